"""The seqlens family: differential campaigns, wrong calls, and relations that hold whatever the implementation.

| group        | would catch                                                                              |
| ------------ | ---------------------------------------------------------------------------------------- |
| differential | query offset used as key offset (SGLang #12583), negative padded lengths (#30378), stale tails |
| replays      | rows and lengths of an earlier batch (#24401)                                            |
| outside      | max_q_len below a length, a total that is not the sum                                    |
| misuse       | a kernel that accepts what it cannot honour                                              |
| relations    | an oracle that is consistently wrong                                                     |
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import lanes, registry
from harness.differential import Example
from harness.states import Cells
from oracles import seqlens
from oracles.seqlens import CuSeqlens, NsaCacheSeqlens, Req, SeqlensExpand
from strategies import domain, sessions
from strategies.seqlens import requests

FAMILY = "seqlens"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
@pytest.mark.parametrize("replayed", ["seqlens_expand", "cu_seqlens", "nsa_cache_seqlens"])
def test_replays(subject, replayed, session, record_property):
    lanes.replays(session, subject, replayed, sessions.replays(registry.contracts()[replayed]), record_property)


@pytest.mark.gate
def test_more_rows_than_a_grid_has_in_its_second_dimension(subject, session):
    """65,535 is all that a GPU's grid has in y and z."""
    lanes.fixed(session, subject, Example((SeqlensExpand((Req(300, 310),), repeat=219),)))


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


WRONG_CALLS = [
    SeqlensExpand((Req(3, 10), Req(0, 7), Req(2, 4))),
    CuSeqlens((3, 0, 4)),
    NsaCacheSeqlens((5, 1, 9), index_topk=4, padded_rows=4),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 8


# -- relations between answers of the oracle ----------------------------------------------------------------------------


def expand(batch, clamp="zero"):
    out = Cells((sum(r.extend_len for r in batch),))
    lengths = dict(extend_seq_lens=[r.extend_len for r in batch], seq_lens=[r.seq_len for r in batch])
    seqlens.seqlens_expand(**lengths, seqlens_expanded=out, total_len=len(out), max_q_len=0, variant={"clamp": clamp})
    return out.value.tolist()


def sums(values):
    out = Cells((len(values) + 1,))
    seqlens.cu_seqlens(seqlens=values, cu_seqlens=out, variant={})
    return out.value.tolist()


def clip(values, topk, padded=0):
    n = max(len(values), padded)
    out, cu = Cells((n,)), Cells((n + 1,))
    seqlens.nsa_cache_seqlens(seqlens_expanded=values, nsa_cache_seqlens=out, nsa_cu_seqlens_k=cu, index_topk=topk,
                              padded_rows=padded, variant={})
    return out.value.tolist(), cu.value.tolist()


BATCHES = st.lists(requests(), max_size=4)
LENGTHS = st.lists(st.integers(0, 5000), max_size=8)


@given(BATCHES, BATCHES)
def test_expanding_two_batches_at_once_is_expanding_each(a, b):
    assert expand(a + b) == expand(a) + expand(b)


@given(st.lists(requests().filter(lambda r: r.seq_len >= r.extend_len), max_size=4))
def test_expanded_lengths_rise_by_one_and_end_at_the_request_length(batch):
    rows = expand(batch)
    for r in batch:
        own, rows = rows[: r.extend_len], rows[r.extend_len :]
        assert own == list(range(r.seq_len - r.extend_len + 1, r.seq_len + 1))


@given(BATCHES)
def test_clamped_lengths_are_the_raw_ones_without_negatives(batch):
    assert expand(batch) == [max(v, 0) for v in expand(batch, clamp="none")]


@given(LENGTHS, LENGTHS)
def test_sums_of_two_batches_are_shifted_by_the_first_total(a, b):
    assert sums(a + b) == sums(a) + [sums(a)[-1] + s for s in sums(b)[1:]]


@given(LENGTHS, st.integers(0, 12))
def test_padding_adds_zero_rows_and_repeats_the_total(values, padded):
    plain, plain_sums = clip(values, 64)
    full, full_sums = clip(values, 64, padded)
    extra = max(padded - len(values), 0)
    assert (full, full_sums) == (plain + [0] * extra, plain_sums + [plain_sums[-1]] * extra)


@given(LENGTHS, st.integers(0, 64))
def test_the_clip_is_monotone_and_its_ends_are_known(values, topk):
    assert all(a <= b for a, b in zip(clip(values, topk)[0], clip(values, topk + 1)[0]))
    assert clip(values, 0)[0] == [0] * len(values)
    assert clip(values, 5000)[0] == values


@given(LENGTHS.filter(lambda v: any(v)), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_every_rank_pads_to_at_least_its_own_tokens(tokens, tp, cp, extend):
    for rank in range(len(tokens)):
        rows = seqlens.cal_padded_tokens(
            global_num_tokens=tokens, dp_rank=rank, dp_size=len(tokens), attn_tp_size=tp, attn_cp_size=cp,
            extend_in_batch=extend, round_robin=False, variant={"alignment": "tp_then_cp"})
        assert rows >= tokens[rank] and rows % cp == 0


def padded(tokens, alignment, **sizes):
    given = dict(dp_rank=0, dp_size=len(tokens), attn_tp_size=1, attn_cp_size=1, extend_in_batch=False, round_robin=False)
    return seqlens.cal_padded_tokens(global_num_tokens=tokens, **{**given, **sizes}, variant={"alignment": alignment})


def test_rows_that_are_not_split_are_not_rounded_for_context_parallelism():
    """SGLang #34443: with padding for context parallelism a plan had more entries than the batch had rows."""
    assert [padded([3], a, attn_cp_size=2) for a in ("tp", "cp", "tp_then_cp")] == [3, 4, 4]
    assert [padded([3], a, attn_tp_size=2) for a in ("tp", "cp", "tp_then_cp")] == [4, 3, 4]
    assert padded([5], "tp", attn_cp_size=2, round_robin=True) == 3


def test_one_count_stands_for_every_rank():
    assert padded([5], "tp", dp_size=4, dp_rank=3, extend_in_batch=True) == padded([5], "tp", dp_size=4, dp_rank=3) == 5
