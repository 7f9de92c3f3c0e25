"""How far a campaign is: a bar and a table in a terminal, a plain line now and then elsewhere."""

import os
import sys
import time

from harness.fleet.journal import State
from harness.progress import EVERY, EVERY_IN_CI, FIRST, clock
from strategies import coverage
from harness import registry

ROWS = 15  # of transforms that a terminal shows: the last ones of which something was heard


class Live:
    """Told about every answer; prints when it is time."""

    def __init__(self, state: State, out=None):
        self._state, self._out = state, out or sys.stdout
        self._began, self._next = time.monotonic(), time.monotonic() + FIRST
        self._heard: list[tuple[str, str, str]] = []
        self._before = len(state.done)
        self._screen = self._terminal() if self._out.isatty() and not os.environ.get("CI") else None

    def _terminal(self):
        from rich.console import Console
        from rich.live import Live as Screen

        screen = Screen(console=Console(file=self._out), transient=True, auto_refresh=False)
        screen.start()
        return screen

    def heard(self, look: tuple[str, str, str]) -> None:
        """Something became of a task of this transform."""
        self._heard = [look, *(other for other in self._heard if other != look)]

    def tick(self) -> None:
        """Show the state if it is time."""
        if self._screen:
            self._screen.update(self._table(), refresh=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + (EVERY_IN_CI if os.environ.get("CI") else EVERY)
            lines = [f"  {self.text()}", *(f"    {' '.join(self.row(look))}" for look in self._heard)]
            print("\n".join(lines), file=self._out, flush=True)
            self._heard = []

    def text(self) -> str:
        """One line: `37/140 shards, 0:40, about 1:50 left, 8,140 examples, 203 a second, 1 finding`."""
        state, spent = self._state, time.monotonic() - self._began
        done, size = len(state.done), state.plan.size
        parts = [f"{done}/{size or '?'} shards", clock(spent)]
        if size and done - self._before >= max(1, (size - self._before) // 20):
            parts.append(f"about {clock(spent / (done - self._before) * (size - done))} left")
        found = len(state.causes)
        return ", ".join([*parts, f"{state.tried:,} examples", f"{found} finding{'' if found == 1 else 's'}"])

    def row(self, look: tuple[str, str, str]) -> list[str]:
        """A transform: examples, findings, cells of the coverage matrix."""
        so_far = self._state.looks[look]
        subject, transform, lane = look
        wanted = {": ".join(cell) for cell in coverage.cells(registry.contracts()[transform])}
        name = transform if lane == "inside" else f"{transform} {lane}"
        return [f"{os.path.basename(subject).removesuffix('.py')} {name}:", f"{so_far.tried:,} examples,",
                f"{len(so_far.causes)} findings,", f"{len(so_far.cells & wanted)}/{len(wanted)} cells"]

    def _table(self):
        from rich.table import Table

        table = Table(box=None, show_header=False, title=self.text(), title_justify="left", pad_edge=False)
        for look in self._heard[:ROWS]:
            table.add_row(*self.row(look))
        return table

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._screen:
            self._screen.stop()
