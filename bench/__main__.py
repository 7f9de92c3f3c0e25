"""Kernel times side by side: ci/bench [--quick] [--family F] [--upstream NAME=DIR]... ; ci/bench --render results.json

Every subject is measured in a process of its own, one after another, on the first GPU: our kernels (the checked call, a
plan, a replayed graph), eager PyTorch, and each SGLang that is unpacked in a folder. Results go to --out as they come.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import composite, render, sizes
from harness import devices, registry
from harness.contract import Kind

ROOT = Path(__file__).resolve().parent.parent
HEADLINE = ("decode_metadata", "fused_metadata_copy_multi")
RESTARTS = 4


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.suite:
        return subprocess.run([sys.executable, "-m", "harness.speed", *options.rest]).returncode
    if options.render:
        return render.write(read(options.render), options.docs, options.page)
    device = devices.resolve(options.device)
    plan = {"kernels": ("kernels", []), "eager": ("eager", [])}
    plan |= {name: ("sglang", [folder]) for name, folder in map(_upstream, options.upstream)}
    chosen, end = wanted(options, device), time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        lines.touch()
        for k, (name, (subject, paths)) in enumerate(plan.items()):
            extra = [[n, s.batch, s.context] for n in composite.NAMES.get(subject, ()) for s in headline(chosen)]
            rows = extra + [[n, s.batch, s.context] for n, s in chosen]
            seconds = (end - time.monotonic()) / (len(plan) - k) if subject != "kernels" else 0.5 * options.seconds
            measure({"subject": subject, "name": name, "device": device, "paths": [str(ROOT), *paths], "out": str(lines),
                     "seconds": max(seconds, 1), "each": options.each}, rows, Path(folder) / "request.json")
            results = collect(lines)
            options.out.write_text(json.dumps(results, indent=1))
    for line in render.console(results):
        print(line)
    print(f"{options.out}: {len(results['rows'])} rows; ci/bench --render {options.out} writes the page and its plots")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ci/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes instead of all")
    parser.add_argument("--family", action="append", default=[], help="only transforms of this family (repeatable)")
    parser.add_argument("--upstream", action="append", default=[], metavar="NAME=DIR", help="an SGLang unpacked in DIR")
    parser.add_argument("--device", default="auto", help="cuda, or cpu (Triton's interpreter: tiny sizes, a test of ci/bench)")
    parser.add_argument("--seconds", type=float, default=240, help="of the whole run; the rest is left out, and listed")
    parser.add_argument("--each", type=float, default=0.015, help="seconds a measurement")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--render", type=Path, metavar="JSON", help="write the page and plots of a run; needs matplotlib")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where --render writes")
    parser.add_argument("--page", default="performance", help="the page that --render writes (default: performance)")
    parser.add_argument("--suite", action="store_true", help="the speed of the suite instead (python -m harness.speed)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked; an error of use ends the process with one line."""
    parser = arguments()
    options, options.rest = parser.parse_known_args(argv)
    if options.rest and not options.suite:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    families = sorted({c.family for c in registry.contracts().values()})
    for family in options.family:
        if family not in families:
            parser.error(f"--family {family}: known are {', '.join(families)}")
    for text in options.upstream:
        if "=" not in text or not Path(_upstream(text)[1], "sglang").is_dir():
            parser.error(f"--upstream {text}: NAME=DIR, where DIR holds a folder sglang")
    return options


def wanted(options: argparse.Namespace, device: str) -> list[tuple[str, sizes.Size]]:
    """Transforms and sizes, the headlines first, so that a short run has them."""
    contracts = registry.contracts()
    names = [n for n, c in contracts.items() if c.kind is not Kind.HOST and (not options.family or c.family in options.family)]
    names.sort(key=lambda n: n not in HEADLINE)
    sweep = [sizes.Size(2, 64)] if device == "cpu" else sizes.sweep(options.quick)
    rows = [(n, s) for s in sweep for n in names]
    seen, kept = set(), []
    for n, s in rows:  # where the context makes no difference, a batch is measured once
        key = (n, s.batch, s.context if sizes.SIZES[n].by_context else 0)
        if key not in seen:
            seen.add(key)
            kept.append((n, s))
    return kept


def headline(chosen: list[tuple[str, sizes.Size]]) -> list[sizes.Size]:
    return [s for n, s in chosen if n == "decode_metadata"]


def measure(request: dict, rows: list, path: Path) -> None:
    """Let children measure the rows; a row that takes its process along is named, and the rest goes on."""
    out, first, end = Path(request["out"]), True, time.monotonic() + request["seconds"]
    for _ in range(1 + RESTARTS):
        before = len(out.read_text().splitlines())
        left = max(1.0, end - time.monotonic())
        path.write_text(json.dumps({**request, "rows": rows, "first": first, "seconds": round(left)}))
        try:
            status = subprocess.run([sys.executable, "-m", "bench.child", str(path)], cwd=ROOT, timeout=left + 60,
                                    capture_output=True, text=True)
            said = f"exit {status.returncode}: {(status.stderr.strip().splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            said = "no end in sight: killed"
        written = [json.loads(line) for line in out.read_text().splitlines()[before:]]
        if any("done" in line for line in written):
            return
        started = [line["started"] for line in written if "started" in line]
        with out.open("a") as file:
            place = dict(zip(("transform", "batch", "context"), started[-1] if started else ("", 0, 0)))
            file.write(json.dumps({"subject": request["name"], **place, "failed": f"the process ended ({said})"}) + "\n")
        if not started:
            return
        rows, first = rows[rows.index(started[-1]) + 1 :], False


def collect(lines: Path) -> dict:
    """The machine, the floors and the rows of a run."""
    results = {"when": time.strftime("%Y-%m-%d"), "machine": {}, "floors": [], "rows": []}
    for line in map(json.loads, lines.read_text().splitlines()):
        if "machine" in line:
            results["machine"][line["subject"]] = line["machine"]
        elif "floor" in line:
            results["floors"].append(line)
        elif "transform" in line:
            results["rows"].append(line)
    return results


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"ci/bench --render {path}: no results there: {error}") from None


def _upstream(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    return name, str(Path(folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
