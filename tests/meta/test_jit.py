"""How often our kernels are compiled: Triton itself says what it would compile anew for. Nothing is compiled here."""

import re
import subprocess
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from harness.client import ROOT
from kernels._jit import jit, typical

KNOW_ALIGNMENT = {"index_cache": {"_get", "_get_k_and_s", "_set_k_and_s", "_fused_store", "_quantize_k_cache",
                                  "_dequantize_k_cache"}, "seqlens": {"_nsa_cache_seqlens"}}  # each says why in its file
WIDTHS = """
import importlib, sys, types
sys.path.insert(0, ".")
sys.modules["compiled"] = types.ModuleType("compiled")
sys.modules["compiled"].__path__ = ["kernels"]
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}
names = ("_launch", "_jit", "metadata_copy", "index_cache")
_launch, _jit, copy, cache = (importlib.import_module(f"compiled.{n}") for n in names)
importlib.import_module("compiled._checks").device_of = lambda name, tensor: tensor.device
ints = lambda *shape: torch.zeros(shape, dtype=torch.int32)
bytes_ = lambda *shape: torch.zeros(shape, dtype=torch.uint8)
one = dict(cache_seqlens=ints(8), cu_seqlens_k=ints(9), nsa_cache_seqlens=ints(8), nsa_cu_seqlens_k=ints(9))
kept = one | dict(page_table_1=ints(8, 4096), real_page_table=ints(8, 64))
absent = dict.fromkeys(("seqlens_expanded", "flashmla_num_splits", "flashmla_metadata"))
for width in (*range(1000, 1020), 1024, 40, 2048):
    new = one | absent | dict(page_indices=ints(8, width), real_page_table=ints(8, -(-width // 64) + 1))
    with _launch._recorder() as launches:
        copy.fused_metadata_copy(**{f"{n}_src": t for n, t in new.items()}, **{f"{n}_dst": t.clone() for n, t in kept.items()},
                                 **{f"{n}_dst": None for n in absent}, forward_mode=0, bs=8, max_len=width, max_seqlen_k=width,
                                 seqlens_expanded_size=8)
        cache.get_k_and_s(buf=bytes_(64, 8448), page_indices=ints(8, width), seq_lens=ints(8), k_out=bytes_(64, 128),
                          s_out=bytes_(64, 4), seq_len_sum=64, max_seq_len=8, page_size=64)
    for kernel, _, args, constants in launches:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found.setdefault(kernel.__name__, set()).add(str(bind(*_jit.typical(kernel, args), **constants)[1]))
print({name: len(kinds) for name, kinds in found.items()})
"""
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
MEMORY = torch.zeros(256, dtype=torch.uint8)
FIRST = -MEMORY.data_ptr() % 16


def copied(out, source, tables, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i, mask=i < n, other=0) + tl.load(tables[0] + i * tables[1], mask=i < n), mask=i < n)


def compiled_for(kernel, args: list) -> str:
    """What Triton tells apart: of all that it is given, the types, the constants and whatever it looked at."""
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    return str(bind(*args, BLOCK=64)[1])


def int32(byte: int) -> torch.Tensor:
    return MEMORY[FIRST + byte :][:64].view(torch.int32)


def calls(out=0, source=0, table=0, stride=5, n=7) -> list:
    return [int32(out), int32(source), (int32(table), stride), n]


DIFFERENT = [calls(out=4), calls(source=4), calls(table=4), calls(out=4, stride=1), calls(out=4, stride=16), calls(out=4, n=1),
             calls(out=4, n=16)]


def kinds(kernel, every) -> set[str]:
    return {compiled_for(kernel, typical(kernel, args)) for args in every}


def jitted() -> JITFunction:
    """Not `jit` itself, which in a process that interprets kernels makes none to compile."""
    asked: dict = {}
    stock, triton.jit = triton.jit, lambda function, **kwargs: asked.update(kwargs)
    try:
        jit(copied)
    finally:
        triton.jit = stock
    return JITFunction(copied, **asked)


def test_triton_itself_compiles_for_each_of_them():
    assert len({compiled_for(JITFunction(copied), args) for args in DIFFERENT}) == len(DIFFERENT)


def test_one_kernel_for_all_numbers_and_addresses():
    assert len(kinds(JITFunction(copied), DIFFERENT)) == 1
    assert len(kinds(jitted(), [calls(table=4), calls(4, 4, 4), calls(table=4, stride=1), calls(table=4, n=16)])) == 1


def test_what_is_aligned_is_compiled_as_it_is():
    plain, unmarked = jitted(), JITFunction(copied)
    assert compiled_for(unmarked, typical(unmarked, calls())) == compiled_for(unmarked, calls())
    assert len(kinds(plain, [calls(stride=1), calls(stride=16), calls(stride=5)])) == 3
    assert len(kinds(plain, [calls(out=4), calls(source=8), calls(n=1)])) == 1


def test_what_must_be_told_apart_is():
    kernel = jitted()
    wide = [MEMORY[FIRST:][:128].view(torch.int64), *calls(table=4)[1:]]
    missing = [calls()[0], None, *calls(table=4)[2:]]
    assert len(kinds(kernel, [calls(table=4), wide, missing, calls(table=4, n=2**31), calls(table=4, stride=2**31)])) == 5


def compiled_by_triton_s_rules(text: str) -> set[str]:
    """The functions that a module launches and that are no `jit` of ours."""
    return set(re.findall(r"^ *(_\w+)\[(?:\(|grid\])", text, re.M)) - set(re.findall(r"^@jit\ndef (\w+)", text, re.M))


def test_whatever_is_launched_is_compiled_for_few_kinds():
    found = {file.stem: compiled_by_triton_s_rules(file.read_text()) for file in (ROOT / "kernels").glob("*.py")}
    assert {family: names for family, names in found.items() if names} == KNOW_ALIGNMENT
    both = "@triton.jit\ndef _a(x):\n    pass\n\n\n@jit\ndef _b(x):\n    pass\n\n\ndef f(x):\n    _a[HOW](x)\n    _b[HOW](x)\n"
    assert [compiled_by_triton_s_rules(both.replace("HOW", how)) for how in ("(1,)", "grid")] == [{"_a"}, {"_a"}]


def test_a_batch_with_a_longer_request_is_compiled_no_differently():
    """Of the copy the tables of the batch, and of the gather the page table, are as wide as its longest request."""
    done = subprocess.run([sys.executable, "-c", WIDTHS], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={"PATH": "/usr/bin:/bin"})
    assert done.stdout.strip() == "{'_copy': 1, '_get_k_and_s': 1}", done.stdout + done.stderr
