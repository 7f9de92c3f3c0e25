"""Planted faults of the mla_block_table family are found and blamed; what its strategies draw; what its kernels launch.

| planted after                                  | faults                                                              |
| ---------------------------------------------- | ------------------------------------------------------------------- |
| SGLang #26651 (seq_lens with or without extend) | keys_of_the_prefix, extend_of_the_sequence, verify_without_drafts  |
| #23757, #15469 (page units, contiguous slots)  | tokens_for_pages, contiguous_pages, last_page_dropped               |
| #24401 (stale tails), #32109 (the tail's rule) | tail_cleared, tail_kept, places_cleared, output_cleared             |
| #19016, #27320 (width of a row)                | sizes_of_the_longest_sequence, page_past_the_row                    |
| #20389 (32-bit offsets)                        | slot_in_32_bits                                                     |
| #26241 (index lists for nobody)                | template_built, lists_built                                         |
| vLLM #42135 (strides of a view)                | pitch_from_shape, pitch_of_the_view                                 |
| #12583, #17662 (wrong lengths)                 | prefixes_for_queries, starts_of_equal_extends                       |
"""

import pytest

from harness import layout as places
from harness import registry
from harness.client import Worker, WorkerOptions
from harness.differential import wire_arguments
from harness.layout import Layout
from measure import BUDGET, drawn, found_and_blamed
from oracles.mla_block_table import MlaMetadata, MlaMultiStepDraft, Req
from strategies import domain, sessions
from strategies.layouts import layouts

CONTRACTS = {n: c for n, c in registry.contracts().items() if c.family == "mla_block_table"}

FAULTS = [
    ("blocks_for_the_reader", "calc_padded_blocks", "returned", "result"),
    ("blocks_rounded_down", "calc_padded_blocks", "returned", "result"),
    ("sizes_of_the_longest_sequence", "mla_metadata_sizes", "returned", "result"),
    ("sizes_with_drafts_twice", "mla_metadata_sizes", "returned", "result"),
    ("starts_of_equal_extends", "mla_metadata", "states", "cu_seqlens_q"),
    ("keys_of_the_prefix", "mla_metadata", "states", "seq_lens_k"),
    ("no_first_start", "mla_metadata", "states", "cu_seqlens_q"),
    ("prefixes_for_queries", "mla_metadata", "states", "seq_lens_q"),
    ("tail_cleared", "mla_block_table", "states", "block_table"),
    ("tail_kept", "mla_block_table", "states", "block_table"),
    ("verify_without_drafts", "mla_block_table", "states", "block_table"),
    ("extend_of_the_sequence", "mla_block_table", "states", "block_table"),
    ("rows_for_slots", "mla_block_table", "states", "block_table"),
    ("tokens_for_pages", "mla_block_table", "states", "block_table"),
    ("contiguous_pages", "mla_block_table", "states", "block_table"),
    ("last_page_dropped", "mla_block_table", "states", "block_table"),
    ("pitch_from_shape", "mla_block_table", "memory", "block_table write-outside"),
    ("slot_in_32_bits", "mla_block_table", "memory", "req_to_token read-outside"),
    ("page_past_the_row", "mla_block_table", "memory", "block_table write-outside"),
    ("template_built", "mla_multi_step_draft", "states", "kv_indptr"),
    ("lists_built", "mla_multi_step_draft", "states", "kv_indices"),
    ("last_step_forgotten", "mla_multi_step_draft", "states", "block_table"),
    ("lengths_grow", "mla_multi_step_draft", "states", "seq_lens_k"),
    ("lengths_of_the_first_step_only", "mla_multi_step_draft", "states", "seq_lens_k"),
    ("viewed_where_divisible", "pad_draft_extend_query", "states", "padded_q"),
    ("pitch_of_the_view", "pad_draft_extend_query", "states", "padded_q"),
    ("places_cleared", "pad_draft_extend_query", "states", "padded_q"),
    ("dropped_tokens_copied", "pad_draft_extend_query", "states", "padded_q"),
    ("heads_of_one_block", "pad_draft_extend_query", "states", "padded_q"),
    ("pad_through_fp8", "pad_draft_extend_query", "states", "padded_q"),
    ("pad_through_float16", "pad_draft_extend_query", "states", "padded_q"),
    ("unpad_through_bfloat16", "unpad_draft_extend_output", "states", "output"),
    ("mask_through_fp8", "pad_sequence_with_mask", "states", "output"),
    ("packed_without_gaps", "unpad_draft_extend_output", "states", "output"),
    ("last_token_dropped", "unpad_draft_extend_output", "states", "output"),
    ("output_cleared", "unpad_draft_extend_output", "states", "output"),
    ("padding_kept", "pad_sequence_with_mask", "states", "output"),
    ("mask_one_too_many", "pad_sequence_with_mask", "states", "attn_mask"),
    ("long_sequences_spill", "pad_sequence_with_mask", "states", "output"),
]


@pytest.mark.parametrize(("fault", "transform", "check", "buffer"), [pytest.param(*row, id=row[0]) for row in FAULTS])
def test_found_and_blamed(fault, transform, check, buffer, faulty, tmp_path):
    found_and_blamed(faulty("faults_mla_block_table.py", fault), transform, check, buffer, tmp_path)


# -- what the kernels launch --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker():
    kernels = Worker(WorkerOptions("kernels"), list(registry.contracts().values()))
    yield kernels
    kernels.close()


def cost(worker, case) -> tuple[int, list[str]]:
    """Launches and torch operations of one call."""
    placed = places.place(case.contract, case.arguments(), Layout(), seed=0, run=0)
    memory, blobs = placed.request()
    header = {"family": case.contract.family, "transform": case.contract.name, "order": 0, "rules": [], "count": True,
              "steps": [{"memory": memory, "arguments": wire_arguments(case.arguments())}]}
    reply, _ = worker.run(header, blobs)
    assert not reply["steps"][0]["raised"], reply["steps"][0]["raised"]
    spent = reply["steps"][0]["cost"]
    return spent["launches"], spent["operations"]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_all_draft_steps_cost_one_launch_and_no_index_list(steps, template, worker):
    case = MlaMultiStepDraft((Req(1, 65), Req(0, 130), Req(2, 1)), steps=steps, template=template, fresh=True, padded=True)
    assert cost(worker, case) == (1, [])


# -- what the strategies draw -------------------------------------------------------------------------------------------


def _places(example) -> set[str]:
    kinds = {f"layout {p.kind}" for p in example.layout.places.values()}
    dtypes = {f"dtype {p.dtype}" for p in example.layout.places.values() if p.dtype}
    return kinds | dtypes


def _chosen(tests: dict[str, bool]) -> set[str]:
    return {name for name, true in tests.items() if true}


def of_block_tables(example) -> set[str]:
    case = example.steps[0]
    seqs, slots = [r.seq_len for r in case.batch], [r.slot for r in case.batch]
    keys = [case.keys(i) for i in range(len(case.batch))]
    pages = [case.pages(i) for i in range(len(case.batch))]
    return _places(example) | {f"page_size {case.page_size}"} | _chosen({
        "2 requests": len(seqs) >= 2, "3 different lengths": len(set(seqs)) >= 3, "length 0": 0 in seqs,
        "empty batch": not seqs, "new": case.fresh, "captured": not case.fresh, "padded width": case.padded,
        "a full row": bool(pages) and max(pages) == case.max_blocks() > 0, "columns to spare": case.extra > 0,
        "several writer units": any(n > 4096 for n in keys), "4096 exactly": 4096 in keys,
        "very short beside very long": bool(seqs) and min(seqs) <= 3 and max(seqs) >= 1000,
        "a page boundary": any(n and n % case.page_size == 0 for n in keys) and case.page_size > 1,
        "one past a page boundary": any(n % case.page_size == 1 for n in keys) and case.page_size > 1,
        "slots out of order": slots != sorted(slots), "a slot twice": len(set(slots)) < len(slots),
        "pages not contiguous": not case.aligned and case.page_size > 1, "shared pages": case.shared and len(seqs) > 1,
        "offsets past 2^31": case.slots == 4096 and case.table_extra == 2**20 and any(s >= 2048 for s in slots),
        "spare capacity": case.spare > 0,
    })


TABLES = {
    "2 requests", "3 different lengths", "length 0", "empty batch", "new", "captured", "padded width", "a full row",
    "columns to spare", "4096 exactly", "very short beside very long", "a page boundary", "one past a page boundary",
    "slots out of order", "a slot twice", "pages not contiguous", "shared pages", "offsets past 2^31", "spare capacity",
    *(f"page_size {p}" for p in (1, 2, 16, 32, 64, 128)), "dtype int64",
    *(f"layout {k}" for k in ("offset", "pitched", "strided", "expanded", "far")),
}


def test_block_tables_have_every_mode_and_edge():
    def labels(example):
        case = example.steps[0]
        extends = [r.extend_len for r in case.batch]
        return of_block_tables(example) | {case.mode, f"draft tokens {case.draft_tokens}"} | _chosen({
            "ragged": case.ragged and len(set(extends)) > 1,
            "captured draft extend": case.mode == "draft_extend" and not case.ragged,
            "keys past the longest sequence": case.ragged and bool(extends) and max(
                case.keys(i) for i in range(len(extends))) > max(r.seq_len for r in case.batch),
            "padded request": any(r.seq_len == 1 < r.extend_len for r in case.batch),
            "more than 64 requests": len(case.batch) > 64,
        })

    seen = drawn(domain.of(CONTRACTS["mla_block_table"]), labels, BUDGET)
    wanted = TABLES | {"decode", "target_verify", "draft_extend", "ragged", "captured draft extend", "padded request",
                       "keys past the longest sequence", "more than 64 requests", "several writer units",
                       *(f"draft tokens {d}" for d in range(1, 9))}
    assert sorted(wanted - set(seen)) == []
    assert seen["2 requests"] > BUDGET * 0.7


def test_draft_steps_have_every_count_and_edge():
    def labels(example):
        case = example.steps[0]
        return of_block_tables(example) | {f"steps {case.steps}"} | _chosen({
            "template buffers": case.template, "no template buffers": not case.template, "idle at position 0": case.idle > 0,
        })

    seen = drawn(domain.of(CONTRACTS["mla_multi_step_draft"]), labels, BUDGET)
    wanted = TABLES | {"template buffers", "no template buffers", "idle at position 0",
                       *(f"steps {s}" for s in (2, 3, 4, 5, 8))}
    assert sorted(wanted - set(seen)) == []


def test_lengths_have_every_mode_and_edge():
    def labels(example):
        case = example.steps[0]
        return _places(example) | {case.mode} | _chosen({
            "ragged": case.ragged, "captured draft extend": case.mode == "draft_extend" and not case.ragged,
            "idle request": any(r.extend_len == 0 for r in case.batch), "no prefix": any(
                r.extend_len == r.seq_len > 0 for r in case.batch),
            "padded request": any(r.seq_len == 1 < r.extend_len for r in case.batch),
            "more than a block": len(case.batch) > 1024,
        })

    seen = drawn(domain.of(CONTRACTS["mla_metadata"]), labels, BUDGET)
    assert {"decode", "target_verify", "draft_extend", "extend", "ragged", "captured draft extend", "idle request", "no prefix",
            "padded request", "more than a block", "dtype int64", "layout strided", "layout expanded"} <= set(seen)


def test_query_lengths_may_be_written_where_they_are_read():
    case = MlaMetadata((Req(0, 10, 1), Req(0, 7, 3)), mode="draft_extend", ragged=True)
    seen = drawn(layouts(case), lambda layout: {layout.aliases}, BUDGET)
    assert set(seen) == {(), (("seq_lens_q", "extend_seq_lens"),)}


@pytest.mark.parametrize("name", ["pad_draft_extend_query", "unpad_draft_extend_output", "pad_sequence_with_mask"])
def test_packed_rows_have_every_shape_and_dtype(name):
    padded = {"pad_draft_extend_query": "padded_q", "unpad_draft_extend_output": "raw_out"}.get(name, "output")

    def labels(example):
        case = example.steps[0]
        counts = [r.count for r in case.requests]
        places = example.layout.places
        return _places(example) | _chosen({
            "idle request": 0 in counts, "empty batch": not counts, "ragged": len(set(counts)) > 1,
            "unequal with an even sum": len(set(counts)) > 1 and case.starts()[-1] % len(counts) == 0,
            "dropped tokens": any(r.dropped for r in case.requests), "places to spare": case.extra > 0,
            "corner of a buffer": padded in places and places[padded].kind == "pitched" and len(set(counts)) > 1,
            "more than 64 heads or numbers": max(case.heads, case.head_dim) > 64,
            "past 8 tokens": bool(counts) and max(counts) > 8,
        })

    seen = drawn(domain.of(CONTRACTS[name]), labels, BUDGET)
    assert {"idle request", "empty batch", "ragged", "unequal with an even sum", "dropped tokens", "places to spare",
            "corner of a buffer", "more than 64 heads or numbers", "past 8 tokens", "layout far", "layout strided",
            "dtype float16", "dtype float8_e4m3fn", "dtype float32", "dtype int64"} <= set(seen)


def test_the_float_tensors_of_a_copy_have_one_dtype():
    def labels(example):
        places, args = example.layout.places, CONTRACTS["pad_draft_extend_query"].args
        chosen = [places[a.name].dtype if a.name in places else None for a in args if a.dtypes[0] == "bfloat16"]
        assert chosen[0] == chosen[1], example
        return {chosen[0]}

    assert len(drawn(domain.of(CONTRACTS["pad_draft_extend_query"]), labels, BUDGET)) == 4


def test_host_sizes_have_rows_past_the_longest_sequence():
    def labels(example):
        case = example.steps[0]
        widest = max([r.extend_len for r in case.requests], default=0)
        longest = max([r.seq_len for r in case.requests], default=0)
        return {case.mode, f"graph {case.graph}"} | _chosen({
            "past": any(r.seq_len - r.extend_len + widest > longest for r in case.requests) and case.mode == "draft_extend",
            "a context of whole units": (longest + case.context_extra) % 4096 == 0 and case.graph,
        })

    seen = drawn(domain.of(CONTRACTS["mla_metadata_sizes"]), labels, BUDGET)
    assert set(seen) == {"decode", "target_verify", "draft_extend", "extend", "graph True", "graph False", "past",
                         "a context of whole units"}


def test_replayed_tables_shrink_grow_and_idle_on_buffers_of_one_size():
    def labels(example):
        totals = [sum(r.seq_len for r in step.batch) for step in example.steps]
        sizes = {(step.max_blocks(), len(step.batch), step.spare, step.fresh) for step in example.steps}
        assert len(sizes) == 1
        return _chosen({
            "shrinks": any(b < a for a, b in zip(totals, totals[1:])), "grows": any(b > a for a, b in zip(totals, totals[1:])),
            "idle": any(all(r.seq_len <= 1 for r in step.batch) for step in example.steps),
            "a row ends earlier": any(b.pages(0) < a.pages(0) and not b.fresh
                                      for a, b in zip(example.steps, example.steps[1:])),
        })

    for name in ("mla_block_table", "mla_multi_step_draft"):
        assert set(drawn(sessions.replays(CONTRACTS[name]), labels, 60)) == {"shrinks", "grows", "idle", "a row ends earlier"}
