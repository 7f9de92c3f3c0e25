"""What a check reports. Each finding has its own exception type per (check, buffer), so Hypothesis tells bugs apart."""

from dataclasses import dataclass, field
from functools import lru_cache

CHECKS = ("states", "inputs", "redzones", "interference", "memory")
MEMORY_RULES = ("read-outside", "write-outside", "read-forbidden", "write-input", "uninitialised", "race", "grid")


@dataclass(frozen=True)
class CheckOptions:
    """Which checks look and which rules the memory tier enforces. Everything is on unless a test turns it off."""

    checks: tuple[str, ...] = CHECKS
    rules: tuple[str, ...] = MEMORY_RULES


@dataclass(frozen=True)
class Difference:
    """One differing cell, for the table under a finding."""

    cell: str
    expected: str
    actual: str
    state: str
    meaning: str


@dataclass(frozen=True)
class Picture:
    """An output around its first wrong cell, as text: what must stand there, what does, and each cell's state.

    `row` and `column` say where the crop starts; `wrong` are the (row, column) of the crop that differ.
    """

    tensor: str
    row: int
    column: int
    expected: tuple[tuple[str, ...], ...]
    actual: tuple[tuple[str, ...], ...]
    state: tuple[tuple[str, ...], ...]
    wrong: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Found:
    """One finding on one case. `check` is a check's name, or `raised`, `fault`, `returned`; `buffer` has no backend.

    `where` is the line of kernel source that a memory finding blames, `file:line`.
    """

    check: str
    buffer: str
    sentence: str
    differences: tuple[Difference, ...] = field(default=())
    step: int = 0
    traceback: str = ""
    wrote: str = ""
    where: str = ""
    picture: Picture | None = None
    alone: bool = True  # comes back in a process that has made no other call

    @property
    def kind(self) -> tuple[str, str]:
        return (self.check, self.buffer)


class Finding(AssertionError):
    """Raised for one finding; its dynamic subclass names the check and the buffer."""

    def __init__(self, found: Found, example=None):
        super().__init__(found.sentence)
        self.found, self.example = found, example


@lru_cache(maxsize=None)
def finding_type(check: str, buffer: str) -> type[Finding]:
    """The exception type of a (check, buffer)."""
    return type(f"{check}:{buffer or 'call'}", (Finding,), {"__module__": __name__})
