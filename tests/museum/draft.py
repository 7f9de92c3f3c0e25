"""Slots and positions of drafts and of accepted tokens."""

import torch

from exhibit import exhibit, put, sums

# -- as many tokens for every request -------------------------------------------------------------------------------------


def _uniform(call, width):
    """(request, first column, slots) of `width` columns per request."""
    for i in range(call["bs"]):
        slot, start = int(call["req_pool_indices"][i]), int(call["start_offset"][i])
        yield i, start, call["req_to_token"][slot, start : start + width]


def _positions(call, i, values):
    if call["positions_out"] is not None:
        put(call["positions_out"][i], values)


@exhibit("B024")
def four_drafts(faulty, **call):
    """SGLang #34189. Trigger: 5 to 8 drafts, all accepted. Symptom: the first ones beyond 4 are never kept; the CPU's twin of
    the kernel has no such limit."""
    width = call["draft_token_num"]
    for i, start, slots in _uniform(call, width):
        kept = min(width, 4) if faulty else width
        call["out_cache_loc"][i * width : i * width + kept] = slots[:kept]
        _positions(call, i, range(start, start + width))


@exhibit("B066")
def positions_of_the_next_step(faulty, **call):
    """SGLang #25015. Trigger: 2 draft steps. Symptom: every position is one too high inside the step; acceptance falls."""
    width = call["draft_token_num"]
    for i, start, slots in _uniform(call, width):
        call["out_cache_loc"][i * width : (i + 1) * width] = slots
        first = start + 1 if faulty else start
        _positions(call, i, range(first, first + width))


@exhibit("B136")
def rows_in_pairs(faulty, **call):
    """DeepGEMM #285, #324, #113. Trigger: 3 query tokens per request. Symptom: tokens are taken in pairs, so rows of an odd
    width are shifted."""
    width = call["draft_token_num"]
    pitch = width + width % 2 if faulty and width > 1 else width
    for i, start, slots in _uniform(call, width):
        room = call["out_cache_loc"][i * pitch : i * pitch + width]
        room[:] = slots[: len(room)]
        _positions(call, i, range(start, start + width))


# -- branches of a draft tree ---------------------------------------------------------------------------------------------


def _tree(call, pitch=None, kept=None) -> None:
    width = call["topk"] * call["num_steps"]
    pitch = width if pitch is None else pitch
    for i in range(call["bs"]):
        slot, n = int(call["req_pool_indices"][i]), int(call["seq_lens"][i])
        count = width if kept is None else max(min(width, kept - i * pitch), 0)
        call["out_cache_loc"][i * pitch : i * pitch + count] = call["req_to_token"][slot, n : n + count]
        if call["positions"] is not None:
            call["positions"][i * call["topk"] : (i + 1) * call["topk"]] = n


@exhibit("B042")
def stride_of_a_chain(faulty, **call):
    """SGLang #27545. Trigger: 2 branches, 3 steps. Symptom: the stride between requests is that of one branch, so query blocks
    are dropped. Right for one branch."""
    _tree(call, pitch=call["num_steps"] if faulty else None)


@exhibit("B163")
def capacity_without_drafts(faulty, **call):
    """vLLM-Ascend #14024, #11774. Trigger: as many tokens as a batch may have, plus drafts. Symptom: the slot map has room for
    the former; drafts write over what is behind it, or are lost."""
    _tree(call, kept=call["bs"] * call["num_steps"] if faulty else None)


@exhibit("B029")
def steps_in_front(faulty, **call):
    """SGLang #26239. Trigger: 2 requests, 3 steps. Symptom: slots that lie (request, branch, step) are cut as if steps came
    first: requests write into each other's KV."""
    _tree(call)
    if faulty:
        bs, topk, steps = call["bs"], call["topk"], call["num_steps"]
        own = call["out_cache_loc"][: bs * topk * steps].clone()
        call["out_cache_loc"][: bs * topk * steps] = own.view(bs * topk, steps).T.reshape(-1)


# -- ragged ranges --------------------------------------------------------------------------------------------------------


def _ranges(call, slots):
    parts = [call["req_to_token"][s, a:b] for s, a, b in zip(slots, call["start_offset"].tolist(), call["end_offset"].tolist())]
    return torch.cat(parts) if parts else call["req_to_token"][0, :0]


@exhibit("B053")
def low_half_stored(faulty, **call):
    """SGLang #23596. Trigger: an int64 output of int32 values. Symptom: only the low 4 bytes are stored; slots out of range
    unless the buffer was zero."""
    locs, out = _ranges(call, call["req_pool_indices"][: call["bs"]].tolist()), call["out_cache_loc"]
    if faulty and out.dtype == torch.int64:
        out[: len(locs)].view(torch.int32)[::2] = locs
    else:
        out[: len(locs)] = locs


@exhibit("B054")
def width_of_the_payload(faulty, **call):
    """SGLang #16912. Trigger: int64 indices beside an int32 payload. Symptom: the kernel for the payload's width reads halves
    of indices."""
    slots = call["req_pool_indices"][: call["bs"]].contiguous()
    if faulty and slots.dtype == torch.int64 and call["out_cache_loc"].dtype == torch.int32:
        slots = slots.view(torch.int32)[: call["bs"]]
    locs = _ranges(call, slots.tolist())
    call["out_cache_loc"][: len(locs)] = locs


# -- accepted tokens ------------------------------------------------------------------------------------------------------


def _accepted(call):
    seq, accept = call["seq_lens"][: call["bs"]].tolist(), call["accept_lens"][: call["bs"]].tolist()
    return [n - a + j for n, a in zip(seq, accept) for j in range(a)], accept


@exhibit("B145")
def count_of_the_longer_list(faulty, **call):
    """aiter #3235. Trigger: 8 rows of keys, 5 slots. Symptom: rows are counted by the longer tensor, and padded ones are
    processed before they are tested."""
    positions, accept = _accepted(call)
    if faulty:
        positions += [0] * (len(call["accept_tokens"]) - len(positions))
    positions = positions[: len(call["positions"])]
    put(call["positions"], positions)
    put(call["bonus_tokens"], [int(call["accept_tokens"][end - 1]) for end in sums(accept)[1:]])


@exhibit("B162")
def every_nth_slot(faulty, **call):
    """vLLM-Ascend #8547, #6344. Trigger: requests of 2 tokens and of 1. Symptom: every second slot is taken, as if all requests
    were as long as the first."""
    positions, accept = _accepted(call)
    put(call["positions"], positions)
    ends = sums([accept[0]] * len(accept) if faulty and accept else accept)[1:]
    put(call["bonus_tokens"], [int(call["accept_tokens"][min(end, sum(accept)) - 1]) for end in ends])
