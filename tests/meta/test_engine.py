"""The engine's own parts: hashing, states, judges, layouts, the worker's wire, declarations."""

import importlib
import socket

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from harness import checks, hashing, lanes, layout, messages, registry
from harness.campaign import PROFILES
from harness.contract import Role, tensors_of
from harness.differential import Example, expect
from harness.generation import fresh_examples, shrinking_for
from harness.layout import Layout, Place
from harness.states import Cells, Judge, State, one_of, same_multiset, within
from harness.tensors import Output, table, vector
from harness.worker import gpu
from oracles.metadata import Decode, Req
from oracles.topk_transform import Row, TopkTransformV2
from strategies import domain

CONTRACTS = registry.contracts()


# -- hashing ------------------------------------------------------------------------------------------------------------


def test_splitmix64_gives_the_published_first_numbers_of_seed_zero():
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.arange(3).astype(np.uint64) * golden
    assert [hex(v) for v in hashing.splitmix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_cells_are_random_access_and_differ_by_name_and_seed():
    whole = hashing.cells(7, "a", np.arange(100))
    assert (hashing.cells(7, "a", np.arange(90, 100)) == whole[90:]).all()
    assert (hashing.cells(7, "b", np.arange(100)) != whole).all() and (hashing.cells(8, "a", np.arange(100)) != whole).all()


# -- states and judges --------------------------------------------------------------------------------------------------


def test_dont_care_never_weakens_a_written_cell():
    out = Cells((3,))
    out[0] = 5
    out.free(slice(0, 2), "last block")
    assert out.state.tolist() == [State.WRITTEN, State.DONT_CARE, State.UNTOUCHED]


@pytest.mark.parametrize(("judge", "right", "wrong"), [
    (one_of(1, 2), [1, 2, 1], [1, 3, 1]),
    (same_multiset([3, 1, 1]), [1, 3, 1], [1, 3, 3]),
    (within(np.array([1.0, 2.0]), np.array([0.5, 0.0])), [1.4, 2.0], [1.0, 2.1]),
    (within(np.array([1.0]), np.array([9.0])), [2.0], [float("nan")]),
])
def test_judges_accept_and_complain(judge: Judge, right, wrong):
    assert judge.complaint(np.array(right)) is None
    assert judge.complaint(np.array(wrong))


def test_an_input_on_the_memory_of_an_output_may_show_its_writes():
    """On a GPU the two tensors are views of one allocation, and PyTorch counts writes for all of them together."""
    case = Decode((Req(1, 3),), backends=1)
    for aliases, checked in (((("cache_seqlens[0]", "seq_lens"),), []), ((), ["seq_lens"])):
        placed = layout.place(case.contract, case.arguments(), Layout(aliases=aliases), seed=3, run=0)
        found = checks.inputs(placed, layout.observe(placed, []), written=["seq_lens"], moved=[])
        assert [f.buffer for f in found] == checked


def test_shrinking_ends_when_its_time_is_up():
    def calls(limit: float) -> int:
        called = []

        @settings(phases=[Phase.generate, Phase.shrink], derandomize=True, deadline=None, database=None)
        @given(st.lists(st.integers(0, 2**40), min_size=10))
        def fails(values):
            called.append(values)
            assert sum(values) < 2**41

        with shrinking_for(limit), pytest.raises(AssertionError):
            fails()
        return len(called)

    assert calls(0.0) < calls(60.0) / 2


# -- layouts ------------------------------------------------------------------------------------------------------------


def sample(kind: str, guard: str, dtype=None):
    case = Decode((Req(1, 3), Req(2, 5)), backends=2, spare=1)
    spots = {n: Place(kind, dtype, guard) for n in ("seq_lens", "page_table_1[1]") if kind in case.contract.arg(n).layouts}
    return layout.place(case.contract, case.arguments(), Layout(spots), seed=3, run=0)


@pytest.mark.parametrize("guard", ["left", "right"])
@pytest.mark.parametrize("kind", ["contiguous", "offset", "pitched", "strided", "expanded", "far"])
def test_tensors_keep_their_cells_and_touch_the_guarded_end(kind, guard):
    placed = sample(kind, guard)
    for name, view in placed.views.items():
        assert sum(len(c) for c in placed.cells(name).values()) == int(np.prod(view.shape))
        last = view.byte_of(int(np.prod(view.shape)) - 1) + view.dtype.itemsize
        assert last <= placed.sizes[view.block] and placed.sizes[view.block] % layout.PAGE == 0
        if placed.guards[view.block] == "right":
            assert last == placed.sizes[view.block]
        else:
            assert view.start == view.storage_offset * view.dtype.itemsize


@pytest.mark.parametrize("guard", ["left", "right"])
@pytest.mark.parametrize("kind", ["contiguous", "offset", "pitched", "far"])
def test_rows_begin_where_a_contract_says(kind, guard):
    """And the last one ends with a whole vector, right in front of the guard."""
    case = TopkTransformV2((Row(3), Row(5), Row(6)), width=7)
    assert case.contract.arg("score").pitch == 4 and kind in case.contract.arg("score").layouts
    placed = layout.place(case.contract, case.arguments(), Layout({"score": Place(kind, guard=guard)}), seed=3, run=0)
    view = placed.views["score"]
    assert view.shape == (3, 7) and view.strides[0] % 4 == 0 and view.strides[0] >= 8
    assert sum(len(c) for c in placed.cells("score").values()) == 3 * 7
    assert view.start % 16 == 0
    if guard == "right":
        assert placed.sizes[view.block] - view.byte_of(3 * 7 - 1) == 8  # the cell itself, and one that is none


def test_the_pages_of_a_far_block_are_read_in_runs():
    assert gpu.runs(np.array([7, 3, 4, 7])) == [(3 * 4096, 5 * 4096), (7 * 4096, 8 * 4096)]
    assert gpu.runs(np.zeros(0, dtype=np.int64)) == []


def test_the_last_row_of_a_far_table_starts_past_2_31_elements():
    view = sample("far", "right").views["page_table_1[1]"]
    assert (view.shape[0] - 1) * view.strides[0] > 2**31


@given(st.sampled_from(sorted(CONTRACTS)).flatmap(lambda n: domain.of(CONTRACTS[n])))
@settings(max_examples=60)
def test_live_cells_are_the_same_in_both_runs_and_nothing_else_is_promised(example):
    if not example.contract.args:
        return
    case = example.steps[0]
    one, two = (layout.place(case.contract, case.arguments(), example.layout, example.seed, run) for run in (0, 1))
    for name, tensor in tensors_of(case.arguments()).items():
        if case.contract.arg(name).role is not Role.IN:
            continue
        other = two.cells(name)
        for start, cells in one.cells(name).items():
            for span in tensor.spans:
                lo, hi = max(span.start, start) - start, min(span.stop, start + len(cells)) - start
                if span.values is not None and lo < hi:
                    assert cells[lo:hi].tobytes() == other[start][lo:hi].tobytes()


@given(st.sampled_from(sorted(CONTRACTS)).flatmap(lambda n: domain.of(CONTRACTS[n])))
@settings(max_examples=100)
def test_layouts_are_what_the_contract_allows(example):
    contract = example.contract
    for name, spot in example.layout.places.items():
        arg = contract.arg(name)
        assert spot.kind in arg.layouts and spot.dtype in (None, *arg.dtypes) and spot.guard in ("left", "right")
    for out, other in example.layout.aliases:
        assert contract.arg(other).name in contract.arg(out).may_alias


def test_a_change_between_rows_is_stray_and_a_change_in_a_cell_is_not():
    placed = sample("pitched", "right")
    view = placed.views["page_table_1[1]"]
    inside = view.byte_of(1)
    gap = view.byte_of(view.shape[1] - 1) + view.dtype.itemsize
    changed = np.r_[inside : inside + 4, gap : gap + 2]
    observed = layout.observe(placed, [(view.block, changed, np.arange(1, 7, dtype=np.uint8))])
    assert observed.stray == [(view.block, gap, b"\5\6")]
    assert checks.redzones(placed, observed)[0].buffer == "page_table_1"


# -- oracles and declarations -------------------------------------------------------------------------------------------


def test_an_oracle_cannot_read_what_is_not_live():
    view = table((3, 8), {1: np.arange(4)}).view()
    assert view[1, 0:4].tolist() == [0, 1, 2, 3] and view[1, 3] == 3
    for row, columns in ((1, slice(0, 5)), (0, slice(0, 1)), (1, slice(2, 8, 3))):
        with pytest.raises(LookupError, match="the oracle read"):
            view[row, columns]


def test_every_contract_is_complete():
    for contract in CONTRACTS.values():
        names = {a.name for a in contract.args} | {s.name for s in contract.scalars}
        case = registry.cases(contract).filter(lambda c: c.batch_size() > 0)
        given_case = _first(case)
        assert set(given_case.arguments()) == names, contract.name
        assert all(v.choices for v in contract.variants) and contract.origin and contract.doc
        for room in ("kernels", "kernels.eager"):
            assert importlib.util.find_spec(f"{room}.{contract.family}") is not None, (room, contract.family)


def _first(strategy):
    return find(strategy, lambda c: True, settings=settings(max_examples=20, phases=[Phase.generate], database=None))


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="has no variant tail=long"):
        CONTRACTS["decode_metadata"].rules({"tail": "long"})


@given(st.sampled_from(sorted(CONTRACTS)).flatmap(lambda n: domain.of(CONTRACTS[n])))
@settings(max_examples=60)
def test_oracles_write_inside_their_outputs_and_touch_no_input(example: Example):
    case = example.steps[0]
    before = repr(case.arguments())
    assert expect(case.contract, case.arguments(), case.contract.rules()) is not None
    assert repr(case.arguments()) == before


def test_tensors_of_names_every_backend():
    flat = tensors_of({"a": vector([1]), "b": [Output((1,)), None, Output((2,))], "c": 3})
    assert sorted(flat) == ["a", "b[0]", "b[2]"]


# -- the wire -----------------------------------------------------------------------------------------------------------


def test_messages_round_trip_with_their_blobs():
    here, there = socket.socketpair()
    messages.send(here, {"op": "x", "n": 3}, [b"abc", b"", np.arange(4, dtype=np.uint8)])
    header, blobs = messages.receive(there, 1.0)
    assert header == {"op": "x", "n": 3} and [bytes(b) for b in blobs] == [b"abc", b"", bytes([0, 1, 2, 3])]


def test_silence_and_a_closed_end_are_told_apart():
    here, there = socket.socketpair()
    with pytest.raises(messages.TimedOut):
        messages.receive(there, 0.01)
    here.close()
    with pytest.raises(messages.Closed):
        messages.receive(there, 1.0)


# -- generation ---------------------------------------------------------------------------------------------------------


def test_fresh_examples_are_several_times_as_many_as_hypothesis_alone_gives():
    def distinct() -> int:
        seen = set()

        @settings(max_examples=200, phases=[Phase.generate], derandomize=True)
        @given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from((False,) * 19 + (True,))), max_size=4), st.integers())
        def draw(batch, seed):
            seen.add(repr((batch, seed)))

        draw()
        return len(seen)

    alone = distinct()
    with fresh_examples():
        assert distinct() > alone
    assert distinct() == alone


def test_nothing_is_drawn_outside_a_contract_that_has_no_precondition_to_break():
    class Session:
        profile, rules = PROFILES["quick"], staticmethod(lambda subject, name: {})

        class worker:
            describe = {"cu_seqlens": {"provided": True, "selective": False}, "seqlens_expand": {"provided": True,
                                                                                                "selective": False}}

            def __init__(self, subject):
                pass

    rows = []
    lanes.outside(Session(), "kernels", "cu_seqlens", None, lambda name, row: rows.append(row))
    assert len(rows) == 1 and "UNCHECKED" in rows[0]
    with pytest.raises(AttributeError):  # one that has some starts a campaign, which needs more than this worker has
        lanes.outside(Session(), "kernels", "seqlens_expand", None, lambda name, row: rows.append(row))
