"""`ci/replay`: run a saved case again. FIXED (exit 0), FAILED (1) or ERROR (2)."""

import argparse
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from harness import casefile, devices, registry, rendering, results, script
from harness.campaign import Report
from harness.casefile import Saved
from harness.client import ROOT, InfraError, Inline, UsageError, Worker, WorkerOptions, shown_path, subject_name
from harness.differential import replay
from harness.findings import Found
from harness.sanitized import CannotRun, Sanitized, find_tool
from harness.worker.subject import BUILT_IN

OURS = set(BUILT_IN) - {"sglang"}  # subjects that lie in this checkout
CORPUS = ROOT / "tests" / "corpus"
FIXED, FAILED, ERROR = 0, 1, 2
WORDS = ("FIXED", "FAILED", "ERROR")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/replay", description="Replay a saved case. FIXED: exit 0, FAILED: 1, ERROR: 2.")
    parser.add_argument("case", type=Path, help="a case file, as a failure names it")
    parser.add_argument("--subject", help="whose kernel to run (default: the one in the file)")
    parser.add_argument("--subject-python", default=sys.executable, help="the interpreter that holds the subject")
    parser.add_argument("--subject-path", action="append", default=[], help="a folder to import the subject from")
    parser.add_argument("--inline", action="store_true", help="run in this process instead of a worker")
    parser.add_argument("--pdb", action="store_true", help="with --inline: stop in the debugger when the subject is called")
    parser.add_argument("--cuda", action="store_true", help="run on a GPU, compiled (default: Triton's interpreter)")
    parser.add_argument("--memcheck", action="store_true", help="run on a GPU under compute-sanitizer's memcheck")
    parser.add_argument("--cuda-gdb", action="store_true", help="run on a GPU in this terminal, under cuda-gdb")
    parser.add_argument("--script", nargs="?", const=Path(), type=Path, metavar="FILE",
                        help="write the case as one Python file that needs nothing of plumbline (default: CASE.py)")
    parser.add_argument("--bisect", nargs="+", type=Path, metavar="VERSION",
                        help="replay over wheels, unpacked folders or .py files of the subject, oldest first")
    parser.add_argument("--keep", action="store_true", help="add the case to tests/corpus, which every test run replays")
    return parser


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    if not options.case.exists() and (ROOT / options.case).exists():
        options.case = ROOT / options.case  # as a failure names it, typed in another folder
    try:
        saved = casefile.read(options.case)
        _possible(options)
        if options.keep and _needs_more(saved):
            raise UsageError(f"--keep {options.case}: the case alone never failed, so a test of it could not")
        if options.keep:
            _keep(options.case)
        options.subject = subject_name(options.subject) if options.subject else saved.subject
        if options.bisect:
            return _bisect(saved, options)
        if options.cuda_gdb:
            return _debug(options)
        return _memcheck(saved, options) if options.memcheck else _replay(saved, options)
    except (casefile.CaseFileError, UsageError, InfraError, CannotRun) as error:
        print(f"ERROR   {error}")
        return ERROR
    except KeyboardInterrupt:
        print("ERROR   interrupted")
        return ERROR


def _possible(options) -> None:
    """Options that need something that is not there."""
    if options.pdb and not options.inline:
        raise UsageError("--pdb needs --inline: a debugger cannot reach the worker")
    for option in ("cuda", "memcheck", "cuda_gdb"):
        if getattr(options, option) and not devices.gpus():
            raise UsageError(f"--{option.replace('_', '-')}: no GPU is visible here (nvidia-smi lists none)")


def _keep(case: Path) -> None:
    CORPUS.mkdir(exist_ok=True)
    if case.resolve().parent != CORPUS.resolve():
        shutil.copy(case, CORPUS / case.name)
    print(f"kept    {shown_path(CORPUS / case.name)}")


def _worker(options, subject: str, paths: tuple[str, ...]):
    device = "cuda" if options.cuda else "cpu"
    kind = Inline if options.inline else Worker
    return kind(WorkerOptions(subject, device, options.subject_python, paths, environment=devices.environment(device, 0)),
                list(registry.contracts().values()))


def _provided(worker, subject: str, name: str) -> None:
    if not worker.describe[name]["provided"]:
        raise UsageError(f"{subject} does not provide {name}: {worker.describe[name]['missing'] or 'no such function'}")


def _replay(saved: Saved, options) -> int:
    worker = _worker(options, options.subject, tuple(options.subject_path))
    name = saved.example.contract.name
    try:
        _provided(worker, options.subject, name)
        if options.pdb:
            worker.stop_in_calls()
        found = replay(saved.example, worker, saved.variant)
        if options.pdb and worker.left:
            raise UsageError("the debugger was left in the middle of a call: no verdict (c goes on)")
        _say(saved, options, found)
        if options.script is not None:
            path = options.script if options.script != Path() else options.case.with_suffix(".py")
            said = script.write(path, saved.example, worker, saved.variant, found)
            print(f"script  python {path}        ({said})")
    finally:
        worker.close()
    print(*(["FAILED"] if found else []), sep="\n", end="\n" if found else "")
    return _status(saved, found)


def _needs_more(saved: Saved) -> bool:
    """Whether the case alone never showed what was found."""
    return not saved.finding.get("alone", True)


def _status(saved: Saved, found: list[Found]) -> int:
    return FAILED if found else ERROR if _needs_more(saved) else FIXED


def _say(saved: Saved, options, found: list[Found]) -> None:
    name = saved.example.contract.name
    if not found and _needs_more(saved):
        print(f"ERROR   {name}: nothing is wrong in a process of its own, and nothing ever was: what the subject keeps between "
              "calls made it fail. Run the gate again")
    elif not found:
        print(f"FIXED   {name}: nothing is wrong on {saved.example}")
    for f in found:
        result = results.of(options.subject, name, saved.variant, Report(f, saved.example, options.case))
        result.found_with = results.for_replay(options)
        print(rendering.finding(result))


def _memcheck(saved: Saved, options) -> int:
    tool = find_tool()
    print("running under compute-sanitizer, which takes its time", flush=True)
    under = Sanitized(tool, "memcheck", options.subject, options)
    try:
        _provided(under.worker, options.subject, saved.example.contract.name)
        found = replay(saved.example, under.worker, saved.variant)
    finally:
        news = under.close()
    _say(saved, options, found)
    print("\n".join(["memcheck:", *(f"  {line}" for line in news)] if news else ["memcheck: nothing"]))
    status = FAILED if news else _status(saved, found)
    print("FIXED under memcheck" if status == FIXED else WORDS[status])
    return status


def _debug(options) -> int:
    """Hand this process over to cuda-gdb, which runs the replay inline and stops where it faults."""
    tool = find_tool("cuda-gdb")
    command = [tool, "-quiet", "-ex", "run", "--args", options.subject_python, "-m", "harness.replay", str(options.case),
               "--inline", "--cuda", "--subject", options.subject, *(f"--subject-path={p}" for p in options.subject_path)]
    sys.stdout.flush()
    os.execv(tool, command)


def _bisect(saved: Saved, options) -> int:
    """Every version in the given order; the exit status is that of the last."""
    _varies(options)
    name, statuses = saved.example.contract.name, []
    width = max(len(v.name) for v in options.bisect)
    print(f"{name} over {len(options.bisect)} versions of {options.subject}")
    for version in options.bisect:
        status, says = _one_version(saved, options, version)
        statuses.append(status)
        print(f"  {version.name:{width}}  {WORDS[status]:6}  {says}".rstrip(), flush=True)
    known = [(v.name, s) for v, s in zip(options.bisect, statuses) if s != ERROR]
    for (before, old), (after, new) in zip(known, known[1:]):
        if old != new:
            print(f"first {'fixed' if new == FIXED else 'failing'}: {after} (before it: {before})")
    return statuses[-1]


def _varies(options) -> None:
    """Raises UsageError where every version but a .py file would show the same subject."""
    fixed = options.subject in OURS or (options.subject not in BUILT_IN and Path(options.subject).is_dir())
    other = next((v for v in options.bisect if v.suffix != ".py"), None)
    if fixed and other:
        raise UsageError(f"--bisect {other}: the subject {options.subject} is the same in every version; give .py files, "
                         "or name a .py file, a module or sglang with --subject")


def _inside(place: Path, subject: str) -> str:
    """A version's own file of a subject that is a file: under the longest end of its path that the version has."""
    parts = Path(subject).parts[1 if Path(subject).is_absolute() else 0 :]
    found = next((f for f in (place.joinpath(*parts[k:]) for k in range(len(parts))) if f.is_file()), None)
    if not found:
        raise UsageError(f"it has no {parts[-1]}, which is the subject; name another with --subject, or give .py files")
    return str(found)


def _one_version(saved: Saved, options, version: Path) -> tuple[int, str]:
    """A wheel is unpacked and a folder taken as it is, both as the place to import the subject from, or to find its file in; a
    .py file is itself the subject."""
    with tempfile.TemporaryDirectory(prefix="plumbline-version-") as folder:
        subject, place = options.subject, str(version.resolve())
        try:
            if not version.exists():
                raise UsageError("no such wheel, folder or file")
            if version.suffix == ".py":
                subject, place = place, str(version.resolve().parent)
            elif version.is_file():
                zipfile.ZipFile(version).extractall(folder)
                place = folder
            if version.suffix != ".py" and subject.endswith(".py"):
                subject = _inside(Path(place), subject)
            worker = _worker(options, subject, (place, *options.subject_path))
            try:
                _provided(worker, subject, saved.example.contract.name)
                found = replay(saved.example, worker, saved.variant)
            finally:
                worker.close()
        except (UsageError, InfraError, zipfile.BadZipFile) as error:
            return ERROR, str(error)
    return _status(saved, found), found[0].sentence if found else ""


if __name__ == "__main__":
    sys.exit(main())
