"""The kernels through their plans, as a subject: every check of the suite looks at what a plan launches.

Each call binds a plan to stand-ins for the inputs, full of zeros, and calls it with the inputs, so that a pointer which a
plan does not replace shows in the results. Calls that cannot be planned are made plainly.
"""

import functools
import importlib
import sys
import types
from pathlib import Path

import torch

HERE = Path(__file__).parent
PACKAGE = "plumbline_planned"
LARGEST = 1 << 20  # bytes; larger inputs stand for themselves
CAPTURABLE = True

if PACKAGE not in sys.modules:
    sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    sys.modules[PACKAGE].__path__ = [str(HERE)]
_plan = importlib.import_module(f"{PACKAGE}._plan")
_checks = importlib.import_module(f"{PACKAGE}._checks")


def planned(function):
    """`function`, every call of which goes through a plan."""

    @functools.wraps(function)
    def call(**arguments):
        inputs = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        try:
            written = _plan.Plan(function, **arguments).written
            new = tuple(n for n, t in inputs.items() if not _meets(t, list(written.values())))
            plan = _plan.Plan(function, new=new, **{**arguments, **{n: _stand_in(inputs[n]) for n in new}})
        except _plan.Unplannable:
            return function(**arguments)
        return plan(*(inputs[n] for n in new))

    return call


def _meets(tensor: torch.Tensor, outputs: list[torch.Tensor]) -> bool:
    return any(o is tensor or _checks.meet(o, tensor) for o in outputs)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Other memory with the same look, at the same distance from a multiple of 16 bytes."""
    first, last = _checks.span(tensor)
    if not tensor.numel() or last - first > LARGEST:
        return tensor
    size = tensor.element_size()
    memory = torch.zeros((last - first) // size + 16 // size, dtype=tensor.dtype, device=tensor.device)
    shift = (first - memory.data_ptr()) % 16 // size
    return memory.as_strided(tensor.shape, tensor.stride(), shift)


for _path in sorted(HERE.glob("[a-z]*.py")):
    if _path.stem != "plans":
        _module = importlib.import_module(f"{PACKAGE}.{_path.stem}")
        globals().update({n: planned(f) for n, f in vars(_module).items()
                          if isinstance(f, types.FunctionType) and f.__module__ == _module.__name__ and n[0] != "_"})
