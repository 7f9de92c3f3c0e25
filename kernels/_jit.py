"""Kernels that are compiled for few kinds of arguments.

Left to itself, Triton compiles again for every mix of addresses that are multiples of 16 and numbers that are 1 or multiples
of 16: with a dozen tensors, a second of compilation for almost every batch. `jit` makes a kernel that is compiled once for all
of them. Of alignment such a kernel is told by a flag, a run-time value, and it makes the promise with `tl.multiple_of`.
`typical` is for what is left: tuples, which Triton looks into whatever it is told, and kernels of plain `triton.jit`.
"""

import inspect

import torch
import triton
import triton.language as tl

ALIGNMENT = 16
SMALL, LARGE = 3, 2**31 + 3  # neither is 1 or a multiple of 16


def jit(function):
    """`triton.jit`, compiled anew only for other dtypes and constants, missing tensors, and numbers that need 64 bits."""
    values = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=values, do_not_specialize_on_alignment=values)


def typical(kernel, args: list) -> list:
    """What to compile `kernel` for: just these `args` if all tensors among them are aligned, else arguments of the same types
    of which nothing more is known."""
    looked_at = [value for p, value in zip(kernel.params, args) if isinstance(value, tuple) or not p.do_not_specialize]
    return args if all(map(_aligned, looked_at)) else list(map(_any, args))


def _aligned(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_aligned, value))
    return not isinstance(value, torch.Tensor) or value.data_ptr() % ALIGNMENT == 0


def _any(value):
    if isinstance(value, tuple):
        return tuple(map(_any, value))
    if isinstance(value, torch.Tensor):
        return _Anywhere(value.dtype)
    if isinstance(value, int) and not isinstance(value, bool):
        return SMALL if -(2**31) <= value < 2**31 else LARGE
    return value


class _Anywhere:
    """A tensor to compile for: a dtype, at no particular address."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1
