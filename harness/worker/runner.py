"""Running one call of the subject on memory that the suite described."""

import importlib.util
import json
import os
import signal
import time
import traceback

import torch

from .counting import counted
from .lines import lines
from .subject import Subject


class Runner:
    """Holds the memory tier and the subject of one worker."""

    def __init__(self, subject: Subject, device: str, guards: bool = True, stock: bool = False):
        self.subject, self.device = subject, device
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        self.memory = _memory(device, guards, stock)
        self._captured, self._arguments, self._tensors = "", {}, {}

    def run(self, header: dict, blobs: list, phase=lambda name: None) -> tuple[dict, list[bytes]]:
        """Run the steps of a call; the reply holds, per step, what was raised, returned, found and changed, or the fault
        after which this process is of no more use."""
        replies, data = [], []
        for step in header["steps"]:
            step_blobs, blobs = blobs[: len(step["memory"]["windows"])], blobs[len(step["memory"]["windows"]) :]
            if replies:
                phase("setup")  # as every call begins
            reply, changes = self._step(header, step, step_blobs, phase)
            replies.append(reply)
            data += changes
            if reply["raised"] or reply["fault"]:
                break
        return {"steps": replies, "fault": replies[-1]["fault"]}, data

    def close(self) -> None:
        """The last call is over: what a tool around this process reports at the end is reported now."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _step(self, header: dict, step: dict, blobs: list, phase) -> tuple[dict, list[bytes]]:
        began = time.perf_counter()
        memory, mode = step["memory"], header.get("mode", "plain")
        key = ""
        if mode == "graph":
            key = json.dumps([header["transform"], memory["blocks"], memory["tensors"], step["arguments"]])
        again = bool(key) and key == self._captured and self.memory.refill(memory, blobs)
        if not again:
            self._captured = ""
            self.memory.map(memory, blobs)
            self._tensors = {n: self._tensor(t) for n, t in memory["tensors"].items()}
            self._arguments = {n: _argument(a, self._tensors) for n, a in step["arguments"].items()}
        arguments = self._arguments
        versions, places = ({n: f(t) for n, t in self._tensors.items()} for f in (lambda t: t._version, _place))
        function = self.subject.function(header["family"], header["transform"])
        self.memory.watch(memory, header, phase)
        launches = self.memory.counts["launches"]
        reply = {"raised": None, "returned": None, "changes": [], "host": {}, "replayed": again}
        phase("run")
        called, error = time.perf_counter(), None
        try:
            if header.get("count"):
                returned, reply["cost"] = counted(self.memory, lambda: function(**arguments),
                                                   header["count"] == "waiting")
            elif header.get("lines_of"):
                returned, reply["lines"] = lines(header["lines_of"], lambda: function(**arguments))
            elif mode == "plain":
                returned = function(**arguments)
            else:
                returned = self.memory.call(mode, lambda: function(**arguments), again)
                self._captured = key
        except BaseException as raised:  # the subject's error is the result of the call, sys.exit() too; Ctrl-C is the user's
            if isinstance(raised, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                raise
            error = raised
        reply["fault"] = self.memory.settle()
        if not reply["fault"]:
            unread = self.memory.unread_error()
            error = error or unread
        reply["launches"] = self.memory.counts["launches"] - launches
        if reply["fault"]:
            return {**reply, "findings": []}, []
        if error is not None:
            reply["raised"] = _describe(error)
        else:
            reply["returned"] = _returned(returned, arguments)
        phase("check")
        returned_at = time.perf_counter()
        reply["findings"] = self.memory.findings()
        reply["written"] = [n for n, t in self._tensors.items() if t._version != versions[n]]
        reply["moved"] = [n for n, t in self._tensors.items() if _place(t) != places[n]]
        reply["host"] = {n: a for n, a in arguments.items() if "value" in step["arguments"][n]}
        data = []
        for block, (positions, values) in enumerate(self.memory.changes()):
            if len(positions):
                reply["changes"].append(block)
                data += [positions.tobytes(), values.tobytes()]
        reply["seconds"] = [called - began, returned_at - called, time.perf_counter() - returned_at]  # setup, run, check
        return reply, data

    def _tensor(self, view: dict) -> torch.Tensor:
        dtype, shape, strides = getattr(torch, view["dtype"]), view["shape"], view["strides"]
        if "device" in view:
            return torch.empty_strided(shape, strides, dtype=dtype, device=view["device"])
        if 0 in shape:
            empty = torch.empty(shape, dtype=dtype, device=self.device)  # without a cell only the row pitch says anything
            pitch = max(strides[0], empty.stride(0))
            return empty if empty.dim() < 2 else empty.as_strided(shape, (pitch, *empty.stride()[1:]))
        reach = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 + view["storage_offset"]
        first = view["start"] - view["storage_offset"] * dtype.itemsize
        raw = self.memory.bytes(view["block"], first, reach * dtype.itemsize)
        return raw.view(dtype).as_strided(shape, strides, raw.storage_offset() // dtype.itemsize + view["storage_offset"])


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _memory(device: str, guards: bool, stock: bool):
    """The memory tier of a device: shadow memory on the CPU, guard pages or plain allocations on a GPU."""
    if device == "cpu":
        from .cpu import CpuMemory

        return CpuMemory(stock)
    from .gpu import GpuMemory

    return GpuMemory("guard pages" if guards and importlib.util.find_spec("cuda.bindings") else "plain allocations")


def _argument(spec: dict, tensors: dict):
    if "tensors" in spec:
        return [None if name is None else tensors[name] for name in spec["tensors"]]
    if "tensor" in spec:
        return tensors[spec["tensor"]]
    return spec["value"]


def _describe(error: BaseException) -> dict:
    """The error as its author would want to see it; the interpreter's wrapper is taken off."""
    cause = error
    while type(cause).__name__ == "InterpreterError" and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = "".join(traceback.format_exception(type(cause), cause, cause.__traceback__))
    said = {"type": type(cause).__name__, "message": str(cause), "traceback": lines.replace(os.getcwd() + os.sep, "")}
    return {name: _encodable(text) for name, text in said.items()}


def _encodable(text: str) -> str:
    """Half of a surrogate pair has no UTF-8, and would end xdist's processes and every print."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _returned(value, arguments: dict):
    """A host value as it is; a tensor as the name of the argument that it is; anything else as its type and its text."""
    if isinstance(value, torch.Tensor):
        return {"tensor": next((n for n, a in arguments.items() if a is value), None)}
    if value is None or type(value) in (int, float, bool, str, list, tuple, dict):
        return value
    return {"type": f"{type(value).__module__}.{type(value).__name__}", "text": repr(value)[:200]}
