"""Faults of the draft family, found by the gate's campaign and blamed on the right tensor; and what its cases have."""

import pytest
from measure import BUDGET, drawn, found_and_blamed

from harness import registry
from strategies import domain

CONTRACTS = registry.contracts()
ASSIGN, EXTEND, UNIFORM, AFTER, DRAFT, CONTIGUOUS = (
    "assign_req_to_token_pool", "assign_extend_cache_locs", "assign_extend_cache_locs_uniform",
    "create_extend_after_decode_spec_info", "assign_draft_cache_locs", "assign_draft_cache_locs_contiguous")
FAULTS = [
    ("offsets_of_one_length", ASSIGN, "states", "req_to_token"),
    ("row_cleared_behind", ASSIGN, "states", "req_to_token"),
    ("slot_times_pitch_in_32_bits", ASSIGN, "memory", "req_to_token write-outside"),
    ("list_cleared_behind", EXTEND, "states", "out_cache_loc"),
    ("from_the_row_start", EXTEND, "states", "out_cache_loc"),
    ("positions_from_zero", UNIFORM, "states", "positions_out"),
    ("first_block_only", UNIFORM, "states", "out_cache_loc"),
    ("lanes_of_the_batch", AFTER, "states", "positions"),
    ("first_for_last", AFTER, "states", "bonus_tokens"),
    ("positions_from_the_end", AFTER, "states", "positions"),
    ("padding_kept_without_copies", DRAFT, "states", "out_cache_loc"),
    ("copies_for_branch_zero", DRAFT, "states", "source_cache_loc"),
    ("requests_overtake", DRAFT, "memory", "out_cache_loc race"),
    ("masked_sum", DRAFT, "memory", "out_cache_loc read-outside"),
    ("positions_of_the_next_step", CONTIGUOUS, "states", "positions"),
    ("steps_first", CONTIGUOUS, "states", "out_cache_loc"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), [pytest.param(*row, id=row[0]) for row in FAULTS])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    found_and_blamed(faulty("faults_draft.py", fault), transform, check, buffer, tmp_path)


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_batch(example) -> set[str]:
    """What every example of the family may have."""
    case = example.steps[0]
    tests = {
        "2 requests": len(case.batch) >= 2,
        "empty batch": not case.batch,
        "more than a block of requests": len(case.batch) > 32,
        "spare capacity": case.spare > 0,
        "a longer list": case.tail > 0,
        "int64": any(p.dtype == "int64" for p in example.layout.places.values()),
        "int32 beside int64": len({p.dtype for p in example.layout.places.values()}) > 1,
    }
    return {f"layout {p.kind}" for p in example.layout.places.values()} | {name for name, true in tests.items() if true}


COMMON = {"2 requests", "empty batch", "more than a block of requests", "spare capacity", "a longer list", "int64",
          "int32 beside int64", "layout offset", "layout strided", "layout expanded"}


def of_slots(example) -> set[str]:
    case = example.steps[0]
    slots = [r.slot for r in case.batch]
    tests = {
        "the last slot": case.slots - 1 in slots, "slot 0": 0 in slots, "slots out of order": slots != sorted(slots),
        "a full table row": case.table_extra == 0,
        "offsets past 2^31": case.slots == 4096 and case.table_extra == 2**20 and any(s >= 2048 for s in slots),
        "a slot twice": len(set(slots)) < len(slots),
    }
    return of_batch(example) | {name for name, true in tests.items() if true}


ON_ROWS = COMMON | {"the last slot", "slot 0", "slots out of order", "a full table row"}
READS = {"offsets past 2^31", "a slot twice"}


@pytest.mark.parametrize(("name", "more"), [(ASSIGN, {"layout far", "layout pitched"}), (EXTEND, READS)])
def test_ranges_have_everything(name, more):
    def labels(example):
        counts, starts = ([getattr(r, f) for r in example.steps[0].batch] for f in ("count", "start"))
        return of_slots(example) | {
            *(["nothing to do"] if 0 in counts else []), *(["3 lengths"] if len(set(counts)) >= 3 else []),
            *(["from 0"] if 0 in starts else []), *(["behind a prefix"] if any(starts) else []),
            *(["more than a block"] if any(c > 128 for c in counts) else []),
        }

    needed = ON_ROWS | more | {"nothing to do", "3 lengths", "from 0", "behind a prefix", "more than a block"}
    assert sorted(needed - set(drawn(domain.of(CONTRACTS[name]), labels, BUDGET, needed))) == []


@pytest.mark.parametrize("name", [UNIFORM, CONTIGUOUS])
def test_ranges_of_one_length_have_everything(name):
    def labels(example):
        case = example.steps[0]
        wanted = case.positions if name == UNIFORM else case.with_positions
        size = f"width {case.draft_tokens}" if name == UNIFORM else f"{case.num_steps} x {case.topk}"
        return of_slots(example) | {"positions" if wanted else "no positions", size}

    widths, trees = {"width 1", "width 2", "width 8", "width 65", "width 129"}, {"1 x 1", "8 x 1", "2 x 8", "3 x 4"}
    seen = drawn(domain.of(CONTRACTS[name]), labels, BUDGET)
    assert sorted((ON_ROWS | READS | (widths if name == UNIFORM else trees) | {"positions", "no positions"}) - set(seen)) == []


def test_accepted_tokens_have_everything():
    def labels(example):
        case = example.steps[0]
        accepts = [r.accept_len for r in case.batch]
        return of_batch(example) | {
            *(["one accepted"] if 1 in accepts else []), *(["all accepted"] if case.num_steps + 1 in accepts else []),
            *(["ragged"] if len(set(accepts)) > 1 else []),
            *(["padded"] if any(r.seq_len < r.accept_len for r in case.batch) else []),
            *(["more than the steps"] if any(a > case.num_steps + 1 for a in accepts) else []),
        }

    needed = COMMON | {"one accepted", "all accepted", "ragged", "padded", "more than the steps"}
    assert sorted(needed - set(drawn(domain.of(CONTRACTS[AFTER]), labels, BUDGET, needed))) == []


def test_draft_slots_have_every_tree_and_page():
    def labels(example):
        case = example.steps[0]
        page, partial = case.page_size, [case.partial(r) for r in case.batch]
        paged = case.paged() and len(case.batch) > 1
        tests = {
            "a chain with pages": page > 1 and case.topk == 1, "a tree without pages": page == 1 and case.topk > 1,
            "partial pages": paged and all(partial), "full and partial pages": paged and 0 in partial and any(partial),
            "only full pages": paged and not any(partial), "padding behind the drafts": paged and case.num_steps % page,
            "a branch of 2 pages": paged and any(p + case.num_steps > page for p in partial),
        }
        found = {name for name, true in tests.items() if true}
        return of_slots(example) | found | {f"{case.num_steps} steps", f"top-k {case.topk}", f"page size {page}"}

    needed = ON_ROWS | {"a chain with pages", "a tree without pages", "partial pages", "full and partial pages",
                        "only full pages", "padding behind the drafts", "a branch of 2 pages", "layout far", "layout pitched",
                        *(f"{n} steps" for n in (1, 2, 3, 4, 5, 8)), *(f"top-k {k}" for k in (1, 2, 3, 4, 8)),
                        *(f"page size {p}" for p in (1, 2, 4, 16, 32, 64, 128))}
    assert sorted(needed - set(drawn(domain.of(CONTRACTS[DRAFT]), labels, BUDGET, needed))) == []
