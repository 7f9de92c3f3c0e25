"""`ci/gate`: planted faults first, then every transform of every subject. Exit 0 clean, 1 a finding, 2 it could not run.
A branch that changes kernels of ours owes `ci/mutate --changed main` as well, which mutates only the functions it changed.

The lanes are pytest tests with the mark `gate`, so a red gate can be taken apart with `pytest -m gate -k ...`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from harness.campaign import PROFILES
from harness.client import ROOT
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
    parser.add_argument("--report", type=Path, default=ROOT / "report", help="where junit.xml, summary.md and verdicts.json go")
    parser.add_argument("-n", dest="workers", default="auto", help="parallel test processes (default: auto)")
    return parser


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    common = [sys.executable, "-m", "pytest", "-q", "-n", options.workers, "--dist=worksteal", f"--device={options.device}"]
    common += ["--require-gpu"] if options.require_gpu else []
    print("self-check: the planted faults", flush=True)
    if subprocess.run([*common, "-m", "selfcheck", "tests/meta"], cwd=ROOT).returncode != 0:
        print("ci/gate: a planted fault was not seen; this gate proves nothing")
        return 2
    verdicts = options.report / "verdicts.json"
    verdicts.unlink(missing_ok=True)
    command = [*common, "-m", "gate", "tests", f"--profile={options.profile}", f"--report={options.report}",
               f"--junitxml={options.report / 'junit.xml'}", "-o", "junit_family=xunit2"]
    command += [f"--subject={s}" for s in options.subject or ("kernels", "eager")]
    command += [f"--subject-path={p}" for p in options.subject_path] + [f"--variant={v}" for v in options.variant]
    command += [f"--subject-python={options.subject_python}"] if options.subject_python else []
    return _conclude(subprocess.run(command, cwd=ROOT).returncode, verdicts)


def _conclude(status: int, verdicts: Path) -> int:
    """pytest's status and the verdicts must agree; anything else is a gate that did not do its job."""
    if status not in (0, 1) or not verdicts.exists():
        print(f"ci/gate: pytest ended with status {status}; no verdict")
        return 2
    code = exit_code([Row(**{**row, "lane": "inside"}) for row in json.loads(verdicts.read_text())])
    return 1 if code == 0 and status == 1 else code


if __name__ == "__main__":
    sys.exit(main())
