"""An example database that holds failing examples only, and loses none that was merely looked past."""

from hypothesis.database import ExampleDatabase


class Kept(ExampleDatabase):
    """What a campaign lets Hypothesis do to a database.

    Hypothesis deletes an example that did not fail again; one of a finding that was reported already, or that another shard
    has, raises nothing when it is replayed. It saves an example that ends the search, which a spent budget does, and those
    that are best at what `target()` asks for.
    """

    def __init__(self, inner: ExampleDatabase, campaign):
        super().__init__()
        self._inner, self._campaign = inner, campaign

    def fetch(self, key: bytes):
        return self._inner.fetch(key)

    def save(self, key: bytes, value: bytes) -> None:
        if self._campaign.last == "failed":
            self._inner.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        if self._campaign.last == "passed":
            self._inner.delete(key, value)

    def move(self, src: bytes, dest: bytes, value: bytes) -> None:
        self._inner.move(src, dest, value)
