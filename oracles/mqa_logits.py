"""Index scores of a prefill, in row chunks when memory is short: the budget, the chunks, the scores, and their top-k.

| transform               | fills                   | from                                                              |
| ----------------------- | ----------------------- | ----------------------------------------------------------------- |
| mqa_logits_budget       | (returns byte counts)   | queries of free and total memory, mem_fraction_static             |
| should_chunk_mqa_logits | (returns whether, bytes) | num_q, num_k, budget                                             |
| mqa_logits_chunk_plan   | (returns row ranges)    | num_q, num_k, budget                                              |
| mqa_logits              | logits                  | q, k, k_scale, weights, key ranges ks and ke                      |
| topk_ragged_chunked     | topk_result             | logits, ks, lengths, topk_indices_offset; max_rows rows at a time |
| topk_paged_chunked      | topk_result             | logits, ks, lengths, page_table_1, token_to_batch_idx; likewise   |

A row is one query token. The keys of all requests stand behind one another; row i sees keys ks[i] ... ke[i] - 1, which is
`lengths[i]` keys. How many rows are processed at a time must not show in any result.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import floats, hashing
from harness.contract import ANY_STRIDES, INT32, ROWS_STRIDED, Arg, Case, Contract, Kind, Precondition, Role, Scalar, Variant
from harness.states import Judge, within
from harness.tensors import Input, Output, Region, runs, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")
BYTES_PER_LOGIT = 4
SKIP_BELOW = 8_000_000  # logits; fewer are never chunked
TOTAL_FRACTION = 0.3  # of the device's memory, at most


# -- mqa_logits_budget --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """Someone asks for the budget of `device`, which has `free` of `total` bytes; `capturing` while a graph is captured."""

    device: int
    free: int
    total: int
    capturing: bool = False


@dataclass(frozen=True, repr=False)
class MqaLogitsBudget(Case):
    """Queries, one after the other, on a fresh cache. Unless `readable`, a reading that must not be taken is None."""

    queries: tuple[Query, ...]
    mem_fraction_static: float | None = None
    free_fraction: float = 0.2
    readable: bool = True

    def dims(self) -> dict[str, int]:
        return {}

    def batch_size(self) -> int:
        return len(self.queries)

    def arguments(self) -> dict:
        asked, cached = [], set()
        for query in self.queries:
            needs_total = self.readable or query.device not in cached
            needs_free = self.readable or needs_total and not query.capturing
            asked.append([query.device, query.free if needs_free else None, query.total if needs_total else None,
                          query.capturing])
            cached |= set() if query.capturing else {query.device}
        return {"queries": asked, "mem_fraction_static": self.mem_fraction_static, "free_fraction": self.free_fraction}


def mqa_logits_budget(*, queries, mem_fraction_static, free_fraction, variant):
    """The bytes that logits may take, per query. The first query outside a capture measures; its answer stays for good.

    A capture must not synchronise, so it neither reads free memory nor leaves its answer to others.

    >>> asked = [[0, 500, 1000, True], [0, 500, 1000, False], [0, 10, 1000, False], [1, 10, 1000, False]]
    >>> mqa_logits_budget(queries=asked, mem_fraction_static=None, free_fraction=0.2, variant={})
    [300, 100, 100, 2]
    >>> mqa_logits_budget(queries=asked, mem_fraction_static=0.75, free_fraction=0.2, variant={})
    [50, 50, 50, 2]
    >>> mqa_logits_budget(queries=asked, mem_fraction_static=1.0, free_fraction=0.2, variant={})
    [1, 1, 1, 1]
    """
    cached = {}
    answers = []
    for device, free, total, capturing in queries:
        if device in cached:
            answers.append(cached[device])
            continue
        static = int(total * TOTAL_FRACTION)
        if mem_fraction_static is not None:
            left_over = int(total * max(0.0, 1.0 - mem_fraction_static))
            static = min(int(left_over * free_fraction), static)
        static = max(1, static)
        if capturing:
            answers.append(static)
        else:
            cached[device] = max(1, min(int(free * free_fraction), static))
            answers.append(cached[device])
    return answers


MQA_LOGITS_BUDGET = Contract(
    name="mqa_logits_budget",
    family="mqa_logits",
    doc="How many bytes of logits a prefill may hold at once: measured once per device, static while capturing.",
    origin="SGLang #25299 Indexer._get_mqa_logits_budget_bytes; free-memory fraction of #25859",
    case=MqaLogitsBudget,
    oracle=mqa_logits_budget,
    kind=Kind.HOST,
    scalars=(
        Scalar("queries", "list of [device, free bytes, total bytes, capturing], asked in turn of a fresh cache; a reading "
                          "that the answer does not need may be None"),
        Scalar("mem_fraction_static", "share of memory that weights and KV cache take, or None; more than 1 counts as 1"),
        Scalar("free_fraction", "share of free memory that logits may take: 0.5 in #25299, 0.2 by default since #25859"),
    ),
    upstream_names=("_get_mqa_logits_budget_bytes",),
)


# -- should_chunk_mqa_logits --------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ShouldChunkMqaLogits(Case):
    """`num_q` query rows against `num_k` keys; a budget of None was never measured."""

    num_q: int
    num_k: int
    budget: int | None

    def dims(self) -> dict[str, int]:
        return {}

    def batch_size(self) -> int:
        return self.num_q

    def arguments(self) -> dict:
        return {"num_q": self.num_q, "num_k": self.num_k, "budget": self.budget}


def should_chunk_mqa_logits(*, num_q, num_k, budget, variant):
    """Whether the fp32 logits exceed the budget, and the budget; few logits never do and need none.

    >>> should_chunk_mqa_logits(num_q=2000, num_k=4000, budget=32_000_000, variant={})
    [False, 32000000]
    >>> should_chunk_mqa_logits(num_q=2000, num_k=4000, budget=31_999_999, variant={})
    [True, 31999999]
    >>> should_chunk_mqa_logits(num_q=1999, num_k=4000, budget=None, variant={})
    [False, 0]
    """
    if num_q * num_k < SKIP_BELOW:
        return [False, 0]
    return [num_q * num_k * BYTES_PER_LOGIT > budget, budget]


SHOULD_CHUNK_MQA_LOGITS = Contract(
    name="should_chunk_mqa_logits",
    family="mqa_logits",
    doc="Whether the logits of a prefill have to be computed in chunks of rows.",
    origin="SGLang #25299 Indexer._should_chunk_mqa_logits",
    case=ShouldChunkMqaLogits,
    oracle=should_chunk_mqa_logits,
    kind=Kind.HOST,
    scalars=(
        Scalar("num_q", "query rows"), Scalar("num_k", "keys"),
        Scalar("budget", "answer of mqa_logits_budget, in bytes; not looked at below 8,000,000 logits, where it may be None"),
    ),
    upstream_names=("_should_chunk_mqa_logits", "mqa_logits_should_chunk"),
)


# -- mqa_logits_chunk_plan ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MqaLogitsChunkPlan(Case):
    num_q: int
    num_k: int
    budget: int

    def dims(self) -> dict[str, int]:
        return {}

    def batch_size(self) -> int:
        return self.num_q

    def arguments(self) -> dict:
        return {"num_q": self.num_q, "num_k": self.num_k, "budget": self.budget}


def mqa_logits_chunk_plan(*, num_q, num_k, budget, variant):
    """Row ranges [start, stop) of as many rows as the budget holds, at least one; the last may be shorter.

    >>> mqa_logits_chunk_plan(num_q=7, num_k=10, budget=130, variant={})
    [[0, 3], [3, 6], [6, 7]]
    >>> mqa_logits_chunk_plan(num_q=2, num_k=10, budget=1, variant={})
    [[0, 1], [1, 2]]
    """
    bytes_per_row = max(1, num_k * BYTES_PER_LOGIT)
    max_rows = max(1, budget // bytes_per_row)
    chunks = []
    start = 0
    while start < num_q:
        stop = min(start + max_rows, num_q)
        chunks.append([start, stop])
        start = stop
    return chunks


MQA_LOGITS_CHUNK_PLAN = Contract(
    name="mqa_logits_chunk_plan",
    family="mqa_logits",
    doc="The chunks of rows in which the logits of a prefill are computed.",
    origin="SGLang #25299 Indexer._get_topk_ragged",
    case=MqaLogitsChunkPlan,
    oracle=mqa_logits_chunk_plan,
    kind=Kind.HOST,
    scalars=(Scalar("num_q", "query rows"), Scalar("num_k", "keys"), Scalar("budget", "bytes of logits, at least 1")),
    preconditions=(
        Precondition("the budget is one", "budget >= 1", "0 is what should_chunk_mqa_logits answers for 'no chunks' (#25299)",
                     lambda c: replace(c, budget=0) if c.num_q else None),
    ),
    upstream_names=("the chunk loop of _get_topk_ragged",),
)


# -- rows of a prefill --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Req:
    """A request: `extend_len` new query tokens, `seq_len` keys in all (those of the new tokens included).

    A padded one has seq_len 1 and more query tokens than keys, so that its first rows see none.
    """

    extend_len: int
    seq_len: int


@dataclass(frozen=True)
class Row:
    """One query token: of which request, where that request's keys start, and how many of them it sees."""

    request: int
    ks: int
    length: int


@dataclass(frozen=True, repr=False)
class _Prefill(Case):
    """What scores and top-k share: `key_spare` keys behind those of the requests, `spare` cells of unused capacity."""

    requests: tuple[Req, ...]
    key_spare: int = 0
    spare: int = 0
    content: int = 0

    @cached_property
    def rows(self) -> list[Row]:
        rows, first = [], 0
        for i, r in enumerate(self.requests):
            rows += [Row(i, first, r.seq_len - r.extend_len + 1 + t) for t in range(r.extend_len)]
            first += r.seq_len
        return rows

    def keys(self) -> int:
        return sum(r.seq_len for r in self.requests) + self.key_spare

    def batch_size(self) -> int:
        return len(self.requests)

    def row_meaning(self, row: int) -> str:
        if row >= len(self.rows):
            return f"it is past the {len(self.rows)} query tokens"
        r = self.rows[row]
        return f"query token {row}, of request {r.request}, sees {r.length} keys from {r.ks} on"


# -- mqa_logits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MqaLogits(_Prefill):
    """kind: small (integers, exact in fp32), wide (any finite e4m3 number) or negative (relu leaves nothing).
    `stretch` keys are claimed beyond the last one."""

    heads: int = 4
    head_dim: int = 16
    clean: bool = True
    kind: str = "small"
    stretch: int = 0

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.rows), "heads": self.heads, "head_dim": self.head_dim, "keys": self.keys()}

    def _codes(self, name: str, count: int) -> np.ndarray:
        raw = hashing.cells(self.content, name, np.arange(count))
        if self.kind == "small":
            return (raw % np.uint64(5)).astype(np.float64) - 2
        code = (raw % np.uint64(127) + np.uint64(128) * (raw >> np.uint64(63))).astype(np.uint8)  # 127 and 255 are NaN
        values = floats.decode(code, "float8_e4m3fn")
        if self.kind == "negative":
            return np.abs(values) if name == "q" else -np.abs(values)
        return values

    def _floats(self, name: str, count: int) -> np.ndarray:
        raw = hashing.cells(self.content, name, np.arange(count))
        if self.kind == "small":
            return 2.0 ** (raw % np.uint64(4)).astype(np.float64) / 4 * np.where(raw >> np.uint64(63), -1, 1)
        values = 0.001 + (raw >> np.uint64(40)).astype(np.float64) / 2**20
        return (values * np.where(raw >> np.uint64(63), -1, 1)).astype(np.float32).astype(np.float64)

    def _seen(self) -> list[int]:
        """The keys that any row sees; the others may hold anything."""
        return sorted({j for r in self.rows for j in range(r.ks, r.ks + r.length)} & set(range(self.keys())))

    def arguments(self) -> dict:
        rows, heads, dim, keys = len(self.rows), self.heads, self.head_dim, self.keys()
        k, scale = self._codes("k", keys * dim).reshape(keys, dim), np.abs(self._floats("k_scale", keys))
        seen = self._seen()
        return {
            "q": _rows_of((rows + self.spare, heads, dim), self._codes("q", rows * heads * dim)),
            "k": runs((keys, dim), {j * dim: k[j] for j in seen}, Region.SLACK),
            "k_scale": runs((keys,), {j: scale[j : j + 1] for j in seen}, Region.SLACK),
            "weights": _rows_of((rows + self.spare, heads), self._floats("weights", rows * heads)),
            "ks": vector([r.ks for r in self.rows]),
            "ke": vector([r.ks + r.length + self.stretch for r in self.rows], self.spare),
            "logits": Output((rows + self.spare, keys + self.spare)),
            "clean_logits": self.clean,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "logits" and index[0] < len(self.rows) and index[1] >= self.keys():
            return f"there are only {self.keys()} keys"
        return self.row_meaning(index[0])


def _rows_of(shape: tuple[int, ...], values: np.ndarray) -> Input:
    """The first rows of a tensor, followed by rows that do not matter."""
    return runs(shape, {0: values}, Region.SLACK)


def mqa_logits(*, q, k, k_scale, weights, ks, ke, logits, clean_logits, variant):
    """logits[i, j] = sum over heads h of weights[i, h] * relu(q[i, h] . k[j]) * k_scale[j], for keys that row i sees.

    Every other key of the row is -inf if `clean_logits`, and anything at all otherwise. Sums may be taken in any order
    of fp32 additions, so a score may be off by one rounding per addition, of the sum of the terms' sizes. An fp8 tensor
    core adds 32 products at a time to the sum so far, and of each of these 33 keeps 13 bits behind the largest's first.

    >>> from harness.states import Cells
    >>> from harness.tensors import dense
    >>> out = Cells((2, 4))
    >>> mqa_logits(q=dense([[[1., 2.]], [[3., 0.]]]).view(), k=dense([[1., 1.], [-1., 0.], [0., 5.]]).view(),
    ...            k_scale=dense([1., 1., .5]).view(), weights=dense([[2.], [-1.]]).view(), ks=[0, 1], ke=[2, 3], logits=out,
    ...            clean_logits=True, variant={"sums": "fp32"})
    >>> out
    Cells([~ ~ -inf .]
          [-inf ~ ~ .])
    >>> [judge.complaint(np.array([6., 0.])) for _, judge in out.judges[:1]]
    [None]
    """
    keys, heads, head_dim = k.shape[0], q.shape[1], q.shape[2]
    rounding = np.finfo(np.float32).eps * (head_dim + heads + 8)
    if variant["sums"] == "fp8_tensor_core":
        rounding += -(-head_dim // 32) * 33 * 2.0**-13
    for i in range(len(ks)):
        if clean_logits:
            logits[i, 0:keys] = -np.inf
        else:
            logits.free((i, slice(0, keys)), "not cleaned")
        scores, bounds = [], []
        for j in range(ks[i], ke[i]):
            score = size = 0.0
            for h in range(heads):
                terms = q[i, h, 0:head_dim] * k[j, 0:head_dim]
                score += weights[i, h] * max(terms.sum(), 0.0) * k_scale[j,]
                size += abs(weights[i, h]) * np.abs(terms).sum() * abs(k_scale[j,])
            scores.append(score)
            bounds.append(rounding * size)
        if scores:
            logits.judge((i, slice(ks[i], ke[i])), within(np.array(scores), np.array(bounds)))


MQA_LOGITS = Contract(
    name="mqa_logits",
    family="mqa_logits",
    doc="Scores of every query token against the keys that it sees, summed over the indexer's heads.",
    origin="DeepGEMM fp8_mqa_logits as SGLang's NSA indexer calls it; key ranges of SGLang #12583",
    case=MqaLogits,
    oracle=mqa_logits,
    args=(
        Arg("q", Role.IN, ("rows", "heads", "head_dim"), ("float8_e4m3fn",), "queries, finite", FAR_ROWS,
            cells="live, slack"),
        Arg("k", Role.IN, ("keys", "head_dim"), ("float8_e4m3fn",), "keys, finite where a row sees them",
            FAR_ROWS, cells="live, slack"),
        Arg("k_scale", Role.IN, ("keys",), ("float32",), "scale of every key", ROWS_STRIDED, sets_size=True,
            cells="live, slack"),
        Arg("weights", Role.IN, ("rows", "heads"), ("float32",), "weight of every head, scales of q included",
            ROWS_STRIDED, cells="live, slack"),
        Arg("ks", Role.IN, ("rows",), INT32, "first key that the row sees", ANY_STRIDES, sets_size=True, cells="live"),
        Arg("ke", Role.IN, ("rows",), INT32, "key behind the last one; at most ks for a row that sees none", ANY_STRIDES,
            cells="live, slack"),
        Arg("logits", Role.OUT, ("rows", "keys"), ("float32",), "scores", FAR_ROWS,
            cells="written, judged, untouched, don't care"),
    ),
    scalars=(Scalar("clean_logits", "whether keys that a row does not see get -inf; SGLang passes False"),),
    variants=(
        Variant("sums", {
            "fp32": "products are added up in fp32, as fp16 tensor cores do",
            "fp8_tensor_core": "Hopper's fp8 tensor cores, as DeepGEMM and tl.dot on fp8 use them",
        }),
    ),
    preconditions=(
        Precondition("ranges lie inside the keys", "0 <= ks and ke <= keys", "fp8_mqa_logits: unchecked",
                     lambda c: replace(c, stretch=c.key_spare + 3) if c.rows else None),
    ),
    capturable=True,
    frozen_by_capture=("rows", "keys", "clean_logits"),
    upstream_names=("deep_gemm.fp8_mqa_logits",),
)


# -- chunked top-k ------------------------------------------------------------------------------------------------------


def _scores(kind: str, raw: np.ndarray) -> np.ndarray:
    """Scores that fp32 holds exactly."""
    if kind == "ties":
        return (raw % np.uint64(4)).astype(np.float64)
    if kind == "equal":
        return np.full(raw.shape, 1.5)
    if kind == "relu":  # half of them 0, as behind a relu
        return np.maximum((raw >> np.uint64(44)).astype(np.float64) - 2**19, 0) / 1024
    if kind == "clustered":  # different, yet the same number in fp16
        return 1 + (raw % np.uint64(4096)).astype(np.float64) * 2.0**-23
    if kind == "zeros":
        return np.array([0.0, -0.0, 2.0**-140, -(2.0**-140)])[raw % np.uint64(4)]
    if kind == "infinite":
        return np.array([-np.inf, -1.0, 0.0, 2.0, np.inf])[raw % np.uint64(5)]
    if kind == "rising":  # the newest keys are the best
        return np.broadcast_to(np.arange(raw.shape[-1], dtype=np.float64), raw.shape)
    return ((raw >> np.uint64(40)).astype(np.float64) - 2**23) / 4096


SCORE_KINDS = ("distinct", "ties", "relu", "clustered", "equal", "zeros", "infinite", "rising")


@dataclass(frozen=True, repr=False)
class _ChunkedTopk(_Prefill):
    """index_topk selected keys per row; max_rows rows at a time; `padding` rows of padding in the result; `kind` as in
    SCORE_KINDS; `early`: columns in front of the logits where the first row's keys start."""

    index_topk: int = 4
    max_rows: int = 1
    padding: int = 0
    kind: str = "distinct"
    early: int = 0

    def token_nums(self) -> int:
        return len(self.rows) + self.padding

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.rows), "token_nums": self.token_nums(), "index_topk": self.index_topk, "keys": 1,
                "requests": 1, "width": 1}

    def logits(self) -> Input:
        """Rows of at most index_topk keys are selected whatever their scores; what a row does not see is arbitrary."""
        live = {}
        for i, r in enumerate(self.rows):
            if r.length > self.index_topk:
                columns = np.arange(r.ks, min(r.ks + r.length, self.keys()))
                live[i * self.keys() + r.ks] = _scores(self.kind, hashing.cells(self.content, f"logits {i}", columns))
        return runs((len(self.rows), self.keys()), {k: v for k, v in live.items() if len(v)}, Region.SLACK)

    def arguments(self) -> dict:
        return {
            "logits": self.logits(),
            "ks": vector([-self.early if self.early and i == 0 else r.ks for i, r in enumerate(self.rows)]),
            "lengths": vector([r.length for r in self.rows], self.spare),
            "topk_result": Output((self.token_nums() + self.spare, self.index_topk + self.spare)),
            "token_nums": self.token_nums(),
            "index_topk": self.index_topk,
            "max_rows": self.max_rows,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "topk_result" and index[-1] >= self.index_topk:
            return f"only {self.index_topk} keys are selected"
        return self.row_meaning(index[0])


@dataclass(frozen=True, repr=False)
class TopkRaggedChunked(_ChunkedTopk):
    """The keys of request i start `shift` behind ks in the flattened KV."""

    shift: int = 0

    def arguments(self) -> dict:
        return {**super().arguments(), "topk_indices_offset": vector([r.ks + self.shift for r in self.rows], self.spare)}


@dataclass(frozen=True, repr=False)
class TopkPagedChunked(_ChunkedTopk):
    """Request i owns row (i + turn) % requests of the page table, which has `table_extra` columns beyond the longest row.
    `stray` is added to every row number."""

    turn: int = 0
    table_extra: int = 0
    shared: bool = False
    stray: int = 0

    def owner(self, request: int) -> int:
        return (request + self.turn) % len(self.requests)

    def width(self) -> int:
        return max([r.length for r in self.rows if r.length > 0], default=0) + self.table_extra

    def page_table(self) -> Input:
        """The slots of a request, each once; shared pages are those of request 0."""
        longest: dict[int, int] = {}
        for r in self.rows:
            longest[r.request] = max(longest.get(r.request, 0), min(r.length, self.width()))
        slots = {}
        for request, length in longest.items():
            raw = hashing.cells(self.content, f"slots {0 if self.shared else request}", np.arange(length))
            slots[self.owner(request)] = (raw % np.uint64(1 << 16)).astype(np.int64) * 4096 + np.arange(length)
        return table((len(self.requests), self.width()), slots)

    def arguments(self) -> dict:
        return {
            **super().arguments(),
            "page_table_1": self.page_table(),
            "token_to_batch_idx": vector([self.owner(r.request) + self.stray for r in self.rows], self.spare),
        }


def top_of(scores: np.ndarray, count: int, names: np.ndarray) -> Judge:
    """`count` different positions, of which none scores less than a position left out; `names[p]` stands for position p.

    >>> judge = top_of(np.array([5., 1., 5., 5.]), 2, np.array([70, 71, 72, 73]))
    >>> judge.complaint(np.array([72, 70]))
    >>> judge.complaint(np.array([72, 71]))
    '71 (score 1.0) is selected, and 70 (score 5.0) is not'
    >>> judge.complaint(np.array([72, -1]))
    '-1 is none of the 4 keys of the row'
    >>> judge.complaint(np.array([72, 72]))
    '72 is selected twice'
    """
    position = {int(name): p for p, name in enumerate(names)}

    def complaint(actual: np.ndarray) -> str | None:
        picked = []
        for value in actual.tolist():
            if value not in position:
                return f"{value} is none of the {len(position)} keys of the row"
            if position[value] in picked:
                return f"{value} is selected twice"
            picked.append(position[value])
        left_out = [p for p in range(len(scores)) if p not in picked]
        worst, best = min(picked, key=scores.__getitem__), max(left_out, key=scores.__getitem__)
        if scores[best] > scores[worst]:
            return (f"{names[worst]} (score {scores[worst]}) is selected, and {names[best]} (score {scores[best]}) is not")
        return None

    return Judge("top_of", complaint)


def _select(row, logits, first, length, names, topk_result, index_topk):
    """One row of the result. With no more than index_topk keys all are selected, in their order."""
    if length <= index_topk:
        topk_result[row, 0:index_topk] = -1
        for p in range(length):
            topk_result[row, p] = names[p]
    else:
        scores = logits[row, first : first + length]
        topk_result.judge((row, slice(0, index_topk)), top_of(scores, index_topk, names))


def topk_ragged_chunked(*, logits, ks, lengths, topk_indices_offset, topk_result, token_nums, index_topk, max_rows, variant):
    """For every row the index_topk best of its keys, as places in the flattened KV; then -1, also in rows of padding.

    `max_rows` rows are processed at a time, which must not show.

    >>> from harness.states import Cells
    >>> from harness.tensors import dense
    >>> out = Cells((4, 2))
    >>> topk_ragged_chunked(logits=dense([[0., 9., 9.], [7., 8., 6.]]).view(), ks=[0, 0], lengths=[1, 3],
    ...                     topk_indices_offset=[100, 100], topk_result=out, token_nums=3, index_topk=2, max_rows=1, variant={})
    >>> out
    Cells([100 -1]
          [~ ~]
          [-1 -1]
          [. .])
    >>> out.judges[0][1].complaint(np.array([100, 101])), out.judges[0][1].complaint(np.array([100, 102]))
    (None, '102 (score 6.0) is selected, and 101 (score 8.0) is not')
    """
    for row in range(len(ks)):
        names = [topk_indices_offset[row] + p for p in range(lengths[row])]
        _select(row, logits, ks[row], lengths[row], names, topk_result, index_topk)
    for row in range(len(ks), token_nums):
        topk_result[row, 0:index_topk] = -1


def topk_paged_chunked(*, logits, ks, lengths, page_table_1, token_to_batch_idx, topk_result, token_nums, index_topk,
                       max_rows, variant):
    """For every row the index_topk best of its keys, as KV slots of the request that owns the row; then -1.

    `max_rows` rows are processed at a time, which must not show: row 1 below is the first of its chunk, and still
    belongs to request 1 (SGLang #14325).

    >>> from harness.states import Cells
    >>> from harness.tensors import dense
    >>> out = Cells((2, 2))
    >>> topk_paged_chunked(logits=dense([[5., 0., 0., 0.], [0., 8., 6., 7.]]).view(), ks=[0, 1], lengths=[1, 3],
    ...                    page_table_1=dense([[40, 41, 42], [93, 91, 95]]).view(), token_to_batch_idx=[0, 1],
    ...                    topk_result=out, token_nums=2, index_topk=2, max_rows=1, variant={})
    >>> out
    Cells([40 -1]
          [~ ~])
    >>> out.judges[0][1].complaint(np.array([95, 93])), out.judges[0][1].complaint(np.array([40, 42]))
    (None, '40 is none of the 3 keys of the row')
    """
    for row in range(len(ks)):
        names = page_table_1[token_to_batch_idx[row], 0 : max(lengths[row], 0)]
        _select(row, logits, ks[row], lengths[row], names, topk_result, index_topk)
    for row in range(len(ks), token_nums):
        topk_result[row, 0:index_topk] = -1


def _outside_logits(case) -> tuple:
    """Half of the longest row is missing; the first row, of which a key is selected, starts in front of the logits."""
    half = max([r.length for r in case.rows], default=0) // 2
    fewer = (replace(case, key_spare=-half),) if half else ()
    return (*fewer, replace(case, early=1, index_topk=1)) if case.rows and case.rows[0].length > 1 else fewer


def _narrow_table(case: TopkPagedChunked):
    longest = case.width() - case.table_extra
    return replace(case, table_extra=-(longest // 2)) if longest >= 2 else None


_TOPK_ARGS = (
    Arg("logits", Role.IN, ("rows", "keys"), ("float32",), "scores, no NaN among the keys that a row sees", FAR_ROWS,
        cells="live, slack"),
    Arg("ks", Role.IN, ("rows",), INT32, "first key that the row sees", ANY_STRIDES, sets_size=True, cells="live"),
    Arg("lengths", Role.IN, ("rows",), INT32, "keys that the row sees; none if 0 or less", ANY_STRIDES, cells="live, slack"),
)
_TOPK_RESULT = Arg("topk_result", Role.OUT, ("token_nums", "index_topk"), INT32, "selected keys, then -1", FAR_ROWS,
                   cells="written, judged, untouched")
_TOPK_SCALARS = (
    Scalar("token_nums", "rows of the result, those of padding included"),
    Scalar("index_topk", "keys to select per row, at least 1"),
    Scalar("max_rows", "rows to process at a time, at least 1"),
)
_INSIDE_LOGITS = Precondition("ranges lie inside the logits", "0 <= ks and ks + lengths <= logits.shape[1]",
                              "fast_topk: lengths beyond the score's width are unchecked", _outside_logits)

TOPK_RAGGED_CHUNKED = Contract(
    name="topk_ragged_chunked",
    family="mqa_logits",
    doc="Top-k of a prefill's rows as places in the flattened KV, in chunks of rows.",
    origin="SGLang Indexer._get_topk_ragged with topk_transform RAGGED; topk_indices_offset_override of #14325",
    case=TopkRaggedChunked,
    oracle=topk_ragged_chunked,
    args=(*_TOPK_ARGS,
          Arg("topk_indices_offset", Role.IN, ("rows",), INT32, "where the keys of the row's request start", ANY_STRIDES,
              cells="live, slack"),
          _TOPK_RESULT),
    scalars=_TOPK_SCALARS,
    preconditions=(_INSIDE_LOGITS,),
    capturable=True,
    frozen_by_capture=("rows", "token_nums", "index_topk", "max_rows"),
    upstream_names=("_get_topk_ragged", "fast_topk_transform_ragged_fused"),
)

def _strayed(case: TopkPagedChunked) -> tuple[TopkPagedChunked, ...]:
    """Every row number past the table, and every one in front of it."""
    owners = [case.owner(r.request) for r in case.rows]
    strays = (len(case.requests) - min(owners), -1 - max(owners)) if owners else ()
    return tuple(replace(case, stray=s) for s in strays)


TOPK_PAGED_CHUNKED = Contract(
    name="topk_paged_chunked",
    family="mqa_logits",
    doc="Top-k of a prefill's rows as KV slots, in chunks of rows.",
    origin="SGLang Indexer._get_topk_ragged with topk_transform PAGED; token_to_batch_idx of #14325",
    case=TopkPagedChunked,
    oracle=topk_paged_chunked,
    args=(*_TOPK_ARGS,
          Arg("page_table_1", Role.IN, ("requests", "width"), INT32, "KV slot of every token of every request", FAR_ROWS,
              cells="live, slack, forbidden"),
          Arg("token_to_batch_idx", Role.IN, ("rows",), INT32, "row of page_table_1 that the row's request owns", ANY_STRIDES,
              cells="live, slack"),
          _TOPK_RESULT),
    scalars=_TOPK_SCALARS,
    preconditions=(
        _INSIDE_LOGITS,
        Precondition("requests exist", "0 <= token_to_batch_idx < page_table_1.shape[0]", "page_table_1[batch_idx]: a gather",
                     _strayed),
        Precondition("the page table covers every row", "lengths <= page_table_1.shape[1]",
                     "fast_topk_transform_fused: unchecked", _narrow_table),
    ),
    capturable=True,
    frozen_by_capture=("rows", "token_nums", "index_topk", "max_rows"),
    upstream_names=("_get_topk_ragged", "fast_topk_transform_fused"),
)

CONTRACTS = (MQA_LOGITS_BUDGET, SHOULD_CHUNK_MQA_LOGITS, MQA_LOGITS_CHUNK_PLAN, MQA_LOGITS, TOPK_RAGGED_CHUNKED,
             TOPK_PAGED_CHUNKED)
