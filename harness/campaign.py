"""A differential campaign: one contract of one subject against its oracle, until the budget is spent or bugs are found."""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from harness import casefile
from harness.client import ROOT
from harness.contract import Contract
from harness.differential import Example, check, harm
from harness.findings import CheckOptions, Finding, Found, finding_type
from harness.generation import Enough, fresh_examples, shrinking_for
from harness.kept import Kept

CONFIRM, RERUNS = 4, 20
STARTED = time.time()
MOST_KINDS = 6
PATIENCE = 10  # times as many examples are drawn for a subject that declines some: drawing is cheap beside running
DATABASE = ROOT / ".hypothesis" / "examples"


@dataclass(frozen=True)
class Profile:
    """How much a campaign tries. `counted` examples are distinct, supported, and have at least 2 requests.

    `later_seconds` bounds each round that looks past the bugs found so far, and `shrink_seconds` the shrinking: a hang or a
    crash makes examples dear.
    """

    name: str
    counted: int
    derandomize: bool
    database: bool = False
    later_seconds: float = 8.0
    shrink: bool = True
    shrink_seconds: float = 60.0

    @property
    def most(self) -> int:
        return 2 * self.counted + 40


PROFILES = {
    "quick": Profile("quick", 60, derandomize=True, later_seconds=4.0),
    "gate": Profile("gate", 220, derandomize=True),
    "dev": Profile("dev", 100, derandomize=False, database=True),
    "nightly": Profile("nightly", 4000, derandomize=False, database=True, later_seconds=120.0, shrink_seconds=300.0),
}


@dataclass
class Report:
    """One bug: the finding on its shrunk example, and the case file that replays it."""

    found: Found
    example: Example
    path: Path
    intermittent: str = ""


@dataclass
class Outcome:
    """What a campaign did and found."""

    counted: int = 0
    degenerate: int = 0
    unsupported: int = 0
    seconds: float = 0.0
    reports: list[Report] = field(default_factory=list)
    also: set[tuple[str, str]] = field(default_factory=set)

    @property
    def verdict(self) -> str:
        if not self.reports:
            return "PASS"
        return "DEFECT" if any(not r.intermittent for r in self.reports) else "INTERMITTENT"


class _Abort(BaseException):
    """Carries an error of the suite past Hypothesis, which would try to shrink it."""


class Campaign:
    """Searches, shrinks and reports. Each round looks past the kinds of bug that earlier rounds reported."""

    def __init__(self, contract: Contract, worker, rules: Mapping[str, str], strategy: SearchStrategy[Example],
                 profile: Profile, options: CheckOptions = CheckOptions(), folder: Path = ROOT / "failures",
                 lane: str = "inside"):
        self.contract, self.worker, self.rules, self.strategy = contract, worker, rules, strategy
        self.profile, self.options, self.folder, self.lane = profile, options, folder, lane
        self.outcome = Outcome()
        self.last = ""  # what became of the last example: passed, failed, or looked past
        self._seen: set[str] = set()
        self._known: set[tuple[str, str]] = set()
        self._failed: tuple[Example, Found] | None = None
        self._inflight = casefile.Note(folder / f"inflight-{os.getpid()}.json")

    def run(self) -> Outcome:
        """Everything there is to find within the budget.

        Raises:
            InfraError: the worker could not be started or answered nonsense.
        """
        started = time.monotonic()
        self.worker.limits.hung = False  # what another transform did says nothing of this one
        try:
            for _ in range(MOST_KINDS):
                fresh = self._round()
                self.outcome.reports += fresh
                self._known |= {r.found.kind for r in fresh}
                if not fresh:
                    break
        finally:
            self._inflight.remove()
            self.outcome.seconds = time.monotonic() - started
        self.outcome.also -= self._known
        return self.outcome

    def _round(self) -> list[Report]:
        self._failed = None
        self._deadline = time.monotonic() + self.profile.later_seconds if self._known else float("inf")
        try:
            with fresh_examples(), shrinking_for(self.profile.shrink_seconds):
                self._search()
        except _Abort as abort:
            raise abort.args[0] from None
        except Enough:
            return []
        except Flaky:
            return [self._confirmed(*self._failed)]
        except Finding as finding:
            return [self._confirmed(finding.example, finding.found)]
        except BaseExceptionGroup as group:
            findings, rest = group.split(Finding)
            if rest is not None:
                raise rest from None
            return [self._confirmed(f.example, f.found) for f in _leaves(findings)]
        return []

    def _search(self) -> None:
        def one(example: Example) -> None:
            self._try(example)

        name = re.sub(r"\W", "_", f"{Path(self.worker.options.subject).stem}_{self.contract.name}")
        one.__name__ = f"check_{name}"
        test = self._seeded(given(example=self.strategy)(one))
        # Hypothesis' own key is made of the source of `one`, which is the same for every transform.
        test._hypothesis_internal_database_key = f"plumbline/{name}/{self.lane}".encode()
        self._settings()(test)()

    def _seeded(self, test):
        """A hook: the test with a seed of its own."""
        return test

    def _settings(self) -> settings:
        database = self._database()
        reuse = [] if self._known else [Phase.reuse]
        shrink = [Phase.shrink] if self.profile.shrink else []
        return settings(
            max_examples=self.profile.most * self._patience(), derandomize=self.profile.derandomize, deadline=None,
            phases=(Phase.explicit, *reuse, Phase.generate, *shrink), database=database and Kept(database, self),
            verbosity=Verbosity.quiet, suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=True,
        )

    def _patience(self) -> int:
        return PATIENCE if self._selective() else 1

    def _database(self) -> ExampleDatabase | None:
        return DirectoryBasedExampleDatabase(DATABASE) if self.profile.database else None

    def _try(self, example: Example) -> None:
        """Run one example and raise its first finding that was not reported yet."""
        self.last = ""
        spent = self.outcome.counted >= self.profile.counted and not self._known
        if self._failed is None and (spent or time.monotonic() > self._deadline):
            raise Enough
        try:
            example, found = self._judge(example)
        except Exception as error:  # the suite's own fault: Hypothesis must not shrink it
            raise _Abort(error) from error
        fresh = self._fresh(found, example)
        self.last = "failed" if fresh else "looked past" if found else "passed"
        self.outcome.also |= {f.kind for f in fresh}
        if fresh:
            self._failed = (example, fresh[0])
            raise finding_type(*fresh[0].kind)(fresh[0], example)

    def _fresh(self, found: list[Found], example: Example) -> list[Found]:
        """The findings that this campaign has to report and did not yet."""
        return [f for f in found if f.kind not in self._known]

    def _judge(self, example: Example) -> tuple[Example, list[Found]]:
        """What is wrong on one example, if the subject takes it."""
        fresh = self._first_time(example)
        if self._refusal(example):
            self.outcome.unsupported += fresh
            return example, []
        self._count(example, fresh)
        return example, self._check(example, self.options)

    def _check(self, example: Example, options: CheckOptions) -> list[Found]:
        self._inflight.write(self._document(example, None))
        return check(example, self.worker, self.rules, options)

    def _first_time(self, example: Example) -> bool:
        key = repr((example.steps, example.layout, example.seed))
        fresh = key not in self._seen
        self._seen.add(key)
        return fresh

    def _refusal(self, example: Example) -> str:
        """Why the subject says that it does not take an example, or ''."""
        if not self._selective():
            return ""
        answers = self.worker.supports(self.contract.family, casefile.encode_calls(example))
        return next((a for a in answers if a), "")

    def _selective(self) -> bool:
        return self.worker.describe[self.contract.name]["selective"]

    def _count(self, example: Example, fresh: bool) -> None:
        if fresh and not self._known:
            if max(case.batch_size() for case in example.steps) >= 2:
                self.outcome.counted += 1
            else:
                self.outcome.degenerate += 1

    def _document(self, example: Example, found: Found | None) -> dict:
        return casefile.document(example, self.rules, self.worker.options.subject, self.worker.versions, found)

    def _confirmed(self, example: Example, found: Found) -> Report:
        """Write the case file; a finding that does not come back every time is rerun and reported as k of N. A hang gets all
        the time that there is once more: shrinking gave it little."""
        self.worker.limits.hung = False
        hits = sum(self._again(example, found) for _ in range(1 if found.check == "fault" else CONFIRM))
        intermittent = ""
        if hits < (1 if found.check == "fault" else CONFIRM):
            intermittent = f"{sum(self._again(example, found) for _ in range(RERUNS))}/{RERUNS}"
        elif found.check != "fault" and not self._comes_back_alone(example, found):
            found = replace(found, alone=False, sentence=f"{found.sentence}; only after earlier calls in the same process")
        content = self._document(example, found)
        return Report(found, example, self._saved(content), intermittent)

    def _saved(self, content: dict) -> Path:
        return casefile.write(case_path(self.folder, content), content)

    def _comes_back_alone(self, example: Example, found: Found) -> bool:
        """Whether the case alone is enough, as its replay takes for granted: a subject may keep something between calls."""
        self.worker.restart_child()
        return self._again(example, found)

    def _again(self, example: Example, found: Found) -> bool:
        return any(f.kind == found.kind for f in self._judge(example)[1])


class OutsideCampaign(Campaign):
    """Looks outside the contract: broken preconditions, and examples that the subject says it does not take."""

    def _patience(self) -> int:
        return 1

    def _judge(self, example: Example) -> tuple[Example, list[Found]]:
        fresh = self._first_time(example)
        declined = self._refusal(example)
        reason = example.outside or declined
        if not reason or (example.outside and declined):
            return example, []
        self._count(example, fresh)
        self._inflight.write(self._document(example, None))
        return replace(example, outside=reason), harm(example, reason, self.worker, self.rules)


def case_path(folder: Path, content: dict) -> Path:
    """Where a failing case is written, whatever folder the subject is in: after its name alone, unless another subject of that
    name has written there in this run."""
    def path(subject: str) -> Path:
        digest = hashlib.sha256(f"{content['digest']} {subject}".encode()).hexdigest()
        return folder / f"{content['contract']}-{digest[:8]}.json"

    short = path(Path(content["subject"]).stem)
    return path(content["subject"]) if _taken(short, content["subject"]) else short


def _taken(path: Path, subject: str) -> bool:
    try:
        return path.stat().st_mtime >= STARTED and json.loads(path.read_text(encoding="utf-8"))["subject"] != subject
    except FileNotFoundError:
        return False


def _leaves(group: BaseExceptionGroup) -> list[Finding]:
    found = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found

