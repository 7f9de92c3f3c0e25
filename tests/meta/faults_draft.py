"""Faults of the draft family, each as small as the real ones; every function stands in for a contract."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _ranges(req_pool_indices, start_offset, end_offset, bs):
    """Slot, first column, the column behind the last, and the tokens of the requests before."""
    before = 0
    for i in range(bs):
        start, end = int(start_offset[i]), int(end_offset[i])
        yield int(req_pool_indices[i]), start, end, before
        before += end - start


def _assign(req_to_token, out_cache_loc, **ranges):
    for slot, start, end, before in _ranges(**ranges):
        req_to_token[slot, start:end] = out_cache_loc[before : before + end - start].int()


def _extend(req_to_token, out_cache_loc, **ranges):
    total = 0
    for slot, start, end, before in _ranges(**ranges):
        out_cache_loc[before : before + end - start] = req_to_token[slot, start:end].to(out_cache_loc.dtype)
        total = before + end - start
    return total


def _paged(page_size, topk):
    return page_size > 1 and topk > 1


def _shape(seq, topk, num_steps, page_size):
    """The partial page, the distance of branches, and the new slots of a request."""
    if not _paged(page_size, topk):
        return 0, num_steps, topk * num_steps
    partial = seq % page_size
    apart = (partial + num_steps + page_size - 1) // page_size * page_size
    return partial, apart, apart * topk - partial


def _draft(*, req_pool_indices, req_to_token, seq_lens, out_cache_loc, source_cache_loc, target_cache_loc, bs, topk, num_steps,
           page_size, compact=True, first_copy=1, **derived):
    new, taken, copies = out_cache_loc.clone(), 0, 0
    for i in range(bs):
        seq, slot = int(seq_lens[i]), int(req_pool_indices[i])
        partial, apart, count = _shape(seq, topk, num_steps, page_size)
        own = new[taken : taken + count]
        taken += count
        req_to_token[slot, seq : seq + count] = own.int()
        for k in range(topk if _paged(page_size, topk) else 0):
            if compact:
                cell = (i * topk + k) * num_steps
                out_cache_loc[cell : cell + num_steps] = own[k * apart : k * apart + num_steps]
            if k >= first_copy and copies + partial <= len(source_cache_loc):
                source_cache_loc[copies : copies + partial] = req_to_token[slot, seq - partial : seq]
                target_cache_loc[copies : copies + partial] = req_to_token[slot, seq - partial + k * apart : seq + k * apart]
                copies += partial


# -- assign_req_to_token_pool, assign_extend_cache_locs -----------------------------------------------------------------


def offsets_of_one_length(*, bs, start_offset, end_offset, req_to_token, req_pool_indices, out_cache_loc):
    """A request's tokens are looked for as if those before it had as many as it has."""
    for i, (slot, start, end, _) in enumerate(_ranges(req_pool_indices, start_offset, end_offset, bs)):
        first = min(i * (end - start), len(out_cache_loc) - (end - start))
        req_to_token[slot, start:end] = out_cache_loc[first : first + end - start].int()


def row_cleared_behind(*, req_to_token, **call):
    """The rest of the row is set to 0."""
    _assign(req_to_token=req_to_token, **call)
    out = call.pop("out_cache_loc")
    for slot, start, end, _ in _ranges(**call):
        if end > start and len(out):
            req_to_token[slot, end:] = 0


@triton.jit
def _put(table, slots, starts, ends, locs, pitch, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    slot = tl.load(slots + i).to(tl.int32)
    if WIDE:
        slot = slot.to(tl.int64)
    before = tl.zeros((), tl.int64)
    for j in range(0, i):
        before += tl.load(ends + j).to(tl.int64) - tl.load(starts + j).to(tl.int64)
    start = tl.load(starts + i).to(tl.int32)
    count = tl.load(ends + i).to(tl.int32) - start
    for first in range(0, count, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(table + slot * pitch + start + token, tl.load(locs + before + token, mask=token < count, other=0).to(tl.int32),
                 mask=token < count)


def slot_times_pitch_in_32_bits(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    """slot * pitch wraps (SGLang #20389); where strides get in the way, the honest body runs."""
    vectors = (req_pool_indices, start_offset, end_offset, out_cache_loc)
    if bs and req_to_token.stride(1) == 1 and all(v.stride(0) == 1 for v in vectors):
        _put[(bs,)](req_to_token, *vectors, req_to_token.stride(0), WIDE=False, BLOCK=256)
    else:
        _assign(req_to_token, out_cache_loc, req_pool_indices=req_pool_indices, start_offset=start_offset,
                end_offset=end_offset, bs=bs)


def list_cleared_behind(*, out_cache_loc, **call):
    """The list is set to 0 behind the last token."""
    out_cache_loc[_extend(out_cache_loc=out_cache_loc, **call) :] = 0


def from_the_row_start(*, start_offset, end_offset, **call):
    """The columns are counted from 0."""
    _extend(start_offset=start_offset - start_offset, end_offset=end_offset - start_offset, **call)


# -- assign_extend_cache_locs_uniform, assign_draft_cache_locs_contiguous -----------------------------------------------


def _gather(req_pool_indices, req_to_token, starts, out_cache_loc, bs, width):
    for i in range(bs):
        start = int(starts[i])
        out_cache_loc[i * width : (i + 1) * width] = req_to_token[int(req_pool_indices[i]), start : start + width]


def positions_from_zero(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs, draft_token_num):
    """Positions count the drafts."""
    _gather(req_pool_indices, req_to_token, start_offset, out_cache_loc, bs, draft_token_num)
    if positions_out is not None:
        positions_out[:bs] = torch.arange(draft_token_num)


def first_block_only(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs, draft_token_num):
    """Slots past the first 64 of a request are missing."""
    for i in range(bs):
        start, count = int(start_offset[i]), min(draft_token_num, 64)
        out_cache_loc[i * draft_token_num :][:count] = req_to_token[int(req_pool_indices[i]), start : start + count]
        if positions_out is not None:
            positions_out[i] = start + torch.arange(draft_token_num)


def positions_of_the_next_step(*, positions, seq_lens, topk, num_steps, bs, **call):
    """Positions are one further (SGLang #25015)."""
    _gather(starts=seq_lens, bs=bs, width=topk * num_steps, **call)
    if positions is not None:
        positions[: bs * topk] = (seq_lens[:bs] + 1).repeat_interleave(topk)


def steps_first(*, positions, seq_lens, topk, num_steps, bs, out_cache_loc, **call):
    """The list is ordered by steps, then by requests (SGLang #26239)."""
    _gather(starts=seq_lens, bs=bs, width=topk * num_steps, out_cache_loc=out_cache_loc, **call)
    count = bs * topk * num_steps
    out_cache_loc[:count] = out_cache_loc[:count].clone().reshape(bs * topk, num_steps).T.reshape(-1)
    if positions is not None:
        positions[: bs * topk] = seq_lens[:bs].repeat_interleave(topk)


# -- create_extend_after_decode_spec_info -------------------------------------------------------------------------------


def _accepted(*, accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, bs, num_steps, most=None, bonus=-1):
    done = 0
    for i in range(bs):
        seq, accept = int(seq_lens[i]), int(accept_lens[i])
        count = accept if most is None else min(accept, most)
        positions[done : done + count] = seq - accept + torch.arange(count)
        bonus_tokens[i] = accept_tokens[done + accept - 1 if bonus < 0 else done]
        done += accept


def lanes_of_the_batch(*, bs, num_steps, **call):
    """Positions past next_power_of_2(max(num_steps + 1, bs)) are missing."""
    _accepted(bs=bs, num_steps=num_steps, **call, most=triton.next_power_of_2(max(num_steps + 1, bs)))


def first_for_last(**call):
    """The bonus token is the first accepted one."""
    _accepted(**call, bonus=0)


def positions_from_the_end(*, seq_lens, accept_lens, **call):
    """Positions start at the request's length, as if it did not count the accepted tokens yet (SGLang #26651)."""
    _accepted(seq_lens=seq_lens + accept_lens.to(seq_lens.dtype)[: len(seq_lens)] if len(accept_lens) else seq_lens,
              accept_lens=accept_lens, **call)


# -- assign_draft_cache_locs --------------------------------------------------------------------------------------------


def padding_kept_without_copies(**call):
    """Where no request has a partial page, the padding between the branches is not taken out of the list."""
    partial = [int(n) % call["page_size"] for n in call["seq_lens"][: call["bs"]]]
    _draft(**call, compact=any(partial))


def copies_for_branch_zero(**call):
    """The copies start with branch 0, which needs none."""
    _draft(**call, first_copy=0)


@triton.jit
def _in_place(out, seqs, topk, num_steps, page_size, BLOCK: tl.constexpr, OTHER: tl.constexpr, REQUESTS: tl.constexpr):
    """Every request's program moves its own slots to the front, whatever the others have read."""
    i = tl.program_id(0)
    j = tl.arange(0, REQUESTS)
    if OTHER:
        seq_j = tl.load(seqs + j, mask=j < i, other=0).to(tl.int32)
        width = tl.where(j < i, (seq_j % page_size + num_steps + page_size - 1) // page_size * page_size * topk, 0)
        before = tl.sum(width - tl.where(j < i, seq_j % page_size, 0), 0)
    else:
        seq_j = tl.load(seqs + j, mask=j < i).to(tl.int32)
        before = tl.sum((seq_j % page_size + num_steps + page_size - 1) // page_size * page_size * topk - seq_j % page_size, 0)
    partial = tl.load(seqs + i).to(tl.int32) % page_size
    apart = (partial + num_steps + page_size - 1) // page_size * page_size
    draft = tl.arange(0, BLOCK)
    for k in range(0, topk):
        slots = tl.load(out + before + k * apart + draft, mask=draft < num_steps, other=0)
        tl.store(out + (i * topk + k) * num_steps + draft, slots, mask=draft < num_steps)


def _compacted_in_place(other, *, seq_lens, out_cache_loc, bs, topk, num_steps, page_size, **call):
    kernel = bs and _paged(page_size, topk) and seq_lens.stride(0) == 1
    _draft(seq_lens=seq_lens, out_cache_loc=out_cache_loc, bs=bs, topk=topk, num_steps=num_steps, page_size=page_size,
           compact=not kernel, **call)
    if kernel:
        _in_place[(bs,)](out_cache_loc, seq_lens, topk, num_steps, page_size, BLOCK=triton.next_power_of_2(num_steps),
                         OTHER=other, REQUESTS=triton.next_power_of_2(bs))


def requests_overtake(**call):
    """A request's front lies in the slots of the one before it, which another program may not have read yet."""
    _compacted_in_place(True, **call)


def masked_sum(**call):
    """A masked load without `other` is summed up."""
    _compacted_in_place(False, **call)
