"""What the shards of a campaign tell each other: failing examples, and which root cause is whose to shrink.

Both lie in Redis. Where it does not answer a shard goes on with the database of its own machine and shrinks what it finds
itself; that is written down, what was to be told is kept, and the next shard that reaches Redis tells it.
"""

import hashlib
import sys
import time
from collections import deque
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase, MultiplexedDatabase, ReadOnlyDatabase

from harness.client import UsageError, shown_path

NEEDS_REDIS = f"--redis: its client is not here: {shown_path(sys.executable)} -m pip install 'redis>=5' (the extra 'fleet')"
LEASE = 900  # seconds to shrink and confirm one finding; a night allows 300 for the shrinking
REMEMBERED = 8 * 24 * 3600  # seconds; as long as Hypothesis keeps examples there
PAUSE = 2.0  # seconds between attempts to reach a Redis that is away
ANSWER = 2.0  # seconds to wait for one
MOST_KEPT = 10_000  # operations to be told later
Cause = tuple[str, ...]


class Alone:
    """A shard without Redis: it shrinks what it finds, and the merged report tells the same causes apart."""

    def __init__(self, local: Path):
        self.database: ExampleDatabase = DirectoryBasedExampleDatabase(local)

    def claim(self, cause: Cause, holder: str) -> bool:
        return True

    def settle(self, cause: Cause, holder: str) -> None:
        """Nobody to tell."""

    def release(self, cause: Cause) -> None:
        """Nobody to tell."""

    def news(self) -> list[str]:
        return []


class Shared:
    """A shard with Redis. With `read_only` it tries what others found and tells them nothing, as a pull request must."""

    def __init__(self, url: str, campaign: str, local: Path, read_only: bool = False):
        self._redis, self._campaign, self._read_only = connect(url), campaign, read_only
        self._lost = self._retry_at = 0.0
        self._why, self._news = "", []
        self._kept: deque = deque(maxlen=MOST_KEPT)
        from hypothesis.extra.redis import RedisExampleDatabase

        fleet: ExampleDatabase = Tolerant(RedisExampleDatabase(self._redis), self)
        self.database: ExampleDatabase = MultiplexedDatabase(DirectoryBasedExampleDatabase(local),
                                                             ReadOnlyDatabase(fleet) if read_only else fleet)

    def claim(self, cause: Cause, holder: str) -> bool:
        """Whether this shard is the one to shrink a root cause: the first, or again itself (its process died, or the driver
        before it wrote down what came of it), or after a lease ran out."""
        if self._read_only:
            return True
        key = self._key(cause)
        if self.ask(lambda: self._redis.set(key, holder, nx=True, ex=LEASE), True):
            return True
        return self.ask(lambda: self._redis.get(key), holder.encode()) in (holder.encode(), saved(holder))

    def settle(self, cause: Cause, holder: str) -> None:
        """A root cause is shrunk and saved: nobody has to do it again in this campaign."""
        if not self._read_only:
            self.tell(lambda: self._redis.set(self._key(cause), saved(holder), ex=REMEMBERED))

    def release(self, cause: Cause) -> None:
        """A root cause that was claimed, met only beside another, and not reported: the next shard may."""
        if not self._read_only:
            self.tell(lambda: self._redis.delete(self._key(cause)))

    def news(self) -> list[str]:
        """What there was to complain about since the last call."""
        news, self._news = self._news, []
        if self._lost:
            news.append(f"Redis has not answered for {time.monotonic() - self._lost:.0f} s ({self._why}): the shard went on "
                        "with the local database")
        return news

    def _key(self, cause: Cause) -> str:
        return f"plumbline:{self._campaign}:{hashlib.sha256(repr(cause).encode()).hexdigest()[:24]}"

    # -- a Redis that may be away --------------------------------------------------------------------------------------

    def ask(self, question, otherwise):
        """The answer of Redis, or `otherwise` while it is away."""
        from redis.exceptions import RedisError

        if time.monotonic() < self._retry_at:
            return otherwise
        try:
            while self._kept:
                self._kept[0]()
                self._kept.popleft()
            answer = question()
        except (RedisError, OSError) as error:
            self._retry_at = time.monotonic() + PAUSE
            self._lost, self._why = self._lost or time.monotonic(), str(error).strip() or type(error).__name__
            return otherwise
        if self._lost:
            self._news.append(f"Redis did not answer for {time.monotonic() - self._lost:.0f} s ({self._why}), and is back")
            self._lost = self._retry_at = 0.0
        return answer

    def tell(self, message) -> None:
        """Tell Redis now, or when it is back."""
        absent = object()
        if self.ask(message, absent) is absent:
            self._kept.append(message)


class Tolerant(ExampleDatabase):
    """An example database in Redis that is empty while Redis is away, and is told later what it missed."""

    def __init__(self, inner: ExampleDatabase, shared: Shared):
        super().__init__()
        self._inner, self._shared = inner, shared

    def fetch(self, key: bytes):
        return self._shared.ask(lambda: list(self._inner.fetch(key)), [])

    def save(self, key: bytes, value: bytes) -> None:
        self._shared.tell(lambda: self._inner.save(key, value))

    def delete(self, key: bytes, value: bytes) -> None:
        self._shared.tell(lambda: self._inner.delete(key, value))

    def move(self, src: bytes, dest: bytes, value: bytes) -> None:
        self._shared.tell(lambda: self._inner.move(src, dest, value))


def saved(holder: str) -> bytes:
    """What stands in the place of a lease when the case is saved."""
    return f"saved by {holder}".encode()


def connect(url: str):
    """A client for a URL.

    Raises:
        UsageError: the package is not installed, or the URL is none.
    """
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise UsageError(NEEDS_REDIS) from None
    try:
        return Redis.from_url(url, socket_timeout=ANSWER, socket_connect_timeout=ANSWER, retry=Retry(NoBackoff(), 0))
    except ValueError as error:
        raise UsageError(f"--redis {url}: {error}") from None


def reachable(url: str) -> None:
    """Raises:
    UsageError: nothing answers at the URL now. Later it may come and go.
    """
    client = connect(url)
    from redis.exceptions import RedisError

    try:
        client.ping()
    except (RedisError, OSError) as error:
        raise UsageError(f"--redis {url}: no answer ({error}); start one with redis-server, or leave --redis out") from None
    finally:
        client.close()
