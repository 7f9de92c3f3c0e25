"""Cases of the kv_indices family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.kv_indices import DraftDecode, DraftDecodeSlices, FlashinferKvIndices, FlashmlaKvIndices, Req
from strategies.common import SLOT, any_slot, around, batch_floor, choice, either, lengths, many, spare

FAR_WIDTH = 2**20
TABLES = ((4, 0), (4, 1), (5, 7), (9, 130), (4, FAR_WIDTH), (4096, 0), (4096, FAR_WIDTH), (4096, FAR_WIDTH))
REQUEST_BLOCK = 32  # batches longer than this cross a block of requests in our kernels
PAGE_SIZES = (64, 1, 2, 16, 32, 128, 4, 8, 256, 512, 1024, 2048, 4096)
DRAFT_PAGE_SIZES = (1, 64, 4, 2, 16, 32, 128)
TREES = ((2, 1), (3, 1), (1, 1), (4, 1), (5, 1), (8, 1), (2, 2), (3, 2), (2, 3), (2, 4), (3, 4), (2, 8), (1, 2))  # steps, top-k


@st.composite
def _frame(draw, page_sizes) -> dict:
    """Everything but the requests: table sizes, page size, capacities."""
    slots, table_extra = draw(choice(*TABLES))
    return dict(
        slots=slots,
        table_extra=table_extra,
        page_size=draw(choice(*page_sizes)),
        spare=draw(spare()),
        aligned=draw(st.booleans()),
        shared=draw(choice(False, False, True)),
        content=draw(st.integers(0, 255)),
    )


def _batch(draw, frame: dict, request: st.SearchStrategy, most: int) -> tuple[Req, ...]:
    """Real requests own distinct slots; padded ones (length 1) stand behind them on any slot, also another's."""
    real = draw(st.lists(request, min_size=draw(batch_floor()), max_size=most, unique_by=SLOT))
    padding = st.builds(Req, slot=either(choice(0), any_slot(frame["slots"])), length=choice(1))
    return (*real, *draw(st.lists(padding, max_size=draw(choice(0, 0, 2)))))


@st.composite
def create_flashinfer_kv_indices(draw, max_requests: int = 4) -> FlashinferKvIndices:
    """Ragged batches with zero-length requests, starts, gaps between the ranges, and room behind them."""
    frame = draw(_frame((1, 64)))
    gap = choice(0, 0, 0, 1, 5)
    start = either(choice(0), lengths(most=200))
    length = either(lengths(*around(512, 1024), most=1100), lengths(most=300))
    request = st.builds(Req, slot=any_slot(frame["slots"]), length=length, start=start, gap=gap)
    batch = _batch(draw, frame, request, max_requests)
    return FlashinferKvIndices(batch, starts=draw(st.booleans()), tail=draw(choice(0, 0, 1, 70)), **frame)


@st.composite
def create_flashmla_kv_indices(draw, max_requests: int = 4) -> FlashmlaKvIndices:
    """Every page size; rows that are exactly wide enough, and wider ones."""
    frame = draw(_frame(PAGE_SIZES))
    page = frame["page_size"]
    length = either(lengths(*around(page, 2 * page, 4096), most=4161), lengths(most=300))
    request = st.builds(Req, slot=any_slot(frame["slots"]), length=length, start=either(choice(0), lengths(page, most=200)))
    batch = _batch(draw, frame, request, max_requests)
    return FlashmlaKvIndices(batch, starts=draw(choice(False, True)), row_extra=draw(choice(0, 0, 1, 9)),
                             row_spare=draw(choice(0, 0, 2)), **frame)


@st.composite
def generate_draft_decode_kv_indices(draw, max_programs: int = 16) -> DraftDecode:
    """Chains and trees of 1 to 8 steps; rows that are exactly wide enough; padded requests behind the real ones, without
    positions; now and then more than a block of requests."""
    frame, padded = draw(_frame(DRAFT_PAGE_SIZES)), 0
    num_steps, topk = draw(choice(*TREES))
    page = frame["page_size"]
    length = either(lengths(*around(page, 2 * page), most=300), lengths(page, most=64))
    request = st.builds(Req, slot=any_slot(frame["slots"]), length=length)
    batch = _batch(draw, frame, request, max(2, max_programs // (num_steps * topk)))
    if draw(many(12)) and batch:
        batch = tuple(replace(r, length=r.length % 9) for r in batch)
        frame.update(repeat=-(-(REQUEST_BLOCK + 1) // len(batch)))
        num_steps, topk = 1, draw(choice(1, 2))
    elif draw(many(12)) and batch:
        batch = (replace(batch[0], length=draw(choice(1025, 512, 513))), *batch[1:])
        num_steps, topk = draw(choice((2, 1), (1, 2)))
    else:
        padded = draw(choice(0, 0, 0, 1, 2))
        batch += (Req(0, 1),) * padded
    return DraftDecode(batch, topk=topk, num_steps=num_steps, unset_positions=padded,
                       row_extra=draw(choice(0, 0, 1, 40)), row_spare=draw(choice(0, 0, 2)), **frame)


@st.composite
def draft_decode_slices(draw, max_requests: int = 6) -> DraftDecodeSlices:
    """Real and padded requests, every tree, rows exactly wide enough and wider."""
    num_steps, topk = draw(choice(*TREES))
    real = draw(st.lists(lengths(2**20, most=2**20), min_size=draw(batch_floor()), max_size=max_requests))
    return DraftDecodeSlices(tuple(real), padded=draw(choice(0, 0, 1, 3)), topk=topk, num_steps=num_steps,
                             row_extra=draw(choice(0, 0, 1, 1000)))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


def _slot_of(captured) -> st.SearchStrategy[int]:
    return any_slot(captured.slots)


@st.composite
def create_flashmla_kv_indices_replay(draw, captured: FlashmlaKvIndices) -> FlashmlaKvIndices:
    """Another batch in the same block table: as many requests, some new, the rest padded."""
    most, count = min(captured.row_width() * captured.page_size, 4161), len(captured.batch)
    request = st.builds(Req, slot=_slot_of(captured), length=lengths(captured.page_size, most=most))
    padding = st.builds(Req, slot=either(choice(0), _slot_of(captured)), length=choice(min(1, most)))
    real = draw(st.lists(request, max_size=count, unique_by=SLOT))
    batch = (*real, *draw(st.lists(padding, min_size=count - len(real), max_size=count - len(real))))
    case = replace(captured, requests=batch, repeat=1, content=draw(st.integers(0, 255)))
    return replace(case, row_extra=captured.row_width() - case.pages())


@st.composite
def generate_draft_decode_kv_indices_replay(draw, captured: DraftDecode) -> DraftDecode:
    """Another batch in the same rows, never more entries than captured."""
    room = sum(r.length for r in captured.batch) + captured.row_extra // captured.topk
    lens = []
    for _ in captured.batch:
        lens.append(draw(either(choice(min(1, room)), lengths(captured.page_size, most=min(room, 300)))))
        room -= lens[-1]
    slots = draw(st.lists(_slot_of(captured), min_size=len(lens), max_size=len(lens)))
    batch = tuple(Req(slot, length) for slot, length in zip(slots, draw(st.permutations(lens))))
    case = replace(captured, requests=batch, repeat=1, row_extra=0, content=draw(st.integers(0, 255)))
    return replace(case, row_extra=captured.needed() + captured.row_extra - case.needed())
