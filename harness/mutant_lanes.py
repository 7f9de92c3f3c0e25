"""Mutants on their examples: lanes, each a process with two workers, draw and trace the examples once and try mutants on them.

A mutant is the kernel's file with one edit (harness/mutants.py), in a folder of its own, loaded by an ordinary worker as an
ordinary subject. Of the examples only those count that execute the edited statement, cheap and successful ones first, until a
check finds something.
"""

import ast
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from harness import casefile, registry
from harness.campaign import PROFILES
from harness.client import Fault, InfraError, UsageError, Worker, WorkerOptions
from harness.contract import Contract
from harness.differential import Example, check, harm
from harness.findings import Found
from harness.generation import Enough, fresh_examples
from harness.mutants import Mutant, mutants
from strategies import domain

GATE = PROFILES["gate"].counted  # examples per transform inside the contract
OUTSIDE = 4  # for so many examples inside the contract, one that breaks each precondition
MOST_RAISED = 30  # a mutant that raises on so many examples, and returns on none, is incompetent
HANG = 3  # a call is a hang when it takes so many times as long as the slowest example, and two seconds

KILLED, TIMEOUT, SURVIVED, UNREACHED, INCOMPETENT = "killed", "timeout", "survived", "unreached", "incompetent"
INSIDE, BESIDE = "inside", "beside"


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


@dataclass(frozen=True)
class Name:
    """Which example: its transform, on which side of the contract's border it was drawn, and its number among the draws."""

    transform: str
    side: str
    number: int


@dataclass
class Probe:
    """An example, the lines of the mutated file that it executes, and what it takes."""

    name: "Name"
    example: Example
    rules: dict[str, str]
    kills: Counter = field(default_factory=Counter)
    lines: frozenset[int] = frozenset()
    seconds: float = 0.0

    def judge(self, worker) -> list[Found]:
        if self.example.outside:
            return harm(self.example, self.example.outside, worker, self.rules)
        return check(self.example, worker, self.rules, thorough=False)

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
    name: Name | None = None
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
        """Examples `first` to `count` of a transform that execute one of the lines, inside the contract and beside it."""
        wanted = [Name(transform, INSIDE, n) for n in range(first, count)]
        if target.ours:
            each = sum(p.broken is not None for p in registry.contracts()[transform].preconditions)
            beside = (min(each * n // OUTSIDE, max(n, GATE)) for n in (first, count))
            wanted += [Name(transform, BESIDE, n) for n in range(*beside)]
        return self._traced(target, lines, wanted, {})

    def killers(self, target: Target, lines: frozenset[int], transform: str, kills: dict[Name, int]) -> list[Probe]:
        """The named examples of a transform, those that execute one of the lines."""
        return self._traced(target, lines, list(kills), kills)

    def _traced(self, target: Target, lines: frozenset[int], wanted: list[Name], kills: dict[Name, int]) -> list[Probe]:
        """Run the examples on the file as it is, to see which lines they execute.

        A finding of ours on a file as it is would make every mutant of it look killed, so it is an error; of another
        subject the example is left out.
        """
        found = []
        for name, example in _examples(wanted):
            if self._declined(example):
                continue
            worker = _Tracing(self._original, target.file)
            rules = example.contract.rules(self._original.describe[name.transform]["variant"])
            probe = Probe(name, example, rules, Counter({"": kills.get(name, 0)}))
            started = time.monotonic()
            wrong = probe.judge(worker)
            if wrong and target.ours:
                raise InfraError(f"{name.transform} is wrong before any mutation, on {example}: {wrong[0].sentence}")
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

    def attempt(self, target: Target, mutant: Mutant, text: str, most: int | None, passed: bool) -> Result:
        """Try a mutant until something is found, on at most so many examples; `passed`: other examples found nothing."""
        started = time.monotonic()
        able = sorted((p for p in self._probes if p.reaches(mutant)), key=lambda p: -p.promise(mutant.operator))
        if not able:
            return Result(mutant.identity, mutant.lines[0], UNREACHED)
        result = Result(mutant.identity, mutant.lines[0], SURVIVED)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            self._mutant.hold(*planted(target, text, Path(folder), self._setup), target.families)
            self._mutant.limits.hung = False
            self._until_found(result, mutant, able[:most], passed)
        result.seconds = round(time.monotonic() - started, 3)
        return result

    def _until_found(self, result: Result, mutant: Mutant, probes: list[Probe], passed: bool) -> None:
        raised = None
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
    result.name, result.example = probe.name, repr(probe.example)
    result.outcome = {"hang": TIMEOUT, "unloadable": INCOMPETENT}.get(found.buffer, KILLED)
    probe.kills[mutant.operator] += 1


def _examples(wanted: list[Name]) -> Iterator[tuple[Name, Example]]:
    """The named examples of one transform; beside the contract only what breaks it, as the others there are ordinary."""
    for side, strategy in ((INSIDE, domain.of), (BESIDE, _broken)):
        names = [n for n in wanted if n.side == side]
        if names:
            examples = drawn(strategy(registry.contracts()[names[0].transform]), max(n.number for n in names) + 1)
            yield from ((n, examples[n.number]) for n in names if n.number < len(examples))


def _broken(contract: Contract) -> SearchStrategy[Example]:
    return domain.outside(contract).filter(lambda example: example.outside)


def drawn(strategy, count: int) -> list[Example]:
    """The first `count` examples of a strategy, the same ones on every machine, and whatever the count up to a gate's."""
    examples: list[Example] = []

    @settings(max_examples=max(count, GATE), phases=[Phase.generate], database=None, derandomize=True, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(example) -> None:
        if len(examples) == count:
            raise Enough
        examples.append(example)

    with fresh_examples(), suppress(Enough):
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
