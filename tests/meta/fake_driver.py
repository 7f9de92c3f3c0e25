"""The part of CUDA's driver API that guard pages are made with, on this machine's own memory."""

import ctypes
import enum
from collections import Counter
from types import SimpleNamespace

from harness.worker import arena

GRANULE = 1 << 21
STALE = 0xEE  # what fresh device memory may hold


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """Counts its calls, and knows what is mapped."""

    CUresult = CUresult
    CUmemLocation = CUmemAllocationProp = CUmemAccessDesc = SimpleNamespace
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self):
        self.calls, self.mapped, self.reserved = Counter(), set(), {}

    def __getattribute__(self, name: str):
        if name.startswith("cuMem"):
            self.calls[name] += 1
        return super().__getattribute__(name)

    def cuMemGetAllocationGranularity(self, kind, flag):
        return CUresult.CUDA_SUCCESS, GRANULE

    def cuMemAddressReserve(self, size, alignment, wanted, flags):
        raw = arena.reserve(size + GRANULE)
        address = -(-raw // GRANULE) * GRANULE
        self.reserved[address] = raw, size + GRANULE
        return CUresult.CUDA_SUCCESS, address

    def cuMemAddressFree(self, address, size):
        arena.release(*self.reserved.pop(address))
        return (CUresult.CUDA_SUCCESS,)

    def cuMemCreate(self, size, kind, flags):
        return CUresult.CUDA_SUCCESS, self.calls["cuMemCreate"]

    def cuMemMap(self, address, size, offset, piece, flags):
        if address in self.mapped:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        arena.reserve(size, 3, at=address)
        arena.bytes_at(address, size)[:] = STALE
        self.mapped.add(address)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, size, who, count):
        return (CUresult.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, size):
        self.mapped.remove(address)
        arena.reserve(size, at=address)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8(self, address, value, size):
        arena.bytes_at(address, size)[:] = value
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoD(self, address, source, size):
        ctypes.memmove(address, source, size)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, target, address, size):
        ctypes.memmove(target, address, size)
        return (CUresult.CUDA_SUCCESS,)
