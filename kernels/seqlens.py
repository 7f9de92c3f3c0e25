"""Triton kernels of the seqlens family: one launch each, no synchronisation, nothing allocated."""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered


@jit
def _seqlens_expand(extend_seq_lens, seq_lens, out, extend_stride, seq_stride, total_len, BLOCK: tl.constexpr):
    """One program per request: sum the lengths before it, then write its ramp block by block."""
    request = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros((), tl.int32)
    for start in range(0, request, BLOCK):
        before = start + lanes
        lengths = tl.load(extend_seq_lens + before * extend_stride, mask=before < request, other=0)
        first += tl.sum(tl.maximum(lengths.to(tl.int32), 0), 0)
    extend = tl.load(extend_seq_lens + request * extend_stride).to(tl.int32)
    visible = tl.load(seq_lens + request * seq_stride).to(tl.int32) - extend + 1
    for start in range(0, extend, BLOCK):
        token = start + lanes
        row = first + token
        tl.store(out + row, tl.maximum(visible + token, 0), mask=(token < extend) & (row < total_len))


@remembered
def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Fill `seqlens_expanded[:total_len]` with the keys that each query token sees (oracles/seqlens.py).

    Args:
        extend_seq_lens, seq_lens: int32 or int64 [bs], any stride.
        seqlens_expanded: int32 [>= total_len], unit stride.
        total_len: sum of extend_seq_lens. max_q_len: accepted for the contract's sake; this kernel needs no bound.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    bs, device = _length("extend_seq_lens", extend_seq_lens), checks.device_of("extend_seq_lens", extend_seq_lens)
    checks.positive("total_len", total_len, 0)
    checks.tensor("extend_seq_lens", extend_seq_lens, checks.INT, (bs,), device)
    checks.tensor("seq_lens", seq_lens, checks.INT, (bs,), device)
    checks.tensor("seqlens_expanded", seqlens_expanded, checks.INT32, (total_len,), device, unit_stride=True)
    checks.own_cells("seqlens_expanded", seqlens_expanded)
    checks.apart({"seqlens_expanded": seqlens_expanded}, {"extend_seq_lens": extend_seq_lens, "seq_lens": seq_lens})
    if bs == 0:
        return
    _seqlens_expand[(bs,)](extend_seq_lens, seq_lens, seqlens_expanded, extend_seq_lens.stride(0), seq_lens.stride(0),
                           total_len, BLOCK=128)


@jit
def _cu_seqlens(lengths, out, stride, n, BLOCK: tl.constexpr):
    """One program: block sums with a carry. Slot 0 is the first block's zero."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.int32)
    tl.store(out, total)
    for start in range(0, n, BLOCK):
        i = start + lanes
        x = tl.load(lengths + i * stride, mask=i < n, other=0)
        tl.store(out + 1 + i, total + tl.cumsum(x, 0), mask=i < n)
        total += tl.sum(x, 0)


@remembered
def cu_seqlens(*, seqlens, cu_seqlens):
    """Fill `cu_seqlens[:bs + 1]` with the prefix sums of `seqlens`.

    Args:
        seqlens: int32 [bs], any stride. cu_seqlens: int32 [>= bs + 1], unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    bs, device = _length("seqlens", seqlens), checks.device_of("seqlens", seqlens)
    checks.tensor("seqlens", seqlens, checks.INT32, (bs,), device)
    checks.tensor("cu_seqlens", cu_seqlens, checks.INT32, (bs + 1,), device, unit_stride=True)
    checks.own_cells("cu_seqlens", cu_seqlens)
    checks.apart({"cu_seqlens": cu_seqlens}, {"seqlens": seqlens})
    _cu_seqlens[(1,)](seqlens, cu_seqlens, seqlens.stride(0), bs, BLOCK=1024)


# Knowing that its vectors are aligned spares the compiler a third of the instructions.
@triton.jit(do_not_specialize=["stride", "rows", "padded", "topk"])
def _nsa_cache_seqlens(expanded, out, cu, stride, rows, padded, topk, BLOCK: tl.constexpr):
    """One program: clip, pad and sum in the same pass."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.int32)
    tl.store(cu, total)
    for start in range(0, padded, BLOCK):
        i = start + lanes
        x = tl.minimum(tl.load(expanded + i * stride, mask=i < rows, other=0), topk)
        tl.store(out + i, x, mask=i < padded)
        tl.store(cu + 1 + i, total + tl.cumsum(x, 0), mask=i < padded)
        total += tl.sum(x, 0)


@remembered
def nsa_cache_seqlens(*, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """Clip `seqlens_expanded` at `index_topk`, pad it with zeros to `padded_rows` rows, and sum it up.

    Args:
        seqlens_expanded: int32 [rows], any stride. nsa_cache_seqlens: int32 [>= n], nsa_cu_seqlens_k: int32 [>= n + 1],
        both unit stride, with n = max(rows, padded_rows).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    rows, device = _length("seqlens_expanded", seqlens_expanded), checks.device_of("seqlens_expanded", seqlens_expanded)
    checks.positive("index_topk", index_topk, 0)
    checks.positive("padded_rows", padded_rows, 0)
    padded = max(rows, padded_rows)
    checks.tensor("seqlens_expanded", seqlens_expanded, checks.INT32, (rows,), device)
    outputs = {"nsa_cache_seqlens": (nsa_cache_seqlens, padded), "nsa_cu_seqlens_k": (nsa_cu_seqlens_k, padded + 1)}
    for name, (value, least) in outputs.items():
        checks.tensor(name, value, checks.INT32, (least,), device, unit_stride=True)
        checks.own_cells(name, value)
    checks.apart({n: v for n, (v, _) in outputs.items()}, {"seqlens_expanded": seqlens_expanded})
    _nsa_cache_seqlens[(1,)](seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, seqlens_expanded.stride(0), rows, padded,
                             index_topk, BLOCK=1024)


def cal_padded_tokens(*, global_num_tokens, dp_rank, dp_size, attn_tp_size, attn_cp_size, extend_in_batch, round_robin):
    """The row count that metadata is padded to on this rank (host integers only).

    Raises:
        ValueError: a size below 1, `global_num_tokens` missing, or `dp_rank` outside it.
    """
    if not global_num_tokens:
        raise ValueError(f"global_num_tokens must hold one count per data-parallel rank, got {global_num_tokens!r}")
    for name, size in (("dp_size", dp_size), ("attn_tp_size", attn_tp_size), ("attn_cp_size", attn_cp_size)):
        checks.positive(name, size)
    if len(global_num_tokens) > 1 and not 0 <= dp_rank < len(global_num_tokens):
        raise ValueError(f"dp_rank must be below {len(global_num_tokens)}, got {dp_rank}")

    def up(count: int, multiple: int) -> int:
        return (count + multiple - 1) // multiple * multiple

    counts = [up(up(n, attn_tp_size), attn_cp_size) for n in global_num_tokens]
    keep_own = (extend_in_batch and dp_size > 1) or max(counts) * dp_size > 2 * sum(counts)
    rows = counts[dp_rank if len(counts) > 1 else 0] if keep_own else max(counts)
    return up(rows, attn_cp_size) // attn_cp_size if round_robin else rows


def _length(name: str, value) -> int:
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        raise TypeError(f"{name} must be a 1-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return value.shape[0]
