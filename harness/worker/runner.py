"""Running one call of the subject on memory that the suite described."""

import ctypes
import os
import traceback

import numpy as np
import torch

from . import interpreter
from .arena import Arena
from .shadow import Shadow
from .subject import Subject

_TORCH = {name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64",
                                                   "bool", "bfloat16", "float8_e4m3fn")}


class Runner:
    """Holds the arena, the shadow memory and the subject of one worker."""

    def __init__(self, subject: Subject, device: str):
        self.subject, self.device = subject, device
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        self.arena = Arena()
        self.shadow = interpreter.install(lambda native: Shadow(native, self.arena))

    def run(self, header: dict, blobs: list, phase=lambda name: None) -> tuple[dict, list[bytes]]:
        """Run the steps of a call; the reply holds, per step, what was raised, returned, found and changed."""
        replies, data = [], []
        for step in header["steps"]:
            step_blobs, blobs = blobs[: len(step["memory"]["windows"])], blobs[len(step["memory"]["windows"]) :]
            reply, changes = self._step(header, step, step_blobs, phase)
            replies.append(reply)
            data += changes
            if reply["raised"]:
                break
        return {"steps": replies}, data

    def _step(self, header: dict, step: dict, blobs: list, phase) -> tuple[dict, list[bytes]]:
        phase("setup")
        memory = step["memory"]
        self._map(memory, blobs)
        tensors = {n: self._tensor(t) for n, t in memory["tensors"].items()}
        arguments = {n: _argument(a, tensors) for n, a in step["arguments"].items()}
        function = self.subject.function(header["family"], header["transform"])
        self.shadow.order = header["order"]
        self.shadow.begin(_views(memory), memory["access"], header["rules"])
        reply = {"raised": None, "returned": None}
        phase("run")
        try:
            returned = function(**arguments)
        except Exception as error:  # the subject's error is the result of the call
            reply["raised"] = _describe(error)
        else:
            reply["returned"] = _returned(returned, arguments)
        finally:
            self.shadow.active = False
        phase("check")
        reply["findings"] = self.shadow.findings
        reply["host"] = {n: a for n, a in arguments.items() if "value" in step["arguments"][n]}
        changes = [(b, o, d) for b, block in enumerate(self.arena.blocks) for o, d in block.changes()]
        reply["changes"] = [[b, o] for b, o, _ in changes]
        self.shadow.end()
        return reply, [d for _, _, d in changes]

    def _map(self, memory: dict, blobs: list) -> None:
        self.arena.map([b["bytes"] for b in memory["blocks"]])
        for (block, offset, _), data in zip(memory["windows"], blobs):
            self.arena.fill(block, offset, np.frombuffer(data, dtype=np.uint8))

    def _tensor(self, view: dict) -> torch.Tensor:
        dtype = _TORCH[view["dtype"]]
        itemsize = dtype.itemsize
        block = self.arena.blocks[view["block"]]
        first = block.address + view["start"] - view["storage_offset"] * itemsize
        shape, strides = view["shape"], view["strides"]
        reach = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 + view["storage_offset"]
        if "device" in view:
            return torch.empty_strided(shape, strides, dtype=dtype, device=view["device"])
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        raw = (ctypes.c_char * (reach * itemsize)).from_address(first)
        return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides, view["storage_offset"])


def _views(memory: dict) -> list[list[dict]]:
    """The tensors on each block."""
    views: list[list[dict]] = [[] for _ in memory["blocks"]]
    for view in memory["tensors"].values():
        views[view["block"]].append({**view, "itemsize": _TORCH[view["dtype"]].itemsize})
    return views


def _argument(spec: dict, tensors: dict):
    if "tensors" in spec:
        return [None if name is None else tensors[name] for name in spec["tensors"]]
    if "tensor" in spec:
        return tensors[spec["tensor"]]
    return spec["value"]


def _describe(error: Exception) -> dict:
    """The error as its author would want to see it; the interpreter's wrapper is taken off."""
    cause = error
    while type(cause).__name__ == "InterpreterError" and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = "".join(traceback.format_exception(type(cause), cause, cause.__traceback__))
    return {"type": type(cause).__name__, "message": str(cause), "traceback": lines.replace(os.getcwd() + os.sep, "")}


def _returned(value, arguments: dict):
    """A host value as it is; a tensor as the name of the argument that it is."""
    if isinstance(value, torch.Tensor):
        return {"tensor": next((n for n, a in arguments.items() if a is value), None)}
    return value if isinstance(value, (int, float, bool, str, list, tuple, dict)) else None
