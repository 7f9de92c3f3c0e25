"""Planted faults of the page_table family are found, and its strategies draw what the faults need."""

import pytest
from measure import BUDGET, drawn, found_and_blamed, found_by_replays

from harness import registry
from harness.contract import Role, tensors_of
from harness.tensors import Input
from oracles.page_table import CuSeqlensQ, ExtendReq, PageTable1Flattened, TopkIndicesOffset
from strategies import domain, sessions

CONTRACTS = registry.contracts()

FOUND = [
    ("rows_dealt_out", "gather_page_table", "states", "page_table_1"),
    ("stale_repeats", "gather_page_table", "states", "page_table_1"),
    ("at_least_one_row", "gather_page_table", "states", "page_table_1"),
    ("selection_ignored", "gather_page_table", "states", "page_table_1"),
    ("slots_in_a_row", "gather_page_table", "states", "page_table_1"),
    ("tail_copied", "gather_page_table", "states", "page_table_1"),
    ("pitch_is_the_width", "gather_page_table", "states", "page_table_1"),
    ("offset_in_32_bits", "gather_page_table", "memory", "req_to_token read-outside"),
    ("rounds_towards_zero", "real_page_table", "states", "real_page_table"),
    ("tokens_for_pages", "real_page_table", "states", "real_page_table"),
    ("cut_page_dropped", "real_page_table", "states", "real_page_table"),
    ("page_of_the_last_token", "real_page_table", "states", "real_page_table"),
    ("shared_slots_once", "page_table_1_flattened", "states", "page_table_1_flattened"),
    ("rows_of_full_width", "page_table_1_flattened", "states", "page_table_1_flattened"),
    ("padded_requests_not_summed", "page_table_1_flattened", "states", "page_table_1_flattened"),
    ("query_base", "topk_indices_offset", "states", "topk_indices_offset"),
    ("end_for_start", "topk_indices_offset", "states", "topk_indices_offset"),
    ("idle_requests_skipped", "topk_indices_offset", "states", "topk_indices_offset"),
    ("verify_has_one_row_per_request", "cu_seqlens_q", "states", "cu_seqlens_q"),
    ("leftover_lengths", "cu_seqlens_q", "states", "cu_seqlens_q"),
    ("total_missing", "cu_seqlens_q", "states", "cu_seqlens_q"),
    ("longest_is_the_last_boundary", "max_seq_len_q", "returned", "result"),
    ("nothing_selected_is_an_error", "max_seq_len_q", "raised", "ValueError"),
]

NEED_THREE = {"selection_ignored", "idle_requests_skipped"}


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), FOUND, ids=lambda v: v)
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    requests = 3 if fault in NEED_THREE else 2
    found_and_blamed(faulty("faults_page_table.py", fault), transform, check, buffer, tmp_path, requests)


KEPT = [
    ("kept_flattened", "page_table_1_flattened", PageTable1Flattened((3, 0, 2))),
    ("kept_offsets", "topk_indices_offset", TopkIndicesOffset((ExtendReq(2, 5), ExtendReq(3, 3)))),
    ("kept_boundaries", "cu_seqlens_q", CuSeqlensQ("extend", (3, 0, 2))),
]


@pytest.mark.parametrize(("fault", "transform", "once"), KEPT, ids=[row[0] for row in KEPT])
def test_a_result_kept_from_the_call_before_is_found_by_replays(fault, transform, once, faulty):
    found_by_replays(faulty("faults_page_table.py", fault), transform, transform, once)


# -- the strategies -----------------------------------------------------------------------------------------------------


def having(labels: dict[str, bool]) -> set[str]:
    return {label for label, has in labels.items() if has}


def kinds(example) -> set[str]:
    """What a layout has."""
    places = example.layout.places.values()
    return {f"layout {p.kind}" for p in places} | having({"int64": any(p.dtype == "int64" for p in places)})


def of_gather(example) -> set[str]:
    case = example.steps[0]
    batch, chosen, rows = case.batch, case.chosen(), case.owners()
    lengths, slots = [r.seq_len for r in batch], [r.slot for r in batch]
    counts = [r.rows for r in batch]
    return kinds(example) | having({
        "3 different lengths": len(set(lengths)) >= 3, "very short beside very long": lengths and min(lengths) <= 3 and
        max(lengths) >= 1000, "length 0": 0 in lengths, "past a block of columns": any(n > 1024 for n in lengths),
        "the last slot": case.slots - 1 in slots, "slots out of order": slots != sorted(slots),
        "a slot twice": len(set(slots)) < len(slots), "shared pages": case.shared and len(batch) >= 2,
        "ragged": case.ragged and len(set(counts)) > 1, "repeats of another order": case.ragged and counts != counts[::-1],
        "a request without rows": case.ragged and 0 in counts and any(counts), "no rows": batch and not rows,
        "a strict selection": case.selection and 0 < len(chosen) < len(batch), "nothing selected": case.selection and batch
        and not chosen, "the longest is not selected": case.selection and chosen and max(lengths) > case.longest(),
        "selected and ragged": case.selection and case.ragged, "a full table row": case.table_extra == case.max_extra == 0,
        "past a block of requests": len(chosen) > 32, "spare capacity": case.spare > 0, "empty batch": not batch,
        **{f"{n} draft tokens": case.draft_tokens == n and not case.ragged and len(batch) >= 2 for n in (1, 2, 3, 4, 5, 8)},
    })


def of_real(example) -> set[str]:
    case = example.steps[0]
    rest = case.columns % case.page_size
    return kinds(example) | set(case.rows) | {f"page_size {case.page_size}"} | having({
        "whole pages": rest == 0 < case.columns, "a cut page": rest > 0, "one column past a page": rest == 1 < case.page_size,
        "past a block of pages": case.pages() > 1024, "no columns": case.columns == 0, "no rows": not case.rows,
    })


def of_flattened(example) -> set[str]:
    case = example.steps[0]
    return kinds(example) | having({
        "shared": case.shared and len(case.all) >= 2, "zeros": 0 in case.all and any(case.all),
        "wider than the longest": case.max_extra + case.table_extra > 0, "a padded request": 1 in case.all[1:],
        "past a block of columns": any(n > 1024 for n in case.all), "past a block of requests": len(case.all) > 32,
    })


def of_offsets(example) -> set[str]:
    batch = example.steps[0].batch
    return kinds(example) | having({
        "prefixed": any(0 < r.extend_len < r.seq_len for r in batch),
        "fresh": any(0 < r.extend_len == r.seq_len for r in batch),
        "idle before others": any(not r.extend_len for r in batch[:-1]), "past 65,536": sum(r.seq_len for r in batch) > 65536,
        "past a block of tokens": any(r.extend_len > 128 for r in batch), "past a block of requests": len(batch) > 32,
    })


def of_boundaries(example) -> set[str]:
    case = example.steps[0]
    return kinds(example) | {case.mode} | having({
        f"{case.mode} {'with' if case.lengths_given else 'without'} lengths": case.mode != "extend" and len(case.all) >= 2,
        "zeros": case.mode == "extend" and 0 in case.all, "past a block": case.rows() > 1024,
    })


def of_longest(example) -> set[str]:
    case = example.steps[0]
    prefixed = any(r.prefix_len for r in case.requests)
    return {f"{case.mode} {prefixed} {case.round_robin}"} | having({"no requests": not case.requests})


STRIDED = {f"layout {k}" for k in ("offset", "strided", "expanded")} | {"int64"}
FAR = {f"layout {k}" for k in ("offset", "pitched", "strided", "far")}
MODES = ("decode", "target_verify", "draft_extend")
NEEDED = {
    "gather_page_table": (of_gather, STRIDED | FAR | {
        "3 different lengths", "very short beside very long", "length 0", "past a block of columns", "the last slot",
        "slots out of order", "a slot twice", "shared pages", "ragged", "repeats of another order", "a request without rows",
        "no rows", "a strict selection", "nothing selected", "the longest is not selected", "selected and ragged",
        "a full table row", "past a block of requests", "spare capacity", "empty batch",
        *(f"{n} draft tokens" for n in (1, 2, 3, 4, 5, 8))}),
    "real_page_table": (of_real, FAR | {
        "aligned", "scattered", "holes", "signed", "whole pages", "a cut page", "one column past a page",
        "past a block of pages", "no columns", "no rows", *(f"page_size {p}" for p in (1, 2, 3, 16, 32, 64, 128))}),
    "page_table_1_flattened": (of_flattened, STRIDED | FAR | {
        "shared", "zeros", "wider than the longest", "a padded request", "past a block of columns",
        "past a block of requests"}),
    "topk_indices_offset": (of_offsets, STRIDED | {
        "prefixed", "fresh", "idle before others", "past 65,536", "past a block of tokens", "past a block of requests"}),
    "cu_seqlens_q": (of_boundaries, STRIDED | {"extend", *MODES} | {
        *(f"{m} {w} lengths" for m in MODES for w in ("with", "without")), "zeros", "past a block"}),
    "max_seq_len_q": (of_longest, {"no requests", *(f"{m} {p} {r}" for m in ("extend", *MODES) for p in (True, False)
                                                    for r in (True, False))}),
}


@pytest.mark.parametrize("name", NEEDED)
def test_examples_have_everything(name):
    labels, needed = NEEDED[name]
    assert sorted(needed - set(drawn(domain.of(CONTRACTS[name]), labels, BUDGET, needed))) == []


def test_every_transform_of_the_family_is_measured():
    assert set(NEEDED) == {n for n, c in CONTRACTS.items() if c.family == "page_table"}


@pytest.mark.parametrize("name", ["gather_page_table", "real_page_table"])
def test_replays_shrink_and_grow_on_buffers_of_one_size(name):
    def size(case) -> int:
        if name == "real_page_table":
            return len(case.rows) * case.columns
        return sum(case.batch[i].seq_len for i in case.owners())

    def labels(example):
        sizes = [size(step) for step in example.steps]
        shapes = {tuple((n, t.shape) for n, t in tensors_of(step.arguments()).items()
                        if step.contract.arg(n).role is Role.OUT) for step in example.steps}
        assert len(shapes) == 1
        return having({"shrinks": any(b < a for a, b in zip(sizes, sizes[1:])), "idle": 0 in sizes,
                       "grows": any(b > a for a, b in zip(sizes, sizes[1:]))})

    assert set(drawn(sessions.replays(CONTRACTS[name]), labels, 60)) == {"shrinks", "grows", "idle"}


@pytest.mark.parametrize("name", [row[1] for row in KEPT])
def test_replays_share_out_the_same_total_anew(name):
    def labels(example):
        given = [step.arguments() for step in example.steps]
        frozen = {tuple(call[n] for n in CONTRACTS[name].frozen_by_capture) for call in given}
        assert len(frozen) == 1
        calls = [tuple(tuple(t.view().tolist()) for t in call.values() if isinstance(t, Input) and len(t.shape) == 1
                       and any(s.values is not None for s in t.spans)) for call in given]
        return having({"other lengths": len(set(calls)) > 1, "zeros": any(0 in t for call in calls for t in call),
                       "3 requests": given[0]["bs"] >= 3})

    assert set(drawn(sessions.replays(CONTRACTS[name]), labels, 60)) == {"other lengths", "zeros", "3 requests"}
