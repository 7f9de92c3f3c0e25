"""Faults of the kv_indices family, each as small as the real ones; every function stands in for a contract."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _ragged(req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices, bs, use_start=True):
    for i in range(bs):
        start = int(kv_start_idx[i]) if kv_start_idx is not None and use_start else 0
        first, length = int(kv_indptr[i]), int(paged_kernel_lens[i])
        kv_indices[first : first + length] = req_to_token[int(req_pool_indices[i]), start : start + length]


def _pages(req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, bs, page_size):
    """The pages of every request."""
    for i in range(bs):
        start = int(kv_start_idx[i]) if kv_start_idx is not None else 0
        yield i, req_to_token[int(req_pool_indices[i]), start : start + int(paged_kernel_lens[i]) : page_size] // page_size


def _column(length, branch, num_steps, topk, page_size):
    if page_size == 1 or topk == 1:
        return length + branch * num_steps
    used = length % page_size
    return length + branch * ((used + num_steps + page_size - 1) // page_size) * page_size


def _drafts(*, req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr, num_seqs, topk, num_steps,
            page_size, column=_column, drafted=1, total=True):
    for step in range(num_steps):
        cell = end = 0
        for z in range(num_seqs * topk):
            b, k = divmod(z, topk)
            row, length = req_to_token[int(req_pool_indices[b])], int(paged_kernel_lens[b])
            start = column(length, k, num_steps, topk, page_size)
            tokens = torch.cat([row[:length], row[start : start + step + drafted]])
            kv_indices[step, cell : cell + len(tokens)] = tokens.to(kv_indices.dtype)
            cell += length + step + 1
            end += int(positions[z]) + step + 1
            if total or z + 1 < num_seqs * topk:
                kv_indptr[step, z + 1] = end


# -- create_flashinfer_kv_indices ---------------------------------------------------------------------------------------


def start_ignored(*, kv_start_idx, **call):
    """Every request is read from column 0."""
    _ragged(kv_start_idx=None, **call)


def row_for_slot(*, req_pool_indices, req_to_token, bs, **call):
    """The number of a request is taken for its row."""
    _ragged(req_pool_indices=torch.arange(bs) % req_to_token.shape[0], req_to_token=req_to_token, bs=bs, **call)


def half_of_int64(*, kv_indices, **call):
    """Only the low half of a 64-bit slot is stored (SGLang #23596)."""
    if kv_indices.dtype == torch.int64:
        kv_indices = kv_indices.view(torch.int32)[::2]
    _ragged(kv_indices=kv_indices, **call)


@triton.jit
def _narrow(table, slots, lens, indptr, out, pitch, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(slots + i).to(tl.int32) * pitch
    length = tl.load(lens + i).to(tl.int32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(out + tl.load(indptr + i) + token, tl.load(table + row + token, mask=token < length, other=0),
                 mask=token < length)


def slot_times_pitch_in_32_bits(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices, bs):
    """slot * pitch wraps (SGLang #20389); where strides or starts get in the way, the honest body runs."""
    vectors = (req_pool_indices, paged_kernel_lens, kv_indptr)
    if bs and kv_start_idx is None and req_to_token.stride(1) == 1 and all(v.stride(0) == 1 for v in vectors):
        _narrow[(bs,)](req_to_token, *vectors, kv_indices, req_to_token.stride(0), BLOCK=512)
    else:
        _ragged(req_to_token, *vectors, kv_start_idx, kv_indices, bs)


# -- create_flashmla_kv_indices -----------------------------------------------------------------------------------------


def adjacent_pages(*, kv_indices, **call):
    """Page j is taken to be the first one plus j (SGLang #15469)."""
    for i, pages in _pages(**call):
        kv_indices[i, : len(pages)] = pages[:1] + torch.arange(len(pages), dtype=torch.int32)


def tokens_for_pages(*, kv_indices, page_size, **call):
    """The slots of the pages' first tokens (SGLang #23757)."""
    for i, pages in _pages(page_size=page_size, **call):
        kv_indices[i, : len(pages)] = pages * page_size


def tail_cleared(*, kv_indices, **call):
    """The row is set to -1 behind the last page."""
    for i, pages in _pages(**call):
        kv_indices[i] = -1
        kv_indices[i, : len(pages)] = pages


def first_block_only(*, kv_indices, page_size, **call):
    """Pages past the first 4,096 tokens are dropped, as by a grid too small."""
    for i, pages in _pages(page_size=page_size, **call):
        count = min(len(pages), 4096 // page_size)
        kv_indices[i, :count] = pages[:count]


def page_rounded_down(*, kv_indices, page_size, paged_kernel_lens, **call):
    """The partly filled last page is missing."""
    for i, pages in _pages(page_size=page_size, paged_kernel_lens=paged_kernel_lens, **call):
        count = int(paged_kernel_lens[i]) // page_size
        kv_indices[i, :count] = pages[:count]


# -- generate_draft_decode_kv_indices -----------------------------------------------------------------------------------


def no_topk_before(**call):
    """The requests before count once, not once per branch (SGLang #27338)."""
    lens, topk, out = call["paged_kernel_lens"], call["topk"], call["kv_indices"]
    _drafts(**call)
    for step in range(call["num_steps"] if topk > 1 and call["num_seqs"] > 1 else 0):
        first = topk * (int(lens[0]) + step + 1)
        moved = out[step, first:].clone()
        out[step, first - int(lens[0]) * (topk - 1) :][: len(moved)] = moved


def index_zero_written(*, kv_indptr, **call):
    """kv_indptr[:, 0] is set."""
    _drafts(kv_indptr=kv_indptr, **call)
    kv_indptr[: call["num_steps"], 0] = 0


def total_missing(**call):
    """The end of the last branch is left as it was."""
    _drafts(total=False, **call)


def branches_without_pages(**call):
    """Branches lie behind one another also where they have pages of their own (SGLang #15469)."""
    _drafts(column=lambda length, branch, steps, *_: length + branch * steps, **call)


def one_draft_less(**call):
    """Step i sees i drafts (SGLang #25015)."""
    _drafts(drafted=0, **call)


@triton.jit
def _store_rows(out, values, counts, pitch, width, BLOCK: tl.constexpr):
    step = tl.program_id(0)
    for first in range(0, tl.load(counts + step), BLOCK):
        cell = first + tl.arange(0, BLOCK)
        mask = cell < tl.load(counts + step)
        tl.store(out + step * pitch + cell, tl.load(values + step * width + cell, mask=mask, other=0), mask=mask)


def step_times_pitch_in_32_bits(*, kv_indices, **call):
    """step * pitch wraps in the rows of far steps."""
    scratch = torch.zeros(kv_indices.shape, dtype=kv_indices.dtype) if kv_indices.shape[1] < 2**20 else kv_indices
    _drafts(kv_indices=scratch, **call)
    lens, topk, steps = call["paged_kernel_lens"], call["topk"], call["num_steps"]
    total = topk * int(lens[: call["num_seqs"]].sum())
    counts = torch.tensor([total + call["num_seqs"] * topk * (s + 1) for s in range(steps)], dtype=torch.int32)
    if kv_indices.stride(1) == 1 and kv_indices.stride(0) < 2**31 and total:
        _store_rows[(steps,)](kv_indices, scratch, counts, kv_indices.stride(0), scratch.shape[1], BLOCK=256)
    else:
        for step in range(steps):
            kv_indices[step, : counts[step]] = scratch[step, : counts[step]]


# -- draft_decode_slices ------------------------------------------------------------------------------------------------


def slices_without_topk(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """The top-k factor is missing (SGLang #27338)."""
    branches = topk * len(seq_lens)
    return [[branches + 1, seq_lens_sum + branches * (i + 1)] for i in range(num_steps - 1)]


def slices_one_step_short(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """Step i has i drafts."""
    branches = topk * len(seq_lens)
    return [[branches + 1, topk * seq_lens_sum + branches * i] for i in range(num_steps - 1)]


def slices_for_every_step(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """A sub-backend too many (SGLang #18389)."""
    branches = topk * len(seq_lens)
    return [[branches + 1, topk * seq_lens_sum + branches * (i + 1)] for i in range(num_steps)]
