"""The mla_block_table family in plain PyTorch: page gathers, prefix sums, masks and index copies."""

import torch


def calc_padded_blocks(*, max_seq_len, page_size):
    """The columns of whole reader units, then on to whole writer units as well."""
    if page_size > 128:
        raise ValueError(f"page_size must be at most 128, got {page_size}")
    reader, writer = 128 // page_size, 4096 // page_size
    columns = torch.arange(0, -(-max_seq_len // page_size) + reader * writer, writer)
    return int(columns[(columns * page_size >= max_seq_len) & (columns % reader == 0)][0])


def mla_metadata_sizes(*, seq_lens, extend_seq_lens, mode, draft_tokens, page_size, max_context_len, graph):
    """From the tensors that mla_metadata fills."""
    seq = torch.tensor(seq_lens, dtype=torch.int64)
    queries = torch.full_like(seq, 1 if mode == "decode" else draft_tokens)
    if extend_seq_lens is not None:
        queries = torch.tensor(extend_seq_lens, dtype=torch.int64)
    widest = int(queries.max()) if len(queries) else 0
    keys = seq.clone()
    if graph:
        keys = torch.tensor([max_context_len])
    if mode == "target_verify":
        keys = (keys if len(keys) else torch.tensor([0])) + draft_tokens
    elif mode == "extend":
        keys = queries
    elif extend_seq_lens is not None and not graph:
        keys = seq + (widest - queries)
    reach = int(keys.max()) if len(keys) else 0
    columns = 0 if mode == "extend" else calc_padded_blocks(max_seq_len=reach, page_size=page_size)
    return {"max_seq_len_q": widest, "sum_seq_lens_q": int(queries.sum()), "max_seq_len_k": reach, "max_seq_len": reach,
            "max_blocks": columns}


def mla_metadata(*, seq_lens, extend_seq_lens, extend_prefix_lens, seq_lens_k, seq_lens_q, cu_seqlens_q, bs, mode,
                 draft_tokens, max_seq_len_q):
    """Keys and queries as whole tensors."""
    seq = seq_lens[:bs].int()
    queries = torch.full_like(seq, draft_tokens)
    if extend_seq_lens is not None:
        queries = extend_seq_lens[:bs].int()
    if extend_prefix_lens is not None:
        queries = seq - extend_prefix_lens[:bs].int()
    if seq_lens_k is not None:
        seq_lens_k[:bs] = _keys(seq, queries, mode, extend_seq_lens is not None, draft_tokens, max_seq_len_q)
    if seq_lens_q is not None:
        seq_lens_q[:bs] = queries
        cu_seqlens_q[: bs + 1] = torch.nn.functional.pad(torch.cumsum(queries, 0, dtype=torch.int32), (1, 0))


def _keys(seq, queries, mode, ragged, draft_tokens, widest):
    if mode == "target_verify":
        return seq + draft_tokens
    return seq + (widest - queries) if ragged else seq


def mla_block_table(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs, max_blocks, page_size,
                    fresh, mode, draft_tokens, max_seq_len_q):
    """Row by row, so that exactly the live prefix is read and written."""
    seq = seq_lens[:bs].long()
    queries = seq if extend_seq_lens is None else extend_seq_lens[:bs].long()
    keys = _keys(seq, queries, mode, extend_seq_lens is not None, draft_tokens, max_seq_len_q)
    if fresh:
        block_table[:bs, :max_blocks] = -1
    for row, (slot, length) in enumerate(zip(req_pool_indices[:bs].tolist(), keys.tolist())):
        pages = torch.div(req_to_token[slot, :length:page_size], page_size, rounding_mode="floor")
        block_table[row, : len(pages)] = pages


def mla_multi_step_draft(*, seq_lens, req_pool_indices, positions, req_to_token, block_table, seq_lens_k, kv_indptr,
                         kv_indices, bs, max_blocks, page_size, fresh, steps):
    """Every step's backend on its own."""
    for table, lengths in zip(block_table, seq_lens_k):
        lengths[:bs] = seq_lens[:bs]
        mla_block_table(seq_lens=seq_lens, extend_seq_lens=None, req_pool_indices=req_pool_indices,
                        req_to_token=req_to_token, block_table=table, bs=bs, max_blocks=max_blocks, page_size=page_size,
                        fresh=fresh, mode="decode", draft_tokens=1, max_seq_len_q=1)


def pad_draft_extend_query(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """Pick the places and their rows, copy bits."""
    places, rows = _places(cu_seqlens_q[:bs], seq_lens_q[:bs], max_seq_len_q)
    _bits(padded_q)[places] = _bits(q)[rows]


def unpad_draft_extend_output(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """The same places, the other way round."""
    places, rows = _places(cu_seqlens_q[:bs], seq_lens_q[:bs], max_seq_len_q)
    _bits(output)[rows] = _bits(raw_out)[places]


def pad_sequence_with_mask(*, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    """Zeros, then the places that hold tokens."""
    places, rows = _places(offsets[:bs], lengths[:bs], max_len)
    _bits(output)[:bs, :max_len] = 0
    _bits(output)[places] = _bits(input_emb)[rows]
    attn_mask[: bs * max_len] = (torch.arange(max_len, device=lengths.device) < lengths[:bs, None]).reshape(-1)


def _places(starts, lengths, width):
    """(request, token) of every token, and its packed row."""
    request, token = torch.nonzero(torch.arange(width, device=lengths.device) < lengths[:, None], as_tuple=True)
    return (request, token), starts.long()[request] + token


def _bits(tensor):
    """fp8 has no indexed copy of its own on the CPU."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
