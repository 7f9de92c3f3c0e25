"""The indexer's key ranges, and how context parallelism deals out the query tokens of a prefill.

| transform                        | fills                          | from                                                |
| -------------------------------- | ------------------------------ | --------------------------------------------------- |
| indexer_k_start_end              | ks, ke, token_to_batch_idx     | extend_seq_lens, seq_lens, cp_size, cp_rank         |
| cp_round_robin_split_q_seqs      | q_lens, bs_idx                 | extend_seq_lens, cp_size, cp_rank                   |
| cp_round_robin_split_q_seqs_cpu  | (returns the same, as lists)   | the same, on the host                               |
| cp_round_robin_split             | split: every cp_size-th value  | x, 1-D                                              |
| cp_round_robin_split_rows        | split: every cp_size-th row    | x, 2-D                                              |
| cp_zigzag_split                  | token_indices, q_lens, kv_lens | extend_seq_lens, seq_lens, cp_size, cp_rank         |
| cp_zigzag_metadata               | (returns the lists)            | the same, on the host                               |

The query tokens of a batch are numbered g = 0, 1, ... through all its requests. Round robin: token g belongs to rank
g % cp_size. Zigzag: each request is cut into 2 * cp_size segments, and rank r has segments r and 2 * cp_size - 1 - r.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import (ANY_STRIDES, INT, INT32, ROWS_STRIDED, Arg, Case, Contract, Kind, Precondition, Role, Scalar,
                              Variant)
from harness.tensors import Output, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")

_RANKS = (
    Scalar("cp_size", "context-parallel ranks, at least 1"),
    Scalar("cp_rank", "this rank, below cp_size"),
)


@dataclass(frozen=True)
class Req:
    """A request with `extend_len` query tokens among its `seq_len` keys."""

    extend_len: int
    seq_len: int


def _owned(first: int, count: int, cp_size: int, cp_rank: int) -> list[int]:
    """Which of a request's `count` tokens belong to a rank, where its first token has number `first`."""
    return [t for t in range(count) if (first + t) % cp_size == cp_rank]


# -- indexer_k_start_end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class IndexerKStartEnd(Case):
    """`requests`, `times` over, on rank `cp_rank` of `cp_size`; `spare` capacity behind every tensor."""

    requests: tuple[Req, ...]
    times: int = 1
    cp_size: int = 1
    cp_rank: int = 0
    spare: int = 0
    total_len: int | None = None

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.times

    @cached_property
    def tokens(self) -> list[tuple[int, int]]:
        """Request and position among its query tokens, of every token of this rank."""
        firsts = np.cumsum([0, *(r.extend_len for r in self.batch)]).tolist()
        return [(i, t) for i, r in enumerate(self.batch)
                for t in _owned(firsts[i], r.extend_len, self.cp_size, self.cp_rank)]

    def total(self) -> int:
        return len(self.tokens) if self.total_len is None else self.total_len

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "tokens": self.total()}

    def arguments(self) -> dict:
        out = {name: Output((self.total() + self.spare,)) for name in ("ks", "ke", "token_to_batch_idx")}
        return {
            "extend_seq_lens": vector([r.extend_len for r in self.batch], self.spare),
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            **out,
            "bs": len(self.batch),
            "total_len": self.total(),
            "cp_size": self.cp_size,
            "cp_rank": self.cp_rank,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name in ("extend_seq_lens", "seq_lens"):
            return f"request {index[0]}"
        if index[0] >= len(self.tokens):
            return f"it is past the rank's {len(self.tokens)} query tokens"
        i, t = self.tokens[index[0]]
        return f"query token {t} of request {i} (extend_len {self.batch[i].extend_len}, seq_len {self.batch[i].seq_len})"


def indexer_k_start_end(*, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank, variant):
    """For every query token of the rank: the first key of its request in the ragged batch of keys, the end of the keys that
    it sees, and its request.

    With context parallelism the ragged batch holds only the keys of requests that own a token of the rank, and requests
    are counted among those.

    >>> from harness.states import Cells
    >>> def fill(tokens, cp_size, cp_rank):
    ...     ks, ke, owner = (Cells((tokens,)) for _ in range(3))
    ...     indexer_k_start_end(extend_seq_lens=[3, 2], seq_lens=[10, 4], ks=ks, ke=ke, token_to_batch_idx=owner, bs=2,
    ...                         total_len=tokens, cp_size=cp_size, cp_rank=cp_rank, variant={})
    ...     return ks, ke, owner
    >>> fill(5, cp_size=1, cp_rank=0)
    (Cells([0 0 0 10 10]), Cells([8 9 10 13 14]), Cells([0 0 0 1 1]))
    >>> fill(2, cp_size=3, cp_rank=1)
    (Cells([0 10]), Cells([9 14]), Cells([0 1]))
    >>> fill(1, cp_size=4, cp_rank=3)
    (Cells([0]), Cells([3]), Cells([0]))
    """
    first, base, place, row = 0, 0, 0, 0
    for i in range(bs):
        owned = _owned(first, extend_seq_lens[i], cp_size, cp_rank)
        for t in owned:
            ks[row] = base
            ke[row] = base + seq_lens[i] - extend_seq_lens[i] + 1 + t
            token_to_batch_idx[row] = place
            row += 1
        if cp_size == 1 or owned:
            base += seq_lens[i]
            place += 1
        first += extend_seq_lens[i]


def _more_queries_than_keys(case):
    if not case.requests or not case.requests[0].extend_len:
        return None
    first = case.requests[0]
    return replace(case, requests=(replace(first, seq_len=first.extend_len - 1), *case.requests[1:]))


def _negative(case):
    if len(case.requests) < 2 or case.times > 1:
        return None
    return replace(case, requests=(replace(case.requests[0], extend_len=-2), *case.requests[1:]))


def _one_less(case):
    return replace(case, total_len=case.total() - 1, spare=0) if case.total() else None


INDEXER_K_START_END = Contract(
    name="indexer_k_start_end",
    family="indexer",
    doc="Key range and request of every query token in the ragged batch of keys, for the MQA logits of a prefill.",
    origin="SGLang nsa_backend._cal_indexer_k_start_end; keys, not query tokens, advance the base (#12583)",
    case=IndexerKStartEnd,
    oracle=indexer_k_start_end,
    args=(
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, cells="live, slack"),
        Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request, new tokens included", ANY_STRIDES, cells="live, slack"),
        Arg("ks", Role.OUT, ("tokens",), INT32, "first key of the token's request", cells="written, untouched"),
        Arg("ke", Role.OUT, ("tokens",), INT32, "one past the last key that the token sees", cells="written, untouched"),
        Arg("token_to_batch_idx", Role.OUT, ("tokens",), INT32, "the token's request, counted among the rank's",
            cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests"),
        Scalar("total_len", "query tokens of this rank"),
        *_RANKS,
    ),
    preconditions=(
        Precondition("queries are keys too", "extend_seq_lens <= seq_lens", "seq_lens = extend_prefix_lens + extend_seq_lens",
                     _more_queries_than_keys),
        Precondition("total_len is the count", "total_len == query tokens g with g % cp_size == cp_rank",
                     "nsa_cp_round_robin_split_data allocates the count", _one_less),
        Precondition("lengths are not negative", "extend_seq_lens >= 0", "a tensor has no -1 rows", _negative),
        Precondition("keys fit int32", "sum(seq_lens) < 2**31", "ks and ke are int32"),
    ),
    capturable=True,
    frozen_by_capture=("bs", "total_len", "cp_size", "cp_rank"),
    upstream_names=("_cal_indexer_k_start_end",),
)


# -- cp_round_robin_split_q_seqs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CpRoundRobinSplitQSeqs(Case):
    """`extends[i]` query tokens of request i, `times` over."""

    extends: tuple[int, ...]
    times: int = 1
    cp_size: int = 1
    cp_rank: int = 0
    spare: int = 0
    num_selected: int | None = None

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.extends * self.times

    @cached_property
    def chosen(self) -> list[int]:
        """The requests that own a token of the rank."""
        firsts = np.cumsum([0, *self.all]).tolist()
        return [i for i, n in enumerate(self.all) if _owned(firsts[i], n, self.cp_size, self.cp_rank)]

    def selected(self) -> int:
        return len(self.chosen) if self.num_selected is None else self.num_selected

    def batch_size(self) -> int:
        return len(self.all)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.all), "selected": self.selected()}

    def arguments(self) -> dict:
        return {
            "extend_seq_lens": vector(self.all, self.spare),
            "q_lens": Output((self.selected() + self.spare,)),
            "bs_idx": Output((self.selected() + self.spare,)),
            "bs": len(self.all),
            "num_selected": self.selected(),
            "cp_size": self.cp_size,
            "cp_rank": self.cp_rank,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "extend_seq_lens":
            return f"request {index[0]}"
        if index[0] >= len(self.chosen):
            return f"it is past the {len(self.chosen)} requests that own a token of rank {self.cp_rank}"
        return f"request {self.chosen[index[0]]} ({self.all[self.chosen[index[0]]]} query tokens)"


def cp_round_robin_split_q_seqs(*, extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank, variant):
    """How many query tokens of each request belong to the rank, and which requests own any.

    Tokens 0 to 4 belong to request 0, token 5 to request 2:

    >>> from harness.states import Cells
    >>> for rank in range(3):
    ...     q_lens, bs_idx = Cells((2,)), Cells((2,))
    ...     cp_round_robin_split_q_seqs(extend_seq_lens=[5, 0, 1], q_lens=q_lens, bs_idx=bs_idx, bs=3, num_selected=2,
    ...                                 cp_size=3, cp_rank=rank, variant={})
    ...     print(q_lens, bs_idx)
    Cells([2 .]) Cells([0 .])
    Cells([2 .]) Cells([0 .])
    Cells([1 1]) Cells([0 2])
    """
    first, place = 0, 0
    for i in range(bs):
        count = len(_owned(first, extend_seq_lens[i], cp_size, cp_rank))
        if count > 0:
            q_lens[place] = count
            bs_idx[place] = i
            place += 1
        first += extend_seq_lens[i]


CP_ROUND_ROBIN_SPLIT_Q_SEQS = Contract(
    name="cp_round_robin_split_q_seqs",
    family="indexer",
    doc="Per-rank query counts under round-robin context parallelism, and the requests that have any.",
    origin="SGLang nsa_cp_round_robin_split_q_seqs_kernel",
    case=CpRoundRobinSplitQSeqs,
    oracle=cp_round_robin_split_q_seqs,
    args=(
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, cells="live, slack"),
        Arg("q_lens", Role.OUT, ("selected",), INT, "query tokens of the rank, of requests that have some",
            cells="written, untouched"),
        Arg("bs_idx", Role.OUT, ("selected",), INT32, "those requests", cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests"),
        Scalar("num_selected", "requests that own a token of the rank, as cp_round_robin_split_q_seqs_cpu counts them"),
        *_RANKS,
    ),
    preconditions=(
        Precondition("num_selected is the count", "num_selected == requests with a token of the rank",
                     "the outputs have num_rank_seqs elements",
                     lambda c: replace(c, num_selected=c.selected() - 1, spare=0) if c.selected() else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "num_selected", "cp_size", "cp_rank"),
    upstream_names=("nsa_cp_round_robin_split_q_seqs_kernel", "dsa_cp_interleave_q_seqs"),
)


@dataclass(frozen=True, repr=False)
class CpRoundRobinSplitQSeqsCpu(Case):
    """`extends[i]` query tokens of request i."""

    extends: tuple[int, ...]
    cp_size: int = 1
    cp_rank: int = 0

    def batch_size(self) -> int:
        return len(self.extends)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        return {"extend_seq_lens": list(self.extends), "cp_size": self.cp_size, "cp_rank": self.cp_rank}


def cp_round_robin_split_q_seqs_cpu(*, extend_seq_lens, cp_size, cp_rank, variant):
    """`cp_round_robin_split_q_seqs` on the host, where the lists have the length that they need.

    >>> cp_round_robin_split_q_seqs_cpu(extend_seq_lens=[5, 0, 1], cp_size=3, cp_rank=2, variant={})
    {'q_lens': [1, 1], 'bs_idx': [0, 2]}
    """
    q_lens, bs_idx, first = [], [], 0
    for i in range(len(extend_seq_lens)):
        count = len(_owned(first, extend_seq_lens[i], cp_size, cp_rank))
        if count > 0:
            q_lens.append(count)
            bs_idx.append(i)
        first += extend_seq_lens[i]
    return {"q_lens": q_lens, "bs_idx": bs_idx}


CP_ROUND_ROBIN_SPLIT_Q_SEQS_CPU = Contract(
    name="cp_round_robin_split_q_seqs_cpu",
    family="indexer",
    doc="Per-rank query counts under round-robin context parallelism, on the host.",
    origin="SGLang nsa_cp_round_robin_split_q_seqs_cpu",
    case=CpRoundRobinSplitQSeqsCpu,
    oracle=cp_round_robin_split_q_seqs_cpu,
    kind=Kind.HOST,
    scalars=(Scalar("extend_seq_lens", "list: query tokens per request"), *_RANKS),
    upstream_names=("nsa_cp_round_robin_split_q_seqs_cpu",),
)


# -- cp_round_robin_split -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CpRoundRobinSplit(Case):
    """`tokens` values of any int32, of which rank `cp_rank` gets every `cp_size`-th."""

    tokens: int
    cp_size: int = 1
    cp_rank: int = 0
    spare: int = 0
    content: int = 0

    def count(self) -> int:
        return len(range(self.cp_rank, self.tokens, self.cp_size))

    def batch_size(self) -> int:
        return self.tokens

    def dims(self) -> dict[str, int]:
        return {"tokens": self.tokens, "count": self.count()}

    def values(self, name: str, count: int) -> np.ndarray:
        return hashing.cells(self.content, name, np.arange(count)).astype(np.uint32).view(np.int32).astype(np.int64)

    def arguments(self) -> dict:
        return {
            "x": vector(self.values("x", self.tokens)),
            "split": Output((self.count() + self.spare,)),
            "cp_size": self.cp_size,
            "cp_rank": self.cp_rank,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "x":
            return f"token {index[0]}"
        if index[0] >= self.count():
            return f"it is past the rank's {self.count()} tokens"
        return f"token {self.cp_rank + index[0] * self.cp_size}"


def cp_round_robin_split(*, x, split, cp_size, cp_rank, variant):
    """The values of tokens `cp_rank`, `cp_rank + cp_size`, ...; none where there are fewer tokens than that.

    >>> from harness.states import Cells
    >>> out = Cells((3,))
    >>> cp_round_robin_split(x=[10, 11, 12, 13, 14], split=out, cp_size=3, cp_rank=1, variant={})
    >>> out
    Cells([11 14 .])
    """
    row = 0
    for token in range(len(x)):
        if token % cp_size == cp_rank:
            split[row] = x[token]
            row += 1


CP_ROUND_ROBIN_SPLIT = Contract(
    name="cp_round_robin_split",
    family="indexer",
    doc="The rank's tokens of a 1-D tensor: positions, expanded lengths, key ranges.",
    origin="SGLang nsa_cp_round_robin_split_data",
    case=CpRoundRobinSplit,
    oracle=cp_round_robin_split,
    args=(
        Arg("x", Role.IN, ("tokens",), INT, "a value per token; fits the dtype of split", ANY_STRIDES, sets_size=True,
            cells="live"),
        Arg("split", Role.OUT, ("count",), INT, "the values of the rank's tokens", cells="written, untouched"),
    ),
    scalars=_RANKS,
    capturable=True,
    frozen_by_capture=("tokens", "cp_size", "cp_rank"),
    upstream_names=("nsa_cp_round_robin_split_data", "cp_split_and_rebuild_position"),
)


@dataclass(frozen=True, repr=False)
class CpRoundRobinSplitRows(CpRoundRobinSplit):
    """`tokens` rows of `columns` values."""

    columns: int = 1

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "columns": self.columns}

    def arguments(self) -> dict:
        rows = {t: self.values(f"x {t}", self.columns) for t in range(self.tokens)}
        arguments = super().arguments()
        arguments["x"] = table((self.tokens, self.columns), rows)
        arguments["split"] = Output((self.count() + self.spare, self.columns + self.spare))
        return arguments

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "split" and index[1] >= self.columns:
            return f"it is past the rows' {self.columns} columns"
        return super().meaning(name, index)


def cp_round_robin_split_rows(*, x, split, cp_size, cp_rank, variant):
    """The rows of tokens `cp_rank`, `cp_rank + cp_size`, ...

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> out = Cells((2, 3))
    >>> cp_round_robin_split_rows(x=table((3, 2), {0: [1, 2], 1: [3, 4], 2: [5, 6]}).view(), split=out, cp_size=2,
    ...                           cp_rank=0, variant={})
    >>> out
    Cells([1 2 .]
          [5 6 .])
    """
    tokens, columns = x.shape
    row = 0
    for token in range(tokens):
        if token % cp_size == cp_rank:
            split[row, 0:columns] = x[token, 0:columns]
            row += 1


CP_ROUND_ROBIN_SPLIT_ROWS = Contract(
    name="cp_round_robin_split_rows",
    family="indexer",
    doc="The rank's tokens of a 2-D tensor with one row per token.",
    origin="SGLang nsa_cp_round_robin_split_data; fewer tokens than ranks (#19656)",
    case=CpRoundRobinSplitRows,
    oracle=cp_round_robin_split_rows,
    args=(
        Arg("x", Role.IN, ("tokens", "columns"), INT, "a row per token; fits the dtype of split", FAR_ROWS, sets_size=True,
            cells="live"),
        Arg("split", Role.OUT, ("count", "columns"), INT, "the rows of the rank's tokens", FAR_ROWS,
            cells="written, untouched"),
    ),
    scalars=_RANKS,
    capturable=True,
    frozen_by_capture=("tokens", "columns", "cp_size", "cp_rank"),
    upstream_names=("nsa_cp_round_robin_split_data", "cp_split_and_rebuild_data"),
)


# -- cp_zigzag_split ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CpZigzagSplit(Case):
    """`requests`, `times` over, and `padding` tokens that count for the last of them."""

    requests: tuple[Req, ...]
    times: int = 1
    padding: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    spare: int = 0
    total_len: int | None = None

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.times

    def num_tokens(self) -> int:
        return sum(r.extend_len for r in self.batch) + (self.padding if self.batch else 0)

    def total(self) -> int:
        if self.total_len is not None:
            return self.total_len
        lengths = _padded([r.extend_len for r in self.batch], self.num_tokens())
        segments = [_segments(n, self.cp_size) for n in lengths]
        return sum(s[self.cp_rank] + s[2 * self.cp_size - 1 - self.cp_rank] for s in segments)

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "tokens": self.total()}

    def arguments(self) -> dict:
        bs = len(self.batch)
        return {
            "extend_seq_lens": vector([r.extend_len for r in self.batch], self.spare),
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "token_indices": Output((self.total() + self.spare,)),
            "q_lens": Output((2 * bs + self.spare,)),
            "kv_lens": Output((2 * bs + self.spare,)),
            "bs": bs,
            "num_tokens": self.num_tokens(),
            "total_len": self.total(),
            "cp_size": self.cp_size,
            "cp_rank": self.cp_rank,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        bs = len(self.batch)
        if name in ("extend_seq_lens", "seq_lens"):
            return f"request {index[0]}"
        if name == "token_indices":
            within = index[0] < self.total()
            return "a token of the rank" if within else f"it is past the rank's {self.total()} query tokens"
        if index[0] >= 2 * bs:
            return f"it is past the batch's {2 * bs} segments"
        return f"the {'early' if index[0] < bs else 'late'} segment of request {index[0] % bs}"


def _padded(extends: list[int], num_tokens: int) -> list[int]:
    """The extend lengths of a batch of `num_tokens` tokens: the last request takes the padding."""
    padding = max(num_tokens - sum(extends), 0)
    return [*extends[:-1], extends[-1] + padding] if extends else []


def _segments(length: int, cp_size: int) -> list[int]:
    """The lengths of 2 * cp_size segments that differ by at most one, longer ones first.

    >>> _segments(11, cp_size=2)
    [3, 3, 3, 2]
    """
    lengths = [0] * (2 * cp_size)
    for k in range(length):
        lengths[k % (2 * cp_size)] += 1
    return lengths


def cp_zigzag_split(*, extend_seq_lens, seq_lens, token_indices, q_lens, kv_lens, bs, num_tokens, total_len, cp_size, cp_rank,
                    variant):
    """The rank's query tokens: the early segments of all requests, then the late ones. `kv_lens`: the keys of the request
    up to the end of the segment.

    Tokens 0 to 4 belong to request 0, which has 10 keys before them; 5 to 9 to request 1. Rank 0 of 2 has the first
    and the last of each request's four segments:

    >>> from harness.states import Cells
    >>> tokens, q_lens, kv_lens = Cells((6,)), Cells((4,)), Cells((4,))
    >>> cp_zigzag_split(extend_seq_lens=[5, 5], seq_lens=[15, 5], token_indices=tokens, q_lens=q_lens, kv_lens=kv_lens,
    ...                 bs=2, num_tokens=10, total_len=6, cp_size=2, cp_rank=0, variant={"prefix": "counted"})
    >>> tokens, q_lens, kv_lens
    (Cells([0 1 5 6 4 9]), Cells([2 2 1 1]), Cells([12 2 15 5]))
    """
    extends = _padded([int(extend_seq_lens[i]) for i in range(bs)], num_tokens)
    row = 0
    for half, segment in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
        first = 0
        for i in range(bs):
            segments = _segments(extends[i], cp_size)
            start = sum(segments[:segment])
            for t in range(segments[segment]):
                token_indices[row] = first + start + t
                row += 1
            prefix = seq_lens[i] - extend_seq_lens[i] if variant["prefix"] == "counted" else 0
            q_lens[half * bs + i] = segments[segment]
            kv_lens[half * bs + i] = prefix + start + segments[segment]
            first += extends[i]


PREFIX = Variant("prefix", {
    "counted": "SGLang 0.5.23 ZigzagCPStrategy: keys include the cached prefix",
    "left_out": "SGLang up to #23269: keys of this extend only; the indexer adds seq_len - extend_len",
})

def _negative_last(case: CpZigzagSplit) -> CpZigzagSplit:
    """The last request's early segment, which lies before every late one, undoes all of these; num_tokens stays right."""
    least = 2 * case.cp_size * (1 + case.num_tokens())
    last = replace(case.requests[-1], extend_len=-least)
    return replace(case, requests=(*case.requests[:-1], last), padding=least, total_len=case.total())


CP_ZIGZAG_SPLIT = Contract(
    name="cp_zigzag_split",
    family="indexer",
    doc="The rank's tokens under in-sequence (zigzag) context parallelism, with the lengths of its segments and their keys.",
    origin="SGLang prepare_input_dp_with_cp_dsa for one request, #23269 for several",
    case=CpZigzagSplit,
    oracle=cp_zigzag_split,
    args=(
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, cells="live, slack"),
        Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request, new tokens included", ANY_STRIDES, cells="live, slack"),
        Arg("token_indices", Role.OUT, ("tokens",), INT32, "the rank's query tokens by their place in the batch",
            cells="written, untouched"),
        Arg("q_lens", Role.OUT, ("bs + bs",), INT32, "query tokens per segment: early ones of all requests, then late ones",
            cells="written, untouched"),
        Arg("kv_lens", Role.OUT, ("bs + bs",), INT32, "keys up to the end of each segment", cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests"),
        Scalar("num_tokens", "query tokens in the (padded) batch; the last request takes the padding"),
        Scalar("total_len", "query tokens of this rank"),
        *_RANKS,
    ),
    variants=(PREFIX,),
    preconditions=(
        Precondition("queries are keys too", "extend_seq_lens <= seq_lens", "seq_lens = prefix + extend_seq_lens",
                     _more_queries_than_keys),
        Precondition("total_len is the sum", "total_len == sum(q_lens)", "the split input has that many rows", _one_less),
        Precondition("num_tokens counts every token", "num_tokens >= sum(extend_seq_lens)", "padding only adds tokens",
                     lambda c: replace(c, padding=-sum(r.extend_len for r in c.batch), total_len=c.total())
                     if c.batch else None),
        Precondition("lengths are not negative", "extend_seq_lens >= 0", "a tensor has no -1 rows",
                     lambda c: (_negative(replace(c, total_len=c.total())), _negative_last(c))
                     if len(c.requests) > 1 and c.times == 1 else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "num_tokens", "total_len", "cp_size", "cp_rank"),
    upstream_names=("prepare_input_dp_with_cp_dsa", "ZigzagCPStrategy.build_metadata", "cp_split_and_rebuild_data"),
)


@dataclass(frozen=True, repr=False)
class CpZigzagMetadata(Case):
    """`padding` tokens count for the last of the `requests`."""

    requests: tuple[Req, ...]
    padding: int = 0
    cp_size: int = 1
    cp_rank: int = 0

    def batch_size(self) -> int:
        return len(self.requests)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        extends = [r.extend_len for r in self.requests]
        return {
            "extend_seq_lens": extends,
            "seq_lens": [r.seq_len for r in self.requests],
            "num_tokens": sum(extends) + (self.padding if extends else 0),
            "cp_size": self.cp_size,
            "cp_rank": self.cp_rank,
        }


def cp_zigzag_metadata(*, extend_seq_lens, seq_lens, num_tokens, cp_size, cp_rank, variant):
    """The lists by which tensors are split and gathered again.

    `zigzag_index`: the rank's segments in `split_list`. Gathering all ranks in order gives segments of the lengths
    `reverse_split_len`; taken in the order of `cp_reverse_index` they are the batch again.

    >>> answer = cp_zigzag_metadata(extend_seq_lens=[5, 4], seq_lens=[15, 4], num_tokens=9, cp_size=2, cp_rank=1,
    ...                             variant={"prefix": "counted"})
    >>> for name, value in answer.items():
    ...     print(name, value)
    can_split True
    split_list [2, 1, 1, 1, 1, 1, 1, 1]
    zigzag_index [1, 5, 2, 6]
    per_rank_actual_token [5, 4]
    max_rank_len [5, 5]
    reverse_split_len [2, 1, 1, 1, 1, 1, 1, 1]
    cp_reverse_index [0, 4, 6, 2, 1, 5, 7, 3]
    q_lens_prev [1, 1]
    q_lens_next [1, 1]
    kv_lens_prev [13, 2]
    kv_lens_next [14, 3]
    """
    bs, parts = len(extend_seq_lens), 2 * cp_size
    extends = _padded(extend_seq_lens, num_tokens)
    segments = [_segments(n, cp_size) for n in extends]
    prefixes = [s - e if variant["prefix"] == "counted" else 0 for s, e in zip(seq_lens, extend_seq_lens)]
    gathered = [(i, s) for rank in range(cp_size) for s in (rank, parts - 1 - rank) for i in range(bs)]
    tokens = [sum(segments[i][rank] + segments[i][parts - 1 - rank] for i in range(bs)) for rank in range(cp_size)]
    late = parts - 1 - cp_rank
    return {
        "can_split": cp_size > 1 and bs > 0 and all(n >= parts for n in extend_seq_lens),
        "split_list": [n for request in segments for n in request],
        "zigzag_index": [i * parts + s for s in (cp_rank, late) for i in range(bs)],
        "per_rank_actual_token": tokens,
        "max_rank_len": [max(tokens)] * cp_size,
        "reverse_split_len": [segments[i][s] for i, s in gathered],
        "cp_reverse_index": [gathered.index((i, s)) for i in range(bs) for s in range(parts)],
        "q_lens_prev": [request[cp_rank] for request in segments],
        "q_lens_next": [request[late] for request in segments],
        "kv_lens_prev": [p + sum(request[: cp_rank + 1]) for p, request in zip(prefixes, segments)],
        "kv_lens_next": [p + sum(request[: late + 1]) for p, request in zip(prefixes, segments)],
    }


CP_ZIGZAG_METADATA = Contract(
    name="cp_zigzag_metadata",
    family="indexer",
    doc="How a batch is split over the ranks under in-sequence (zigzag) context parallelism, and put together again.",
    origin="SGLang prepare_input_dp_with_cp_dsa for one request, #23269 for several",
    case=CpZigzagMetadata,
    oracle=cp_zigzag_metadata,
    kind=Kind.HOST,
    scalars=(
        Scalar("extend_seq_lens", "list: query tokens per request"),
        Scalar("seq_lens", "list: keys per request, new tokens included"),
        Scalar("num_tokens", "query tokens in the (padded) batch; the last request takes the padding"),
        *_RANKS,
    ),
    variants=(PREFIX,),
    upstream_names=("prepare_input_dp_with_cp_dsa", "ZigzagCPStrategy.build_metadata", "can_cp_split"),
)

CONTRACTS = (INDEXER_K_START_END, CP_ROUND_ROBIN_SPLIT_Q_SEQS, CP_ROUND_ROBIN_SPLIT_Q_SEQS_CPU, CP_ROUND_ROBIN_SPLIT,
             CP_ROUND_ROBIN_SPLIT_ROWS, CP_ZIGZAG_SPLIT, CP_ZIGZAG_METADATA)
