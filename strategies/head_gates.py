"""Cases of the head_gates family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.head_gates import KINDS, SOURCES, ApplyScales, FusedLogitsHeadGate, LogitsHeadGate, ProjectAndScale, UpdateRope
from strategies.common import choice, many, spare

TOKENS = choice(2, 3, 17, 5, 2, 16, 0, 3, 1, 8, 17, 15)
HEADS = choice(4, 1, 3, 8, 16, 4, 17, 64)
HIDDEN = choice(64, 1, 16, 33, 127, 128, 129, 256)
WAYS = (*SOURCES, *("apart", "same") * 3, *("shifted",) * 2)  # more often: what callers have, and what varies most
HEAD_DIMS = choice(128, 64, 192)


@st.composite
def _frame(draw, many_tokens: int = 18) -> dict:
    """Sizes, contents and spare capacity that all gates have; once in `many_tokens` more tokens than a tile."""
    tokens = draw(choice(33, 65)) if draw(many(many_tokens)) else draw(TOKENS)
    heads = draw(HEADS) if tokens <= 17 else draw(choice(3, 17))
    return dict(tokens=tokens, heads=heads, head_dim=draw(HEAD_DIMS), spare=draw(spare()), kind=draw(choice(*KINDS)),
                content=draw(st.integers(0, 255)))


@st.composite
def _projected(draw) -> dict:
    """The same with a hidden size: mostly small, now and then the model's 7,168 for a few tokens and heads."""
    frame = draw(_frame())
    if draw(many(18)):
        return {**frame, "tokens": min(frame["tokens"], 3), "heads": min(frame["heads"], 4), "hidden": 7168}
    return {**frame, "hidden": draw(HIDDEN)}


@st.composite
def _scaled(draw) -> dict:
    """Of what costs little, more: many tokens more often, and more heads than a tile."""
    frame = draw(_frame(6))
    return {**frame, "tokens": min(frame["tokens"], 5), "heads": 65} if draw(many(10)) else frame


def project_and_scale_head_gates() -> st.SearchStrategy[ProjectAndScale]:
    """Tiles that are full, not full and cut; sums that cancel."""
    return _projected().map(lambda frame: ProjectAndScale(**frame))


def logits_head_gate() -> st.SearchStrategy[LogitsHeadGate]:
    """The same, with scales."""
    return _projected().map(lambda frame: LogitsHeadGate(**frame))


def apply_q_scale_and_softmax_scale() -> st.SearchStrategy[ApplyScales]:
    """Gates of every size."""
    return _scaled().map(lambda frame: ApplyScales(**frame))


def fused_logits_head_gate() -> st.SearchStrategy[FusedLogitsHeadGate]:
    """Raw gates of every size."""
    return _scaled().map(lambda frame: FusedLogitsHeadGate(**frame))


@st.composite
def update_rope_guarded(draw) -> UpdateRope:
    """Every way in which source and destination share memory, or do not; now and then more than registers hold."""
    tokens, heads = draw(choice(2, 3, 4, 2, 3, 7, 2, 0, 1, 5)), draw(choice(2, 1, 3, 4))
    rope_dim, tail = draw(choice(4, 1, 2, 8, 64)), draw(choice(2, 0, 1, 5, 64))
    if draw(many(10)):
        tokens, heads, rope_dim, tail = draw(choice((9, 4, 64, 64), (10, 8, 33, 7), (2, 3, 600, 100), (17, 1, 4, 3)))
    head_dim = rope_dim + tail
    near = (1, -1, rope_dim - 1, rope_dim, -rope_dim, head_dim, -head_dim, heads * head_dim, -heads * head_dim)
    return UpdateRope(tokens, heads, rope_dim, head_dim, source=draw(choice(*WAYS)),
                      shift=draw(choice(*near)), gap=draw(choice(0, 3)), spare=draw(spare()),
                      content=draw(st.integers(0, 255)))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


@st.composite
def _other_numbers(draw, captured):
    """The captured sizes, which all are frozen, with other contents."""
    return replace(captured, kind=draw(choice(*KINDS)), content=draw(st.integers(0, 255)))


project_and_scale_head_gates_replay = logits_head_gate_replay = _other_numbers
apply_q_scale_and_softmax_scale_replay = fused_logits_head_gate_replay = _other_numbers


@st.composite
def update_rope_guarded_replay(draw, captured: UpdateRope) -> UpdateRope:
    """The captured views, which are frozen, of a memory with other contents."""
    return replace(captured, content=draw(st.integers(0, 255)))
