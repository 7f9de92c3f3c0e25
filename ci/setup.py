"""Find or make a Python that can run the suite. Standard library only: a fresh machine has nothing else."""

import fcntl
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NO_SKIPS = bool(os.environ.get("PLUMBLINE_NO_SKIPS"))
PATHS = ("--subject-path", "--subject-python", "--report")  # options whose value is a path, there already or not
PROBE = """
import sys
from importlib import metadata
from re import match
for need in sys.argv[1:]:
    name, least = need.split(">=")
    number = lambda text: [int(match("[0-9]*", part).group() or 0) for part in text.split(".")]
    if number(metadata.version(name)) < number(least):
        sys.exit(1)
"""


def requirements(extras: bool = True) -> list[str]:
    """The dependencies that pyproject.toml declares. The extra `fleet` is large and few need it: it is left to them, except
    where no test may be skipped."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    more = {n: needs for n, needs in project["optional-dependencies"].items() if n != "fleet" or NO_SKIPS} if extras else {}
    return project["dependencies"] + sum(more.values(), [])


def suits(python: str, extras: bool = True) -> bool:
    """Whether an interpreter has everything."""
    return subprocess.run([python, "-c", PROBE, *requirements(extras)], capture_output=True).returncode == 0


def python() -> str:
    """The running interpreter if it suits (extras are only asked for where no test may be skipped), else .venv with
    everything, made on first use. pip's own configuration is honoured."""
    if suits(sys.executable, extras=NO_SKIPS):
        return sys.executable
    inside = str(VENV / "bin" / "python")
    if not suits_if_there(inside):
        with VENV.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a command beside this one may be at it already
            if not suits_if_there(inside):
                make(inside)
    return inside


def suits_if_there(inside: str) -> bool:
    return VENV.exists() and suits(inside)


def make(inside: str) -> None:
    """A fresh .venv with everything."""
    print(f"setting up {VENV.name} (once; a minute or more)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # in a terminal pip shows how far it is
    pip = [inside, "-m", "pip", "install", *quiet, "-c", str(ROOT / "ci" / "constraints.txt")]
    # torch on its own first: with the pinned build there, nothing else pulls another.
    subprocess.run([*pip, *(r for r in requirements() if r.startswith("torch>"))], check=True)
    subprocess.run([*pip, *requirements()], check=True)


def with_paths(arguments: list[str]) -> list[str]:
    """pytest's arguments with the caller's paths made absolute. A bare word such as `kernels` is a subject, also where a
    folder has that name. Links are followed, but for an interpreter: the Python of a virtual environment is one."""
    given = []
    for before, argument in zip(["", *arguments], arguments):
        option, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            given.append(_absolute(before, argument))
        else:
            given.append(f"{option}={_absolute(option, value)}" if equals else argument)
    return given


def _absolute(option: str, value: str) -> str:
    file, colons, test = value.partition("::")
    if option in PATHS:
        is_path = os.sep in file or option != "--subject-python"  # a bare `python3` is looked up on the PATH
    else:
        is_path = (os.sep in file or file.endswith(".py")) and os.path.exists(file)
    absolute = os.path.abspath if option == "--subject-python" else os.path.realpath
    return absolute(file) + colons + test if is_path else value


def run(*arguments: str) -> None:
    """Become the suite's Python with `arguments`, in the caller's folder: paths are the caller's, and so is Ctrl-C. Exit
    status 1 would mean a finding, so where no such Python can be had it is 2."""
    try:
        inside = python()
    except subprocess.CalledProcessError as error:
        print(f"ci/{Path(sys.argv[0]).name}: {VENV.name} could not be set up: status {error.returncode} of "
              f"`{shlex.join(error.cmd)}`", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execv(inside, [inside, "-P", *arguments])
