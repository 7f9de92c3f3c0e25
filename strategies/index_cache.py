"""Cases of the index_cache family."""

from dataclasses import fields, replace

from hypothesis import strategies as st

from oracles.index_cache import (KINDS, LATENT_BYTES, TOKEN_BYTES, DequantizeKCache, DequantizeKCachePaged,
                                 FusedStoreIndexCache, GetK, GetKAndS, GetS, Latent, QuantizeKCache, Req, SetKAndS, Slot, Token)
from strategies.common import around, batch_floor, choice, crowd, either, lengths, many, spare

PAGE_SIZES = (1, 64, 2, 16, 64, 32, 128)
PAGES = (4, 1, 3, 9)
FAR_BYTES = 5 << 30  # of a cache whose offsets pass 2^31, and 2^32 too
LONG = 65_600  # more tokens than a grid has rows in y and z
TOKEN_BLOCK, REQUEST_BLOCK, STORE_BLOCK = 128, 32, 16  # what our kernels take at a time


@st.composite
def _cache(draw, far: bool = True) -> dict:
    """Page size, number of pages, contents; now and then a cache of 5 GiB of which a few pages are live."""
    page_size = draw(choice(*PAGE_SIZES))
    pages = FAR_BYTES // (page_size * TOKEN_BYTES) if far and draw(many(7)) else draw(choice(*PAGES))
    return dict(page_size=page_size, pages=pages, content=draw(st.integers(0, 255)), spare=draw(spare()))


def _length(cache: dict, least: int = 0) -> st.SearchStrategy[int]:
    page = cache["page_size"]
    return lengths(*around(page, 2 * page, TOKEN_BLOCK), least=least, most=140)


@st.composite
def get_k(draw) -> GetK:
    """Mostly several pages, a partial last one, pages that come twice; also no token."""
    cache = draw(_cache())
    several = _length(cache, least=cache["page_size"] + 1)
    return GetK(**cache, seq_len=draw(either(several, several, several, _length(cache))))


@st.composite
def get_s(draw) -> GetS:
    """Likewise."""
    case = draw(get_k())
    return GetS(**{f.name: getattr(case, f.name) for f in fields(case)})


@st.composite
def get_k_and_s(draw, max_requests: int = 4) -> GetKAndS:
    """Ragged batches, idle requests, common prefixes, batches longer than a block; a launch made for 65,600 tokens."""
    cache, crowd = draw(_cache()), draw(many(10))
    length = st.integers(0, 3) if crowd else _length(cache)
    batch = draw(st.lists(length.map(Req), min_size=2 if crowd else draw(batch_floor()), max_size=max_requests))
    return GetKAndS(
        **cache, requests=tuple(batch), shared=not crowd and draw(choice(False, False, True)),
        repeat=-(-(REQUEST_BLOCK + 1) // len(batch)) if crowd else 1,
        max_extra=LONG if draw(many(12)) else draw(choice(0, 1, 63)),
        width_extra=draw(choice(0, 0, 1, 5)),
    )


@st.composite
def _stores(draw, kinds: st.SearchStrategy[str], max_tokens: int = 5) -> dict:
    """Distinct slots, at the start or at the end of the cache, and padded tokens, which all have slot 0. Now and then more
    tokens than a block.

    A cache to write in is far by its layout alone, as every cell of an output is laid out.
    """
    cache = draw(_cache(far=False))
    slots = cache["pages"] * cache["page_size"]
    last, padded = draw(st.booleans()), draw(choice(0, 0, 0, 2, 3))
    slot = either(st.integers(0, min(slots - 1, 5)), st.integers(0, min(slots - 1, 600)))
    if padded:  # then slot 0 is theirs
        slot = slot.filter(lambda loc: (slots - 1 - loc if last else loc) != 0) if slots > 1 else st.nothing()
    room = min(slots - bool(padded), max_tokens)
    tokens = draw(st.lists(st.builds(Token, slot, kinds), min_size=min(draw(batch_floor()), room), max_size=room,
                           unique_by=lambda t: t.loc))
    if tokens and slots > STORE_BLOCK + 2 and draw(many(8)):
        tokens = [replace(tokens[i % len(tokens)], loc=1 + i) for i in range(STORE_BLOCK + 1)]
    return dict(**cache, tokens=tuple(tokens), padded=padded, last=last)


@st.composite
def set_k_and_s(draw) -> SetKAndS:
    """Any key bytes, NaN among them."""
    return SetKAndS(**draw(_stores(choice("random"))))


@st.composite
def fused_store_index_cache(draw) -> FusedStoreIndexCache:
    """Every kind of key, with both kinds of scale."""
    return FusedStoreIndexCache(**draw(_stores(choice(*KINDS))), ue8m0=draw(st.booleans()))


@st.composite
def quantize_k_cache(draw) -> QuantizeKCache:
    """Every kind of tile, different ones in one token; batches longer than a block of tokens."""
    tiles = st.lists(choice(*KINDS), min_size=4, max_size=4).map(tuple)
    latents = draw(st.lists(st.builds(Latent, tiles), min_size=draw(batch_floor()), max_size=4))
    repeat = draw(choice(1, 3, 9)) if draw(many(8)) else 1
    return QuantizeKCache(tuple(latents), repeat, draw(st.integers(0, 255)), draw(spare()))


@st.composite
def dequantize_k_cache(draw) -> DequantizeKCache:
    """From no token to more than a block of them."""
    count = draw(choice(2, 0, 1, 3, 4, 5, 9, 17))
    return DequantizeKCache(count, draw(st.integers(0, 255)), draw(spare()), draw(choice(False, False, True)))


@st.composite
def dequantize_k_cache_paged(draw) -> DequantizeKCachePaged:
    """Slots in any order, some of them twice, at either end of the cache; now and then one of 5 GiB."""
    far = draw(many(7))
    slots = FAR_BYTES // LATENT_BYTES if far else draw(choice(8, 1, 70))
    slot = st.integers(0, min(slots - 1, 9)).map(Slot)
    tokens = draw(st.lists(slot, min_size=draw(batch_floor()), max_size=6))
    return DequantizeKCachePaged(
        content=draw(st.integers(0, 255)), spare=draw(spare()), nan=draw(choice(False, False, True)),
        tokens=crowd(draw, tokens), slots=slots, from_end=draw(choice(True, False, far)))
