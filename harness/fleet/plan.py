"""What a campaign has to do: tasks as plain data, the same on every engine and after every interruption."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness.campaign import PROFILES

SHARD_EXAMPLES = 200  # some seconds of work: what a lost process costs, against a few milliseconds to hand it out
REPLAY_SHARE = 5  # an example of the lane `replays` is several calls


@dataclass(frozen=True, order=True)
class Task:
    """One shard: the examples that one seed of Hypothesis draws for one transform of one subject."""

    shard: int
    subject: str
    transform: str
    lane: str  # inside, replays
    profile: str

    @property
    def name(self) -> str:
        lane = "" if self.lane == "inside" else f" {self.lane}"
        return f"{Path(self.subject).stem} {self.transform}{lane} #{self.shard}"

    @property
    def key(self) -> str:
        """The task in one word, whatever else is called like its subject."""
        return f"{self.subject}|{self.transform}|{self.lane}|{self.shard}"


@dataclass(frozen=True)
class Plan:
    """What a campaign was asked for. `looks` are (subject, transform, lane); `shards` 0 goes on until a budget ends it.

    `gpus` is the share of a GPU that one process takes; 0 on a CPU, where it takes a core.
    """

    looks: tuple[tuple[str, str, str], ...]
    profile: str
    shards: int
    examples: int  # in each shard: counted ones, as a gate counts
    seed: int
    part: tuple[int, int] = (0, 1)  # every part[1]-th task, from part[0] on
    device: str = "cpu"
    gpus: float = 0.0
    python: str = ""
    paths: tuple[str, ...] = ()
    variants: tuple[tuple[str, str, str], ...] = ()
    target: bool = False
    redis: str = ""
    read_only: bool = False
    database: str = ""
    engine: str = "ray"
    run_limit: float = 20.0

    def tasks(self) -> Iterator[Task]:
        """Every transform once before any has its second shard."""
        every = (Task(shard, *look, self.profile)
                 for shard in (range(self.shards) if self.shards else itertools.count()) for look in self.looks)
        return itertools.islice(every, self.part[0], None, self.part[1])

    @property
    def size(self) -> int:
        """How many tasks; 0 where there is no end."""
        return len(range(self.part[0], self.shards * len(self.looks), self.part[1]))

    def dump(self) -> dict:
        return asdict(self)

    @classmethod
    def load(cls, values: dict) -> "Plan":
        tuples = {f.name for f in fields(cls) if str(f.type).startswith("tuple")}
        return cls(**{k: _tuples(v) if k in tuples else v for k, v in values.items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def sharded(profile: str, examples: int = 0) -> tuple[int, int]:
    """How many shards a profile's budget makes, and how many examples each has.

    >>> sharded("quick"), sharded("nightly"), sharded("nightly", 1000)
    ((1, 60), (20, 200), (4, 1000))
    """
    counted = PROFILES[profile].counted
    shards = -(-counted // (examples or SHARD_EXAMPLES))
    return shards, examples or -(-counted // shards)
