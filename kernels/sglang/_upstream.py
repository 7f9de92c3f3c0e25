"""Reaching the kernels of an installed SGLang without importing the rest of it."""

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
import triton
import triton.language as tl


def root() -> Path | None:
    """The folder of the installed package, or None."""
    spec = importlib.util.find_spec("sglang") if "sglang" not in sys.modules else sys.modules["sglang"].__spec__
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def version() -> str:
    """The installed version, from the package's metadata."""
    from importlib import metadata

    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return ""


def module(name: str) -> types.ModuleType | None:
    """Import one module of SGLang with empty parent packages; None if this version has no such module."""
    folder = root()
    if folder is None or not folder.joinpath(*name.split(".")[1:]).with_suffix(".py").exists():
        return None
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            package = types.ModuleType(parent)
            package.__path__ = [str(folder.joinpath(*parts[1:depth]))]
            package.__spec__ = importlib.machinery.ModuleSpec(parent, None, is_package=True)
            package.__spec__.submodule_search_locations = package.__path__
            sys.modules[parent] = package
    return importlib.import_module(name)


def jit_functions(path: str) -> types.SimpleNamespace | None:
    """Only the `@triton.jit` functions of a file, for modules that import too much; None if there is no such file."""
    folder = root()
    if folder is None or not (folder / path).exists():
        return None
    tree = ast.parse((folder / path).read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list)]
    scope = {"torch": torch, "triton": triton, "tl": tl, "__name__": f"sglang_jit.{Path(path).stem}"}
    exec(compile(ast.Module(kept, []), str(folder / path), "exec"), scope)
    return types.SimpleNamespace(**{node.name: scope[node.name] for node in kept})


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).startswith("triton.jit")


class _Cuda(torch.Tensor):
    """A CPU tensor that answers `is_cuda`, so that upstream's own wrapper runs in Triton's interpreter."""

    is_cuda = property(lambda self: True)


def cuda(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as upstream's wrapper wants it."""
    return tensor if tensor is None or tensor.is_cuda else tensor.as_subclass(_Cuda)
