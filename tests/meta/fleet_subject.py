"""A subject for campaigns: three right functions; one wrong on few examples; one that sometimes ends its process."""

import ctypes

import torch


def cu_seqlens(*, seqlens, cu_seqlens):
    """Wrong where a long first length is followed by more than six others."""
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)
    if len(seqlens) > 6 and int(seqlens[0]) > 300:
        cu_seqlens[1] += 1


def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    row = 0
    for extend, seq in zip(extend_seq_lens.tolist(), seq_lens.tolist()):
        for t in range(extend):
            seqlens_expanded[row] = max(seq - extend + 1 + t, 0)
            row += 1


def nsa_cache_seqlens(*, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """Reads through a null pointer where there is much padding."""
    if padded_rows > 1000:
        ctypes.string_at(0)
    n, rows = len(seqlens_expanded), max(len(seqlens_expanded), padded_rows)
    nsa_cache_seqlens[:n] = seqlens_expanded.clamp(max=index_topk)
    nsa_cache_seqlens[n:rows] = 0
    nsa_cu_seqlens_k[0] = 0
    nsa_cu_seqlens_k[1 : rows + 1] = torch.cumsum(nsa_cache_seqlens[:rows], 0)
