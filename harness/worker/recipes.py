"""Triton's semantic layer, asked once per combination of types.

In the interpreter `a + b` costs some 40 µs, of which the addition is one: types are promoted, shapes compared and type
objects made anew each time, though the answer (which builder functions run on which operands) follows from the types and
the Python values among the arguments alone. `Cookbook.remembering` keeps that answer as a recipe and carries it out the next
time: the same builder functions on the same operands. What it cannot follow is left to the stock code: an argument of an
unknown kind, a value that was looked at on the way, an operand that no builder function made.
"""

from collections.abc import Callable

MOST = 5_000  # recipes of one function; Python integers are part of the key, and a kernel may count with them
CONSTANT = ("create_splat", "create_broadcast", "create_expand_dims", "create_reshape", "create_make_range", "create_int_cast",
            "create_si_to_fp", "create_ui_to_fp", "create_fp_to_fp", "create_fp_trunc", "create_fp_ext", "get_all_ones_value")


class _Unknown(Exception):
    """An argument that no key can describe."""


class Cookbook:
    """The recipes of one interpreter."""

    def __init__(self, interpreter):
        import triton.language as tl

        self._builder = interpreter.interpreter_builder
        self._semantic = interpreter.interpreter_semantic
        self._tensor, self._handle = tl.tensor, interpreter.TensorHandle
        self._constexpr, self._tuple, self._slices, self._dtype = tl.constexpr, tl.tuple, (slice, tl.core.slice), tl.dtype
        self._kinds: dict[str, object] = {}
        self._tensor._kind = None  # of a tensor whose type was not looked at yet
        self._recording: _Recording | None = None

    def looked(self) -> None:
        """Something asked for the value of an operand: what follows is not decided by types."""
        if self._recording is not None:
            self._recording.sound = False

    def remembering(self, member):
        """A builtin of the language as kernels call it in the interpreter."""
        recipes: dict[tuple, Callable | None] = {}

        def call(*args, **kwargs):
            if "_semantic" in kwargs:
                del kwargs["_semantic"]
            if self._recording is not None:
                return member(*args, **kwargs, _semantic=self._recording.semantic)
            handles: list = []
            try:
                key = self._key(args, kwargs, handles)
            except _Unknown:
                return member(*args, **kwargs, _semantic=self._semantic)
            recipe = recipes.get(key, _NEW)
            if recipe is None:
                return member(*args, **kwargs, _semantic=self._semantic)
            if recipe is not _NEW:
                return recipe(handles, args)
            if len(recipes) >= MOST:
                recipes.clear()
            result, recipes[key] = self._record(member, args, kwargs, handles)
            return result

        return call

    # -- keys -------------------------------------------------------------------------------------------------------

    def _key(self, args: tuple, kwargs: dict, handles: list) -> tuple:
        key, tensor = [], self._tensor
        for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind is tensor and value._kind is not None:
                handles.append(value.handle)
                key.append(value._kind)
            elif kind is int:
                key.append(value)
            else:
                key.append(self._describe(value, handles))
        if len(handles) > 1 and len(set(map(id, handles))) < len(handles):
            first: dict[int, int] = {}
            key.append(tuple([first.setdefault(id(h), k) for k, h in enumerate(handles)]))
        return tuple(key)

    def _describe(self, value, handles: list):
        kind = type(value)
        if kind is self._tensor:
            if type(value.handle) is not self._handle:
                raise _Unknown
            handles.append(value.handle)
            if value._kind is None:
                value._kind = self._kinds.setdefault(str(value.type), object())
            return value._kind
        if value is None or kind is str:
            return value
        if kind is int:
            return value
        if kind is bool:
            return kind, value
        if kind is float:
            return kind, value.hex()
        if kind is self._constexpr:
            return "constexpr", self._describe(value.value, handles)
        if kind is tuple or kind is list:
            return kind, tuple(self._describe(v, handles) for v in value)
        if kind is self._tuple:
            return kind, tuple(self._describe(v, handles) for v in value.values)
        if kind in self._slices:
            return kind, tuple(self._describe(v, handles) for v in (value.start, value.stop, value.step))
        if isinstance(value, self._dtype):
            return self._dtype, str(value)
        raise _Unknown

    # -- recording --------------------------------------------------------------------------------------------------

    def _record(self, member, args: tuple, kwargs: dict, handles: list):
        """The result of the stock code, and the recipe of how it came about if that can be followed again."""
        self._recording = recording = _Recording(self._builder, self._handle, type(self._semantic), handles)
        try:
            result = member(*args, **kwargs, _semantic=recording.semantic)
        finally:
            self._recording = None
        return result, recording.recipe(result, args, self._shape_of)

    def _shape_of(self, tensor) -> dict:
        """What tensors of one type have in common."""
        kind = self._kinds.setdefault(str(tensor.type), object())
        return {**{n: v for n, v in tensor.__dict__.items() if n != "handle"}, "_kind": kind}


_NEW = object()


class _Recording:
    """Stands in for the builder while the stock code runs, and notes what is asked of it."""

    def __init__(self, builder, handle: type, semantic: type, inputs: list):
        self._builder, self._handle = builder, handle
        self.semantic = semantic(self)
        self.sound = True
        self._slots = {id(h): k for k, h in enumerate(inputs)}
        self._values = list(inputs)  # keeps them alive, so that an id stands for one handle
        self._constants: set[int] = set()
        self._inputs = len(inputs)
        self._steps: list[tuple] = []

    def __getattr__(self, name: str):
        method = getattr(self._builder, name)
        if not callable(method):
            return method

        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            self._note(name, method, args, kwargs, result)
            return result

        return call

    def _note(self, name: str, method, args: tuple, kwargs: dict, result) -> None:
        if name.startswith("get_") and not isinstance(result, self._handle):
            return  # a type, or a cache policy
        try:
            operands = [self._operand(a) for a in args]
        except _Unknown:
            self.sound = False
            return
        outputs = result if isinstance(result, tuple) else (result,)
        if kwargs or not all(o is None or isinstance(o, self._handle) for o in outputs):
            self.sound = False
            return
        constant = (name in CONSTANT or name.startswith("get_")) and all(
            not is_slot or at in self._constants for is_slot, at in operands)
        first = len(self._values)
        for output in outputs:
            if constant:
                self._constants.add(len(self._values))
            if output is not None:
                self._slots[id(output)] = len(self._values)
            self._values.append(output)
        if not constant:
            self._steps.append((method, operands, first, len(result) if isinstance(result, tuple) else 0))

    def _operand(self, value) -> tuple[bool, object]:
        if isinstance(value, self._handle):
            if id(value) not in self._slots:
                raise _Unknown
            return True, self._slots[id(value)]
        if isinstance(value, (list, tuple)) and any(isinstance(v, self._handle) for v in value):
            raise _Unknown
        return False, value

    def recipe(self, result, args: tuple, shape_of):
        """How to get there again, as a function of the operands and arguments; None if that is not known."""
        if not self.sound or type(result) not in (tuple, self.semantic.tensor, type(None)):
            return None
        made = []
        for part in result if isinstance(result, tuple) else (result,):
            same = [k for k, a in enumerate(args) if a is part]
            if part is None or same:
                made.append(f"args[{same[0]}]" if same else "None")
            elif type(part) is not self.semantic.tensor or part.handle is not None and id(part.handle) not in self._slots:
                return None
            else:
                made.append((shape_of(part), None if part.handle is None else self._slots[id(part.handle)]))
        return self._compiled(made, isinstance(result, tuple))

    def _compiled(self, made: list, several: bool):
        """The builder functions in order on numbered operands, and the tensors to make of the outcome, as Python."""
        names: dict = {"new": object.__new__, "Tensor": self.semantic.tensor}

        def named(value) -> str:
            names[name := f"k{len(names)}"] = value
            return name

        lines = [f"v{k}" for k in range(self._inputs)]
        lines = [f"[{', '.join(lines)}] = handles"] if lines else []
        at = {k: named(v) for k, v in enumerate(self._values) if k in self._constants}
        operand = lambda is_slot, value: at.get(value, f"v{value}") if is_slot else named(value)
        for method, operands, first, outputs in self._steps:
            targets = ", ".join(f"v{first + k}" for k in range(outputs or 1))
            lines.append(f"{targets} = {named(method)}({', '.join(operand(*o) for o in operands)})")
        results = []
        for k, part in enumerate(made):
            if isinstance(part, str):
                results.append(part)
                continue
            shape, slot = part
            lines += [f"t{k} = new(Tensor)", f"t{k}.__dict__.update({named(shape)})",
                      f"t{k}.handle = {'None' if slot is None else operand(True, slot)}"]
            results.append(f"t{k}")
        lines.append(f"return {', '.join(results)}{',' if several else ''}")
        exec("def follow(handles, args):\n " + "\n ".join(lines), names)
        return names["follow"]
