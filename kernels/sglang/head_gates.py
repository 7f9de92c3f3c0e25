"""SGLang's way of writing rotated queries back; its head gates are compiled PyTorch, not Triton kernels."""

import ast

import torch

from . import _upstream

VERSION = _upstream.version()
_GATES = ("project_and_scale_head_gates", "apply_q_scale_and_softmax_scale", "logits_head_gate", "fused_logits_head_gate")


def _method(name: str):
    """A static method of a module that imports too much, without its decorators; None if this version has none."""
    path = _upstream.file_of(name)
    if path is None:
        return None
    code = (_upstream.root() / path).read_text()
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef) and n.name == name]
    nodes[0].decorator_list = []
    scope = {"torch": torch, "__name__": f"sglang_method.{name}"}
    exec(compile(ast.Module(nodes[:1], []), path, "exec"), scope)
    return scope[name]


_guarded = _method("_update_rope_guarded")
MISSING = {name: "SGLang's head gates are compiled PyTorch, not Triton kernels" for name in _GATES}
if not _guarded:
    MISSING["update_rope_guarded"] = "this SGLang has no _update_rope_guarded"


def _update_rope_guarded(*, memory, shape, dst_offset, dst_strides, src_offset, src_strides):
    base = memory.storage_offset()
    _guarded(memory.as_strided(shape, dst_strides, base + dst_offset), memory.as_strided(shape, src_strides, base + src_offset))


def supports(case):
    """What the guard is for: a rotary kernel that works in place ("src/dst tensors point to a single memory"), or one that
    returns tensors of its own."""
    fields = case["case"]
    if fields.get("source", "same") in ("same", "apart"):
        return True
    if 0 in (fields["tokens"], fields.get("heads", 2), fields.get("rope_dim", 4)):
        return True
    return "a source that is the destination or lies apart from it (the guard compares addresses alone)"


if _guarded:
    update_rope_guarded = _update_rope_guarded
