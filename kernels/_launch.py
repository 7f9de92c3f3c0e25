"""How every kernel is launched: its arguments worked out once, then handed to the compiled kernel as raw numbers.

`record` makes a plain, checked call with Triton's `kernel[grid]` replaced by a recorder: every check is made, and what it
returns is exactly what the call would have launched. `Compiled` is such a launch on a GPU, `Interpreted` in Triton's
interpreter. `remembered` keeps a transform's launches by the look of its arguments; a plan (`_plan.py`) takes new ones.
"""

import functools
import threading
from contextlib import contextmanager

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from . import _checks as checks
from ._jit import typical

_thread, _recording = threading.local(), threading.RLock()
MOST_REMEMBERED = 256


class Unplannable(ValueError):
    """The transform does more than launch kernels on its arguments: it copies, allocates or computes with torch."""


def remembered(transform):
    """`transform`, whose checks and launches are worked out once for every look of its arguments.

    What the checks say depends on addresses, shapes, strides, dtypes and numbers alone, and so does what is launched. A call
    that looks like an earlier one is launched straight away; only raw addresses are kept, and no tensor is kept alive. In the
    interpreter every call is made as it is written.
    """
    return transform if triton.knobs.runtime.interpret else _remembering(transform)


def _remembering(transform):
    ready: dict[tuple, list | None] = {}

    def first(key, arguments: dict):
        try:
            recorded, _, returned = record(transform, arguments)
        except Unplannable:
            recorded, returned = None, None
        if len(ready) >= MOST_REMEMBERED:
            ready.clear()
        ready[key] = None if recorded is None or returned is not None else [launch(*one) for one in recorded]
        return ready[key]

    @functools.wraps(transform)
    def call(**arguments):
        if getattr(_thread, "recording", False):
            return transform(**arguments)
        try:
            key = _look_of(arguments)
            launches = ready[key] if key in ready else first(key, arguments)
        except TypeError:  # an argument that has no look, for the transform to refuse or to take
            launches = None
        if launches is None:
            return transform(**arguments)
        for ready_launch in launches:
            ready_launch()
        return None

    return call


def _look_of(arguments: dict) -> tuple:
    look: list = [*arguments]
    if torch.cuda.is_initialized():
        look.append(torch.cuda.current_device())
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            look += (value.data_ptr(), value.shape, value.stride(), value.dtype, value.get_device())
        elif isinstance(value, (list, tuple)):
            look.append((type(value), len(value)))
            for one in value:
                if isinstance(one, torch.Tensor):
                    look += (one.data_ptr(), one.shape, one.stride(), one.dtype, one.get_device())
                else:
                    look += (type(one), one)
        else:
            look += (type(value), value)
    return tuple(look)


# -- launches -----------------------------------------------------------------------------------------------------------


def launch(kernel, grid, args: list, constants: dict):
    """A recorded launch, ready to be made."""
    return (Interpreted if triton.knobs.runtime.interpret else Compiled)(kernel, grid, args, constants)


class Interpreted:
    """A launch in Triton's interpreter."""

    def __init__(self, kernel, grid, args: list, constants: dict):
        self._launch, self._args, self._constants = kernel[grid], list(args), constants

    def putter(self, path: tuple[int, ...], view: torch.Tensor, offset: int):
        """A function that puts a new tensor, or its view that begins `offset` bytes into it, where `view` is."""
        shape, strides = view.shape, view.stride()

        def put(tensor: torch.Tensor, pointer: int) -> None:
            if shape != tensor.shape or strides != tensor.stride():
                tensor = tensor.as_strided(shape, strides, tensor.storage_offset() + offset // tensor.element_size())
            _set(self._args, path, tensor)

        return put

    def __call__(self) -> None:
        self._launch(*self._args, **self._constants)


class Compiled:
    """A launch on a GPU: the compiled kernel and its arguments, tensors as raw pointers.

    Triton's own launch binds, specialises and hashes every argument to find the compiled kernel. Here that was done once,
    and no later call can need another one: numbers stay as they were, and the new pointers are held to the old alignment.
    Given raw pointers, the launcher does not ask the driver about each of them either.
    """

    def __init__(self, kernel, grid, args: list, constants: dict):
        self._grid, self._device = (*grid, 1, 1)[:3], torch.cuda.current_device()
        self._kernel = kernel.run(*typical(kernel, args), grid=grid, warmup=True, **constants)
        launcher = self._kernel.run  # loads the binary
        given = dict(zip(kernel.arg_names, args)) | constants
        self._values = [_pointers(given.get(p.name, p.default)) for p in kernel.params]
        self._short = None
        if triton.__version__.startswith("3.6.") and not launcher.global_scratch_size + launcher.profile_scratch_size:
            # What CudaLauncher.__call__ comes to when a kernel needs no scratch memory.
            self._short = launcher.launch
            self._head = [*self._grid, 0, self._kernel.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None,
                          None, self._kernel.packed_metadata, None, None, None]

    def putter(self, path: tuple[int, ...], view: torch.Tensor, offset: int):
        """As of `Interpreted`; all but a few tensors stand outside of tuples, where putting them costs nothing."""
        values, index = self._values, path[0]

        def put(tensor: torch.Tensor, pointer: int) -> None:
            values[index] = pointer + offset

        return put if len(path) == 1 else lambda tensor, pointer: _set(values, path, pointer + offset)

    def __call__(self) -> None:
        if self._device != (current := torch.cuda.current_device()):
            raise ValueError(f"the plan was bound on cuda:{self._device}, and the current device is cuda:{current}")
        stream = driver.active.get_current_stream(current)
        hook = triton.knobs.runtime.launch_enter_hook
        if self._short is not None and (hook is None or not getattr(hook, "calls", True)):
            self._head[3] = stream
            self._short(*self._head, *self._values)
            return
        kernel, runtime = self._kernel, triton.knobs.runtime
        metadata = kernel.launch_metadata(self._grid, stream, *self._values)
        kernel.run(*self._grid, stream, kernel.function, kernel.packed_metadata, metadata, runtime.launch_enter_hook,
                   runtime.launch_exit_hook, *self._values)


# -- recording ----------------------------------------------------------------------------------------------------------


class _OnlyViews(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            raise Unplannable(f"the call uses {operation}, which a plan would not repeat; make the plain call")
        return operation(*args, **(kwargs or {}))


def record(transform, arguments: dict) -> tuple[list, dict[str, torch.Tensor], object]:
    """Make the plain call without launching: its launches, what it writes, what it returns."""
    with _recorder() as launches, checks.watched() as written, _OnlyViews():
        returned = transform(**arguments)
    known = flat(arguments).values()
    given, spans = {id(t) for t in known}, [checks.span(t) for t in known if t.numel()]
    for _, _, args, _ in launches:
        for _, view in tensors_in(args):
            first, last = checks.span(view)
            if view.numel() and id(view) not in given and not any(a <= first and last <= b for a, b in spans):
                raise Unplannable("the call launches a kernel on memory of its own; make the plain call")
    return launches, written, returned


@contextmanager
def _recorder():
    """`kernel[grid](...)` of this thread is noted, and not launched; of another thread it is launched. One thread records at a
    time, since what is replaced, and put back, is the process's."""
    with _recording:
        stock, here, launches = KernelInterface.__getitem__, threading.get_ident(), []

        def getitem(kernel, grid):
            if threading.get_ident() != here:
                return stock(kernel, grid)
            return lambda *args, **constants: launches.append((kernel, grid, list(args), constants))

        outer, _thread.recording = getattr(_thread, "recording", False), True
        KernelInterface.__getitem__ = getitem
        try:
            yield launches
        finally:
            KernelInterface.__getitem__, _thread.recording = stock, outer


def flat(arguments: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a call by name; those of a list are numbered."""
    flat = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, (list, tuple)):
            flat.update({f"{name}[{b}]": t for b, t in enumerate(value) if isinstance(t, torch.Tensor)})
    return flat


def tensors_in(values, path=()):
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield (*path, i), value
        elif isinstance(value, tuple):
            yield from tensors_in(value, (*path, i))


def _pointers(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(_pointers, value)) if isinstance(value, tuple) else value


def _set(values: list, path: tuple[int, ...], value) -> None:
    """Set the entry at `path` of nested tuples; the outermost is a list."""
    first, *rest = path
    if rest:
        inner = list(values[first])
        _set(inner, tuple(rest), value)
        value = tuple(inner)
    values[first] = value
