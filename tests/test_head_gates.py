"""The head_gates family: differential campaigns within bounds, writing back between views that overlap, and relations.

| group        | would catch                                                                                     |
| ------------ | ----------------------------------------------------------------------------------------------- |
| differential | a forgotten scale (SGLang #22232), bfloat16 results, rows of a padded pitch, spare rows written |
| write-back   | addresses compared without strides (SGLang #22232), copying over what is still to be read       |
| replays      | a result kept by address and size, of an earlier call's numbers                                 |
| outside      | a view that leaves its memory                                                                   |
| bounds       | a bound that lets a wrong gate pass, or fails an honest one                                     |
| relations    | an oracle that is consistently wrong                                                            |
"""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, layout as layouts, registry
from harness.client import ROOT
from harness.differential import Example
from harness.floats import decode, rounded
from harness.layout import Layout, Place
from harness.states import Cells, State
from oracles import head_gates
from oracles.head_gates import (EPS, KINDS, SOURCES, ApplyScales, FusedLogitsHeadGate, LogitsHeadGate, ProjectAndScale,
                                UpdateRope, numbers)
from strategies import domain, sessions
from strategies.head_gates import update_rope_guarded

FAMILY = "head_gates"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_replays(subject, transform, session, record_property):
    lanes.replays(session, subject, transform, sessions.replays(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


WRONG_CALLS = [
    ProjectAndScale(3, heads=4, hidden=16),
    LogitsHeadGate(3, heads=4, hidden=16),
    ApplyScales(3, heads=4),
    FusedLogitsHeadGate(3, heads=4),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 12


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_write_backs_are_refused_before_a_write(source, session):
    assert lanes.refusals(session, "kernels", UpdateRope(3, source=source, shift=1)) >= 4


TOO_WIDE = """
import torch
from kernels.head_gates import MOST_OF_A_SIZE, write_back
for lanes in (MOST_OF_A_SIZE, MOST_OF_A_SIZE + 1):
    view = torch.empty((1, 1, lanes), dtype=torch.bfloat16)  # never touched; the same view is left alone
    try:
        print(write_back(view, view))
    except ValueError as error:
        print(error)
"""


def test_rows_that_32_bits_cannot_count_are_refused():
    done = subprocess.run([sys.executable, "-c", TOO_WIDE], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, timeout=60)
    told = done.stdout.splitlines()
    assert told[0] == "None" and told[1].startswith("dst must have at most 2147479552 heads and lanes, got"), done.stderr


def test_the_model_s_own_sizes(session):
    """64 heads of 7,168 inputs, three tokens."""
    for kind in KINDS:
        example = Example((LogitsHeadGate(3, heads=64, hidden=7168, kind=kind),))
        assert differential.check(example, session.worker("kernels"), {}) == []


# -- bounds -------------------------------------------------------------------------------------------------------------


def judged(case):
    """The judge of a case's gates."""
    cells = differential.expect(case.contract, case.arguments(), {})
    ((_, judge),) = next(iter(cells.values())).judges
    return judge


def exact(case: ProjectAndScale) -> tuple[np.ndarray, np.ndarray]:
    """What the gates are, and the sum of absolute products, scaled alike."""
    x, weight = (case.arguments()[n].view() for n in ("x", "weight"))
    return (x @ weight.T * case.heads**-0.5).reshape(-1), (np.abs(x) @ np.abs(weight).T * case.heads**-0.5).reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_summation_passes_and_a_few_ulps_of_the_result_would_not(kind):
    case = ProjectAndScale(2, heads=2, hidden=256, kind=kind)
    x, weight = (case.arguments()[n].view().astype(np.float32) for n in ("x", "weight"))
    judge, (value, _) = judged(case), exact(case)
    orders = [np.arange(256), np.arange(256)[::-1], np.argsort(np.arange(256) % 2, kind="stable")]
    errors = []
    for order in orders:
        gates = np.zeros((2, 2), np.float32)
        for k in order:
            gates += x[:, None, k] * weight[None, :, k]
        got = (gates * np.float32(2**-0.5)).reshape(-1).astype(np.float64)
        assert judge.complaint(got) is None
        errors.append(np.abs(got - value).max())
    if kind == "cancelling":
        assert np.abs(value).max() == 0 and max(errors) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_tight_enough_to_see_a_bfloat16_result_a_missing_product_and_a_missing_scale(kind):
    case = ProjectAndScale(2, heads=2, hidden=64, kind=kind, content=3)
    judge, (value, absolute) = judged(case), exact(case)
    assert judge.complaint(value) is None
    for i in range(len(value)):
        unscaled = value[i] * 2**0.5 + (absolute[i] if kind == "cancelling" else 0)
        for wrong in (value[i] + absolute[i] / 64 / 16, unscaled, np.nan):
            gates = value.copy()
            gates[i] = wrong
            assert judge.complaint(gates).startswith(f"cell {i} is ")


def test_scales_are_bounded_by_ulps_of_the_result():
    case = ApplyScales(2, heads=2)
    arguments = case.arguments()
    value = (arguments["gates"].view()[..., None] * arguments["q_scale"].view()).reshape(-1) * case.softmax_scale
    judge = judged(case)
    assert judge.complaint(value * (1 + 3 * EPS)) is None
    assert judge.complaint(value * (1 + 6 * EPS)) is not None


# -- relations between answers of the oracles ---------------------------------------------------------------------------

SIZES = dict(tokens=st.integers(0, 4), heads=st.integers(1, 5), hidden=st.integers(1, 40), kind=st.sampled_from(KINDS),
             content=st.integers(0, 99))


def answer(oracle, shape, **given_) -> Cells:
    """An oracle's states for inputs that no case holds."""
    out = Cells(shape)
    oracle(**given_, **{"gates" if "q_scale" not in given_ else "out": out}, variant={})
    return out


def accepts(cells: Cells, values: np.ndarray) -> bool:
    ((_, judge),) = cells.judges
    return judge.complaint(values.reshape(-1)) is None


@given(st.builds(LogitsHeadGate, **SIZES))
def test_projecting_and_then_scaling_is_the_gate_in_one(case):
    """What the two steps make, computed exactly, is accepted by the oracle of the whole."""
    a = case.arguments()
    x, weight, q = (a[n].view() for n in ("x", "weight", "q_scale"))
    gates = x @ weight.T * case.heads**-0.5
    steps = gates[..., None] * q * case.softmax_scale
    both = differential.expect(case.contract, a, {})["out"]
    assert accepts(both, steps)
    scaled = answer(head_gates.apply_q_scale_and_softmax_scale, steps.shape, gates=gates, q_scale=q, n_heads=case.heads,
                    softmax_scale=case.softmax_scale)
    assert accepts(scaled, steps)


@given(st.builds(FusedLogitsHeadGate, **{n: s for n, s in SIZES.items() if n != "hidden"}))
def test_fused_is_scaling_by_the_heads_and_then_the_rest(case):
    gates, q = (case.arguments()[n].view() for n in ("gates", "q_scale"))
    split = gates * case.heads**-0.5
    frame = dict(q_scale=q, n_heads=case.heads, softmax_scale=case.softmax_scale)
    value = split[..., None] * q * case.softmax_scale
    assert accepts(answer(head_gates.apply_q_scale_and_softmax_scale, value.shape, gates=split, **frame), value)
    assert accepts(answer(head_gates.fused_logits_head_gate, value.shape, gates=gates, **frame), value)


@given(st.builds(ProjectAndScale, **SIZES), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_rows(case, random):
    x, weight = (case.arguments()[n].view() for n in ("x", "weight"))
    order = list(range(case.tokens))
    random.shuffle(order)
    value = x @ weight.T * case.heads**-0.5
    shuffled = answer(head_gates.project_and_scale_head_gates, value.shape, x=x[order], weight=weight, n_heads=case.heads)
    assert accepts(shuffled, value[order])


@given(st.sampled_from(KINDS), st.integers(0, 99), st.integers(2, 300))
def test_contents_are_bfloat16_numbers_and_products_of_them_are_normal(kind, seed, count):
    x, weight = numbers(kind, seed, "x", count), numbers(kind, seed, "weight", count)
    assert (rounded(x, "bfloat16") == x).all() and (rounded(weight, "bfloat16") == weight).all()
    assert (np.abs(x * weight) > 2.0**-100).all() and (np.abs(x * weight).sum() < 2.0**100)
    if kind == "cancelling" and count % 2 == 0:
        assert (x * weight).sum() == 0


@given(st.sampled_from([k for k in KINDS if k != "ones"]), st.integers(0, 99))
def test_float32_gates_have_a_float32_s_mantissa(kind, seed):
    gates = numbers(kind, seed, "gates", 300, "float32")
    assert (rounded(gates, "float32") == gates).all() and (rounded(gates, "bfloat16") != gates).mean() > 0.9
    assert (gates != 0).all() and (np.abs(gates) > 2.0**-50).all() and (np.abs(gates) < 2.0**50).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oracle_sees_the_gates_that_the_subject_sees(dtype):
    """Contents are float32 numbers; where the layout has a bfloat16 tensor, both see them rounded."""
    example = Example((FusedLogitsHeadGate(3, heads=4),), Layout({"gates": Place(dtype=dtype)}))
    (step,) = differential.plan(example, {}, True)
    placed = layouts.place(example.contract, step.arguments, example.layout, seed=0, run=0)
    held = np.concatenate([decode(cells, dtype) for _, cells in sorted(placed.cells("gates").items())])
    value = held.astype(np.float64).reshape(3, 4, 1) * step.arguments["q_scale"].view() * 4**-0.5 * 128**-0.5
    assert accepts(step.expected["out"], value)
    exact = example.steps[0].gates().view().reshape(-1)
    assert (held == rounded(exact, dtype)).all() and (held == exact).all() == (dtype == "float32")


# -- writing back -------------------------------------------------------------------------------------------------------


def written(case: UpdateRope) -> tuple[np.ndarray, Cells]:
    """The whole memory before (NaN where nothing may be read), and the oracle's states."""
    cells = differential.expect(case.contract, case.arguments(), {})["memory"]
    before = np.full(cells.shape, np.nan)
    for span in case.arguments()["memory"].spans:
        if span.values is not None:
            before[span.start : span.stop] = span.values
    return before, cells


def through_a_copy(case: UpdateRope) -> np.ndarray:
    """The same by NumPy: gather everything, then scatter."""
    before, _ = written(case)
    after = before.copy()
    after[case.cells(*case.dst())] = before[case.cells(*case.src())]
    return after


@given(update_rope_guarded())
def test_the_destination_holds_what_the_source_was_and_nothing_else_changes(case):
    before, cells = written(case)
    after = through_a_copy(case)
    touched = cells.state == State.WRITTEN
    assert sorted(np.flatnonzero(touched)) == sorted(set(case.cells(*case.dst()).tolist()))
    np.testing.assert_array_equal(cells.value[touched], after[touched])
    np.testing.assert_array_equal(before[~touched], after[~touched])


@given(update_rope_guarded().map(lambda case: replace(case, source="same")))
def test_writing_back_in_place_changes_nothing(case):
    before, cells = written(case)
    touched = cells.state == State.WRITTEN
    np.testing.assert_array_equal(cells.value[touched], before[touched])


@given(update_rope_guarded().map(lambda case: replace(case, source="apart")))
def test_a_source_elsewhere_is_left_as_it_was(case):
    _, cells = written(case)
    assert (cells.state[case.cells(*case.src())] == State.UNTOUCHED).all()


HAND = [
    # two tokens of one head, two numbers of three each: the memory is [a b t | c d u]
    (UpdateRope(2, 1, 2, 3, "same"), [0, 1, None, 3, 4]),
    (UpdateRope(2, 1, 2, 3, "packed"), [0, 1, None, 2, 3]),
    (UpdateRope(2, 1, 2, 3, "shifted", shift=1), [1, 2, None, 4, 5, None]),
    (UpdateRope(2, 1, 2, 3, "shifted", shift=-1), [None, 0, 1, None, 3, 4]),
    (UpdateRope(2, 1, 2, 3, "apart"), [6, 7, None, 8, 9, None, None, None, None, None]),
    (UpdateRope(2, 2, 1, 1, "swapped"), [0, 2, 1, 3]),
    (UpdateRope(1, 2, 1, 2, "one_head"), [0, None, 0]),
]


@pytest.mark.parametrize(("case", "sources"), HAND, ids=lambda v: v.source if isinstance(v, UpdateRope) else "")
def test_where_every_cell_comes_from(case, sources):
    """`sources[i]` is the cell that cell i takes its value from; None: it stays."""
    before, cells = written(case)
    assert len(cells.state) == len(sources)
    for i, source in enumerate(sources):
        assert (cells.state[i] == State.WRITTEN) == (source is not None)
        assert source is None or np.array_equal(cells.value[i], before[source], equal_nan=True)
