"""Cache locations and positions of speculative decoding: which KV slots new and draft tokens get, and where they stand.

| transform                           | fills                         | from                                            |
| ----------------------------------- | ----------------------------- | ----------------------------------------------- |
| assign_req_to_token_pool            | req_to_token                  | new slots, one range of columns per request     |
| assign_extend_cache_locs            | out_cache_loc                 | the same ranges, read back                      |
| assign_extend_cache_locs_uniform    | out_cache_loc, positions      | ranges of one length for all requests           |
| create_extend_after_decode_spec_info | positions, bonus tokens      | accepted tokens and their number                |
| assign_draft_cache_locs             | req_to_token, out_cache_loc, copy lists | new slots for `topk` branches of drafts |
| assign_draft_cache_locs_contiguous  | out_cache_loc, positions      | slots that the table already holds              |

The last two answer the same question for two generations of SGLang in opposite directions: the first puts newly allocated
slots into the table and takes the padding out of the list in place, the second reads the list from the table. They share no
argument list and no rule that a variant could name, so they are two contracts. Everything not named stays as it was. Sizes
that only the device knows are "0" in a shape; a precondition states what they must hold.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import ANY_STRIDES, INT, INT32, ROWS_STRIDED, UNIT_STRIDE, Arg, Case, Contract, Precondition, Role, Scalar
from harness.hashing import kv_slots
from harness.tensors import Input, Output, Region, Span, table, vector
from oracles.kv_indices import FAR_ROWS, at_the_end, branch_start, first_request, slots_exist


def new_slots(content: int, count: int) -> np.ndarray:
    """Freshly allocated KV slots: no two alike."""
    return (hashing.cells(content, "new", np.arange(count)) % np.uint64(2**30)).astype(np.int64)


@dataclass(frozen=True, repr=False)
class _Batch(Case):
    """What the family's cases share.

    repeat       how many times over the batch holds `requests`
    slots        rows of req_to_token;   table_extra  its columns beyond those that the batch needs
    spare        unused capacity behind every vector of the batch;   tail  cells of out_cache_loc beyond those it needs
    content      which contents
    """

    requests: tuple = ()
    repeat: int = 1
    slots: int = 4
    table_extra: int = 0
    spare: int = 0
    tail: int = 0
    content: int = 0

    @cached_property
    def batch(self) -> tuple:
        return self.requests * self.repeat

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch)}

    def reach(self, r) -> int:
        """The first column of a request's row that it does not need."""
        raise NotImplementedError

    def columns(self) -> int:
        return max([0, *(self.reach(r) for r in self.batch)]) + self.table_extra

    def of_batch(self, field: str) -> Input:
        return vector([getattr(r, field) for r in self.batch], self.spare)

    def read_table(self) -> Input:
        """req_to_token of a transform that reads it: live up to what the batch needs, other rows forbidden."""
        live: dict[int, int] = {}
        for r in self.batch:
            if 0 <= r.slot < self.slots:
                live[r.slot] = max(live.get(r.slot, 0), min(self.reach(r), self.columns()))
        rows = {s: kv_slots(self.content, s + 1, n, aligned=False) for s, n in live.items()}
        return table((self.slots, self.columns()), rows)

    def of_cell(self, cell: int, counts: list[int]) -> str:
        """Whose a cell of a ragged list is."""
        for i, count in enumerate(counts):
            if cell < count:
                return f"token {cell} of request {i}"
            cell -= count
        return f"it is past the batch's {sum(counts)} tokens"

    def of_row(self, name: str, index: tuple[int, ...]) -> str:
        owners = [i for i, r in enumerate(self.batch) if r.slot == index[0]]
        return f"column {index[1]} of slot {index[0]}, which " + (f"request {owners[0]} owns" if owners else "nobody owns")


# -- assign_req_to_token_pool, assign_extend_cache_locs -----------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """`count` columns from `start` on in row `slot` of the request table."""

    slot: int
    start: int
    count: int


@dataclass(frozen=True, repr=False)
class _Extents(_Batch):
    requests: tuple[Extent, ...] = ()

    def reach(self, r: Extent) -> int:
        return r.start + max(r.count, 0)

    def total(self) -> int:
        return max(sum(max(r.count, 0) for r in self.batch) + self.tail, 0)

    def ranges(self) -> dict:
        return {
            "req_pool_indices": self.of_batch("slot"),
            "start_offset": self.of_batch("start"),
            "end_offset": vector([r.start + r.count for r in self.batch], self.spare),
            "bs": len(self.batch),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "req_to_token":
            return self.of_row(name, index)
        if name == "out_cache_loc":
            return self.of_cell(index[0], [r.count for r in self.batch])
        return f"request {index[0]}"


@dataclass(frozen=True, repr=False)
class AssignReqToTokenPool(_Extents):
    """New slots go into the table. The tokens of a ragged batch follow one another in out_cache_loc."""

    def arguments(self) -> dict:
        return {**self.ranges(), "req_to_token": Output((self.slots, self.columns())),
                "out_cache_loc": vector(new_slots(self.content, self.total()), self.spare)}


@dataclass(frozen=True, repr=False)
class AssignExtendCacheLocs(_Extents):
    """The slots of a ragged batch come out of the table."""

    def arguments(self) -> dict:
        return {**self.ranges(), "req_to_token": self.read_table(), "out_cache_loc": Output((self.total(),))}


def assign_req_to_token_pool(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs, variant):
    """Every request's new slots go into its columns.

    >>> from harness.states import Cells
    >>> R = Cells((2, 4))
    >>> assign_req_to_token_pool(req_pool_indices=[1, 0], req_to_token=R, start_offset=[1, 0], end_offset=[3, 1],
    ...                          out_cache_loc=[50, 51, 52], bs=2, variant={})
    >>> R
    Cells([52 . . .]
          [. 50 51 .])
    """
    taken = 0
    for i in range(bs):
        for column in range(start_offset[i], end_offset[i]):
            req_to_token[req_pool_indices[i], column] = out_cache_loc[taken]
            taken += 1


def assign_extend_cache_locs(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs, variant):
    """The slots of every request's columns, one request after the other; what is behind them stays.

    >>> from harness.states import Cells
    >>> R = table((2, 4), {0: [52], 1: [40, 50, 51]}).view()
    >>> out = Cells((4,))
    >>> assign_extend_cache_locs(req_pool_indices=[1, 0], req_to_token=R, start_offset=[1, 0], end_offset=[3, 1],
    ...                          out_cache_loc=out, bs=2, variant={})
    >>> out
    Cells([50 51 52 .])
    """
    filled = 0
    for i in range(bs):
        count = end_offset[i] - start_offset[i]
        out_cache_loc[filled : filled + count] = req_to_token[req_pool_indices[i], start_offset[i] : end_offset[i]]
        filled += count


# -- assign_extend_cache_locs_uniform, assign_draft_cache_locs_contiguous -----------------------------------------------


@dataclass(frozen=True)
class Req:
    """A request with `seq_len` tokens in row `slot` of the request table."""

    slot: int
    seq_len: int


@dataclass(frozen=True, repr=False)
class AssignExtendCacheLocsUniform(_Batch):
    """`draft_tokens` columns behind every request's tokens; `positions`: whether positions_out is given."""

    requests: tuple[Req, ...] = ()
    draft_tokens: int = 2
    positions: bool = False

    def reach(self, r: Req) -> int:
        return r.seq_len + self.draft_tokens

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "draft_tokens": self.draft_tokens, "tokens": len(self.batch) * self.draft_tokens}

    def arguments(self) -> dict:
        bs = len(self.batch)
        return {
            "req_pool_indices": self.of_batch("slot"),
            "req_to_token": self.read_table(),
            "start_offset": self.of_batch("seq_len"),
            "out_cache_loc": Output((bs * self.draft_tokens + self.tail,)),
            "positions_out": Output((bs + self.tail, self.draft_tokens)) if self.positions else None,
            "bs": bs,
            "draft_token_num": self.draft_tokens,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "out_cache_loc":
            return self.of_cell(index[0], [self.draft_tokens] * len(self.batch))
        return self.of_row(name, index) if name == "req_to_token" else f"request {index[0]}"


def assign_extend_cache_locs_uniform(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs,
                                     draft_token_num, variant):
    """The slots of `draft_token_num` columns from each start, and the columns' numbers as positions where wanted.

    >>> from harness.states import Cells
    >>> R = table((2, 4), {0: [52, 53], 1: [40, 50, 51]}).view()
    >>> out, positions = Cells((5,)), Cells((2, 2))
    >>> assign_extend_cache_locs_uniform(req_pool_indices=[1, 0], req_to_token=R, start_offset=[1, 0], out_cache_loc=out,
    ...                                  positions_out=positions, bs=2, draft_token_num=2, variant={})
    >>> out
    Cells([50 51 52 53 .])
    >>> positions
    Cells([1 2]
          [0 1])
    """
    for i in range(bs):
        for t in range(draft_token_num):
            column = start_offset[i] + t
            out_cache_loc[i * draft_token_num + t] = req_to_token[req_pool_indices[i], column]
            if positions_out is not None:
                positions_out[i, t] = column


@dataclass(frozen=True, repr=False)
class AssignDraftCacheLocsContiguous(_Batch):
    """`topk * num_steps` columns behind every request's tokens; `with_positions`: whether positions are wanted."""

    requests: tuple[Req, ...] = ()
    topk: int = 1
    num_steps: int = 2
    with_positions: bool = False

    def reach(self, r: Req) -> int:
        return r.seq_len + self.topk * self.num_steps

    def dims(self) -> dict[str, int]:
        branches = len(self.batch) * self.topk
        return {**super().dims(), "branches": branches, "drafts": branches * self.num_steps}

    def arguments(self) -> dict:
        branches = len(self.batch) * self.topk
        return {
            "req_pool_indices": self.of_batch("slot"),
            "req_to_token": self.read_table(),
            "seq_lens": self.of_batch("seq_len"),
            "out_cache_loc": Output((branches * self.num_steps + self.tail,)),
            "positions": Output((branches + self.tail,)) if self.with_positions else None,
            "bs": len(self.batch),
            "topk": self.topk,
            "num_steps": self.num_steps,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "positions":
            return f"branch {index[0] % self.topk} of request {index[0] // self.topk}"
        if name == "out_cache_loc":
            return self.of_cell(index[0], [self.topk * self.num_steps] * len(self.batch))
        return self.of_row(name, index) if name == "req_to_token" else f"request {index[0]}"


def assign_draft_cache_locs_contiguous(*, req_pool_indices, req_to_token, seq_lens, out_cache_loc, positions, bs, topk,
                                       num_steps, variant):
    """The slots of the `topk * num_steps` columns behind each request, branch after branch; every branch's position.

    >>> from harness.states import Cells
    >>> R = table((2, 5), {0: [52, 53, 54, 55], 1: [40, 50, 51, 60, 61]}).view()
    >>> out, positions = Cells((9,)), Cells((4,))
    >>> assign_draft_cache_locs_contiguous(req_pool_indices=[1, 0], req_to_token=R, seq_lens=[1, 0], out_cache_loc=out,
    ...                                    positions=positions, bs=2, topk=2, num_steps=2, variant={})
    >>> out
    Cells([50 51 60 61 52 53 54 55 .])
    >>> positions
    Cells([1 1 0 0])
    """
    for i in range(bs):
        for k in range(topk):
            if positions is not None:
                positions[i * topk + k] = seq_lens[i]
            for t in range(num_steps):
                draft = k * num_steps + t
                out_cache_loc[i * topk * num_steps + draft] = req_to_token[req_pool_indices[i], seq_lens[i] + draft]


# -- create_extend_after_decode_spec_info -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accepted:
    """A request of `seq_len` tokens, the last `accept_len` of which verification has just accepted."""

    seq_len: int
    accept_len: int


@dataclass(frozen=True, repr=False)
class CreateExtendAfterDecode(Case):
    """`requests`, `repeat` times over, after `num_steps` draft steps; `tail` cells behind the tokens, and
    `token_tail` behind those of accept_tokens, which also has `spare`."""

    requests: tuple[Accepted, ...]
    repeat: int = 1
    num_steps: int = 2
    spare: int = 0
    tail: int = 0
    token_tail: int = 0
    content: int = 0

    @cached_property
    def batch(self) -> tuple[Accepted, ...]:
        return self.requests * self.repeat

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch)}

    def total(self, tail: int) -> int:
        return max(sum(max(r.accept_len, 0) for r in self.batch) + tail, 0)

    def arguments(self) -> dict:
        return {
            "accept_tokens": vector(new_slots(self.content, self.total(self.token_tail)), self.spare),
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "accept_lens": vector([r.accept_len for r in self.batch], self.spare),
            "positions": Output((self.total(self.tail),)),
            "bonus_tokens": Output((len(self.batch) + self.spare,)),
            "bs": len(self.batch),
            "num_steps": self.num_steps,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        cell = index[0]
        if name != "positions":
            return f"request {cell}" if cell < len(self.batch) else f"it is past the batch's {len(self.batch)} requests"
        for i, r in enumerate(self.batch):
            if cell < r.accept_len:
                return f"accepted token {cell} of request {i} (accept_len {r.accept_len}, seq_len {r.seq_len})"
            cell -= r.accept_len
        return "it is past the accepted tokens"


def create_extend_after_decode_spec_info(*, accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, bs, num_steps,
                                         variant):
    """Where the accepted tokens of each request stand, and the last of them, which the next draft continues.

    >>> from harness.states import Cells
    >>> positions, bonus = Cells((5,)), Cells((2,))
    >>> create_extend_after_decode_spec_info(accept_tokens=[11, 12, 13, 21], seq_lens=[10, 7], accept_lens=[3, 1],
    ...                                      positions=positions, bonus_tokens=bonus, bs=2, num_steps=2, variant={})
    >>> positions, bonus
    (Cells([7 8 9 6 .]), Cells([13 21]))
    """
    done = 0
    for i in range(bs):
        for t in range(accept_lens[i]):
            positions[done] = seq_lens[i] - accept_lens[i] + t
            done += 1
        bonus_tokens[i] = accept_tokens[done - 1]


# -- assign_draft_cache_locs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class AssignDraftCacheLocs(_Batch):
    """`topk` branches of `num_steps` drafts per request. With several branches and pages every branch has whole pages, and
    the first of them repeats the request's last, partly filled page. `extend_slip` spoils the first extend_len, `copy_tail`
    the length of the copy lists."""

    requests: tuple[Req, ...] = ()
    topk: int = 1
    num_steps: int = 2
    page_size: int = 1
    extend_slip: int = 0
    copy_tail: int = 0

    def paged(self) -> bool:
        return self.page_size > 1 and self.topk > 1

    def partial(self, r: Req) -> int:
        """Tokens on the request's last page, if that is not full."""
        return r.seq_len % self.page_size

    def branch_pages(self, r: Req) -> int:
        return -(-(self.partial(r) + self.num_steps) // self.page_size)

    def count(self, r: Req) -> int:
        """New slots of a request."""
        return (self.branch_pages(r) * self.page_size * self.topk - self.partial(r) if self.paged()
                else self.topk * self.num_steps)

    def reach(self, r: Req) -> int:
        return r.seq_len + self.count(r)

    def copied(self) -> int:
        return (self.topk - 1) * sum(self.partial(r) for r in self.batch)

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "drafts": len(self.batch) * self.topk * self.num_steps}

    def arguments(self) -> dict:
        count = [self.count(r) for r in self.batch]
        slipped = [c + self.extend_slip * (i == 0) for i, c in enumerate(count)]
        derived = {
            "extend_lens": vector(slipped, self.spare),
            "num_new_pages_per_topk": vector([self.branch_pages(r) for r in self.batch], self.spare),
            "last_page_lens_cumsum": vector(np.cumsum([self.partial(r) for r in self.batch], dtype=np.int64), self.spare),
            "source_cache_loc": Output((self.copied() + self.spare + self.copy_tail,)),
            "target_cache_loc": Output((self.copied() + self.spare + self.copy_tail,)),
        }
        return {
            "req_pool_indices": self.of_batch("slot"),
            "req_to_token": self.written_table(),
            "seq_lens": self.of_batch("seq_len"),
            "out_cache_loc": vector(new_slots(self.content, max(sum(count) + self.tail, 0)), self.spare),
            **(derived if self.paged() else dict.fromkeys(derived)),
            "bs": len(self.batch),
            "topk": self.topk,
            "num_steps": self.num_steps,
            "page_size": self.page_size,
        }

    def written_table(self) -> Input:
        """Live are a request's last, partly filled page and the columns of its new slots; other rows are forbidden."""
        width, spans = self.columns(), []
        owners = {r.slot: r for r in self.batch}
        for slot in range(self.slots):
            row = slot * width
            if slot not in owners:
                spans.append(Span(row, row + width, Region.FORBIDDEN))
                continue
            r = owners[slot]
            first = max(min(r.seq_len - self.partial(r) if self.paged() else r.seq_len, width), 0)
            last = max(min(self.reach(r), width), first)
            values = kv_slots(self.content, slot + 1, last, aligned=False)[first:]
            spans += [Span(row, row + first, Region.SLACK), Span(row + first, row + last, Region.LIVE, values),
                      Span(row + last, row + width, Region.SLACK)]
        return Input((self.slots, width), tuple(s for s in spans if s.stop > s.start))

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "req_to_token":
            return self.of_row(name, index)
        if name == "out_cache_loc":
            each = self.topk * self.num_steps
            i, draft = divmod(index[0], each)
            if i < len(self.batch):
                return f"draft {draft % self.num_steps} of branch {draft // self.num_steps} of request {i}"
            return f"it is past the batch's {each * len(self.batch)} drafts"
        if name in ("source_cache_loc", "target_cache_loc"):
            return self.of_cell(index[0], [(self.topk - 1) * self.partial(r) for r in self.batch])
        return f"request {index[0]}"


def assign_draft_cache_locs(*, req_pool_indices, req_to_token, seq_lens, extend_lens, num_new_pages_per_topk, out_cache_loc,
                            source_cache_loc, target_cache_loc, last_page_lens_cumsum, bs, topk, num_steps, page_size, variant):
    """New slots go into the table behind each request; what remains in front of out_cache_loc are the drafts' slots.

    Two branches of two drafts, pages of 4, and a request of 5 tokens: its last page holds 1 token. Branch 0 goes on there and
    has one page; so has branch 1, whose first cell is for the copy of that token. 3 + 4 slots are new.

    >>> from harness.states import Cells
    >>> R = Cells((1, 12), table((1, 12), {0: [*range(80, 85), *[0] * 7]}).view())
    >>> out, source, target = Cells((7,), np.array([85, 86, 87, 40, 41, 42, 43])), Cells((1,)), Cells((1,))
    >>> assign_draft_cache_locs(req_pool_indices=[0], req_to_token=R, seq_lens=[5], extend_lens=[7],
    ...                         num_new_pages_per_topk=[1], out_cache_loc=out, source_cache_loc=source,
    ...                         target_cache_loc=target, last_page_lens_cumsum=[1], bs=1, topk=2, num_steps=2, page_size=4,
    ...                         variant={})
    >>> R
    Cells([. . . . . 85 86 87 40 41 42 43])
    >>> out
    Cells([85 86 41 42 . . .])
    >>> source, target
    (Cells([84]), Cells([40]))
    """
    paged = page_size > 1 and topk > 1
    taken = copies = 0
    for i in range(bs):
        slot, seq = req_pool_indices[i], seq_lens[i]
        partial = seq % page_size
        pages = -(-(partial + num_steps) // page_size)
        count = pages * page_size * topk - partial if paged else topk * num_steps
        new = [out_cache_loc.before[taken + t] for t in range(count)]
        taken += count
        for t in range(count):
            req_to_token[slot, seq + t] = new[t]
        for k in range(topk if paged else 0):
            first = branch_start(seq, k, num_steps, topk, page_size) - seq
            for t in range(num_steps):
                out_cache_loc[(i * topk + k) * num_steps + t] = new[first + t]
            for t in range(partial if k else 0):
                source_cache_loc[copies] = req_to_token.before[slot, seq - partial + t]
                target_cache_loc[copies] = new[first - partial + t]
                copies += 1


# -- contracts ----------------------------------------------------------------------------------------------------------


def _too_narrow(case):
    """A request table that ends in the middle of its longest row, or one column short of it."""
    return tuple(replace(c, table_extra=-n) for c in (case, *at_the_end(case))
                 for needed in (c.columns() - c.table_extra,) for n in {1, needed // 2} if needed >= 2)


def _outside_columns(first_column: str):
    """Ranges that end behind the table's columns; one that begins in front of them, in the row in front of which is nothing."""

    def broken(case):
        before = [replace(case, requests=(replace(r, slot=0, **{first_column: -2}),), repeat=1) for r in case.requests[:1]]
        return (*_too_narrow(case), *before)

    return broken


def _ends_in_last_page(case):
    """A request table whose last row ends just before the last draft of the last branch, or the last token copied for it."""
    ends = []
    for alone in at_the_end(case) if case.paged() else ():
        (r,) = alone.requests
        behind = alone.branch_pages(r) * case.page_size - alone.partial(r) + 1  # columns from the last copied token on
        ends += [replace(alone, table_extra=case.num_steps - behind)]
        ends += [replace(alone, table_extra=-behind)] if alone.partial(r) else []
    return tuple(2 * ends)


def _pool() -> Arg:
    return _of_batch("req_pool_indices", "row of req_to_token that each request owns")


def _of_batch(name: str, doc: str, **more) -> Arg:
    return Arg(name, Role.IN, ("bs",), INT, doc, ANY_STRIDES, cells="live, slack", **more)


_READ_TABLE = Arg("req_to_token", Role.IN, ("1", "0"), INT32, "KV slot of every token of every request", ROWS_STRIDED,
                  cells="live, slack, forbidden")
_BS = Scalar("bs", "requests in the batch")
_RANGES = (_of_batch("start_offset", "first column of each request"), _of_batch("end_offset", "the column behind its last"))
_EXTENTS = (
    slots_exist("assign_req_to_token_pool, assign_extend_cache_locs: unchecked"),
    Precondition("the columns are in the table", "0 <= start_offset, end_offset <= req_to_token.shape[1]", "unchecked",
                 _outside_columns("start")),
    Precondition("ranges do not end before they start", "start_offset <= end_offset",
                 "assign_req_to_token_pool: a negative length moves every later request's offset",
                 lambda c: first_request(c, count=-2) if len(c.batch) > 1 and c.batch[0].start >= 2 else None),
    Precondition("out_cache_loc holds every range", "sum(end_offset - start_offset) <= len(out_cache_loc)", "unchecked",
                 lambda c: replace(c, tail=-1, spare=0) if c.batch and c.batch[-1].count > 0 else None),
)
_ONE_OWNER = Precondition("no column is assigned twice",
                          "requests on one row (padded ones share row 0 or a stale one) have ranges apart, or none",
                          "assign_req_to_token_pool: one program per request, in no order")

ASSIGN_REQ_TO_TOKEN_POOL = Contract(
    name="assign_req_to_token_pool",
    family="draft",
    doc="New KV slots into the request table.",
    origin="SGLang assign_req_to_token_pool",
    case=AssignReqToTokenPool,
    oracle=assign_req_to_token_pool,
    args=(
        _pool(),
        Arg("req_to_token", Role.OUT, ("1", "0"), INT32, "KV slot of every token of every request", FAR_ROWS,
            cells="written, untouched"),
        *_RANGES,
        Arg("out_cache_loc", Role.IN, ("0",), INT, "new slots, request after request", ANY_STRIDES, cells="live, slack"),
    ),
    scalars=(_BS,),
    preconditions=(*_EXTENTS, _ONE_OWNER),
    capturable=True,
    frozen_by_capture=("bs",),
    upstream_names=("assign_req_to_token_pool",),
)

ASSIGN_EXTEND_CACHE_LOCS = Contract(
    name="assign_extend_cache_locs",
    family="draft",
    doc="KV slots of a ragged range of columns per request.",
    origin="SGLang assign_extend_cache_locs",
    case=AssignExtendCacheLocs,
    oracle=assign_extend_cache_locs,
    args=(_pool(), _READ_TABLE, *_RANGES,
          Arg("out_cache_loc", Role.OUT, ("0",), INT, "their slots, request after request", UNIT_STRIDE,
              cells="written, untouched")),
    scalars=(_BS,),
    preconditions=_EXTENTS,
    capturable=True,
    frozen_by_capture=("bs",),
    upstream_names=("assign_extend_cache_locs",),
)

_TOKENS_IN_TABLE = Precondition("the columns are in the table",
                                "0 <= seq_len, and every request's last new column < req_to_token.shape[1]", "unchecked",
                                _outside_columns("seq_len"))

ASSIGN_EXTEND_CACHE_LOCS_UNIFORM = Contract(
    name="assign_extend_cache_locs_uniform",
    family="draft",
    doc="KV slots of equally many columns per request, and their positions.",
    origin="SGLang assign_extend_cache_locs_uniform (2026-08)",
    case=AssignExtendCacheLocsUniform,
    oracle=assign_extend_cache_locs_uniform,
    args=(
        _pool(), _READ_TABLE, _RANGES[0],
        Arg("out_cache_loc", Role.OUT, ("tokens",), INT, "the slots, request after request", UNIT_STRIDE,
            cells="written, untouched"),
        Arg("positions_out", Role.OUT, ("bs", "draft_tokens"), INT, "the columns' numbers", ROWS_STRIDED,
            optional="positions are not wanted", cells="written, untouched"),
    ),
    scalars=(_BS, Scalar("draft_token_num", "columns per request")),
    preconditions=(slots_exist("assign_extend_cache_locs_uniform: unchecked"), _TOKENS_IN_TABLE),
    capturable=True,
    frozen_by_capture=("bs", "draft_token_num"),
    upstream_names=("assign_extend_cache_locs_uniform",),
)

CREATE_EXTEND_AFTER_DECODE_SPEC_INFO = Contract(
    name="create_extend_after_decode_spec_info",
    family="draft",
    doc="Positions of the accepted tokens, and the last accepted token of every request.",
    origin="SGLang create_extend_after_decode_spec_info (removed in 2026-08)",
    case=CreateExtendAfterDecode,
    oracle=create_extend_after_decode_spec_info,
    args=(
        Arg("accept_tokens", Role.IN, ("0",), INT, "accepted token ids, request after request", ANY_STRIDES,
            cells="live, slack"),
        _of_batch("seq_lens", "tokens of each request, accepted ones included"),
        _of_batch("accept_lens", "accepted tokens of each request, at least 1"),
        Arg("positions", Role.OUT, ("0",), INT, "position of every accepted token", UNIT_STRIDE, cells="written, untouched"),
        Arg("bonus_tokens", Role.OUT, ("bs",), INT, "last accepted token of each request", UNIT_STRIDE,
            cells="written, untouched"),
    ),
    scalars=(_BS, Scalar("num_steps", "draft steps; a hint: requests accept num_steps + 1 tokens, or more")),
    preconditions=(
        Precondition("every request accepts something", "accept_lens >= 1",
                     "create_extend_after_decode_spec_info: the bonus token is the one before the next request's first",
                     lambda c: tuple(replace(first_request(c, accept_len=n), repeat=1) for n in (0, -2) if c.requests)),
        Precondition("positions and accept_tokens hold every token", "sum(accept_lens) <= len", "unchecked",
                     lambda c: (replace(c, tail=-1, token_tail=0), replace(c, tail=0, token_tail=-1, spare=0))
                     if c.batch else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "num_steps"),
    upstream_names=("create_extend_after_decode_spec_info",),
)

_DERIVED = "page_size is 1 or topk is 1"

ASSIGN_DRAFT_CACHE_LOCS = Contract(
    name="assign_draft_cache_locs",
    family="draft",
    doc="New KV slots for the drafts of every branch, with whole pages per branch and copies of the last partial page.",
    origin="SGLang assign_draft_cache_locs (up to #27599, #28105)",
    case=AssignDraftCacheLocs,
    oracle=assign_draft_cache_locs,
    args=(
        _pool(),
        Arg("req_to_token", Role.INOUT, ("1", "0"), INT32, "KV slot of every token of every request", FAR_ROWS,
            cells="live, slack, forbidden, written, untouched"),
        _of_batch("seq_lens", "tokens of each request before the drafts"),
        _of_batch("extend_lens", "new slots of each request", optional=_DERIVED),
        _of_batch("num_new_pages_per_topk", "pages of each branch, the copied partial page included", optional=_DERIVED),
        Arg("out_cache_loc", Role.INOUT, ("drafts",), INT, "before: new slots, request after request; after: the drafts' slots "
            "in front", UNIT_STRIDE, cells="live, slack, written, untouched"),
        Arg("source_cache_loc", Role.OUT, ("0",), INT, "slots to copy from: the partial page, for every branch but the first",
            UNIT_STRIDE, optional=_DERIVED, cells="written, untouched"),
        Arg("target_cache_loc", Role.OUT, ("0",), INT, "slots to copy to", UNIT_STRIDE, optional=_DERIVED,
            cells="written, untouched"),
        _of_batch("last_page_lens_cumsum", "inclusive prefix sums of the tokens on partial pages", optional=_DERIVED),
    ),
    scalars=(_BS, Scalar("topk", "branches per request"), Scalar("num_steps", "drafts per branch"),
             Scalar("page_size", "tokens per page")),
    preconditions=(
        slots_exist("assign_draft_cache_locs: unchecked"),
        replace(_TOKENS_IN_TABLE, broken=lambda c: (*_outside_columns("seq_len")(c), *_ends_in_last_page(c))),
        Precondition("derived inputs agree",
                     "extend_lens, num_new_pages_per_topk and last_page_lens_cumsum follow from seq_lens",
                     "get_last_loc_large_page_size_large_top_k computes them",
                     lambda c: replace(c, extend_slip=3) if c.paged() and c.batch else None),
        Precondition("out_cache_loc holds every new slot", "the sum of extend_lens <= len(out_cache_loc)", "unchecked",
                     lambda c: replace(c, tail=-1, spare=0) if c.batch else None),
        Precondition("the copy lists hold every copy", "(topk - 1) * tokens on partial pages <= len", "unchecked",
                     lambda c: replace(c, copy_tail=-1, spare=0) if c.paged() and c.copied() else None),
        Precondition("every request owns its row", "no two requests have one row", "one program per request, in no order"),
    ),
    capturable=True,
    frozen_by_capture=("bs", "topk", "num_steps", "page_size"),
    upstream_names=("assign_draft_cache_locs",),
)

ASSIGN_DRAFT_CACHE_LOCS_CONTIGUOUS = Contract(
    name="assign_draft_cache_locs_contiguous",
    family="draft",
    doc="KV slots of the drafts of every branch where the table holds them one behind the other, and the branches' positions.",
    origin="SGLang assign_draft_cache_locs_contiguous (#27599, #28105); before, assign_draft_cache_locs_page_size_1",
    case=AssignDraftCacheLocsContiguous,
    oracle=assign_draft_cache_locs_contiguous,
    args=(
        _pool(), _READ_TABLE, _of_batch("seq_lens", "tokens of each request before the drafts"),
        Arg("out_cache_loc", Role.OUT, ("drafts",), INT, "slots, draft after draft of branch after branch", UNIT_STRIDE,
            cells="written, untouched"),
        Arg("positions", Role.OUT, ("branches",), INT, "position of every branch", UNIT_STRIDE,
            optional="positions are not wanted", cells="written, untouched"),
    ),
    scalars=(_BS, Scalar("topk", "branches per request"), Scalar("num_steps", "drafts per branch")),
    preconditions=(slots_exist("assign_draft_cache_locs_contiguous: unchecked"), _TOKENS_IN_TABLE),
    capturable=True,
    frozen_by_capture=("bs", "topk", "num_steps"),
    upstream_names=("assign_draft_cache_locs_contiguous", "assign_draft_cache_locs_page_size_1"),
)

CONTRACTS = (ASSIGN_REQ_TO_TOKEN_POOL, ASSIGN_EXTEND_CACHE_LOCS, ASSIGN_EXTEND_CACHE_LOCS_UNIFORM,
             CREATE_EXTEND_AFTER_DECODE_SPEC_INFO, ASSIGN_DRAFT_CACHE_LOCS, ASSIGN_DRAFT_CACHE_LOCS_CONTIGUOUS)
