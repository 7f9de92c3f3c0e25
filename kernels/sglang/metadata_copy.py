"""SGLang's fused metadata copies: CUDA C++, compiled on first use, so on a GPU only. Needs apache-tvm-ffi and nvcc.

Upstream's own wrapper is called. What it imports to compile with belongs to the whole runtime; `_Build` stands in for it.
"""

import functools
import importlib.util
import os
import sys
import types

import torch

from . import _upstream

VERSION = _upstream.version()
ON_A_GPU_ONLY = True
BACKENDS, DECODE = 3, 0
LINEAR = ("real_page_table_src", "flashmla_num_splits_src", "flashmla_metadata_src")  # the wrapper makes the rest contiguous


class _Build(types.ModuleType):
    """The three names that the wrapper takes from SGLang's JIT utilities."""

    cache_once = staticmethod(functools.cache)

    def __init__(self, name: str, folder):
        super().__init__(name)
        self.folder = folder

    @staticmethod
    def make_cpp_args(*args: int | bool) -> "_Arguments":
        return _Arguments(str(a).lower() for a in args)

    def load_jit(self, *names: str, cuda_files: list[str], cuda_wrappers: list[tuple[str, str]]):
        from tvm_ffi.cpp import load_inline

        major, minor = torch.cuda.get_device_capability()
        lines = [f'#include "{self.folder / "csrc" / file}"' for file in cuda_files]
        exports = [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, ({code}));" for name, code in cuda_wrappers]
        lines += ["namespace sglang {", *exports, "}"]  # where newer versions keep their kernels
        return load_inline(
            "_".join(("sglang", *names)), cuda_sources="\n".join(lines), extra_include_paths=[str(self.folder / "include")],
            extra_cuda_cflags=["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-DSGL_CUDA_ARCH={major}{minor}0"])


class _Arguments(tuple):
    """Template arguments; as text, what stands between the angle brackets."""

    def __str__(self) -> str:
        return ", ".join(self)


def _wrapper() -> types.ModuleType | None:
    folder = _upstream.root()
    for name, home in (("sglang.jit_kernel.utils", "jit_kernel"), ("sglang.kernels.jit.utils", "kernels/jit")):
        if folder and (folder / home / "csrc").is_dir():
            sys.modules[name] = _Build(name, folder / home)
    return _upstream.home("fused_metadata_copy_multi_cuda")


def _missing() -> str:
    if not _upstream.file_of("fused_metadata_copy_multi_cuda"):
        return "this SGLang has no fused metadata copies"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "CUDA C++: on a GPU only"
    return "" if importlib.util.find_spec("tvm_ffi") else "needs apache-tvm-ffi to compile: pip install apache-tvm-ffi"


MISSING = {name: reason for name in ("fused_metadata_copy", "fused_metadata_copy_multi") if (reason := _missing())}


def supports(case):
    """What the kernels take for granted: destinations without a pitch, like backends."""
    fields, places = case["case"], case["layout"]["places"]
    for name, place in places.items():
        linear = "_dst" in name or name in LINEAR
        if linear and place["kind"] not in ("contiguous", "offset"):
            return f"a contiguous {name.split('[')[0]}: the kernel indexes it linearly"
    if not fields["requests"] or not fields.get("width", 1):
        return "at least one request and one column: there are as many blocks as the table has cells, and no launch has none"
    if len({str(b) for b in fields.get("backends", ())}) > 1:
        return "backends with the same buffers: the pitches of the first count for all"
    return True


def _single(*, page_indices_src, forward_mode, bs, max_len, max_seqlen_k, **tensors):
    decode = forward_mode == DECODE  # docstring: [bs, max_len] in decode, otherwise [rows, max_seqlen_k]
    rows = page_indices_src[:bs, :max_len] if decode else page_indices_src[:, :max_seqlen_k]
    tensors |= {"page_indices_src": rows, "forward_mode": forward_mode, "bs": bs, "max_len": max_len,
                "max_seqlen_k": max_seqlen_k}
    _KERNELS.fused_metadata_copy_cuda(**{_renamed(name): value for name, value in tensors.items()})


def _multi(*, bs, max_len, seqlens_expanded_size, **tensors):
    """Three backends a launch; where there are fewer, the last one stands in for the others."""
    count = len(tensors["cache_seqlens_dst"])
    tensors["page_indices_src"] = tensors["page_indices_src"][:bs, :max_len]  # docstring: [bs, max_len]
    for first in range(0, count, BACKENDS):
        arguments = {"bs": bs, "max_len": max_len, "seqlens_expanded_size": seqlens_expanded_size}
        for name, value in tensors.items():
            each = {f"{name}{b}": value[min(first + b, count - 1)] for b in range(BACKENDS)} if isinstance(value, list) else {}
            arguments |= each or {name: value}
        _KERNELS.fused_metadata_copy_multi_cuda(**{_renamed(name): value for name, value in arguments.items()})


def _renamed(name: str) -> str:
    """NSA became DSA in 2026."""
    return name if "nsa_cu_seqlens_k_src" in _ARGUMENTS else name.replace("nsa_", "dsa_")


if not MISSING:
    _KERNELS = _wrapper()
    _ARGUMENTS = _KERNELS.fused_metadata_copy_cuda.__code__.co_varnames
    fused_metadata_copy = _single
    fused_metadata_copy_multi = _multi
