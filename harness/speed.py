"""`ci/bench --suite`, or `python -m harness.speed`: how many examples the suite gets through, and where their time goes.

Each transform's campaign, the gate's own, runs on a few dozen examples: on a CPU once with our form of Triton's interpreter and
once with the stock form, with all checks on both, the two taking turns; on a GPU once to compile and once to measure. What is
counted is what a gate counts: distinct examples with at least two requests.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import devices, registry
from harness.campaign import Campaign, Profile
from harness.client import ROOT, Fault, InfraError, UsageError, Worker, WorkerOptions, subject_name
from harness.contract import Contract, Kind
from strategies import domain

PAGE = ROOT / "docs" / "performance-suite.md"
FORMS = {"cpu": ("fast", "stock"), "cuda": ("fast",)}
THREE_REQUESTS = ("seqlens", "page_table")
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    """One campaign of one transform. `seconds` is wall clock; `cpu` what the suite's and the subject's process used; `worker`
    the parts of `seconds` in which the subject's process set memory up, ran the call, and looked at memory afterwards."""

    transform: str
    family: str
    form: str
    cases: str  # "drawn" or "three requests"
    counted: int
    seconds: float
    cpu: float
    worker: list[float]
    launches: int
    finding: str = ""


class Metered:
    """A worker whose launches are counted, and whose times are added up."""

    def __init__(self, worker: Worker):
        self._worker, self.seconds, self.launches = worker, [0.0, 0.0, 0.0], 0

    def __getattr__(self, name: str):
        return getattr(self._worker, name)

    def run(self, header: dict, blobs: list):
        reply, data = self._worker.run(header, blobs)
        for step in () if isinstance(reply, Fault) else reply["steps"]:
            self.launches += step["launches"]
            self.seconds = [a + b for a, b in zip(self.seconds, step.get("seconds", (0, 0, 0)))]
        return reply, data


def measure(contract: Contract, worker: Worker, form: str, examples: int, folder: Path, three: bool = False) -> Measured:
    """One campaign, timed."""
    strategy = domain.of(contract)
    if three:
        strategy = strategy.filter(lambda example: example.steps[0].batch_size() == 3)
    metered = Metered(worker)
    rules = contract.rules(worker.describe[contract.name]["variant"])
    campaign = Campaign(contract, metered, rules, strategy, Profile("speed", examples, derandomize=True, shrink=False),
                        folder=folder)
    used, started = cpu_seconds(worker.child), time.perf_counter()
    outcome = campaign.run()
    seconds = time.perf_counter() - started
    finding = outcome.reports[0].found.sentence if outcome.reports else ""
    return Measured(contract.name, contract.family, form, "three requests" if three else "drawn", outcome.counted, seconds,
                    cpu_seconds(worker.child) - used, metered.seconds, metered.launches, finding)


def cpu_seconds(child: int) -> float:
    """Processor time that this process and the subject's process have used so far."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / TICK


def rows(measured: list[Measured], device: str) -> list[tuple[str, ...]]:
    """A line for each group of campaigns, and the medians over the families."""
    groups = {f: [m for m in measured if m.family == f and m.cases == "drawn"] for f in sorted({m.family for m in measured})}
    three = {f"{f}, three requests": [m for m in measured if m.family == f and m.cases != "drawn"] for f in THREE_REQUESTS}
    lines, ratios, rates = [], [], []
    for name, members in {**groups, **three}.items():
        if not members:
            continue
        fast, stock = (_Sum(m for m in members if m.form == form) for form in ("fast", "stock"))
        line = [name, f"{fast.rate:.0f}", f"{fast.per_cpu:.0f}", f"{fast.launches:.0f}", *(f"{t:.1f}" for t in fast.parts)]
        if device == "cpu":
            line += [f"{stock.per_cpu:.1f}", f"{fast.per_cpu / stock.per_cpu:.1f}"]
        if name in groups:
            rates.append(fast.per_cpu)
            ratios.append(fast.per_cpu / stock.per_cpu if device == "cpu" else 0.0)
        lines.append(tuple(line))
    median = ["**median over families**", "", f"{statistics.median(rates):.0f}", *[""] * 6]
    return [*lines, tuple(median + (["", f"{statistics.median(ratios):.1f}"] if device == "cpu" else []))]


class _Sum:
    def __init__(self, members: Iterable[Measured]):
        members = list(members)
        counted, seconds, cpu = (sum(getattr(m, n) for m in members) for n in ("counted", "seconds", "cpu"))
        self.rate, self.per_cpu = counted / (seconds or 1), counted / (cpu or 1)
        self.launches = sum(m.launches for m in members) / (cpu or 1)
        worker = [sum(m.worker[k] for m in members) for k in range(3)]
        self.parts = [1000 * t / (counted or 1) for t in (seconds, *worker, seconds - sum(worker))]


HEAD = ("family", "counted examples/s", "per core second", "launches per core second", "ms an example", "setup", "run", "check",
        "suite")
HEAD_CPU = (*HEAD, "stock form, per core second", "ratio")


def table(measured: list[Measured], device: str) -> str:
    head = HEAD_CPU if device == "cpu" else HEAD
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows(measured, device)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def about(worker: Worker, device: str, examples: int) -> str:
    """What the numbers belong to."""
    gpu = devices.model(devices.gpus()[0]) if device == "cuda" else ""
    versions = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
    return (f"{gpu or f'{platform.machine()}, {os.cpu_count()} cores'}; {worker.tier}; {versions}; "
            f"{examples} counted examples of each transform.")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m harness.speed", description="Examples and launches per second, by family.")
    made.add_argument("--device", default="auto", help="cpu, cuda or auto")
    made.add_argument("--subject", default="kernels", help="whose kernels (default: kernels)")
    made.add_argument("--examples", type=int, default=15, help="counted examples of each transform (default: 15)")
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="a family or a transform (repeatable)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every campaign's numbers")
    made.add_argument("--write", action="store_true", help=f"keep the table in {PAGE.relative_to(ROOT)}")
    return made


def chosen(only: list[str]) -> list[Contract]:
    every = list(registry.contracts().values())
    if unknown := set(only) - {c.name for c in every} - {c.family for c in every}:
        raise UsageError(f"--only {min(unknown)}: neither a family nor a transform")
    return [c for c in every if not only or c.name in only or c.family in only]


def run(options) -> list[Measured]:
    if options.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {options.device}: known are auto, cpu, cuda")
    device = devices.resolve(options.device)
    if device == "cuda" and not devices.gpus():
        raise UsageError("--device cuda: no GPU is visible here (nvidia-smi lists none)")
    contracts = chosen(options.only)
    every = list(registry.contracts().values())
    workers = {form: Worker(WorkerOptions(subject_name(options.subject), device, interpreter=form,
                                          environment=devices.environment(device, 0)), every) for form in FORMS[device]}
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for contract in (c for c in contracts if workers["fast"].describe[c.name]["provided"]):
            for three in (False, True) if contract.family in THREE_REQUESTS and contract.kind is not Kind.HOST else (False,):
                for form, worker in workers.items():
                    given = contract, worker, form, options.examples, Path(folder), three
                    if device == "cuda":
                        measure(*given)  # compiles
                    measured.append(measure(*given))
    text = f"{about(workers['fast'], device, options.examples)}\n\n{table(measured, device)}"
    print(text)
    if options.write:
        _keep(text, device)
    if options.json:
        options.json.write_text(json.dumps([asdict(m) for m in measured], indent=1), encoding="utf-8")
    for worker in workers.values():
        worker.close()
    return measured


def _keep(text: str, device: str) -> None:
    """Put the table into the page, between the marks of its device."""
    first, last = (f"<!-- {device}: {which} of the table that --write makes -->\n" for which in ("start", "end"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(first)
    PAGE.write_text(f"{before}{first}\n{text}\n{last}{rest.partition(last)[2]}", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def main(given: list[str] | None = None) -> int:
    options = parser().parse_args(given)
    try:
        measured = run(options)
    except (UsageError, InfraError) as error:
        print(f"harness.speed: {error}")
        return 2
    for found in (m for m in measured if m.finding):
        print(f"harness.speed: {found.transform} has a finding, so its speed says little: {found.finding}")
    return 1 if any(m.finding for m in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
