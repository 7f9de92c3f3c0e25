"""Block tables and metadata of the TRT-LLM MLA backend, and the padding of ragged queries: one launch each.

Tables of several draft steps are equal, so one launch reads req_to_token once and stores every entry for all of them.
Padding copies bits: it goes by the element size, never by the number format. Whatever the lengths on the device say,
nothing outside the given tensors is read or written.
"""

import math

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

MODES = ("decode", "target_verify", "draft_extend", "extend")
TRTLLM_TOKENS, WRITER_TOKENS = 128, 4096
FLOATS = (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32)
BITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}
BLOCK_REQUESTS, BLOCK_COLUMNS, MOST_SPLITS = 1024, 1024, 32
BLOCK_TOKENS, BLOCK_CELLS = 8, 256
MOST_TOKENS = 65_535 * BLOCK_TOKENS  # a grid's second dimension ends there


# -- host integers ------------------------------------------------------------------------------------------------------


def calc_padded_blocks(*, max_seq_len, page_size):
    """The columns of a block table for `max_seq_len` keys: a multiple of what its reader and its writer need.

    Raises:
        ValueError: max_seq_len below 0, or page_size outside 1 to 128 (no table suits such pages).
    """
    checks.positive("max_seq_len", max_seq_len, 0)
    _check_page_size(page_size)
    unit = math.lcm(TRTLLM_TOKENS // page_size, WRITER_TOKENS // page_size)
    return triton.cdiv(triton.cdiv(max_seq_len, page_size), unit) * unit


def mla_metadata_sizes(*, seq_lens, extend_seq_lens, mode, draft_tokens, page_size, max_context_len, graph):
    """Query tokens, the longest row of keys, and the columns of the block table (oracles/mla_block_table.py).

    Args:
        seq_lens, extend_seq_lens: lists of one integer per request; extend_seq_lens is None unless requests differ.
    Returns:
        dict of max_seq_len_q, sum_seq_lens_q, max_seq_len_k, max_seq_len and max_blocks.
    Raises:
        ValueError: an unknown mode, a size out of range, or lists of different lengths.
    """
    _check_mode(mode)
    for name, value, least in (("draft_tokens", draft_tokens, 1), ("max_context_len", max_context_len, 0)):
        checks.positive(name, value, least)
    _check_page_size(page_size)
    bs = len(seq_lens)
    if extend_seq_lens is not None and len(extend_seq_lens) != bs:
        raise ValueError(f"extend_seq_lens must have one entry per request: it has {len(extend_seq_lens)}, seq_lens has {bs}")
    uniform = 1 if mode == "decode" else draft_tokens
    widest = max(extend_seq_lens or [uniform if bs else 0])
    total = uniform * bs if extend_seq_lens is None else sum(extend_seq_lens)
    if mode == "extend":
        return _sizes(widest, total, widest, 0)
    added = draft_tokens if mode == "target_verify" else 0
    reach = (max_context_len if graph else max(seq_lens, default=0)) + added
    if extend_seq_lens is not None:
        reach = max([reach, *(seq - extend + widest for seq, extend in zip(seq_lens, extend_seq_lens))])
    return _sizes(widest, total, reach, calc_padded_blocks(max_seq_len=reach, page_size=page_size))


def _sizes(widest: int, total: int, reach: int, columns: int) -> dict[str, int]:
    return {"max_seq_len_q": widest, "sum_seq_lens_q": total, "max_seq_len_k": reach, "max_seq_len": reach,
            "max_blocks": columns}


def _check_page_size(page_size) -> None:
    checks.positive("page_size", page_size)
    if page_size > TRTLLM_TOKENS:
        raise ValueError(f"page_size must be at most {TRTLLM_TOKENS}: a block table holds whole units of {TRTLLM_TOKENS} "
                         f"tokens; got {page_size}")


def _check_mode(mode, known=MODES) -> None:
    if mode not in known:
        raise ValueError(f"mode must be one of {', '.join(known)}, got {mode!r}")


# -- lengths ------------------------------------------------------------------------------------------------------------


@jit
def _lengths(seq_lens, others, seq_lens_k, seq_lens_q, cu_seqlens_q, bs, added, uniform, seq_stride, other_stride,
             QUERIES: tl.constexpr, HAS_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """One program. QUERIES: 0 none, 1 `uniform` of each, 2 `others` of them, 3 what `others` leaves of the keys."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.int32)
    if QUERIES != 0:
        tl.store(cu_seqlens_q, total)
    for start in range(0, bs, BLOCK):
        i = start + lanes
        live = i < bs
        seq = tl.load(seq_lens + i * seq_stride, mask=live, other=0).to(tl.int32)
        keys = seq + added
        if QUERIES != 0:
            queries = tl.where(live, uniform, 0).to(tl.int32)
            if QUERIES > 1:
                queries = tl.load(others + i * other_stride, mask=live, other=0).to(tl.int32)
            if QUERIES == 2:
                keys -= queries
            if QUERIES == 3:
                queries = seq - queries
            tl.store(seq_lens_q + i, queries, mask=live)
            tl.store(cu_seqlens_q + 1 + i, total + tl.cumsum(queries, 0), mask=live)
            total += tl.sum(queries, 0)
        if HAS_KEYS:
            tl.store(seq_lens_k + i, keys, mask=live)


@remembered
def mla_metadata(*, seq_lens, extend_seq_lens, extend_prefix_lens, seq_lens_k, seq_lens_q, cu_seqlens_q, bs, mode,
                 draft_tokens, max_seq_len_q):
    """Fill the lengths of keys and queries (oracles/mla_block_table.py has them by mode).

    Args:
        seq_lens: int32 or int64 [>= bs], any stride. extend_seq_lens, extend_prefix_lens: likewise, each given exactly in
            its mode (a draft_extend without extend_seq_lens has `draft_tokens` queries per request).
        seq_lens_k [>= bs], seq_lens_q [>= bs], cu_seqlens_q [>= bs + 1]: int32, unit stride; None where the mode has none.
            seq_lens_q may be extend_seq_lens itself.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _check_mode(mode)
    checks.positive("bs", bs, 0)
    checks.positive("draft_tokens", draft_tokens)
    checks.positive("max_seq_len_q", max_seq_len_q, 0)
    has_queries, ragged = mode in ("draft_extend", "extend"), mode == "draft_extend" and extend_seq_lens is not None
    inputs = {"seq_lens": seq_lens, "extend_seq_lens": extend_seq_lens, "extend_prefix_lens": extend_prefix_lens}
    outputs = {"seq_lens_k": seq_lens_k, "seq_lens_q": seq_lens_q, "cu_seqlens_q": cu_seqlens_q}
    _check_presence(mode, extend_seq_lens=None if mode == "draft_extend" else False, extend_prefix_lens=mode == "extend",
                    seq_lens_k=mode != "extend", seq_lens_q=has_queries, cu_seqlens_q=has_queries, given=inputs | outputs)
    device = checks.device_of("seq_lens", seq_lens)
    inputs, outputs = _present(inputs), _present(outputs)
    for name, value in inputs.items():
        checks.tensor(name, value, checks.INT, (bs,), device)
    for name, value in outputs.items():
        checks.tensor(name, value, checks.INT32, (bs + (name == "cu_seqlens_q"),), device, unit_stride=True)
        checks.own_cells(name, value)
    checks.apart(outputs, inputs, {frozenset(("seq_lens_q", "extend_seq_lens"))})
    queries = 0 if not has_queries else 3 if mode == "extend" else 2 if ragged else 1
    added = draft_tokens if mode == "target_verify" else max_seq_len_q if ragged else 0
    other = seq_lens if queries < 2 else extend_seq_lens if ragged else extend_prefix_lens
    unused = next(iter(outputs.values()))
    _lengths[(1,)](seq_lens, other, outputs.get("seq_lens_k", unused), outputs.get("seq_lens_q", unused),
                   outputs.get("cu_seqlens_q", unused), bs, added, draft_tokens, seq_lens.stride(0), other.stride(0),
                   QUERIES=queries, HAS_KEYS=mode != "extend", BLOCK=BLOCK_REQUESTS)


def _check_presence(mode: str, given: dict, **wanted: bool | None) -> None:
    """Every optional tensor is there exactly where its mode has it; None: the caller decides."""
    for name, needed in wanted.items():
        if needed is not None and needed != (given[name] is not None):
            raise ValueError(f"{name} must be {'given' if needed else 'None'} in mode {mode}, got "
                             f"{'None' if given[name] is None else type(given[name]).__name__}")


def _present(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if value is not None}


# -- block tables -------------------------------------------------------------------------------------------------------


@jit
def _block_tables(seq_lens, extend_seq_lens, req_pool_indices, req_to_token, tables, seq_lens_k, table_strides,
                  slots, tokens, max_blocks, page_size, added, seq_stride, extend_stride, pool_stride,
                  token_stride_0, token_stride_1, RAGGED: tl.constexpr, FRESH: tl.constexpr, HAS_LENGTHS: tl.constexpr,
                  STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Programs (i, 0...) write row i of every table, program (i, 0) also its lengths."""
    request, part = tl.program_id(0), tl.program_id(1)
    keys = tl.load(seq_lens + request * seq_stride).to(tl.int32) + added
    if RAGGED:
        keys -= tl.load(extend_seq_lens + request * extend_stride).to(tl.int32)
    if HAS_LENGTHS:
        if part == 0:
            for s in tl.static_range(STEPS):
                tl.store(seq_lens_k[s] + request, keys)

    # A slot or a length that no caller may pass costs entries, not memory.
    slot = tl.load(req_pool_indices + request * pool_stride).to(tl.int64)
    pages = tl.minimum((tl.maximum(keys, 0) + page_size - 1) // page_size, max_blocks)
    pages = tl.where((slot >= 0) & (slot < slots), pages, 0)
    end = pages
    if FRESH:
        end = max_blocks
    source = req_to_token + slot * token_stride_0
    for start in range(part * BLOCK, end, tl.num_programs(1) * BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        token = column * page_size
        live = (column < pages) & (token < tokens)
        page = tl.load(source + token * token_stride_1, mask=live, other=0) // page_size
        wanted = live
        if FRESH:
            page = tl.where(live, page, -1)
            wanted = column < max_blocks
        for s in tl.static_range(STEPS):
            row = tables[s] + request.to(tl.int64) * table_strides[s][0]
            tl.store(row + column * table_strides[s][1], page, mask=wanted)


@remembered
def mla_block_table(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs, max_blocks, page_size,
                    fresh, mode, draft_tokens, max_seq_len_q):
    """Fill `block_table[:bs]` with the pages of every request's keys (oracles/mla_block_table.py).

    Args:
        seq_lens, req_pool_indices: int32 or int64 [>= bs], any stride. extend_seq_lens: likewise, in a ragged draft_extend
            only, with `max_seq_len_q` their maximum.
        req_to_token: int32 [slots, tokens], any strides. block_table: int32 [>= bs, >= max_blocks], any strides.
        fresh: whether the rest of every row becomes -1; else it stays.
    Raises:
        TypeError, ValueError: an argument is not as above, or the output overlaps an input; nothing was written.
    """
    _check_mode(mode, MODES[:3])
    checks.positive("draft_tokens", draft_tokens)
    checks.positive("max_seq_len_q", max_seq_len_q, 0)
    if extend_seq_lens is not None and mode != "draft_extend":
        raise ValueError(f"extend_seq_lens must be None in mode {mode}, got {type(extend_seq_lens).__name__}")
    ragged = extend_seq_lens is not None
    added = draft_tokens if mode == "target_verify" else max_seq_len_q if ragged else 0
    inputs = {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices, "req_to_token": req_to_token}
    inputs |= _present({"extend_seq_lens": extend_seq_lens})
    _fill(inputs, {"block_table": [block_table]}, bs, max_blocks, page_size, fresh, added, numbered=False)


@remembered
def mla_multi_step_draft(*, seq_lens, req_pool_indices, positions, req_to_token, block_table, seq_lens_k, kv_indptr,
                         kv_indices, bs, max_blocks, page_size, fresh, steps):
    """Block tables and lengths of all `steps - 1` draft backends in one launch. Arguments as for `mla_block_table`, and

    Args:
        block_table, seq_lens_k: lists with one int32 tensor per backend: [>= bs, >= max_blocks], any strides, and
            [>= bs], unit stride.
        positions, kv_indptr, kv_indices: None or the template's buffers, which are neither read nor written (#26241).
    """
    checks.positive("steps", steps, 2)
    outputs = {"block_table": block_table, "seq_lens_k": seq_lens_k}
    backends = checks.same_count(**outputs)
    if backends != steps - 1:
        raise ValueError(f"block_table must have steps - 1 = {steps - 1} entries, got {backends}")
    inputs = {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices, "req_to_token": req_to_token}
    idle = {"positions": (positions, checks.INT, (bs,)), "kv_indptr": (kv_indptr, checks.INT32, (steps, bs + 1)),
            "kv_indices": (kv_indices, checks.INT32, (steps, 0))} if isinstance(bs, int) else {}
    _fill(inputs, outputs, bs, max_blocks, page_size, fresh, 0, idle=idle)


def _fill(inputs, outputs, bs, max_blocks, page_size, fresh, added, numbered=True, idle=None) -> None:
    """Check everything, then launch once."""
    _check_tables(inputs, outputs, bs, max_blocks, page_size, fresh, numbered, idle or {})
    if bs == 0:
        return
    seq, pool, tokens = inputs["seq_lens"], inputs["req_pool_indices"], inputs["req_to_token"]
    extend = inputs.get("extend_seq_lens", seq)
    tables = tuple(outputs["block_table"])
    grid = (bs, min(max(triton.cdiv(max_blocks, BLOCK_COLUMNS), 1), MOST_SPLITS))
    _block_tables[grid](
        seq, extend, pool, tokens, tables, tuple(outputs.get("seq_lens_k", tables)),
        tuple((t.stride(0), t.stride(1)) for t in tables),
        tokens.shape[0], tokens.shape[1], max_blocks, page_size, added, seq.stride(0), extend.stride(0), pool.stride(0),
        tokens.stride(0), tokens.stride(1), RAGGED="extend_seq_lens" in inputs, FRESH=fresh,
        HAS_LENGTHS="seq_lens_k" in outputs, STEPS=len(tables), BLOCK=BLOCK_COLUMNS,
    )


def _check_tables(inputs, outputs, bs, max_blocks, page_size, fresh, numbered, idle) -> None:
    """Refuse what the kernel could not honour."""
    for name, value, least in (("bs", bs, 0), ("max_blocks", max_blocks, 0), ("page_size", page_size, 1)):
        checks.positive(name, value, least)
    if not isinstance(fresh, bool):
        raise TypeError(f"fresh must be True or False, got {fresh!r}")
    device = checks.device_of("seq_lens", inputs["seq_lens"])
    for name, value in inputs.items():
        table = name == "req_to_token"
        checks.tensor(name, value, checks.INT32 if table else checks.INT, (1, 0) if table else (bs,), device)
    flat = {f"{n}[{b}]" if numbered else n: t for n, group in outputs.items() for b, t in enumerate(group)}
    for name, value in flat.items():
        lengths = name.startswith("seq_lens_k")
        checks.tensor(name, value, checks.INT32, (bs,) if lengths else (bs, max_blocks), device, unit_stride=lengths)
        checks.own_cells(name, value)
    for name, (value, dtypes, least) in idle.items():
        if value is not None:
            checks.tensor(name, value, dtypes, least, device)
    checks.apart(flat, inputs | _present({name: value for name, (value, _, _) in idle.items()}))


# -- padding ------------------------------------------------------------------------------------------------------------


@jit
def _ragged_copy(packed, padded, mask, starts, lengths, width, rows, cells, inner, start_stride, length_stride,
                 packed_0, packed_1, packed_2, padded_0, padded_1, padded_2, padded_3,
                 BITS: tl.constexpr, TO_PADDED: tl.constexpr, ZERO: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
                 BLOCK_CELLS: tl.constexpr):
    """Program (i, block of tokens, block of cells): packed[starts[i] + t] and padded[i, t] for the tokens of request i."""
    request = tl.program_id(0)
    packed, padded = packed.to(tl.pointer_type(BITS)), padded.to(tl.pointer_type(BITS))
    start = tl.load(starts + request * start_stride).to(tl.int64)
    length = tl.load(lengths + request * length_stride).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cell = tl.program_id(2) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = start + token
    there = token < width
    live = there & (token < length) & (row >= 0) & (row < rows)
    outer, last = (cell // inner).to(tl.int64), (cell % inner).to(tl.int64)
    in_packed = packed + row[:, None] * packed_0 + (outer * packed_1 + last * packed_2)[None, :]
    in_padded = (padded + request.to(tl.int64) * padded_0 + token[:, None] * padded_1
                 + (outer * padded_2 + last * padded_3)[None, :])
    exists = (cell < cells)[None, :]
    if TO_PADDED:
        bits = tl.load(in_packed, mask=live[:, None] & exists, other=0)
        wanted = live
        if ZERO:
            wanted = there
            if tl.program_id(2) == 0:
                tl.store(mask + request.to(tl.int64) * width + token, token < length, mask=there)
        tl.store(in_padded, bits, mask=wanted[:, None] & exists)
    else:
        bits = tl.load(in_padded, mask=live[:, None] & exists, other=0)
        tl.store(in_packed, bits, mask=live[:, None] & exists)


@remembered
def pad_draft_extend_query(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    """Copy every request's queries to the front of its row of `padded_q[:bs, :max_seq_len_q]`; the places behind stay.

    Args:
        q: bfloat16, float8_e4m3fn, float16 or float32 [rows, heads, head_dim]; padded_q: of the same dtype
            [>= bs, >= max_seq_len_q, heads, head_dim]; both any strides (a corner of a larger buffer among them).
        seq_lens_q [>= bs], cu_seqlens_q [>= bs + 1]: int32 or int64, any stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or padded_q overlaps an input; nothing was written.
    """
    _check_counts(bs=bs, max_seq_len_q=max_seq_len_q)
    lengths = {"seq_lens_q": (seq_lens_q, (bs,)), "cu_seqlens_q": (cu_seqlens_q, (bs + 1,))}
    _check_padding(("q", q, (0, 0, 0)), ("padded_q", padded_q, (bs, max_seq_len_q, 0, 0)), lengths, output="padded_q")
    _copy(q, padded_q, None, cu_seqlens_q, seq_lens_q, bs, max_seq_len_q, q.shape[0], to_padded=True)


@remembered
def unpad_draft_extend_output(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    """Copy the front of every row of `raw_out` to the request's place in `output[:sum_seq_lens_q]`; the rest stays.

    Args:
        raw_out: bfloat16, float8_e4m3fn, float16 or float32 [>= bs, >= max_seq_len_q, heads, head_dim]; output: of the
            same dtype [>= sum_seq_lens_q, heads, head_dim]; both any strides.
        cu_seqlens_q [>= bs + 1], seq_lens_q [>= bs]: int32 or int64, any stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or output overlaps an input; nothing was written.
    """
    _check_counts(bs=bs, max_seq_len_q=max_seq_len_q, sum_seq_lens_q=sum_seq_lens_q)
    lengths = {"seq_lens_q": (seq_lens_q, (bs,)), "cu_seqlens_q": (cu_seqlens_q, (bs + 1,))}
    _check_padding(("output", output, (sum_seq_lens_q, 0, 0)), ("raw_out", raw_out, (bs, max_seq_len_q, 0, 0)), lengths,
                   output="output")
    _copy(output, raw_out, None, cu_seqlens_q, seq_lens_q, bs, max_seq_len_q, sum_seq_lens_q, to_padded=False)


@remembered
def pad_sequence_with_mask(*, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    """Copy every sequence to its row of `output[:bs, :max_len]`, zero the places behind it, and say which are which.

    Args:
        input_emb: bfloat16, float8_e4m3fn, float16 or float32 [rows, hidden]; output: of the same dtype
            [>= bs, >= max_len, hidden]; both any strides. attn_mask: bool [>= bs * max_len], unit stride.
        offsets, lengths: int32 or int64 [>= bs], any stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs overlap; nothing was written.
    """
    _check_counts(bs=bs, max_len=max_len)
    _check_padding(("input_emb", input_emb, (0, 0)), ("output", output, (bs, max_len, 0)),
                   {"offsets": (offsets, (bs,)), "lengths": (lengths, (bs,))}, output="output", mask=(attn_mask, bs * max_len))
    _copy(input_emb, output, attn_mask, offsets, lengths, bs, max_len, input_emb.shape[0], to_padded=True)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        checks.positive(name, value, 0)
        if name.startswith("max_") and value > MOST_TOKENS:
            raise ValueError(f"{name} must be at most {MOST_TOKENS}, got {value}")


def _check_padding(packed, padded, lengths, output: str, mask=None) -> None:
    """Both float tensors have one dtype and rows of one shape. `packed` and `padded`: name, tensor and least shape."""
    device = checks.device_of(packed[0], packed[1])
    for name, value, least in (packed, padded):
        checks.tensor(name, value, FLOATS, least, device)
    if packed[1].dtype != padded[1].dtype:
        raise TypeError(f"{padded[0]} must have the dtype of {packed[0]}, {packed[1].dtype}, got {padded[1].dtype}")
    if padded[1].shape[2:] != packed[1].shape[1:]:
        raise ValueError(f"{padded[0]} and {packed[0]} must have rows of one shape, got {tuple(padded[1].shape[2:])} and "
                         f"{tuple(packed[1].shape[1:])}")
    for name, (value, least) in lengths.items():
        checks.tensor(name, value, checks.INT, least, device)
    tensors = {packed[0]: packed[1], padded[0]: padded[1], **{name: value for name, (value, _) in lengths.items()}}
    outputs = {output: tensors.pop(output)}
    if mask is not None:
        checks.tensor("attn_mask", mask[0], (torch.bool,), (mask[1],), device, unit_stride=True)
        outputs["attn_mask"] = mask[0]
    for name, value in outputs.items():
        checks.own_cells(name, value)
    checks.apart(outputs, tensors)


def _copy(packed, padded, mask, starts, lengths, bs, width, rows, to_padded: bool) -> None:
    """One launch over the bits of both tensors: a copy needs no number format. Rows are [heads, head_dim] or [hidden]."""
    bits, inner, cells = BITS[packed.element_size()], packed.shape[-1], math.prod(packed.shape[1:])
    heads = packed.dim() == 3
    packed_strides = packed.stride() if heads else (packed.stride(0), 0, packed.stride(1))
    padded_strides = padded.stride() if heads else (*padded.stride()[:2], 0, padded.stride(2))
    grid = (bs, triton.cdiv(width, BLOCK_TOKENS), triton.cdiv(cells, BLOCK_CELLS))
    if 0 in grid:
        return
    zero = mask is not None
    _ragged_copy[grid](packed, padded, mask if zero else packed, starts, lengths, width, rows, cells, inner, starts.stride(0),
                       lengths.stride(0), *packed_strides, *padded_strides, BITS=bits, TO_PADDED=to_padded, ZERO=zero,
                       BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_CELLS=BLOCK_CELLS)
