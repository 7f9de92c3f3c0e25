"""Sequence lengths: per-token expansion, prefix sums, top-k clip with padding, and the padded token count.

| transform         | fills                                | from                                           |
| ----------------- | ------------------------------------ | ---------------------------------------------- |
| seqlens_expand    | seqlens_expanded                     | extend_seq_lens, seq_lens                      |
| cu_seqlens        | cu_seqlens                           | seqlens                                        |
| nsa_cache_seqlens | nsa_cache_seqlens, nsa_cu_seqlens_k  | seqlens_expanded, index_topk, padded_rows      |
| cal_padded_tokens | (returns the padded row count)       | token counts of all ranks, parallel sizes      |
"""

from dataclasses import dataclass, replace
from functools import cached_property

from harness.contract import ANY_STRIDES, INT, INT32, Arg, Case, Contract, Kind, Precondition, Role, Scalar, Variant
from harness.tensors import Output, vector

INT32_MAX = 2**31 - 1


# -- seqlens_expand -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Req:
    """A request: `extend_len` new query tokens, `seq_len` keys in all (those of the new tokens included)."""

    extend_len: int
    seq_len: int


@dataclass(frozen=True, repr=False)
class SeqlensExpand(Case):
    """`requests`, `repeat` times over. `spare` cells of unused capacity lie behind the lengths and the output;
    `max_q_len` exceeds the longest request by `extra`."""

    requests: tuple[Req, ...]
    repeat: int = 1
    extra: int = 0
    spare: int = 0
    total_len: int | None = None

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def total(self) -> int:
        return sum(r.extend_len for r in self.batch) if self.total_len is None else self.total_len

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "rows": self.total()}

    def batch_size(self) -> int:
        return len(self.batch)

    def arguments(self) -> dict:
        return {
            "extend_seq_lens": vector([r.extend_len for r in self.batch]),
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "seqlens_expanded": Output((self.total() + self.spare,)),
            "total_len": self.total(),
            "max_q_len": max([r.extend_len for r in self.batch], default=0) + self.extra,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "seqlens_expanded":
            return f"request {index[0]}"
        first = 0
        for i, r in enumerate(self.batch):
            if index[0] < first + r.extend_len:
                return f"query token {index[0] - first} of request {i} (extend_len {r.extend_len}, seq_len {r.seq_len})"
            first += r.extend_len
        return f"it is past the batch's {first} query tokens"


def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len, variant):
    """For every query token the number of keys it may see: causal, before the top-k clip.

    >>> from harness.states import Cells
    >>> out = Cells((6,))
    >>> seqlens_expand(extend_seq_lens=[3, 0, 2], seq_lens=[10, 7, 4], seqlens_expanded=out, total_len=5, max_q_len=3,
    ...                variant={"clamp": "zero"})
    >>> out
    Cells([8 9 10 3 4 .])

    A padded row has seq_len 1 and more query tokens than keys; its lengths stop at 0 (SGLang #30378):

    >>> out = Cells((4,))
    >>> seqlens_expand(extend_seq_lens=[4], seq_lens=[1], seqlens_expanded=out, total_len=4, max_q_len=4,
    ...                variant={"clamp": "zero"})
    >>> out
    Cells([0 0 0 1])
    """
    row = 0
    for i in range(len(extend_seq_lens)):
        for t in range(extend_seq_lens[i]):
            visible = seq_lens[i] - extend_seq_lens[i] + 1 + t
            if variant["clamp"] == "zero":
                visible = max(visible, 0)
            seqlens_expanded[row] = visible
            row += 1


CLAMP = Variant("clamp", {
    "zero": "SGLang #30378: consumers read the lengths as unsigned",
    "none": "SGLang #19536 up to #30378: rows with seq_len < extend_len go negative",
})


def _longer_than_block(case: SeqlensExpand) -> SeqlensExpand | None:
    longest = max((r.extend_len for r in case.batch), default=0)
    return replace(case, extra=-(longest - longest // 2)) if longest >= 2 else None


def _negative(case: SeqlensExpand) -> SeqlensExpand | None:
    """The first request has -2 query tokens; the output has room for those of the others."""
    if len(case.requests) < 2 or case.repeat > 1:
        return None
    others = case.requests[1:]
    return replace(case, requests=(Req(-2, case.requests[0].seq_len), *others), total_len=sum(r.extend_len for r in others))


SEQLENS_EXPAND = Contract(
    name="seqlens_expand",
    family="seqlens",
    doc="For every query token, the number of keys it may see.",
    origin="SGLang #19536 seqlens_expand_triton; clamp of #30378",
    case=SeqlensExpand,
    oracle=seqlens_expand,
    args=(
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, sets_size=True, cells="live"),
        Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request, new tokens included", ANY_STRIDES, cells="live, slack"),
        Arg("seqlens_expanded", Role.OUT, ("rows",), INT32, "keys that each query token sees", cells="written, untouched"),
    ),
    scalars=(
        Scalar("total_len", "sum of extend_seq_lens: the rows to fill"),
        Scalar("max_q_len", "at least the longest extend_seq_len"),
    ),
    variants=(CLAMP,),
    preconditions=(
        Precondition("max_q_len covers every request", "max(extend_seq_lens) <= max_q_len",
                     "seqlens_expand_triton: BLOCK = next_power_of_2(max_q_len)", _longer_than_block),
        Precondition("total_len is the sum", "total_len == sum(extend_seq_lens)",
                     "seqlens_expand_triton: the output has total_len elements",
                     lambda c: replace(c, total_len=c.total() - 1, spare=0) if c.total() else None),
        Precondition("lengths are not negative", "extend_seq_lens >= 0", "a request has no -1 query tokens", _negative),
    ),
    capturable=True,
    frozen_by_capture=("total_len", "max_q_len", "bs"),
    upstream_names=("seqlens_expand_triton", "compute_seqlens_expanded"),
)


# -- cu_seqlens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CuSeqlens(Case):
    lengths: tuple[int, ...]
    repeat: int = 1
    spare: int = 0

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.lengths * self.repeat

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.all)}

    def batch_size(self) -> int:
        return len(self.all)

    def arguments(self) -> dict:
        return {"seqlens": vector(self.all), "cu_seqlens": Output((len(self.all) + 1 + self.spare,))}

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if index[0] > len(self.all):
            return f"it is past the batch's {len(self.all)} requests"
        return f"where request {index[0]} starts" if index[0] < len(self.all) else "the total"


def cu_seqlens(*, seqlens, cu_seqlens, variant):
    """`[0, x0, x0 + x1, ...]`: where each request starts, and the total.

    >>> from harness.states import Cells
    >>> out = Cells((5,))
    >>> cu_seqlens(seqlens=[3, 0, 4], cu_seqlens=out, variant={})
    >>> out
    Cells([0 3 3 7 .])
    """
    total = 0
    cu_seqlens[0] = 0
    for i in range(len(seqlens)):
        total += seqlens[i]
        cu_seqlens[i + 1] = total


CU_SEQLENS = Contract(
    name="cu_seqlens",
    family="seqlens",
    doc="Exclusive prefix sum of lengths, with the total at the end.",
    origin="SGLang nsa_backend.compute_cu_seqlens",
    case=CuSeqlens,
    oracle=cu_seqlens,
    args=(
        Arg("seqlens", Role.IN, ("bs",), INT32, "lengths", ANY_STRIDES, sets_size=True, cells="live"),
        Arg("cu_seqlens", Role.OUT, ("bs + 1",), INT32, "prefix sums", cells="written, untouched"),
    ),
    preconditions=(
        Precondition("the total fits int32", "sum(seqlens) < 2**31", "compute_cu_seqlens accumulates in int32"),
    ),
    capturable=True,
    frozen_by_capture=("bs",),
    upstream_names=("compute_cu_seqlens",),
)


# -- nsa_cache_seqlens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class NsaCacheSeqlens(Case):
    lengths: tuple[int, ...]
    repeat: int = 1
    index_topk: int = 2048
    padded_rows: int = 0
    spare: int = 0

    @cached_property
    def all(self) -> tuple[int, ...]:
        return self.lengths * self.repeat

    def rows(self) -> int:
        return max(len(self.all), self.padded_rows)

    def dims(self) -> dict[str, int]:
        return {"rows": len(self.all), "padded": self.rows()}

    def batch_size(self) -> int:
        return len(self.all)

    def arguments(self) -> dict:
        return {
            "seqlens_expanded": vector(self.all),
            "nsa_cache_seqlens": Output((self.rows() + self.spare,)),
            "nsa_cu_seqlens_k": Output((self.rows() + 1 + self.spare,)),
            "index_topk": self.index_topk,
            "padded_rows": self.padded_rows,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        rows, i = len(self.all), index[0]
        if i >= self.rows() + (name == "nsa_cu_seqlens_k"):
            return f"it is past the {self.rows()} padded rows"
        return f"row {i}" if i < rows else f"padding behind {rows} rows"


def nsa_cache_seqlens(*, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows, variant):
    """Lengths clipped at the top-k, padded with zero rows; and their prefix sums, which repeat over the padding.

    Padding never truncates: with fewer `padded_rows` than rows, every row stays. Negative lengths pass through.

    >>> from harness.states import Cells
    >>> clipped, cu = Cells((5,)), Cells((6,))
    >>> nsa_cache_seqlens(seqlens_expanded=[5, 1, 9], nsa_cache_seqlens=clipped, nsa_cu_seqlens_k=cu, index_topk=4,
    ...                   padded_rows=4, variant={})
    >>> clipped
    Cells([4 1 4 0 .])
    >>> cu
    Cells([0 4 5 9 9 .])
    """
    total = 0
    nsa_cu_seqlens_k[0] = 0
    for row in range(max(len(seqlens_expanded), padded_rows)):
        length = min(seqlens_expanded[row], index_topk) if row < len(seqlens_expanded) else 0
        nsa_cache_seqlens[row] = length
        total += length
        nsa_cu_seqlens_k[row + 1] = total


NSA_CACHE_SEQLENS = Contract(
    name="nsa_cache_seqlens",
    family="seqlens",
    doc="Expanded lengths clipped at index_topk and padded with zeros for DP and CP, with prefix sums.",
    origin="SGLang nsa_backend.compute_nsa_seqlens and pad_nsa_cache_seqlens (#19134)",
    case=NsaCacheSeqlens,
    oracle=nsa_cache_seqlens,
    args=(
        Arg("seqlens_expanded", Role.IN, ("rows",), INT32, "keys that each query token sees", ANY_STRIDES, sets_size=True,
            cells="live"),
        Arg("nsa_cache_seqlens", Role.OUT, ("padded",), INT32, "min(expanded, index_topk), then zeros",
            cells="written, untouched"),
        Arg("nsa_cu_seqlens_k", Role.OUT, ("padded + 1",), INT32, "prefix sums of nsa_cache_seqlens",
            cells="written, untouched"),
    ),
    scalars=(
        Scalar("index_topk", "tokens that the indexer selects per query token"),
        Scalar("padded_rows", "least number of rows; cal_padded_tokens computes it, 0 for no padding"),
    ),
    preconditions=(
        Precondition("the total fits int32", "sum of clipped lengths < 2**31", "nsa_cu_seqlens_k is int32"),
    ),
    capturable=True,
    frozen_by_capture=("rows", "padded_rows", "index_topk"),
    upstream_names=("compute_nsa_seqlens", "compute_dsa_seqlens", "pad_nsa_cache_seqlens"),
)


# -- cal_padded_tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CalPaddedTokens(Case):
    """`tokens[r]`: the tokens of data-parallel rank r. One entry stands for all ranks together, of which there are
    `dp_size` (otherwise as many as entries)."""

    tokens: tuple[int, ...]
    dp_rank: int = 0
    attn_tp_size: int = 1
    attn_cp_size: int = 1
    extend_in_batch: bool = False
    round_robin: bool = False
    dp_size: int | None = None

    def batch_size(self) -> int:
        return len(self.tokens)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        return {
            "global_num_tokens": list(self.tokens), "dp_rank": self.dp_rank, "dp_size": self.dp_size or len(self.tokens),
            "attn_tp_size": self.attn_tp_size, "attn_cp_size": self.attn_cp_size,
            "extend_in_batch": self.extend_in_batch, "round_robin": self.round_robin,
        }


def cal_padded_tokens(*, global_num_tokens, dp_rank, dp_size, attn_tp_size, attn_cp_size, extend_in_batch, round_robin,
                      variant):
    """How many rows this rank's metadata is padded to, so that it matches the padded hidden states.

    Two ranks, 3 and 5 tokens, no extend: both pad to the larger; with an extend each keeps its own count.

    >>> sizes = dict(dp_size=2, attn_tp_size=1, attn_cp_size=1, round_robin=False, variant={"alignment": "tp_then_cp"})
    >>> cal_padded_tokens(global_num_tokens=[3, 5], dp_rank=0, extend_in_batch=False, **sizes)
    5
    >>> cal_padded_tokens(global_num_tokens=[3, 5], dp_rank=0, extend_in_batch=True, **sizes)
    3
    """
    aligned = []
    for count in global_num_tokens:
        if variant["alignment"] in ("tp_then_cp", "tp"):
            count = -(-count // attn_tp_size) * attn_tp_size
        if variant["alignment"] in ("tp_then_cp", "cp"):
            count = -(-count // attn_cp_size) * attn_cp_size
        aligned.append(count)
    sum_mode = (extend_in_batch and dp_size > 1) or 2 * sum(aligned) < max(aligned) * dp_size
    if not sum_mode:
        padded = max(aligned)
    elif len(aligned) > 1:
        padded = aligned[dp_rank]
    else:
        padded = aligned[0]
    if round_robin:
        padded = -(-padded // attn_cp_size)
    return padded


CAL_PADDED_TOKENS = Contract(
    name="cal_padded_tokens",
    family="seqlens",
    doc="The row count that nsa_cache_seqlens is padded to under data and context parallelism.",
    origin="SGLang nsa/utils.cal_padded_tokens; must agree with ForwardBatch.prepare_mlp_sync_batch",
    case=CalPaddedTokens,
    oracle=cal_padded_tokens,
    kind=Kind.HOST,
    scalars=(
        Scalar("global_num_tokens", "list: tokens of every data-parallel rank, or one entry for all of them; not None"),
        Scalar("dp_rank", "this rank"), Scalar("dp_size", "data-parallel ranks"),
        Scalar("attn_tp_size", "attention tensor-parallel ranks"), Scalar("attn_cp_size", "context-parallel ranks"),
        Scalar("extend_in_batch", "whether any rank extends"),
        Scalar("round_robin", "whether the round-robin context-parallel split is active"),
    ),
    variants=(
        Variant("alignment", {
            "tp_then_cp": "ForwardBatch.prepare_mlp_sync_batch aligns to attn_tp_size, then attn_cp_size (#30642)",
            "cp": "SGLang up to May 2026 aligns to attn_cp_size only",
            "tp": "SGLang #34443 aligns to attn_tp_size only: context parallelism rounds no rows but those that it splits",
        }),
    ),
    upstream_names=("cal_padded_tokens",),
)

CONTRACTS = (SEQLENS_EXPAND, CU_SEQLENS, NSA_CACHE_SEQLENS, CAL_PADDED_TOKENS)
