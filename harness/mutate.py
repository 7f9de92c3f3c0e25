"""`ci/mutate`: how many small edits of a kernel does the suite notice? Exit 0 if all but those in the ledger, 1 if one
survived or the ledger is stale, 2 on an error of use.

A mutant of ours is tried first on the examples that killed others before, and only what survives those on a gate's worth.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harness import casefile, registry
from harness.client import ROOT, InfraError, UsageError
from harness.mutant_lanes import (GATE, INCOMPETENT, KILLED, SURVIVED, TIMEOUT, UNREACHED, Lanes, Name, Probe, Result, Setup,
                                  Target)
from harness.mutant_ledger import KILLERS, LEDGER, Entry, killers, learn, ledger
from harness.mutants import OPERATORS, Mutant, mutants

ROUNDS = (24, 96)  # examples of each transform at first, and for what survived those; a gate's worth for the rest
LEDGER_TRIES = 5  # examples on which a mutant of the ledger is tried, unless everything is asked for
MOST_OF_LEDGER = 0.15
PAGE = ROOT / "docs" / "mutation.md"


# -- one target ---------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """A target's mutants and what became of them."""

    target: str
    total: int
    examples: int = 0
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    not_called: list[str] = field(default_factory=list)
    whole: bool = True

    def count(self, *outcomes: str) -> int:
        return sum(r.outcome in outcomes for r in self.results)

    @property
    def open(self) -> list[Result]:
        """What nothing noticed, and the ledger does not excuse."""
        return [r for r in self.results if r.outcome in (SURVIVED, UNREACHED) and r.mutant not in self.entries]

    def row(self) -> dict[str, int | float | str]:
        """The score is of the mutants that were executed, load, and are not in the ledger: how many of them were killed."""
        unseen = [r.mutant for r in self.results if r.outcome in (SURVIVED, UNREACHED)]
        excused = [self.entries[i] for i in unseen if i in self.entries]
        counts = Counter(r.outcome for r in self.open)
        return _scored({
            "target": self.target, "mutants": self.total, "killed": self.count(KILLED), "timeout": self.count(TIMEOUT),
            "incompetent": self.count(INCOMPETENT), "equivalent": sum(not e.blind for e in excused),
            "blind spots": sum(e.blind for e in excused), "survived": counts[SURVIVED], "unreached": counts[UNREACHED],
            "not tried": self.total - len(self.results), "score": 0.0, "seconds": round(self.seconds, 1)})


def _scored(row: dict) -> dict:
    killed = row["killed"] + row["timeout"]
    return {**row, "score": round(killed / (killed + row["survived"]), 3) if killed + row["survived"] else 1.0}


@dataclass(frozen=True)
class Plan:
    """What a target's mutants are tried on: first what killed mutants before, then up to `budget` examples of each transform.

    Mutants of the ledger are tried on a few of the first, on all if `full`.
    """

    entries: dict[str, Entry]
    killers: dict[Name, int]
    budget: int
    full: bool = False


def run(target: Target, lanes: Lanes, plan: Plan, score: Score, say) -> None:
    """Try every mutant of a target; `score` fills up as it goes, so that it is valid whenever the run ends."""
    started = time.monotonic()
    source = target.file.read_text()
    found = {m.identity: m for m in target.mutants()}
    score.entries = {i: plan.entries[i] for i in found if i in plan.entries}
    score.whole = target.functions is None and target.only is None
    if score.whole:
        score.stale = [f"{i}: there is no such mutant" for i in plan.entries if i not in found]
    todo, results = list(found.values()), {}
    for fresh in _stages(target, lanes, plan):
        if not target.ours and target.functions is None and not score.results:
            todo = _called(todo, fresh, score)
        score.examples += len(fresh)
        lanes.everywhere("hold", fresh)
        passed = {r.mutant for r in results.values() if r.outcome == SURVIVED}
        tasks = ((target, m, m.applied(source), LEDGER_TRIES if m.identity in plan.entries and not plan.full else None,
                  m.identity in passed) for m in todo)
        for result in lanes.spread("attempt", tasks):
            results[result.mutant] = result
            score.results = list(results.values())
            score.seconds = time.monotonic() - started
            say(score)
        again = {r.mutant for r in score.results if r.outcome in (SURVIVED, UNREACHED)} if plan.full else \
                {r.mutant for r in score.open}
        todo = [m for m in todo if m.identity in again]
        if not todo:
            break
    score.stale += [f"{r.mutant}: it is killed ({r.sentence})" for r in score.results
                    if r.mutant in plan.entries and r.outcome in (KILLED, TIMEOUT)]
    score.seconds = time.monotonic() - started
    score.results.sort(key=lambda r: list(found).index(r.mutant))


def _stages(target: Target, lanes: Lanes, plan: Plan) -> Iterator[list[Probe]]:
    """The examples of each round."""
    transforms = [t for t in lanes.everywhere("provided")[0] if registry.contracts()[t].family in target.families]
    lines = target.lines()
    if plan.killers:
        known = {t: {n: k for n, k in plan.killers.items() if n.transform == t} for t in transforms}
        yield [p for group in lanes.spread("killers", ((target, lines, t, k) for t, k in known.items() if k)) for p in group]
    first = 0
    for count in sorted({min(n, plan.budget) for n in (*ROUNDS, plan.budget)}):
        tasks = [(target, lines, t, first, count) for t in transforms]
        fresh = [p for group in lanes.spread("probes", tasks) for p in group]
        yield fresh
        first = count
        if not target.ours:  # most transforms have nothing to do with another's file
            transforms = [t for t in transforms if any(p.name.transform == t for p in fresh)]


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
    for text, target in zip(options.target, found):
        _something_to_mutate(text, target)
    if not options.again:
        return found
    try:
        report = json.loads(options.again.read_text())["targets"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--again {options.again}: no report of ci/mutate --json") from None
    survived = {t["target"]: frozenset(r["mutant"] for r in t["results"] if r["outcome"] in (SURVIVED, UNREACHED))
                for t in report}
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


def _something_to_mutate(text: str, target: Target) -> None:
    """A target without mutants would have a perfect score.

    Raises:
        UsageError: the file has no Triton functions, or none of the given name.
    """
    try:
        source = target.file.read_text()
        names = list(dict.fromkeys(m.function for m in mutants(source)))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{text}: {target.file} is no Python file: {error}") from None
    if not names:
        raise UsageError(f"{text}: nothing to mutate, {target.file} has no Triton function that could be; it has "
                         f"{', '.join(_functions(source)) or 'no function at all'}")
    if target.functions and target.functions.isdisjoint(names):
        raise UsageError(f"{text}: nothing to mutate in a function of that name; {target.file} has {', '.join(names)}")


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
    parser.add_argument("--full", action="store_true", help="try mutants of the ledger, too, on everything")
    parser.add_argument("--learn", action="store_true", help=f"keep the examples that killed in {KILLERS.relative_to(ROOT)}")
    parser.add_argument("--report", type=Path, metavar="DIR", help="leave the table where ci/gate --report DIR shows it")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
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
        chosen, entries = targets(options), ledger(options.ledger)
        if options.list:
            for target in chosen:
                for mutant in target.mutants():
                    print(f"{target.name}:{mutant.lines[0]}  {mutant.identity}")
            return 0
        if options.write:
            section(chosen)  # before hours of work: can the table be written at all?
        progress = _Progress(options.json)
        finished = _scores(chosen, entries, options, progress)
        progress.write(finished)
        if options.report:
            casefile.write(options.report / "mutants.json", [s.row() for s in progress.scores])
        if finished and options.write:
            written(section(chosen), "\n".join(table([s.row() for s in progress.scores])))
        return _conclude(progress.scores, finished)
    except (UsageError, InfraError) as error:
        print(f"ci/mutate: {error}")
        return 2


def _scores(chosen: list[Target], entries: dict[str, dict[str, Entry]], options, progress) -> bool:
    """Run every target; False if the user ended it."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        lanes, subject, known = None, None, killers()
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
                plan = Plan(entries.get(target.name, {}), known.get(target.name, {}), options.examples, options.full)
                run(target, lanes, plan if target.ours else Plan({}, {}, options.examples), score, progress)
                progress.done(score)
                if options.learn and target.ours and score.whole:
                    learn(target.name, Counter(r.name for r in score.results if r.name and r.outcome == KILLED))
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
            print(f"  {score.target}: {len(score.results)} of {score.total} mutants, {len(score.open)} survive so far, "
                  f"{score.seconds:.0f} s", flush=True)
            self.write(finished=False)

    def write(self, finished: bool) -> None:
        if self._report:
            targets = [{**s.row(), "stale": s.stale, "results": [asdict(r) for r in s.results]} for s in self.scores]
            casefile.write(self._report, {"finished": finished, "targets": targets})

    def done(self, score: Score) -> None:
        self.write(finished=False)
        print("  " + ", ".join(f"{k} {v}" for k, v in score.row().items()), flush=True)
        for result in score.open:
            print(f"{result.outcome.upper():9} {score.target}:{result.line}  {result.mutant}  ({result.tried} examples)")
        if score.not_called:
            print(f"  not called by the subject's adapters, not counted: {', '.join(score.not_called)}")
        for text in score.stale:
            print(f"STALE     {score.target}: the ledger has {text}")


def _conclude(scores: list[Score], finished: bool) -> int:
    print("\n" + "\n".join(table([s.row() for s in scores])))
    if not finished:
        print("ci/mutate: interrupted; the table and the report hold what was done")
        return 1
    whole = [s for s in scores if s.whole]
    entered, every = sum(len(s.entries) for s in whole), sum(s.total for s in whole)
    if entered > MOST_OF_LEDGER * every:
        print(f"ci/mutate: {entered} of {every} mutants are in the ledger, more than {MOST_OF_LEDGER:.0%}")
        return 1
    return 1 if any(s.open or s.stale for s in scores) else 0


# -- what is published --------------------------------------------------------------------------------------------------


def operators() -> str:
    """The operators as a Markdown table."""
    rows = [f"| {o.name} | {o.bug} | `{o.before.replace('|', chr(92) + '|')}` | `{o.after.replace('|', chr(92) + '|')}` |"
            for o in OPERATORS]
    return "\n".join(["| operator | the bug | of | makes |", "| --- | --- | --- | --- |", *rows])


def table(rows: list[dict]) -> list[str]:
    """The rows of scores, and their sum, as a Markdown table."""
    if not rows:
        return ["nothing to mutate"]
    if len(rows) > 1:
        rows = [*rows, _scored({k: "all" if k == "target" else round(sum(r[k] for r in rows), 1) for k in rows[0]})]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in r.values()] for r in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def section(chosen: list[Target]) -> str:
    """The part of the page that a run may write.

    Raises:
        UsageError: a part of our kernels, whose rows would stand beside those of another state of the suite.
    """
    if not all(t.ours for t in chosen):
        return chosen[0].subject
    if [t.name for t in chosen if t.functions is None and t.only is None] != families():
        raise UsageError("--write publishes all our kernels; run ci/mutate --write without targets")
    return "kernels"


def written(part: str, text: str) -> None:
    """Put a table between the marks of its part of the page.

    Raises:
        UsageError: the page has no such part.
    """
    begin, end = f"<!-- ci/mutate --write: {part} -->", "<!-- end -->"
    page = PAGE.read_text(encoding="utf-8")
    if begin not in page:
        raise UsageError(f"--write: {PAGE.relative_to(ROOT)} has no part {begin}")
    head, rest = page.split(begin, 1)
    PAGE.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
