"""Triton's interpreter as the suite uses it: the shadow memory hooked in, and the known gaps closed by named shims."""

import itertools
import math

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes

from . import fast
from .shadow import Shadow, poison


def install(shadow_of, stock: bool = False) -> Shadow:
    """Patch the imported interpreter once per process. `shadow_of(native)` makes the stand-in for its native module; `stock`
    leaves out what only makes it faster."""
    from triton.runtime import interpreter

    shadow = shadow_of(interpreter._interpreter)
    interpreter._interpreter = shadow
    loop_bounds_from_memory(interpreter)
    if not stock:
        fast.install(interpreter)
    poison_masked_lanes(interpreter)
    scalar_and_vector_masks(interpreter)
    narrow_float_casts(interpreter)
    integer_sums_wrap(interpreter)
    first_config_of_autotune(interpreter)
    watch_launches(interpreter, shadow)
    return shadow


def loop_bounds_from_memory(interpreter) -> None:
    """Triton 3.6 with NumPy 2.4 or newer fails on `range(n)` with n loaded from memory (Triton issue #9171)."""
    stock = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        stock(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def poison_masked_lanes(interpreter) -> None:
    """A masked load without `other` is undefined on hardware; the interpreter gives 0, which hides missing masks.

    Whether there is a mask or an `other` Triton asks by its truth, which in the interpreter is its value where it has one lane.
    """
    builder, semantic = interpreter.InterpreterBuilder, type(interpreter.interpreter_semantic)
    stock, stock_patch, stock_access = builder.create_masked_load, interpreter._patch_lang_tensor, {}
    inside = {"access": False}

    def accessing(name):
        def access(self, *args):
            inside["access"] = True
            try:
                return stock_access[name](self, *args)
            finally:
                inside["access"] = False

        return access

    def patched(tensor, scope):
        stock_patch(tensor, scope)
        truth = tensor.__bool__
        scope.set_attr(tensor, "__bool__", lambda self: inside["access"] or truth(self))

    def create_masked_load(self, pointers, mask, other, *rest):
        if other is None:
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            other = interpreter.TensorHandle(np.full(pointers.data.shape, poison(dtype), dtype=dtype), element)
        return stock(self, pointers, mask, other, *rest)

    for name in ("load", "store"):
        stock_access[name] = getattr(semantic, name)
        setattr(semantic, name, accessing(name))
    interpreter._patch_lang_tensor = patched
    builder.create_masked_load = create_masked_load


def scalar_and_vector_masks(interpreter) -> None:
    """Triton 3.9 keeps the operand's shape out of `(scalar < n) & (vector < m)`; broadcast before a masked access."""
    builder = interpreter.InterpreterBuilder
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store

    def fitted(mask, like):
        if mask.data.shape == like.data.shape and mask.data.dtype == bool:
            return mask
        return interpreter.TensorHandle(np.broadcast_to(mask.data, like.data.shape).astype(bool), mask.dtype)

    builder.create_masked_load = lambda self, p, mask, *rest: stock_load(self, p, fitted(mask, p), *rest)
    builder.create_masked_store = lambda self, p, value, mask, *rest: stock_store(self, p, value, fitted(mask, p), *rest)


def narrow_float_casts(interpreter) -> None:
    """Casts among float32, bfloat16 and float8 e4m3 round to nearest even, e4m3 saturates and NaN stays NaN, as on hardware.

    The stock ones truncate to bfloat16, round e4m3 halves up without carrying, and read e4m3's NaN as 480.
    """
    import torch
    import triton.language as tl

    formats = {tl.float32: (torch.float32, np.float32), tl.bfloat16: (torch.bfloat16, np.int16),
               tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}
    bits = {4: np.uint32, 2: np.uint16, 1: np.uint8}
    stock = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if source not in formats or target not in formats or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return stock(values, source, target, rounding_mode)
        (dtype, raw), (goal, _) = formats[source], formats[target]
        wide = torch.from_numpy(np.array(values).view(raw)).view(dtype).to(torch.float32)
        if target == tl.float8e4nv:
            wide = wide.clamp(-448.0, 448.0)
        result = wide.to(goal)
        return result.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[goal.itemsize]).numpy().view(bits[goal.itemsize])

    interpreter._convert_float = convert


def integer_sums_wrap(interpreter) -> None:
    """The sum of an integer block wraps in the block's dtype, as on hardware.

    NumPy sums in 64 bits, and before 3.9 Triton fails to convert a sum of all lanes that 32 do not hold. Scans convert blocks,
    which wraps.
    """
    stock = interpreter.ReduceOps.sum

    def wrapping(self, block):
        dtype = np.dtype(interpreter._get_np_dtype(block.dtype))
        if not block.dtype.is_int() or dtype.kind not in "iu":
            return stock(self, block)
        total = np.sum(block.handle.data, axis=self.axis, keepdims=self.keep_dims, dtype=dtype)
        return self.to_tensor(total, block.dtype)

    interpreter.ReduceOps.sum = wrapping


def first_config_of_autotune(interpreter) -> None:
    """`triton.autotune` measures its configs on a GPU; run the first instead, of those that the kernel's pruning leaves.

    Hooks that are there for the measuring (`reset_to_zero`, `restore_value`) do not run; a config's own `pre_hook` does.
    """
    from triton.runtime.autotuner import Autotuner

    stock = Autotuner.run

    def run(self, *args, **kwargs):
        every = usable = self.configs
        if len(every) > 1 and self.early_config_prune:
            usable = self.early_config_prune(every, dict(zip(self.arg_names, args)), **kwargs)
        self.configs = list(usable)[:1] or every
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.configs = every

    Autotuner.run = run


class _Refused(Exception):
    """Hardware refuses a launch."""


def watch_launches(interpreter, shadow: Shadow) -> None:
    """Tell the shadow about launches and programs, and run the programs in a drawn order; none of a refused launch."""
    stock_call = interpreter.GridExecutor.__call__
    stock_index = interpreter.InterpreterBuilder.set_grid_idx
    stock_dim = interpreter.InterpreterBuilder.set_grid_dim
    state = {"own": [], "order": (1, 0), "grid": (1, 1, 1)}

    def call(self, *args, **kwargs):
        values = list(args) + list(kwargs.values())
        state["own"] = list(itertools.chain.from_iterable(own_ranges(v, shadow._arena) for v in values))
        with _disable_current_modes():  # the interpreter's own torch operations are not the kernel's
            try:
                return stock_call(self, *args, **kwargs)
            except _Refused:
                return None

    def set_grid_dim(self, x, y, z):
        stock_dim(self, x, y, z)
        state["grid"] = (x, y, z)
        state["order"] = program_order(x * y * z, shadow.order)
        if not shadow.launch((x, y, z), state["own"]):
            raise _Refused

    def set_grid_idx(self, x, y, z):
        nx, ny, nz = state["grid"]
        factor, shift = state["order"]
        number = ((x * ny + y) * nz + z) * factor + shift
        number %= nx * ny * nz
        index = (number // (ny * nz), number // nz % ny, number % nz)
        stock_index(self, *index)
        shadow.program(index, number)

    shadow.order = 0
    interpreter.GridExecutor.__call__ = call
    interpreter.InterpreterBuilder.set_grid_dim = set_grid_dim
    interpreter.InterpreterBuilder.set_grid_idx = set_grid_idx


def program_order(count: int, seed: int) -> tuple[int, int]:
    """A permutation i -> (i * factor + shift) mod count of the programs; seed 0 keeps their order."""
    if seed == 0 or count < 2:
        return 1, 0
    if seed == 1:
        return count - 1, count - 1
    factor = seed % count or 1
    while math.gcd(factor, count) != 1:
        factor += 1
    return factor, seed // 7 % count


def own_ranges(value, arena):
    """The address ranges of tensors in a launch's arguments that lie outside the arena."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from own_ranges(item, arena)
    elif hasattr(value, "data_ptr") and hasattr(value, "stride") and value.numel():
        address = value.data_ptr()
        if arena.block_of(address) is None:
            reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
            yield address, address + (reach + 1) * value.element_size()
