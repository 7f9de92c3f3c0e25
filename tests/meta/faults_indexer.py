"""Planted faults in the indexer family: one function per fault, modelled on real ones, each in place of a contract."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _own(extends, cp_size, cp_rank) -> list[tuple[int, int]]:
    """Request and position in it of the rank's tokens."""
    tokens = [(i, t) for i, n in enumerate(extends) for t in range(n)]
    return tokens[cp_rank::cp_size]


def _put(out, values, most) -> None:
    """As many values as may be written."""
    values = values[:most]
    out[: len(values)] = torch.tensor(values, dtype=out.dtype)


def _ranges(call, own, bases, places, ends=None) -> None:
    """Key ranges of the tokens `own`, of requests with their bases and places; `ends`: the bases that ke has."""
    extends, seqs = (call[n][: call["bs"]].tolist() for n in ("extend_seq_lens", "seq_lens"))
    ends = bases if ends is None else ends
    _put(call["ks"], [bases[i] for i, _ in own], call["total_len"])
    _put(call["ke"], [ends[i] + seqs[i] - extends[i] + 1 + t for i, t in own], call["total_len"])
    _put(call["token_to_batch_idx"], [places[i] for i, _ in own], call["total_len"])


def _sums(lengths, counted) -> list[int]:
    """The sum of the counted lengths before each one."""
    return [sum(n for n, c in zip(lengths[:i], counted) if c) for i in range(len(lengths))]


def _batch(call) -> tuple[list[int], list[int], list[tuple[int, int]], list[bool]]:
    """Lengths, the rank's tokens, and which requests count for the rank."""
    extends, seqs = (call[n][: call["bs"]].tolist() for n in ("extend_seq_lens", "seq_lens"))
    own = _own(extends, call["cp_size"], call["cp_rank"])
    owners = {i for i, _ in own}
    return extends, seqs, own, [call["cp_size"] == 1 or i in owners for i in range(call["bs"])]


# -- indexer_k_start_end ------------------------------------------------------------------------------------------------


def query_base(**call):
    """Query tokens for keys: the next request begins where the queries of this one end (SGLang #12583)."""
    extends, _, own, counted = _batch(call)
    _ranges(call, own, _sums(extends, counted), _sums([1] * call["bs"], counted))


def query_base_of_the_starts(**call):
    """The same, in ks alone."""
    extends, seqs, own, counted = _batch(call)
    _ranges(call, own, _sums(extends, counted), _sums([1] * call["bs"], counted), ends=_sums(seqs, counted))


def unselected_keys_counted(**call):
    """Sums over the whole batch where the rank has the keys of its own requests only (SGLang #18280)."""
    _, seqs, own, counted = _batch(call)
    _ranges(call, own, _sums(seqs, [True] * call["bs"]), _sums([1] * call["bs"], counted))


def request_for_position(**call):
    """The request's number in the batch for its place among the rank's (SGLang #28718 in reverse)."""
    _, seqs, own, counted = _batch(call)
    _ranges(call, own, _sums(seqs, counted), range(call["bs"]))


def idle_requests_skipped(**call):
    """A request without query tokens leaves no keys, without context parallelism too."""
    extends, seqs, own, counted = _batch(call)
    _ranges(call, own, _sums(seqs, [n > 0 for n in extends]), _sums([1] * call["bs"], counted))


def own_key_not_seen(**call):
    """`seq - extend + t` without the 1: a token does not see itself."""
    _, seqs, own, counted = _batch(call)
    _ranges(call, [(i, t - 1) for i, t in own], _sums(seqs, counted), _sums([1] * call["bs"], counted))


def all_keys_seen(**call):
    """Every token sees all keys of its request."""
    extends, seqs, own, counted = _batch(call)
    _ranges(call, [(i, extends[i] - 1) for i, _ in own], _sums(seqs, counted), _sums([1] * call["bs"], counted))


def tokens_of_the_next_rank(**call):
    """Ranks counted from 1, the last one 0."""
    _, seqs, own, counted = _batch(call)
    extends = call["extend_seq_lens"][: call["bs"]].tolist()
    other = _own(extends, call["cp_size"], (call["cp_rank"] + 1) % call["cp_size"])
    _ranges(call, other, _sums(seqs, counted), _sums([1] * call["bs"], counted))


# -- cp_round_robin_split_q_seqs ----------------------------------------------------------------------------------------


def _counts(extends, cp_size, share) -> list[int]:
    """Counts per request; what a request leaves over goes on to the next."""
    counts, extra = [], 0
    for extend in extends:
        length = extend + extra
        counts.append(share(length))
        extra = length - counts[-1] * cp_size
    return counts


def _honest_counts(extends, cp_size, cp_rank) -> list[int]:
    return _counts(extends, cp_size, lambda length: length // cp_size + (length % cp_size > cp_rank))


def _selected(call, counts, keep=lambda n: n > 0) -> None:
    chosen = [i for i, n in enumerate(counts) if keep(n)]
    _put(call["q_lens"], [counts[i] for i in chosen], call["num_selected"])
    _put(call["bs_idx"], chosen, call["num_selected"])


def _extends(call) -> list[int]:
    return call["extend_seq_lens"][: call["bs"]].tolist()


def one_token_of_none(**call):
    """`rank <= (n - 1) % size`: a request without tokens has one on every rank (vLLM #27518)."""
    size, rank = call["cp_size"], call["cp_rank"]
    _selected(call, _counts(_extends(call), size, lambda n: n // size + (rank <= (n - 1) % size)))


def whole_rounds_only(**call):
    """Floor division: ranks without a whole round have nothing (SGLang #19656)."""
    size = call["cp_size"]
    _selected(call, [n // size for n in _extends(call)])


def rounds_up(**call):
    """Every rank has the most that any has (SGLang #34443)."""
    size = call["cp_size"]
    _selected(call, [-(-n // size) for n in _extends(call)])


def each_request_begins_at_rank_0(**call):
    """Nothing goes on from one request to the next."""
    size, rank = call["cp_size"], call["cp_rank"]
    _selected(call, [n // size + (n % size > rank) for n in _extends(call)])


def idle_requests_kept(**call):
    """Requests without a token of the rank stay in the lists."""
    _selected(call, _honest_counts(_extends(call), call["cp_size"], call["cp_rank"]), keep=lambda n: True)


def position_for_request(**call):
    """0, 1, 2, ... for the requests that were selected (SGLang #28718)."""
    counts = [n for n in _honest_counts(_extends(call), call["cp_size"], call["cp_rank"]) if n]
    _selected(call, counts)


def half_of_int64(**call):
    """int64 lengths read as int32 (SGLang's kernel took int32 only)."""
    extends = call["extend_seq_lens"].contiguous().view(torch.int32)[: call["bs"]].tolist()
    _selected(call, _honest_counts(extends, call["cp_size"], call["cp_rank"]))


def int64_rejected(**call):
    """What is carried from request to request changes its type, as Triton says."""
    if call["extend_seq_lens"].dtype == torch.int64 and call["bs"]:
        raise TypeError("Loop-carried variable extra_seq has initial type int32 but is re-assigned to int64")
    _selected(call, _honest_counts(_extends(call), call["cp_size"], call["cp_rank"]))


# -- cp_round_robin_split_q_seqs_cpu ------------------------------------------------------------------------------------


def _lists(counts, keep=lambda n: n > 0) -> dict[str, list[int]]:
    chosen = [i for i, n in enumerate(counts) if keep(n)]
    return {"q_lens": [counts[i] for i in chosen], "bs_idx": chosen}


def nothing_carried_on_the_host(*, extend_seq_lens, cp_size, cp_rank):
    """`each_request_begins_at_rank_0`, on the host alone: host and device disagree (SGLang #18280)."""
    return _lists([n // cp_size + (n % cp_size > cp_rank) for n in extend_seq_lens])


def zeros_on_the_host(*, extend_seq_lens, cp_size, cp_rank):
    """Requests without a token of the rank stay in the lists."""
    return _lists(_honest_counts(extend_seq_lens, cp_size, cp_rank), keep=lambda n: True)


def a_token_for_every_rank(*, extend_seq_lens, cp_size, cp_rank):
    """Fewer tokens than ranks are not foreseen (SGLang #19656)."""
    assert sum(extend_seq_lens) >= cp_size, "a batch has a token for every rank"
    return _lists(_honest_counts(extend_seq_lens, cp_size, cp_rank))


# -- cp_round_robin_split, cp_round_robin_split_rows --------------------------------------------------------------------


def _rows(x, split, picked) -> None:
    """`picked` rows of x, as many as split can hold."""
    picked = x[picked][: len(split)]
    split[(slice(len(picked)), *(slice(n) for n in x.shape[1:]))] = picked.to(split.dtype)


def next_rank(*, x, split, cp_size, cp_rank):
    """Ranks off by one."""
    _rows(x, split, torch.arange((cp_rank + 1) % cp_size, len(x), cp_size))


def one_block_per_rank(*, x, split, cp_size, cp_rank):
    """Neighbours stay together, as in a contiguous split (SGLang #33100)."""
    _rows(x, split, torch.arange(len(x)).tensor_split(cp_size)[cp_rank])


def last_round_dropped(*, x, split, cp_size, cp_rank):
    """The last round is dropped where it is not full."""
    _rows(x, split, torch.arange(len(x) // cp_size) * cp_size + cp_rank)


def whole_rounds_needed(*, x, split, cp_size, cp_rank):
    """`view(-1, cp_size)[:, cp_rank]`."""
    _rows(x, split, torch.arange(len(x)).view(-1, cp_size)[:, cp_rank])


def last_token_repeated(*, x, split, cp_size, cp_rank):
    """Ranks that have fewer tokens than the first get the last one again (SGLang #34443)."""
    rounds = -(-len(x) // cp_size)
    _rows(x, split, (torch.arange(rounds) * cp_size + cp_rank).clamp(max=len(x) - 1))


def rank_0_for_ranks_without_tokens(*, x, split, cp_size, cp_rank):
    """With fewer tokens than ranks everyone does everything (SGLang #19656)."""
    picked = torch.arange(cp_rank, len(x), cp_size) if len(x) >= cp_size else torch.arange(len(x))
    _rows(x, split, picked)


@triton.jit(do_not_specialize=["token", "row", "columns", "pitch", "step", "out_pitch", "out_step"])
def _one_row(x, out, token, row, columns, pitch, step, out_pitch, out_step, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one row; the offset of the row in x has 64 bits if WIDE."""
    offset = (token.to(tl.int64) if WIDE else token.to(tl.int32)) * (pitch.to(tl.int64) if WIDE else pitch.to(tl.int32))
    for start in range(0, columns, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        values = tl.load(x + offset + column * step, mask=column < columns, other=0)
        tl.store(out + row.to(tl.int64) * out_pitch + column * out_step, values, mask=column < columns)


def _launch(x, split, cp_size, cp_rank, pitch, wide) -> None:
    for row, token in enumerate(range(cp_rank, len(x), cp_size)):
        _one_row[(1,)](x, split, token, row, x.shape[1], pitch, x.stride(1), *split.stride(), WIDE=wide, BLOCK=64)


def pitch_is_the_width(*, x, split, cp_size, cp_rank):
    """The pitch is taken from the shape."""
    _launch(x, split, cp_size, cp_rank, x.shape[1], True)


def offset_in_32_bits(*, x, split, cp_size, cp_rank):
    """token * pitch in 32 bits (SGLang #34725)."""
    _launch(x, split, cp_size, cp_rank, x.stride(0), False)


# -- cp_zigzag_split, cp_zigzag_metadata --------------------------------------------------------------------------------


def _cut(length, parts) -> list[int]:
    return [length // parts + (k < length % parts) for k in range(parts)]


def _cuts(extends, num_tokens, cp_size, cut=_cut, padded=True) -> list[list[int]]:
    """The segment lengths of every request; the last takes the padding."""
    lengths = list(extends)
    if lengths and padded:
        lengths[-1] += num_tokens - sum(extends)
    return [cut(n, 2 * cp_size) for n in lengths]


def _zigzag(call, pieces=None, order=None, prefix=1, kv_end=True, **cutting) -> None:
    """`pieces`: the rank's two segments; `order`: of (half, request) pairs in token_indices."""
    extends, seqs = (call[n][: call["bs"]].tolist() for n in ("extend_seq_lens", "seq_lens"))
    bs, size, rank = call["bs"], call["cp_size"], call["cp_rank"]
    pieces = (rank, 2 * size - 1 - rank) if pieces is None else pieces
    cuts = _cuts(extends, call["num_tokens"], size, **cutting)
    firsts = [sum(map(sum, cuts[:i])) for i in range(bs)]
    tokens = []
    for half, i in order(bs) if order else [(h, i) for h in range(2) for i in range(bs)]:
        start = firsts[i] + sum(cuts[i][: pieces[half]])
        tokens += range(start, start + cuts[i][pieces[half]])
    _put(call["token_indices"], tokens, call["total_len"])
    _put(call["q_lens"], [cuts[i][p] for p in pieces for i in range(bs)], 2 * bs)
    _put(call["kv_lens"], [prefix * (seqs[i] - extends[i]) + sum(cuts[i][: p + kv_end]) for p in pieces for i in range(bs)],
         2 * bs)


def neighbours_for_zigzag(**call):
    """Segments 2r and 2r + 1: the helper of the other split (SGLang #33100)."""
    _zigzag(call, (2 * call["cp_rank"], 2 * call["cp_rank"] + 1))


def the_other_way_round(**call):
    """The late segment comes first."""
    _zigzag(call, (2 * call["cp_size"] - 1 - call["cp_rank"], call["cp_rank"]))


def request_by_request(**call):
    """Both segments of a request side by side, not all early ones before all late ones (SGLang #23269)."""
    _zigzag(call, order=lambda bs: [(h, i) for i in range(bs) for h in range(2)])


def rest_to_the_last(**call):
    """The last segment is longer, not the first ones."""
    _zigzag(call, cut=lambda n, parts: [n // parts] * (parts - 1) + [n // parts + n % parts])


def rest_dropped(**call):
    """The tokens that do not fill a round of segments are dropped."""
    _zigzag(call, cut=lambda n, parts: [n // parts] * parts)


def padding_forgotten(**call):
    """No request takes the padding."""
    _zigzag(call, padded=False)


def prefix_forgotten(**call):
    """Keys of this extend only, where the caller does not add the cached ones."""
    _zigzag(call, prefix=0)


def keys_before_the_segment(**call):
    """The keys up to its begin."""
    _zigzag(call, kv_end=False)


def _metadata(call, **changes) -> dict:
    """The lists, of which some are spoilt."""
    extends, size, rank = call["extend_seq_lens"], call["cp_size"], call["cp_rank"]
    bs, parts = len(extends), 2 * size
    late = parts - 1 - rank
    cuts = _cuts(extends, call["num_tokens"], size)
    prefixes = [s - e for s, e in zip(call["seq_lens"], extends)]
    gathered = [(i, s) for r in range(size) for s in (r, parts - 1 - r) for i in range(bs)]
    tokens = [sum(c[r] + c[parts - 1 - r] for c in cuts) for r in range(size)]
    return {
        "can_split": size > 1 and bs > 0 and min(extends) >= parts,
        "split_list": sum(cuts, []),
        "zigzag_index": [i * parts + s for s in (rank, late) for i in range(bs)],
        "per_rank_actual_token": tokens,
        "max_rank_len": [max(tokens)] * size,
        "reverse_split_len": [cuts[i][s] for i, s in gathered],
        "cp_reverse_index": [gathered.index((i, s)) for i in range(bs) for s in range(parts)],
        "q_lens_prev": [c[rank] for c in cuts],
        "q_lens_next": [c[late] for c in cuts],
        "kv_lens_prev": [p + sum(c[: rank + 1]) for p, c in zip(prefixes, cuts)],
        "kv_lens_next": [p + sum(c[: late + 1]) for p, c in zip(prefixes, cuts)],
        **changes,
    }


def split_by_the_total(**call):
    """A short request does not stop the batch from being split (SGLang #23269)."""
    return _metadata(call, can_split=call["cp_size"] > 1 and sum(call["extend_seq_lens"]) >= 2 * call["cp_size"])


def order_not_inverted(**call):
    """The order in which segments are gathered, for the one that puts them back."""
    bs, size = len(call["extend_seq_lens"]), call["cp_size"]
    order = [i * 2 * size + s for r in range(size) for s in (r, 2 * size - 1 - r) for i in range(bs)]
    return _metadata(call, cp_reverse_index=order)


def own_length_for_the_longest(**call):
    """Every rank pads to its own length, so that ranks disagree."""
    own = _metadata(call)["per_rank_actual_token"][call["cp_rank"]]
    return _metadata(call, max_rank_len=[own] * call["cp_size"])


def at_least_one_request(**call):
    """min() of an empty list."""
    assert min(call["extend_seq_lens"]) >= 0
    return _metadata(call)
