"""The suite's side of a worker: start it, run calls on it, and say what became of it."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from harness import messages, registry
from harness.worker.subject import BUILT_IN

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 180.0
END_LIMIT = 30.0
TEST_SIGNS = ("PYTEST_", "HYPOTHESIS_", "PLUMBLINE_")
OWN_FAULT = 70  # the worker's exit status for an error of its own
UNLOADABLE = 71  # that of a child whose subject does not load
PHASE_LIMIT = {"setup": 60.0, "compile": 300.0, "check": 60.0}
INTERPRETERS = ("fast", "stock")  # stock: Triton's own, with our checks but with nothing that makes it faster


class InfraError(Exception):
    """The suite could not do its job; the subject is not to blame."""


class UsageError(Exception):
    """The user asked for something that cannot be: one line, exit 2."""


def shown_path(path: Path | str) -> str:
    """A path as the user types it at the root."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def known_variants(subject: str, contracts, described: dict) -> dict:
    """What a subject says about itself, if its VARIANTS names contracts and rules that there are.

    Raises:
        UsageError: it names another.
    """
    for contract in contracts:
        said = described[contract.name]
        unknown = [name for name in said["chooses"] if name not in registry.contracts()]
        if unknown:
            raise UsageError(f"--subject {subject}: VARIANTS names {unknown[0]!r}, which is no contract; known are "
                             f"{', '.join(registry.contracts())}")
        try:
            contract.rules(said["variant"])
        except ValueError as error:
            raise UsageError(f"--subject {subject}: VARIANTS: {error}") from None
    return described


def subject_name(spec: str) -> str:
    """A subject as case files name it: a file or folder inside this checkout relative to its root, so that its cases replay
    in any other checkout; another one by its full path; anything else as it is. A name that could be that of a module is
    one, unless its folder is no package."""
    folder = spec not in BUILT_IN and Path(spec).is_dir() and ("/" in spec or not Path(spec, "__init__.py").exists())
    if not spec.endswith(".py") and not folder:
        return spec
    path = Path(spec).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@dataclass(frozen=True)
class Fault:
    """The worker did not survive a call: a signal, an exit, or a hang, and in which phase."""

    kind: str
    phase: str
    detail: str


@dataclass
class Limits:
    """How long the subject may run. After a first hang, later ones are cut shorter: shrinking meets many."""

    run: float = 20.0
    slowest: float = 0.0
    hung: bool = False

    def now(self) -> float:
        return min(self.run, max(0.3, 20 * self.slowest)) if self.hung else self.run


@dataclass
class WorkerOptions:
    subject: str = "kernels"
    device: str = "cpu"
    python: str = sys.executable
    paths: tuple[str, ...] = ()
    run_limit: float = 20.0
    guards: bool = True
    interpreter: str = field(default_factory=lambda: os.environ.get("PLUMBLINE_INTERPRETER", "fast"))
    environment: dict = field(default_factory=dict)
    under: tuple[str, ...] = ()  # a command that runs the worker, e.g. compute-sanitizer; calls then run in it, not in a fork

    def __post_init__(self):
        if self.interpreter not in INTERPRETERS:
            raise UsageError(f"PLUMBLINE_INTERPRETER={self.interpreter}: known are {', '.join(INTERPRETERS)}")


class Worker:
    """A worker process with one subject. Dead children are replaced; a parent that cannot start is INFRA."""

    def __init__(self, options: WorkerOptions, contracts):
        self.options = options
        self.limits = Limits(options.run_limit)
        self._contracts = list(contracts)
        self._log = tempfile.TemporaryFile(mode="w+")
        self._channel: socket.socket | None = None
        self._pid = 0
        self._count = 0
        self._held: dict = {}
        self._start()
        atexit.register(self.close)

    # -- the parent -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for attempt in (1, 2):
            reply = self._try_start()
            if reply is None and attempt == 1:
                continue
            if reply is None:
                raise InfraError(f"the worker did not start: {self._output() or 'it printed nothing'}")
            break
        if not reply["ready"]:
            raise (UsageError if reply["kind"] == "subject" else InfraError)(reply["error"])
        try:
            self.describe = known_variants(self.options.subject, self._contracts, reply["describe"])
        except UsageError:
            self.close()
            raise
        self.versions, self.tier = reply["versions"], reply["tier"]

    def _try_start(self) -> dict | None:
        self._control, theirs = socket.socketpair()
        main = ROOT / "harness" / "worker" / "main.py"
        command = [*self.options.under, self.options.python, "-I", str(main), str(theirs.fileno())]
        environment = {**_untold(os.environ), **self.options.environment}
        try:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log,
                                             stderr=subprocess.STDOUT, env=environment,
                                             start_new_session=bool(self.options.under))
        except OSError as error:
            self._control.close()
            option = "" if self.options.under else "--subject-python "
            raise UsageError(f"{option}{command[0]}: cannot be started ({error.strerror}); it must be "
                             f"{'a program' if self.options.under else 'a Python with torch, Triton and NumPy'}") from None
        finally:
            theirs.close()
        config = {"subject": self.options.subject, "device": self.options.device, "root": str(ROOT),
                  "paths": list(self.options.paths), "contracts": [[c.family, c.name, c.names] for c in self._contracts],
                  "guards": self.options.guards,
                  "fork": not self.options.under, "stock": self.options.interpreter == "stock"}
        try:
            messages.send(self._control, config)
            return messages.receive(self._control, START_LIMIT)[0]
        except (messages.Closed, messages.TimedOut):
            self._process.kill()
            self._process.wait()
            return None

    def _output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()

    def close(self) -> None:
        """End the worker and everything it forked."""
        self._drop_channel()
        self._control.close()
        if self._process.poll() is None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        atexit.unregister(self.close)

    # -- a child ----------------------------------------------------------------------------------------------------

    def _fork(self) -> None:
        if self.options.under:
            if self._process.poll() is not None:
                self._start()
            self._channel, self._pid = self._control, self._process.pid
            return
        self._channel, theirs = socket.socketpair()
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        socket.send_fds(self._control, [json.dumps({"op": "fork", **self._held}).encode()], [theirs.fileno()])
        theirs.close()
        self._pid = self._answer()["pid"]

    def _answer(self) -> dict:
        data = self._control.recv(4096)
        if not data:
            raise InfraError(f"the worker's parent died: {self._output()}")
        return json.loads(data)

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _reap(self, kill: bool) -> int:
        self._drop_channel()
        if self.options.under:
            return self._end()
        self._control.sendall(json.dumps({"op": "reap", "pid": self._pid, "kill": kill}).encode())
        return self._answer()["status"]

    def _end(self) -> int:
        """End the process that serves calls itself; the tool around it gets time to write its report."""
        try:
            return self._process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    @property
    def child(self) -> int:
        """The process that holds the subject now."""
        if self._channel is None:
            self._fork()
        return self._pid

    def restart_child(self) -> None:
        """Forget whatever earlier calls left in the subject's process."""
        if self._channel is not None:
            self._reap(kill=True)

    def hold(self, subject: str, paths: tuple[str, ...], families: tuple[str, ...]) -> None:
        """From now on children load another subject, these families of it; `describe` stays that of the first one."""
        self.restart_child()
        self._held = {"subject": subject, "paths": list(paths), "families": list(families), "root": str(ROOT)}

    def supports(self, family: str, cases: list[dict]) -> list[str]:
        """For each case the subject's reason not to take it, or ''."""
        reply, _ = self._exchange({"op": "supports", "family": family, "cases": cases}, [])
        if isinstance(reply, Fault):
            raise InfraError(f"the subject's supports() ended the worker: {reply.detail}")
        if reply["raised"]:
            raise UsageError(f"--subject {self.options.subject}: supports() {reply['raised']} on a case of {family}")
        return reply["answers"]

    def run(self, header: dict, blobs: list) -> tuple["dict | Fault", list]:
        """Run one call. The answer is the worker's reply, or the `Fault` that ended it."""
        return self._exchange({"op": "run", **header}, blobs)

    def _exchange(self, header: dict, blobs: list):
        if self._channel is None:
            self._fork()
        self._count += 1
        phase, started = "setup", None
        try:
            messages.send(self._channel, {**header, "id": self._count}, blobs)
            while True:
                limit = self.limits.now() if phase == "run" else PHASE_LIMIT[phase]
                reply, data = messages.receive(self._channel, limit)
                if "phase" not in reply:
                    if reply["id"] != self._count:
                        raise InfraError(f"the worker answered call {reply['id']} instead of {self._count}")
                    if reply.get("fault"):
                        self._reap(kill=True)
                        return Fault(reply["fault"]["kind"], "run", reply["fault"]["detail"]), []
                    return reply, data
                if phase == "run":
                    self.limits.slowest = max(self.limits.slowest, reply["at"] - started)
                phase, started = reply["phase"], reply["at"]
        except messages.TimedOut:
            waited = limit
            self._reap(kill=True)
            self.limits.hung = True
            return Fault("hang", phase, f"no answer within {waited:.2g} s in phase {phase}"), []
        except messages.Closed:
            status = self._reap(kill=False)
            if status == OWN_FAULT and "Traceback" in self._output():
                raise InfraError(f"the worker failed: {self._output()}")
            if status == UNLOADABLE and self._held:
                return Fault("unloadable", phase, self._output()), []
            return Fault("died", phase, f"{_status(status)} in phase {phase}"), []


def _untold(environment) -> dict[str, str]:
    """The environment without what says that a test is running: a subject must not be able to behave for the occasion."""
    return {name: value for name, value in environment.items() if not name.startswith(TEST_SIGNS)}


def _status(status: int) -> str:
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process exited with status {status}"


class StandIn:
    """A worker whose calls go to one function of its subject, whatever the contract: how planted faults are tried."""

    def __init__(self, worker: Worker, function: str):
        self._worker, self._function = worker, function
        self.options, self.versions, self.limits, self.tier = worker.options, worker.versions, worker.limits, worker.tier
        self.describe = {n: {"provided": True, "variant": {}, "version": "", "selective": False, "missing": "",
                             "capturable": True} for n in worker.describe}

    def run(self, header: dict, blobs: list):
        return self._worker.run({**header, "transform": self._function}, blobs)

    def restart_child(self) -> None:
        self._worker.restart_child()


class Inline:
    """The worker's code in this process, for a debugger: no isolation, no time limit."""

    def __init__(self, options: WorkerOptions, contracts):
        self.left = False  # whether a debugger was, in the middle of a call: nothing is known of that call then
        if options.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        from harness.worker import runner, subject

        self.options = options
        sys.path[:0] = options.paths
        try:
            loaded = subject.Subject(options.subject, ROOT)
            described = {c.name: loaded.describe(c.family, c.name, c.names) for c in contracts}
        except subject.SubjectError as error:
            raise UsageError(str(error)) from None
        self.describe = known_variants(options.subject, contracts, described)
        self._runner = runner.Runner(loaded, options.device, options.guards, options.interpreter == "stock")
        self.tier = self._runner.memory.guards
        import numpy
        import torch
        import triton

        self.versions = {"python": sys.version.split()[0], "numpy": numpy.__version__, "torch": torch.__version__,
                         "triton": triton.__version__}
        self.limits = Limits(options.run_limit)

    def supports(self, family: str, cases: list[dict]) -> list[str]:
        return [self._runner.subject.supports(family, case) for case in cases]

    def run(self, header: dict, blobs: list) -> tuple[dict, list]:
        return self._runner.run(header, [memoryview(b) for b in blobs])

    def stop_in_calls(self) -> None:
        """Stop in pdb on the first line of the subject's function, each time it is called."""
        import pdb

        worker, find = self, self._runner.subject.function

        class Debugger(pdb.Pdb):
            def set_quit(self):
                worker.left = True
                super().set_quit()

        self._runner.subject.function = lambda family, name: lambda **given: Debugger().runcall(find(family, name), **given)

    def close(self) -> None:
        """Nothing to end."""
