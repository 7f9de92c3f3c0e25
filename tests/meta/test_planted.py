"""Planted faults, found by the ordinary campaign with the ordinary strategies, and blamed on the right tensor."""

from dataclasses import replace

import pytest

from harness import lanes, registry
from harness.campaign import PROFILES, Campaign
from harness.differential import Example, check
from harness.verdicts import Row
from measure import shrunk_and_saved
from oracles.metadata import Decode, Req
from oracles.seqlens import CuSeqlens
from strategies import domain, sessions

FOUND_BY_SEARCH = [
    ("off_by_one", "seqlens_expand", "states", "seqlens_expanded"),
    ("unwritten", "cu_seqlens", "states", "cu_seqlens"),
    ("stale_when_larger", "cu_seqlens", "states", "cu_seqlens"),
    ("tail_written", "decode_metadata", "states", "page_table_1"),
    ("pitch_from_shape", "decode_metadata", "memory", "page_table_1 write-outside"),
    ("read_past_row", "decode_metadata", "memory", "req_to_token read-forbidden"),
    ("slack_matters", "decode_metadata", "states", "cache_seqlens"),
    ("write_past_end", "cu_seqlens", "memory", "cu_seqlens write-outside"),
    ("jump", "cu_seqlens", "memory", "seqlens write-input"),
    ("write_input", "seqlens_expand", "inputs", "seq_lens"),
    ("gap_written", "decode_metadata", "redzones", "page_table_1"),
    ("uninitialised", "cu_seqlens", "memory", "cu_seqlens uninitialised"),
    ("race", "cu_seqlens", "memory", "cu_seqlens race"),
    ("int32_wrap", "decode_metadata", "memory", "req_to_token read-outside"),
    ("wrong_slot", "decode_metadata", "states", "page_table_1"),
    ("cu0_clobbered", "cu_seqlens", "states", "cu_seqlens"),
    ("empty_grid", "cu_seqlens", "memory", "grid"),
    ("raises", "cu_seqlens", "raised", "RuntimeError"),
    ("segfault", "cu_seqlens", "fault", "died"),
    ("quiet_exit", "cu_seqlens", "fault", "died"),
    ("endless_loop", "cu_seqlens", "fault", "hang"),
]
SELFCHECK = {"off_by_one", "tail_written", "write_past_end", "write_input", "gap_written", "race", "segfault"}


@pytest.mark.parametrize(
    ("fault", "transform", "check", "buffer"),
    [pytest.param(*row, id=row[0], marks=[pytest.mark.selfcheck] * (row[0] in SELFCHECK)) for row in FOUND_BY_SEARCH],
)
def test_found_and_blamed(fault, transform, check, buffer, planted, tmp_path):
    shrunk_and_saved(planted(fault), transform, check, buffer, tmp_path)


@pytest.mark.parametrize(("fault", "transform", "buffer"), [
    ("rows_of_the_first_batch", "seqlens_expand", "seqlens_expanded"), ("sums_of_the_first_batch", "cu_seqlens", "cu_seqlens")])
def test_what_is_kept_from_the_capture_is_found_by_replays(fault, transform, buffer, planted, tmp_path):
    contract = registry.contracts()[transform]
    outcome = Campaign(contract, planted(fault), contract.rules(), sessions.replays(contract), PROFILES["quick"],
                       folder=tmp_path).run()
    assert ("states", buffer) in {r.found.kind for r in outcome.reports}


@pytest.mark.parametrize(("tail", "wrong"), [("full", set()), *((t, {"page_table_1"}) for t in ("strict", "block", "longest"))])
def test_whole_rows_are_right_by_the_rule_that_says_so_alone(tail, wrong, planted):
    case = Decode((Req(0, 5), Req(1, 3)), max_extra=300, slots=2)
    found = check(Example((case,)), planted("tail_written"), case.contract.rules({"tail": tail}))
    assert {f.buffer for f in found if f.check == "states"} == wrong


def test_a_refused_launch_runs_no_program(planted):
    rules = registry.contracts()["cu_seqlens"].rules()
    assert {f.kind for f in check(Example((CuSeqlens((3, 5)),)), planted("huge_grid"), rules)} == {("memory", "grid")}


def test_two_independent_faults_are_both_reported(planted, tmp_path):
    contract = registry.contracts()["decode_metadata"]
    campaign = Campaign(contract, planted("two_faults"), contract.rules(), domain.of(contract), PROFILES["quick"],
                        folder=tmp_path)
    kinds = {r.found.kind for r in campaign.run().reports}
    assert {("states", "nsa_cache_seqlens"), ("states", "page_table_1")} <= kinds


def test_a_fault_that_comes_and_goes_is_reported_as_k_of_n(planted, tmp_path):
    contract = registry.contracts()["cu_seqlens"]
    outcome = Campaign(contract, planted("sometimes"), contract.rules(), domain.of(contract), PROFILES["quick"],
                       folder=tmp_path).run()
    assert outcome.verdict == "INTERMITTENT"
    hits, runs = outcome.reports[0].intermittent.split("/")
    assert 0 < int(hits) < int(runs) == 20


def test_an_honest_subject_passes(planted, tmp_path):
    contract = registry.contracts()["cu_seqlens"]
    outcome = Campaign(contract, planted("honest_sum"), contract.rules(), domain.of(contract), PROFILES["quick"],
                       folder=tmp_path).run()
    assert (outcome.verdict, outcome.reports) == ("PASS", [])
    assert outcome.counted >= 60
    assert not list(tmp_path.iterdir())


def test_a_fixed_example_fails_on_a_fault_and_passes_on_an_honest_subject(planted):
    class Session:
        def __init__(self, fault):
            self.worker, self.rules = (lambda subject: planted(fault)), (lambda subject, name: {})

    example = Example((CuSeqlens((3, 5)),))
    lanes.fixed(Session("honest_sum"), "planted", example)
    with pytest.raises(pytest.fail.Exception, match="was not written"):
        lanes.fixed(Session("unwritten"), "planted", example)


PICKY = """
import torch


def cu_seqlens(*, seqlens, cu_seqlens):
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)


def supports(case):
    lengths = case["case"]["lengths"]
    return len(lengths) > 1 and sum(lengths) % {one_in} == {one_in} - 1 or "a sum that happens to fit"
"""


@pytest.mark.parametrize("one_in, verdict, note", [(9, "PASS", None), (300, "PASS", "few examples: "),
                                                   (10**9, "INFRA", "no example was tried; the subject declined ")],
                         ids=["enough", "few", "none"])
def test_a_subject_that_takes_few_examples_is_given_more(one_in, verdict, note, session, tmp_path):
    class Session:
        profile, worker, rules = PROFILES["quick"], session.worker, session.rules

    subject, kept = tmp_path / "picky.py", []
    subject.write_text(PICKY.format(one_in=one_in))
    row = lanes._campaign(Session, str(subject), "cu_seqlens", "inside", domain.of(registry.contracts()["cu_seqlens"]),
                          Session.profile, lambda _, text: kept.append(Row.load(text)))
    assert kept == [row] and row.verdict == verdict
    assert row.counted == 60 if note is None else row.counted < 30
    assert [n.startswith(note) for n in row.notes] == [True] if note else row.notes == []


def test_a_wrong_call_that_is_accepted_or_refused_late_is_a_failure(planted):
    class Session:
        def __init__(self, fault):
            self.worker = lambda subject: planted(fault)

    for fault in ("honest_sum", "raises"):
        with pytest.raises(pytest.fail.Exception, match="was not refused cleanly"):
            lanes.refusals(Session(fault), "planted", CuSeqlens((3, 5)))


class LeavesOutAChangeOfMode:
    """A worker of honest kernels, except that a decode right after another mode is said to have been done and was not."""

    def __init__(self, worker):
        self._worker, self._last = worker, "decode_metadata"
        self.options, self.versions, self.limits, self.tier = worker.options, worker.versions, worker.limits, worker.tier
        self.describe, self.restart_child = worker.describe, worker.restart_child

    def run(self, header, blobs):
        reply, data = self._worker.run(header, blobs)
        changed_mode = header["transform"] == "decode_metadata" != self._last
        self._last = header["transform"]
        if changed_mode:
            reply["steps"][0]["changes"], data = [], []
        return reply, data


def test_serving_sessions_see_what_goes_wrong_at_a_change_of_mode(session):
    class Session:
        def __init__(self, worker):
            self.profile = replace(PROFILES["quick"], later_seconds=0.0, shrink=False)
            self.worker, self.rules = (lambda subject: worker), session.rules

    def unrecorded(name, value):
        """These verdicts are not the run's."""

    eager = session.worker("eager")
    modes = ["decode_metadata", "target_verify_metadata", "draft_extend_metadata"]
    lanes.serving(Session(eager), "eager", modes, sessions.serving(), unrecorded)
    decode = Campaign(registry.contracts()["decode_metadata"], LeavesOutAChangeOfMode(eager), session.rules("eager", modes[0]),
                      domain.of(registry.contracts()["decode_metadata"]), PROFILES["quick"])
    assert decode.run().verdict == "PASS"
    with pytest.raises(pytest.fail.Exception, match="was not written"):
        lanes.serving(Session(LeavesOutAChangeOfMode(eager)), "eager", modes, sessions.serving(), unrecorded)
