"""Cases of the topk_transform family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.topk_transform import (
    SCORES, FastTopk, FastTopkPaged, FastTopkRagged, IndexRequest, IndexRow, PadTopkIndices, RaggedRow, Request, Row,
    TopkTransformV2, TransformDecode, TransformPrefill, TransformRagged)
from strategies.common import around, batch_floor, choice, crowd, either, lengths, made_once, many, spare

SEEDS = st.integers(0, 255)
KINDS = ("selected", "holes", "identity", "ends", "none")
BLOCKS = (63, 65, 256, 257, 300)  # around the column blocks of our kernels and of SGLang's
OFFSETS = (0, 3, 100, 4097, 2**20, 2**31 - 2**13)
STARTS = choice(0, 1, 2, 3, 0, 7, 63, 64, 250)


@made_once
def look(kinds: tuple[str, ...]) -> st.SearchStrategy[tuple[str, int]]:
    """A kind and a seed from one choice: rows of few choices are deleted in one step when a case shrinks."""
    return st.integers(0, 256 * len(kinds) - 1).map(lambda n: (kinds[n % len(kinds)], n // len(kinds)))


def _topk(draw, *wide: int) -> int:
    """Indices per row: few, at the edge of a block, or SGLang's 2,048."""
    return draw(choice(1, 4, 3, 16, 64, *BLOCKS, *wide))


def _keys(topk: int) -> st.SearchStrategy[int]:
    return lengths(*around(topk), most=600)


# -- index transforms ---------------------------------------------------------------------------------------------------


@made_once
def _index_rows(keys: st.SearchStrategy[int], kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[IndexRow]:
    return st.builds(lambda n, kind: IndexRow(n, *kind), keys, look(kinds))


@st.composite
def transform_index_page_table_decode(draw, max_rows: int = 5) -> TransformDecode:
    """Rows of every kind; a quarter of the batches has SGLang's 2,048 indices a row, which its older kernel needs."""
    topk = _topk(draw, 2048, 2048, 2048, 2048)
    row = _index_rows(_keys(topk))
    most = max_rows if topk <= 64 else 3
    if draw(many(8)):  # and now and then the width of a pooled index, over a wide table
        topk, most = draw(choice(2051, 4, 1025)), 3
        row = _index_rows(choice(4096, 65537, 2049), ("ends", "holes"))
    rows = tuple(draw(st.lists(row, min_size=draw(batch_floor()), max_size=most)))
    rows = crowd(draw, rows) if topk <= 64 else rows
    return TransformDecode(rows, topk, _width(draw, [r.keys for r in rows]), draw(choice(False, False, True)),
                           draw(spare()), draw(SEEDS))


def _width(draw, keys: list[int]) -> int:
    """A table as wide as the longest row, or wider."""
    return max(keys, default=0) + draw(choice(0, 1, 0, 61))


@made_once
def _index_requests(extends: st.SearchStrategy[int], keys: st.SearchStrategy[int]) -> st.SearchStrategy[IndexRequest]:
    return st.builds(lambda extend, n, kind: IndexRequest(extend, n, *kind), extends, keys, look(KINDS))


@st.composite
def transform_index_page_table_prefill(draw, max_requests: int = 4) -> TransformPrefill:
    """Ragged batches with requests without tokens, tables by request and by token, and padding of either kind."""
    topk = _topk(draw)
    extends = choice(1, 0, 2, 3, 4, 5, 9) if topk <= 64 else choice(1, 0, 2)
    if draw(many(10)):
        topk, extends = 4, choice(1, 17, 65)
    request = _index_requests(extends, _keys(topk))
    requests = tuple(draw(st.lists(request, min_size=draw(batch_floor()), max_size=max_requests)))
    if draw(many(10)) and requests:
        topk, requests = 4, tuple(replace(r, extend_len=r.extend_len % 2) for r in requests) * (-(-65 // len(requests)))
    if draw(choice(*(False,) * 5, True)) and requests:  # all that SGLang's older kernel takes
        plain = tuple(replace(r, extend_len=1 + r.extend_len % 3) for r in requests[:3])
        return TransformPrefill(plain, 2048, _width(draw, [r.keys for r in plain]), shared=draw(st.booleans()),
                                sums=draw(st.booleans()), spare=draw(spare()), content=draw(SEEDS))
    expanded = draw(choice(False, False, True))
    return TransformPrefill(
        requests, topk, _width(draw, [r.keys for r in requests]), expanded, shared=draw(choice(False, False, True)),
        sums=draw(st.booleans()), padding=draw(choice(0, 0, 1, 3)),
        output_extra=draw(choice(None, 0, 1, 5)), table_spare=draw(choice(0, 0, 2)), spare=draw(spare()),
        content=draw(SEEDS))


@made_once
def _ragged_rows(keys: st.SearchStrategy[int]) -> st.SearchStrategy[RaggedRow]:
    return st.builds(lambda n, offset, kind: RaggedRow(n, offset, *kind), keys, choice(*OFFSETS), look(KINDS))


@st.composite
def transform_index_ragged(draw, max_rows: int = 5) -> TransformRagged:
    """Offsets from 0 to the edge of int32."""
    topk = _topk(draw, 2048)
    rows = draw(st.lists(_ragged_rows(_keys(topk)), min_size=draw(batch_floor()), max_size=max_rows if topk <= 64 else 3))
    return TransformRagged(crowd(draw, rows) if topk <= 64 else tuple(rows), topk, draw(spare()))


@st.composite
def pad_topk_indices(draw, max_rows: int = 5) -> PadTopkIndices:
    """No padding, a little, and more than a block of rows."""
    topk = _topk(draw, 2048)
    rows = draw(st.lists(_index_rows(_keys(topk)), min_size=draw(batch_floor()),
                         max_size=max_rows if topk <= 64 else 3))
    padding = draw(choice(0, 1, 3, 17)) if topk <= 64 else draw(choice(0, 1))
    return PadTopkIndices(crowd(draw, rows) if topk <= 64 else tuple(rows), topk, padding, draw(spare()))


# -- selections ---------------------------------------------------------------------------------------------------------


@st.composite
def _shape(draw, most: int = 400) -> dict:
    """What the rows of a selection have in common: how many keys to take, the edges of their lengths, and which scores."""
    topk = draw(choice(4, 16, 1, 64, 3))
    if draw(many(8)):  # more ties than a kernel's buffers hold (SGLang #30512, #36807), and its own topk
        topk, kinds = draw(choice(2048, 64)), ("one_bin", "equal", "one_bin", "distinct")
        return dict(topk=topk, length=choice(4200, 2049, 4200, 7), scores=kinds, rows=2)
    length = either(lengths(*around(topk), most=most), st.integers(topk + 1, topk + 40), choice(-1, -4, 0, 1, topk))
    return dict(topk=topk, length=length, scores=SCORES, rows=3)


@st.composite
def _frame(draw, starts: bool = True) -> dict:
    """Everything but the rows; the width follows from them."""
    return dict(spare=draw(spare()), **(dict(starts=draw(st.booleans())) if starts else {}))


def _row(shape: dict, *offsets: int) -> st.SearchStrategy[Row]:
    """A row; `offsets` go with the seed."""
    return _rows_of(shape["length"], shape["scores"], offsets or (0,))


@made_once
def _rows_of(length: st.SearchStrategy[int], scores: tuple[str, ...], offsets: tuple[int, ...]) -> st.SearchStrategy[Row]:
    return st.builds(lambda n, start, kind: Row(n, start, *kind, offsets[kind[1] % len(offsets)]), length, STARTS, look(scores))


def _crowd(draw, shape: dict, rows: list[Row]) -> tuple[Row, ...]:
    """Many rows now and then, of few keys: the oracle sorts every row."""
    return crowd(draw, rows) if shape["rows"] > 2 and max((r.length for r in rows), default=0) <= 100 else tuple(rows)


def _wide(draw, case):
    """The case with as many columns of scores as its rows need, or more."""
    return replace(case, width=case.reach() + draw(choice(0, 1, 3, 130)))


def one_bin(keys: int) -> list:
    """The four selections from one row whose keys a radix selection cannot tell apart by the first byte; too long to be drawn.

    The seed is one with which the last of 65,537 keys is selected.
    """
    row, frame = Row(keys, scores="one_bin", seed=37), dict(topk=2048, width=keys)
    return [FastTopk((row,), **frame), FastTopkPaged((Request((row,)),), decode=True, **frame),
            FastTopkRagged((replace(row, offset=100),), **frame), TopkTransformV2((row,), **frame)]


@st.composite
def fast_topk(draw) -> FastTopk:
    """Fewer keys than the top-k, as many, more; negative lengths; every kind of score, with and without row starts."""
    shape = draw(_shape())
    rows = draw(st.lists(_row(shape), min_size=draw(batch_floor()), max_size=shape["rows"]))
    return _wide(draw, FastTopk(_crowd(draw, shape, rows), shape["topk"], **draw(_frame())))


@st.composite
def fast_topk_transform_paged(draw) -> FastTopkPaged:
    """Decode batches, ragged ones, and those in which a request has no row while there are as many rows as requests."""
    shape = draw(_shape())
    row, decode = _row(shape), draw(choice(True, False, False))
    counts = [1] * draw(st.integers(2, shape["rows"])) if decode else draw(st.lists(
        choice(1, 0, 2, 1), min_size=draw(batch_floor()), max_size=3))
    if not decode and draw(choice(False, False, True)):
        counts = draw(choice((0, 2), (2, 0), (0, 1, 2), (1, 2, 0), (2,)))
    if not decode and draw(many(10)):
        counts = [0] * 64 + list(counts)
    requests = tuple(Request(tuple(draw(st.lists(row, min_size=n, max_size=n)))) for n in counts)
    return _wide(draw, FastTopkPaged(requests, shape["topk"], decode=decode or draw(st.booleans()), content=draw(SEEDS),
                                     table_extra=draw(choice(0, 1, 0, 40)), **draw(_frame())))


@st.composite
def fast_topk_transform_ragged(draw) -> FastTopkRagged:
    """Offsets of their own for every row, from 0 to the edge of int32."""
    shape = draw(_shape())
    rows = draw(st.lists(_row(shape, *OFFSETS), min_size=draw(batch_floor()), max_size=shape["rows"]))
    return _wide(draw, FastTopkRagged(_crowd(draw, shape, rows), shape["topk"], **draw(_frame())))


@made_once
def _rows_from_0(length: st.SearchStrategy[int], scores: tuple[str, ...]) -> st.SearchStrategy[Row]:
    return st.builds(lambda n, kind: Row(max(n, 0), 0, *kind), length, look(scores))


@st.composite
def topk_transform_v2(draw) -> TopkTransformV2:
    """Page sizes from 1 to 128, with lengths around their multiples."""
    shape = draw(_shape())
    page_size = draw(choice(64, 1, 2, 16, 32, 128))
    if shape["rows"] > 2:
        shape["length"] = either(shape["length"], choice(*around(page_size, 2 * page_size)))
    rows = draw(st.lists(_rows_from_0(shape["length"], shape["scores"]), min_size=draw(batch_floor()), max_size=shape["rows"]))
    return _wide(draw, TopkTransformV2(_crowd(draw, shape, rows), shape["topk"], page_size=page_size, content=draw(SEEDS),
                                       pages_extra=draw(choice(0, 1, 0, 9)), **draw(_frame(starts=False))))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


@st.composite
def transform_index_page_table_decode_replay(draw, captured: TransformDecode) -> TransformDecode:
    """As many rows on a table of the same width, with other lengths."""
    row = _index_rows(st.integers(0, captured.width))
    rows = draw(st.lists(row, min_size=len(captured.rows), max_size=len(captured.rows)))
    return replace(captured, rows=tuple(rows), content=draw(SEEDS))


@st.composite
def _replayed_row(draw, captured) -> Row:
    """Any row that fits the captured width; idle ones among them."""
    start = draw(st.integers(0, min(captured.width, 9))) if captured.starts else 0
    length = draw(either(choice(0, 1, -2), st.integers(0, captured.width - start)))
    return Row(min(length, captured.width - start), start, draw(choice(*SCORES)), draw(SEEDS))


@st.composite
def fast_topk_replay(draw, captured: FastTopk) -> FastTopk:
    """As many rows over as many columns."""
    count = len(captured.rows)
    return replace(captured, rows=tuple(draw(st.lists(_replayed_row(captured), min_size=count, max_size=count))))


@st.composite
def fast_topk_transform_paged_replay(draw, captured: FastTopkPaged) -> FastTopkPaged:
    """As many rows of each request over as many columns."""
    requests = tuple(Request(tuple(draw(_replayed_row(captured)) for _ in r.rows)) for r in captured.requests)
    return replace(captured, requests=requests, content=draw(SEEDS))
