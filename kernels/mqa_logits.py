"""The mqa_logits family: the memory budget and the chunks on the host; scores and chunked top-k in Triton.

Nothing is allocated and nothing synchronises: chunks are row ranges of the given tensors, never copies of them.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BYTES_PER_LOGIT = 4
SKIP_BELOW = 8_000_000
TOTAL_FRACTION = 0.3
FP8 = (torch.float8_e4m3fn,)
FP32 = (torch.float32,)
COST = {name: {"launches": 64} for name in ("topk_ragged_chunked", "topk_paged_chunked")}  # one per chunk; 64 in a test


# -- host -----------------------------------------------------------------------------------------------------------------


class LogitsBudget:
    """How many bytes of logits a device may hold, measured by the first caller outside a capture and kept for good.

    Args:
        total_memory, free_memory: read a device's memory in bytes, by device index. Reading free memory synchronises, so it
            happens once per device and never in a capture.
        mem_fraction_static: share of memory taken by weights and KV cache, or None. free_fraction: share of free memory that
            logits may take.
    """

    def __init__(self, total_memory: Callable[[int], int], free_memory: Callable[[int], int],
                 mem_fraction_static: float | None, free_fraction: float):
        self._total_memory, self._free_memory = total_memory, free_memory
        self._mem_fraction_static, self._free_fraction = mem_fraction_static, free_fraction
        self._measured: dict[int, int] = {}

    def bytes(self, device: int, capturing: bool = False) -> int:
        """The budget, at least 1. In a capture the static cap, which is not kept: a later caller still measures."""
        if device in self._measured:
            return self._measured[device]
        cap = self._static_cap(self._total_memory(device))
        if capturing:
            return cap
        self._measured[device] = max(1, min(int(self._free_memory(device) * self._free_fraction), cap))
        return self._measured[device]

    def _static_cap(self, total: int) -> int:
        cap = int(total * TOTAL_FRACTION)
        if self._mem_fraction_static is not None:
            unclaimed = int(total * max(0.0, 1.0 - self._mem_fraction_static))
            cap = min(int(unclaimed * self._free_fraction), cap)
        return max(1, cap)


def mqa_logits_budget(*, queries, mem_fraction_static, free_fraction):
    """The budgets that one fresh `LogitsBudget` answers to `queries`, a list of [device, free, total, capturing].

    Raises:
        ValueError: a fraction that is negative or no number, or a reading that is needed and no byte count.
    """
    for name, fraction in (("mem_fraction_static", mem_fraction_static), ("free_fraction", free_fraction)):
        if not (isinstance(fraction, (int, float)) and fraction >= 0 or name != "free_fraction" and fraction is None):
            raise ValueError(f"{name} must be a number of at least 0, got {fraction!r}")
    now: dict[str, dict[int, int]] = {"free": {}, "total": {}}

    def reading(kind: str, device: int) -> int:
        checks.positive(f"queries: {kind} bytes of device {device}", now[kind][device], 0)
        return now[kind][device]

    budget = LogitsBudget(lambda d: reading("total", d), lambda d: reading("free", d), mem_fraction_static, free_fraction)
    answers = []
    for device, free, total, capturing in queries:
        now["free"][device], now["total"][device] = free, total
        answers.append(budget.bytes(device, capturing))
    return answers


def should_chunk_mqa_logits(*, num_q, num_k, budget):
    """[whether num_q x num_k fp32 logits exceed `budget` bytes, the budget]; [False, 0] below 8,000,000 logits, where the
    budget is not looked at.

    Raises:
        ValueError: a negative count, or a budget below 1 where one is needed.
    """
    checks.positive("num_q", num_q, 0)
    checks.positive("num_k", num_k, 0)
    if num_q * num_k < SKIP_BELOW:
        return [False, 0]
    checks.positive("budget", budget)
    return [BYTES_PER_LOGIT * num_q * num_k > budget, budget]


def mqa_logits_chunk_plan(*, num_q, num_k, budget):
    """Row ranges [start, stop), each of as many rows of num_k logits as `budget` bytes hold, and of one at least.

    Raises:
        ValueError: a negative count, or a budget below 1 (0 is should_chunk_mqa_logits' answer for 'no chunks').
    """
    checks.positive("num_q", num_q, 0)
    checks.positive("num_k", num_k, 0)
    checks.positive("budget", budget)
    max_rows = max(1, budget // max(1, BYTES_PER_LOGIT * num_k))
    return [[start, min(start + max_rows, num_q)] for start in range(0, num_q, max_rows)]


# -- scores ---------------------------------------------------------------------------------------------------------------


@jit
def _mqa_logits(q, k, k_scale, weights, ks, ke, logits, rows, keys, heads, head_dim, q_row, q_head, q_dim, k_row, k_dim,
                scale_step, weight_row, weight_head, ks_step, ke_step, out_row, out_step, CLEAN: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """One program per tile of rows and keys: the heads of its rows against its keys in one product."""
    key_blocks = tl.cdiv(keys, BLOCK_KEYS)
    first_row = (tl.program_id(0) // key_blocks).to(tl.int64) * BLOCK_ROWS
    key = (tl.program_id(0) % key_blocks).to(tl.int64) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    start = tl.load(ks + row * ks_step, mask=exists, other=0)
    stop = tl.minimum(tl.load(ke + row * ke_step, mask=exists, other=0), keys)
    seen = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
    wanted = tl.max(seen.to(tl.int32), 0) > 0
    scores = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        pair = tl.arange(0, BLOCK_ROWS * BLOCK_HEADS)
        pair_row, head = first_row + pair // BLOCK_HEADS, pair % BLOCK_HEADS
        dim = tl.arange(0, BLOCK_DIM)
        has_head = (pair_row < rows) & (head < heads)
        queries = tl.load(q + (pair_row * q_row + head * q_head)[:, None] + (dim * q_dim)[None, :],
                          mask=has_head[:, None] & (dim < head_dim)[None, :], other=0.0)
        tile = tl.load(k + (key * k_row)[None, :] + (dim * k_dim)[:, None],
                       mask=wanted[None, :] & (dim < head_dim)[:, None], other=0.0)
        # Every e4m3 number is an fp16 number, and fp16 products add up in fp32; fp8 tensor cores keep fewer bits.
        products = tl.dot(queries.to(tl.float16), tile.to(tl.float16))
        weight = tl.load(weights + pair_row * weight_row + head * weight_head, mask=has_head, other=0.0)
        weighted = tl.maximum(products, 0.0) * weight[:, None]
        scores = tl.sum(tl.reshape(weighted, (BLOCK_ROWS, BLOCK_HEADS, BLOCK_KEYS)), 1)
        scores *= tl.load(k_scale + key * scale_step, mask=wanted, other=0.0)[None, :]
    out = logits + (row * out_row)[:, None] + (key * out_step)[None, :]
    if CLEAN:
        tl.store(out, tl.where(seen, scores, float("-inf")), mask=exists[:, None] & (key < keys)[None, :])
    else:
        tl.store(out, scores, mask=seen)


@remembered
def mqa_logits(*, q, k, k_scale, weights, ks, ke, logits, clean_logits):
    """Fill `logits[:rows, :keys]`, with rows = len(ks) and keys = len(k_scale) (oracles/mqa_logits.py).

    Args:
        q: float8_e4m3fn [>= rows, heads, head_dim]; k: float8_e4m3fn [>= keys, head_dim]; weights: float32 [>= rows, heads];
            k_scale: float32 [keys]; ks, ke: int32 [rows] and [>= rows]; logits: float32 [>= rows, >= keys]. Any strides.
        clean_logits: write -inf where a row does not see a key; otherwise such cells keep what they hold.
    Raises:
        TypeError, ValueError: an argument is not as above, or logits shares memory with another; nothing was written.
    """
    rows, keys = _length("ks", ks), _length("k_scale", k_scale)
    device = checks.device_of("q", q)
    if not isinstance(clean_logits, bool):
        raise TypeError(f"clean_logits must be a bool, got {clean_logits!r}")
    for name, value, rank in (("q", q, 3), ("k", k, 2), ("weights", weights, 2)):
        if not isinstance(value, torch.Tensor) or value.dim() != rank:
            raise TypeError(f"{name} must be a {rank}-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    heads, head_dim = q.shape[1:]
    if weights.shape[1] != heads:
        raise ValueError(f"q and weights must have the same heads: q has {heads}, weights has {weights.shape[1]}")
    if k.shape[1] != head_dim:
        raise ValueError(f"q and k must have the same head_dim: q has {head_dim}, k has {k.shape[1]}")
    checks.positive("heads of q", heads)
    checks.positive("head_dim of q", head_dim)
    inputs = {"q": (q, FP8, (rows, heads, head_dim)), "k": (k, FP8, (keys, head_dim)), "k_scale": (k_scale, FP32, (keys,)),
              "weights": (weights, FP32, (rows, heads)), "ks": (ks, checks.INT32, (rows,)), "ke": (ke, checks.INT32, (rows,))}
    for name, (value, dtypes, least) in inputs.items():
        checks.tensor(name, value, dtypes, least, device)
    checks.tensor("logits", logits, FP32, (rows, keys), device)
    checks.own_cells("logits", logits)
    checks.apart({"logits": logits}, {n: v for n, (v, _, _) in inputs.items()})
    if rows == 0 or keys == 0:
        return
    block_heads = triton.next_power_of_2(heads)
    block_rows, block_keys = max(1, 128 // block_heads), 128
    programs = triton.cdiv(rows, block_rows) * triton.cdiv(keys, block_keys)
    _mqa_logits[(programs,)](
        q, k, k_scale, weights, ks, ke, logits, rows, keys, heads, head_dim, *q.stride(), *k.stride(), k_scale.stride(0),
        *weights.stride(), ks.stride(0), ke.stride(0), *logits.stride(), CLEAN=clean_logits, BLOCK_ROWS=block_rows,
        BLOCK_HEADS=block_heads, BLOCK_KEYS=block_keys, BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), num_warps=8)


def _length(name: str, value) -> int:
    """The length of a 1-D tensor that sets a size."""
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        raise TypeError(f"{name} must be a 1-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return value.shape[0]


# -- chunked top-k --------------------------------------------------------------------------------------------------------


@triton.jit
def _sort_key(score):
    """Unsigned integers in the order of the scores (-0 below 0)."""
    bits = score.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending ^ -2147483648).to(tl.uint32, bitcast=True)


@jit
def _topk(logits, ks, lengths, name, owner, out, first_row, rows, keys, topk, logit_row, logit_step, ks_step, length_step,
          name_row, name_step, owner_step, names, owners, out_row, out_step, PAGED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row. A radix search over the scores' bits, eight at a time, finds the score of the last key that is
    selected, and how many keys of just that score are; one more pass stores the selected keys in ascending order.

    Lengths and owners that reach outside a tensor are cut, so that no row harms memory.
    """
    row = first_row + tl.program_id(0).to(tl.int64)
    real = row < rows
    lanes = tl.arange(0, BLOCK)
    far_lanes = lanes.to(tl.int64)
    first = tl.load(ks + row * ks_step, mask=real, other=-1)
    length = tl.load(lengths + row * length_step, mask=real, other=0)
    length = tl.where(first >= 0, tl.minimum(length, keys - first), 0)
    if PAGED:
        request = tl.load(owner + row * owner_step, mask=real, other=-1).to(tl.int64)
        length = tl.where((request >= 0) & (request < owners), tl.minimum(length, names), 0)
        slots = name + request * name_row
    else:
        base = tl.load(name + row * name_row, mask=real, other=0)
    ranked = length > topk  # otherwise all are selected as they are, and the scores are not read
    scores = logits + row * logit_row + first.to(tl.int64) * logit_step
    first_key = _sort_key(tl.load(scores + far_lanes * logit_step, mask=ranked & (lanes < length), other=0.0))

    remaining = tl.zeros((), tl.int32) + topk
    last = tl.zeros((), tl.uint32)
    if ranked:
        bins = tl.arange(0, 256)
        for digit in tl.static_range(4):
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, length, BLOCK):
                candidate = start + lanes < length
                key = first_key
                if start > 0:
                    key = _sort_key(tl.load(scores + (start + far_lanes) * logit_step, mask=candidate, other=0.0))
                key >>= 24 - 8 * digit
                if digit > 0:
                    candidate &= (key >> 8) == last
                counts += tl.histogram((key & 255).to(tl.int32), 256, mask=candidate)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            found = tl.sum((above >= remaining).to(tl.int32), 0)
            remaining -= tl.sum(tl.where(bins > found, counts, 0), 0)
            last = (last << 8) | found.to(tl.uint32)

    stored = tl.zeros((), tl.int32)
    equal_before = tl.zeros((), tl.int32)
    target = out + row * out_row
    for start in range(0, length, BLOCK):
        take = start + lanes < length
        if ranked:
            key = first_key
            if start > 0:
                key = _sort_key(tl.load(scores + (start + far_lanes) * logit_step, mask=take, other=0.0))
            equal = (take & (key == last)).to(tl.int32)
            take &= (key > last) | ((equal > 0) & (equal_before + tl.cumsum(equal, 0) <= remaining))
            equal_before += tl.sum(equal, 0)
        taken = take.to(tl.int32)
        place = stored + tl.cumsum(taken, 0) - 1
        if PAGED:
            value = tl.load(slots + (start + far_lanes) * name_step, mask=take, other=-1)
        else:
            value = base + start + lanes
        tl.store(target + place.to(tl.int64) * out_step, value, mask=take)
        stored += tl.sum(taken, 0)
    for start in range(0, topk, BLOCK):
        column = start + lanes
        tl.store(target + column.to(tl.int64) * out_step, tl.full((BLOCK,), -1, tl.int32),
                 mask=(column >= stored) & (column < topk))


@remembered
def topk_ragged_chunked(*, logits, ks, lengths, topk_indices_offset, topk_result, token_nums, index_topk, max_rows):
    """Fill `topk_result[:token_nums, :index_topk]` with places in the flattened KV, one launch per `max_rows` rows.

    Args:
        logits: float32 [>= rows, keys], with rows = len(ks); ks, lengths, topk_indices_offset: int32 [>= rows]; topk_result:
            int32 [>= token_nums, >= index_topk]. Any strides.
        token_nums: at least rows; rows past `rows` become -1. index_topk, max_rows: at least 1.
    Raises:
        TypeError, ValueError: an argument is not as above, or topk_result shares memory with another; nothing was written.
    """
    rows = _length("ks", ks)
    device = checks.device_of("logits", logits)
    checks.tensor("topk_indices_offset", topk_indices_offset, checks.INT32, (rows,), device)
    _check_topk(rows, device, dict(logits=logits, ks=ks, lengths=lengths, topk_indices_offset=topk_indices_offset), topk_result,
                token_nums, index_topk, max_rows)
    _launch(rows, logits, ks, lengths, topk_indices_offset, (topk_indices_offset.stride(0), 0), topk_indices_offset,
            topk_result, token_nums, index_topk, max_rows, names=0, owners=0, paged=False)


@remembered
def topk_paged_chunked(*, logits, ks, lengths, page_table_1, token_to_batch_idx, topk_result, token_nums, index_topk, max_rows):
    """Fill `topk_result[:token_nums, :index_topk]` with KV slots, one launch per `max_rows` rows. The page table is read in
    place: no rows of it are gathered. Arguments as for `topk_ragged_chunked`, and

    Args:
        page_table_1: int32 [requests, width], any strides. token_to_batch_idx: int32 [>= rows], any stride.
    """
    rows = _length("ks", ks)
    device = checks.device_of("logits", logits)
    checks.tensor("page_table_1", page_table_1, checks.INT32, (0, 0), device)
    checks.tensor("token_to_batch_idx", token_to_batch_idx, checks.INT32, (rows,), device)
    inputs = dict(logits=logits, ks=ks, lengths=lengths, page_table_1=page_table_1, token_to_batch_idx=token_to_batch_idx)
    _check_topk(rows, device, inputs, topk_result, token_nums, index_topk, max_rows)
    _launch(rows, logits, ks, lengths, page_table_1, page_table_1.stride(), token_to_batch_idx, topk_result, token_nums,
            index_topk, max_rows, names=page_table_1.shape[1], owners=page_table_1.shape[0], paged=True)


def _check_topk(rows, device, inputs, topk_result, token_nums, index_topk, max_rows) -> None:
    """Refuse what the kernel could not honour."""
    checks.positive("token_nums", token_nums, rows)
    checks.positive("index_topk", index_topk)
    checks.positive("max_rows", max_rows)
    checks.tensor("logits", inputs["logits"], FP32, (rows, 0), device)
    checks.tensor("ks", inputs["ks"], checks.INT32, (rows,), device)
    checks.tensor("lengths", inputs["lengths"], checks.INT32, (rows,), device)
    checks.tensor("topk_result", topk_result, checks.INT32, (token_nums, index_topk), device)
    checks.own_cells("topk_result", topk_result)
    checks.apart({"topk_result": topk_result}, inputs)


def _launch(rows, logits, ks, lengths, name, name_strides, owner, topk_result, token_nums, index_topk, max_rows, names, owners,
            paged) -> None:
    """One launch per chunk of rows; the padding comes with the last one."""
    start = 0
    while start < token_nums:
        stop = start + max_rows if start + max_rows < rows else token_nums
        _topk[(stop - start,)](
            logits, ks, lengths, name, owner, topk_result, start, rows, logits.shape[1], index_topk, *logits.stride(),
            ks.stride(0), lengths.stride(0), *name_strides, owner.stride(0), names, owners, *topk_result.stride(),
            PAGED=paged, BLOCK=256 if logits.shape[1] <= 1024 else 1024)
        start = stop
