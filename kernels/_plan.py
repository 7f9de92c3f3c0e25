"""Plans: a transform bound once to persistent buffers, then launched with only the tensors that are new.

Checking thirty tensors in Python costs many times what a launch costs, so checks cannot be on the hot path. They are made
when a plan is bound; a call compares the new tensors with those that were bound, and launches.

    plan = Plan(decode_metadata, new=("seq_lens",), seq_lens=seq_lens, req_pool_indices=..., ...)
    plan(other_seq_lens)
"""

from bisect import bisect_left

import torch

from . import _checks as checks
from . import _launch
from ._launch import Unplannable

_address = torch.Tensor.data_ptr


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
        recorded, self.written, self._returned = _launch.record(transform, arguments)
        tensors = _launch.flat(arguments)
        for name in new:
            if not isinstance(arguments.get(name), torch.Tensor):
                raise ValueError(f"new names {name!r}, which is no tensor argument of {transform.__name__}")
            if any(tensors[name] is t for t in self.written.values()):
                raise ValueError(f"new names {name!r}, which {transform.__name__} writes: outputs are bound")
            if shared := _sharing(name, tensors, self.written):
                raise ValueError(f"new names {name!r}, which shares memory with {shared}, so that a plan could not tell them "
                                 "apart; bind it to memory of its own (a call may pass one tensor for both)")
        bound = {n: t for n, t in tensors.items() if n not in new}
        self._names, self._bound = list(bound), list(bound.values())
        self._addresses = [t.data_ptr() for t in self._bound]
        self._launches = [_launch.launch(*one) for one in recorded]
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


def _sharing(name: str, tensors: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> str:
    """Another input that is the tensor `name`, or has a byte in common with it, or ''."""
    mine, outputs = tensors[name], {id(t) for t in written.values()}
    for other, tensor in tensors.items():
        if other != name and id(tensor) not in outputs:
            if tensor is mine or checks.meet(tensor, mine):
                return other
    return ""


def _connect(inputs: list[_New], tensors: dict[str, torch.Tensor], launches: list, recorded: list) -> None:
    """Find the new tensors, and views of them, among the launches' arguments."""
    spans = {one.name: checks.span(tensors[one.name]) for one in inputs if tensors[one.name].numel()}
    known = {id(t) for t in tensors.values()}
    for launch, (_, _, args, _) in zip(launches, recorded):
        for path, value in _launch.tensors_in(args):
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
