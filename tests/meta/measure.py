"""What the tests of the suite itself share: how often a strategy draws a feature, and hunting a planted fault."""

import math
import os
from collections import Counter

import pytest
from hypothesis import event

from harness import casefile, registry
from harness.campaign import PROFILES, Campaign, Outcome, Profile
from harness.contract import Case, Contract, Kind, base_name, tensors_of
from harness.differential import Example, expect
from harness.differential import check as differential_check
from harness.generation import Enough, each_distinct
from harness.states import State
from harness.tensors import Input, Region
from strategies import domain, sessions

BUDGET = PROFILES["gate"].counted
PLANTED = Profile("planted", BUDGET, derandomize=True, later_seconds=0.5)


def needs(there, what: str) -> None:
    """Skip aloud, or fail where nothing may be skipped: only tools that a plain user has no use for (a browser, a linter, a
    plotter, Ray, Redis) may be missing at all, and `.ci/run` has them all."""
    if not there:
        pytest.fail(f"needs {what}") if os.environ.get("PLUMBLINE_NO_SKIPS") else pytest.skip(f"needs {what}")


def drawn(strategy, labels, budget: int, wanted=None) -> Counter:
    """How often each label comes up in a gate's worth of examples: distinct ones, as a campaign counts them. It ends early
    where every label in `wanted` has come up."""
    seen: Counter = Counter()

    def visit(example) -> None:
        for label in labels(example):
            event(label)
            seen[label] += 1
        if wanted is not None and set(wanted) <= set(seen):
            raise Enough

    each_distinct(strategy, budget, visit)
    return seen


def hunt(worker, transform: str, folder) -> Outcome:
    """The ordinary campaign with the ordinary strategies, on a worker that holds a fault."""
    contract = registry.contracts()[transform]
    return Campaign(contract, worker, contract.rules(), domain.of(contract), PLANTED, folder=folder).run()


def found_and_blamed(worker, transform: str, check: str, buffer: str, folder, most_requests: int = 2) -> None:
    """The fault is found in a gate's worth of examples, and blamed on the right tensor. With PLUMBLINE_PROFILE=nightly it is
    also shrunk, as `shrunk_and_saved` says; for every fault that takes most of an hour on two cores."""
    if os.environ.get("PLUMBLINE_PROFILE") == "nightly":
        return shrunk_and_saved(worker, transform, check, buffer, folder, most_requests)
    contract = registry.contracts()[transform]

    def kinds(example) -> set[tuple[str, str]]:
        return {f.kind for f in differential_check(example, worker, contract.rules())}

    found = drawn(domain.of(contract), kinds, BUDGET, {(check, buffer)})
    assert (check, buffer) in found, found
    return None


def shrunk_and_saved(worker, transform: str, check: str, buffer: str, folder, most_requests: int = 2) -> None:
    """The fault is found, blamed on the right tensor, shrunk to a few requests, and saved as a case that loads again."""
    outcome = hunt(worker, transform, folder)
    kinds = {r.found.kind: r for r in outcome.reports}
    assert (check, buffer) in kinds, (list(kinds), outcome.also)
    report = kinds[check, buffer]
    assert max(case.batch_size() for case in report.example.steps) <= most_requests, report.example
    assert casefile.read(report.path).example == report.example


def found_by_replays(worker, transform: str, buffer: str, once: Case) -> None:
    """Sessions find the fault at a second or later call on the same buffers; one call, `once`, is right."""
    contract = registry.contracts()[transform]
    assert differential_check(Example((once,)), worker, contract.rules()) == []

    def later(example) -> set[tuple[str, str]]:
        return {f.kind for f in differential_check(example, worker, contract.rules()) if f.step}

    assert ("states", buffer) in drawn(sessions.replays(contract), later, BUDGET // 5, {("states", buffer)})


CELLS = ("live", "slack", "forbidden", "written", "judged", "untouched", "don't care")
_STATES = {State.WRITTEN: "written", State.JUDGED: "judged", State.UNTOUCHED: "untouched", State.DONT_CARE: "don't care"}


class CellsSeen:
    """What the cells of every argument are, over the cases shown to it: the text that `Arg.cells` must have."""

    def __init__(self, contract: Contract):
        self._contract, self._seen = contract, {a.name: set() for a in contract.args}

    def visit(self, case) -> None:
        arguments = case.arguments()
        for name, tensor in tensors_of(arguments).items():
            if isinstance(tensor, Input):
                spans = [s for s in tensor.spans if s.stop > s.start]
                self._seen[base_name(name)] |= {s.region.name.lower() for s in spans}
                if sum(s.stop - s.start for s in spans) < math.prod(tensor.shape):
                    self._seen[base_name(name)].add(Region.FORBIDDEN.name.lower())
        if self._contract.kind is not Kind.HOST:
            for name, cells in expect(self._contract, arguments, self._contract.rules()).items():
                self._seen[base_name(name)] |= {_STATES[State(s)] for s in set(cells.state.reshape(-1).tolist())}

    def text(self) -> dict[str, str]:
        return {name: ", ".join(c for c in CELLS if c in labels) for name, labels in self._seen.items()}
