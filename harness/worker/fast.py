"""What makes Triton's interpreter fast enough for a gate without changing what it computes. Each shim stands alone, and a
test compares results and findings with those of the stock form, which PLUMBLINE_INTERPRETER=stock runs."""

import functools
import inspect
import types

import numpy as np

from .recipes import Cookbook


def install(interpreter) -> None:
    """Patch the imported interpreter once per process."""
    skip_unused_overflow_checks(interpreter)
    look_dtypes_up(interpreter)
    build_handles_directly(interpreter)
    remember_semantics(interpreter)
    convert_arguments_by_dtype(interpreter)
    patch_language_by_list(interpreter)


def skip_unused_overflow_checks(interpreter) -> None:
    """Without debug the stock interpreter computes every 32-bit sum twice and drops the verdict; don't compute it."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        object.__setattr__(options, "sanitize_overflow", False)


def look_dtypes_up(interpreter) -> None:
    """The stock form makes a dictionary of all dtypes for every operand of every operation."""
    import triton.language as tl

    stock, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = stock(dtype)
        return found

    interpreter._get_np_dtype = numpy_dtype
    interpreter._validate_np_data_size = lambda array, dtype: array.itemsize <= (dtype._most or _most_bytes(dtype))
    tl.dtype._most = None


def _most_bytes(dtype) -> int:
    """The size that an element of a Triton type may have in NumPy."""
    dtype._most = 8 if dtype.is_ptr() else max(dtype.primitive_bitwidth, 8) // 8
    return dtype._most


def build_handles_directly(interpreter) -> None:
    """The builder functions that kernels spend their time in, without the detours: `np.full` for a splat, a comparison of
    type objects for a cast, a check of every result's size twice, a mask of ones made for every load."""
    import triton.language as tl

    builder, handle_type, numpy_dtype = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._get_np_dtype
    stock_binary, stock_splat, stock_cast = builder.binary_op, builder.create_splat, builder.cast_impl
    plain, ones, zeros = tl.dtype, functools.cache(np.ones), functools.cache(np.zeros)

    def handle(data, dtype):
        made = object.__new__(handle_type)
        made.data, made.dtype, made.attr = data, dtype, {}
        return made

    def binary(op):
        def create(self, lhs, rhs):
            data = lhs.data
            if data.dtype.char == "?":  # what int1 does differs between versions
                return stock_binary(self, lhs, rhs, op)
            output, dtype = op(data, rhs.data), lhs.dtype
            if type(dtype) is not plain:
                dtype = dtype.scalar
            if output.itemsize > (dtype._most or _most_bytes(dtype)):
                output = output.astype(numpy_dtype(dtype))
            return handle(output, dtype)

        return create

    def create_splat(self, block, scalar):
        if type(scalar.dtype) is tl.block_type:
            return stock_splat(self, block, scalar)
        output = np.empty(_shape(block), numpy_dtype(scalar.dtype))
        output[...] = scalar.data
        return handle(output, scalar.dtype.scalar)

    def cast_impl(self, source, target):
        if tl.bfloat16.name in (source.dtype.scalar.name, target.scalar.name):
            return stock_cast(self, source, target)
        return handle(source.data.astype(numpy_dtype(target)), target.scalar)

    def create_addptr(self, pointer, offset):
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        return handle(pointer.data + size * offset.data.astype(np.uint64), pointer.dtype)

    def create_load(self, pointers, *_):
        element, data = pointers.get_element_ty(), pointers.data
        dtype = numpy_dtype(element)
        return handle(interpreter._interpreter.load(data, ones(data.shape, bool), zeros(data.shape, dtype), dtype), element)

    for name, op in list(_binary_operations(builder)):
        setattr(builder, name, binary(op))
    builder.create_splat, builder.cast_impl = create_splat, cast_impl
    builder.create_addptr, builder.create_load = create_addptr, create_load


def _binary_operations(builder):
    """The builder's functions that apply one NumPy function to two operands, each with that function."""

    class Asked:
        def binary_op(self, lhs, rhs, op):
            return op

    for name, function in vars(builder).items():
        if name.startswith("create_") and inspect.isfunction(function) and function.__name__ == "<lambda>":
            if "binary_op" in function.__code__.co_names:
                yield name, function(Asked(), None, None)


def _shape(block) -> tuple[int, ...]:
    """A block type's shape; Triton's own is a tuple of its language, which NumPy reads element by element."""
    found = block.__dict__.get("_numpy_shape")
    if found is None:
        found = block._numpy_shape = tuple(block.shape)
    return found


def remember_semantics(interpreter) -> None:
    """Ask Triton's semantic layer once per combination of types; see recipes.py."""
    book = Cookbook(interpreter)
    stock_tensor, stock_truth = interpreter._patch_lang_tensor, interpreter.TensorHandle.__bool__

    def patch_attr(obj, name, member, builder, scope):
        scope.set_attr(obj, name, book.remembering(member))

    def patch_tensor(tensor, scope):
        stock_tensor(tensor, scope)
        for name in ("__index__", "__bool__"):
            scope.set_attr(tensor, name, looking(getattr(tensor, name)))

    def looking(stock):
        def method(self):
            book.looked()
            return stock(self)

        return method

    interpreter._patch_attr = patch_attr
    interpreter._patch_lang_tensor = patch_tensor
    interpreter.TensorHandle.__bool__ = looking(stock_truth)


def convert_arguments_by_dtype(interpreter) -> None:
    """A tensor argument's Triton type is read from a string that is made of its dtype, at every launch; look it up."""
    import torch
    import triton.language as tl

    stock, common = interpreter._implicit_cvt, {}

    def convert(argument):
        if type(argument) is not torch.Tensor:
            return stock(argument)
        known = common.get(argument.dtype)
        if known is None:
            first = stock(argument)
            common[argument.dtype] = {n: v for n, v in first.__dict__.items() if n != "handle"}
            return first
        made = object.__new__(tl.tensor)
        made.__dict__.update(known)
        made.handle = interpreter.TensorHandle(np.array([argument.data_ptr()], dtype=np.uint64), made.type)
        return made

    interpreter._implicit_cvt = convert


def patch_language_by_list(interpreter) -> None:
    """Every launch, and every call of a jit function inside a kernel, patches `triton.language` by walking all its members:
    a third of the interpreter's time on Triton 3.9. What is replaced by what never changes, so walk them once."""
    import triton.language as tl

    stock, visible = interpreter._patch_lang, set()
    patches = _Patches(lambda: stock(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})), interpreter._MISSING)

    def patch(fn):
        if fn not in visible:
            if not any(value is tl or value is tl.core for value in fn.__globals__.values()):
                return stock(fn)  # which says so
            visible.add(fn)
        return patches.apply()

    interpreter._patch_lang = patch


class _Patches:
    """The attributes that a launch replaces, as (object, name, original, replacement). Nested calls need nothing more."""

    def __init__(self, find, missing):
        self._find, self._missing, self._changes, self._applied = find, missing, [], False

    def apply(self) -> "_Patches | None":
        if self._applied:
            return None
        self._applied = True
        if self._changes:
            for obj, name, _, replacement in self._changes:
                setattr(obj, name, replacement)
        else:
            changes = self._find()._changes
            final = {(id(obj), name): getattr(obj, name) for obj, name, _ in changes}
            first = {(id(obj), name): (obj, name, original) for obj, name, original in reversed(changes)}
            self._changes = [(*change, final[key]) for key, change in first.items()]
        return self

    def restore(self) -> None:
        self._applied = False
        for obj, name, original, _ in self._changes:
            if original is self._missing:
                delattr(obj, name)
            else:
                setattr(obj, name, original)
