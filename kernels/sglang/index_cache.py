"""SGLang's kernels of the index_cache family, launched on the given outputs as upstream's own wrappers launch them."""

import torch
import triton

from . import _upstream

VERSION = _upstream.version()

VARIANTS = {"quantize_k_cache": {"scale": "fp32", "tiny": "undefined"}}
_NAMES = {
    "get_k": "_get_k_triton_kernel", "get_s": "_get_s_triton_kernel", "get_k_and_s": "_get_k_and_s_triton_kernel",
    "set_k_and_s": "_set_k_and_s_triton_kernel", "quantize_k_cache": "_quantize_k_cache_fast_kernel",
    "dequantize_k_cache": "_dequantize_k_cache_fast_kernel", "dequantize_k_cache_paged": "_dequantize_k_cache_paged_kernel",
}
_kernels = {contract: _upstream.kernel(name) for contract, name in _NAMES.items()}
MISSING = {contract: f"this SGLang has no {_NAMES[contract]}" for contract, kernel in _kernels.items() if kernel is None}
MISSING["fused_store_index_cache"] = "fused_store_index_k_cache is CUDA C++ and needs a GPU"
_PAGED = _upstream.first_of("dequantize_k_cache_paged_dsa", "dequantize_k_cache_paged")
_PRESHUFFLES = "set_k_and_s" not in MISSING and "PRESHUFFLE_TILE" in _kernels["set_k_and_s"].arg_names
_BATCHED = "get_k_and_s" not in MISSING and "seq_len_num_pow" in _kernels["get_k_and_s"].arg_names


def _get_k(*, buf, page_indices, k_out, seq_len, page_size):
    _kernels["get_k"][(seq_len,)](buf, page_indices, k_out, seq_len, page_size, buf.shape[1], 128, BLOCK_SIZE=128)


def _get_s(*, buf, page_indices, s_out, seq_len, page_size):
    _kernels["get_s"][(seq_len,)](buf, page_indices, s_out, seq_len, page_size, buf.shape[1], page_size * 128)


def _get_k_and_s(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    requests = seq_lens.shape[0]
    if not _BATCHED:
        _kernels["get_k_and_s"][(seq_len_sum,)](buf, page_indices, k_out, s_out, seq_len_sum, page_size, buf.shape[1], 128,
                                                page_size * 128, BLOCK_SIZE_K=128)
        return
    _kernels["get_k_and_s"][(requests, triton.cdiv(max_seq_len, 256), 1)](
        buf, page_indices, k_out, s_out, seq_lens, triton.next_power_of_2(requests), page_size, buf.shape[1], 128,
        page_size * 128, page_indices.shape[1], BLOCK_SIZE=256, BLOCK_SIZE_K=128)


def _set_k_and_s(*, buf, loc, index_k, index_k_scale, page_size):
    tokens = loc.shape[0]
    index_k, index_k_scale = index_k[:tokens], index_k_scale[:tokens]  # SetKAndS asserts a payload of exactly these rows
    if _PRESHUFFLES:  # the versions that know preshuffled caches convert
        loc = loc.to(torch.int64)
    _kernels["set_k_and_s"][(tokens,)](
        buf.view(torch.float8_e4m3fn), buf.view(torch.float32), loc, index_k, index_k_scale, index_k.stride(0),
        PAGE_SIZE=page_size, BUF_NUMEL_PER_PAGE=buf.shape[1], NUM_K_ELEMS_PER_TOKEN=128,
        S_OFFSET_NBYTES_IN_PAGE=page_size * 128, **({"PRESHUFFLE_TILE": 0} if _PRESHUFFLES else {}))


_DIMS = dict(NUM_NOPE_BLOCKS=4, GROUP_SIZE=128, DIM_NOPE=512, DIM_ROPE=64)


def _parts(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes, scales and rotary numbers of quantised latents."""
    return (cache[:, :512].view(torch.float8_e4m3fn), cache[:, 512:528].view(torch.float32),
            cache[:, 528:656].view(torch.bfloat16))


def _quantize_k_cache(*, cache_k, quant_k_cache):
    parts, nope, rope = _parts(quant_k_cache), cache_k[:, :512], cache_k[:, 512:576]
    _kernels["quantize_k_cache"][(len(cache_k), 5)](
        *parts, nope, rope, *(p.stride(0) for p in parts), nope.stride(0), rope.stride(0), **_DIMS, FP8_MIN=-448.0,
        FP8_MAX=448.0)


def _dequantize_k_cache(*, quant_k_cache, k_cache):
    parts = _parts(quant_k_cache)
    _kernels["dequantize_k_cache"][(len(quant_k_cache), 5)](
        k_cache, *parts, k_cache.stride(0), *(p.stride(0) for p in parts), **_DIMS)


def _dequantize_k_cache_paged(*, quant_k_cache, page_table_1_flattened, k_cache):
    """Upstream's own wrapper, whose output is `k_cache`."""
    count = len(page_table_1_flattened)
    output = k_cache[:count].view(count, 1, 576)
    wrapper = _upstream.function_of(_PAGED, {
        "torch": _upstream.Torch(k_cache.device, empty=lambda *shape, **_: output), "triton": triton, "_infer_dsa_dims": _dims,
        "_dequantize_k_cache_paged_kernel": _kernels["dequantize_k_cache_paged"]})
    wrapper(quant_k_cache.view(torch.float8_e4m3fn), page_table_1_flattened)


def _dims(bytes_per_token: int) -> tuple[int, int]:
    return 512, 64


def supports(case):
    """What the wrappers assert, allocate themselves, or visibly assume."""
    contract, fields, places = case["contract"], case["case"], case["layout"]["places"]
    tokens = _tokens(contract, fields)
    if not tokens:
        return "at least one token (the grid has one program per token)"
    for name, place in places.items():
        free = ("contiguous", "offset", "pitched") if contract == "quantize_k_cache" and name == "cache_k" else ("contiguous",)
        if place["kind"] == "offset" and name not in ("buf", "quant_k_cache"):
            free += ("offset",)  # a slice of a larger tensor; caches start their allocation
        if place["kind"] not in free:
            return "contiguous tensors (asserted by set_k_and_s; strides are taken from shapes elsewhere, or views need them)"
    if contract == "get_k_and_s" and not _BATCHED and len(fields["requests"]) != 1:
        return "one request (the kernel of this version takes the pages of one)"
    if contract == "set_k_and_s" and fields["page_size"] != 64:
        return "page_size 64 (asserted)"
    if contract == "set_k_and_s" and not _PRESHUFFLES and places.get("loc", {}).get("dtype") != "int64":
        return "int64 loc (asserted; newer versions convert it)"
    return True


def _tokens(contract: str, fields: dict) -> int:
    if contract in ("get_k", "get_s"):
        return fields["seq_len"]
    if contract == "get_k_and_s":
        return max((r["seq_len"] for r in fields["requests"]), default=0)
    if contract == "set_k_and_s":
        return len(fields["tokens"]) + fields["padded"]
    if contract == "quantize_k_cache":
        return len(fields["latents"]) * fields["repeat"]
    return fields["count"] if contract == "dequantize_k_cache" else len(fields["tokens"])


if "get_k" not in MISSING:
    get_k = _get_k
if "get_s" not in MISSING:
    get_s = _get_s
if "get_k_and_s" not in MISSING:
    get_k_and_s = _get_k_and_s
if "set_k_and_s" not in MISSING:
    set_k_and_s = _set_k_and_s
if "quantize_k_cache" not in MISSING:
    quantize_k_cache = _quantize_k_cache
if "dequantize_k_cache" not in MISSING:
    dequantize_k_cache = _dequantize_k_cache
if "dequantize_k_cache_paged" not in MISSING:
    dequantize_k_cache_paged = _dequantize_k_cache_paged
