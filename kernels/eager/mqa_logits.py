"""The mqa_logits family in plain PyTorch and plain Python: a second opinion on the oracles."""

import torch


def mqa_logits_budget(*, queries, mem_fraction_static, free_fraction):
    """The first query outside a capture fixes a device's budget."""
    share = 1.0 if mem_fraction_static is None else max(0.0, 1.0 - mem_fraction_static)

    def cap(total):
        whole = torch.tensor([total * 0.3], dtype=torch.float64)
        left = torch.tensor([total * share], dtype=torch.float64).floor() * free_fraction
        caps = whole if mem_fraction_static is None else torch.minimum(left, whole)
        return caps.floor().clamp(min=1)

    fixed, answers = {}, []
    for device, free, total, capturing in queries:
        if device not in fixed and not capturing:
            fixed[device] = torch.minimum(torch.tensor([free * free_fraction], dtype=torch.float64), cap(total))
        answers.append(int(fixed.get(device, cap(total) if device not in fixed else None).floor().clamp(min=1)))
    return answers


def should_chunk_mqa_logits(*, num_q, num_k, budget):
    """4 bytes per logit, strictly more than the budget."""
    logits = num_q * num_k
    return [bool(logits > budget / 4), budget] if logits >= 8e6 else [False, 0]


def mqa_logits_chunk_plan(*, num_q, num_k, budget):
    """Equal steps, cut at the end."""
    step = min(max(num_q, 1), max(1, budget // (4 * num_k) if num_k else budget))
    edges = torch.arange(0, num_q + step, step).clamp(max=num_q).tolist()
    return [[a, b] for a, b in zip(edges, edges[1:]) if a < b]


def mqa_logits(*, q, k, k_scale, weights, ks, ke, logits, clean_logits):
    """All pairs at once; what a row does not see is masked out afterwards."""
    rows, keys = len(ks), len(k_scale)
    key = torch.arange(keys, device=q.device)
    seen = (key >= ks[:, None]) & (key < ke[:rows, None])
    wanted = seen.any(0)
    tile = torch.where(wanted[:, None], k.float(), 0)
    products = torch.einsum("ihd,jd->ihj", q[:rows].float(), tile).relu()
    scores = (products * weights[:rows, :, None]).sum(1) * torch.where(wanted, k_scale, 0)
    kept = -torch.inf if clean_logits else logits[:rows, :keys]
    logits[:rows, :keys] = torch.where(seen, scores, kept)


def _best(logits, ks, lengths, index_topk):
    """Positions of the best keys per row, and which of them count; a stable sort keeps keys in front of what is none."""
    width = max(int(lengths.max()) if len(lengths) else 0, 1)
    p = torch.arange(width, device=logits.device).expand(len(ks), width)
    inside = p < lengths[:, None]
    column = torch.where(inside, ks[:, None] + p, 0).long()
    scores = logits.gather(1, column).masked_fill(~inside, -torch.inf) if logits.shape[1] else p.float()
    order = scores.sort(dim=1, descending=True, stable=True).indices
    order = torch.where(lengths[:, None] <= index_topk, p, order)[:, :index_topk]
    return order, order < lengths[:, None]


def _chunked(ks, max_rows, token_nums, index_topk, topk_result, select):
    rows = len(ks)
    topk_result[:token_nums, :index_topk] = -1
    for start in range(0, rows, max_rows):
        chunk = slice(start, min(start + max_rows, rows))
        values = select(chunk)
        topk_result[chunk, : values.shape[1]] = values


def topk_ragged_chunked(*, logits, ks, lengths, topk_indices_offset, topk_result, token_nums, index_topk, max_rows):
    """Positions plus the row's offset."""
    def select(chunk):
        order, real = _best(logits[chunk], ks[chunk], lengths[chunk], index_topk)
        return torch.where(real, order + topk_indices_offset[chunk, None], -1).int()

    _chunked(ks, max_rows, token_nums, index_topk, topk_result, select)


def topk_paged_chunked(*, logits, ks, lengths, page_table_1, token_to_batch_idx, topk_result, token_nums, index_topk, max_rows):
    """Positions looked up in the rows that the chunk's tokens own."""
    def select(chunk):
        order, real = _best(logits[chunk], ks[chunk], lengths[chunk], index_topk)
        slots = page_table_1[token_to_batch_idx[chunk, None].long(), torch.where(real, order, 0)] if real.any() else order
        return torch.where(real, slots, -1).int()

    _chunked(ks, max_rows, token_nums, index_topk, topk_result, select)
