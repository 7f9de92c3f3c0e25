"""Tensors of any rank and float dtypes, on a toy contract that converts and copies."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import floats, hashing, layout
from harness.contract import Arg, Case, Contract, Role
from harness.differential import Example, check
from harness.layout import Layout, Place
from harness.tensors import Output, Region, dense, runs, vector
from oracles.metadata import Decode, Req


@dataclass(frozen=True, repr=False)
class Convert(Case):
    """`count` numbers of every magnitude to convert, and a 3-D cube of pages to copy of which only `live` pages matter."""

    count: int
    live: tuple[int, ...]

    def dims(self):
        return {"n": self.count, "pages": 4}

    def batch_size(self):
        return self.count

    def numbers(self):
        raw = hashing.cells(1, "numbers", np.arange(self.count))
        small = (raw % np.uint64(4096)).astype(np.float64) - 2048
        special = [0.0, -0.0, float("nan"), float("inf"), 464.0, 465.0, 3.0e-3]
        return np.concatenate([special, small * 2.0 ** ((raw >> np.uint64(20)) % np.uint64(24)).astype(np.float64) / 2**20])[
            : self.count]

    def arguments(self):
        pages = {p * 6: np.arange(6) + 10.0 * p for p in self.live}
        return {"numbers": vector(self.numbers()), "fp8": Output((self.count,)), "bf16": Output((self.count,)),
                "cube": runs((4, 2, 3), pages, Region.FORBIDDEN), "copy": Output((4, 2, 3)),
                "flags": Output((4,)), "weights": dense(np.ones((2, 3))), "live": list(self.live)}


def oracle(*, numbers, fp8, bf16, cube, copy, flags, weights, live, variant):
    for i in range(len(numbers)):
        if abs(numbers[i]) <= 464:
            fp8[i] = numbers[i]
        else:
            fp8.free(i, "beyond the format: saturated or NaN, by version")
        bf16[i] = numbers[i]
    for page in live:
        for token in range(2):
            copy[page, token] = cube[page, token, 0:3] * weights[token]
        flags[page] = True


CONVERT = Contract(
    name="convert", family="toy", doc="Conversions and a copy.", origin="none", case=Convert, oracle=oracle,
    args=(
        Arg("numbers", Role.IN, ("n",), ("float32",), "numbers"), Arg("fp8", Role.OUT, ("n",), ("float8_e4m3fn",), "as fp8"),
        Arg("bf16", Role.OUT, ("n",), ("bfloat16",), "as bf16"),
        Arg("cube", Role.IN, ("pages", "2", "3"), ("float32", "bfloat16", "float16"), "pages"),
        Arg("copy", Role.OUT, ("pages", "2", "3"), ("float32", "bfloat16"), "live pages"),
        Arg("flags", Role.OUT, ("pages",), ("bool",), "which pages were copied"),
        Arg("weights", Role.IN, ("2", "3"), ("float32", "bfloat16"), "ones"),
    ),
)


def example(kind: str, guard: str = "right", dtype=None) -> Example:
    spots = {n: Place(kind, dtype, guard) for n in ("cube", "copy", "weights")}
    return Example((Convert(40, (0, 2, 3)),), Layout({**spots, "bf16": Place("offset", guard=guard)}))


@pytest.mark.parametrize("guard", ["left", "right"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["contiguous", "offset", "pitched", "strided", "expanded"])
def test_an_honest_subject_passes_in_every_layout(kind, dtype, guard, planted):
    """The subject converts with torch: so our rounding is torch's."""
    assert check(example(kind, guard, dtype), planted("convert"), {}) == []


@pytest.mark.parametrize(("fault", "kind", "where"), [
    ("convert_truncates", ("states", "bf16"), "bf16["),
    ("convert_wrong_plane", ("states", "copy"), "copy[0, 1, 0]"),
    ("convert_flags_all", ("states", "flags"), "flags[1]"),
    ("convert_writes_dead_page", ("states", "copy"), "copy[1, 0, 0] was overwritten"),
    ("convert_between_pages", ("redzones", "copy"), "outside copy"),
    ("convert_reads_dead_page", ("memory", "cube read-forbidden"), "cube[1, 0, 0]"),
])
def test_each_fault_is_seen_and_placed(fault, kind, where, planted):
    found = {f.kind: f for f in check(example("pitched"), planted(fault), {})}
    assert kind in found, found
    assert where in found[kind].sentence


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_every_code_survives_decoding_and_encoding(name):
    codes = np.arange(1 << (8 * floats.storage(name).itemsize)).astype(floats.storage(name))
    meant = floats.decode(codes, name)
    again = floats.encode(meant, name)
    assert ((again == codes) | np.isnan(meant)).all()


@given(st.floats(-600, 600), st.sampled_from(["bfloat16", "float8_e4m3fn"]))
def test_rounding_is_to_the_nearest_and_monotone(value, name):
    near = floats.rounded([value, np.nextafter(value, np.inf)], name)
    everything = floats.decode(np.arange(1 << (8 * floats.storage(name).itemsize)).astype(floats.storage(name)), name)
    finite = everything[np.isfinite(everything)]
    if np.isfinite(near[0]):
        assert abs(near[0] - value) == np.abs(finite - value).min()
    assert not near[0] > near[1]


def test_a_read_outside_the_live_runs_is_an_error_of_the_oracle():
    view = runs((4, 2, 3), {6: np.arange(6.0)}).view()
    assert view[1, 0, 0:3].tolist() == [0, 1, 2] and view[1, 1, 2] == 5 and view[1, 0, 0:3:2].tolist() == [0, 2]
    for index in ((0, 0, slice(0, 3)), (2, 0, 0), (0, 1, slice(2, 4))):
        with pytest.raises(LookupError, match="LIVE"):
            view[index]


def test_the_end_of_a_long_row_is_a_cell_of_one_window_alone():
    long = Decode((Req(1, 131072), Req(3, 2)))
    placed = layout.place(long.contract, long.arguments(), Layout(), seed=1, run=0)
    view = placed.views["page_table_1[0]"]
    last = view.byte_of(131071)
    observed = layout.observe(placed, [(view.block, last + np.arange(4), np.arange(1, 5, dtype=np.uint8))])
    assert observed.stray == [] and placed.cells("page_table_1[0]", observed.windows)[0][131071] == 0x04030201


def test_a_run_over_the_rows_of_a_far_tensor_is_cut_at_every_row():
    """One window over the gap between two rows would be gigabytes."""
    arguments = {**Convert(1, ()).arguments(), "cube": runs((4, 2, 3), {6: np.arange(12.0)}, Region.SLACK)}
    placed = layout.place(CONVERT, arguments, Layout({"cube": Place("far")}), seed=1, run=0)
    assert placed.sizes[placed.views["cube"].block] > 2**33
    assert max(len(w.image) for w in placed.windows) <= layout.PAGE
    cells = placed.cells("cube")
    assert {start: len(c) for start, c in cells.items()} == {0: 6, 6: 6, 12: 6, 18: 6}
    assert [*cells[6], *cells[12]] == list(range(12))
