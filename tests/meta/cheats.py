"""A subject that looks right and is not: kernels that would pass a careless test, one function each, all for `cu_seqlens`.

None of them is ever right for the reason that a caller relies on; `test_cheats.py` shows that each is rejected.
"""

import os
import sys
import threading

import torch


def _honest(seqlens, cu_seqlens):
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)


_last: dict[int, torch.Tensor] = {}


def last_result_again(*, seqlens, cu_seqlens):
    """Batches of one size get the answer that the first of them got."""
    size = len(seqlens) + 1
    if size not in _last:
        _honest(seqlens, cu_seqlens)
        _last[size] = cu_seqlens[:size].clone()
    cu_seqlens[:size] = _last[size]


_by_address: dict[tuple[int, int, int], torch.Tensor] = {}


def cached_by_address(*, seqlens, cu_seqlens):
    """The answer is remembered by where the lengths lie, not by what they are."""
    key = (seqlens.data_ptr(), cu_seqlens.data_ptr(), len(seqlens))
    if key not in _by_address:
        _honest(seqlens, cu_seqlens)
        _by_address[key] = cu_seqlens[: len(seqlens) + 1].clone()
    cu_seqlens[: len(seqlens) + 1] = _by_address[key]


def right_where_watched(*, seqlens, cu_seqlens):
    """Right where the process looks like a test: its environment, its arguments, its modules, its callers."""
    frame, files = sys._getframe(), []
    while frame:
        files.append(os.path.basename(frame.f_code.co_filename))
        frame = frame.f_back
    signs = [*os.environ, *sys.argv, *files, *(name.partition(".")[0] for name in sys.modules)]
    if any(word in sign.lower() for sign in signs for word in ("pytest", "hypothesis", "conftest", "test_", "plumbline_test")):
        _honest(seqlens, cu_seqlens)


def shortcut_for_small(*, seqlens, cu_seqlens):
    """Up to eight requests as any test would try them; beyond, the rest is left out."""
    _honest(seqlens[:8], cu_seqlens)


def altered_and_restored(*, seqlens, cu_seqlens):
    """The lengths are summed in place and then put back."""
    before = seqlens.clone()
    torch.cumsum(before, 0, out=seqlens)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = seqlens
    seqlens.copy_(before)


def output_is_the_input(*, seqlens, cu_seqlens):
    """The caller's tensor object is made to show other memory; the buffer that a graph captured stays as it was."""
    sums = torch.zeros(len(cu_seqlens), dtype=cu_seqlens.dtype)
    _honest(seqlens, sums)
    cu_seqlens.set_(sums)


def output_shares_the_input(*, seqlens, cu_seqlens):
    """The output object is pointed at the input's memory, and the sums are written there."""
    _honest(seqlens, cu_seqlens)
    if len(seqlens):
        cu_seqlens.set_(seqlens)


def later(*, seqlens, cu_seqlens):
    """The work is done after the call has returned."""
    threading.Timer(0.05, _honest, (seqlens, cu_seqlens)).start()


def replaced_judge(*, seqlens, cu_seqlens):
    """The comparison itself is made to agree."""
    torch.equal = torch.allclose = lambda *a, **k: True
    cu_seqlens[:] = 0


def on_another_stream(*, seqlens, cu_seqlens):
    """GPU: the work goes to a stream of its own, and nobody waits for it or for what comes before it."""
    with torch.cuda.stream(torch.cuda.Stream()):
        _honest(seqlens, cu_seqlens)
