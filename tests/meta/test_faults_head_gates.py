"""Planted faults of the head_gates family are found and blamed, and its strategies draw what the bugs need."""

from dataclasses import replace

import pytest
from measure import BUDGET, drawn, found_and_blamed, found_by_replays

from harness import registry
from harness.campaign import PROFILES, Campaign
from oracles.head_gates import (KINDS, SOURCES, ApplyScales, FusedLogitsHeadGate, LogitsHeadGate, ProjectAndScale,
                                UpdateRope)
from strategies import domain, sessions

FILE = "faults_head_gates.py"
CONTRACTS = registry.contracts()

FOUND_BY_SEARCH = [
    ("no_head_scale", "project_and_scale_head_gates", "states", "gates"),
    ("bfloat16_result", "project_and_scale_head_gates", "states", "gates"),
    ("bfloat16_accumulator", "project_and_scale_head_gates", "states", "gates"),
    ("last_input_dropped", "project_and_scale_head_gates", "states", "gates"),
    ("spare_rows_zeroed", "project_and_scale_head_gates", "states", "gates"),
    ("reads_past_the_row", "project_and_scale_head_gates", "memory", "x read-outside"),
    ("scale_of_the_first_head", "apply_q_scale_and_softmax_scale", "states", "out"),
    ("no_q_scale", "logits_head_gate", "states", "out"),
    ("heads_for_head_dim", "logits_head_gate", "states", "out"),
    ("head_scale_twice", "fused_logits_head_gate", "states", "out"),
    ("pitch_from_shape", "fused_logits_head_gate", "states", "out"),
    ("gates_through_bfloat16", "apply_q_scale_and_softmax_scale", "states", "out"),
    ("raw_gates_through_bfloat16", "fused_logits_head_gate", "states", "out"),
    ("through_bfloat16", "update_rope_guarded", "states", "memory"),
    ("through_float16", "update_rope_guarded", "states", "memory"),
    ("address_alone", "update_rope_guarded", "states", "memory"),
    ("no_guard", "update_rope_guarded", "states", "memory"),
    ("lost_in_a_copy", "update_rope_guarded", "states", "memory"),
    ("whole_heads", "update_rope_guarded", "states", "memory"),
    ("a_program_per_row", "update_rope_guarded", "memory", "memory race"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), FOUND_BY_SEARCH, ids=[row[0] for row in FOUND_BY_SEARCH])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    found_and_blamed(faulty(FILE, fault), transform, check, buffer, tmp_path)


KEPT = [
    ("kept_projection", "gates", ProjectAndScale(3, heads=4, hidden=16)),
    ("kept_gates", "out", LogitsHeadGate(3, heads=4, hidden=16)),
    ("kept_scales", "out", ApplyScales(3, heads=4)),
    ("kept_raw_scales", "out", FusedLogitsHeadGate(3, heads=4)),
    ("kept_source", "memory", UpdateRope(3, source="shifted", shift=1)),
]


@pytest.mark.parametrize(("fault", "buffer", "once"), KEPT, ids=[row[0] for row in KEPT])
def test_a_result_kept_from_the_call_before_is_found_by_replays(fault, buffer, once, faulty):
    found_by_replays(faulty(FILE, fault), once.contract.name, buffer, once)


@pytest.mark.parametrize("name", [row[2].contract.name for row in KEPT])
def test_replays_change_the_numbers_and_nothing_else(name):
    def labels(example):
        contents = {(getattr(step, "kind", ""), step.content) for step in example.steps}
        assert len({replace(step, content=0, **({"kind": "ones"} if hasattr(step, "kind") else {}))
                    for step in example.steps}) == 1
        return {f"contents {min(len(contents), 3)}", f"2 tokens {example.steps[0].tokens >= 2}"}

    assert {"contents 2", "contents 3", "2 tokens True"} <= set(drawn(sessions.replays(CONTRACTS[name]), labels, 60))


@pytest.mark.parametrize(("honest", "transform"), [
    ("honest_project", "project_and_scale_head_gates"), ("honest_write_back", "update_rope_guarded"),
])
def test_honest_bodies_pass(honest, transform, faulty, tmp_path):
    contract = CONTRACTS[transform]
    campaign = Campaign(contract, faulty(FILE, honest), {}, domain.of(contract), PROFILES["quick"], folder=tmp_path)
    assert campaign.run().reports == []


def of_layout(example) -> set[str]:
    places = example.layout.places.values()
    return {f"layout {p.kind}" for p in places} | {f"dtype {p.dtype}" for p in places if p.dtype} | {
        f"order {example.layout.order > 0}"}


def of_gates(example) -> set[str]:
    case = example.steps[0]
    tests = {
        "2 tokens": case.tokens >= 2, "no token": case.tokens == 0, "a full tile of tokens": case.tokens == 16,
        "one token past a tile": case.tokens == 17, "two tiles of tokens": case.tokens > 32, "1 head": case.heads == 1,
        "64 heads": case.heads == 64, "odd heads": case.heads in (3, 17, 65), "spare rows": case.spare > 0,
    }
    if hasattr(case, "hidden"):
        tests |= {"the model's hidden size": case.hidden == 7168, "a full block of inputs": case.hidden == 128,
                  "one input past a block": case.hidden == 129, "one input": case.hidden == 1, "odd inputs": case.hidden == 33}
    return of_layout(example) | {case.kind} | {name for name, true in tests.items() if true}


GATES = {"2 tokens", "no token", "a full tile of tokens", "one token past a tile", "two tiles of tokens", "1 head", "64 heads",
         "odd heads", "spare rows", "order True", *KINDS, *(f"layout {k}" for k in ("offset", "pitched", "strided"))}
PROJECTED = {"the model's hidden size", "a full block of inputs", "one input past a block", "one input", "odd inputs"}


@pytest.mark.parametrize(("name", "own"), [
    ("project_and_scale_head_gates", PROJECTED), ("logits_head_gate", PROJECTED), ("apply_q_scale_and_softmax_scale", set()),
    ("fused_logits_head_gate", {"dtype bfloat16"}),
])
def test_gates_have_everything(name, own):
    seen = drawn(domain.of(CONTRACTS[name]), of_gates, BUDGET)
    assert sorted((GATES | own) - set(seen)) == []
    assert seen["2 tokens"] > BUDGET * 0.7


def of_write_back(example) -> set[str]:
    case = example.steps[0]
    dst, src = set(case.cells(*case.dst()).tolist()), set(case.cells(*case.src()).tolist())
    tests = {
        "partly the same cells": bool(dst & src) and dst != src, "all the same cells": bool(dst) and dst == src,
        "no cell in common": bool(dst) and not dst & src, "in each other's gaps": case.source == "shifted" and not dst & src,
        "before": case.source == "shifted" and case.shift < 0, "behind": case.source == "shifted" and case.shift > 0,
        "no tail": case.head_dim == case.rope_dim, "a tail": case.head_dim > case.rope_dim, "no token": case.tokens == 0,
        "one address, other strides": bool(dst) and case.source in ("packed", "swapped") and case.dst() != case.src(),
        "more than registers hold": len(dst) > 2048 and bool(dst & src), "spare cells": case.spare > 0,
    }
    return of_layout(example) | {case.source} | {name for name, true in tests.items() if true}


def test_write_backs_overlap_in_every_way():
    seen = drawn(domain.of(CONTRACTS["update_rope_guarded"]), of_write_back, BUDGET)
    assert sorted({
        *SOURCES, "partly the same cells", "all the same cells", "no cell in common", "in each other's gaps", "before",
        "behind", "no tail", "a tail", "no token", "one address, other strides", "more than registers hold", "spare cells",
        "dtype float32", "dtype float16", "layout offset",
    } - set(seen)) == []
