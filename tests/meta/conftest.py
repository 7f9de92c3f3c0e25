"""Workers that hold planted faults, and a way to run one of them in a contract's place."""

from pathlib import Path

import pytest

from harness import registry
from harness.client import StandIn, Worker, WorkerOptions

HERE = Path(__file__).parent

# Programs that tests start in a process of their own: importing one sets that process up.
collect_ignore = ["compile_kernels.py", "plan_uses.py"]


@pytest.fixture(scope="session")
def faulty_workers():
    workers: dict[str, Worker] = {}
    yield workers
    for worker in workers.values():
        worker.close()


@pytest.fixture
def faulty(faulty_workers):
    """`faulty(file, name)`: a worker of a file beside this one, with the named fault in every contract's place."""

    def stand(file: str, name: str) -> StandIn:
        if file not in faulty_workers:
            options = WorkerOptions(str(HERE / file), run_limit=4.0, paths=(str(HERE),))
            faulty_workers[file] = Worker(options, list(registry.contracts().values()))
        return StandIn(faulty_workers[file], name)

    return stand


@pytest.fixture
def planted(faulty):
    """`planted(name)`: a fault of `planted.py`."""
    return lambda fault: faulty("planted.py", fault)
