"""The worker process: a preloaded parent that forks a child for the calls, so a crash costs a fork and not an import.

Started as `<python> -I main.py CONTROL_FD`. On the control socket the suite sends a configuration and then asks for
children; each child gets a channel of its own and serves calls until that channel closes or it dies.
"""

import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN_FAULT, UNLOADABLE = 70, 71


def _load():
    """Make this folder (and the wire format beside it) importable as `plumbline_worker`."""
    package = types.ModuleType("plumbline_worker")
    package.__path__ = [str(HERE), str(HERE.parent)]
    sys.modules["plumbline_worker"] = package
    return importlib.import_module("plumbline_worker.messages")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the suite, which ends this process when it is done
    messages = _load()
    control = socket.socket(fileno=int(sys.argv[1]))
    config, _ = messages.receive(control)
    try:
        reply, runner = _preload(config)
    except BaseException as error:  # reported as INFRA or as an error of use, never lost
        kind = "subject" if type(error).__name__ == "SubjectError" else "infra"
        messages.send(control, {"ready": False, "kind": kind, "error": f"{error}" or type(error).__name__})
        return
    messages.send(control, {"ready": True, **reply})
    if config["fork"]:
        _serve(messages, control, runner)
        sys.stdout.flush()
        os._exit(0)  # tearing torch down takes longer than test processes are given to end
    else:
        _child(messages, control, runner)


def _preload(config: dict):
    if config["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.path[:0] = config["paths"]
    import numpy
    import triton

    if wrong := wrong_pair(triton.__version__, numpy.__version__):
        raise RuntimeError(f"{wrong} (in {sys.executable})")
    import torch
    from triton.runtime.jit import mangle_type

    mangle_type(0)  # imports what a first launch does, here once and not in every child
    runner_module = importlib.import_module("plumbline_worker.runner")
    subject_module = importlib.import_module("plumbline_worker.subject")
    subject = subject_module.Subject(config["subject"], Path(config["root"]))
    runner = runner_module.Runner(subject, config["device"], config["guards"], config["stock"])
    if torch.cuda.is_initialized():
        raise subject_module.SubjectError(f"--subject {config['subject']}: importing it initialises CUDA; calls run in forked "
                                          "processes, so do that on first use")
    described = {name: subject.describe(family, name, given) for family, name, given in config["contracts"]}
    versions = {"python": sys.version.split()[0], "numpy": numpy.__version__, "torch": torch.__version__,
                "triton": triton.__version__}
    return {"versions": versions, "describe": described, "tier": runner.memory.guards}, runner


def wrong_pair(triton: str, numpy: str) -> str:
    """Why these versions do not work together with this worker, or ''."""
    number = lambda text: tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:2])
    if number(triton) >= (3, 6) and number(numpy) >= (2, 0):
        return ""
    return (f"Triton {triton} with NumPy {numpy}: the interpreter is known from Triton 3.6 on with NumPy 2; "
            "pip install 'triton>=3.6' 'numpy>=2.0'")


def _serve(messages, control: socket.socket, runner) -> None:
    """Fork, kill and reap children as the suite asks; when the suite is gone, take them along."""
    children: set[int] = set()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        except OSError:
            data = b""
        request = json.loads(data) if data else {"op": "quit"}
        if request["op"] == "fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                _hold(request, runner)
                _child(messages, socket.socket(fileno=descriptors[0]), runner)
            os.close(descriptors[0])
            children.add(pid)
            control.sendall(json.dumps({"pid": pid}).encode())
        elif request["op"] == "reap":
            if request["kill"]:
                os.kill(request["pid"], signal.SIGKILL)
            status = os.waitpid(request["pid"], 0)[1]
            children.discard(request["pid"])
            control.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
        else:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return


def _hold(request: dict, runner) -> None:
    """In a child: hold another subject than the parent, if the suite asks for one."""
    if "subject" not in request:
        return
    try:
        sys.path[:0] = request["paths"]
        runner.subject = type(runner.subject)(request["subject"], Path(request["root"]))
        for family in request["families"]:
            runner.subject.module(family)
    except BaseException:  # whatever a mutant raises at import
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(UNLOADABLE)


def _child(messages, channel: socket.socket, runner) -> None:
    def phase(name: str) -> None:
        messages.send(channel, {"phase": name, "at": time.monotonic()})

    try:
        while True:
            header, blobs = messages.receive(channel)
            if header["op"] == "supports":
                answers, raised = _supported(runner.subject, header)
                messages.send(channel, {"id": header["id"], "answers": answers, "raised": raised})
                continue
            reply, data = runner.run(header, blobs, phase)
            messages.send(channel, {"id": header["id"], **reply}, data)
    except messages.Closed:
        runner.close()
        os._exit(0)
    except BaseException:  # a fault of this code, not of the subject: the suite reads the log and reports INFRA
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(OWN_FAULT)


def _supported(subject, header: dict) -> tuple[list[str], str]:
    """The subject's answers, or what its supports() did instead."""
    try:
        return [subject.supports(header["family"], case) for case in header["cases"]], ""
    except BaseException as error:  # whatever a user's function raises is a report to its author
        name = type(error).__name__
        return [], f"{error}" if name == "SubjectError" else f"raised {name}: {error}"


if __name__ == "__main__":
    main()
