"""KV indices: which KV slots, or pages of them, each request or draft branch attends to.

| transform                        | fills                | from                                                     |
| -------------------------------- | -------------------- | -------------------------------------------------------- |
| create_flashinfer_kv_indices     | kv_indices (ragged)  | table rows, lengths, starts, kv_indptr                   |
| create_flashmla_kv_indices       | kv_indices (a table) | table rows, lengths, starts, page_size                   |
| generate_draft_decode_kv_indices | kv_indices, kv_indptr | table rows, lengths, positions; all draft steps at once |
| draft_decode_slices              | (returns sizes)      | lengths, their sum, top-k, steps, the width of a row     |

A *branch* is one of the `topk` continuations that tree drafting follows for a request; branch k of request b has number
`b * topk + k`. Draft step i sees `i + 1` draft tokens of its branch behind the request's own tokens. Everything not named
stays as it was. Sizes that only the device knows are "0" in a shape; a precondition states what they must hold.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from harness.contract import (ANY_STRIDES, INT, INT32, ROWS_STRIDED, UNIT_STRIDE, Arg, Case, Contract, Kind, Precondition,
                              Role, Scalar, beyond)
from harness.hashing import kv_slots
from harness.tensors import Input, Output, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")


@dataclass(frozen=True)
class Req:
    """`length` tokens from column `start` of row `slot`; in the ragged output behind `gap` cells of nobody."""

    slot: int
    length: int
    start: int = 0
    gap: int = 0


@dataclass(frozen=True, repr=False)
class _Pool(Case):
    """What the transforms that read a request table share.

    repeat       how many times over the batch holds `requests`
    slots        rows of req_to_token;   table_extra  its columns beyond those that the batch needs
    spare        unused capacity behind every vector of the batch
    aligned      whether the tokens of a page are contiguous in it;   shared  whether all requests share their slots
    content      which table contents
    """

    requests: tuple[Req, ...]
    repeat: int = 1
    page_size: int = 1
    slots: int = 4
    table_extra: int = 0
    spare: int = 0
    aligned: bool = True
    shared: bool = False
    content: int = 0

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def batch_size(self) -> int:
        return len(self.batch)

    def reach(self, r: Req) -> int:
        """The first column of a request's row that it does not need."""
        return r.start + max(r.length, 0)

    def columns(self) -> int:
        """The columns that the batch needs."""
        return max([0, *(self.reach(r) for r in self.batch)])

    def req_to_token(self) -> Input:
        """The rows that the batch's requests own, live up to their last token; every other row is forbidden."""
        width = self.columns() + self.table_extra
        live: dict[int, int] = {}
        for r in self.batch:
            if 0 <= r.slot < self.slots:
                live[r.slot] = max(live.get(r.slot, 0), min(self.reach(r), width))
        rows = {s: kv_slots(self.content, 0 if self.shared else s + 1, n, self.page_size, self.aligned)
                for s, n in live.items()}
        return table((self.slots, width), rows)

    def of_batch(self) -> dict:
        """The arguments that say which requests there are."""
        return {
            "req_to_token": self.req_to_token(),
            "req_pool_indices": vector([r.slot for r in self.batch], self.spare),
            "paged_kernel_lens": vector([r.length for r in self.batch], self.spare),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "req_to_token":
            return f"slot {index[0]}"
        return f"request {index[0]}" if index[0] < len(self.batch) else f"it is past the batch's {len(self.batch)} requests"


# -- create_flashinfer_kv_indices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FlashinferKvIndices(_Pool):
    """`starts`: whether kv_start_idx is given; without it every request starts at column 0. `tail`: cells of kv_indices
    behind the last range."""

    starts: bool = False
    tail: int = 0

    def reach(self, r: Req) -> int:
        return (r.start if self.starts else 0) + max(r.length, 0)

    def firsts(self) -> list[int]:
        """Where each request's range starts, and where the last one ends."""
        firsts, end = [], 0
        for r in self.batch:
            firsts.append(end + r.gap)
            end = firsts[-1] + max(r.length, 0)
        return [*firsts, end]

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch)}

    def arguments(self) -> dict:
        firsts = self.firsts()
        return {
            **self.of_batch(),
            "kv_indptr": vector(firsts, self.spare),
            "kv_start_idx": vector([r.start for r in self.batch], self.spare) if self.starts else None,
            "kv_indices": Output((max(firsts[-1] + self.tail, 0),)),
            "bs": len(self.batch),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "kv_indices":
            return super().meaning(name, index)
        for i, (r, first) in enumerate(zip(self.batch, self.firsts())):
            if first <= index[0] < first + r.length:
                return f"token {index[0] - first} of request {i} (slot {r.slot}, start {r.start if self.starts else 0})"
        return "it belongs to no request"


def create_flashinfer_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                                 bs, variant):
    """The slots of each request's tokens, one request after the other where kv_indptr says.

    >>> from harness.states import Cells
    >>> R = table((2, 4), {0: [7, 8], 1: [4, 5, 9]}).view()
    >>> out = Cells((6,))
    >>> create_flashinfer_kv_indices(req_to_token=R, req_pool_indices=[1, 0], paged_kernel_lens=[2, 2], kv_indptr=[0, 3, 5],
    ...                              kv_start_idx=[1, 0], kv_indices=out, bs=2, variant={})
    >>> out
    Cells([5 9 . 7 8 .])
    """
    for i in range(bs):
        start = 0 if kv_start_idx is None else kv_start_idx[i]
        first, length = kv_indptr[i], paged_kernel_lens[i]
        kv_indices[first : first + length] = req_to_token[req_pool_indices[i], start : start + length]


# -- create_flashmla_kv_indices -----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FlashmlaKvIndices(_Pool):
    """`starts` as for FlashinferKvIndices; `row_extra`: columns of kv_indices beyond the longest request's pages, and
    `row_spare`: rows beyond the batch."""

    starts: bool = False
    row_extra: int = 0
    row_spare: int = 0

    def reach(self, r: Req) -> int:
        return (r.start if self.starts else 0) + max(r.length, 0)

    def pages(self) -> int:
        return max([-(-r.length // self.page_size) for r in self.batch], default=0)

    def row_width(self) -> int:
        return max(self.pages() + self.row_extra, 0)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch)}

    def arguments(self) -> dict:
        return {
            **self.of_batch(),
            "kv_start_idx": vector([r.start for r in self.batch], self.spare) if self.starts else None,
            "kv_indices": Output((len(self.batch) + self.row_spare, self.row_width())),
            "bs": len(self.batch),
            "page_size": self.page_size,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "kv_indices" or index[0] >= len(self.batch):
            return super().meaning(name, index)
        r = self.batch[index[0]]
        pages = -(-r.length // self.page_size)
        where = f"request {index[0]} (slot {r.slot}, length {r.length})"
        return f"page {index[1]} of {where}" if index[1] < pages else f"it is past the {pages} pages of {where}"


def create_flashmla_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, kv_indices, bs, page_size,
                               variant):
    """The page of every `page_size`-th token. The rest of the row stays; a page that the row has no room for is dropped.

    >>> from harness.states import Cells
    >>> R = table((2, 5), {0: [8, 9], 1: [4, 5, 12, 13, 2]}).view()
    >>> out = Cells((2, 4))
    >>> create_flashmla_kv_indices(req_to_token=R, req_pool_indices=[1, 0], paged_kernel_lens=[5, 1], kv_start_idx=None,
    ...                            kv_indices=out, bs=2, page_size=2, variant={})
    >>> out
    Cells([2 6 1 .]
          [4 . . .])

    A start that is not the first token of a page counts its pages from there:

    >>> out = Cells((1, 3))
    >>> create_flashmla_kv_indices(req_to_token=R, req_pool_indices=[1], paged_kernel_lens=[4], kv_start_idx=[1],
    ...                            kv_indices=out, bs=1, page_size=2, variant={})
    >>> out
    Cells([2 6 .])
    """
    width = kv_indices.shape[1]
    for i in range(bs):
        start = 0 if kv_start_idx is None else kv_start_idx[i]
        tokens = req_to_token[req_pool_indices[i], start : start + paged_kernel_lens[i] : page_size]
        fitting = tokens[:width] // page_size
        kv_indices[i, 0 : len(fitting)] = fitting


# -- generate_draft_decode_kv_indices -----------------------------------------------------------------------------------


def branch_start(length: int, branch: int, num_steps: int, topk: int, page_size: int) -> int:
    """The column of the request's row where the draft tokens of a branch start.

    Without pages or without branches they lie behind one another. Otherwise every branch has whole pages of its own, and the
    first of them repeats the request's last, partly filled page (here 1 of 4 tokens, so 2 pages for 5 steps):

    >>> [branch_start(9, k, num_steps=5, topk=3, page_size=1) for k in range(3)]
    [9, 14, 19]
    >>> [branch_start(9, k, num_steps=5, topk=3, page_size=4) for k in range(3)]
    [9, 17, 25]
    """
    if page_size == 1 or topk == 1:
        return length + branch * num_steps
    partial = length % page_size
    pages = -(-(partial + num_steps) // page_size)
    return (length - partial) + branch * pages * page_size + partial


@dataclass(frozen=True, repr=False)
class DraftDecode(_Pool):
    """`num_steps` draft steps of `topk` branches. `row_extra`: columns of kv_indices beyond what the last step needs;
    `row_spare`: rows and indptr columns beyond the batch; `unset_positions`: trailing requests whose positions are 0."""

    topk: int = 1
    num_steps: int = 2
    row_extra: int = 0
    row_spare: int = 0
    unset_positions: int = 0

    def branches(self) -> int:
        return len(self.batch) * self.topk

    def reach(self, r: Req) -> int:
        last = branch_start(r.length, self.topk - 1, self.num_steps, self.topk, self.page_size)
        return last + self.num_steps

    def needed(self) -> int:
        """Entries of the last step."""
        return self.topk * sum(r.length for r in self.batch) + self.branches() * self.num_steps

    def positions(self) -> list[int]:
        known = len(self.batch) - self.unset_positions
        return [r.length if i < known else 0 for i, r in enumerate(self.batch) for _ in range(self.topk)]

    def dims(self) -> dict[str, int]:
        return {"num_seqs": len(self.batch), "branches": self.branches(), "steps": self.num_steps,
                "drafts": self.branches() * self.num_steps}

    def arguments(self) -> dict:
        width = max(self.needed() + self.row_extra, self.branches() * self.num_steps)
        return {
            **self.of_batch(),
            "positions": vector(self.positions(), self.spare),
            "kv_indices": Output((self.num_steps + self.row_spare, width)),
            "kv_indptr": Output((self.num_steps + self.row_spare, self.branches() + 1 + self.row_spare)),
            "num_seqs": len(self.batch),
            "topk": self.topk,
            "num_steps": self.num_steps,
            "page_size": self.page_size,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name not in ("kv_indices", "kv_indptr"):
            return super().meaning(name, index)
        if index[0] >= self.num_steps:
            return f"it is past the {self.num_steps} draft steps"
        if name == "kv_indptr":
            if index[1] == 0:
                return "where the first branch starts, which nobody writes"
            past = f"it is past the {self.branches()} branches"
            return f"where branch {index[1] - 1} ends" if index[1] <= self.branches() else past
        at = index[1]
        for z in range(self.branches()):
            i, k = divmod(z, self.topk)
            length = self.batch[i].length
            if at < length:
                return f"token {at} of request {i} (slot {self.batch[i].slot}), branch {k}"
            if at < length + index[0] + 1:
                return f"draft token {at - length} of request {i} (slot {self.batch[i].slot}), branch {k}"
            at -= length + index[0] + 1
        return f"it is past the {self.branches()} branches"


def generate_draft_decode_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr,
                                     num_seqs, topk, num_steps, page_size, variant):
    """For every draft step and branch: the request's slots, then those of the branch's draft tokens up to this step.

    kv_indptr says where each branch ends; where the first one starts, index 0, is nobody's to write. A slot that the row of
    kv_indices has no room for is dropped. kv_indptr counts positions, kv_indices lengths: the draft runner pads lengths with
    1 and positions with 0, and from the first padded request on the two disagree.

    >>> from harness.states import Cells
    >>> R = table((2, 6), {0: [70, 71, 72, 73, 74], 1: [40, 41, 42, 43, 44, 45]}).view()
    >>> out, indptr = Cells((2, 15)), Cells((2, 5))
    >>> generate_draft_decode_kv_indices(req_to_token=R, req_pool_indices=[1, 0], paged_kernel_lens=[2, 1],
    ...                                  positions=[2, 2, 1, 1], kv_indices=out, kv_indptr=indptr, num_seqs=2, topk=2,
    ...                                  num_steps=2, page_size=1, variant={})
    >>> out
    Cells([40 41 42 40 41 44 70 71 70 73 . . . . .]
          [40 41 42 43 40 41 44 45 70 71 72 70 73 74 .])
    >>> indptr
    Cells([. 3 6 8 10]
          [. 4 8 11 14])
    """
    width = kv_indices.shape[1]
    for step in range(num_steps):
        drafted = step + 1
        first = end = 0
        for z in range(num_seqs * topk):
            b, k = divmod(z, topk)
            slot, length = req_pool_indices[b], paged_kernel_lens[b]
            start = branch_start(length, k, num_steps, topk, page_size)
            slots = [*req_to_token[slot, 0:length], *req_to_token[slot, start : start + drafted]]
            fitting = slots[: max(width - first, 0)]
            kv_indices[step, first : first + len(fitting)] = fitting
            first += len(slots)
            end += positions[z] + drafted
            kv_indptr[step, z + 1] = end


# -- draft_decode_slices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class DraftDecodeSlices(Case):
    """`lengths` of the batch's real requests, `padded` requests of length 1 behind them; rows of kv_indices hold `row_extra`
    entries more than the batch needs. `forget_padding`: the sum leaves the padded requests out."""

    lengths: tuple[int, ...]
    padded: int = 0
    topk: int = 1
    num_steps: int = 2
    row_extra: int = 0
    forget_padding: bool = False

    def batch_size(self) -> int:
        return len(self.lengths) + self.padded

    def needed(self) -> int:
        return self.topk * (sum(self.lengths) + self.padded) + self.batch_size() * self.topk * self.num_steps

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        return {
            "seq_lens": [*self.lengths, *[1] * self.padded],
            "seq_lens_sum": sum(self.lengths) + (0 if self.forget_padding else self.padded),
            "topk": self.topk,
            "num_steps": self.num_steps,
            "row_width": max(self.needed() + self.row_extra, 0),
        }


def draft_decode_slices(*, seq_lens, seq_lens_sum, topk, num_steps, row_width, variant):
    """How much of kv_indptr's and kv_indices' row i the sub-backend of draft step i is given: `[entries, entries]` each.

    There is one sub-backend less than steps. Padded requests count, since the kernel fills entries for them too.

    >>> sizes = dict(topk=2, num_steps=3, row_width=28, variant={})
    >>> draft_decode_slices(seq_lens=[5, 2, 1], seq_lens_sum=8, **{**sizes, "row_width": 34})
    [[7, 22], [7, 28]]
    >>> draft_decode_slices(seq_lens=[5, 2], seq_lens_sum=7, **sizes)
    [[5, 18], [5, 22]]
    """
    slices = []
    for step in range(num_steps - 1):
        entries = 0
        for length in seq_lens:
            for _ in range(topk):
                entries += length + step + 1
        slices.append([len(seq_lens) * topk + 1, entries])
    return slices


# -- contracts ----------------------------------------------------------------------------------------------------------


def first_request(case, **changes):
    """The case with its first request changed, or None where there is none."""
    return replace(case, requests=(replace(case.requests[0], **changes), *case.requests[1:])) if case.requests else None


def _too_narrow(case):
    """A request table that ends in the middle of its longest row, or one token short of it."""
    return tuple(replace(c, table_extra=-n) for c in (case, *at_the_end(case)) if c.columns() >= 2
                 for n in {1, c.columns() // 2})


def at_the_end(case):
    """The longest request alone, in the last row of the table, behind which there is nothing."""
    longest = max(case.requests, key=case.reach, default=None)
    return (replace(case, requests=(replace(longest, slot=case.slots - 1),), repeat=1),) if longest else ()


def _negative(case):
    return first_request(case, length=-5)


def _in_front(case):
    """The longest request alone, one column in front of the table's first row, where there is nothing."""
    longest = max(case.requests, key=lambda r: r.length)
    return (replace(case, requests=(replace(longest, slot=0, start=-1),), repeat=1),) if longest.length > 0 else ()


_STARTS = Precondition("starts are not negative", "kv_start_idx >= 0", "unchecked",
                       lambda c: (first_request(c, start=-2), *_in_front(c)) if c.starts and c.requests else None)


def slots_exist(source: str) -> Precondition:
    return Precondition("slots exist", "0 <= req_pool_indices < req_to_token.shape[0]", source,
                        lambda c: tuple(first_request(c, slot=s) for s in beyond(c.slots) if c.requests))


TABLE = Arg("req_to_token", Role.IN, ("1", "0"), INT32, "KV slot of every token of every request", ROWS_STRIDED,
            cells="live, slack, forbidden")
POOL = Arg("req_pool_indices", Role.IN, ("bs",), INT, "row of req_to_token that each request owns", ANY_STRIDES,
           cells="live, slack")
LENS = Arg("paged_kernel_lens", Role.IN, ("bs",), INT, "tokens of each request", ANY_STRIDES, cells="live, slack")
STARTS = Arg("kv_start_idx", Role.IN, ("bs",), INT, "first column of each request", ANY_STRIDES,
             optional="every request starts at column 0", cells="live, slack")

CREATE_FLASHINFER_KV_INDICES = Contract(
    name="create_flashinfer_kv_indices",
    family="kv_indices",
    doc="KV slots of every request's tokens in one ragged list.",
    origin="SGLang create_flashinfer_kv_indices_triton",
    case=FlashinferKvIndices,
    oracle=create_flashinfer_kv_indices,
    args=(
        TABLE, POOL, LENS,
        Arg("kv_indptr", Role.IN, ("bs + 1",), INT, "where each request's range starts, and the end", ANY_STRIDES,
            cells="live, slack"),
        STARTS,
        Arg("kv_indices", Role.OUT, ("0",), INT, "KV slots", UNIT_STRIDE, cells="written, untouched"),
    ),
    scalars=(Scalar("bs", "requests in the batch"),),
    preconditions=(
        slots_exist("create_flashinfer_kv_indices_triton: unchecked"),
        Precondition("the tokens are in the table", "start + length <= req_to_token.shape[1]",
                     "create_flashinfer_kv_indices_triton: only the length bounds the load", _too_narrow),
        Precondition("kv_indices holds every range", "0 <= kv_indptr[i], kv_indptr[i] + length <= len(kv_indices)",
                     "create_flashinfer_kv_indices_triton: the store has no bound (SGLang #24587, #27485)",
                     lambda c: (replace(c, tail=-1), first_request(c, gap=-2)) if c.batch and c.batch[-1].length > 0 else None),
        _STARTS,
        Precondition("lengths are not negative", "paged_kernel_lens >= 0", "unchecked", _negative),
        Precondition("ranges do not overlap", "no cell of kv_indices belongs to two requests: programs have no order",
                     "kv_indptr is a prefix sum of the lengths"),
    ),
    capturable=True,
    frozen_by_capture=("bs",),
    upstream_names=("create_flashinfer_kv_indices_triton",),
)

CREATE_FLASHMLA_KV_INDICES = Contract(
    name="create_flashmla_kv_indices",
    family="kv_indices",
    doc="Page numbers of every request in a block table.",
    origin="SGLang create_flashmla_kv_indices_triton; parallel over page blocks since #27320",
    case=FlashmlaKvIndices,
    oracle=create_flashmla_kv_indices,
    args=(
        TABLE, POOL, LENS, STARTS,
        Arg("kv_indices", Role.OUT, ("bs", "0"), INT32, "pages of each request", FAR_ROWS, cells="written, untouched"),
    ),
    scalars=(Scalar("bs", "requests in the batch"), Scalar("page_size", "tokens per page: a power of two up to 4096")),
    preconditions=(
        slots_exist("create_flashmla_kv_indices_triton: unchecked"),
        Precondition("the tokens are in the table", "start + length <= req_to_token.shape[1]",
                     "create_flashmla_kv_indices_triton: only the length bounds the load", _too_narrow),
        Precondition("rows hold every page", "ceil(length / page_size) <= kv_indices.shape[1]",
                     "create_flashmla_kv_indices_triton: the store has no bound; #27320 drops whole blocks past the row",
                     lambda c: replace(c, row_extra=-1) if c.pages() else None),
        _STARTS,
        Precondition("lengths are not negative", "paged_kernel_lens >= 0", "unchecked", _negative),
    ),
    capturable=True,
    frozen_by_capture=("bs", "page_size"),
    upstream_names=("create_flashmla_kv_indices_triton",),
)

GENERATE_DRAFT_DECODE_KV_INDICES = Contract(
    name="generate_draft_decode_kv_indices",
    family="kv_indices",
    doc="KV slots that every branch attends to, for every step of a multi-step draft.",
    origin="SGLang generate_draft_decode_kv_indices; row width fixed by #27338 and #27460, asserted since #27475",
    case=DraftDecode,
    oracle=generate_draft_decode_kv_indices,
    args=(
        TABLE, replace(POOL, shape=("num_seqs",)), replace(LENS, shape=("num_seqs",)),
        Arg("positions", Role.IN, ("branches",), INT, "position of every branch: its request's length", ANY_STRIDES,
            cells="live, slack"),
        Arg("kv_indices", Role.OUT, ("steps", "drafts"), INT, "KV slots, one row per draft step", FAR_ROWS,
            cells="written, untouched"),
        Arg("kv_indptr", Role.OUT, ("steps", "branches + 1"), INT32, "where each branch ends; index 0 is not written",
            ROWS_STRIDED, cells="written, untouched"),
    ),
    scalars=(
        Scalar("num_seqs", "requests in the (padded) batch"),
        Scalar("topk", "branches per request"),
        Scalar("num_steps", "draft steps, the last one included although no sub-backend uses it"),
        Scalar("page_size", "tokens per page: with more than 1, branches of a request have pages of their own"),
    ),
    preconditions=(
        slots_exist("generate_draft_decode_kv_indices: unchecked"),
        Precondition("the draft tokens are in the table", "the last branch's last draft token < req_to_token.shape[1]",
                     "generate_draft_decode_kv_indices: only the length bounds the load", _too_narrow),
        Precondition("rows hold every branch", "topk * sum(lengths) + branches * num_steps <= kv_indices.shape[1]",
                     "SGLang #27338, #27460: the top-k factor was missing; #27475 asserts it on the host",
                     lambda c: tuple(replace(c, row_extra=-n) for n in {1, sum(r.length for r in c.batch)})
                     if any(r.length for r in c.batch) else None),
        Precondition("lengths are not negative", "paged_kernel_lens >= 0", "unchecked", _negative),
        Precondition("the total fits int32", "entries of a step < 2**31", "kv_indptr is int32"),
    ),
    capturable=True,
    frozen_by_capture=("num_seqs", "topk", "num_steps", "page_size"),
    upstream_names=("generate_draft_decode_kv_indices",),
)

DRAFT_DECODE_SLICES = Contract(
    name="draft_decode_slices",
    family="kv_indices",
    doc="The part of each step's kv_indptr and kv_indices that its draft backend is given.",
    origin="SGLang common_template of the multi-step draft backends; #27475 checks the row",
    case=DraftDecodeSlices,
    oracle=draft_decode_slices,
    kind=Kind.HOST,
    scalars=(
        Scalar("seq_lens", "list: tokens of every request, padded ones included"),
        Scalar("seq_lens_sum", "their sum"),
        Scalar("topk", "branches per request"),
        Scalar("num_steps", "draft steps, at least 1; there are num_steps - 1 sub-backends"),
        Scalar("row_width", "entries that a row of kv_indices has"),
    ),
    preconditions=(
        Precondition("rows hold every branch", "topk * sum(seq_lens) + branches * num_steps <= row_width",
                     "SGLang #27338, #27460; asserted since #27475",
                     lambda c: replace(c, row_extra=-(c.needed() // 2)) if c.needed() and c.num_steps > 1 else None),
        Precondition("the sum counts every request", "seq_lens_sum == sum(seq_lens)",
                     "SGLang #26880: the host's sum leaves out requests that padding added",
                     lambda c: replace(c, forget_padding=True) if c.padded and c.num_steps > 1 else None),
    ),
    upstream_names=("common_template", "draft_kv_indices_used_len"),
)

CONTRACTS = (CREATE_FLASHINFER_KV_INDICES, CREATE_FLASHMLA_KV_INDICES, GENERATE_DRAFT_DECODE_KV_INDICES, DRAFT_DECODE_SLICES)
