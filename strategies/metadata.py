"""Cases of the metadata family."""

import functools
from dataclasses import replace

from hypothesis import strategies as st

from oracles.metadata import Decode, DraftExtend, ExtendReq, Req, TargetVerify
from strategies.common import SLOT, any_slot, around, batch_floor, choice, either, lengths, many, rounded, spare, up

PAGE_SIZES = (1, 64, 2, 16, 32, 128)
FAR_WIDTH = 2**20
TABLES = ((4, 0), (4, 1), (5, 7), (9, 130), (4, FAR_WIDTH), (4096, 0), (4096, FAR_WIDTH), (4096, FAR_WIDTH))
REQUEST_BLOCK = 64  # batches longer than this cross a block of requests in our kernels
MANY_REQUESTS, MANY_COLUMNS = 33, 32 * 1024  # more than one pass of our kernel's programs takes


@st.composite
def _frame(draw) -> dict:
    """Everything but the requests: page size, top-k, backends, table sizes, capacities."""
    page_size = draw(choice(*PAGE_SIZES))
    wide = page_size == 1 or draw(choice(True, True, False))
    slots, table_extra = draw(choice(*TABLES))
    return dict(
        slots=slots,
        table_extra=table_extra,
        page_size=page_size,
        wide=wide,
        index_topk=draw(choice(2048, 64, 4, 1, 0)),
        backends=draw(choice(1, 1, 1, 2, 2, 3, 4)),
        max_extra=draw(choice(0, 1, 63, 200)),
        spare=draw(spare()),
        aligned=draw(st.booleans()),
        shared=draw(choice(False, False, True)),
        content=draw(st.integers(0, 255)),
    )


def _lengths(frame: dict) -> st.SearchStrategy[int]:
    edges = around(frame["page_size"], 2 * frame["page_size"], frame["index_topk"], 1024)
    return lengths(*edges, most=2100 if frame["wide"] else 4161)


@functools.cache
def _request(slots: st.SearchStrategy, lengths: st.SearchStrategy) -> st.SearchStrategy[Req]:
    return st.builds(Req, slot=slots, seq_len=lengths)


_ONE = choice(1)
_PADDED = choice(0, 0, 2)


def _batch(draw, frame: dict, request: st.SearchStrategy, padding: st.SearchStrategy, most: int) -> tuple:
    """Real requests own distinct slots; padded ones stand behind them on any slot, also another's."""
    real = draw(st.lists(request, min_size=draw(batch_floor()), max_size=most, unique_by=SLOT))
    batch = (*real, *draw(st.lists(padding, max_size=draw(_PADDED))))
    if draw(many(10)) and batch:
        frame.update(repeat=-(-(REQUEST_BLOCK + 1) // len(batch)), backends=1, max_extra=min(frame["max_extra"], 1))
        batch = tuple(_shortened(r) for r in batch)
    elif frame["wide"] and batch and draw(many(25)):
        frame.update(backends=1, table_extra=min(frame["table_extra"], 7))
        others = (*batch[1:], *[_shortened(batch[0])] * (MANY_REQUESTS - len(batch)))
        batch = (replace(batch[0], seq_len=MANY_COLUMNS + draw(st.integers(1, 300))), *others)
    return batch


def _shortened(request: Req | ExtendReq) -> Req | ExtendReq:
    """The same request with a short row: long batches of long rows take the interpreter many seconds."""
    if isinstance(request, ExtendReq):
        extend = min(request.extend_len, 2)
        return replace(request, extend_len=extend, seq_len=extend + request.seq_len % 33)
    return replace(request, seq_len=request.seq_len % 33)


def _rounded(draw, case):
    """The case, now and then with table rows that all begin at multiples of 16 bytes."""
    if not draw(rounded()):
        return case
    case = replace(case, spare=case.spare // 3 * 4, max_extra=case.max_extra + up(case.max_len()))
    return replace(case, table_extra=case.table_extra + up(case.table_extra))


@st.composite
def decode_metadata(draw, max_requests: int = 4) -> Decode:
    """Ragged decode batches with zero-length requests and padded rows (length 1, stale slot)."""
    frame = draw(_frame())
    request, padding = _request(any_slot(frame["slots"]), _lengths(frame)), _request(any_slot(frame["slots"]), _ONE)
    return _rounded(draw, Decode(_batch(draw, frame, request, padding, max_requests), **frame))


@st.composite
def target_verify_metadata(draw, max_requests: int = 3) -> TargetVerify:
    """Draft widths 1 to 8, with and without the two-dimensional lengths."""
    frame = draw(_frame())
    request, padding = _request(any_slot(frame["slots"]), _lengths(frame)), _request(any_slot(frame["slots"]), _ONE)
    batch = _batch(draw, frame, request, padding, max_requests)
    width = draw(choice(1, 2, 3, 4, 2, 3, 5, 8))
    return _rounded(draw, TargetVerify(batch, draft_tokens=width, ctx_lens=draw(st.booleans()), **frame))


@st.composite
def draft_extend_metadata(draw, max_requests: int = 4) -> DraftExtend:
    """Ragged accept lengths (0 among them) and static widths; padded requests have fewer keys than query tokens."""
    frame = draw(_frame())
    width = draw(st.integers(1, 8))
    static = draw(st.booleans())
    extend = choice(width) if static else st.integers(0, width)

    def real(slot: int, new: int, prefix: int) -> ExtendReq:
        return ExtendReq(slot, prefix + new, new)

    request = st.builds(real, any_slot(frame["slots"]), extend, _lengths(frame))
    padding = st.builds(ExtendReq, slot=any_slot(frame["slots"]), seq_len=choice(1, 1, 0), extend_len=choice(width))
    batch = _batch(draw, frame, request, padding, max_requests)
    static = static and len({r.extend_len for r in batch}) < 2  # long batches are of shortened requests
    return _rounded(draw, DraftExtend(batch, static=static, extend_extra=draw(choice(0, 1)), **frame))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


@st.composite
def _replayed(draw, captured, request: st.SearchStrategy, padding: st.SearchStrategy):
    """As many requests as captured: some new, the rest padded; table widths as captured."""
    count = len(captured.batch)
    real = draw(st.lists(request, max_size=count, unique_by=SLOT))
    batch = (*real, *draw(st.lists(padding, min_size=count - len(real), max_size=count - len(real))))
    case = replace(captured, requests=batch, repeat=1, max_extra=0, content=draw(st.integers(0, 255)))
    return replace(case, max_extra=captured.max_len() - case.max_len())


def _slot_of(captured) -> st.SearchStrategy[int]:
    return any_slot(captured.slots)


def decode_metadata_replay(captured: Decode) -> st.SearchStrategy[Decode]:
    """Another decode batch on the same buffers."""
    most = captured.max_len()
    request = st.builds(Req, slot=_slot_of(captured), seq_len=lengths(most=most))
    padding = st.builds(Req, slot=_slot_of(captured), seq_len=choice(min(1, most)))
    return _replayed(captured, request, padding)


def target_verify_metadata_replay(captured: TargetVerify) -> st.SearchStrategy[TargetVerify]:
    """Another verify batch on the same buffers; the draft width is captured."""
    most = captured.max_len() - captured.draft_tokens
    request = st.builds(Req, slot=_slot_of(captured), seq_len=lengths(most=most))
    padding = st.builds(Req, slot=_slot_of(captured), seq_len=choice(min(1, most)))
    return _replayed(captured, request, padding)


@st.composite
def draft_extend_metadata_replay(draw, captured: DraftExtend) -> DraftExtend:
    """Another draft extend on the same buffers; with ragged accept lengths never more rows than captured."""
    most = captured.max_len()
    requests = []
    for r in captured.batch:
        extend = r.extend_len if captured.static else draw(st.integers(0, r.extend_len))
        requests.append(ExtendReq(draw(_slot_of(captured)), draw(either(choice(min(1, most)), lengths(most=most))), extend))
    case = replace(captured, requests=tuple(requests), repeat=1, max_extra=0, extend_extra=0, row_spare=0,
                   content=draw(st.integers(0, 255)))
    return replace(case, max_extra=most - case.max_len(), row_spare=captured.row_spare + captured.rows() - case.rows(),
                   extend_extra=captured.max_extend_len() - case.max_extend_len())


# -- serving sessions: one bucket, one set of buffers, any mode ---------------------------------------------------------


@st.composite
def serving(draw) -> tuple[Decode | TargetVerify | DraftExtend, ...]:
    """Steps of a server on the buffers of one bucket: it grows, shrinks, idles (every request padded) and switches between
    decode, verify and draft extend, as a speculative decoder does from step to step."""
    bucket, width = draw(st.integers(1, 4)), draw(choice(1, 2, 3, 4))
    most = width + draw(lengths(least=1, most=300))
    frame = {**draw(_frame()), "slots": 6, "table_extra": 3}
    lens_2d = draw(st.booleans())
    kinds = draw(st.lists(choice("decode", "verify", "extend", "ragged", "idle"), min_size=2, max_size=5))
    return tuple(_served(draw, kind, bucket, width, most, {**frame, "content": draw(st.integers(0, 255))}, lens_2d)
                 for kind in kinds)


def _served(draw, kind: str, bucket: int, width: int, most: int, frame: dict, lens_2d: bool):
    """One step: as many real requests as there are, padding up to the bucket, tables of `most` columns."""
    live = [] if kind == "idle" else draw(st.lists(st.integers(0, frame["slots"] - 1), max_size=bucket, unique=True))
    slots = live + [draw(st.integers(0, frame["slots"] - 1)) for _ in range(bucket - len(live))]
    seqs = [draw(lengths(most=most - width)) if i < len(live) else 1 for i in range(bucket)]
    if kind == "verify":
        case = TargetVerify(tuple(Req(*r) for r in zip(slots, seqs)), draft_tokens=width, ctx_lens=lens_2d, **frame)
    elif kind in ("extend", "ragged"):
        extends = [width if kind == "extend" or i >= len(live) else draw(st.integers(0, width)) for i in range(bucket)]
        requests = tuple(ExtendReq(slot, seq + extend if i < len(live) else 1, extend)
                         for i, (slot, seq, extend) in enumerate(zip(slots, seqs, extends)))
        case = DraftExtend(requests, static=kind == "extend", **frame)
    else:
        case = Decode(tuple(Req(*r) for r in zip(slots, seqs)), **frame)
    return replace(case, max_extra=most - case.longest, row_spare=bucket * width - case.rows())
