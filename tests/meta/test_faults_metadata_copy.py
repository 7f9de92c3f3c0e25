"""Faulty metadata copies are found and blamed, and the strategies draw everything that finding them needs."""

import pytest

from harness import registry
from harness.campaign import PROFILES, Campaign
from harness.contract import Role, tensors_of
from measure import BUDGET, PLANTED, drawn, found_and_blamed
from oracles.metadata_copy import DECODE, TARGET_VERIFY
from strategies import domain, sessions

FILE = "faults_metadata_copy.py"
SINGLE, MULTI = "fused_metadata_copy", "fused_metadata_copy_multi"
CONTRACTS = registry.contracts()

FOUND_BY_SEARCH = [
    ("pitch_from_shape", SINGLE, "memory", "page_table_1_dst write-outside"),
    ("pitch_of_first_backend", MULTI, "states", "page_table_1_dst"),
    ("offsets_of_32_bits", MULTI, "memory", "page_table_1_dst write-outside"),
    ("real_source_taken_for_dense", SINGLE, "states", "real_page_table_dst"),
    ("plan_copied_linearly", SINGLE, "memory", "flashmla_metadata_dst write-outside"),
    ("rows_cut_by_the_width", SINGLE, "states", "page_table_1_dst"),
    ("cu0_overwritten", SINGLE, "states", "cu_seqlens_k_dst"),
    ("nsa_cu0_cleared", MULTI, "states", "nsa_cu_seqlens_k_dst"),
    ("tail_cleared", SINGLE, "states", "page_table_1_dst"),
    ("width_of_the_other_mode", SINGLE, "states", "page_table_1_dst"),
    ("size_for_bs", SINGLE, "states", "nsa_cache_seqlens_dst"),
    ("size_for_rows", SINGLE, "states", "page_table_1_dst"),
    ("splits_without_the_total", SINGLE, "states", "flashmla_num_splits_dst"),
    ("expanded_in_decode", SINGLE, "states", "seqlens_expanded_dst"),
    ("flashmla_only_with_real", SINGLE, "states", "flashmla_num_splits_dst"),
    ("three_backends", MULTI, "states", "cache_seqlens_dst"),
    ("real_only_if_the_first_has_one", MULTI, "states", "real_page_table_dst"),
    ("grid_of_the_page_table", MULTI, "memory", "grid"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"),
                         [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in FOUND_BY_SEARCH])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    most = 3 if fault == "offsets_of_32_bits" else 2  # the last of two rows starts past 2^31 by its pitch alone
    found_and_blamed(faulty(FILE, fault), transform, check, buffer, tmp_path, most)


def test_replays_find_what_depends_on_the_batch_before(faulty, tmp_path):
    contract = CONTRACTS[SINGLE]
    worker = faulty(FILE, "unchanged_lengths_skipped")
    outcome = Campaign(contract, worker, contract.rules(), sessions.replays(contract), PLANTED, folder=tmp_path).run()
    found = {r.found.kind: r for r in outcome.reports}
    assert len(found["states", "page_table_1_dst"].example.steps) == 2


@pytest.mark.parametrize("transform", [SINGLE, MULTI])
def test_an_honest_copy_passes(transform, faulty, tmp_path):
    contract = CONTRACTS[transform]
    outcome = Campaign(contract, faulty(FILE, "honest_copy"), contract.rules(), domain.of(contract), PROFILES["quick"],
                       folder=tmp_path).run()
    assert (outcome.verdict, outcome.reports) == ("PASS", []) and outcome.counted >= 60


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_any(example) -> set[str]:
    """What an example of either transform has."""
    case = example.steps[0]
    kinds = {p.kind for p in example.layout.places.values()}
    tests = {
        "2 requests": case.batch_size() >= 2, "empty batch": not case.batch, "no width": case.width == 0,
        "more than a block": case.batch_size() > 256, "a wide table": case.width > 1024, "one column": case.width == 1,
        "a block of columns": case.width in (127, 128, 129, 255, 256, 257),
        "a full last page": case.page_size > 1 and case.width % case.page_size == 0 and case.width > 0,
        "a broken last page": case.width % case.page_size > 0,
        "wider source": case.more_columns > 0 and case.rows() > 1 and case.width > 0, "spare capacity": case.spare > 0,
        "spare rows": case.row_spare > 0, "one part": case.parts == 1, "many parts": case.parts > 32,
        "guarded on the left": any(p.guard == "left" for p in example.layout.places.values()),
        "shuffled programs": example.layout.order > 0,
        "pitched real source": example.layout.place("real_page_table_src").kind in ("pitched", "strided", "far")
        and case.rows() > 1 and case.page_size > 1,
        "far rows": any(n.startswith("page_table_1") and p.kind == "far" for n, p in example.layout.places.items())
        and case.rows() > 2 and case.width > 0,
    }
    return {n for n, true in tests.items() if true} | {f"page_size {case.page_size}"} | {f"layout {k}" for k in kinds}


ANY = {
    "2 requests", "empty batch", "no width", "more than a block", "a wide table", "one column", "a block of columns",
    "a full last page", "a broken last page", "wider source", "spare capacity", "spare rows", "one part", "many parts",
    "guarded on the left", "shuffled programs", "pitched real source", "far rows",
    *(f"page_size {p}" for p in (1, 2, 64, 128)),
    *(f"layout {k}" for k in ("offset", "pitched", "strided", "far")),
}


def of_single(example) -> set[str]:
    case = example.steps[0]
    flashmla = case.num_splits and case.parts > 0
    verify_or_extend = case.mode != DECODE
    tests = {
        "splits without a plan": case.num_splits and not flashmla,
        "size is not bs in decode": not verify_or_extend and case.size() != len(case.batch),
        "more tokens than requests": verify_or_extend and case.n() > len(case.batch),
        "fewer tokens than requests": verify_or_extend and 0 < case.n() < len(case.batch),
        "no token": verify_or_extend and case.batch and case.n() == 0,
        "ragged": verify_or_extend and len(set(case.batch)) >= 3,
        "more table rows than tokens": verify_or_extend and case.more_rows > 0,
        "rows that decode leaves": not verify_or_extend and case.more_rows > 0,
        "expanded lengths in decode": not verify_or_extend and case.expanded and len(case.batch) > 0,
        "no other width": case.other_width == -1, "other width smaller": 0 <= case.other_width < case.width,
        "other width larger": case.other_width > case.width,
        "a pitch that is not the width": case.rows() > 1
        and example.layout.place("page_table_1_dst").kind in ("pitched", "far"),
        "lengths in place": bool(example.layout.aliases),
        "pitched plan": example.layout.place("flashmla_metadata_dst").kind in ("pitched", "strided", "far") and case.parts > 1,
    }
    options = {f"mode {case.mode}: {'' if case.page_size > 1 else 'no '}real pages",
               f"mode {case.mode}: {'' if flashmla else 'no '}FlashMLA"}
    return of_any(example) | {n for n, true in tests.items() if true} | options


def test_single_copies_have_everything():
    seen = drawn(domain.of(CONTRACTS[SINGLE]), of_single, BUDGET)
    every = ANY | {
        "size is not bs in decode", "more tokens than requests", "fewer tokens than requests", "no token", "ragged",
        "more table rows than tokens", "rows that decode leaves", "expanded lengths in decode", "no other width",
        "other width smaller", "other width larger", "a pitch that is not the width", "lengths in place", "pitched plan",
        "splits without a plan", *(f"mode {m}: {table}" for m in (0, 1, 2) for table in ("real pages", "no real pages")),
        *(f"mode {m}: {flashmla}" for m in (0, 1, 2) for flashmla in ("FlashMLA", "no FlashMLA")),
    }
    assert sorted(every - set(seen)) == []
    assert seen["2 requests"] > BUDGET * 0.7


def of_multi(example) -> set[str]:
    case = example.steps[0]
    backends, real, flashmla = case.backends, case.page_size > 1, case.num_splits
    pitches = {b.columns for b in backends}
    tests = {
        "two pitches": len(pitches) > 1 and case.rows() > 1 and case.width > 0,
        "two real pitches": real and len({b.pages for b in backends if b.real}) > 1 and case.rows() > 1,
        "the first has no real table": real and not backends[0].real,
        "another has no real table": real and any(not b.real for b in backends[1:]),
        "the first has no FlashMLA": flashmla and not backends[0].flashmla,
        "the last has no FlashMLA": flashmla and not backends[-1].flashmla,
        "size is not bs": case.size() != len(case.batch),
        "more than three": len(backends) > 3 and case.batch_size() >= 2,
    }
    shared = {f"{a.split('[')[0]} on {b.split('[')[0]}" for a, b in example.layout.aliases}
    return of_any(example) | {n for n, true in tests.items() if true} | {f"backends {len(backends)}"} | shared


def test_multi_copies_have_everything():
    seen = drawn(domain.of(CONTRACTS[MULTI]), of_multi, BUDGET)
    every = ANY | {
        "two pitches", "two real pitches", "the first has no real table", "another has no real table",
        "the first has no FlashMLA", "the last has no FlashMLA", "size is not bs", "more than three",
        "cache_seqlens_dst on cache_seqlens_dst", "cache_seqlens_dst on cache_seqlens_src",
        *(f"backends {n}" for n in (1, 2, 3, 4, 5, 6)),
    }
    assert sorted(every - set(seen)) == []
    assert seen["more than three"] > BUDGET * 0.2


@pytest.mark.parametrize("name", [SINGLE, MULTI])
def test_replays_shrink_grow_and_idle_on_buffers_of_one_size(name):
    def labels(example):
        work = [step.rows() * step.width for step in example.steps]
        sizes = {tuple((n, t.shape) for n, t in tensors_of(step.arguments()).items()
                       if step.contract.arg(n).role is Role.OUT) for step in example.steps}
        assert len(sizes) == 1
        return {
            *(["shrinks"] if any(b < a for a, b in zip(work, work[1:])) else []),
            *(["grows"] if any(b > a for a, b in zip(work, work[1:])) else []),
            *(["idle"] if 0 in work else []),
            *(["fewer tokens"] if len({step.n() for step in example.steps}) > 1 else []),
            *(["verify"] if example.steps[0].mode == TARGET_VERIFY else []),
        }

    seen = drawn(sessions.replays(CONTRACTS[name]), labels, 60)
    assert set(seen) == {"shrinks", "grows", "idle"} | ({"fewer tokens", "verify"} if name == SINGLE else set())
