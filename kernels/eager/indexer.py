"""The indexer family in plain PyTorch: a second opinion on the oracles, and the baseline of the kernels.

Every transform writes down all tokens of the batch and then picks the rank's.
"""

import torch


def _tokens(extend, cp_size, cp_rank):
    """Number, request and position in the request of the rank's tokens."""
    owner = torch.repeat_interleave(torch.arange(len(extend), device=extend.device), extend)
    first = torch.cumsum(extend, 0) - extend
    number = torch.arange(len(owner), device=extend.device)[cp_rank::cp_size]
    owner = owner[cp_rank::cp_size]
    return number, owner, number - first[owner]


def indexer_k_start_end(*, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank):
    """Bases are sums over the requests that the rank has tokens of."""
    extend, seq = extend_seq_lens[:bs].long(), seq_lens[:bs].long()
    _, owner, position = _tokens(extend, cp_size, cp_rank)
    here = torch.zeros(bs, dtype=torch.int64, device=seq.device)
    here[owner] = 1
    if cp_size == 1:
        here[:] = 1
    base = torch.cumsum(seq * here, 0) - seq * here
    ks[:total_len] = base[owner]
    ke[:total_len] = base[owner] + (seq - extend)[owner] + position + 1
    token_to_batch_idx[:total_len] = (torch.cumsum(here, 0) - 1)[owner]


def cp_round_robin_split_q_seqs(*, extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank):
    """Count the owners of the rank's tokens."""
    _, owner, _ = _tokens(extend_seq_lens[:bs].long(), cp_size, cp_rank)
    requests, counts = torch.unique_consecutive(owner, return_counts=True)
    q_lens[:num_selected] = counts
    bs_idx[:num_selected] = requests


def cp_round_robin_split_q_seqs_cpu(*, extend_seq_lens, cp_size, cp_rank):
    """Count the owners of the rank's tokens."""
    _, owner, _ = _tokens(torch.tensor(extend_seq_lens, dtype=torch.int64), cp_size, cp_rank)
    requests, counts = torch.unique_consecutive(owner, return_counts=True)
    return {"q_lens": counts.tolist(), "bs_idx": requests.tolist()}


def cp_round_robin_split(*, x, split, cp_size, cp_rank):
    """A strided slice."""
    picked = x[cp_rank::cp_size]
    split[: len(picked)] = picked


def cp_round_robin_split_rows(*, x, split, cp_size, cp_rank):
    """A strided slice."""
    picked = x[cp_rank::cp_size]
    split[: len(picked), : x.shape[1]] = picked


def _zigzag(extend, seq, num_tokens, cp_size):
    """Boundaries [bs, 2 * cp_size + 1] of every request's segments, in the batch of tokens; prefixes; where requests start."""
    parts = 2 * cp_size
    prefix, extend = seq - extend, extend.clone()
    extend[-1:] += num_tokens - extend.sum()
    k = torch.arange(parts + 1, device=extend.device)
    cuts = torch.minimum(k, (extend % parts)[:, None]) + k * (extend // parts)[:, None]
    first = torch.cumsum(extend, 0) - extend
    return first[:, None] + cuts, prefix, first


def cp_zigzag_split(*, extend_seq_lens, seq_lens, token_indices, q_lens, kv_lens, bs, num_tokens, total_len, cp_size, cp_rank):
    """The rank's segments as ranges of tokens."""
    cuts, prefix, first = _zigzag(extend_seq_lens[:bs].long(), seq_lens[:bs].long(), num_tokens, cp_size)
    segments = [cp_rank, 2 * cp_size - 1 - cp_rank]
    begin, end = (torch.cat([cuts[:, s + shift] for s in segments]) for shift in (0, 1))
    q_lens[: 2 * bs] = end - begin
    kv_lens[: 2 * bs] = end - first.repeat(2) + prefix.repeat(2)
    within = torch.arange(total_len, device=end.device)
    starts = torch.cumsum(end - begin, 0) - (end - begin)
    owner = torch.repeat_interleave(torch.arange(2 * bs, device=end.device), end - begin)
    token_indices[:total_len] = within - starts[owner] + begin[owner]


def cp_zigzag_metadata(*, extend_seq_lens, seq_lens, num_tokens, cp_size, cp_rank):
    """All lists from one table of segment lengths [bs, 2 * cp_size]."""
    bs, parts = len(extend_seq_lens), 2 * cp_size
    extend, seq = (torch.tensor(v, dtype=torch.int64) for v in (extend_seq_lens, seq_lens))
    cuts, prefix, first = _zigzag(extend, seq, num_tokens, cp_size)
    sizes = cuts.diff(dim=1)
    order = torch.stack([torch.arange(cp_size), parts - 1 - torch.arange(cp_size)], 1).flatten()
    numbers = torch.arange(bs * parts).reshape(bs, parts)
    gathered = numbers[:, order].T.flatten()
    ends = cuts - first[:, None] + prefix[:, None]
    late = parts - 1 - cp_rank
    tokens = (sizes + sizes.flip(1))[:, :cp_size].sum(0)
    return {
        "can_split": cp_size > 1 and bs > 0 and bool((extend >= parts).all()),
        "split_list": sizes.flatten().tolist(),
        "zigzag_index": numbers[:, [cp_rank, late]].T.flatten().tolist(),
        "per_rank_actual_token": tokens.tolist(),
        "max_rank_len": tokens.max().expand(cp_size).tolist(),
        "reverse_split_len": sizes[:, order].T.flatten().tolist(),
        "cp_reverse_index": torch.argsort(gathered).tolist(),
        "q_lens_prev": sizes[:, cp_rank].tolist(),
        "q_lens_next": sizes[:, late].tolist(),
        "kv_lens_prev": ends[:, cp_rank + 1].tolist(),
        "kv_lens_next": ends[:, late + 1].tolist(),
    }
