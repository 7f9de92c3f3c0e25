"""The head_gates family in plain PyTorch: a second opinion on the oracles."""

import torch


def project_and_scale_head_gates(*, x, weight, gates, n_heads):
    """A float32 matrix product."""
    gates[: len(x), :n_heads] = x.float() @ weight[:n_heads, : x.shape[1]].float().T / n_heads**0.5


def logits_head_gate(*, x, weight, q_scale, out, n_heads, softmax_scale):
    """The scales folded into one factor per head."""
    factor = q_scale[: len(x), :n_heads, 0] * (softmax_scale / n_heads**0.5)
    out[: len(x), :n_heads, 0] = torch.einsum("tk,hk->th", x.float(), weight[:n_heads, : x.shape[1]].float()) * factor


def apply_q_scale_and_softmax_scale(*, gates, q_scale, out, n_heads, softmax_scale):
    """Scales first."""
    tokens = len(gates)
    out[:tokens, :n_heads] = (q_scale[:tokens, :n_heads] * softmax_scale) * gates[:, :n_heads, None]


def fused_logits_head_gate(*, gates, q_scale, out, n_heads, softmax_scale):
    """Scales first."""
    tokens = len(gates)
    out[:tokens, :n_heads] = q_scale[:tokens, :n_heads] * (softmax_scale * n_heads**-0.5) * gates[:, :n_heads, None].float()


def update_rope_guarded(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    """Always through a copy of the source."""
    if 0 in shape:
        return
    base = memory.storage_offset()
    source = memory.as_strided(shape, src_strides, base + src_offset).clone()
    memory.as_strided(shape, dst_strides, base + dst_offset).copy_(source)
