"""How far a run is and how long it has left: a bar in a terminal, a plain line now and then elsewhere."""

import os
import threading
import time

import pytest

FIRST, EVERY, EVERY_IN_CI = 5.0, 10.0, 30.0  # seconds between plain lines


def clock(seconds: float) -> str:
    """
    >>> clock(75.2)
    '1:15'
    >>> clock(3700)
    '1:01:40'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Count:
    """Tests done, in all, and running."""

    def __init__(self, now=time.monotonic):
        self._now = now
        self.started, self.total, self.done, self.failed = now(), 0, 0, 0
        self.running: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.running[name] = self._now()

    def end(self, name: str) -> None:
        self.done += self.running.pop(name, None) is not None

    def text(self) -> str:
        """One line: `37/140 tests, 0:40, about 1:50 left, 1 failed; running decode_metadata (12 s)`."""
        spent = self._now() - self.started
        parts = [f"{self.done}/{self.total or '?'} tests", clock(spent)]
        if self.total and self.done >= max(1, self.total // 20):  # the first few say nothing about the rest
            parts.append(f"about {clock(spent / self.done * (self.total - self.done))} left")
        parts += [f"{self.failed} failed"] if self.failed else []
        line = ", ".join(parts)
        if self.running:
            name, since = min(self.running.items(), key=lambda pair: pair[1])
            line += f"; running {name.split('::')[-1]} ({self._now() - since:.0f} s)"
        return line


class Progress:
    """The pytest plugin; it takes the place of pytest's row of dots."""

    def __init__(self, config):
        self._terminal = config.pluginmanager.get_plugin("terminalreporter")
        self._count = Count()
        self._over = threading.Event()
        self._bar = self._live() if self._terminal.isatty and not os.environ.get("CI") else None
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _live(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(BarColumn(30), TextColumn("{task.description}", markup=False), transient=True,
                       console=Console(file=self._terminal._tw._file))
        self._task = bar.add_task("collecting", total=None)
        bar.start()
        return bar

    def _tick(self) -> None:
        wait = 1.0 if self._bar else FIRST
        while not self._over.wait(wait):
            if self._bar:
                self._show()
            else:
                self._say(f"  {self._count.text()}")
                wait = EVERY_IN_CI if os.environ.get("CI") else EVERY

    def _say(self, line: str) -> None:
        self._terminal.write_line(line)
        self._terminal.flush()  # a pipe would keep it until the end

    def _show(self) -> None:
        count = self._count
        self._bar.update(self._task, total=count.total or None, completed=count.done, description=count.text())

    def pytest_collection_finish(self, session):
        self._count.total = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._count.total = len(ids)

    def pytest_runtest_logstart(self, nodeid):
        self._count.begin(nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        self._count.end(nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._count.failed += 1
            line = f"FAILED {report.nodeid}"
            self._bar.console.print(line, markup=False, highlight=False) if self._bar else self._say(line)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        category, _, _ = yield
        return category, "", ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        session.config.pluginmanager.unregister(self)
        self._over.set()
        self._thread.join()
        if self._bar:
            self._bar.stop()
