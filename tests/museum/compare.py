"""What other ways of testing see of the museum: `python -m tests.museum.compare [--viz COMMAND] [ID...]`.

The same examples of the same strategies for every column, seed 0, up to the gate's budget: the suite; its red zones alone
(canaries around and between rows); an ordinary test (`plain.py equal`); triton-viz's sanitizer (`plain.py viz`, where its
command is given). Writes docs/comparison.md and report/comparison.json.
"""

import argparse
import json
import re
import subprocess
import sys
import time

from harness.client import ROOT, StandIn
from harness.differential import check
from harness.findings import CheckOptions
from tests.museum import catalogue, run

PAGE = ROOT / "docs" / "comparison.md"
PLAIN = str(run.HERE / "plain.py")
TOOLS = {"suite": "the suite", "redzones": "red zones only", "equal": "ordinary test", "viz": "triton-viz 3.0"}
KERNELS = "triton-viz looks at Triton kernels only; exhibits in PyTorch or plain Python are out of its reach"


def suite(room: run.Room, exhibit) -> dict:
    """All checks."""
    hunted = run.hunt(room, exhibit, 0)
    return {"seen": bool(hunted.kind), "examples": hunted.examples, "seconds": hunted.seconds}


def redzones(room: run.Room, exhibit) -> dict:
    """Nothing but the bytes that belong to no tensor; a crash shows as well."""
    stand, tried, started = StandIn(room.worker, exhibit.id), 0, time.monotonic()

    def visit(example) -> None:
        nonlocal tried
        tried += 1
        if exhibit.lane != "inside":
            room.worker.restart_child()
        if check(example, stand, run.rules(exhibit), CheckOptions(checks=("redzones",), rules=())):
            raise Found

    try:
        run.search(exhibit, run.budget(exhibit, run.BUDGET), 0, visit)
    except Found:
        return {"seen": True, "examples": tried, "seconds": time.monotonic() - started}
    except run.Over:
        pass
    return {"seen": False, "examples": tried, "seconds": time.monotonic() - started}


class Found(BaseException):
    """Ends a search."""


def others(command: list[str], tool: str, ids: list[str]) -> dict[str, dict]:
    """`plain.py` under a command, exhibit by exhibit."""
    lines = subprocess.run([*command, PLAIN, tool, *ids], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {row["id"]: row for row in map(json.loads, lines.splitlines())}


def uses_triton(name: str) -> bool:
    """Whether an exhibit's body launches a kernel, as its file says."""
    for path in run.HERE.glob("*.py"):
        found = re.search(rf'@exhibit\("{name}"\)\ndef .*?(?=\n@exhibit|\Z)', path.read_text(), re.DOTALL)
        if found:
            return "[(" in found.group() or "[grid" in found.group()
    raise LookupError(name)


def page(results: dict[str, dict[str, dict]], tools: list[str]) -> str:
    """The table as Markdown."""
    bugs = catalogue.bugs()
    lines = ["# The museum under other ways of testing", "",
             "Written by `python -m tests.museum.compare`. The same bugs, strategies and examples for every column (seed 0, up "
             f"to {run.BUDGET} counted): examples and seconds to the first sign of the bug; empty: not seen. *Ordinary test*: "
             "contiguous tensors, zeroed outputs, what must be written compared by `torch.equal`. *Red zones only*: canaries "
             "around and between rows.", "", "| column | seen | of | clean twins called faulty | median seconds |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for tool in tools:
        rows = [r[tool] for name, r in results.items() if tool != "viz" or uses_triton(name)]
        found = sorted(r["seconds"] for r in rows if _seen(r))
        alarms = sum(bool(r.get("false_alarm")) for r in rows)
        median = f"{found[len(found) // 2]:.2f}" if found else ""
        lines.append(f"| {TOOLS[tool]} | {len(found)} | {len(rows)} | {alarms} | {median} |")
    lines += ["", *([KERNELS + ".", ""] if "viz" in tools else []),
              "| id | bug | " + " | ".join(TOOLS[t] for t in tools) + " |", "| --- | --- |" + " ---: |" * len(tools)]
    for name, row in results.items():
        cells = ["n/a" if t == "viz" and not uses_triton(name) else _cell(row[t]) for t in tools]
        lines.append(f"| {name} | {bugs[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _seen(result: dict) -> bool:
    return result["seen"] and not result.get("false_alarm")


def _cell(result: dict) -> str:
    if result.get("false_alarm"):
        return "also in the clean twin"
    if not result["seen"]:
        return ""
    how = f" ({result['how']})" if result.get("how") in ("hang", "crash") else ""
    return f"{result['examples'] or '?'}, {result['seconds']:.2f} s{how}"


def main() -> int:
    parser = argparse.ArgumentParser("compare", description=__doc__.splitlines()[0])
    parser.add_argument("id", nargs="*", help="exhibits (default: all)")
    parser.add_argument("--viz", default="", help="triton-viz's command, e.g. triton-sanitizer; the column is left out without")
    options = parser.parse_args()
    ids = options.id or list(catalogue.EXHIBITS)
    room = run.Room()
    results = {name: {"suite": suite(room, catalogue.EXHIBITS[name]), "redzones": redzones(room, catalogue.EXHIBITS[name])}
               for name in ids}
    columns = {"equal": [sys.executable]} | ({"viz": options.viz.split()} if options.viz else {})
    for tool, command in columns.items():
        for name, row in others(command, tool, ids).items():
            results[name][tool] = row
    (ROOT / "report").mkdir(exist_ok=True)
    (ROOT / "report" / "comparison.json").write_text(json.dumps(results, indent=1) + "\n")
    if not options.id:
        PAGE.write_text(page(results, ["suite", "redzones", *columns]))
    print(page(results, ["suite", "redzones", *columns]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
