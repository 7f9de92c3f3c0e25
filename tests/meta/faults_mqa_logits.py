"""Faults of the mqa_logits family, each as small as the real ones were."""

import torch


# -- host ---------------------------------------------------------------------------------------------------------------


def _budget(query, static_share, fraction):
    _, free, total, capturing = query
    cap = int(total * 0.3)
    if static_share is not None:
        cap = min(int(int(total * max(0.0, 1.0 - static_share)) * fraction), cap)
    return max(1, cap), (0 if capturing else max(1, min(int(free * fraction), max(1, cap))))


def capture_cached(*, queries, mem_fraction_static, free_fraction):
    """What a capture is told is kept for everyone."""
    kept, answers = {}, []
    for query in queries:
        if query[0] not in kept:
            static, measured = _budget(query, mem_fraction_static, free_fraction)
            kept[query[0]] = static if query[3] else measured
        answers.append(kept[query[0]])
    return answers


def one_budget_for_all_devices(*, queries, mem_fraction_static, free_fraction):
    kept, answers = None, []
    for query in queries:
        static, measured = _budget(query, mem_fraction_static, free_fraction)
        if kept is None and not query[3]:
            kept = measured
        answers.append(static if kept is None else kept)
    return answers


def budget_of_zero(*, queries, mem_fraction_static, free_fraction):
    """Nothing free is a budget of 0, which later divides."""
    kept, answers = {}, []
    for query in queries:
        static, measured = _budget(query, mem_fraction_static, free_fraction)
        if query[0] in kept:
            answers.append(kept[query[0]])
        elif query[3]:
            answers.append(static)
        else:
            kept[query[0]] = min(int(query[1] * free_fraction), measured)
            answers.append(kept[query[0]])
    return answers


def chunks_at_the_budget(*, num_q, num_k, budget):
    """Exactly the budget counts as too much."""
    return [False, 0] if num_q * num_k < 8_000_000 else [4 * num_q * num_k >= budget, budget]


def elements_for_bytes(*, num_q, num_k, budget):
    return [False, 0] if num_q * num_k < 8_000_000 else [num_q * num_k > budget, budget]


def last_chunk_dropped(*, num_q, num_k, budget):
    """Only whole chunks."""
    rows = max(1, budget // max(1, 4 * num_k))
    return [[start, start + rows] for start in range(0, num_q - rows + 1, rows)]


def no_row_fits(*, num_q, num_k, budget):
    """A budget below one row gives chunks of none."""
    rows = budget // max(1, 4 * num_k)
    return [[start, min(start + rows, num_q)] for start in range(0, num_q, rows)] if rows else []


# -- scores -------------------------------------------------------------------------------------------------------------


def _scores(q, k, k_scale, weights, ks, ke, logits, clean_logits, relu=True, base=None):
    rows, keys = len(ks), len(k_scale)
    for i in range(rows):
        start, stop = (int(ks[i]), int(ke[i])) if base is None else base(i)
        if clean_logits:
            logits[i, :keys] = -torch.inf
        if start < stop:
            products = q[i].float() @ k[start:stop].float().T
            products = products.clamp(min=0) if relu else products
            logits[i, start:stop] = (products * weights[i][:, None]).sum(0) * k_scale[start:stop]


def honest_scores(*, ks, ke, **rest):
    _scores(ks=ks, ke=ke, **rest)


def _tensor_core(a, b):
    """The dot products of two float rows as fp8 tensor cores take them."""
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(a), 32):
        terms = torch.cat([total[None], (a[first : first + 32] * b[first : first + 32]).double()])
        unit = 2.0 ** (float(torch.frexp(terms.abs().max())[1]) - 14)
        total = (terms / unit).trunc().sum() * unit
    return float(total)


def scores_of_fp8_tensor_cores(*, q, k, k_scale, weights, ks, ke, logits, clean_logits):
    """Right by the rule `sums=fp8_tensor_core` alone."""
    for i in range(len(ks)):
        if clean_logits:
            logits[i, : len(k_scale)] = -torch.inf
        for j in range(int(ks[i]), int(ke[i])):
            heads = [max(_tensor_core(q[i, h].float(), k[j].float()), 0.0) * float(weights[i, h]) for h in range(q.shape[1])]
            logits[i, j] = sum(heads) * k_scale[j]


def no_relu(*, ks, ke, **rest):
    _scores(ks=ks, ke=ke, **rest, relu=False)


def query_counter_as_key_base(*, ks, ke, **rest):
    """Keys are counted from the query row (SGLang #12583)."""
    _scores(ks=ks, ke=ke, **rest, base=lambda i: (min(i, int(ks[i])), int(ke[i])))


def scale_forgotten(*, k_scale, **rest):
    _scores(k_scale=torch.ones_like(k_scale), **rest)


def tail_cleaned_always(*, clean_logits, **rest):
    """-inf also past the keys, into what is not the row's."""
    _scores(clean_logits=clean_logits, **rest)
    rest["logits"][: len(rest["ks"]), len(rest["k_scale"]) :] = -torch.inf


# -- chunked top-k ------------------------------------------------------------------------------------------------------


def _topk(logits, ks, lengths, topk_result, token_nums, index_topk, max_rows, name, column=None, stop_early=False):
    rows = len(ks)
    topk_result[:token_nums, :index_topk] = -1
    stops = [*range(max_rows, rows, max_rows), rows] if not stop_early else list(range(max_rows, rows + 1, max_rows))
    start = 0
    for stop in stops:
        for row in range(start, stop):
            length, first = int(lengths[row]), int(ks[row]) if column is None else column(row, start)
            if length <= 0:
                continue
            best = torch.arange(length)
            if length > index_topk:
                best = logits[row, first : first + length].topk(index_topk).indices
            topk_result[row, : len(best)] = name(row, start, best)
        start = stop


def _ragged(topk_indices_offset, name=None, **rest):
    _topk(**rest, name=name or (lambda row, start, best: (best + topk_indices_offset[row]).int()))


def _paged(page_table_1, token_to_batch_idx, owner=None, **rest):
    owner = owner or (lambda row, start: row)
    _topk(**rest, name=lambda row, start, best: page_table_1[int(token_to_batch_idx[owner(row, start)]), best])


def honest_paged(**rest):
    _paged(**rest)


def chunk_row_for_token(**rest):
    """The owner of a chunk's row is looked up from the batch's start (SGLang #14325)."""
    _paged(**rest, owner=lambda row, start: row - start)


def offset_of_the_chunk(*, topk_indices_offset, **rest):
    """The offsets are not sliced with the chunk."""
    _ragged(topk_indices_offset, **rest, name=lambda row, start, best: (best + topk_indices_offset[row - start]).int())


def ks_forgotten(*, topk_indices_offset, **rest):
    """Scores are read from the row's first column."""
    _ragged(topk_indices_offset, **rest, column=lambda row, start: 0)


def partial_chunk_dropped(*, topk_indices_offset, **rest):
    _ragged(topk_indices_offset, **rest, stop_early=True)


def one_key_short(*, topk_result, index_topk, **rest):
    """The last place of a full row stays -1 (SGLang #30645)."""
    _ragged(topk_result=topk_result, index_topk=index_topk, **rest)
    lengths = rest["lengths"]
    for row in range(len(rest["ks"])):
        if lengths[row] > index_topk:
            topk_result[row, index_topk - 1] = -1


def padding_left(*, topk_result, token_nums, **rest):
    """Rows of padding keep what they held."""
    keep = topk_result[len(rest["ks"]) : token_nums].clone()
    _paged(topk_result=topk_result, token_nums=token_nums, **rest)
    topk_result[len(rest["ks"]) : token_nums] = keep
