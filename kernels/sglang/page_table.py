"""SGLang's kernel of the page_table family: rows of slots gathered from req_to_token, one per request.

The NSA backend gathers with PyTorch; the kernel is the one that serves the TRTLLM-MHA backend since 0.5.23, with pages of
one token.
"""

from . import _upstream

VERSION = _upstream.version()
_new = _upstream.module("sglang.kernels.ops.attention.trtllm_mha_page_table")

MISSING = {} if _new else {"gather_page_table": "this SGLang gathers page tables with PyTorch"}


def _gather_page_table(*, req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, page_table_1, bs, total_rows,
                       draft_tokens, max_len):
    """Call upstream's wrapper on the part of the output that the batch has, as its callers do."""
    _new.build_trtllm_mha_page_table(req_to_token, req_pool_indices, cache_seqlens, page_table_1[:bs, :max_len], 1)


def supports(case):
    """What the wrapper is documented for and what the kernel visibly takes for granted."""
    fields, places = case["case"], case["layout"]["places"]
    if case["contract"] != "gather_page_table":
        return True
    if not fields["requests"] or all(r["seq_len"] == 0 for r in fields["requests"]) and not fields["max_extra"]:
        return "a page table with cells (the grid has one program per request and block of pages)"
    if fields["ragged"] or fields["selection"] or fields["draft_tokens"] != 1:
        return "one row per request ('page_table_ptr,  # [bs, num_pages] int32')"
    if any(places.get(n, {}).get("kind") in ("strided", "expanded") for n in ("req_pool_indices", "cache_seqlens")):
        return "unit strides of req_pool_indices and cache_seqlens (loaded from ptr + pid_req)"
    if any(places.get(n, {}).get("kind") == "strided" for n in ("req_to_token", "page_table_1")):
        return "unit column strides of the tables (only row strides are passed)"
    return True


if _new:
    gather_page_table = _gather_page_table
