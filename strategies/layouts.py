"""Memory layouts: how each tensor of a case lies in memory, drawn in one go and shrinking to the default."""

from dataclasses import replace

from hypothesis import strategies as st

from harness.contract import Case, Contract, Role, base_name, tensors_of
from harness.differential import Example
from harness.layout import Layout, Place
from strategies.common import choice, either, made_once


def places(contract: Contract, name: str) -> st.SearchStrategy[Place]:
    """A layout kind, dtype and guarded end that the contract allows for one tensor."""
    arg = contract.arg(name)
    return st.builds(Place, kind=choice(*arg.layouts), dtype=choice(None, *arg.dtypes[1:]), guard=choice("right", "left"))


@made_once
def _few(names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    few = st.lists(choice(*names), max_size=6, unique=True)
    if len(names) <= 12:
        return few
    # Of many tensors a few at a time leave some layout of some tensor out of a gate's worth of examples.
    return either(few, st.lists(choice(*names), min_size=len(names) // 4, max_size=len(names), unique=True))


def layouts(case: Case) -> st.SearchStrategy[Layout]:
    """A few tensors out of the ordinary, all index inputs int32 or int64, memory shared where the contract allows it."""
    return _layouts(case.contract, tuple(sorted(tensors_of(case.arguments()))))


@made_once
@st.composite
def _layouts(draw, contract: Contract, names: tuple[str, ...]) -> Layout:
    if not names:
        return Layout()
    chosen = {}
    if draw(st.booleans()):
        chosen = {n: Place(dtype=contract.arg(n).dtypes[1]) for n in names if len(contract.arg(n).dtypes) > 1}
    rare = draw(choice(*(None,) * 8, "expanded", "far"))
    for name in names if rare else ():
        if rare in contract.arg(name).layouts:
            chosen[name] = replace(chosen.get(name, Place()), kind=rare)
    for name in draw(_few(names)):
        chosen[name] = draw(places(contract, name))
    for name in names:
        leader = chosen.get(contract.arg(name).dtype_of)
        if contract.arg(name).dtype_of and (leader or name in chosen):
            chosen[name] = replace(chosen.get(name, Place()), dtype=leader.dtype if leader else None)
    aliases = draw(_aliases(contract, names))
    for pair in aliases:
        for name in pair:
            chosen.pop(name, None)
    order = draw(choice(0, 1, 2, 3, 17))
    return Layout(chosen, aliases, order)


@made_once
def _aliases(contract: Contract, names: tuple[str, ...]) -> st.SearchStrategy[tuple]:
    """Outputs that may lie on the memory of an input, or of the first backend's output: one of them, or every backend's."""
    pairs, together = [], {}
    for name in names:
        arg = contract.arg(name)
        for other in names:
            if arg.role is Role.OUT and other != name and base_name(other) in arg.may_alias:
                if contract.arg(other).role is Role.IN or other.endswith("[0]") and not name.endswith("[0]"):
                    pairs.append(((name, other),))
                    together.setdefault((base_name(name), other), []).append((name, other))
    every = [tuple(group) for group in together.values() if len(group) > 1]
    return choice((), (), (), *pairs, *every) if pairs else choice(())


@st.composite
def examples(draw, cases: st.SearchStrategy[Case]) -> Example:
    """A case with its layout and fill seed."""
    case = draw(cases)
    return Example((case,), draw(layouts(case)), draw(st.integers(0, 65535)))
