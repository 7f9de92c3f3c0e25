"""Faulty implementations of the mla_block_table family, one function per fault, as small as the real ones are."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _keys(seq_lens, extend_seq_lens, bs, mode, draft_tokens, max_seq_len_q, **rest):
    keys = seq_lens[:bs].long()
    if mode == "target_verify":
        return keys + draft_tokens
    return keys if extend_seq_lens is None else keys - extend_seq_lens[:bs] + max_seq_len_q


def _table(block_table, slots, keys, req_to_token, bs, max_blocks, page_size, fresh, clear=None, page=None):
    clear = fresh if clear is None else clear
    page = page or (lambda slot, length: req_to_token[slot, :length:page_size] // page_size)
    for row, (slot, length) in enumerate(zip(slots, keys.tolist())):
        entries = page(slot, length)
        block_table[row, : len(entries)] = entries
        if clear:
            block_table[row, len(entries) : max_blocks] = -1


def _block_table(keys=None, slots=None, clear=None, page=None, **call):
    keys = _keys(**call) if keys is None else keys
    slots = call["req_pool_indices"][: call["bs"]].tolist() if slots is None else slots
    _table(call["block_table"], slots, keys, call["req_to_token"], call["bs"], call["max_blocks"], call["page_size"],
           call["fresh"], clear, page)


def _steps(seq_lens, req_pool_indices, req_to_token, block_table, seq_lens_k, bs, max_blocks, page_size, fresh, steps,
           last=None, **rest):
    for s in range(steps - 1 if last is None else last):
        seq_lens_k[s][:bs] = seq_lens[:bs]
        _table(block_table[s], req_pool_indices[:bs].tolist(), seq_lens[:bs], req_to_token, bs, max_blocks, page_size, fresh)


def _lengths(seq_lens, extend_seq_lens, extend_prefix_lens, seq_lens_k, seq_lens_q, cu_seqlens_q, bs, mode, draft_tokens,
             max_seq_len_q):
    seq = seq_lens[:bs].int()
    queries = torch.full_like(seq, draft_tokens)
    if extend_seq_lens is not None:
        queries = extend_seq_lens[:bs].int()
    if extend_prefix_lens is not None:
        queries = seq - extend_prefix_lens[:bs].int()
    if seq_lens_k is not None:
        seq_lens_k[:bs] = _keys(seq_lens, extend_seq_lens, bs, mode, draft_tokens, max_seq_len_q)
    if seq_lens_q is not None:
        seq_lens_q[:bs] = queries
        cu_seqlens_q[0] = 0
        cu_seqlens_q[1 : bs + 1] = torch.cumsum(queries, 0)


def _bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _pad(q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    for i, (start, count) in enumerate(zip(cu_seqlens_q[:bs].tolist(), seq_lens_q[:bs].tolist())):
        _bits(padded_q)[i, :count] = _bits(q)[start : start + count]


def _unpad(raw_out, starts, counts, output):
    for i, (start, count) in enumerate(zip(starts, counts)):
        _bits(output)[start : start + count] = _bits(raw_out)[i, :count]


def _mask(input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    _bits(output)[:bs, :max_len] = 0
    for i, (start, count) in enumerate(zip(offsets[:bs].tolist(), lengths[:bs].tolist())):
        kept = min(count, max_len)
        _bits(output)[i, :kept] = _bits(input_emb)[start : start + kept]
        attn_mask[i * max_len : (i + 1) * max_len] = torch.arange(max_len) < count


# -- sizes --------------------------------------------------------------------------------------------------------------


def blocks_for_the_reader(*, max_seq_len, page_size):
    """The writer's unit is forgotten."""
    unit = 128 // page_size
    return -(-max_seq_len // page_size // unit) * unit


def blocks_rounded_down(*, max_seq_len, page_size):
    """Whole pages only."""
    import math

    unit = math.lcm(128 // page_size, 4096 // page_size)
    return -(-(max_seq_len // page_size) // unit) * unit


def _sizes(seq_lens, extend_seq_lens, mode, draft_tokens, page_size, max_context_len, graph, tail, twice):
    import math

    queries = extend_seq_lens or [1 if mode == "decode" else draft_tokens] * len(seq_lens)
    widest = max(queries, default=0)
    reach = (max_context_len if graph else max(seq_lens, default=0)) + (draft_tokens if mode == "target_verify" else 0)
    if extend_seq_lens and tail:
        reach = max([reach, *(s - e + widest for s, e in zip(seq_lens, extend_seq_lens))])
    unit = math.lcm(128 // page_size, 4096 // page_size)
    columns = -(-(-(-reach // page_size)) // unit) * unit
    if mode == "extend":
        reach, columns = widest, 0
    told = reach + (draft_tokens if twice and mode == "target_verify" else 0)
    return {"max_seq_len_q": widest, "sum_seq_lens_q": sum(queries), "max_seq_len_k": reach, "max_seq_len": told,
            "max_blocks": columns}


def sizes_of_the_longest_sequence(**call):
    """Rows that end behind the longest sequence are forgotten: their last page has no column."""
    return _sizes(**call, tail=False, twice=False)


def sizes_with_drafts_twice(**call):
    """The kernel is told of draft tokens that are counted already."""
    return _sizes(**call, tail=True, twice=True)


# -- lengths ------------------------------------------------------------------------------------------------------------


def starts_of_equal_extends(**call):
    """Every request is taken to have as many queries as the widest one."""
    _lengths(**call)
    if call["cu_seqlens_q"] is not None:
        bs = call["bs"]
        call["cu_seqlens_q"][: bs + 1] = torch.arange(bs + 1) * call["max_seq_len_q"]


def keys_of_the_prefix(**call):
    """A draft extend's seq_len is taken to be without its new tokens."""
    _lengths(**call)
    if call["mode"] == "draft_extend":
        call["seq_lens_k"][: call["bs"]] += call["max_seq_len_q"]


def no_first_start(**call):
    """Index 0 is left to whoever cleared the buffer."""
    kept = None if call["cu_seqlens_q"] is None else call["cu_seqlens_q"][0].clone()
    _lengths(**call)
    if kept is not None:
        call["cu_seqlens_q"][0] = kept


def prefixes_for_queries(**call):
    """Prefill: the cached tokens are taken for the new ones."""
    _lengths(**call)
    if call["mode"] == "extend":
        call["seq_lens_q"][: call["bs"]] = call["extend_prefix_lens"][: call["bs"]]


# -- block tables -------------------------------------------------------------------------------------------------------


def tail_cleared(**call):
    """A captured table is cleared as a new one is."""
    _block_table(**call, clear=True)


def tail_kept(**call):
    """A new table keeps what its memory held."""
    _block_table(**call, clear=False)


def verify_without_drafts(**call):
    """The draft tokens are not counted."""
    _block_table(**{**call, "draft_tokens": 0})


def extend_of_the_sequence(**call):
    """A ragged draft extend reads as many keys as the request has, not as its padded queries see."""
    _block_table(**call, keys=call["seq_lens"][: call["bs"]] if call["extend_seq_lens"] is not None else None)


def rows_for_slots(**call):
    """The row number is taken for the request's slot."""
    _block_table(**call, slots=[i % call["req_to_token"].shape[0] for i in range(call["bs"])])


def tokens_for_pages(**call):
    """Slots are not divided by the page size."""
    _block_table(**call, page=lambda slot, n: call["req_to_token"][slot, : n : call["page_size"]])


def contiguous_pages(**call):
    """The first page is read, the others are counted up from it."""
    def page(slot, n):
        first = call["req_to_token"][slot, :1] // call["page_size"]
        return first[: n and 1] + torch.arange(-(-n // call["page_size"]))

    _block_table(**call, page=page)


def last_page_dropped(**call):
    """A partly filled page is no page."""
    page = call["page_size"]
    _block_table(**call, page=lambda slot, n: call["req_to_token"][slot, : n // page * page : page] // page)


@triton.jit
def _write_pages(table, req_to_token, slots, keys, width, table_pitch, token_pitch, PAGE: tl.constexpr, WIDE: tl.constexpr,
                 SPILL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int32)
    if WIDE:
        slot = slot.to(tl.int64)
    pages = (tl.load(keys + row).to(tl.int32) + PAGE - 1) // PAGE
    for start in range(0, pages, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < pages
        entry = tl.load(req_to_token + slot * token_pitch + column * PAGE, mask=live, other=0) // PAGE
        if SPILL:
            live = column < tl.maximum(pages, 1) + (pages == width).to(tl.int32)
        tl.store(table + row * table_pitch + column, entry, mask=live)


def _triton(pitch, wide, spill, call):
    table, tokens = call["block_table"], call["req_to_token"]
    if table.stride(1) != 1 or tokens.stride(1) != 1 or not call["bs"]:
        return _block_table(**call)
    keys, slots = _keys(**call).contiguous(), call["req_pool_indices"][: call["bs"]].contiguous()
    if call["fresh"]:
        table[: call["bs"], : call["max_blocks"]] = -1
    _write_pages[(call["bs"],)](table, tokens, slots, keys, call["max_blocks"], pitch(table), tokens.stride(0),
                                PAGE=call["page_size"], WIDE=wide, SPILL=spill, BLOCK=256)


def pitch_from_shape(**call):
    """The row pitch is taken from the shape."""
    _triton(lambda table: table.shape[1], True, False, call)


def slot_in_32_bits(**call):
    """slot * pitch in 32 bits."""
    _triton(lambda table: table.stride(0), False, False, call)


def page_past_the_row(**call):
    """A full row's next page goes where the next row starts."""
    _triton(lambda table: table.stride(0), True, True, call)


# -- draft steps --------------------------------------------------------------------------------------------------------


def template_built(**call):
    """The index lists that nothing reads are built (as before #26241)."""
    _steps(**call)
    if call["kv_indptr"] is not None:
        for step in range(call["steps"]):
            ends = torch.cumsum(call["positions"][: call["bs"]] + step + 1, 0)
            call["kv_indptr"][step, 1 : call["bs"] + 1] = ends


def lists_built(**call):
    """Only the lists themselves, one list's worth."""
    _steps(**call)
    if call["kv_indices"] is not None and call["bs"]:
        slot, n = int(call["req_pool_indices"][0]), int(call["seq_lens"][0]) + 1
        call["kv_indices"][0, :n] = call["req_to_token"][slot, :n]


def last_step_forgotten(**call):
    """The last backend is not filled."""
    _steps(**call, last=max(call["steps"] - 2, 1))


def lengths_grow(**call):
    """Every step counts the draft tokens before it."""
    _steps(**call)
    for s, lengths in enumerate(call["seq_lens_k"]):
        lengths[: call["bs"]] += s


def lengths_of_the_first_step_only(**call):
    """The other steps' lengths are what they were."""
    kept = [lengths.clone() for lengths in call["seq_lens_k"]]
    _steps(**call)
    for s in range(1, call["steps"] - 1):
        call["seq_lens_k"][s].copy_(kept[s])


# -- padding ------------------------------------------------------------------------------------------------------------


def viewed_where_divisible(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """Queries are viewed as equal extends where their number divides evenly (SGLang trtllm_mla_backend.forward_extend)."""
    total = int(cu_seqlens_q[bs])
    if bs and total and total % bs == 0 and total // bs <= max_seq_len_q:
        each = total // bs
        for i in range(bs):
            _bits(padded_q)[i, :each] = _bits(q)[i * each : (i + 1) * each]
    else:
        _pad(q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q)


def pitch_of_the_view(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """The corner of a larger buffer is written as if it were the whole."""
    row = padded_q.shape[2] * padded_q.shape[3]
    if padded_q.stride(-1) != 1 or not padded_q.numel():
        return _pad(q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q)
    dense = (padded_q.shape[1] * row, row, padded_q.shape[3], 1)
    _pad(q, seq_lens_q, cu_seqlens_q, padded_q.as_strided(padded_q.shape, dense), bs, max_seq_len_q)


def places_cleared(*, padded_q, bs, max_seq_len_q, **rest):
    """Places behind a request's queries are zeroed."""
    _bits(padded_q)[:bs, :max_seq_len_q] = 0
    _pad(padded_q=padded_q, bs=bs, max_seq_len_q=max_seq_len_q, **rest)


def dropped_tokens_copied(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """Lengths are taken from the starts, so tokens that a verify cut off come back."""
    counts = (cu_seqlens_q[1 : bs + 1] - cu_seqlens_q[:bs]).clamp(max=max_seq_len_q)
    _pad(q, counts, cu_seqlens_q, padded_q, bs, max_seq_len_q)


def heads_of_one_block(*, padded_q, **rest):
    """Only the first 64 heads and numbers are copied."""
    kept = padded_q[:, :, 64:].clone(), padded_q[..., 64:].clone()
    _pad(padded_q=padded_q, **rest)
    padded_q[:, :, 64:], padded_q[..., 64:] = kept


def _through(tensor, dtype):
    return tensor.to(dtype).to(tensor.dtype)


def pad_through_fp8(*, q, **rest):
    """Queries of every dtype pass through fp8."""
    _pad(q=_through(q, torch.float8_e4m3fn), **rest)


def pad_through_float16(*, q, **rest):
    """bfloat16 queries, and wider ones, pass through float16."""
    _pad(q=_through(q, torch.float16), **rest)


def unpad_through_bfloat16(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """Outputs of every dtype pass through bfloat16."""
    _unpad(_through(raw_out, torch.bfloat16), cu_seqlens_q[:bs].tolist(), seq_lens_q[:bs].tolist(), output)


def mask_through_fp8(*, input_emb, **rest):
    """Tokens of every dtype pass through fp8."""
    _mask(input_emb=_through(input_emb, torch.float8_e4m3fn), **rest)


def packed_without_gaps(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """Starts are the sums of what is kept."""
    counts = seq_lens_q[:bs].tolist()
    _unpad(raw_out, [sum(counts[:i]) for i in range(bs)], counts, output)


def last_token_dropped(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """`<` for `<=`."""
    _unpad(raw_out, cu_seqlens_q[:bs].tolist(), [max(n - 1, min(n, 1)) for n in seq_lens_q[:bs].tolist()], output)


def output_cleared(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """Everything else becomes zero."""
    _bits(output)[:] = 0
    _unpad(raw_out, cu_seqlens_q[:bs].tolist(), seq_lens_q[:bs].tolist(), output)


def padding_kept(*, output, **rest):
    """Places without a token keep what the memory held."""
    before = output.clone()
    _mask(output=output, **rest)
    for i, count in enumerate(rest["lengths"][: rest["bs"]].tolist()):
        _bits(output)[i, count : rest["max_len"]] = _bits(before)[i, count : rest["max_len"]]


def mask_one_too_many(*, attn_mask, lengths, bs, max_len, **rest):
    """`<=` for `<`."""
    _mask(attn_mask=attn_mask, lengths=lengths, bs=bs, max_len=max_len, **rest)
    attn_mask[: bs * max_len] = (torch.arange(max_len) <= lengths[:bs, None]).reshape(-1)


def long_sequences_spill(*, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    """A sequence longer than a row goes on in the next one."""
    _mask(input_emb, offsets, lengths, output, attn_mask, bs, max_len)
    for i, (start, count) in enumerate(zip(offsets[:bs].tolist(), lengths[:bs].tolist())):
        if count > max_len and i + 1 < bs and max_len:
            _bits(output)[i + 1, 0] = _bits(input_emb)[start + max_len]
