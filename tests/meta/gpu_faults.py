"""A subject of faults that only a GPU shows: each stands in for `cu_seqlens`."""

import torch
import triton
import triton.language as tl


def _sum(seqlens, out):
    out[:1].zero_()
    out[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)


@triton.jit
def _touch(source, into, offset, STORE: tl.constexpr):
    value = tl.load(source + offset)
    if STORE:
        tl.store(source + offset, value + 1)
    else:
        tl.store(into, value)


def reads_one_past(*, seqlens, cu_seqlens):
    """One element past the last; the value goes nowhere that is compared."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens) >= 2:
        _touch[(1,)](seqlens, torch.zeros(1, dtype=torch.int32, device=seqlens.device), len(seqlens) * seqlens.stride(0), False)


def reads_one_before(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)
    _touch[(1,)](cu_seqlens, torch.zeros(1, dtype=torch.int32, device=seqlens.device), -1, False)


@triton.jit
def _wide(source, into):
    tl.store(into, tl.load((source.to(tl.uint64) + 2).to(tl.pointer_type(tl.int32))))


def misaligned(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)
    if len(seqlens) >= 2:
        _wide[(1,)](seqlens, torch.zeros(1, dtype=torch.int32, device=seqlens.device))


@triton.jit
def _wrap(source, into):
    tl.store(into, (tl.load(source) | 1) * 0x7FFFFFFF * 2)


def overflows(*, seqlens, cu_seqlens):
    """A product that does not fit in 32 bits; it goes nowhere that is compared."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens) >= 2:
        _wrap[(1,)](seqlens, torch.zeros(1, dtype=torch.int32, device=seqlens.device))


def leaves_an_error(*, seqlens, cu_seqlens):
    """The runtime refuses something, and nobody looks."""
    _sum(seqlens, cu_seqlens)
    torch.cuda.cudart().cudaHostRegister(1, 0, 0)


def device_assert(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)
    torch._assert_async((seqlens >= 0).all() & (torch.tensor(len(seqlens), device=seqlens.device) < 2))


@triton.jit
def _spin(flag):
    while tl.load(flag, volatile=True) == 0:
        pass


def endless(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)
    if len(seqlens) >= 2:
        _spin[(1,)](torch.zeros(1, dtype=torch.int32, device=seqlens.device))


def killed(*, seqlens, cu_seqlens):
    import os
    import signal

    _sum(seqlens, cu_seqlens)
    if len(seqlens) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)


def honest(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)


def wrong_stream(*, seqlens, cu_seqlens):
    """Launched on the default stream, whatever stream the caller is on."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        _sum(seqlens, cu_seqlens)


_eager: dict[int, torch.Tensor] = {}


def frozen_at_capture(*, seqlens, cu_seqlens):
    """The captured graph reads a copy that only eager calls refresh."""
    if not torch.cuda.is_current_stream_capturing():
        _eager[len(seqlens)] = seqlens.clone()
    _sum(_eager[len(seqlens)], cu_seqlens)


def waits_for_the_gpu(*, seqlens, cu_seqlens):
    """Reads a length back, which a captured graph cannot."""
    _sum(seqlens, cu_seqlens)
    assert seqlens.sum().item() >= 0
