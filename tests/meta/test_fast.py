"""What makes the interpreter fast changes nothing: the same bytes and the same findings as the stock form, over drawn examples
of every transform and over the planted faults; and the few things that it must not remember.

    PLUMBLINE_PROFILE=nightly pytest tests/meta/test_fast.py      more examples of each
"""

import importlib
import os
from pathlib import Path

import pytest

from harness import differential, registry
from harness.client import Fault, StandIn, UsageError, Worker, WorkerOptions
from harness.contract import Kind
from harness.generation import each_distinct
from strategies import domain

HERE = Path(__file__).parent
LONG = os.environ.get("PLUMBLINE_PROFILE") == "nightly"
FAMILIES = sorted({c.family for c in registry.contracts().values()})
FILES = sorted(p.stem for p in HERE.glob("faults_*.py"))
OWN_FAULTS = [("off_by_one", "seqlens_expand"), ("read_past_row", "decode_metadata"), ("race", "cu_seqlens"),
              ("write_past_end", "cu_seqlens"), ("uninitialised", "cu_seqlens"), ("empty_grid", "cu_seqlens"),
              ("raises", "cu_seqlens"), ("write_outside_unchanged", "cu_seqlens"), ("jump", "cu_seqlens")]


class Listening:
    """A worker whose answers are kept."""

    def __init__(self, worker):
        self._worker, self.heard = worker, []
        self.options, self.describe, self.versions = worker.options, worker.describe, worker.versions

    def run(self, header, blobs):
        reply, data = self._worker.run(header, blobs)
        heard = reply if isinstance(reply, Fault) else [{k: v for k, v in s.items() if k != "seconds"} for s in reply["steps"]]
        self.heard.append((heard, [bytes(d) for d in data]))
        return reply, data


@pytest.fixture(scope="module")
def workers():
    """The fast worker and the stock one."""
    every = list(registry.contracts().values())
    started = [Worker(WorkerOptions("kernels", interpreter=form), every) for form in ("fast", "stock")]
    yield started
    for worker in started:
        worker.close()


def holding(workers, subject: str, families: tuple[str, ...] = ()) -> list[Worker]:
    for worker in workers:
        worker.hold(subject, (str(HERE),), families)
    return workers


def faulty(workers, file: str, fault: str) -> list[StandIn]:
    """Both workers with a planted fault in every contract's place."""
    return [StandIn(w, fault) for w in holding(workers, str(HERE / file))]


def same(workers, transform: str, examples: int) -> int:
    """Every answer of both workers on so many examples is the same; returns how many answers held a memory finding."""
    contract = registry.contracts()[transform]
    seen = []

    def visit(example):
        pair = [Listening(w) for w in workers]
        found = [differential.check(example, w, contract.rules()) for w in pair]
        assert pair[0].heard == pair[1].heard, example
        assert found[0] == found[1], example
        seen.extend(step for steps, _ in pair[0].heard if not isinstance(steps, Fault) for step in steps
                    if step["findings"])

    each_distinct(domain.of(contract), examples, visit)
    return len(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_leave_the_same_bytes(family, workers):
    holding(workers, "kernels", (family,))
    for contract in registry.contracts().values():
        if contract.family == family and contract.kind is not Kind.HOST:
            same(workers, contract.name, 60 if LONG else 2)


def test_planted_faults_are_seen_alike(workers):
    found = {fault for fault, transform in OWN_FAULTS
             if same(faulty(workers, "planted.py", fault), transform, 40 if LONG else 4)}
    assert found >= {"read_past_row", "race", "write_past_end", "uninitialised", "jump"}


@pytest.mark.parametrize("file", FILES)
def test_faults_of_a_family_are_seen_alike(file, workers):
    module = importlib.import_module(f"test_{file}")
    rows = next(getattr(module, name) for name in ("FAULTS", "FOUND", "FOUND_BY_SEARCH") if hasattr(module, name))
    for fault, transform, *_ in rows if LONG else rows[-1:]:
        same(faulty(workers, f"{file}.py", fault), transform, 20 if LONG else 1)


@pytest.mark.parametrize("trap", ["alike", "sums"])
def test_calls_that_look_alike_are_told_apart_and_sums_wrap_alike(trap, workers):
    same(faulty(workers, "fast_traps.py", trap), "cu_seqlens", 12)


def test_a_difference_between_the_two_forms_is_seen(workers):
    with pytest.raises((AssertionError, ExceptionGroup)) as caught:  # Hypothesis groups the failures of several examples
        same(faulty(workers, "fast_traps.py", "different"), "cu_seqlens", 2)
    failures = getattr(caught.value, "exceptions", [caught.value])
    assert all(type(f) is AssertionError for f in failures), failures


def test_an_unknown_form_is_an_error_of_use():
    with pytest.raises(UsageError, match="PLUMBLINE_INTERPRETER=slow: known are fast, stock"):
        WorkerOptions(interpreter="slow")
