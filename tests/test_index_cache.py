"""The index_cache family: differential campaigns, far caches, long requests, wrong calls, and relations between transforms.

| group        | would catch                                                                                        |
| ------------ | -------------------------------------------------------------------------------------------------- |
| differential | scales and keys in the wrong place, one request's rows in another's, a pitch taken from the shape    |
| far          | page * bytes in 32 bits (SGLang #34725), in readers and writers                                      |
| long         | more than 65,535 tokens on a grid axis (#16043, re-landed in #19319)                                 |
| outside      | pages, slots and widths that a caller must not pass                                                 |
| relations    | an oracle that is consistently wrong                                                                |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import differential, floats, lanes, registry
from harness.differential import Example
from harness.layout import Layout, Place
from harness.states import Cells
from oracles import index_cache
from oracles.index_cache import (KINDS, LEAST_ABSMAX, NOPE, ROPE, TILE, TILES, DequantizeKCache, DequantizeKCachePaged,
                                 FusedStoreIndexCache, GetK, GetKAndS, GetS, Latent, QuantizeKCache, Req, SetKAndS, Slot, Token,
                                 half_step, nearest_scale, numbers, quantised)
from strategies import domain
from strategies.index_cache import get_k_and_s, quantize_k_cache, set_k_and_s

FAMILY = "index_cache"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


PAGES_FAR = (254_200, 254_201, 508_401)  # of 8,448 bytes: the last below 2^31 bytes, the first past it, the first past 2^32
FAR_CASES = [
    *(GetK(page_size=64, pages=600_000, seq_len=70, first_page=page) for page in PAGES_FAR),
    *(GetS(page_size=64, pages=600_000, seq_len=70, first_page=page) for page in PAGES_FAR),
    *(GetKAndS(page_size=64, pages=600_000, requests=(Req(70), Req(3)), first_page=page) for page in PAGES_FAR),
    *(DequantizeKCachePaged(slots=7_000_000, tokens=(Slot(slot), Slot(1))) for slot in (3_273_603, 3_273_604, 6_547_208)),
]
FAR_BY_PITCH = [
    SetKAndS(page_size=64, pages=4, tokens=(Token(255), Token(64), Token(130))),
    FusedStoreIndexCache(page_size=64, pages=4, tokens=(Token(255), Token(64), Token(130))),
    QuantizeKCache((Latent(), Latent(), Latent())),
    DequantizeKCache(3),
]


@pytest.mark.gate
@pytest.mark.parametrize("case", FAR_CASES, ids=repr)
def test_far(subject, case, session):
    """Caches of more than 4 GiB, whole in memory but for the pages that nobody reads."""
    lanes.fixed(session, subject, Example((case,)))


@pytest.mark.gate
@pytest.mark.parametrize("case", FAR_BY_PITCH, ids=lambda c: c.contract.name)
def test_far_rows(subject, case, session):
    """Rows so far apart that the last starts past element 2^31."""
    names = [a.name for a in case.contract.args if "far" in a.layouts]
    lanes.fixed(session, subject, Example((case,), Layout({n: Place("far") for n in names})))


@pytest.mark.gate
def test_a_launch_for_long_requests(subject, session):
    """A bound of more tokens than a grid has rows along y."""
    lanes.fixed(session, subject, Example((GetKAndS(page_size=64, requests=(Req(3), Req(130)), max_extra=131_072),)))


def test_more_tokens_than_a_grid_has_rows(session):
    """One row of scales for each of 65,600 tokens."""
    lanes.fixed(session, "kernels", Example((GetS(page_size=64, pages=9, seq_len=65_600),)))


WRONG_CALLS = [
    GetK(page_size=2, seq_len=5),
    GetS(page_size=2, seq_len=5),
    GetKAndS(page_size=2, requests=(Req(5), Req(3))),
    SetKAndS(page_size=2, tokens=(Token(3), Token(0))),
    FusedStoreIndexCache(page_size=2, tokens=(Token(3), Token(0))),
    QuantizeKCache((Latent(), Latent())),
    DequantizeKCache(2),
    DequantizeKCachePaged(tokens=(Slot(3), Slot(0))),
]


@pytest.mark.parametrize("case", WRONG_CALLS, ids=lambda c: c.contract.name)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 8


# -- worked by hand -----------------------------------------------------------------------------------------------------


def test_a_slot_lies_where_the_layout_of_a_page_says():
    """Page size 64: pages of 8,448 bytes; slot 70 is token 6 of page 1, its key at byte 768 and its scale at 8,192 + 24."""
    buf = Cells((2, 8448))
    index_cache.set_k_and_s(buf=buf, loc=[70], index_k=np.full((1, 128), 448.0), index_k_scale=[2.0], page_size=64, variant={})
    written = np.argwhere(buf.state == 1)
    assert written.tolist() == [[1, b] for b in (*range(768, 896), *range(8216, 8220))]
    assert set(buf.value[1, 768:896]) == {0x7E} and buf.value[1, 8216:8220].tolist() == [0, 0, 0, 0x40]


def test_a_latent_lies_where_the_layout_of_656_bytes_says():
    row = np.zeros((1, 656), np.int64)
    row[0, 128:130] = [0x38, 0xC0]  # the first numbers of tile 1: 1 and -2
    row[0, 516:520] = [0, 0, 0x40, 0x40]  # the scale of tile 1: 3
    row[0, 654:656] = [0x80, 0xBF]  # the last rotary number: -1
    out = Cells((1, 576))
    index_cache.dequantize_k_cache(quant_k_cache=row, k_cache=out, variant={})
    assert out.value[0, 575] == -1.0
    assert out.judges[1][0].tolist() == list(range(128, 256))
    assert out.judges[1][1].complaint(np.r_[3.0, -6.0, np.zeros(126)]) is None


def test_padded_tokens_leave_slot_0_to_nobody():
    case = SetKAndS(page_size=2, tokens=(Token(3),), padded=2)
    states = expected(case)["buf"].state
    assert set(states[0, :128].tolist()) == {2} and set(states[0, 256:260].tolist()) == {2}
    assert (states == 1).sum() == 132 and (states == 0).sum() == states.size - 264


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def expected(case) -> dict[str, Cells]:
    return differential.expect(case.contract, case.arguments(), case.contract.rules())


@given(get_k_and_s())
@settings(deadline=None, max_examples=50)
def test_keys_and_scales_together_are_keys_and_scales_apart(case):
    both, buf, first = expected(case), case.arguments()["buf"].view(), 0
    for i, r in enumerate(case.batch):
        call = dict(buf=buf, page_indices=case.row(i), seq_len=r.seq_len, page_size=case.page_size, variant={})
        keys, scales = Cells((r.seq_len, 128)), Cells((r.seq_len, 4))
        index_cache.get_k(k_out=keys, **call)
        index_cache.get_s(s_out=scales, **call)
        assert (both["k_out"].value[first : first + r.seq_len] == keys.value).all()
        assert (both["s_out"].value[first : first + r.seq_len] == scales.value).all()
        first += r.seq_len
    assert (both["k_out"].state[first:] == 0).all() and (both["s_out"].state[first:] == 0).all()


@given(get_k_and_s(), get_k_and_s())
@settings(deadline=None, max_examples=50)
def test_gathering_two_batches_at_once_is_gathering_each(a, b):
    """With common pages, the rows of the second batch follow those of the first."""
    a, b = (replace(c, shared=True, page_size=a.page_size, pages=9, content=a.content, spare=0) for c in (a, b))
    together = expected(replace(a, requests=a.batch + b.batch, repeat=1))
    for name in ("k_out", "s_out"):
        rows = np.concatenate([expected(c)[name].value for c in (a, b)])
        assert (together[name].value == rows).all()


@given(set_k_and_s())
@settings(deadline=None, max_examples=50)
def test_what_was_stored_is_what_is_gathered(case):
    case = replace(case, padded=0)
    buf = expected(case)["buf"].value
    for i, token in enumerate(case.stored):
        page, place = divmod(token.loc, case.page_size)
        call = dict(buf=buf, page_indices=[page], seq_len=place + 1, page_size=case.page_size, variant={})
        key, scale = Cells((place + 1, 128)), Cells((place + 1, 4))
        index_cache.get_k(k_out=key, **call)
        index_cache.get_s(s_out=scale, **call)
        stored = floats.encode(floats.decode(case.codes(i), "float8_e4m3fn"), "float8_e4m3fn")  # NaN has one code
        assert (key.value[place] == stored).all()
        assert index_cache.stored_scale(scale.value[place]) == case.scale(i)


def nearest(x: np.ndarray, scale: float) -> np.ndarray:
    """The obvious quantisation: codes, then the bytes of the scale."""
    scale = float(np.float32(scale))
    codes = floats.encode(np.clip(x / scale if scale else x, -448, 448), "float8_e4m3fn")
    return np.r_[codes, np.array([scale], "<f4").view(np.uint8)]


@given(quantize_k_cache())
@settings(deadline=None, max_examples=50)
def test_dequantised_quantised_latents_are_within_half_a_step(case):
    cells = expected(case)["quant_k_cache"]
    for i in range(len(case.all)):
        x, row = case.latent(i), np.zeros(656, np.int64)
        row[528:] = floats.encode(x[NOPE:], "bfloat16").astype("<u2").view(np.uint8)
        assert (row[528:] == cells.value[i, 528:]).all()
        for t in range(TILES):
            tile = x[t * TILE : (t + 1) * TILE]
            members, judge = cells.judges[i * TILES + t]
            row[members - i * 656] = nearest(tile, nearest_scale(tile))
            assert judge.complaint(row[members - i * 656]) is None
        out = Cells((1, 576))
        index_cache.dequantize_k_cache(quant_k_cache=row[None], k_cache=out, variant={})
        assert (out.value[0, NOPE:] == x[NOPE:]).all()
        for t, (members, judge) in enumerate(out.judges):
            tile, scale = x[t * TILE : (t + 1) * TILE], index_cache.stored_scale(row[NOPE + 4 * t : NOPE + 4 * t + 4])
            meant = floats.decode(row[t * TILE : (t + 1) * TILE].astype(np.uint8), "float8_e4m3fn") * scale
            sizes = np.abs(tile) / scale * 1.0001 if scale else np.zeros(TILE)
            assert (np.abs(meant - tile) <= half_step(sizes) * scale * 1.0001).all()
            assert judge.complaint(floats.rounded(meant, "bfloat16")) is None


@given(st.sampled_from(("random", "outlier", "edge", "ties")), st.integers(0, 255), st.integers(-20, 20))
def test_quantising_is_equivariant_by_powers_of_two(kind, seed, power):
    x = numbers(kind, seed, "x")
    stored = nearest(x, nearest_scale(x))
    scaled = np.r_[stored[:128], np.array([index_cache.stored_scale(stored[128:]) * 2.0**power], "<f4").view(np.uint8)]
    assert quantised(x).complaint(stored) is None
    assert quantised(x * 2.0**power).complaint(scaled) is None


@given(st.sampled_from(KINDS), st.integers(0, 255))
def test_both_kinds_of_scale_mean_the_same_key(kind, seed):
    x = numbers(kind, seed, "x")
    plain = nearest_scale(x, LEAST_ABSMAX)
    power = 2.0 ** np.ceil(np.log2(plain))
    assert quantised(x, LEAST_ABSMAX).complaint(nearest(x, plain)) is None
    assert quantised(x, LEAST_ABSMAX, "ue8m0").complaint(nearest(x, power)) is None
    other = quantised(x, LEAST_ABSMAX).complaint(nearest(x, power))
    assert (other is None) == (plain == power), "the bytes differ, unless the plain scale is a power of two"


@given(st.sampled_from(KINDS), st.integers(0, 255))
def test_numbers_to_quantise_are_bfloat16_and_finite(kind, seed):
    for x in (numbers(kind, seed, "x"), numbers("random", seed, "rope", ROPE)):
        assert (floats.rounded(x, "bfloat16") == x).all() and np.isfinite(x).all()
