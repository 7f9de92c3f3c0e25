"""The indexer family: differential campaigns, wrong calls, examples worked by hand, and relations between ranks.

| group        | would catch                                                                                         |
| ------------ | --------------------------------------------------------------------------------------------------- |
| differential | query offset used as key offset (SGLang #12583), the unselected batch's sizes (#18280), tokens given to |
|              | ranks that have none (vLLM #27518), fewer tokens than ranks (#19656), a round-up too many (#34443),  |
|              | selection by value instead of position (#28718)                                                     |
| outside      | totals and counts that a caller must not pass                                                       |
| relations    | an oracle that is consistently wrong: every token must be on exactly one rank                       |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.findings import CheckOptions
from harness.layout import Layout, Place
from oracles.indexer import (CpRoundRobinSplit, CpRoundRobinSplitQSeqs, CpRoundRobinSplitQSeqsCpu, CpRoundRobinSplitRows,
                             CpZigzagMetadata, CpZigzagSplit, IndexerKStartEnd, Req)
from oracles.seqlens import Req as ExpandReq
from oracles.seqlens import SeqlensExpand
from strategies import domain, indexer

FAMILY = "indexer"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_far(subject, session):
    """Rows past element 2^31, on both sides."""
    places = {"x": Place("far"), "split": Place("far", guard="left")}
    lanes.fixed(session, subject, Example((CpRoundRobinSplitRows(9, 4, 1, columns=5),), Layout(places)))


WRONG_CALLS = [
    IndexerKStartEnd((Req(3, 10), Req(0, 7), Req(2, 4))),
    CpRoundRobinSplitQSeqs((5, 0, 4), cp_size=2, cp_rank=1),
    CpRoundRobinSplit(8, 2, 1),
    CpRoundRobinSplitRows(8, 2, 1, columns=3),
    CpZigzagSplit((Req(9, 10), Req(5, 5)), cp_size=2, cp_rank=1),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 7


@pytest.mark.parametrize("case", [*WRONG_CALLS, CpRoundRobinSplitQSeqsCpu((3, 2)), CpZigzagMetadata((Req(9, 10),))],
                         ids=lambda c: c.contract.name)
@pytest.mark.parametrize(("rank", "message"), [
    ({"cp_size": 2, "cp_rank": 2}, "cp_rank must be below 2, got 2"),
    ({"cp_size": 2, "cp_rank": -1}, "cp_rank must be an integer of at least 0"),
    ({"cp_size": 0, "cp_rank": 0}, "cp_size must be an integer of at least 1"),
])
def test_a_rank_that_does_not_exist_is_refused_by_name(case, rank, message, session):
    class Misled(type(case)):
        """The case as it is, called with another rank."""

        def arguments(self):
            return {**super().arguments(), **rank}

    wrong = Misled(**{f: getattr(case, f) for f in case.__dataclass_fields__})
    options = CheckOptions(checks=("inputs", "redzones", "memory"))
    found = differential.check(Example((wrong,)), session.worker("kernels"), case.contract.rules(), options)
    assert [f.kind for f in found] == [("raised", "ValueError")] and message in found[0].sentence and not found[0].wrote


# -- worked by hand -----------------------------------------------------------------------------------------------------


def answer(case, **rules) -> dict[str, list]:
    """What the oracle writes to every output."""
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules(rules))
    return {name: c.value.tolist() for name, c in cells.items()} if case.contract.args else cells


def test_the_ranges_of_the_fix_of_12583():
    got = answer(IndexerKStartEnd((Req(3, 10), Req(2, 4))))
    assert got == {"ks": [0, 0, 0, 10, 10], "ke": [8, 9, 10, 13, 14], "token_to_batch_idx": [0, 0, 0, 1, 1]}


def test_requests_without_a_token_of_the_rank_leave_no_gap_in_its_keys():
    batch = (Req(3, 10), Req(1, 7), Req(0, 5), Req(2, 4))  # tokens 0-2, 3, none, 4-5
    assert answer(IndexerKStartEnd(batch, cp_size=3, cp_rank=0)) == {
        "ks": [0, 10], "ke": [8, 17], "token_to_batch_idx": [0, 1]}
    assert answer(IndexerKStartEnd(batch, cp_size=3, cp_rank=1)) == {
        "ks": [0, 10], "ke": [9, 13], "token_to_batch_idx": [0, 1]}
    assert answer(IndexerKStartEnd(batch, cp_size=3, cp_rank=2)) == {
        "ks": [0, 10], "ke": [10, 14], "token_to_batch_idx": [0, 1]}
    assert answer(IndexerKStartEnd(batch)) == {
        "ks": [0, 0, 0, 10, 22, 22], "ke": [8, 9, 10, 17, 25, 26], "token_to_batch_idx": [0, 0, 0, 1, 3, 3]}


def test_a_zigzag_of_one_request_over_two_ranks():
    early_and_last = answer(CpZigzagSplit((Req(7, 9),), cp_size=2, cp_rank=0))
    assert early_and_last == {"token_indices": [0, 1, 6], "q_lens": [2, 1], "kv_lens": [4, 9]}
    middle = answer(CpZigzagSplit((Req(7, 9),), cp_size=2, cp_rank=1), prefix="left_out")
    assert middle == {"token_indices": [2, 3, 4, 5], "q_lens": [2, 2], "kv_lens": [4, 6]}


# -- relations between answers of the oracles ---------------------------------------------------------------------------


RANKS = st.sampled_from((1, 2, 3, 4, 8))
BATCHES = st.lists(indexer.requests(), max_size=5).map(tuple)


def every_rank(case_of, cp_size: int) -> list:
    """The answers of all ranks."""
    return [answer(case_of(cp_size, rank)) for rank in range(cp_size)]


@given(BATCHES, RANKS)
def test_the_ranks_together_have_every_token_once_with_its_range_and_request(batch, cp_size):
    whole = answer(IndexerKStartEnd(batch))
    keys = np.cumsum([0, *(r.seq_len for r in batch)])
    for rank, part in enumerate(every_rank(lambda c, r: IndexerKStartEnd(batch, cp_size=c, cp_rank=r), cp_size)):
        own = {name: column[rank::cp_size] for name, column in whole.items()}
        assert np.subtract(part["ke"], part["ks"]).tolist() == np.subtract(own["ke"], own["ks"]).tolist()
        if cp_size == 1:
            assert part == own
            continue
        owners = sorted(set(own["token_to_batch_idx"]))
        assert [owners[place] for place in part["token_to_batch_idx"]] == own["token_to_batch_idx"]
        selected = np.cumsum([0, *(batch[i].seq_len for i in owners)])
        assert part["ks"] == [int(selected[place]) for place in part["token_to_batch_idx"]]
        assert own["ks"] == [int(keys[i]) for i in own["token_to_batch_idx"]]


@given(BATCHES)
def test_key_ranges_are_as_long_as_the_expanded_lengths(batch):
    got = answer(IndexerKStartEnd(batch))
    expanded = answer(SeqlensExpand(tuple(ExpandReq(r.extend_len, r.seq_len) for r in batch)))["seqlens_expanded"]
    assert np.subtract(got["ke"], got["ks"]).tolist() == expanded
    ends = np.cumsum([r.seq_len for r in batch]).tolist()
    lasts = np.cumsum([r.extend_len for r in batch]) - 1
    assert [got["ke"][k] for k, r in zip(lasts, batch) if r.extend_len] == [e for e, r in zip(ends, batch) if r.extend_len]


@given(BATCHES, BATCHES)
def test_ranges_of_a_second_batch_are_shifted_by_the_keys_of_the_first(a, b):
    both, first, second = (answer(IndexerKStartEnd(batch)) for batch in (a + b, a, b))
    keys = sum(r.seq_len for r in a)
    shift = {"ks": keys, "ke": keys, "token_to_batch_idx": len(a)}
    assert both == {n: first[n] + [v + shift[n] for v in second[n]] for n in shift}


@given(BATCHES, RANKS, st.sampled_from((1, 2, 5)))
def test_a_padded_request_changes_no_row_before_it(batch, cp_size, extend):
    padded = (*batch, Req(extend, extend))
    for rank in range(cp_size):
        before, after = (answer(IndexerKStartEnd(b, cp_size=cp_size, cp_rank=rank)) for b in (batch, padded))
        assert before == {name: column[: len(before["ks"])] for name, column in after.items()}
        before, after = (answer(CpRoundRobinSplitQSeqs(tuple(r.extend_len for r in b), cp_size=cp_size, cp_rank=rank))
                         for b in (batch, padded))
        assert before == {name: column[: len(before["bs_idx"])] for name, column in after.items()}


@given(BATCHES, st.randoms(use_true_random=False))
def test_permuting_requests_permutes_their_segments(batch, random):
    order = random.sample(range(len(batch)), len(batch))
    got, permuted = (answer(IndexerKStartEnd(tuple(b))) for b in (batch, [batch[i] for i in order]))
    lengths = np.subtract(got["ke"], got["ks"])
    segments = np.split(lengths, np.cumsum([r.extend_len for r in batch])[:-1]) if batch else []
    expected = np.concatenate([segments[i] for i in order]) if batch else lengths
    assert np.subtract(permuted["ke"], permuted["ks"]).tolist() == expected.tolist()


@given(st.lists(st.integers(0, 40), max_size=8), RANKS)
def test_counts_are_those_of_the_tokens_counted_one_by_one(extends, cp_size):
    owners = [i for i, n in enumerate(extends) for _ in range(n)]
    for rank in range(cp_size):
        own = owners[rank::cp_size]
        got = answer(CpRoundRobinSplitQSeqs(tuple(extends), cp_size=cp_size, cp_rank=rank))
        assert got["bs_idx"] == sorted(set(own)) and got["q_lens"] == [own.count(i) for i in got["bs_idx"]]
        assert answer(CpRoundRobinSplitQSeqsCpu(tuple(extends), cp_size, rank)) == got


@given(st.lists(st.integers(0, 40), max_size=8), RANKS)
def test_the_ranks_together_count_every_request_fully(extends, cp_size):
    totals = [0] * len(extends)
    for part in every_rank(lambda c, r: CpRoundRobinSplitQSeqs(tuple(extends), cp_size=c, cp_rank=r), cp_size):
        for i, count in zip(part["bs_idx"], part["q_lens"]):
            totals[i] += count
    assert totals == extends


@given(BATCHES, RANKS)
def test_a_rank_repeats_the_keys_of_its_requests_by_its_counts(batch, cp_size):
    for rank in range(cp_size if cp_size > 1 else 0):
        ranges = answer(IndexerKStartEnd(batch, cp_size=cp_size, cp_rank=rank))
        counts = answer(CpRoundRobinSplitQSeqs(tuple(r.extend_len for r in batch), cp_size=cp_size, cp_rank=rank))
        starts = np.cumsum([0, *(batch[i].seq_len for i in counts["bs_idx"])])[:-1]
        assert ranges["ks"] == np.repeat(starts, counts["q_lens"]).tolist()
        assert ranges["token_to_batch_idx"] == np.repeat(np.arange(len(starts)), counts["q_lens"]).tolist()


@given(BATCHES, RANKS)
def test_the_parts_of_a_split_interleave_to_the_whole(batch, cp_size):
    tokens = sum(r.extend_len for r in batch) % 50
    parts = every_rank(lambda c, r: CpRoundRobinSplit(tokens, c, r), cp_size)
    rows = every_rank(lambda c, r: CpRoundRobinSplitRows(tokens, c, r, columns=2), cp_size)
    whole, whole_rows = CpRoundRobinSplit(tokens).values("x", tokens).tolist(), answer(CpRoundRobinSplitRows(tokens, columns=2))
    assert [parts[g % cp_size]["split"][g // cp_size] for g in range(tokens)] == whole
    assert [rows[g % cp_size]["split"][g // cp_size] for g in range(tokens)] == whole_rows["split"]


ZIGZAGS = indexer.cp_zigzag_split().map(lambda c: replace(c, times=1, spare=0))


@given(ZIGZAGS)
def test_the_zigzag_ranks_together_have_every_token_once(case):
    parts = every_rank(lambda c, r: replace(case, cp_rank=r), case.cp_size)
    assert sorted(t for part in parts for t in part["token_indices"]) == list(range(case.num_tokens()))


@given(ZIGZAGS)
def test_the_last_token_of_a_segment_sees_all_keys_up_to_itself(case):
    part, bs = answer(case), len(case.batch)
    firsts = np.cumsum([0, *(r.extend_len for r in case.batch)])
    ends = np.cumsum(part["q_lens"])
    for k, (end, count) in enumerate(zip(ends, part["q_lens"])):
        r = case.batch[k % bs]
        if count:
            assert part["kv_lens"][k] == r.seq_len - r.extend_len + part["token_indices"][end - 1] - firsts[k % bs] + 1


@given(ZIGZAGS)
def test_keys_without_the_prefix_are_the_keys_of_the_extend(case):
    counted, left_out = answer(case), answer(case, prefix="left_out")
    prefixes = [r.seq_len - r.extend_len for r in case.batch] * 2
    assert np.subtract(counted["kv_lens"], left_out["kv_lens"]).tolist() == prefixes
    assert counted["token_indices"] == left_out["token_indices"] and counted["q_lens"] == left_out["q_lens"]


@given(ZIGZAGS)
def test_the_zigzag_lists_of_the_host_say_the_same(case):
    host = answer(CpZigzagMetadata(case.batch, case.padding, case.cp_size, case.cp_rank))
    part = answer(case)
    assert host["q_lens_prev"] + host["q_lens_next"] == part["q_lens"]
    assert host["kv_lens_prev"] + host["kv_lens_next"] == part["kv_lens"]
    assert host["per_rank_actual_token"][case.cp_rank] == len(part["token_indices"])
    starts = np.cumsum([0, *host["split_list"]])
    picked = [t for k in host["zigzag_index"] for t in range(starts[k], starts[k + 1])]
    assert picked == part["token_indices"]


@given(ZIGZAGS)
def test_gathering_all_zigzag_ranks_gives_the_batch_again(case):
    host = answer(CpZigzagMetadata(case.batch, case.padding, case.cp_size, case.cp_rank))
    gathered = np.array([t for part in every_rank(lambda c, r: replace(case, cp_rank=r), case.cp_size)
                         for t in part["token_indices"]], dtype=np.int64)
    pieces = np.split(gathered, np.cumsum(host["reverse_split_len"])[:-1]) if case.batch else []
    again = [int(t) for k in host["cp_reverse_index"] for t in pieces[k]]
    assert again == list(range(case.num_tokens()))


@given(ZIGZAGS.filter(lambda c: c.batch))
def test_padding_lengthens_the_last_request_only(case):
    longer = (*case.batch[:-1], Req(case.batch[-1].extend_len + case.padding, case.batch[-1].seq_len + case.padding))
    assert answer(case) == answer(replace(case, requests=longer, padding=0))


@given(BATCHES, RANKS)
def test_a_zigzag_split_needs_a_token_for_every_segment_of_every_request(batch, cp_size):
    host = answer(CpZigzagMetadata(batch, cp_size=cp_size))
    assert host["can_split"] == (cp_size > 1 and len(batch) > 0 and min(host["split_list"]) >= 1)
