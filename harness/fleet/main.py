"""`ci/campaign`: a long search over many processes or machines. Exit 0 clean, 1 a finding, 2 it could not run.

Tasks go to Ray (a local one, or a cluster with --ray) or to pytest-xdist; what is done is in the journal of --folder, and
--resume goes on from there.
"""

import argparse
import re
import secrets
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from harness import devices, registry
from harness.campaign import DATABASE, PROFILES
from harness.client import ROOT, InfraError, UsageError, Worker, WorkerOptions, shown_path, subject_name
from harness.fleet import memory, on_ray, summary
from harness.fleet.engine import Answer, Order
from harness.fleet.journal import Journal, State
from harness.fleet.live import Live
from harness.fleet.on_xdist import OnXdist
from harness.fleet.plan import Plan, Task, sharded
from harness.reporting import table
from harness.verdicts import exit_code

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """Seconds, or a number with a unit.

    >>> duration("90"), duration("10m"), duration("8h")
    (90.0, 600.0, 28800.0)
    """
    match = re.fullmatch(r"([0-9.]+)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no duration: seconds, or a number with s, m or h")
    return float(match[1]) * UNITS[match[2]]


def part(text: str) -> tuple[int, int]:
    """Which of how many parts, counted from 1.

    >>> part("2/5")
    (1, 5)
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is no part: 2/5 is the second of five")
    return int(match[1]) - 1, int(match[2])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/campaign", description="Search for long, on many processes or machines.")
    parser.add_argument("--subject", action="append", help="whose kernels (repeatable; default: kernels)")
    parser.add_argument("--subject-python", default=sys.executable, help="the interpreter that holds the subjects")
    parser.add_argument("--subject-path", action="append", default=[], help="a folder to import subjects from")
    parser.add_argument("--variant", action="append", default=[], help="CONTRACT:RULE=CHOICE, over what the subject declares")
    parser.add_argument("-k", dest="only", default="", help="only these families or transforms, comma-separated")
    parser.add_argument("--profile", default="nightly", choices=sorted(PROFILES), help="how much to try (default: nightly)")
    parser.add_argument("--shards", type=int, help="seeds per transform (default: the profile's; 0: until a budget ends)")
    parser.add_argument("--shard-examples", type=int, default=0, help="examples of a shard (default: 200, or the profile's)")
    parser.add_argument("--seed", type=int, help="another number, other examples (default: drawn, and written down)")
    parser.add_argument("--target", action="store_true", help="climb towards far offsets, many live pages, much padding")
    parser.add_argument("--engine", choices=("ray", "xdist"), help="who runs the processes (default: ray)")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="join a Ray: auto, or host:port (default: a local one)")
    parser.add_argument("-n", dest="processes", type=int, default=0, help="at most so many processes (default: what there is)")
    parser.add_argument("--gpu-share", type=float, default=1 / devices.WORKERS_PER_GPU,
                        help="how much of a GPU one process takes (default: 1/8)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cpu, cuda or auto")
    parser.add_argument("--redis", default="", metavar="URL", help="the fleet's memory, e.g. redis://host:6379/0")
    parser.add_argument("--redis-read-only", action="store_true", help="try what the fleet found, and tell it nothing")
    parser.add_argument("--database", type=Path, default=DATABASE, help="the local examples (default: .hypothesis/examples)")
    parser.add_argument("--wall", type=duration, help="stop after so long: 600, 10m, 8h")
    parser.add_argument("--gpu-seconds", type=float, help="stop after so many GPU-seconds (core-seconds on a CPU)")
    parser.add_argument("--examples", type=int, help="stop after so many examples")
    parser.add_argument("--part", type=part, default=(0, 1), help="only this part of the tasks: 2/5, in a matrix of jobs")
    parser.add_argument("--folder", type=Path, default=ROOT / "report" / "campaign",
                        help="journal, cases and report (default: report/campaign beside ci/)")
    parser.add_argument("--resume", action="store_true", help="go on with the campaign in --folder, as it was begun")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FOLDER", help="only write one report over these folders")
    return parser


class Driver:
    """Hands out what is left of a plan, keeps what comes back, and knows when to stop."""

    def __init__(self, journal: Journal, state: State, options):
        self.journal, self.state, self._options = journal, state, options
        self._tasks = (task for task in state.plan.tasks() if task.key not in state.done and not state.lost(task))
        self._again: list[Task] = []
        self._until = time.monotonic() + options.wall if options.wall else float("inf")
        self.stopped = ""

    def next_order(self) -> Order | None:
        """The next task, first those whose process died; None when there is nothing to do, or a budget is spent."""
        if self._over():
            return None
        task = self._again.pop(0) if self._again else next(self._tasks, None)
        return Order(task, self._until - time.monotonic()) if task else None

    def _over(self) -> str:
        if not self.stopped:
            spent = {"--wall": time.monotonic() >= self._until, "--examples": self._beyond("examples", self.state.tried),
                     "--gpu-seconds": self._beyond("gpu_seconds", self.state.seconds)}
            self.stopped = next((f"{option} is spent" for option, over in spent.items() if over), "")
        return self.stopped

    def _beyond(self, option: str, spent: float) -> bool:
        most = getattr(self._options, option)
        return most is not None and spent >= most

    def run(self, engine, live: Live) -> None:
        """Until there is nothing left to do or a reason to stop."""
        for answer in engine.run(self.next_order):
            if answer is not None:
                self._keep(answer)
                live.heard((answer.task.subject, answer.task.transform, answer.task.lane))
            if self._over():
                engine.hurry()
            live.tick()

    def _keep(self, answer: Answer) -> None:
        task = answer.task
        if answer.line is not None:
            if answer.line["partial"] and not any(answer.line["tried"].values()):
                return  # it had no time
            self.state.add(self.journal.finished(answer.line))
            return
        self.state.add(self.journal.died(task, answer.died, answer.case))
        if not self.state.lost(task):
            self._again.append(task)


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    try:
        return _merge(options) if options.merge else _run(options)
    except (UsageError, InfraError) as error:
        print(f"ci/campaign: {error}")
        return 2


def _merge(options) -> int:
    """One report over the journals of several jobs."""
    state = None
    for folder in options.merge:
        state = Journal(folder).read(state)
        for case in (folder / "cases").glob("**/*.json") if folder.resolve() != options.folder.resolve() else ():
            place = options.folder / case.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(case, place)
    state.plan = replace(state.plan, part=(0, 1))
    return _conclude(options.folder.resolve(), state, 0.0)


def _run(options) -> int:
    if options.redis:
        memory.connect(options.redis).close()
    journal = Journal(options.folder.resolve())
    state = None
    if options.resume:
        state = journal.read()
    else:
        journal.vacant()
    options.engine = options.engine or (state.plan.engine if state else "ray")
    if options.engine == "ray":
        on_ray.join(options.ray, options.processes)
    state = state or _new(options)
    if state.plan.redis:
        memory.reachable(state.plan.redis)
    if not options.resume:
        journal.begin(state)
    print(f"{'going on with' if options.resume else 'began'} campaign {state.campaign} in {shown_path(journal.folder)}: "
          f"{state.plan.size or 'endless'} shards of {state.plan.examples} examples, seed {state.plan.seed}", flush=True)
    shutil.rmtree(journal.folder / "work", ignore_errors=True)
    started = time.monotonic()
    _drive(Driver(journal, state, options), options)
    return _conclude(journal.folder, state, time.monotonic() - started)


def _drive(driver: Driver, options) -> None:
    """Run the engine. The first Ctrl-C lets what is in flight finish, the second does not."""
    journal, state = driver.journal, driver.state
    kind = on_ray.OnRay if options.engine == "ray" else OnXdist
    engine = kind(state.plan, state.campaign, journal.folder, options.processes)
    live = Live(state)

    def interrupted(number, frame):
        if driver.stopped:
            raise KeyboardInterrupt
        driver.stopped = "interrupted; what is in flight may finish (again Ctrl-C: now)"
        print(f"  {driver.stopped}", flush=True)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        driver.run(engine, live)
    except KeyboardInterrupt:
        driver.stopped = "interrupted"
    finally:
        signal.signal(signal.SIGINT, before)
        live.close()
        engine.close()
        shutil.rmtree(journal.folder / "work", ignore_errors=True)
    print(f"  {live.text()}" + (f"; {driver.stopped}" if driver.stopped else ""), flush=True)


def _conclude(folder: Path, state: State, seconds: float) -> int:
    run = summary.write(folder, state, seconds)
    print("\n".join(table(run.rows)))
    print(f"{summary.outcome(state)}\nreport: {shown_path(folder)}")
    return exit_code(run.rows)


def _new(options) -> State:
    """The campaign that is asked for.

    Raises:
        UsageError: it cannot be done.
    """
    chosen = _chosen(options.only)
    try:
        variants = tuple(map(registry.variant, options.variant))
    except ValueError as error:
        raise UsageError(f"--variant {error}") from None
    if options.device == "cuda" and options.engine == "xdist" and not devices.gpus():
        raise UsageError("--device cuda: no GPU is visible here (nvidia-smi lists none)")
    device = on_ray.device(options.device) if options.engine == "ray" else devices.resolve(options.device)
    shards, examples = sharded(options.profile, options.shard_examples)
    shards = shards if options.shards is None else options.shards
    if not shards and options.wall is options.gpu_seconds is options.examples is None:
        raise UsageError("--shards 0 has no end: give --wall, --gpu-seconds or --examples")
    paths = tuple(str(Path(p).resolve()) for p in options.subject_path)
    looks, missing, versions = _looks(options, chosen, paths)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    plan = Plan(looks, options.profile, shards, examples, seed, options.part, device,
                options.gpu_share if device == "cuda" else 0.0, options.subject_python, paths, variants, options.target,
                options.redis, options.redis_read_only, str(options.database.resolve()), options.engine)
    return State(secrets.token_hex(4), plan, _header(options, plan, versions), missing)


def _chosen(only: str) -> list[str]:
    """The transforms that -k names, by family or by name."""
    contracts = registry.contracts()
    words = [word for word in only.split(",") if word]
    known = {name for c in contracts.values() for name in (c.name, c.family)}
    for word in words:
        if word not in known:
            raise UsageError(f"-k {word}: neither a family nor a transform; families are "
                             f"{', '.join(sorted({c.family for c in contracts.values()}))}")
    return [name for name, c in contracts.items() if not words or {name, c.family} & set(words)]


def _looks(options, chosen: list[str], paths: tuple[str, ...]) -> tuple[tuple, dict, dict[str, str]]:
    """(subject, transform, lane) of what the subjects provide; of what they do not, with the reason; and versions."""
    looks, missing = [], {}
    for subject in [subject_name(s) for s in options.subject or ("kernels",)]:
        worker = Worker(WorkerOptions(subject, devices.resolve("auto"), options.subject_python, paths),
                        list(registry.contracts().values()))
        worker.close()
        for name in chosen:
            if worker.describe[name]["provided"]:
                looks += [(subject, name, lane) for lane in ("inside", "replays")[: 1 + registry.replayed(name)]]
            else:
                missing[subject, name, "inside"] = worker.describe[name]["missing"]
    if not looks:
        raise UsageError("the subjects provide none of these transforms")
    return tuple(looks), missing, worker.versions


def _header(options, plan: Plan, versions: dict[str, str]) -> list[str]:
    """What the campaign depends on, for the report."""
    shown = " ".join(f"{name} {version}" for name, version in versions.items())
    return [f"campaign: profile {plan.profile}, {plan.shards or 'endless'} shards of {plan.examples} examples, "
            f"seed {plan.seed}, engine {options.engine}, device {plan.device}" + (", guided" if plan.target else ""),
            f"subjects {', '.join(dict.fromkeys(subject for subject, _, _ in plan.looks))}", shown]


if __name__ == "__main__":
    sys.exit(main())
