"""The pytest plugin that hears every test process: the verdict table at the end, and the reports."""

import os
import time
from pathlib import Path

import pytest

from harness import rendering, report
from harness.lanes import FoundWrong
from harness.report import Run
from harness.results import Result, bucketed, for_replay, red
from harness.verdicts import Row, exit_code, merged

SLOWEST = 15


def attach(item, call, outcome) -> None:
    """Give a test's findings to its report, in the process that ran it."""
    if call.excinfo is not None and isinstance(call.excinfo.value, FoundWrong):
        outcome.user_properties += [("finding", result.dump()) for result in call.excinfo.value.results]


class Reporting:
    """Collects what the tests found; lives in the process that the user started."""

    def __init__(self, config, header: list[str]):
        self.config, self.run = config, Run(header, [])
        self._started, self._options = time.monotonic(), for_replay(config.option)
        self._seconds: dict[str, float] = {}
        self._found: list[tuple[object, list[Result]]] = []

    def pytest_collection_finish(self, session):
        self.run.collected = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.run.collected = len(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report):
        """Take our own properties out: junit.xml is for other tools' eyes."""
        ours = [p for p in report.user_properties if p[0] in ("verdict", "finding")]
        report.user_properties = [p for p in report.user_properties if p not in ours]
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        self.run.ran += report.when == "teardown"
        if report.failed and isinstance(report.longrepr, str):
            report.__dict__.pop("node", None)  # which of xdist's processes said it is not above the fold
        if report.when != "call":
            return
        self.run.rows += [Row.load(value) for name, value in ours if name == "verdict"]
        results = [Result.load(value) for name, value in ours if name == "finding"]
        for result in results:
            result.test, result.found_with = report.nodeid, self._options
        self.run.results += results
        self.run.rows += [Row(r.subject, r.transform, "found", r.label.split()[0]) for r in results if red(r)]
        if results and report.failed:
            self._found.append((report, results))

    def pytest_keyboard_interrupt(self, excinfo):
        self.run.interrupted = True

    def pytest_sessionfinish(self, session, exitstatus):
        """An error of use or of the suite is exit 2; a root cause is shown in full once, on a shrunk case if one met it."""
        if self.run.rows and exit_code(self.run.rows) == 2 and exitstatus in (0, 1):
            session.exitstatus = 2
        shown: dict[tuple, Result] = {}
        for r in sorted((r for _, results in self._found for r in results), key=lambda r: not r.shrunk):
            shown.setdefault(r.cause, r)
        for failure, results in self._found:
            texts = []
            for r in sorted(results, key=lambda r: r is not shown[r.cause]):
                full = shown[r.cause]
                texts.append(rendering.finding(r) if r is full else
                             rendering.repeated(r, "above" if full.test == r.test else f"in {full.test}"))
            failure.longrepr = "\n\n".join(texts)  # text alone: no name of an exception in the short summary
            failure.__dict__.pop("node", None)  # which of xdist's processes ran it is not above the fold

    def pytest_terminal_summary(self, terminalreporter):
        self.run.seconds = time.monotonic() - self._started
        self.run.slowest = sorted(self._seconds.items(), key=lambda pair: -pair[1])[:SLOWEST]
        if self.run.rows:
            for line in table(self.run.rows):
                terminalreporter.write_line(line)
        if not (self.run.rows or self.run.interrupted):
            return
        folder: Path | None = self.config.option.report
        if folder:
            said = report.write(folder, self.run) + [f"report: {folder}"]
            terminalreporter.write_line("\n".join(["", *said]))
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for line in report.annotations(bucketed(self.run.results)):
                terminalreporter.write_line(line)


def table(rows: list[Row]) -> list[str]:
    """The verdict table as text, and the notes under it."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for column, justify in (("subject", "left"), ("transform", "left"), ("examples", "right"), ("degenerate", "right"),
                            ("unsupported", "right"), ("checks", "left"), ("seconds", "right"), ("verdict", "left")):
        shown.add_column(column, justify=justify, no_wrap=True)
    for r in merged(rows):
        label = "eager (oracle cross-check)" if r.subject == "eager" else Path(r.subject).stem
        shown.add_row(label, r.transform, str(r.counted), str(r.degenerate), str(r.unsupported), r.checks,
                      f"{r.seconds:.1f}", r.verdict)
    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    lines = ["", *(line.rstrip() for line in capture.get().splitlines())]
    return lines + [f"  {Path(r.subject).stem} {r.transform}: {note}" for r in merged(rows) for note in r.notes]
