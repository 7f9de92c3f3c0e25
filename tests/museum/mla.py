"""The TRT-LLM MLA backend: block tables, lengths, padded queries."""

import torch
import triton
import triton.language as tl

from exhibit import exhibit, put, sums


def _keys(seq, extends, mode, draft_tokens, widest):
    if mode == "target_verify":
        return [n + draft_tokens for n in seq]
    return seq if extends is None else [n + widest - e for n, e in zip(seq, extends.tolist())]


def _tables(keys, req_pool_indices, req_to_token, block_table, page_size):
    for i, (slot, n) in enumerate(zip(req_pool_indices.tolist(), keys)):
        block_table[i, : -(-n // page_size)] = req_to_token[slot, :n:page_size] // page_size


@exhibit("B093")
def vacated_rows(faulty, *, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs, max_blocks, page_size,
                 fresh, mode, draft_tokens, max_seq_len_q):
    """vLLM #37728, #49757. Trigger: a request leaves, its pages go to another, an idle step writes. Symptom: what the row held
    is written through, and the new owner's state is gone."""
    if fresh and not faulty:
        block_table[:bs, :max_blocks] = -1
    keys = _keys(seq_lens[:bs].tolist(), extend_seq_lens, mode, draft_tokens, max_seq_len_q)
    _tables(keys, req_pool_indices, req_to_token, block_table, page_size)


@exhibit("B169")
def no_column_for_the_next_token(faulty, *, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs,
                                 max_blocks, page_size, fresh, mode, draft_tokens, max_seq_len_q):
    """nano-vLLM #258. Trigger: a sequence that ends with a full page. Symptom: the page of the token behind it is missing, or
    is what a wider batch left there."""
    if fresh:
        block_table[:bs, :max_blocks] = -1
    seq = seq_lens[:bs].tolist()
    keys = _keys(seq, extend_seq_lens, mode, draft_tokens, max_seq_len_q)
    _tables(seq if faulty else keys, req_pool_indices, req_to_token, block_table, page_size)


def _metadata(seq, queries, call):
    if call["seq_lens_k"] is not None:
        extends = call["extend_seq_lens"]
        put(call["seq_lens_k"], _keys(seq, extends, call["mode"], call["draft_tokens"], call["max_seq_len_q"]))
    if call["seq_lens_q"] is not None:
        put(call["seq_lens_q"], queries)


def _queries(call) -> list[int]:
    seq = call["seq_lens"][: call["bs"]].tolist()
    if call["extend_prefix_lens"] is not None:
        return [n - p for n, p in zip(seq, call["extend_prefix_lens"].tolist())]
    if call["extend_seq_lens"] is not None:
        return call["extend_seq_lens"][: len(seq)].tolist()
    return [call["draft_tokens"]] * len(seq)


@exhibit("B058")
def sums_of_the_real_batch(faulty, **call):
    """SGLang #21649. Trigger: 3 requests padded to 4 under data parallelism. Symptom: one request more than the sums have
    ranges, so an illegal address."""
    seq, queries = call["seq_lens"][: call["bs"]].tolist(), _queries(call)
    _metadata(seq, queries, call)
    real = len(seq)
    while faulty and real and seq[real - 1] <= 1:
        real -= 1
    if call["cu_seqlens_q"] is not None:
        put(call["cu_seqlens_q"], sums(queries[:real]))


@exhibit("B164")
def residual_starts(faulty, **call):
    """vLLM-Ascend #5711, #10895. Trigger: a decode ends and a prefill joins in one step. Symptom: entries of the step before
    stay, and a request has -540 tokens."""
    seq, queries = call["seq_lens"][: call["bs"]].tolist(), _queries(call)
    _metadata(seq, queries, call)
    if call["cu_seqlens_q"] is not None:
        call["cu_seqlens_q"][0] = 0
        for i, end in enumerate(sums(queries)[1:]):
            if queries[i] or not faulty:
                call["cu_seqlens_q"][i + 1] = end


@exhibit("B087")
def one_query_per_request(faulty, *, seq_lens, extend_seq_lens, mode, draft_tokens, page_size, max_context_len, graph):
    """vLLM #27368. Trigger: 2 query tokens per request. Symptom: the splits are planned for one."""
    queries = [1 if mode == "decode" or (faulty and mode == "target_verify") else draft_tokens] * len(seq_lens)
    queries = queries if extend_seq_lens is None else extend_seq_lens
    widest = max(queries, default=0)
    keys = [max_context_len] if graph else seq_lens
    if mode == "target_verify":
        keys = [n + draft_tokens for n in keys or [0]]
    elif mode == "extend":
        keys = queries
    elif extend_seq_lens is not None and not graph:
        keys = [n + widest - q for n, q in zip(seq_lens, queries)]
    reach = max(keys, default=0)
    return {"max_seq_len_q": widest, "sum_seq_lens_q": sum(queries), "max_seq_len_k": reach, "max_seq_len": reach,
            "max_blocks": 0 if mode == "extend" else _blocks(reach, page_size)}


def _blocks(tokens, page_size, unit=4096):
    reader, writer = 128 // page_size, unit // page_size
    columns = 0
    while columns * page_size < tokens or columns % reader or columns % writer:
        columns += 1
    return columns


@exhibit("B114")
def size_in_the_wrong_unit(faulty, *, max_seq_len, page_size):
    """vLLM #28315, #26499. Trigger: 3 query tokens per request and a bucket of 4. Symptom: sizes in tokens are compared with
    sizes in another unit: a bucket too small, or no graph."""
    if page_size > 128:
        raise ValueError(f"page_size must be at most 128, got {page_size}")
    return _blocks(-(-max_seq_len // page_size) if faulty else max_seq_len, page_size)


@triton.jit
def _pad(q, lengths, starts, out, q_row, q_head, q_step, out_request, out_row, out_head, out_step, length_step, start_step,
         head_dim, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(starts + request * start_step).to(tl.int32)
    column = tl.arange(0, BLOCK)
    for j in range(0, tl.load(lengths + request * length_step).to(tl.int32)):
        row = start + j
        if WIDE:
            row = row.to(tl.int64)
        value = tl.load(q + row * q_row + head * q_head + column * q_step, mask=column < head_dim)
        place = request * out_request + j * out_row.to(tl.int64) + head * out_head + column * out_step
        tl.store(out + place, value, mask=column < head_dim)


@exhibit("B014")
def start_times_stride(faulty, *, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """SGLang #20389, #20390. Trigger: 131,072 tokens of a stride of 16,384. Symptom: the product of a start and a stride wraps
    at 2^31, an illegal access."""
    heads, head_dim = q.shape[1:]
    if bs and heads and head_dim:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[q.element_size()]
        _pad[(bs, heads)](q.view(bits), seq_lens_q, cu_seqlens_q, padded_q.view(bits), *q.stride(), *padded_q.stride(),
                          seq_lens_q.stride(0), cu_seqlens_q.stride(0), head_dim, WIDE=not faulty,
                          BLOCK=triton.next_power_of_2(head_dim))


def _rows(input_emb, offsets, lengths, output, bs, max_len, empty_fill):
    """Last request first, as programs may run; `empty_fill`: places to clear for a request without tokens."""
    raw, out = (t.view(torch.uint8 if t.element_size() == 1 else t.dtype) for t in (input_emb, output))
    for i in reversed(range(bs)):
        start, n = int(offsets[i]), min(int(lengths[i]), max_len)
        out[i, :n] = raw[start : start + n]
        for place in range(n, max_len if n else empty_fill):
            if i + place // max(max_len, 1) < bs:
                out[i + place // max_len, place % max_len] = 0


@exhibit("B141")
def zeros_by_the_tile(faulty, *, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    """FlashAttention a3a257c7, #2470. Trigger: an empty request in front of one with tokens. Symptom: the zeros of the empty
    one reach over the first rows of the next."""
    _rows(input_emb, offsets, lengths, output, bs, max_len, 8 if faulty and max_len and max_len < 8 else max_len)
    for i in range(bs):
        attn_mask[i * max_len : (i + 1) * max_len] = torch.arange(max_len) < int(lengths[i])


@exhibit("B064")
def mask_of_the_real_batch(faulty, *, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    """SGLang #13740, #33127. Trigger: 3 requests padded to 4, a tree of drafts. Symptom: padded rows read behind the mask."""
    _rows(input_emb, offsets, lengths, output, bs, max_len, max_len)
    real = bs
    while faulty and real and int(lengths[real - 1]) == 0:
        real -= 1
    for i in range(real):
        attn_mask[i * max_len : (i + 1) * max_len] = torch.arange(max_len) < int(lengths[i])
