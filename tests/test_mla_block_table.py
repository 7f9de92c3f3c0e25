"""placeholder"""
import pytest
from harness import lanes, registry
from strategies import domain, sessions
FAMILY = "mla_block_table"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


REPLAYED = ("mla_metadata", "mla_block_table", "mla_multi_step_draft", "pad_draft_extend_query", "unpad_draft_extend_output",
            "pad_sequence_with_mask")


@pytest.mark.gate
@pytest.mark.parametrize("captured", REPLAYED)
def test_replays(subject, captured, session, record_property):
    lanes.replays(session, subject, captured, sessions.replays(registry.contracts()[captured]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)
