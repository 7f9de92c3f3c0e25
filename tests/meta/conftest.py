"""One worker that holds every planted fault, and a way to run one of them in a contract's place."""

from pathlib import Path

import pytest

from harness import registry
from harness.client import Worker, WorkerOptions

PLANTED = str(Path(__file__).parent / "planted.py")


class Standing:
    """A worker whose calls go to one planted fault, whatever the contract."""

    def __init__(self, worker, fault: str):
        self._worker, self._fault = worker, fault
        self.options, self.versions, self.limits = worker.options, worker.versions, worker.limits
        self.describe = {n: {"provided": True, "variant": {}, "version": "", "selective": False, "missing": ""}
                         for n in registry.contracts()}

    def run(self, header, blobs):
        return self._worker.run({**header, "transform": self._fault}, blobs)


@pytest.fixture(scope="session")
def planted_worker():
    worker = Worker(WorkerOptions(PLANTED, run_limit=4.0), list(registry.contracts().values()))
    yield worker
    worker.close()


@pytest.fixture
def planted(planted_worker):
    """`planted(name)`: the worker, with the named fault in every contract's place."""
    return lambda fault: Standing(planted_worker, fault)
