"""Plans: a transform bound once to persistent buffers, then launched with only the tensors that are new.

Checking thirty tensors in Python costs many times what a launch costs, so checks cannot be on the hot path. Binding a plan
runs the plain, checked call with Triton's `kernel[grid]` replaced by a recorder: every check is made, and what the plan
launches later is exactly what the plain call would have launched. On a GPU a recorded launch becomes the compiled kernel
and a ready list of raw pointers and numbers; in Triton's interpreter it stays a plain launch.

    plan = Plan(decode_metadata, new=("seq_lens",), seq_lens=seq_lens, req_pool_indices=..., ...)
    plan(other_seq_lens)
"""

import functools
import threading
from bisect import bisect_left
from contextlib import contextmanager

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from . import _checks as checks

_address = torch.Tensor.data_ptr
_thread = threading.local()
MOST_REMEMBERED = 256


class Unplannable(ValueError):
    """The transform does more than launch kernels on its arguments: it copies, allocates or computes with torch."""


class Plan:
    """One call of a transform, checked now and launched any number of times.

    Args:
        transform: a function of `kernels`. arguments: its arguments, by keyword.
        new: names of input tensors that every call passes anew, in this order. They have the dtype, shape, strides and device
            of the tensors bound here, which stand for them. Everything else is bound: host numbers, outputs, other inputs.
    Attributes:
        written: the tensors that the transform writes, by name (`page_table_1[2]`).
        launches: how many kernels a call launches.
    Raises:
        TypeError, ValueError: what the transform itself raises; or `new` names no input tensor.
        Unplannable: the transform does more than launch kernels.

    A plan belongs to one device and, like the buffers that it writes, to one thread at a time.
    """

    def __init__(self, transform, *, new: tuple[str, ...] = (), **arguments):
        recorded, self.written, self._returned = _record(transform, arguments)
        tensors = _flat(arguments)
        for name in new:
            if not isinstance(arguments.get(name), torch.Tensor):
                raise ValueError(f"new names {name!r}, which is no tensor argument of {transform.__name__}")
            if any(tensors[name] is t for t in self.written.values()):
                raise ValueError(f"new names {name!r}, which {transform.__name__} writes: outputs are bound")
        bound = {n: t for n, t in tensors.items() if n not in new}
        self._names, self._bound = list(bound), list(bound.values())
        self._addresses = [t.data_ptr() for t in self._bound]
        make = _Interpreted if triton.knobs.runtime.interpret else _Compiled
        self._launches = [make(*launch) for launch in recorded]
        self.launches = len(recorded)
        spans = _merged([checks.span(t) for t in self.written.values() if t.numel()])
        self._inputs = [_New(n, tensors[n], spans) for n in new]
        _connect(self._inputs, tensors, self._launches, recorded)

    def __call__(self, *new: torch.Tensor):
        """Launch on the current stream, with `new` in the place of the tensors named at binding; returns what the transform
        returned there.

        Raises:
            TypeError, ValueError: a new tensor does not look like the bound one, or overlaps an output; or the memory of a
                bound tensor has moved since (resize_, set_, a reallocation). Nothing was launched.
        """
        if [*map(_address, self._bound)] != self._addresses:
            raise ValueError(self._moved())
        if len(new) != len(self._inputs):
            raise TypeError(f"the plan takes {len(self._inputs)} new tensors "
                            f"({', '.join(i.name for i in self._inputs)}), got {len(new)}")
        pointers = [one.check(tensor) for one, tensor in zip(self._inputs, new)]
        for one, tensor, pointer in zip(self._inputs, new, pointers):
            for put in one.puts:
                put(tensor, pointer)
        for launch in self._launches:
            launch()
        return self._returned

    def _moved(self) -> str:
        name, was, now = next((n, a, t.data_ptr()) for n, a, t in zip(self._names, self._addresses, self._bound)
                              if t.data_ptr() != a)
        return (f"{name} has moved since the plan was bound, from {was:#x} to {now:#x}; a plan holds addresses: bind a new one "
                "after a reallocation")


class _New:
    """A tensor that every call passes: what it must look like, and how it gets into the launches' arguments."""

    def __init__(self, name: str, tensor: torch.Tensor, spans: tuple[list[int], list[int]]):
        self.name, self.dtype, self.shape, self.strides = name, tensor.dtype, tensor.shape, tensor.stride()
        self.device, self.first = tensor.get_device(), tensor.data_ptr()
        first, last = checks.span(tensor)
        self.size = last - first if tensor.numel() else 0
        self.starts, self.ends = spans if self.size else ([], [])
        # Code compiled for a pointer that is a multiple of 16 bytes loads 16 bytes at once, and faults on any other; code
        # compiled for any other pointer takes all. Views of the tensor have the same bits if the tensor has.
        self.fixed_bits = 0
        self.puts: list = []  # functions of the tensor and its address

    def check(self, tensor: torch.Tensor) -> int:
        """The address of a tensor that may stand here."""
        try:
            like = (tensor.dtype is self.dtype and tensor.shape == self.shape and tensor.stride() == self.strides
                    and tensor.get_device() == self.device)
        except AttributeError:
            raise TypeError(f"{self.name} must be a tensor, got {type(tensor).__name__}") from None
        if not like:
            raise ValueError(f"{self.name} must be {_look(self.dtype, self.shape, self.strides, self.device)} like the tensor "
                             f"that was bound, got {_look(tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())}")
        pointer = tensor.data_ptr()
        if (pointer ^ self.first) & self.fixed_bits:
            raise ValueError(f"{self.name} must start as far from a multiple of 16 bytes as the tensor that was bound, "
                             f"{self.first % 16} bytes, got {pointer % 16}")
        k = bisect_left(self.starts, pointer + self.size)
        if k and self.ends[k - 1] > pointer and pointer != self.first:
            raise ValueError(f"{self.name} shares memory with an output of the plan, and must not")
        return pointer


class _Interpreted:
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


class _Compiled:
    """A launch on a GPU: the compiled kernel and its arguments, tensors as raw pointers.

    Triton's own launch binds, specialises and hashes every argument to find the compiled kernel. Here that was done once,
    and no later call can need another one: numbers stay as they were, and the new pointers are held to the old alignment.
    Given raw pointers, the launcher does not ask the driver about each of them either.
    """

    def __init__(self, kernel, grid, args: list, constants: dict):
        self._grid, self._device = (*grid, 1, 1)[:3], torch.cuda.current_device()
        self._kernel = kernel.run(*args, grid=grid, warmup=True, **constants)
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
        """As of `_Interpreted`; all but a few tensors stand outside of tuples, where putting them costs nothing."""
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


# -- the plain call -----------------------------------------------------------------------------------------------------


def remembered(transform):
    """`transform`, whose checks and launches are worked out once for every look of its arguments.

    What the checks say depends on addresses, shapes, strides, dtypes and numbers alone, and so does what is launched. A call
    that looks like an earlier one is launched straight away; only raw addresses are kept, and no tensor is kept alive. In the
    interpreter every call is made as it is written.
    """
    return transform if triton.knobs.runtime.interpret else _remembering(transform)


def _remembering(transform):
    ready: dict[tuple, list | None] = {}
    make = _Interpreted if triton.knobs.runtime.interpret else _Compiled

    def first(key, arguments: dict):
        try:
            recorded, _, returned = _record(transform, arguments)
        except Unplannable:
            recorded, returned = None, None
        if len(ready) >= MOST_REMEMBERED:
            ready.clear()
        ready[key] = None if recorded is None or returned is not None else [make(*launch) for launch in recorded]
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
        for launch in launches:
            launch()
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


# -- binding ------------------------------------------------------------------------------------------------------------


class _OnlyViews(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            raise Unplannable(f"the call uses {operation}, which a plan would not repeat; make the plain call")
        return operation(*args, **(kwargs or {}))


def _record(transform, arguments: dict) -> tuple[list, dict[str, torch.Tensor], object]:
    """Make the plain call without launching: its launches, what it writes, what it returns."""
    with _recorder() as launches, checks.watched() as written, _OnlyViews():
        returned = transform(**arguments)
    known = _flat(arguments).values()
    given, spans = {id(t) for t in known}, [checks.span(t) for t in known if t.numel()]
    for _, _, args, _ in launches:
        for _, view in _tensors_in(args):
            first, last = checks.span(view)
            if view.numel() and id(view) not in given and not any(a <= first and last <= b for a, b in spans):
                raise Unplannable("the call launches a kernel on memory of its own; make the plain call")
    return launches, written, returned


@contextmanager
def _recorder():
    """`kernel[grid](...)` of this thread is noted, and not launched."""
    stock, here, launches = KernelInterface.__getitem__, threading.get_ident(), []

    def getitem(kernel, grid):
        if threading.get_ident() != here:
            return stock(kernel, grid)
        return lambda *args, **constants: launches.append((kernel, grid, list(args), constants))

    KernelInterface.__getitem__, _thread.recording = getitem, True
    try:
        yield launches
    finally:
        KernelInterface.__getitem__, _thread.recording = stock, False


def _connect(inputs: list[_New], tensors: dict[str, torch.Tensor], launches: list, recorded: list) -> None:
    """Find the new tensors, and views of them, among the launches' arguments."""
    spans = {one.name: checks.span(tensors[one.name]) for one in inputs if tensors[one.name].numel()}
    known = {id(t) for t in tensors.values()}
    for launch, (_, _, args, _) in zip(launches, recorded):
        for path, value in _tensors_in(args):
            first, last = checks.span(value)
            owner = next((one for one in inputs if value is tensors[one.name]), None)
            if owner is None and id(value) not in known and value.numel():
                owner = next((one for one in inputs if one.size and spans[one.name][0] <= first and last <= spans[one.name][1]),
                             None)
            if owner is not None:
                if value.dtype != owner.dtype:
                    raise Unplannable(f"the call views {owner.name} as {value.dtype}; leave it out of new")
                owner.puts.append(launch.putter(path, value, first - owner.first))
                owner.fixed_bits |= 0 if first % 16 else 15


def _flat(arguments: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a call by name; those of a list are numbered."""
    flat = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, (list, tuple)):
            flat.update({f"{name}[{b}]": t for b, t in enumerate(value) if isinstance(t, torch.Tensor)})
    return flat


def _tensors_in(values, path=()):
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield (*path, i), value
        elif isinstance(value, tuple):
            yield from _tensors_in(value, (*path, i))


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


def _merged(spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Address ranges sorted and joined where they meet: their starts and their ends."""
    starts: list[int] = []
    ends: list[int] = []
    for first, last in sorted(spans):
        if ends and first <= ends[-1]:
            ends[-1] = max(ends[-1], last)
        else:
            starts.append(first)
            ends.append(last)
    return starts, ends


def _look(dtype, shape, strides, device: int) -> str:
    where = "cpu" if device < 0 else f"cuda:{device}"
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}, strides {tuple(strides)}, on {where}"
