"""Triton kernel of the metadata_copy family: one launch copies a precomputed batch into any number of backends.

A source cell is read once and stored for every backend. The programs walk the lengths and prefix sums, of which there are
few, and tiles of the page tables; rows are never cut out of a linear index, so that every tensor may have its own strides
and no product of a row count and a width is formed. Offsets are 64-bit. Sizes are run-time values.
"""

import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2
BLOCK_ITEMS, TILE, MOST_ROWS, MOST_PROGRAMS = 256, 2048, 16, 1024
OPTIONAL = ("real_page_table", "flashmla_num_splits", "flashmla_metadata")
SHARED = frozenset((frozenset(("cache_seqlens_src", "cache_seqlens_dst")), frozenset(("cache_seqlens_dst",))))


@triton.jit
def _items(pair, i, copied):
    """The cells `i` of a vector, where `copied`, to every backend. A pair is (source, its last stride, backends' tensors,
    their strides). The row pitch of a source is passed apart: it changes with every batch, and Triton compiles anew for the
    numbers in tuples."""
    source, step, targets, target_strides = pair
    values = tl.load(source + i * step, mask=copied, other=0)
    for b in tl.static_range(len(targets)):
        tl.store(targets[b] + i * target_strides[b][0], values, mask=copied)


@triton.jit
def _cells(pair, pitch, row, column, copied):
    """The cells (row, column) of a table, where `copied`, to every backend."""
    source, step, targets, target_strides = pair
    values = tl.load(source + row * pitch + column * step, mask=copied, other=0)
    for b in tl.static_range(len(targets)):
        tl.store(targets[b] + row * target_strides[b][0] + column * target_strides[b][1], values, mask=copied)


@triton.jit
def _block(pair, pitch, row, first, width, rows, aligned, BLOCK: tl.constexpr):
    """BLOCK columns of a table from `first` on, cut at `width`. Of tables whose rows all begin at multiples of 16 bytes,
    whole blocks need no mask along the row, and 16 bytes move at once."""
    column = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    if (aligned != 0) & (first + BLOCK <= width):
        source, step, targets, target_strides = pair
        values = tl.load(tl.multiple_of(source + row * pitch, [16, 16]) + column, mask=row < rows, other=0)
        for b in tl.static_range(len(targets)):
            tl.store(tl.multiple_of(targets[b] + row * target_strides[b][0], [16, 16]) + column, values, mask=row < rows)
    else:
        _cells(pair, pitch, row, column, (row < rows) & (column < width))


@jit
def _copy(cache, cu, expanded, nsa, nsa_cu, splits, plan, wide, real,
          plan_pitch, wide_pitch, real_pitch, bs, n, rows, width, pages, plan_cells, plan_columns, items, columns, wide_aligned,
          real_aligned,
          BLOCK_ITEMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for start in range(program * BLOCK_ITEMS, items, programs * BLOCK_ITEMS):
        i = (start + tl.arange(0, BLOCK_ITEMS)).to(tl.int64)
        _items(cache, i, i < bs)
        _items(cu, i + 1, i < bs)
        _items(nsa, i, i < n)
        _items(nsa_cu, i + 1, i < n)
        if expanded is not None:
            _items(expanded, i, i < n)
        if splits is not None:
            _items(splits, i, i < n + 1)
        if plan is not None:
            _cells(plan, plan_pitch, i // plan_columns, i % plan_columns, i < plan_cells)

    for first_row in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        for first in range(tl.program_id(1) * BLOCK_COLUMNS, columns, tl.num_programs(1) * BLOCK_COLUMNS):
            if first < width:
                _block(wide, wide_pitch, row, first, width, rows, wide_aligned, BLOCK_COLUMNS)
            if real is not None:
                if first < pages:
                    _block(real, real_pitch, row, first, pages, rows, real_aligned, BLOCK_COLUMNS)


@remembered
def fused_metadata_copy(*, cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src,
                        seqlens_expanded_src, nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src,
                        flashmla_metadata_src, cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst,
                        seqlens_expanded_dst, nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst,
                        flashmla_metadata_dst, forward_mode, bs, max_len, max_seqlen_k, seqlens_expanded_size):
    """Copy a precomputed batch into one backend's buffers (oracles/metadata_copy.py has the contract). All tensors are
    int32, with any strides; source and destination of one name have the least shape given.

    Args:
        forward_mode: 0 decode, 1 target verify, 2 draft extend: SGLang's integers, so that its call needs no translation.
        bs, max_len, max_seqlen_k, seqlens_expanded_size: in decode n = rows = bs and width = max_len; otherwise
            n = seqlens_expanded_size, rows = page_indices_src.shape[0] and width = max_seqlen_k. What a mode does not use
            may be any number.
        cache_seqlens [bs], cu_seqlens_k [bs + 1], nsa_cache_seqlens [n], nsa_cu_seqlens_k [n + 1]. cache_seqlens_dst may
            be the memory of cache_seqlens_src.
        seqlens_expanded [n]: ignored in decode, where it may be None or anybody's memory.
        page_indices_src and page_table_1_dst [rows, width].
        real_page_table [rows, pages]: both or neither; the source's width is what is copied.
        flashmla_num_splits [n + 1]: both or neither.
        flashmla_metadata [parts, columns]: both or neither, and only with num_splits; the source's shape is what is copied,
            and the destination has as many columns.
    Raises:
        TypeError, ValueError: an argument is not as above, or destinations overlap; nothing was written.
    """
    known = isinstance(forward_mode, int) and not isinstance(forward_mode, bool)
    if not known or forward_mode not in (DECODE, TARGET_VERIFY, DRAFT_EXTEND):
        raise ValueError(f"forward_mode must be 0 (decode), 1 (target verify) or 2 (draft extend), got {forward_mode!r}")
    sources = dict(
        cache_seqlens=cache_seqlens_src, cu_seqlens_k=cu_seqlens_k_src, page_indices=page_indices_src,
        nsa_cache_seqlens=nsa_cache_seqlens_src, nsa_cu_seqlens_k=nsa_cu_seqlens_k_src, real_page_table=real_page_table_src,
        flashmla_num_splits=flashmla_num_splits_src, flashmla_metadata=flashmla_metadata_src)
    targets = dict(
        cache_seqlens=cache_seqlens_dst, cu_seqlens_k=cu_seqlens_k_dst, page_table_1=page_table_1_dst,
        nsa_cache_seqlens=nsa_cache_seqlens_dst, nsa_cu_seqlens_k=nsa_cu_seqlens_k_dst, real_page_table=real_page_table_dst,
        flashmla_num_splits=flashmla_num_splits_dst, flashmla_metadata=flashmla_metadata_dst)
    groups = {name: {f"{name}_dst": tensor} for name, tensor in targets.items()}
    checks.positive("bs", bs, 0)
    if forward_mode == DECODE:
        checks.positive("max_len", max_len, 0)
        _fill(sources, groups, bs, bs, max_len)
        return
    checks.positive("max_seqlen_k", max_seqlen_k, 0)
    checks.positive("seqlens_expanded_size", seqlens_expanded_size, 0)
    sources["seqlens_expanded"] = seqlens_expanded_src
    groups["seqlens_expanded"] = {"seqlens_expanded_dst": seqlens_expanded_dst}
    _fill(sources, groups, bs, seqlens_expanded_size, max_seqlen_k, by_table=True)


@remembered
def fused_metadata_copy_multi(*, cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src,
                              nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src,
                              cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst,
                              nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst, flashmla_metadata_dst, bs,
                              max_len, seqlens_expanded_size):
    """Copy a precomputed decode batch into the buffers of any number of backends, in one launch.

    Args:
        *_src, bs, max_len: as for `fused_metadata_copy` in decode. seqlens_expanded_size: not used.
        *_dst: lists with one tensor per backend, each with shape, row pitch and strides of its own. Backends may share one
            cache_seqlens_dst. Of the optional three, entries may be None: that backend goes without; but a source that is
            given has at least one destination, and none that is not.
    Raises:
        TypeError, ValueError: as for `fused_metadata_copy`.
    """
    checks.positive("bs", bs, 0)
    checks.positive("max_len", max_len, 0)
    sources = dict(
        cache_seqlens=cache_seqlens_src, cu_seqlens_k=cu_seqlens_k_src, page_indices=page_indices_src,
        nsa_cache_seqlens=nsa_cache_seqlens_src, nsa_cu_seqlens_k=nsa_cu_seqlens_k_src, real_page_table=real_page_table_src,
        flashmla_num_splits=flashmla_num_splits_src, flashmla_metadata=flashmla_metadata_src)
    lists = dict(
        cache_seqlens_dst=cache_seqlens_dst, cu_seqlens_k_dst=cu_seqlens_k_dst, page_table_1_dst=page_table_1_dst,
        nsa_cache_seqlens_dst=nsa_cache_seqlens_dst, nsa_cu_seqlens_k_dst=nsa_cu_seqlens_k_dst,
        real_page_table_dst=real_page_table_dst, flashmla_num_splits_dst=flashmla_num_splits_dst,
        flashmla_metadata_dst=flashmla_metadata_dst)
    checks.same_count(**lists)
    groups = {name.removesuffix("_dst"): {f"{name}[{b}]": t for b, t in enumerate(group)} for name, group in lists.items()}
    _fill(sources, groups, bs, bs, max_len)


def _fill(sources, groups, bs, n, width, by_table=False) -> None:
    """Check everything, then launch once. `by_table`: the rows are those of page_indices, and not bs."""
    device = checks.device_of("cache_seqlens_src", sources["cache_seqlens"])
    checks.tensor("page_indices_src", sources["page_indices"], checks.INT32, (0 if by_table else bs, width), device)
    rows = sources["page_indices"].shape[0] if by_table else bs
    _check_partners(sources, groups)
    shapes = _shapes(sources, bs, n, rows, width)
    _check_tensors(sources, groups, shapes, device)

    def pair(source_name, name):
        source, targets = sources.get(source_name), [t for t in groups.get(name, {}).values() if t is not None]
        if source is None:
            return None
        return source, source.stride(-1), tuple(targets), tuple(t.stride() for t in targets)

    def pitch(source_name):
        return 0 if sources[source_name] is None else sources[source_name].stride(0)

    def aligned(source_name, name):
        tables = [sources[source_name], *groups[name].values()]
        return checks.rows_aligned(*(t for t in tables if t is not None))

    pages = shapes["real_page_table"][1]
    parts, plan_columns = shapes["flashmla_metadata"]
    items, columns = max(bs, n + 1, parts * plan_columns), max(width, pages)
    block_rows = min(triton.next_power_of_2(max(rows, 2)), MOST_ROWS)  # a block of one row compiles with no hint of alignment
    block_columns = TILE // block_rows
    row_programs = min(max(triton.cdiv(rows, block_rows), 1), MOST_PROGRAMS)
    splits = min(max(triton.cdiv(columns, block_columns), 1), max(MOST_PROGRAMS // row_programs, 1))
    _copy[(row_programs, splits)](
        pair("cache_seqlens", "cache_seqlens"), pair("cu_seqlens_k", "cu_seqlens_k"),
        pair("seqlens_expanded", "seqlens_expanded"), pair("nsa_cache_seqlens", "nsa_cache_seqlens"),
        pair("nsa_cu_seqlens_k", "nsa_cu_seqlens_k"), pair("flashmla_num_splits", "flashmla_num_splits"),
        pair("flashmla_metadata", "flashmla_metadata"), pair("page_indices", "page_table_1"),
        pair("real_page_table", "real_page_table"),
        pitch("flashmla_metadata"), pitch("page_indices"), pitch("real_page_table"),
        bs, n, rows, width, pages, parts * plan_columns, max(plan_columns, 1), items, columns,
        aligned("page_indices", "page_table_1"), aligned("real_page_table", "real_page_table"),
        BLOCK_ITEMS=BLOCK_ITEMS, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
    )


def _check_partners(sources, groups) -> None:
    """An optional source has a destination, a destination has a source, and metadata has split counts."""
    for name in OPTIONAL:
        given = [n for n, t in groups[name].items() if t is not None]
        if sources[name] is None and given:
            raise ValueError(f"{name}_src must be given, as {given[0]} is; got None")
        if sources[name] is not None and not given:
            raise ValueError(f"{name}_dst must be given, for one backend at least, as {name}_src is; got None")
    if sources["flashmla_metadata"] is not None and sources["flashmla_num_splits"] is None:
        raise ValueError("flashmla_num_splits_src must be given, as flashmla_metadata_src is; got None")


def _shapes(sources, bs, n, rows, width) -> dict[str, tuple[int, ...]]:
    """What is copied, by the name of the destination."""
    real, plan = sources["real_page_table"], sources["flashmla_metadata"]
    for name, table in (("real_page_table_src", real), ("flashmla_metadata_src", plan)):
        if table is not None:
            checks.tensor(name, table, checks.INT32, (0, 0), sources["cache_seqlens"].device)
    return {"cache_seqlens": (bs,), "cu_seqlens_k": (bs + 1,), "nsa_cache_seqlens": (n,), "nsa_cu_seqlens_k": (n + 1,),
            "seqlens_expanded": (n,), "flashmla_num_splits": (n + 1,), "page_table_1": (rows, width),
            "real_page_table": (rows, 0 if real is None else real.shape[1]),
            "flashmla_metadata": (0, 0) if plan is None else tuple(plan.shape)}


def _check_tensors(sources, groups, shapes, device) -> None:
    """Dtypes, devices, sizes, and memory that nothing else writes."""
    for (name, source), (target_name, group) in zip(sources.items(), groups.items()):
        if source is not None or name not in OPTIONAL:
            checks.tensor(f"{name}_src", source, checks.INT32, shapes[target_name], device)
        for full_name, target in group.items():
            if target is not None or name not in OPTIONAL:
                checks.tensor(full_name, target, checks.INT32, shapes[target_name], device)
                checks.own_cells(full_name, target)
    plan = sources["flashmla_metadata"]
    for full_name, target in groups["flashmla_metadata"].items():
        if target is not None and target.shape[1] != plan.shape[1]:
            raise ValueError(f"{full_name} must have {plan.shape[1]} columns like flashmla_metadata_src, got {target.shape[1]}")
    outputs = {n: t for group in groups.values() for n, t in group.items() if t is not None}
    inputs = {f"{n}_src": t for n, t in sources.items() if t is not None}
    checks.apart(outputs, inputs, SHARED)
