"""Metadata of a whole pass, in one call and in sessions."""

from exhibit import elsewhere, exhibit, put, replayed, sums

# -- an honest pass: rows first, then every buffer ------------------------------------------------------------------------


def lengths(call) -> list[int]:
    """Keys per request; the mode shows in the arguments."""
    return [n + call.get("draft_tokens", 0) for n in call["seq_lens"][: call["bs"]].tolist()]


def rows(call, keys) -> list[tuple[int, int]]:
    """(request, visible keys) of every row."""
    if "draft_tokens" in call:
        width = call["draft_tokens"]
        return [(i, n - width + 1 + j) for i, n in enumerate(keys) for j in range(width)]
    if "extend_seq_lens" in call:
        extends = call["extend_seq_lens"][: len(keys)].tolist()
        return [(i, max(n - e + 1 + j, 0)) for i, (n, e) in enumerate(zip(keys, extends)) for j in range(e)]
    return list(enumerate(keys))


def fill_lengths(call, keys, visible) -> None:
    clipped = [min(n, call["index_topk"]) for n in visible]
    for b in range(len(call["cache_seqlens"])):
        put(call["cache_seqlens"][b], keys)
        put(call["cu_seqlens_k"][b], sums(keys))
        put(call["nsa_cache_seqlens"][b], clipped)
        put(call["nsa_cu_seqlens_k"][b], sums(clipped))
        if "seqlens_expanded" in call:
            put(call["seqlens_expanded"][b], visible)
        if call.get("paged_mqa_ctx_lens_2d", [None])[0] is not None:
            for i, n in enumerate(keys):
                call["paged_mqa_ctx_lens_2d"][b][i, : call["draft_tokens"]] = n


def fill_tables(call, keys, owners) -> None:
    slots, page_size = call["req_pool_indices"].tolist(), call["page_size"]
    for row, i in enumerate(owners):
        tokens = call["req_to_token"][slots[i], : keys[i]]
        for wide, real in zip(call["page_table_1"], call["real_page_table"]):
            if wide is not None:
                wide[row, : keys[i]] = tokens
            if real is not None:
                real[row, : -(-keys[i] // page_size)] = tokens[::page_size] // page_size


def fill(call) -> None:
    keys = lengths(call)
    dealt = rows(call, keys)
    fill_lengths(call, keys, [n for _, n in dealt])
    fill_tables(call, keys, [i for i, _ in dealt])


# -- wrong in one call ----------------------------------------------------------------------------------------------------


@exhibit("B008")
def one_length_for_all_rows(faulty, **call):
    """SGLang #17662. Trigger: verify, 2 requests, 4 drafts. Symptom: every draft sees the keys of the last one; all fields
    agree with each other, and outputs are silently wrong."""
    keys = lengths(call)
    dealt = [(i, keys[i] if faulty else n) for i, n in rows(call, keys)]
    fill_lengths(call, keys, [n for _, n in dealt])
    fill_tables(call, keys, [i for i, _ in dealt])


@exhibit("B010")
def table_without_draft_columns(faulty, **call):
    """SGLang #19016, #29379. Trigger: a sequence at the context limit, plus drafts. Symptom: rows laid out for the limit alone
    run into the next row."""
    def narrow(table):
        pitch = table.stride(0) - call["draft_tokens"] * table.stride(1)
        return table.as_strided(table.shape, (max(pitch, 0), table.stride(1)), table.storage_offset())

    if faulty:
        call["page_table_1"] = [t if t is None else narrow(t) for t in call["page_table_1"]]
    fill(call)


@exhibit("B044")
def extend_counted_twice(faulty, **call):
    """SGLang #26651, and #26512 the other way round. Trigger: prefix 5, extend 4. Symptom: 4 tokens are attended twice."""
    keys = lengths(call)
    told = [n + e for n, e in zip(keys, call["extend_seq_lens"].tolist())] if faulty else keys
    dealt = rows(call, keys)
    fill_lengths(call, told, [n for _, n in dealt])
    fill_tables(call, keys, [i for i, _ in dealt])


@exhibit("B048")
def full_capacity(faulty, **call):
    """SGLang #36913. Trigger: capacity 8, bucket 4. Symptom: the batch is as long as the static buffers, and stale rows behind
    the bucket are processed."""
    fill(call)
    for cache in call["cache_seqlens"] if faulty else ():
        cache[call["bs"] :] = 1


@exhibit("B059")
def uniform_widths(faulty, **call):
    """SGLang #24856. Trigger: a draft extend with ragged accept lengths on the decode path. Symptom: rows belong to the wrong
    requests."""
    keys = lengths(call)
    dealt = rows(call, keys)
    owners = [row // max(call["max_extend_len"], 1) if faulty else i for row, (i, _) in enumerate(dealt)]
    fill_lengths(call, keys, [n for _, n in dealt])
    fill_tables(call, keys, owners)


@exhibit("B111")
def tokens_for_requests(faulty, **call):
    """vLLM #45100. Trigger: 2 requests of 4 tokens. Symptom: fields per request are filled for every token, over state of
    others."""
    fill(call)
    tokens = call["bs"] * call["draft_tokens"]
    for cache in call["cache_seqlens"] if faulty else ():
        cache[call["bs"] : tokens] = call["draft_tokens"] + 1


@exhibit("B160")
def negative_on_padding(faulty, **call):
    """vLLM-Ascend #12840, #13779. Trigger: padded rows, whose length is below what is subtracted for the rank. Symptom: local
    lengths of -2, a slow or wrong kernel."""
    keys, extends = lengths(call), call["extend_seq_lens"].tolist()
    visible = [n - e + 1 + j for n, e in zip(keys, extends) for j in range(e)]
    fill_lengths(call, keys, visible if faulty else [max(n, 0) for n in visible])
    fill_tables(call, keys, [i for i, _ in rows(call, keys)])


@exhibit("B165")
def padded_requests_left_out(faulty, **call):
    """xLLM #1939. Trigger: 100 requests in a bucket of 112. Symptom: sums stop at the last real request, while the captured
    kernel goes through the bucket."""
    keys = lengths(call)
    real = len(keys)
    while faulty and real and keys[real - 1] == 1:
        real -= 1
    dealt = rows(call, keys)
    fill_lengths(call, keys[:real], [n for _, n in dealt][:real])
    fill_tables(call, keys, [i for i, _ in dealt])


# -- wrong from the second call on ----------------------------------------------------------------------------------------


@exhibit("B046")
def lengths_in_another_tensor(faulty, **call):
    """SGLang #26521, #26655. Trigger: a replay with other lengths. Symptom: the draft step's graph reads the lengths of its
    capture."""
    fill(elsewhere(call, "cache_seqlens") if faulty and replayed("B046") else call)


@exhibit("B049")
def replay_on_the_capture_branch(faulty, **call):
    """SGLang #26019. Trigger: any second replay. Symptom: right values in fresh tensors, and a graph that reads the old
    ones."""
    outputs = [name for name, value in call.items() if isinstance(value, list)]
    fill(elsewhere(call, *outputs) if faulty and replayed("B049") else call)


@exhibit("B089")
def derived_fields_of_step_zero(faulty, **call):
    """vLLM #41162, #46849. Trigger: 2 draft steps. Symptom: lengths advance, what is derived from them stays at step 0."""
    derived = ("seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
    fill(elsewhere(call, *derived) if faulty and replayed("B089") else call)


@exhibit("B166")
def sums_allocated_again(faulty, **call):
    """RTP-LLM #1259, #1084. Trigger: a replay with allocations before it. Symptom: the graph reads freed sums."""
    fill(elsewhere(call, "cu_seqlens_k") if faulty and replayed("B166") else call)


_before: dict = {}


@exhibit("B072")
def buffers_of_the_last_replay(faulty, **call):
    """SGLang #22832. Trigger: a graph step, then an eager one. Symptom: the eager step reads the rows of the replay, since a
    runner exists."""
    keys = _before.setdefault("B072", lengths(call)) if faulty else lengths(call)
    dealt = rows(call, keys)
    fill_lengths(call, keys, [n for _, n in dealt])
    fill_tables(call, lengths(call), [i for i, _ in dealt])


@exhibit("B027")
def idle_returns_early(faulty, **call):
    """SGLang #26313. Trigger: a decode of 4, then an idle step. Symptom: the idle rank reads the lengths and tables of a batch
    that is gone."""
    if not (faulty and all(n <= 1 for n in call["seq_lens"][: call["bs"]].tolist())):
        fill(call)


# -- sessions of several modes: one body for all three --------------------------------------------------------------------


@exhibit("B026")
def idle_as_verify(faulty, **call):
    """SGLang #31705. Trigger: an idle rank after a verify. Symptom: its dummy batch counts draft tokens, as the last real step
    did."""
    keys = lengths(call)
    if "draft_tokens" in call:
        _before["width"] = call["draft_tokens"]
    elif faulty and all(n <= 1 for n in keys) and "extend_seq_lens" not in call:
        fill_lengths(call, [n + _before.get("width", 0) for n in keys], keys)
        return fill_tables(call, keys, range(len(keys)))
    return fill(call)


@exhibit("B061")
def fallback_of_another_mode(faulty, **call):
    """SGLang #32288. Trigger: a prefill, then a captured verify. Symptom: the verify records the tables that the eager step
    left behind."""
    slots = call["req_pool_indices"][: call["bs"]].clone()
    if "draft_tokens" in call and faulty:
        slots = _before.get("slots", slots)
    else:
        _before["slots"] = slots
    fill({**call, "req_pool_indices": slots})


@exhibit("B150")
def owners_of_the_first_step(faulty, **call):
    """TensorRT-LLM #16925, #17240, #19138. Trigger: 3 requests, from 4 tokens each to one. Symptom: tokens 0 to 3 are all
    request 0's, whose pages the others read and write. Right for one request."""
    keys = lengths(call)
    dealt = rows(call, keys)
    owners = [i for i, _ in dealt]
    if faulty and len(_before.get("owners", ())) > len(owners):
        owners = _before["owners"][: len(owners)]
    _before["owners"] = owners
    fill_lengths(call, keys, [n for _, n in dealt])
    fill_tables(call, keys, owners)
