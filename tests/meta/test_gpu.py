"""On a GPU: faults that end a process are found, named, shrunk, and the run goes on. Without one, nothing here can run."""

import time
from pathlib import Path

import pytest
from measure import Standing, hunt

from harness import devices, registry
from harness.client import Worker, WorkerOptions

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not devices.gpus(), reason="no GPU is visible here; pytest --require-gpu is red then")

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
    outcome = hunt(Standing(worker, fault), "cu_seqlens", tmp_path)
    assert ("fault", kind) in {r.found.kind for r in outcome.reports}, (outcome.reports, outcome.also)
    assert all(r.example.steps[0].batch_size() <= 2 for r in outcome.reports)
    assert time.monotonic() - start < 60
    assert hunt(Standing(worker, "honest"), "cu_seqlens", tmp_path).verdict == "PASS"
