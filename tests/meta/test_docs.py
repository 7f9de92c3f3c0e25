"""The documentation that is generated from the declarations, and the declarations that only documentation reads."""

import pytest
from measure import cells_drawn

from harness import docs, registry

CONTRACTS = registry.contracts()


def test_the_page_of_transforms_is_up_to_date():
    assert docs.PATH.read_text() == docs.text(), "stale: run python -m harness.docs"


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_the_declared_cells_are_the_drawn_ones(name):
    assert {a.name: a.cells for a in CONTRACTS[name].args} == cells_drawn(CONTRACTS[name])
