"""Triton kernels of the head_gates family: one launch each, no synchronisation."""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BFLOAT16 = (torch.bfloat16,)
FLOAT32 = (torch.float32,)
COPIED = (torch.bfloat16, torch.float32, torch.float16)
BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HIDDEN, BLOCK_REST, WARPS = 16, 16, 1024, 128, 4
SCALED = 256  # gates that one program scales
MOST_OF_A_SIZE = 2**31 - 2**12  # heads, and lanes: a program counts them in 32 bits
IN_REGISTERS = 2048  # elements of overlapping views that one program holds at a time
# Larger overlapping views are copied aside first.
COST = {"update_rope_guarded": {"operations": ["aten.clone.default"]}}


@jit
def _project(x, weight, q_scale, out, tokens, hidden, heads, aligned, x_stride_0, x_stride_1, weight_stride_0,
             weight_stride_1, q_stride_0, q_stride_1, out_stride_0, out_stride_1, head_scale, softmax_scale,
             HAS_Q: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
             BLOCK_REST: tl.constexpr, WARPS: tl.constexpr):
    """One program per tile of tokens and heads. A bfloat16 number is a TF32 number, so the products are exact.

    Whole blocks of rows that begin at multiples of 16 bytes come first: their loads can be sent ahead, and each warp sums up
    its own part of a block, so that no product waits for all those before it."""
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    whole = tl.where(aligned != 0, hidden, 0) // BLOCK_HIDDEN * BLOCK_HIDDEN
    first = tl.multiple_of(x + token[None, :, None] * x_stride_0, [16, 16, 16])
    second = tl.multiple_of(weight + head[None, None, :] * weight_stride_0, [16, 16, 16])
    lane = tl.arange(0, BLOCK_HIDDEN // WARPS)
    parts = tl.zeros((WARPS, BLOCK_TOKENS, BLOCK_HEADS), tl.float32)
    for start in range(0, whole, BLOCK_HIDDEN):
        k = start + tl.arange(0, WARPS)[:, None, None] * (BLOCK_HIDDEN // WARPS)
        rows = tl.load(first + (k + lane[None, None, :]), mask=(token < tokens)[None, :, None], other=0.0)
        columns = tl.load(second + (k + lane[None, :, None]), mask=(head < heads)[None, None, :], other=0.0)
        parts = tl.dot(rows.to(tl.float32), columns.to(tl.float32), parts, input_precision="tf32")
    gates = tl.sum(parts, 0)
    for start in range(whole, hidden, BLOCK_REST):
        k = (start + tl.arange(0, BLOCK_REST)).to(tl.int64)
        rows = tl.load(x + token[:, None] * x_stride_0 + k[None, :] * x_stride_1,
                       mask=(token < tokens)[:, None] & (k < hidden)[None, :], other=0.0)
        columns = tl.load(weight + head[None, :] * weight_stride_0 + k[:, None] * weight_stride_1,
                          mask=(head < heads)[None, :] & (k < hidden)[:, None], other=0.0)
        gates = tl.dot(rows.to(tl.float32), columns.to(tl.float32), gates, input_precision="tf32")
    mask = (token < tokens)[:, None] & (head < heads)[None, :]
    gates = gates * head_scale
    if HAS_Q:
        q = tl.load(q_scale + token[:, None] * q_stride_0 + head[None, :] * q_stride_1, mask=mask, other=0.0)
        gates = gates * q * softmax_scale
    tl.store(out + token[:, None] * out_stride_0 + head[None, :] * out_stride_1, gates, mask=mask)


@jit
def _scale(gates, q_scale, out, tokens, heads, gate_stride_0, gate_stride_1, q_stride_0, q_stride_1, out_stride_0,
           out_stride_1, head_scale, softmax_scale, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """One program per tile of tokens and heads."""
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :]
    mask = (token < tokens) & (head < heads)
    value = tl.load(gates + token * gate_stride_0 + head * gate_stride_1, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(q_scale + token * q_stride_0 + head * q_stride_1, mask=mask, other=0.0)
    tl.store(out + token * out_stride_0 + head * out_stride_1, value * head_scale * q * softmax_scale, mask=mask)


@remembered
def project_and_scale_head_gates(*, x, weight, gates, n_heads):
    """Fill `gates[:tokens, :n_heads]` with x times weight transposed, times n_heads^-0.5 (oracles/head_gates.py).

    Args:
        x: bfloat16 [tokens, hidden], weight: bfloat16 [>= n_heads, >= hidden], any strides.
        gates: float32 [>= tokens, >= n_heads], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    tokens, hidden, device = _check_projection(x, weight, n_heads)
    checks.tensor("gates", gates, FLOAT32, (tokens, n_heads), device)
    checks.own_cells("gates", gates)
    checks.apart({"gates": gates}, {"x": x, "weight": weight})
    _launch_projection(x, weight, None, gates, tokens, hidden, n_heads, 1.0)


@remembered
def logits_head_gate(*, x, weight, q_scale, out, n_heads, softmax_scale):
    """The same, times q_scale, times softmax_scale, into `out[:tokens, :n_heads, 0]`.

    Args:
        x: bfloat16 [tokens, hidden], weight: bfloat16 [>= n_heads, >= hidden], any strides.
        q_scale: float32 [>= tokens, >= n_heads, 1], out: float32 [>= tokens, >= n_heads, 1], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    tokens, hidden, device = _check_projection(x, weight, n_heads)
    _check_scaling(tokens, n_heads, q_scale, out, softmax_scale, device)
    checks.apart({"out": out}, {"x": x, "weight": weight, "q_scale": q_scale})
    _launch_projection(x, weight, q_scale, out, tokens, hidden, n_heads, softmax_scale)


@remembered
def apply_q_scale_and_softmax_scale(*, gates, q_scale, out, n_heads, softmax_scale):
    """Fill `out[:tokens, :n_heads, 0]` with gates times q_scale times softmax_scale.

    Args:
        gates: float32 [tokens, >= n_heads], q_scale: float32 [>= tokens, >= n_heads, 1], any strides.
        out: float32 [>= tokens, >= n_heads, 1], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _fill(gates, FLOAT32, q_scale, out, n_heads, softmax_scale, 1.0)


@remembered
def fused_logits_head_gate(*, gates, q_scale, out, n_heads, softmax_scale):
    """The same on raw gates (float32 or bfloat16), which are scaled by n_heads^-0.5 first."""
    _fill(gates, (*FLOAT32, *BFLOAT16), q_scale, out, n_heads, softmax_scale, None)


def _fill(gates, dtypes, q_scale, out, n_heads, softmax_scale, head_scale: float | None) -> None:
    device = checks.device_of("gates", gates)
    checks.positive("n_heads", n_heads)
    checks.tensor("gates", gates, dtypes, (0, n_heads), device)
    tokens = gates.shape[0]
    _check_scaling(tokens, n_heads, q_scale, out, softmax_scale, device)
    checks.apart({"out": out}, {"gates": gates, "q_scale": q_scale})
    if tokens == 0:
        return
    scale = n_heads**-0.5 if head_scale is None else head_scale
    block = min(triton.next_power_of_2(n_heads), 64)
    rows = SCALED // block
    _scale[(triton.cdiv(tokens, rows), triton.cdiv(n_heads, block))](
        gates, q_scale, out, tokens, n_heads, gates.stride(0), gates.stride(1), q_scale.stride(0), q_scale.stride(1),
        out.stride(0), out.stride(1), scale, softmax_scale, BLOCK_TOKENS=rows, BLOCK_HEADS=block)


def _check_projection(x, weight, n_heads) -> tuple[int, int, torch.device]:
    device = checks.device_of("x", x)
    checks.positive("n_heads", n_heads)
    checks.tensor("x", x, BFLOAT16, (0, 0), device)
    checks.tensor("weight", weight, BFLOAT16, (n_heads, x.shape[1]), device)
    return x.shape[0], x.shape[1], device


def _check_scaling(tokens, n_heads, q_scale, out, softmax_scale, device) -> None:
    if not isinstance(softmax_scale, float):
        raise TypeError(f"softmax_scale must be a float, got {softmax_scale!r}")
    checks.tensor("q_scale", q_scale, FLOAT32, (tokens, n_heads, 1), device)
    checks.tensor("out", out, FLOAT32, (tokens, n_heads, 1), device)
    checks.own_cells("out", out)


def _launch_projection(x, weight, q_scale, out, tokens, hidden, heads, softmax_scale) -> None:
    if tokens == 0:
        return
    q = out if q_scale is None else q_scale
    _project[(triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(heads, BLOCK_HEADS))](
        x, weight, q, out, tokens, hidden, heads, checks.rows_aligned(x, weight), x.stride(0), x.stride(1), weight.stride(0),
        weight.stride(1), q.stride(0), q.stride(1), out.stride(0), out.stride(1), heads**-0.5, softmax_scale,
        HAS_Q=q_scale is not None, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HEADS=BLOCK_HEADS, BLOCK_HIDDEN=BLOCK_HIDDEN,
        BLOCK_REST=BLOCK_REST, WARPS=WARPS, num_warps=WARPS, num_stages=2)


# -- writing back -------------------------------------------------------------------------------------------------------


@jit
def _copy(dst, src, cells, heads, rope_dim, dst_token, dst_head, dst_lane, src_token, src_head, src_lane,
          BLOCK: tl.constexpr):
    """BLOCK cells per program. All its loads come before its first store, so one program may copy between views that
    overlap; several programs may not."""
    # Cells are counted from the first row that the program meets, rows from the first token, so that 32 bits do: a division in
    # 64 bits is many instructions.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    cell = (start % rope_dim).to(tl.int32) + tl.arange(0, BLOCK)
    row = (start // rope_dim % heads).to(tl.int32) + cell // rope_dim
    token = start // rope_dim // heads + row // heads
    head, lane = (row % heads).to(tl.int64), (cell % rope_dim).to(tl.int64)
    copied = start + tl.arange(0, BLOCK) < cells
    value = tl.load(src + token * src_token + head * src_head + lane * src_lane, mask=copied)
    tl.debug_barrier()
    tl.store(dst + token * dst_token + head * dst_head + lane * dst_lane, value, mask=copied)


def write_back(dst: torch.Tensor, src: torch.Tensor) -> None:
    """`dst` = what `src` was before the call, though they may share memory in any way.

    The same view is left alone. Views that lie apart, and overlapping ones of up to 2,048 elements, take one launch and no
    allocation; larger overlapping ones are copied aside first.

    Args:
        dst, src: [tokens, heads, rope_dim] of one dtype, any strides; no two cells of dst at one address.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device = checks.device_of("dst", dst)
    checks.tensor("dst", dst, COPIED, (0, 0, 0), device)
    checks.tensor("src", src, (dst.dtype,), tuple(dst.shape), device)
    if src.shape != dst.shape:
        raise ValueError(f"src must have the shape of dst, {tuple(dst.shape)}, got {tuple(src.shape)}")
    if max(dst.shape[1:]) > MOST_OF_A_SIZE:
        raise ValueError(f"dst must have at most {MOST_OF_A_SIZE} heads and lanes, got {tuple(dst.shape)}")
    checks.own_cells("dst", dst)
    if dst.numel() == 0 or _same_view(dst, src):
        return
    overlapping = checks.meet(dst, src)
    if overlapping and dst.numel() > IN_REGISTERS:
        src, overlapping = src.clone(), False
    block = triton.next_power_of_2(dst.numel()) if overlapping else 1024
    _copy[(triton.cdiv(dst.numel(), block),)](dst, src, dst.numel(), dst.shape[1], dst.shape[2], *dst.stride(), *src.stride(),
                                              BLOCK=block)


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One address is not enough: the strides must agree wherever there is more than one index."""
    strides = zip(a.shape, a.stride(), b.stride())
    return a.data_ptr() == b.data_ptr() and all(x == y for n, x, y in strides if n > 1)


@remembered
def update_rope_guarded(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    """`write_back` between two views of `memory`.

    Args:
        memory: bfloat16, float16 or float32 [cells], unit stride.
        shape: three sizes. dst_offset, src_offset: elements from the start of `memory`. dst_strides, src_strides: three each.
    Raises:
        TypeError, ValueError: an argument is not as above, or a view leaves `memory`; nothing was written.
    """
    device = checks.device_of("memory", memory)
    checks.tensor("memory", memory, COPIED, (0,), device, unit_stride=True)
    checks.apart({"memory": memory}, {})
    write_back(_view(memory, "dst", shape, dst_offset, dst_strides), _view(memory, "src", shape, src_offset, src_strides))


def _view(memory: torch.Tensor, name: str, shape, offset: int, strides) -> torch.Tensor:
    for what, sizes in (("shape", shape), (f"{name}_strides", strides)):
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 3:
            raise TypeError(f"{what} must be three integers, got {sizes!r}")
        for size in sizes:
            checks.positive(what, size, 0)
    checks.positive(f"{name}_offset", offset, 0)
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides)) + 1
    if 0 not in shape and reach > memory.shape[0]:
        raise ValueError(f"memory must hold the {name} view, which reaches element {reach}; it has {memory.shape[0]} elements")
    return memory.as_strided(shape, strides, memory.storage_offset() + offset if 0 not in shape else 0)
