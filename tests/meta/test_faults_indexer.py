"""Planted faults of the indexer family are found, and its strategies draw what the faults need."""

import pytest
from measure import BUDGET, drawn, found_and_blamed

from harness import registry
from strategies import domain

CONTRACTS = registry.contracts()
RANGES, COUNTS, ZIGZAG = "indexer_k_start_end", "cp_round_robin_split_q_seqs", "cp_zigzag_split"
COUNTS_CPU, LISTS = "cp_round_robin_split_q_seqs_cpu", "cp_zigzag_metadata"
SPLIT, ROWS = "cp_round_robin_split", "cp_round_robin_split_rows"

FOUND = [
    ("query_base", RANGES, "states", "ks"),
    ("query_base_of_the_starts", RANGES, "states", "ks"),
    ("unselected_keys_counted", RANGES, "states", "ks"),
    ("request_for_position", RANGES, "states", "token_to_batch_idx"),
    ("idle_requests_skipped", RANGES, "states", "ks"),
    ("own_key_not_seen", RANGES, "states", "ke"),
    ("all_keys_seen", RANGES, "states", "ke"),
    ("tokens_of_the_next_rank", RANGES, "states", "ke"),
    ("one_token_of_none", COUNTS, "states", "q_lens"),
    ("whole_rounds_only", COUNTS, "states", "q_lens"),
    ("rounds_up", COUNTS, "states", "q_lens"),
    ("each_request_begins_at_rank_0", COUNTS, "states", "q_lens"),
    ("idle_requests_kept", COUNTS, "states", "bs_idx"),
    ("position_for_request", COUNTS, "states", "bs_idx"),
    ("half_of_int64", COUNTS, "states", "q_lens"),
    ("int64_rejected", COUNTS, "raised", "TypeError"),
    ("nothing_carried_on_the_host", COUNTS_CPU, "returned", "result"),
    ("zeros_on_the_host", COUNTS_CPU, "returned", "result"),
    ("a_token_for_every_rank", COUNTS_CPU, "raised", "AssertionError"),
    ("next_rank", SPLIT, "states", "split"),
    ("one_block_per_rank", SPLIT, "states", "split"),
    ("last_round_dropped", SPLIT, "states", "split"),
    ("whole_rounds_needed", SPLIT, "raised", "RuntimeError"),
    ("last_token_repeated", SPLIT, "states", "split"),
    ("last_round_dropped", ROWS, "states", "split"),
    ("rank_0_for_ranks_without_tokens", ROWS, "states", "split"),
    ("pitch_is_the_width", ROWS, "states", "split"),
    ("offset_in_32_bits", ROWS, "memory", "x read-outside"),
    ("neighbours_for_zigzag", ZIGZAG, "states", "token_indices"),
    ("the_other_way_round", ZIGZAG, "states", "token_indices"),
    ("request_by_request", ZIGZAG, "states", "token_indices"),
    ("rest_to_the_last", ZIGZAG, "states", "token_indices"),
    ("rest_dropped", ZIGZAG, "states", "token_indices"),
    ("padding_forgotten", ZIGZAG, "states", "token_indices"),
    ("prefix_forgotten", ZIGZAG, "states", "kv_lens"),
    ("keys_before_the_segment", ZIGZAG, "states", "kv_lens"),
    ("split_by_the_total", LISTS, "returned", "result"),
    ("order_not_inverted", LISTS, "returned", "result"),
    ("own_length_for_the_longest", LISTS, "returned", "result"),
    ("at_least_one_request", LISTS, "raised", "ValueError"),
]


NEED_THREE = {"one_block_per_rank"}  # of two tokens, two ranks have one each, either way


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), FOUND, ids=lambda v: v)
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    requests = 3 if fault in NEED_THREE else 2
    found_and_blamed(faulty("faults_indexer.py", fault), transform, check, buffer, tmp_path, requests)


def test_every_transform_of_the_family_has_a_fault():
    assert {transform for _, transform, _, _ in FOUND} == {n for n, c in CONTRACTS.items() if c.family == "indexer"}


# -- the strategies -----------------------------------------------------------------------------------------------------


def having(labels: dict[str, bool]) -> set[str]:
    return {label for label, has in labels.items() if has}


def common(example) -> set[str]:
    """What a layout has, and which rank of how many."""
    case, places = example.steps[0], example.layout.places.values()
    size, rank = case.cp_size, case.cp_rank
    return {f"layout {p.kind}" for p in places} | {f"{size} ranks"} | having({
        "int64": any(p.dtype == "int64" for p in places), "spare capacity": getattr(case, "spare", 0) > 0,
        "rank 0": rank == 0 < size - 1, "the last rank": 0 < rank == size - 1, "a rank between": 0 < rank < size - 1,
    })


def dealt(extends, case) -> set[str]:
    """How query tokens of several requests fall on the ranks."""
    total, size, selected = sum(extends), case.cp_size, set()
    first = 0
    for i, n in enumerate(extends):
        selected |= {i} if len(range((case.cp_rank - first) % size, n, size)) else set()
        first += n
    busy = {i for i, n in enumerate(extends) if n}
    return having({
        "fewer tokens than ranks": 0 < total < size, "a rank without tokens": total > 0 and not selected,
        "as many tokens as ranks": total == size > 1, "not divisible": total % size > 0, "divisible": total > total % size == 0,
        "no tokens": extends and not total, "empty batch": not extends, "past a block of requests": len(extends) > 32,
        "zero before others": any(n == 0 and sum(extends[i:]) for i, n in enumerate(extends)),
        "a strict selection": len(selected) >= 1 and selected < busy,
        "the first is not selected": bool(selected) and bool(busy) and min(selected) > min(busy),
        "a request begins past rank 0": any(sum(extends[:i]) % size and n for i, n in enumerate(extends)),
        "past a block of tokens": any(n // size > 128 for n in extends),
    })


def prefixes(batch) -> set[str]:
    return having({
        "prefixed": any(0 < r.extend_len < r.seq_len for r in batch), "an idle request with keys": any(
            not r.extend_len and r.seq_len for r in batch),
        "fresh": any(0 < r.extend_len == r.seq_len for r in batch), "3 different lengths": len({r.seq_len for r in batch}) >= 3,
        "past 65,536 keys": sum(r.seq_len for r in batch) > 65536,
    })


def of_ranges(example) -> set[str]:
    batch = example.steps[0].batch
    return common(example) | dealt([r.extend_len for r in batch], example.steps[0]) | prefixes(batch)


def of_counts(example) -> set[str]:
    case = example.steps[0]
    extends = getattr(case, "all", case.extends)
    return common(example) | dealt(extends, case) | having({"past 1,024 requests": len(extends) > 1024})


def of_split(example) -> set[str]:
    case = example.steps[0]
    return common(example) | dealt((case.tokens,), case) | having({
        "past a block": case.count() > 512, "one token": case.tokens == 1,
        "past a block of columns": getattr(case, "columns", 0) > 512, "one column": getattr(case, "columns", 0) == 1,
    })


def of_zigzag(example) -> set[str]:
    case = example.steps[0]
    batch, parts = getattr(case, "batch", case.requests), 2 * case.cp_size
    extends = [r.extend_len for r in batch]
    return common(example) | prefixes(batch) | having({
        "one request": len(batch) == 1, "several requests": len(batch) >= 2, "empty batch": not batch,
        "padded": case.padding > 0 and len(batch) >= 2, "shorter than the segments": any(0 < n < parts for n in extends),
        "whole segments": any(n and n % parts == 0 for n in extends),
        "one more": any(n > parts and n % parts == 1 for n in extends),
        "one less": any(n % parts == parts - 1 for n in extends), "cuttable": bool(extends) and min(extends) >= parts,
        "long and short": len(extends) >= 2 and sum(extends) >= parts > min(extends),
        "past a block of requests": len(batch) > 32, "past a block of tokens": any(n // parts >= 128 for n in extends),
    })


RANKS = {*(f"{n} ranks" for n in (1, 2, 3, 4, 8)), "rank 0", "the last rank", "a rank between"}
STRIDED = {f"layout {k}" for k in ("offset", "pitched", "strided", "expanded")} | {"int64", "spare capacity"}
FAR = {f"layout {k}" for k in ("offset", "pitched", "strided", "far")} | {"int64", "spare capacity"}
DEALT = {"fewer tokens than ranks", "a rank without tokens", "as many tokens as ranks", "not divisible", "divisible",
         "no tokens"}
SELECTED = {"empty batch", "zero before others", "a strict selection", "the first is not selected",
            "a request begins past rank 0"}
PREFIXES = {"prefixed", "fresh", "an idle request with keys", "3 different lengths", "past 65,536 keys"}
CUT = {"one request", "several requests", "empty batch", "padded", "shorter than the segments", "whole segments", "one more",
       "one less", "cuttable", "long and short"}
NEEDED = {
    RANGES: (of_ranges, RANKS | STRIDED | DEALT | SELECTED | PREFIXES | {"past a block of requests", "past a block of tokens"}),
    COUNTS: (of_counts, RANKS | STRIDED | DEALT | SELECTED | {"past a block of requests", "past 1,024 requests"}),
    COUNTS_CPU: (of_counts, RANKS | DEALT | SELECTED),
    SPLIT: (of_split, RANKS | STRIDED | DEALT | {"one token", "past a block"}),
    ROWS: (of_split, RANKS | FAR | DEALT | {"one token", "one column", "past a block of columns"}),
    ZIGZAG: (of_zigzag, RANKS | STRIDED | CUT | PREFIXES | {"past a block of requests", "past a block of tokens"}),
    LISTS: (of_zigzag, RANKS | CUT | PREFIXES),
}


@pytest.mark.parametrize("name", NEEDED)
def test_examples_have_everything(name):
    labels, needed = NEEDED[name]
    assert sorted(needed - set(drawn(domain.of(CONTRACTS[name]), labels, BUDGET, needed))) == []


def test_every_transform_of_the_family_is_measured():
    assert set(NEEDED) == {n for n, c in CONTRACTS.items() if c.family == "indexer"}
