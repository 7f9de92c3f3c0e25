"""`ci/replay`: run a saved case again. FIXED (exit 0), FAILED (1) or ERROR (2)."""

import argparse
import shutil
import sys
from pathlib import Path

from harness import casefile, registry, rendering
from harness.campaign import Report
from harness.client import ROOT, InfraError, Inline, UsageError, Worker, WorkerOptions
from harness.differential import replay

CORPUS = ROOT / "tests" / "corpus"
FIXED, FAILED, ERROR = 0, 1, 2


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/replay", description="Replay a saved case.")
    parser.add_argument("case", type=Path, help="a case file, as a failure names it")
    parser.add_argument("--subject", help="whose kernel to run (default: the one in the file)")
    parser.add_argument("--subject-python", default=sys.executable, help="the interpreter that holds the subject")
    parser.add_argument("--subject-path", action="append", default=[], help="a folder to import the subject from")
    parser.add_argument("--inline", action="store_true", help="run in this process instead of a worker")
    parser.add_argument("--pdb", action="store_true", help="with --inline: stop in the debugger when the subject is called")
    parser.add_argument("--keep", action="store_true", help="add the case to tests/corpus, which every test run replays")
    return parser


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    try:
        return _replay(options)
    except (casefile.CaseFileError, UsageError, InfraError) as error:
        print(f"ERROR   {error}")
        return ERROR


def _replay(options) -> int:
    saved = casefile.read(options.case)
    if options.pdb and not options.inline:
        raise UsageError("--pdb needs --inline: a debugger cannot reach the worker")
    if options.keep:
        CORPUS.mkdir(exist_ok=True)
        kept = shutil.copy(options.case, CORPUS / options.case.name)
        print(f"kept    {rendering.shown_path(Path(kept))}")
    subject = options.subject or saved.subject
    kind = Inline if options.inline else Worker
    worker = kind(WorkerOptions(subject, python=options.subject_python, paths=tuple(options.subject_path)),
                  list(registry.contracts().values()))
    name = saved.example.contract.name
    if not worker.describe[name]["provided"]:
        raise UsageError(f"{subject} does not provide {name}: {worker.describe[name]['missing'] or 'no such function'}")
    if options.pdb:
        breakpoint()  # the next call of the subject is `n` steps away: worker.run(...)
    found = replay(saved.example, worker, saved.variant)
    worker.close()
    if not found:
        print(f"FIXED   {name}: nothing is wrong on {saved.example}")
        return FIXED
    for f in found:
        print(rendering.finding(name, dict(saved.variant), Report(f, saved.example, options.case)))
    print("FAILED")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
