"""Faults of the kv_indices family, found by the gate's campaign and blamed on the right tensor; and what its cases have."""

import pytest
from measure import BUDGET, drawn, found_and_blamed

from harness import registry
from oracles.kv_indices import DraftDecode
from strategies import domain, sessions

CONTRACTS = registry.contracts()
RAGGED, PAGED, DRAFT, SLICES = ("create_flashinfer_kv_indices", "create_flashmla_kv_indices",
                                "generate_draft_decode_kv_indices", "draft_decode_slices")
FAULTS = [
    ("start_ignored", RAGGED, "states", "kv_indices"),
    ("row_for_slot", RAGGED, "states", "kv_indices"),
    ("half_of_int64", RAGGED, "states", "kv_indices"),
    ("slot_times_pitch_in_32_bits", RAGGED, "memory", "req_to_token read-outside"),
    ("adjacent_pages", PAGED, "states", "kv_indices"),
    ("tokens_for_pages", PAGED, "states", "kv_indices"),
    ("tail_cleared", PAGED, "states", "kv_indices"),
    ("first_block_only", PAGED, "states", "kv_indices"),
    ("page_rounded_down", PAGED, "states", "kv_indices"),
    ("no_topk_before", DRAFT, "states", "kv_indices"),
    ("index_zero_written", DRAFT, "states", "kv_indptr"),
    ("total_missing", DRAFT, "states", "kv_indptr"),
    ("branches_without_pages", DRAFT, "states", "kv_indices"),
    ("one_draft_less", DRAFT, "states", "kv_indices"),
    ("step_times_pitch_in_32_bits", DRAFT, "memory", "kv_indices write-outside"),
    ("slices_without_topk", SLICES, "returned", "result"),
    ("slices_one_step_short", SLICES, "returned", "result"),
    ("slices_for_every_step", SLICES, "returned", "result"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), [pytest.param(*row, id=row[0]) for row in FAULTS])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    found_and_blamed(faulty("faults_kv_indices.py", fault), transform, check, buffer, tmp_path)


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_batch(example) -> set[str]:
    """What an example of a request table has."""
    case = example.steps[0]
    batch, lengths = case.batch, [r.length for r in case.batch]
    slots, kinds = [r.slot for r in batch], {p.kind for p in example.layout.places.values()}
    tests = {
        "2 requests": len(batch) >= 2,
        "3 different lengths": len(set(lengths)) >= 3,
        "empty batch": not batch,
        "the last slot": case.slots - 1 in slots,
        "slot 0 of a real request": any(r.slot == 0 and r.length > 1 for r in batch),
        "a slot twice": len(set(slots)) < len(slots),
        "length 0": 0 in lengths,
        "shared slots": case.shared and len(batch) >= 2,
        "slots of a page not together": not case.aligned and case.page_size > 1,
        "offsets past 2^31": case.slots == 4096 and case.table_extra == 2**20 and any(s >= 2048 for s in slots),
        "a full table row": case.table_extra == 0,
        "spare capacity": case.spare > 0,
        "int64 inputs": any(p.dtype == "int64" for n, p in example.layout.places.items() if n != "kv_indices"),
        "int64 output": any(p.dtype == "int64" for n, p in example.layout.places.items() if n == "kv_indices"),
    }
    return {f"layout {k}" for k in kinds} | {name for name, true in tests.items() if true}


EVERY = {
    "2 requests", "3 different lengths", "empty batch", "the last slot", "slot 0 of a real request", "a slot twice", "length 0",
    "shared slots", "slots of a page not together", "offsets past 2^31", "a full table row", "spare capacity", "int64 inputs",
    *(f"layout {k}" for k in ("offset", "strided", "expanded")),
}


def with_starts(example) -> set[str]:
    case = example.steps[0]
    tests = {
        "starts": case.starts and any(r.start for r in case.batch),
        "no starts": not case.starts and bool(case.batch),
        "a start inside a page": case.starts and any(r.start % case.page_size for r in case.batch),
    }
    return of_batch(example) | {name for name, true in tests.items() if true}


def test_ragged_examples_have_everything():
    def labels(example):
        case = example.steps[0]
        return with_starts(example) | {
            *(["gaps"] if any(r.gap for r in case.batch) else []), *(["room behind"] if case.tail else []),
            *(["exactly enough"] if case.batch and not case.tail else []),
            *(["more than a block"] if any(r.length > 1024 for r in case.batch) else []),
        }

    seen = drawn(domain.of(CONTRACTS[RAGGED]), labels, BUDGET)
    needed = EVERY | {"starts", "no starts", "gaps", "exactly enough", "room behind", "more than a block", "int64 output"}
    assert sorted(needed - set(seen)) == []


def test_block_tables_have_everything():
    def labels(example):
        case = example.steps[0]
        page = case.page_size
        return with_starts(example) | {f"page size {page}"} | {
            *(["exactly wide enough"] if case.pages() and not case.row_extra else []),
            *(["past a block of 4,096 tokens"] if any(r.length > 4096 for r in case.batch) else []),
            *(["a page boundary"] if any(r.length and r.length % page == 0 for r in case.batch) and page > 1 else []),
            *(["one past a page boundary"] if any(r.length % page == 1 for r in case.batch) and page > 1 else []),
        }

    seen = drawn(domain.of(CONTRACTS[PAGED]), labels, BUDGET)
    needed = EVERY | {"starts", "no starts", "a start inside a page", "exactly wide enough", "past a block of 4,096 tokens",
                      "a page boundary", "one past a page boundary", "layout far", "layout pitched",
                      *(f"page size {2**k}" for k in range(13))}
    assert sorted(needed - set(seen)) == []


def test_drafts_have_every_tree_and_page():
    def labels(example):
        case: DraftDecode = example.steps[0]
        page, kinds = case.page_size, {p.kind for n, p in example.layout.places.items() if n == "kv_indices"}
        lengths, paged = [r.length for r in case.batch], case.page_size > 1 and case.topk > 1
        tests = {
            "exactly wide enough": case.batch and not case.row_extra,
            "branches with pages": paged and len(case.batch) > 1,
            "a partial page": paged and any(n % page for n in lengths),
            "a full page": paged and any(n and n % page == 0 for n in lengths),
            "a branch of 2 pages": paged and any(n % page + case.num_steps > page for n in lengths),
            "more than a block of requests": len(case.batch) > 32,
            "more than a block of tokens": any(n > 512 for n in lengths),
            "far steps": "far" in kinds and case.num_steps > 2,
            "spare rows": case.row_spare,
        }
        found = {name for name, true in tests.items() if true}
        return of_batch(example) | found | {f"{case.num_steps} steps", f"top-k {case.topk}", f"page size {page}"}

    seen = drawn(domain.of(CONTRACTS[DRAFT]), labels, BUDGET)
    needed = EVERY | {"exactly wide enough", "branches with pages", "a partial page", "a full page", "a branch of 2 pages",
                      "more than a block of requests", "more than a block of tokens", "far steps", "spare rows", "int64 output",
                      *(f"{n} steps" for n in (1, 2, 3, 4, 5, 8)), *(f"top-k {k}" for k in (1, 2, 3, 4, 8)),
                      *(f"page size {p}" for p in (1, 2, 4, 16, 32, 64, 128))}
    assert sorted(needed - set(seen)) == []
    assert seen["2 requests"] > BUDGET * 0.7


def test_slices_have_padding_and_exact_rows():
    def labels(example):
        case = example.steps[0]
        return {*(["padded"] if case.padded else []), *(["exact"] if not case.row_extra else []), f"top-k {case.topk}",
                *(["no sub-backend"] if case.num_steps == 1 else [])}

    seen = drawn(domain.of(CONTRACTS[SLICES]), labels, BUDGET)
    assert {"padded", "exact", "no sub-backend", "top-k 1", "top-k 8"} <= set(seen)


@pytest.mark.parametrize("name", [PAGED, DRAFT])
def test_replays_shrink_and_grow_on_buffers_of_one_size(name):
    def labels(example):
        totals = [sum(r.length for r in step.batch) for step in example.steps]
        shapes = {(step.arguments()["kv_indices"].shape, len(step.batch)) for step in example.steps}
        assert len(shapes) == 1
        return {*(["shrinks"] if any(b < a for a, b in zip(totals, totals[1:])) else []),
                *(["grows"] if any(b > a for a, b in zip(totals, totals[1:])) else []),
                *(["idle"] if any(all(r.length <= 1 for r in step.batch) for step in example.steps) else [])}

    assert set(drawn(sessions.replays(CONTRACTS[name]), labels, 60)) == {"shrinks", "grows", "idle"}
