"""The page_table family: differential campaigns, replays on the same buffers, wrong calls, and relations.

| group        | would catch                                                                                          |
| ------------ | ---------------------------------------------------------------------------------------------------- |
| differential | repeats of a stale host list (SGLang #15429), contiguity assumed (#15469), tokens taken for pages    |
|              | (#23757), swapped strides (aiter #1815), sizes of the unselected batch (#18280), shared slots (#15086), |
|              | keys and query tokens mixed up (#12583), per-request for per-token rows (#17662)                     |
| replays      | rows and columns of an earlier batch (#24401), results kept by address and size                      |
| far          | 32-bit row and slot offsets (#34725, #20389)                                                         |
| outside      | slots, lengths and totals that a caller must not pass (#19016)                                       |
| relations    | an oracle that is consistently wrong                                                                 |
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
from harness.states import Cells, State
from oracles import page_table as oracles
from oracles.indexer import IndexerKStartEnd
from oracles.indexer import Req as KeyReq
from oracles.metadata import Decode, DraftExtend, TargetVerify
from oracles.metadata import ExtendReq as MetadataExtendReq
from oracles.metadata import Req as MetadataReq
from oracles.page_table import (CuSeqlensQ, ExtendReq, GatherPageTable, MaxSeqLenQ, PageTable1Flattened, PrefixReq,
                                RealPageTable, Req, TopkIndicesOffset)
from strategies import domain, page_table, sessions

FAMILY = "page_table"
REPLAYED = ["gather_page_table", "real_page_table", "page_table_1_flattened", "topk_indices_offset", "cu_seqlens_q"]


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
@pytest.mark.parametrize("replayed", REPLAYED)
def test_replays(subject, replayed, session, record_property):
    lanes.replays(session, subject, replayed, sessions.replays(registry.contracts()[replayed]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


def far(*names: str) -> Layout:
    """The tensors with their last row past element 2^31."""
    return Layout({name: Place("far", guard="left" if k else "right") for k, name in enumerate(names)})


FAR_EXAMPLES = [
    Example((GatherPageTable((Req(4095, 130), Req(2048, 3), Req(0, 1)), draft_tokens=2, slots=4096, table_extra=2**20 - 130),),
            far("page_table_1")),
    Example((GatherPageTable((Req(3, 130, 2), Req(1, 3, 1)), ragged=True),), far("req_to_token", "page_table_1")),
    Example((RealPageTable(("aligned", "signed", "holes"), 130),), far("page_table_1", "real_page_table")),
    Example((PageTable1Flattened((5, 130, 64)),), far("page_table_1")),
]


@pytest.mark.gate
@pytest.mark.parametrize("example", FAR_EXAMPLES, ids=lambda e: f"{e.contract.name}-{len(e.layout.places)}")
def test_far(subject, example, session):
    """A request table of 4,096 x 1,048,576 cells, and rows past element 2^31 on either side."""
    lanes.fixed(session, subject, example)


def test_long_rows(session):
    """131,072 tokens in one row beside a very short one."""
    for case in (GatherPageTable((Req(1, 131072), Req(3, 2))), PageTable1Flattened((2, 65537, 1, 131072))):
        assert differential.check(Example((case,)), session.worker("kernels"), case.contract.rules()) == []


WRONG_CALLS = [
    GatherPageTable((Req(1, 3, 2), Req(0, 130, 0), Req(2, 5, 3)), ragged=True, selection=True),
    RealPageTable(("aligned", "aligned", "holes"), 130, 64),
    PageTable1Flattened((3, 130, 2)),
    TopkIndicesOffset((ExtendReq(3, 10), ExtendReq(2, 4))),
    CuSeqlensQ("extend", (3, 0, 2)),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 8


REFUSED_VALUES = [
    (GatherPageTable((Req(1, 3), Req(0, 2)), draft_tokens=2, total_rows=3), "total_rows must be 2 requests x 2"),
    (RealPageTable(("aligned",) * 2, 8, page_size=0), "page_size must be an integer of at least 1"),
    (CuSeqlensQ("prefill", (3, 2)), "mode must be one of decode, target_verify, draft_extend, extend"),
    (MaxSeqLenQ("prefill", (PrefixReq(3, 2),)), "mode must be one of decode, target_verify, draft_extend, extend"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED_VALUES, ids=lambda v: None if isinstance(v, str) else v.contract.name)
def test_impossible_host_values_are_refused_by_name(case, message, session):
    options = CheckOptions(checks=("inputs", "redzones", "memory"))
    found = differential.check(Example((case,)), session.worker("kernels"), case.contract.rules(), options)
    assert [f.kind for f in found] == [("raised", "ValueError")] and message in found[0].sentence and not found[0].wrote


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def cells(case, **rules) -> list:
    """(state, value) of every cell of the only output."""
    out, = differential.expect(case.contract, case.arguments(), case.contract.rules(rules)).values()
    return np.stack([out.state, out.value], axis=-1).tolist()


WIDTH = 300


def plain(case) -> GatherPageTable:
    """One row per request, no capacity to spare, rows short and of one width, so that batches can be compared."""
    requests = tuple(replace(r, seq_len=r.seq_len % WIDTH) for r in case.requests)
    return resized(replace(case, times=1, ragged=False, selection=False, draft_tokens=1, spare=0, row_spare=0), requests)


def resized(case, requests) -> GatherPageTable:
    """The same tables with other requests, as wide as before."""
    case = replace(case, requests=tuple(requests), max_extra=0)
    return replace(case, max_extra=WIDTH - case.longest())


GATHERS = page_table.gather_page_table().map(plain)
WIDTHS = st.integers(1, 5)


@given(GATHERS, st.randoms(use_true_random=False))
def test_permuting_requests_permutes_their_rows(case, random):
    order = random.sample(range(len(case.requests)), len(case.requests))
    rows = cells(case)
    assert cells(resized(case, [case.requests[i] for i in order])) == [rows[i] for i in order]


@given(GATHERS, st.integers(0, 3))
def test_a_padded_request_changes_no_row_before_it(case, slot):
    assert cells(resized(case, (*case.requests, Req(slot, 1))))[:-1] == cells(case)


@given(GATHERS, GATHERS)
def test_rows_of_two_batches_at_once_are_the_rows_of_each(a, b):
    b = replace(a, requests=tuple(replace(r, slot=r.slot % a.slots) for r in b.requests))
    both = resized(a, (*a.requests, *b.requests))
    assert cells(both) == cells(a) + cells(resized(b, b.requests))


@given(GATHERS, WIDTHS)
def test_a_scalar_repeat_is_a_ragged_one_of_equal_repeats(case, width):
    ragged = tuple(replace(r, rows=width) for r in case.requests)
    repeated = cells(replace(case, draft_tokens=width))
    assert repeated == cells(replace(case, requests=ragged, ragged=True))
    assert repeated == [row for row in cells(case) for _ in range(width)]


@given(GATHERS)
def test_a_selection_is_the_selected_rows_of_the_whole_batch(case):
    chosen = [row for row, r in zip(cells(case), case.requests) if r.selected]
    picked = cells(replace(case, selection=True))  # as wide as its own longest request
    assert picked == [row[: len(p)] for p, row in zip(picked, chosen)] and len(picked) == len(chosen)


@given(GATHERS)
def test_the_full_tail_frees_what_the_strict_one_protects(case):
    for strict, full, r in zip(cells(case), cells(case, tail="full"), case.requests):
        assert strict[: r.seq_len] == full[: r.seq_len]
        assert all(state == State.UNTOUCHED for state, _ in strict[r.seq_len :])
        assert all(state == State.DONT_CARE for state, _ in full[r.seq_len :])


@given(GATHERS.filter(lambda c: c.requests), WIDTHS)
def test_a_gathered_table_is_the_table_of_the_fused_passes(case, width):
    fields = dict(page_size=1, max_extra=case.max_extra, table_extra=case.table_extra, slots=case.slots, shared=case.shared,
                  content=case.content)
    requests = tuple(MetadataReq(r.slot, r.seq_len) for r in case.requests)
    longer = tuple(replace(r, seq_len=r.seq_len + width) for r in case.requests)
    ragged = tuple(MetadataExtendReq(r.slot, r.seq_len, r.rows) for r in case.requests)
    pairs = [
        (Decode(requests, **fields), case),
        (TargetVerify(requests, draft_tokens=width, **fields), replace(case, requests=longer, draft_tokens=width)),
        (DraftExtend(ragged, **fields), replace(case, ragged=True)),
    ]
    for fused, gathered in pairs:
        out = differential.expect(fused.contract, fused.arguments(), fused.contract.rules())["page_table_1[0]"]
        assert np.stack([out.state, out.value], axis=-1).tolist() == cells(gathered)


TABLES = page_table.real_page_table().map(lambda c: replace(c, row_spare=0, page_spare=0))


@given(TABLES)
def test_a_page_and_its_offset_give_back_the_slot_exactly_where_pages_are_whole(case):
    pages = np.array(cells(case), dtype=np.int64).reshape(len(case.rows), case.pages(), 2)[..., 1]
    for i, kind in enumerate(case.rows):
        slots, column = case.slots(i, kind), np.arange(case.columns)
        back = pages[i, column // case.page_size] * case.page_size + column % case.page_size
        firsts = slots[:: case.page_size]
        whole = all((firsts % case.page_size == 0).tolist()) and all(
            np.diff(slots[k : k + case.page_size]).tolist() == [1] * (min(case.page_size, case.columns - k) - 1)
            for k in range(0, case.columns, case.page_size))
        assert (back.tolist() == slots.tolist()) == whole
        assert whole or kind != "aligned"


@given(TABLES)
def test_pages_are_rounded_down(case):
    for row, pages in enumerate(cells(case)):
        slots = case.slots(row, case.rows[row])[:: case.page_size].tolist()
        assert all(0 <= slot - page * case.page_size < case.page_size for slot, (_, page) in zip(slots, pages, strict=True))


FLAT = page_table.page_table_1_flattened().map(lambda c: replace(c, times=1, spare=0, content=0, shared=True))


@given(FLAT, FLAT)
def test_flattening_two_batches_at_once_is_flattening_each(a, b):
    both = PageTable1Flattened((*a.lengths, *b.lengths), shared=True)
    assert cells(both) == cells(a) + cells(b)


@given(page_table.page_table_1_flattened().map(lambda c: replace(c, times=1, spare=0)))
def test_the_flattened_table_holds_the_gathered_rows_end_to_end(case):
    requests = tuple(Req(i, n) for i, n in enumerate(case.lengths))
    gathered = GatherPageTable(requests, slots=max(len(requests), 1))
    rows = differential.expect(gathered.contract, gathered.arguments(), gathered.contract.rules())["page_table_1"].value
    tables = dict(page_table_1=rows, seq_lens=list(case.lengths), bs=len(requests), max_len=rows.shape[1], variant={})
    out = Cells((case.total(),))
    oracles.page_table_1_flattened(page_table_1_flattened=out, total_len=len(out), **tables)
    assert out.value.tolist() == [slot for row, n in zip(rows.tolist(), case.lengths) for slot in row[:n]]


OFFSETS = page_table.topk_indices_offset().map(lambda c: replace(c, times=1, spare=0))


@given(OFFSETS)
def test_the_ragged_offset_of_a_token_is_the_indexers_first_key(case):
    ranges = IndexerKStartEnd(tuple(KeyReq(r.extend_len, r.seq_len) for r in case.requests))
    ks = differential.expect(ranges.contract, ranges.arguments(), {})["ks"]
    assert [v for _, v in cells(case)] == ks.value.tolist()


@given(OFFSETS, OFFSETS)
def test_offsets_of_a_second_batch_are_shifted_by_the_keys_of_the_first(a, b):
    keys = sum(r.seq_len for r in a.requests)
    both = replace(a, requests=(*a.requests, *b.requests))
    assert [v for _, v in cells(both)] == [v for _, v in cells(a)] + [v + keys for _, v in cells(b)]


BOUNDARIES = page_table.cu_seqlens_q().map(lambda c: replace(c, times=1, spare=0))


def bounds(case) -> list[int]:
    return [v for _, v in cells(case)]


@given(BOUNDARIES)
def test_the_last_query_boundary_counts_all_query_tokens(case):
    tokens = {"decode": len(case.all), "target_verify": len(case.all) * case.draft_tokens}.get(case.mode, sum(case.all))
    assert bounds(case)[0] == 0 and bounds(case)[-1] == tokens


@given(BOUNDARIES, BOUNDARIES)
def test_boundaries_of_a_second_batch_are_shifted_by_the_first_total(a, b):
    b = replace(b, mode=a.mode, draft_tokens=a.draft_tokens)
    assert bounds(replace(a, extends=a.extends + b.extends)) == bounds(a) + [bounds(a)[-1] + v for v in bounds(b)[1:]]


@given(BOUNDARIES)
def test_an_extend_of_one_token_each_has_the_boundaries_of_a_decode(case):
    ones = replace(case, extends=(1,) * len(case.extends), mode="decode")
    assert bounds(ones) == bounds(replace(ones, mode="extend")) == bounds(replace(ones, mode="draft_extend"))


@given(page_table.max_seq_len_q())
def test_the_longest_query_sequence_is_the_widest_step_between_boundaries(case):
    longest = oracles.max_seq_len_q(**case.arguments(), variant={})
    extends = tuple(r.extend_len for r in case.requests)
    steps = np.diff(bounds(CuSeqlensQ(case.mode, extends))).tolist()
    if case.mode != "extend":
        assert longest == 1 and set(steps) <= {1}
    elif extends and (case.round_robin or any(r.prefix_len for r in case.requests)):
        assert longest == max(steps)
    elif extends:
        assert longest >= max(steps)
