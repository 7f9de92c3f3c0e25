import pytest
from harness import differential, lanes, registry
from strategies import domain, sessions
FAMILY = "draft"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)
