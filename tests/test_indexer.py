FAMILY = "indexer"
import pytest
from harness import lanes, registry
from strategies import domain
@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)
