"""Cases of the schedule family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.schedule import INT32_MAX, FlashmlaSchedule, PagedMqaSchedule, PagedMqaWalk
from strategies.common import around, batch_floor, choice, either, lengths, many, repeats, spare

FEW = (4, 1, 2, 3, 5, 8, 7)
DEVICES = (132, 148, 78)
BLOCK_EDGES = (63, 64)  # a schedule has one entry more than SMs, and our kernel writes 64 at a time


@st.composite
def _processors(draw) -> int:
    """Mostly a few: the interpreter runs what they do one after the other."""
    return draw(choice(*DEVICES if draw(many(18)) else FEW))


def _lengths(most: int) -> st.SearchStrategy[int]:
    return either(lengths(most=600), lengths(*around(256, 512, 1024), most=most), choice(0, 1, 256))


@st.composite
def _batch(draw, most: int, max_rows: int = 6) -> tuple[int, ...]:
    """Ragged batches, idle ones (all zero), padded ones (length 1 behind real rows), and one row alone."""
    batch = draw(st.lists(_lengths(most), min_size=draw(batch_floor()), max_size=max_rows))
    kind = draw(choice(*("ragged",) * 8, "idle", "padded", "alone"))
    if kind == "idle":
        return (0,) * len(batch)
    if kind == "alone":
        return tuple(batch[:1])
    return (*batch, *(1,) * draw(st.integers(1, 3))) if kind == "padded" else tuple(batch)


@st.composite
def paged_mqa_schedule(draw) -> PagedMqaSchedule:
    """One- and two-dimensional lengths, up to the largest int32; fewer splits than SMs, and many more."""
    batch = draw(_batch(most=2**20))
    if draw(choice(*(False,) * 11, True)) and batch:
        batch = (*batch[:-1], INT32_MAX)
    return PagedMqaSchedule(batch, draw(repeats(257, 65)), draw(choice(0, 0, 1, 2, 3, 4, 5, 8)),
                            draw(choice(*FEW, *DEVICES, *BLOCK_EDGES)), draw(spare()))


@st.composite
def paged_mqa_walk(draw) -> PagedMqaWalk:
    """Rows of a few splits; rows of many now and then."""
    most = 80_000 if draw(many(15)) else 1300
    return PagedMqaWalk(draw(_batch(most, max_rows=4)), draw(_processors()), spare=draw(spare()))


@st.composite
def flashmla_schedule(draw) -> FlashmlaSchedule:
    """The same keys for every request (64 keys to more than the usual 2,048), or as many as it has."""
    batch = draw(_batch(most=20_000).filter(len))
    topk = draw(choice(-1, -1, 2048, 2047, 64, 1, 4096))
    return FlashmlaSchedule(batch, draw(repeats(65, 257)), topk, draw(_processors()), draw(spare()))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


def _as_many(captured, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Other lengths, as many as captured: any, all short, idle."""
    n = captured.batch_size()
    short = either(st.integers(0, 1), st.integers(0, 260))
    return either(*(st.lists(e, min_size=n, max_size=n).map(tuple) for e in (_lengths(most), short, choice(0))))


def paged_mqa_schedule_replay(captured: PagedMqaSchedule) -> st.SearchStrategy[PagedMqaSchedule]:
    """Other lengths; the batch, the SMs and the layout of the lengths are captured."""
    return _as_many(captured, 2**20).map(lambda batch: replace(captured, lengths=batch, repeat=1))


def paged_mqa_walk_replay(captured: PagedMqaWalk) -> st.SearchStrategy[PagedMqaWalk]:
    """Other lengths with their own schedule; the columns of the output are captured."""
    width = captured.max_splits()
    batch = st.lists(lengths(most=256 * width), min_size=captured.batch_size(), max_size=captured.batch_size())
    return batch.map(lambda b: replace(captured, lengths=tuple(b), width=width))


def flashmla_schedule_replay(captured: FlashmlaSchedule) -> st.SearchStrategy[FlashmlaSchedule]:
    """Other lengths; the batch, the top-k and the parts are captured."""
    return _as_many(captured, 20_000).map(lambda batch: replace(captured, lengths=batch, repeat=1))
