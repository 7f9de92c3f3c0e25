"""The GPU's memory tier over a driver that maps this machine's own memory: what is mapped, kept, zeroed and compared."""

import sys
from types import SimpleNamespace

import pytest
import torch
from fake_driver import GRANULE, Driver

from harness.worker import arena, gpu

FAR, WINDOW = (1 << 28) + (1 << 20) + 24, 7 * 4096 + 5
SMALL = bytes(1 << 15)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    monkeypatch.setattr(gpu, "_tensor", lambda address, size: torch.from_numpy(arena.bytes_at(address, size)))
    monkeypatch.setattr(gpu, "_Turn", lambda: SimpleNamespace(take=lambda: None, done=lambda: None))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **given: zeros(*shape, **given))
    yield made
    for raw, size in made.reserved.values():
        arena.release(raw, size)


def mapped(memory: gpu.GpuMemory, size: int = FAR, guard: str = "right", at: int = 1 << 27, window: int = WINDOW,
           data: bytes = bytes([1, 2, 3])) -> torch.Tensor:
    """A block of `size` bytes whose cells may be used at its start and from byte `at` on, with `data` at `window`."""
    memory.map({"blocks": [{"bytes": size, "guard": guard}], "windows": [[0, window, len(data)]], "tensors": {},
                "access": [[0, 0, 1, 1, 1], [0, at, 1, 1, 1]]}, [data])
    return memory.bytes(0, 0, size)


def changes(memory: gpu.GpuMemory) -> dict[int, int]:
    ((positions, values),) = memory.changes()
    return dict(zip(positions.tolist(), values.tolist()))


@pytest.mark.parametrize("guard", ["left", "right"])
def test_of_a_far_block_every_byte_that_changed_is_seen_and_only_what_may_be_used_is_mapped(driver, guard):
    memory = gpu.GpuMemory("guard pages")
    block = mapped(memory, guard=guard)
    assert len(driver.mapped) == 2 and changes(memory) == {}
    block[WINDOW + 1], block[1 << 27] = 0, 9
    assert changes(memory) == {WINDOW + 1: 0, 1 << 27: 9}


def test_blocks_of_the_last_calls_shape_stay_mapped_and_are_zero_again(driver):
    memory = gpu.GpuMemory("guard pages")
    first = mapped(memory)
    first[1 << 27] = 9
    maps = driver.calls["cuMemMap"]
    second = mapped(memory)
    assert driver.calls["cuMemMap"] == maps and second.data_ptr() == first.data_ptr()
    assert changes(memory) == {} and second[WINDOW : WINDOW + 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("other", [{"size": FAR + 8}, {"guard": "left"}, {"at": 1 << 26}])
def test_a_block_of_another_shape_leaves_nothing_of_the_last_one_mapped(driver, other):
    memory = gpu.GpuMemory("guard pages")
    mapped(memory)
    before = set(driver.mapped)
    mapped(memory, **other)
    assert len(driver.mapped) == 2 and len(driver.reserved) == 1 and driver.calls["cuMemUnmap"] == len(before)
    assert changes(memory) == {}


def test_what_is_large_is_unmapped_at_once(driver, monkeypatch):
    monkeypatch.setattr(gpu, "LARGE", GRANULE)
    memory = gpu.GpuMemory("guard pages")
    mapped(memory)
    memory._space.release(memory._blocks)
    assert not driver.mapped and not driver.reserved


def test_beside_a_small_block_the_margin_is_compared_and_made_anew(driver):
    memory = gpu.GpuMemory("guard pages")
    small = {"size": len(SMALL), "guard": "left", "at": 100, "window": 0, "data": SMALL}
    block = mapped(memory, **small)
    beyond = torch.from_numpy(arena.bytes_at(block.data_ptr(), GRANULE))
    assert changes(memory) == {}
    block[WINDOW], beyond[len(SMALL) + 3] = 7, 0
    assert changes(memory) == {WINDOW: 7, len(SMALL) + 3: 0}
    mapped(memory, **small)
    assert changes(memory) == {}


def test_plain_allocations_are_free_with_the_next_call_whoever_holds_a_view(driver):
    memory = gpu.GpuMemory("plain allocations")
    held = mapped(memory, size=1 << 21, at=0)
    held[5] = 9
    fresh = mapped(memory, size=1 << 21, at=0)
    assert held.untyped_storage().size() == 0 and fresh.untyped_storage().size() == 1 << 21
    assert changes(memory) == {}


def test_of_a_plain_allocation_every_changed_byte_is_told_once_however_often_it_was_filled(driver, monkeypatch):
    monkeypatch.setattr(gpu, "HUGE", 1 << 20)
    memory = gpu.GpuMemory("plain allocations")
    block = mapped(memory, size=1 << 21, at=0)
    memory._write()  # as before a graph is captured
    block[WINDOW + 1] = 0
    ((positions, values),) = memory.changes()
    assert positions.tolist() == [WINDOW + 1] and values.tolist() == [0]
