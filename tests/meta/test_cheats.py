"""Cheats are rejected by the ordinary campaign with the ordinary strategies; each against its honest twin."""

import pytest

from harness import devices, registry
from harness.campaign import PROFILES, Campaign
from harness.client import StandIn, Worker, WorkerOptions
from strategies import domain

CHEATS = {
    "last_result_again": "states",
    "cached_by_address": "states",
    "right_where_watched": "states",
    "shortcut_for_small": "states",
    "altered_and_restored": "inputs",
    "output_is_the_input": "states",
    "output_shares_the_input": "inputs",
    "later": "states",
    "replaced_judge": "states",
}
CONTRACT = registry.contracts()["cu_seqlens"]


def verdict(worker, tmp_path):
    return Campaign(CONTRACT, worker, CONTRACT.rules(), domain.of(CONTRACT), PROFILES["quick"], folder=tmp_path).run()


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_rejected(cheat, faulty, tmp_path):
    outcome = verdict(faulty("cheats.py", cheat), tmp_path)
    assert CHEATS[cheat] in {r.found.check for r in outcome.reports}, outcome


def test_the_honest_twin_passes(faulty, tmp_path):
    assert verdict(faulty("planted.py", "honest_sum"), tmp_path).verdict == "PASS"


@pytest.mark.skipif(not devices.gpus(), reason="no GPU is visible here; streams need one")
def test_work_on_another_stream_is_rejected(tmp_path):
    options = WorkerOptions("tests/meta/cheats.py", "cuda", environment=devices.environment("cuda", 0))
    worker = Worker(options, list(registry.contracts().values()))
    try:
        assert verdict(StandIn(worker, "on_another_stream"), tmp_path).reports
    finally:
        worker.close()
