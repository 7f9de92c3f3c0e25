"""Triton kernels of the page_table family: one launch each, no synchronisation, nothing allocated.

A table program takes one request (or row) and a share of its columns; a tile is read once and stored for every row of the
request. Row and page offsets are 64-bit, slots and lengths that are out of bounds read and write nothing.
"""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BLOCK_REQUESTS, BLOCK_TOKENS, BLOCK_COLUMNS, MOST_SPLITS = 32, 128, 1024, 32


@jit
def _gather_page_table(req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, out,
                       bs, slots, total_rows, draft_tokens, max_len,
                       token_stride_0, token_stride_1, pool_stride, length_stride, repeat_stride, chosen_stride,
                       out_stride_0, out_stride_1, aligned,
                       RAGGED: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_REQUESTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Program (p, part): the rows of the p-th request that has some, columns of its part. Where all rows begin at multiples
    of 16 bytes (`aligned`), whole blocks need no mask, and 16 bytes move at once."""
    place = tl.program_id(0)
    part = tl.program_id(1)
    request = place.to(tl.int64)
    if CHOSEN:
        request = tl.load(bs_idx + place * chosen_stride).to(tl.int64)
    exists = (request >= 0) & (request < bs)

    first = place.to(tl.int64) * draft_tokens
    rows = tl.zeros((), tl.int64) + draft_tokens
    if RAGGED:
        first = tl.zeros((), tl.int64)
        for start in range(0, place, BLOCK_REQUESTS):
            j = start + tl.arange(0, BLOCK_REQUESTS)
            earlier = j < place
            if CHOSEN:
                j = tl.load(bs_idx + j * chosen_stride, mask=earlier, other=0).to(tl.int64)
                earlier = earlier & (j >= 0) & (j < bs)
            repeats = tl.load(row_repeats + j * repeat_stride, mask=earlier, other=0).to(tl.int64)
            first += tl.sum(tl.maximum(repeats, 0), 0)
        rows = tl.load(row_repeats + request * repeat_stride, mask=exists, other=0).to(tl.int64)
    rows = tl.minimum(rows, total_rows - first).to(tl.int32)  # a request that does not exist has no columns

    slot = tl.load(req_pool_indices + request * pool_stride, mask=exists, other=0).to(tl.int64)
    length = tl.load(cache_seqlens + request * length_stride, mask=exists, other=0).to(tl.int32)
    length = tl.where((slot >= 0) & (slot < slots) & exists, tl.minimum(length, max_len), 0)
    source = req_to_token + slot * token_stride_0
    step = tl.num_programs(1) * BLOCK_COLUMNS
    lanes = tl.arange(0, BLOCK_COLUMNS)
    whole = tl.where(aligned != 0, length, 0) // BLOCK_COLUMNS * BLOCK_COLUMNS
    for start in range(part * BLOCK_COLUMNS, length, step):
        column = (start + lanes).to(tl.int64)
        if start < whole:
            tokens = tl.load(tl.multiple_of(req_to_token + slot * token_stride_0, 16) + column)
            for r in range(0, rows):
                tl.store(tl.multiple_of(out + (first + r) * out_stride_0, 16) + column, tokens)
        else:
            tokens = tl.load(source + column * token_stride_1, mask=column < length, other=0)
            for r in range(0, rows):
                tl.store(out + (first + r) * out_stride_0 + column * out_stride_1, tokens, mask=column < length)


@remembered
def gather_page_table(*, req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, page_table_1, bs, total_rows,
                      draft_tokens, max_len):
    """Fill the live prefix of `page_table_1[:total_rows]` with the KV slots of the rows' requests (oracles/page_table.py).

    Args:
        req_to_token: int32 [slots, >= max_len], any strides. req_pool_indices, cache_seqlens: int32 or int64 [>= bs], any
        stride. row_repeats: int32 or int64 [>= bs], any stride, or None: every request has draft_tokens rows.
        bs_idx: int32 or int64 [requests that have rows], any stride, or None: all have.
        page_table_1: int32 [>= total_rows, >= max_len], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above, total_rows is not the sum where the host can tell, or the output
        overlaps; nothing was written.
    """
    for name, value in (("bs", bs), ("total_rows", total_rows), ("draft_tokens", draft_tokens), ("max_len", max_len)):
        checks.positive(name, value, 0)
    device = checks.device_of("req_to_token", req_to_token)
    inputs = dict(req_to_token=req_to_token, req_pool_indices=req_pool_indices, cache_seqlens=cache_seqlens)
    checks.tensor("req_to_token", req_to_token, checks.INT32, (1, max_len), device)
    for name, value in (("req_pool_indices", req_pool_indices), ("cache_seqlens", cache_seqlens), ("row_repeats", row_repeats)):
        if value is not None or name != "row_repeats":
            checks.tensor(name, value, checks.INT, (bs,), device)
            inputs[name] = value
    places = bs
    if bs_idx is not None:
        places = _length("bs_idx", bs_idx)
        checks.tensor("bs_idx", bs_idx, checks.INT, (places,), device)
        inputs["bs_idx"] = bs_idx
    if row_repeats is None and total_rows != places * draft_tokens:
        raise ValueError(f"total_rows must be {places} requests x {draft_tokens} draft_tokens, got {total_rows}")
    _output("page_table_1", page_table_1, (total_rows, max_len), device, inputs)
    if places == 0 or total_rows == 0 or max_len == 0:
        return
    repeats = req_pool_indices if row_repeats is None else row_repeats
    chosen = req_pool_indices if bs_idx is None else bs_idx
    _gather_page_table[(places, _splits(max_len))](
        req_to_token, req_pool_indices, cache_seqlens, repeats, chosen, page_table_1,
        bs, req_to_token.shape[0], total_rows, draft_tokens, max_len,
        *req_to_token.stride(), req_pool_indices.stride(0), cache_seqlens.stride(0), repeats.stride(0), chosen.stride(0),
        *page_table_1.stride(), checks.rows_aligned(req_to_token, page_table_1), RAGGED=row_repeats is not None,
        CHOSEN=bs_idx is not None, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK_COLUMNS=BLOCK_COLUMNS)


@jit
def _real_page_table(table, out, pages, page_size, table_stride_0, table_stride_1, out_stride_0, out_stride_1,
                     BLOCK: tl.constexpr):
    """Program (row, part). Division rounds down also where it is done on a negative slot."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lanes = part * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, pages - part * BLOCK, tl.num_programs(1) * BLOCK):
        page = (start + lanes).to(tl.int64)
        slot = tl.load(table + row * table_stride_0 + page * page_size * table_stride_1, mask=page < pages, other=0)
        slot = slot.to(tl.int64)
        below = tl.maximum(-slot, 0)
        number = tl.maximum(slot, 0) // page_size - (below + page_size - 1) // page_size
        tl.store(out + row * out_stride_0 + page * out_stride_1, number.to(tl.int32), mask=page < pages)


@remembered
def real_page_table(*, page_table_1, real_page_table, page_size):
    """Fill `real_page_table[:rows, :ceil(columns / page_size)]` with the pages of every page_size-th column.

    Args:
        page_table_1: int32 [rows, columns], any strides. real_page_table: int32, at least the size filled, any strides.
    Raises:
        TypeError, ValueError: an argument is not as above, or they overlap; nothing was written.
    """
    checks.positive("page_size", page_size)
    device = checks.device_of("page_table_1", page_table_1)
    checks.tensor("page_table_1", page_table_1, checks.INT32, (0, 0), device)
    rows, columns = page_table_1.shape
    pages = triton.cdiv(columns, page_size)
    _output("real_page_table", real_page_table, (rows, pages), device, {"page_table_1": page_table_1})
    if rows == 0 or pages == 0:
        return
    _real_page_table[(rows, _splits(pages))](page_table_1, real_page_table, pages, page_size, *page_table_1.stride(),
                                             *real_page_table.stride(), BLOCK=BLOCK_COLUMNS)


@triton.jit
def _sum_before(values, stride, last, BLOCK: tl.constexpr):
    """The sum of the values (none below 0) before index `last`."""
    total = tl.zeros((), tl.int64)
    for start in range(0, last, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(values + j * stride, mask=j < last, other=0).to(tl.int64)
        total += tl.sum(tl.maximum(x, 0), 0)
    return total


@jit
def _page_table_1_flattened(table, lengths, out, max_len, total_len, table_stride_0, table_stride_1, length_stride,
                            BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (request, part)."""
    request = tl.program_id(0)
    part = tl.program_id(1)
    first = _sum_before(lengths, length_stride, request, BLOCK_REQUESTS)
    length = tl.minimum(tl.load(lengths + request * length_stride).to(tl.int32), max_len)
    lanes = part * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, length - part * BLOCK, tl.num_programs(1) * BLOCK):
        column = (start + lanes).to(tl.int64)
        tokens = tl.load(table + request.to(tl.int64) * table_stride_0 + column * table_stride_1, mask=column < length, other=0)
        tl.store(out + first + column, tokens, mask=(column < length) & (first + column < total_len))


@remembered
def page_table_1_flattened(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """Fill `page_table_1_flattened[:total_len]` with the live prefixes of the rows.

    Args:
        page_table_1: int32 [>= bs, >= max_len], any strides. seq_lens: int32 or int64 [>= bs], any stride.
        page_table_1_flattened: int32 [>= total_len], unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or the output overlaps; nothing was written.
    """
    for name, value in (("bs", bs), ("max_len", max_len), ("total_len", total_len)):
        checks.positive(name, value, 0)
    device = checks.device_of("page_table_1", page_table_1)
    checks.tensor("page_table_1", page_table_1, checks.INT32, (bs, max_len), device)
    checks.tensor("seq_lens", seq_lens, checks.INT, (bs,), device)
    _output("page_table_1_flattened", page_table_1_flattened, (total_len,), device,
            {"page_table_1": page_table_1, "seq_lens": seq_lens})
    if bs == 0 or max_len == 0 or total_len == 0:
        return
    _page_table_1_flattened[(bs, _splits(max_len))](
        page_table_1, seq_lens, page_table_1_flattened, max_len, total_len, *page_table_1.stride(), seq_lens.stride(0),
        BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK_COLUMNS)


@jit
def _topk_indices_offset(starts, extends, out, total_len, start_stride, extend_stride, BLOCK_REQUESTS: tl.constexpr,
                         BLOCK: tl.constexpr):
    """One program per request."""
    request = tl.program_id(0)
    first = _sum_before(extends, extend_stride, request, BLOCK_REQUESTS)
    extend = tl.load(extends + request * extend_stride).to(tl.int32)
    key = tl.load(starts + request * start_stride)
    for start in range(0, extend, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(out + first + token, token * 0 + key, mask=(token < extend) & (first + token < total_len))


@remembered
def topk_indices_offset(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """Fill `topk_indices_offset[:total_len]` with the first key of every query token's request.

    Args:
        cu_seqlens_k: int32 [>= bs + 1], extend_seq_lens: int32 or int64 [>= bs], any stride.
        topk_indices_offset: int32 [>= total_len], unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or the output overlaps; nothing was written.
    """
    checks.positive("bs", bs, 0)
    checks.positive("total_len", total_len, 0)
    device = checks.device_of("cu_seqlens_k", cu_seqlens_k)
    checks.tensor("cu_seqlens_k", cu_seqlens_k, checks.INT32, (bs + 1,), device)
    checks.tensor("extend_seq_lens", extend_seq_lens, checks.INT, (bs,), device)
    _output("topk_indices_offset", topk_indices_offset, (total_len,), device,
            {"cu_seqlens_k": cu_seqlens_k, "extend_seq_lens": extend_seq_lens})
    if bs == 0 or total_len == 0:
        return
    _topk_indices_offset[(bs,)](cu_seqlens_k, extend_seq_lens, topk_indices_offset, total_len, cu_seqlens_k.stride(0),
                                extend_seq_lens.stride(0), BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK_TOKENS)


@jit
def _arange(out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, i, mask=i < n)


@jit
def _prefix_sums(lengths, out, stride, n, BLOCK: tl.constexpr):
    """One program: block sums with a carry. Slot 0 is the first block's zero."""
    total = tl.zeros((), tl.int32)
    tl.store(out, total)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(lengths + i * stride, mask=i < n, other=0).to(tl.int32)
        tl.store(out + 1 + i, total + tl.cumsum(x, 0), mask=i < n)
        total += tl.sum(x, 0)


@remembered
def cu_seqlens_q(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """Fill `cu_seqlens_q[:n + 1]` with where its n query sequences start, and the total.

    Args:
        extend_seq_lens: int32 or int64 [>= bs], any stride; in modes other than extend unused, and may be None.
        cu_seqlens_q: int32 [>= n + 1], unit stride. mode: decode (n = bs), target_verify (n = bs * draft_tokens),
        draft_extend (n = extend_num_tokens) or extend (n = bs).
    Raises:
        TypeError, ValueError: an argument is not as above, or the output overlaps; nothing was written.
    """
    for name, value in (("bs", bs), ("draft_tokens", draft_tokens), ("extend_num_tokens", extend_num_tokens)):
        checks.positive(name, value, 0)
    n = _sequences(mode, bs, draft_tokens, extend_num_tokens)
    device = checks.device_of("cu_seqlens_q", cu_seqlens_q)
    inputs = {} if mode != "extend" and extend_seq_lens is None else {"extend_seq_lens": extend_seq_lens}
    if inputs:
        checks.tensor("extend_seq_lens", extend_seq_lens, checks.INT, (bs,), device)
    _output("cu_seqlens_q", cu_seqlens_q, (n + 1,), device, inputs)
    if mode == "extend":
        _prefix_sums[(1,)](extend_seq_lens, cu_seqlens_q, extend_seq_lens.stride(0), bs, BLOCK=1024)
    else:
        _arange[(triton.cdiv(n + 1, 1024),)](cu_seqlens_q, n + 1, BLOCK=1024)


def max_seq_len_q(*, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin):
    """The longest query sequence of a pass (host integers only).

    Raises:
        ValueError: an unknown mode.
    """
    if _sequences(mode, 1, 1, 1) and mode != "extend":
        return 1
    if not round_robin and not any(extend_prefix_lens):
        return max_seq_len_k
    return max(extend_seq_lens, default=1)


def _sequences(mode, bs: int, draft_tokens: int, extend_num_tokens: int) -> int:
    """How many query sequences a mode has."""
    counts = {"decode": bs, "target_verify": bs * draft_tokens, "draft_extend": extend_num_tokens, "extend": bs}
    if mode not in counts:
        raise ValueError(f"mode must be one of {', '.join(counts)}, got {mode!r}")
    return counts[mode]


def _output(name: str, value, least: tuple[int, ...], device, inputs: dict) -> None:
    """An int32 output of its own cells, apart from every input; 1-D ones have unit stride."""
    checks.tensor(name, value, checks.INT32, least, device, unit_stride=len(least) == 1)
    checks.own_cells(name, value)
    checks.apart({name: value}, inputs)


def _splits(columns: int) -> int:
    """Programs that share the columns of a row."""
    return min(triton.cdiv(columns, BLOCK_COLUMNS), MOST_SPLITS)


def _length(name: str, value) -> int:
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        raise TypeError(f"{name} must be a 1-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return value.shape[0]
