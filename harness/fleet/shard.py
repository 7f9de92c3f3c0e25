"""One task: a campaign with a seed of its own that knows of the other shards, and what it leaves behind as plain data."""

import base64
import hashlib
import json
import os
import shutil
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import hypothesis
from hypothesis import Phase, settings
from hypothesis.database import ExampleDatabase
from hypothesis.strategies import SearchStrategy

from harness import casefile, devices, lanes, registry, results
from harness.campaign import PROFILES, Campaign, Report
from harness.client import InfraError, UsageError, Worker, WorkerOptions
from harness.differential import Example
from harness.findings import Found
from harness.fleet.aim import aims
from harness.fleet.memory import Alone, Cause, Shared
from harness.fleet.plan import REPLAY_SHARE, Plan, Task
from harness.generation import Enough
from strategies import coverage, domain, sessions

LATER_SECONDS = 8.0
KINDS = ("counted", "degenerate", "unsupported")


def digest(example: Example) -> bytes:
    """Tells an example from all others that any shard tries: 8 bytes."""
    return hashlib.sha256(repr((example.steps, example.layout, example.seed)).encode()).digest()[:8]


def case_name(content: dict) -> str:
    """The file of a case: two subjects may fail on the same one."""
    return f"{Path(content['subject']).stem}-{content['contract']}-{content['digest'][:8]}.json"


@dataclass
class Line:
    """What a task did, one line of the journal. A partial one ran out of time: its task is run again, and what it tried is
    counted once. `seconds` are busy seconds of its core or share of a GPU; `first` is how many examples the first finding
    took; `cells` are those of the coverage matrix; `results` are shrunk and confirmed, `met` is what another shard had taken to
    shrink, as it was met; `cases` holds the files of both by their paths under the campaign's `cases`."""

    task: dict
    seconds: float = 0.0
    partial: bool = False
    tried: dict[str, str] = field(default_factory=dict)  # kind -> digests of distinct examples, base64
    cells: list[str] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    met: list[dict] = field(default_factory=list)
    cases: dict[str, dict] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)
    first: int = 0
    checks: str = ""
    news: list[str] = field(default_factory=list)
    at: float = 0.0  # when it was known, in seconds of the Unix clock


def strategy(task: Task) -> SearchStrategy[Example]:
    """What a task draws from."""
    contract = registry.contracts()[task.transform]
    return sessions.replays(contract) if task.lane == "replays" else domain.of(contract)


def seed(plan: Plan, task: Task) -> int:
    """The shard's seed: the same on every machine and after every interruption."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}|{task.key}".encode()).digest()[:8])


class Shard(Campaign):
    """A campaign that draws from its seed, shrinks what nobody else does, and remembers what it tried."""

    def __init__(self, plan: Plan, task: Task, worker, memory, folder: Path, until: float):
        contract = registry.contracts()[task.transform]
        chosen = dict(worker.describe[task.transform]["variant"])
        chosen |= {key: choice for name, key, choice in plan.variants if name == task.transform}
        counted = plan.examples if task.lane == "inside" else max(plan.examples // REPLAY_SHARE, 1)
        profile = PROFILES[task.profile]
        # Shards that find nothing of their own look past what is known with all of their budget; this one need not.
        profile = replace(profile, counted=counted, derandomize=False, later_seconds=min(profile.later_seconds, LATER_SECONDS))
        super().__init__(contract, worker, contract.rules(chosen), strategy(task), profile, folder=folder, lane=task.lane)
        self.tried: dict[str, bytearray] = {kind: bytearray() for kind in KINDS}
        self.cells: set = set()
        self.met: list[Report] = []
        self.first, self.partial = 0, False
        self._task, self._memory, self._until, self._aim, self._seed = task, memory, until, plan.target, seed(plan, task)
        self._hand: Example | None = None
        self._mine: set[Cause] = set()
        self._others: set[Cause] = set()

    # -- what Hypothesis is told ---------------------------------------------------------------------------------------

    def _seeded(self, test):
        return hypothesis.seed(self._seed)(test)

    def _settings(self) -> settings:
        plain = super()._settings()
        if not self._aim:
            return plain
        # Hypothesis begins to climb at half of max_examples, which is where an ordinary shard ends.
        return settings(plain, phases=(*plain.phases, Phase.target), max_examples=self.profile.counted)

    def _database(self) -> ExampleDatabase:
        return self._memory.database

    # -- an example ----------------------------------------------------------------------------------------------------

    def _try(self, example: Example) -> None:
        if self._failed is None and time.monotonic() > self._until:
            self.partial, self.last = True, ""
            raise Enough
        if self._aim:
            for label, value in aims(example).items():
                hypothesis.target(value, label=label)
        super()._try(example)

    def _judge(self, example: Example) -> tuple[Example, list[Found]]:
        self._hand = example
        before = [getattr(self.outcome, kind) for kind in KINDS]
        answer = super()._judge(example)
        for kind, was in zip(KINDS, before):
            if getattr(self.outcome, kind) > was:
                self.tried[kind] += digest(example)
                self.cells |= coverage.of(example)
        return answer

    def _fresh(self, found: list[Found], example: Example) -> list[Found]:
        if found and not self.first:
            self.first = sum(map(len, self.tried.values())) // 8
        return [f for f in super()._fresh(found, example) if self._to_report(f, example)]

    def _to_report(self, found: Found, example: Example) -> bool:
        """Whether a finding is this shard's to shrink. One that is not is kept as it is, once: whoever has it may die."""
        cause = self._cause(found)
        if cause in self._mine or cause in self._others:
            return cause in self._mine
        if self._memory.claim(cause, self._task.key):
            self._mine.add(cause)
            return True
        self._others.add(cause)
        self.met.append(Report(found, example, self._saved(self._document(example, found))))
        return False

    def _cause(self, found: Found) -> Cause:
        return (self._task.subject, self._task.transform, found.check, found.where or found.buffer)

    def _confirmed(self, example: Example, found: Found) -> Report:
        report = super()._confirmed(example, found)
        self._memory.settle(self._cause(report.found), self._task.key)
        return report

    def _saved(self, content: dict) -> Path:
        return casefile.write(self.folder / case_name(content), content)

    def line(self) -> Line:
        """Run the campaign and say what came of it.

        Raises:
            InfraError: the worker could not be started or answered nonsense.
        """
        try:
            outcome = self.run()
        finally:
            for cause in self._mine - {self._cause(r.found) for r in self.outcome.reports}:
                self._memory.release(cause)
        reported, met = self._results(outcome.reports), self._results(self.met)
        cases = {r.path.name: r.path for r in outcome.reports} | {f"met/{r.path.name}": r.path for r in self.met}
        return Line(
            asdict(self._task), outcome.seconds, self.partial,
            {kind: base64.b64encode(tried).decode() for kind, tried in self.tried.items()},
            sorted(": ".join(cell) for cell in self.cells & coverage.cells(self.contract)), reported, met,
            {name: json.loads(path.read_text()) for name, path in cases.items()},
            [f"{check} ({buffer})" for check, buffer in sorted(outcome.also)], self.first,
            lanes.checks(self.contract, self.worker.tier), self._memory.news(),
        )

    def _results(self, reports: list[Report]) -> list[dict]:
        task = self._task
        return [{**asdict(results.of(task.subject, task.transform, self.rules, r)), "test": task.name} for r in reports]

    def in_hand(self) -> dict | None:
        """The case that was being tried when something went wrong."""
        return self._document(self._hand, None) if self._hand else None


class Runner:
    """Runs one task after another, with a worker for each subject; one in each process."""

    def __init__(self, plan: dict, campaign: str, folder: str, number: int = 0, workers: dict[str, Worker] | None = None):
        self._plan, self._folder, self._number = Plan.load(plan), Path(folder), number
        self.workers = {} if workers is None else workers
        local = Path(self._plan.database)
        self._memory = (Shared(self._plan.redis, campaign, local, self._plan.read_only) if self._plan.redis else Alone(local))

    def run(self, task: dict, seconds: float = float("inf")) -> dict:
        """What a task did (see `Line`), or {"error": why the suite could not do it}. It may take so many seconds more."""
        told, shard = Task(**task), None
        folder = work(self._folder, told) / str(os.getpid())
        try:
            worker = self._worker(told.subject)
            shard = Shard(self._plan, told, worker, self._memory, folder, time.monotonic() + seconds)
            return asdict(shard.line())
        except (InfraError, UsageError) as error:
            self.close(told.subject)
            return {"error": str(error), "case": shard and shard.in_hand()}
        except Exception:  # the suite's own fault: the campaign goes on, and says so
            return {"error": traceback.format_exc(), "case": shard and shard.in_hand()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self, subject: str) -> None:
        """End a subject's worker; the next task starts another."""
        if subject in self.workers:
            self.workers.pop(subject).close()

    def _worker(self, subject: str) -> Worker:
        if subject not in self.workers:
            plan = self._plan
            options = WorkerOptions(subject, plan.device, plan.python, plan.paths, plan.run_limit,
                                    environment=devices.environment(plan.device, self._number))
            self.workers[subject] = Worker(options, list(registry.contracts().values()))
        return self.workers[subject]


def work(folder: Path, task: Task) -> Path:
    """Where a task leaves its files while it runs; on the driver's machine, or on a shared one, the driver finds them."""
    return folder / "work" / hashlib.sha256(task.key.encode()).hexdigest()[:16]


def inflight(folder: Path) -> dict | None:
    """The case that a process had in hand when it died, if it can be read from here."""
    found = sorted(folder.glob("*/inflight-*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else None
