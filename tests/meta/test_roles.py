"""An inout argument, judged cells, floats with a bound and a DON'T CARE cell, on a toy contract."""

from dataclasses import dataclass

import numpy as np
import pytest

from harness.contract import Arg, Case, Contract, Role
from harness.differential import Example, check
from harness.layout import Layout, Place
from harness.states import same_multiset, within
from harness.tensors import Input, Output, Region, Span


@dataclass(frozen=True, repr=False)
class Toy(Case):
    """The last cell of `values` is slack."""

    values: tuple[int, ...]

    def dims(self):
        return {"n": len(self.values)}

    def batch_size(self):
        return len(self.values)

    def arguments(self):
        n = len(self.values)
        live = Span(0, n, Region.LIVE, np.array(self.values))
        return {"values": Input((n + 1,), (live, Span(n, n + 1, Region.SLACK))), "order": Output((n,)), "halves": Output((n,))}


def oracle(*, values, order, halves, variant):
    n = len(values.before)
    values[0:n] = [v + 1 for v in values.before]
    values.free(slice(n, n + 1), "scratch")
    order.judge(slice(0, n), same_multiset(list(values.before)))
    expected = np.array(values.before) / 2
    halves.judge(slice(0, n), within(expected, 4 * np.finfo(np.float32).eps * np.abs(expected)))


TOY = Contract(
    name="toy", family="toy", doc="A toy.", origin="none", case=Toy, oracle=oracle,
    args=(Arg("values", Role.INOUT, ("n",), ("int32",), "in place"), Arg("order", Role.OUT, ("n",), ("int32",), "any order"),
          Arg("halves", Role.OUT, ("n",), ("float32",), "halves")),
)
EXAMPLE = Example((Toy((5, 8, 13)),), Layout({"values": Place("offset", guard="left")}))


def test_the_honest_toy_passes(planted):
    assert check(EXAMPLE, planted("toy"), {}) == []


@pytest.mark.parametrize(("fault", "buffer"), [
    ("toy_wrong_inout", "values"), ("toy_wrong_order", "order"), ("toy_wrong_float", "halves"), ("toy_nan", "halves"),
])
def test_each_fault_is_seen_in_its_own_buffer(fault, buffer, planted):
    assert [f.kind for f in check(EXAMPLE, planted(fault), {})] == [("states", buffer)]
