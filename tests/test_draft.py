"""The draft family: differential campaigns, wrong calls, and relations between writing slots and reading them back.

| group        | would catch                                                                                           |
| ------------ | ----------------------------------------------------------------------------------------------------- |
| differential | drafts that write other slots than they attend to (SGLang #15469), lists in the wrong order (#26239)   |
| far          | 32-bit row offsets of the request table (#20389)                                                      |
| outside      | short lists (#4100), ranges that end before they start, slots that do not exist                        |
| relations    | an oracle that is consistently wrong, positions off by one (#25015)                                    |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.layout import Layout, Place
from harness.tensors import table
from oracles.draft import (Accepted, AssignDraftCacheLocs, AssignDraftCacheLocsContiguous, AssignExtendCacheLocs,
                           AssignExtendCacheLocsUniform, AssignReqToTokenPool, CreateExtendAfterDecode, Extent, Req,
                           assign_extend_cache_locs)
from oracles.kv_indices import branch_start
from strategies import domain
from strategies.draft import (assign_draft_cache_locs, assign_draft_cache_locs_contiguous, assign_extend_cache_locs_uniform,
                              assign_req_to_token_pool, create_extend_after_decode_spec_info)

FAMILY = "draft"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


FAR_TABLE = {"req_to_token": Place("far"), "req_pool_indices": Place(dtype="int64")}
FAR_CASES = [
    (AssignReqToTokenPool((Extent(3, 5, 3), Extent(2, 0, 40))), FAR_TABLE),
    (AssignExtendCacheLocs((Extent(4095, 5, 3), Extent(2048, 0, 40)), slots=4096, table_extra=2**20),
     {"req_pool_indices": Place(dtype="int64")}),
    (AssignDraftCacheLocs((Req(3, 5), Req(2, 9)), topk=2, num_steps=3, page_size=4), FAR_TABLE),
]


@pytest.mark.gate
@pytest.mark.parametrize(("case", "places"), FAR_CASES, ids=lambda c: c.contract.name if hasattr(c, "contract") else "")
def test_far(subject, case, places, session):
    """Request tables whose last rows lie past element 2^31."""
    lanes.fixed(session, subject, Example((case,), Layout(places)))


WRONG_CALLS = [
    (AssignReqToTokenPool((Extent(1, 0, 3), Extent(0, 2, 4))), 14),
    (AssignExtendCacheLocs((Extent(1, 0, 3), Extent(0, 2, 4))), 14),
    (AssignExtendCacheLocsUniform((Req(1, 3), Req(0, 5)), draft_tokens=3, positions=True), 15),
    (CreateExtendAfterDecode((Accepted(9, 2), Accepted(5, 3))), 14),
    (AssignDraftCacheLocs((Req(1, 5), Req(0, 3)), topk=2, page_size=4), 29),
    (AssignDraftCacheLocsContiguous((Req(1, 3), Req(0, 5)), topk=2, with_positions=True), 14),
]


@pytest.mark.parametrize(("case", "least"), WRONG_CALLS, ids=lambda c: c.contract.name if hasattr(c, "contract") else "")
def test_wrong_calls_are_refused_before_a_write(case, least, session):
    assert lanes.refusals(session, "kernels", case) >= least


@pytest.mark.parametrize(("changes", "argument"), [
    (dict(page_size=1), "extend_lens"), (dict(topk=1), "extend_lens"), (dict(page_size=4, topk=2), "extend_lens"),
])
def test_page_lists_are_given_exactly_for_pages_and_branches(changes, argument, session):
    """Given where they must be None, and None where they must be given."""
    paged = AssignDraftCacheLocs((Req(1, 5), Req(0, 3)), topk=2, page_size=4)
    arguments = {**paged.arguments(), **changes}
    if "page_size" in changes and "topk" in changes:
        arguments[argument] = None
    placed = differential.layouts.place(paged.contract, arguments, Layout(), seed=0, run=0)
    memory, blobs = placed.request()
    header = {"family": "draft", "transform": paged.contract.name, "order": 0, "rules": [],
              "steps": [{"memory": memory, "arguments": differential.wire_arguments(arguments)}]}
    reply, changed = session.worker("kernels").run(header, blobs)
    raised = reply["steps"][0]["raised"]
    assert raised["type"] == "ValueError" and argument in raised["message"] and not changed


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case):
    """The oracle's states of every output."""
    return differential.expect(case.contract, case.arguments(), case.contract.rules())


def filled(cells, before) -> np.ndarray:
    """An output as it is afterwards, with `before` where nothing was written."""
    return np.where(cells.state == 1, cells.value, before)


@given(assign_req_to_token_pool())
def test_slots_that_were_put_into_the_table_are_read_back(case):
    arguments = case.arguments()
    rows = filled(answer(case)["req_to_token"], -1)
    given_out = arguments["out_cache_loc"].view()
    ranges = {n: arguments[n].view() for n in ("req_pool_indices", "start_offset", "end_offset")}
    out = registry.contracts()["assign_extend_cache_locs"].oracle
    cells = differential.Cells((case.total(),))
    out(**ranges, req_to_token=table(rows.shape, dict(enumerate(rows))).view(), out_cache_loc=cells, bs=len(case.batch),
        variant={})
    taken = sum(r.count for r in case.batch)
    assert cells.value[:taken].tolist() == given_out[:taken].tolist()
    assert not cells.state[taken:].any()


@given(assign_extend_cache_locs_uniform())
def test_ranges_of_one_length_are_ragged_ranges(case):
    width = case.draft_tokens
    frame = {f: getattr(case, f) for f in ("repeat", "slots", "table_extra", "spare", "tail", "content")}
    ragged = AssignExtendCacheLocs(tuple(Extent(r.slot, r.seq_len, width) for r in case.requests), **frame)
    assert answer(ragged)["out_cache_loc"].value.tolist() == answer(case)["out_cache_loc"].value.tolist()


@given(assign_draft_cache_locs_contiguous())
def test_draft_slots_in_a_row_are_one_range_per_request(case):
    frame = {f: getattr(case, f) for f in ("requests", "repeat", "slots", "table_extra", "spare", "tail", "content")}
    uniform = AssignExtendCacheLocsUniform(draft_tokens=case.topk * case.num_steps, positions=True, **frame)
    out, of_range = answer(case), answer(uniform)
    assert out["out_cache_loc"].value.tolist() == of_range["out_cache_loc"].value.tolist()
    if case.with_positions:
        first = of_range["positions_out"].value[: len(case.batch), 0]
        assert out["positions"].value[: len(case.batch) * case.topk].tolist() == np.repeat(first, case.topk).tolist()


@given(create_extend_after_decode_spec_info())
def test_accepted_tokens_stand_at_the_end_of_their_request(case):
    out, done = answer(case), 0
    tokens = case.arguments()["accept_tokens"].view()
    for i, r in enumerate(case.batch):
        assert out["positions"].value[done : done + r.accept_len].tolist() == list(range(r.seq_len - r.accept_len, r.seq_len))
        done += r.accept_len
        assert out["bonus_tokens"].value[i] == tokens[done - 1]
    assert not out["positions"].state[done:].any()


@given(assign_draft_cache_locs())
def test_every_draft_has_a_new_slot_of_its_own_where_its_branch_looks_for_it(case):
    """A branch attends to the columns of `branch_start`: the slots there are those that its drafts are written to."""
    out, new = answer(case), case.arguments()["out_cache_loc"].view()
    locs = filled(out["out_cache_loc"], [*new, *[-1] * case.spare])[: len(case.batch) * case.topk * case.num_steps]
    assert len(set(locs.tolist())) == len(locs) and set(locs.tolist()) <= set(new.tolist())
    for i, r in enumerate(case.batch):
        for k in range(case.topk):
            start = branch_start(r.seq_len, k, case.num_steps, case.topk, case.page_size)
            own = locs[(i * case.topk + k) * case.num_steps :][: case.num_steps]
            assert out["req_to_token"].value[r.slot, start : start + case.num_steps].tolist() == own.tolist()


@given(assign_draft_cache_locs().filter(lambda c: c.paged() and c.copied()))
def test_copies_of_the_partial_page_go_to_new_slots_that_are_no_drafts(case):
    out, new = answer(case), case.arguments()["out_cache_loc"].view().tolist()
    target = out["target_cache_loc"].value[: case.copied()].tolist()
    source = out["source_cache_loc"].value[: case.copied()].tolist()
    drafts = out["out_cache_loc"].value[: len(case.batch) * case.topk * case.num_steps].tolist()
    assert len(set(target)) == len(target) and set(target) <= set(new) and not set(target) & set(drafts)
    taken = 0
    for r in case.batch:
        own = case.written_table().view()[r.slot, r.seq_len - case.partial(r) : r.seq_len].tolist()
        assert source[taken : taken + len(own) * (case.topk - 1)] == own * (case.topk - 1)
        taken += len(own) * (case.topk - 1)


@given(assign_draft_cache_locs().filter(lambda c: not c.paged()))
def test_without_pages_new_slots_are_read_back_as_they_were_given(case):
    """What the first generation puts into the table is what the second one reads from it."""
    rows = filled(answer(case)["req_to_token"], 0)
    arguments = case.arguments()
    count = case.topk * case.num_steps
    out = differential.Cells((len(case.batch) * count,))
    starts = arguments["seq_lens"].view()
    assign_extend_cache_locs(req_pool_indices=arguments["req_pool_indices"].view(), req_to_token=rows, start_offset=starts,
                             end_offset=starts + count, out_cache_loc=out, bs=len(case.batch), variant={})
    assert out.value.tolist() == arguments["out_cache_loc"].view()[: len(out)].tolist()


@given(assign_draft_cache_locs(), st.integers(0, 39))
def test_a_request_more_changes_nothing_for_those_before_it(case, length):
    free = sorted(set(range(case.slots)) - {r.slot for r in case.batch})
    if not free:
        return
    more = replace(case, requests=(*case.batch, Req(free[0], length)))
    fewer, longer = answer(case), answer(more)
    kept = len(case.batch) * case.topk * case.num_steps if case.paged() else 0
    assert longer["out_cache_loc"].value[:kept].tolist() == fewer["out_cache_loc"].value[:kept].tolist()
    for r in case.batch:
        columns = slice(r.seq_len, case.reach(r))
        assert longer["req_to_token"].value[r.slot, columns].tolist() == fewer["req_to_token"].value[r.slot, columns].tolist()
