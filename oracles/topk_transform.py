"""Top-k: which keys a query token attends to, and where they lie in the KV cache.

| transform                          | fills               | from                                                   |
| ---------------------------------- | ------------------- | ------------------------------------------------------ |
| transform_index_page_table_decode  | result              | page_table (a row per token), topk_indices             |
| transform_index_page_table_prefill | result              | page_table (a row per request or token), topk_indices  |
| transform_index_ragged             | result              | topk_indices, topk_indices_offset                      |
| pad_topk_indices                   | result              | topk_indices, num_tokens                               |
| fast_topk                          | indices             | score, lengths, row_starts                             |
| fast_topk_transform_paged          | dst_page_table      | the same, page_table, cu_seqlens_q                     |
| fast_topk_transform_ragged         | topk_indices_ragged | the same, topk_indices_offset                          |
| topk_transform_v2                  | page_indices        | score, lengths, real_page_table                        |

A selection is a set: row b has n = lengths[b] keys (none if that is negative), in the score's columns from row_starts[b].
Up to `topk` keys are all taken, in their order, and -1 fills the row. Of more keys, any `topk` are right whose scores are
the largest, in any order, whichever of equal ones.

"Largest" leaves two freedoms, since there are two orders in use, and a selection is right if it is right in either:
by value  -0.0 equals +0.0, and every NaN is above +inf (torch.topk);
by bits   -0.0 is below +0.0, a NaN is above +inf, and one with the sign bit is below -inf (SGLang's radix kernels).
So a NaN without the sign bit is above +inf in any case, and infinities are ordinary scores.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import ANY_STRIDES, INT, INT32, ROWS_STRIDED, Arg, Case, Contract, Precondition, Role, Scalar
from harness.states import Judge
from harness.tensors import Input, Output, Region, runs, table, vector

TABLE_ROWS = (*ROWS_STRIDED, "far", "expanded")
SCORE_ROWS = ("contiguous", "offset", "pitched", "far")
PRIME = 0x9E3779B1  # p * PRIME modulo m is different for every p < m


# -- contents -----------------------------------------------------------------------------------------------------------


def slots(content: int, owner: str, count: int, below: int = 2**31) -> np.ndarray:
    """The KV slots (or pages) of an owner's first `count` tokens: no order in them, and none twice."""
    start = int(hashing.cells(content, f"slots of {owner}", np.zeros(1))[0] >> np.uint64(33))
    return (np.arange(count) * PRIME + start) % below


def chosen(kind: str, seed: int, keys: int, topk: int, negatives: tuple[int, ...]) -> np.ndarray:
    """A row of `topk` indices below `keys`, or negative.

    selected  min(keys, topk) of them, then -1      identity  0, 1, 2..., then -1
    holes     a quarter of them negative            ends      first and last key in turn
    none      nothing but -1
    """
    place = np.arange(topk)
    raw = hashing.cells(seed, f"indices {kind}", place)
    if kind == "none" or keys == 0:
        return np.full(topk, -1)
    picked = {"identity": place, "ends": np.where(place % 2 == 0, keys - 1, 0)}.get(kind)
    if picked is None:
        picked = ((raw >> np.uint64(8)) % np.uint64(keys)).astype(np.int64)
    hidden = raw % np.uint64(4) == 0 if kind == "holes" else place >= keys
    return np.where(hidden, np.array(negatives)[(raw >> np.uint64(2)).astype(np.int64) % len(negatives)], picked)


EXTREMES = (np.inf, -np.inf, 65504.0, 65505.0, 65520.0, 1e5, float(np.finfo(np.float32).max), 2.0**-149, -1e5, 0.0, -0.0, 1.0)
CHOICES = {
    "ties": (0.0, 1.0, 2.0), "equal": (0.25,), "zeros": (0.0, -0.0), "extremes": EXTREMES, "minus_inf": (-np.inf,),
    "nan": (np.nan,), "some_nan": (np.nan, np.inf, 1.0, 2.0, -np.inf, -1.0),
    "nan_signs": (np.nan, np.copysign(np.nan, -1.0), 0.0, 1.0, -np.inf),
}


def scores(kind: str, seed: int, count: int) -> np.ndarray:
    """`count` scores, every one a float32.

    distinct  all different, in no order      rising, falling  all different, in order
    relu      distinct with zeros for the negative half
    one_bin   all different; up to 131,072 of them in [1, 1.125), inside one value of the top byte of an fp16 (SGLang #36807)
    the rest  drawn from `CHOICES`
    """
    raw = hashing.cells(seed, f"scores {kind}", np.arange(count))
    if kind in CHOICES:
        return np.array(CHOICES[kind])[(raw % np.uint64(len(CHOICES[kind]))).astype(np.int64)]
    order = np.argsort(raw, kind="stable").astype(np.float64)
    if kind == "one_bin":
        return 1 + order * 2.0**-20
    if kind in ("rising", "falling"):
        order = np.sort(order)[:: 1 if kind == "rising" else -1]
    values = (order - count // 2) / 8
    return np.maximum(values, 0.0) if kind == "relu" else values


SCORES = ("distinct", "rising", "falling", "relu", "one_bin", *CHOICES)


# -- the judge of a selection -------------------------------------------------------------------------------------------


def by_value(scores: np.ndarray) -> np.ndarray:
    """Ranks of scores: equal zeros, and every NaN on top.

    >>> by_value(np.array([0.0, -0.0, -np.inf, np.nan, np.inf, -np.nan])).tolist()
    [1, 1, 0, 3, 2, 3]
    """
    return np.unique(scores + 0.0, return_inverse=True)[1]


def by_bits(scores: np.ndarray) -> np.ndarray:
    """Ranks of scores as sign-magnitude numbers: -0.0 below +0.0, and NaN beyond the infinity of its sign.

    >>> by_bits(np.array([0.0, -0.0, 2.0**-149])).tolist()
    [0, -1, 1]
    """
    bits = scores.astype(np.float32).view(np.uint32).astype(np.int64)
    return np.where(bits < 2**31, bits, 2**31 - 1 - bits)


def top_set(scores: np.ndarray, topk: int, names: np.ndarray) -> Judge:
    """The cells name `topk` different keys of a row, and no key left out has a higher score than one taken.

    `names[p]` is what stands for key p: the position itself, or the slot that the table has for it.

    >>> judge = top_set(np.array([5.0, 9.0, 1.0, 5.0]), 2, np.array([40, 41, 42, 43]))
    >>> judge.complaint(np.array([43, 41])), judge.complaint(np.array([41, 40]))
    (None, None)
    >>> judge.complaint(np.array([41, 42]))
    'key 0 with score 5.0 is left out, and key 2 with score 1.0 is taken'
    >>> judge.complaint(np.array([41, -1]))
    'cell 1 is -1, and must name one of 4 keys'
    """
    known = {int(name): p for p, name in enumerate(names)}

    def complaint(actual: np.ndarray) -> str | None:
        taken: dict[int, int] = {}
        for cell, name in enumerate(actual.tolist()):
            if name not in known:
                return f"cell {cell} is {name}, and must name one of {len(known)} keys"
            p = known[name]
            if p in taken:
                return f"cells {taken[p]} and {cell} are both key {p}"
            taken[p] = cell
        if len(taken) != topk:
            return f"{len(taken)} keys are taken, and must be {topk}"
        return _worse(scores, sorted(taken), by_bits) and _worse(scores, sorted(taken), by_value)

    return Judge("top_set", complaint)


def _worse(scores: np.ndarray, taken: list[int], ranks_of) -> str | None:
    """The lowest key taken, if a key left out is above it."""
    ranks, left = ranks_of(scores), np.setdiff1d(np.arange(len(scores)), taken)
    low, high = taken[int(np.argmin(ranks[taken]))], left[int(np.argmax(ranks[left]))]
    if ranks[low] >= ranks[high]:
        return None
    return f"key {high} with score {scores[high]} is left out, and key {low} with score {scores[low]} is taken"


# -- transform_index_page_table_decode ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexRow:
    """The indices of one query token that sees `keys` keys, by kind (see `chosen`)."""

    keys: int
    kind: str = "selected"
    seed: int = 0

    def indices(self, topk: int) -> np.ndarray:
        return chosen(self.kind, self.seed, self.keys, topk, NEGATIVES)


NEGATIVES = (-1, -1, -2, -(2**31))  # anything negative names no key


def _rows(shape: tuple[int, int], rows) -> Input:
    """A 2-D input: `rows` are LIVE, what is behind them SLACK."""
    return runs(shape, {i * shape[1]: row for i, row in enumerate(rows) if len(row) and i < shape[0]}, Region.SLACK)


@dataclass(frozen=True, repr=False)
class TransformDecode(Case):
    """`width` columns of page_table. `shared`: every row is the table of one request. `spare` capacity of the result."""

    rows: tuple[IndexRow, ...]
    topk: int = 4
    width: int = 8
    shared: bool = False
    spare: int = 0
    content: int = 0

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.rows), "topk": self.topk}

    def batch_size(self) -> int:
        return len(self.rows)

    @cached_property
    def index_rows(self) -> list[np.ndarray]:
        return [r.indices(self.topk) for r in self.rows]

    def arguments(self) -> dict:
        longest = max([r.keys for r in self.rows], default=0)
        live = {i: slots(self.content, "all" if self.shared else f"row {i}",
                         min(longest if self.shared else r.keys, self.width)) for i, r in enumerate(self.rows)}
        return {
            "page_table": table((len(self.rows), self.width), live),
            "topk_indices": _rows((len(self.rows), self.topk), self.index_rows),
            "result": Output((len(self.rows) + self.spare, self.topk + self.spare)),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "page_table":
            return f"the slot of key {index[1]} of row {index[0]}"
        if index[0] >= len(self.rows) or index[1] >= self.topk:
            return f"it is past {len(self.rows)} rows of {self.topk} indices"
        return f"index {index[1]} of token {index[0]}, which is {self.index_rows[index[0]][index[1]]}"


def transform_index_page_table_decode(*, page_table, topk_indices, result, variant):
    """The KV slot of each index, in the token's own row of the table; -1 for any negative index.

    >>> from harness.states import Cells
    >>> out = Cells((2, 4))
    >>> T = table((2, 4), {0: [70, 71, 72], 1: [90]}).view()
    >>> transform_index_page_table_decode(page_table=T, topk_indices=np.array([[2, -1, 0], [-7, 0, -1]]), result=out,
    ...                                   variant={})
    >>> out
    Cells([72 -1 70 .]
          [-1 90 -1 .])
    """
    rows, topk = topk_indices.shape
    for t in range(rows):
        result[t, 0:topk] = _looked_up(page_table, t, topk_indices[t, 0:topk].tolist())


def _looked_up(page_table, row: int, indices: list[int]) -> list[int]:
    """The slots of `indices` in one row of the table."""
    slot_of = page_table[row, 0 : max(indices) + 1].tolist()
    return [slot_of[i] if i >= 0 else -1 for i in indices]


def _narrow(case):
    """The table without the column of the highest index."""
    highest = max([int(row.max()) for row in case.index_rows], default=-1)
    return replace(case, width=highest) if highest >= 0 else None


INDICES_IN_TABLE = Precondition("indices lie in the table", "every index < page_table.shape[1]",
                                "transform_index kernels: unchecked", _narrow)

_INDICES = Arg("topk_indices", Role.IN, ("tokens", "topk"), INT, "positions of the selected keys; negative for none",
               ROWS_STRIDED, sets_size=True, cells="live")
_RESULT = Arg("result", Role.OUT, ("rows", "topk"), INT32, "their KV slots", ROWS_STRIDED, cells="written, untouched")

TRANSFORM_DECODE = Contract(
    name="transform_index_page_table_decode",
    family="topk_transform",
    doc="Positions of selected keys to KV slots, one table row per token.",
    origin="SGLang nsa/transform_index.transform_index_page_table_decode (later dsa/transform_index)",
    case=TransformDecode,
    oracle=transform_index_page_table_decode,
    args=(
        Arg("page_table", Role.IN, ("rows", "0"), INT, "KV slot of every key of each token", TABLE_ROWS, cells="live, slack"),
        replace(_INDICES, shape=("rows", "topk")),
        _RESULT,
    ),
    preconditions=(INDICES_IN_TABLE,),
    capturable=True,
    frozen_by_capture=("rows", "topk"),
    upstream_names=("transform_index_page_table_decode", "transform_index_page_table_decode_fast"),
)


# -- transform_index_page_table_prefill ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexRequest:
    """A request with `extend_len` query tokens, whose indices name `keys` keys."""

    extend_len: int
    keys: int
    kind: str = "selected"
    seed: int = 0

    def indices(self, token: int, topk: int) -> np.ndarray:
        return chosen(self.kind, self.seed + 1000 * token, self.keys, topk, NEGATIVES)


@dataclass(frozen=True, repr=False)
class TransformPrefill(Case):
    """What surrounds the requests' tokens.

    expanded       page_table has a row per token, else one per request
    sums           whether cu_seqlens_q is given beside the host's lengths;   shift  added to it (a broken precondition)
    padding        rows of topk_indices behind the tokens;   output_extra  rows of the result on top, None: not asked for
    """

    requests: tuple[IndexRequest, ...]
    topk: int = 4
    width: int = 8
    expanded: bool = False
    shared: bool = False
    sums: bool = False
    shift: int = 0
    padding: int = 0
    output_extra: int | None = None
    table_spare: int = 0
    spare: int = 0
    content: int = 0

    def tokens(self) -> int:
        return sum(r.extend_len for r in self.requests)

    def index_count(self) -> int:
        return max(self.tokens() + self.padding, 0)

    def output_rows(self) -> int:
        return max(self.index_count() + (self.output_extra or 0), 0)

    def dims(self) -> dict[str, int]:
        return {"requests": len(self.requests), "tokens": self.index_count(), "rows": self.output_rows(), "topk": self.topk,
                "table_rows": self.tokens() if self.expanded else len(self.requests)}

    def batch_size(self) -> int:
        return len(self.requests)

    @cached_property
    def index_rows(self) -> list[np.ndarray]:
        return [r.indices(t, self.topk) for r in self.requests for t in range(r.extend_len)]

    def page_table(self) -> Input:
        """The rows that tokens look into are live; those of requests without tokens are nobody's."""
        if self.expanded:
            owned = {row: f"token {row}" for row in range(self.tokens())}
            keys = [r.keys for r in self.requests for _ in range(r.extend_len)]
        else:
            owned = {i: f"request {i}" for i, r in enumerate(self.requests) if r.extend_len}
            keys = [r.keys for r in self.requests]
        longest = max([keys[row] for row in owned], default=0)
        live = {row: slots(self.content, "all" if self.shared else name, min(longest if self.shared else keys[row], self.width))
                for row, name in owned.items()}
        return table((self.dims()["table_rows"] + self.table_spare, self.width), live)

    def arguments(self) -> dict:
        ends = np.cumsum([0, *(r.extend_len for r in self.requests)]) + self.shift
        return {
            "page_table": self.page_table(),
            "topk_indices": _rows((self.index_count(), self.topk), self.index_rows),
            "cu_seqlens_q": vector(ends) if self.sums else None,
            "result": Output((self.output_rows() + self.spare, self.topk + self.spare)),
            "extend_lens_cpu": [r.extend_len for r in self.requests],
            "output_num_tokens": None if self.output_extra is None else self.index_count() + self.output_extra,
            "page_table_is_expanded": self.expanded,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "page_table":
            return f"the slot of key {index[1]} of row {index[0]}"
        if len(index) == 1:
            return f"where request {index[0]} starts"
        if index[0] >= self.output_rows() or index[1] >= self.topk:
            return f"it is past {self.output_rows()} rows of {self.topk} indices"
        if index[0] >= self.tokens():
            return f"a row behind {self.tokens()} tokens"
        first = 0
        for i, r in enumerate(self.requests):
            if index[0] < first + r.extend_len:
                return f"index {index[1]} of token {index[0] - first} of request {i}, {self.index_rows[index[0]][index[1]]}"
            first += r.extend_len
        return ""


def transform_index_page_table_prefill(*, page_table, topk_indices, cu_seqlens_q, result, extend_lens_cpu,
                                       output_num_tokens, page_table_is_expanded, variant):
    """The KV slot of each index, in the row of the token's request (or the token's own); rows behind the tokens hold -1.

    >>> from harness.states import Cells
    >>> out = Cells((5, 2))
    >>> T = table((3, 3), {0: [70, 71, 72], 2: [90, 91]}).view()
    >>> transform_index_page_table_prefill(
    ...     page_table=T, topk_indices=np.array([[2, 0], [1, -5], [1, 0]]), cu_seqlens_q=None, result=out,
    ...     extend_lens_cpu=[1, 0, 2], output_num_tokens=4, page_table_is_expanded=False, variant={})
    >>> out
    Cells([72 70]
          [91 -1]
          [91 90]
          [-1 -1]
          [. .])
    """
    tokens, topk = topk_indices.shape
    t = 0
    for i in range(len(extend_lens_cpu)):
        for _ in range(extend_lens_cpu[i]):
            row = t if page_table_is_expanded else i
            result[t, 0:topk] = _looked_up(page_table, row, topk_indices[t, 0:topk].tolist())
            t += 1
    while t < (tokens if output_num_tokens is None else output_num_tokens):
        result[t, 0:topk] = -1
        t += 1


TRANSFORM_PREFILL = Contract(
    name="transform_index_page_table_prefill",
    family="topk_transform",
    doc="Positions of selected keys to KV slots, one table row per request or per token.",
    origin="SGLang nsa/transform_index.transform_index_page_table_prefill (later dsa/transform_index, padded and expanded)",
    case=TransformPrefill,
    oracle=transform_index_page_table_prefill,
    args=(
        Arg("page_table", Role.IN, ("table_rows", "0"), INT, "KV slot of every key, by request or by token", TABLE_ROWS,
            cells="live, slack, forbidden"),
        replace(_INDICES, cells="live, slack"),
        Arg("cu_seqlens_q", Role.IN, ("requests + 1",), INT32, "prefix sums of extend_lens_cpu", ANY_STRIDES,
            optional="the host's lengths are copied to the device instead", cells="live"),
        _RESULT,
    ),
    scalars=(
        Scalar("extend_lens_cpu", "list: query tokens of each request"),
        Scalar("output_num_tokens", "rows to fill, at least those of topk_indices; None for as many"),
        Scalar("page_table_is_expanded", "whether page_table has a row per token"),
    ),
    preconditions=(
        INDICES_IN_TABLE,
        Precondition("topk_indices has every token", "sum(extend_lens_cpu) <= topk_indices.shape[0]",
                     "_allocate_prefill_result asserts it",
                     lambda c: replace(c, padding=-1, output_extra=None) if c.tokens() else None),
        Precondition("the output has every row of topk_indices", "topk_indices.shape[0] <= output_num_tokens",
                     "_allocate_prefill_result asserts it",
                     lambda c: replace(c, output_extra=-1) if c.index_count() else None),
        Precondition("cu_seqlens_q agrees with extend_lens_cpu", "cu_seqlens_q == cumsum(extend_lens_cpu)",
                     "transform_index_page_table_prefill: 'skips' the copy, unchecked",
                     lambda c: replace(c, sums=True, shift=c.tokens() + 1)),
    ),
    upstream_names=("transform_index_page_table_prefill", "transform_index_page_table_prefill_fast"),
)


# -- transform_index_ragged ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RaggedRow:
    """The indices of one query token; its request's keys start at `offset` in the ragged KV."""

    keys: int
    offset: int
    kind: str = "selected"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class TransformRagged(Case):
    """`below` puts -2 among the indices, which a caller must not."""

    rows: tuple[RaggedRow, ...]
    topk: int = 4
    spare: int = 0
    below: bool = False

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.rows), "topk": self.topk}

    def batch_size(self) -> int:
        return len(self.rows)

    def arguments(self) -> dict:
        negatives = (-2,) if self.below else (-1,)
        live = [chosen(r.kind, r.seed, r.keys, self.topk, negatives) for r in self.rows]
        return {
            "topk_indices": _rows((len(self.rows), self.topk), live),
            "topk_indices_offset": vector([r.offset for r in self.rows], self.spare),
            "result": Output((len(self.rows) + self.spare, self.topk + self.spare)),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if index[0] >= len(self.rows) or len(index) == 2 and index[1] >= self.topk:
            return f"it is past {len(self.rows)} rows of {self.topk} indices"
        return f"token {index[0]}, whose keys start at {self.rows[index[0]].offset}"


def transform_index_ragged(*, topk_indices, topk_indices_offset, result, variant):
    """Positions in the ragged KV: each index plus where its request starts; -1 stays.

    >>> from harness.states import Cells
    >>> out = Cells((2, 3))
    >>> transform_index_ragged(topk_indices=np.array([[2, 0, -1], [0, -1, -1]]), topk_indices_offset=[10, 500], result=out,
    ...                        variant={})
    >>> out
    Cells([12 10 -1]
          [500 -1 -1])
    """
    rows, topk = topk_indices.shape
    for t in range(rows):
        result[t, 0:topk] = [i + topk_indices_offset[t] if i != -1 else -1 for i in topk_indices[t, 0:topk].tolist()]


TRANSFORM_RAGGED = Contract(
    name="transform_index_ragged",
    family="topk_transform",
    doc="Positions of selected keys to positions in the ragged KV.",
    origin="SGLang nsa_backend with SGLANG_NSA_FUSE_TOPK off: where(indices != -1, indices + offset, indices)",
    case=TransformRagged,
    oracle=transform_index_ragged,
    args=(
        replace(_INDICES, shape=("rows", "topk"), dtypes=INT32),
        Arg("topk_indices_offset", Role.IN, ("rows",), INT32, "where the keys of each token's request start", ANY_STRIDES,
            cells="live, slack"),
        replace(_RESULT, doc="positions in the ragged KV"),
    ),
    preconditions=(
        Precondition("-1 is the only negative index", "every index >= -1", "its producer fast_topk writes -1 alone",
                     lambda c: replace(c, below=True)),
        Precondition("positions fit int32", "index + offset < 2**31", "topk_indices_offset is int32"),
    ),
    capturable=True,
    frozen_by_capture=("rows", "topk"),
    upstream_names=("NativeSparseAttnBackend.forward_extend (RAGGED, unfused)",),
)


# -- pad_topk_indices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PadTopkIndices(Case):
    """`padding` rows to append."""

    rows: tuple[IndexRow, ...]
    topk: int = 4
    padding: int = 0
    spare: int = 0

    def num_tokens(self) -> int:
        return len(self.rows) + self.padding

    def dims(self) -> dict[str, int]:
        return {"tokens": len(self.rows), "rows": max(self.num_tokens(), 0), "topk": self.topk}

    def batch_size(self) -> int:
        return len(self.rows)

    def arguments(self) -> dict:
        return {
            "topk_indices": _rows((len(self.rows), self.topk), [r.indices(self.topk) for r in self.rows]),
            "result": Output((max(self.num_tokens(), 0) + self.spare, self.topk + self.spare)),
            "num_tokens": self.num_tokens(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if index[0] >= self.num_tokens() or index[1] >= self.topk:
            return f"it is past {self.num_tokens()} rows of {self.topk} indices"
        return f"token {index[0]}" if index[0] < len(self.rows) else f"a row behind {len(self.rows)} tokens"


def pad_topk_indices(*, topk_indices, result, num_tokens, variant):
    """The indices as they are, then rows of -1.

    >>> from harness.states import Cells
    >>> out = Cells((3, 2))
    >>> pad_topk_indices(topk_indices=np.array([[5, -1]]), result=out, num_tokens=2, variant={})
    >>> out
    Cells([5 -1]
          [-1 -1]
          [. .])
    """
    rows, topk = topk_indices.shape
    for t in range(num_tokens):
        result[t, 0:topk] = topk_indices[t, 0:topk] if t < rows else -1


PAD_TOPK_INDICES = Contract(
    name="pad_topk_indices",
    family="topk_transform",
    doc="Rows of -1 behind the indices, so that they match padded hidden states.",
    origin="SGLang nsa_backend._pad_topk_indices",
    case=PadTopkIndices,
    oracle=pad_topk_indices,
    args=(replace(_INDICES, dtypes=INT32), replace(_RESULT, doc="the indices, padded")),
    scalars=(Scalar("num_tokens", "rows to fill, at least those of topk_indices"),),
    preconditions=(
        Precondition("no row is dropped", "topk_indices.shape[0] <= num_tokens", "_pad_topk_indices asserts it",
                     lambda c: replace(c, padding=-1) if c.rows else None),
    ),
    capturable=True,
    frozen_by_capture=("tokens", "topk", "num_tokens"),
    upstream_names=("_pad_topk_indices",),
)


# -- fast_topk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A query token that sees `length` keys (none if negative), scored in the columns from `start` on.

    `scores` is a kind of `SCORES`; `offset` is where the request's keys start in the ragged KV (ragged only).
    """

    length: int
    start: int = 0
    scores: str = "distinct"
    seed: int = 0
    offset: int = 0

    def keys(self) -> int:
        return max(self.length, 0)


class _Selection(Case):
    """What the four selections share. `width`: columns of scores; `starts`: whether row_starts is given (else all 0);
    `spare`: capacity of the output beyond the rows and `topk`."""

    rows: tuple[Row, ...]
    topk: int
    width: int
    starts: bool = False
    spare: int

    @property
    def all_rows(self) -> tuple[Row, ...]:
        return self.rows

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.all_rows), "topk": self.topk}

    def batch_size(self) -> int:
        return len(self.all_rows)

    def reach(self) -> int:
        """Columns of scores that the rows need."""
        return max([(r.start if self.starts else 0) + r.keys() for r in self.all_rows], default=0)

    def score(self) -> Input:
        """Only rows with more than `topk` keys are live: of the others every key is taken, whatever its score."""
        live = {}
        for b, r in enumerate(self.all_rows):
            start = r.start if self.starts else 0
            count = min(r.length, self.width - start)
            if r.length > self.topk and count > 0 and start >= 0:
                live[b * self.width + start] = scores(r.scores, r.seed, r.length)[:count]
        return runs((len(self.all_rows), self.width), live, Region.SLACK)

    def selection(self, output: str) -> dict:
        rows = self.all_rows
        return {
            "score": self.score(),
            "lengths": vector([r.length for r in rows]),
            "row_starts": vector([r.start for r in rows]) if self.starts else None,
            output: Output((len(rows) + self.spare, self.topk + self.spare)),
            "topk": self.topk,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name in ("lengths", "row_starts", "topk_indices_offset"):
            return f"row {index[0]}"
        if name in ("score", "page_table", "real_page_table", "cu_seqlens_q"):
            return ""
        if index[0] >= len(self.all_rows) or index[1] >= self.topk:
            return f"it is past {len(self.all_rows)} rows of {self.topk} indices"
        return f"place {index[1]} of row {index[0]}, which has {self.all_rows[index[0]].length} keys"


@dataclass(frozen=True, repr=False)
class FastTopk(_Selection):
    """The selection alone."""

    rows: tuple[Row, ...]
    topk: int = 4
    width: int = 8
    starts: bool = False
    spare: int = 0

    def arguments(self) -> dict:
        return self.selection("indices")


def _select(out, b: int, score, length: int, start: int, topk: int, names) -> None:
    """Row b: all keys in order and then -1, or any right choice of `topk`. `names[p]` stands for key p."""
    if length <= topk:
        for j in range(topk):
            out[b, j] = names[j] if j < length else -1
    else:
        out.judge((b, slice(0, topk)), top_set(score[b, start : start + length], topk, names))


def fast_topk(*, score, lengths, row_starts, indices, topk, variant):
    """The positions of the `topk` best keys of each row, relative to its start.

    >>> from harness.states import Cells
    >>> out = Cells((3, 2))
    >>> fast_topk(score=np.array([[0.0, 7.0, 9.0, 8.0]] * 3), lengths=[4, 1, -3], row_starts=None, indices=out, topk=2,
    ...           variant={})
    >>> out
    Cells([~ ~]
          [0 -1]
          [-1 -1])
    >>> out.judges[0][1].complaint(np.array([3, 2])), out.judges[0][1].complaint(np.array([2, 1]))
    (None, 'key 3 with score 8.0 is left out, and key 1 with score 7.0 is taken')
    """
    for b in range(len(lengths)):
        length = max(int(lengths[b]), 0)
        start = 0 if row_starts is None else int(row_starts[b])
        _select(indices, b, score, length, start, topk, range(length))


def _too_wide(case):
    """The score without the later half of the columns that the rows need; some rows may start past its end, or in front of
    its first column."""
    rows = getattr(case, "rows", ()) if case.starts else ()
    early = [replace(case, rows=(replace(r, start=-2), *rows[1:])) for r in rows[:1]]
    return (*[replace(case, width=case.reach() // 2)] * (case.reach() > 0), *early)


KEYS_IN_SCORE = Precondition("keys lie in the score", "0 <= row_starts and row_starts + lengths <= score.shape[1]",
                             "fast_topk kernels: unchecked", _too_wide)
_SCORE = (
    Arg("score", Role.IN, ("rows", "0"), ("float32",), "a score per key, of any width; unit column stride", SCORE_ROWS,
        cells="live, slack"),
    Arg("lengths", Role.IN, ("rows",), INT32, "keys per row; a negative one counts as 0", ANY_STRIDES, sets_size=True,
        cells="live"),
    Arg("row_starts", Role.IN, ("rows",), INT32, "the column of each row's first key", ANY_STRIDES,
        optional="every row starts at column 0", cells="live"),
)
_TOPK = Scalar("topk", "keys to select per row, at least 1")


def _selected(name: str, doc: str) -> Arg:
    return Arg(name, Role.OUT, ("rows", "topk"), INT32, doc, ROWS_STRIDED, cells="written, judged, untouched")


FAST_TOPK = Contract(
    name="fast_topk",
    family="topk_transform",
    doc="Top-k selection: positions of the best keys of each row.",
    origin="SGLang sgl-kernel fast_topk_v2 (there for topk 2048 alone)",
    case=FastTopk,
    oracle=fast_topk,
    args=(*_SCORE, _selected("indices", "positions relative to the row's start, -1 behind them")),
    scalars=(_TOPK,),
    preconditions=(KEYS_IN_SCORE,),
    capturable=True,
    frozen_by_capture=("rows", "topk"),
    upstream_names=("fast_topk_v2",),
)


# -- fast_topk_transform_paged ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request with a query token per row."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, repr=False)
class FastTopkPaged(_Selection):
    """`decode`: cu_seqlens_q is left out where every request has one row. `unowned` rows belong to no request (broken)."""

    requests: tuple[Request, ...]
    topk: int = 4
    width: int = 8
    starts: bool = False
    spare: int = 0
    decode: bool = False
    table_extra: int = 0
    unowned: int = 0
    content: int = 0

    @cached_property
    def all_rows(self) -> tuple[Row, ...]:
        return tuple(row for r in self.requests for row in r.rows)

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "requests": len(self.requests)}

    def batch_size(self) -> int:
        return len(self.requests)

    def arguments(self) -> dict:
        longest = [max([row.keys() for row in r.rows], default=None) for r in self.requests]
        width = max([n for n in longest if n is not None], default=0) + self.table_extra
        live = {i: slots(self.content, f"request {i}", min(n, width)) for i, n in enumerate(longest) if n is not None}
        ends = np.cumsum([0, *(len(r.rows) for r in self.requests)])
        plain = self.decode and all(len(r.rows) == 1 for r in self.requests)
        return {
            **self.selection("dst_page_table"),
            "page_table": table((len(self.requests), max(width, 0)), live),
            "cu_seqlens_q": None if plain else vector(np.minimum(ends, ends[-1] - self.unowned)),
        }


def fast_topk_transform_paged(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk, variant):
    """The KV slots of the `topk` best keys of each row, from the table of the row's request.

    >>> from harness.states import Cells
    >>> out = Cells((2, 2))
    >>> T = table((2, 3), {1: [50, 60, 70]}).view()
    >>> fast_topk_transform_paged(score=np.array([[0.0] * 3, [7.0, 9.0, 8.0]]), lengths=[2, 3], row_starts=None,
    ...                           page_table=T, cu_seqlens_q=[0, 0, 2], dst_page_table=out, topk=2, variant={})
    >>> out
    Cells([50 60]
          [~ ~])
    >>> out.judges[0][1].complaint(np.array([60, 70]))
    """
    for b in range(len(lengths)):
        length = max(int(lengths[b]), 0)
        start = 0 if row_starts is None else int(row_starts[b])
        request = b
        if cu_seqlens_q is not None:
            request = next(i for i in range(len(cu_seqlens_q) - 1) if cu_seqlens_q[i] <= b < cu_seqlens_q[i + 1])
        _select(dst_page_table, b, score, length, start, topk, page_table[request, 0:length].tolist())


FAST_TOPK_PAGED = Contract(
    name="fast_topk_transform_paged",
    family="topk_transform",
    doc="Top-k selection straight to KV slots.",
    origin="SGLang sgl-kernel fast_topk_transform_fused (there the mode is guessed from the shapes)",
    case=FastTopkPaged,
    oracle=fast_topk_transform_paged,
    args=(
        *_SCORE,
        Arg("page_table", Role.IN, ("requests", "0"), INT32, "KV slot of every key of each request; more requests than rows of "
            "score are legal here, where upstream demands page_table.shape[0] <= score.shape[0]", TABLE_ROWS,
            cells="live, slack, forbidden"),
        Arg("cu_seqlens_q", Role.IN, ("requests + 1",), INT32, "prefix sums of the requests' rows", sets_size=True,
            optional="every request has one row (decode)", cells="live"),
        _selected("dst_page_table", "KV slots, -1 behind them"),
    ),
    scalars=(_TOPK,),
    preconditions=(
        KEYS_IN_SCORE,
        Precondition("keys lie in the table", "lengths <= page_table.shape[1]", "fast_topk_transform_fused: unchecked",
                     lambda c: replace(c, table_extra=-1) if c.reach() else None),
        Precondition("every row belongs to a request", "cu_seqlens_q[-1] == score.shape[0]",
                     "fast_topk_transform_fused: unchecked",
                     lambda c: replace(c, unowned=1, decode=False) if c.all_rows else None),
    ),
    capturable=True,
    frozen_by_capture=("rows", "requests", "topk"),
    upstream_names=("fast_topk_transform_fused",),
)


# -- fast_topk_transform_ragged -----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FastTopkRagged(FastTopk):
    """Every row has an offset of its own."""

    def arguments(self) -> dict:
        return {**self.selection("topk_indices_ragged"), "topk_indices_offset": vector([r.offset for r in self.rows])}


def fast_topk_transform_ragged(*, score, lengths, row_starts, topk_indices_offset, topk_indices_ragged, topk, variant):
    """The positions in the ragged KV of the `topk` best keys of each row.

    >>> from harness.states import Cells
    >>> out = Cells((2, 2))
    >>> fast_topk_transform_ragged(score=np.array([[7.0, 9.0, 8.0]] * 2), lengths=[1, 3], row_starts=None,
    ...                            topk_indices_offset=[100, 101], topk_indices_ragged=out, topk=2, variant={})
    >>> out
    Cells([100 -1]
          [~ ~])
    >>> out.judges[0][1].complaint(np.array([103, 102]))
    """
    for b in range(len(lengths)):
        length, offset = max(int(lengths[b]), 0), int(topk_indices_offset[b])
        start = 0 if row_starts is None else int(row_starts[b])
        _select(topk_indices_ragged, b, score, length, start, topk, range(offset, offset + length))


FAST_TOPK_RAGGED = Contract(
    name="fast_topk_transform_ragged",
    family="topk_transform",
    doc="Top-k selection straight to positions in the ragged KV.",
    origin="SGLang sgl-kernel fast_topk_transform_ragged_fused",
    case=FastTopkRagged,
    oracle=fast_topk_transform_ragged,
    args=(
        *_SCORE,
        Arg("topk_indices_offset", Role.IN, ("rows",), INT32, "where the keys of each row's request start", ANY_STRIDES,
            cells="live"),
        _selected("topk_indices_ragged", "positions in the ragged KV, -1 behind them"),
    ),
    scalars=(_TOPK,),
    preconditions=(
        KEYS_IN_SCORE,
        Precondition("positions fit int32", "topk_indices_offset + lengths <= 2**31", "topk_indices_offset is int32"),
    ),
    capturable=True,
    frozen_by_capture=("rows", "topk"),
    upstream_names=("fast_topk_transform_ragged_fused",),
)


# -- topk_transform_v2 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class TopkTransformV2(_Selection):
    """Rows start at column 0. `pages_extra` columns of the table beyond the longest row's."""

    rows: tuple[Row, ...]
    topk: int = 4
    width: int = 8
    spare: int = 0
    page_size: int = 64
    pages_extra: int = 0
    content: int = 0

    def arguments(self) -> dict:
        pages = [-(-r.keys() // self.page_size) for r in self.rows]
        width = max(max(pages, default=0) + self.pages_extra, 0)
        live = {b: slots(self.content, f"row {b}", min(n, width), 2**31 // self.page_size) for b, n in enumerate(pages)}
        given = self.selection("page_indices")
        del given["row_starts"]
        return {**given, "real_page_table": table((len(self.rows), width), live), "page_size": self.page_size}


def topk_transform_v2(*, score, lengths, real_page_table, page_indices, topk, page_size, variant):
    """The KV slots of the `topk` best keys of each row, from the table of its pages.

    >>> from harness.states import Cells
    >>> out = Cells((2, 3))
    >>> topk_transform_v2(score=np.array([[0.0] * 4, [7.0, 9.0, 8.0, 9.0]]), lengths=[3, 4], page_indices=out, topk=3,
    ...                   real_page_table=np.array([[30, 10], [20, 40]]), page_size=2, variant={})
    >>> out
    Cells([60 61 20]
          [~ ~ ~])
    >>> out.judges[0][1].complaint(np.array([80, 81, 41]))
    """
    for b in range(len(lengths)):
        length = max(int(lengths[b]), 0)
        pages = real_page_table[b, 0 : -(-length // page_size)].tolist()
        names = [pages[p // page_size] * page_size + p % page_size for p in range(length)]
        _select(page_indices, b, score, length, 0, topk, names)


TOPK_TRANSFORM_V2 = Contract(
    name="topk_transform_v2",
    family="topk_transform",
    doc="Top-k selection straight to KV slots, through the table of pages.",
    origin="SGLang #30274 deepseek_v4 topk_v2 (there with a plan, for topk up to 2048)",
    case=TopkTransformV2,
    oracle=topk_transform_v2,
    args=(
        replace(_SCORE[0], pitch=4),
        Arg("lengths", Role.IN, ("rows",), INT32, "keys per row", ANY_STRIDES, sets_size=True, cells="live"),
        Arg("real_page_table", Role.IN, ("rows", "0"), INT32, "page of every page position of each row", TABLE_ROWS,
            cells="live, slack"),
        _selected("page_indices", "KV slots, -1 behind them"),
    ),
    scalars=(_TOPK, Scalar("page_size", "tokens per page, at least 1")),
    preconditions=(
        KEYS_IN_SCORE,
        Precondition("pages lie in the table", "ceil(lengths / page_size) <= real_page_table.shape[1]", "topk_v2: unchecked",
                     lambda c: replace(c, pages_extra=-1) if c.reach() else None),
        Precondition("lengths are not negative", "lengths >= 0", "topk_v2 reads them as uint32",
                     lambda c: replace(c, rows=(replace(c.rows[0], length=-1), *c.rows[1:])) if c.rows else None),
    ),
    capturable=True,
    frozen_by_capture=("rows", "topk", "page_size"),
    upstream_names=("topk_transform_v2", "topk_transform_512_v2"),
)

CONTRACTS = (TRANSFORM_DECODE, TRANSFORM_PREFILL, TRANSFORM_RAGGED, PAD_TOPK_INDICES, FAST_TOPK, FAST_TOPK_PAGED,
             FAST_TOPK_RAGGED, TOPK_TRANSFORM_V2)
