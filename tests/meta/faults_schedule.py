"""Planted faults of the schedule family, each as small as a real one was."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _splits(lengths) -> list[int]:
    return [-(-n // 256) for n in lengths.tolist()]


def _column(context_lens):
    return context_lens[:, -1] if context_lens.dim() == 2 else context_lens


def _entries(splits: list[int], num_sms: int) -> list[list[int]]:
    share, left = divmod(sum(splits), num_sms)
    return [_at(splits, i * share + min(i, left)) for i in range(num_sms + 1)]


def _at(splits: list[int], rest: int) -> list[int]:
    row = 0
    while row < len(splits) and rest >= splits[row]:
        rest -= splits[row]
        row += 1
    return [row, rest]


def _schedule(context_lens, schedule, num_sms):
    schedule[: num_sms + 1] = torch.tensor(_entries(_splits(_column(context_lens)), num_sms), dtype=torch.int32)


def _deal(keys: list[int], num_parts: int, overhead: int = 5):
    """Rows of the metadata, and the splits."""
    blocks = [max(1, -(-n // 64)) for n in keys]
    room = -(-sum(b + overhead for b in blocks) // num_parts) + overhead
    r = block = split = 0
    rows, splits = [], [0]
    for _ in range(num_parts):
        row, free = [r, len(keys) - 1, block, 0, split, 0, 0, 0], room
        while r < len(keys):
            if free >= blocks[r] - block + overhead:
                free -= blocks[r] - block + overhead
                row[1], row[3] = r, blocks[r] if keys[r] else 0
                splits.append(splits[-1] + split + 1)
                r, block, split = r + 1, 0, 0
            else:
                if free > overhead:
                    block, split = block + free - overhead, split + 1
                    row[1], row[3] = r, block
                break
        rows.append(row)
    pieces = [b - a for a, b in zip(splits, splits[1:])]
    for row in rows:
        if row[0] <= row[1]:
            row[5], row[6] = int(pieces[row[0]] > 1), int(pieces[row[1]] > 1)
    return rows, splits


def _keys(cache_seqlens, num_rows, topk) -> list[int]:
    return cache_seqlens[:num_rows].tolist() if topk == -1 else [topk] * num_rows


def _parts(cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, topk, num_parts):
    rows, splits = _deal(_keys(cache_seqlens, num_rows, topk), num_parts)
    tile_scheduler_metadata[:num_parts] = torch.tensor(rows, dtype=torch.int32)
    num_splits[: num_rows + 1] = torch.tensor(splits, dtype=torch.int32)


def honest_schedule(*, context_lens, schedule, num_sms):
    _schedule(context_lens, schedule, num_sms)


def honest_parts(**call):
    _parts(**call)


# -- stale schedules ----------------------------------------------------------------------------------------------------


def kept_if_plausible(*, context_lens, schedule, num_sms):
    """SGLang #24635: what a replay finds in the buffer passes for the schedule of its lengths."""
    batch = len(context_lens)
    there = schedule[: num_sms + 1].tolist()
    if there[-1] != [batch, 0] or not all(0 <= row <= batch and 0 <= split < 2**23 for row, split in there):
        _schedule(context_lens, schedule, num_sms)


def parts_kept_if_plausible(*, num_splits, num_rows, **call):
    """SGLang #24632: the plan is kept while the batch has the same size."""
    pieces = torch.diff(num_splits[: num_rows + 1].long())
    if int(num_splits[0]) != 0 or bool(((pieces < 1) | (pieces > 10_000)).any()):
        _parts(num_splits=num_splits, num_rows=num_rows, **call)


def fresh_tensors(*, schedule, **call):
    """vLLM #21691: the new schedule stands in a tensor of its own, and the buffer of the graph keeps the old one."""
    _schedule(schedule=schedule.clone(), **call)


# -- wrong schedules ----------------------------------------------------------------------------------------------------


def first_column(*, context_lens, **call):
    """SGLang #24635: two-dimensional lengths are read as if they were (N, 1)."""
    _schedule(context_lens=context_lens[:, 0] if context_lens.dim() == 2 else context_lens, **call)


def flattened(*, context_lens, schedule, num_sms):
    """SGLang #24635: a schedule of batch * next_n rows."""
    _schedule(context_lens.reshape(-1), schedule, num_sms)


def remainder_last(*, context_lens, schedule, num_sms):
    """What is left over goes to the last SMs: another version's rule."""
    splits = _splits(_column(context_lens))
    share, left = divmod(sum(splits), num_sms)
    starts = [i * share + max(0, i - (num_sms - left)) for i in range(num_sms + 1)]
    schedule[: num_sms + 1] = torch.tensor([_at(splits, start) for start in starts], dtype=torch.int32)


def floor_of_splits(*, context_lens, schedule, num_sms):
    """The last, unfilled split of a row is forgotten."""
    rounded = _column(context_lens) // 256 * 256
    _schedule(rounded, schedule, num_sms)


def int32_sum(*, context_lens, schedule, num_sms):
    """(length + 255) / 256 in 32 bits."""
    lengths = _column(context_lens)
    splits = torch.div(lengths + 255, 256, rounding_mode="floor").clamp(min=0).tolist()
    schedule[: num_sms + 1] = torch.tensor(_entries(splits, num_sms), dtype=torch.int32)


def no_rows_clamped(*, context_lens, schedule, num_sms):
    """DeepGEMM #353: without any work the search for a row ends one before the end of the batch."""
    _schedule(context_lens, schedule, num_sms)
    if len(context_lens) and not any(_splits(_column(context_lens))):
        schedule[:num_sms, 0] = len(context_lens) - 1


def one_entry_short(*, context_lens, schedule, num_sms):
    """The end of the work is not written."""
    keep = schedule[num_sms].clone()
    _schedule(context_lens, schedule, num_sms)
    schedule[num_sms] = keep


@triton.jit
def _peek(lengths, index, stride):
    tl.load(lengths + index * stride)


def reads_past_the_batch(*, context_lens, schedule, num_sms):
    """DeepGEMM #344: the length of the request past the end is loaded, and not used."""
    _schedule(context_lens, schedule, num_sms)
    lengths = _column(context_lens)
    if len(lengths) and lengths.stride(0):
        _peek[(1,)](lengths, len(lengths), lengths.stride(0))


# -- consumers ----------------------------------------------------------------------------------------------------------


def _walk(context_lens, schedule, owner, num_sms, met):
    splits = _splits(context_lens)
    places = schedule[: num_sms + 1].tolist()
    for sm in reversed(range(num_sms)):
        (row, split), end = places[sm], places[sm + 1]
        while not met([row, split], end):
            count = splits[row] if row < len(splits) else 0
            if split < min(count, owner.shape[1]):
                owner[row, split] = sm
            split += 1
            if split >= count:
                row, split = row + 1, 0


def meets_its_end(*, context_lens, schedule, owner, num_sms, max_splits):
    """SGLang #24635: the walk ends where it meets its end, and nowhere else."""
    _walk(context_lens, schedule, owner, num_sms, lambda at, end: at == end)


def passes_its_end(*, context_lens, schedule, owner, num_sms, max_splits):
    """The walk ends where it meets or passes its end."""
    _walk(context_lens, schedule, owner, num_sms, lambda at, end: at >= end)


def loads_before_it_tests(*, context_lens, schedule, owner, num_sms, max_splits):
    """DeepGEMM #344: a walker that has come to the end of the batch loads that length first."""
    passes_its_end(context_lens=context_lens, schedule=schedule, owner=owner, num_sms=num_sms, max_splits=max_splits)
    if len(context_lens) and context_lens.stride(0):
        _peek[(1,)](context_lens, len(context_lens), context_lens.stride(0))


def one_split_too_many(*, context_lens, schedule, owner, num_sms, max_splits):
    """`<=` for `<`: an SM also takes the first split of the next one."""
    _walk(context_lens, schedule, owner, num_sms, lambda at, end: at > end or at[0] >= len(context_lens))


# -- FlashMLA -----------------------------------------------------------------------------------------------------------


def no_overhead(*, cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, topk, num_parts):
    """Parts are filled without the overhead of a request."""
    rows, splits = _deal(_keys(cache_seqlens, num_rows, topk), num_parts, overhead=0)
    tile_scheduler_metadata[:num_parts] = torch.tensor(rows, dtype=torch.int32)
    num_splits[: num_rows + 1] = torch.tensor(splits, dtype=torch.int32)


def lengths_matter(*, topk, **call):
    """The top-k is ignored: the requests' own lengths decide."""
    _parts(topk=-1, **{**call, "cache_seqlens": call["cache_seqlens"].clamp(0, 100_000)})


def piece_restarts(*, tile_scheduler_metadata, num_parts, **call):
    """The number of a piece starts at 0 again in every part."""
    _parts(tile_scheduler_metadata=tile_scheduler_metadata, num_parts=num_parts, **call)
    tile_scheduler_metadata[:num_parts, 4] = 0


def not_cut(*, tile_scheduler_metadata, num_parts, **call):
    """No part says that its requests are cut, so nothing combines the pieces."""
    _parts(tile_scheduler_metadata=tile_scheduler_metadata, num_parts=num_parts, **call)
    tile_scheduler_metadata[:num_parts, 5:7] = 0


def splits_past_the_batch(*, num_splits, num_rows, **call):
    """SGLang #34443: one row of splits too many."""
    _parts(num_splits=num_splits, num_rows=num_rows, **call)
    num_splits[num_rows + 1 :] = num_splits[num_rows]


def parts_tail_cleared(*, tile_scheduler_metadata, num_parts, **call):
    """vLLM #27128 turned round: what lies behind the parts of this device is cleared."""
    _parts(tile_scheduler_metadata=tile_scheduler_metadata, num_parts=num_parts, **call)
    tile_scheduler_metadata[num_parts:] = 0
