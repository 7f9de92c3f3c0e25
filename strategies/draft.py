"""Cases of the draft family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.draft import (Accepted, AssignDraftCacheLocs, AssignDraftCacheLocsContiguous, AssignExtendCacheLocs,
                           AssignExtendCacheLocsUniform, AssignReqToTokenPool, CreateExtendAfterDecode, Extent, Req)
from strategies.common import SLOT, any_slot, around, batch_floor, choice, either, lengths, made_once, many, spare
from strategies.kv_indices import DRAFT_PAGE_SIZES, REQUEST_BLOCK, TABLES, TREES

WRITTEN_TABLES = ((4, 0), (4, 1), (5, 7), (9, 130), (40, 3))  # every row of an output is compared


@st.composite
def _frame(draw, tables) -> dict:
    slots, table_extra = draw(choice(*tables))
    return dict(slots=slots, table_extra=table_extra, spare=draw(spare()), tail=draw(choice(0, 0, 1, 9)),
                content=draw(st.integers(0, 255)))


def _batch(draw, request: st.SearchStrategy, most: int = 4) -> tuple:
    """Requests on rows of their own."""
    return tuple(draw(st.lists(request, min_size=draw(batch_floor()), max_size=most, unique_by=SLOT)))


def _more_than_a_block(draw, frame: dict, batch: tuple, shortened) -> tuple:
    """Now and then the batch again and again, with less to do for each request."""
    if draw(many(10)) and batch:
        frame.update(repeat=-(-(REQUEST_BLOCK + 1) // len(batch)))
        return tuple(shortened(r) for r in batch)
    return batch


def _extents(draw, frame: dict, repeatable: bool) -> tuple[Extent, ...]:
    """Ranges of new tokens, empty ones among them; behind them padded requests with no tokens, on any row."""
    count = either(st.integers(0, 8), choice(*around(32, 64, 128)), lengths(most=300))
    request = st.builds(Extent, slot=any_slot(frame["slots"]), start=either(choice(0), lengths(most=300)), count=count)
    batch = _batch(draw, request)
    padding = st.builds(Extent, slot=either(choice(0), any_slot(frame["slots"])), start=choice(0, 1, 7),
                        count=choice(0))
    batch += tuple(draw(st.lists(padding, max_size=draw(choice(0, 0, 2)))))
    if repeatable:
        return _more_than_a_block(draw, frame, batch, lambda r: replace(r, count=r.count % 5))
    if draw(many(10)) and batch:  # rows have one owner each: a block of requests without tokens in front of the real ones
        idle = tuple(Extent(0, 0, 0) for _ in range(REQUEST_BLOCK - 1))
        return (batch[0], *idle, *batch[1:])
    return batch


@st.composite
def assign_req_to_token_pool(draw) -> AssignReqToTokenPool:
    """Ragged ranges that no two requests share, and padded requests on anybody's row."""
    frame = draw(_frame(WRITTEN_TABLES))
    return AssignReqToTokenPool(_extents(draw, frame, False), **frame)


@st.composite
def assign_extend_cache_locs(draw) -> AssignExtendCacheLocs:
    """Ragged ranges; far tables."""
    frame = draw(_frame(TABLES))
    batch = _extents(draw, frame, True)
    return AssignExtendCacheLocs(batch, **frame)


def _requests(draw, frame: dict, *edges: int) -> tuple[Req, ...]:
    """Requests of their own rows, then padded ones (length 1) on any."""
    request = st.builds(Req, slot=any_slot(frame["slots"]), seq_len=lengths(*edges, most=300))
    padding = st.builds(Req, slot=either(choice(0), any_slot(frame["slots"])), seq_len=choice(1))
    batch = _batch(draw, request) + tuple(draw(st.lists(padding, max_size=draw(choice(0, 0, 2)))))
    return _more_than_a_block(draw, frame, batch, lambda r: r)


@st.composite
def assign_extend_cache_locs_uniform(draw) -> AssignExtendCacheLocsUniform:
    """Draft widths 1 to 8 and around the block."""
    frame = draw(_frame(TABLES))
    width = draw(choice(2, 1, 3, 4, 5, 8, 64, 65, 128, 129))
    return AssignExtendCacheLocsUniform(_requests(draw, frame), draft_tokens=width, positions=draw(st.booleans()), **frame)


@st.composite
def assign_draft_cache_locs_contiguous(draw) -> AssignDraftCacheLocsContiguous:
    """Chains and trees."""
    frame = draw(_frame(TABLES))
    num_steps, topk = draw(choice(*TREES))
    return AssignDraftCacheLocsContiguous(_requests(draw, frame), topk=topk, num_steps=num_steps,
                                          with_positions=draw(st.booleans()), **frame)


@made_once
def _accepted(accept: st.SearchStrategy[int]) -> st.SearchStrategy[Accepted]:
    return st.builds(lambda prefix, new: Accepted(prefix + new, new), lengths(2**20, most=2**20), accept)


@st.composite
def create_extend_after_decode_spec_info(draw, max_requests: int = 6) -> CreateExtendAfterDecode:
    """Everything and little accepted, more than num_steps + 1 (up to more than a block), and padded requests (length 1)."""
    num_steps = draw(choice(2, 1, 3, 4, 5, 8))
    accept = either(st.integers(1, num_steps + 1), st.integers(1, num_steps + 1), choice(9, 17, 33, 130))
    real = _accepted(accept)
    padded = st.builds(Accepted, seq_len=choice(1), accept_len=st.integers(1, num_steps + 1))
    batch = draw(st.lists(either(real, real, padded), min_size=draw(batch_floor()), max_size=max_requests))
    frame = dict(spare=draw(spare()), tail=draw(choice(0, 0, 1, 9)), content=draw(st.integers(0, 255)))
    batch = _more_than_a_block(draw, frame, tuple(batch), lambda r: replace(r, accept_len=min(r.accept_len, 2)))
    return CreateExtendAfterDecode(batch, num_steps=num_steps, **frame)


@st.composite
def assign_draft_cache_locs(draw) -> AssignDraftCacheLocs:
    """Chains and trees with and without pages; partial last pages, full ones, batches of only full ones, and drafts that fill
    their last page."""
    frame = draw(_frame(WRITTEN_TABLES))
    num_steps, topk = draw(choice(*TREES))
    page = draw(choice(*DRAFT_PAGE_SIZES, 4, 16))
    length = lengths(*around(page, 2 * page), most=300)
    last_page = draw(choice("any", "any", "any", "full", "filled"))
    if last_page != "any":
        drafts = num_steps if last_page == "filled" else 0
        length = st.integers(0, 300 // page).map(lambda n: n * page + -drafts % page)
    request = st.builds(Req, slot=any_slot(frame["slots"]), seq_len=length)
    most = 4
    if frame["slots"] == 40 and draw(many(5)):
        most = REQUEST_BLOCK + 4
        request = st.builds(Req, slot=st.integers(0, 39), seq_len=st.integers(0, 20))
        batch = tuple(draw(st.lists(request, min_size=REQUEST_BLOCK + 1, max_size=most, unique_by=SLOT)))
        num_steps, topk, page = 2, 2, min(page, 4)
    else:
        batch = _batch(draw, request, most)
    return AssignDraftCacheLocs(batch, topk=topk, num_steps=num_steps, page_size=page, **frame)
