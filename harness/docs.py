"""`docs/transforms.md`, from the declarations: `python -m harness.docs` writes it, a test fails where it is stale."""

import importlib
import inspect
from collections.abc import Iterable

from harness import registry
from harness.client import ROOT
from harness.contract import Arg, Contract, Kind

PATH = ROOT / "docs" / "transforms.md"
HEAD = """# The transforms

Generated from the declarations in `oracles/` by `python -m harness.docs`; do not edit.

An argument's **cells** say what its tensor is made of. Inputs: *live* cells decide the result, *slack* may be read and must
not matter, *forbidden* cells must not be read. Outputs: a cell is *written* with exactly one value, *judged* by a named rule,
*untouched* (the prior bytes stay), or *don't care*. **Layouts** beside contiguous ones are what callers really pass: a kernel
honours them or refuses them by name. A **variant** is a rule that upstream changed on purpose; the first choice is ours. A
broken **precondition** makes no result right, but a kernel must refuse it or leave all other memory alone; *tried* marks
those that the gate breaks on purpose.
"""


def text() -> str:
    """The whole page."""
    contracts = registry.contracts().values()
    parts = [HEAD, _index(contracts)]
    for family in dict.fromkeys(c.family for c in contracts):
        lead = inspect.getdoc(importlib.import_module(f"oracles.{family}")).split("\n\n")[0]
        parts.append(f"## {family}\n\n{lead}\n")
        parts += [_section(c) for c in contracts if c.family == family]
    return "\n".join(parts)


def _index(contracts: Iterable[Contract]) -> str:
    rows = [(f"[`{c.name}`](#{c.name})", c.family, _names(c.upstream_names), c.doc) for c in contracts]
    return _table(("ours", "family", "upstream's names, old and new", "what it does"), rows)


def _section(contract: Contract) -> str:
    """One transform: what it is, its arguments, its rules, a worked example."""
    parts = [f"### {contract.name}\n", contract.doc + "\n", _facts(contract) + "\n"]
    if contract.args:
        rows = [(f"`{a.name}`", a.role.value, _shape(a), ", ".join(a.dtypes), ", ".join(a.layouts), a.cells, _says(a))
                for a in contract.args]
        parts.append(_table(("tensor", "role", "least shape", "dtypes", "layouts", "cells", "holds"), rows))
    if contract.scalars:
        parts.append(_table(("host value", "means"), [(f"`{s.name}`", s.doc) for s in contract.scalars]))
    if contract.variants:
        rows = [(f"`{v.name}`", f"`{choice}`", source) for v in contract.variants for choice, source in v.choices.items()]
        parts.append(_table(("variant", "choice", "source"), rows))
    if contract.preconditions:
        rows = [(p.name, p.doc, p.source, "tried" if p.broken else "") for p in contract.preconditions]
        parts.append(_table(("precondition", "says", "source", ""), rows))
    parts.append(f"```\n{inspect.getdoc(contract.oracle)}\n```\n")
    return "\n".join(parts)


def _facts(contract: Contract) -> str:
    facts = [f"Origin: {contract.origin}.", f"Upstream: {_names(contract.upstream_names) or 'no function of its own'}."]
    if contract.kind is Kind.HOST:
        facts.append("A host function: it returns its result.")
    if contract.capturable:
        frozen = ", ".join(f"`{f}`" for f in contract.frozen_by_capture) or "nothing"
        facts.append(f"May run inside a captured graph, which freezes {frozen}.")
    return " ".join(facts)


def _shape(arg: Arg) -> str:
    return "[" + ", ".join(arg.shape) + "]"


def _says(arg: Arg) -> str:
    more = [arg.doc]
    more += [f"rows begin at multiples of {arg.pitch} cells"] if arg.pitch > 1 else []
    more += ["one per backend"] if arg.per_backend else []
    more += [f"of the dtype of `{arg.dtype_of}`"] if arg.dtype_of else []
    more += [f"may be None: {arg.optional}"] if arg.optional else []
    more += [f"may share memory with {', '.join(f'`{a}`' for a in arg.may_alias)}"] if arg.may_alias else []
    return "; ".join(more)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text())
    print(f"wrote {PATH.relative_to(ROOT)}")
