"""What the tests of the suite itself share: how often a strategy draws a feature, and hunting a planted fault."""

from collections import Counter

from hypothesis import Phase, event, given, settings

from harness import casefile, registry
from harness.campaign import PROFILES, Campaign, Outcome, Profile
from strategies import domain

BUDGET = PROFILES["gate"].counted
PLANTED = Profile("planted", BUDGET, derandomize=True, later_seconds=0.5)


def drawn(strategy, labels, budget: int) -> Counter:
    """How often each label comes up in a gate's worth of examples."""
    seen: Counter = Counter()

    @settings(max_examples=budget, phases=[Phase.generate], database=None, derandomize=True, deadline=None)
    @given(strategy)
    def draw(example) -> None:
        for label in labels(example):
            event(label)
            seen[label] += 1

    draw()
    return seen


def hunt(worker, transform: str, folder) -> Outcome:
    """The ordinary campaign with the ordinary strategies, on a worker that holds a fault."""
    contract = registry.contracts()[transform]
    return Campaign(contract, worker, contract.rules(), domain.of(contract), PLANTED, folder=folder).run()


def found_and_blamed(worker, transform: str, check: str, buffer: str, folder, most_requests: int = 2) -> None:
    """The fault is found, blamed on the right tensor, shrunk to a few requests, and saved as a case that loads again."""
    outcome = hunt(worker, transform, folder)
    kinds = {r.found.kind: r for r in outcome.reports}
    assert (check, buffer) in kinds, (list(kinds), outcome.also)
    report = kinds[check, buffer]
    assert max(case.batch_size() for case in report.example.steps) <= most_requests, report.example
    assert casefile.read(report.path).example == report.example
