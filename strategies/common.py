"""What the families share: lengths that lean to the edges, and batch shapes."""

import functools

from hypothesis import strategies as st

SHORT_EDGES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG_EDGES = (2047, 2048, 2049, 4095, 4096, 4097, 65535, 65536, 65537, 131071, 131072, 131073, 2**20 - 1, 2**20)


def around(*values: int) -> tuple[int, ...]:
    """Each value with its neighbours, without negatives."""
    return tuple(sorted({v + d for v in values for d in (-1, 0, 1) if v + d >= 0}))


@functools.cache  # making a strategy costs more than drawing from it
def lengths(*edges: int, least: int = 0, most: int = 300) -> st.SearchStrategy[int]:
    """A length from `least` to `most`: small, at an edge (of `edges` or the usual ones), or anything."""
    special = sorted(e for e in {*SHORT_EDGES, *LONG_EDGES, *edges} if least <= e <= most)
    return st.one_of(st.integers(least, min(least + 9, most)), st.sampled_from(special), st.integers(least, most))


@functools.cache
def any_slot(slots: int) -> st.SearchStrategy[int]:
    """A row of the request table: one of the first, the last, or any."""
    return st.one_of(st.integers(0, min(slots - 1, 3)), st.just(slots - 1), st.integers(0, slots - 1))


@functools.cache
def batch_floor() -> st.SearchStrategy[int]:
    """The least number of requests to draw: mostly 2, so that most batches are ragged, and shrinking towards none."""
    return st.sampled_from((0, 1) + (2,) * 14)


@functools.cache
@st.composite
def many(draw, one_in: int) -> bool:
    """True once in `one_in`, for what makes a case large. Costs choices, so that shrinking prefers a few more requests."""
    chosen = draw(st.sampled_from((False,) * (one_in - 1) + (True,)))
    if chosen:
        draw(st.tuples(*[st.booleans()] * 40))
    return chosen


@st.composite
def repeats(draw, *block_sizes: int) -> int:
    """How often a batch is repeated: mostly once, now and then past a kernel's block of requests."""
    return draw(st.sampled_from(block_sizes)) if draw(many(15)) else 1


def crowd(draw, items, least: int = 17) -> tuple:
    """Now and then so many items, by repetition, that a kernel needs a second block of them."""
    items = tuple(items)
    return items * -(-least // len(items)) if items and draw(many(12)) else items


@functools.cache
def rounded() -> st.SearchStrategy[bool]:
    """Whether row widths are multiples of 16 bytes, as engines allocate them: kernels may then move as much at once."""
    return st.sampled_from((False, False, True))


def up(width: int) -> int:
    """What a width of 4-byte cells lacks to be a multiple of 16 bytes."""
    return -width % 4


@functools.cache
def spare() -> st.SearchStrategy[int]:
    """Capacity that a captured buffer has beyond the batch."""
    return st.sampled_from((0, 1, 0, 3))
