"""Triton kernels of the topk_transform family: one launch each, the same result every time.

Selection: one program per row finds the topk-th largest score by its bits, eight at a time from the top (a histogram of the
keys that agree so far, in a pass over the row each), then writes the keys above it and the first of those equal to it,
in the order of their positions. So any number of ties is handled alike, and nothing is bounded by shared memory.
"""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

COPY, TABLE, OFFSET, PAGES = 0, 1, 2, 3  # what stands for a position: itself, its slot, its ragged position, its page's slot
OWN_ROW, BY_SUMS = 0, 1  # whose row of the table: the token's own, or its request's by cu_seqlens_q
SMALL = 64  # indices per row that a narrow block covers
BLOCK_REQUESTS = 64
# Without cu_seqlens_q the extend lengths are only on the host, and go to the device in a copy.
COST = {"transform_index_page_table_prefill": {"operations": ["aten.lift_fresh.default", "aten._to_copy.default"],
                                               "waits": True}}


@triton.jit
def _name(position, live, table_row, table_stride, width, offset, page_size, NAMES: tl.constexpr):
    """What stands for the key at `position`; -1 where not `live`, or past the table's width."""
    name = position
    if NAMES == 1:
        live = live & (position < width)
        name = tl.load(table_row + position.to(tl.int64) * table_stride, mask=live, other=-1)
    elif NAMES == 2:
        name = position + offset
    elif NAMES == 3:
        page = position // page_size
        live = live & (page < width)
        name = tl.load(table_row + page.to(tl.int64) * table_stride, mask=live, other=0) * page_size + position % page_size
    return tl.where(live, name, -1).to(tl.int32)


# -- index transforms ---------------------------------------------------------------------------------------------------


@jit
def _transform_index(page_table, topk_indices, cu_seqlens_q, offsets, result, tokens, rows, topk, requests, table_rows, width,
                     table_stride_0, table_stride_1, index_stride_0, index_stride_1, offset_stride, sum_stride,
                     result_stride_0, result_stride_1, NAMES: tl.constexpr, OWNER: tl.constexpr,
                     BLOCK_REQUESTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Program (i, j) writes a block of rows and columns of the result; rows past `tokens` hold -1."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = (row < tokens)[:, None] & (column < topk)[None, :]
    source = row.to(tl.int64)[:, None] * index_stride_0 + column.to(tl.int64)[None, :] * index_stride_1
    index = tl.load(topk_indices + source, mask=live, other=-1)

    owner = row
    if OWNER == 1:
        owner = tl.zeros((BLOCK_ROWS,), tl.int32)
        for start in range(0, requests, BLOCK_REQUESTS):
            i = start + tl.arange(0, BLOCK_REQUESTS)
            end = tl.load(cu_seqlens_q + (i + 1) * sum_stride, mask=i < requests, other=2147483647)
            owner += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), 1)
        owner = tl.where(row < tl.load(cu_seqlens_q), table_rows, owner)  # before the first request, so nobody's
    offset = row
    if NAMES == 2:
        offset = tl.load(offsets + row * offset_stride, mask=row < tokens, other=0)
    if NAMES == 0:
        name = index
    else:
        named = index >= 0  # -1 where not live
        if NAMES == 1:
            named = named & (owner < table_rows)[:, None]
        name = _name(index, named, page_table + owner.to(tl.int64)[:, None] * table_stride_0, table_stride_1, width,
                     offset[:, None], 1, NAMES)
    target = row.to(tl.int64)[:, None] * result_stride_0 + column.to(tl.int64)[None, :] * result_stride_1
    tl.store(result + target, name.to(tl.int32), mask=(row < rows)[:, None] & (column < topk)[None, :])


@remembered
def transform_index_page_table_decode(*, page_table, topk_indices, result):
    """Fill `result[t, j]` with `page_table[t, topk_indices[t, j]]`, or -1 for a negative index (oracles/topk_transform.py).

    Args:
        page_table: int32 or int64 [>= rows, any width], any strides. topk_indices: int32 or int64 [rows, topk], any strides.
        result: int32 [>= rows, >= topk], any strides. An index past the width gives -1.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    rows, topk = _size("topk_indices", topk_indices)
    inputs = {"page_table": (page_table, checks.INT, (rows, 0)), "topk_indices": (topk_indices, checks.INT, (rows, topk))}
    _check(inputs, {"result": (result, checks.INT32, (rows, topk))}, topk_indices)
    _launch(TABLE, OWN_ROW, topk_indices, result, rows, rows, page_table=page_table)


@remembered
def transform_index_page_table_prefill(*, page_table, topk_indices, cu_seqlens_q, result, extend_lens_cpu, output_num_tokens,
                                       page_table_is_expanded):
    """The same with the table's row of the token's request, or of the token if `page_table_is_expanded`; then rows of -1.

    Args:
        page_table: int32 or int64 [>= requests or tokens, any width], any strides. topk_indices: int32 or int64
            [>= tokens, topk], any strides. cu_seqlens_q: int32 [>= requests + 1], any stride; None copies the lengths to the
            device, which a captured graph must not do.
        result: int32 [>= output_num_tokens, >= topk], any strides.
        extend_lens_cpu: list of tokens per request. output_num_tokens: at least the rows of topk_indices, None for those.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    count, topk = _size("topk_indices", topk_indices)
    if not isinstance(extend_lens_cpu, (list, tuple)):
        raise TypeError(f"extend_lens_cpu must be a list of integers, got {type(extend_lens_cpu).__name__}")
    for n in extend_lens_cpu:
        checks.positive("every one of extend_lens_cpu", n, 0)
    requests, tokens = len(extend_lens_cpu), sum(extend_lens_cpu)
    rows = count if output_num_tokens is None else output_num_tokens
    checks.positive("output_num_tokens", rows, count)
    if tokens > count:
        raise ValueError(f"topk_indices must have a row per token: sum(extend_lens_cpu) is {tokens}, it has {count}")
    table_rows = tokens if page_table_is_expanded else requests
    inputs = {"page_table": (page_table, checks.INT, (table_rows, 0)),
              "topk_indices": (topk_indices, checks.INT, (tokens, topk))}
    if cu_seqlens_q is not None:
        inputs["cu_seqlens_q"] = (cu_seqlens_q, checks.INT32, (requests + 1,))
    _check(inputs, {"result": (result, checks.INT32, (rows, topk))}, topk_indices)
    if cu_seqlens_q is None and not page_table_is_expanded and rows and topk:
        ends = [0]
        for n in extend_lens_cpu:
            ends.append(ends[-1] + n)
        cu_seqlens_q = torch.tensor(ends, dtype=torch.int32).to(topk_indices.device)
    _launch(TABLE, OWN_ROW if page_table_is_expanded else BY_SUMS, topk_indices, result, tokens, rows, page_table=page_table,
            cu_seqlens_q=cu_seqlens_q, requests=requests)


@remembered
def transform_index_ragged(*, topk_indices, topk_indices_offset, result):
    """Fill `result[t, j]` with `topk_indices[t, j] + topk_indices_offset[t]`, or -1 for an index of -1.

    Args:
        topk_indices: int32 [rows, topk], any strides. topk_indices_offset: int32 [>= rows], any stride.
        result: int32 [>= rows, >= topk], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    rows, topk = _size("topk_indices", topk_indices)
    inputs = {"topk_indices": (topk_indices, checks.INT32, (rows, topk)),
              "topk_indices_offset": (topk_indices_offset, checks.INT32, (rows,))}
    _check(inputs, {"result": (result, checks.INT32, (rows, topk))}, topk_indices)
    _launch(OFFSET, OWN_ROW, topk_indices, result, rows, rows, offsets=topk_indices_offset)


@remembered
def pad_topk_indices(*, topk_indices, result, num_tokens):
    """Fill `result[:num_tokens]` with `topk_indices` and rows of -1 behind them.

    Args:
        topk_indices: int32 [rows, topk], any strides. result: int32 [>= num_tokens, >= topk], any strides.
        num_tokens: at least the rows of topk_indices.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    rows, topk = _size("topk_indices", topk_indices)
    checks.positive("num_tokens", num_tokens, rows)
    inputs = {"topk_indices": (topk_indices, checks.INT32, (rows, topk))}
    _check(inputs, {"result": (result, checks.INT32, (num_tokens, topk))}, topk_indices)
    _launch(COPY, OWN_ROW, topk_indices, result, rows, num_tokens)


def _launch(names, owner, topk_indices, result, tokens, rows, page_table=None, offsets=None, cu_seqlens_q=None, requests=0):
    topk = topk_indices.shape[1]
    if rows == 0 or topk == 0:
        return
    block_rows, block_columns = (16, SMALL) if topk <= SMALL else (4, 1024)
    table = topk_indices if page_table is None else page_table
    offsets = topk_indices if offsets is None else offsets
    sums = topk_indices if cu_seqlens_q is None else cu_seqlens_q
    _transform_index[(triton.cdiv(rows, block_rows), triton.cdiv(topk, block_columns))](
        table, topk_indices, sums, offsets, result, tokens, rows, topk, requests, table.shape[0], table.shape[1],
        table.stride(0), table.stride(1), topk_indices.stride(0), topk_indices.stride(1), offsets.stride(0), sums.stride(0),
        result.stride(0), result.stride(1), NAMES=names, OWNER=owner, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )


# -- selection ----------------------------------------------------------------------------------------------------------


@triton.jit
def _key(score):
    """An unsigned number that orders as the score does: NaN beyond the infinity of its sign, -0.0 below +0.0."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)


@jit
def _fast_topk(score, lengths, row_starts, cu_seqlens_q, table, offsets, out, width, topk, requests, table_width, page_size,
               score_pitch, length_stride, start_stride, sum_stride, table_stride_0, table_stride_1, offset_stride,
               out_stride_0, out_stride_1, NAMES: tl.constexpr, OWNER: tl.constexpr, HAS_STARTS: tl.constexpr,
               BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first = row * 0
    if HAS_STARTS:
        first = tl.maximum(tl.load(row_starts + row * start_stride), 0)
    length = tl.maximum(tl.minimum(tl.load(lengths + row * length_stride), width - first), 0)

    owner = row
    if OWNER == 1:
        owner = row * 0
        for start in range(0, requests, BLOCK_REQUESTS):
            i = start + tl.arange(0, BLOCK_REQUESTS)
            end = tl.load(cu_seqlens_q + (i + 1) * sum_stride, mask=i < requests, other=2147483647)
            owner += tl.sum((end <= row).to(tl.int32), 0)
        length = tl.where((owner < requests) & (row >= tl.load(cu_seqlens_q)), length, 0)
    offset = row * 0
    if NAMES == 2:
        offset = tl.load(offsets + row * offset_stride)
    names = table + owner.to(tl.int64) * table_stride_0
    scores = score + row.to(tl.int64) * score_pitch + first
    target = out + row.to(tl.int64) * out_stride_0

    if length <= topk:
        for start in range(0, topk, BLOCK):
            j = start + lanes
            name = _name(j, j < length, names, table_stride_1, table_width, offset, page_size, NAMES)
            tl.store(target + j.to(tl.int64) * out_stride_1, name, mask=j < topk)
    else:
        # The bits of the topk-th largest key, and how many keys equal to it are wanted.
        threshold = tl.zeros((), tl.uint32)
        wanted = topk
        bins = tl.arange(0, 256)
        for digit in tl.static_range(4):
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, length, BLOCK):
                column = start + lanes
                agrees = column < length
                key = _key(tl.load(scores + column, mask=agrees, other=0.0)) >> (24 - 8 * digit)
                if digit > 0:
                    agrees = agrees & ((key >> 8) == threshold)
                counts += tl.histogram((key & 255).to(tl.int32), 256, mask=agrees)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            here = (above < wanted) & (above + counts >= wanted)
            threshold = (threshold << 8) + tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32)
            wanted -= tl.sum(tl.where(here, above, 0), 0)

        written = tl.zeros((), tl.int32)
        equal = tl.zeros((), tl.int32)
        for start in range(0, length, BLOCK):
            column = start + lanes
            inside = column < length
            key = _key(tl.load(scores + column, mask=inside, other=0.0))
            tied = inside & (key == threshold)
            rank = equal + tl.cumsum(tied.to(tl.int32), 0)
            taken = (inside & (key > threshold)) | (tied & (rank <= wanted))
            place = written + tl.cumsum(taken.to(tl.int32), 0) - 1
            name = _name(column, taken, names, table_stride_1, table_width, offset, page_size, NAMES)
            tl.store(target + place.to(tl.int64) * out_stride_1, name, mask=taken)
            equal += tl.sum(tied.to(tl.int32), 0)
            written += tl.sum(taken.to(tl.int32), 0)


@remembered
def fast_topk(*, score, lengths, row_starts, indices, topk):
    """Fill each row of `indices` with the positions of its `topk` best keys, relative to its start; -1 behind them.

    Up to `topk` keys stand in their order; of more, equal ones are taken from the front, and positions rise.

    Args:
        score: float32 [>= rows, any width], unit column stride. lengths: int32 [rows], any stride; negative counts as 0.
        row_starts: int32 [>= rows], any stride, or None. indices: int32 [>= rows, >= topk], any strides.
        topk: at least 1. Keys past the width do not exist.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _select(COPY, score, lengths, row_starts, "indices", indices, topk)


@remembered
def fast_topk_transform_paged(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk):
    """`fast_topk` with each position's slot in the table of the row's request. Arguments as there, and

    Args:
        page_table: int32 [>= requests, any width], any strides. cu_seqlens_q: int32 [requests + 1], any stride, where each
            request's rows start; None for one row per request. Keys past the table and rows of no request give -1.
    """
    _select(TABLE, score, lengths, row_starts, "dst_page_table", dst_page_table, topk, cu_seqlens_q=cu_seqlens_q,
            table=("page_table", page_table))


@remembered
def fast_topk_transform_ragged(*, score, lengths, row_starts, topk_indices_offset, topk_indices_ragged, topk):
    """`fast_topk` with the row's `topk_indices_offset` (int32 [>= rows], any stride) added to each position."""
    _select(OFFSET, score, lengths, row_starts, "topk_indices_ragged", topk_indices_ragged, topk, offsets=topk_indices_offset)


@remembered
def topk_transform_v2(*, score, lengths, real_page_table, page_indices, topk, page_size):
    """`fast_topk` with each position's slot by the row's table of pages (int32 [>= rows, any width], any strides)."""
    checks.positive("page_size", page_size)
    _select(PAGES, score, lengths, None, "page_indices", page_indices, topk, table=("real_page_table", real_page_table),
            page_size=page_size)


def _select(names, score, lengths, row_starts, out_name, out, topk, cu_seqlens_q=None, table=("", None), offsets=None,
            page_size=1) -> None:
    """Check everything, then launch once."""
    checks.positive("topk", topk)
    rows = _size("lengths", lengths, 1)[0]
    requests = rows if cu_seqlens_q is None else _size("cu_seqlens_q", cu_seqlens_q, 1)[0] - 1
    checks.positive("the requests of cu_seqlens_q", requests, 0)
    inputs = {"score": (score, (torch.float32,), (rows, 0)), "lengths": (lengths, checks.INT32, (rows,))}
    if row_starts is not None:
        inputs["row_starts"] = (row_starts, checks.INT32, (rows,))
    if cu_seqlens_q is not None:
        inputs["cu_seqlens_q"] = (cu_seqlens_q, checks.INT32, (requests + 1,))
    if names in (TABLE, PAGES):
        inputs[table[0]] = (table[1], checks.INT32, (requests, 0))
    if names == OFFSET:
        inputs["topk_indices_offset"] = (offsets, checks.INT32, (rows,))
    _check(inputs, {out_name: (out, checks.INT32, (rows, topk))}, lengths, unit_stride=("score",))
    if rows == 0:
        return
    slots = out if table[1] is None else table[1]
    starts, sums, offsets = (lengths if t is None else t for t in (row_starts, cu_seqlens_q, offsets))
    _fast_topk[(rows,)](
        score, lengths, starts, sums, slots, offsets, out, score.shape[1], topk, requests, slots.shape[1], page_size,
        score.stride(0), lengths.stride(0), starts.stride(0), sums.stride(0), slots.stride(0), slots.stride(1),
        offsets.stride(0), out.stride(0), out.stride(1), NAMES=names, OWNER=OWN_ROW if cu_seqlens_q is None else BY_SUMS,
        HAS_STARTS=row_starts is not None, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=1024 if score.shape[1] <= 1024 else 2048,
        num_warps=4 if score.shape[1] <= 1024 else 8,
    )


# -- checks -------------------------------------------------------------------------------------------------------------


def _size(name: str, value, dimensions: int = 2) -> tuple[int, ...]:
    if not isinstance(value, torch.Tensor) or value.dim() != dimensions:
        raise TypeError(f"{name} must be a {dimensions}-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return tuple(value.shape)


def _check(inputs, outputs, leader, unit_stride=()) -> None:
    """Every tensor as (value, dtypes, least shape); no output overlaps itself or another argument."""
    leading = next(n for n, (value, _, _) in inputs.items() if value is leader)
    device = checks.device_of(leading, leader)
    for name, (value, dtypes, least) in (inputs | outputs).items():
        checks.tensor(name, value, dtypes, least, device, unit_stride=name in unit_stride)
    for name, (value, _, _) in outputs.items():
        checks.own_cells(name, value)
    checks.apart({n: v[0] for n, v in outputs.items()}, {n: v[0] for n, v in inputs.items()})
