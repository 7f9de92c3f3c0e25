"""The interpreter's blind spots: what the shims close, and what stays blind and is therefore judged elsewhere.

A spot that stays blind is asserted too: the day Triton mends it, the test fails and the README's table gets shorter.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry
from harness.differential import check
from harness.generation import each_distinct
from strategies import domain

SCRIPT = Path(__file__).parent / "blind_spots.py"


def answers(python: str, *arguments: str) -> dict:
    done = subprocess.run([python, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shimmed(pytestconfig):
    return answers(pytestconfig.option.subject_python)


@pytest.fixture(scope="module")
def stock(pytestconfig):
    return answers(pytestconfig.option.subject_python, "--stock")


def test_loop_bounds_may_come_from_memory(shimmed):
    assert shimmed["loop_bound"] == 6


def test_masked_lanes_without_other_are_poison_and_not_zero(shimmed, stock):
    assert stock["masked_lane"] == [1, 1, 0, 0]
    assert shimmed["masked_lane"] == [1, 1, 0x5A5A5A5A, 0x5A5A5A5A]


def test_a_zero_for_masked_lanes_is_kept_where_there_is_only_one_lane(shimmed):
    assert shimmed["one_masked_lane"] == [0]


def test_a_scalar_and_a_vector_condition_make_a_mask(shimmed):
    assert shimmed["mixed_mask"] == [1, 2, 3, 0]


def test_stock_triton_fails_just_where_a_shim_is(stock):
    version = tuple(int(part) for part in stock["triton"].split(".")[:2])
    assert (stock["loop_bound"] == 6) == (version >= (3, 7))
    assert (stock["mixed_mask"] == [1, 2, 3, 0]) == (version < (3, 9))


def test_overflow_in_masked_off_lanes_is_no_alarm(shimmed):
    assert shimmed["masked_overflow"] == [0, 2**30, 0, 0]


def test_32_bit_products_wrap_as_on_hardware(shimmed):
    assert shimmed["wrapped_product"] == 65536


def test_casts_to_narrow_floats_round_to_even_saturate_and_keep_nan(shimmed, stock):
    right = [["3f80", "3f82", "3ff8", "43e0", "4e6e", "ff80", "3ac0", "nan"], ["38", "38", "40", "7e", "7e", "fe", "01", "7f"]]
    assert shimmed["narrow_casts"] == right
    assert stock["narrow_casts"] != right


def test_casts_from_narrow_floats_keep_nan(shimmed, stock):
    right = ["-1.0", "480.0", "9.183549615799121e-41", "-inf", "-1.0", "nan", "0.001953125", "-240.0"]
    assert shimmed["wide_casts"] == right
    assert stock["wide_casts"] != right


def test_sums_of_integers_wrap_in_the_dtype_that_triton_gives_them(shimmed, stock):
    right = {"torch.int8": [400, 200, 200, 100, 200, 300, 400],
             "torch.int32": [4, 2 - 2**31, 2 - 2**31, 2**30 + 1, 2 - 2**31, 3 - 2**30, 4],
             "torch.uint32": [4, 2, 2, 2**31 + 1, 2, 2**31 + 3, 4],
             "torch.int64": [4, 2 - 2**63, 2 - 2**63, 2**62 + 1, 2 - 2**63, 3 - 2**62, 4]}
    assert shimmed["sums"] == right
    version = tuple(int(part) for part in stock["triton"].split(".")[:2])
    assert (stock["sums"] == right) == (version >= (3, 9))


def test_launches_that_hardware_refuses_are_reported(shimmed):
    refused = {grid: rules for grid, rules in shimmed["grids"].items() if rules}
    assert refused == {"(0,)": ["grid"], "(1, 65536)": ["grid"], "(1, 1, 65536)": ["grid"]}


@pytest.mark.parametrize(("kernel", "found"), [
    ("right", set()), ("first_pruned", set()), ("wrong", {("states", "cu_seqlens")})])
def test_an_autotuned_kernel_is_judged_by_its_first_config(kernel, found, faulty):
    assert autotuned(kernel, faulty) == found


def test_blind_only_the_first_config_of_an_autotuned_kernel_runs(faulty):
    assert autotuned("second_wrong", faulty) == set()


def autotuned(kernel: str, faulty) -> set[tuple[str, str]]:
    """The kinds of findings of a few examples."""
    contract, worker, kinds = registry.contracts()["cu_seqlens"], faulty("autotuned.py", kernel), set()
    each_distinct(domain.of(contract), 5, lambda e: kinds.update(f.kind for f in check(e, worker, contract.rules())))
    return kinds


def test_blind_loop_indices_are_python_integers_and_never_wrap(shimmed):
    assert shimmed["loop_index"] == 2 * (2**31 - 1)


def test_blind_bf16_arithmetic_is_wrong(shimmed):
    assert shimmed["bf16"] != 3.0


def test_the_suite_never_imports_torch_or_triton():
    loaded = "import sys, harness.gate, harness.lanes, harness.replay, strategies.domain, strategies.sessions\n"
    loaded += "from harness import registry; registry.contracts()\n"
    loaded += "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'triton', 'cuda'}))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert done.stdout.strip() == "[]", done.stderr
