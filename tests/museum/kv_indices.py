"""Index lists and block tables of KV slots."""

import torch
import triton
import triton.language as tl

from exhibit import elsewhere, exhibit, replayed


@triton.jit
def _slots(table, slots, lengths, starts, indptr, out, table_row, table_step, slot_step, length_step, start_step, indptr_step,
           STARTS: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    slot = tl.load(slots + request * slot_step).to(tl.int64)
    start = 0
    if STARTS:
        start = tl.load(starts + request * start_step).to(tl.int32)
    first = tl.load(indptr + request * indptr_step).to(tl.int64)
    length = tl.load(lengths + request * length_step).to(tl.int32)
    for block in range(0, length, BLOCK):
        token = block + tl.arange(0, BLOCK)
        value = tl.load(table + slot * table_row + (start + token) * table_step, mask=token < length)
        tl.store(out + first + token, value, mask=token < length)


@exhibit("B052")
def start_that_is_not_there(faulty, *, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                            bs):
    """SGLang #4100. Trigger: 2 requests, prefixes not given. Symptom: the kernel loads a prefix all the same; often it is 0."""
    given = kv_start_idx is not None
    starts = kv_start_idx if given else torch.empty(0, dtype=torch.int32)
    if bs:
        _slots[(bs,)](req_to_token, req_pool_indices, paged_kernel_lens, starts, kv_indptr, kv_indices, *req_to_token.stride(),
                      req_pool_indices.stride(0), paged_kernel_lens.stride(0), starts.stride(0), kv_indptr.stride(0),
                      STARTS=given or faulty, BLOCK=256)


def _pages(call, i, count):
    """The pages at the starts of `count` pages of a request."""
    slot, page_size = int(call["req_pool_indices"][i]), call["page_size"]
    start = 0 if call["kv_start_idx"] is None else int(call["kv_start_idx"][i])
    return call["req_to_token"][slot, start : start + (count - 1) * page_size + 1 : page_size][: max(count, 0)] // page_size


@triton.jit
def _entries(row, step, values, count, BLOCK: tl.constexpr):
    for block in range(0, count, BLOCK):
        entry = block + tl.arange(0, BLOCK)
        tl.store(row + entry * step, tl.load(values + entry, mask=entry < count), mask=entry < count)


@exhibit("B041")
def entry_per_token(faulty, **call):
    """SGLang #24587. Trigger: pages of 16 tokens, more than one page. Symptom: one entry per token goes into a buffer sized in
    pages: writes behind it."""
    for i in range(call["bs"]):
        length, page_size, row = int(call["paged_kernel_lens"][i]), call["page_size"], call["kv_indices"][i]
        pages = _pages(call, i, -(-length // page_size)).int()
        if faulty:
            pages = pages.repeat_interleave(page_size)[:length]
        if len(pages):
            _entries[(1,)](row, row.stride(0), pages.contiguous(), len(pages), BLOCK=256)


@exhibit("B067")
def tokens_for_pages(faulty, **call):
    """SGLang #23757. Trigger: pages of 64 tokens. Symptom: the table of tokens is read as if it held pages."""
    for i in range(call["bs"]):
        count = -(-int(call["paged_kernel_lens"][i]) // call["page_size"])
        pages = _pages({**call, "page_size": 1} if faulty else call, i, count)
        call["kv_indices"][i, :count] = pages


@exhibit("B082")
def first_column_of_every_row(faulty, **call):
    """vLLM #34552, #35431. Trigger: padded requests. Symptom: column 0 of their rows is used, though nothing is there."""
    for i in range(call["bs"]):
        count = -(-int(call["paged_kernel_lens"][i]) // call["page_size"])
        count = max(count, 1) if faulty and call["kv_indices"].shape[1] else count
        call["kv_indices"][i, :count] = _pages(call, i, count)


@exhibit("B092")
def last_page_by_remainder(faulty, **call):
    """vLLM #31282. Trigger: a length that is a multiple of the page size. Symptom: a last page of no token."""
    for i in range(call["bs"]):
        length, page_size = int(call["paged_kernel_lens"][i]), call["page_size"]
        count = length // page_size + 1 if faulty else -(-length // page_size)
        pages = _pages(call, i, count)
        call["kv_indices"][i, : len(pages)] = pages[: call["kv_indices"].shape[1]]


@exhibit("B138")
def rows_of_the_cache(faulty, **call):
    """FlashAttention #1795. Trigger: a paged cache. Symptom: its first dimension counts blocks, and is taken for the batch."""
    for i in range(min(call["req_to_token"].shape[0], call["bs"]) if faulty else call["bs"]):
        count = -(-int(call["paged_kernel_lens"][i]) // call["page_size"])
        call["kv_indices"][i, :count] = _pages(call, i, count)


# -- the lists of a multi-step draft --------------------------------------------------------------------------------------


def _draft(call, kv_indices, room=None) -> None:
    table, topk, steps, page_size = (call[n] for n in ("req_to_token", "topk", "num_steps", "page_size"))
    branches = call["num_seqs"] * topk
    for step in range(1, steps + 1):
        entries = []
        for slot, n in zip(call["req_pool_indices"][: call["num_seqs"]].tolist(), call["paged_kernel_lens"].tolist()):
            apart = steps if page_size == 1 or topk == 1 else -(-(n % page_size + steps) // page_size) * page_size
            own = table[slot, :n].tolist()
            for k in range(topk):
                entries += own + table[slot, n + k * apart : n + k * apart + step].tolist()
        entries = entries[: kv_indices.shape[1] if room is None else room]
        kv_indices[step - 1, : len(entries)] = torch.tensor(entries, dtype=kv_indices.dtype)
        ends = torch.cumsum(call["positions"][:branches] + step, 0)
        call["kv_indptr"][step - 1, 1 : branches + 1] = ends


@exhibit("B037")
def rows_without_the_branches(faulty, **call):
    """SGLang #27338, #27460. Trigger: 2 branches, full lengths. Symptom: rows of kv_indices run into each other, then into the
    next allocation."""
    out = call["kv_indices"]
    if faulty:
        out = out.as_strided(out.shape, (out.stride(0) // call["topk"], out.stride(1)), out.storage_offset())
    _draft(call, out)


@exhibit("B040")
def no_room_for_drafts(faulty, **call):
    """SGLang #27485. Trigger: every request at the limit, 4 drafts. Symptom: the capacity counts keys and leaves out drafts."""
    keys = call["topk"] * sum(call["paged_kernel_lens"][: call["num_seqs"]].tolist())
    _draft(call, call["kv_indices"], keys if faulty else None)


@exhibit("B033")
def positions_not_restored(faulty, **call):
    """SGLang #30839. Trigger: 2 replays of 3 draft steps. Symptom: the second starts 3 positions late; acceptance falls."""
    _draft(call, call["kv_indices"])
    if faulty:
        call["positions"] += call["num_steps"]


@exhibit("B047")
def eager_sums(faulty, **call):
    """SGLang #37975. Trigger: a replay with other lengths. Symptom: the eager sums are right, the captured ones are those of
    the capture; the kernel of the day does not read them."""
    call = elsewhere(call, "kv_indptr") if faulty and replayed("B047") else call
    _draft(call, call["kv_indices"])


@exhibit("B045")
def sum_without_drafts(faulty, *, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """SGLang #26880, #1789, #26753. Trigger: a host sum from before the accepted tokens were added. Symptom: the device's sums
    are right, and the slice that the host takes is too short."""
    branches = len(seq_lens) * topk
    return [[branches + 1, topk * seq_lens_sum + (0 if faulty else branches * step)] for step in range(1, num_steps)]
