"""Faulty copies of a precomputed batch: one function per fault, each standing in for the contract that the test names.

Modelled on what SGLang #17554 leaves unchecked or does for three backends only, and on what its own tests cannot see.
"""

import torch
import triton
import triton.language as tl

VECTORS = ("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "seqlens_expanded", "flashmla_num_splits")


# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _sizes(call: dict) -> tuple[int, int, int]:
    """n, rows and width."""
    if call.get("forward_mode", 0) == 0:
        return call["bs"], call["bs"], call["max_len"]
    return call["seqlens_expanded_size"], len(call["page_indices_src"]), call["max_seqlen_k"]


def _vectors(src: dict, dst: dict, bs: int, n: int, splits: int = 1) -> None:
    """Everything that has one dimension; what is None on either side is left out."""
    for name in VECTORS:
        if src.get(name) is None or dst.get(name) is None:
            continue
        first = 1 if "cu_seqlens" in name else 0
        count = bs if name in ("cache_seqlens", "cu_seqlens_k") else n + splits if name == "flashmla_num_splits" else n
        dst[name][first : first + count] = src[name][first : first + count]


def _table(dst, src, rows: int, width: int) -> None:
    if dst is not None and src is not None:
        dst[:rows, :width] = src[:rows, :width]


def _tables(src: dict, dst: dict, rows: int, width: int, pages: bool = True) -> None:
    if pages:
        _table(dst["page_table_1"], src["page_indices"], rows, width)
    if src.get("real_page_table") is not None:
        _table(dst.get("real_page_table"), src["real_page_table"], rows, src["real_page_table"].shape[1])


def _plan(src: dict, dst: dict) -> None:
    if src.get("flashmla_metadata") is not None:
        _table(dst.get("flashmla_metadata"), src["flashmla_metadata"], *src["flashmla_metadata"].shape)


def _split(call: dict) -> tuple[dict, list[dict]]:
    """The sources, and the destinations of every backend."""
    src = {n[:-4]: t for n, t in call.items() if n.endswith("_src")}
    dst = {n[:-4]: t for n, t in call.items() if n.endswith("_dst")}
    if call.get("forward_mode", 0) == 0:
        src.pop("seqlens_expanded", None)
    if not isinstance(dst["cache_seqlens"], list):
        return src, [dst]
    return src, [{n: group[b] for n, group in dst.items()} for b in range(len(dst["cache_seqlens"]))]


def honest_copy(*, pages: bool = True, **call):
    src, backends = _split(call)
    n, rows, width = _sizes(call)
    for dst in backends:
        _vectors(src, dst, call["bs"], n)
        _tables(src, dst, rows, width, pages)
        _plan(src, dst)


# -- pitches and strides ------------------------------------------------------------------------------------------------


@triton.jit
def _copy_rows(dst, src, width, dst_pitch, src_pitch, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        cells = tl.load(src + row * src_pitch + column, mask=column < width, other=0)
        tl.store(dst + row * dst_pitch + column, cells, mask=column < width)


def _with_pitch(call: dict, pitch, wide: bool = True) -> None:
    """An honest copy whose rows of page_table_1 lie `pitch(first backend's table, own table)` apart."""
    honest_copy(**call, pages=False)
    src, backends = _split(call)
    n, rows, width = _sizes(call)
    source = src["page_indices"][:rows, :width].contiguous()
    tables = [dst["page_table_1"] for dst in backends]
    for table in tables:
        if rows and all(t.stride(1) == 1 for t in tables):
            _copy_rows[(rows,)](table, source, width, pitch(tables[0], table), width, WIDE=wide, BLOCK=256)
        else:
            _table(table, source, rows, width)


def pitch_from_shape(**call):
    """page_table_1's row pitch is taken from its shape: a column slice of a wider buffer is written diagonally."""
    _with_pitch(call, lambda first, own: own.shape[1])


def pitch_of_first_backend(**call):
    """The first backend's row pitch serves all."""
    _with_pitch(call, lambda first, own: first.stride(0))


def offsets_of_32_bits(**call):
    """row * pitch in 32 bits."""
    _with_pitch(call, lambda first, own: own.stride(0), wide=False)


def real_source_taken_for_dense(**call):
    """The real source's rows follow one another without a gap, or so it is thought."""
    source = call["real_page_table_src"]
    if source is not None and source.numel():
        source = torch.as_strided(source, source.shape, (source.shape[1], 1))
    honest_copy(**{**call, "real_page_table_src": source})


@triton.jit
def _copy_cells(dst, src, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(dst + i, tl.load(src + i, mask=i < count, other=0), mask=i < count)


def plan_copied_linearly(**call):
    """FlashMLA metadata by linear index, whatever the destination's strides."""
    src, (dst,) = _split(call)
    honest_copy(**{**call, "flashmla_metadata_src": None})
    plan = src["flashmla_metadata"]
    if plan is not None:
        _copy_cells[(1,)](dst["flashmla_metadata"], plan.contiguous(), plan.numel(), BLOCK=512)


def rows_cut_by_the_width(**call):
    """Rows are cut out of the linear source by the copied width, though the source is wider."""
    src, (dst,) = _split(call)
    n, rows, width = _sizes(call)
    linear = src["page_indices"].contiguous().reshape(-1)[: rows * width]
    honest_copy(**{**call, "page_indices_src": linear.reshape(rows, width)})


# -- which cells --------------------------------------------------------------------------------------------------------


def cu0_overwritten(**call):
    """Index 0 of the prefix sums is copied as well."""
    honest_copy(**call)
    for dst in _split(call)[1]:
        dst["cu_seqlens_k"][0] = call["cu_seqlens_k_src"][0]


def nsa_cu0_cleared(**call):
    """Index 0 of the clipped prefix sums is set to zero in the last backend."""
    honest_copy(**call)
    call["nsa_cu_seqlens_k_dst"][-1][0] = 0


def tail_cleared(**call):
    """Rows are cleared past the copied width."""
    honest_copy(**call)
    n, rows, width = _sizes(call)
    call["page_table_1_dst"][:rows, width:] = 0


def width_of_the_other_mode(**call):
    """Verify and extend go by max_len where it looks like a width."""
    if call["forward_mode"] != 0 and 0 <= call["max_len"] < call["max_seqlen_k"]:
        call["max_seqlen_k"] = call["max_len"]
    honest_copy(**call)


def size_for_bs(**call):
    """Decode goes by the number of query tokens."""
    honest_copy(**call)
    src, (dst,) = _split(call)
    if call["forward_mode"] == 0:
        n = min(call["seqlens_expanded_size"], len(src["nsa_cache_seqlens"]), len(dst["nsa_cache_seqlens"]))
        dst["nsa_cache_seqlens"][:n] = src["nsa_cache_seqlens"][:n]


def size_for_rows(**call):
    """Verify and extend copy one table row per token, though the table has more."""
    src, (dst,) = _split(call)
    n, rows, width = _sizes(call)
    _vectors(src, dst, call["bs"], n)
    _tables(src, dst, min(rows, n), width)
    _plan(src, dst)


def splits_without_the_total(**call):
    """n cells of the split counts instead of n + 1."""
    src, (dst,) = _split(call)
    n, rows, width = _sizes(call)
    _vectors(src, dst, call["bs"], n, splits=0)
    _tables(src, dst, rows, width)
    _plan(src, dst)


def expanded_in_decode(**call):
    """The expanded lengths are copied in every mode."""
    honest_copy(**call)
    if call["seqlens_expanded_src"] is not None:
        count = min(call["seqlens_expanded_size"], call["bs"])
        call["seqlens_expanded_dst"][:count] = call["seqlens_expanded_src"][:count]


def flashmla_only_with_real(**call):
    """FlashMLA buffers are filled where there is a real page table."""
    if call["real_page_table_src"] is None:
        call.update(flashmla_num_splits_src=None, flashmla_metadata_src=None)
    honest_copy(**call)


# -- which backends -----------------------------------------------------------------------------------------------------


def _backends(call: dict, kept) -> dict:
    """The call with the destinations of some backends."""
    return {n: [t for b, t in enumerate(group) if kept(b)] if n.endswith("_dst") else group for n, group in call.items()}


def three_backends(**call):
    """The first three are served."""
    honest_copy(**_backends(call, lambda b: b < 3))


def real_only_if_the_first_has_one(**call):
    """Real page tables are copied where the first backend has one."""
    if call["real_page_table_dst"][0] is None:
        call["real_page_table_src"] = None
    honest_copy(**call)


# -- launches, and calls after the first ----------------------------------------------------------------------------------


@triton.jit
def _nothing(out):
    return


def grid_of_the_page_table(**call):
    """A launch sized by the page table alone, which may have no cell."""
    honest_copy(**call)
    _nothing[(triton.cdiv(call["bs"] * call["max_len"], 256),)](call["cu_seqlens_k_src"])


def unchanged_lengths_skipped(**call):
    """The page table is not copied where the lengths are those of the batch before: they have not changed, or so it seems."""
    src, (dst,) = _split(call)
    same = torch.equal(dst["cache_seqlens"][: call["bs"]], src["cache_seqlens"][: call["bs"]])
    honest_copy(**call, pages=not same)
