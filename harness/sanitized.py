"""A worker under one tool of compute-sanitizer, and what the tool says about its calls."""

import os
import shutil
import tempfile
from pathlib import Path

from harness import devices, registry
from harness.client import Worker, WorkerOptions

FLAGS = {"memcheck": ("--padding", "2048", "--report-api-errors", "no")}
SURVIVES = ("--destroy-on-device-error", "kernel")  # memcheck otherwise ends the context, and with it the process
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
SIGN = "========="  # how every line of the tool starts
QUIET = ("COMPUTE-SANITIZER", "ERROR SUMMARY: 0", "RACECHECK SUMMARY: 0", "LEAK SUMMARY: 0")


class CannotRun(Exception):
    """The tool cannot do its job here: one line, exit 2."""


def find_tool(name: str = "compute-sanitizer") -> str:
    """The path of a tool of the CUDA toolkit."""
    toolkits = [os.environ.get(v, "/usr/local/cuda") for v in ("CUDA_HOME", "CUDA_PATH")]
    for place in (shutil.which(name), *(f"{toolkit}/bin/{name}" for toolkit in toolkits)):
        if place and os.access(place, os.X_OK):
            return place
    raise CannotRun(f"{name} is not on the PATH nor under CUDA_HOME; install the CUDA toolkit")


def under(command: str, tool: str, folder: Path) -> tuple[str, ...]:
    """The command line before a program's; the tool writes into a folder, a file per process."""
    return (command, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all", "--require-cuda-init", "yes",
            "--launch-timeout", "120", "--print-limit", "100", "--log-file", f"{folder}/log-%p", *FLAGS.get(tool, ()))


def told(folder: Path) -> list[str]:
    """What the tool has reported so far; its own greetings left out."""
    text = "".join(p.read_text(errors="replace") for p in sorted(folder.iterdir()))
    lines = [line.removeprefix(SIGN).strip() for line in text.splitlines() if line.startswith(SIGN)]
    return [line for line in lines if line and not any(q in line for q in QUIET)]


class Sanitized:
    """A worker under one tool, and what the tool has written since one last looked.

    `options` has `subject_python` and `subject_path`, as the commands' arguments do."""

    def __init__(self, command: str, tool: str, subject: str, options):
        self._folder, self._seen = Path(tempfile.mkdtemp(prefix="plumbline-sanitize-")), 0
        line = under(command, tool, self._folder) + (SURVIVES if tool == "memcheck" else ())
        self.worker = Worker(WorkerOptions(subject, "cuda", options.subject_python, tuple(options.subject_path), 120.0,
                                           guards=False, environment={**devices.environment("cuda", 0), **ENVIRONMENT},
                                           under=line), list(registry.contracts().values()))

    def news(self) -> list[str]:
        """What the tool has reported since the last look."""
        lines = told(self._folder)
        fresh, self._seen = lines[self._seen :], len(lines)
        return fresh

    def close(self) -> list[str]:
        self.worker.close()
        return self.news()
