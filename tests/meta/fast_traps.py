"""A subject for the comparison of the interpreter's two forms: calls that look alike to a careless memory, and one that gives
itself away in the fast form."""

import triton
import triton.language as tl


@triton.jit
def _alike(seqlens, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    square = i * i  # one operand twice, then two of the same types
    product = i * (i + 1)
    whole = (i + 1).to(tl.int64)  # three constants that are equal
    truth = (i + True).to(tl.int64)
    real = ((i + 1.0) * 2).to(tl.int64)
    lowest = tl.load(seqlens + 0 * n, mask=n > 0, other=7)  # one lane: there and not there
    highest = tl.load(seqlens + 0 * n, mask=n < 0, other=7)
    signed = (i - 2) // 2  # the same operator on other types
    unsigned = (i.to(tl.uint32) + 4) // 2
    total = square + 10 * product + 100 * whole + 1000 * truth + 10000 * real + signed + unsigned.to(tl.int64)
    tl.store(out + i, (total + lowest + 3 * highest).to(tl.int32), mask=i < n + 1)


def alike(*, seqlens, cu_seqlens):
    _alike[(1,)](seqlens, cu_seqlens, len(seqlens), BLOCK=4)
    _alike[(1,)](seqlens, cu_seqlens, min(len(seqlens), 2), BLOCK=8)


@triton.jit
def _sums(seqlens, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    everything = tl.sum(tl.load(seqlens + i, mask=i < n))  # of poison in masked-off lanes, which passes 2^31
    tl.store(out + i, everything + tl.cumsum(i * 0 + 2147483647), mask=i < n + 1)


def sums(*, seqlens, cu_seqlens):
    _sums[(1,)](seqlens, cu_seqlens, len(seqlens), BLOCK=triton.next_power_of_2(len(seqlens) + 8))


def different(*, seqlens, cu_seqlens):
    """Another answer where the interpreter is fast."""
    from triton.runtime import interpreter

    cu_seqlens[0] = 5
    cu_seqlens[0] += "fast" in interpreter._get_np_dtype.__module__
