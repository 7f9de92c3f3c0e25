"""Cases of the indexer family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.indexer import (CpRoundRobinSplit, CpRoundRobinSplitQSeqs, CpRoundRobinSplitQSeqsCpu, CpRoundRobinSplitRows,
                             CpZigzagMetadata, CpZigzagSplit, IndexerKStartEnd, Req)
from strategies.common import around, batch_floor, choice, either, lengths, made_once, many, repeats, spare

CP_SIZES = (2, 3, 4, 8, 1)
EXTENDS = either(st.integers(0, 8), choice(15, 16, 17, 31, 32, 33, 127, 128, 129, 300), choice(0))
PREFIXES = either(choice(0), st.integers(1, 20), lengths(*around(2048), most=5000), lengths(*around(131072), most=2**20))
MOST_CUT = choice(4, 4, 4, 4, 4, 1)  # requests of a zigzag; upstream had one until #23269
SPLIT_BLOCK = 1024
REQUEST_BLOCK = 32  # batches longer than this cross a block of requests in our kernels


@made_once
def requests() -> st.SearchStrategy[Req]:
    """Prefixed, fresh (extend == seq) and idle (extend 0) requests."""
    return st.builds(lambda extend, prefix: Req(extend, extend + prefix), EXTENDS, PREFIXES)


@st.composite
def ranks(draw) -> dict[str, int]:
    """A context-parallel size and one of its ranks, the last one as often as the first."""
    size = draw(choice(*CP_SIZES))
    return {"cp_size": size, "cp_rank": draw(either(st.integers(0, size - 1), choice(size - 1)))}


def _batch(draw, element: st.SearchStrategy, most: int = 5) -> tuple:
    return tuple(draw(st.lists(element, min_size=min(draw(batch_floor()), most), max_size=most)))


def _long(draw, batch: tuple[Req, ...]) -> tuple[tuple[Req, ...], int]:
    """The batch, now and then so many times over that it crosses a block of requests, with few query tokens each: long
    batches of long requests take the interpreter many seconds."""
    if not draw(many(20)) or not batch:
        return batch, 1
    short = tuple(replace(r, extend_len=r.extend_len % 4, seq_len=r.seq_len % 997 + 4) for r in batch[:3])
    return short, -(-(REQUEST_BLOCK + 1) // len(short))


@st.composite
def indexer_k_start_end(draw) -> IndexerKStartEnd:
    """Every rank of 1, 2, 3, 4 and 8; fewer tokens than ranks; requests without tokens, on this rank or at all."""
    batch = _batch(draw, requests())
    if draw(many(20)) and batch:
        batch = (*batch[:-1], Req(1100, 1100 + batch[-1].seq_len))
    return IndexerKStartEnd(*_long(draw, batch), **draw(ranks()), spare=draw(spare()))


@st.composite
def cp_round_robin_split_q_seqs(draw) -> CpRoundRobinSplitQSeqs:
    """Zero counts anywhere, fewer tokens than ranks, batches longer than a block of 1,024 requests."""
    extends, times = _batch(draw, EXTENDS, 8), draw(repeats(33, 520, SPLIT_BLOCK + 1))
    extends = extends[:1] if times > SPLIT_BLOCK else extends
    short = tuple(n % 4 for n in extends[:2])
    return CpRoundRobinSplitQSeqs(extends if times == 1 else short, times, **draw(ranks()), spare=draw(spare()))


@st.composite
def cp_round_robin_split_q_seqs_cpu(draw) -> CpRoundRobinSplitQSeqsCpu:
    """The same batches, on the host."""
    return CpRoundRobinSplitQSeqsCpu(_batch(draw, EXTENDS, 8), **draw(ranks()))


def _token_counts() -> st.SearchStrategy[int]:
    return either(st.integers(0, 9), st.integers(2, 40), choice(15, 16, 17, 31, 32, 33, 63, 64, 65))


@st.composite
def cp_round_robin_split(draw) -> CpRoundRobinSplit:
    """Token counts that the ranks divide and that they do not, fewer tokens than ranks, none."""
    tokens = draw(choice(1024, 1025, 1537, 5000)) if draw(many(12)) else draw(_token_counts())
    return CpRoundRobinSplit(tokens, **draw(ranks()), spare=draw(spare()), content=draw(st.integers(0, 255)))


@st.composite
def cp_round_robin_split_rows(draw) -> CpRoundRobinSplitRows:
    """The same, with rows of a few values, and now and then of more than a block."""
    columns = draw(choice(511, 512, 513, 1100)) if draw(many(12)) else draw(st.integers(1, 17))
    tokens = draw(_token_counts()) if columns < 20 else draw(st.integers(0, 17))
    return CpRoundRobinSplitRows(tokens, **draw(ranks()), spare=draw(spare()), content=draw(st.integers(0, 255)),
                                 columns=columns)


@made_once
def _cuttable(cp_size: int) -> st.SearchStrategy[Req]:
    """Requests of lengths around multiples of the segments, and any others."""
    parts = 2 * cp_size
    extend = either(choice(*around(parts, 2 * parts, 3 * parts)), EXTENDS, st.integers(parts, 5 * parts))
    return st.builds(lambda extend, prefix: Req(extend, extend + prefix), extend, PREFIXES)


def _paddings() -> st.SearchStrategy[int]:
    return choice(0, 0, 1, 5)


@st.composite
def cp_zigzag_split(draw) -> CpZigzagSplit:
    """One request and several, with prefixes, shorter than their segments, and padding behind the last."""
    rank = draw(ranks())
    batch = _batch(draw, _cuttable(rank["cp_size"]), draw(MOST_CUT))
    if draw(many(20)) and batch:
        batch = (Req(2100, 2100 + batch[0].seq_len), *batch[1:])
    return CpZigzagSplit(*_long(draw, batch), draw(_paddings()), **rank, spare=draw(spare()))


@st.composite
def cp_zigzag_metadata(draw) -> CpZigzagMetadata:
    """The same batches, on the host."""
    rank = draw(ranks())
    return CpZigzagMetadata(_batch(draw, _cuttable(rank["cp_size"]), draw(MOST_CUT)), draw(_paddings()), **rank)
