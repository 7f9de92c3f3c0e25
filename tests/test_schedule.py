"""The schedule family: differential campaigns, replays through one buffer, stale schedules, and what every schedule obeys.

| group        | would catch                                                                                      |
| ------------ | ------------------------------------------------------------------------------------------------ |
| differential | the first column of (batch, next_n) lengths (SGLang #24635), all-zero batches (DeepGEMM #353), int32 overflow |
| replays      | a schedule kept from an earlier batch (SGLang #24635, #24632; vLLM #21691, #35175)               |
| outside      | a consumer that never meets the end of a stale schedule (SGLang #24635)                          |
| judges       | a judge that lets a wrong schedule pass                                                          |
| relations    | an oracle that is consistently wrong                                                             |
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from oracles.schedule import (PAGED_MQA_SCHEDULE, SPLIT, FlashmlaSchedule, PagedMqaSchedule, PagedMqaWalk, deal,
                              dealt_complaint, entries, partition_complaint, pieces_of, room_of, splits_of, walk)
from strategies import domain, sessions

FAMILY = "schedule"


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
    PagedMqaSchedule((700, 0, 300), next_n=3, num_sms=5),
    PagedMqaWalk((700, 0, 300), num_sms=5),
    FlashmlaSchedule((700, 0, 300), num_parts=5),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 9


# -- a stale schedule is a finding --------------------------------------------------------------------------------------

def complaint(lengths, schedule):
    return partition_complaint(schedule, [splits_of(n) for n in lengths])


def plan(lengths, num_sms, rule="january"):
    return entries([splits_of(n) for n in lengths], num_sms, 1, rule)


def units(schedule, splits):
    """Every (row, split) that the SMs compute, in order."""
    runs = [run for a, b in zip(schedule, schedule[1:]) for run in walk(a, b, splits)]
    return [(row, split) for row, first, stop in runs for split in range(first, stop)]


def test_a_schedule_of_longer_rows_is_walked_without_end():
    said = complaint((300, 1000), plan((1000, 300), 2))
    assert "SM 0 starts at (0, 0) and never meets its end (0, 3): row 0 has 2 splits, so the walk does not terminate" == said


def test_a_schedule_of_fewer_rows_leaves_work_out():
    assert complaint((300, 300, 300), plan((300, 300), 2)) == "split 0 of row 2 is computed by no SM"


def test_a_schedule_of_shorter_rows_gives_one_sm_too_much():
    assert complaint((256, 2560), plan((256, 256), 2)) == "the load is unbalanced: SM 1 has 10 splits, SM 0 has 1"


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.lists(st.integers(0, 3000), min_size=1, max_size=4),
       st.integers(1, 9))
def test_a_stale_schedule_is_accepted_only_where_it_is_as_good_as_a_fresh_one(live, earlier, num_sms):
    stale = plan(earlier, num_sms)
    if complaint(live, stale) is None:
        assert units(stale, [splits_of(n) for n in live]) == units(plan(live, num_sms), [splits_of(n) for n in live])


# -- the judges, clause by clause ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "clause"), [
    ([(0, 0), (0, 2), (2, 0)], None),
    ([(0, 0), (0, 2), (3, 0)], "entry 2 is (3, 0), which is no place in a batch of 2 rows"),
    ([(0, 0), (0, -1), (2, 0)], "entry 1 is (0, -1), which is no place"),
    ([(0, 0), (1, 0), (0, 1)], "entry 2, (0, 1), comes before entry 1, (1, 0)"),
    ([(0, 0), (0, 3), (2, 0)], "SM 0 starts at (0, 0) and never meets its end (0, 3): row 0 has 3 splits"),
    ([(0, 0), (2, 1), (2, 1)], "SM 0 starts at (0, 0) and never meets its end (2, 1): row 2 has 0 splits"),
    ([(0, 1), (0, 2), (2, 0)], "split 0 of row 0 is computed by no SM"),
    ([(0, 0), (0, 2), (1, 0)], "split 0 of row 1 is computed by no SM"),
    ([(0, 0), (0, 1), (2, 0)], "the load is unbalanced: SM 1 has 3 splits, SM 0 has 1"),
])
def test_the_judge_of_partitions(schedule, clause):
    said = partition_complaint(schedule, [3, 1])
    assert said is None if clause is None else said.startswith(clause)


def test_the_judge_of_partitions_wants_the_end_of_the_batch_behind_rows_without_keys():
    assert partition_complaint([(0, 0), (1, 0)], [2, 0]) == "the last entry is (1, 0), and must be (2, 0)"
    assert partition_complaint([(0, 0), (2, 0)], [2, 0]) is None


# Two requests of 8 blocks and 1, four parts: [0, 5), [5, 8), [0, 1) and an idle one.
GOOD = [[0, 0, 0, 5, 0, 1, 1, 0], [0, 0, 5, 8, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]]
KEYS, PIECES = [500, 64], [2, 1]


def changed(part: int, field: int, value: int) -> list[list[int]]:
    rows = [list(row) for row in GOOD]
    rows[part][field] = value
    return rows


@pytest.mark.parametrize(("rows", "clause"), [
    (GOOD, None),
    (changed(3, 2, 77), None),
    (changed(3, 7, 77), None),
    (changed(1, 2, 4), "part 1 starts at request 0, block 4; dealt out so far is up to (0, 5)"),
    (changed(1, 0, 1), "part 2 starts at request 1, block 0; dealt out so far is up to (0, 5)"),
    (changed(1, 1, 2), "part 1 covers requests 0 to 2 of 2"),
    (changed(1, 3, 9), "part 1 ends at block 9 of request 0, which has 8"),
    (changed(0, 3, 0), "part 0 ends at block 0 of request 0, which has 8"),
    (changed(1, 4, 0), "part 1 starts with piece 0 of request 0, and must with 1"),
    (changed(0, 5, 0), "part 0 says (0, 1) about whether its first and last request are cut, and must say (1, 1)"),
    (changed(1, 6, 0), "part 1 says (1, 0) about whether"),
    ([GOOD[0], GOOD[1], GOOD[3], GOOD[3]], "the blocks from request 1, block 0 on are dealt out to no part"),
    ([[0, 1, 0, 1, 0, 0, 0, 0], GOOD[3], GOOD[3], GOOD[3]], "part 0 has a load of 19, and the share of a part is 10"),
])
def test_the_judge_of_parts(rows, clause):
    said = dealt_complaint(rows, KEYS, PIECES, "april")
    assert said is None if clause is None else said.startswith(clause)


def test_the_judge_of_parts_counts_pieces_as_num_splits_does():
    said = dealt_complaint([row[:5] + [9, 9, 9] for row in march(GOOD)], KEYS, [1, 1], "march")
    assert said == "request 0 is cut into 2 pieces; num_splits must say 1"


def march(rows: list[list[int]]) -> list[list[int]]:
    """The same parts in the layout of March 2026."""
    return [[-1] * 8 if r[0] > r[1] else [r[0], r[2], r[1], r[3], r[4], 0, 0, 0] for r in rows]


def test_the_judge_of_parts_reads_the_layout_of_march():
    assert dealt_complaint(march(GOOD), KEYS, PIECES, "march") is None
    assert dealt_complaint(march(changed(1, 2, 4)), KEYS, PIECES, "march").startswith("part 1 starts at request 0, block 4")


# -- relations between answers of the oracles ---------------------------------------------------------------------------

LENGTHS = st.lists(st.one_of(st.integers(0, 3000), st.just(0)), max_size=6)
PROCESSORS = st.integers(1, 40)


@given(LENGTHS, PROCESSORS, st.sampled_from(("january", "june_sm90")))
def test_a_fresh_schedule_covers_the_work_once_evenly_and_its_walk_ends(lengths, num_sms, rule):
    assert complaint(lengths, plan(lengths, num_sms, rule)) is None


@given(LENGTHS, PROCESSORS, st.integers(2, 8))
def test_an_april_schedule_is_a_fair_one_of_pairs_of_tokens(lengths, num_sms, next_n):
    splits = [splits_of(n) for n in lengths for _ in range(-(-next_n // 2))]
    assert partition_complaint(entries([splits_of(n) for n in lengths], num_sms, next_n, "april"), splits) is None


@given(LENGTHS, PROCESSORS, st.integers(1, 8))
def test_an_sm100_schedule_covers_every_request_once_in_order(lengths, num_sms, next_n):
    splits = [splits_of(n) for n in lengths]
    places = [(token // next_n, split) for token, split in entries(splits, num_sms, next_n, "june_sm100")]
    assert units(places, splits) == [(r, s) for r in range(len(splits)) for s in range(splits[r])]


@given(LENGTHS, PROCESSORS)
def test_the_versions_agree_where_every_row_is_one_token_and_the_work_divides(lengths, num_sms):
    splits = [splits_of(n) for n in lengths] + [-sum(splits_of(n) for n in lengths) % num_sms]
    schedules = {rule: entries(splits, num_sms, 1, rule) for rule in ("january", "april", "june_sm90", "june_sm100")}
    assert len(set(map(tuple, schedules.values()))) == 1


@given(LENGTHS, PROCESSORS, PROCESSORS)
def test_the_covered_work_does_not_depend_on_the_number_of_sms(lengths, few, many):
    splits = [splits_of(n) for n in lengths]
    covered = units(entries(splits, few), splits)
    assert covered == units(entries(splits, many), splits)
    assert len(covered) == sum(splits)


@given(LENGTHS, LENGTHS, PROCESSORS)
def test_rows_without_keys_only_shift_the_rows_behind_them(before, behind, num_sms):
    plain, padded = plan(before + behind, num_sms), plan(before + [0] + behind, num_sms)
    assert padded == [(row + (row >= len(before)), split) for row, split in plain]


def test_only_the_last_column_of_two_dimensional_lengths_counts():
    flat = PagedMqaSchedule((700, 0, 300), num_sms=3)
    wide = replace(flat, next_n=4)
    assert expected(flat) == expected(wide) == [[0, 0], [0, 2], [2, 1], [3, 0]]


def expected(case):
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())
    return cells[next(n for n in cells if n != "tile_scheduler_metadata")].value.tolist()


BLOCKS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(BLOCKS, PROCESSORS)
def test_dealt_parts_cover_every_block_once_in_order(blocks, num_parts):
    parts = deal(blocks, num_parts)
    covered = [(r, b) for p in parts for r in range(p.first, p.last + 1)
               for b in range(p.begin if r == p.first else 0, p.end if r == p.last else blocks[r])]
    assert covered == [(r, b) for r in range(len(blocks)) for b in range(blocks[r])]
    assert len(parts) <= num_parts
    rows = [[p.first, p.begin, p.last, p.end, p.split, 0, 0, 0] for p in parts] + [[-1] * 8] * (num_parts - len(parts))
    assert dealt_complaint(rows, [64 * b for b in blocks], pieces_of(parts, len(blocks)), "march") is None


@given(BLOCKS, PROCESSORS)
def test_no_request_is_cut_more_often_than_there_are_parts(blocks, num_parts):
    pieces = pieces_of(deal(blocks, num_parts), len(blocks))
    assert sum(pieces) <= len(blocks) + num_parts - 1
    assert pieces_of(deal(blocks, 1), len(blocks)) == [1] * len(blocks)
    assert room_of(blocks, 1) >= room_of(blocks, num_parts)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=5), PROCESSORS)
def test_with_a_topk_only_the_number_of_requests_matters(lengths, num_parts):
    one, two = (FlashmlaSchedule(tuple(batch), topk=2048, num_parts=num_parts) for batch in (lengths, lengths[::-1]))
    assert expected(one) == expected(two) == expected(FlashmlaSchedule((2048,) * len(lengths), num_parts=num_parts))


# -- worked by hand -----------------------------------------------------------------------------------------------------


def test_fewer_splits_than_sms():
    """3 splits for 5 SMs: the first three take one each, and the others stand at the end."""
    assert plan((300, 1), 5) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 0), (2, 0)]
    assert plan((300, 1), 5, "june_sm90") == [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (2, 0)]


def test_a_length_of_one_more_than_a_split_is_two_splits():
    assert [splits_of(n) for n in (0, 1, SPLIT - 1, SPLIT, SPLIT + 1, 2**31 - 1)] == [0, 1, 1, 1, 2, 2**23]


def test_the_top_k_of_2048_is_32_blocks_and_the_overhead_5():
    """Two requests on 4 parts: 74 by 4 is 19, and 5 make 24, so a part takes 19 blocks of a request that does not fit."""
    assert room_of([32, 32], 4) == 24
    assert [(p.first, p.begin, p.last, p.end) for p in deal([32, 32], 4)] == [(0, 0, 0, 19), (0, 19, 1, 1), (1, 1, 1, 20),
                                                                             (1, 20, 1, 32)]


def test_any_even_partition_passes_where_no_version_is_asked_for(session):
    """The rule that looks at the consumer's needs alone takes our kernel, whose entries are January's."""
    example = Example((PagedMqaSchedule((700, 0, 300), num_sms=3),))
    assert differential.check(example, session.worker("kernels"), PAGED_MQA_SCHEDULE.rules({"entries": "any"})) == []
