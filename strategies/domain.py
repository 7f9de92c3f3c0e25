"""The examples that a campaign draws for a contract: its family's cases, in any allowed layout."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness import registry
from harness.contract import Contract
from harness.differential import Example
from strategies.layouts import examples


def of(contract: Contract) -> SearchStrategy[Example]:
    """Everything inside the contract."""
    return examples(registry.cases(contract))


def outside(contract: Contract) -> SearchStrategy[Example]:
    """Examples that break exactly one of the contract's preconditions, and ordinary ones for a subject to decline."""
    breakable = [p for p in contract.preconditions if p.broken]
    ordinary = of(contract)
    return st.one_of(ordinary, *(_broken(contract, p) for p in breakable)) if breakable else ordinary


@st.composite
def _broken(draw, contract: Contract, precondition) -> Example:
    cases = draw(registry.cases(contract).map(precondition.broken).filter(bool))
    case = draw(st.sampled_from(cases)) if isinstance(cases, tuple) else cases
    return replace(draw(examples(st.just(case))), outside=precondition.name)
