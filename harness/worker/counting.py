"""What one call costs in things that can be counted: launches, torch operations, compilations. Never in seconds."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    """Every torch operation of a call that is no view: allocations, copies and read-backs among them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def counted(memory, function):
    """The call's result, and how many kernels it launched and compiled and which torch operations it used.

    On a GPU a call that waits for the device raises."""
    operations = _Operations()
    before = dict(memory.counts)
    gpu = torch.cuda.is_initialized()
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with operations:
            returned = function()
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    cost = {name: memory.counts[name] - before[name] for name in before}
    return returned, {**cost, "operations": operations.names}
