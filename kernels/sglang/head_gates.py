"""SGLang's head gates, methods of its indexer on PyTorch tensors, and its way of writing rotated queries back.

The methods are executed alone and uncompiled. The projection is a module of the model: a product in the dtype of its weight,
rounded to that dtype; where a version asks DeepGEMM or cuBLAS for float32 instead, that is what a stand-in gives.
"""

import types

import torch

from . import _upstream

VERSION = _upstream.version()
_GATES = {"project_and_scale_head_gates": "_project_and_scale_head_gates", "logits_head_gate": "_get_logits_head_gate",
          "apply_q_scale_and_softmax_scale": "_apply_q_scale_and_softmax_scale"}
_there = {ours: name for ours, name in _GATES.items() if _upstream.file_of(name)}
_indexer = _upstream.text(_upstream.file_of("_get_logits_head_gate"))
# The weight of the projection: float32 in 0.5.6 and 0.5.7, bfloat16 before and (on CUDA) behind.
_FLOAT32 = "params_dtype=torch.float32," in _indexer
# 0.5.5 projects outside the method.
_OUTSIDE = "weights_proj" not in _upstream.source("_get_logits_head_gate")

MISSING = {ours: f"this SGLang has no {name}" for ours, name in _GATES.items() if ours not in _there}
MISSING["fused_logits_head_gate"] = "this SGLang scales gates in its other methods"


def _run(name: str, tokens: torch.Tensor, weight, n_heads: int, softmax_scale: float, *more):
    """A method of the indexer on `tokens`."""
    def project(x):
        kept = weight.float() if _FLOAT32 else weight
        return torch.nn.functional.linear(x, kept[:n_heads]), None

    def into(x, kept, out):
        out[:] = x.float() @ kept[:n_heads].float().T

    scope = {"torch": _upstream.Torch(tokens.device, mm=_float32_product), "_is_hip": False, "_is_cuda": True,
             "_use_aiter": False,
             "deep_gemm_wrapper": types.SimpleNamespace(ENABLE_JIT_DEEPGEMM=True, gemm_nt_bf16bf16f32=into)}
    indexer = types.SimpleNamespace(n_heads=n_heads, softmax_scale=softmax_scale, weights_proj=project)
    if weight is not None:
        project.weight = weight[:n_heads]
    wide = _upstream.function_of("_weights_proj_bf16_in_fp32_out", scope)
    indexer._weights_proj_bf16_in_fp32_out = lambda x: wide(indexer, x)
    return _upstream.function_of(name, scope)(indexer, tokens, *more)


def _float32_product(a, b, out_dtype):
    return a.float() @ b.float()


def _project_and_scale_head_gates(*, x, weight, gates, n_heads):
    gates[: len(x), :n_heads] = _run("_project_and_scale_head_gates", x, weight, n_heads, 1.0)


def _logits_head_gate(*, x, weight, q_scale, out, n_heads, softmax_scale):
    tokens = torch.nn.functional.linear(x, weight[:n_heads]) if _OUTSIDE else x
    out[: len(x), :n_heads] = _run("_get_logits_head_gate", tokens, weight, n_heads, softmax_scale, q_scale[: len(x), :n_heads])


def _apply_q_scale_and_softmax_scale(*, gates, q_scale, out, n_heads, softmax_scale):
    tokens = len(gates)
    out[:tokens, :n_heads] = _run("_apply_q_scale_and_softmax_scale", gates[:, :n_heads], None, n_heads, softmax_scale,
                                  q_scale[:tokens, :n_heads])


_guarded = _upstream.function_of("_update_rope_guarded", {"torch": torch})
if not _guarded:
    MISSING["update_rope_guarded"] = "this SGLang has no _update_rope_guarded"


def _update_rope_guarded(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    base = memory.storage_offset()
    _guarded(memory.as_strided(shape, dst_strides, base + dst_offset), memory.as_strided(shape, src_strides, base + src_offset))


def supports(case):
    """What the guard is for: a rotary kernel that works in place ("src/dst tensors point to a single memory"), or one that
    returns tensors of its own."""
    fields = case["case"]
    if case["contract"] != "update_rope_guarded":
        return True
    if fields.get("source", "same") in ("same", "apart"):
        return True
    if 0 in (fields["tokens"], fields.get("heads", 2), fields.get("rope_dim", 4)):
        return True
    return "a source that is the destination or lies apart from it (the guard compares addresses alone)"


if _guarded:
    update_rope_guarded = _update_rope_guarded
if "logits_head_gate" in _there:
    logits_head_gate = _logits_head_gate
if "project_and_scale_head_gates" in _there:
    project_and_scale_head_gates = _project_and_scale_head_gates
if "apply_q_scale_and_softmax_scale" in _there:
    apply_q_scale_and_softmax_scale = _apply_q_scale_and_softmax_scale
