"""What the headlines compare, beside the rows of the table: one step for several draft backends.

ragged_decode  our decode metadata, for requests of different lengths
precompute     0.5.10.post1 prepares a decode batch with PyTorch, before it copies it into the backends
multi_copy     and that copy
three_decodes  0.5.23 derives a decode batch three times, once per backend

Upstream's are its own functions, called with ready tensors.
"""

import ast
import importlib
import sys
import types
from functools import partial
from pathlib import Path

import torch

from bench import rows, sizes

NAMES = {"kernels": ("ragged_decode",), "sglang": ("precompute", "multi_copy", "three_decodes")}


def measure(bench: "rows.Bench", name: str, batch: int, context: int) -> dict:
    """A row like any other, or that this SGLang has no such thing."""
    if name == "ragged_decode":
        return bench.case(sizes.ragged_decode(sizes.Size(batch, context)))
    upstream = importlib.import_module(f"plumbline_{bench.spec}._upstream")
    transform = "fused_metadata_copy_multi" if name == "multi_copy" else "decode_metadata"
    call = globals()[f"_{name}"](upstream, rows.materialise(sizes.case(transform, sizes.Size(batch, context)), bench.device))
    if call is None:
        return {"not_provided": f"not in SGLang {upstream.version()}, or not to be built here"}
    call()
    bench.wait()
    return bench.times(call)


def _precompute(upstream, arguments: dict):
    if upstream.file_of("_precompute_decode_mode") is None:
        return None
    folder = upstream.file_of("_precompute_decode_mode").removesuffix(".py").split("/")[:-1]
    utilities = ".".join(["sglang", *folder, "utils"])
    if utilities not in sys.modules:  # the real one imports the server; its one function that is needed stands alone
        sys.modules[utilities] = types.ModuleType(utilities)
        exec(upstream.source("compute_nsa_seqlens"), vars(sys.modules[utilities]))
    mixin = upstream.home("_precompute_decode_mode").NativeSparseAttnBackendMTPPrecomputeMixin
    scope = {"torch": torch}
    exec(_method(upstream.root().joinpath(*folder[:-1], "nsa_backend.py"), "_transform_table_1_to_real"), scope)
    backend = types.SimpleNamespace(
        req_to_token=arguments["req_to_token"], nsa_index_topk=arguments["index_topk"], real_page_size=arguments["page_size"],
        nsa_decode_impl="flashmla_sparse", device=arguments["seq_lens"].device)
    backend._transform_table_1_to_real = partial(scope["_transform_table_1_to_real"], backend)
    return partial(mixin._precompute_decode_mode, backend, arguments["bs"], arguments["req_pool_indices"],
                   arguments["seq_lens"], arguments["seq_lens"].cpu())


def _method(path: Path, name: str) -> str:
    """The text of a method; several backends have one of this name."""
    text = path.read_text()
    return next(ast.get_source_segment(text, node) for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef) and node.name == name)


def _multi_copy(upstream, arguments: dict):
    adapter = importlib.import_module(upstream.__name__.replace("._upstream", ".metadata_copy"))
    if "fused_metadata_copy_multi" in adapter.MISSING:
        return None
    given = {}
    for name, value in arguments.items():
        given |= {f"{name}{b}": t for b, t in enumerate(value)} if name.endswith("_dst") else {name: value}
    return partial(adapter._KERNELS.fused_metadata_copy_multi_cuda, **{adapter._renamed(n): v for n, v in given.items()})


def _three_decodes(upstream, arguments: dict):
    module = upstream.home("fused_dsa_decode_metadata")
    if module is None:
        return None
    a = {n: upstream.cuda(v) if isinstance(v, torch.Tensor) else [upstream.cuda(t) for t in v] if isinstance(v, list) else v
         for n, v in arguments.items()}
    each = [(a["seq_lens"], a["req_pool_indices"], a["req_to_token"], a["cache_seqlens"][b], a["cu_seqlens_k"][b],
             a["page_table_1"][b], a["nsa_cache_seqlens"][b], a["nsa_cu_seqlens_k"][b], a["real_page_table"][b], a["bs"],
             a["max_len"], a["index_topk"], a["page_size"]) for b in range(len(a["cache_seqlens"]))]

    def call():
        for given in each:
            module.fused_dsa_decode_metadata(*given)

    return call
