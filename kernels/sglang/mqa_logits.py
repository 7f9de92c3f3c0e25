"""SGLang's budget of MQA logits, since #25299: host functions, taken out of modules that import the whole runtime.

The scores are DeepGEMM's and the top-k is a compiled kernel; neither has a Triton kernel to launch.
"""

import ast
import types

from . import _upstream

VERSION = _upstream.version()
_UTILS = "srt/layers/attention/mqa_logits_utils.py"


def _definitions(path: str | None, keep) -> list[ast.stmt]:
    """The definitions of a file that `keep` picks, those inside classes included; none if there is no such file."""
    folder = _upstream.root()
    if folder is None or path is None or not (folder / path).exists():
        return []
    tree = ast.parse((folder / path).read_text())
    return [node for node in ast.walk(tree) if keep(node)]


class _Engine:
    """Stands for what upstream's functions ask of the engine: memory readings, server arguments and the capture mode."""

    def __init__(self, mem_fraction_static=None, free_fraction=0.2):
        self.mem_fraction_static, self.free_fraction = mem_fraction_static, free_fraction
        self.free = self.total = None
        self.capturing = False

    def scope(self) -> dict:
        fraction = types.SimpleNamespace(get=lambda: self.free_fraction)
        module = types.SimpleNamespace(get_device_properties=lambda d: types.SimpleNamespace(total_memory=self.total))
        return {
            "envs": types.SimpleNamespace(SGLANG_DSA_MQA_LOGITS_FREE_MEM_FRACTION=fraction),
            "get_schedule": lambda: self, "get_device_module": lambda: module, "is_hip": lambda: False, "is_xpu": lambda: False,
            "get_is_capture_mode": lambda: self.capturing,
            "torch": types.SimpleNamespace(cuda=types.SimpleNamespace(mem_get_info=lambda d: (self.free, self.total))),
        }


def _functions(engine: _Engine) -> types.SimpleNamespace:
    """Upstream's functions, in a scope where the engine is `engine`."""
    scope = {**engine.scope(), "__name__": "sglang_mqa_logits"}
    code = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *_nodes], [])
    exec(compile(ast.fix_missing_locations(code), _UTILS, "exec"), scope)
    return types.SimpleNamespace(**scope)


def _wanted(node: ast.AST) -> bool:
    constant = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("MQA_LOGITS_")
    return constant or isinstance(node, ast.FunctionDef) and node.name.startswith("mqa_logits_")


_cached = _definitions(_upstream.file_of("_get_mqa_logits_budget_bytes"),
                       lambda n: isinstance(n, ast.FunctionDef) and n.name == "_get_mqa_logits_budget_bytes")
_nodes = [*_definitions(_UTILS, _wanted), *_cached]

_SCORES = "its fp8_mqa_logits is DeepGEMM's, and its top-k is a compiled kernel"
MISSING = {"mqa_logits_chunk_plan": "its chunk loop is a part of Indexer._get_topk_ragged", "mqa_logits": _SCORES,
           "topk_ragged_chunked": _SCORES, "topk_paged_chunked": _SCORES}
if not _cached:
    MISSING.update(dict.fromkeys(("mqa_logits_budget", "should_chunk_mqa_logits"), "this SGLang has no cached budget (#25299)"))


def _mqa_logits_budget(*, queries, mem_fraction_static, free_fraction):
    engine = _Engine(mem_fraction_static, free_fraction)
    functions = _functions(engine)
    indexer = types.SimpleNamespace(_mqa_logits_budget_bytes={})
    answers = []
    for device, engine.free, engine.total, engine.capturing in queries:
        answers.append(functions._get_mqa_logits_budget_bytes(indexer, device))
    return answers


def _should_chunk_mqa_logits(*, num_q, num_k, budget):
    functions = _functions(_Engine())
    return list(functions.mqa_logits_should_chunk(num_rows=num_q, num_cols=num_k, get_budget_bytes=lambda: budget, rocm=False))


if _cached:
    mqa_logits_budget = _mqa_logits_budget
    should_chunk_mqa_logits = _should_chunk_mqa_logits
