"""What the families share: lengths that lean to the edges, and batch shapes."""

import functools
import operator

from hypothesis import strategies as st

SHORT_EDGES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG_EDGES = (2047, 2048, 2049, 4095, 4096, 4097, 65535, 65536, 65537, 131071, 131072, 131073, 2**20 - 1, 2**20)


# Hypothesis spends more time on making and validating a strategy than on drawing from it. It keeps the lists, tuples and
# builds that it made if their parts are the same objects as before; what is decorated with `made_once` is.
made_once = functools.lru_cache(maxsize=4096, typed=True)
SLOT = operator.attrgetter("slot")


@made_once
def choice(*values) -> st.SearchStrategy:
    """One of the values, shrinking to the first: `sampled_from`, made once."""
    return st.sampled_from(values) if len(values) > 1 else st.just(*values)


@made_once
def either(*strategies: st.SearchStrategy) -> st.SearchStrategy:
    """From one of the strategies, shrinking to the first: `one_of`, made once."""
    return st.one_of(*strategies)


def around(*values: int) -> tuple[int, ...]:
    """Each value with its neighbours, without negatives."""
    return tuple(sorted({v + d for v in values for d in (-1, 0, 1) if v + d >= 0}))


@made_once
def lengths(*edges: int, least: int = 0, most: int = 300) -> st.SearchStrategy[int]:
    """A length from `least` to `most`: small, at an edge (of `edges` or the usual ones), or anything."""
    special = sorted(e for e in {*SHORT_EDGES, *LONG_EDGES, *edges} if least <= e <= most)
    return either(st.integers(least, min(least + 9, most)), choice(*special), st.integers(least, most))


@made_once
def any_slot(slots: int) -> st.SearchStrategy[int]:
    """A row of the request table: one of the first, the last, or any."""
    return either(st.integers(0, min(slots - 1, 3)), choice(slots - 1), st.integers(0, slots - 1))


@made_once
def batch_floor() -> st.SearchStrategy[int]:
    """The least number of requests to draw: mostly 2, so that most batches are ragged, and shrinking towards none."""
    return choice(0, 1, *(2,) * 14)


FORTY_CHOICES = st.tuples(*[st.booleans()] * 40)


@made_once
@st.composite
def many(draw, one_in: int) -> bool:
    """True once in `one_in`, for what makes a case large. Costs choices, so that shrinking prefers a few more requests."""
    chosen = draw(choice(*(False,) * (one_in - 1), True))
    if chosen:
        draw(FORTY_CHOICES)
    return chosen


@st.composite
def shared_out(draw, parts: tuple[int, ...], most: int) -> tuple[int, ...]:
    """As many lengths of the same total, none of them over `most`, which all of `parts` keep to: in any order, and what one
    has given to the next."""
    parts = list(draw(st.permutations(parts)))
    for i in range(len(parts) - 1):
        given = draw(st.integers(0, min(parts[i], most - parts[i + 1])))
        parts[i], parts[i + 1] = parts[i] - given, parts[i + 1] + given
    return tuple(parts)


@st.composite
def repeats(draw, *block_sizes: int) -> int:
    """How often a batch is repeated: mostly once, now and then past a kernel's block of requests."""
    return draw(choice(*block_sizes)) if draw(many(15)) else 1


def crowd(draw, items, least: int = 17) -> tuple:
    """Now and then so many items, by repetition, that a kernel needs a second block of them."""
    items = tuple(items)
    return items * -(-least // len(items)) if items and draw(many(12)) else items


@made_once
def rounded() -> st.SearchStrategy[bool]:
    """Whether row widths are multiples of 16 bytes, as engines allocate them: kernels may then move as much at once."""
    return choice(False, False, True)


def up(width: int) -> int:
    """What a width of 4-byte cells lacks to be a multiple of 16 bytes."""
    return -width % 4


@made_once
def spare() -> st.SearchStrategy[int]:
    """Capacity that a captured buffer has beyond the batch."""
    return choice(0, 1, 0, 3)
