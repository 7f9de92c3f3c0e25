"""SGLang's kernels around TRT-LLM MLA: the page writer, the padding kernels, and the draft template's index lists.

The methods of its backend are not imported (they need a model); `_calc_padded_blocks` alone is taken out and called.
"""

import ast
import math
import types

import torch
import triton

from . import _upstream

VERSION = _upstream.version()
_BACKEND = "srt/layers/attention/trtllm_mla_backend.py"
_WRITER_TOKENS = 4096  # FLASHMLA_CREATE_KV_BLOCK_SIZE_TRITON


_pages = _upstream.kernel("create_flashmla_kv_indices_triton")
_pad = _upstream.kernel("pad_draft_extend_query_kernel")
_unpad = _upstream.kernel("unpad_draft_extend_output_kernel")
_pad_sequence = _upstream.kernel("pad_sequence_with_mask_kernel")
_template = _upstream.kernel("generate_draft_decode_kv_indices")
_BY_BLOCK = bool(_upstream.file_of("get_num_kv_index_blocks_flashmla"))  # #27320


def _skips_template() -> bool:
    """Whether this version's multi-step backend has an eager init of its own (#26241)."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "init_forward_metadata"
               for c in ast.parse(_upstream.text(_BACKEND)).body if isinstance(c, ast.ClassDef) and "MultiStep" in c.name
               for node in c.body)


_blocks = _upstream.function_of("_calc_padded_blocks", {
    "triton": triton, "math": math, "TRTLLM_BLOCK_CONSTRAINT": 128, "TRITON_PAD_NUM_PAGE_PER_BLOCK": 64,
    "get_num_page_per_block_flashmla": lambda page_size: _WRITER_TOKENS // page_size}, _BACKEND)
VARIANTS = {"mla_multi_step_draft": {"kv_index_template": "skipped" if _skips_template() else "built"}}
MISSING = {
    "mla_metadata": "its backend computes the lengths with torch, inside a model",
    "mla_metadata_sizes": "its backend computes the sizes inside a model",
}


def _calc_padded_blocks(*, max_seq_len, page_size):
    return _blocks(types.SimpleNamespace(page_size=page_size), max_seq_len)


def _mla_block_table(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs, max_blocks, page_size,
                     fresh, mode, draft_tokens, max_seq_len_q):
    """The lengths as the backend adds them up, and the page writer."""
    keys = seq_lens[:bs]
    if mode == "target_verify":
        keys = keys + draft_tokens
    elif extend_seq_lens is not None:
        keys = keys - extend_seq_lens[:bs] + max_seq_len_q
    _write(block_table, req_pool_indices[:bs], keys, req_to_token, bs, max_blocks, page_size, fresh)


def _write(table, slots, keys, req_to_token, bs, max_blocks, page_size, fresh):
    if fresh:
        table[:bs, :max_blocks] = -1
    grid = (bs,)
    if _BY_BLOCK:
        grid = (bs, triton.cdiv(table.shape[1], _WRITER_TOKENS // page_size))
    if bs and table.shape[1]:
        _pages[grid](req_to_token, slots, keys, None, table, req_to_token.stride(0), table.shape[1], PAGED_SIZE=page_size)


def _mla_multi_step_draft(*, seq_lens, req_pool_indices, positions, req_to_token, block_table, seq_lens_k, kv_indptr,
                          kv_indices, bs, max_blocks, page_size, fresh, steps):
    """Every step's backend on its own, behind the template where this version has it."""
    if VARIANTS["mla_multi_step_draft"]["kv_index_template"] == "built" and kv_indices is not None and bs:
        _template[(steps, bs, 1)](
            req_pool_indices, req_to_token, seq_lens, kv_indices, kv_indptr, positions, req_to_token.shape[1],
            kv_indices.shape[1], kv_indptr.shape[1], triton.next_power_of_2(bs), triton.next_power_of_2(steps),
            triton.next_power_of_2(bs), page_size)
    for table, lengths in zip(block_table, seq_lens_k):
        lengths[:bs] = seq_lens[:bs].to(torch.int32)
        _write(table, req_pool_indices[:bs], seq_lens[:bs], req_to_token, bs, max_blocks, page_size, fresh)


def _pad_draft_extend_query(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q):
    heads, head_dim = q.shape[1:]
    grid = (bs * padded_q.shape[1], triton.cdiv(heads, 64), triton.cdiv(head_dim, 64))
    if 0 not in grid:
        _pad[grid](q, padded_q, seq_lens_q, cu_seqlens_q, bs, padded_q.shape[1], heads, head_dim, BLOCK_SIZE=64)


def _unpad_draft_extend_output(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q):
    _, width, heads, head_dim = raw_out.shape
    grid = (bs * width, triton.cdiv(heads, 64), triton.cdiv(head_dim, 64))
    if 0 not in grid:
        _unpad[grid](raw_out, output, seq_lens_q, cu_seqlens_q, bs, width, heads, head_dim, BLOCK_SIZE=64)


def _pad_sequence_with_mask(*, input_emb, offsets, lengths, output, attn_mask, bs, max_len):
    hidden = input_emb.shape[1]
    if bs and max_len:
        output[:bs] = 0
        _pad_sequence[(bs, 1, 1)](input_emb, offsets, lengths, output, attn_mask, max_len, hidden,
                                  BLOCK_M=triton.next_power_of_2(max_len), BLOCK_D=triton.next_power_of_2(hidden))


# -- what the kernels take for granted ----------------------------------------------------------------------------------

_DENSE = {
    "mla_block_table": (("seq_lens", "extend_seq_lens", "req_pool_indices"), ("block_table",)),
    "mla_multi_step_draft": (("seq_lens", "req_pool_indices", "positions"), ("block_table", "kv_indptr", "kv_indices")),
    "pad_draft_extend_query": (("seq_lens_q", "cu_seqlens_q"), ("q", "padded_q")),
    "unpad_draft_extend_output": (("seq_lens_q", "cu_seqlens_q"), ("raw_out", "output")),
    "pad_sequence_with_mask": (("offsets", "lengths"), ("input_emb", "output")),
}


def supports(case):
    """What upstream's callers and comments say or visibly assume."""
    name, fields, places = case["contract"], case["case"], case["layout"]["places"]
    if name == "calc_padded_blocks":
        return True
    kinds = {(n.split("[")[0], p["kind"]) for n, p in places.items()}
    vectors, tables = _DENSE[name]
    if kinds & {(n, kind) for n in vectors for kind in ("strided", "expanded")}:
        return "unit stride of lengths and indices (comments: [batch_size])"
    if ("padded_q", "pitched") in kinds:
        return "a padded_q that is no corner of a wider buffer (forward_extend passes padded_q_buffer[:bs, :max_q])"
    if kinds & {(n, kind) for n in tables for kind in ("pitched", "strided", "far")}:
        return "rows that follow one another: addresses are made of the shape (shape[1] as row pitch)"
    if name in ("mla_block_table", "mla_multi_step_draft"):
        return _supports_table(fields, kinds, places)
    if name == "pad_sequence_with_mask" and fields["spare"]:
        return "an output of max_len places per row (the wrapper allocates it so)"
    return True


def _supports_table(fields, kinds, places):
    if ("req_to_token", "strided") in kinds:
        return "unit stride within a row of req_to_token"
    if places.get("req_pool_indices", {}).get("dtype") != "int64" and fields["table_extra"] >= 2**20 and fields["slots"] > 2000:
        return "int64 req_pool_indices for a request table of 2^31 elements or more (the runners pass int64)"
    if "steps" in fields and VARIANTS["mla_multi_step_draft"]["kv_index_template"] == "built":
        if not fields["template"]:
            return "the kv-index buffers, which this version fills"
        if ("req_to_token", "pitched") in kinds:
            return "rows of req_to_token that follow one another (pool_len = req_to_token.shape[1])"
    return True


if _blocks:
    calc_padded_blocks = _calc_padded_blocks
if _pages:
    mla_block_table = _mla_block_table
    mla_multi_step_draft = _mla_multi_step_draft
if _pad:
    pad_draft_extend_query = _pad_draft_extend_query
if _unpad:
    unpad_draft_extend_output = _unpad_draft_extend_output
if _pad_sequence:
    pad_sequence_with_mask = _pad_sequence_with_mask
