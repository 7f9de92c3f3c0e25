"""Sessions: several batches through the same persistent buffers, as the replays of a captured graph are.

The bucket, the widths and the number of backends are fixed by the capture; lengths, slots and accepted tokens change from
replay to replay, requests retire into padded rows, and a whole batch can be idle.
"""

import importlib
from dataclasses import replace

from hypothesis import strategies as st

from harness import registry
from harness.contract import Contract
from harness.differential import Example
from strategies import metadata
from strategies.layouts import layouts


@st.composite
def replays(draw, contract: Contract) -> Example:
    """2 to 4 steps, in any order, on outputs of one size. `<contract>_replay` of the family draws a step."""
    family = importlib.import_module(f"strategies.{contract.family}")
    captured = draw(registry.cases(contract).filter(lambda c: 1 <= c.batch_size() <= 6))
    again = getattr(family, f"{contract.name}_replay")(captured)
    steps = draw(st.permutations([captured, *draw(st.lists(again, min_size=1, max_size=3))]))
    return Example(tuple(steps), replace(draw(layouts(captured)), aliases=()), draw(st.integers(0, 65535)))


@st.composite
def serving(draw) -> Example:
    """A serving session of the metadata family: steps of any mode on one set of buffers."""
    steps = draw(metadata.serving())
    return Example(steps, replace(draw(layouts(steps[0])), aliases=()), draw(st.integers(0, 65535)))
