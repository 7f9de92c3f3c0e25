"""Wrong calls, derived from a contract's declaration: every one must be refused before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness import layout as layouts
from harness.client import Fault
from harness.contract import Arg, Case, Role, base_name, tensors_of
from harness.differential import wire_arguments
from harness.layout import Layout, Place
from harness.tensors import Input, Output


@dataclass(frozen=True)
class Misuse:
    """One wrong call: what is wrong, the argument that the error must name, and the call."""

    name: str
    argument: str
    arguments: dict
    layout: Layout
    meta: str = ""


@dataclass(frozen=True)
class Answer:
    """What the subject made of a misuse."""

    error: str = ""
    message: str = ""
    wrote: str = ""
    fault: str = ""


def misuses(case: Case) -> Iterator[Misuse]:
    """Wrong dtype, wrong device, too small, missing, missing for one backend, and undeclared overlap, per argument."""
    contract, arguments = case.contract, case.arguments()
    tensors = tensors_of(arguments)
    for name, tensor in tensors.items():
        arg = contract.arg(name)
        wrong = "float32" if "float32" not in arg.dtypes else "int32"
        yield Misuse(f"{name} of dtype {wrong}", base_name(name), arguments, Layout({name: Place(dtype=wrong)}))
        if "int64" not in arg.dtypes:
            yield Misuse(f"{name} of dtype int64", base_name(name), arguments, Layout({name: Place(dtype="int64")}))
        yield Misuse(f"{name} on the device meta", base_name(name), arguments, Layout(), meta=name)
        for axis, least in enumerate(arg.least_shape(case.dims())):
            if least > 1 and not arg.sets_size:
                short = _with(arguments, name, _cut(tensor, axis, least - 1))
                yield Misuse(f"{name} with {least - 1} of {least} cells along axis {axis}", base_name(name), short, Layout())
        if arg.optional is None:
            yield Misuse(f"{name} missing", base_name(name), _with(arguments, name, None), Layout())
    for name in {base_name(n) for n in tensors if "[" in n}:
        if len(arguments[name]) > 1:
            last = f"{name}[{len(arguments[name]) - 1}]"
            yield Misuse(f"{name} missing for the last backend", name, _with(arguments, last, None), Layout())
            yield Misuse(f"{name} with one backend less", name, {**arguments, name: arguments[name][:-1]}, Layout())
    yield from _overlaps(case, arguments, tensors)


def _overlaps(case: Case, arguments: dict, tensors: dict) -> Iterator[Misuse]:
    one_dimensional = [n for n, t in tensors.items() if len(t.shape) == 1 and "int32" in case.contract.arg(n).dtypes]
    for out in one_dimensional:
        arg: Arg = case.contract.arg(out)
        for other in one_dimensional:
            allowed = base_name(other) in arg.may_alias or base_name(out) in case.contract.arg(other).may_alias
            if arg.role is Role.OUT and other != out and not allowed:
                if tensors[other].shape[0] >= arg.least_shape(case.dims())[0] > 0:
                    yield Misuse(f"{out} on the memory of {other}", base_name(out), arguments, Layout(aliases=((out, other),)))


def _with(arguments: dict, name: str, value) -> dict:
    base = base_name(name)
    if "[" not in name:
        return {**arguments, base: value}
    index = int(name[len(base) + 1 : -1])
    group = list(arguments[base])
    group[index] = value
    return {**arguments, base: group}


def _cut(tensor, axis: int, size: int):
    shape = tuple(size if k == axis else n for k, n in enumerate(tensor.shape))
    if isinstance(tensor, Output):
        return Output(shape)
    if len(shape) > 1:
        return Input(shape, ())
    kept = [replace(s, stop=min(s.stop, size), values=None if s.values is None else s.values[: size - s.start])
            for s in tensor.spans if s.start < size]
    return Input(shape, tuple(kept))


def attempt(case: Case, misuse: Misuse, worker) -> Answer:
    """Make the wrong call and say what came of it."""
    placed = layouts.place(case.contract, misuse.arguments, misuse.layout, seed=0, run=0)
    memory, blobs = placed.request()
    if misuse.meta:
        memory["tensors"][misuse.meta]["device"] = "meta"
    header = {"family": case.contract.family, "transform": case.contract.name, "order": 0, "rules": [],
              "steps": [{"memory": memory, "arguments": wire_arguments(misuse.arguments)}]}
    reply, _ = worker.run(header, blobs)
    if isinstance(reply, Fault):
        return Answer(fault=reply.detail)
    step = reply["steps"][0]
    wrote = f"{len(step['changes'])} of its tensors" if step["changes"] else ""
    raised = step["raised"] or {"type": "", "message": ""}
    return Answer(raised["type"], raised["message"], wrote)
