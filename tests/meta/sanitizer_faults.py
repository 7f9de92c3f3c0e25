"""Faults that compute-sanitizer must see before `ci/sanitize` trusts it; each stands in for `cu_seqlens`."""

import ctypes

import torch
import triton
import triton.language as tl

CUDA = r"""
extern "C" __global__ void race(int *out) {
    __shared__ int cell[64];
    cell[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = cell[(threadIdx.x + 33) % 64];
}
extern "C" __global__ void barrier(int *out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = threadIdx.x;
}
"""


def honest(*, seqlens, cu_seqlens):
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)


@triton.jit
def _load(source, into, offset):
    tl.store(into, tl.load(source + offset))


@triton.jit
def _store(into, offset):
    tl.store(into + offset, 1)


def read_past_the_end(*, seqlens, cu_seqlens):
    honest(seqlens=seqlens, cu_seqlens=cu_seqlens)
    _load[(1,)](seqlens, torch.zeros(1, dtype=torch.int32, device=seqlens.device), len(seqlens) * seqlens.stride(0))


def write_past_the_end(*, seqlens, cu_seqlens):
    honest(seqlens=seqlens, cu_seqlens=cu_seqlens)
    own = torch.zeros(4, dtype=torch.int32, device=seqlens.device)
    _store[(1,)](own, 4)


def read_before_write(*, seqlens, cu_seqlens):
    honest(seqlens=seqlens, cu_seqlens=cu_seqlens)
    torch.utils.deterministic.fill_uninitialized_memory = False
    scratch = torch.empty(64, dtype=torch.int32, device=seqlens.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _load[(1,)](scratch, torch.zeros(1, dtype=torch.int32, device=seqlens.device), 7)


def _launch(name: str, threads: int, device) -> None:
    """One block of a CUDA C++ kernel, compiled at run time."""
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    _, program = nvrtc.nvrtcCreateProgram(CUDA.encode(), b"faults.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"-lineinfo"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    status, module = driver.cuModuleLoadData(bytes(code))
    assert status == driver.CUresult.CUDA_SUCCESS, status
    _, function = driver.cuModuleGetFunction(module, name.encode())
    out = torch.zeros(threads, dtype=torch.int32, device=device)
    driver.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, 0, ((out.data_ptr(),), (ctypes.c_void_p,)), 0)
    torch.cuda.synchronize()


def shared_memory_race(*, seqlens, cu_seqlens):
    honest(seqlens=seqlens, cu_seqlens=cu_seqlens)
    _launch("race", 64, seqlens.device)


def divergent_barrier(*, seqlens, cu_seqlens):
    honest(seqlens=seqlens, cu_seqlens=cu_seqlens)
    _launch("barrier", 64, seqlens.device)
