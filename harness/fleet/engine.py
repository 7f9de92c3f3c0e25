"""What an engine does, whichever it is: it asks for tasks as long as there are some, and says what became of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from harness.fleet.plan import Task


@dataclass(frozen=True)
class Answer:
    """What became of a task: what it did (`shard.Line` as values), or why it did not, with the case that was in hand."""

    task: Task
    line: dict | None
    died: str = ""
    case: dict | None = None


@dataclass(frozen=True)
class Order:
    """A task, and how many seconds are left for it."""

    task: Task
    seconds: float


class Engine(Protocol):
    """Processes to run tasks on. The journal is the driver's: an engine keeps nothing."""

    def run(self, next_order: Callable[[], Order | None]) -> Iterator[Answer | None]:
        """Run orders until there are none and none is in flight. None between answers is a moment to look at the clock."""
        ...

    def hurry(self) -> None:
        """A budget is spent, or somebody wants to go home: there will be no more orders."""
        ...

    def close(self) -> None:
        """End the processes; what is in flight is lost."""
        ...


def answered(task: Task, reply: dict) -> Answer:
    """A runner's reply (`shard.Runner.run`) as an answer."""
    if "error" in reply:
        return Answer(task, None, reply["error"], reply["case"])
    return Answer(task, reply)
