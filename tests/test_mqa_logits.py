"""The mqa_logits family: differential campaigns, wrong calls, and relations that hold whatever the implementation.

| group        | would catch                                                                                       |
| ------------ | ------------------------------------------------------------------------------------------------- |
| differential | query counter used as key base (SGLang #12583), chunk-local row used as global row (#14325)        |
| outside      | key ranges past the logits, rows of the page table that do not exist                               |
| misuse       | a kernel that accepts what it cannot honour                                                        |
| relations    | a result that depends on the size of a chunk, a budget that is 0, cached in a capture or not monotone |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.states import Cells
from harness.tensors import dense
from oracles import mqa_logits
from oracles.mqa_logits import MqaLogits, Query, Req, TopkPagedChunked, TopkRaggedChunked, top_of
from strategies import domain
from strategies.mqa_logits import mqa_logits as logits_cases
from strategies.mqa_logits import mqa_logits_chunk_plan, queries, topk_paged_chunked, topk_ragged_chunked

FAMILY = "mqa_logits"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


BATCH = (Req(2, 9), Req(0, 3), Req(3, 3))
WRONG_CALLS = [
    MqaLogits(BATCH, spare=1),
    TopkRaggedChunked(BATCH, index_topk=4, max_rows=2),
    TopkPagedChunked(BATCH, index_topk=4, max_rows=2),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 15


# -- the budget ---------------------------------------------------------------------------------------------------------


def budgets(asked, static=None, fraction=0.2) -> list[int]:
    return mqa_logits.mqa_logits_budget(queries=[[q.device, q.free, q.total, q.capturing] for q in asked],
                                        mem_fraction_static=static, free_fraction=fraction, variant={})


QUERIES = st.lists(queries(), min_size=1, max_size=5)
STATIC = st.one_of(st.none(), st.floats(0.0, 1.5))
FRACTION = st.floats(0.0, 1.0)


@given(QUERIES, STATIC, FRACTION)
def test_a_budget_is_never_zero_and_never_more_than_three_tenths_of_the_device(asked, static, fraction):
    for query, answer in zip(asked, budgets(asked, static, fraction)):
        assert answer >= 1
    first = asked[0]
    assert budgets([first], static, fraction)[0] <= max(1, int(first.total * 0.3))


@given(QUERIES, STATIC, FRACTION)
def test_what_a_capture_is_told_is_forgotten(asked, static, fraction):
    outside = [q for q in asked if not q.capturing]
    answers = [a for q, a in zip(asked, budgets(asked, static, fraction)) if not q.capturing]
    assert answers == budgets(outside, static, fraction)


@given(queries(), QUERIES, STATIC, FRACTION)
def test_the_first_measurement_of_a_device_stays(first, later, static, fraction):
    first = replace(first, capturing=False)
    answers = budgets([first, *later], static, fraction)
    assert {a for q, a in zip(later, answers[1:]) if q.device == first.device} <= {answers[0]}


@given(queries(), st.integers(0, 2**36), STATIC, FRACTION)
def test_the_budget_grows_with_free_and_total_memory_and_falls_with_the_static_share(query, more, static, fraction):
    one = budgets([query], static, fraction)[0]
    assert budgets([replace(query, free=query.free + more)], static, fraction)[0] >= one
    assert budgets([replace(query, total=query.total + more)], static, fraction)[0] >= one
    if static is not None:
        assert budgets([query], static + 0.1, fraction)[0] <= one


def test_a_budget_worked_by_hand():
    """80 GiB, half of it free: a fifth of that, unless nine tenths are static or three tenths of the device are less."""
    gib = 2**30
    query = Query(0, 40 * gib, 80 * gib)
    assert budgets([query]) == [8 * gib]
    assert budgets([query], static=0.9) == [int(int(80 * gib * (1 - 0.9)) * 0.2)]
    assert budgets([query], fraction=0.5) == [20 * gib]
    assert budgets([replace(query, free=80 * gib)], fraction=0.5) == [24 * gib]


# -- chunks -------------------------------------------------------------------------------------------------------------


@given(mqa_logits_chunk_plan())
def test_chunks_are_equal_but_the_last_and_hold_every_row_once(case):
    chunks = mqa_logits.mqa_logits_chunk_plan(**case.arguments(), variant={})
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(case.num_q))
    sizes = [stop - start for start, stop in chunks]
    assert len(set(sizes[:-1])) <= 1 and all(0 < size <= sizes[0] for size in sizes)
    assert all(size == 1 or 4 * case.num_k * size <= case.budget for size in sizes)


@given(mqa_logits_chunk_plan())
def test_a_prefill_that_need_not_be_chunked_is_one_chunk(case):
    chunk, budget = mqa_logits.should_chunk_mqa_logits(**case.arguments(), variant={})
    chunks = mqa_logits.mqa_logits_chunk_plan(**case.arguments(), variant={})
    if budget:
        assert (len(chunks) > 1) == (chunk and case.num_q > 1)


def answer(case) -> list:
    """The oracle's states and values, and which rows are judged."""
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())["topk_result"]
    return [cells.state.tolist(), cells.value.tolist(), [members.tolist() for members, _ in cells.judges]]


@given(st.one_of(topk_ragged_chunked(), topk_paged_chunked()))
@settings(max_examples=8)
def test_no_chunk_size_shows_in_what_the_kernels_select(session, case):
    """The oracle knows no chunks, so every size is held against one answer."""
    rows = len(case.rows)
    for size in sorted({1, max(rows - 1, 1), max(rows, 1), rows + 1}):
        assert differential.check(Example((replace(case, max_rows=size),)), session.worker("kernels"), {}) == []


SCORES = st.lists(st.integers(-50, 50), min_size=3, max_size=12, unique=True)


@given(SCORES, st.integers(1, 2), st.integers(-1000, 1000), st.randoms())
def test_a_constant_on_top_changes_no_selection_and_permuted_keys_are_selected_permuted(scores, count, constant, random):
    scores, names = np.array(scores, dtype=float), np.arange(len(scores)) + 100
    best = names[np.argsort(-scores)[:count]]
    order = list(range(len(scores)))
    random.shuffle(order)
    for judge in (top_of(scores, count, names), top_of(scores + constant, count, names),
                  top_of(scores[order], count, names[order])):
        assert judge.complaint(best) is None
        assert "is not" in judge.complaint(names[np.argsort(-scores)[1 : count + 1]])


@given(topk_ragged_chunked().filter(lambda c: all(r.length <= c.index_topk for r in c.rows)))
def test_rows_of_few_keys_are_selected_whatever_their_scores(case):
    assert answer(case) == answer(replace(case, kind="equal", content=case.content + 1))


@given(topk_paged_chunked())
def test_paged_selects_the_slots_of_what_ragged_selects(case):
    """A slot stands for its position, so both judge the same selection alike."""
    shared = {f: getattr(case, f) for f in TopkRaggedChunked.__dataclass_fields__ if f in case.__dataclass_fields__}
    ragged = TopkRaggedChunked(**shared)
    paged_cells = differential.expect(case.contract, case.arguments(), {})["topk_result"]
    ragged_cells = differential.expect(ragged.contract, ragged.arguments(), {})["topk_result"]
    assert paged_cells.state.tolist() == ragged_cells.state.tolist()
    judged_rows = [m[0] // paged_cells.shape[1] for m, _ in paged_cells.judges]
    for row, (_, by_slot), (_, by_place) in zip(judged_rows, paged_cells.judges, ragged_cells.judges):
        r = case.rows[row]
        slots = case.page_table().view()[case.owner(r.request), 0 : r.length]
        best = sorted(range(r.length), key=lambda p: -scores_of(case, row)[p])[: case.index_topk]
        for picked in (best, best[1:] + best[:1], list(range(case.index_topk))):
            assert (by_slot.complaint(slots[picked]) is None) == (by_place.complaint(ragged_places(r, picked)) is None)


def scores_of(case, row):
    r = case.rows[row]
    return case.logits().view()[row, r.ks : r.ks + r.length]


def ragged_places(r, picked):
    return np.array([r.ks + p for p in picked])


# -- scores -------------------------------------------------------------------------------------------------------------


@given(logits_cases().filter(lambda c: c.rows))
def test_a_row_is_scored_against_its_own_requests_keys_alone(case):
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())["logits"]
    firsts = [sum(r.seq_len for r in case.requests[:i]) for i in range(len(case.requests))]
    for members, _ in cells.judges:
        row, columns = members[0] // cells.shape[1], members % cells.shape[1]
        request = case.rows[row].request
        assert columns.min() == firsts[request] and columns.max() < firsts[request] + case.requests[request].seq_len


def test_scores_worked_by_hand():
    """One head, two dimensions: relu(1*3 + 2*(-1)) * 0.5 * 4 = 2, and a negative product leaves nothing."""
    out = Cells((1, 2))
    mqa_logits.mqa_logits(q=dense([[[1.0, 2.0]]]).view(), k=dense([[3.0, -1.0], [-3.0, 1.0]]).view(),
                          k_scale=dense([4.0, 4.0]).view(), weights=dense([[0.5]]).view(), ks=[0], ke=[2], logits=out,
                          clean_logits=False, variant={"sums": "fp32"})
    ((_, judge),) = out.judges
    assert judge.complaint(dense([2.0, 0.0]).view()) is None and judge.complaint(dense([2.0, -2.0]).view())
