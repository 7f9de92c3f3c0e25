"""placeholder"""

import pytest

from harness import lanes, registry
from strategies import domain, sessions

FAMILY = "topk_transform"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
@pytest.mark.parametrize("replayed", ["transform_index_page_table_decode", "fast_topk", "fast_topk_transform_paged"])
def test_replays(subject, replayed, session, record_property):
    lanes.replays(session, subject, replayed, sessions.replays(registry.contracts()[replayed]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)
