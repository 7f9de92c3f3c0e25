"""Our kernels of the mla_block_table family, returning what each call did to the device: launches, and PyTorch operations."""

import importlib
import sys
import types
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

_package = types.ModuleType("plumbline_counted")
_package.__path__ = [str(Path(__file__).parents[2] / "kernels")]
sys.modules["plumbline_counted"] = _package
_kernels = importlib.import_module("plumbline_counted.mla_block_table")
_VIEWS = ("aten.view.dtype", "aten.unsqueeze.default", "aten.detach.default")
_done: list[str] = []


class _Counted:
    """A kernel whose launches are noted by name."""

    def __init__(self, name: str, kernel):
        self._name, self._kernel = name, kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            _done.append(self._name)
            with _Operations.paused():
                return self._kernel[grid](*args, **options)

        return launch


class _Operations(TorchDispatchMode):
    """Notes every operation that is not a view; the interpreter's own, inside a launch, do not count."""

    _paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not _Operations._paused and str(function) not in _VIEWS:
            _done.append(str(function))
        return function(*args, **(kwargs or {}))

    @classmethod
    def paused(cls):
        class Pause:
            def __enter__(self):
                cls._paused = True

            def __exit__(self, *error):
                cls._paused = False

        return Pause()


for _name in ("_lengths", "_block_tables", "_ragged_copy"):
    setattr(_kernels, _name, _Counted(_name, getattr(_kernels, _name)))


def _counting(function):
    def call(**arguments):
        _done.clear()
        with _Operations():
            function(**arguments)
        return list(_done)

    return call


for _name in ("mla_metadata", "mla_block_table", "mla_multi_step_draft", "pad_draft_extend_query",
              "unpad_draft_extend_output", "pad_sequence_with_mask"):
    globals()[_name] = _counting(getattr(_kernels, _name))
