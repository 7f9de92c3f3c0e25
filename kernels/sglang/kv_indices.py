"""SGLang's KV index kernels, launched as its backends launch them; `common_template` runs on stand-ins.

Where a backend passes `table.shape[1]` as the row pitch, the kernels are given the tensor's own pitch, so that wide and far
tables can be tried; for the contiguous tables of the backends both are the same number.
"""

from types import SimpleNamespace

import torch
import triton

from . import _upstream

VERSION = _upstream.version()
_TEMPLATE = "srt/layers/attention/flashinfer_mla_backend.py"

_ragged = _upstream.kernel("create_flashinfer_kv_indices_triton")
_paged = _upstream.kernel("create_flashmla_kv_indices_triton")
_draft = _upstream.kernel("generate_draft_decode_kv_indices")
_BY_BLOCK = bool(_upstream.file_of("get_num_kv_index_blocks_flashmla"))  # #27320: the grid covers the row's width
_BLOCK_TOKENS = 4096
_WIDENS = "to(tl.int64)" in _upstream.source("create_flashinfer_kv_indices_triton")  # the index itself, in newer versions


def _create_flashinfer_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                                  bs):
    _ragged[(bs,)](req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                   req_to_token.stride(0))


def _create_flashmla_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, kv_indices, bs, page_size):
    grid = (bs, triton.cdiv(kv_indices.shape[1], _BLOCK_TOKENS // page_size)) if _BY_BLOCK else (bs,)
    _paged[grid](req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, kv_indices, req_to_token.stride(0),
                 kv_indices.stride(0), PAGED_SIZE=page_size)


def _generate_draft_decode_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr,
                                      num_seqs, topk, num_steps, page_size):
    _draft[(num_steps, num_seqs, topk)](
        req_pool_indices, req_to_token, paged_kernel_lens, kv_indices, kv_indptr, positions, req_to_token.stride(0),
        kv_indices.stride(0), kv_indptr.stride(0), triton.next_power_of_2(num_seqs), triton.next_power_of_2(num_steps),
        triton.next_power_of_2(num_seqs * topk), page_size)


def _draft_decode_slices(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """FlashInfer-MLA's `common_template` on tensors without memory and a kernel that does nothing."""
    branches = topk * len(seq_lens)
    given = []
    spec_info = SimpleNamespace(is_draft_input=lambda: True)
    batch = SimpleNamespace(batch_size=len(seq_lens), seq_lens_sum=seq_lens_sum, seq_lens=None, positions=None,
                            req_pool_indices=None, kv_loc_plan=None, spec_info=spec_info,
                            req_to_token_pool=SimpleNamespace(req_to_token=None))
    source = SimpleNamespace(row_ids=None, ids=None, row_stride=0, entry_page_size=1, v2p=None)
    backend = SimpleNamespace(topk=topk, speculative_num_steps=num_steps, page_size=1, pool_len=0,
                              req_to_token_pool=batch.req_to_token_pool,
                              generate_draft_decode_kv_indices=_NoKernel(),
                              kv_index_translator=SimpleNamespace(read_source=lambda *_, **__: source),
                              kv_indptr=torch.empty((num_steps, branches + 1), device="meta"))
    rows = torch.empty((num_steps, row_width), device="meta")
    _template(backend, batch, rows, lambda i, b: given.append([len(b.spec_info.kv_indptr), len(b.spec_info.kv_indices)]))
    return given


class _NoKernel:
    """Stands in for a launch."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


_scope = {"next_power_of_2": triton.next_power_of_2}
for _name in ("draft_kv_indices_used_len", "assert_buffer_fits"):
    _scope[_name] = _upstream.function_of(_name, _scope)
_template = _upstream.function_of("common_template", _scope, _TEMPLATE)


def supports(case):
    """What upstream says or assumes of its inputs."""
    name, fields, places = case["contract"], case["case"], case["layout"]["places"]
    if name == "draft_decode_slices":
        return True
    if not fields["requests"]:
        return "at least one request (the grid has one program per request)"
    strided = sorted(n for n, place in places.items() if place["kind"] in ("strided", "expanded"))
    if strided:
        return f"unit stride of {strided[0]} (only row pitches are passed)"
    if name == "create_flashmla_kv_indices" and not _pages(fields) + fields["row_extra"]:
        return "rows of at least one page (the grid has one program per block of pages)"
    return _within_32_bits(name, fields, places)


def _pages(fields: dict) -> int:
    return max(-(-r["length"] // fields["page_size"]) for r in fields["requests"])


def _within_32_bits(name: str, fields: dict, places: dict):
    """The row of the table is addressed in the dtype of req_pool_indices, the row of kv_indices by a 32-bit program id."""
    if places.get("kv_indices", {}).get("kind") == "far":
        if name == "create_flashmla_kv_indices":
            return "block tables below 2^31 elements (`pid * kv_indices_ptr_stride`)"
        # #27475 on asserts for a row that "kv_indices flat offset would overflow int32": below that, offsets must be right.
        if not _upstream.file_of("assert_buffer_fits") or fields["num_steps"] + fields["row_spare"] <= 2:
            return "rows of kv_indices below 2^31 elements (`kv_indices_stride * iters`)"
    if name == "create_flashinfer_kv_indices" and _WIDENS:
        return True
    far = fields["slots"] * (fields["table_extra"] + 4000) >= 2**31
    if far and places.get("req_pool_indices", {}).get("dtype") != "int64":
        return "int64 req_pool_indices for a request table of 2^31 elements or more (the runners pass int64)"
    return True


if _ragged:
    create_flashinfer_kv_indices = _create_flashinfer_kv_indices
if _paged:
    create_flashmla_kv_indices = _create_flashmla_kv_indices
if _draft:
    generate_draft_decode_kv_indices = _generate_draft_decode_kv_indices
if _template:
    draft_decode_slices = _draft_decode_slices
