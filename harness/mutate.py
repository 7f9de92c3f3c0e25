"""`ci/mutate`: how many small edits of a kernel does the suite notice? Exit 0 if all but those in the ledger, 1 if one
survived or the ledger is stale, 2 on an error of use.

A mutant is the kernel's file with one edit (harness/mutants.py), in a folder of its own, loaded by an ordinary worker as an
ordinary subject. It is tried on the ordinary examples, of which only those count that execute the edited statement, cheap
and successful ones first, until a check finds something.
"""

import argparse
import ast
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from harness import casefile, registry
from harness.campaign import PROFILES
from harness.client import ROOT, Fault, InfraError, UsageError, Worker, WorkerOptions
from harness.differential import Example, check, harm
from harness.findings import Found
from harness.generation import fresh_examples
from harness.mutants import OPERATORS, Mutant, mutants
from strategies import domain

LEDGER = ROOT / "tests" / "meta" / "equivalent_mutants.toml"
FIRST, GATE = 100, PROFILES["gate"].counted  # examples per transform: at first, and for what survived those
OUTSIDE = 8  # for so many examples inside the contract, one that breaks each precondition
ENOUGH = 30  # examples of a transform, after which it is known whether it calls a function at all
MOST_RAISED = 30  # a mutant that raises on so many examples, and returns on none, is incompetent
LEDGER_SHARE = 4  # one in so many of its examples is tried on a mutant of the ledger
HANG = 3  # a call is a hang when it takes so many times as long as the slowest example, and two seconds
MOST_OF_LEDGER = 0.15

KILLED, TIMEOUT, SURVIVED, INCOMPETENT = "killed", "timeout", "survived", "incompetent"


@dataclass(frozen=True)
class Target:
    """A file to mutate. `root` is the folder that a mutant gets a copy of, the file replaced.

    `shape` says how a mutant is loaded: "family" (the folder is the subject), "file" (the file is), "path" (the subject
    finds the file in `root`, a folder that it imports from).
    """

    name: str
    file: Path
    root: Path
    shape: str
    subject: str
    families: tuple[str, ...]
    functions: frozenset[str] | None = None
    only: frozenset[str] | None = None

    def mutants(self) -> list[Mutant]:
        found = mutants(self.file.read_text(), self.functions)
        return [m for m in found if self.only is None or m.identity in self.only]

    def lines(self) -> frozenset[int]:
        """The lines of the functions that have mutants."""
        names = {m.function for m in self.mutants()}
        defined = [n for n in ast.walk(ast.parse(self.file.read_text())) if isinstance(n, ast.FunctionDef) and n.name in names]
        return frozenset(line for f in defined for line in range(f.lineno, f.end_lineno + 1))

    @property
    def ours(self) -> bool:
        return self.subject == "kernels"


@dataclass(frozen=True)
class Setup:
    """What a lane needs to start its workers."""

    subject: str
    python: str
    paths: tuple[str, ...]


@dataclass
class Probe:
    """An example, the lines of the mutated file that it executes, and what it takes."""

    example: Example
    rules: dict[str, str]
    lines: frozenset[int]
    seconds: float
    kills: Counter = field(default_factory=Counter)

    def judge(self, worker) -> list[Found]:
        if self.example.outside:
            return harm(self.example, self.example.outside, worker, self.rules)
        return check(self.example, worker, self.rules)

    def reaches(self, mutant: Mutant) -> bool:
        return any(line in self.lines for line in range(mutant.lines[0], mutant.lines[1] + 1))

    def promise(self, operator: str) -> float:
        """Kills per second, those by the same operator above all."""
        return (1 + self.kills.total() + 8 * self.kills[operator]) / (self.seconds + 0.005)


@dataclass
class Result:
    """What became of a mutant."""

    mutant: str
    line: int
    outcome: str
    check: str = ""
    buffer: str = ""
    sentence: str = ""
    example: str = ""
    transform: str = ""
    tried: int = 0
    seconds: float = 0.0


# -- one lane: a process with workers of its own ------------------------------------------------------------------------


class _Tracing:
    """A worker that also says which lines of a file each call executes."""

    def __init__(self, worker: Worker, path: Path):
        self._worker, self._path, self.lines = worker, str(path), set()
        self.options, self.versions, self.limits, self.tier = worker.options, worker.versions, worker.limits, worker.tier
        self.describe = worker.describe

    def run(self, header: dict, blobs: list):
        reply, data = self._worker.run({**header, "lines_of": self._path}, blobs)
        if not isinstance(reply, Fault):
            for step in reply["steps"]:
                self.lines |= set(step.get("lines", ()))
        return reply, data


class Lane:
    """Draws probes from the subject as it is, and tries mutants on them."""

    def __init__(self, setup: Setup, scratch: Path):
        self.scratch = scratch
        contracts = list(registry.contracts().values())
        options = dict(device="cpu", python=setup.python)
        self._original = Worker(WorkerOptions(setup.subject, paths=setup.paths, **options), contracts)
        nobody = scratch / "nobody"
        nobody.mkdir(parents=True)
        self._mutant = Worker(WorkerOptions(str(nobody), **options), contracts)
        self._mutant.describe = self._original.describe
        self._setup = setup
        self._probes: list[Probe] = []

    def provided(self) -> list[str]:
        return [n for n, d in self._original.describe.items() if d["provided"]]

    def probes(self, target: Target, lines: frozenset[int], transform: str, first: int, count: int) -> list[Probe]:
        """Examples `first` to `count` of a transform that execute one of the lines, inside the contract and beside it; none if
        the first few do not.

        A finding of ours on a file as it is would make every mutant of it look killed, so it is an error; of another
        subject the example is left out.
        """
        contract = registry.contracts()[transform]
        rules = contract.rules(self._original.describe[transform]["variant"])
        examples = drawn(domain.of(contract), count)[first:]
        if target.ours:
            each = 1 + sum(p.broken is not None for p in contract.preconditions)  # and ordinary examples, which are left out
            broken = drawn(domain.outside(contract), each * count // OUTSIDE)[each * first // OUTSIDE :]
            examples += [e for e in broken if e.outside]
        found = []
        for tried, example in enumerate(examples):
            if tried == ENOUGH and not found:
                break
            if self._declined(example):
                continue
            worker = _Tracing(self._original, target.file)
            probe = Probe(example, rules, frozenset(), 0.0)
            started = time.monotonic()
            wrong = probe.judge(worker)
            if wrong and target.ours:
                raise InfraError(f"{transform} is wrong before any mutation, on {example}: {wrong[0].sentence}")
            if not wrong and worker.lines & lines:
                probe.lines, probe.seconds = frozenset(worker.lines), time.monotonic() - started
                found.append(probe)
        return found

    def _declined(self, example: Example) -> bool:
        if not self._original.describe[example.contract.name]["selective"]:
            return False
        return any(self._original.supports(example.contract.family, casefile.encode_calls(example)))

    def hold(self, probes: list[Probe]) -> None:
        self._probes = probes
        self._mutant.limits.run = 2.0 + HANG * max((p.seconds for p in probes), default=0.0)

    def attempt(self, target: Target, mutant: Mutant, text: str, share: int) -> Result:
        """Try a mutant until something is found; `share`: on one in so many of its examples."""
        started = time.monotonic()
        result = Result(mutant.identity, mutant.lines[0], SURVIVED)
        able = sorted((p for p in self._probes if p.reaches(mutant)), key=lambda p: -p.promise(mutant.operator))
        if not able:
            result.sentence = "no example executes it"
            return result
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            self._mutant.hold(*planted(target, text, Path(folder), self._setup), target.families)
            self._mutant.limits.hung = False
            self._until_found(result, mutant, able[: -(-len(able) // share)])
        result.seconds = round(time.monotonic() - started, 3)
        return result

    def _until_found(self, result: Result, mutant: Mutant, probes: list[Probe]) -> None:
        passed, raised = False, None
        for result.tried, probe in enumerate(probes, 1):
            found = probe.judge(self._mutant)
            if found and found[0].check == "raised" and not probe.example.outside:
                raised = raised or (probe, found[0])
            elif found:
                return _kill(result, mutant, probe, found[0])
            elif not probe.example.outside:
                passed = True
            if raised and passed:
                return _kill(result, mutant, *raised)
            if raised and result.tried == MOST_RAISED:
                break
        if raised:
            result.outcome, result.sentence = INCOMPETENT, raised[1].sentence
        return None


def _kill(result: Result, mutant: Mutant, probe: Probe, found: Found) -> None:
    result.check, result.buffer, result.sentence = found.check, found.buffer, found.sentence
    result.transform, result.example = probe.example.contract.name, repr(probe.example)
    result.outcome = {"hang": TIMEOUT, "unloadable": INCOMPETENT}.get(found.buffer, KILLED)
    probe.kills[mutant.operator] += 1


def drawn(strategy, count: int) -> list[Example]:
    """The first `count` examples of a strategy, the same ones on every machine."""
    examples: list[Example] = []

    @settings(max_examples=count, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(example) -> None:
        examples.append(example)

    with fresh_examples():
        draw()
    return examples


def planted(target: Target, text: str, folder: Path, setup: Setup) -> tuple[str, tuple[str, ...]]:
    """Put a mutated file into a copy of its folder. Returns the subject to load, and the folders to import from."""
    place, source = folder, target.root
    for part in target.file.relative_to(target.root).parts:
        for entry in source.iterdir():
            if entry.name != part and entry.name != "__pycache__":
                (place / entry.name).symlink_to(entry)
        place, source = place / part, source / part
        if source.is_dir():
            place.mkdir()
    place.write_text(text)
    if target.shape == "path":
        return setup.subject, (str(folder), *setup.paths)
    return str(folder if target.shape == "family" else place), setup.paths


# -- all lanes ----------------------------------------------------------------------------------------------------------


class Lanes:
    """Lanes in parallel. They are told to do things by name, and answer in any order."""

    def __init__(self, setup: Setup, count: int, scratch: Path):
        context = multiprocessing.get_context("fork")
        self._pipes, self._processes = [], []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, setup, scratch / f"lane{number}"))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def everywhere(self, method: str, *arguments) -> list:
        """Every lane's answer to the same request."""
        for pipe in self._pipes:
            pipe.send((method, arguments))
        return [_answer(pipe) for pipe in self._pipes]

    def spread(self, method: str, tasks: Iterable[tuple]) -> Iterator:
        """One answer per task, as they come."""
        tasks, busy = iter(tasks), set()
        for pipe in self._pipes:
            _next(pipe, method, tasks, busy)
        while busy:
            for pipe in wait(busy):
                answer = _answer(pipe)
                busy.discard(pipe)
                _next(pipe, method, tasks, busy)
                yield answer

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(3)
            process.kill()  # its workers end with it: their sockets close
            process.join()


def _next(pipe, method: str, tasks: Iterator[tuple], busy: set) -> None:
    task = next(tasks, None)
    if task is not None:
        pipe.send((method, task))
        busy.add(pipe)


def _answer(pipe):
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise InfraError("a process of ci/mutate died") from None
    if kind == "error":
        raise value
    return value


def _serve(pipe, setup: Setup, scratch: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        lane = Lane(setup, scratch)
        while True:
            method, arguments = pipe.recv()
            pipe.send(("value", getattr(lane, method)(*arguments)))
    except EOFError:
        return
    except Exception as error:  # the suite's own fault, or the user's: told to the command
        known = isinstance(error, (InfraError, UsageError))
        pipe.send(("error", error if known else InfraError(f"{type(error).__name__}: {error}")))


# -- the ledger ---------------------------------------------------------------------------------------------------------


def ledger(path: Path = LEDGER) -> dict[str, dict[str, str]]:
    """For every family, the mutants that are argued to be equivalent, with the argument.

    Raises:
        UsageError: an entry without an argument, or a mutant that is there twice.
    """
    found: dict[str, dict[str, str]] = {}
    for entry in tomllib.loads(path.read_text()).get("equivalent", []) if path.exists() else []:
        if not entry.get("because", "").strip():
            raise UsageError(f"{path}: an entry of {entry.get('family')} has no argument (`because`)")
        family = found.setdefault(entry["family"], {})
        for identity in entry["mutants"]:
            if identity in family:
                raise UsageError(f"{path}: {entry['family']}: {identity} is there twice")
            family[identity] = entry["because"]
    return found


# -- one target ---------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """A target's mutants and what became of them."""

    target: str
    total: int
    transforms: int = 0
    examples: int = 0
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    equivalent: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    not_called: list[str] = field(default_factory=list)
    whole: bool = True

    def count(self, *outcomes: str) -> int:
        return sum(r.outcome in outcomes for r in self.results)

    @property
    def survivors(self) -> list[Result]:
        return [r for r in self.results if r.outcome == SURVIVED and r.mutant not in self.equivalent]

    @property
    def in_ledger(self) -> int:
        return sum(r.outcome == SURVIVED and r.mutant in self.equivalent for r in self.results)

    @property
    def score(self) -> float:
        """Killed mutants of those that could be: neither incompetent nor in the ledger."""
        killed = self.count(KILLED, TIMEOUT)
        return killed / (killed + len(self.survivors)) if killed + len(self.survivors) else 1.0

    def row(self) -> dict:
        return {"target": self.target, "mutants": self.total, "killed": self.count(KILLED), "timeout": self.count(TIMEOUT),
                "incompetent": self.count(INCOMPETENT), "ledger": self.in_ledger, "survived": len(self.survivors),
                "unreached": sum(r.tried == 0 for r in self.survivors),
                "score": round(self.score, 4), "examples": self.examples, "seconds": round(self.seconds, 1)}


def run(target: Target, lanes: Lanes, equivalent: dict[str, str], score: Score, budget: int, say) -> None:
    """Try every mutant of a target; `score` fills up as it goes, so that it is valid whenever the run ends."""
    started = time.monotonic()
    source = target.file.read_text()
    found = {m.identity: m for m in target.mutants()}
    score.equivalent = {i: equivalent[i] for i in found if i in equivalent}
    score.whole = target.functions is None and target.only is None
    if score.whole:
        score.stale = [f"{i}: there is no such mutant" for i in equivalent if i not in found]
    provided = lanes.everywhere("provided")[0]
    transforms = [t for t in provided if registry.contracts()[t].family in target.families]
    lines = target.lines()
    todo, first, retried = list(found.values()), 0, set()
    for count in sorted({min(FIRST, budget), budget}):
        tasks = ((target, lines, t, first, count) for t in transforms)
        fresh = [p for group in lanes.spread("probes", tasks) for p in group]
        score.transforms, score.examples, first = len(transforms), score.examples + len(fresh), count
        if first == count and not target.ours and target.functions is None and not retried:
            todo = _called(todo, fresh, score)
        lanes.everywhere("hold", fresh)
        retried = {m.identity for m in todo}
        score.results = [r for r in score.results if r.mutant not in retried]
        tasks = ((target, m, m.applied(source), LEDGER_SHARE if m.identity in equivalent else 1) for m in todo)
        for result in lanes.spread("attempt", tasks):
            score.results.append(result)
            score.seconds = time.monotonic() - started
            say(score)
        names = {r.mutant for r in score.survivors}
        todo = [m for m in todo if m.identity in names]
        if not todo:
            break
    score.stale += [f"{r.mutant}: it is killed ({r.sentence})" for r in score.results
                    if r.mutant in equivalent and r.outcome in (KILLED, TIMEOUT)]
    score.seconds = time.monotonic() - started
    score.results.sort(key=lambda r: list(found).index(r.mutant))


def _called(todo: list[Mutant], probes: list[Probe], score: Score) -> list[Mutant]:
    """Of another's file, the mutants of those functions that the adapters call at all."""
    lines = set().union(*(p.lines for p in probes))
    called = {m.function for m in todo if any(line in lines for line in range(m.lines[0], m.lines[1] + 1))}
    score.not_called = sorted({m.function for m in todo} - called)
    kept = [m for m in todo if m.function in called]
    score.total = len(kept)
    return kept


# -- what to mutate -----------------------------------------------------------------------------------------------------


def families() -> list[str]:
    return list(dict.fromkeys(c.family for c in registry.contracts().values()))


def targets(options) -> list[Target]:
    """The files that the command line names."""
    if options.changed:
        if options.target:
            raise UsageError("--changed chooses the targets itself; give it or targets")
        return list(_changed(options.changed))
    found = [_target(text, options) for text in options.target or families()]
    if not options.again:
        return found
    try:
        report = json.loads(options.again.read_text())["targets"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--again {options.again}: no report of ci/mutate --json") from None
    survived = {t["target"]: frozenset(r["mutant"] for r in t["results"] if r["outcome"] == SURVIVED) for t in report}
    return [replace(t, only=survived[t.name]) for t in found if survived.get(t.name)]


def _target(text: str, options) -> Target:
    name, _, function = text.partition(":")
    functions = frozenset({function}) if function else None
    if name in families() and options.subject == "kernels":
        return family(name, functions)
    file = Path(name).resolve()
    if not file.is_file():
        raise UsageError(f"{text}: neither a family ({', '.join(families())}) nor a file")
    if file.parent == ROOT / "kernels":
        return family(file.stem, functions)
    among = tuple(options.family or families())
    for folder in map(Path.resolve, map(Path, options.subject_path)):
        if file.is_relative_to(folder):
            if options.subject == "kernels":
                raise UsageError(f"{text} lies under --subject-path; say with --subject whose adapters call it (e.g. sglang)")
            return Target(file.stem, file, folder, "path", options.subject, among, functions)
    return Target(file.stem, file, file.parent, "file", str(file), among, functions)


def family(name: str, functions: frozenset[str] | None = None) -> Target:
    """Our kernels of a family."""
    folder = ROOT / "kernels"
    return Target(name, folder / f"{name}.py", folder, "family", "kernels", (name,), functions)


def _changed(base: str) -> Iterator[Target]:
    """Our families whose kernels or launches are not those of a git revision, limited to the functions that changed."""
    for name in families():
        file = ROOT / "kernels" / f"{name}.py"
        before = subprocess.run(["git", "show", f"{base}:kernels/{name}.py"], cwd=ROOT, capture_output=True, text=True)
        if before.returncode and "exists on disk, but not in" not in before.stderr and "does not exist" not in before.stderr:
            raise UsageError(f"--changed {base}: {before.stderr.strip()}")
        old = _functions(before.stdout)
        now = _functions(file.read_text())
        changed = frozenset(f for f, text in now.items() if old.get(f) != text)
        if changed:
            yield family(name, changed)


def _functions(source: str) -> dict[str, str]:
    return {n.name: ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}


# -- the command --------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/mutate", description="Does the suite notice small edits of a kernel?")
    parser.add_argument("target", nargs="*", help="a family, or FILE[:function] (default: all our families)")
    parser.add_argument("--changed", metavar="BASE", help="only functions of our kernels that differ from a git revision")
    parser.add_argument("--again", type=Path, metavar="REPORT", help="only what survived in a report of --json")
    parser.add_argument("--subject", default="kernels", help="whose adapters call FILE, where it is no subject itself")
    parser.add_argument("--subject-path", action="append", default=[], help="the folder that the subject imports FILE from")
    parser.add_argument("--subject-python", default=sys.executable, help="the interpreter that holds the subject")
    parser.add_argument("--family", action="append", choices=families(), help="with FILE: only transforms of this family")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="mutants argued to be equivalent")
    parser.add_argument("--examples", type=int, default=GATE, help="of each transform, at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--operators", action="store_true", help="print the operators as a Markdown table")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    parser.add_argument("-n", dest="lanes", type=int, default=os.cpu_count() or 1, help="parallel processes")
    return parser


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    if options.operators:
        print(operators())
        return 0
    try:
        chosen, equivalent = targets(options), ledger(options.ledger)
        if options.list:
            for target in chosen:
                for mutant in target.mutants():
                    print(f"{target.name}:{mutant.lines[0]}  {mutant.identity}")
            return 0
        progress = _Progress(options.json)
        finished = _scores(chosen, equivalent, options, progress)
        progress.write(finished)
        return _conclude(progress.scores, finished)
    except (UsageError, InfraError) as error:
        print(f"ci/mutate: {error}")
        return 2


def _scores(chosen: list[Target], equivalent: dict[str, dict[str, str]], options, progress) -> bool:
    """Run every target; False if the user ended it."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        lanes, subject = None, None
        try:
            for target in chosen:
                if target.subject != subject:
                    if lanes:
                        lanes.close()
                    subject = target.subject
                    setup = Setup(subject, options.subject_python, tuple(str(Path(p).resolve()) for p in options.subject_path))
                    lanes = Lanes(setup, max(options.lanes, 1), Path(scratch) / target.name)
                score = Score(target.name, len(target.mutants()))
                progress.start(score)
                run(target, lanes, equivalent.get(target.name, {}) if target.ours else {}, score,
                    options.examples, progress)
                progress.done(score)
        except KeyboardInterrupt:
            return False
        finally:
            if lanes:
                lanes.close()
    return True


class _Progress:
    """A line every few seconds, and one for every finished target; the report is kept up to date with them."""

    def __init__(self, report: Path | None):
        self._last, self._report = time.monotonic(), report
        self.scores: list[Score] = []

    def start(self, score: Score) -> None:
        self.scores.append(score)

    def __call__(self, score: Score) -> None:
        if time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            print(f"  {score.target}: {len(score.results)} of {score.total} mutants, {len(score.survivors)} survive so far, "
                  f"{score.seconds:.0f} s", flush=True)
            self.write(finished=False)

    def write(self, finished: bool) -> None:
        if self._report:
            targets = [{**s.row(), "stale": s.stale, "results": [asdict(r) for r in s.results]} for s in self.scores]
            casefile.write(self._report, {"finished": finished, "targets": targets})

    def done(self, score: Score) -> None:
        self.write(finished=False)
        print("  " + ", ".join(f"{k} {v}" for k, v in score.row().items()), flush=True)
        for result in score.survivors:
            print(f"SURVIVED  {score.target}:{result.line}  {result.mutant}  ({result.tried} examples) {result.sentence}")
        if score.not_called:
            print(f"  not called by the subject's adapters, not counted: {', '.join(score.not_called)}")
        for text in score.stale:
            print(f"STALE     {score.target}: the ledger has {text}")


def _conclude(scores: list[Score], finished: bool) -> int:
    for line in table(scores):
        print(line)
    if not finished:
        print("ci/mutate: interrupted; the table and the report hold what was done")
        return 1
    entered, every = sum(s.in_ledger for s in scores if s.whole), sum(s.total for s in scores if s.whole)
    if entered > MOST_OF_LEDGER * every:
        print(f"ci/mutate: {entered} of {every} mutants are in the ledger, more than {MOST_OF_LEDGER:.0%}")
        return 1
    return 1 if any(s.survivors or s.stale for s in scores) else 0


def operators() -> str:
    """The operators as a Markdown table."""
    rows = [f"| {o.name} | {o.bug} | `{o.before.replace('|', chr(92) + '|')}` | `{o.after.replace('|', chr(92) + '|')}` |"
            for o in OPERATORS]
    return "\n".join(["| operator | the bug | of | makes |", "| --- | --- | --- | --- |", *rows])


def table(scores: list[Score]) -> list[str]:
    """The scores as a Markdown table."""
    if not scores:
        return ["nothing to mutate"]
    columns = list(scores[0].row())
    rows = [[str(v) for v in s.row().values()] for s in scores]
    whole = [s.row() for s in scores]
    if len(rows) > 1:
        total = Score("all", sum(s.total for s in scores), results=[r for s in scores for r in s.results],
                      equivalent={})
        sums = {k: sum(w[k] for w in whole) for k in columns if k not in ("target", "score")}
        killed = total.count(KILLED, TIMEOUT)
        score = round(killed / max(killed + sums["survived"], 1), 4)
        sums |= {"target": "all", "score": score, "seconds": round(sums["seconds"], 1)}
        rows.append([str(sums[k]) for k in columns])
    lines = [columns, ["---"] * len(columns), *rows]
    return ["", *("| " + " | ".join(cells) + " |" for cells in lines)]


if __name__ == "__main__":
    sys.exit(main())
