"""Planted faults of the schedule family are found and blamed, and its strategies draw what the bugs need."""

from dataclasses import replace

import pytest

from harness import registry
from harness.campaign import PROFILES, Campaign
from harness.differential import Example, harm
from measure import BUDGET, drawn, found_and_blamed
from oracles.schedule import PagedMqaWalk
from strategies import domain, sessions

FILE = "faults_schedule.py"
CONTRACTS = registry.contracts()

FOUND_BY_SEARCH = [
    ("fresh_tensors", "paged_mqa_schedule", "states", "schedule"),
    ("first_column", "paged_mqa_schedule", "states", "schedule"),
    ("flattened", "paged_mqa_schedule", "states", "schedule"),
    ("remainder_last", "paged_mqa_schedule", "states", "schedule"),
    ("floor_of_splits", "paged_mqa_schedule", "states", "schedule"),
    ("int32_sum", "paged_mqa_schedule", "states", "schedule"),
    ("no_rows_clamped", "paged_mqa_schedule", "states", "schedule"),
    ("one_entry_short", "paged_mqa_schedule", "states", "schedule"),
    ("reads_past_the_batch", "paged_mqa_schedule", "memory", "context_lens read-outside"),
    ("loads_before_it_tests", "paged_mqa_walk", "memory", "context_lens read-outside"),
    ("one_split_too_many", "paged_mqa_walk", "states", "owner"),
    ("no_overhead", "flashmla_schedule", "states", "tile_scheduler_metadata"),
    ("lengths_matter", "flashmla_schedule", "states", "tile_scheduler_metadata"),
    ("piece_restarts", "flashmla_schedule", "states", "tile_scheduler_metadata"),
    ("not_cut", "flashmla_schedule", "states", "tile_scheduler_metadata"),
    ("splits_past_the_batch", "flashmla_schedule", "states", "num_splits"),
    ("parts_tail_cleared", "flashmla_schedule", "states", "tile_scheduler_metadata"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), FOUND_BY_SEARCH, ids=[row[0] for row in FOUND_BY_SEARCH])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    found_and_blamed(faulty(FILE, fault), transform, check, buffer, tmp_path)


@pytest.mark.parametrize(("honest", "transform"), [
    ("honest_schedule", "paged_mqa_schedule"), ("passes_its_end", "paged_mqa_walk"), ("meets_its_end", "paged_mqa_walk"),
    ("honest_parts", "flashmla_schedule"),
])
def test_honest_bodies_pass(honest, transform, faulty, tmp_path):
    contract = CONTRACTS[transform]
    outcome = Campaign(contract, faulty(FILE, honest), contract.rules(), domain.of(contract), PROFILES["quick"],
                       folder=tmp_path).run()
    assert outcome.reports == []


# -- stale schedules ----------------------------------------------------------------------------------------------------

SESSIONS = replace(PROFILES["gate"], counted=BUDGET // 5)


def session_outcome(worker, transform, rules, folder):
    contract = CONTRACTS[transform]
    return Campaign(contract, worker, contract.rules(rules), sessions.replays(contract), SESSIONS, folder=folder).run()


@pytest.mark.parametrize(("fault", "transform", "buffer"), [
    ("kept_if_plausible", "paged_mqa_schedule", "schedule"),
    ("parts_kept_if_plausible", "flashmla_schedule", "tile_scheduler_metadata"),
])
def test_a_plan_that_is_not_refreshed_is_found_by_replays_and_by_nothing_else(fault, transform, buffer, faulty, tmp_path):
    alone = Campaign(CONTRACTS[transform], faulty(FILE, fault), CONTRACTS[transform].rules(), domain.of(CONTRACTS[transform]),
                     PROFILES["quick"], folder=tmp_path).run()
    assert alone.reports == []
    reports = session_outcome(faulty(FILE, fault), transform, {}, tmp_path).reports
    assert reports[0].found.kind[0] == "states" and any(r.found.buffer == buffer for r in reports)
    assert reports[0].found.sentence.startswith("step 1: ") and len(reports[0].example.steps) == 2


def test_a_stale_schedule_is_reported_as_work_left_out_or_a_walk_without_end(faulty, tmp_path):
    """Judged by what the consumer needs, whatever the version: the report says what would happen."""
    report = session_outcome(faulty(FILE, "kept_if_plausible"), "paged_mqa_schedule", {"entries": "any"}, tmp_path).reports[0]
    said = report.found.sentence
    assert said.startswith("step 1: ")
    assert any(clause in said for clause in ("does not terminate", "computed by no SM", "load is unbalanced"))


def test_a_consumer_that_only_meets_its_end_hangs_on_a_stale_schedule(faulty):
    stale = Example((PagedMqaWalk((300, 1000), num_sms=2, built_from=(1000, 300)),),
                    outside="the schedule is that of the live lengths")
    (found,) = harm(stale, stale.outside, faulty(FILE, "meets_its_end"), {})
    assert (found.check, found.buffer) == ("unchecked", stale.outside)
    assert "no answer within" in found.sentence
    assert harm(stale, stale.outside, faulty(FILE, "passes_its_end"), {}) == []


# -- the strategies -----------------------------------------------------------------------------------------------------


def labels(example) -> set[str]:
    case = example.steps[0]
    batch = getattr(case, "all", case.lengths)
    splits = [-(-n // 256) for n in batch]
    sms = getattr(case, "num_sms", None) or case.num_parts
    tests = {
        "2 rows": len(batch) >= 2, "3 different lengths": len(set(batch)) >= 3, "idle": bool(batch) and not any(batch),
        "a row without keys between rows": any(a and not b and c for a, b, c in zip(batch, batch[1:], batch[2:])),
        "very short beside very long": bool(batch) and min(batch) <= 3 and max(batch) >= 1000,
        "a whole split": any(n and n % 256 == 0 for n in batch), "one past a split": any(n % 256 == 1 for n in batch),
        "fewer splits than SMs": 0 < sum(splits) < sms, "more splits than SMs": sum(splits) > sms,
        "work that divides": bool(sum(splits)) and sum(splits) % sms == 0, "1 SM": sms == 1, "a whole device": sms >= 132,
        "spare capacity": case.spare > 0, "padded": list(batch[-1:]) == [1], "a block of rows": len(batch) > 256,
        "strided": any(p.kind == "strided" for p in example.layout.places.values()),
        "shuffled programs": example.layout.order > 0,
    }
    if hasattr(case, "next_n"):
        tests |= {f"next_n {n}": case.next_n == n for n in (0, 1, 2, 3, 4, 5, 8)}
        tests |= {"the largest int32": 2**31 - 1 in batch, "empty": not batch}
    if hasattr(case, "topk"):
        tests |= {"dense": case.topk == -1, "the usual top-k": case.topk == 2048, "an odd top-k": case.topk % 64 not in (0, 63)}
    return {name for name, true in tests.items() if true}


COMMON = {"2 rows", "3 different lengths", "idle", "a row without keys between rows", "very short beside very long",
          "a whole split", "one past a split", "fewer splits than SMs", "more splits than SMs", "work that divides", "1 SM",
          "a whole device", "spare capacity", "padded", "strided", "shuffled programs"}


@pytest.mark.parametrize(("name", "own"), [
    ("paged_mqa_schedule", {"a block of rows", "the largest int32", "empty", *(f"next_n {n}" for n in (0, 1, 2, 3, 4, 5, 8))}),
    ("paged_mqa_walk", set()),
    ("flashmla_schedule", {"a block of rows", "dense", "the usual top-k", "an odd top-k"}),
])
def test_examples_have_everything(name, own):
    seen = drawn(domain.of(CONTRACTS[name]), labels, BUDGET)
    assert sorted((COMMON | own) - set(seen)) == []
    assert seen["2 rows"] > BUDGET * 0.7


@pytest.mark.parametrize("name", ["paged_mqa_schedule", "paged_mqa_walk", "flashmla_schedule"])
def test_replays_shrink_grow_and_idle(name):
    def of_session(example):
        totals = [sum(case.lengths) for case in example.steps]
        return {*(["shrinks"] if any(b < a for a, b in zip(totals, totals[1:])) else []),
                *(["grows"] if any(b > a for a, b in zip(totals, totals[1:])) else []), *(["idle"] if 0 in totals else [])}

    assert set(drawn(sessions.replays(CONTRACTS[name]), of_session, 60)) == {"shrinks", "grows", "idle"}
