"""Triton kernels of the metadata family: one launch fills the persistent buffers of every draft backend.

Each request has `parts` programs, one after another: the first writes its lengths, the others its table rows, so that
neighbours write neighbouring memory. A request's place in the batch (the rows and sums before it) is a masked sum over the
requests before it, so no program waits for another, and a table tile is read once and stored for every row and backend.
Lengths, strides, alignment and batch size are run-time values: a flag says whether every row begins at a multiple of 16
bytes, and whole blocks of such rows take a path of their own. It asks the L2 cache to keep what is read for the first
requests, as much as it can keep, and to let go what is read for the others and what is written.
"""

import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2
BLOCK_REQUESTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_PAGES, WARPS = 64, 64, 1024, 64, 8
PROGRAMS, LEAST_SPLITS = 8192, 32
KEPT_CELLS = 3 << 19  # 6 MB: what stays in an L2 cache of 50 MB beside three times 34 MB of writes; of more, nothing does


@triton.jit
def _clipped_sum(n, topk):
    """min(1, topk) + ... + min(n, topk); 0 for n <= 0."""
    n = tl.maximum(n, 0).to(tl.int64)
    ramp = tl.minimum(n, topk)
    return ramp * (ramp + 1) // 2 + (n - ramp) * topk


@triton.jit
def _rows(seq, extend, draft_tokens, MODE: tl.constexpr):
    """Keys after the pass, keys that the first row sees, and rows, of requests with `seq` keys."""
    if MODE == 0:
        keys, first, rows = seq, seq, seq * 0 + 1
    elif MODE == 1:
        keys, first, rows = seq + draft_tokens, seq + 1, seq * 0 + draft_tokens
    else:
        keys, first, rows = seq, seq - extend + 1, extend
    return keys, first, rows


@triton.jit
def _store_rows(tables, strides, first_row, rows, column, values, mask):
    """Cells of `rows` rows of every backend's table."""
    for r in range(0, rows):
        row = (first_row + r).to(tl.int64)
        for b in tl.static_range(len(tables)):
            tl.store(tables[b] + row * strides[b][0] + column * strides[b][1], values, mask=mask)


@triton.jit
def _store_blocks(tables, strides, first_row, rows, column, values):
    """The same for whole blocks of tables whose rows begin at multiples of 16 bytes: 16 bytes move at once."""
    for r in range(0, rows):
        row = (first_row + r).to(tl.int64)
        for b in tl.static_range(len(tables)):
            tl.store(tl.multiple_of(tables[b] + row * strides[b][0], 16) + column, values, eviction_policy="evict_first")


@triton.jit
def _store_pages(source, stride, tables, strides, first_row, rows, page_size, start, stop, BLOCK: tl.constexpr):
    """Cells start .. start + BLOCK - 1, but for those from `stop`, of rows of page tables: the page of its first token."""
    page = (start + tl.arange(0, BLOCK)).to(tl.int64)
    tokens = tl.load(source + page * page_size * stride, mask=page < stop, other=0)
    _store_rows(tables, strides, first_row, rows, page, tokens // page_size, page < stop)


@jit
def _metadata(seq_lens, extend_seq_lens, req_pool_indices, req_to_token,
              cache_seqlens, cu_seqlens_k, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k,
              page_table_1, real_page_table, ctx_lens, wide_strides, real_strides, ctx_strides,
              parts, bs, kept, total_rows, max_len, slots, topk, page_size, draft_tokens, aligned, seq_stride, extend_stride,
              pool_stride, token_stride_0, token_stride_1,
              MODE: tl.constexpr, BACKENDS: tl.constexpr, HAS_WIDE: tl.constexpr, HAS_REAL: tl.constexpr,
              HAS_CTX: tl.constexpr, BLOCK_REQUESTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
              BLOCK_PAGES: tl.constexpr):
    request = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    exists = request < bs

    if (request == 0) & (part == 0):
        for b in tl.static_range(BACKENDS):
            tl.store(cu_seqlens_k[b], tl.zeros((), tl.int32))
            tl.store(nsa_cu_seqlens_k[b], tl.zeros((), tl.int32))

    # The requests before this one: how many keys, rows and clipped keys they have. A table needs the rows alone, and in two
    # modes knows them, so that its programs do not wait for one more load.
    keys_before = tl.zeros((), tl.int32)
    rows_before = tl.zeros((), tl.int32)
    clipped_before = tl.zeros((), tl.int64)
    last = request
    if MODE != 2:
        rows_before += request * draft_tokens
        last = tl.where(part == 0, request, 0)
    for start in range(0, last, BLOCK_REQUESTS):
        j = start + tl.arange(0, BLOCK_REQUESTS)
        earlier = j < request
        seq_j = tl.load(seq_lens + j * seq_stride, mask=earlier, other=0).to(tl.int32)
        extend_j = seq_j
        if MODE == 2:
            extend_j = tl.load(extend_seq_lens + j * extend_stride, mask=earlier, other=0)
            extend_j = tl.maximum(extend_j.to(tl.int32), 0)
            rows_before += tl.sum(extend_j, 0)
        if part == 0:
            keys_j, first_j, rows_j = _rows(seq_j, extend_j, draft_tokens, MODE)
            clipped_j = _clipped_sum(first_j + rows_j - 1, topk) - _clipped_sum(first_j - 1, topk)
            keys_before += tl.sum(tl.where(earlier, keys_j, 0), 0)
            clipped_before += tl.sum(tl.where(earlier, clipped_j, 0), 0)

    seq = tl.load(seq_lens + request * seq_stride, mask=exists, other=0).to(tl.int32)
    extend = seq
    if MODE == 2:
        extend = tl.load(extend_seq_lens + request * extend_stride, mask=exists, other=0).to(tl.int32)
    keys, first, rows = _rows(seq, extend, draft_tokens, MODE)
    rows = tl.where(exists, tl.minimum(rows, total_rows - rows_before), 0)

    if part == 0:
        for b in tl.static_range(BACKENDS):
            tl.store(cache_seqlens[b] + request, keys, mask=exists)
            tl.store(cu_seqlens_k[b] + request + 1, keys_before + keys, mask=exists)
        for start in range(0, rows, BLOCK_ROWS):
            t = start + tl.arange(0, BLOCK_ROWS)
            visible = tl.maximum(first + t, 0)
            clipped = tl.minimum(visible, topk)
            upto = clipped_before + _clipped_sum(first + t, topk) - _clipped_sum(first - 1, topk)
            row = rows_before + t
            for b in tl.static_range(BACKENDS):
                if MODE != 0:
                    tl.store(seqlens_expanded[b] + row, visible, mask=t < rows)
                tl.store(nsa_cache_seqlens[b] + row, clipped, mask=t < rows)
                tl.store(nsa_cu_seqlens_k[b] + row + 1, upto.to(tl.int32), mask=t < rows)
                if HAS_CTX:
                    tl.store(ctx_lens[b] + request.to(tl.int64) * ctx_strides[b][0] + t * ctx_strides[b][1],
                             keys, mask=t < rows)
    else:
        slot = tl.load(req_pool_indices + request * pool_stride, mask=exists, other=0).to(tl.int64)
        length = tl.where((slot >= 0) & (slot < slots) & exists, tl.minimum(keys, max_len), 0)
        source = req_to_token + slot * token_stride_0
        own = (part - 1) * BLOCK_COLUMNS
        step = (parts - 1) * BLOCK_COLUMNS
        lanes = tl.arange(0, BLOCK_COLUMNS)
        if HAS_WIDE:
            whole = tl.where(aligned != 0, length, 0) // BLOCK_COLUMNS * BLOCK_COLUMNS
            for start in range(own, length, step):
                column = (start + lanes).to(tl.int64)
                if start < whole:
                    block = tl.multiple_of(req_to_token + slot * token_stride_0, 16) + column
                    if request < kept:
                        tokens = tl.load(block, eviction_policy="evict_last")
                    else:
                        tokens = tl.load(block, eviction_policy="evict_first")
                    _store_blocks(page_table_1, wide_strides, rows_before, rows, column, tokens)
                else:
                    tokens = tl.load(source + column * token_stride_1, mask=column < length, other=0)
                    _store_rows(page_table_1, wide_strides, rows_before, rows, column, tokens, column < length)
                if HAS_REAL:  # the pages that begin with one of these tokens, which are in the cache now
                    first = (start + page_size - 1) // page_size
                    stop = (tl.minimum(start + BLOCK_COLUMNS, length) + page_size - 1) // page_size
                    for page in range(first, stop, BLOCK_PAGES):
                        _store_pages(source, token_stride_1, real_page_table, real_strides, rows_before, rows, page_size,
                                     page, stop, BLOCK_PAGES)
        else:
            count = (length + page_size - 1) // page_size
            for start in range(own, count, step):
                _store_pages(source, token_stride_1, real_page_table, real_strides, rows_before, rows, page_size,
                             start, count, BLOCK_COLUMNS)


@remembered
def decode_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, nsa_cache_seqlens,
                    nsa_cu_seqlens_k, page_table_1, real_page_table, bs, max_len, index_topk, page_size):
    """Metadata of a decode step into the buffers of every backend (oracles/metadata.py has the contract).

    Args:
        seq_lens, req_pool_indices: int32 or int64 [>= bs], any stride. req_to_token: int32 [slots, >= max_len], any strides.
        cache_seqlens [>= bs], cu_seqlens_k [>= bs + 1], nsa_cache_seqlens [>= rows], nsa_cu_seqlens_k [>= rows + 1]:
            lists with one int32 unit-stride tensor per backend. A cache_seqlens may be seq_lens itself, or another
            backend's.
        page_table_1 [>= rows, >= max_len]: list of int32 tensors, any strides; all None if page_size > 1 and not wanted.
        real_page_table [>= rows, >= ceil(max_len / page_size)]: likewise; all None exactly if page_size is 1.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs overlap; nothing was written.
    """
    outputs = dict(cache_seqlens=cache_seqlens, cu_seqlens_k=cu_seqlens_k, nsa_cache_seqlens=nsa_cache_seqlens,
                   nsa_cu_seqlens_k=nsa_cu_seqlens_k, page_table_1=page_table_1, real_page_table=real_page_table)
    inputs = dict(seq_lens=seq_lens, req_pool_indices=req_pool_indices, req_to_token=req_to_token)
    _fill(DECODE, inputs, outputs, bs, bs, max_len, index_topk, page_size,
          may_alias={frozenset(("cache_seqlens", "seq_lens")), frozenset(("cache_seqlens",))})


@remembered
def target_verify_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, seqlens_expanded,
                           nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, paged_mqa_ctx_lens_2d, bs,
                           max_len, index_topk, page_size, draft_tokens):
    """Metadata of a target-verify step; rows = bs * draft_tokens. Arguments as for `decode_metadata`, and

    Args:
        seqlens_expanded [>= rows]: list of int32 unit-stride tensors.
        paged_mqa_ctx_lens_2d [>= bs, >= draft_tokens]: list of int32 tensors, any strides, or all None.
    """
    checks.positive("draft_tokens", draft_tokens)
    outputs = dict(cache_seqlens=cache_seqlens, cu_seqlens_k=cu_seqlens_k, seqlens_expanded=seqlens_expanded,
                   nsa_cache_seqlens=nsa_cache_seqlens, nsa_cu_seqlens_k=nsa_cu_seqlens_k, page_table_1=page_table_1,
                   real_page_table=real_page_table, paged_mqa_ctx_lens_2d=paged_mqa_ctx_lens_2d)
    inputs = dict(seq_lens=seq_lens, req_pool_indices=req_pool_indices, req_to_token=req_to_token)
    rows = bs * draft_tokens if isinstance(bs, int) else bs
    _fill(TARGET_VERIFY, inputs, outputs, bs, rows, max_len, index_topk, page_size, draft_tokens)


@remembered
def draft_extend_metadata(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
                          seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, bs,
                          total_len, max_len, index_topk, page_size, max_extend_len, static_extend_len):
    """Metadata of a draft extend; rows = total_len. Arguments as for `target_verify_metadata`, and

    Args:
        extend_seq_lens: int32 or int64 [>= bs], any stride: rows of each request.
        max_extend_len, static_extend_len: accepted for the contract's sake; this kernel needs neither.
    """
    checks.positive("total_len", total_len, 0)
    outputs = dict(cache_seqlens=cache_seqlens, cu_seqlens_k=cu_seqlens_k, seqlens_expanded=seqlens_expanded,
                   nsa_cache_seqlens=nsa_cache_seqlens, nsa_cu_seqlens_k=nsa_cu_seqlens_k, page_table_1=page_table_1,
                   real_page_table=real_page_table)
    inputs = dict(seq_lens=seq_lens, extend_seq_lens=extend_seq_lens, req_pool_indices=req_pool_indices,
                  req_to_token=req_to_token)
    _fill(DRAFT_EXTEND, inputs, outputs, bs, total_len, max_len, index_topk, page_size)


def _fill(mode, inputs, outputs, bs, rows, max_len, topk, page_size, draft_tokens=1, may_alias=frozenset()) -> None:
    """Check everything, then launch once."""
    backends = _check(inputs, outputs, bs, rows, max_len, topk, page_size, draft_tokens, may_alias)
    wide, real = outputs["page_table_1"], outputs["real_page_table"]
    ctx = outputs.get("paged_mqa_ctx_lens_2d", [None])
    pages = triton.cdiv(max_len, page_size)
    has_wide, has_real, has_ctx = wide[0] is not None, real[0] is not None, ctx[0] is not None
    columns = max_len if has_wide else pages
    # One program per block of a request's columns, if that does not make too many.
    parts = 1 + min(triton.cdiv(columns, BLOCK_COLUMNS), max(LEAST_SPLITS, PROGRAMS // max(bs, 1)))
    seq, pool, tokens = inputs["seq_lens"], inputs["req_pool_indices"], inputs["req_to_token"]
    extend = inputs.get("extend_seq_lens", seq)
    cache = tuple(outputs["cache_seqlens"])
    _metadata[(max(bs, 1) * parts,)](
        seq, extend, pool, tokens, cache, tuple(outputs["cu_seqlens_k"]),
        tuple(outputs.get("seqlens_expanded", cache)), tuple(outputs["nsa_cache_seqlens"]),
        tuple(outputs["nsa_cu_seqlens_k"]), tuple(wide) if has_wide else cache, tuple(real) if has_real else cache,
        tuple(ctx) if has_ctx else cache, _strides(wide), _strides(real), _strides(ctx),
        parts, bs, KEPT_CELLS // max(max_len, 1), rows, max_len, tokens.shape[0], topk, page_size, draft_tokens,
        checks.rows_aligned(tokens, *wide) if has_wide else 0, seq.stride(0), extend.stride(0), pool.stride(0),
        *tokens.stride(),
        MODE=mode, BACKENDS=backends, HAS_WIDE=has_wide, HAS_REAL=has_real, HAS_CTX=has_ctx,
        BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_PAGES=BLOCK_PAGES,
        num_warps=WARPS,
    )


def _strides(tables) -> tuple[tuple[int, int], ...]:
    return tuple((0, 0) if t is None else (t.stride(0), t.stride(1)) for t in tables)


def _check(inputs, outputs, bs, rows, max_len, topk, page_size, draft_tokens, may_alias) -> int:
    """Refuse what the kernel could not honour; returns the number of backends."""
    for name, value, least in (("bs", bs, 0), ("max_len", max_len, 0), ("index_topk", topk, 0), ("page_size", page_size, 1)):
        checks.positive(name, value, least)
    backends = checks.same_count(**outputs)
    device = checks.device_of("seq_lens", inputs["seq_lens"])
    for name, value in inputs.items():
        table = name == "req_to_token"
        checks.tensor(name, value, checks.INT32 if table else checks.INT, (1, max_len) if table else (bs,), device)
    _check_presence(outputs, page_size)
    shapes = {"cache_seqlens": (bs,), "cu_seqlens_k": (bs + 1,), "seqlens_expanded": (rows,), "nsa_cache_seqlens": (rows,),
              "nsa_cu_seqlens_k": (rows + 1,), "page_table_1": (rows, max_len),
              "real_page_table": (rows, triton.cdiv(max_len, page_size)), "paged_mqa_ctx_lens_2d": (bs, draft_tokens)}
    absent = {n for n in ("page_table_1", "real_page_table", "paged_mqa_ctx_lens_2d") if outputs.get(n, [None])[0] is None}
    flat = {f"{n}[{b}]": t for n, group in outputs.items() if n not in absent for b, t in enumerate(group)}
    for name, value in flat.items():
        least = shapes[name.split("[")[0]]
        checks.tensor(name, value, checks.INT32, least, device, unit_stride=len(least) == 1)
        checks.own_cells(name, value)
    checks.apart(flat, inputs, may_alias)
    return backends


def _check_presence(outputs, page_size: int) -> None:
    """Tables are there for every backend or for none, and the real one exactly for page_size > 1."""
    for name in ("page_table_1", "real_page_table", "paged_mqa_ctx_lens_2d"):
        group = outputs.get(name, [])
        missing = [b for b, t in enumerate(group) if t is None]
        if missing and len(missing) != len(group):
            raise ValueError(f"{name} must be given for every backend or for none; it is None for backend {missing[0]}")
    if page_size > 1 and outputs["real_page_table"][0] is None:
        raise ValueError(f"real_page_table must be given for page_size {page_size}, got None")
    if page_size == 1 and outputs["real_page_table"][0] is not None:
        raise ValueError("real_page_table must be None for page_size 1, where page_table_1 is the real table")
    if page_size == 1 and outputs["page_table_1"][0] is None:
        raise ValueError("page_table_1 must be given for page_size 1, got None")
