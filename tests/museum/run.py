"""The museum as a measurement: which real bugs the ordinary campaigns find, how fast, and by which check.

    ci/gate --museum [--seeds N] [ID...]

Strategies, checks and budgets are the gate's own; no exhibit has any of its own. Every exhibit is hunted with every seed until
a finding of its declared kind, its clean twin must pass a quick profile's worth of examples, and the case found with seed 0 is
shrunk and compared with `golden.json`. Exit 0: all caught, all twins clean, no shrunk case of more requests; else 2.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from harness import devices, registry
from harness.campaign import PROFILES
from harness.client import ROOT, StandIn, UsageError, Worker, WorkerOptions
from harness.differential import Example, check
from harness.findings import Found
from harness.generation import fresh_examples
from strategies import domain, sessions
from tests.museum import report
from tests.museum.catalogue import EXHIBITS, GPU_ONLY, Exhibit
from tests.museum.report import Hunt, Result

HERE = Path(__file__).parent
BUDGET = PROFILES["gate"].counted


@dataclass(frozen=True)
class Plan:
    """How much a visit tries. A short one has further seeds only for what escaped the first, and shrinks nothing."""

    seeds: int
    twin_examples: int = PROFILES["quick"].counted
    short: bool = False
    device: str = "cpu"


IN_A_GATE = Plan(seeds=3, twin_examples=4, short=True)


# -- one exhibit ----------------------------------------------------------------------------------------------------------


class Over(BaseException):
    """Ends a search: something is found, or the budget is spent. Hypothesis would try an ordinary exception again."""


class _Bug(AssertionError):
    """The finding that a case is shrunk for."""


class Room:
    """A worker with all exhibits."""

    def __init__(self, subject: Path = HERE / "subject.py", device: str = "cpu"):
        options = WorkerOptions(str(subject), device, paths=(str(HERE), str(ROOT / "kernels")))
        self.worker = Worker(options, list(registry.contracts().values()))

    def judge(self, exhibit: Exhibit, function: str, example: Example) -> list[Found]:
        """What is wrong on one example. A session starts in a process that has seen none."""
        if exhibit.lane != "inside":
            self.worker.restart_child()
        stand = StandIn(self.worker, function)
        stand.describe[exhibit.contract]["capturable"] = False  # bugs between streams are no part of a graph
        return check(example, stand, rules(exhibit))

    def caught(self, exhibit: Exhibit, example: Example) -> Found | None:
        """The finding that counts, if there is one."""
        found = self.judge(exhibit, exhibit.id, example)
        return next((f for f in found if f.kind in exhibit.caught), None)


def rules(exhibit: Exhibit) -> dict[str, str]:
    """Our variant of every rule, for all contracts that a session mixes."""
    contracts = registry.contracts()
    names = [n for n, c in contracts.items() if c.family == "metadata"] if exhibit.lane == "serving" else [exhibit.contract]
    return {k: v for n in names for k, v in contracts[n].rules().items()}


def strategy(exhibit: Exhibit):
    """What the gate draws for the exhibit's contract and lane."""
    contract = registry.contracts()[exhibit.contract]
    return {"inside": lambda: domain.of(contract), "replays": lambda: sessions.replays(contract),
            "serving": sessions.serving}[exhibit.lane]()


def budget(exhibit: Exhibit, counted: int) -> int:
    """Sessions get a fifth of the examples, as in the gate: each is several calls."""
    return counted if exhibit.lane == "inside" else max(counted // 5, 1)


def search(exhibit: Exhibit, counted: int, seed: int, visit, phases=(Phase.generate,)) -> None:
    """Visit distinct examples, `counted` of them with at least 2 requests, as a campaign does."""
    seen: set[str] = set()
    many = 0
    shrinking = Phase.shrink in phases

    @hypothesis.seed(seed)
    @settings(max_examples=2 * counted + 40, phases=phases, database=None, deadline=None, verbosity=Verbosity.quiet,
              suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False)
    @given(strategy(exhibit))
    def one(example: Example) -> None:
        nonlocal many
        key = repr((example.steps, example.layout, example.seed))
        if not shrinking and many >= counted:
            raise Over
        if not shrinking and key in seen:
            return
        seen.add(key)
        many += max(case.batch_size() for case in example.steps) >= 2
        visit(example)

    with fresh_examples():
        one()


def hunt(room: Room, exhibit: Exhibit, seed: int) -> Hunt:
    """Examples and seconds to the first finding that counts."""
    result, started = Hunt(seed), time.monotonic()

    def visit(example: Example) -> None:
        result.examples += 1
        found = room.caught(exhibit, example)
        if found:
            result.kind = " ".join(found.kind)
            raise Over

    try:
        search(exhibit, budget(exhibit, BUDGET), seed, visit)
    except Over:
        pass
    result.seconds = time.monotonic() - started
    return result


def twin(room: Room, exhibit: Exhibit, counted: int) -> str:
    """The first thing that is wrong with the clean twin, or ''."""
    complaints: list[str] = []

    def visit(example: Example) -> None:
        found = room.judge(exhibit, f"{exhibit.id}_clean", example)
        if found:
            complaints.append(f"{found[0].sentence} on {example!r}")
            raise Over

    try:
        search(exhibit, budget(exhibit, counted), 0, visit)
    except Over:
        pass
    return next(iter(complaints), "")


def shrink(room: Room, exhibit: Exhibit) -> Example | None:
    """The smallest case that Hypothesis makes of what seed 0 finds."""
    smallest: list[Example] = []

    def visit(example: Example) -> None:
        if room.caught(exhibit, example):
            smallest[:] = [example]
            raise _Bug

    try:
        search(exhibit, budget(exhibit, BUDGET), 0, visit, (Phase.generate, Phase.shrink))
    except _Bug:
        pass
    return next(iter(smallest), None)


@cache
def _room(device: str) -> Room:
    """This process's room."""
    return Room(device=device)


def examine(exhibit: Exhibit, plan: Plan) -> Result:
    """Everything about one exhibit."""
    room, result = _room(plan.device), Result(exhibit.id)
    for seed in range(plan.seeds):
        result.hunts.append(hunt(room, exhibit, seed))
        if plan.short and result.hunts[-1].kind:
            break
    result.twin = twin(room, exhibit, plan.twin_examples)
    repeatable = exhibit.id not in GPU_ONLY  # bugs between streams come and go, and Hypothesis cannot shrink those
    smallest = shrink(room, exhibit) if result.hunts[0].kind and repeatable and not plan.short else None
    if smallest:
        result.shrunk, result.requests = repr(smallest), max(case.batch_size() for case in smallest.steps)
    return result


# -- all of them ----------------------------------------------------------------------------------------------------------


def visit_all(exhibits: list[Exhibit], plan: Plan, workers: int) -> list[Result]:
    """Every exhibit, in parallel, sessions first; a line for each that is done, unless the visit is short."""
    order = sorted(exhibits, key=lambda e: e.lane == "inside")
    done: list[Result] = []
    with ProcessPoolExecutor(max(workers, 1)) as pool:
        running = [pool.submit(examine, e, plan) for e in order]
        for future in as_completed(running):
            done.append(future.result())
            if not plan.short:
                print(f"  {len(done):3d}/{len(order)} {_line(done[-1])}", flush=True)
    return sorted(done, key=lambda r: r.id)


def _line(result: Result) -> str:
    caught = sum(bool(h.kind) for h in result.hunts)
    seconds = sum(h.seconds for h in result.hunts)
    return f"{result.id} caught {caught}/{len(result.hunts)}, {seconds:.1f} s{', TWIN NOT CLEAN' if result.twin else ''}"


def chosen(ids: list[str], device: str) -> list[Exhibit]:
    """The exhibits with these ids, or all of the device.

    Raises:
        UsageError: an id is no exhibit of the device.
    """
    room = GPU_ONLY if device == "cuda" else EXHIBITS
    for name in ids:
        if name not in room:
            other = "; it needs --device cuda" if name in GPU_ONLY else ""
            raise UsageError(f"{name} is no exhibit that runs on this device{other} (docs/museum.md lists them)")
    return [room[name] for name in ids] or list(room.values())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/gate --museum", description="Measure the suite on real bugs.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="exhibits, B001 and so on (default: all)")
    parser.add_argument("--seeds", type=int, default=20, help="seeds per exhibit (default: 20)")
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="where museum.json goes")
    parser.add_argument("-n", dest="workers", type=int, default=os.cpu_count(), help="parallel processes (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the exhibits that only a GPU can judge")
    parser.add_argument("--in-a-gate", action="store_true", help="what the plain gate does: one seed, short twins")
    parser.add_argument("--write", action="store_true", help="write docs/museum.md and golden.json")
    return parser


def main(given_arguments: list[str] | None = None) -> int:
    options = arguments().parse_args(given_arguments)
    try:
        exhibits = chosen(options.ids, options.device)
        _validate(options)
    except UsageError as error:
        print(f"ci/gate --museum: {error}")
        return 2
    plan = IN_A_GATE if options.in_a_gate else Plan(options.seeds, device=options.device)
    results = visit_all(exhibits, plan, options.workers)
    problems = report.complaints(results, None if options.write else report.golden_cases())
    if options.in_a_gate:
        seen, clean = sum(r.caught() for r in results), sum(not r.twin for r in results)
        print(f"{seen} of {len(results)} real bugs seen, {clean} twins clean")
    else:
        _record(results, options)
    for problem in problems:
        print(f"museum: {problem}")
    return 2 if problems else 0


def _record(results: list[Result], options) -> None:
    options.report.mkdir(parents=True, exist_ok=True)
    (options.report / "museum.json").write_text(json.dumps([report.row(r) for r in results], indent=1))
    if options.write:
        report.write(results)
    for name, value in report.summary(results).items():
        print(f"{name}: {value}")


def _validate(options) -> None:
    if options.seeds < 1:
        raise UsageError("--seeds must be at least 1")
    if options.write and (options.ids or options.device == "cuda"):
        raise UsageError("--write needs all exhibits of the CPU tier")
    if options.device == "cuda" and not devices.gpus():
        raise UsageError("--device cuda: no GPU is visible here (nvidia-smi lists none)")


if __name__ == "__main__":
    sys.exit(main())
