"""Triton kernels of the kv_indices family: one launch each, no synchronisation, nothing allocated.

Every request has a column of programs, which share its tokens block by block. Rows of the request table, of the outputs and
their sums are addressed in 64 bits. What only the device knows (a slot outside the table, a row too narrow) is masked: then
cells are missing, but no other tensor and no other row is touched.
"""

import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BLOCK, DRAFT_BLOCK, BLOCK_REQUESTS, MOST_SPLITS = 1024, 512, 32, 32
MOST_PAGE_SIZE = 4096


@triton.jit
def _tokens_of(req_pool_indices, lens, starts, request, slots, columns, pool_stride, len_stride, start_stride,
               HAS_START: tl.constexpr):
    """A request's slot, first column, and how many tokens it has in the table; none for a slot that does not exist."""
    slot = tl.load(req_pool_indices + request * pool_stride).to(tl.int64)
    length = tl.load(lens + request * len_stride).to(tl.int64)
    start = tl.zeros((), tl.int64)
    if HAS_START:
        start = tl.load(starts + request * start_stride).to(tl.int64)
    there = (slot >= 0) & (slot < slots) & (start >= 0)
    return slot, start, tl.where(there, tl.minimum(length, columns - start), 0).to(tl.int32)


@jit
def _flashinfer(req_to_token, req_pool_indices, lens, indptr, starts, out, slots, columns, capacity, row_stride,
                column_stride, pool_stride, len_stride, indptr_stride, start_stride, HAS_START: tl.constexpr,
                BLOCK: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    slot, start, length = _tokens_of(req_pool_indices, lens, starts, request, slots, columns, pool_stride, len_stride,
                                     start_stride, HAS_START)
    first = tl.load(indptr + request * indptr_stride).to(tl.int64)
    source = req_to_token + slot * row_stride
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for begin in range(0, length - tl.program_id(1) * BLOCK, tl.num_programs(1) * BLOCK):
        token = (begin + lanes).to(tl.int64)
        held = (token < length) & (first + token >= 0) & (first + token < capacity)
        tokens = tl.load(source + (start + token) * column_stride, mask=held, other=0)
        tl.store(out + first + token, tokens, mask=held)


@remembered
def create_flashinfer_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                                 bs):
    """Gather every request's KV slots into one ragged list (oracles/kv_indices.py has the contract).

    Args:
        req_to_token: int32 [slots, columns], any strides.
        req_pool_indices, paged_kernel_lens [>= bs], kv_indptr [>= bs + 1]: int32 or int64, any stride.
        kv_start_idx: likewise [>= bs], or None where every request starts at column 0.
        kv_indices: int32 or int64, unit stride. Ranges that it does not hold are cut.
    Raises:
        TypeError, ValueError: an argument is not as above, or kv_indices shares memory with another; nothing was written.
    """
    checks.positive("bs", bs, 0)
    inputs = dict(req_to_token=req_to_token, req_pool_indices=req_pool_indices, paged_kernel_lens=paged_kernel_lens,
                  kv_indptr=kv_indptr, kv_start_idx=kv_start_idx)
    device = _check_inputs(inputs, {"kv_indptr": bs + 1}, bs)
    checks.tensor("kv_indices", kv_indices, checks.INT, (0,), device, unit_stride=True)
    checks.own_cells("kv_indices", kv_indices)
    checks.apart({"kv_indices": kv_indices}, _given(inputs))
    slots, columns = req_to_token.shape
    if bs == 0:
        return
    starts = paged_kernel_lens if kv_start_idx is None else kv_start_idx
    splits = _splits(min(columns, kv_indices.numel()), BLOCK)
    _flashinfer[(bs, splits)](
        req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, starts, kv_indices, slots, columns, kv_indices.numel(),
        req_to_token.stride(0), req_to_token.stride(1), req_pool_indices.stride(0), paged_kernel_lens.stride(0),
        kv_indptr.stride(0), starts.stride(0), HAS_START=kv_start_idx is not None, BLOCK=BLOCK)


@jit
def _flashmla(req_to_token, req_pool_indices, lens, starts, out, slots, columns, width, row_stride, column_stride,
              pool_stride, len_stride, start_stride, out_row_stride, out_column_stride, PAGE_SIZE: tl.constexpr,
              HAS_START: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    slot, start, length = _tokens_of(req_pool_indices, lens, starts, request, slots, columns, pool_stride, len_stride,
                                     start_stride, HAS_START)
    pages = tl.minimum((length + PAGE_SIZE - 1) // PAGE_SIZE, width)
    source = req_to_token + slot * row_stride
    target = out + request * out_row_stride
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for begin in range(0, pages - tl.program_id(1) * BLOCK, tl.num_programs(1) * BLOCK):
        page = (begin + lanes).to(tl.int64)
        tokens = tl.load(source + (start + page * PAGE_SIZE) * column_stride, mask=page < pages, other=0)
        tl.store(target + page * out_column_stride, tokens // PAGE_SIZE, mask=page < pages)


@remembered
def create_flashmla_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, kv_indices, bs, page_size):
    """Fill a block table with the page of every `page_size`-th token.

    Args:
        req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx: as for `create_flashinfer_kv_indices`.
        kv_indices: int32 [>= bs, width], any strides. Pages past the width are dropped.
        page_size: a power of two, at most 4096.
    Raises:
        TypeError, ValueError: an argument is not as above, or kv_indices shares memory with another; nothing was written.
    """
    checks.positive("bs", bs, 0)
    _power_of_two("page_size", page_size)
    inputs = dict(req_to_token=req_to_token, req_pool_indices=req_pool_indices, paged_kernel_lens=paged_kernel_lens,
                  kv_start_idx=kv_start_idx)
    device = _check_inputs(inputs, {}, bs)
    checks.tensor("kv_indices", kv_indices, checks.INT32, (bs, 0), device)
    checks.own_cells("kv_indices", kv_indices)
    checks.apart({"kv_indices": kv_indices}, _given(inputs))
    slots, columns = req_to_token.shape
    if bs == 0:
        return
    starts = paged_kernel_lens if kv_start_idx is None else kv_start_idx
    width = min(kv_indices.shape[1], triton.cdiv(columns, page_size))
    _flashmla[(bs, _splits(width, BLOCK))](
        req_to_token, req_pool_indices, paged_kernel_lens, starts, kv_indices, slots, columns, width,
        req_to_token.stride(0), req_to_token.stride(1), req_pool_indices.stride(0), paged_kernel_lens.stride(0),
        starts.stride(0), kv_indices.stride(0), kv_indices.stride(1), PAGE_SIZE=page_size,
        HAS_START=kv_start_idx is not None, BLOCK=BLOCK)


@jit
def _draft_decode(req_to_token, req_pool_indices, lens, positions, kv_indices, kv_indptr, num_seqs, topk, num_steps,
                  page_size, slots, columns, width, row_stride, column_stride, pool_stride, len_stride, position_stride,
                  out_row_stride, out_column_stride, indptr_row_stride, indptr_column_stride, BLOCK_REQUESTS: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_STEPS: tl.constexpr):
    request = tl.program_id(0)
    part = tl.program_id(1)
    zero = tl.zeros((), tl.int64)

    # Tokens of the requests before this one.
    before = zero
    for start in range(0, request, BLOCK_REQUESTS):
        j = start + tl.arange(0, BLOCK_REQUESTS)
        length_j = tl.load(lens + j.to(tl.int64) * len_stride, mask=j < request, other=0).to(tl.int64)
        before += tl.sum(tl.maximum(length_j, 0), 0)

    slot = tl.load(req_pool_indices + (zero + request) * pool_stride).to(tl.int64)
    length = tl.maximum(tl.load(lens + (zero + request) * len_stride).to(tl.int64), 0)
    there = (slot >= 0) & (slot < slots)
    source = req_to_token + slot * row_stride

    # The request's own tokens: a block is loaded once and stored for every step (down) and branch.
    step = tl.arange(0, BLOCK_STEPS)[:, None].to(tl.int64)
    row = kv_indices + step * out_row_stride
    first = topk * before + (zero + request) * topk * (step + 1)
    held = tl.where(there, tl.minimum(length, columns), 0).to(tl.int32)
    lanes = part * BLOCK + tl.arange(0, BLOCK)
    for begin in range(0, held - part * BLOCK, tl.num_programs(1) * BLOCK):
        token = (begin + lanes).to(tl.int64)[None, :]
        tokens = tl.load(source + token * column_stride, mask=token < held, other=0)
        for branch in range(0, topk):
            cell = first + branch * (length + step + 1) + token
            tl.store(row + cell * out_column_stride, tokens, mask=(step < num_steps) & (token < held) & (cell < width))

    if part == 0:
        # The draft tokens of each branch, up to each step.
        partial = length % page_size
        pages = (partial + num_steps + page_size - 1) // page_size
        apart = pages * page_size  # num_steps for pages of one token
        draft = tl.arange(0, BLOCK_STEPS)[None, :].to(tl.int64)
        for branch in range(0, topk):
            column = length + branch * apart + draft
            known = there & (draft < num_steps) & (column < columns)
            tokens = tl.load(source + column * column_stride, mask=known, other=0)
            cell = first + branch * (length + step + 1) + length + draft
            tl.store(row + cell * out_column_stride, tokens,
                     mask=known & (step < num_steps) & (draft <= step) & (cell < width))

        # Where each branch ends. Index 0 is the captured buffer's zero.
        end = zero
        for start in range(0, request * topk, BLOCK_REQUESTS):
            z = start + tl.arange(0, BLOCK_REQUESTS)
            position = tl.load(positions + z.to(tl.int64) * position_stride, mask=z < request * topk, other=0).to(tl.int64)
            end += tl.sum(position, 0)
        steps = tl.arange(0, BLOCK_STEPS)
        for branch in range(0, topk):
            z = zero + request * topk + branch
            end += tl.load(positions + z * position_stride).to(tl.int64)
            tl.store(kv_indptr + steps.to(tl.int64) * indptr_row_stride + (z + 1) * indptr_column_stride,
                     (end + (z + 1) * (steps + 1)).to(tl.int32), mask=steps < num_steps)


@remembered
def generate_draft_decode_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr,
                                     num_seqs, topk, num_steps, page_size):
    """Fill every draft step's KV slots and branch ends; kv_indptr[:, 0] stays (oracles/kv_indices.py has the contract).

    Args:
        req_to_token: int32 [slots, columns], any strides.
        req_pool_indices, paged_kernel_lens [>= num_seqs], positions [>= num_seqs * topk]: int32 or int64, any stride.
        kv_indices: int32 or int64 [>= num_steps, width], any strides. Slots that a row does not hold are dropped.
        kv_indptr: int32 [>= num_steps, >= num_seqs * topk + 1], any strides.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs share memory; nothing was written.
    """
    for name, value, least in (("num_seqs", num_seqs, 0), ("topk", topk, 1), ("num_steps", num_steps, 1),
                               ("page_size", page_size, 1)):
        checks.positive(name, value, least)
    branches = num_seqs * topk
    inputs = dict(req_to_token=req_to_token, req_pool_indices=req_pool_indices, paged_kernel_lens=paged_kernel_lens,
                  positions=positions)
    device = _check_inputs(inputs, {"positions": branches}, num_seqs)
    outputs = dict(kv_indices=kv_indices, kv_indptr=kv_indptr)
    checks.tensor("kv_indices", kv_indices, checks.INT, (num_steps, branches * num_steps), device)
    checks.tensor("kv_indptr", kv_indptr, checks.INT32, (num_steps, branches + 1), device)
    for name, value in outputs.items():
        checks.own_cells(name, value)
    checks.apart(outputs, inputs)
    slots, columns = req_to_token.shape
    if num_seqs == 0:
        return
    width = kv_indices.shape[1]
    _draft_decode[(num_seqs, _splits(min(columns, width), DRAFT_BLOCK))](
        req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr, num_seqs, topk, num_steps,
        page_size, slots, columns, width, req_to_token.stride(0), req_to_token.stride(1), req_pool_indices.stride(0),
        paged_kernel_lens.stride(0), positions.stride(0), kv_indices.stride(0), kv_indices.stride(1), kv_indptr.stride(0),
        kv_indptr.stride(1), BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=DRAFT_BLOCK, BLOCK_STEPS=triton.next_power_of_2(num_steps))


def draft_decode_slices(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """The entries of kv_indptr and of kv_indices that each sub-backend is given (host integers only).

    Raises:
        ValueError: `seq_lens_sum` is not the sum of `seq_lens` (padded requests forgotten, for one), `row_width` does not
            hold the last step, or a size is below its least.
    """
    checks.positive("topk", topk)
    checks.positive("num_steps", num_steps)
    if seq_lens_sum != sum(seq_lens):
        raise ValueError(f"seq_lens_sum must be the sum of all {len(seq_lens)} requests, {sum(seq_lens)}, got {seq_lens_sum}")
    branches = topk * len(seq_lens)
    needed = topk * seq_lens_sum + branches * num_steps
    if row_width < needed:
        raise ValueError(f"row_width must be at least {needed} for {branches} branches and {num_steps} steps, got {row_width}")
    return [[branches + 1, topk * seq_lens_sum + branches * (step + 1)] for step in range(num_steps - 1)]


def _splits(cells: int, block: int) -> int:
    return max(1, min(triton.cdiv(cells, block), MOST_SPLITS))


def _given(inputs: dict) -> dict:
    return {n: t for n, t in inputs.items() if t is not None}


def _check_inputs(inputs: dict, least: dict[str, int], bs: int):
    """The table and the vectors of a batch; returns their device."""
    device = checks.device_of("req_to_token", inputs["req_to_token"])
    checks.tensor("req_to_token", inputs["req_to_token"], checks.INT32, (1, 0), device)
    for name, value in inputs.items():
        if name != "req_to_token" and not (name == "kv_start_idx" and value is None):
            checks.tensor(name, value, checks.INT, (least.get(name, bs),), device)
    return device


def _power_of_two(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST_PAGE_SIZE or value & (value - 1):
        raise ValueError(f"{name} must be a power of two from 1 to {MOST_PAGE_SIZE}, got {value!r}")
