"""The kv_indices family: differential campaigns, replays on the same buffers, wrong calls, and relations.

| group        | would catch                                                                                        |
| ------------ | -------------------------------------------------------------------------------------------------- |
| differential | contiguity assumed of slots (SGLang #15469), pages for tokens (#24587, #23757), half-written int64 (#23596) |
| replays      | stale indptr entries and block-table rows (#37975, #24401)                                          |
| far          | 32-bit row, slot and step offsets (#20389, #34725)                                                  |
| outside      | rows without the top-k factor (#27338, #27460), sums without padded requests (#26880), short buffers (#27485) |
| narrow rows  | a row that spills into the next one (#27338, #27475; pages past a block table's row, #27320)         |
| relations    | an oracle that is consistently wrong, drafts off by one step (#25015)                               |
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.layout import Layout, Place
from harness.states import State
from oracles.kv_indices import (DraftDecode, DraftDecodeSlices, FlashinferKvIndices, FlashmlaKvIndices, Req, branch_start,
                                draft_decode_slices)
from strategies import domain, sessions
from strategies.kv_indices import create_flashinfer_kv_indices, create_flashmla_kv_indices, generate_draft_decode_kv_indices

FAMILY = "kv_indices"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
@pytest.mark.parametrize("replayed", ["create_flashmla_kv_indices", "generate_draft_decode_kv_indices"])
def test_replays(subject, replayed, session, record_property):
    lanes.replays(session, subject, replayed, sessions.replays(registry.contracts()[replayed]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


INT64 = {"req_pool_indices": Place(dtype="int64")}
FAR_CASES = {
    "slots": (FlashinferKvIndices((Req(4095, 130), Req(0, 3), Req(2048, 1)), slots=4096, table_extra=2**20), INT64),
    "pages": (FlashmlaKvIndices((Req(4095, 130), Req(0, 3)), page_size=64, slots=4096, table_extra=2**20), INT64),
    "block tables": (FlashmlaKvIndices((Req(3, 130), Req(0, 3), Req(1, 65)), page_size=64),
                     {"kv_indices": Place("far"), **INT64}),
    "drafts": (DraftDecode((Req(4095, 5), Req(2047, 2)), slots=4096, table_extra=2**20, topk=2), INT64),
    "draft steps": (DraftDecode((Req(1, 5), Req(0, 2)), num_steps=3), {"kv_indices": Place("far"), **INT64}),
}


@pytest.mark.gate
@pytest.mark.parametrize("name", FAR_CASES)
def test_far(subject, name, session):
    """A request table of 4,096 x 1,048,576 cells, and output rows past element 2^31."""
    case, places = FAR_CASES[name]
    lanes.fixed(session, subject, Example((case,), Layout(places)))


NARROW = [
    FlashmlaKvIndices((Req(1, 300), Req(0, 130), Req(2, 70)), page_size=64, row_extra=-3),
    DraftDecode((Req(1, 30), Req(0, 7)), topk=2, num_steps=2, row_extra=-37),
    DraftDecode((Req(1, 3), Req(0, 7)), topk=2, num_steps=3, page_size=4, row_extra=-1),
]


@pytest.mark.parametrize("case", NARROW, ids=lambda c: c.contract.name)
def test_a_row_too_narrow_gets_what_fits_and_the_next_row_stays(case, session):
    assert differential.check(Example((case,)), session.worker("kernels"), case.contract.rules()) == []


WRONG_CALLS = [
    (FlashinferKvIndices((Req(1, 3, 2), Req(0, 130, 1)), starts=True), 17),
    (FlashmlaKvIndices((Req(1, 3, 2), Req(0, 130, 1)), starts=True, page_size=64), 14),
    (DraftDecode((Req(1, 3), Req(0, 130)), topk=2, num_steps=3, page_size=4), 22),
]


@pytest.mark.parametrize(("case", "least"), WRONG_CALLS, ids=lambda c: c.contract.name if hasattr(c, "contract") else None)
def test_wrong_calls_are_refused_before_a_write(case, least, session):
    assert lanes.refusals(session, "kernels", case) >= least


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case):
    """The oracle's states of every output."""
    return differential.expect(case.contract, case.arguments(), case.contract.rules())


def listed(cells):
    return list(zip(cells.state.reshape(-1).tolist(), cells.value.reshape(-1).tolist()))


def row_of(case, r: Req, start: int, count: int) -> list[int]:
    """`count` slots of a request's row."""
    return case.req_to_token().view()[r.slot, start : start + count].tolist()


@given(create_flashinfer_kv_indices())
def test_every_range_holds_its_requests_columns_and_nothing_else_is_written(case):
    out = answer(case)["kv_indices"]
    kept = sum(r.length for r in case.batch)
    assert (out.state == State.WRITTEN).sum() == kept
    for r, first in zip(case.batch, case.firsts()):
        assert out.value[first : first + r.length].tolist() == row_of(case, r, r.start if case.starts else 0, r.length)


@given(create_flashmla_kv_indices())
def test_block_tables_are_every_pages_first_slot_divided_by_the_page(case):
    pages = answer(case)["kv_indices"]
    shared = set(FlashinferKvIndices.__dataclass_fields__) & set(FlashmlaKvIndices.__dataclass_fields__)
    flat = FlashinferKvIndices(**{f: getattr(case, f) for f in shared})
    slots = answer(flat)["kv_indices"].value
    for i, (r, first) in enumerate(zip(case.batch, flat.firsts())):
        own = [int(v) // case.page_size for v in slots[first : first + r.length : case.page_size]]
        assert pages.value[i, : len(own)].tolist() == own
        assert not pages.state[i, len(own) :].any()


@given(create_flashmla_kv_indices(), st.randoms(use_true_random=False))
def test_permuting_the_requests_permutes_the_rows_of_a_block_table(case, random):
    order = random.sample(range(len(case.batch)), len(case.batch))
    permuted = answer(replace(case, requests=tuple(case.batch[i] for i in order)))["kv_indices"]
    assert permuted.value[: len(order)].tolist() == answer(case)["kv_indices"].value[order].tolist()


def positioned():
    """Cases in which every request has its positions, so that kv_indptr tells the branches of kv_indices apart."""
    return generate_draft_decode_kv_indices().map(lambda c: replace(c, unset_positions=0))


@given(positioned())
def test_branches_end_their_length_and_their_drafts_apart(case):
    indptr = answer(case)["kv_indptr"]
    for step in range(case.num_steps if case.batch else 0):
        ends = [0, *indptr.value[step, 1 : case.branches() + 1].tolist()]
        lengths = [r.length for r in case.batch for _ in range(case.topk)]
        assert [b - a for a, b in zip(ends, ends[1:])] == [n + step + 1 for n in lengths]


@given(positioned())
def test_a_branch_is_its_requests_tokens_and_then_its_own_drafts(case):
    out = answer(case)
    for step in range(case.num_steps):
        ends = [0, *out["kv_indptr"].value[step, 1:].tolist()]
        for z in range(case.branches()):
            r, k = case.batch[z // case.topk], z % case.topk
            start = branch_start(r.length, k, case.num_steps, case.topk, case.page_size)
            own = row_of(case, r, 0, r.length) + row_of(case, r, start, step + 1)
            assert out["kv_indices"].value[step, ends[z] : ends[z + 1]].tolist() == own
        assert not out["kv_indices"].state[step, ends[case.branches()] :].any()


@given(positioned().filter(lambda c: c.num_steps > 1))
def test_a_step_sees_one_draft_more_than_the_step_before(case):
    out = answer(case)
    for step in range(1, case.num_steps):
        before, now = ([0, *out["kv_indptr"].value[s, 1:].tolist()] for s in (step - 1, step))
        for z in range(case.branches()):
            longer = out["kv_indices"].value[step, now[z] : now[z + 1]].tolist()
            assert longer[:-1] == out["kv_indices"].value[step - 1, before[z] : before[z + 1]].tolist()


@given(generate_draft_decode_kv_indices())
def test_where_the_first_branch_starts_is_nobodys_to_write(case):
    assert not answer(case)["kv_indptr"].state[:, 0].any()


@given(generate_draft_decode_kv_indices(), st.integers(1, 2))
def test_padded_requests_without_positions_leave_the_real_branches_alone(case, padded):
    """The draft runner pads lengths with 1 and positions with 0: behind the real branches indptr and data then disagree."""
    case = replace(case, requests=case.batch, repeat=1, unset_positions=0)
    real = answer(case)
    wider = replace(case, requests=(*case.batch, *[Req(0, 1)] * padded), unset_positions=padded)
    with_padding = answer(wider)
    for step in range(case.num_steps):
        total = case.topk * sum(r.length for r in case.batch) + case.branches() * (step + 1)
        ends = slice(1, case.branches() + 1)
        assert with_padding["kv_indptr"].value[step, ends].tolist() == real["kv_indptr"].value[step, ends].tolist()
        assert with_padding["kv_indices"].value[step, :total].tolist() == real["kv_indices"].value[step, :total].tolist()
        if case.batch:
            first = case.branches() + 1
            assert with_padding["kv_indptr"].value[step, first] != total + step + 2  # the padded branch has 1 token more


@given(generate_draft_decode_kv_indices().filter(lambda c: c.topk == 1))
def test_a_chain_of_drafts_does_not_know_pages(case):
    one = replace(case, page_size=1, aligned=False)
    assert listed(answer(replace(case, aligned=False))["kv_indices"]) == listed(answer(one)["kv_indices"])


@given(st.integers(0, 400), st.sampled_from((1, 2, 4, 8)), st.integers(1, 8), st.sampled_from((1, 2, 4, 16, 64)))
def test_drafts_of_different_branches_have_columns_of_their_own(length, topk, num_steps, page_size):
    starts = [branch_start(length, k, num_steps, topk, page_size) for k in range(topk)]
    columns = [c for start in starts for c in range(start, start + num_steps)]
    assert len(set(columns)) == len(columns) and min(columns) == length
    if page_size > 1 and topk > 1:
        pages = [{c // page_size for c in range(start, start + num_steps)} for start in starts]
        assert sum(map(len, pages)) == len(set().union(*pages))
        assert {start % page_size for start in starts} == {length % page_size}


@given(positioned())
def test_slices_end_where_the_last_branch_ends(case):
    lens = [r.length for r in case.batch]
    slices = draft_decode_slices(seq_lens=lens, seq_lens_sum=sum(lens), topk=case.topk, num_steps=case.num_steps, row_width=0,
                                 variant={})
    indptr = answer(case)["kv_indptr"].value
    assert len(slices) == case.num_steps - 1
    for step, (ends, entries) in enumerate(slices):
        assert (ends, entries) == (case.branches() + 1, int(indptr[step, case.branches()]))


def test_full_requests_need_more_than_the_context_length_for_every_branch():
    """A row of branches * context_len entries (#27475's width) is short by the drafts where every request is full."""
    context, topk, steps = 4096, 2, 3
    full = DraftDecodeSlices((context, context), topk=topk, num_steps=steps)
    assert full.needed() == 2 * topk * context + 2 * topk * steps
