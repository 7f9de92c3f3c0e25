"""On a GPU: faults that end a process are found, named, shrunk, and the run goes on. Without one, nothing here can run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from measure import hunt

from harness import casefile, devices, registry
from harness.differential import Example, check, replay
from oracles.seqlens import CuSeqlens
from harness.client import ROOT, StandIn, Worker, WorkerOptions
from harness.sanitized import ENVIRONMENT

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not devices.gpus(), reason="no GPU is visible here; pytest --require-gpu is red then")

FAR_BLOCK = """
from harness.worker.gpu import GpuMemory
memory, size, page = GpuMemory("guard pages"), (1 << 30) + 24, 4096
memory.map({"blocks": [{"bytes": size, "guard": "right"}], "windows": [[0, 7 * page + 5, 3]], "tensors": {},
            "access": [[0, 0, 1, 1, 1], [0, 1 << 29, 1, 1, 1]]}, [bytes([1, 2, 3])])
block = memory.bytes(0, 0, size)
block[7 * page + 6] = 0  # a byte of the window becomes zero, and one elsewhere becomes another
block[1 << 29] = 9
((positions, values),) = memory.changes()
print(positions.tolist(), values.tolist())
"""
FAULTS = [
    ("reads_one_past", "illegal address"),
    ("reads_one_before", "illegal address"),
    ("misaligned", "misaligned address"),
    ("device_assert", "device assert"),
    ("endless", "hang"),
    ("killed", "died"),
]


@pytest.fixture(scope="module")
def worker():
    found = Worker(WorkerOptions(str(HERE / "gpu_faults.py"), "cuda", run_limit=4.0,
                                 environment=devices.environment("cuda", 0)), list(registry.contracts().values()))
    yield found
    found.close()


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_is_named_and_shrunk_within_a_minute(fault, kind, worker, tmp_path):
    start = time.monotonic()
    outcome = hunt(StandIn(worker, fault), "cu_seqlens", tmp_path)
    assert ("fault", kind) in {r.found.kind for r in outcome.reports}, (outcome.reports, outcome.also)
    assert all(r.example.steps[0].batch_size() <= 2 for r in outcome.reports)
    assert time.monotonic() - start < 60
    assert hunt(StandIn(worker, "honest"), "cu_seqlens", tmp_path).verdict == "PASS"


def test_an_integer_that_wraps_shows_only_where_triton_checks_for_it(worker, tmp_path):
    assert hunt(StandIn(worker, "overflows"), "cu_seqlens", tmp_path).verdict == "PASS"
    checked = Worker(WorkerOptions(str(HERE / "gpu_faults.py"), "cuda", environment=devices.environment("cuda", 0, True)),
                     list(registry.contracts().values()))
    try:
        assert hunt(StandIn(checked, "honest"), "cu_seqlens", tmp_path).verdict == "PASS"
        outcome = hunt(StandIn(checked, "overflows"), "cu_seqlens", tmp_path)
    finally:
        checked.close()
    assert {r.found.kind for r in outcome.reports} == {("fault", "device assert")}


def test_of_a_far_block_every_byte_that_changed_is_reported():
    done = subprocess.run([sys.executable, "-c", FAR_BLOCK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == str([7 * 4096 + 6, 1 << 29]) + " [0, 9]", done.stderr


def test_far_tables_hold_without_guard_pages_too():
    """As without cuda-bindings. The second run is a captured graph, whose inputs are filled twice."""
    far = [casefile.read(p).example for p in sorted((ROOT / "tests" / "corpus").glob("*past-2-31-elements.json"))]
    plain = Worker(WorkerOptions("kernels", "cuda", guards=False, environment=devices.environment("cuda", 0) | ENVIRONMENT),
                   list(registry.contracts().values()))
    try:
        found = [replay(example, plain, example.contract.rules(plain.describe[example.contract.name]["variant"]))
                 for example in far]
    finally:
        plain.close()
    assert len(far) > 1 and not any(found), found


SLOW_HOST = """
import time, torch
from bench import measure
cells = torch.zeros(8, device="cuda")
cells.add_(1)  # loads the kernel
print(max(measure._between_events(lambda: (time.sleep(0.0002), cells.add_(1)), 5)))
"""


def test_a_slow_host_is_not_measured_as_gpu_time():
    done = subprocess.run([sys.executable, "-c", SLOW_HOST], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 100, done  # microseconds; the host sleeps for twice as long


ONE, TWO = Example((CuSeqlens((3, 5)),)), Example((CuSeqlens((3, 5)), CuSeqlens((4, 9)), CuSeqlens((0, 1))))


def test_a_launch_on_another_stream_reads_inputs_that_are_not_there_yet(worker):
    standing = StandIn(worker, "wrong_stream")
    standing.describe["cu_seqlens"]["capturable"] = False
    assert {f.kind for f in check(ONE, standing, {})} == {("interference", "cu_seqlens")}


def test_what_capture_froze_shows_only_when_a_session_replays_the_graph(worker):
    assert check(ONE, StandIn(worker, "frozen_at_capture"), {}) == []
    assert {f.kind for f in check(TWO, StandIn(worker, "frozen_at_capture"), {})} == {("interference", "cu_seqlens")}
    assert check(TWO, StandIn(worker, "honest"), {}) == []


def test_an_error_that_nobody_looked_at_is_laid_at_its_own_door(worker):
    found = check(ONE, StandIn(worker, "leaves_an_error"), {})
    assert [f.check for f in found] == ["raised"] and "invalid argument" in found[0].sentence
    assert check(ONE, StandIn(worker, "honest"), {}) == []


def test_a_call_that_waits_for_the_gpu_cannot_be_captured(worker):
    found = check(ONE, StandIn(worker, "waits_for_the_gpu"), {})
    assert [f.check for f in found] == ["raised"] and "captur" in found[0].sentence
