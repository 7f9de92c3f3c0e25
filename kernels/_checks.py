"""Argument checks shared by the kernels: every message names the argument, what came and what is needed."""

import threading
from collections.abc import Sequence
from contextlib import contextmanager

import torch
import triton

INT32 = (torch.int32,)
INT = (torch.int32, torch.int64)
MOST_REACH = 1 << 31  # elements: kernels count in 32 bits along vectors, but for long ones of unit stride
_thread = threading.local()


def tensor(name: str, value, dtypes: Sequence[torch.dtype], least: Sequence[int], device: torch.device,
           unit_stride: bool = False) -> None:
    """A tensor of one of `dtypes`, at least `least` in every dimension, on `device`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        needed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {needed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    if value.dim() != len(least) or any(have < need for have, need in zip(value.shape, least)):
        raise ValueError(f"{name} must be at least {tuple(least)}, got {tuple(value.shape)}")
    if value.dim() == 1 and value.numel() > 1 and value.stride(0) > 1 and value.stride(0) * (len(value) - 1) >= MOST_REACH:
        raise ValueError(f"{name} must lie within 2^31 elements, got {len(value)} of them at a stride of {value.stride(0)}")
    if unit_stride and value.numel() > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride, got stride {value.stride(-1)}")


def own_cells(name: str, value: torch.Tensor) -> None:
    """No two cells of an output at one address (an expanded view)."""
    reach = 1
    for size, stride in sorted(zip(value.shape, value.stride()), key=lambda d: d[1]):
        if size > 1 and stride < reach:
            raise ValueError(f"{name} is written, so its cells must not overlap; got strides {tuple(value.stride())} for "
                             f"shape {tuple(value.shape)}")
        reach += (size - 1) * stride


def apart(outputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor], may_alias=frozenset()) -> None:
    """No output shares memory with another argument, except pairs in `may_alias` that are the very same memory."""
    for watcher in getattr(_thread, "watchers", ()):
        watcher.update(outputs)
    spans = sorted((*span(t), n) for n, t in {**others, **outputs}.items() if t.numel())
    reach, widest = -1, ""
    for first, last, name in spans:
        if first < reach and (name in outputs or widest in outputs):
            pair = frozenset((_base(name), _base(widest)))
            if not (pair in may_alias and _same_cells(*({**others, **outputs}[n] for n in (name, widest)))):
                raise ValueError(f"{name} and {widest} share memory, and must not")
        if last > reach:
            reach, widest = last, name


def _same_cells(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views have their first cells, and so all that both have, in common, one by one."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and (min(a.numel(), b.numel()) < 2 or a.stride() == b.stride())


def positive(name: str, value: int, least: int = 1) -> None:
    """A host integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def same_count(**groups: Sequence) -> int:
    """Every per-backend argument is a list of one length; returns it."""
    counts = {}
    for name, group in groups.items():
        if not isinstance(group, (list, tuple)):
            raise TypeError(f"{name} must be a list with one entry per backend, got {type(group).__name__}")
        counts[name] = len(group)
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first] or count == 0:
            raise ValueError(f"{name} must have one entry per backend: it has {count}, {first} has {counts[first]}")
    return counts[first]


def rows_aligned(*tables: torch.Tensor) -> int:
    """1 if every row of every table begins at a multiple of 16 bytes and has unit stride, else 0: an argument of kernels."""
    return int(all(t.stride(-1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tables))


@contextmanager
def watched():
    """Collect the outputs that this thread's calls inside name, for a plan that is being bound."""
    found: dict[str, torch.Tensor] = {}
    outer = getattr(_thread, "watchers", ())
    _thread.watchers = (*outer, found)
    try:
        yield found
    finally:
        _thread.watchers = outer


def span(t: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor that has cells, and the first one behind it."""
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


def meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the byte ranges of two tensors have a byte in common; their cells may still lie apart."""
    if not (a.numel() and b.numel()):
        return False
    (first_a, last_a), (first_b, last_b) = span(a), span(b)
    return first_a < last_b and first_b < last_a


def _base(name: str) -> str:
    return name.split("[")[0]


def device_of(name: str, value) -> torch.device:
    """The device of the leading argument: CUDA, or the CPU where TRITON_INTERPRET=1 runs the kernels there."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    needed = "cpu" if triton.knobs.runtime.interpret else "cuda"
    if value.device.type != needed:
        raise ValueError(f"{name} must be on a {needed} device, got {value.device}")
    return value.device
