"""Cases of the page_table family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.page_table import (KINDS, MODES, CuSeqlensQ, ExtendReq, GatherPageTable, MaxSeqLenQ, PageTable1Flattened,
                                PrefixReq, RealPageTable, Req, TopkIndicesOffset)
from strategies.common import (
    SLOT, any_slot, around, batch_floor, choice, crowd, either, lengths, many, repeats, rounded, shared_out, spare, up)

PAGE_SIZES = (64, 1, 2, 16, 32, 128, 3)
WIDTHS = (1, 2, 3, 4, 5, 8)
TABLES = ((4, 0), (4, 1), (5, 7), (9, 130), (4096, 2**20), (4096, 0))
REQUEST_BLOCK = 32  # batches longer than this cross a block of requests in our kernels
COLUMN_BLOCK = 1024
MANY_COLUMNS = 32 * COLUMN_BLOCK  # more than the columns of one pass of our kernels' programs


def _lengths() -> st.SearchStrategy[int]:
    return lengths(*around(COLUMN_BLOCK), most=2100)


@st.composite
def gather_page_table(draw, max_requests: int = 4) -> GatherPageTable:
    """One row per request, `draft_tokens` rows, ragged rows (0 among them), and selections (none and all among them).

    Real requests own distinct slots; padded ones (length 1) stand behind them on any slot, also another's.
    """
    slots, table_extra = draw(choice(*TABLES))
    rows, selected = st.integers(0, 5), choice(True, True, False)
    request = st.builds(Req, slot=any_slot(slots), seq_len=_lengths(), rows=rows, selected=selected)
    padding = st.builds(Req, slot=any_slot(slots), seq_len=choice(1), rows=rows, selected=selected)
    real = draw(st.lists(request, min_size=draw(batch_floor()), max_size=max_requests, unique_by=SLOT))
    batch = (*real, *draw(st.lists(padding, max_size=draw(choice(0, 0, 2)))))
    mode = draw(choice("widths", "ragged", "selection", "widths", "both"))
    if mode == "selection" and draw(choice(*(False,) * 5, True)):
        batch = tuple(replace(r, selected=False) for r in batch)
    case = GatherPageTable(
        batch, ragged=mode in ("ragged", "both"), selection=mode in ("selection", "both"),
        draft_tokens=draw(choice(*WIDTHS)) if mode != "selection" else 1,
        max_extra=draw(choice(0, 1, 63, 200)), table_extra=table_extra, spare=draw(spare()),
        row_spare=draw(choice(0, 0, 2)), slots=slots, shared=draw(choice(False, False, True)),
        content=draw(st.integers(0, 255)))
    if batch and draw(many(12)):
        short = tuple(replace(r, seq_len=r.seq_len % 33, rows=min(r.rows, 2)) for r in batch)
        with_rows = len(case.chosen()) or len(batch)
        case = replace(case, requests=short, times=-(-(REQUEST_BLOCK + 1) // with_rows), draft_tokens=1, max_extra=0)
    elif batch and draw(many(20)):
        first = replace(batch[0], seq_len=MANY_COLUMNS + draw(st.integers(1, 300)), selected=True)
        case = replace(case, requests=(first, *batch[1:]), slots=4, table_extra=min(table_extra, 7),
                       draft_tokens=min(case.draft_tokens, 2))
        case = replace(case, requests=tuple(replace(r, slot=r.slot % 4, rows=min(r.rows, 2)) for r in case.requests))
    if draw(rounded()):
        case = replace(case, spare=case.spare // 3 * 4, max_extra=case.max_extra + up(case.max_len()))
        case = replace(case, table_extra=case.table_extra + up(case.table_extra))
    return case


@st.composite
def gather_page_table_replay(draw, captured: GatherPageTable) -> GatherPageTable:
    """Another batch on the same buffers: as many requests, some of them padded; never more ragged rows than captured."""
    most = captured.max_len()
    requests = []
    for r in captured.batch:
        length = draw(either(choice(min(1, most)), lengths(most=most)))
        requests.append(Req(draw(any_slot(captured.slots)), length, draw(st.integers(0, r.rows)), r.selected))
    case = replace(captured, requests=tuple(requests), times=1, max_extra=0, content=draw(st.integers(0, 255)))
    return replace(case, max_extra=most - case.max_len(), row_spare=captured.row_spare + captured.rows() - case.rows())


def _kinds() -> st.SearchStrategy[str]:
    return choice(*KINDS)


@st.composite
def real_page_table(draw, max_rows: int = 5) -> RealPageTable:
    """Whole and cut last pages; aligned and scattered slots, holes, and any int32."""
    page_size = draw(choice(*PAGE_SIZES))
    columns = draw(lengths(*around(page_size, 2 * page_size), most=300))
    rows = tuple(draw(st.lists(_kinds(), min_size=draw(batch_floor()), max_size=max_rows)))
    if draw(many(15)):
        page_size = draw(choice(1, 2, 3))
        pages = draw(choice(COLUMN_BLOCK, COLUMN_BLOCK, MANY_COLUMNS))
        columns = pages * page_size + draw(choice(1, 1, 0))
    elif columns < 64:
        rows = crowd(draw, rows)
    return RealPageTable(rows, columns, page_size, draw(spare()), draw(spare()), draw(st.integers(0, 255)))


@st.composite
def real_page_table_replay(draw, captured: RealPageTable) -> RealPageTable:
    """A table of other contents, of at most as many rows and columns, into the same buffer."""
    rows = tuple(draw(st.lists(_kinds(), max_size=len(captured.rows))))
    case = replace(captured, rows=rows, columns=draw(st.integers(0, captured.columns)), content=draw(st.integers(0, 255)))
    return replace(case, row_spare=captured.row_spare + len(captured.rows) - len(rows),
                   page_spare=captured.page_spare + captured.pages() - case.pages())


@st.composite
def page_table_1_flattened(draw, max_requests: int = 5) -> PageTable1Flattened:
    """Ragged lengths with zeros among them, tables wider than the longest, shared pages."""
    batch = tuple(draw(st.lists(_lengths(), min_size=draw(batch_floor()), max_size=max_requests)))
    times = draw(repeats(REQUEST_BLOCK + 1))
    batch = batch if times == 1 else tuple(n % 33 for n in batch[:2])
    if batch and times == 1 and draw(many(20)):
        batch = (MANY_COLUMNS + batch[0], *batch[1:])
    return PageTable1Flattened(
        batch, times, draw(choice(0, 1, 63, 200)), draw(choice(0, 0, 5)), draw(spare()),
        draw(choice(False, False, True)), draw(st.integers(0, 255)))


@st.composite
def page_table_1_flattened_replay(draw, captured: PageTable1Flattened) -> PageTable1Flattened:
    """As many requests with as many keys in all, on a table of the same width; other slots."""
    batch = draw(shared_out(captured.all, captured.max_len()))
    case = replace(captured, lengths=batch, times=1, max_extra=0, content=draw(st.integers(0, 255)))
    return replace(case, max_extra=captured.max_len() - case.longest())


EXTENDS = either(st.integers(0, 8), choice(15, 16, 17, 127, 128, 129, 130, 300))
PREFIXES = either(choice(0), lengths(most=300), lengths(*around(131072), most=2**20))
EXTEND_REQUESTS = st.builds(lambda extend, prefix: ExtendReq(extend, extend + prefix), EXTENDS, PREFIXES)


@st.composite
def topk_indices_offset(draw, max_requests: int = 5) -> TopkIndicesOffset:
    """Prefixed, fresh (extend == seq) and idle (extend 0) requests."""
    batch = tuple(draw(st.lists(EXTEND_REQUESTS, min_size=draw(batch_floor()), max_size=max_requests)))
    times = draw(repeats(REQUEST_BLOCK + 1))
    if times > 1:
        batch = tuple(ExtendReq(r.extend_len % 4, r.seq_len) for r in batch[:1])
    return TopkIndicesOffset(batch, times, draw(spare()))


@st.composite
def topk_indices_offset_replay(draw, captured: TopkIndicesOffset) -> TopkIndicesOffset:
    """As many requests with as many query tokens in all, among other keys."""
    extends = draw(shared_out(tuple(r.extend_len for r in captured.batch), captured.total()))
    return replace(captured, requests=tuple(ExtendReq(n, n + draw(PREFIXES)) for n in extends), times=1)


@st.composite
def cu_seqlens_q(draw, max_requests: int = 6) -> CuSeqlensQ:
    """Every mode; lengths that the mode does not need are missing or leftovers. Row counts past a block of 1,024."""
    mode = draw(choice(*MODES))
    extends, times = tuple(draw(st.lists(EXTENDS, min_size=draw(batch_floor()), max_size=max_requests))), 1
    if draw(many(15)):
        extends, times = tuple(n % 5 for n in extends[: draw(choice(1, 2))]), COLUMN_BLOCK + 1
    return CuSeqlensQ(mode, extends, times, draw(choice(*WIDTHS)), draw(st.booleans()), draw(spare()))


@st.composite
def cu_seqlens_q_replay(draw, captured: CuSeqlensQ) -> CuSeqlensQ:
    """As many requests with as many query tokens in all, in the same mode. Only an extend's boundaries depend on them."""
    return replace(captured, extends=draw(shared_out(captured.all, sum(captured.all))), times=1)


@st.composite
def max_seq_len_q(draw) -> MaxSeqLenQ:
    """Every mode, with and without prefixes and context parallelism; ranks that own nothing."""
    mode, prefixed, round_robin = draw(st.tuples(choice("extend", *MODES), st.booleans(), st.booleans()))
    request = st.builds(PrefixReq, EXTENDS, lengths(most=300) if prefixed else choice(0))
    batch = tuple(draw(st.lists(request, min_size=draw(batch_floor()), max_size=5)))
    batch = () if draw(choice(*(False,) * 9, True)) else batch
    return MaxSeqLenQ(mode, batch, round_robin, draw(choice(0, 0, 7)))
