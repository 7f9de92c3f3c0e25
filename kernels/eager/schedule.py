"""The schedule family in plain PyTorch: a second opinion on the oracles."""

import torch


def _ends(lengths):
    """Where each row's splits end when all splits stand in one line."""
    return torch.cumsum((lengths.long().clamp(min=0) + 255) >> 8, 0)


def paged_mqa_schedule(*, context_lens, schedule, num_sms):
    """Search every SM's start among the ends of the rows."""
    ends = _ends(context_lens[:, -1] if context_lens.dim() == 2 else context_lens)
    sm = torch.arange(num_sms + 1, device=ends.device)
    total = int(ends[-1]) if len(ends) else 0
    start = sm * (total // num_sms) + sm.clamp(max=total % num_sms)
    row = torch.searchsorted(ends, start, right=True)
    begin = torch.cat([ends.new_zeros(1), ends])[row]
    schedule[: num_sms + 1, :2] = torch.stack([row, start - begin], 1).int()


def paged_mqa_walk(*, context_lens, schedule, owner, num_sms, max_splits):
    """The position of every split in one line, searched among the positions where the SMs start."""
    ends = _ends(context_lens)
    begins = torch.cat([ends.new_zeros(1), ends])
    plan = schedule[: num_sms + 1].long()
    start = begins[plan[:, 0]] + plan[:, 1]
    line = torch.arange(int(begins[-1]), device=ends.device)
    row = torch.searchsorted(ends, line, right=True)
    sm = torch.searchsorted(start[1:].contiguous(), line, right=True)
    owner[row, line - begins[row]] = sm.int()


def flashmla_schedule(*, cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, topk, num_parts):
    """Cut points one after the other, then everything from the cut points at once."""
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    keys = cache_seqlens[:num_rows].long() if topk == -1 else torch.full((num_rows,), topk, device=cache_seqlens.device)
    blocks = ((keys + 63) // 64).clamp(min=1)
    ends = torch.cumsum(blocks + 5, 0)
    begins = ends - blocks - 5
    share = -(-int(ends[-1]) // num_parts)
    cuts = [0]
    for _ in range(num_parts):
        at = cuts[-1] + share
        row = int(torch.searchsorted(ends - 5, at, right=True))
        inside = row < num_rows and at > int(begins[row])
        cuts.append(at if inside else int(begins[row]) if row < num_rows else int(ends[-1]))
    cut = torch.tensor(cuts, device=ends.device)
    row = torch.searchsorted(ends, cut, right=True)
    block = cut - torch.cat([begins, ends[-1:]])[row]
    pieces = 1 + torch.bincount(row[1:][block[1:] > 0], minlength=num_rows)[:num_rows]
    num_splits[: num_rows + 1] = torch.cat([pieces.new_zeros(1), torch.cumsum(pieces, 0)]).int()
    first, begin = row[:-1], block[:-1]
    last = torch.where(block[1:] > 0, row[1:], row[1:] - 1)
    end = torch.where(block[1:] > 0, block[1:], ((keys + 63) // 64)[last])
    number = torch.zeros_like(first)
    for i in range(1, num_parts):
        number[i] = 0 if begin[i] == 0 else number[i - 1] + 1 if first[i] == first[i - 1] else 1
    safe = first.clamp(max=num_rows - 1)
    flags = [(pieces[safe] > 1) & (first < num_rows), (pieces[last] > 1) & (first < num_rows)]
    fields = [first, last, begin, end, number, *(f.long() for f in flags), torch.zeros_like(first)]
    tile_scheduler_metadata[:num_parts, :8] = torch.stack(fields, 1).int()
