"""Scores of a prefill, the chunks they are computed in, and their top-k."""

import torch
import triton
import triton.language as tl

from exhibit import exhibit


def _best(row, start, length, topk) -> list[int]:
    """Positions of the best keys; all of them in order where there are no more than wanted."""
    if length <= topk:
        return list(range(max(length, 0)))
    return row[start : start + length].topk(topk).indices.tolist()


def _chunked(call, values) -> None:
    """`values(row, first row of its chunk, positions)` for every row, then -1."""
    out, topk = call["topk_result"], call["index_topk"]
    out[: call["token_nums"], :topk] = -1
    for row, (start, length) in enumerate(zip(call["ks"].tolist(), call["lengths"].tolist())):
        keys = _best(call["logits"][row], start, length, topk)
        found = values(row, row - row % call["max_rows"], keys)
        out[row, : len(keys)] = torch.as_tensor(found, dtype=torch.int32)


@exhibit("B002")
def owner_by_chunk(faulty, **call):
    """SGLang #14325. Trigger: 2 requests, chunks of one row. Symptom: row j of a chunk is looked up in the table of request j:
    slots of another request. The first chunk is right."""
    owners = call["token_to_batch_idx"].tolist()
    _chunked(call, lambda row, first, keys: call["page_table_1"][owners[row - first if faulty else row], keys])


@triton.jit
def _count(lengths, counts, step, count_step):
    row = tl.program_id(0)
    tl.store(counts + row, tl.load(lengths + row * step))


@exhibit("B016")
def lengths_of_padded_rows(faulty, **call):
    """SGLang #17076. Trigger: 3 tokens padded to 4. Symptom: the loop runs over the padded rows, and the last one's length is
    what follows in memory."""
    lengths = call["lengths"]
    rows = call["token_nums"] if faulty else len(lengths)
    counts = torch.zeros(max(rows, len(lengths)), dtype=torch.int32)
    if rows:
        _count[(rows,)](lengths, counts, lengths.stride(0), 1)
    offsets = call["topk_indices_offset"].tolist()
    _chunked({**call, "lengths": counts[: len(lengths)]}, lambda row, first, keys: [k + offsets[row] for k in keys])


def _logits(call, weight_rows, empty) -> None:
    keys = call["k"].float()
    for row, (first, end) in enumerate(zip(call["ks"].tolist(), call["ke"].tolist())):
        out = call["logits"][row, : len(keys)]
        if call["clean_logits"] and (empty or end > first):
            out[:] = -torch.inf
        if end > first:
            dots = (call["q"][row].float() @ keys[first:end].T).relu()
            out[first:end] = call["weights"][weight_rows[row]] @ dots * call["k_scale"][first:end]


@exhibit("B095")
def nothing_for_no_keys(faulty, **call):
    """vLLM #49294, #15492. Trigger: contexts of 8 and of 0 keys. Symptom: the row without keys is not written, where -inf is
    what makes a merge neutral."""
    _logits(call, range(len(call["ks"])), empty=not faulty)


@exhibit("B109")
def queries_packed_weights_flat(faulty, **call):
    """vLLM #32175. Trigger: requests of 2 tokens and of 1. Symptom: queries are packed to a rectangle and weights are not, so
    rows behind the short request have another token's weights."""
    starts = call["ks"].tolist()
    groups = [starts.index(s) for s in starts]
    widest = max([groups.count(g) for g in groups], default=1)
    order = sorted(set(groups))
    packed = [order.index(g) * widest + row - g for row, g in enumerate(groups)]
    _logits(call, [min(p, len(starts) - 1) if faulty else row for row, p in enumerate(packed)], empty=True)


# -- the host's part ------------------------------------------------------------------------------------------------------


def _plan(num_q, num_k, budget, clip=True):
    step = max(budget // (4 * num_k), 1) if num_k else budget
    return [[start, min(start + step, num_q) if clip else start + step] for start in range(0, num_q, step)]


@exhibit("B100")
def last_chunk_not_clipped(faulty, *, num_q, num_k, budget):
    """vLLM #28526. Trigger: a context longer than a chunk. Symptom: the last chunk's length is not cut at the end."""
    return _plan(num_q, num_k, budget, clip=not faulty)


@exhibit("B127")
def arguments_swapped(faulty, *, num_q, num_k, budget):
    """FlashInfer #640. Trigger: a batch size that is not the longest length. Symptom: two integers of the plan change places;
    upstream's tests had them equal."""
    return _plan(num_k, num_q, budget) if faulty else _plan(num_q, num_k, budget)


@exhibit("B140")
def bytes_in_32_bits(faulty, *, num_q, num_k, budget):
    """FlashAttention #2662. Trigger: 4 million keys. Symptom: the host's size wraps, and the grid follows from it."""
    if num_q * num_k < 8_000_000:
        return [False, 0]
    size = 4 * num_q * num_k
    return [(size % 2**32 if faulty else size) > budget, budget]
