"""The metadata family: differential campaigns, replays on the same buffers, wrong calls, and relations between modes.

| group        | would catch                                                                                    |
| ------------ | ---------------------------------------------------------------------------------------------- |
| differential | per-request for per-token lengths (SGLang #17662), narrow tables (#19016), contiguity assumed (#15469) |
| replays      | stale rows of an earlier, larger batch (#24401), results kept from the last call               |
| sessions     | what a change of mode leaves behind (SGLang #31705, #26313)                                     |
| far          | 32-bit row and slot offsets (#34725, #20389)                                                   |
| outside      | slots and lengths that a caller must not pass                                                  |
| relations    | an oracle that is consistently wrong                                                           |
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.layout import Layout, Place
from oracles.metadata import Decode, DraftExtend, ExtendReq, Req, TargetVerify
from strategies import domain, sessions
from strategies.metadata import decode_metadata, draft_extend_metadata, target_verify_metadata

FAMILY = "metadata"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_replays(subject, transform, session, record_property):
    lanes.replays(session, subject, transform, sessions.replays(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_serving_sessions(subject, session, record_property):
    modes = [n for n, c in registry.contracts().items() if c.family == FAMILY]
    lanes.serving(session, subject, modes, sessions.serving(), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


FAR = Layout({"page_table_1[0]": Place("far"), "page_table_1[1]": Place("far", guard="left")})
FAR_CASES = [
    Decode((Req(4095, 130), Req(0, 3), Req(2048, 1)), backends=2, slots=4096, table_extra=2**20 - 130),
    TargetVerify((Req(4095, 5), Req(2047, 64)), page_size=64, backends=2, slots=4096, table_extra=2**20 - 66, draft_tokens=2),
    DraftExtend((ExtendReq(4095, 70, 2), ExtendReq(1, 1, 3)), backends=2, slots=4096, table_extra=2**20 - 70),
]


@pytest.mark.gate
@pytest.mark.parametrize("case", FAR_CASES, ids=lambda c: c.contract.name)
def test_far(subject, case, session):
    """A request table of 4,096 x 1,048,576 cells, and output rows past element 2^31."""
    lanes.fixed(session, subject, Example((case,), FAR))


def test_long_rows(session):
    """131,072 tokens in one row beside a very short one, through the real table alone."""
    case = Decode((Req(1, 131072), Req(3, 2)), page_size=64, wide=False)
    rules = case.contract.rules()
    assert differential.check(Example((case,)), session.worker("kernels"), rules) == []


WRONG_CALLS = [
    Decode((Req(1, 3), Req(0, 130)), page_size=64, backends=2),
    TargetVerify((Req(1, 3), Req(0, 130)), page_size=64, backends=2, draft_tokens=3, ctx_lens=True),
    DraftExtend((ExtendReq(1, 3, 2), ExtendReq(0, 1, 4)), backends=2),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 50


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case) -> dict[str, list]:
    """The oracle's states of the first backend, as comparable lists of (state, value)."""
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())
    return {n.split("[")[0]: list(zip(c.state.tolist(), c.value.tolist())) for n, c in cells.items() if n.endswith("[0]")}


@given(target_verify_metadata())
def test_verify_of_one_draft_token_is_decode_of_one_key_more(case):
    verify = answer(replace(case, draft_tokens=1, ctx_lens=False))
    frame = {f: getattr(case, f) for f in case.__dataclass_fields__ if f not in ("requests", "draft_tokens", "ctx_lens")}
    decode = answer(Decode(tuple(replace(r, seq_len=r.seq_len + 1) for r in case.requests), **frame))
    expanded = verify.pop("seqlens_expanded")
    assert verify == decode
    assert expanded == decode["cache_seqlens"]


@given(target_verify_metadata())
def test_verify_is_a_static_draft_extend_of_the_longer_requests(case):
    case = replace(case, ctx_lens=False)
    width = case.draft_tokens
    frame = {f: getattr(case, f) for f in case.__dataclass_fields__ if f not in ("requests", "draft_tokens", "ctx_lens")}
    longer = tuple(ExtendReq(r.slot, r.seq_len + width, width) for r in case.requests)
    assert answer(case) == answer(DraftExtend(longer, static=True, **frame))


@given(decode_metadata(), st.integers(0, 3))
def test_padded_rows_change_nothing_before_them(case, slot):
    real = answer(case)
    padded = answer(replace(case, repeat=1, requests=(*case.batch, Req(slot, 1)), max_extra=case.max_extra))
    for name in ("cache_seqlens", "nsa_cache_seqlens"):
        assert padded[name][: len(case.batch)] == real[name][: len(case.batch)]
    for name in ("cu_seqlens_k", "nsa_cu_seqlens_k"):
        assert padded[name][: len(case.batch) + 1] == real[name][: len(case.batch) + 1]


@given(draft_extend_metadata())
def test_clipped_lengths_never_exceed_the_topk_or_the_length(case):
    got = answer(case)
    for (_, clipped), (_, visible) in zip(got["nsa_cache_seqlens"][: case.rows()], got["seqlens_expanded"]):
        assert clipped == min(visible, case.index_topk) and visible >= 0


@given(decode_metadata().filter(lambda c: c.page_size > 1 and c.wide and c.aligned))
def test_a_page_and_its_offset_give_back_the_slot(case):
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())
    wide, real = cells["page_table_1[0]"], cells["real_page_table[0]"]
    for row in range(len(case.batch)):
        for p in range(case.kv_len(row)):
            assert real.value[row, p // case.page_size] * case.page_size + p % case.page_size == wide.value[row, p]
