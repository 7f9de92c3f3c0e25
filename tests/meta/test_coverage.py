"""A gate's worth of examples fills every cell of the coverage matrix, and the declarations say what its cells are."""

import re
from dataclasses import replace

import pytest
from measure import CellsSeen

from harness import registry
from harness.client import ROOT
from strategies import coverage, domain

CONTRACTS = registry.contracts()


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_no_cell_is_empty(name):
    contract = CONTRACTS[name]
    cells = CellsSeen(contract)
    counts = coverage.drawn(contract, lambda example: [cells.visit(case) for case in example.steps])
    assert sorted(cell for cell in coverage.cells(contract) if not counts[cell]) == []
    assert {a.name: a.cells for a in contract.args} == cells.text()


def test_a_generator_that_leaves_something_out_is_noticed(monkeypatch):
    """Batches of one request, one page size, nothing strided."""
    contract = CONTRACTS["gather_page_table"]
    stock = domain.of

    def poor(example):
        case, layout = example.steps[0], example.layout
        plain = {n: replace(p, kind="contiguous" if p.kind == "strided" else p.kind) for n, p in layout.places.items()}
        case = replace(case, requests=case.requests[:1], times=1)
        return replace(example, steps=(case,), layout=replace(layout, places=plain))

    monkeypatch.setattr(domain, "of", lambda c: stock(c).map(poor))
    counts = coverage.drawn(contract)
    empty = {cell for cell in coverage.cells(contract) if not counts[cell]}
    assert {("requests", "2"), ("requests", "more than 16"), ("layouts", "req_to_token strided")} <= empty


def test_every_exemption_names_a_cell_of_a_transform():
    for name, (dimension, what), reason in coverage.EXEMPT:
        contracts = [c for c in CONTRACTS.values() if name in (c.name, c.family)]
        assert contracts and reason
        without = [c for contract in contracts for c in {*coverage.declared(contract), *coverage.shaped(contract)}
                   if c[0] == dimension and c[1].startswith(what)]
        assert without, (name, dimension, what)


def test_the_page_of_coverage_lists_every_transform_with_its_cells():
    page = (ROOT / "docs" / "coverage.md").read_text()
    for name, contract in CONTRACTS.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)[:1]
        counts = [int(cell.split(",")[0]) if cell.strip() else 0 for cell in row.split("|")]
        wanted = coverage.cells(contract)
        assert counts == [sum(c[0] == d for c in wanted) for d in coverage.DIMENSIONS], (
            f"{name}: the page is stale, run python -m strategies.coverage")
    assert ", 0x" not in page


def test_help_draws_nothing(monkeypatch, capsys):
    monkeypatch.setattr(coverage, "drawn", lambda contract: pytest.fail("nothing may be drawn"))
    for words, status, says in ((["--help"], 0, "prints the matrix"), (["--fast"], 2, "unrecognized arguments: --fast")):
        with pytest.raises(SystemExit) as ended:
            coverage.main(words)
        assert ended.value.code == status and says in "".join(capsys.readouterr())
