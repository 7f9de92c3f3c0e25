"""What other ways of testing see of the museum: `python -m tests.museum.compare --write [--viz COMMAND]`. See --help.

The same examples of the same strategies for every column, seed 0, up to the gate's budget. Every row is kept in a file as soon
as it is measured, so that a column can be measured alone, elsewhere, and merged.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from pathlib import Path

from harness import devices
from harness.client import ROOT, StandIn, UsageError
from harness.differential import check
from harness.findings import CheckOptions
from harness.sanitized import ENVIRONMENT, CannotRun, find_tool, told, under
from tests.museum import catalogue, plain, run
from tests.museum.comparison import TOOLS, Column, merged, page, save, summary

PAGE = ROOT / "docs" / "comparison.md"
PLAIN = str(run.HERE / "plain.py")
FOR_KERNELS = ("viz", *plain.ON_A_GPU)  # these look at Triton kernels; most exhibits are PyTorch


# -- our own checks -------------------------------------------------------------------------------------------------------


def ours(tool: str, ids: list[str], column: Column) -> Iterator[None]:
    """All checks, of which only findings of the declared kind count; or nothing but the bytes that belong to no tensor."""
    room = run.Room()
    column.on = f"{os.cpu_count()} cores, {plain.ON}"
    for name in ids:
        column.rows[name] = plain.with_twin(name, lambda *what: _hunt(room, tool, catalogue.EXHIBITS[name], *what))
        yield


def _hunt(room: run.Room, tool: str, exhibit, function: str, counted: int) -> dict:
    stand, tried, started, found, how = StandIn(room.worker, function), 0, time.monotonic(), [], ""

    def visit(example) -> None:
        nonlocal tried, how
        if tool == "redzones" and time.monotonic() - started > plain.LIMIT:
            how = plain.LATE
            raise run.Over
        tried += 1
        if tool == "redzones":
            if exhibit.lane != "inside":
                room.worker.restart_child()
            options = CheckOptions(checks=("redzones",), rules=())
            found[:] = [f for f in check(example, stand, run.rules(exhibit), options) if f.check == "redzones"]
        elif function == exhibit.id:
            found[:] = filter(None, [room.caught(exhibit, example)])
        else:
            found[:] = room.judge(exhibit, function, example)
        if found:
            raise run.Over

    try:
        run.search(exhibit, run.budget(exhibit, counted), 0, visit)
    except run.Over:
        pass
    how = " ".join(found[0].kind) if found else how
    return {"seen": bool(found), "how": how, "examples": tried, "seconds": time.monotonic() - started}


# -- others ---------------------------------------------------------------------------------------------------------------


def others(tool: str, ids: list[str], column: Column, command: list[str]) -> Iterator[None]:
    """`plain.py` under a command, exhibit by exhibit."""
    process = subprocess.Popen([*command, PLAIN, tool, *ids], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        row = json.loads(line)
        if "on" in row:
            column.on = f"{os.cpu_count()} cores, {row['on']}"
        else:
            column.rows[row.pop("id")] = row
            yield
    if process.wait():
        raise CannotRun(f"{' '.join(command)} ended with status {process.returncode}")


def sanitized(tool: str, ids: list[str], column: Column, command: str, jobs: int) -> Iterator[None]:
    """A process under compute-sanitizer per function: a memory fault ends it, and what it wrote belongs to that function."""
    versions = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.split()
    sanitizer = f"compute-sanitizer {versions[-1] if versions else '?'}"
    column.on = f"{devices.model(devices.gpus()[0])}, {plain.ON}, {sanitizer}, {jobs} processes"
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        hunts = {pool.submit(plain.with_twin, name, lambda *what: _one(tool, command, *what)): name for name in ids}
        for hunted in as_completed(hunts):
            try:
                column.rows[hunts[hunted]] = hunted.result()
            except RuntimeError as error:
                failed.append(f"{hunts[hunted]}: {str(error).splitlines()[-1]}")
            yield
    if failed:
        raise CannotRun(f"{tool} has no result for {len(failed)}: {'; '.join(failed)}")
    if not any(row["seen"] for row in column.rows.values()):
        raise CannotRun(f"{tool} saw nothing at all; this column proves nothing")


def _one(tool: str, command: str, function: str, counted: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="plumbline-compare-") as folder, tempfile.TemporaryFile("w+") as errors:
        line = [*under(command, tool, Path(folder)), sys.executable, PLAIN, tool, function, str(counted), folder]
        environment = {**os.environ, **devices.environment("cuda", 0), **ENVIRONMENT}
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors,
                                   start_new_session=True)
        try:
            result = plain.watch(process.stdout.fileno(), plain.PATIENCE["cuda"])
        except RuntimeError as error:
            errors.seek(0)
            raise RuntimeError(f"{error} {errors.read()[-300:]}".strip()) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = told(Path(folder))
    return {**result, "seen": result["seen"] or bool(said), "how": "sanitizer" if said else result["how"], "said": said[:2]}


# -- the command ----------------------------------------------------------------------------------------------------------


def measure(tool: str, ids: list[str], column: Column, options: argparse.Namespace) -> Iterator[None]:
    """Fill a column, a row at a time."""
    if tool in FOR_KERNELS:
        ids = [name for name in ids if name in kernels()]
    if tool in plain.ON_A_GPU:
        return sanitized(tool, ids, column, find_tool(), options.jobs)
    if tool in ("suite", "redzones"):
        return ours(tool, ids, column)
    return others(tool, ids, column, shlex.split(options.viz) if tool == "viz" else [sys.executable])


@cache
def kernels() -> set[str]:
    """The exhibits that launch Triton kernels."""
    return set(subprocess.run([sys.executable, PLAIN, "kernels"], check=True, capture_output=True, text=True).stdout.split())


def missing(columns: dict[str, Column]) -> list[str]:
    """The columns that lack exhibits, and how many."""
    wanted = {tool: kernels() if tool in FOR_KERNELS else set(catalogue.EXHIBITS) for tool in columns}
    return [f"{tool} lacks {len(wanted[tool] - set(c.rows))}" for tool, c in columns.items() if wanted[tool] - set(c.rows)]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.museum.compare", description="Other ways of testing on the museum.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="exhibits, B001 and so on (default: all)")
    parser.add_argument("--only", action="append", choices=tuple(TOOLS), default=[], help="which columns to measure (default: "
                        "suite, redzones and equal, viz where its command is given, and none with --merge)")
    parser.add_argument("--viz", default="", metavar="COMMAND", help="triton-viz's sanitizer, e.g. triton-sanitizer")
    parser.add_argument("--jobs", type=int, default=devices.worker_count("cuda"), help="parallel processes on a GPU")
    parser.add_argument("--merge", action="append", type=Path, default=[], help="start from the columns of this file")
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "comparison.json", help="where the columns go")
    parser.add_argument("--write", action="store_true", help="write docs/comparison.md")
    return parser


def _validate(options: argparse.Namespace) -> list[str]:
    """The columns to measure.

    Raises:
        UsageError: something that they need is not there.
    """
    tools = options.only or ([] if options.merge else ["suite", "redzones", "equal", *(["viz"] if options.viz else [])])
    run.chosen(options.ids, "cpu")
    for path in options.merge:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    if "viz" in tools and not options.viz:
        raise UsageError("--only viz needs --viz COMMAND")
    if set(tools) & set(plain.ON_A_GPU) and not devices.gpus():
        raise UsageError(f"--only {tools[0]}: no GPU is visible here (nvidia-smi lists none)")
    return tools


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    try:
        tools, columns = _validate(options), merged(options.merge)
        for tool in tools:
            columns.setdefault(tool, Column())
            for _ in measure(tool, options.ids or list(catalogue.EXHIBITS), columns[tool], options):
                save(options.out, columns)
            print(summary(tool, columns[tool]), flush=True)
        save(options.out, columns)
        lacks = missing({"suite": Column(), **columns}) if options.write else []
        if lacks:
            raise UsageError(f"--write needs whole columns: {', '.join(lacks)} of the exhibits")
    except (CannotRun, UsageError) as error:
        print(f"compare: {error}")
        return 2
    if options.write:
        PAGE.write_text(page(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
