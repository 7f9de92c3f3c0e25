"""Plans launch what the plain call launches, take up new tensors, and refuse what they could not honour.

`ci/gate --subject plans` holds them to the oracles; here the plain call is their twin, and misuse has its words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry
from harness.contract import Kind
from harness.differential import Example, check
from oracles.seqlens import CuSeqlens

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def came() -> dict:
    done = subprocess.run([sys.executable, str(HERE / "plan_uses.py")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_plan_writes_what_the_plain_call_writes(came):
    assert set(came["agrees"]) == {n for n, c in registry.contracts().items() if c.kind is Kind.BUFFER}
    assert [n for n, same in came["agrees"].items() if not same] == []


@pytest.mark.parametrize("use, told", {
    "resized": "cu_seqlens has moved since the plan was bound",
    "set to other memory": "cu_seqlens has moved since the plan was bound",
    "another dtype": "seqlens must be int32 (4,), strides (1,), on cpu like the tensor that was bound, got int64",
    "another shape": "got int32 (3,)",
    "another stride": "got int32 (4,), strides (2,)",
    "another alignment": "seqlens must start as far from a multiple of 16 bytes",
    "no tensor": "TypeError: seqlens must be a tensor, got list",
    "too few": "the plan takes 1 new tensors (seqlens), got 0",
    "an output as input": "seqlens shares memory with an output of the plan",
    "an output as new": "new names 'cu_seqlens', which cu_seqlens writes",
    "one tensor for two new ones": "new names 'extend_seq_lens', which shares memory with seq_lens",
    "a new one that a bound one is": "new names 'seq_lens', which shares memory with extend_seq_lens",
    "memory as new": "new names 'memory', which update_rope_guarded writes",
    "lengths of another type at one address": "share memory, and must not",
    "lengths of another pitch at one address": "share memory, and must not",
    "lengths far apart": "seqlens must lie within 2^31 elements, got 3 of them at a stride of 1073741831",
    "more tokens than a grid has": "max_len must be at most 524280, got 600000",
    "an unknown name": "new names 'lengths', which is no tensor argument",
    "what the call refuses": "cu_seqlens must be at least (5,), got (4,)",
    "a copy in the call": "Unplannable: the call uses aten.clone.default",
}.items(), ids=lambda value: value.replace(" ", "-") if len(value) < 24 else "")
def test_misuse_is_refused_in_words(use, told, came):
    assert told in str(came["uses"][use])


def test_two_threads_may_bind_plans(came):
    assert came["threads"] == {"as it was": True, "launches": [1, 1], "written": [["cu_seqlens"], ["cu_seqlens"]]}


def test_nothing_is_written_by_binding_or_by_a_refused_call(came):
    assert came["uses"]["binding writes nothing"] == [77] * 9
    assert came["uses"]["after the misuses"] == [0, 1, 3, 6, 10, 77, 77, 77, 77]


def test_a_plain_call_that_looks_like_an_earlier_one_is_not_checked_again(came):
    found = came["remembered"]
    assert found["first"] == [1, [0, 1, 3]]
    assert found["other contents"] == [1, [0, 4, 9]]
    assert found["another place"] == [2, [0, 7, 14]]


def test_a_plain_call_that_looks_different_is_checked(came):
    found = came["remembered"]
    assert "cu_seqlens must be at least (3,), got (2,)" in found["a shorter output"][1] == found["refused again"][1]
    assert "padded_rows must be an integer of at least 0, got True" in found["True for 1"]
    assert found["a copy in the call"] == [2.0, 3.0, 4.0]


def test_the_subject_plans_shows_a_plan_that_keeps_the_old_tensor(faulty):
    found = check(Example((CuSeqlens((3, 5)),)), faulty("stale_plans.py", "cu_seqlens"), {})
    assert {f.check for f in found} == {"states"}, found
