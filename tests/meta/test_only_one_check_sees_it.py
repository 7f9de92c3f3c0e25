"""For each of the five checks and each memory rule a fault that only it sees: found when it is on, passed when it is off."""

import pytest

from harness.differential import Example, check
from harness.findings import CHECKS, MEMORY_RULES, CheckOptions
from harness.layout import Layout, Place
from oracles.metadata import Decode, Req
from oracles.seqlens import CuSeqlens, SeqlensExpand
from oracles.seqlens import Req as ExtendReq

SUMS = Example((CuSeqlens((3, 5), spare=1),))
LEFT = Example((CuSeqlens((3, 5)),), Layout({"seqlens": Place(guard="left"), "cu_seqlens": Place(guard="left")}))
EXPAND = Example((SeqlensExpand((ExtendReq(2, 5), ExtendReq(1, 4))),))
TABLE = Example((Decode((Req(1, 3), Req(2, 5))),))
PITCHED = Example((Decode((Req(1, 3), Req(2, 5))),), Layout({"page_table_1[0]": Place("pitched")}))

CASES = [
    ("states", "off_by_one", EXPAND), ("inputs", "write_input", EXPAND), ("redzones", "gap_written", PITCHED),
    ("interference", "left_from_previous", SUMS),
    ("read-outside", "read_outside", LEFT), ("write-outside", "write_outside_unchanged", LEFT),
    ("read-forbidden", "read_forbidden", TABLE), ("write-input", "write_input_unchanged", SUMS),
    ("uninitialised", "uninitialised", SUMS), ("race", "race", SUMS), ("grid", "always_empty_grid", SUMS),
]


def without(name: str) -> CheckOptions:
    return CheckOptions(tuple(c for c in CHECKS if c != name), tuple(r for r in MEMORY_RULES if r != name))


@pytest.mark.parametrize(("name", "fault", "example"), CASES, ids=[c[0] for c in CASES])
def test_found_when_on_and_passed_when_off(name, fault, example, planted):
    planted(fault).restart_child()
    found = check(example, planted(fault), example.contract.rules())
    assert found, "not seen with everything on"
    assert {f.check for f in found} == {name if name in CHECKS else "memory"}
    planted(fault).restart_child()
    assert check(example, planted(fault), example.contract.rules(), without(name)) == []


def test_every_check_and_rule_has_such_a_fault():
    assert {c[0] for c in CASES} == (set(CHECKS) | set(MEMORY_RULES)) - {"memory"}


def test_interference_sees_what_one_run_cannot(planted):
    """A result that depends on what stood there before is right in one run for some seeds."""
    lucky = [seed for seed in range(40) if check(Example((CuSeqlens((3, 5)),), seed=seed), planted("prior_matters"), {},
                                                 without("interference")) == []]
    assert lucky
    for seed in lucky[:5]:
        found = check(Example((CuSeqlens((3, 5)),), seed=seed), planted("prior_matters"), {})
        assert {f.kind for f in found} <= {("interference", "cu_seqlens")}
    assert any(check(Example((CuSeqlens((3, 5)),), seed=seed), planted("prior_matters"), {}) for seed in lucky)
