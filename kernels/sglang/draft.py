"""SGLang's cache-location kernels of speculative decoding, launched as its workers launch them.

Where a worker passes `req_to_token.shape[1]` as the row pitch, the kernels are given the tensor's own pitch, so that wide and
far tables can be tried; for the contiguous tables of the workers both are the same number.
"""

import triton

from . import _upstream

VERSION = _upstream.version()
_into_table = _upstream.kernel("assign_req_to_token_pool")
_from_table = _upstream.kernel("assign_extend_cache_locs")
_uniform = _upstream.kernel("assign_extend_cache_locs_uniform")
_after_decode = _upstream.kernel("create_extend_after_decode_spec_info")
_draft = _upstream.kernel("assign_draft_cache_locs")
_contiguous = _upstream.kernel("assign_draft_cache_locs_contiguous")
_contiguous_old = _upstream.kernel("assign_draft_cache_locs_page_size_1")
_WRITES_POSITIONS = _contiguous is not None and "positions" in _contiguous.arg_names
_WRITES_POSITIONS_OUT = _uniform is not None and "positions_out" in _uniform.arg_names
if _draft and "duplicate_cache_len" not in _draft.arg_names:
    _draft = None  # before 0.5.6 it neither compacts nor lists what to copy: another transform

_GONE = "this SGLang has no kernel of this name"
MISSING = {name: _GONE for name, kernel in (
    ("assign_extend_cache_locs_uniform", _uniform), ("create_extend_after_decode_spec_info", _after_decode),
    ("assign_draft_cache_locs", _draft)) if kernel is None}


def _assign_req_to_token_pool(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    _into_table[(bs,)](req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, req_to_token.stride(0),
                       triton.next_power_of_2(bs))


def _assign_extend_cache_locs(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    _from_table[(bs,)](req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, req_to_token.stride(0),
                       triton.next_power_of_2(bs))


def _assign_extend_cache_locs_uniform(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs,
                                      draft_token_num):
    written = {"positions_out": positions_out} if _WRITES_POSITIONS_OUT else {}
    _uniform[(bs,)](req_pool_indices, req_to_token, start_offset, out_cache_loc, req_to_token.stride(0), draft_token_num,
                    **written)


def _create_extend_after_decode_spec_info(*, accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, bs, num_steps):
    _after_decode[(bs,)](accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, _bs_upper(num_steps, bs))


def _assign_draft_cache_locs(*, req_pool_indices, req_to_token, seq_lens, extend_lens, num_new_pages_per_topk, out_cache_loc,
                             source_cache_loc, target_cache_loc, last_page_lens_cumsum, bs, topk, num_steps, page_size):
    duplicates = (topk - 1) * int((seq_lens[:bs] % page_size).sum()) if extend_lens is not None else 0
    _draft[(bs,)](req_pool_indices, req_to_token, seq_lens, extend_lens, num_new_pages_per_topk, out_cache_loc,
                  source_cache_loc, target_cache_loc, last_page_lens_cumsum, duplicates, req_to_token.stride(0), topk,
                  num_steps, page_size, triton.next_power_of_2(bs), triton.next_power_of_2(num_steps + page_size))


def _assign_draft_cache_locs_contiguous(*, req_pool_indices, req_to_token, seq_lens, out_cache_loc, positions, bs, topk,
                                        num_steps):
    if not _WRITES_POSITIONS:
        kernel = _contiguous or _contiguous_old
        kernel[(bs,)](req_pool_indices, req_to_token, seq_lens, out_cache_loc, req_to_token.stride(0), topk, num_steps)
    else:
        _contiguous[(bs,)](req_pool_indices, req_to_token, seq_lens, out_cache_loc, req_to_token.stride(0), topk, num_steps,
                           positions=positions, BS=bs, WRITE_POSITIONS=positions is not None)


def _bs_upper(num_steps: int, bs: int) -> int:
    """The lanes that the worker launches for every request."""
    return triton.next_power_of_2(max(num_steps + 1, bs))


def supports(case):
    """What upstream says or assumes of its inputs."""
    name, fields, places = case["contract"], case["case"], case["layout"]["places"]
    if not fields["requests"]:
        return "at least one request (the grid has one program per request)"
    strided = sorted(n for n, place in places.items() if place["kind"] in ("strided", "expanded"))
    if strided:
        return f"unit stride of {strided[0]} (only the table's row pitch is passed)"
    if name == "create_extend_after_decode_spec_info":
        lanes = _bs_upper(fields["num_steps"], len(fields["requests"]) * fields["repeat"])
        if max(r["accept_len"] for r in fields["requests"]) > lanes:
            return "at most bs_upper accepted tokens (next_power_of_2(max(speculative_num_steps + 1, bs)) lanes)"
        return True
    if name == "assign_draft_cache_locs_contiguous" and fields["with_positions"] and not _WRITES_POSITIONS:
        return "no positions (the kernel of this version has none)"
    if name == "assign_extend_cache_locs_uniform" and fields["positions"] and not _WRITES_POSITIONS_OUT:
        return "no positions (the kernel of this version has none)"
    if places.get("positions_out", {}).get("kind") == "pitched":
        return "contiguous positions_out (\"[batch, draft_token_num]\", and its pitch is not passed)"
    return _within_32_bits(fields, places)


def _within_32_bits(fields: dict, places: dict):
    """`tl.load(req_pool_indices + pid) * pool_len` is computed in the dtype of req_pool_indices."""
    far = fields["slots"] * (fields["table_extra"] + 1000) >= 2**31 or places.get("req_to_token", {}).get("kind") == "far"
    if far and places.get("req_pool_indices", {}).get("dtype") != "int64":
        return "int64 req_pool_indices for a request table of 2^31 elements or more (the runners pass int64)"
    return True


if _into_table:
    assign_req_to_token_pool = _assign_req_to_token_pool
if _from_table:
    assign_extend_cache_locs = _assign_extend_cache_locs
if _uniform:
    assign_extend_cache_locs_uniform = _assign_extend_cache_locs_uniform
if _after_decode:
    create_extend_after_decode_spec_info = _create_extend_after_decode_spec_info
if _draft:
    assign_draft_cache_locs = _assign_draft_cache_locs
if _contiguous or _contiguous_old:
    assign_draft_cache_locs_contiguous = _assign_draft_cache_locs_contiguous
