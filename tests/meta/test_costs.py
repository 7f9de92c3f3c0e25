"""What our kernels claim of a call, over a whole strategy: the launches, no torch operation (so no allocation, no copy, no
wait for the device), and on a GPU no compilation once warm."""

from collections import Counter

import pytest
from hypothesis import Phase, given, settings

from harness import devices, registry
from harness import layout as layouts
from harness.client import Worker, WorkerOptions
from harness.contract import Kind
from harness.differential import Example, wire_arguments
from oracles.seqlens import CuSeqlens
from strategies import domain

BUFFERS = [n for n, c in registry.contracts().items() if c.kind is Kind.BUFFER]


@pytest.fixture(scope="module", params=["cpu", "cuda"] if devices.gpus() else ["cpu"])
def worker(request):
    found = Worker(WorkerOptions("kernels", request.param, environment=devices.environment(request.param, 0)),
                   list(registry.contracts().values()))
    yield found
    found.close()


def cost(worker, example) -> dict:
    """One counted call."""
    case = example.steps[0]
    placed = layouts.place(case.contract, case.arguments(), example.layout, example.seed, 0)
    memory, blobs = placed.request()
    waits = worker.describe[case.contract.name].get("cost", {}).get("waits")
    header = {"family": case.contract.family, "transform": case.contract.name, "order": 0, "rules": [],
              "count": "waiting" if waits else "strictly",
              "steps": [{"memory": memory, "arguments": wire_arguments(placed.arguments)}]}
    reply, _ = worker.run(header, blobs)
    step = reply["steps"][0]
    assert step["raised"] is None, step["raised"]
    return step["cost"]


@pytest.mark.parametrize("name", BUFFERS)
def test_a_call_costs_what_the_kernel_claims(name, worker):
    claim = worker.describe[name]["cost"]
    seen: Counter = Counter()

    @settings(max_examples=40, phases=[Phase.generate])
    @given(domain.of(registry.contracts()[name]))
    def count(example):
        spent = cost(worker, example)
        seen[f"{spent['launches']} launches"] += 1
        seen["calls"] += 1
        assert spent["launches"] <= claim.get("launches", 1), (spent, example)
        assert Counter(spent["operations"]) <= Counter(claim.get("operations", [])), (spent, example)

    count()
    assert seen["calls"] and len(seen) > 1, seen


@pytest.mark.skipif(not devices.gpus(), reason="no GPU is visible here; only a GPU compiles")
@pytest.mark.parametrize("worker", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", BUFFERS)
def test_nothing_is_compiled_once_warm(name, worker):
    compiled: list[int] = []

    @settings(max_examples=80, phases=[Phase.generate])
    @given(domain.of(registry.contracts()[name]))
    def count(example):
        compiled.append(cost(worker, example)["compilations"])

    count()
    count()
    assert sum(compiled[len(compiled) // 2 :]) == 0
    assert sum(compiled) <= worker.describe[name]["cost"].get("variants", 64)


def test_torch_operations_and_launches_are_counted(planted):
    """What the tests above would see of a kernel that allocates, or launches twice."""
    example = Example((CuSeqlens((3, 5)),))
    assert any("cumsum" in name for name in cost(planted("honest_sum"), example)["operations"])
    assert [cost(planted(name), example)["launches"] for name in ("honest_sum", "launches_twice")] == [0, 2]
