"""The metadata family in plain PyTorch: gathers, repeats and slice assignments, one backend after the other."""

import torch


def decode_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, nsa_cache_seqlens,
                    nsa_cu_seqlens_k, page_table_1, real_page_table, bs, max_len, index_topk, page_size):
    """One row per request."""
    keys = seq_lens[:bs].int()
    _fill_lengths(keys, keys, cache_seqlens, cu_seqlens_k, [None] * len(cache_seqlens), nsa_cache_seqlens, nsa_cu_seqlens_k,
                  index_topk)
    _fill_tables(keys, req_pool_indices[:bs].long(), req_to_token, page_table_1, real_page_table, page_size)


def target_verify_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, seqlens_expanded,
                           nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, paged_mqa_ctx_lens_2d, bs,
                           max_len, index_topk, page_size, draft_tokens):
    """`draft_tokens` rows per request."""
    seq = seq_lens[:bs].int()
    keys = seq + draft_tokens
    steps = torch.arange(1, draft_tokens + 1, dtype=torch.int32, device=seq.device)
    visible = (seq[:, None] + steps).reshape(-1)
    _fill_lengths(keys, visible, cache_seqlens, cu_seqlens_k, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk)
    for lens in paged_mqa_ctx_lens_2d:
        if lens is not None:
            lens[:bs, :draft_tokens] = keys[:, None]
    owner = torch.arange(bs, device=seq.device).repeat_interleave(draft_tokens)
    _fill_tables(keys[owner], req_pool_indices[:bs].long()[owner], req_to_token, page_table_1, real_page_table, page_size)


def draft_extend_metadata(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
                          seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, bs,
                          total_len, max_len, index_topk, page_size, max_extend_len, static_extend_len):
    """`extend_seq_lens[i]` rows of request i."""
    keys, extend = seq_lens[:bs].int(), extend_seq_lens[:bs].long()
    owner = torch.arange(bs, device=keys.device).repeat_interleave(extend, output_size=total_len)
    later = torch.cumsum(extend, 0)[owner] - 1 - torch.arange(total_len, device=keys.device)
    visible = (keys[owner] - later.int()).clamp(min=0)
    _fill_lengths(keys, visible, cache_seqlens, cu_seqlens_k, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk)
    _fill_tables(keys[owner], req_pool_indices[:bs].long()[owner], req_to_token, page_table_1, real_page_table, page_size)


def _fill_lengths(keys, visible, cache_seqlens, cu_seqlens_k, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, topk):
    clipped = visible.clamp(max=topk)
    for b in range(len(cache_seqlens)):
        cache_seqlens[b][: len(keys)] = keys
        _sums(cu_seqlens_k[b], keys)
        if seqlens_expanded[b] is not None:
            seqlens_expanded[b][: len(visible)] = visible
        nsa_cache_seqlens[b][: len(visible)] = clipped
        _sums(nsa_cu_seqlens_k[b], clipped)


def _sums(out, lengths):
    out[0] = 0
    out[1 : len(lengths) + 1] = torch.cumsum(lengths, 0, dtype=torch.int32)


def _fill_tables(keys, slots, req_to_token, page_table_1, real_page_table, page_size):
    """Row by row, so that exactly the live prefix is written."""
    for row, (slot, length) in enumerate(zip(slots.tolist(), keys.tolist())):
        tokens = req_to_token[slot, :length]
        for wide, real in zip(page_table_1, real_page_table):
            if wide is not None:
                wide[row, :length] = tokens
            if real is not None:
                real[row, : -(-length // page_size)] = tokens[::page_size] // page_size
