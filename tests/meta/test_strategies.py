"""The strategies as a product: what they must be able to produce is produced within the gate's budget.

Each row names the bugs that survive where it is missing (SGLang, vLLM, TensorRT-LLM, FlashInfer issue numbers).
"""

import subprocess
import sys

import pytest

from harness import registry
from harness.client import ROOT
from harness.contract import Role, tensors_of
from measure import BUDGET, drawn
from strategies import domain, sessions

CONTRACTS = registry.contracts()


def of_metadata(example) -> set[str]:
    """What a metadata example has."""
    case = example.steps[0]
    batch = case.batch
    lengths = [r.seq_len for r in batch]
    slots = [r.slot for r in batch]
    kinds = {p.kind for p in example.layout.places.values()}
    has = {f"page_size {case.page_size}", f"backends {case.backends}", f"layouts {' '.join(sorted(kinds))}"}
    has |= {f"layout {k}" for k in kinds}
    tests = {
        "2 requests": len(batch) >= 2,
        "3 different lengths": len(set(lengths)) >= 3,
        "the last slot": case.slots - 1 in slots,
        "slot 0 of a real request": any(r.slot == 0 and r.seq_len > 1 for r in batch),
        "slots out of order": slots != sorted(slots),
        "a slot twice": len(set(slots)) < len(slots),
        "shared pages": case.shared and len(batch) >= 2,
        "pages not contiguous": not case.aligned and case.page_size > 1,
        "length 0": 0 in lengths,
        "very short beside very long": bool(lengths) and min(lengths) <= 3 and max(lengths) >= 1000,
        "a page boundary": any(n % case.page_size == 0 and n for n in lengths) and case.page_size > 1,
        "one past a page boundary": any(n % case.page_size == 1 for n in lengths) and case.page_size > 1,
        "at the top-k": case.index_topk in lengths, "past the top-k": any(n > case.index_topk for n in lengths),
        "no wide table": not case.wide, "spare capacity": case.spare > 0,
        "a full table row": case.table_extra == 0 and case.max_extra == 0,
        "offsets past 2^31": case.slots == 4096 and case.table_extra == 2**20 and any(s >= 2048 for s in slots),
        "more than a block of requests": len(batch) > 64,
        "empty batch": not batch,
        "int64 inputs": any(p.dtype == "int64" for p in example.layout.places.values()),
        "guarded on the left": any(p.guard == "left" for p in example.layout.places.values()),
        "shuffled programs": example.layout.order > 0,
    }
    return has | {name for name, true in tests.items() if true}


EVERY = {
    "2 requests", "3 different lengths", "the last slot", "slot 0 of a real request", "slots out of order", "a slot twice",
    "shared pages", "pages not contiguous", "length 0", "very short beside very long", "a page boundary",
    "one past a page boundary", "past the top-k", "no wide table", "spare capacity", "a full table row", "offsets past 2^31",
    "more than a block of requests", "empty batch", "int64 inputs", "guarded on the left", "shuffled programs",
    *(f"page_size {p}" for p in (1, 2, 16, 32, 64, 128)), *(f"backends {n}" for n in (1, 2, 3, 4)),
    *(f"layout {k}" for k in ("offset", "pitched", "strided", "expanded", "far")),
}


@pytest.mark.parametrize("name", ["decode_metadata", "target_verify_metadata", "draft_extend_metadata"])
def test_metadata_examples_have_everything(name):
    seen = drawn(domain.of(CONTRACTS[name]), of_metadata, BUDGET)
    assert sorted(EVERY - set(seen)) == []
    assert seen["2 requests"] > BUDGET * 0.7


def test_decode_shares_memory_where_upstream_does():
    seen = drawn(domain.of(CONTRACTS["decode_metadata"]), lambda e: {f"{a.split('[')[0]} on {b.split('[')[0]}" for a, b in
                                                                     e.layout.aliases}, BUDGET)
    assert set(seen) == {"cache_seqlens on seq_lens", "cache_seqlens on cache_seqlens"}


def test_verify_has_every_draft_width():
    seen = drawn(domain.of(CONTRACTS["target_verify_metadata"]), lambda e: {e.steps[0].draft_tokens}, BUDGET)
    assert {1, 2, 3, 4, 5, 8} <= set(seen)


def test_draft_extends_accept_nothing_something_and_everything():
    def labels(example):
        extends = [r.extend_len for r in example.steps[0].batch]
        return {
            *(["nothing"] if 0 in extends else []), *(["ragged"] if len(set(extends)) > 1 else []),
            *(["padded"] if any(r.seq_len == 1 < r.extend_len for r in example.steps[0].batch) else []),
            *(["static"] if example.steps[0].static else []), *(["no rows"] if extends and not sum(extends) else []),
            *(["no prefix"] if any(r.seq_len == r.extend_len > 0 for r in example.steps[0].batch) else []),
        }

    seen = drawn(domain.of(CONTRACTS["draft_extend_metadata"]), labels, BUDGET)
    assert set(seen) == {"nothing", "ragged", "padded", "static", "no rows", "no prefix"}


def test_sequence_lengths_have_every_edge():
    def labels(example):
        batch = example.steps[0].batch
        return {
            *(["prefix"] if any(r.extend_len < r.seq_len for r in batch) else []),
            *(["no prefix"] if any(r.extend_len == r.seq_len for r in batch) else []),
            *(["negative without clamp"] if any(r.extend_len > r.seq_len + 1 for r in batch) else []),
            *(["idle"] if any(r.extend_len == 0 for r in batch) else []),
            *(["past 65,536"] if any(r.seq_len > 65536 for r in batch) else []),
            *(["more than a block"] if len(batch) > 128 else []),
        }

    seen = drawn(domain.of(CONTRACTS["seqlens_expand"]), labels, BUDGET)
    assert set(seen) == {"prefix", "no prefix", "negative without clamp", "idle", "past 65,536", "more than a block"}


@pytest.mark.parametrize("name", ["decode_metadata", "target_verify_metadata", "draft_extend_metadata"])
def test_replays_shrink_grow_and_idle_on_buffers_of_one_size(name):
    def labels(example):
        totals = [sum(r.seq_len for r in step.batch) for step in example.steps]
        sizes = {tuple((n, t.shape) for n, t in tensors_of(step.arguments()).items()
                       if step.contract.arg(n).role is Role.OUT) for step in example.steps}
        assert len(sizes) == 1
        return {
            *(["shrinks"] if any(b < a for a, b in zip(totals, totals[1:])) else []),
            *(["grows"] if any(b > a for a, b in zip(totals, totals[1:])) else []),
            *(["idle"] if any(all(r.seq_len <= 1 for r in step.batch) for step in example.steps) else []),
        }

    seen = drawn(sessions.replays(CONTRACTS[name]), labels, 60)
    assert set(seen) == {"shrinks", "grows", "idle"}


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_every_breakable_precondition_is_broken(name):
    contract = CONTRACTS[name]
    breakable = {p.name for p in contract.preconditions if p.broken}
    assert set(drawn(domain.outside(contract), lambda e: {e.outside} - {""}, 100, breakable)) == breakable


DRAWS = """
import sys
{before}
from harness import registry
from harness.generation import each_distinct
from strategies import domain
seen = []
each_distinct(domain.of(registry.contracts()["mla_metadata"]), 120, lambda e: seen.append(repr(e)))
print(seen)
"""


def test_the_same_examples_whatever_else_the_process_has_loaded(tmp_path):
    """Hypothesis draws integers from the source of loaded modules; a gate may not."""
    (tmp_path / "numbers_of_mine.py").write_text("A = [" + ", ".join(str(i) for i in range(256)) + "]\n")
    before = f"sys.path.insert(0, {str(tmp_path)!r}); import numbers_of_mine, harness.gate"
    alone, beside = (subprocess.run([sys.executable, "-c", DRAWS.format(before=b)], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout for b in ("", before))
    assert alone == beside and alone.count("MlaMetadata") >= 120
