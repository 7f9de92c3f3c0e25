"""Cases of the seqlens family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.seqlens import CalPaddedTokens, CuSeqlens, NsaCacheSeqlens, Req, SeqlensExpand
from strategies.common import around, batch_floor, choice, either, lengths, made_once, repeats, spare

EXTENDS = either(st.integers(0, 8), choice(15, 16, 17, 127, 128, 129, 130, 300))
SEQ = either(lengths(most=300), lengths(*around(131072, 2**20), most=2**20), choice(*around(65536, 131072)))


@made_once
def requests() -> st.SearchStrategy[Req]:
    """Prefixed (extend < seq), fresh (extend == seq), idle (extend 0), and padded requests (seq 1 or 0, extend = width)."""
    prefixed = st.builds(lambda extend, prefix: Req(extend, prefix + extend), EXTENDS, SEQ)
    fresh = EXTENDS.map(lambda n: Req(n, n))
    padded = st.builds(Req, st.integers(1, 8), choice(1, 1, 0))
    return either(prefixed, prefixed, fresh, padded)


@st.composite
def seqlens_expand(draw, max_requests: int = 5) -> SeqlensExpand:
    """Ragged batches, empty ones, and batches longer than a block of requests."""
    batch = draw(st.lists(requests(), min_size=draw(batch_floor()), max_size=max_requests))
    return SeqlensExpand(tuple(batch), repeat=draw(repeats(65)), extra=draw(choice(0, 1, 5)), spare=draw(spare()))


def _bounded(draw, element: st.SearchStrategy[int], most: int) -> tuple[int, ...]:
    return tuple(draw(st.lists(element, min_size=draw(batch_floor()), max_size=most)))


@st.composite
def cu_seqlens(draw, max_requests: int = 8) -> CuSeqlens:
    """Lengths up to a million, zeros among them; now and then more than one block of 1,024."""
    values = _bounded(draw, SEQ, max_requests)
    repeat = draw(repeats(342, 1025)) if sum(values) * 1025 < 2**31 else 1
    return CuSeqlens(values, repeat, draw(spare()))


@st.composite
def nsa_cache_seqlens(draw, max_requests: int = 8) -> NsaCacheSeqlens:
    """Lengths around the top-k, and negative ones; no padding, padding, and fewer padded rows than rows."""
    topk = draw(choice(2048, 64, 1, 0))
    values = _bounded(draw, either(*[lengths(*around(topk), most=2**20)] * 5, st.integers(-9, -1)), max_requests)
    return NsaCacheSeqlens(values, draw(repeats(342)), topk, draw(choice(0, 1, 4, 9, 1030)), draw(spare()))


@st.composite
def cal_padded_tokens(draw) -> CalPaddedTokens:
    """1 to 8 data-parallel ranks, idle ones among them, or one count for all; every combination of parallel sizes."""
    tokens = tuple(draw(st.lists(lengths(most=300), min_size=draw(choice(1, 2, 2, 2)), max_size=8)))
    ranks = draw(choice(None, 2, 4, 8)) if len(tokens) == 1 else None
    return CalPaddedTokens(
        tokens, draw(st.integers(0, (ranks or len(tokens)) - 1)), draw(choice(1, 2, 3, 4, 8)),
        draw(choice(1, 2, 3, 4, 8)), draw(st.booleans()), draw(st.booleans()), ranks,
    )


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


@st.composite
def seqlens_expand_replay(draw, captured: SeqlensExpand) -> SeqlensExpand:
    """As many query tokens, dealt to the requests in another order; other keys."""
    extends = draw(st.permutations([r.extend_len for r in captured.batch]))
    return replace(captured, repeat=1, requests=tuple(Req(n, draw(either(choice(1), lengths(most=300)))) for n in extends))


@st.composite
def cu_seqlens_replay(draw, captured: CuSeqlens) -> CuSeqlens:
    """As many lengths."""
    return replace(captured, repeat=1, lengths=tuple(draw(SEQ) for _ in captured.all))


@st.composite
def nsa_cache_seqlens_replay(draw, captured: NsaCacheSeqlens) -> NsaCacheSeqlens:
    """As many rows, and as many of padding."""
    around_topk = lengths(*around(captured.index_topk), most=2**20)
    return replace(captured, repeat=1, lengths=tuple(draw(around_topk) for _ in captured.all))
