"""Head gates of the indexer, and writing rotated queries and keys back.

| transform                       | fills  | from                                                  |
| ------------------------------- | ------ | ----------------------------------------------------- |
| project_and_scale_head_gates    | gates  | x, weight                                             |
| apply_q_scale_and_softmax_scale | out    | gates, q_scale, softmax_scale                         |
| logits_head_gate                | out    | x, weight, q_scale, softmax_scale: both in one        |
| fused_logits_head_gate          | out    | raw gates, q_scale, softmax_scale                     |
| update_rope_guarded             | memory | two views of the same memory, which may overlap       |

Floats are compared within a bound, since no order of summation is promised. With float32 sums of n exact products the error
is at most n ulps of the sum of their *absolute* values; a few ulps of the result itself would fail every honest kernel
where the products cancel.
"""

from dataclasses import dataclass, replace

import numpy as np

from harness import floats, hashing
from harness.contract import ROWS_STRIDED, UNIT_STRIDE, Arg, Case, Contract, Precondition, Role, Scalar
from harness.states import within
from harness.tensors import Output, Region, dense, runs

EPS = float(np.finfo(np.float32).eps)
FLOAT32 = ("float32",)
BFLOAT16 = ("bfloat16",)

KINDS = ("random", "cancelling", "ones", "large", "small")


def numbers(kind: str, seed: int, name: str, count: int, dtype: str = "bfloat16") -> np.ndarray:
    """`count` numbers of a dtype, bfloat16 or float32, with all of its mantissa; none of them is 0 or subnormal.

    random      of either sign, 2^-4 to 2^4
    cancelling  the same for every second number; those between are their neighbours, for `weight` with the other sign
    ones        1
    large       random times 2^40;   small  random times 2^-40
    """
    if kind == "ones":
        return np.ones(count)
    position = np.arange(count) // 2 if kind == "cancelling" else np.arange(count)
    raw = hashing.cells(seed, name, position)
    fraction = (raw >> np.uint64(8) & np.uint64(127)).astype(np.float64) / 128
    if dtype == "float32":
        fraction += (raw >> np.uint64(24) & np.uint64(2**16 - 1)).astype(np.float64) / 2**23
    size = (1 + fraction) * 2.0 ** ((raw >> np.uint64(16)) % np.uint64(8)) / 16
    value = np.where(raw & np.uint64(1), -size, size)
    if kind == "cancelling" and name == "weight":
        value = np.where(np.arange(count) % 2, -value, value)
    return value * {"large": 2.0**40, "small": 2.0**-40}.get(kind, 1.0)


def positive(seed: int, name: str, count: int) -> np.ndarray:
    """`count` positive float32 scales."""
    raw = hashing.cells(seed, name, np.arange(count)) % np.uint64(1 << 20)
    return floats.rounded((1.0 + raw.astype(np.float64)) / 2.0**16, "float32")


# -- the cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _Gates(Case):
    """`tokens` rows of `heads` gates. `spare` rows of unused capacity lie behind the output; `kind` and `content` say which
    numbers the inputs hold."""

    tokens: int
    heads: int = 64
    head_dim: int = 128
    spare: int = 0
    kind: str = "random"
    content: int = 0

    def batch_size(self) -> int:
        return self.tokens

    def dims(self) -> dict[str, int]:
        return {"tokens": self.tokens, "heads": self.heads}

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def gates(self):
        values = numbers(self.kind, self.content, "gates", self.tokens * self.heads, "float32")
        return dense(values.reshape(self.tokens, self.heads))

    def q_scale(self):
        return dense(positive(self.content, "q_scale", self.tokens * self.heads).reshape(self.tokens, self.heads, 1))

    def out(self, *inner: int) -> Output:
        return Output((self.tokens + self.spare, self.heads, *inner))

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "weight":
            return f"head {index[0]}, input {index[1]}"
        if index[0] >= self.tokens:
            return f"it is past the {self.tokens} tokens"
        return f"token {index[0]}, input {index[1]}" if name == "x" else f"token {index[0]}, head {index[1]}"


@dataclass(frozen=True, repr=False)
class _Projected(_Gates):
    hidden: int = 64

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "hidden": self.hidden}

    def inputs(self) -> dict:
        x = numbers(self.kind, self.content, "x", self.tokens * self.hidden)
        weight = numbers(self.kind, self.content, "weight", self.heads * self.hidden)
        return {"x": dense(x.reshape(self.tokens, self.hidden)), "weight": dense(weight.reshape(self.heads, self.hidden)),
                "n_heads": self.heads}


@dataclass(frozen=True, repr=False)
class ProjectAndScale(_Projected):
    """Gates of every head, scaled by the number of heads."""

    def arguments(self) -> dict:
        return {**self.inputs(), "gates": self.out()}


@dataclass(frozen=True, repr=False)
class LogitsHeadGate(_Projected):
    """Projection and both scales."""

    def arguments(self) -> dict:
        return {**self.inputs(), "q_scale": self.q_scale(), "out": self.out(1), "softmax_scale": self.softmax_scale}


@dataclass(frozen=True, repr=False)
class ApplyScales(_Gates):
    """Gates that are scaled by the number of heads already."""

    def arguments(self) -> dict:
        return {"gates": self.gates(), "q_scale": self.q_scale(), "out": self.out(1), "n_heads": self.heads,
                "softmax_scale": self.softmax_scale}


@dataclass(frozen=True, repr=False)
class FusedLogitsHeadGate(_Gates):
    """Raw gates, as a projection elsewhere has left them: float32, or bfloat16 where it does not widen them."""

    def arguments(self) -> dict:
        return {"gates": self.gates(), "q_scale": self.q_scale(), "out": self.out(1), "n_heads": self.heads,
                "softmax_scale": self.softmax_scale}


# -- oracles of the gates -----------------------------------------------------------------------------------------------


def project_and_scale_head_gates(*, x, weight, gates, n_heads, variant):
    """gates[t, h] = sum over k of x[t, k] * weight[h, k], times n_heads^-0.5.

    Four heads scale by 1/2; 3 * 1 + 4 * 2 is 11 for the second head, and 3 * 1 - 4 * 1 is -1 for the third:

    >>> from harness.states import Cells
    >>> out = Cells((1, 4))
    >>> project_and_scale_head_gates(x=np.array([[3.0, 4.0]]), weight=np.array([[1.0, 0], [1, 2], [1, -1], [0, 1]]), gates=out,
    ...                              n_heads=4, variant={})
    >>> out
    Cells([~ ~ ~ ~])
    >>> members, judge = out.judges[0]
    >>> judge.complaint(np.array([1.5, 5.5, -0.5, 2.0]))
    >>> judge.complaint(np.array([1.5, 5.5, -0.5, 2.001]))
    'cell 3 is 2.001, must be 2.0 within 1.430511474609375e-06'
    """
    value, error = _projected(x, weight)
    scale = n_heads**-0.5
    gates.judge((slice(0, len(x)), slice(0, n_heads)), within(value.reshape(-1) * scale, error.reshape(-1) * scale))


def logits_head_gate(*, x, weight, q_scale, out, n_heads, softmax_scale, variant):
    """out[t, h] = projection of token t on head h, times n_heads^-0.5, times q_scale[t, h], times softmax_scale.

    >>> from harness.states import Cells
    >>> out = Cells((1, 1, 1))
    >>> logits_head_gate(x=np.array([[3.0, 4.0]]), weight=np.array([[1.0, 2.0]]), q_scale=np.array([[[0.5]]]), out=out,
    ...                  n_heads=1, softmax_scale=0.25, variant={})
    >>> out.judges[0][1].complaint(np.array([11 * 0.5 * 0.25]))
    """
    value, error = _projected(x, weight)
    scale = n_heads**-0.5 * softmax_scale * q_scale.reshape(-1)
    out.judge((slice(0, len(x)), slice(0, n_heads), 0), within(value.reshape(-1) * scale, error.reshape(-1) * scale))


def _projected(x, weight) -> tuple[np.ndarray, np.ndarray]:
    """Every product of a row of `x` with a row of `weight`, and its error bound: one ulp of the sum of absolute products
    per product (which covers accumulators that truncate), and four for the multiplications that follow."""
    value, error = np.zeros((len(x), len(weight))), np.zeros((len(x), len(weight)))
    for t in range(len(x)):
        for h in range(len(weight)):
            products = x[t] * weight[h]
            value[t, h] = products.sum()
            error[t, h] = (len(products) + 4) * EPS * np.abs(products).sum()
    return value, error


def apply_q_scale_and_softmax_scale(*, gates, q_scale, out, n_heads, softmax_scale, variant):
    """out[t, h] = gates[t, h] * q_scale[t, h] * softmax_scale, in any order.

    >>> from harness.states import Cells
    >>> out = Cells((1, 2, 1))
    >>> apply_q_scale_and_softmax_scale(gates=np.array([[3.0, -2.0]]), q_scale=np.array([[[2.0], [0.5]]]), out=out, n_heads=2,
    ...                                 softmax_scale=0.25, variant={})
    >>> out.judges[0][1].complaint(np.array([1.5, -0.25]))
    """
    _scaled(gates, q_scale, out, softmax_scale)


def fused_logits_head_gate(*, gates, q_scale, out, n_heads, softmax_scale, variant):
    """out[t, h] = gates[t, h] * n_heads^-0.5 * q_scale[t, h] * softmax_scale, in any order.

    >>> from harness.states import Cells
    >>> out = Cells((1, 4, 1))
    >>> fused_logits_head_gate(gates=np.array([[3.0, -2.0, 1.0, 0.5]]), q_scale=np.ones((1, 4, 1)), out=out, n_heads=4,
    ...                        softmax_scale=0.25, variant={})
    >>> out.judges[0][1].complaint(np.array([0.375, -0.25, 0.125, 0.0625]))
    """
    _scaled(gates, q_scale, out, n_heads**-0.5 * softmax_scale)


def _scaled(gates, q_scale, out, factor: float) -> None:
    tokens, heads = gates.shape
    expected = np.zeros(tokens * heads)
    for t in range(tokens):
        for h in range(heads):
            expected[t * heads + h] = gates[t, h] * q_scale[t, h, 0] * factor
    out.judge((slice(0, tokens), slice(0, heads), 0), within(expected, 4 * EPS * np.abs(expected)))


# -- contracts of the gates ---------------------------------------------------------------------------------------------

_X = Arg("x", Role.IN, ("tokens", "hidden"), BFLOAT16, "hidden states", ROWS_STRIDED, sets_size=True, cells="live")
_WEIGHT = Arg("weight", Role.IN, ("heads", "hidden"), BFLOAT16, "projection to one gate per head", ROWS_STRIDED, cells="live")
_GATES = Arg("gates", Role.IN, ("tokens", "heads"), FLOAT32, "one gate per token and head", ROWS_STRIDED, sets_size=True,
             cells="live")
_Q_SCALE = Arg("q_scale", Role.IN, ("tokens", "heads", "1"), FLOAT32, "scale of the quantised query", ROWS_STRIDED,
               cells="live")
_OUT = Arg("out", Role.OUT, ("tokens", "heads", "1"), FLOAT32, "weight of every head in the logits", ROWS_STRIDED,
           cells="judged, untouched")
_N_HEADS = Scalar("n_heads", "heads of the indexer, at least 1")
_SOFTMAX = Scalar("softmax_scale", "head_dim^-0.5")

PROJECT_AND_SCALE_HEAD_GATES = Contract(
    name="project_and_scale_head_gates",
    family="head_gates",
    doc="The gate of every head, in float32 from bfloat16, scaled by n_heads^-0.5.",
    origin="SGLang nsa_indexer._project_and_scale_head_gates (#22232)",
    case=ProjectAndScale,
    oracle=project_and_scale_head_gates,
    args=(_X, _WEIGHT, Arg("gates", Role.OUT, ("tokens", "heads"), FLOAT32, "one scaled gate per token and head", ROWS_STRIDED,
                           cells="judged, untouched")),
    scalars=(_N_HEADS,),
    capturable=True,
    frozen_by_capture=("tokens", "n_heads"),
    upstream_names=("_project_and_scale_head_gates", "_weights_proj_bf16_in_fp32_out"),
)

APPLY_Q_SCALE_AND_SOFTMAX_SCALE = Contract(
    name="apply_q_scale_and_softmax_scale",
    family="head_gates",
    doc="Scaled gates times the query's scale and the softmax scale.",
    origin="SGLang dsa_indexer._apply_q_scale_and_softmax_scale (#22232)",
    case=ApplyScales,
    oracle=apply_q_scale_and_softmax_scale,
    args=(_GATES, _Q_SCALE, _OUT),
    scalars=(_N_HEADS, _SOFTMAX),
    capturable=True,
    frozen_by_capture=("tokens", "n_heads", "softmax_scale"),
    upstream_names=("_apply_q_scale_and_softmax_scale",),
)

LOGITS_HEAD_GATE = Contract(
    name="logits_head_gate",
    family="head_gates",
    doc="Projection, and all scales: the weight of every head in the indexer's logits.",
    origin="SGLang nsa_indexer._get_logits_head_gate (#22232)",
    case=LogitsHeadGate,
    oracle=logits_head_gate,
    args=(_X, _WEIGHT, _Q_SCALE, _OUT),
    scalars=(_N_HEADS, _SOFTMAX),
    capturable=True,
    frozen_by_capture=("tokens", "n_heads", "softmax_scale"),
    upstream_names=("_get_logits_head_gate", "logits_head_gate_graph"),
)

FUSED_LOGITS_HEAD_GATE = Contract(
    name="fused_logits_head_gate",
    family="head_gates",
    doc="All scales on gates that were projected elsewhere, in one pass.",
    origin="SGLang fused_logits_head_gate (follow-up of #22232); dsa_indexer._scale_head_gates",
    case=FusedLogitsHeadGate,
    oracle=fused_logits_head_gate,
    args=(replace(_GATES, dtypes=("float32", "bfloat16"), doc="raw gates"), _Q_SCALE, _OUT),
    scalars=(_N_HEADS, _SOFTMAX),
    capturable=True,
    frozen_by_capture=("tokens", "n_heads", "softmax_scale"),
    upstream_names=("fused_logits_head_gate", "_scale_head_gates", "scale_head_gate_graph"),
)


# -- update_rope_guarded ------------------------------------------------------------------------------------------------

SOURCES = ("same", "apart", "packed", "shifted", "swapped", "one_head")


@dataclass(frozen=True, repr=False)
class UpdateRope(Case):
    """The destination is the first `rope_dim` of the `head_dim` numbers of every head of a tensor. `source` says where
    their new values lie, in elements of the same memory:

    same      in the destination itself (a rotary kernel that works in place)
    apart     in a tensor of their own, behind the other one; its rows are `gap` elements longer than they need to be
    packed    from the destination's first element on, without the gaps between its rows
    shifted   in rows with the destination's strides, `shift` elements behind it, or before it where that is negative
    swapped   from the destination's first element on, with the strides of tokens and heads exchanged
    one_head  in the first head of every token, for all its heads

    The memory in which both lie is one argument, and the two views are host values: every cell then has one state, however
    the views overlap. `spare` elements that belong to neither lie in front of it and behind it.
    """

    tokens: int
    heads: int = 2
    rope_dim: int = 4
    head_dim: int = 6
    source: str = "same"
    shift: int = 0
    gap: int = 0
    spare: int = 0
    content: int = 0
    misplaced: int = 0

    def batch_size(self) -> int:
        return self.tokens

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.tokens, self.heads, self.rope_dim

    def dst(self) -> tuple[int, tuple[int, int, int]]:
        """Offset and strides."""
        before = max(0, -self.shift) if self.source == "shifted" else 0
        return self.spare + before, (self.heads * self.head_dim, self.head_dim, 1)

    def src(self) -> tuple[int, tuple[int, int, int]]:
        """Offset and strides."""
        offset, (token, head, one) = self.dst()
        row = self.rope_dim + self.gap
        return {
            "same": (offset, (token, head, one)),
            "apart": (offset + self.tokens * token, (self.heads * row, row, one)),
            "packed": (offset, (self.heads * self.rope_dim, self.rope_dim, one)),
            "shifted": (offset + self.shift, (token, head, one)),
            "swapped": (offset, (head, token, one)),
            "one_head": (offset, (token, 0, one)),
        }[self.source]

    def cells(self, offset: int, strides: tuple[int, ...]) -> np.ndarray:
        """The element of the memory under every index of a view, in order of the indices."""
        token, head, lane = np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij")
        return (offset + token * strides[0] + head * strides[1] + lane * strides[2]).reshape(-1)

    def reach(self) -> int:
        """One past the last element of both views."""
        both = np.concatenate([self.cells(*self.dst()), self.cells(*self.src())])
        return int(both.max()) + 1 if len(both) else 0

    def dims(self) -> dict[str, int]:
        return {"cells": self.reach()}

    def arguments(self) -> dict:
        live = np.unique(np.concatenate([self.cells(*self.dst()), self.cells(*self.src())])).astype(np.int64)
        values = hashing.anything(self.content, "memory", np.arange(self.reach()))
        cuts = np.flatnonzero(np.diff(live) > 1) + 1
        pieces = {int(p[0]): values[p[0] : p[-1] + 1] for p in np.split(live, cuts) if len(p)}
        (dst_offset, dst_strides), (src_offset, src_strides) = self.dst(), self.src()
        return {
            "memory": runs((self.reach() + self.spare,), pieces, rest=Region.FORBIDDEN),
            "shape": list(self.shape),
            "dst_offset": dst_offset,
            "dst_strides": list(dst_strides),
            "src_offset": src_offset + self.misplaced,
            "src_strides": list(src_strides),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        found = np.flatnonzero(self.cells(*self.dst()) == index[0])
        if len(found):
            token, head, lane = np.unravel_index(int(found[0]), self.shape)
            return f"token {token}, head {head}, number {lane} of the destination"
        read = np.flatnonzero(self.cells(*self.src()) == index[0])
        return "a cell of the source" if len(read) else "a cell of neither view"


def update_rope_guarded(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides, variant):
    """dst[t, h, r] = what src[t, h, r] was before the call, though the two may share memory in any way.

    In place nothing changes; a source one element behind the destination moves every row by one:

    >>> from harness.states import Cells
    >>> memory = Cells((5,), before=np.array([1.0, 2, 3, 4, 5]))
    >>> update_rope_guarded(memory=memory, shape=[1, 1, 3], dst_offset=1, dst_strides=[3, 3, 1], src_offset=0,
    ...                     src_strides=[3, 3, 1], variant={})
    >>> memory
    Cells([. 1.0 2.0 3.0 .])
    """
    tokens, heads, rope_dim = shape
    for t in range(tokens):
        for h in range(heads):
            for r in range(rope_dim):
                to = dst_offset + t * dst_strides[0] + h * dst_strides[1] + r * dst_strides[2]
                of = src_offset + t * src_strides[0] + h * src_strides[1] + r * src_strides[2]
                memory[to] = memory.before[of,]


UPDATE_ROPE_GUARDED = Contract(
    name="update_rope_guarded",
    family="head_gates",
    doc="Write rotated queries or keys back into the tensor they were split from, wherever the rotary kernel left them.",
    origin="SGLang dsa_indexer._update_rope_guarded, which compares addresses alone (#22232)",
    case=UpdateRope,
    oracle=update_rope_guarded,
    args=(
        Arg("memory", Role.INOUT, ("cells",), ("bfloat16", "float32", "float16"), "the memory of both views", UNIT_STRIDE,
            cells="live, forbidden, written, untouched"),
    ),
    scalars=(
        Scalar("shape", "[tokens, heads, rope_dim] of both views"),
        Scalar("dst_offset", "first element of the destination"), Scalar("dst_strides", "its strides, in elements"),
        Scalar("src_offset", "first element of the source"), Scalar("src_strides", "its strides, in elements; 0 repeats"),
    ),
    preconditions=(
        Precondition("both views lie in the memory", "offset + sum((n - 1) * stride) < cells",
                     "a view cannot leave its storage",
                     lambda c: replace(c, misplaced=c.reach() + c.spare) if c.tokens and c.heads and c.rope_dim else None),
    ),
    capturable=True,
    frozen_by_capture=("shape", "dst_offset", "dst_strides", "src_offset", "src_strides"),
    upstream_names=("_update_rope_guarded",),
)

CONTRACTS = (PROJECT_AND_SCALE_HEAD_GATES, APPLY_Q_SCALE_AND_SOFTMAX_SCALE, LOGITS_HEAD_GATE, FUSED_LOGITS_HEAD_GATE,
             UPDATE_ROPE_GUARDED)
