"""The topk_transform family: differential campaigns, replays, wrong calls, order rules, and relations between transforms.

| group        | would catch                                                                                                |
| ------------ | ---------------------------------------------------------------------------------------------------------- |
| differential | ties that leave places unwritten (SGLang #30512) or -1 (#30645), candidates cut at 4,096 (#36807),         |
|              | the row of another request (#14325), no row start (#12583), columns past the length (FlashInfer #2308)     |
| replays      | counters and results left from the last call (vLLM #41444)                                                 |
| far          | 32-bit row offsets into a page table                                                                       |
| one bin      | a candidate list of 16,384 keys (as SGLang's was before #17747), positions of 16 bits                      |
| outside      | indices, keys and rows that a caller must not pass                                                         |
| order rules  | a judge that is too strict or too lax about zeros, infinities and NaN (vLLM #49896)                        |
| relations    | an oracle that is consistently wrong                                                                       |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.layout import Layout, Place
from harness.states import Cells, State
from oracles import topk_transform as oracle
from oracles.topk_transform import (
    SCORES, FastTopk, FastTopkPaged, FastTopkRagged, IndexRequest, IndexRow, PadTopkIndices, RaggedRow, Request, Row,
    TopkTransformV2, TransformDecode, TransformPrefill, TransformRagged, scores, top_set)
from strategies import domain, sessions
from strategies import topk_transform as drawn

FAMILY = "topk_transform"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
@pytest.mark.parametrize("replayed", ["transform_index_page_table_decode", "fast_topk", "fast_topk_transform_paged"])
def test_replays(subject, replayed, session, record_property):
    lanes.replays(session, subject, replayed, sessions.replays(registry.contracts()[replayed]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


FAR_CASES = [
    Example((TransformPrefill((IndexRequest(2, 9), IndexRequest(1, 5), IndexRequest(1, 8, "ends")), width=9),),
            Layout({"page_table": Place("far")})),
    Example((FastTopk((Row(9), Row(6, scores="rising"), Row(2)), width=9),), Layout({"score": Place("far", guard="left")})),
    Example((TopkTransformV2((Row(9), Row(70), Row(65)), width=70),), Layout({"real_page_table": Place("far")})),
]


@pytest.mark.gate
@pytest.mark.parametrize("example", FAR_CASES, ids=lambda e: e.contract.name)
def test_far(subject, example, session):
    """The last row starts past element 2^31."""
    lanes.fixed(session, subject, example)


@pytest.mark.gate
@pytest.mark.parametrize("case", drawn.one_bin(20_000) + drawn.one_bin(65_537), ids=lambda c: f"{c.contract.name}-{c.width}")
def test_one_bin(subject, case, session):
    """More keys in one bin of the first pass than a list of candidates has places, and a position that 16 bits cannot hold."""
    lanes.fixed(session, subject, Example((case,)))


WRONG_CALLS = [
    TransformDecode((IndexRow(3), IndexRow(5, "ends")), width=5),
    TransformPrefill((IndexRequest(2, 3), IndexRequest(1, 4)), width=4, sums=True, output_extra=1),
    TransformRagged((RaggedRow(3, 10), RaggedRow(9, 500))),
    PadTopkIndices((IndexRow(3), IndexRow(9)), padding=1),
    FastTopk((Row(9), Row(3, start=2)), width=9, starts=True),
    FastTopkPaged((Request((Row(9), Row(2))), Request((Row(6),))), width=9),
    FastTopkPaged((Request((Row(9),)), Request((Row(6),))), width=9, decode=True, starts=True),
    FastTopkRagged((Row(9, offset=7), Row(3, offset=80)), width=9, starts=True),
    TopkTransformV2((Row(70), Row(3)), width=70),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 9


# -- order rules, by hand -----------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("values", "right", "wrong"), [
    pytest.param([1.0, 3.0, 2.0], [{1, 2}], [{0, 1}], id="distinct"),
    pytest.param([2.0, 2.0, 2.0], [{0, 1}, {0, 2}, {1, 2}], [], id="any of equal ones"),
    pytest.param([5.0, 2.0, 2.0, 2.0], [{0, 1}, {0, 3}], [{1, 2}], id="a tie at the threshold"),
    pytest.param([INF, 1.0, -INF], [{0, 1}], [{0, 2}], id="infinities are ordinary"),
    pytest.param([-INF, -INF, -INF], [{0, 1}, {1, 2}], [], id="minus infinity is taken where nothing else is left"),
    pytest.param([NAN, INF, 1.0], [{0, 1}], [{1, 2}, {0, 2}], id="NaN above infinity"),
    pytest.param([NAN, NAN, NAN], [{0, 2}, {1, 2}], [], id="all NaN"),
    pytest.param([-NAN, 1.0, 0.0, -INF], [{1, 2}, {0, 1}], [{2, 3}, {0, 2}], id="NaN with a sign: on top or at the bottom"),
    pytest.param([0.0, -0.0, 1.0], [{0, 2}, {1, 2}], [{0, 1}], id="zeros are equal or in order of their signs"),
    pytest.param([-0.0, 0.0, -1.0], [{0, 1}], [{1, 2}, {0, 2}], id="both zeros above a negative"),
    pytest.param([65504.0, 65505.0, 1e5], [{1, 2}], [{0, 1}, {0, 2}], id="beyond fp16"),
    pytest.param([2.0**-149, 0.0, -0.0], [{0, 1}, {0, 2}], [{1, 2}], id="denormals are no zeros"),
    pytest.param([1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-22], [{1, 2}], [{0, 1}], id="one bin of fp16"),
])
def test_the_order_of_scores(values, right, wrong):
    judge = top_set(np.array(values), 2, np.arange(len(values)))
    for chosen in right:
        assert judge.complaint(np.array(sorted(chosen))) is None, chosen
        assert judge.complaint(np.array(sorted(chosen, reverse=True))) is None, chosen
    for chosen in wrong:
        assert judge.complaint(np.array(sorted(chosen))), chosen


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case) -> Cells:
    """What the oracle says about a case's only output."""
    (cells,) = differential.expect(case.contract, case.arguments(), case.contract.rules()).values()
    return cells


def some_answer(case) -> np.ndarray:
    """One right answer of `fast_topk`: the judged rows by sorting, the rest as written."""
    cells = answer(case)
    out = cells.value[: len(case.rows), : case.topk].copy()
    for b, r in enumerate(case.rows):
        if r.length > case.topk:
            out[b] = np.argsort(oracle.by_bits(scores(r.scores, r.seed, r.length)))[: -case.topk - 1 : -1]
    return out


def agrees(cells: Cells, rows: np.ndarray) -> bool:
    """Whether `rows` is right for the leading cells of an answer."""
    judged = np.full(cells.shape, -(2**40))
    judged[: rows.shape[0], : rows.shape[1]] = rows
    fine = all(judge.complaint(judged.reshape(-1)[members]) is None for members, judge in cells.judges)
    written = cells.state == State.WRITTEN
    return fine and bool((judged[written] == cells.value[written]).all())


def few(case) -> bool:
    return case.width < 1000


DISTINCT = st.sampled_from(("distinct", "rising", "falling", "one_bin"))


@given(st.integers(2, 40), DISTINCT, st.integers(0, 99), st.data())
def test_a_constant_added_to_a_row_changes_no_selection(count, kind, seed, data):
    topk = data.draw(st.integers(1, count - 1))
    values, names = scores(kind, seed, count), np.arange(count)
    picked = np.array(sorted(data.draw(st.permutations(range(count)))[:topk]))
    best = np.argsort(values)[-topk:]
    for constant in (0.0, -0.5, 8.0):  # sums that are float32 numbers
        judge = top_set(values + constant, topk, names)
        assert judge.complaint(best) is None
        assert (judge.complaint(picked) is None) == (set(picked) == set(best))


@given(st.integers(2, 40), st.sampled_from(SCORES), st.integers(0, 99), st.data())
def test_permuted_columns_select_the_permuted_keys(count, kind, seed, data):
    topk = data.draw(st.integers(1, count - 1))
    values = scores(kind, seed, count)
    order = np.array(data.draw(st.permutations(range(count))))
    picked = np.array(data.draw(st.permutations(range(count)))[:topk])
    whole, permuted = top_set(values, topk, np.arange(count)), top_set(values[order], topk, order)
    assert (whole.complaint(picked) is None) == (permuted.complaint(picked) is None)


@given(drawn.fast_topk(), st.sampled_from(SCORES))
def test_up_to_topk_keys_are_taken_whatever_their_scores(case, kind):
    case = replace(case, rows=tuple(replace(r, length=min(r.length, case.topk)) for r in case.rows))
    other = replace(case, rows=tuple(replace(r, scores=kind) for r in case.rows))
    assert answer(case).value.tolist() == answer(other).value.tolist()
    assert not answer(case).judges


@given(drawn.fast_topk().filter(few))
def test_a_negative_length_is_a_length_of_zero(case):
    negative = replace(case, rows=tuple(replace(r, length=-1 - r.seed) for r in case.rows))
    assert agrees(answer(negative), np.full((len(case.rows), case.topk), -1))


@given(drawn.fast_topk().filter(few))
def test_row_starts_shift_the_score_and_not_the_answer(case):
    moved = replace(case, starts=True, width=case.reach() + 300,
                    rows=tuple(replace(r, start=r.start + 37) for r in case.rows))
    assert agrees(answer(moved), some_answer(case))


@given(drawn.fast_topk().filter(few))
def test_selecting_and_then_looking_up_is_the_fused_selection(case):
    """Unfused `fast_topk` with the three mappings, against the three fused selections."""
    picked = some_answer(case)
    rows = tuple(replace(r, offset=1000 * b) for b, r in enumerate(case.rows))
    ragged = FastTopkRagged(rows, case.topk, case.width, case.starts)
    assert agrees(answer(ragged), np.where(picked >= 0, picked + [[r.offset] for r in rows], picked) if rows else picked)

    paged = FastTopkPaged(tuple(Request((r,)) for r in rows), case.topk, case.width, case.starts, decode=True, content=3)
    tables = [oracle.slots(3, f"request {b}", r.keys()) for b, r in enumerate(rows)]
    slots = np.array([[table[p] if p >= 0 else -1 for p in row] for row, table in zip(picked, tables)]).reshape(picked.shape)
    assert agrees(answer(paged), slots)
    if len(rows) and (slots >= 0).any():
        assert not agrees(answer(paged), picked)


@given(drawn.topk_transform_v2().filter(few))
def test_a_page_and_its_offset_give_the_slot_of_the_fused_selection(case):
    plain = FastTopk(case.rows, case.topk, case.width)
    picked, size = some_answer(plain), case.page_size
    pages = [oracle.slots(case.content, f"row {b}", -(-r.keys() // size), 2**31 // size) for b, r in enumerate(case.rows)]
    slots = [[page[p // size] * size + p % size if p >= 0 else -1 for p in row] for row, page in zip(picked, pages)]
    assert agrees(answer(case), np.array(slots).reshape(picked.shape))


@given(drawn.fast_topk_transform_paged().filter(few))
def test_one_row_per_request_is_the_same_with_and_without_cu_seqlens_q(case):
    case = replace(case, requests=tuple(Request(r.rows[:1]) for r in case.requests if r.rows))
    with_sums, without = (replace(case, decode=decode) for decode in (False, True))
    assert with_sums.arguments()["cu_seqlens_q"] is not None and without.arguments()["cu_seqlens_q"] is None
    picked = some_answer(FastTopk(case.all_rows, case.topk, case.width, case.starts))
    tables = [oracle.slots(case.content, f"request {b}", r.keys()) for b, r in enumerate(case.all_rows)]
    slots = np.array([[t[p] if p >= 0 else -1 for p in row] for row, t in zip(picked, tables)]).reshape(picked.shape)
    assert agrees(answer(with_sums), slots) and agrees(answer(without), slots)


def looked_up(table: list[np.ndarray], indices: np.ndarray, lengths: list[int]) -> list[list[int]]:
    """The prefill oracle on plain arrays: a table row per request."""
    out = Cells(indices.shape)
    oracle.transform_index_page_table_prefill(
        page_table=np.array(table).reshape(len(table), -1), topk_indices=indices, cu_seqlens_q=None, result=out,
        extend_lens_cpu=lengths, output_num_tokens=None, page_table_is_expanded=False, variant={})
    return out.value.tolist()


BATCHES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), min_size=1, max_size=4)


def arrays(batch):
    """Lengths, table rows and index rows of a batch of (tokens, seed)."""
    lengths = [n for n, _ in batch]
    table = [oracle.slots(0, str(seed), 6) for _, seed in batch]
    rows = [IndexRow(6, "holes", seed + t).indices(4) for n, seed in batch for t in range(n)]
    return lengths, table, rows


@given(BATCHES, BATCHES)
def test_looking_up_two_batches_at_once_is_looking_up_each(a, b):
    both = [looked_up(t, np.array(i).reshape(-1, 4), n) for n, t, i in (arrays(a), arrays(b), arrays(a + b))]
    assert both[2] == both[0] + both[1]


@given(BATCHES, st.randoms(use_true_random=False))
def test_permuting_requests_permutes_the_rows(batch, random):
    shuffled = random.sample(batch, len(batch))
    groups = []
    for part in (batch, shuffled):
        n, t, i = arrays(part)
        rows, ends = looked_up(t, np.array(i).reshape(-1, 4), n), np.cumsum([0, *n])
        groups.append(sorted((request, str(rows[a:b])) for request, a, b in zip(part, ends, ends[1:])))
    assert groups[0] == groups[1]


@given(drawn.transform_index_page_table_prefill())
def test_padding_changes_nothing_before_it_and_adds_rows_of_minus_one(case):
    tokens = case.tokens()
    plain = replace(case, padding=0, output_extra=None, spare=0, sums=False)
    padded = replace(plain, padding=2, output_extra=3)
    before, after = answer(plain).value, answer(padded).value
    assert after[:tokens].tolist() == before.tolist() and (after[tokens:] == -1).all() and len(after) == tokens + 5


@given(drawn.transform_index_page_table_decode().filter(few))
def test_decode_is_prefill_of_one_token_each_by_request_or_by_token(case):
    case = replace(case, spare=0)
    table, indices = case.arguments()["page_table"].view(), np.array(case.index_rows).reshape(-1, case.topk)
    for expanded in (False, True):
        out = Cells(indices.shape)
        oracle.transform_index_page_table_prefill(
            page_table=table, topk_indices=indices, cu_seqlens_q=None, result=out, extend_lens_cpu=[1] * len(case.rows),
            output_num_tokens=None, page_table_is_expanded=expanded, variant={})
        assert out.value.tolist() == answer(case).value.tolist()


@given(st.lists(st.builds(IndexRow, st.integers(0, 9), st.sampled_from(("selected", "holes")), st.integers(0, 99)), min_size=1,
                max_size=4), st.integers(0, 3))
def test_padding_and_then_looking_up_is_looking_up_and_then_padding(rows, padding):
    padded = answer(PadTopkIndices(tuple(rows), padding=padding)).value
    first = answer(TransformDecode(tuple(rows), width=9, shared=True)).value
    table = np.array([oracle.slots(0, "all", 9)] * len(padded))
    out = Cells(padded.shape)
    oracle.transform_index_page_table_decode(page_table=table, topk_indices=padded, result=out, variant={})
    assert out.value[: len(rows)].tolist() == first.tolist() and (out.value[len(rows) :] == -1).all()


@given(st.lists(st.builds(RaggedRow, st.integers(0, 9), st.integers(0, 99), st.just("selected"), st.integers(0, 99)),
                max_size=4))
def test_a_ragged_offset_is_added_to_every_index_but_minus_one(rows):
    moved = answer(TransformRagged(tuple(rows))).value
    still = answer(TransformRagged(tuple(replace(r, offset=0) for r in rows))).value
    for r, a, b in zip(rows, moved.tolist(), still.tolist()):
        assert [y - x for x, y in zip(b, a)] == [0 if x == -1 else r.offset for x in b]
