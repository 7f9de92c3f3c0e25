"""CPU memory for the tensors of a call: reserved address space, one far-apart slot per block.

Slots are 64 GiB wide and blocks lie in their middle, so an index that leaves its tensor by less than 16 GiB can only
reach inaccessible addresses. Untouched pages cost nothing, whatever a block's size.
"""

import ctypes
import os

import numpy as np

PAGE = 4096
SLOT_BITS = 36
SLOTS = 96
INSET = 20 << 30
DENSE_LIMIT = 1 << 20

_PROT_NONE, _PROT_RW = 0, 3
_PRIVATE_ANONYMOUS_NORESERVE = 0x02 | 0x20 | 0x4000
_FIXED = 0x10
_MADV_NOHUGEPAGE = 15

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def reserve(size: int, prot: int = _PROT_NONE, at: int | None = None) -> int:
    """Reserve address space that is backed by nothing yet; returns its address."""
    flags = _PRIVATE_ANONYMOUS_NORESERVE | (_FIXED if at is not None else 0)
    address = _libc.mmap(at, size, prot, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"cannot reserve {size} bytes of address space")
    _libc.madvise(address, size, _MADV_NOHUGEPAGE)
    return address


def release(address: int, size: int) -> None:
    """Give address space back."""
    _check(_libc.munmap(address, size))


def bytes_at(address: int, size: int) -> np.ndarray:
    """The bytes at an address as a writable uint8 array."""
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=np.uint8)


class Block:
    """One mapped allocation and what it held before the call."""

    def __init__(self, address: int, size: int):
        self.address, self.size = address, size
        self.windows: list[tuple[int, np.ndarray]] = []

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes that differ from before the call: their positions, ascending, and what stands there now."""
        ranges = [(0, self.size)] if self.size <= DENSE_LIMIT else self._touched()
        return joined([differences(lo, image(lo, hi, self.windows), bytes_at(self.address + lo, hi - lo)) for lo, hi in ranges])

    def _touched(self) -> list[tuple[int, int]]:
        """The byte ranges of pages that were ever accessed: every other page still reads as zero."""
        resident = np.zeros(self.size // PAGE, dtype=np.uint8)
        _check(_libc.mincore(self.address, self.size, resident.ctypes.data))
        words = np.flatnonzero(resident[: len(resident) // 8 * 8].view(np.uint64))  # a far table has millions of pages
        candidates = np.r_[(words[:, None] * 8 + np.arange(8)).reshape(-1), len(resident) // 8 * 8 : len(resident)]
        pages = candidates[resident[candidates] & 1 != 0]
        if not len(pages):
            return []
        cuts = np.flatnonzero(np.diff(pages) > 1)
        firsts, lasts = pages[np.r_[0, cuts + 1]], pages[np.r_[cuts, len(pages) - 1]]
        return [(int(a) * PAGE, (int(b) + 1) * PAGE) for a, b in zip(firsts, lasts)]


def image(lo: int, hi: int, windows: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The bytes [lo, hi) of a block as they were: zero, except where a window (offset, bytes) says otherwise."""
    before = np.zeros(hi - lo, dtype=np.uint8)
    for offset, data in windows:
        if offset < hi and lo < offset + len(data):
            a, b = max(lo, offset), min(hi, offset + len(data))
            before[a - lo : b - lo] = data[a - offset : b - offset]
    return before


def differences(base: int, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where two images of the bytes from `base` on differ, and what the second has there."""
    changed = np.flatnonzero(before != after)
    return changed + base, after[changed]


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The differences of several ranges as those of one."""
    if len(parts) == 1:
        return parts[0]
    positions, values = zip(*parts) if parts else ([np.zeros(0, np.int64)], [np.zeros(0, np.uint8)])
    return np.concatenate(positions), np.concatenate(values)


class Arena:
    """Blocks in reserved, otherwise inaccessible address space."""

    def __init__(self):
        self.base = reserve(SLOTS << SLOT_BITS)
        self.blocks: list[Block] = []

    def map(self, sizes: list[int]) -> None:
        """Replace all blocks by fresh, zeroed ones of `sizes` bytes (multiples of the page)."""
        if len(sizes) > SLOTS:
            raise ValueError(f"a call may have at most {SLOTS} blocks, this one has {len(sizes)}")
        for block in self.blocks:
            reserve(block.size, _PROT_NONE, at=block.address)
        self.blocks = []
        for slot, size in enumerate(sizes):
            address = self.base + (slot << SLOT_BITS) + INSET
            reserve(size, _PROT_RW, at=address)
            self.blocks.append(Block(address, size))

    def fill(self, block: int, offset: int, data: np.ndarray) -> None:
        """Write a window's bytes."""
        target = self.blocks[block]
        bytes_at(target.address + offset, len(data))[:] = data
        target.windows.append((offset, data))

    def block_of(self, address: int) -> int | None:
        """The block whose slot an address lies in."""
        slot = (address - self.base) >> SLOT_BITS
        return slot if 0 <= slot < len(self.blocks) else None
