"""The index_cache family."""
import pytest
from harness import lanes, registry
from strategies import domain

FAMILY = "index_cache"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)
