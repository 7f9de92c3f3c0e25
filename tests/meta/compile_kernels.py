"""Compile what the transforms of a folder launch on batches of one request and of several, for an H100, without a GPU:
`compile_kernels.py FOLDER TRANSFORM...`. One line of JSON for each transform and batch: what went wrong, or ''."""

import importlib
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.modules["compiled"] = types.ModuleType("compiled")
sys.modules["compiled"].__path__ = [sys.argv[1]]

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from bench import rows, sizes  # noqa: E402
from harness import registry  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
BATCHES = (1, 3)


def compile_launch(kernel, args: list, constants: dict) -> None:
    """What `kernel[grid](*args)` would compile on that GPU."""
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    typical = importlib.import_module("compiled._jit").typical
    bound, specialisation, options = bind(*typical(kernel, args), **constants, debug=False)
    options, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialisation, options)
    triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options.__dict__)


def problem(transform, name: str, batch: int) -> str:
    with importlib.import_module("compiled._launch")._recorder() as launches:
        transform(**rows.materialise(sizes.case(name, sizes.Size(batch, 130)), "cpu"))
    for kernel, _, args, constants in launches:
        try:
            compile_launch(kernel, args, constants)
        except (RuntimeError, triton.CompilationError) as error:
            return f"{kernel.__name__}: {type(error).__name__}: {error}"
    return "" if launches else "no kernel was launched"


def main(names: list[str]) -> None:
    importlib.import_module("compiled._checks").device_of = lambda named, tensor: tensor.device
    for name in names:
        transform = getattr(importlib.import_module(f"compiled.{registry.contracts()[name].family}"), name)
        for batch in BATCHES:
            print(json.dumps([name, batch, problem(transform, name, batch)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[2:])
