"""Which contracts and strategies exist: one module per family in `oracles/` and `strategies/`, found by name."""

import importlib
import pkgutil
from functools import lru_cache

from hypothesis.strategies import SearchStrategy

import oracles
from harness.contract import Case, Contract


@lru_cache(maxsize=None)
def contracts() -> dict[str, Contract]:
    """Every declared transform by name, in the order of the families' files."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(oracles.__path__)):
        for contract in importlib.import_module(f"oracles.{module}").CONTRACTS:
            if contract.name in found or contract.family != module:
                raise TypeError(f"contract {contract.name} is declared twice, or not in oracles/{contract.family}.py")
            found[contract.name] = contract
    return found


def cases(contract: Contract) -> SearchStrategy[Case]:
    """The family's strategy for a contract's cases: a function of the contract's name in `strategies/<family>.py`."""
    return getattr(importlib.import_module(f"strategies.{contract.family}"), contract.name)()


def replayed(name: str) -> bool:
    """Whether a contract's family draws sessions of it: several calls on the same buffers."""
    return hasattr(importlib.import_module(f"strategies.{contracts()[name].family}"), f"{name}_replay")


def variant(text: str) -> tuple[str, str, str]:
    """CONTRACT:RULE=CHOICE, checked against the declarations.

    Raises:
        ValueError: there is no such contract, rule or choice.
    """
    name, _, rule = text.partition(":")
    key, _, choice = rule.partition("=")
    if name not in contracts():
        raise ValueError(f"{text}: unknown contract {name!r}; known are {', '.join(contracts())}")
    try:
        contracts()[name].rules({key: choice})
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    return name, key, choice
