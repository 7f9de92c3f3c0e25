"""Triton kernels of the schedule family: one launch each, no synchronisation, nothing allocated."""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

SPLIT = 256
BLOCK_ENTRIES, BLOCK_ROWS = 64, 256
FLASHMLA_BLOCK, FLASHMLA_OVERHEAD = 64, 5
MOST_PARTS = 255  # every part is compared with every other, in registers
ROW_BLOCKS = (256, 2048, 16384)  # FlashMLA batches held in registers: one binary each


@triton.jit
def _splits(lengths, SPLIT: tl.constexpr):
    """Units of work in rows of these lengths. The lengths are int64, so that rounding up cannot overflow."""
    return (tl.maximum(lengths, 0) + (SPLIT - 1)) // SPLIT


@jit
def _paged_mqa_schedule(context_lens, schedule, batch, num_sms, len_stride, out_stride_0, out_stride_1,
                        SPLIT: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """One program per block of entries: sum all work, then count the rows that end at or before each entry's start."""
    lanes = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((), tl.int64)
    for start in range(0, batch, BLOCK_ROWS):
        row = (start + lanes).to(tl.int64)
        total += tl.sum(_splits(tl.load(context_lens + row * len_stride, mask=row < batch, other=0).to(tl.int64), SPLIT), 0)

    entry = tl.program_id(0) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    share = total // num_sms
    target = entry.to(tl.int64) * share + tl.minimum(entry.to(tl.int64), total - share * num_sms)
    found = tl.zeros((BLOCK_ENTRIES,), tl.int32)
    before = tl.zeros((BLOCK_ENTRIES,), tl.int64)
    done = tl.zeros((), tl.int64)
    for start in range(0, batch, BLOCK_ROWS):
        row = (start + lanes).to(tl.int64)
        splits = _splits(tl.load(context_lens + row * len_stride, mask=row < batch, other=0).to(tl.int64), SPLIT)
        ends = done + tl.cumsum(splits, 0)
        passed = (ends[None, :] <= target[:, None]) & (row < batch)[None, :]
        found += tl.sum(passed.to(tl.int32), 1)
        before += tl.sum(tl.where(passed, splits[None, :], 0), 1)
        done += tl.sum(splits, 0)

    place = schedule + entry.to(tl.int64) * out_stride_0
    tl.store(place, found, mask=entry <= num_sms)
    tl.store(place + out_stride_1, (target - before).to(tl.int32), mask=entry <= num_sms)


@remembered
def paged_mqa_schedule(*, context_lens, schedule, num_sms):
    """Fill `schedule[:num_sms + 1]` with the (row, split) where every SM starts (oracles/schedule.py).

    Args:
        context_lens: int32 [batch] or [batch, next_n], any strides; of the latter only the last column is read.
        schedule: int32 [>= num_sms + 1, >= 2], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device = checks.device_of("context_lens", context_lens)
    checks.positive("num_sms", num_sms)
    lengths = _one_column(context_lens)
    checks.tensor("context_lens", lengths, checks.INT32, (0,), device)
    checks.tensor("schedule", schedule, checks.INT32, (num_sms + 1, 2), device)
    checks.own_cells("schedule", schedule)
    checks.apart({"schedule": schedule}, {"context_lens": context_lens})
    _paged_mqa_schedule[(triton.cdiv(num_sms + 1, BLOCK_ENTRIES),)](
        lengths, schedule, lengths.shape[0], num_sms, lengths.stride(0), schedule.stride(0), schedule.stride(1),
        SPLIT=SPLIT, BLOCK_ENTRIES=BLOCK_ENTRIES, BLOCK_ROWS=BLOCK_ROWS)


def _one_column(context_lens: torch.Tensor) -> torch.Tensor:
    """The lengths that count."""
    if context_lens.dim() == 2 and context_lens.shape[1] > 0:
        return context_lens[:, -1]
    if context_lens.dim() == 1:
        return context_lens
    raise ValueError(f"context_lens must be [batch] or [batch, next_n], got {tuple(context_lens.shape)}")


@jit
def _paged_mqa_walk(context_lens, schedule, owner, batch, width, len_stride, plan_stride_0, plan_stride_1, out_stride_0,
                    out_stride_1, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per SM. The end is passed by comparison, not met by equality: a schedule of other lengths also ends."""
    sm = tl.program_id(0)
    start = schedule + sm.to(tl.int64) * plan_stride_0
    end = start + plan_stride_0
    first_row, first_split = tl.load(start), tl.load(start + plan_stride_1)
    last_row, last_split = tl.load(end), tl.load(end + plan_stride_1)
    stop_row = tl.minimum(last_row + (last_split > 0).to(tl.int32), batch)
    for row in range(tl.maximum(first_row, 0), stop_row):
        far = tl.zeros((), tl.int64) + row
        place = owner + far * out_stride_0
        count = _splits(tl.load(context_lens + far * len_stride).to(tl.int64), SPLIT)
        count = tl.minimum(count, width).to(tl.int32)
        begin = tl.where(row == first_row, tl.maximum(first_split, 0), 0)
        stop = tl.where(row == last_row, tl.minimum(last_split, count), count)
        for split in range(begin, stop, BLOCK):
            column = split + tl.arange(0, BLOCK)
            tl.store(place + column.to(tl.int64) * out_stride_1, tl.full((BLOCK,), 0, tl.int32) + sm, mask=column < stop)


@remembered
def paged_mqa_walk(*, context_lens, schedule, owner, num_sms, max_splits):
    """Fill `owner[row, :splits of the row]` with the SM that computes each split.

    A schedule of other lengths does no harm: the walk ends, and stays inside `owner`.

    Args:
        context_lens: int32 [batch], any stride. schedule: int32 [>= num_sms + 1, >= 2], any strides.
        owner: int32 [>= batch, >= max_splits], any strides. max_splits: at least the splits of the longest row.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device = checks.device_of("context_lens", context_lens)
    checks.positive("num_sms", num_sms)
    checks.tensor("context_lens", context_lens, checks.INT32, (0,), device)
    batch = context_lens.shape[0]
    checks.tensor("schedule", schedule, checks.INT32, (num_sms + 1, 2), device)
    checks.positive("max_splits", max_splits, 0)
    checks.tensor("owner", owner, checks.INT32, (batch, max_splits), device)
    checks.own_cells("owner", owner)
    checks.apart({"owner": owner}, {"context_lens": context_lens, "schedule": schedule})
    _paged_mqa_walk[(num_sms,)](
        context_lens, schedule, owner, batch, max_splits, context_lens.stride(0), schedule.stride(0), schedule.stride(1),
        owner.stride(0), owner.stride(1), SPLIT=SPLIT, BLOCK=256)


@jit
def _flashmla_schedule(cache_seqlens, metadata, num_splits, rows, num_parts, topk, len_stride, out_stride_0, out_stride_1,
                       DENSE: tl.constexpr, KEYS: tl.constexpr, OVERHEAD: tl.constexpr, BLOCK: tl.constexpr,
                       LANES: tl.constexpr):
    """One program. A position is what was dealt out before it, in blocks and overheads; cut p is where part p starts.

    A part ends where its room does, unless that lies in the overhead behind a request: then the request is finished.
    """
    request = tl.arange(0, BLOCK)
    keys = tl.zeros((BLOCK,), tl.int32) + topk
    if DENSE:
        keys = tl.load(cache_seqlens + request.to(tl.int64) * len_stride, mask=request < rows, other=0)
    blocks = (tl.maximum(keys, 1) - 1) // KEYS + 1
    cost = tl.where(request < rows, blocks + OVERHEAD, 0).to(tl.int64)
    total = tl.sum(cost, 0)
    ends = tl.where(request < rows, tl.cumsum(cost, 0), total + num_parts + OVERHEAD + total)
    share = (total + num_parts - 1) // num_parts
    blocks = tl.where(keys > 0, blocks, 0)

    # The cuts follow from one another; what the parts are is read off them afterwards, all at once.
    cut = tl.arange(0, LANES)
    cut_request = tl.where(cut == 0, 0, rows)
    cut_block = tl.zeros((LANES,), tl.int32)
    whole_before = tl.zeros((LANES,), tl.int32)  # blocks of the request before the cut's
    inside = tl.zeros((BLOCK,), tl.int32)  # cuts inside this request and those before it
    at = tl.zeros((), tl.int64)
    part = tl.zeros((), tl.int32)
    while (part < num_parts) & (at < total):
        part += 1
        finished = ends <= at + share + OVERHEAD
        following = tl.sum(finished.to(tl.int32), 0)
        base = tl.max(tl.where(finished, ends, 0), 0)
        at = tl.minimum(tl.maximum(at + share, base), total)
        inside += ((at > base) & (at < ends)).to(tl.int32)
        here = cut == part
        cut_request = tl.where(here, following, cut_request)
        cut_block = tl.where(here, (at - base).to(tl.int32), cut_block)
        whole_before = tl.where(here, tl.sum(tl.where(request == following - 1, blocks, 0), 0), whole_before)
    tl.store(num_splits, tl.zeros((), tl.int32))
    tl.store(num_splits + 1 + request, request + 1 + inside, mask=request < rows)

    # Part p lies between the cuts p and p + 1. Its last request is the one of the next cut, or the one before that.
    split = (cut_block > 0).to(tl.int32)
    last = cut_request - 1 + split
    same = (cut_request[:, None] == cut_request[None, :]) & (cut_block > 0)[None, :]
    number = tl.sum((same & (cut[None, :] <= cut[:, None])).to(tl.int32), 1)
    first_cut = tl.sum(same.to(tl.int32), 1) > 0
    last_cut = tl.sum(((last[:, None] == cut_request[None, :]) & (cut_block > 0)[None, :]).to(tl.int32), 1) > 0
    begins = metadata + cut.to(tl.int64) * out_stride_0
    starts = cut < num_parts
    tl.store(begins, cut_request, mask=starts)
    tl.store(begins + 2 * out_stride_1, cut_block, mask=starts)
    tl.store(begins + 4 * out_stride_1, number, mask=starts)
    tl.store(begins + 5 * out_stride_1, first_cut.to(tl.int32), mask=starts)
    tl.store(begins + 7 * out_stride_1, cut * 0, mask=starts)
    stops = (cut > 0) & (cut <= num_parts)
    tl.store(begins - out_stride_0 + out_stride_1, last, mask=stops)
    tl.store(begins - out_stride_0 + 3 * out_stride_1, tl.where(split > 0, cut_block, whole_before), mask=stops)
    tl.store(begins - out_stride_0 + 6 * out_stride_1, last_cut.to(tl.int32), mask=stops)


@remembered
def flashmla_schedule(*, cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, topk, num_parts):
    """Deal the blocks of `num_rows` requests out to `num_parts` parts (layout of FlashMLA since April 2026).

    `num_parts` belongs to the device: each power of two of it is a binary of its own.

    Args:
        cache_seqlens: int32 [>= num_rows], any stride; not read unless topk is -1.
        tile_scheduler_metadata: int32 [>= num_parts, >= 8], any strides. num_splits: int32 [>= num_rows + 1], unit stride.
        num_rows: 1 to 16,384 requests. num_parts: 1 to 255. topk: keys per request, or -1.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device = checks.device_of("cache_seqlens", cache_seqlens)
    checks.positive("num_rows", num_rows)
    checks.positive("num_parts", num_parts)
    if topk != -1:
        checks.positive("topk", topk)
    if num_rows > ROW_BLOCKS[-1]:
        raise ValueError(f"num_rows must be at most {ROW_BLOCKS[-1]}, got {num_rows}")
    if num_parts > MOST_PARTS:
        raise ValueError(f"num_parts must be at most {MOST_PARTS}, got {num_parts}")
    checks.tensor("cache_seqlens", cache_seqlens, checks.INT32, (num_rows,), device)
    checks.tensor("tile_scheduler_metadata", tile_scheduler_metadata, checks.INT32, (num_parts, 8), device)
    checks.tensor("num_splits", num_splits, checks.INT32, (num_rows + 1,), device, unit_stride=True)
    outputs = {"tile_scheduler_metadata": tile_scheduler_metadata, "num_splits": num_splits}
    for name, value in outputs.items():
        checks.own_cells(name, value)
    checks.apart(outputs, {"cache_seqlens": cache_seqlens})
    block = next(b for b in ROW_BLOCKS if num_rows <= b)
    _flashmla_schedule[(1,)](
        cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, num_parts, topk, cache_seqlens.stride(0),
        tile_scheduler_metadata.stride(0), tile_scheduler_metadata.stride(1), DENSE=topk == -1, KEYS=FLASHMLA_BLOCK,
        OVERHEAD=FLASHMLA_OVERHEAD, BLOCK=block, LANES=triton.next_power_of_2(num_parts + 1),
        num_warps=4 if block < 4096 else 16)
