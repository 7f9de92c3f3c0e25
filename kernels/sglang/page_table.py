"""SGLang's kernel of the page_table family: rows of slots gathered from req_to_token.

The NSA backend gathers with PyTorch. The kernel is that of the TRTLLM-MHA and FlashAttention backends in 0.5.23, called with
pages of one token; it has one row per request, so a row that repeats a request is given as a request of its own.
"""

import torch

from . import _upstream

VERSION = _upstream.version()
_new = _upstream.home("build_trtllm_mha_page_table")

MISSING = {} if _new else {"gather_page_table": "this SGLang gathers page tables with PyTorch"}


def _gather_page_table(*, req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, page_table_1, bs, total_rows,
                       draft_tokens, max_len):
    """Call upstream's wrapper with one request per row; the wrapper fills the whole of the table that it gets."""
    chosen = torch.arange(bs, device=req_to_token.device) if bs_idx is None else bs_idx
    owner = chosen.repeat_interleave(draft_tokens if row_repeats is None else row_repeats[chosen])
    _new.build_trtllm_mha_page_table(req_to_token, req_pool_indices[owner], cache_seqlens[owner],
                                     page_table_1[:total_rows, :max_len], 1)


def supports(case):
    """What the kernel visibly takes for granted."""
    fields, places = case["case"], case["layout"]["places"]
    if case["contract"] != "gather_page_table":
        return True
    if not _has_cells(fields):
        return "a page table with cells (the grid has one program per request and block of pages)"
    if places.get("page_table_1", {}).get("kind") == "far":
        return "an output of less than 2**31 cells (out_off is the 32-bit product pid_req * page_table_stride)"
    if any(places.get(n, {}).get("kind") == "strided" for n in ("req_to_token", "page_table_1")):
        return "unit column strides of the tables (only row strides are passed)"
    return True


def _has_cells(fields) -> bool:
    chosen = [r for r in fields["requests"] if r["selected"] or not fields["selection"]]
    rows = sum(r["rows"] for r in chosen) if fields["ragged"] else len(chosen) * fields["draft_tokens"]
    return rows > 0 and max(r["seq_len"] for r in chosen) + fields["max_extra"] > 0


if _new:
    gather_page_table = _gather_page_table
