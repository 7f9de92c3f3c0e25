"""Faults of the topk_transform family are found by the ordinary campaign; its judge fails on each of them alone; and the
strategies draw what they need."""

import numpy as np
import pytest
from measure import BUDGET, drawn, found_and_blamed, hunt

from harness import registry
from harness.differential import Example, check
from harness.layout import Layout
from oracles.topk_transform import FastTopk, Row, scores, top_set
from strategies import domain
from strategies.topk_transform import one_bin

CONTRACTS = registry.contracts()
FILE = "faults_topk_transform.py"

DECODE, PREFILL = "transform_index_page_table_decode", "transform_index_page_table_prefill"
FOUND_BY_SEARCH = [
    ("pitch_from_shape", DECODE, "memory", "page_table read-outside"),
    ("int32_rows", DECODE, "memory", "page_table read-outside"),
    ("only_minus_one", DECODE, "states", "result"),
    ("holes_untouched", DECODE, "states", "result"),
    ("row_of_the_token", PREFILL, "states", "result"),
    ("empty_requests_skipped", PREFILL, "states", "result"),
    ("padding_forgotten", PREFILL, "states", "result"),
    ("offset_on_everything", "transform_index_ragged", "states", "result"),
    ("zeros_for_padding", "pad_topk_indices", "states", "result"),
    ("padding_overflows", "pad_topk_indices", "states", "result"),
    ("ties_overflow", "fast_topk", "states", "indices"),
    ("short_of_infinities", "fast_topk", "states", "indices"),
    ("nothing_above_nan", "fast_topk", "states", "indices"),
    ("candidates_cut", "fast_topk", "states", "indices"),
    ("no_row_starts", "fast_topk", "states", "indices"),
    ("absolute_columns", "fast_topk", "states", "indices"),
    ("reads_past_the_length", "fast_topk", "states", "indices"),
    ("twice_the_best", "fast_topk", "states", "indices"),
    ("one_short", "fast_topk", "states", "indices"),
    ("mode_by_shape", "fast_topk_transform_paged", "states", "dst_page_table"),
    ("unsigned_length", "fast_topk_transform_paged", "states", "dst_page_table"),
    ("positions_for_slots", "fast_topk_transform_paged", "states", "dst_page_table"),
    ("offset_of_the_first", "fast_topk_transform_ragged", "states", "topk_indices_ragged"),
    ("offset_on_padding", "fast_topk_transform_ragged", "states", "topk_indices_ragged"),
    ("offset_in_the_page_lost", "topk_transform_v2", "states", "page_indices"),
    ("pages_of_the_row_before", "topk_transform_v2", "states", "page_indices"),
]
THREE_NEEDED = {"pitch_from_shape", "int32_rows"}  # the wrong offset of row 1 may still be a cell


@pytest.mark.parametrize(("fault", "transform", "kind", "buffer"), FOUND_BY_SEARCH, ids=lambda row: row)
def test_found_and_blamed(fault, transform, kind, buffer, faulty, tmp_path):
    most = 3 if fault in THREE_NEEDED else 2
    found_and_blamed(faulty(FILE, fault), transform, kind, buffer, tmp_path, most_requests=most)


def test_the_honest_body_passes(faulty):
    example = Example((FastTopk((Row(9, scores="ties"), Row(300, 5, "extremes"), Row(-3)), width=305, starts=True),), Layout())
    assert check(example, faulty(FILE, "honest_topk"), {}) == []


@pytest.mark.parametrize(("fault", "keys"), [
    ("candidate_list_of_16384", 20_000), ("candidate_list_of_16384", 65_537), ("positions_of_16_bits", 65_537)])
def test_rows_too_long_to_be_drawn_are_examples_of_their_own(fault, keys, faulty):
    """With no more than 16,384 keys the fault does not show."""
    worker = faulty(FILE, fault)
    found, fits = ([f.kind for f in check(Example((one_bin(n)[0],)), worker, {})] for n in (keys, 16_384))
    assert found == [("states", "indices")] and fits == []


def test_a_long_row_of_one_bin_is_one_value_of_the_first_byte():
    """131,072 keys, and all of them different numbers in float32."""
    values = scores("one_bin", 0, 131_072).astype(np.float32)
    assert len(np.unique(values)) == 131_072
    assert len(np.unique(values.astype(np.float16).view(np.uint16) >> 8)) == 1


def test_a_kernel_may_count_on_the_pitch_that_a_contract_promises_and_on_no_other(faulty, tmp_path):
    outcome = hunt(faulty(FILE, "sixteen_bytes_at_once"), "topk_transform_v2", tmp_path)
    assert outcome.verdict == "PASS", [r.found for r in outcome.reports]
    outcome = hunt(faulty(FILE, "sixteen_bytes_at_once_from_any_row"), "fast_topk", tmp_path)
    assert [r.found.kind for r in outcome.reports] == [("raised", "ValueError")]


def test_a_counter_left_from_the_call_before_is_found_on_the_second_step(faulty):
    """One call is right; so a single example would pass."""
    steps = (FastTopk((Row(9), Row(3)), width=9), FastTopk((Row(7), Row(9)), width=9))
    found = check(Example(steps), faulty(FILE, "counter_left"), {})
    assert [(f.check, f.buffer, f.step) for f in found] == [("states", "indices", 1)]


# -- the judge of a selection, on one wrong answer each -----------------------------------------------------------------

SCORES = np.array([5.0, 9.0, 1.0, 5.0, 7.0])
SLOTS = np.array([40, 31, 22, 13, 4])


@pytest.mark.parametrize(("actual", "complaint"), [
    pytest.param([31, 4, 4], "cells 1 and 2 are both key 4", id="a duplicate"),
    pytest.param([31, 4, 5], "cell 2 is 5, and must name one of 5 keys", id="no slot of the row"),
    pytest.param([31, 4, -1], "cell 2 is -1, and must name one of 5 keys", id="a -1 among the first keys"),
    pytest.param([31, 40, 13], "key 4 with score 7.0 is left out, and key 0 with score 5.0 is taken", id="second best missing"),
    pytest.param([40, 4, 13], "key 1 with score 9.0 is left out, and key 0 with score 5.0 is taken", id="the best missing"),
    pytest.param([31, 4, 22], "key 0 with score 5.0 is left out, and key 2 with score 1.0 is taken", id="the worst taken"),
    pytest.param([31, 4, 1542714988], "cell 2 is 1542714988, and must name one of 5 keys", id="an unwritten place"),
    pytest.param([31, 4], "2 keys are taken, and must be 3", id="too few"),
])
def test_the_judge_complains(actual, complaint):
    assert top_set(SCORES, 3, SLOTS).complaint(np.array(actual)) == complaint


@pytest.mark.parametrize("actual", [[31, 4, 40], [13, 31, 4], [4, 13, 31]])
def test_the_judge_takes_any_order_and_either_of_two_equal_keys(actual):
    assert top_set(SCORES, 3, SLOTS).complaint(np.array(actual)) is None


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_layout(example) -> set[str]:
    kinds = {f"{n} {p.kind}" for n, p in example.layout.places.items()}
    kinds |= {f"{n} with gaps" for n, p in example.layout.places.items() if p.kind in ("pitched", "strided")}
    return kinds | {f"{n} int64" for n, p in example.layout.places.items() if p.dtype == "int64"}


def true(**tests) -> set[str]:
    return {name.replace("_", " ") for name, holds in tests.items() if holds}


def of_selection(example) -> set[str]:
    case = example.steps[0]
    rows, topk = case.all_rows, case.topk
    picked = [r for r in rows if r.length > topk]
    return of_layout(example) | {f"scores {r.scores}" for r in picked} | true(
        no_rows=not rows, negative=any(r.length < 0 for r in rows), no_keys=any(r.length == 0 for r in rows),
        fewer_than_topk=any(0 < r.length < topk for r in rows), topk_exactly=any(r.length == topk for r in rows),
        one_more=any(r.length == topk + 1 for r in rows), short_beside_long=bool(picked) and len(picked) < len(rows),
        more_than_4096=any(r.length > 4096 for r in rows), topk_2048=topk == 2048 and bool(picked),
        one_bin_over_4096=any(r.scores == "one_bin" and r.length > 4096 for r in rows),
        odd_width_of_one_row=len(rows) == 1 and case.width % 4 != 0, columns_to_spare=case.width > case.reach(),
        full_width=bool(picked) and case.width == case.reach(), spare=case.spare > 0, topk_1=topk == 1,
        shuffled=example.layout.order > 0, left=any(p.guard == "left" for p in example.layout.places.values()))


SELECTION = {
    "negative", "no keys", "fewer than topk", "topk exactly", "one more", "short beside long", "more than 4096", "topk 2048",
    "one bin over 4096", "columns to spare", "full width", "spare", "topk 1", "shuffled", "left", "score far",
    "score with gaps", "lengths strided", "lengths expanded", "no rows",
    *(f"scores {kind}" for kind in ("distinct", "rising", "falling", "relu", "one_bin", "ties", "equal", "zeros", "extremes",
                                    "minus_inf", "nan", "some_nan", "nan_signs")),
}


@pytest.mark.parametrize(("name", "output"), [
    ("fast_topk", "indices"), ("fast_topk_transform_paged", "dst_page_table"),
    ("fast_topk_transform_ragged", "topk_indices_ragged"), ("topk_transform_v2", "page_indices"),
])
def test_selections_have_everything(name, output):
    seen = drawn(domain.of(CONTRACTS[name]), of_selection, BUDGET)
    needed = SELECTION | {f"{output} with gaps"}
    needed -= {"negative"} if name == "topk_transform_v2" else set()  # outside its contract
    needed |= {"odd width of one row"} if name == "fast_topk" else set()
    assert sorted(needed - set(seen)) == []


def test_row_starts_are_given_and_left_out():
    def labels(example):
        case = example.steps[0]
        picked = [r for r in case.rows if r.length > case.topk]
        return true(given=case.starts, left_out=not case.starts, different=case.starts and len({r.start for r in picked}) > 1,
                    zero=case.starts and any(r.start == 0 for r in picked), late=any(r.start > 200 for r in picked))

    seen = drawn(domain.of(CONTRACTS["fast_topk"]), labels, BUDGET)
    assert set(seen) == {"given", "left out", "different", "zero", "late"}


def test_paged_batches_are_decode_ragged_and_deceptive():
    """As many rows as requests, with an empty one: where the mode is guessed from the shapes, the guess is wrong."""
    def labels(example):
        case = example.steps[0]
        counts = [len(r.rows) for r in case.requests]
        sums = case.arguments()["cu_seqlens_q"] is not None
        return of_layout(example) | true(
            decode=not sums, one_row_each_with_sums=sums and len(counts) > 1 and set(counts) == {1},
            ragged=len(set(counts)) > 1, empty_request=0 in counts,
            deceptive=sum(counts) == len(counts) and 0 in counts and not case.starts,
            many_requests=len(counts) > 64, more_requests_than_rows=len(counts) > sum(counts),
            table_to_spare=case.table_extra > 0)

    seen = drawn(domain.of(CONTRACTS["fast_topk_transform_paged"]), labels, BUDGET)
    needed = {"decode", "one row each with sums", "ragged", "empty request", "deceptive", "many requests", "table to spare",
              "more requests than rows", "page_table far", "page_table with gaps"}
    assert sorted(needed - set(seen)) == []


def test_page_sizes_meet_lengths_around_their_multiples():
    def labels(example):
        case = example.steps[0]
        return {f"page_size {case.page_size}"} | true(
            full_page=any(r.length and r.length % case.page_size == 0 for r in case.rows if case.page_size > 1),
            one_past=any(r.length % case.page_size == 1 and r.length > case.page_size > 1 for r in case.rows),
            pages_to_spare=case.pages_extra > 0)

    seen = drawn(domain.of(CONTRACTS["topk_transform_v2"]), labels, BUDGET)
    assert {*(f"page_size {p}" for p in (1, 2, 16, 32, 64, 128)), "full page", "one past", "pages to spare"} <= set(seen)


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_index_transforms_have_everything(name):
    def labels(example):
        case = example.steps[0]
        rows = np.concatenate([[-1], *case.index_rows])
        two_rows = len(case.index_rows) >= 2
        expanded = example.layout.place("page_table").kind == "expanded"
        has = of_layout(example) | {f"topk {case.topk}"} | true(
            minus_one=(rows == -1).any(), other_negative=(rows < -1).any(), repeated=case.shared,
            same_row_for_all=expanded and case.shared and two_rows, table_to_spare=case.width > rows.max() + 1,
            full_width=two_rows and case.width == rows.max() + 1, spare=case.spare > 0, wide_table=case.width > 65536,
            all_negative=two_rows and any((row < 0).all() for row in case.index_rows))
        if name == PREFILL:
            extends = [r.extend_len for r in case.requests]
            has |= true(
                by_token=case.expanded, by_request=not case.expanded, sums=case.sums, lengths_alone=not case.sums,
                padding=case.padding > 0, more_output=bool(case.output_extra), empty_request=0 in extends,
                no_tokens=bool(extends) and not sum(extends), ragged=len(set(extends)) > 1,
                many_tokens=max(extends, default=0) > 16, many_requests=len(extends) > 64,
                table_rows_to_spare=case.table_spare > 0)
        return has

    needed = {"minus one", "other negative", "same row for all", "table to spare", "full width", "spare", "all negative",
              "topk 2048", "topk 1", "topk 257", "page_table int64", "topk_indices int64", "page_table far",
              "page_table with gaps", "topk_indices with gaps", "result with gaps"}
    needed |= {"wide table"} if name == DECODE else {
        "by token", "by request", "sums", "lengths alone", "padding", "more output", "empty request", "no tokens", "ragged",
        "many tokens", "many requests", "table rows to spare", "cu_seqlens_q strided"}
    seen = drawn(domain.of(CONTRACTS[name]), labels, BUDGET)
    assert sorted(needed - set(seen)) == []


@pytest.mark.parametrize("name", ["transform_index_ragged", "pad_topk_indices"])
def test_plain_index_maps_have_everything(name):
    def labels(example):
        case = example.steps[0]
        own = (true(far_offset=any(r.offset > 2**30 for r in case.rows), no_offset=any(r.offset == 0 for r in case.rows),
                    different=len({r.offset for r in case.rows}) > 1) if name == "transform_index_ragged" else
               true(no_padding=case.padding == 0, padding=case.padding > 0, more_than_a_block=case.num_tokens() > 16))
        return of_layout(example) | own | {f"topk {case.topk}"} | true(spare=case.spare > 0, no_rows=not case.rows)

    own = {"far offset", "no offset", "different"} if name == "transform_index_ragged" else {
        "no padding", "padding", "more than a block"}
    needed = own | {"spare", "no rows", "topk 2048", "topk 1", "topk_indices with gaps", "result with gaps"}
    seen = drawn(domain.of(CONTRACTS[name]), labels, BUDGET)
    assert sorted(needed - set(seen)) == []
