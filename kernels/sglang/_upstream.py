"""Reaching the kernels of an installed SGLang without importing the rest of it."""

import __future__
import ast
import builtins
import functools
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import torch
import triton
import triton.language as tl

HOMES = ("kernels/ops", "srt/layers/attention", "srt/speculative", "srt/mem_cache", "jit_kernel", "srt/layers/utils",
         "srt/layers/cp")
OTHER_MODELS = ("dsv4", "kpool")  # kernels of the same names for caches of another layout
_DEFINITION = re.compile(r"^ *def (\w+)\(", re.MULTILINE)


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


def file_of(name: str) -> str | None:
    """The file, relative to the package, that defines a function (or method) of this name; None if this version has none.

    Kernels moved between files from version to version, hardly ever changing their names."""
    folder = root()
    return definitions(folder).get(name) if folder else None


def first_of(*names: str) -> str:
    """The first of these names that this version has a function of, or ''."""
    return next((name for name in names if file_of(name)), "")


@functools.cache
def definitions(folder: Path) -> dict[str, str]:
    """Where each function of a package is defined: name -> file, relative to the package."""
    found: dict[str, str] = {}
    for home in HOMES:
        for path in sorted((folder / home).rglob("*.py")):
            place = path.relative_to(folder).as_posix()
            if not any(other in place for other in OTHER_MODELS):
                for name in _DEFINITION.findall(path.read_text(errors="replace")):
                    found.setdefault(name, place)
    return found


def kernel(*names: str):
    """The `@triton.jit` function of the first of these names that this version has, or None.

    Of its file only such functions and the constants that they read are executed."""
    for name in names:
        if path := file_of(name):
            return getattr(_jit_functions(path), name, None)
    return None


def home(function: str) -> types.ModuleType | None:
    """The imported module that defines a function; None if this version has no such function."""
    path = file_of(function)
    return module("sglang." + path.removesuffix(".py").replace("/", ".")) if path else None


@functools.cache
def _jit_functions(path: str) -> types.SimpleNamespace:
    tree = ast.parse((root() / path).read_text())
    kept = [node for node in tree.body if _is_constant(node) or _is_kernel(node)]
    for node in kept:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if _is_jit(d)]  # upstream's own caches are left out
    scope = {"torch": torch, "triton": triton, "tl": tl, "__name__": f"sglang_jit.{Path(path).stem}"}
    exec(compile(ast.Module(kept, []), str(root() / path), "exec"), scope)
    return types.SimpleNamespace(**scope)


def _is_constant(node: ast.stmt) -> bool:
    """`NAME = 4096`, `NAME: tl.constexpr = 4096`, `NAME = tl.constexpr(OTHER_NAME)`."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("tl.constexpr", "triton.language.constexpr"):
        return isinstance(value.args[0], (ast.Constant, ast.Name))
    return isinstance(value, ast.Constant)


def text(file: str | None) -> str:
    """A file of this version, or ''."""
    path = root() / file if root() and file else None
    return path.read_text() if path and path.is_file() else ""


@functools.cache
def source(name: str) -> str:
    """The text of the function that `file_of` finds, or ''."""
    code = text(file_of(name))
    return next((ast.get_source_segment(code, node) for node in ast.walk(ast.parse(code))
                 if isinstance(node, ast.FunctionDef) and node.name == name), "")


def function_of(name: str, scope: dict, file: str = "", imports: dict | None = None):
    """A function or method of this version, executed alone, without decorators; None if this version has none.

    Its module belongs to the whole runtime: `scope` stands for what it reads from it, `imports` for what it imports itself.
    """
    code = _code_of(name, file or file_of(name)) if name else None
    if code is None:
        return None
    own = {**scope, "__name__": f"sglang_host.{name}"}
    if imports:
        own["__builtins__"] = {**vars(builtins), "__import__": lambda module, *_: imports[module]}
    exec(code, own)
    return own[name]


@functools.cache
def _code_of(name: str, file: str | None):
    """A definition that does something, compiled; its annotations name what is not here, and stay text."""
    found = [n for n in ast.walk(ast.parse(text(file))) if isinstance(n, ast.FunctionDef) and n.name == name
             and not any("abstract" in ast.unparse(d) for d in n.decorator_list)]
    if not found:
        return None
    found[0].decorator_list = []
    return compile(ast.Module(found[:1], []), str(root() / file), "exec", __future__.annotations.compiler_flag, True)


class Torch:
    """PyTorch, except that what it makes on "cuda" (or on a stand-in for a device) lies on `device`, or is what `made` says."""

    def __init__(self, device: torch.device, **made):
        self._device, self._made = device, made

    def __getattr__(self, name: str):
        if name in self._made:
            return self._made[name]
        if name not in ("full", "ones", "zeros", "empty", "arange", "tensor"):
            return getattr(torch, name)
        return lambda *args, **options: getattr(torch, name)(*args, **{**options, "device": self._device})


def _is_kernel(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list)


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).startswith("triton.jit")


class _Cuda(torch.Tensor):
    """A CPU tensor that answers `is_cuda`, so that upstream's own wrapper runs in Triton's interpreter."""

    is_cuda = property(lambda self: True)


def cuda(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as upstream's wrapper wants it."""
    return tensor if tensor is None or tensor.is_cuda else tensor.as_subclass(_Cuda)
