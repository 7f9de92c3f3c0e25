"""Copying one precomputed batch into the persistent metadata buffers of draft backends.

A multi-step draft computes the metadata of a batch once and hands it to the backend of every step. Per destination:

| destination            | cells written              | from (source of the same cells) | modes         |
| ---------------------- | -------------------------- | ------------------------------- | ------------- |
| cache_seqlens          | [0, bs)                    | cache_seqlens                   | all           |
| cu_seqlens_k           | [1, bs + 1)                | cu_seqlens_k                    | all           |
| page_table_1           | rows x width               | page_indices                    | all           |
| seqlens_expanded       | [0, n)                     | seqlens_expanded                | verify, extend |
| nsa_cache_seqlens      | [0, n)                     | nsa_cache_seqlens               | all           |
| nsa_cu_seqlens_k       | [1, n + 1)                 | nsa_cu_seqlens_k                | all           |
| real_page_table        | rows x the source's width  | real_page_table, if there is one | all          |
| flashmla_num_splits    | [0, n + 1)                 | flashmla_num_splits, if any     | all           |
| flashmla_metadata      | all of the source          | flashmla_metadata, if any       | all           |

In decode a row is a request: n and rows are bs, and the width is max_len. In target verify and draft extend a row is a
query token: n is seqlens_expanded_size, the rows are those of page_indices, and the width is max_seqlen_k.

Index 0 of both prefix sums holds the zero of the capture, and no copy writes it. Everything not named stays as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import ANY_STRIDES, INT32, ROWS_STRIDED, Arg, Case, Contract, Precondition, Role, Scalar
from harness.tensors import Output, table, vector

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2  # SGLang's numbers in the kernel's interface
FAR_ROWS = (*ROWS_STRIDED, "far")
PLAN_COLUMNS = 8  # int32 cells that FlashMLA keeps per streaming-multiprocessor part


# -- cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """The buffers of one backend: columns of page_table_1 and pages of real_page_table beyond the copied ones, and
    whether it has a real page table and FlashMLA buffers at all."""

    columns: int = 0
    pages: int = 0
    real: bool = True
    flashmla: bool = True


@dataclass(frozen=True, repr=False)
class _Copy(Case):
    """What both transforms share. All contents are arbitrary int32 numbers: a copy has no business with what they mean.

    requests     query tokens of each request; their sum is seqlens_expanded_size, also in decode, which has no use for it
    repeat       how many times over the batch holds `requests`
    width        columns of page_indices that are copied
    page_size    tokens per page; there is a real page table for more than 1
    num_splits   whether there are FlashMLA split counts;   parts  rows of FlashMLA metadata, 0 for none
    more_rows    rows of the source's tables beyond n: verify and extend go by the table and copy them, decode does not
    more_columns columns of page_indices beyond the width
    spare        capacity of every tensor beyond what is copied;   row_spare  on top of it, of everything that has n or rows
    content      which contents
    """

    requests: tuple[int, ...]
    repeat: int = 1
    width: int = 1
    page_size: int = 1
    num_splits: bool = False
    parts: int = 0
    more_rows: int = 0
    more_columns: int = 0
    spare: int = 0
    row_spare: int = 0
    content: int = 0

    @cached_property
    def batch(self) -> tuple[int, ...]:
        return self.requests * self.repeat

    @property
    def mode(self) -> int:
        return DECODE

    def buffers(self) -> tuple[Backend, ...]:
        raise NotImplementedError

    def batch_size(self) -> int:
        return len(self.batch)

    def size(self) -> int:
        return sum(self.batch)

    def n(self) -> int:
        return len(self.batch) if self.mode == DECODE else self.size()

    def rows(self) -> int:
        return self.n() if self.mode == DECODE else self.n() + self.more_rows

    def pages(self) -> int:
        return -(-self.width // self.page_size)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "n": self.n(), "rows": self.rows(), "width": self.width, "pages": self.pages(),
                "parts": self.parts, "plan": PLAN_COLUMNS}

    def numbers(self, name: str, columns: int, rows: int = 1) -> np.ndarray:
        """Cells of any int32 value, (rows, columns); a cell depends on its place alone, so more is an extension of less."""
        place = (np.arange(rows)[:, None] << 32) + np.arange(columns)
        return hashing.cells(self.content, name, place).astype(np.uint32).view(np.int32).astype(np.int64)

    def _vector(self, name: str, count: int):
        return vector(self.numbers(name, count)[0], self.spare)

    def _table(self, name: str, rows: int, height: int, columns: int, width: int):
        """`rows` of `height` rows are live over `columns` of `width` columns."""
        return table((height, width), dict(enumerate(self.numbers(name, min(columns, width), min(rows, height)))))

    @cached_property
    def sources(self) -> dict:
        bs, n, rows = len(self.batch), self.n(), self.rows()
        height = n + self.more_rows
        plan = self._table("flashmla_metadata", self.parts, self.parts, PLAN_COLUMNS, PLAN_COLUMNS)
        return {
            "cache_seqlens_src": self._vector("cache_seqlens", bs),
            "cu_seqlens_k_src": self._vector("cu_seqlens_k", bs + 1),
            "page_indices_src": self._table("page_indices", rows, height, self.width, self.width + self.more_columns),
            "nsa_cache_seqlens_src": self._vector("nsa_cache_seqlens", n),
            "nsa_cu_seqlens_k_src": self._vector("nsa_cu_seqlens_k", n + 1),
            "real_page_table_src":
                self._table("real_page_table", rows, height, self.pages(), self.pages()) if self.page_size > 1 else None,
            "flashmla_num_splits_src": self._vector("flashmla_num_splits", n + 1) if self.num_splits else None,
            "flashmla_metadata_src": plan if self.parts else None,
        }

    def destinations(self, backend: Backend) -> dict[str, Output | None]:
        bs, spare = len(self.batch), self.spare
        n, rows = self.n() + self.row_spare + spare, self.rows() + self.row_spare + spare
        return {
            "cache_seqlens_dst": Output((bs + spare,)),
            "cu_seqlens_k_dst": Output((bs + 1 + spare,)),
            "page_table_1_dst": Output((rows, self.width + backend.columns)),
            "nsa_cache_seqlens_dst": Output((n,)),
            "nsa_cu_seqlens_k_dst": Output((n + 1,)),
            "real_page_table_dst":
                Output((rows, self.pages() + backend.pages)) if self.page_size > 1 and backend.real else None,
            "flashmla_num_splits_dst": Output((n + 1,)) if self.num_splits and backend.flashmla else None,
            "flashmla_metadata_dst": Output((self.parts + spare, PLAN_COLUMNS)) if self.parts and backend.flashmla else None,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        base = name.split("[")[0].removesuffix("_src").removesuffix("_dst")
        if base == "flashmla_metadata":
            return f"part {index[0]}" if index[0] < self.parts else f"it is past the {self.parts} parts"
        if base in ("cu_seqlens_k", "nsa_cu_seqlens_k") and index[0] == 0:
            return "index 0 keeps the zero of the capture"
        if base in ("cache_seqlens", "cu_seqlens_k"):
            request = index[0] - (base == "cu_seqlens_k")
            return f"request {request}" if request < len(self.batch) else f"it is past the batch's {len(self.batch)} requests"
        if len(index) == 1:
            row = index[0] - (base == "nsa_cu_seqlens_k")
            last = self.n() + (base == "flashmla_num_splits")
            if base == "seqlens_expanded" and self.mode == DECODE:
                return "decode has no expanded lengths of its own"
            return f"row {row}" if row < last else f"it is past the batch's {self.n()} rows"
        columns = self.pages() if base == "real_page_table" else self.width
        if index[0] >= self.rows():
            return f"it is past the batch's {self.rows()} rows"
        return f"row {index[0]}" if index[1] < columns else f"it is past the {columns} columns of the source"


@dataclass(frozen=True, repr=False)
class MetadataCopy(_Copy):
    """A copy into one backend. `other_width` is the width argument of the modes that are not in play; `expanded`:
    whether the expanded lengths are passed, which decode may do."""

    forward_mode: int = DECODE
    other_width: int = -1
    expanded: bool = True
    backend: Backend = Backend()

    @property
    def mode(self) -> int:
        return self.forward_mode

    def buffers(self) -> tuple[Backend, ...]:
        return (self.backend,)

    def arguments(self) -> dict:
        n = self.n()
        decode = self.mode == DECODE
        return {
            **self.sources,
            **self.destinations(self.backend),
            "seqlens_expanded_src": self._vector("seqlens_expanded", n) if self.expanded else None,
            "seqlens_expanded_dst": Output((n + self.row_spare + self.spare,)) if self.expanded else None,
            "forward_mode": self.mode,
            "bs": len(self.batch),
            "max_len": self.width if decode else self.other_width,
            "max_seqlen_k": self.other_width if decode else self.width,
            "seqlens_expanded_size": self.size(),
        }


@dataclass(frozen=True, repr=False)
class MetadataCopyMulti(_Copy):
    """A copy of a decode batch into several backends."""

    backends: tuple[Backend, ...] = (Backend(), Backend())

    def buffers(self) -> tuple[Backend, ...]:
        return self.backends

    def arguments(self) -> dict:
        each = [self.destinations(b) for b in self.backends]
        return {
            **self.sources,
            **{name: [buffers[name] for buffers in each] for name in self.destinations(Backend())},
            "bs": len(self.batch),
            "max_len": self.width,
            "seqlens_expanded_size": self.size(),
        }


# -- oracles ------------------------------------------------------------------------------------------------------------


def fused_metadata_copy(*, cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src,
                        seqlens_expanded_src, nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src,
                        flashmla_metadata_src, cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst,
                        seqlens_expanded_dst, nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst,
                        flashmla_metadata_dst, forward_mode, bs, max_len, max_seqlen_k, seqlens_expanded_size, variant):
    """One batch into one backend.

    A verify batch of one request with two rows, whose page table is two columns wide, into buffers with room for a second
    request and a third row:

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> pages = table((2, 2), {0: [40, 41], 1: [50, 51]}).view()
    >>> cache, cu, wide, nsa, full, nsa_cu = Cells((2,)), Cells((3,)), Cells((3, 3)), Cells((3,)), Cells((3,)), Cells((4,))
    >>> fused_metadata_copy(cache_seqlens_src=[9], cu_seqlens_k_src=[0, 9], page_indices_src=pages,
    ...                     nsa_cache_seqlens_src=[4, 4], seqlens_expanded_src=[8, 9], nsa_cu_seqlens_k_src=[0, 4, 8],
    ...                     real_page_table_src=None, flashmla_num_splits_src=None, flashmla_metadata_src=None,
    ...                     cache_seqlens_dst=cache, cu_seqlens_k_dst=cu, page_table_1_dst=wide, nsa_cache_seqlens_dst=nsa,
    ...                     seqlens_expanded_dst=full, nsa_cu_seqlens_k_dst=nsa_cu, real_page_table_dst=None,
    ...                     flashmla_num_splits_dst=None, flashmla_metadata_dst=None, forward_mode=TARGET_VERIFY, bs=1,
    ...                     max_len=-1, max_seqlen_k=2, seqlens_expanded_size=2, variant={})
    >>> cache, cu, nsa, full, nsa_cu
    (Cells([9 .]), Cells([. 9 .]), Cells([4 4 .]), Cells([8 9 .]), Cells([. 4 8 .]))
    >>> wide
    Cells([40 41 .]
          [50 51 .]
          [. . .])
    """
    if forward_mode == DECODE:
        n, rows, width = bs, bs, max_len
    else:
        n, rows, width = seqlens_expanded_size, page_indices_src.shape[0], max_seqlen_k
    for i in range(bs):
        cache_seqlens_dst[i] = cache_seqlens_src[i]
        cu_seqlens_k_dst[i + 1] = cu_seqlens_k_src[i + 1]
    for row in range(n):
        nsa_cache_seqlens_dst[row] = nsa_cache_seqlens_src[row]
        nsa_cu_seqlens_k_dst[row + 1] = nsa_cu_seqlens_k_src[row + 1]
        if forward_mode != DECODE:
            seqlens_expanded_dst[row] = seqlens_expanded_src[row]
    for row in range(rows):
        page_table_1_dst[row, 0:width] = page_indices_src[row, 0:width]
    if real_page_table_src is not None:
        pages = real_page_table_src.shape[1]
        for row in range(rows):
            real_page_table_dst[row, 0:pages] = real_page_table_src[row, 0:pages]
    if flashmla_num_splits_src is not None:
        for i in range(n + 1):
            flashmla_num_splits_dst[i] = flashmla_num_splits_src[i]
    if flashmla_metadata_src is not None:
        parts, columns = flashmla_metadata_src.shape
        for part in range(parts):
            flashmla_metadata_dst[part, 0:columns] = flashmla_metadata_src[part, 0:columns]


def fused_metadata_copy_multi(*, cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src,
                              nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src,
                              cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst,
                              nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst, flashmla_metadata_dst, bs,
                              max_len, seqlens_expanded_size, variant):
    """A decode batch into every backend; a backend without a real page table or FlashMLA buffers goes without those.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> pages = table((1, 2), {0: [40, 41]}).view()
    >>> two = lambda *shape: [Cells(shape), Cells(shape)]
    >>> cache, cu, nsa, nsa_cu, wide = two(1), two(2), two(1), two(2), [Cells((1, 2)), Cells((2, 3))]
    >>> fused_metadata_copy_multi(cache_seqlens_src=[9], cu_seqlens_k_src=[0, 9], page_indices_src=pages,
    ...                           nsa_cache_seqlens_src=[4], nsa_cu_seqlens_k_src=[0, 4], real_page_table_src=None,
    ...                           flashmla_num_splits_src=None, flashmla_metadata_src=None, cache_seqlens_dst=cache,
    ...                           cu_seqlens_k_dst=cu, page_table_1_dst=wide, nsa_cache_seqlens_dst=nsa,
    ...                           nsa_cu_seqlens_k_dst=nsa_cu, real_page_table_dst=[None] * 2,
    ...                           flashmla_num_splits_dst=[None] * 2, flashmla_metadata_dst=[None] * 2, bs=1, max_len=2,
    ...                           seqlens_expanded_size=1, variant={})
    >>> cu
    [Cells([. 9]), Cells([. 9])]
    >>> wide
    [Cells([40 41]),
     Cells([40 41 .]
           [. . .])]
    """
    for b in range(len(cache_seqlens_dst)):
        for i in range(bs):
            cache_seqlens_dst[b][i] = cache_seqlens_src[i]
            cu_seqlens_k_dst[b][i + 1] = cu_seqlens_k_src[i + 1]
            nsa_cache_seqlens_dst[b][i] = nsa_cache_seqlens_src[i]
            nsa_cu_seqlens_k_dst[b][i + 1] = nsa_cu_seqlens_k_src[i + 1]
            page_table_1_dst[b][i, 0:max_len] = page_indices_src[i, 0:max_len]
            if real_page_table_dst[b] is not None:
                pages = real_page_table_src.shape[1]
                real_page_table_dst[b][i, 0:pages] = real_page_table_src[i, 0:pages]
        if flashmla_num_splits_dst[b] is not None:
            for i in range(bs + 1):
                flashmla_num_splits_dst[b][i] = flashmla_num_splits_src[i]
        if flashmla_metadata_dst[b] is not None:
            parts, columns = flashmla_metadata_src.shape
            for part in range(parts):
                flashmla_metadata_dst[b][part, 0:columns] = flashmla_metadata_src[part, 0:columns]


# -- contracts ----------------------------------------------------------------------------------------------------------

_REAL = "exactly when page_size is 1"
_FLASHMLA = "FlashMLA is not in use"


def _source(name: str, shape: tuple[str, ...], doc: str, layouts=ANY_STRIDES, cells="live, slack", **more) -> Arg:
    return Arg(f"{name}_src", Role.IN, shape, INT32, doc, layouts, cells=cells, **more)


def _sources(rows: str, sets_size: bool) -> tuple[Arg, ...]:
    """`rows` of the tables; with `sets_size` page_indices itself says how many there are."""
    return (
        _source("cache_seqlens", ("bs",), "keys per request"),
        _source("cu_seqlens_k", ("bs + 1",), "their prefix sums; index 0 is not used"),
        _source("page_indices", (rows, "width"), "KV slot of every token position", FAR_ROWS,
                "live, slack, forbidden", sets_size=sets_size),
        _source("nsa_cache_seqlens", ("n",), "keys per row, at most the top-k"),
        _source("nsa_cu_seqlens_k", ("n + 1",), "their prefix sums; index 0 is not used"),
        _source("real_page_table", (rows, "pages"), "page of every page position; its width is what is copied", FAR_ROWS,
                "live, forbidden", optional=_REAL, sets_size=True),
        _source("flashmla_num_splits", ("n + 1",), "first split of every row, and the total", optional=_FLASHMLA),
        _source("flashmla_metadata", ("parts", "plan"), "schedule of every part; its shape is what is copied", FAR_ROWS,
                "live", optional=f"{_FLASHMLA}, or only its split counts", sets_size=True),
    )


def _destinations(per_backend: bool) -> tuple[Arg, ...]:
    def out(name: str, shape: tuple[str, ...], doc: str, layouts=ROWS_STRIDED, **more) -> Arg:
        return Arg(f"{name}_dst", Role.OUT, shape, INT32, doc, layouts, per_backend=per_backend, cells="written, untouched",
                   **more)

    shared = ("cache_seqlens_src", "cache_seqlens_dst") if per_backend else ("cache_seqlens_src",)
    lacks = "; a backend may go without" if per_backend else ""
    return (
        out("cache_seqlens", ("bs",), "keys per request", may_alias=shared),
        out("cu_seqlens_k", ("bs + 1",), "prefix sums; index 0 stays"),
        out("page_table_1", ("rows", "width"), "KV slot of every token position", FAR_ROWS),
        out("nsa_cache_seqlens", ("n",), "keys per row, at most the top-k"),
        out("nsa_cu_seqlens_k", ("n + 1",), "prefix sums; index 0 stays"),
        out("real_page_table", ("rows", "pages"), "page of every page position", FAR_ROWS, optional=_REAL + lacks),
        out("flashmla_num_splits", ("n + 1",), "first split of every row, and the total", optional=_FLASHMLA + lacks),
        out("flashmla_metadata", ("parts", "plan"), "schedule of every part", FAR_ROWS, optional=_FLASHMLA + lacks),
    )


def _each_backend(case: _Copy, change: Callable[[Backend], Backend]) -> _Copy:
    if isinstance(case, MetadataCopy):
        return replace(case, backend=change(case.backend))
    return replace(case, backends=tuple(map(change, case.backends)))


def _narrow_source(case: _Copy) -> _Copy | None:
    return replace(case, more_columns=-(case.width - case.width // 2)) if case.width and case.rows() else None


def _narrow_destination(case: _Copy) -> _Copy | None:
    return _each_backend(case, lambda b: replace(b, columns=-1)) if case.width and case.rows() else None


def _low_destination(case: _Copy) -> _Copy | None:
    return replace(case, spare=0, row_spare=-1) if case.n() else None


def _no_destination(case: _Copy) -> _Copy | None:
    return _each_backend(case, lambda b: replace(b, real=False)) if case.page_size > 1 else None


def _plan_without_splits(case: _Copy) -> _Copy | None:
    return replace(case, num_splits=False) if case.parts else None


_PRECONDITIONS = (
    Precondition("page_indices is as wide as the copy", "page_indices_src.shape[1] >= the width",
                 "fused_metadata_copy.cuh: rows are cut out of the linear source by the width; unchecked", _narrow_source),
    Precondition("page_table_1 is as wide as the copy", "page_table_1_dst.shape[1] >= the width",
                 "fused_metadata_copy.cuh: unchecked, a row runs into the next", _narrow_destination),
    Precondition("destinations have the rows of the copy", "at least n cells and as many rows as are copied",
                 "fused_metadata_copy.cuh: unchecked", _low_destination),
    Precondition("a source has a destination", "an optional source comes with its destination, in one backend at least",
                 "fused_metadata_copy.cuh: tests only the source; a null destination is written to", _no_destination),
    Precondition("FlashMLA metadata comes with split counts", "flashmla_metadata_src needs flashmla_num_splits_src",
                 "fused_metadata_copy.cuh: goes by the split counts and drops the metadata without them",
                 _plan_without_splits),
)

FUSED_METADATA_COPY = Contract(
    name="fused_metadata_copy",
    family="metadata_copy",
    doc="The metadata of one batch into the buffers of one backend.",
    origin="SGLang #17554 fused_metadata_copy_cuda, and the single copies that it replaces",
    case=MetadataCopy,
    oracle=fused_metadata_copy,
    args=(
        *_sources("rows", True),
        _source("seqlens_expanded", ("n",), "keys per row, before the clip", optional="decode, which has no use for it"),
        *_destinations(per_backend=False),
        Arg("seqlens_expanded_dst", Role.OUT, ("n",), INT32, "keys per row, before the clip", ROWS_STRIDED,
            optional="decode, which has no use for it", cells="written, untouched"),
    ),
    scalars=(
        Scalar("forward_mode", "0 decode, 1 target verify, 2 draft extend"),
        Scalar("bs", "requests in the batch"),
        Scalar("max_len", "columns to copy in decode; any integer otherwise (target verify passes -1)"),
        Scalar("max_seqlen_k", "columns to copy in target verify and draft extend; any integer in decode"),
        Scalar("seqlens_expanded_size", "query tokens in the batch; decode goes by bs"),
    ),
    preconditions=(
        *_PRECONDITIONS,
        Precondition("verify and extend have expanded lengths", "seqlens_expanded_src and _dst are given in modes 1 and 2",
                     "fused_metadata_copy.cuh: unchecked, null is read and written",
                     lambda c: replace(c, expanded=False) if c.mode != DECODE and c.n() else None),
    ),
    capturable=True,
    frozen_by_capture=("forward_mode", "bs", "max_len", "max_seqlen_k", "seqlens_expanded_size"),
    upstream_names=("fused_metadata_copy_cuda", "init_forward_metadata_replay_cuda_graph_from_precomputed"),
)

FUSED_METADATA_COPY_MULTI = Contract(
    name="fused_metadata_copy_multi",
    family="metadata_copy",
    doc="The metadata of one decode batch into the buffers of several backends.",
    origin="SGLang #17554 fused_metadata_copy_multi_cuda, which takes exactly three backends",
    case=MetadataCopyMulti,
    oracle=fused_metadata_copy_multi,
    args=(*_sources("rows", False), *_destinations(per_backend=True)),
    scalars=(
        Scalar("bs", "requests in the batch"),
        Scalar("max_len", "columns to copy"),
        Scalar("seqlens_expanded_size", "query tokens in the batch; not used, decode goes by bs"),
    ),
    preconditions=_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=("bs", "max_len"),
    upstream_names=("fused_metadata_copy_multi_cuda",),
)

CONTRACTS = (FUSED_METADATA_COPY, FUSED_METADATA_COPY_MULTI)
