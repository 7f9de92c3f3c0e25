"""The CPU's memory tier: Triton's interpreter over a reserved arena, every access looked up in shadow memory."""

import ctypes

import numpy as np
import torch

from . import interpreter
from .arena import Arena
from .shadow import Shadow


class CpuMemory:
    """Blocks far apart in inaccessible address space, watched access by access."""

    guards = "shadow memory"

    def __init__(self, stock: bool = False):
        self.arena = Arena()
        self.shadow = interpreter.install(lambda native: Shadow(native, self.arena), stock)

    def map(self, memory: dict, blobs: list) -> None:
        """Fresh blocks with the given contents."""
        self.arena.map([b["bytes"] for b in memory["blocks"]])
        for (block, offset, _), data in zip(memory["windows"], blobs):
            self.arena.fill(block, offset, np.frombuffer(data, dtype=np.uint8))

    def bytes(self, block: int, start: int, size: int) -> torch.Tensor:
        """Part of a block as a uint8 tensor."""
        raw = (ctypes.c_char * size).from_address(self.arena.blocks[block].address + start)
        return torch.frombuffer(raw, dtype=torch.uint8)

    def watch(self, memory: dict, header: dict, phase) -> None:
        """Look at every access from here on."""
        views: list[list[dict]] = [[] for _ in memory["blocks"]]
        for view in memory["tensors"].values():
            views[view["block"]].append({**view, "itemsize": getattr(torch, view["dtype"]).itemsize})
        self.shadow.order = header["order"]
        self.shadow.begin(views, memory["access"], header["rules"])

    @property
    def counts(self) -> dict[str, int]:
        """Launches so far; the interpreter compiles nothing."""
        return {"launches": self.shadow.launches, "compilations": 0}

    def settle(self) -> str:
        """The call is over; on the CPU a fault would have ended the process."""
        self.shadow.active = False
        return ""

    def unread_error(self) -> None:
        """A launch fails where it is made."""

    def findings(self) -> list[dict]:
        """What the shadow memory saw; its marks are given back."""
        self.shadow.end()
        return self.shadow.findings

    def changes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each block the bytes that the call changed: their positions, and what stands there now."""
        return [block.changes() for block in self.arena.blocks]
