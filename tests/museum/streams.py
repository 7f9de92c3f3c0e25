"""Bugs between streams, which only a GPU has."""

from functools import cache

import torch

from exhibit import exhibit


@cache
def _side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@exhibit("B062")
def cast_on_a_side_stream(faulty, *, seqlens, cu_seqlens):
    """SGLang #28410. Trigger: a slow producer on one stream, the plan on another. Symptom: the plan reads the tokens of the
    step before; acceptance falls."""
    stream = _side()
    if not faulty:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wide = seqlens.to(torch.int64)
    torch.cuda.current_stream().wait_stream(stream)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(wide, 0)


@exhibit("B104")
def staging_buffer_overwritten(faulty, *, x, split, cp_size, cp_rank):
    """vLLM #23737. Trigger: 2 steps one behind the other, a busy stream. Symptom: the copy of the first is still under way when
    the second fills the same pinned buffer: a plan of garbage."""
    chosen = list(range(cp_rank, len(x), cp_size))
    staged = torch.empty(len(chosen), dtype=torch.int64, pin_memory=True)
    staged[:] = torch.tensor(chosen, dtype=torch.int64)
    rows = staged.to(x.device, non_blocking=True)
    if faulty:
        staged.zero_()
    split[: len(chosen)] = x[rows]
