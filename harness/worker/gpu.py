"""The GPU's memory tier: every block flush against unmapped address space, so that one element past it is a fault.

Blocks of up to 1 MiB lie in slots that stay mapped; larger ones (far tables) are mapped only where a cell may be used.
Without cuda-bindings, or for compute-sanitizer, blocks are plain allocations with red zones.
"""

import fcntl
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .arena import DENSE_LIMIT, PAGE, differences, image, joined

MARGIN = 1 << 16  # bytes beside a block in its slot that are compared as well
CANARY = 0xA5
PATIENCE = 0.05  # seconds that inputs are late, at most
HUGE = 2 << 30  # larger plain allocations are not searched for stray bytes
LARGE = 256 << 20  # calls that map more than this take turns on a GPU
KINDS = {"CUDA_ERROR_ILLEGAL_ADDRESS": "illegal address", "CUDA_ERROR_MISALIGNED_ADDRESS": "misaligned address",
         "CUDA_ERROR_ASSERT": "device assert", "CUDA_ERROR_LAUNCH_FAILED": "launch failure",
         "CUDA_ERROR_LAUNCH_TIMEOUT": "launch timeout", "CUDA_ERROR_ILLEGAL_INSTRUCTION": "illegal instruction"}


class GpuMemory:
    """The blocks of one call on the current GPU. Nothing touches CUDA before the first call: the parent forks."""

    def __init__(self, guards: str):
        self.guards = guards
        self.counts = {"launches": 0, "compilations": 0}
        self._hooked = False
        self._space = self._probe = None
        self._barrier = None
        self._blocks: list = []
        self._windows: list[list[tuple[int, np.ndarray]]] = []

    def map(self, memory: dict, blobs: list) -> None:
        """Fresh blocks with the given contents."""
        if self._space is None:
            torch.cuda.init()
            self._probe = torch.zeros(1, device="cuda")
            self._space = GuardPages() if self.guards == "guard pages" else PlainAllocations()
        self._space.release(self._blocks)
        self._windows = [[] for _ in memory["blocks"]]
        for (block, offset, _), data in zip(memory["windows"], blobs):
            self._windows[block].append((offset, np.frombuffer(data, dtype=np.uint8)))
        used = _used(memory)
        self._graph = None
        self._blocks = [self._space.block(b["bytes"], b["guard"], used[k]) for k, b in enumerate(memory["blocks"])]
        self._write()

    def refill(self, memory: dict, blobs: list) -> bool:
        """Other contents in the blocks of the last call, at the same addresses; False if a block is too large for that."""
        if any(isinstance(block, _Region) for block in self._blocks):
            return False
        self._windows = [[] for _ in memory["blocks"]]
        for (block, offset, _), data in zip(memory["windows"], blobs):
            self._windows[block].append((offset, np.frombuffer(data, dtype=np.uint8)))
        self._write()
        return True

    def _write(self) -> None:
        for block, windows in zip(self._blocks, self._windows):
            for offset, data in windows:
                block.write(offset, data)

    def bytes(self, block: int, start: int, size: int) -> torch.Tensor:
        """Part of a block as a uint8 tensor."""
        return self._blocks[block].tensor.narrow(0, start + self._blocks[block].inset, size)

    def watch(self, memory: dict, header: dict, phase) -> None:
        """Nothing is watched access by access; but a compilation is told apart from the run, so that it is no hang."""
        torch.cuda.synchronize()
        from triton import knobs

        def compiling(**_) -> None:
            phase("compile")

        def compiled(**_) -> None:
            self.counts["compilations"] += 1
            phase("run")

        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = compiling, compiled
        if not self._hooked:
            self._hooked = True
            knobs.runtime.launch_enter_hook.add(self._launched)

    def _launched(self, _) -> None:
        self.counts["launches"] += 1

    def call(self, mode: str, function, again: bool):
        """Run in a captured graph (captured now, or `again` the one of the last call), or on a stream of its own behind a
        producer that is late with every input."""
        return self._late(function) if mode == "side stream" else self._graphed(function, again)

    def _graphed(self, function, again: bool):
        if not again:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                self._returned = function()  # compiles, and whatever else happens only once
            torch.cuda.synchronize()
            self._write()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage first, which takes longer than the rest
                self._graph.capture_begin()
                try:
                    function()
                finally:
                    self._graph.capture_end()
        self._graph.replay()
        return self._returned

    def _late(self, function):
        staged = [b for b in self._blocks if not isinstance(b, _Region)]
        contents = [b.tensor.clone() for b in staged]
        for block in staged:
            block.tensor.narrow(0, block.inset, block.size).zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        self._barrier = self._barrier or _Barrier()
        with torch.cuda.stream(stream), self._barrier.before(stream):
            for block, content in zip(staged, contents):
                block.tensor.copy_(content)
            returned = function()
        torch.cuda.synchronize()
        return returned

    def settle(self) -> dict | str:
        """Wait for the GPU; a fault leaves the process without a usable context."""
        from cuda.bindings import driver

        (status,) = driver.cuCtxSynchronize()
        if status == driver.CUresult.CUDA_SUCCESS:
            return ""
        return {"kind": KINDS.get(status.name, status.name), "detail": f"{status.name} on the GPU"}

    def unread_error(self) -> RuntimeError | None:
        """The error of a launch that the call did not look at. CUDA would tell it to whoever looks next."""
        try:
            self._probe.fill_(0)
        except RuntimeError as error:
            return RuntimeError(f"the call left an error behind that it did not look at: {str(error).splitlines()[0]}")
        return None

    def findings(self) -> list[dict]:
        """Findings of this tier are faults."""
        return []

    def changes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each block the bytes that the call changed: their positions, and what stands there now."""
        found = []
        for block, windows in zip(self._blocks, self._windows):
            parts = []
            for lo, after in block.read():
                before = image(lo, lo + len(after), windows)
                before[: max(0, -lo)] = CANARY
                before[max(0, block.size - lo) :] = CANARY
                parts.append(differences(lo, before, after))
            found.append(joined(parts))
        return found


class _Barrier:
    """Holds a stream until the host has issued everything behind it, however slow the host is today; or until its patience
    ends, because a call that waits for the GPU would wait forever."""

    def __init__(self):
        self._flag = torch.zeros(1, dtype=torch.int32).pin_memory()

    @contextmanager
    def before(self, stream: torch.cuda.Stream):
        from cuda.bindings import driver

        self._flag.zero_()
        at_least = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        (status,) = driver.cuStreamWaitValue32(stream.cuda_stream, self._flag.data_ptr(), 1, at_least)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the GPU cannot hold a stream back: {status.name}")
        end = threading.Timer(PATIENCE, self._flag.fill_, (1,))
        end.start()
        try:
            yield
        finally:
            end.cancel()
            self._flag.fill_(1)


def _used(memory: dict) -> list[list[tuple[int, int]]]:
    """For every block the byte ranges that hold a cell which may be used, or that have contents."""
    used: list[list[tuple[int, int]]] = [[] for _ in memory["blocks"]]
    for block, byte, count, step, flags in memory["access"]:
        if flags and count:
            itemsize = 16  # at least any dtype's
            used[block].append((byte, byte + (count - 1) * step + itemsize))
    for block, offset, size in memory["windows"]:
        used[block].append((offset, offset + size))
    for view in memory["tensors"].values():  # torch and Triton ask the driver about the first byte of a tensor
        used[view["block"]] += [(0, 1), (view["start"], view["start"] + 1)]
    return used


def runs(pages: np.ndarray) -> list[tuple[int, int]]:
    """Page numbers, in any order, as address ranges of neighbours."""
    pages = np.unique(pages)
    return [(int(run[0]) * PAGE, (int(run[-1]) + 1) * PAGE) for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1)
            if len(run)]


class GuardPages:
    """Device memory mapped piece by piece into reserved address space."""

    def __init__(self):
        from cuda.bindings import driver

        self._driver = driver
        self._where = driver.CUmemLocation()
        self._where.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._where.id = torch.cuda.current_device()
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location = self._where
        self._may = driver.CUmemAccessDesc()
        self._may.location = self._where
        self._may.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granule = self.ask(driver.cuMemGetAllocationGranularity(self._kind, flag))
        self._idle: list[_Slot] = []
        self._kept: list[_Region] = []
        self._pieces: list = []
        self._turn = _Turn()

    def ask(self, answer):
        """A driver call's result, or an error that names it."""
        status, *rest = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise MemoryError(f"the driver answered {status.name}")
        return rest[0] if rest else None

    def block(self, size: int, guard: str, used: list[tuple[int, int]]):
        """A block whose end (guard right) or start (guard left) is flush with unmapped addresses."""
        if size <= min(DENSE_LIMIT, self.granule):
            slot = self._idle.pop() if self._idle else _Slot(self)
            slot.place(size, guard)
            return slot
        shape = _shape(size, guard, used, self.granule)
        for region in self._kept:
            if region.shape == shape:
                self._kept.remove(region)
                region.clear()
                return region
        self._free(self._kept)
        return _Region(self, shape)

    def release(self, blocks: list) -> None:
        """Take the blocks of the last call back. An example is run several times, with blocks of the same shapes: mapping
        is slow, and slower where other processes map, so what the last call had stays mapped for the next."""
        self._free(self._kept)
        for block in blocks:
            if isinstance(block, _Slot):
                self._idle.append(block)
            else:
                self._kept.append(block)
        if sum(region.mapped_bytes() for region in self._kept) > LARGE:
            self._free(self._kept)
        self._turn.done()

    @staticmethod
    def _free(regions: list) -> None:
        while regions:
            regions.pop().free()

    # -- address space ----------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        return int(self.ask(self._driver.cuMemAddressReserve(size, self.granule, 0, 0)))

    def give_back(self, address: int, size: int) -> None:
        self.ask(self._driver.cuMemAddressFree(address, size))

    def map_piece(self, address: int):
        """Back one granule of address space with zeroed memory; returns the piece for `unmap_piece`."""
        piece = self._pieces.pop() if self._pieces else self.ask(self._driver.cuMemCreate(self.granule, self._kind, 0))
        self.ask(self._driver.cuMemMap(address, self.granule, 0, piece, 0))
        self.ask(self._driver.cuMemSetAccess(address, self.granule, [self._may], 1))
        self.zero(address)
        return piece

    def zero(self, address: int) -> None:
        self.ask(self._driver.cuMemsetD8(address, 0, self.granule))

    def unmap_piece(self, address: int, piece) -> None:
        self.ask(self._driver.cuMemUnmap(address, self.granule))
        self._pieces.append(piece)

    def take_turn(self, size: int) -> None:
        if size > LARGE:
            self._turn.take()

    def to_device(self, address: int, data: np.ndarray) -> None:
        self.ask(self._driver.cuMemcpyHtoD(address, data.ctypes.data, len(data)))

    def to_host(self, address: int, size: int) -> np.ndarray:
        data = np.empty(size, dtype=np.uint8)
        self.ask(self._driver.cuMemcpyDtoH(data.ctypes.data, address, size))
        return data


class _Slot:
    """One mapped granule between two unmapped ones, used for one block after another."""

    def __init__(self, space: GuardPages):
        self._space = space
        base = space.reserve(3 * space.granule)
        self._address = base + space.granule
        self._piece = space.map_piece(self._address)
        space.ask(space._driver.cuMemsetD8(self._address, CANARY, space.granule))
        self.tensor = _tensor(self._address, space.granule)
        self.size = self.inset = 0

    def place(self, size: int, guard: str) -> None:
        """Put a block of `size` bytes at the guarded end; what an earlier block left becomes canary again."""
        if self.size:
            lo = max(0, self.inset - MARGIN)
            hi = min(self._space.granule, self.inset + self.size + MARGIN)
            self._space.ask(self._space._driver.cuMemsetD8(self._address + lo, CANARY, hi - lo))
        self.size = size
        self.inset = self._space.granule - size if guard == "right" else 0

    def write(self, offset: int, data: np.ndarray) -> None:
        self._space.to_device(self._address + self.inset + offset, data)

    def read(self) -> list[tuple[int, np.ndarray]]:
        """The block and the margin beside it, as (offset, bytes)."""
        lo = max(0, self.inset - MARGIN)
        hi = min(self._space.granule, self.inset + self.size + MARGIN)
        return [(lo - self.inset, self._space.to_host(self._address + lo, hi - lo))]


@dataclass(frozen=True)
class _Shape:
    """Where a large block lies in its granules, and which of them are mapped: `size` bytes, `shift` bytes into the first."""

    size: int
    shift: int
    granules: int
    mapped: tuple[int, ...]


def _shape(size: int, guard: str, used: list[tuple[int, int]], granule: int) -> _Shape:
    granules = -(-size // granule)
    shift = granules * granule - size if guard == "right" else 0
    mapped: set[int] = set()
    for lo, hi in used:
        mapped.update(range((shift + lo) // granule, (shift + min(hi, size) - 1) // granule + 1))
    return _Shape(size, shift, granules, tuple(sorted(mapped)))


class _Region:
    """A large block, mapped only in the granules that hold something."""

    inset = 0

    def __init__(self, space: GuardPages, shape: _Shape):
        self._space, self.shape, self.size = space, shape, shape.size
        self._reserved = (shape.granules + 2) * space.granule
        self._base = space.reserve(self._reserved)
        first = self._base + space.granule
        self._address = first + shape.shift
        space.take_turn(self.mapped_bytes())
        self._mapped = {first + k * space.granule: None for k in shape.mapped}
        for address in self._mapped:
            self._mapped[address] = space.map_piece(address)
        self.tensor = _tensor(self._address, self.size)
        self._written: list[tuple[int, int]] = []

    def mapped_bytes(self) -> int:
        return len(self.shape.mapped) * self._space.granule

    def clear(self) -> None:
        """Zero again, as if just mapped."""
        self._written = []
        for address in self._mapped:
            self._space.zero(address)

    def write(self, offset: int, data: np.ndarray) -> None:
        self._space.to_device(self._address + offset, data)
        self._written.append((self._address + offset, self._address + offset + len(data)))

    def read(self) -> list[tuple[int, np.ndarray]]:
        """What was written before the call and what is not zero after it, by pages, as (offset, bytes)."""
        written = [np.arange(lo // PAGE, -(-hi // PAGE)) for lo, hi in self._written]
        parts = []
        for lo, hi in runs(np.concatenate([self._not_zero(), *written])):
            lo, hi = max(lo, self._address), min(hi, self._address + self.size)
            if lo < hi:
                parts.append((lo - self._address, self._space.to_host(lo, hi - lo)))
        return parts

    def _not_zero(self) -> np.ndarray:
        """The numbers of the mapped pages with a byte that is not zero; the GPU looks, since copying them takes longer."""
        if not self._mapped:
            return np.zeros(0, dtype=np.int64)
        granule = self._space.granule
        looked = [_tensor(a, granule).view(torch.int64).view(-1, PAGE // 8).any(1) for a in self._mapped]
        found = np.flatnonzero(torch.cat(looked).cpu().numpy())
        bases = np.fromiter(self._mapped, dtype=np.int64) // PAGE
        return bases[found // (granule // PAGE)] + found % (granule // PAGE)

    def free(self) -> None:
        for address, piece in self._mapped.items():
            self._space.unmap_piece(address, piece)
        self._space.give_back(self._base, self._reserved)


class PlainAllocations:
    """One allocation a block: red zones and the tensors' own bounds, no guard pages."""

    def __init__(self):
        self._turn = _Turn()

    def block(self, size: int, guard: str, used: list[tuple[int, int]]):
        if size > LARGE:
            self._turn.take()
        return _Allocation(size)

    def release(self, blocks: list) -> None:
        """Their memory is free now, whoever still holds a view: a subject may, and under compute-sanitizer the arguments of
        past calls stay alive."""
        for block in blocks:
            block.tensor.untyped_storage().resize_(0)
        blocks.clear()
        self._turn.done()


class _Allocation:
    inset = 0

    def __init__(self, size: int):
        self.size, self.tensor = size, torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._written: list[tuple[int, int]] = []

    def write(self, offset: int, data: np.ndarray) -> None:
        self.tensor[offset : offset + len(data)] = torch.from_numpy(data.copy()).to(self.tensor.device)
        if (span := (offset, offset + len(data))) not in self._written:  # written again where a graph was captured between
            self._written.append(span)

    def read(self) -> list[tuple[int, np.ndarray]]:
        """Small blocks whole; of large ones the windows and every other byte that is no longer zero; of those that fill a
        card only the windows, since compute-sanitizer needs as much memory again."""
        if self.size <= DENSE_LIMIT:
            return [(0, self.tensor.cpu().numpy())]
        parts = [(lo, self.tensor[lo:hi].cpu().numpy()) for lo, hi in self._written]
        if self.size > HUGE:
            return parts
        for lo in range(0, self.size, 1 << 30):
            hi = min(self.size, lo + (1 << 30))
            rest = self.tensor[lo:hi].clone()
            for a, b in self._written:
                rest[max(0, a - lo) : max(0, min(b, hi) - lo)] = 0
            for byte in torch.nonzero(rest)[:64, 0].tolist():
                parts.append((lo + byte, rest[byte : byte + 1].cpu().numpy()))
        return parts


class _Turn:
    """Large calls of several workers, one after the other."""

    def __init__(self):
        name = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        self._path = Path(tempfile.gettempdir()) / f"plumbline-{name}.lock"
        self._file = None

    def take(self) -> None:
        if self._file is None:
            self._file = self._path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def done(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _tensor(address: int, size: int) -> torch.Tensor:
    """Device memory that is not torch's own, as a uint8 tensor."""
    interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None}
    holder = type("Memory", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(holder, device="cuda")
