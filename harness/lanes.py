"""The gate's lanes as test bodies: run a campaign, record its verdict, fail with the findings and nothing else."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from harness import casefile, registry, rendering, results
from harness.campaign import Campaign, OutsideCampaign, Outcome, Report, case_path
from harness.client import ROOT, shown_path
from harness.contract import Case, Kind
from harness.differential import Example, replay
from harness.findings import CheckOptions
from harness.misuse import attempt, misuses
from harness.verdicts import INFRA, NOT_PROVIDED, UNCHECKED, Row


class FoundWrong(pytest.fail.Exception):
    """A test's findings: their text for the terminal, and the findings themselves for the reports."""

    def __init__(self, found: list[results.Result]):
        super().__init__("\n\n".join(map(rendering.finding, found)), pytrace=False)
        self.results = found


SHORT = {"states": "cells", "inputs": "inputs", "redzones": "red zones", "interference": "interference", "memory": "memory"}


def inside(session, subject: str, transform: str, strategy, record_property) -> None:
    """Everything inside the contract; any finding fails."""
    row = _campaign(session, subject, transform, "inside", strategy, session.profile, record_property)
    if row and row.verdict == INFRA:
        pytest.fail(f"INFRA  {transform}: {row.notes[-1]}", pytrace=False)


def replays(session, subject: str, transform: str, strategy, record_property) -> None:
    """Several calls on the same buffers, a fifth of the budget: each example is several calls."""
    profile = replace(session.profile, counted=session.profile.counted // 5)
    _campaign(session, subject, transform, "replays", strategy, profile, record_property)


def serving(session, subject: str, transforms: list[str], strategy, record_property) -> None:
    """Sessions that mix several transforms on one set of buffers, a fifth of the budget; a subject needs all of them."""
    worker = session.worker(subject)
    missing = [t for t in transforms if not worker.describe[t]["provided"]]
    contract = registry.contracts()[transforms[0]]
    row = Row(subject, f"{contract.family} sessions", "inside", NOT_PROVIDED, checks=checks(contract, worker.tier))
    if missing:
        row.notes.append(f"a session needs {', '.join(missing)} as well")
        return _record(record_property, row)
    rules = {k: v for t in transforms for k, v in session.rules(subject, t).items()}
    profile = replace(session.profile, counted=session.profile.counted // 5)
    outcome = Campaign(contract, worker, rules, strategy, profile, lane="serving").run()
    _fill(row, outcome)
    _record(record_property, row)
    _fail(subject, row.transform, rules, outcome.reports)


def _campaign(session, subject: str, transform: str, lane: str, strategy, profile, record_property) -> Row | None:
    contract = registry.contracts()[transform]
    worker = session.worker(subject)
    row = Row(subject, transform, lane, NOT_PROVIDED, checks=checks(contract, worker.tier))
    if not worker.describe[transform]["provided"]:
        row.notes += [m for m in [worker.describe[transform]["missing"]] if m and lane == "inside"]
        _record(record_property, row)
        return None
    rules = session.rules(subject, transform)
    outcome = Campaign(contract, worker, rules, strategy, profile, lane=lane).run()
    _fill(row, outcome)
    if lane == "inside" and outcome.verdict == "PASS" and outcome.counted == 0:
        row.verdict = INFRA
        row.notes.append(f"no example was tried; the subject declined {outcome.unsupported}")
    elif lane == "inside" and outcome.verdict == "PASS" and outcome.unsupported and outcome.counted < profile.counted // 2:
        row.notes.append(f"few examples: {outcome.counted} of {profile.counted}; the subject declined {outcome.unsupported}")
    _record(record_property, row)
    _fail(subject, transform, rules, outcome.reports)
    return row


def outside(session, subject: str, transform: str, strategy, record_property) -> None:
    """Beyond the contract, a quarter of the budget: informative, but our own kernels must refuse or survive everything.

    `eager` is there to cross-check the oracles, which say nothing beyond a contract."""
    if subject == "eager":
        return
    contract = registry.contracts()[transform]
    worker = session.worker(subject)
    if not worker.describe[transform]["provided"]:
        _record(record_property, Row(subject, transform, "outside", NOT_PROVIDED))
        return
    if not worker.describe[transform]["selective"] and not any(p.broken for p in contract.preconditions):
        _record(record_property, Row(subject, transform, "outside", UNCHECKED))  # there is nothing outside to try
        return
    profile = replace(session.profile, counted=session.profile.counted // 4, shrink_seconds=15.0)
    rules = session.rules(subject, transform)
    outcome = OutsideCampaign(contract, worker, rules, strategy, profile, lane="outside").run()
    row = Row(subject, transform, "outside", UNCHECKED, seconds=outcome.seconds)
    row.notes = [f"UNCHECKED PRECONDITION ({r.found.buffer}): {r.found.sentence}; {shown_path(r.path)}"
                 for r in outcome.reports]
    _record(record_property, row)
    if subject == "kernels":
        _fail(subject, transform, rules, outcome.reports)
    for report in outcome.reports:
        record_property("finding", results.of(subject, transform, rules, report).dump())


def fixed(session, subject: str, example: Example) -> None:
    """One given example inside its contract."""
    rules = session.rules(subject, example.contract.name)
    _fail(subject, example.contract.name, rules, _found_on(session, subject, example, rules), shrunk=False)


def kept(session, subject: str, example: Example, record_property) -> None:
    """One example of the corpus; outside its contract it is informative, as in `outside`."""
    if not example.outside or subject == "kernels":
        return fixed(session, subject, example)
    rules = session.rules(subject, example.contract.name)
    for report in _found_on(session, subject, example, rules):
        record_property("finding", results.of(subject, example.contract.name, rules, report, shrunk=False).dump())
    return None


def _found_on(session, subject: str, example: Example, rules: Mapping[str, str]) -> list[Report]:
    """A subject that does not provide the transform, or declines the example, has nothing to show."""
    worker, contract = session.worker(subject), example.contract
    if not worker.describe[contract.name]["provided"]:
        return []
    if worker.describe[contract.name]["selective"] and any(worker.supports(contract.family, casefile.encode_calls(example))):
        return []
    worker.limits.hung = False
    reports = []
    for found in replay(example, worker, rules):
        content = casefile.document(example, rules, subject, worker.versions, found)
        reports.append(Report(found, example, casefile.write(case_path(ROOT / "failures", content), content)))
    return reports


def refusals(session, subject: str, case: Case) -> int:
    """Make every wrong call that the declaration suggests; each must be refused by name before a write. Returns how many."""
    tried = 0
    for misuse in misuses(case):
        answer = attempt(case, misuse, session.worker(subject))
        clear = answer.error in ("TypeError", "ValueError") and misuse.argument in answer.message
        if not clear or answer.wrote:
            pytest.fail(f"{case.contract.name}: {misuse.name} was not refused cleanly: {answer}", pytrace=False)
        tried += 1
    return tried


def checks(contract, tier: str) -> str:
    """What looks at an example, in the words of the verdict table."""
    if contract.kind is Kind.HOST:
        return "result, inputs"
    every = set(CheckOptions().checks) == set(SHORT)
    return f"all 5, {tier}" if every else ", ".join(SHORT[c] for c in CheckOptions().checks)


def _fill(row: Row, outcome: Outcome) -> None:
    row.counted, row.degenerate, row.unsupported = outcome.counted, outcome.degenerate, outcome.unsupported
    row.seconds, row.verdict = outcome.seconds, outcome.verdict
    row.notes += [f"also seen, not shrunk: {check} ({buffer})" for check, buffer in sorted(outcome.also)]


def _fail(subject: str, transform: str, rules: Mapping[str, str], reports: list[Report], shrunk: bool = True) -> None:
    """Fail with the findings, if there are any."""
    if reports:
        raise FoundWrong([results.of(subject, transform, rules, r, shrunk) for r in reports])


def _record(record_property, row: Row) -> None:
    record_property("verdict", row.dump())
