"""`ci/sanitize`: compute-sanitizer over the saved corpus and the long-context cases, on a GPU.

Every tool first gets faults that it must see; a tool that misses one proves nothing, and the run is red. The worker runs
under the tool, the oracles outside; what the tool writes while a case runs belongs to that case. Exit 0 clean, 1 a finding,
2 it could not do its job.
"""

import argparse
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path

from harness import casefile, devices, layout
from harness.client import ROOT, InfraError, StandIn, UsageError
from harness.differential import Example, check, replay
from harness.sanitized import CannotRun, Sanitized, find_tool
from oracles.seqlens import CuSeqlens
from strategies.long_context import EXAMPLES

FAULTS = ROOT / "tests" / "meta" / "sanitizer_faults.py"
TOOLS = {  # tool -> the planted faults that it must see
    "memcheck": ("read_past_the_end", "write_past_the_end"),
    "initcheck": ("read_before_write",),
    "racecheck": ("shared_memory_race",),
    "synccheck": ("divergent_barrier",),
}
NOT_FAR = ("racecheck",)
FAR = 1 << 34  # bytes
ROOM = 1.25  # bytes that a case may take for each of its own; under initcheck it took 1.12
PROBE = Example((CuSeqlens((3, 5)),))


@dataclass
class Result:
    """What one tool made of one case: its findings, or the suite's."""

    tool: str
    case: str
    seconds: float
    findings: list[str] = field(default_factory=list)


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    try:
        results = run(options)
    except (CannotRun, InfraError, UsageError) as error:
        print(f"ci/sanitize: {error}")
        return 2
    write_junit(options.report / "sanitize.xml", results)
    bad = [r for r in results if r.findings]
    for r in bad:
        print(f"{r.tool}: {r.case}\n  " + "\n  ".join(r.findings[:8]))
    print(f"ci/sanitize: {len(results)} runs of cases under {len(options.tool)} tools, {len(bad)} with findings")
    return 1 if bad else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/sanitize", description="compute-sanitizer over the corpus and long-context cases.")
    parser.add_argument("--tool", action="append", choices=sorted(TOOLS), help="which tools (default: all)")
    parser.add_argument("--subject", default="kernels", help="whose kernels (default: kernels)")
    parser.add_argument("--subject-python", default=sys.executable, help="the interpreter that holds the subject")
    parser.add_argument("--subject-path", action="append", default=[], help="a folder to import the subject from")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a tool may take (default: 300)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="where sanitize.xml goes")
    return parser


def run(options: argparse.Namespace) -> list[Result]:
    """All tools over all cases."""
    options.tool = options.tool or list(TOOLS)
    command = find_tool()
    if not devices.gpus():
        raise CannotRun("no GPU is visible here (nvidia-smi lists none)")
    cases = {n: e for n, e in {**corpus(), **EXAMPLES}.items() if options.only in n}
    if not cases:
        raise CannotRun(f"no case has a name with {options.only!r}; nothing was run")
    results = []
    for tool in options.tool:
        start = time.monotonic()
        prove(command, tool, options)
        print(f"{tool}: sees its planted faults ({time.monotonic() - start:.0f} s)", flush=True)
        left = {n: why for n, e in cases.items() if (why := left_out(tool, size(e), devices.memory(devices.gpus()[0])))}
        for name, why in left.items():
            print(f"{tool}: left out: {name}: {why}", flush=True)
        mine = {n: e for n, e in cases.items() if n not in left}
        results += sweep(command, tool, mine, options)
        print(f"{tool}: {len(mine)} cases, {len(left)} left out, {time.monotonic() - start:.0f} s", flush=True)
    return results


def left_out(tool: str, needs: int, memory: int) -> str:
    """Why a case of `needs` bytes is not run under a tool on a GPU of `memory` bytes (0: not known), or ''."""
    if tool in NOT_FAR and needs >= FAR:
        return f"{tool} takes minutes to clear a far table, and looks at shared memory, which it has none of"
    if memory and needs * ROOM > memory:
        return f"takes {needs * ROOM / 2**30:.0f} GiB, and this GPU has {memory / 2**30:.0f}"
    return ""


def size(example: Example) -> int:
    """Bytes of the first call's memories."""
    case = example.steps[0]
    return sum(layout.place(case.contract, case.arguments(), example.layout, example.seed, 0).sizes)


def corpus() -> dict[str, Example]:
    """The saved cases that lie inside their contract."""
    saved = {p.stem: casefile.read(p).example for p in sorted((ROOT / "tests" / "corpus").glob("*.json"))}
    return {name: example for name, example in saved.items() if not example.outside}


def prove(command: str, tool: str, options: argparse.Namespace) -> None:
    """The tool must see each of its planted faults, and nothing in an honest call."""
    under = Sanitized(command, tool, str(FAULTS), options)
    try:
        for fault in ("honest", *TOOLS[tool]):
            check(PROBE, StandIn(under.worker, fault), {})
            under.worker.restart_child()
            seen = under.news()
            if bool(seen) == (fault == "honest"):
                what = f"reports {seen[0]!r} in an honest call" if seen else f"does not see the planted fault {fault}"
                raise CannotRun(f"{tool} {what}; this run would prove nothing")
    finally:
        under.close()


def sweep(command: str, tool: str, cases: dict[str, Example], options: argparse.Namespace) -> list[Result]:
    """Every case under one tool."""
    under = Sanitized(command, tool, options.subject, options)
    results, deadline = [], time.monotonic() + options.limit
    try:
        for name, example in cases.items():
            describe = under.worker.describe[example.contract.name]
            if not describe["provided"]:
                continue
            if time.monotonic() > deadline:
                raise CannotRun(f"{tool} took more than {options.limit:.0f} s; {len(results)} of {len(cases)} cases were run")
            start = time.monotonic()
            rules = example.contract.rules(describe["variant"])
            found = [f"{f.check}: {f.sentence}" for f in replay(example, under.worker, rules)]
            results.append(Result(tool, name, time.monotonic() - start, found + under.news()))
    finally:
        rest = under.close()
    if not results:
        raise CannotRun(f"{tool}: the subject provides none of the {len(cases)} cases' transforms; nothing was run")
    if rest:
        results.append(Result(tool, "at the end of the process", 0.0, rest))
    return results


def write_junit(path: Path, results: list[Result]) -> None:
    """One test case per tool and case."""
    suite = xml.Element("testsuite", name="ci/sanitize", tests=str(len(results)),
                        failures=str(sum(bool(r.findings) for r in results)))
    for r in results:
        case = xml.SubElement(suite, "testcase", classname=r.tool, name=r.case, time=f"{r.seconds:.3f}")
        if r.findings:
            xml.SubElement(case, "failure", message=r.findings[0]).text = "\n".join(r.findings)
    path.parent.mkdir(parents=True, exist_ok=True)
    xml.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


if __name__ == "__main__":
    sys.exit(main())
