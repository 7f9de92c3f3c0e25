"""SGLang's kernel of the seqlens family, and its host functions on PyTorch tensors, executed alone."""

import types

import torch
import triton

from . import _upstream

VERSION = _upstream.version()
_kernel = _upstream.kernel("seqlens_expand_kernel")

# The kernel clamps negative lengths since #30378.
VARIANTS = {"seqlens_expand": {"clamp": "zero" if "tl.maximum" in _upstream.source("seqlens_expand_kernel") else "none"}}
_clip = _upstream.function_of(_upstream.first_of("compute_nsa_seqlens", "compute_dsa_seqlens"), {"torch": torch})
_sums = _upstream.function_of("compute_cu_seqlens", {"torch": torch})
_pads = _upstream.first_of("pad_nsa_cache_seqlens", "pad_dsa_cache_seqlens")
MISSING = {name: reason for name, there, reason in (
    ("seqlens_expand", _kernel, "this SGLang has no seqlens_expand_kernel"),
    ("cu_seqlens", _sums, "this SGLang has no compute_cu_seqlens"),
    ("nsa_cache_seqlens", _pads, "this SGLang pads no lengths"),
    ("cal_padded_tokens", False, "its padding mode is asked of the parallel runtime"),
) if not there}


def _seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Launch the kernel on the given output; the offsets are what upstream's wrapper passes it."""
    n = extend_seq_lens.numel()
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=extend_seq_lens.device)
    offsets[1:] = torch.cumsum(extend_seq_lens, dim=0)
    _kernel[(n,)](extend_seq_lens, seq_lens, offsets, seqlens_expanded, n, BLOCK=triton.next_power_of_2(max_q_len))


def _cu_seqlens(*, seqlens, cu_seqlens):
    cu_seqlens[: len(seqlens) + 1] = _sums(_upstream.cuda(seqlens))


def _nsa_cache_seqlens(*, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """Under data parallelism alone: `padded_rows` tokens of this rank, without a split over the ranks of a context."""
    batch = types.SimpleNamespace(global_num_tokens_cpu=[padded_rows] if padded_rows else None, extend_seq_lens_cpu=[])
    pad = _upstream.function_of(_pads, {
        "torch": torch, "get_attention_tp_size": lambda: 1, "get_attention_cp_size": lambda: 1,
        "get_parallel": lambda: types.SimpleNamespace(attn_cp_size=1), "cal_padded_tokens": lambda batch: padded_rows,
        "can_nsa_prefill_cp_round_robin_split": lambda batch: False})
    lengths = pad(batch, _clip(seqlens_expanded, index_topk))
    nsa_cache_seqlens[: len(lengths)] = lengths
    nsa_cu_seqlens_k[: len(lengths) + 1] = _sums(_upstream.cuda(lengths))


def supports(case):
    """What seqlens_expand_triton says or assumes of its inputs."""
    if case["contract"] != "seqlens_expand":
        return True
    extends = [r["extend_len"] for r in case["case"]["requests"]]
    if not extends:
        return "at least one request (the grid is (N,))"
    if max(extends) + case["case"].get("extra", 0) < 1:
        return "max_q_len of at least 1 (BLOCK = next_power_of_2(max_q_len))"
    if any(place["kind"] in ("strided", "expanded") for place in case["layout"]["places"].values()):
        return "unit stride of every input (docstring: extend_seq_lens [N], seq_lens [N])"
    return True


if _kernel:
    seqlens_expand = _seqlens_expand
if _sums:
    cu_seqlens = _cu_seqlens
if _pads:
    nsa_cache_seqlens = _nsa_cache_seqlens
