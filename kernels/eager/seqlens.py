"""The seqlens family in plain PyTorch: a second opinion on the oracles, and the baseline of the kernels."""

import torch


def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Keys that each query token sees: the request's length minus the tokens that come after it."""
    extend = extend_seq_lens.long()
    owner = torch.repeat_interleave(torch.arange(len(extend), device=extend.device), extend, output_size=total_len)
    ends = torch.cumsum(extend, 0)
    later = ends[owner] - 1 - torch.arange(total_len, device=extend.device)
    seqlens_expanded[:total_len] = (seq_lens[: len(extend)].long()[owner] - later).clamp(min=0).int()


def cu_seqlens(*, seqlens, cu_seqlens):
    """Prefix sums."""
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0, dtype=torch.int32)


def nsa_cache_seqlens(*, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """Clip, pad, sum."""
    rows = len(seqlens_expanded)
    padded = max(rows, padded_rows)
    clipped = torch.nn.functional.pad(seqlens_expanded.clamp(max=index_topk), (0, padded - rows))
    nsa_cache_seqlens[:padded] = clipped
    cu_seqlens(seqlens=clipped, cu_seqlens=nsa_cu_seqlens_k)


def cal_padded_tokens(*, global_num_tokens, dp_rank, dp_size, attn_tp_size, attn_cp_size, extend_in_batch, round_robin):
    """The same arithmetic on tensors."""
    counts = torch.tensor(global_num_tokens)
    for multiple in (attn_tp_size, attn_cp_size):
        counts = torch.div(counts + multiple - 1, multiple, rounding_mode="floor") * multiple
    own = counts[dp_rank] if len(counts) > 1 else counts[0]
    wasteful = bool(2 * counts.sum() < counts.max() * dp_size)
    rows = int(own if wasteful or (extend_in_batch and dp_size > 1) else counts.max())
    return -(-rows // attn_cp_size) if round_robin else rows
