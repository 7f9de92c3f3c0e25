"""Attention metadata of one forward pass, straight into the persistent buffers of N draft backends.

Every transform reads `seq_lens`, `req_pool_indices` and `req_to_token` and fills, for each backend:

| output            | shape                        | holds                                                           |
| ----------------- | ---------------------------- | --------------------------------------------------------------- |
| cache_seqlens     | bs                           | keys per request                                                |
| cu_seqlens_k      | bs + 1                       | their prefix sums                                               |
| seqlens_expanded  | rows                         | keys per row, before the top-k clip (not in decode)             |
| nsa_cache_seqlens | rows                         | min(keys per row, index_topk)                                   |
| nsa_cu_seqlens_k  | rows + 1                     | their prefix sums                                               |
| page_table_1      | rows, max_len                | KV slot of every token position; may be absent for page_size > 1 |
| real_page_table   | rows, ceil(max_len / page)   | page of every page position; absent for page_size 1             |

A row is one query token: one per request in decode, `draft_tokens` per request in target verify, `extend_seq_lens[i]`
in draft extend. Everything not named stays as it was: buffers outlive batches, and a CUDA graph holds their addresses.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import (ANY_STRIDES, INT, INT32, ROWS_STRIDED, Arg, Case, Contract, Precondition, Role, Scalar,
                              Variant, beyond)
from harness.tensors import Output, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")
BLOCK = 128  # columns that SGLang's fused kernels write at a time


@dataclass(frozen=True)
class Req:
    """A request that owns row `slot` of req_to_token."""

    slot: int
    seq_len: int


@dataclass(frozen=True)
class ExtendReq:
    """A request of a draft extend: `extend_len` of its `seq_len` tokens are new (accepted, the bonus token included)."""

    slot: int
    seq_len: int
    extend_len: int


@dataclass(frozen=True, repr=False)
class _Metadata(Case):
    """What the three modes share.

    repeat      how many times over the batch holds `requests`
    backends    draft backends, each with buffers of its own
    wide        whether page_table_1 exists (page_size 1 needs it)
    max_extra   max_len beyond the longest request;   table_extra  req_to_token columns beyond max_len
    spare       capacity of every output beyond what the batch needs, rows and columns;   row_spare  rows on top of it
    slots       rows of req_to_token
    aligned     whether the tokens of a page are contiguous in it;   shared  whether all requests share their pages
    content     which table contents
    """

    requests: tuple[Req, ...]
    repeat: int = 1
    page_size: int = 1
    index_topk: int = 2048
    backends: int = 1
    wide: bool = True
    max_extra: int = 0
    table_extra: int = 0
    spare: int = 0
    row_spare: int = 0
    slots: int = 4
    aligned: bool = True
    shared: bool = False
    content: int = 0

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def kv_len(self, i: int) -> int:
        """Keys of request i after this pass."""
        return self.batch[i].seq_len

    def rows_of(self, i: int) -> int:
        """Query tokens of request i."""
        return 1

    def rows(self) -> int:
        return sum(self.rows_of(i) for i in range(len(self.batch)))

    @cached_property
    def longest(self) -> int:
        return max([self.kv_len(i) for i in range(len(self.batch))], default=0)

    def max_len(self) -> int:
        return self.longest + self.max_extra

    def pages(self) -> int:
        return -(-self.max_len() // self.page_size)

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "rows": self.rows(), "max_len": self.max_len(), "pages": self.pages(), "slots": 1}

    def arguments(self) -> dict:
        bs, rows = len(self.batch), self.rows()

        def each(*shape: int) -> list[Output]:
            return [Output(tuple(n + self.spare for n in shape)) for _ in range(self.backends)]

        absent = [None] * self.backends
        return {
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "req_pool_indices": vector([r.slot for r in self.batch], self.spare),
            "req_to_token": self.req_to_token(),
            "cache_seqlens": each(bs),
            "cu_seqlens_k": each(bs + 1),
            "nsa_cache_seqlens": each(rows + self.row_spare),
            "nsa_cu_seqlens_k": each(rows + self.row_spare + 1),
            "page_table_1": each(rows + self.row_spare, self.max_len()) if self.wide else absent,
            "real_page_table": each(rows + self.row_spare, self.pages()) if self.page_size > 1 else absent,
            "bs": bs,
            "max_len": self.max_len(),
            "index_topk": self.index_topk,
            "page_size": self.page_size,
        }

    def req_to_token(self):
        """The rows that the batch's requests own, live up to their length; every other row is forbidden."""
        live: dict[int, int] = {}
        for i, r in enumerate(self.batch):
            if 0 <= r.slot < self.slots:
                live[r.slot] = max(live.get(r.slot, 0), min(self.kv_len(i), self.max_len()))
        return table((self.slots, self.max_len() + self.table_extra), {s: self.tokens(s, n) for s, n in live.items()})

    def tokens(self, slot: int, count: int) -> np.ndarray:
        """KV slots of the first `count` tokens of the request in row `slot`."""
        return hashing.kv_slots(self.content, 0 if self.shared else slot + 1, count, self.page_size, self.aligned)

    def owner(self, row: int) -> int | None:
        """The request of a row, or None past the batch."""
        first = 0
        for i in range(len(self.batch)):
            first += self.rows_of(i)
            if row < first:
                return i
        return None

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        bs, base = len(self.batch), name.split("[")[0]
        if base in ("cache_seqlens", "cu_seqlens_k"):
            last = bs + (base == "cu_seqlens_k")
            return f"request {index[0]}" if index[0] < last else f"it is past the batch's {bs} requests"
        if base in ("seq_lens", "req_pool_indices", "extend_seq_lens"):
            return f"request {index[0]}"
        if base == "nsa_cu_seqlens_k" and index[0] == self.rows():
            return "the total of all rows"
        i = self.owner(index[0])
        if base == "req_to_token":
            return f"slot {index[0]}"
        if i is None:
            return f"it is past the batch's {self.rows()} rows"
        if len(index) == 1 or base == "paged_mqa_ctx_lens_2d":
            return f"a row of request {i}"
        page = self.page_size if base == "real_page_table" else 1
        if index[1] * page < self.kv_len(i):
            return f"token {index[1] * page} of request {i} (slot {self.batch[i].slot})"
        return f"it is past request {i}'s length {self.kv_len(i)}"


@dataclass(frozen=True, repr=False)
class Decode(_Metadata):
    """One query token per request; `seq_len` counts it already."""


@dataclass(frozen=True, repr=False)
class TargetVerify(_Metadata):
    """`draft_tokens` query tokens per request, on top of `seq_len` keys; optionally the (bs, draft_tokens) lengths."""

    draft_tokens: int = 2
    ctx_lens: bool = False

    def kv_len(self, i: int) -> int:
        return self.batch[i].seq_len + self.draft_tokens

    def rows_of(self, i: int) -> int:
        return self.draft_tokens

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "draft_tokens": self.draft_tokens}

    def arguments(self) -> dict:
        arguments = super().arguments()
        bs = len(self.batch)
        arguments["seqlens_expanded"] = [Output((self.rows() + self.spare,)) for _ in range(self.backends)]
        lens = [Output((bs, self.draft_tokens)) for _ in range(self.backends)]
        arguments["paged_mqa_ctx_lens_2d"] = lens if self.ctx_lens and bs else [None] * self.backends
        arguments["draft_tokens"] = self.draft_tokens
        return arguments


@dataclass(frozen=True, repr=False)
class DraftExtend(_Metadata):
    """`extend_seq_lens[i]` query tokens of request i, which `seq_len` counts already. `static`: all equal."""

    requests: tuple[ExtendReq, ...] = ()
    static: bool = False
    extend_extra: int = 0
    total_len: int | None = None

    def rows_of(self, i: int) -> int:
        return self.batch[i].extend_len

    def total(self) -> int:
        return self.rows() if self.total_len is None else self.total_len

    def max_extend_len(self) -> int:
        return max([r.extend_len for r in self.batch], default=0) + self.extend_extra

    def arguments(self) -> dict:
        arguments = super().arguments()
        arguments["extend_seq_lens"] = vector([r.extend_len for r in self.batch], self.spare)
        capacity = self.rows() + self.row_spare + self.spare
        arguments["seqlens_expanded"] = [Output((capacity,)) for _ in range(self.backends)]
        arguments["total_len"] = self.total()
        arguments["max_extend_len"] = self.max_extend_len()
        arguments["static_extend_len"] = self.static
        return arguments


# -- oracles ------------------------------------------------------------------------------------------------------------


def decode_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, nsa_cache_seqlens,
                    nsa_cu_seqlens_k, page_table_1, real_page_table, bs, max_len, index_topk, page_size, variant):
    """One row per request.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> R = table((2, 4), {0: [7], 1: [4, 5, 9]}).view()
    >>> one = lambda *shape: [Cells(shape)]
    >>> cache, cu, nsa, nsa_cu, wide = one(2), one(3), one(2), one(3), one(2, 4)
    >>> decode_metadata(seq_lens=[3, 1], req_pool_indices=[1, 0], req_to_token=R, cache_seqlens=cache, cu_seqlens_k=cu,
    ...                 nsa_cache_seqlens=nsa, nsa_cu_seqlens_k=nsa_cu, page_table_1=wide, real_page_table=[None], bs=2,
    ...                 max_len=4, index_topk=2, page_size=1, variant={"tail": "strict", "cu0": "written"})
    >>> cache[0], cu[0], nsa[0], nsa_cu[0]
    (Cells([3 1]), Cells([0 3 4]), Cells([2 1]), Cells([0 2 3]))
    >>> wide[0]
    Cells([4 5 9 .]
          [7 . . .])
    """
    lengths = [seq_lens[i] for i in range(bs)]
    owners = list(range(bs))
    _per_request(cache_seqlens, cu_seqlens_k, lengths, variant)
    _per_row(nsa_cache_seqlens, nsa_cu_seqlens_k, lengths, index_topk, variant)
    _tables(page_table_1, real_page_table, req_to_token, req_pool_indices, owners, lengths, max_len, page_size, variant)


def target_verify_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, seqlens_expanded,
                           nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, paged_mqa_ctx_lens_2d, bs,
                           max_len, index_topk, page_size, draft_tokens, variant):
    """`draft_tokens` rows per request; row j of request i sees seq_len + j + 1 keys.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> R = table((1, 3), {0: [8, 9, 3]}).view()
    >>> one = lambda *shape: [Cells(shape)]
    >>> cache, cu, full, nsa, nsa_cu, wide = one(1), one(2), one(2), one(2), one(3), one(2, 3)
    >>> target_verify_metadata(seq_lens=[1], req_pool_indices=[0], req_to_token=R, cache_seqlens=cache, cu_seqlens_k=cu,
    ...                        seqlens_expanded=full, nsa_cache_seqlens=nsa, nsa_cu_seqlens_k=nsa_cu, page_table_1=wide,
    ...                        real_page_table=[None], paged_mqa_ctx_lens_2d=[None], bs=1, max_len=3, index_topk=2,
    ...                        page_size=1, draft_tokens=2, variant={"tail": "strict", "cu0": "written"})
    >>> cache[0], full[0], nsa[0], nsa_cu[0]
    (Cells([3]), Cells([2 3]), Cells([2 2]), Cells([0 2 4]))
    >>> wide[0]
    Cells([8 9 3]
          [8 9 3])
    """
    lengths = [seq_lens[i] + draft_tokens for i in range(bs)]
    owners = [i for i in range(bs) for _ in range(draft_tokens)]
    expanded = [seq_lens[i] + j + 1 for i in range(bs) for j in range(draft_tokens)]
    _per_request(cache_seqlens, cu_seqlens_k, lengths, variant)
    for b in range(len(seqlens_expanded)):
        for row in range(len(expanded)):
            seqlens_expanded[b][row] = expanded[row]
    _per_row(nsa_cache_seqlens, nsa_cu_seqlens_k, expanded, index_topk, variant)
    _tables(page_table_1, real_page_table, req_to_token, req_pool_indices, owners, lengths, max_len, page_size, variant)
    for b in range(len(paged_mqa_ctx_lens_2d)):
        if paged_mqa_ctx_lens_2d[b] is not None:
            for i in range(bs):
                for j in range(draft_tokens):
                    paged_mqa_ctx_lens_2d[b][i, j] = lengths[i]


def draft_extend_metadata(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
                          seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, bs,
                          total_len, max_len, index_topk, page_size, max_extend_len, static_extend_len, variant):
    """`extend_seq_lens[i]` rows of request i; a padded row sees no key rather than a negative number (#30378).

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> R = table((2, 3), {0: [6], 1: [5, 2, 8]}).view()
    >>> one = lambda *shape: [Cells(shape)]
    >>> cache, cu, full, nsa, nsa_cu, wide = one(2), one(3), one(4), one(4), one(5), one(4, 3)
    >>> draft_extend_metadata(seq_lens=[3, 1], extend_seq_lens=[1, 2], req_pool_indices=[1, 0], req_to_token=R,
    ...                       cache_seqlens=cache, cu_seqlens_k=cu, seqlens_expanded=full, nsa_cache_seqlens=nsa,
    ...                       nsa_cu_seqlens_k=nsa_cu, page_table_1=wide, real_page_table=[None], bs=2, total_len=3,
    ...                       max_len=3, index_topk=2, page_size=1, max_extend_len=2, static_extend_len=False,
    ...                       variant={"tail": "strict", "cu0": "written", "clamp": "zero"})
    >>> cache[0], full[0], nsa[0], nsa_cu[0]
    (Cells([3 1]), Cells([3 0 1 .]), Cells([2 0 1 .]), Cells([0 2 2 3 .]))
    >>> wide[0]
    Cells([5 2 8]
          [6 . .]
          [6 . .]
          [. . .])
    """
    lengths = [seq_lens[i] for i in range(bs)]
    owners = [i for i in range(bs) for _ in range(extend_seq_lens[i])]
    expanded = []
    for i in range(bs):
        for t in range(extend_seq_lens[i]):
            visible = seq_lens[i] - extend_seq_lens[i] + 1 + t
            expanded.append(max(visible, 0) if variant["clamp"] == "zero" else visible)
    _per_request(cache_seqlens, cu_seqlens_k, lengths, variant)
    for b in range(len(seqlens_expanded)):
        for row in range(len(expanded)):
            seqlens_expanded[b][row] = expanded[row]
    _per_row(nsa_cache_seqlens, nsa_cu_seqlens_k, expanded, index_topk, variant)
    _tables(page_table_1, real_page_table, req_to_token, req_pool_indices, owners, lengths, max_len, page_size, variant)


def _per_request(cache_seqlens, cu_seqlens_k, lengths, variant):
    for b in range(len(cache_seqlens)):
        total = 0
        if variant["cu0"] == "written":
            cu_seqlens_k[b][0] = 0
        for i in range(len(lengths)):
            cache_seqlens[b][i] = lengths[i]
            total += lengths[i]
            cu_seqlens_k[b][i + 1] = total


def _per_row(nsa_cache_seqlens, nsa_cu_seqlens_k, expanded, index_topk, variant):
    for b in range(len(nsa_cache_seqlens)):
        total = 0
        if variant["cu0"] == "written":
            nsa_cu_seqlens_k[b][0] = 0
        for row in range(len(expanded)):
            nsa_cache_seqlens[b][row] = min(expanded[row], index_topk)
            total += min(expanded[row], index_topk)
            nsa_cu_seqlens_k[b][row + 1] = total


def _tables(page_table_1, real_page_table, req_to_token, req_pool_indices, owners, lengths, max_len, page_size, variant):
    """Row by row the slots (and pages) of the owner's tokens. What lies past the length is the tail rule's affair."""
    for b in range(len(page_table_1)):
        for row in range(len(owners)):
            slot, length = req_pool_indices[owners[row]], lengths[owners[row]]
            reach = _tail_reach(length, max(lengths), max_len, variant["tail"])
            if page_table_1[b] is not None:
                page_table_1[b][row, 0:length] = req_to_token[slot, 0:length]
                page_table_1[b].free((row, slice(length, reach)), "the writer's last block")
            if real_page_table[b] is not None:
                pages = -(-length // page_size)
                real_page_table[b][row, 0:pages] = req_to_token[slot, 0:length:page_size] // page_size
                real_page_table[b].free((row, slice(pages, -(-reach // page_size))), "the writer's last block")


def _tail_reach(length, longest, max_len, tail):
    """The first column that must be left alone."""
    if tail == "strict":
        return length
    if tail == "block":
        return min(max_len, -(-length // BLOCK) * BLOCK)
    return longest if tail == "longest" else max_len


# -- contracts ----------------------------------------------------------------------------------------------------------

TAIL = Variant("tail", {
    "strict": "SGLang #31981: rows are written over their live prefix only",
    "block": "SGLang #31981 as coded: whole blocks of 128 columns of live rows, cut at max_len",
    "longest": "SGLang up to #29413: every row up to the batch's longest request",
    "full": "SGLang #29413 up to #31981: every row up to max_len, the width of the table",
})
CU0 = Variant("cu0", {
    "written": "SGLang #29499: the generation kernels store 0",
    "kept": "SGLang #17554 and before: index 0 keeps the zero of the capture",
})
CLAMP = Variant("clamp", {
    "zero": "SGLang #30378: consumers read the lengths as unsigned",
    "none": "SGLang #29499 up to #30378",
})


def _outputs(*extra: Arg) -> tuple[Arg, ...]:
    def out(name: str, shape: tuple[str, ...], doc: str, layouts=("contiguous", "offset"), **more) -> Arg:
        return Arg(name, Role.OUT, shape, INT32, doc, layouts, per_backend=True, **more)

    return (
        out("cache_seqlens", ("bs",), "keys per request", cells="written, untouched"),
        out("cu_seqlens_k", ("bs + 1",), "prefix sums of cache_seqlens", cells="written, untouched"),
        *extra,
        out("nsa_cache_seqlens", ("rows",), "keys per row, at most index_topk", cells="written, untouched"),
        out("nsa_cu_seqlens_k", ("rows + 1",), "prefix sums of nsa_cache_seqlens", cells="written, untouched"),
        out("page_table_1", ("rows", "max_len"), "KV slot of every token position", FAR_ROWS,
            optional="page_size > 1, for every backend alike", cells="written, untouched"),
        out("real_page_table", ("rows", "pages"), "page of every page position", FAR_ROWS,
            optional="exactly when page_size is 1", cells="written, untouched"),
    )


_EXPANDED = Arg("seqlens_expanded", Role.OUT, ("rows",), INT32, "keys per row, before the clip", per_backend=True,
                cells="written, untouched")

_INPUTS = (
    Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request", ANY_STRIDES, cells="live, slack"),
    Arg("req_pool_indices", Role.IN, ("bs",), INT, "row of req_to_token that each request owns", ANY_STRIDES,
        cells="live, slack"),
    Arg("req_to_token", Role.IN, ("slots", "max_len"), INT32, "KV slot of every token of every request", ROWS_STRIDED,
        cells="live, slack, forbidden"),
)

_SCALARS = (
    Scalar("bs", "requests in the (padded) batch"),
    Scalar("max_len", "columns that exist: at least the longest request, at most req_to_token's width"),
    Scalar("index_topk", "tokens that the indexer selects per row"),
    Scalar("page_size", "tokens per page; the real table exists for more than 1"),
)


def _first_request(case, **changes):
    return replace(case, requests=(replace(case.requests[0], **changes), *case.requests[1:])) if case.requests else None


def _slot_outside(case):
    return tuple(_first_request(case, slot=s) for s in beyond(case.slots) if case.requests)


def _longer_than_max_len(case):
    return replace(case, max_extra=-(case.longest // 2), table_extra=0) if case.longest >= 2 else None


_PRECONDITIONS = (
    Precondition("slots exist", "0 <= req_pool_indices < req_to_token.shape[0]", "fused_dsa_decode_metadata: unchecked",
                 _slot_outside),
    Precondition("max_len covers every request", "keys per request <= max_len", "fused_dsa_decode_metadata: unchecked",
                 _longer_than_max_len),
    Precondition("totals fit int32", "sum of keys < 2**31", "cu_seqlens_k is int32"),
)

_FROZEN = ("bs", "max_len", "index_topk", "page_size")

DECODE_METADATA = Contract(
    name="decode_metadata",
    family="metadata",
    doc="Metadata of a decode step: one query token per request.",
    origin="SGLang #29499 fused_dsa_decode_metadata; replay of #17554; several backends at once as in #14781",
    case=Decode,
    oracle=decode_metadata,
    args=(replace(_INPUTS[0], may_alias=("cache_seqlens",)), *_INPUTS[1:],
          replace(_outputs()[0], may_alias=("seq_lens", "cache_seqlens")), *_outputs()[1:]),
    scalars=_SCALARS,
    variants=(TAIL, CU0),
    preconditions=_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=_FROZEN,
    upstream_names=("fused_dsa_decode_metadata", "init_forward_metadata_replay_cuda_graph (DECODE)"),
)

TARGET_VERIFY_METADATA = Contract(
    name="target_verify_metadata",
    family="metadata",
    doc="Metadata of a target-verify step: draft_tokens query tokens per request.",
    origin="SGLang #29499 fused_dsa_target_verify_metadata; replay of #17554",
    case=TargetVerify,
    oracle=target_verify_metadata,
    args=(*_INPUTS, *_outputs(_EXPANDED),
          Arg("paged_mqa_ctx_lens_2d", Role.OUT, ("bs", "draft_tokens"), INT32, "seq_len + draft_tokens in every column",
              ROWS_STRIDED, per_backend=True, optional="not wanted, for every backend alike", cells="written")),
    scalars=(*_SCALARS, Scalar("draft_tokens", "query tokens per request, at least 1")),
    variants=(TAIL, CU0),
    preconditions=_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=(*_FROZEN, "draft_tokens"),
    upstream_names=("fused_dsa_target_verify_metadata", "init_forward_metadata_replay_cuda_graph (TARGET_VERIFY)"),
)

def _negative_extend(case: DraftExtend) -> DraftExtend | None:
    """The first request has -2 new tokens; the buffers have room for the rows of the others."""
    if len(case.requests) < 2 or case.repeat > 1:
        return None
    first, *others = case.requests
    return replace(case, requests=(replace(first, extend_len=-2), *others), total_len=sum(r.extend_len for r in others),
                   row_spare=case.row_spare + 2, static=False)


DRAFT_EXTEND_METADATA = Contract(
    name="draft_extend_metadata",
    family="metadata",
    doc="Metadata of a draft extend: ragged accept lengths, or one static length for all requests.",
    origin="SGLang #29499 fused_dsa_draft_extend_metadata; static width of #29413; clamp of #30378",
    case=DraftExtend,
    oracle=draft_extend_metadata,
    args=(_INPUTS[0], Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES,
                          cells="live, slack"),
          *_INPUTS[1:], *_outputs(_EXPANDED)),
    scalars=(
        *_SCALARS,
        Scalar("total_len", "sum of extend_seq_lens"),
        Scalar("max_extend_len", "at least the longest extend_seq_len"),
        Scalar("static_extend_len", "whether all extend_seq_lens are equal"),
    ),
    variants=(TAIL, CU0, CLAMP),
    preconditions=(
        *_PRECONDITIONS,
        Precondition("max_extend_len covers every request", "max(extend_seq_lens) <= max_extend_len",
                     "fused_dsa_draft_extend_metadata: 'caller-owned graph metadata guarantees'",
                     lambda c: replace(c, extend_extra=-1) if c.max_extend_len() >= 2 else None),
        Precondition("total_len is the sum", "total_len == sum(extend_seq_lens)",
                     "fused_dsa_draft_extend_metadata: rows past total_len are masked",
                     lambda c: replace(c, total_len=c.rows() - 1, spare=0, row_spare=-1) if c.rows() >= 2 else None),
        Precondition("extends are not negative", "extend_seq_lens >= 0", "a request has no -1 query tokens", _negative_extend),
    ),
    capturable=True,
    frozen_by_capture=(*_FROZEN, "total_len", "max_extend_len"),
    upstream_names=("fused_dsa_draft_extend_metadata", "init_forward_metadata_replay_cuda_graph (DRAFT_EXTEND)"),
)

CONTRACTS = (DECODE_METADATA, TARGET_VERIFY_METADATA, DRAFT_EXTEND_METADATA)
