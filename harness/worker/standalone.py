# What follows is the same in every such script: it builds the tensors, calls the kernel and compares.
import importlib
import importlib.util
import os
import sys
import types

import numpy
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
MARGIN = 1 << 18  # elements of zeros around every memory
BITS = {"float64": "int64", "float32": "int32", "float16": "int16", "bfloat16": "int16", "float8_e4m3fn": "uint8",
        "bool": "uint8"}  # how floats are written down
READ, WRITE = 2, 1


def load(subject):
    """The function under test: of a Python file, of a module, or of a file in a folder of modules."""
    sys.path[:0] = subject["paths"]
    if "folder" in subject:
        package = types.ModuleType("subject_of_the_case")
        package.__path__ = [subject["folder"]]
        sys.modules[package.__name__] = package
        module = importlib.import_module(f"{package.__name__}.{subject['module']}")
    elif "file" in subject:
        spec = importlib.util.spec_from_file_location("subject_of_the_case", subject["file"])
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(subject["module"])
    return getattr(module, subject["function"])


def zeros(count, dtype):
    """On the CPU, zeros that cost nothing until they are touched."""
    if DEVICE == "cuda":
        return torch.zeros(count, dtype=getattr(torch, dtype), device=DEVICE)
    return torch.from_numpy(numpy.zeros(count, dtype=dtype))


def build(step):
    """The memories as the case has them, as integers; and the tensors, which are views of them."""
    memory, tensors = {}, {}
    for name, (dtype, size, runs) in step["memory"].items():
        flat = zeros(MARGIN + size + MARGIN, BITS.get(dtype, dtype))
        for start, values in runs.items():
            flat[MARGIN + start : MARGIN + start + len(values)] = torch.tensor(values, dtype=flat.dtype)
        memory[name] = flat
    for name, (of, shape, strides, offset) in step["tensors"].items():
        typed = memory[of].view(getattr(torch, step["memory"][of][0]))
        tensors[name] = typed.as_strided(shape, strides, MARGIN + offset)
    return memory, tensors


def argument(spec, tensors):
    if "tensors" in spec:
        return [None if name is None else tensors[name] for name in spec["tensors"]]
    return tensors[spec["tensor"]] if "tensor" in spec else spec["value"]


def place(step, name, flat):
    """The index of a cell, and its element in memory."""
    _, shape, strides, offset = step["tensors"][name]
    index = []
    for size in reversed(shape):
        index.insert(0, flat % size)
        flat //= size
    return index, offset + sum(i * s for i, s in zip(index, strides))


def differences(step, memory):
    """Everything that is not as it must be after the call, as lines of text."""
    cells, free = {}, set()
    for name, runs in step["written"].items():
        for start, values in runs.items():
            for k, value in enumerate(values):
                index, element = place(step, name, start + k)
                cells[step["tensors"][name][0], element] = (f"{name}{index}", value, step["meaning"].get((name, start + k), ""))
    for name, runs in step["free"].items():
        for start, count in runs.items():
            free |= {(step["tensors"][name][0], place(step, name, start + k)[1]) for k in range(count)}
    for of, (dtype, size, runs) in step["memory"].items():
        kind, whole = getattr(torch, dtype), memory[of].cpu()
        for start, values in runs.items():
            now = whole[MARGIN + start : MARGIN + start + len(values)]
            for k in torch.nonzero(now != torch.tensor(values, dtype=now.dtype)).flatten().tolist():
                if (of, start + k) not in free and (of, start + k) not in cells:
                    was, became = (torch.tensor([v], dtype=now.dtype).view(kind).item() for v in (values[k], now[k].item()))
                    yield f"{of}, element {start + k} of its memory: {was} became {became}, and nothing may write there"
        for where, part in (("before", whole[:MARGIN]), ("after", whole[MARGIN + size :])):
            if part.any():
                yield f"{of}: bytes were written {where} it"
        for (other, element), (cell, value, meaning) in cells.items():
            if other == of:
                got, want = (torch.tensor([v], dtype=whole.dtype).view(kind) for v in (whole[MARGIN + element].item(), value))
                if not torch.allclose(got.double(), want.double(), rtol=0, atol=0, equal_nan=True):
                    yield f"{cell} is {got.item()}, and must be {want.item()}" + (f"; {meaning}" if meaning else "")
    for name, members, values, complaint in step["refused"]:
        places = [place(step, name, flat)[1] for flat in members]
        if memory[step["tensors"][name][0]].cpu()[[MARGIN + p for p in places]].tolist() == values:
            yield f"{name}{place(step, name, members[0])[0]} and the cells judged with it: {complaint}"


def spot(step, of, element):
    """An element of a memory, as a cell of the tensor there where that is easy to say."""
    _, shape, strides, offset = step["tensors"][of]
    if len(shape) == 1 and strides[0] and (element - offset) % strides[0] == 0:
        return f"{of}[{(element - offset) // strides[0]}] of {shape[0]}"
    return f"{of}, element {element} of its memory"


def watch(step, memory):
    """Triton's interpreter with every access looked up first; a wrong one is recorded and not performed."""
    from triton.runtime import interpreter

    native, seen = interpreter._interpreter, []
    marks = {}
    for of, flat in memory.items():
        marks[of] = numpy.zeros(flat.numel(), dtype=numpy.uint8)
        for first, count, stride, flags in step["access"][of]:
            marks[of][MARGIN + first : MARGIN + first + (count - 1) * stride + 1 : stride] |= flags

    def wrong(pointers, mask, need, size):
        bad = numpy.zeros(pointers.shape, dtype=bool)
        active = numpy.broadcast_to(mask, pointers.shape).astype(bool)
        for of, flat in memory.items():
            offset = pointers.astype(numpy.int64) - flat.data_ptr()
            for part in range(0, max(size, flat.element_size()), flat.element_size()):
                element = (offset + part) // flat.element_size()
                here = active & (element >= 0) & (element < flat.numel())
                lanes = here & ((marks[of][numpy.where(here, element, 0)] & need) != need)
                for at in numpy.unique(element[lanes & ~bad])[:3].tolist():
                    seen.append(f"{'store to' if need == WRITE else 'load from'} {spot(step, of, at - MARGIN)}, where that is "
                                "not allowed")
                bad |= lanes
                if need == WRITE:
                    marks[of][element[here & ~lanes]] |= READ
        return bad

    class Watched:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, pointers, mask, other, dtype):
            bad = wrong(pointers, mask, READ, numpy.dtype(dtype).itemsize)
            return native.load(pointers, numpy.ascontiguousarray(mask & ~bad), other, dtype)

        def store(self, pointers, value, mask):
            bad = wrong(pointers, mask, WRITE, value.dtype.itemsize)
            return native.store(pointers, value, numpy.ascontiguousarray(mask & ~bad))

    interpreter._interpreter = Watched()
    return native, seen


def main(subject, steps, watched, shims=()):
    """Exit status 1 while something is wrong."""
    function = load(subject)
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        for shim in shims:
            shim(interpreter)
    for number, step in enumerate(steps):
        memory, tensors = build(step)
        given = {name: argument(spec, tensors) for name, spec in step["arguments"].items()}
        native, seen = watch(step, memory) if watched and DEVICE == "cpu" else (None, [])
        returned, ended = None, []
        try:
            returned = function(**given)
        except SystemExit as raised:  # it would end this script too, as right if its status is 0
            ended = [f"raised SystemExit: {raised}"]
        if native:
            interpreter._interpreter = native
        wrong = ended or seen + list(differences(step, memory))
        if "returned" in step and not ended and returned != step["returned"]:
            wrong.append(f"returned {returned!r}, and must return {step['returned']!r}")
        wrong += [f"the argument {n} was changed to {given[n]!r}" for n, spec in step["arguments"].items()
                  if "value" in spec and given[n] != spec["value"]]
        if wrong:
            print(f"WRONG, call {number + 1} of {len(steps)} on {DEVICE}:")
            print("\n".join(f"  {line}" for line in wrong[:8]))
            print(f"  ({len(wrong)} in all)" if len(wrong) > 8 else "", end="\n" if len(wrong) > 8 else "")
            return 1
    print(f"RIGHT: nothing is wrong with this call on {DEVICE}")
    return 0
