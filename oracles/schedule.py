"""Schedules: how the work of a paged kernel is cut over the processors, ahead of the kernel that does it.

| transform          | fills                                | from                                                  |
| ------------------ | ------------------------------------ | ----------------------------------------------------- |
| paged_mqa_schedule | schedule                             | context_lens, num_sms                                 |
| paged_mqa_walk     | owner                                | context_lens, schedule: it is the schedule's consumer |
| flashmla_schedule  | tile_scheduler_metadata, num_splits  | cache_seqlens or topk, the number of parts            |

A schedule holds positions in the work, and its consumer walks the *live* lengths from one position to the next. One that
was built from other lengths leaves work out, or names a position that the walk never meets, and then it never ends (SGLang
#24635). So a schedule belongs to its lengths: it is rebuilt at every replay, into the buffer that the graph holds.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness.contract import (ANY_STRIDES, INT32, ROWS_STRIDED, Arg, Case, Contract, Precondition, Role, Scalar, Variant)
from harness.states import Judge
from harness.tensors import Input, Output, Region, dense, runs, vector

SPLIT = 256  # keys that one unit of paged-MQA work covers
BLOCK = 64  # keys in a block of FlashMLA
OVERHEAD = 5  # what a request costs a part of FlashMLA beyond its blocks
INT32_MAX = 2**31 - 1


def splits_of(length: int) -> int:
    """Units of work in a row of `length` keys."""
    return -(-length // SPLIT)


# -- paged_mqa_schedule -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PagedMqaSchedule(Case):
    """`lengths`, `repeat` times over. `next_n` is the width of two-dimensional context lengths, of which only the last
    column counts; 0 for one-dimensional ones. `spare` rows of unused capacity lie behind the schedule."""

    lengths: tuple[int, ...]
    repeat: int = 1
    next_n: int = 0
    num_sms: int = 4
    spare: int = 0

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.lengths * self.repeat

    def dims(self) -> dict[str, int]:
        return {"batch": len(self.all), "num_sms": self.num_sms}

    def batch_size(self) -> int:
        return len(self.all)

    def context_lens(self) -> Input:
        if not self.next_n:
            return vector(self.all)
        last = {i * self.next_n + self.next_n - 1: [n] for i, n in enumerate(self.all)}
        return runs((len(self.all), self.next_n), last, rest=Region.SLACK)

    def arguments(self) -> dict:
        return {
            "context_lens": self.context_lens(),
            "schedule": Output((self.num_sms + 1 + self.spare, 2)),
            "num_sms": self.num_sms,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "context_lens":
            return f"request {index[0]}"
        if index[0] > self.num_sms:
            return f"it is past the {self.num_sms} SMs"
        what = "split" if index[1] else "row"
        if index[0] == self.num_sms:
            return f"the {what} where the last SM stops"
        return f"the {what} where SM {index[0]} starts" + (f" and SM {index[0] - 1} stops" if index[0] else "")


def paged_mqa_schedule(*, context_lens, schedule, num_sms, variant):
    """Where every SM starts: entry i is (row, split), and SM i works from entry i up to entry i + 1.

    Two rows of 3 and 2 splits over 2 SMs: the first takes 3 of the 5, so the second starts at row 1.

    >>> from harness.states import Cells
    >>> out = Cells((4, 2))
    >>> paged_mqa_schedule(context_lens=[700, 300], schedule=out, num_sms=2, variant={"entries": "january"})
    >>> out
    Cells([0 0]
          [1 0]
          [2 0]
          [. .])

    The June kernel of SM90 gives what is left over to the last SMs:

    >>> out = Cells((3, 2))
    >>> paged_mqa_schedule(context_lens=[700, 300], schedule=out, num_sms=2, variant={"entries": "june_sm90"})
    >>> out
    Cells([0 0]
          [0 2]
          [2 0])

    Rows without keys are passed over, and without any work every SM starts where it stops:

    >>> out = Cells((3, 2))
    >>> paged_mqa_schedule(context_lens=[0, 0], schedule=out, num_sms=2, variant={"entries": "january"})
    >>> out
    Cells([2 0]
          [2 0]
          [2 0])
    """
    splits = [splits_of(n) for n in _last_column(context_lens)]
    if variant["entries"] == "any":
        schedule.judge((slice(0, num_sms + 1), slice(0, 2)), fair_partition(splits))
        return
    for i, entry in enumerate(entries(splits, num_sms, _next_n(context_lens), variant["entries"])):
        schedule[i, 0], schedule[i, 1] = entry


def entries(splits: list[int], num_sms: int, next_n: int = 1, rule: str = "january") -> list[tuple[int, int]]:
    """Where every SM starts, and where the last one stops."""
    groups = {"april": -(-next_n // min(next_n, 2)), "june_sm90": -(-next_n // min(next_n, 2)), "june_sm100": next_n}
    per_request = groups.get(rule, 1)
    share, left = divmod(sum(splits) * per_request, num_sms)
    found = []
    for i in range(num_sms + 1):
        extra = max(0, i - (num_sms - left)) if rule == "june_sm90" else min(i, left)
        found.append(_position(i * share + extra, splits, per_request, rule))
    return found


def _position(start: int, splits: list[int], per_request: int, rule: str) -> tuple[int, int]:
    """The row and split of the unit of work number `start`."""
    before = 0
    for request in range(len(splits)):
        work = splits[request] * per_request
        if start < before + work:
            offset = start - before
            if rule == "june_sm100":  # the unit is one split of one query token; an SM starts at a whole split
                return request * per_request, offset // per_request
            return request * per_request + offset // splits[request], offset % splits[request]
        before += work
    return len(splits) * per_request, 0


def _next_n(context_lens) -> int:
    return context_lens.shape[1] if len(np.shape(context_lens)) == 2 else 1


def _last_column(context_lens) -> list[int]:
    if len(np.shape(context_lens)) == 1:
        return [int(n) for n in context_lens]
    rows, columns = context_lens.shape
    return [int(context_lens[i, columns - 1]) for i in range(rows)]


def walk(start: tuple[int, int], end: tuple[int, int], splits: list[int]) -> list[tuple[int, int, int]] | None:
    """What the consumer computes from `start` on, until it *meets* `end`: (row, first split, one past the last), row by row.
    None if it never meets it: the last split of a row is always followed by the first of the next row.

    >>> walk((0, 1), (2, 0), [3, 0, 1])
    [(0, 1, 3)]
    >>> walk((0, 1), (0, 2), [3, 0, 1])
    [(0, 1, 2)]
    >>> walk((0, 1), (1, 4), [3, 2])
    """
    row, split = start
    visited = []
    while (row, split) != end:
        if row > end[0]:
            return None
        count = splits[row] if row < len(splits) else 0
        meets = row == end[0] and split < end[1] < count
        stop = end[1] if meets else count
        if split < stop:
            visited.append((row, split, stop))
        row, split = (row, stop) if meets else (row + 1, 0)
    return visited


def partition_complaint(schedule: list[tuple[int, int]], splits: list[int]) -> str | None:
    """What is wrong with a schedule of rows of `splits`, in one clause, or None."""
    batch, sms = len(splits), len(schedule) - 1
    for i, (row, split) in enumerate(schedule):
        if not (0 <= row <= batch and split >= 0):
            return f"entry {i} is {(row, split)}, which is no place in a batch of {batch} rows"
    for i in range(sms):
        if schedule[i + 1] < schedule[i]:
            return f"entry {i + 1}, {schedule[i + 1]}, comes before entry {i}, {schedule[i]}"
    covered, loads = [0] * batch, []
    for i in range(sms):
        visited = walk(schedule[i], schedule[i + 1], splits)
        if visited is None:
            row = schedule[i + 1][0]
            count = splits[row] if row < batch else 0
            return (f"SM {i} starts at {schedule[i]} and never meets its end {schedule[i + 1]}: row {row} has {count} splits, "
                    "so the walk does not terminate")
        for row, first, stop in visited:
            if first > covered[row]:
                return f"split {covered[row]} of row {row} is computed by no SM"
            covered[row] = stop
        loads.append(sum(stop - first for _, first, stop in visited))
    for row in range(batch):
        if covered[row] < splits[row]:
            return f"split {covered[row]} of row {row} is computed by no SM"
    if schedule[sms] != (batch, 0):
        return f"the last entry is {schedule[sms]}, and must be {(batch, 0)}"
    if max(loads) - min(loads) > 1:
        return f"the load is unbalanced: SM {loads.index(max(loads))} has {max(loads)} splits, SM " \
               f"{loads.index(min(loads))} has {min(loads)}"
    return None


def fair_partition(splits: list[int]) -> Judge:
    """Every split of every row once, in order, evenly, by walks that end."""

    def complaint(actual: np.ndarray) -> str | None:
        flat = [int(v) for v in actual]
        return partition_complaint(list(zip(flat[::2], flat[1::2])), splits)

    return Judge("fair_partition", complaint)


ENTRIES = Variant("entries", {
    "january": "DeepGEMM 0f5f266 (Jan 2026): one row per request, what is left over to the first SMs",
    "april": "DeepGEMM 891d57b (Apr 2026): pairs of query tokens are rows of their own",
    "june_sm90": "DeepGEMM 54e2261 (June 2026), SM90: as april, what is left over to the last SMs; SGLang's own kernel",
    "june_sm100": "DeepGEMM 54e2261 (June 2026), SM100: query tokens count as work, SMs start at whole splits",
    "any": "no version: any even partition in rows of one per request, by its consumer's needs alone",
})


def _negative(case: PagedMqaSchedule) -> PagedMqaSchedule | None:
    return replace(case, lengths=(-300, *case.lengths[1:])) if case.lengths else None


_CONTEXT_LENS = Arg("context_lens", Role.IN, ("batch",), INT32, "keys per row; [batch, next_n]: the last column counts",
                    ANY_STRIDES, sets_size=True, cells="live, slack")

PAGED_MQA_SCHEDULE = Contract(
    name="paged_mqa_schedule",
    family="schedule",
    doc="Where every SM starts in the splits of 256 keys of the paged MQA logits.",
    origin="DeepGEMM get_paged_mqa_logits_metadata; SGLang nsa_backend, refreshed at every replay since #24635",
    case=PagedMqaSchedule,
    oracle=paged_mqa_schedule,
    args=(
        _CONTEXT_LENS,
        Arg("schedule", Role.OUT, ("num_sms + 1", "2"), INT32, "(row, split) where each SM starts; the end of the work last",
            ROWS_STRIDED, cells="written, untouched"),
    ),
    scalars=(Scalar("num_sms", "SMs that share the work, at least 1"),),
    variants=(ENTRIES,),
    preconditions=(
        Precondition("lengths are not negative", "context_lens >= 0", "DeepGEMM reads the lengths as uint32", _negative),
    ),
    capturable=True,
    frozen_by_capture=("batch", "num_sms"),
    upstream_names=("get_paged_mqa_logits_metadata", "paged_mqa_schedule_metadata"),
)


# -- paged_mqa_walk -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PagedMqaWalk(Case):
    """The schedule is that of `lengths`, unless `built_from` names the lengths of an earlier batch. `max_splits` is
    what the longest row needs, at least `width`, less `missing`; the output has `spare` rows and columns more. Every number
    of the schedule is `below` too small."""

    lengths: tuple[int, ...]
    num_sms: int = 4
    built_from: tuple[int, ...] | None = None
    width: int = 0
    missing: int = 0
    spare: int = 0
    below: int = 0

    def max_splits(self) -> int:
        return max([self.width, *(splits_of(n) for n in self.lengths)]) - self.missing

    def dims(self) -> dict[str, int]:
        return {"batch": len(self.lengths), "num_sms": self.num_sms, "max_splits": self.max_splits()}

    def batch_size(self) -> int:
        return len(self.lengths)

    def schedule(self) -> list[tuple[int, int]]:
        lengths = self.lengths if self.built_from is None else self.built_from
        return entries([splits_of(n) for n in lengths], self.num_sms)

    def arguments(self) -> dict:
        return {
            "context_lens": vector(self.lengths),
            "schedule": dense(np.array(self.schedule()) - self.below),
            "owner": Output((len(self.lengths) + self.spare, self.max_splits() + self.spare)),
            "num_sms": self.num_sms,
            "max_splits": self.max_splits(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "context_lens":
            return f"row {index[0]}"
        if name == "schedule":
            return f"where SM {index[0]} starts"
        if index[0] >= len(self.lengths):
            return f"it is past the batch's {len(self.lengths)} rows"
        count = splits_of(self.lengths[index[0]])
        return f"split {index[1]} of row {index[0]}" if index[1] < count else f"it is past row {index[0]}'s {count} splits"


def paged_mqa_walk(*, context_lens, schedule, owner, num_sms, max_splits, variant):
    """The SM that computes every split, as the schedule's consumer finds them.

    >>> from harness.states import Cells
    >>> out = Cells((2, 4))
    >>> paged_mqa_walk(context_lens=[700, 300], schedule=np.array([[0, 0], [0, 2], [1, 0], [2, 0]]), owner=out, num_sms=3,
    ...                max_splits=4, variant={})
    >>> out
    Cells([0 0 1 .]
          [2 2 . .])
    """
    splits = [splits_of(int(n)) for n in context_lens]
    places = [(int(schedule[i, 0]), int(schedule[i, 1])) for i in range(num_sms + 1)]
    for sm in range(num_sms):
        for row, first, stop in walk(places[sm], places[sm + 1], splits) or []:
            owner[row, first:stop] = sm


def _another_schedule(case: PagedMqaWalk) -> tuple[PagedMqaWalk, ...]:
    """The schedule of a batch whose first requests were longer: its ends lie past what they have now. That of a larger
    batch. One that nobody has filled."""
    longer = tuple(n + SPLIT * (len(case.lengths) - i) for i, n in enumerate(case.lengths))
    larger = (*longer, 3 * SPLIT, 3 * SPLIT)
    return (replace(case, built_from=longer), replace(case, built_from=larger), replace(case, below=3)) if longer else ()


def _too_few_splits(case: PagedMqaWalk) -> tuple[PagedMqaWalk, ...]:
    """Half of what the longest row needs, or one less; that row also alone, where nothing lies behind it."""
    alone = replace(case, lengths=(max(case.lengths, default=0),), spare=0)
    return tuple(replace(c, missing=n, spare=0) for c in (case, alone) if c.max_splits() > 1 for n in {1, c.max_splits() // 2})


PAGED_MQA_WALK = Contract(
    name="paged_mqa_walk",
    family="schedule",
    doc="The consumer of a paged-MQA schedule: which SM computes which split of the live lengths.",
    origin="DeepGEMM's scheduler of the paged MQA logits; ordered end test of SM90PagedMQALogitsScheduler",
    case=PagedMqaWalk,
    oracle=paged_mqa_walk,
    args=(
        replace(_CONTEXT_LENS, doc="keys per row", cells="live"),
        Arg("schedule", Role.IN, ("num_sms + 1", "2"), INT32, "(row, split) where each SM starts", ROWS_STRIDED, cells="live"),
        Arg("owner", Role.OUT, ("batch", "max_splits"), INT32, "the SM that computes each split", ROWS_STRIDED,
            cells="written, untouched"),
    ),
    scalars=(Scalar("num_sms", "SMs that share the work, at least 1"),
             Scalar("max_splits", "at least the splits of the longest row")),
    preconditions=(
        Precondition("max_splits covers every row", "splits of a row <= max_splits",
                     "the logits have max_seq_len columns, which SGLang takes from its block table: unchecked",
                     _too_few_splits),
        Precondition("the schedule is that of the live lengths", "built from the same context_lens",
                     "SGLang #24635: a walker that tests for equality with its end never stops", _another_schedule),
    ),
    capturable=True,
    frozen_by_capture=("batch", "num_sms"),
    upstream_names=("PagedMQALogitsScheduler",),
)


# -- flashmla_schedule --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FlashmlaSchedule(Case):
    """`lengths`, `repeat` times over. With `topk` every request has that many keys, and its length does not matter; with
    -1 its length decides. `spare` rows of unused capacity lie behind both outputs."""

    lengths: tuple[int, ...]
    repeat: int = 1
    topk: int = -1
    num_parts: int = 4
    spare: int = 0

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.lengths * self.repeat

    def keys(self) -> list[int]:
        return [n if self.topk == -1 else self.topk for n in self.all]

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.all), "num_parts": self.num_parts}

    def batch_size(self) -> int:
        return len(self.all)

    def arguments(self) -> dict:
        n = len(self.all)
        return {
            "cache_seqlens": vector(self.all if self.topk == -1 else (), self.spare + (0 if self.topk == -1 else n)),
            "tile_scheduler_metadata": Output((self.num_parts + self.spare, 8)),
            "num_splits": Output((n + 1 + self.spare,)),
            "num_rows": n,
            "topk": self.topk,
            "num_parts": self.num_parts,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "cache_seqlens":
            return f"request {index[0]}"
        if name == "num_splits":
            if index[0] > len(self.all):
                return f"it is past the batch's {len(self.all)} requests"
            return f"the splits of the requests before {index[0]}"
        return f"part {index[0]}" if index[0] < self.num_parts else f"it is past the {self.num_parts} parts"


@dataclass(frozen=True)
class Part:
    """The work of one part: from block `begin` of request `first` up to block `end` of request `last`, which it does not
    include. `split` is the number of the piece of `first` that it starts with."""

    first: int
    begin: int
    last: int
    end: int
    split: int


def flashmla_schedule(*, cache_seqlens, tile_scheduler_metadata, num_splits, num_rows, topk, num_parts, variant):
    """Blocks of 64 keys dealt out to the parts in order; a request may be cut, and its pieces are numbered.

    Two requests of 3 blocks and 1 block, 2 parts: a part has room for (3 + 1 + 2 * 5) / 2 + 5 = 12, so the first part
    takes request 0 for 8, and of the 4 that are left nothing fits beside the overhead of 5.

    >>> from harness.states import Cells
    >>> parts, splits = Cells((2, 8)), Cells((3,))
    >>> flashmla_schedule(cache_seqlens=[190, 60], tile_scheduler_metadata=parts, num_splits=splits, num_rows=2, topk=-1,
    ...                   num_parts=2, variant={"layout": "april"})
    >>> splits
    Cells([0 1 2])
    >>> deal([3, 1], 2)
    [Part(first=0, begin=0, last=0, end=3, split=0), Part(first=1, begin=0, last=1, end=1, split=0)]
    """
    keys = [int(cache_seqlens[i]) if topk == -1 else topk for i in range(num_rows)]
    blocks = [max(1, -(-n // BLOCK)) for n in keys]
    parts = deal(blocks, num_parts)
    pieces = pieces_of(parts, num_rows)
    num_splits[0] = 0
    for i in range(num_rows):
        num_splits[i + 1] = sum(pieces[: i + 1])
    tile_scheduler_metadata.judge((slice(0, num_parts), slice(0, 8)), dealt(keys, pieces, num_parts, variant["layout"]))


def room_of(blocks: list[int], num_parts: int) -> int:
    """How much a part takes: an even share of all blocks and overheads, and one overhead more."""
    return -(-sum(b + OVERHEAD for b in blocks) // num_parts) + OVERHEAD


def deal(blocks: list[int], num_parts: int) -> list[Part]:
    """The parts that get work, in order: each is filled before the next one starts.

    >>> deal([8, 1], 2)
    [Part(first=0, begin=0, last=0, end=8, split=0), Part(first=1, begin=0, last=1, end=1, split=0)]
    >>> deal([8, 1], 4)
    [Part(first=0, begin=0, last=0, end=5, split=0), Part(first=0, begin=5, last=0, end=8, split=1), \
Part(first=1, begin=0, last=1, end=1, split=0)]
    """
    room = room_of(blocks, num_parts)
    request, block, split = 0, 0, 0
    parts = []
    while request < len(blocks):
        first, begin, number = request, block, split
        free = room
        while request < len(blocks) and free >= blocks[request] - block + OVERHEAD:
            free -= blocks[request] - block + OVERHEAD
            last, end = request, blocks[request]
            request, block, split = request + 1, 0, 0
        if request < len(blocks) and free > OVERHEAD:
            block, split = block + free - OVERHEAD, split + 1
            last, end = request, block
        parts.append(Part(first, begin, last, end, number))
    return parts


def pieces_of(parts: list[Part], num_rows: int) -> list[int]:
    """Into how many pieces each request is cut."""
    pieces = [0] * num_rows
    for part in parts:
        for request in range(part.first, part.last + 1):
            pieces[request] += 1
    return pieces


def _decoded(row: list[int], layout: str) -> tuple[Part | None, tuple[int, int] | None]:
    """A row of the metadata: its part, None if it is idle, and its flags, None where the layout has none."""
    if layout == "march":
        first, begin, last, end, split = row[:5]
        return (None if first < 0 else Part(first, begin, last, end, split)), None
    first, last, begin, end, split, cut_first, cut_last = row[:7]
    return (None if first > last else Part(first, begin, last, end, split)), (cut_first, cut_last)


def dealt_complaint(rows: list[list[int]], keys: list[int], pieces: list[int], layout: str) -> str | None:
    """What is wrong with tile-scheduler metadata for requests of `keys`, cut into `pieces`, in one clause, or None."""
    blocks = [-(-n // BLOCK) for n in keys]
    room = room_of([max(1, b) for b in blocks], len(rows))
    at, seen = (0, 0), [0] * len(keys)  # the first request and block that are not dealt out yet
    for i, row in enumerate(rows):
        part, flags = _decoded(row, layout)
        if part is None:
            continue
        if (part.first, part.begin) != at:
            return f"part {i} starts at request {part.first}, block {part.begin}; dealt out so far is up to {at}"
        if not part.first <= part.last < len(keys):
            return f"part {i} covers requests {part.first} to {part.last} of {len(keys)}"
        begin = part.begin if part.last == part.first else 0
        if not (begin < part.end <= blocks[part.last] or begin == part.end == blocks[part.last] == 0):
            return f"part {i} ends at block {part.end} of request {part.last}, which has {blocks[part.last]}"
        if part.split != seen[part.first]:
            return f"part {i} starts with piece {part.split} of request {part.first}, and must with {seen[part.first]}"
        load = sum(max(1, blocks[r]) + OVERHEAD for r in range(part.first, part.last)) - part.begin
        load += (part.end or 1) + OVERHEAD
        if load > room:
            return f"part {i} has a load of {load}, and the share of a part is {room}"
        for request in range(part.first, part.last + 1):
            seen[request] += 1
        if flags:
            cut = (int(pieces[part.first] > 1), int(pieces[part.last] > 1))
            if tuple(map(bool, flags)) != tuple(map(bool, cut)):
                return f"part {i} says {flags} about whether its first and last request are cut, and must say {cut}"
        at = (part.last, part.end) if part.end < blocks[part.last] else (part.last + 1, 0)
    if at != (len(keys), 0):
        return f"the blocks from request {at[0]}, block {at[1]} on are dealt out to no part"
    if seen != pieces:
        wrong = next(r for r in range(len(keys)) if seen[r] != pieces[r])
        return f"request {wrong} is cut into {seen[wrong]} pieces; num_splits must say {pieces[wrong]}"
    return None


def dealt(keys: list[int], pieces: list[int], num_parts: int, layout: str) -> Judge:
    """Every block of every request once, in order, in numbered pieces as num_splits counts them."""

    def complaint(actual: np.ndarray) -> str | None:
        return dealt_complaint(actual.astype(np.int64).reshape(num_parts, 8).tolist(), keys, pieces, layout)

    return Judge("dealt", complaint)


FLASHMLA_SCHEDULE = Contract(
    name="flashmla_schedule",
    family="schedule",
    doc="Which blocks of which request each part of FlashMLA's split-KV decode computes.",
    origin="FlashMLA get_mla_metadata (SGLang flashmla_backend, nsa_backend); SGLang flashmla_sched_meta",
    case=FlashmlaSchedule,
    oracle=flashmla_schedule,
    args=(
        Arg("cache_seqlens", Role.IN, ("bs",), INT32, "keys per request; they do not matter with topk", ANY_STRIDES,
            cells="live, slack"),
        Arg("tile_scheduler_metadata", Role.OUT, ("num_parts", "8"), INT32, "the work of each part", ROWS_STRIDED,
            cells="judged, untouched"),
        Arg("num_splits", Role.OUT, ("bs + 1",), INT32, "prefix sums of the pieces of each request",
            cells="written, untouched"),
    ),
    scalars=(
        Scalar("num_rows", "requests in the batch, at least 1"),
        Scalar("topk", "keys that every request attends to; -1: as many as it has"),
        Scalar("num_parts", "parts that share the work, at least 1"),
    ),
    variants=(
        Variant("layout", {
            "april": "FlashMLA abb5477 (Apr 2026): requests first and last, blocks, split, both flags; first > last is idle",
            "march": "FlashMLA up to be055fb (Mar 2026): request and block of begin and end, split; request -1 is idle",
        }),
    ),
    preconditions=(
        Precondition("at least one request", "num_rows >= 1", "flashmla_sched_meta: 'batch size must be positive'",
                     lambda c: replace(c, lengths=())),
        Precondition("lengths are not negative", "cache_seqlens >= 0", "get_mla_metadata: unchecked",
                     lambda c: replace(c, lengths=(-70, *c.lengths[1:])) if c.lengths and c.topk == -1 else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "topk", "num_parts"),
    upstream_names=("get_mla_metadata", "flashmla_sched_meta"),
)

CONTRACTS = (PAGED_MQA_SCHEDULE, PAGED_MQA_WALK, FLASHMLA_SCHEDULE)
