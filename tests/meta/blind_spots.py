"""What Triton's interpreter does that hardware does not, each shown by a small kernel. Run as a worker runs: its own
process, TRITON_INTERPRET set before Triton is imported. Prints one JSON object."""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from harness.worker import interpreter  # noqa: E402
from harness.worker.arena import Arena  # noqa: E402
from harness.worker.shadow import RULES, Shadow  # noqa: E402

shims = "--stock" not in sys.argv
if shims:
    arena = Arena()
    shadow = interpreter.install(lambda native: Shadow(native, arena))
else:
    shadow = None


@triton.jit
def _loop_to_loaded_bound(n_ptr, out):
    n = tl.load(n_ptr)
    total = tl.zeros((), tl.int32)
    for i in range(0, n):
        total += i
    tl.store(out, total)


@triton.jit
def _masked_load_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@triton.jit
def _masked_load_with_zero(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < 0, other=0))


@triton.jit
def _scalar_and_vector_mask(x, out, n, m, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = (row < n) & (i < m)
    tl.store(out + i, tl.load(x + i, mask=mask, other=0), mask=mask)


@triton.jit
def _overflow_in_masked_lanes(out, big, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, i * big, mask=i < n)


@triton.jit
def _product_wraps(out, a, b):
    tl.store(out, (a * b).to(tl.int64))


@triton.jit
def _loop_index_times(out, n):
    last = 0
    for i in range(0, n):
        last = i * 2147483647
    tl.store(out, last)


@triton.jit
def _bf16_sum(x, out):
    tl.store(out, tl.load(x) + tl.load(x))


@triton.jit
def _narrow(x, bf16, fp8, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(bf16 + i, tl.load(x + i).to(tl.bfloat16))
    tl.store(fp8 + i, tl.load(x + i).to(tl.float8e4nv))


@triton.jit
def _widen(bf16, fp8, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(bf16 + i).to(tl.float32))
    tl.store(out + N + i, tl.load(fp8 + i).to(tl.float32))


@triton.jit
def _sums(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + i)
    tl.store(out, tl.sum(values))
    tl.store(out + 1 + tl.arange(0, 2), tl.sum(tl.reshape(values, (2, N // 2)), axis=1))
    tl.store(out + 3 + i, tl.cumsum(values))


@triton.jit
def _nothing(out):
    return


def loop_bound():
    out = torch.zeros(1, dtype=torch.int32)
    _loop_to_loaded_bound[(1,)](torch.tensor([4], dtype=torch.int32), out)
    return out.item()


def masked_lane():
    out = torch.zeros(4, dtype=torch.int32)
    _masked_load_without_other[(1,)](torch.ones(4, dtype=torch.int32), out, 2, BLOCK=4)
    return out.tolist()


def one_masked_lane():
    out = torch.ones(1, dtype=torch.int32)
    _masked_load_with_zero[(1,)](torch.ones(1, dtype=torch.int32), out, BLOCK=1)
    return out.tolist()


def mixed_mask():
    out = torch.zeros(4, dtype=torch.int32)
    _scalar_and_vector_mask[(1,)](torch.arange(1, 5, dtype=torch.int32), out, 1, 3, BLOCK=4)
    return out.tolist()


def masked_overflow():
    out = torch.zeros(4, dtype=torch.int32)
    _overflow_in_masked_lanes[(1,)](out, 2**30, 2, BLOCK=4)
    return out.tolist()


def wrapped_product():
    out = torch.zeros(1, dtype=torch.int64)
    _product_wraps[(1,)](out, 65536, 65537)
    return out.item()


def loop_index():
    out = torch.zeros(1, dtype=torch.int64)
    _loop_index_times[(1,)](out, 3)
    return out.item()


def bf16():
    x, out = torch.full((1,), 1.5, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    _bf16_sum[(1,)](x, out)
    return out.item()


def narrow_casts():
    """The bits of some numbers as bfloat16 and as e4m3: ties to even, a carry, the largest number, past it, a subnormal."""
    x = torch.tensor([1.00390625, 1.01171875, 1.9375, 448.0, 1e9, float("-inf"), 3 * 2.0**-11, float("nan")])
    bf16, fp8 = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.float8_e4m3fn)
    _narrow[(1,)](x, bf16, fp8, N=8)
    return [["nan" if v.isnan() else f"{v.view(torch.int16).item() & 0xFFFF:04x}" for v in bf16],
            [f"{code:02x}" for code in fp8.view(torch.uint8).tolist()]]


def wide_casts():
    """What some codes mean: -1, 480 and NaN, the smallest subnormals, minus infinity and -240."""
    bf16 = torch.tensor([-16512, 17392, 1, -128], dtype=torch.int16).view(torch.bfloat16)
    fp8 = torch.tensor([0xB8, 0x7F, 0x01, 0xF7], dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.zeros(8)
    _widen[(1,)](bf16, fp8, out, N=4)
    return [str(v) for v in out.tolist()]


def sums():
    """The sum of all, of each half, and up to each, of integers whose sum passes their dtype's largest, by dtype."""
    found = {}
    for dtype, value in ((torch.int8, 100), (torch.int32, 2**30 + 1), (torch.uint32, 2**31 + 1), (torch.int64, 2**62 + 1)):
        out = torch.zeros(7, dtype=torch.int64)
        _sums[(1,)](torch.tensor([value] * 4, dtype=dtype), out, N=4)
        found[str(dtype)] = out.tolist()
    return found


def grids():
    """Which grids the shadow memory reports; the stock interpreter runs them all."""
    out, seen = torch.zeros(1, dtype=torch.int32), {}
    for grid in ((1,), (0,), (1, 65536), (1, 1, 65536), (1, 65535)):
        if shadow is not None:
            shadow.begin([], [], RULES)
        _nothing[grid](out)
        seen[str(grid)] = [f["rule"] for f in shadow.findings] if shadow is not None else []
    return seen


def attempt(test):
    try:
        return test()
    except Exception as error:  # what an unshimmed interpreter raises is the answer
        return f"{type(error).__name__}: {error}"


tests = (loop_bound, masked_lane, one_masked_lane, mixed_mask, masked_overflow, wrapped_product, loop_index, bf16,
         narrow_casts, wide_casts, sums, grids)
answers = {test.__name__: attempt(test) for test in (tests if shims else tests[:-1])}
print(json.dumps({"triton": triton.__version__, "numpy": np.__version__, **answers}))
