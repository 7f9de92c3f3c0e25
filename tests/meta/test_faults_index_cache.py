"""Planted faults of the index_cache family, found by the ordinary campaign; what the strategies draw; the judges failing."""

import numpy as np
import pytest

from harness import floats, registry
from measure import BUDGET, drawn, found_and_blamed
from oracles.index_cache import KINDS, numbers, quantised, scale_only, to_bfloat16
from strategies import domain

CONTRACTS = registry.contracts()

FAULTS = [
    ("narrow_page_offset", "get_k", "memory", "buf read-outside"),
    ("narrow_scale_offset", "get_s", "memory", "buf read-outside"),
    ("scales_beside_keys", "get_s", "states", "s_out"),
    ("whole_pages", "get_k", "states", "k_out"),
    ("pages_in_order", "get_k", "states", "k_out"),
    ("first_request_only", "get_k_and_s", "states", "k_out"),
    ("padded_requests", "get_k_and_s", "states", "k_out"),
    ("sum_of_all_lanes", "get_k_and_s", "states", "k_out"),
    ("token_on_grid_y", "get_k_and_s", "memory", "grid"),
    ("page_past_the_width", "get_k_and_s", "memory", "page_indices read-outside"),
    ("table_pitch_from_shape", "get_k_and_s", "states", "k_out"),
    ("lost_write", "set_k_and_s", "states", "buf"),
    ("page_and_place_swapped", "set_k_and_s", "states", "buf"),
    ("scale_of_another", "set_k_and_s", "states", "buf"),
    ("narrow_store", "set_k_and_s", "memory", "buf write-outside"),
    ("whole_page_written", "set_k_and_s", "states", "buf"),
    ("tokens_of_the_payload", "set_k_and_s", "memory", "loc read-outside"),
    ("tokens_of_the_key", "fused_store_index_cache", "memory", "loc read-outside"),
    ("truncated_codes", "fused_store_index_cache", "states", "buf"),
    ("no_least_scale", "fused_store_index_cache", "states", "buf"),
    ("scale_rounded_down", "fused_store_index_cache", "states", "buf"),
    ("scale_format_ignored", "fused_store_index_cache", "states", "buf"),
    ("inverse_scale_stored", "fused_store_index_cache", "states", "buf"),
    ("fp32_scale_from_bf16", "fused_store_index_cache", "states", "buf"),
    ("zero_by_zero", "quantize_k_cache", "states", "quant_k_cache"),
    ("one_scale", "quantize_k_cache", "states", "quant_k_cache"),
    ("scales_reversed", "quantize_k_cache", "states", "quant_k_cache"),
    ("rope_quantised", "quantize_k_cache", "states", "quant_k_cache"),
    ("truncated_bfloat16", "dequantize_k_cache", "states", "k_cache"),
    ("first_scale_for_all", "dequantize_k_cache", "states", "k_cache"),
    ("slot_by_position", "dequantize_k_cache_paged", "states", "k_cache"),
    ("narrow_slot_offset", "dequantize_k_cache_paged", "memory", "quant_k_cache read-outside"),
    ("unique_slots", "dequantize_k_cache_paged", "states", "k_cache"),
]
MORE_REQUESTS = {"sum_of_all_lanes": 99, "pages_in_order": 99, "narrow_page_offset": 99, "narrow_scale_offset": 99}


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), [pytest.param(*row, id=row[0]) for row in FAULTS])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    worker = faulty("faults_index_cache.py", fault)
    found_and_blamed(worker, transform, check, buffer, tmp_path, MORE_REQUESTS.get(fault, 2))


# -- what the strategies draw -------------------------------------------------------------------------------------------


def of_layout(example) -> set[str]:
    places = example.layout.places.items()
    return {f"{n} {p.kind}" for n, p in places} | {"int64" for _, p in places if p.dtype == "int64"}


def of_cache(case) -> set[str]:
    far = case.pages * case.page_bytes() > 2**31
    return {f"page_size {case.page_size}", *(["past 2^31"] if far else []), *(["spare"] if case.spare else [])}


def of_get(example) -> set[str]:
    case = example.steps[0]
    pages, n = case.page_indices, case.seq_len
    tests = {
        "no token": n == 0, "several pages": len(pages) > 1, "a partial last page": n % case.page_size != 0,
        "whole pages": n > 0 and n % case.page_size == 0 and case.page_size > 1, "a page twice": len(set(pages)) < len(pages),
        "pages out of order": pages != sorted(pages), "page 0": 0 in pages, "the last page": case.pages - 1 in pages,
        "a page past 2^31": any(p * case.page_bytes() > 2**31 for p in pages), "more than a block": n > 128,
    }
    return of_layout(example) | of_cache(case) | {name for name, true in tests.items() if true}


GET = {"no token", "several pages", "a partial last page", "whole pages", "a page twice", "pages out of order", "page 0",
       "the last page", "a page past 2^31", "more than a block", "int64", "spare", "buf far", "buf pitched", "buf offset",
       *(f"page_size {p}" for p in (1, 2, 16, 64))}


@pytest.mark.parametrize("name", ["get_k", "get_s"])
def test_single_gathers_have_everything(name):
    assert sorted(GET - set(drawn(domain.of(CONTRACTS[name]), of_get, BUDGET, GET))) == []


def of_batch(example) -> set[str]:
    case = example.steps[0]
    lengths = [r.seq_len for r in case.batch]
    tests = {
        "no request": not lengths, "3 different lengths": len(set(lengths)) >= 3,
        "an idle request": 0 in lengths and any(lengths),
        "very short beside long": bool(lengths) and min(lengths) <= 2 and max(lengths) >= 100,
        "common pages": case.shared and len(lengths) > 1, "a block of requests": len(lengths) > 32,
        "65,600 tokens on the grid": case.max_extra > 65_535, "a wider table": case.width_extra > 0,
        "a full table": case.width_extra == 0 and any(n and n % case.page_size == 0 for n in lengths),
        "a page past 2^31": any(p * case.page_bytes() > 2**31 for i in range(len(lengths)) for p in case.row(i)),
    }
    return of_layout(example) | of_cache(case) | {name for name, true in tests.items() if true}


BATCH = {"no request", "3 different lengths", "an idle request", "very short beside long", "common pages",
         "a block of requests", "65,600 tokens on the grid", "a wider table", "a full table", "a page past 2^31", "int64",
         "spare", "buf far", "page_indices pitched", "page_indices far", "page_indices strided", "k_out far", "k_out pitched"}


def test_ragged_gathers_have_everything():
    assert sorted(BATCH - set(drawn(domain.of(CONTRACTS["get_k_and_s"]), of_batch, BUDGET, BATCH))) == []


def of_store(example) -> set[str]:
    case = example.steps[0]
    locs = [t.loc for t in case.stored]
    kinds = {f"kind {t.kind}" for t in case.tokens}
    tests = {
        "no token": not locs, "padded tokens": case.padded > 1, "slot 0 of a token": 0 in locs and not case.padded,
        "the last slot": case.pages * case.page_size - 1 in locs, "out of order": locs != sorted(locs),
        "two tokens in a page": case.page_size > 1 and len({n // case.page_size for n in locs}) < len(locs) - case.padded,
        "ue8m0": getattr(case, "ue8m0", False), "plain scale": not getattr(case, "ue8m0", True),
    }
    return of_layout(example) | of_cache(case) | kinds | {name for name, true in tests.items() if true}


STORE = {"no token", "padded tokens", "slot 0 of a token", "the last slot", "out of order", "two tokens in a page", "int64",
         "spare", "buf far", "buf pitched", "buf offset", *(f"page_size {p}" for p in (1, 2, 16, 64))}


@pytest.mark.parametrize(("name", "more"), [
    ("set_k_and_s", {"index_k strided", "index_k pitched", "index_k_scale strided"}),
    ("fused_store_index_cache", {"ue8m0", "plain scale", "key strided", *(f"kind {k}" for k in KINDS)}),
])
def test_stores_have_everything(name, more):
    assert sorted((STORE | more) - set(drawn(domain.of(CONTRACTS[name]), of_store, BUDGET, STORE | more))) == []


def test_latents_have_everything():
    def labels(example):
        case = example.steps[0]
        kinds = {f"tile {k}" for latent in case.latents for k in latent.tiles}
        return of_layout(example) | kinds | ({"more than a block"} if len(case.all) > 4 else set()) | (
            set() if case.all else {"no token"})

    wanted = {"more than a block", "no token", "cache_k far", "quant_k_cache far", "quant_k_cache pitched",
              *(f"tile {k}" for k in KINDS)}
    assert sorted(wanted - set(drawn(domain.of(CONTRACTS["quantize_k_cache"]), labels, BUDGET, wanted))) == []


def test_slots_have_everything():
    def labels(example):
        case = example.steps[0]
        slots = case.table
        tests = {
            "no token": not slots, "a slot twice": len(set(slots)) < len(slots), "out of order": slots != sorted(slots),
            "the last slot": case.slots - 1 in slots, "NaN codes": case.nan, "more than a block": len(slots) > 4,
            "a slot past 2^31": any(s * 656 > 2**31 for s in slots), "more tokens than slots": len(slots) > case.slots,
        }
        return of_layout(example) | {name for name, true in tests.items() if true}

    wanted = {"no token", "a slot twice", "out of order", "the last slot", "NaN codes", "more than a block", "a slot past 2^31",
              "more tokens than slots", "int64", "quant_k_cache far", "quant_k_cache pitched", "k_cache far"}
    assert sorted(wanted - set(drawn(domain.of(CONTRACTS["dequantize_k_cache_paged"]), labels, BUDGET, wanted))) == []


# -- the judges, failing ------------------------------------------------------------------------------------------------


def stored(x, scale):
    codes = floats.encode(np.clip(x / scale, -448, 448), "float8_e4m3fn")
    return np.r_[codes, np.array([scale], "<f4").view(np.uint8)]


X = numbers("edge", 3, "x")
SCALE = float(np.max(np.abs(X))) / 448


def changed(cell, value):
    right = stored(X, SCALE)
    right[cell] = value
    return right


BIG = int(np.argmax(np.abs(X)))
WRONG = {
    "the next code": changed(BIG, stored(X, SCALE)[BIG] - 1),
    "a code of NaN": changed(5, 0x7F),
    "the other sign": changed(BIG, stored(X, SCALE)[BIG] ^ 0x80),
    "a scale that is a little larger": stored(X, SCALE * (1 + 2.0**-19)),
    "the scale's bytes reversed": np.r_[stored(X, SCALE)[:128], stored(X, SCALE)[:127:-1]],
    "the scale in front": np.roll(stored(X, SCALE), 4),
    "a scale of NaN": changed([130, 131], [0xC0, 0x7F]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_judge_of_quantised_numbers_complains(wrong):
    assert quantised(X).complaint(stored(X, SCALE)) is None
    assert quantised(X).complaint(WRONG[wrong])


@pytest.mark.parametrize("factor", [0.5, 4.0, 1.5])
def test_the_judge_of_power_of_two_scales_complains(factor):
    power = 2.0 ** np.ceil(np.log2(SCALE))
    assert quantised(X, rule="ue8m0").complaint(stored(X, power)) is None
    assert "least power of two" in quantised(X, rule="ue8m0").complaint(stored(X, power * factor))


def test_the_judge_of_a_scale_alone_complains():
    scale = stored(X, SCALE)[128:]
    assert scale_only(X, "fp32").complaint(scale) is None
    assert scale_only(X, "fp32").complaint(scale + np.array([0, 0, 1, 0], np.uint8))


def test_the_judge_of_bfloat16_takes_the_nearest_and_both_of_a_tie_alone():
    judge = to_bfloat16(np.array([1.00390625, 1.005]))  # halfway between two numbers; nearer to the upper one
    assert judge.complaint(np.array([1.0, 1.0078125])) is None
    assert judge.complaint(np.array([1.0078125, 1.0078125])) is None
    assert judge.complaint(np.array([1.0, 1.0])) and judge.complaint(np.array([float("nan"), 1.0078125]))
