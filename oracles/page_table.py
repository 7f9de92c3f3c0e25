"""Page tables as prefill and eager speculative passes build them, and the query boundaries beside them.

| transform              | fills                    | from                                                           |
| ---------------------- | ------------------------ | -------------------------------------------------------------- |
| gather_page_table      | page_table_1             | req_to_token, the slots of the requests, rows per request      |
| real_page_table        | real_page_table          | page_table_1, page_size                                        |
| page_table_1_flattened | page_table_1_flattened   | page_table_1, lengths                                          |
| topk_indices_offset    | topk_indices_offset      | cu_seqlens_k, extend_seq_lens                                  |
| cu_seqlens_q           | cu_seqlens_q             | mode, extend_seq_lens, row counts                              |
| max_seq_len_q          | (returns one host value) | mode, extend lengths, prefix lengths                           |

How many rows a request has depends on the mode: one in decode and extend, `draft_tokens` in target verify and draft extend
v2, `row_repeats[i]` in draft extend v1; under round-robin context parallelism only the requests of `bs_idx` have rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import (ANY_STRIDES, INT, INT32, ROWS_STRIDED, Arg, Case, Contract, Kind, Precondition, Role, Scalar,
                              Variant, beyond)
from harness.hashing import kv_slots
from harness.tensors import Input, Output, Region, Span, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")


# -- gather_page_table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Req:
    """A request that owns row `slot` of req_to_token and has `seq_len` keys. `rows`: its rows where they are ragged.
    `selected`: whether this context-parallel rank owns query tokens of it."""

    slot: int
    seq_len: int
    rows: int = 1
    selected: bool = True


@dataclass(frozen=True, repr=False)
class GatherPageTable(Case):
    """
    times        how many times over the batch holds `requests`
    draft_tokens rows per request, unless `ragged`: then each request's own `rows`
    selection    whether bs_idx is given, with the selected requests
    max_extra    max_len beyond the longest request that has rows;   table_extra  req_to_token columns beyond max_len
    spare        capacity of the lengths and the output beyond the batch;   row_spare  output rows on top of it
    slots        rows of req_to_token;   shared  whether all requests share their pages;   content  which contents
    stray        what stands in the place of the first entry of bs_idx
    """

    requests: tuple[Req, ...]
    times: int = 1
    draft_tokens: int = 1
    ragged: bool = False
    selection: bool = False
    max_extra: int = 0
    table_extra: int = 0
    spare: int = 0
    row_spare: int = 0
    slots: int = 4
    shared: bool = False
    content: int = 0
    total_rows: int | None = None
    stray: int | None = None

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.times

    def chosen(self) -> list[int]:
        """The requests that have rows, in order."""
        return [i for i, r in enumerate(self.batch) if r.selected or not self.selection]

    def selected(self) -> list[int]:
        """bs_idx."""
        return self.chosen() if self.stray is None else [self.stray, *self.chosen()[1:]]

    def owners(self) -> list[int]:
        """The request of every row."""
        return [i for i in self.chosen() for _ in range(self.batch[i].rows if self.ragged else self.draft_tokens)]

    def rows(self) -> int:
        return len(self.owners()) if self.total_rows is None else self.total_rows

    def longest(self) -> int:
        """The most keys of a request that has rows; others may have more (#18280)."""
        return max([self.batch[i].seq_len for i in self.chosen()], default=0)

    def max_len(self) -> int:
        return self.longest() + self.max_extra

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "selected": len(self.chosen()), "rows": self.rows(), "max_len": self.max_len(),
                "slots": 1}

    def arguments(self) -> dict:
        return {
            "req_to_token": self.req_to_token(),
            "req_pool_indices": vector([r.slot for r in self.batch], self.spare),
            "cache_seqlens": vector([r.seq_len for r in self.batch], self.spare),
            "row_repeats": vector([r.rows for r in self.batch], self.spare) if self.ragged else None,
            "bs_idx": vector(self.selected()) if self.selection else None,
            "page_table_1": Output((self.rows() + self.row_spare + self.spare, self.max_len() + self.spare)),
            "bs": len(self.batch),
            "total_rows": self.rows(),
            "draft_tokens": self.draft_tokens,
            "max_len": self.max_len(),
        }

    def req_to_token(self) -> Input:
        """Rows of requests with rows are live up to their length; a row of no request in the batch is forbidden."""
        live = {r.slot: 0 for r in self.batch if 0 <= r.slot < self.slots}
        for i in self.chosen():
            slot = self.batch[i].slot
            if slot in live:
                live[slot] = max(live[slot], min(self.batch[i].seq_len, self.max_len()))
        shape = (self.slots, self.max_len() + self.table_extra)
        return table(shape, {s: kv_slots(self.content, 0 if self.shared else s + 1, n) for s, n in live.items()})

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        owners = self.owners()
        if name == "req_to_token":
            return f"slot {index[0]}"
        if name != "page_table_1":
            return f"entry {index[0]}"
        if index[0] >= len(owners):
            return f"it is past the batch's {len(owners)} rows"
        request = self.batch[owners[index[0]]]
        if index[1] >= request.seq_len:
            return f"it is past request {owners[index[0]]}'s length {request.seq_len}"
        return f"token {index[1]} of request {owners[index[0]]} (slot {request.slot})"


def gather_page_table(*, req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, page_table_1, bs, total_rows,
                      draft_tokens, max_len, variant):
    """Row by row the KV slots of the tokens of the row's request.

    Two requests, two rows each (target verify); then ragged rows, of which request 0 has none:

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> batch = dict(req_to_token=table((3, 4), {0: [7], 2: [4, 5, 9]}).view(), req_pool_indices=[2, 0],
    ...              cache_seqlens=[3, 1], bs_idx=None, bs=2, max_len=4)
    >>> out = Cells((4, 4))
    >>> gather_page_table(**batch, row_repeats=None, page_table_1=out, total_rows=4, draft_tokens=2,
    ...                   variant={"tail": "strict"})
    >>> out
    Cells([4 5 9 .]
          [4 5 9 .]
          [7 . . .]
          [7 . . .])
    >>> out = Cells((1, 4))
    >>> gather_page_table(**batch, row_repeats=[0, 1], page_table_1=out, total_rows=1, draft_tokens=2,
    ...                   variant={"tail": "full"})
    >>> out
    Cells([7 ? ? ?])
    """
    chosen = range(bs) if bs_idx is None else bs_idx
    row = 0
    for i in chosen:
        slot, length = req_pool_indices[i], cache_seqlens[i]
        for _ in range(draft_tokens if row_repeats is None else row_repeats[i]):
            page_table_1[row, 0:length] = req_to_token[slot, 0:length]
            if variant["tail"] == "full":
                page_table_1.free((row, slice(length, max_len)), "whatever req_to_token holds past the request's length")
            row += 1


def _change_first(case, **changes):
    return replace(case, requests=(replace(case.requests[0], **changes), *case.requests[1:])) if case.requests else None


def _unknown_slot(case: GatherPageTable) -> tuple[GatherPageTable, ...]:
    return tuple(_change_first(case, slot=slot) for slot in beyond(case.slots) if case.requests)


def _no_such_request(case: GatherPageTable) -> tuple[GatherPageTable, ...]:
    """bs_idx begins with a request behind the batch, behind which there is nothing, or in front of it."""
    return tuple(replace(case, stray=i, spare=0) for i in beyond(len(case.batch)) if case.selection and case.chosen())


def _negative_repeats(case: GatherPageTable) -> GatherPageTable | None:
    return _change_first(case, rows=-2) if case.ragged and case.times == 1 else None


def _too_long(case) -> Case | None:
    return replace(case, max_extra=-(case.longest() // 2), table_extra=0) if case.longest() >= 2 else None


def _one_row_less(case: GatherPageTable) -> GatherPageTable | None:
    rows = case.rows()
    return replace(case, total_rows=rows - 1, spare=0, row_spare=0) if rows else None


GATHER_PAGE_TABLE = Contract(
    name="gather_page_table",
    family="page_table",
    doc="The page-1 table: the KV slots of every row's request, one row per query token where tokens have rows.",
    origin="SGLang nsa_backend.init_forward_metadata: req_to_token[req_pool_indices, :max_len], its row repeats and its "
           "selection under round-robin context parallelism",
    case=GatherPageTable,
    oracle=gather_page_table,
    args=(
        Arg("req_to_token", Role.IN, ("slots", "max_len"), INT32, "KV slot of every token of every request", FAR_ROWS,
            cells="live, slack, forbidden"),
        Arg("req_pool_indices", Role.IN, ("bs",), INT, "row of req_to_token that each request owns", ANY_STRIDES,
            cells="live, slack"),
        Arg("cache_seqlens", Role.IN, ("bs",), INT, "keys per request, draft tokens included", ANY_STRIDES,
            cells="live, slack"),
        Arg("row_repeats", Role.IN, ("bs",), INT, "rows of each request (draft extend v1)", ANY_STRIDES,
            optional="every request has draft_tokens rows", cells="live, slack"),
        Arg("bs_idx", Role.IN, ("selected",), INT, "requests that have rows, in order (round-robin context parallelism)",
            ANY_STRIDES, optional="all have rows", sets_size=True, cells="live"),
        Arg("page_table_1", Role.OUT, ("rows", "max_len"), INT32, "KV slot of every token position", FAR_ROWS,
            cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests in the batch"),
        Scalar("total_rows", "rows to fill: the sum of the rows of the requests that have some"),
        Scalar("draft_tokens", "rows per request without row_repeats: 1 in decode and extend"),
        Scalar("max_len", "columns that exist: at least the longest request of those with rows, at most req_to_token's width"),
    ),
    variants=(
        Variant("tail", {
            "strict": "SGLang #31981: rows are written over their live prefix only",
            "full": "SGLang nsa_backend's gather: all max_len columns, with what req_to_token holds past the length",
        }),
    ),
    preconditions=(
        Precondition("slots exist", "0 <= req_pool_indices < req_to_token.shape[0]", "indexing of req_to_token", _unknown_slot),
        Precondition("requests exist", "0 <= bs_idx < bs", "indexing of the lengths", _no_such_request),
        Precondition("rows are not negative", "row_repeats >= 0", "repeat_interleave refuses them", _negative_repeats),
        Precondition("max_len covers every request", "cache_seqlens <= max_len of requests with rows",
                     "max_len is the largest of indexer_seq_lens_cpu", _too_long),
        Precondition("total_rows is the sum", "total_rows == rows of all requests that have some",
                     "repeat_interleave allocates the sum", _one_row_less),
    ),
    capturable=True,
    frozen_by_capture=("bs", "total_rows", "draft_tokens", "max_len"),
    upstream_names=("init_forward_metadata (page_table)", "init_forward_metadata_replay_cuda_graph (page_table_1)"),
)


# -- real_page_table ----------------------------------------------------------------------------------------------------

KINDS = ("aligned", "scattered", "holes", "signed")


@dataclass(frozen=True, repr=False)
class RealPageTable(Case):
    """`rows[i]` says what row i of page_table_1 holds: slots of whole pages (`aligned`), any slots (`scattered`), slots of
    which the first and some others are -1 (`holes`), or any int32, an outermost one first (`signed`). `row_spare`,
    `page_spare`: output capacity beyond the table."""

    rows: tuple[str, ...]
    columns: int = 1
    page_size: int = 64
    row_spare: int = 0
    page_spare: int = 0
    content: int = 0

    def pages(self) -> int:
        return -(-self.columns // max(self.page_size, 1))

    def batch_size(self) -> int:
        return len(self.rows)

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.rows), "columns": self.columns, "pages": self.pages()}

    def arguments(self) -> dict:
        cells = {i: self.slots(i, kind) for i, kind in enumerate(self.rows)}
        return {
            "page_table_1": table((len(self.rows), self.columns), cells),
            "real_page_table": Output((len(self.rows) + self.row_spare, self.pages() + self.page_spare)),
            "page_size": self.page_size,
        }

    def slots(self, row: int, kind: str) -> np.ndarray:
        if kind == "signed":
            drawn = hashing.cells(self.content, f"signed {row}", np.arange(self.columns))
            drawn = drawn.astype(np.uint32).view(np.int32).astype(np.int64)
            drawn[:1] = (-(2**31), 2**31 - 1)[(self.content + row) % 2]
            return drawn
        slots = kv_slots(self.content, row, self.columns, max(self.page_size, 1) if kind == "aligned" else 1)
        hole = hashing.cells(self.content, f"hole {row}", np.arange(self.columns)) % np.uint64(3) == 0
        hole[:1] = True
        return np.where(hole, -1, slots) if kind == "holes" else slots

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if index[0] >= len(self.rows):
            return f"it is past the table's {len(self.rows)} rows"
        if name == "page_table_1":
            return f"a row of {self.rows[index[0]]} slots"
        if index[1] >= self.pages():
            return f"it is past the row's {self.pages()} pages"
        return f"the page of column {index[1] * self.page_size} of a row of {self.rows[index[0]]} slots"


def real_page_table(*, page_table_1, real_page_table, page_size, variant):
    """Every `page_size`-th slot as a page number, rounded down (-1 stays -1). The last page may be cut short.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> out = Cells((2, 3))
    >>> real_page_table(page_table_1=table((2, 3), {0: [8, 9, 6], 1: [-1, 5, 3]}).view(), real_page_table=out, page_size=2,
    ...                 variant={})
    >>> out
    Cells([4 3 .]
          [-1 1 .])
    """
    rows, columns = page_table_1.shape
    pages = -(-columns // page_size)
    for row in range(rows):
        real_page_table[row, 0:pages] = page_table_1[row, 0:columns:page_size] // page_size


REAL_PAGE_TABLE = Contract(
    name="real_page_table",
    family="page_table",
    doc="The page table for page_size > 1: pages instead of slots, one column per page. A copy for page_size 1.",
    origin="SGLang nsa_backend._transform_table_1_to_real; for page_size 1 upstream returns page_table_1 itself",
    case=RealPageTable,
    oracle=real_page_table,
    args=(
        Arg("page_table_1", Role.IN, ("rows", "columns"), INT32, "KV slot of every token position", FAR_ROWS, sets_size=True,
            cells="live"),
        Arg("real_page_table", Role.OUT, ("rows", "pages"), INT32, "page of every page position", FAR_ROWS,
            cells="written, untouched"),
    ),
    scalars=(Scalar("page_size", "tokens per page"),),
    preconditions=(Precondition("page_size is positive", "page_size >= 1", "division by page_size",
                                lambda c: replace(c, page_size=0)),),
    capturable=True,
    frozen_by_capture=("rows", "columns", "page_size"),
    upstream_names=("_transform_table_1_to_real",),
)


# -- page_table_1_flattened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PageTable1Flattened(Case):
    """`lengths[i]` keys of request i, `times` over. `max_extra`: max_len beyond the longest; `table_extra`: columns beyond
    max_len; `shared`: whether all requests share their pages; `spare`: capacity beyond the batch, everywhere."""

    lengths: tuple[int, ...]
    times: int = 1
    max_extra: int = 0
    table_extra: int = 0
    spare: int = 0
    shared: bool = False
    content: int = 0
    total_len: int | None = None

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.lengths * self.times

    def longest(self) -> int:
        return max(self.all, default=0)

    def max_len(self) -> int:
        return self.longest() + self.max_extra

    def total(self) -> int:
        return sum(self.all) if self.total_len is None else self.total_len

    def batch_size(self) -> int:
        return len(self.all)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.all), "max_len": self.max_len(), "total": self.total()}

    def arguments(self) -> dict:
        rows = {i: kv_slots(self.content, 0 if self.shared else i, min(n, self.max_len())) for i, n in enumerate(self.all)}
        return {
            "page_table_1": table((len(self.all) + self.spare, self.max_len() + self.table_extra), rows),
            "seq_lens": vector(self.all, self.spare),
            "page_table_1_flattened": Output((self.total() + self.spare,)),
            "bs": len(self.all),
            "max_len": self.max_len(),
            "total_len": self.total(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "page_table_1_flattened":
            return f"request {index[0]}"
        first = 0
        for i, length in enumerate(self.all):
            if index[0] < first + length:
                return f"token {index[0] - first} of request {i} (length {length})"
            first += length
        return f"it is past the batch's {first} keys"


def page_table_1_flattened(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len, variant):
    """The live prefixes of the rows, one after the other.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> out = Cells((5,))
    >>> page_table_1_flattened(page_table_1=table((3, 3), {0: [7, 3], 1: [], 2: [4, 5]}).view(), seq_lens=[2, 0, 2],
    ...                        page_table_1_flattened=out, bs=3, max_len=3, total_len=4, variant={})
    >>> out
    Cells([7 3 4 5 .])
    """
    end = 0
    for i in range(bs):
        page_table_1_flattened[end : end + seq_lens[i]] = page_table_1[i, 0 : seq_lens[i]]
        end += seq_lens[i]


PAGE_TABLE_1_FLATTENED = Contract(
    name="page_table_1_flattened",
    family="page_table",
    doc="The KV slots of all keys of all requests in one row: what a ragged prefill gathers.",
    origin="SGLang nsa_backend.init_forward_metadata, page_table_1_flattened; requests may share slots (#15086)",
    case=PageTable1Flattened,
    oracle=page_table_1_flattened,
    args=(
        Arg("page_table_1", Role.IN, ("bs", "max_len"), INT32, "KV slot of every token position", FAR_ROWS,
            cells="live, slack, forbidden"),
        Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request", ANY_STRIDES, cells="live, slack"),
        Arg("page_table_1_flattened", Role.OUT, ("total",), INT32, "KV slots, request after request",
            cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests (those selected, under context parallelism)"),
        Scalar("max_len", "columns that exist: at least the longest request, at most page_table_1's width"),
        Scalar("total_len", "sum of seq_lens"),
    ),
    preconditions=(
        Precondition("max_len covers every request", "seq_lens <= max_len", "page_table[i, :kv_len] is sliced", _too_long),
        Precondition("lengths are not negative", "seq_lens >= 0", "page_table[i, :kv_len] is sliced",
                     lambda c: replace(c, lengths=(-2, *c.lengths[1:]), total_len=sum(c.lengths[1:]))
                     if len(c.lengths) > 1 and c.times == 1 else None),
        Precondition("total_len is the sum", "total_len == sum(seq_lens)", "'assert page_table_1_flattened.shape[0] == ...'",
                     lambda c: replace(c, total_len=c.total() - 1, spare=0) if c.total() else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "max_len", "total_len"),
    upstream_names=("page_table_1_flattened",),
)


# -- topk_indices_offset ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtendReq:
    """A request with `extend_len` query tokens among its `seq_len` keys."""

    extend_len: int
    seq_len: int


@dataclass(frozen=True, repr=False)
class TopkIndicesOffset(Case):
    """`requests`, `times` over, with `spare` capacity behind the lengths and the output."""

    requests: tuple[ExtendReq, ...]
    times: int = 1
    spare: int = 0
    total_len: int | None = None

    @cached_property
    def batch(self) -> tuple[ExtendReq, ...]:
        return self.requests * self.times

    def total(self) -> int:
        return sum(r.extend_len for r in self.batch) if self.total_len is None else self.total_len

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "tokens": self.total()}

    def arguments(self) -> dict:
        return {
            "cu_seqlens_k": vector(np.cumsum([0, *(r.seq_len for r in self.batch)]), self.spare),
            "extend_seq_lens": vector([r.extend_len for r in self.batch], self.spare),
            "topk_indices_offset": Output((self.total() + self.spare,)),
            "bs": len(self.batch),
            "total_len": self.total(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "topk_indices_offset":
            return f"request {index[0]}"
        first = 0
        for i, r in enumerate(self.batch):
            if index[0] < first + r.extend_len:
                return f"query token {index[0] - first} of request {i}"
            first += r.extend_len
        return f"it is past the batch's {first} query tokens"


def topk_indices_offset(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len, variant):
    """For every query token, where its request's keys start in the ragged batch of keys.

    >>> from harness.states import Cells
    >>> out = Cells((6,))
    >>> topk_indices_offset(cu_seqlens_k=[0, 10, 17, 21], extend_seq_lens=[3, 0, 2], topk_indices_offset=out, bs=3,
    ...                     total_len=5, variant={})
    >>> out
    Cells([0 0 0 17 17 .])
    """
    token = 0
    for i in range(bs):
        for _ in range(extend_seq_lens[i]):
            topk_indices_offset[token] = cu_seqlens_k[i]
            token += 1


def _negative_extend(case: TopkIndicesOffset) -> TopkIndicesOffset | None:
    first = replace(case.requests[0], extend_len=-2) if len(case.requests) > 1 and case.times == 1 else None
    rest = sum(r.extend_len for r in case.requests[1:])
    return first and replace(case, requests=(first, *case.requests[1:]), total_len=rest)


TOPK_INDICES_OFFSET = Contract(
    name="topk_indices_offset",
    family="page_table",
    doc="Start of each query token's keys in the ragged batch, which the ragged top-k adds to its indices.",
    origin="SGLang nsa_backend: repeat_interleave(cu_seqlens_k[:-1], extend_seq_lens); equals ks of the indexer (#12583)",
    case=TopkIndicesOffset,
    oracle=topk_indices_offset,
    args=(
        Arg("cu_seqlens_k", Role.IN, ("bs + 1",), INT32, "prefix sums of the keys per request", ANY_STRIDES,
            cells="live, slack"),
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, cells="live, slack"),
        Arg("topk_indices_offset", Role.OUT, ("tokens",), INT32, "first key of the token's request",
            cells="written, untouched"),
    ),
    scalars=(Scalar("bs", "requests"), Scalar("total_len", "sum of extend_seq_lens")),
    preconditions=(
        Precondition("total_len is the sum", "total_len == sum(extend_seq_lens)", "repeat_interleave allocates the sum",
                     lambda c: replace(c, total_len=c.total() - 1, spare=0) if c.total() else None),
        Precondition("lengths are not negative", "extend_seq_lens >= 0", "repeat_interleave refuses them", _negative_extend),
    ),
    capturable=True,
    frozen_by_capture=("bs", "total_len"),
    upstream_names=("topk_indices_offset",),
)


# -- cu_seqlens_q -------------------------------------------------------------------------------------------------------

MODES = ("decode", "target_verify", "draft_extend", "extend")


@dataclass(frozen=True, repr=False)
class CuSeqlensQ(Case):
    """`extends[i]` query tokens of request i, `times` over. `lengths_given`: whether extend_seq_lens is passed in modes that
    do not need it, where it holds leftovers."""

    mode: str
    extends: tuple[int, ...]
    times: int = 1
    draft_tokens: int = 1
    lengths_given: bool = True
    spare: int = 0

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.extends * self.times

    def rows(self) -> int:
        bs = len(self.all)
        return {"target_verify": bs * self.draft_tokens, "draft_extend": sum(self.all)}.get(self.mode, bs)

    def batch_size(self) -> int:
        return len(self.all)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.all), "rows": self.rows()}

    def arguments(self) -> dict:
        lengths = vector(self.all, self.spare)
        if self.mode != "extend":
            lengths = Input(lengths.shape, (Span(0, lengths.shape[0], Region.SLACK),)) if self.lengths_given else None
        return {
            "extend_seq_lens": lengths,
            "cu_seqlens_q": Output((self.rows() + 1 + self.spare,)),
            "mode": self.mode,
            "bs": len(self.all),
            "draft_tokens": self.draft_tokens,
            "extend_num_tokens": sum(self.all),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "cu_seqlens_q":
            return f"request {index[0]}"
        what = "request" if self.mode == "extend" else "query token"
        if index[0] > self.rows():
            return f"it is past the batch's {self.rows()} {what}s"
        return f"where {what} {index[0]} starts" if index[0] < self.rows() else "the total"


def cu_seqlens_q(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens, variant):
    """Where each sequence of queries starts: requests in an extend; everywhere else each query token is a sequence.

    >>> from harness.states import Cells
    >>> sizes = dict(bs=3, draft_tokens=2, extend_num_tokens=5, variant={})
    >>> def fill(mode, cells):
    ...     out = Cells((cells,))
    ...     cu_seqlens_q(extend_seq_lens=[3, 0, 2], cu_seqlens_q=out, mode=mode, **sizes)
    ...     return out
    >>> fill("decode", 4), fill("extend", 5)
    (Cells([0 1 2 3]), Cells([0 3 3 5 .]))
    >>> fill("target_verify", 7), fill("draft_extend", 6)
    (Cells([0 1 2 3 4 5 6]), Cells([0 1 2 3 4 5]))
    """
    if mode == "decode":
        lengths = [1] * bs
    elif mode == "target_verify":
        lengths = [1] * (bs * draft_tokens)
    elif mode == "draft_extend":
        lengths = [1] * extend_num_tokens
    else:
        lengths = [extend_seq_lens[i] for i in range(bs)]
    total = 0
    cu_seqlens_q[0] = 0
    for i in range(len(lengths)):
        total += lengths[i]
        cu_seqlens_q[i + 1] = total


CU_SEQLENS_Q = Contract(
    name="cu_seqlens_q",
    family="page_table",
    doc="Query boundaries of a pass. An extend without any prefix may use cu_seqlens_k: the values are the same.",
    origin="SGLang nsa_backend.init_forward_metadata, cu_seqlens_q of every mode",
    case=CuSeqlensQ,
    oracle=cu_seqlens_q,
    args=(
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES,
            optional="the mode is not extend, where it may also hold anything", cells="live, slack"),
        Arg("cu_seqlens_q", Role.OUT, ("rows + 1",), INT32, "prefix sums of query lengths", cells="written, untouched"),
    ),
    scalars=(
        Scalar("mode", "decode (idle too), target_verify, draft_extend (v2 too), extend (mixed too)"),
        Scalar("bs", "requests"),
        Scalar("draft_tokens", "query tokens per request of a target verify"),
        Scalar("extend_num_tokens", "query tokens of a draft extend in all"),
    ),
    preconditions=(
        Precondition("the total fits int32", "sum(extend_seq_lens) < 2**31", "cu_seqlens_q is int32"),
        Precondition("the mode exists", "mode is one of the four", "init_forward_metadata: 'Unsupported forward_mode'",
                     lambda c: replace(c, mode="prefill")),
    ),
    capturable=True,
    frozen_by_capture=("mode", "bs", "draft_tokens", "extend_num_tokens"),
    upstream_names=("cu_seqlens_q", "get_device_int32_arange"),
)


# -- max_seq_len_q ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixReq:
    """A request with `extend_len` query tokens behind a cached prefix."""

    extend_len: int
    prefix_len: int


@dataclass(frozen=True, repr=False)
class MaxSeqLenQ(Case):
    """`max_extra`: max_seq_len_k beyond the longest request (the table's width, where nothing on the host is longer)."""

    mode: str
    requests: tuple[PrefixReq, ...]
    round_robin: bool = False
    max_extra: int = 0

    def batch_size(self) -> int:
        return len(self.requests)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        longest = max([r.extend_len + r.prefix_len for r in self.requests], default=0)
        return {
            "mode": self.mode,
            "extend_seq_lens": [r.extend_len for r in self.requests],
            "extend_prefix_lens": [r.prefix_len for r in self.requests],
            "max_seq_len_k": longest + self.max_extra,
            "round_robin": self.round_robin,
        }


def max_seq_len_q(*, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin, variant):
    """The most query tokens in one of the sequences that cu_seqlens_q bounds (an upper bound without prefixes).

    >>> lengths = dict(extend_seq_lens=[3, 2], max_seq_len_k=9, round_robin=False, variant={})
    >>> max_seq_len_q(mode="extend", extend_prefix_lens=[0, 7], **lengths)
    3
    >>> max_seq_len_q(mode="extend", extend_prefix_lens=[0, 0], **lengths)
    9
    >>> max_seq_len_q(mode="target_verify", extend_prefix_lens=[0, 7], **lengths)
    1
    """
    if mode != "extend":
        return 1
    if round_robin or any(prefix > 0 for prefix in extend_prefix_lens):
        return max(extend_seq_lens) if len(extend_seq_lens) else 1
    return max_seq_len_k


MAX_SEQ_LEN_Q = Contract(
    name="max_seq_len_q",
    family="page_table",
    doc="The longest query sequence of a pass, on the host.",
    origin="SGLang nsa_backend.init_forward_metadata, max_seqlen_q of every mode",
    case=MaxSeqLenQ,
    oracle=max_seq_len_q,
    kind=Kind.HOST,
    scalars=(
        Scalar("mode", "decode, target_verify, draft_extend or extend"),
        Scalar("extend_seq_lens", "list: query tokens per request; under round-robin context parallelism this rank's, "
                                  "of requests that have some"),
        Scalar("extend_prefix_lens", "list: cached keys per request"),
        Scalar("max_seq_len_k", "the most keys of a request"),
        Scalar("round_robin", "whether the round-robin context-parallel split is active"),
    ),
    upstream_names=("max_seqlen_q",),
)

CONTRACTS = (GATHER_PAGE_TABLE, REAL_PAGE_TABLE, PAGE_TABLE_1_FLATTENED, TOPK_INDICES_OFFSET, CU_SEQLENS_Q, MAX_SEQ_LEN_Q)
