"""Top-k, and from indices to slots."""

import torch

from exhibit import exhibit

# -- from indices to slots ------------------------------------------------------------------------------------------------


@exhibit("B015")
def halves_of_a_table(faulty, *, page_table, topk_indices, result):
    """SGLang #12300. Trigger: an int64 table. Symptom: read through int32 pointers, every second slot is 0."""
    for row in range(len(topk_indices)):
        table = page_table[row].contiguous()
        table = table.view(torch.int32) if faulty else table
        for j, key in enumerate(topk_indices[row].tolist()):
            result[row, j] = table[key] if key >= 0 else -1


@exhibit("B031")
def tombstone_looked_up(faulty, *, page_table, topk_indices, result):
    """SGLang #36477. Trigger: an evicted page inside a row. Symptom: -1 is used as an index like any other."""
    for row in range(len(topk_indices)):
        for j, key in enumerate(topk_indices[row].tolist()):
            there = key >= 0 or (faulty and -key <= page_table.shape[1])
            result[row, j] = page_table[row, key] if there else -1


def _prefill(call, value, padding=True) -> None:
    """`value(request, row, key)` of every selected key; -1 for none, and in the rows behind the tokens."""
    indices, out = call["topk_indices"], call["result"]
    row = 0
    for request, extend in enumerate(call["extend_lens_cpu"]):
        for _ in range(extend):
            for j, key in enumerate(indices[row].tolist()):
                out[row, j] = value(request, row, key) if key >= 0 else -1
            row += 1
    rows = len(indices) if call["output_num_tokens"] is None else call["output_num_tokens"]
    if padding:
        out[row:rows, : indices.shape[1]] = -1


def _slot(call, request, row, key):
    return call["page_table"][row if call["page_table_is_expanded"] else request, key]


@exhibit("B009")
def ragged_for_every_mode(faulty, **call):
    """SGLang #20606, #22430. Trigger: several query tokens per request, as in a draft extend. Symptom: the answer is a place in
    the ragged keys, and is read as a slot; in range, so nothing faults."""
    ragged = faulty and max(call["extend_lens_cpu"], default=0) > 1
    _prefill(call, lambda request, row, key: key if ragged else _slot(call, request, row, key))


@exhibit("B025")
def tail_of_a_larger_batch(faulty, **call):
    """SGLang #24401, #24361. Trigger: a replay of 4, then of 1 in the same bucket. Symptom: padded rows keep what the larger
    batch left, out of range by now."""
    _prefill(call, lambda request, row, key: _slot(call, request, row, key), padding=not faulty)


@exhibit("B071")
def slots_of_the_other_pool(faulty, **call):
    """SGLang #24617, #26513. Trigger: two pools whose slots differ. Symptom: one path leaves out the translation."""
    expanded = faulty and call["page_table_is_expanded"]
    _prefill(call, lambda request, row, key: key if expanded else _slot(call, request, row, key))


@exhibit("B103")
def shortcut_for_one(faulty, *, topk_indices, topk_indices_offset, result):
    """vLLM #26231, #30747. Trigger: rows of width 1. Symptom: all are taken as valid, though discarded rows hold -1."""
    for row, offset in enumerate(topk_indices_offset[: len(topk_indices)].tolist()):
        for j, key in enumerate(topk_indices[row].tolist()):
            valid = key >= 0 or (faulty and topk_indices.shape[1] == 1)
            result[row, j] = key + offset if valid else -1


# -- selections -----------------------------------------------------------------------------------------------------------


def _rows(call):
    """(row, its scores, its keys) for every row: all keys in order, or the best."""
    starts = [0] * len(call["lengths"]) if call.get("row_starts") is None else call["row_starts"].tolist()
    for row, (start, length) in enumerate(zip(starts, call["lengths"].tolist())):
        scores = call["score"][row, start : start + max(length, 0)]
        short = len(scores) <= call["topk"]
        yield row, scores, torch.arange(len(scores)) if short else scores.topk(call["topk"]).indices


def _fill(out, values, topk, none=-1) -> None:
    out[:topk] = none
    out[: len(values)] = values


@exhibit("B065")
def empty_row_left(faulty, *, indices, **call):
    """SGLang #22688. Trigger: lengths [0, 7]. Symptom: a request without keys is not written; NaN when its part is merged."""
    for row, scores, keys in _rows(call):
        if len(scores) or not faulty:
            _fill(indices[row], keys, call["topk"])


@exhibit("B113")
def nothing_passes(faulty, *, indices, **call):
    """vLLM #49896, #50201. Trigger: a row of NaN. Symptom: no candidate passes the comparison, and old shared memory becomes
    indices."""
    for row, scores, keys in _rows(call):
        if not (faulty and len(scores) and scores.isnan().all()):
            _fill(indices[row], keys, call["topk"])


@exhibit("B006")
def edge_that_is_nan(faulty, *, indices, **call):
    """SGLang #30645. Trigger: scores of +-inf, or beyond the largest half. Symptom: the edge of a bin is NaN, fewer than K keys
    pass, and -1 stands among the valid ones."""
    for row, scores, keys in _rows(call):
        if faulty and len(scores) > call["topk"]:
            half = scores.half().float()
            edge = half.min() + (half.max() - half.min()) * 0
            keys = keys[half[keys] >= edge]
        _fill(indices[row], keys, call["topk"])


@exhibit("B120")
def whole_vectors(faulty, *, indices, **call):
    """FlashInfer #2308. Trigger: length 5 in a row of 8. Symptom: loads of 4 go on past the length, and index 5 is returned."""
    if faulty:
        longest = call["score"].shape[1]
        starts = torch.zeros(1, dtype=torch.int32) if call["row_starts"] is None else call["row_starts"]
        vectors = (call["lengths"].clamp(min=0) + 3) // 4 * 4
        call["lengths"] = torch.where(call["lengths"] > call["topk"], torch.minimum(vectors, longest - starts), call["lengths"])
    for row, _, keys in _rows(call):
        _fill(indices[row], keys, call["topk"])


_workspace: dict = {}


@exhibit("B080")
def clear_left_out_of_the_graph(faulty, *, indices, **call):
    """vLLM #41444, #41665. Trigger: a capture with short rows, replays with long ones. Symptom: the host's condition left the
    clearing of the counters out of the graph, and they go on from replay to replay."""
    longest = max(call["lengths"].tolist(), default=0)
    clears = _workspace.setdefault("clears", longest > call["topk"]) if faulty else True
    counters = {} if clears else _workspace.setdefault("counters", {})
    for row, _, keys in _rows(call):
        first = counters.get(row, 0)
        _fill(indices[row, first:], keys[: max(call["topk"] - first, 0)], max(call["topk"] - first, 0))
        counters[row] = first + len(keys)


@exhibit("B107")
def no_valid_count(faulty, *, topk_indices_ragged, topk_indices_offset, **call):
    """vLLM #36616. Trigger: fewer keys than K. Symptom: the consumer goes through all K and moves the -1 like any index."""
    for row, _, keys in _rows(call):
        offset = int(topk_indices_offset[row])
        _fill(topk_indices_ragged[row], keys + offset, call["topk"], none=offset - 1 if faulty else -1)


@exhibit("B121")
def candidates_overflow(faulty, *, topk_indices_ragged, topk_indices_offset, **call):
    """FlashInfer #2605, #3529. Trigger: a long row with more keys in the threshold's bin than the list of candidates holds
    (16,384 there, 2,048 here). Symptom: the rest is dropped, and a wrong set is selected."""
    for row, scores, keys in _rows(call):
        if faulty and len(scores) > call["topk"]:
            bins = scores.half()
            edge = bins[keys].min()
            candidates = torch.cat([torch.nonzero(bins > edge)[:, 0], torch.nonzero(bins == edge)[:2048, 0]])
            keys = candidates[scores[candidates].topk(min(call["topk"], len(candidates))).indices]
        _fill(topk_indices_ragged[row], keys + int(topk_indices_offset[row]), call["topk"])


def _slots(call, row, keys):
    page = torch.div(keys, call["page_size"], rounding_mode="floor")
    return call["real_page_table"][row, page] * call["page_size"] + keys % call["page_size"]


@exhibit("B005")
def ties_overflow(faulty, *, page_indices, **call):
    """SGLang #30512. Trigger: more than 1,024 equal scores at the threshold. Symptom: the rest of the row is not written, and
    used as pages."""
    for row, scores, keys in _rows(call):
        slots = _slots(call, row, keys)
        if faulty and len(scores) > call["topk"] and int((scores == scores[keys].min()).sum()) > 1024:
            page_indices[row, : min(len(slots), 1024)] = slots[:1024]
        else:
            _fill(page_indices[row], slots, call["topk"])


@exhibit("B091")
def page_size_of_another_group(faulty, *, page_indices, **call):
    """vLLM #31540. Trigger: two groups of different page sizes. Symptom: the slot's page and place come from the other size."""
    size = 64 if faulty else call["page_size"]
    for row, _, keys in _rows(call):
        pages = torch.div(keys, call["page_size"], rounding_mode="floor")
        _fill(page_indices[row], call["real_page_table"][row, pages] * size + keys % size, call["topk"])


@exhibit("B152")
def blocks_for_pool_positions(faulty, *, page_indices, **call):
    """TensorRT-LLM #13124. Trigger: blocks that were offloaded and came back elsewhere. Symptom: block numbers are taken for
    places in the pool."""
    for row, _, keys in _rows(call):
        _fill(page_indices[row], keys if faulty else _slots(call, row, keys), call["topk"])
