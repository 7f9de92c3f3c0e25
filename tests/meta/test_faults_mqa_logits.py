"""Faults of the mqa_logits family, found by the gate's campaign and blamed on the right tensor; and what its cases have."""

import numpy as np
import pytest
from measure import BUDGET, drawn, found_and_blamed, hunt

from harness import registry
from harness.differential import check
from oracles.mqa_logits import SCORE_KINDS, top_of
from strategies import domain

CONTRACTS = registry.contracts()
BUDGETS, CHUNK, PLAN, SCORES, RAGGED, PAGED = (c.name for c in CONTRACTS.values() if c.family == "mqa_logits")
FAULTS = [
    ("capture_cached", BUDGETS, "returned", "result"),
    ("one_budget_for_all_devices", BUDGETS, "returned", "result"),
    ("budget_of_zero", BUDGETS, "returned", "result"),
    ("chunks_at_the_budget", CHUNK, "returned", "result"),
    ("elements_for_bytes", CHUNK, "returned", "result"),
    ("last_chunk_dropped", PLAN, "returned", "result"),
    ("no_row_fits", PLAN, "returned", "result"),
    ("no_relu", SCORES, "states", "logits"),
    ("query_counter_as_key_base", SCORES, "states", "logits"),
    ("scale_forgotten", SCORES, "states", "logits"),
    ("tail_cleaned_always", SCORES, "states", "logits"),
    ("chunk_row_for_token", PAGED, "states", "topk_result"),
    ("padding_left", PAGED, "states", "topk_result"),
    ("offset_of_the_chunk", RAGGED, "states", "topk_result"),
    ("ks_forgotten", RAGGED, "states", "topk_result"),
    ("partial_chunk_dropped", RAGGED, "states", "topk_result"),
    ("one_key_short", RAGGED, "states", "topk_result"),
]
BY_ROWS = {CHUNK, PLAN}  # their batch is the number of rows, and 8,000,000 logits take many


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), [pytest.param(*row, id=row[0]) for row in FAULTS])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    most = 2**31 if transform in BY_ROWS else 3 if transform == BUDGETS else 2
    found_and_blamed(faulty("faults_mqa_logits.py", fault), transform, check, buffer, tmp_path, most)


@pytest.mark.parametrize(("honest", "transform"), [("honest_scores", SCORES), ("honest_paged", PAGED)])
def test_the_bodies_that_the_faults_spoil_are_right(honest, transform, faulty, tmp_path):
    assert hunt(faulty("faults_mqa_logits.py", honest), transform, tmp_path).verdict == "PASS"


@pytest.mark.parametrize(("fault", "sums", "found"), [
    ("scores_of_fp8_tensor_cores", "fp32", True), ("scores_of_fp8_tensor_cores", "fp8_tensor_core", False),
    ("no_relu", "fp8_tensor_core", True), ("query_counter_as_key_base", "fp8_tensor_core", True),
    ("scale_forgotten", "fp8_tensor_core", True)])
def test_fewer_bits_are_right_by_their_own_rule_and_hide_no_fault(fault, sums, found, faulty):
    rules = CONTRACTS[SCORES].rules({"sums": sums})
    seen = drawn(domain.of(CONTRACTS[SCORES]),
                 lambda e: {f.kind for f in check(e, faulty("faults_mqa_logits.py", fault), rules)}, 60)
    assert (("states", "logits") in seen) == found, seen


@pytest.mark.parametrize(("actual", "clause"), [
    ([72, 71], "is selected, and"), ([72, -1], "none of the 4 keys"), ([72, 72], "selected twice"), ([72, 9], "none of the"),
])
def test_the_judge_of_a_selection_complains(actual, clause):
    judge = top_of(np.array([5.0, 1.0, 5.0, 5.0]), 2, np.array([70, 71, 72, 73]))
    assert clause in judge.complaint(np.array(actual))
    for right in ([70, 72], [73, 70], [72, 73]):
        assert judge.complaint(np.array(right)) is None


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_topk(example) -> set[str]:
    """What an example of chunked top-k has."""
    case = example.steps[0]
    lengths = [r.length for r in case.rows]
    tests = {
        "2 requests": len(case.requests) >= 2,
        "a prefix": any(r.extend_len < r.seq_len for r in case.requests),
        "no prefix": any(r.extend_len == r.seq_len > 0 for r in case.requests),
        "an idle request": any(r.extend_len == 0 for r in case.requests),
        "a row without keys": any(n <= 0 for n in lengths),
        "at the top-k": case.index_topk in lengths,
        "one past the top-k": case.index_topk + 1 in lengths,
        "one row a chunk": case.max_rows == 1 and len(lengths) > 1,
        "a partial last chunk": 1 < case.max_rows < len(lengths) and len(lengths) % case.max_rows > 0,
        "one chunk": case.max_rows >= len(lengths),
        "padding": case.padding > 0,
        "more than 1,000 keys in a row": bool(lengths) and max(lengths) > 1000,
        "no rows": not lengths,
    }
    return {name for name, true in tests.items() if true} | {f"scores {case.kind}"}


@pytest.mark.parametrize("name", [RAGGED, PAGED])
def test_topk_examples_have_everything(name):
    seen = drawn(domain.of(CONTRACTS[name]), of_topk, BUDGET)
    every = {"2 requests", "a prefix", "no prefix", "an idle request", "a row without keys", "at the top-k",
             "one past the top-k", "one row a chunk", "a partial last chunk", "one chunk", "padding",
             "more than 1,000 keys in a row", "no rows"}
    assert sorted((every | {f"scores {k}" for k in SCORE_KINDS}) - set(seen)) == []


def test_budgets_are_drawn_in_and_out_of_captures_and_on_several_devices():
    def labels(example):
        case = example.steps[0]
        return {
            *(["a capture"] if any(q.capturing for q in case.queries) else []),
            *(["nothing free"] if any(q.free == 0 for q in case.queries) else []),
            *(["devices"] if len({q.device for q in case.queries}) > 1 else []),
            *(["a device twice"] if len({q.device for q in case.queries}) < len(case.queries) else []),
            "no static share" if case.mem_fraction_static is None else "a static share",
            *(["more than all"] if (case.mem_fraction_static or 0) > 1 else []),
            *(["readings withheld"] if not case.readable else []),
        }

    seen = drawn(domain.of(CONTRACTS[BUDGETS]), labels, BUDGET)
    assert set(seen) == {"a capture", "nothing free", "devices", "a device twice", "no static share", "a static share",
                         "more than all", "readings withheld"}


def test_sizes_of_logits_reach_past_32_bits():
    def labels(example):
        size = 4 * example.steps[0].num_q * example.steps[0].num_k
        return {name for name, true in {"small": size < 2**25, "past 2^32": size >= 2**32}.items() if true}

    seen = drawn(domain.of(CONTRACTS["should_chunk_mqa_logits"]), labels, BUDGET)
    assert min(seen["small"], seen["past 2^32"]) >= 5
