"""`ci/gate`: planted faults and the museum of real bugs first, then every transform of every subject. Exit 0 clean, 1 a
finding, 2 it could not run. A branch that changes kernels of ours owes `ci/mutate --changed main` as well, which mutates
only the functions that it changed.

The lanes are pytest tests with the mark `gate`, so a red gate can be taken apart with `pytest -m gate -k ...`. With --museum
the gate measures itself instead: `tests/museum/run.py`, a program of its own, has the rest of the command line.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from harness import devices, registry
from harness.campaign import PROFILES
from harness.client import ROOT, InfraError, UsageError, Worker, WorkerOptions, subject_name
from harness.verdicts import Row, exit_code


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/gate", description="Check kernels before a merge.")
    parser.add_argument("--profile", default="gate", choices=sorted(PROFILES), help="how much to try (default: gate)")
    parser.add_argument("--subject", action="append", help="whose kernels (repeatable; default: kernels and eager)")
    parser.add_argument("--subject-python", help="the interpreter that holds the subjects")
    parser.add_argument("--subject-path", action="append", default=[], help="a folder to import subjects from")
    parser.add_argument("--variant", action="append", default=[], help="CONTRACT:RULE=CHOICE, over what the subject declares")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--require-gpu", action="store_true", help="exit 2 where there is no GPU")
    parser.add_argument("--overflow", action="store_true",
                        help="on a GPU: Triton kernels compiled with its checks of integer overflow")
    parser.add_argument("--report", type=Path, default=ROOT / "report",
                        help="where index.html, summary.md, junit.xml and verdicts.json go (default: report/ beside ci/)")
    parser.add_argument("-n", dest="workers", default="auto", help="parallel test processes (default: auto)")
    parser.add_argument("--museum", action="store_true",
                        help="measure the suite on real bugs instead: [--seeds N] [ID...], see --museum --help")
    return parser


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    if "--museum" in given:
        return _museum(*(word for word in given if word != "--museum"))
    options = arguments().parse_args(given)
    options.report = options.report.resolve()
    if os.sep in (options.subject_python or ""):  # pytest runs in the root; a virtual environment's Python is a link, kept
        options.subject_python = os.path.abspath(options.subject_python)
    options.subject = [subject_name(s) for s in options.subject or ("kernels", "eager")]
    wrong = _impossible(options)
    if wrong:
        print(f"ci/gate: {wrong}")
        return 2
    common = [sys.executable, "-m", "pytest", "-q", "--progress", "-n", options.workers, "--dist=worksteal",
              f"--device={options.device}"]
    common += ["--require-gpu"] if options.require_gpu else []
    print("self-check: the planted faults", flush=True)
    if status := run([*common, "-m", "selfcheck", "tests/meta"]):
        print(f"ci/gate: {'interrupted' if status == 2 else 'a planted fault was not seen; this gate proves nothing'}")
        return 2
    print("self-check: the museum of real bugs, one seed", flush=True)
    if _museum("--in-a-gate", *(["-n", options.workers] if options.workers.isdigit() else [])) != 0:
        print("ci/gate: a real bug was not seen, or its clean twin was not clean; this gate is blind")
        return 2
    print(f"the gate: profile {options.profile}, subjects {', '.join(options.subject)}", flush=True)
    verdicts = options.report / "verdicts.json"
    verdicts.unlink(missing_ok=True)
    command = [*common, "-m", "gate", "tests", f"--profile={options.profile}", f"--report={options.report}",
               f"--junitxml={options.report / 'junit.xml'}", "-o", "junit_family=xunit2"]
    command += [f"--subject={s}" for s in options.subject]
    command += [f"--subject-path={Path(p).resolve()}" for p in options.subject_path]
    command += [f"--variant={v}" for v in options.variant]
    command += ["--overflow"] * options.overflow
    command += [f"--subject-python={options.subject_python}"] if options.subject_python else []
    return _conclude(run(command), verdicts)


def run(command: list[str]) -> int:
    """The status of a pytest run. Ctrl-C reaches pytest as well, which then writes what it has; wait for that."""
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _impossible(options) -> str:
    """What cannot be, seen before the self-check takes a minute; or ''."""
    if options.device not in ("auto", "cpu", "cuda"):
        return f"--device {options.device}: known are auto, cpu, cuda"
    if (options.require_gpu or options.device == "cuda") and not devices.gpus():
        return f"{'--require-gpu' if options.require_gpu else '--device cuda'}: no GPU is visible here (nvidia-smi lists none)"
    if options.overflow and devices.resolve(options.device) != "cuda":
        return devices.NO_OVERFLOW
    if options.workers not in ("auto", "logical") and not options.workers.isdigit():
        return f"-n {options.workers}: it must be a number, auto or logical"
    try:
        for rule in options.variant:
            registry.variant(rule)
        options.report.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        return f"--variant {error}"
    except OSError as error:
        return f"--report {options.report}: {error.strerror}"
    try:
        return next(filter(None, (_nothing_in(subject, options) for subject in options.subject)), "")
    except (UsageError, InfraError) as error:
        return str(error)


def _nothing_in(subject: str, options) -> str:
    """What to say of a subject that has nothing to check; or ''."""
    worker = Worker(WorkerOptions(subject, devices.resolve(options.device), options.subject_python or sys.executable,
                                  tuple(options.subject_path)), list(registry.contracts().values()))
    try:
        if any(found["provided"] for found in worker.describe.values()):
            return ""
        return f"--subject {subject}: it has no function with the name of a contract, as {', '.join(list(worker.describe)[:3])}"
    finally:
        worker.close()


def _museum(*words: str) -> int:
    return run([sys.executable, "-m", "tests.museum.run", *words])


def _conclude(status: int, verdicts: Path) -> int:
    """pytest's status and the verdicts must agree; anything else is a gate that did not do its job."""
    if status not in (0, 1) or not verdicts.exists():
        print(f"ci/gate: pytest ended with status {status}; no verdict")
        return 2
    code = exit_code([Row(**{**row, "lane": "inside"}) for row in json.loads(verdicts.read_text(encoding="utf-8"))])
    return 1 if code == 0 and status == 1 else code


if __name__ == "__main__":
    sys.exit(main())
