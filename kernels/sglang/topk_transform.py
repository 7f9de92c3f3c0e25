"""SGLang's index transforms. Their kernels are launched as upstream's wrappers launch them, on the given output.

Older trees (nsa/transform_index) have one kernel, for rows of 2,048 indices, and a prefill that runs it once per request on
an expanded row of the table; newer ones (dsa/transform_index) a second for any width and a third for prefill.
The selections are CUDA (sgl-kernel and JIT), out of reach here. Where they are in reach, fast_topk_transform_fused takes no
more requests than rows (it checks page_table.shape[0] <= score.shape[0]): `supports` must decline the others then.
"""

import inspect

from . import _upstream

VERSION = _upstream.version()
_home = _upstream.home("transform_index_page_table_decode")
# Older trees have wrappers of these names too, which only pass keywords on.
_new = _home if _home and "page_table" in inspect.signature(_home.transform_index_page_table_decode).parameters else None
_old = None if _new else _home

_CUDA_ONLY = ("fast_topk", "fast_topk_transform_paged", "fast_topk_transform_ragged", "topk_transform_v2")
_NO_KERNEL = ("transform_index_ragged", "pad_topk_indices")
MISSING = {
    **{name: "its selection is a CUDA kernel, which the interpreter cannot run" for name in _CUDA_ONLY},
    **{name: "upstream uses PyTorch operations inside its backend" for name in _NO_KERNEL},
    **({} if _home else {name: "this SGLang has no transform_index"
                         for name in ("transform_index_page_table_decode", "transform_index_page_table_prefill")}),
}


def _decode_new(*, page_table, topk_indices, result):
    rows, topk = topk_indices.shape
    _new.transform_index_page_table_decode(page_table[:rows], topk_indices, result=result[:rows, :topk])


def _prefill_new(*, page_table, topk_indices, cu_seqlens_q, result, extend_lens_cpu, output_num_tokens,
                 page_table_is_expanded):
    filled = _new.transform_index_page_table_prefill(
        page_table, topk_indices, extend_lens_cpu, output_num_tokens=output_num_tokens,
        page_table_is_expanded=page_table_is_expanded, cu_seqlens_q=cu_seqlens_q)
    result[: len(filled), : topk_indices.shape[1]] = filled


def _decode_old(*, page_table, topk_indices, result):
    rows, topk = topk_indices.shape
    _old.transform_index_page_table_decode_fast(page_table[:rows], topk_indices, result=result[:rows, :topk])


def _prefill_old(*, page_table, topk_indices, cu_seqlens_q, result, extend_lens_cpu, output_num_tokens,
                 page_table_is_expanded):
    filled = _old.transform_index_page_table_prefill_fast(page_table[: len(extend_lens_cpu)], topk_indices, extend_lens_cpu)
    result[: len(filled), : topk_indices.shape[1]] = filled


def supports(case):
    """What the wrappers assert, and what their kernels take for granted of dense rows."""
    if case["contract"] == "transform_index_page_table_decode":
        return _takes_decode(case)
    return _takes_prefill(case)


def _takes_decode(case):
    fields, places = case["case"], case["layout"]["places"]
    if not fields["rows"]:
        return "at least one row (the grid is (qo_len,))"
    if _strided(places, "page_table"):
        return "unit column stride of page_table (page_table_ptr + index)"
    if fields["topk"] != 2048:
        return True if _new else "2048 indices per row (assert topk_indices.shape[1] == 2048)"
    if fields["spare"] or not _dense(places, "topk_indices", "result"):
        return "dense rows of 2048 indices (topk_indices_ptr + req_id * TOPK)"
    if not _new and not _dense(places, "page_table"):
        return "dense rows of page_table (max_seqlen_k = page_table.shape[1] is the pitch)"
    return True


def _takes_prefill(case):
    fields, places = case["case"], case["layout"]["places"]
    if _new:
        return "unit stride of cu_seqlens_q (cu_seqlens_q_ptr + request_id)" if _strided(places, "cu_seqlens_q") else True
    if fields["topk"] != 2048:
        return "2048 indices per row (assert topk_indices.shape[1] == 2048)"
    if not fields["requests"] or not all(r["extend_len"] for r in fields["requests"]):
        return "at least one token of every request (the grid is (qo_len,))"
    if fields["expanded"] or fields["padding"] or fields["output_extra"]:
        return "no table by token and no padding (the signature has neither)"
    if not _dense(places, "topk_indices", "page_table"):
        return "dense rows of 2048 indices (topk_indices_ptr + req_id * TOPK)"
    return True


def _dense(places, *names: str) -> bool:
    return all(places.get(n, {}).get("kind", "contiguous") in ("contiguous", "offset") for n in names)


def _strided(places, name: str) -> bool:
    return places.get(name, {}).get("kind") == "strided"


if _new:
    transform_index_page_table_decode = _decode_new
    transform_index_page_table_prefill = _prefill_new
elif _old:
    transform_index_page_table_decode = _decode_old
    transform_index_page_table_prefill = _prefill_old
