"""The documentation that is generated from the declarations, and the declarations that only documentation reads."""

import re

from harness import docs, registry

CONTRACTS = registry.contracts()


def test_the_page_of_transforms_is_up_to_date():
    assert docs.PATH.read_text() == docs.text(), "stale: run python -m harness.docs"


def test_the_page_of_corners_names_tests_and_faults_that_exist():
    page = (docs.PATH.parent / "corners.md").read_text()
    tests = re.findall(r"`(test_\w+\.py)(?:::(\w+))?", page)
    assert len(tests) > 20
    for file, name in tests:
        (found,) = [*docs.ROOT.glob(f"tests/**/{file}")]
        assert not name or f"def {name}" in found.read_text(), (file, name)
    planted = "".join(p.read_text() for p in docs.ROOT.glob("tests/meta/faults_*.py"))
    faults = {name for name in re.findall(r"`([a-z]\w+)`", page) if "_" in name and not name.startswith(("test_", "cu_"))}
    assert len(faults) > 15
    assert [name for name in sorted(faults) if f"def {name}" not in planted and f'"{name}"' not in planted
            and not hasattr(contract_names(), name)] == []


def contract_names():
    """Everything else that the page quotes: arguments and host values of the declarations."""
    names = {a.name for c in CONTRACTS.values() for a in (*c.args, *c.scalars)} | {"extra_topk", "like_this"}
    return type("Names", (), dict.fromkeys(names))
