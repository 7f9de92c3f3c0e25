"""Cases of the mqa_logits family."""

from hypothesis import strategies as st

from oracles.mqa_logits import (SCORE_KINDS, MqaLogits, MqaLogitsBudget, MqaLogitsChunkPlan, Query, Req, ShouldChunkMqaLogits,
                                TopkPagedChunked, TopkRaggedChunked)
from strategies.common import around, batch_floor, choice, either, lengths, made_once, many, spare

GIGABYTE = 2**30
MEMORY = either(choice(80 * GIGABYTE, 141 * GIGABYTE, 85_899_345_919, 1, 3, 10), st.integers(1, 2**38))
FRACTIONS = either(choice(0.0, 0.2, 0.5, 0.7, 0.83, 0.9, 1.0), st.floats(0.0, 1.0))
FREE_FRACTIONS = choice(0.2, 0.5, 0.2, 0.5, 0.1, 1.0, 0.0)
SKIP_BELOW = 8_000_000


# -- host ---------------------------------------------------------------------------------------------------------------


@st.composite
def queries(draw) -> Query:
    """A device of 3, with none, little, much or all of its memory free."""
    total = draw(MEMORY)
    free = draw(either(choice(0, 1, total // 10, total // 2, total), st.integers(0, total)))
    return Query(draw(st.integers(0, 2)), free, total, draw(choice(False, False, True)))


@st.composite
def mqa_logits_budget(draw) -> MqaLogitsBudget:
    """Devices in turn and in captures, with every kind of mem_fraction_static; more than 1 among them."""
    asked = tuple(draw(st.lists(queries(), min_size=draw(batch_floor()), max_size=6)))
    static = draw(either(st.none(), FRACTIONS, FRACTIONS, choice(1.25)))
    return MqaLogitsBudget(asked, static, draw(FREE_FRACTIONS), draw(st.booleans()))


ROW_COUNTS = either(lengths(most=300), choice(2000, 2048, 2049, 4096, 8192, 16384))
KEY_COUNTS = either(lengths(most=300), choice(1000, 4000, 65536, 131072, 131073, 2**20))


@st.composite
def should_chunk_mqa_logits(draw) -> ShouldChunkMqaLogits:
    """Around 8,000,000 logits, of any size and of more than 2^32 bytes; budgets around the bytes that they take; below, the
    budget may be None."""
    size = draw(choice("any", "limit", "limit", "any", "long"))
    if size == "limit":
        num_q = draw(choice(1, 2, 1000, 2000, 1999, 2001, 4096))
        num_k = draw(choice(*around(SKIP_BELOW // num_q)))
    elif size == "long":
        num_q, num_k = draw(choice(8192, 16384, 16385)), draw(choice(131072, 131073, 2**20))
    else:
        num_q, num_k = draw(ROW_COUNTS), draw(KEY_COUNTS)
    elements = num_q * num_k
    near = choice(*(b for b in (4 * elements, 4 * elements - 1, 4 * elements + 1, elements) if b > 0))
    measured = either(near, near, st.integers(1, 2**36), choice(1)) if elements else st.integers(1, 2**36)
    return ShouldChunkMqaLogits(num_q, num_k, draw(either(st.none(), measured) if elements < SKIP_BELOW else measured))


@st.composite
def mqa_logits_chunk_plan(draw) -> MqaLogitsChunkPlan:
    """Budgets of 1 row, a few, all but one, all and more; of less than a row; one byte short. No rows, no keys."""
    num_q, num_k = draw(either(st.integers(0, 12), ROW_COUNTS)), draw(KEY_COUNTS)
    rows = draw(either(choice(*around(num_q)), st.integers(1, 8), choice(0)))
    if num_q > 300:
        rows = max(rows, num_q // 40)
    return MqaLogitsChunkPlan(num_q, num_k, max(1, rows * 4 * num_k + draw(choice(0, 0, -1, 1))))


# -- rows of a prefill --------------------------------------------------------------------------------------------------


@made_once
def requests(*edges: int, most: int = 60) -> st.SearchStrategy[Req]:
    """With a cached prefix (extend < seq), fresh (extend == seq), idle (extend 0), and padded (seq 1, extend more)."""
    extend = st.integers(0, 3)
    prefixed = st.builds(lambda new, before: Req(new, before + new), extend, lengths(*edges, most=most))
    fresh = st.integers(0, 5).map(lambda n: Req(n, n))
    padded = st.integers(2, 5).map(lambda width: Req(width, 1))
    return either(prefixed, prefixed, prefixed, fresh, padded)


@st.composite
def mqa_logits(draw, max_requests: int = 3) -> MqaLogits:
    """Ragged key ranges of every kind; now and then heads and head_dim as deployed, and keys past a block of 128."""
    large = draw(many(20))
    batch = draw(st.lists(requests(most=300 if large else 24), min_size=draw(batch_floor()), max_size=max_requests))
    heads, head_dim = draw(choice((4, 16), (1, 16), (3, 32), (2, 24), (8, 16), (64, 16), (64, 128)))
    return MqaLogits(tuple(batch), key_spare=draw(choice(0, 1, 5)), spare=draw(spare()),
                     content=draw(st.integers(0, 255)), heads=4 if large else heads, head_dim=head_dim,
                     clean=draw(st.booleans()), kind=draw(choice("small", "wide", "wide", "negative")))


@st.composite
def _chunked(draw, most: int) -> dict:
    """Everything that ragged and paged top-k share: rows shorter than the top-k, at it and longer; chunks of every size."""
    topk = draw(choice(4, 1, 5, 8, 16, 64))
    edges = around(topk, 2 * topk)
    batch = tuple(draw(st.lists(requests(*edges, most=90), min_size=draw(batch_floor()), max_size=most)))
    kind = draw(choice("distinct", *SCORE_KINDS))
    if draw(many(12)):
        batch = (*batch[:1], Req(draw(st.integers(1, 2)), draw(choice(257, 1025, 1500, 2049, 2400))))
        kind = draw(choice(kind, "rising"))  # a block of one key shows only if that key is selected
    rows = sum(r.extend_len for r in batch)
    sizes = sorted({1, 2, max(rows - 1, 1), max(rows, 1), rows + 1, 1000})
    return dict(requests=batch, index_topk=topk, max_rows=draw(choice(*sizes)),
                padding=draw(choice(0, 1, 3)), kind=kind,
                key_spare=draw(choice(0, 1, 6)), spare=draw(spare()), content=draw(st.integers(0, 255)))


@st.composite
def topk_ragged_chunked(draw, max_requests: int = 4) -> TopkRaggedChunked:
    """Offsets that equal ks, and offsets that do not."""
    return TopkRaggedChunked(**draw(_chunked(max_requests)), shift=draw(choice(0, 1000, 3)))


@st.composite
def topk_paged_chunked(draw, max_requests: int = 4) -> TopkPagedChunked:
    """Requests that own the page table's rows in order and out of order, with slots of their own and shared ones."""
    fields = draw(_chunked(max_requests))
    turn = draw(st.integers(0, max(len(fields["requests"]) - 1, 0)))
    return TopkPagedChunked(**fields, turn=turn, table_extra=draw(choice(0, 1, 40)),
                            shared=draw(choice(False, False, True)))
