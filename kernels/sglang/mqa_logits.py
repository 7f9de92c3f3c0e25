"""SGLang's budget of MQA logits, since #25299, and its loop over chunks of rows: host functions, taken out of modules that
import the whole runtime. The scores are DeepGEMM's and the selections compiled kernels: `_indexer` has stand-ins for them.
"""

import ast
import types

import torch

from . import _indexer, _upstream

VERSION = _upstream.version()
_UTILS = "srt/layers/attention/mqa_logits_utils.py"  # since 0.5.21; before, methods and constants of the indexer
_METHODS = ("_get_mqa_logits_budget_bytes", "_should_chunk_mqa_logits", "_mqa_logits_free_mem_fraction")


def _definitions(path: str | None, keep) -> list[ast.stmt]:
    """The definitions of a file that `keep` picks, those inside classes included; none if there is no such file."""
    return [node for node in ast.walk(ast.parse(_upstream.text(path))) if keep(node)]


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
            "get_schedule": lambda: self, "get_server_args": lambda: self, "get_global_server_args": lambda: self,
            "_is_hip": False, "_is_xpu": False, "is_hip": lambda: False, "is_xpu": lambda: False,
            "get_device_module": lambda: module,
            "get_is_capture_mode": lambda: self.capturing,
            "torch": types.SimpleNamespace(cuda=types.SimpleNamespace(mem_get_info=lambda d: (self.free, self.total),
                                                                      **vars(module))),
        }

    def indexer(self, budgets: dict) -> types.SimpleNamespace:
        """What the methods read from `self`."""
        return types.SimpleNamespace(
            _mqa_logits_budget_bytes=budgets, _mqa_logits_free_mem_fraction=lambda: self.free_fraction,
            **{n.targets[0].id: n.value.value for n in _constants})


def _functions(engine: _Engine) -> types.SimpleNamespace:
    """Upstream's functions, in a scope where the engine is `engine`."""
    scope = {**engine.scope(), "__name__": "sglang_mqa_logits"}
    code = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *_nodes], [])
    exec(compile(ast.fix_missing_locations(code), _UTILS, "exec"), scope)
    return types.SimpleNamespace(**scope)


def _wanted(node: ast.AST) -> bool:
    constant = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("MQA_LOGITS_")
    return constant or isinstance(node, ast.FunctionDef) and node.name.startswith("mqa_logits_")


_constants = _definitions(_upstream.file_of("_get_mqa_logits_budget_bytes"),
                          lambda n: isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
                          and getattr(n.targets[0], "id", "").startswith("_MQA_LOGITS_"))
_cached = _definitions(_upstream.file_of("_get_mqa_logits_budget_bytes"),
                       lambda n: isinstance(n, ast.FunctionDef) and n.name in _METHODS)
_nodes = [*_definitions(_UTILS, _wanted), *_cached]

MISSING = {"mqa_logits_chunk_plan": "its chunk loop is a part of Indexer._get_topk_ragged",
           "mqa_logits": "its fp8_mqa_logits is DeepGEMM's"}
if not _cached:
    MISSING.update(dict.fromkeys(("mqa_logits_budget", "should_chunk_mqa_logits"), "this SGLang has no cached budget (#25299)"))


def _mqa_logits_budget(*, queries, mem_fraction_static, free_fraction):
    engine = _Engine(mem_fraction_static, free_fraction)
    functions = _functions(engine)
    indexer = engine.indexer({})
    answers = []
    for device, engine.free, engine.total, engine.capturing in queries:
        answers.append(functions._get_mqa_logits_budget_bytes(indexer, device))
    return answers


def _should_chunk_mqa_logits(*, num_q, num_k, budget):
    engine = _Engine()
    functions = _functions(engine)
    if hasattr(functions, "mqa_logits_should_chunk"):
        return list(functions.mqa_logits_should_chunk(num_rows=num_q, num_cols=num_k, rocm=False,
                                                      get_budget_bytes=lambda: budget))
    indexer = engine.indexer({0: budget})
    indexer._get_mqa_logits_budget_bytes = lambda device: budget
    return list(functions._should_chunk_mqa_logits(indexer, num_q, num_k, 0))


def _topk_chunked(*, logits, ks, lengths, topk_result, token_nums, index_topk, max_rows, page_table_1=None,
                  token_to_batch_idx=None, topk_indices_offset=None):
    """One request per first key, with the keys up to the next one's; keys in front of them are a request without queries."""
    first, place, extends = torch.unique_consecutive(ks, return_inverse=True, return_counts=True)
    silent = int(first[0] > 0)
    edges = [*[0] * silent, *first.tolist(), logits.shape[1]]
    seen, place = lengths[: len(ks)], place + silent
    if topk_indices_offset is None:
        heads = torch.cat([extends.new_zeros(1 + silent), extends.cumsum(0)[:-1]])  # a row of each request
        table = page_table_1[token_to_batch_idx[heads].long()]
    else:
        table = logits  # is only asserted to be there
    topk_result[:token_nums, :index_topk] = _indexer.run(
        extends=[*[0] * silent, *extends.tolist()], lengths=[b - a for a, b in zip(edges, edges[1:])], seen=seen,
        logits=logits, index_topk=index_topk, token_nums=token_nums, max_rows=max_rows, device=logits.device,
        ranges=(ks, ks + seen, place.int()), page_table=table,
        offsets=None if topk_indices_offset is None else topk_indices_offset[: len(ks)])


def supports(case):
    """What the loop asserts."""
    if case["contract"].startswith("topk_") and not any(r["extend_len"] for r in case["case"]["requests"]):
        return "at least one query token (assert q_fp8[:q_offset].shape[0] != 0)"
    return True


if _cached:
    mqa_logits_budget = _mqa_logits_budget
    should_chunk_mqa_logits = _should_chunk_mqa_logits
if _indexer.HAS_LOOP:
    topk_paged_chunked = _topk_chunked
else:
    MISSING["topk_paged_chunked"] = "this SGLang has no _get_topk_ragged"
if _indexer.HAS_LOOP and _indexer.HAS_RAGGED:
    topk_ragged_chunked = _topk_chunked
else:
    MISSING["topk_ragged_chunked"] = "this SGLang selects from page tables alone"
