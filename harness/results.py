"""A finding as plain data: what a test process tells the one that reports, and what `findings.json` holds."""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from harness.campaign import Report
from harness.client import shown_path


@dataclass
class Result:
    """One finding of one test. Paths are relative to the root where they lie under it."""

    subject: str
    transform: str
    label: str
    sentence: str
    case: str
    check: str
    buffer: str
    path: str
    layout: str = ""
    variant: str = ""
    where: str = ""
    differences: list[list[str]] = field(default_factory=list)  # cell, expected, actual, state, meaning
    picture: dict | None = None
    traceback: str = ""
    shrunk: bool = True  # False: a fixed case, as it was given
    found_with: list[str] = field(default_factory=list)  # options of the run that a replay needs as well
    test: str = ""
    also: list[str] = field(default_factory=list)  # other tests that met the same root cause

    @property
    def cause(self) -> tuple[str, ...]:
        """Findings with the same cause are one bug: the same line of the kernel, or else the same check on the same tensor."""
        return (self.subject, self.transform, self.check, self.where or self.buffer)

    @property
    def replay(self) -> str:
        """What `ci/replay` is given."""
        return " ".join([self.path, *map(shlex.quote, self.found_with)])

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Result":
        return cls(**json.loads(text))


def of(subject: str, transform: str, rules: Mapping[str, str], report: Report, shrunk: bool = True) -> Result:
    """What a campaign or a replay found, as plain data."""
    found, example = report.found, report.example
    label = f"INTERMITTENT {report.intermittent}" if report.intermittent else "DEFECT"
    if found.check == "unchecked":
        label = f"UNCHECKED PRECONDITION ({found.buffer})"
    return Result(
        subject, transform, label, found.sentence, repr(example.steps[0] if len(example.steps) == 1 else list(example.steps)),
        found.check, found.buffer, shown_path(report.path),
        layout="" if repr(example.layout) == "default" else repr(example.layout),
        variant=", ".join(f"{k}={v}" for k, v in rules.items()), where=found.where,
        differences=[[d.cell, d.expected, d.actual, d.state, d.meaning] for d in found.differences],
        picture=asdict(found.picture) if found.picture else None, traceback=found.traceback, shrunk=shrunk,
    )


def for_replay(options) -> list[str]:
    """The options of a run or a replay without which the subject is not found again."""
    python = [] if options.subject_python == sys.executable else ["--subject-python", options.subject_python]
    return [*python, *(word for path in options.subject_path for word in ("--subject-path", path))]


def bucketed(results: Sequence[Result]) -> list[Result]:
    """One result per root cause, the shortest case of each, with the names of the other tests that met it."""
    causes: dict[tuple, list[Result]] = {}
    for result in results:
        causes.setdefault(result.cause, []).append(result)
    buckets = []
    for same in causes.values():
        first = min(same, key=lambda r: len(r.case))
        first.also = sorted({r.test for r in same} - {first.test})
        buckets.append(first)
    return sorted(buckets, key=lambda r: (not red(r), r.subject, r.transform, r.check))


def red(result: Result) -> bool:
    return result.label.startswith(("DEFECT", "INTERMITTENT"))


def plain(text: str) -> str:
    """Text without terminal colours and control characters."""
    return re.sub(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b-\x1f]", "", text)
