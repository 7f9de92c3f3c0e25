"""Planted faults of the head_gates family, each as small as a real one was."""

import torch
import triton
import triton.language as tl
from first_results import keep

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _gates(x, weight, n_heads):
    return x.float() @ weight[:n_heads].float().T * n_heads**-0.5


def _views(memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    base = memory.storage_offset()
    return (memory.as_strided(shape, dst_strides, base + dst_offset), memory.as_strided(shape, src_strides, base + src_offset))


def honest_project(*, x, weight, gates, n_heads):
    gates[: len(x), :n_heads] = _gates(x, weight, n_heads)


def honest_write_back(**call):
    dst, src = _views(**call)
    dst.copy_(src.clone())


# -- gates --------------------------------------------------------------------------------------------------------------


def no_head_scale(*, x, weight, gates, n_heads):
    """n_heads^-0.5 is forgotten."""
    gates[: len(x), :n_heads] = _gates(x, weight, n_heads) * n_heads**0.5


def bfloat16_result(*, x, weight, gates, n_heads):
    """The product is rounded to bfloat16 before it is widened (the path of #22232 on another device)."""
    gates[: len(x), :n_heads] = _gates(x, weight, n_heads).bfloat16().float()


def bfloat16_accumulator(*, x, weight, gates, n_heads):
    """Partial sums over 32 inputs are kept in bfloat16."""
    total = torch.zeros(len(x), n_heads, dtype=torch.bfloat16)
    for k in range(0, x.shape[1], 32):
        total = (total.float() + x[:, k : k + 32].float() @ weight[:n_heads, k : k + 32].float().T).bfloat16()
    gates[: len(x), :n_heads] = total.float() * n_heads**-0.5


def last_input_dropped(*, x, weight, gates, n_heads):
    """`<` for `<=`: the last input of an odd count is left out."""
    even = max(x.shape[1] // 2 * 2, 1)
    gates[: len(x), :n_heads] = _gates(x[:, :even], weight[:, :even], n_heads)


def spare_rows_zeroed(*, x, weight, gates, n_heads):
    """Rows behind the tokens are cleared."""
    gates.zero_()
    honest_project(x=x, weight=weight, gates=gates, n_heads=n_heads)


@triton.jit
def _rows(x, weight, out, hidden, x_pitch, weight_pitch, out_pitch, scale, BLOCK: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    a = tl.load(x + token * x_pitch + k, mask=k <= hidden, other=0.0).to(tl.float32)
    b = tl.load(weight + head * weight_pitch + k, mask=k < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * out_pitch + head, tl.sum(a * b, 0) * scale)


def reads_past_the_row(*, x, weight, gates, n_heads):
    """One input past the row; the other factor is 0 there, and 0 times NaN is not."""
    plain = all(t.stride(1) == 1 for t in (x, weight, gates)) and 0 < len(x) * n_heads <= 16 and x.shape[1] < 256
    if plain:
        _rows[(len(x), n_heads)](x, weight, gates, x.shape[1], x.stride(0), weight.stride(0), gates.stride(0), n_heads**-0.5,
                                 BLOCK=256)
    else:
        honest_project(x=x, weight=weight, gates=gates, n_heads=n_heads)


def scale_of_the_first_head(*, gates, q_scale, out, n_heads, softmax_scale):
    """The query's scale of head 0 is taken for every head."""
    out[: len(gates), :n_heads] = gates[:, :n_heads, None] * q_scale[: len(gates), :1] * softmax_scale


def no_q_scale(*, x, weight, q_scale, out, n_heads, softmax_scale):
    """The query's scale is forgotten."""
    out[: len(x), :n_heads, 0] = _gates(x, weight, n_heads) * softmax_scale


def heads_for_head_dim(*, x, weight, q_scale, out, n_heads, softmax_scale):
    """The softmax scale is made of the number of heads."""
    out[: len(x), :n_heads, 0] = _gates(x, weight, n_heads) * q_scale[: len(x), :n_heads, 0] * n_heads**-0.5


def head_scale_twice(*, gates, q_scale, out, n_heads, softmax_scale):
    """Gates that are scaled already are scaled again."""
    out[: len(gates), :n_heads] = gates[:, :n_heads, None].float() / n_heads * q_scale[: len(gates), :n_heads] * softmax_scale


def pitch_from_shape(*, gates, q_scale, out, n_heads, softmax_scale):
    """The rows of the gates are taken to lie without gaps."""
    tokens = len(gates)
    packed = gates.as_strided((tokens, n_heads), (n_heads, 1)) if gates.stride(0) >= n_heads else gates
    out[:tokens, :n_heads] = packed[:, :, None].float() * n_heads**-0.5 * q_scale[:tokens, :n_heads] * softmax_scale


def gates_through_bfloat16(*, gates, q_scale, out, n_heads, softmax_scale):
    """Float32 gates are rounded to bfloat16 on their way (SGLang #19041)."""
    out[: len(gates), :n_heads] = gates[:, :n_heads, None].bfloat16().float() * q_scale[: len(gates), :n_heads] * softmax_scale


def raw_gates_through_bfloat16(*, gates, q_scale, out, n_heads, softmax_scale):
    """The same for gates that are not scaled yet."""
    gates_through_bfloat16(gates=gates, q_scale=q_scale * n_heads**-0.5, out=out, n_heads=n_heads, softmax_scale=softmax_scale)


# -- results kept by address and size -----------------------------------------------------------------------------------


def kept_projection(*, x, weight, gates, n_heads):
    """The gates of the first call on these buffers."""
    keep(lambda: honest_project(x=x, weight=weight, gates=gates, n_heads=n_heads), gates[: len(x), :n_heads], (x, weight))


def kept_gates(*, x, weight, q_scale, out, n_heads, softmax_scale):
    """The same with both scales."""
    def fill():
        out[: len(x), :n_heads, 0] = _gates(x, weight, n_heads) * q_scale[: len(x), :n_heads, 0] * softmax_scale

    keep(fill, out[: len(x), :n_heads], (x, weight, q_scale), softmax_scale)


def _scaled_once(gates, q_scale, out, n_heads, factor):
    part = out[: len(gates), :n_heads]
    keep(lambda: part.copy_(gates[:, :, None].float() * q_scale * factor), part, (gates, q_scale), factor)


def kept_scales(*, gates, q_scale, out, n_heads, softmax_scale):
    """The scaled gates of the first call on these buffers."""
    _scaled_once(gates, q_scale, out, n_heads, softmax_scale)


def kept_raw_scales(*, gates, q_scale, out, n_heads, softmax_scale):
    """The same of gates that are not scaled yet."""
    _scaled_once(gates, q_scale, out, n_heads, n_heads**-0.5 * softmax_scale)


def kept_source(**call):
    """What the first call on this memory read is written again."""
    dst, src = _views(**call)
    values = src.clone()
    keep(lambda: dst.copy_(values), dst, (src,))


# -- writing back -------------------------------------------------------------------------------------------------------


def through_bfloat16(**call):
    """Numbers of every dtype pass through bfloat16."""
    dst, src = _views(**call)
    dst.copy_(src.clone().bfloat16().to(src.dtype))


def through_float16(**call):
    """Numbers of every dtype pass through float16."""
    dst, src = _views(**call)
    dst.copy_(src.clone().half().to(src.dtype))


def address_alone(**call):
    """SGLang's guard: views at one address pass for the same memory, whatever their strides."""
    dst, src = _views(**call)
    if dst.data_ptr() != src.data_ptr():
        dst.copy_(src.clone())


def no_guard(**call):
    """Cell after cell, over what is still to be read."""
    dst, src = _views(**call)
    tokens, heads, rope_dim = call["shape"]
    for t in range(tokens):
        for h in range(heads):
            for r in range(rope_dim):
                dst[t, h, r] = src[t, h, r].item()


def lost_in_a_copy(**call):
    """What is written is a contiguous copy of the destination."""
    dst, src = _views(**call)
    dst.contiguous().copy_(src.clone())


def whole_heads(**call):
    """The tail of every head is written as well."""
    dst, src = _views(**call)
    values = src.clone()
    dst.copy_(values)
    pitch, rope_dim = call["dst_strides"][1], call["shape"][2]
    if pitch > rope_dim and 0 not in call["shape"]:
        tail = call["memory"].as_strided((call["shape"][0],), (call["dst_strides"][0],),
                                         call["memory"].storage_offset() + call["dst_offset"] + rope_dim)
        tail.fill_(0)


@triton.jit
def _copy_rows(memory, dst, src, heads, dst_token, dst_head, src_token, src_head, src_lane, rope_dim, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    token, head = row // heads, row % heads
    value = tl.load(memory + src + token * src_token + head * src_head + lane * src_lane, mask=lane < rope_dim)
    tl.store(memory + dst + token * dst_token + head * dst_head + lane, value, mask=lane < rope_dim)


def a_program_per_row(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    """Rows are copied side by side, though a row may read what another one writes."""
    tokens, heads, rope_dim = shape
    if 0 < tokens * heads * rope_dim and tokens * heads <= 32 and rope_dim <= 64:
        _copy_rows[(tokens * heads,)](memory, dst_offset, src_offset, heads, dst_strides[0], dst_strides[1], *src_strides,
                                      rope_dim, BLOCK=64)
    elif 0 not in shape:
        honest_write_back(memory=memory, shape=shape, dst_offset=dst_offset, dst_strides=dst_strides, src_offset=src_offset,
                          src_strides=src_strides)
