"""Mutants of Triton kernels: a fixed list of small edits, each of which stands for a bug that such kernels have had.

An edit replaces one expression or statement of a source text and leaves every other byte. Kernels are mutated whole; of the
Python functions that launch them only the launches are, so argument checks stay as they are.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """A kind of edit: the bug it stands for, and an example, of which `tests/meta` checks that it is what the edit does."""

    name: str
    bug: str
    before: str
    after: str
    edits: Callable[[ast.AST, "Scope"], Iterator["ast.AST | tuple[ast.AST, ast.AST]"]]  # what stands for a node, or (part, new)
    launches: bool = False  # also applied to the functions that launch kernels


@dataclass(frozen=True)
class Scope:
    """What an edit may want to know: the names of the function's arguments, and of the file's kernels."""

    arguments: tuple[str, ...]
    kernels: frozenset[str]


@dataclass(frozen=True)
class Mutant:
    """One edit of one file. `identity` does not change when lines move; `lines` are those of the edited statement."""

    function: str
    operator: str
    change: str
    ordinal: int
    lines: tuple[int, int]
    span: tuple[int, int]
    text: str

    @property
    def identity(self) -> str:
        again = f" #{self.ordinal + 1}" if self.ordinal else ""
        return f"{self.function}: {self.operator}: {self.change}{again}"

    def applied(self, source: str) -> str:
        """The mutated file."""
        raw = source.encode()
        return (raw[: self.span[0]] + self.text.encode() + raw[self.span[1] :]).decode()


# -- recognising Triton -------------------------------------------------------------------------------------------------

_ATOMIC = ("atomic_add", "atomic_max", "atomic_min", "atomic_or", "atomic_and", "atomic_xchg", "atomic_cas")


def _called(node: ast.AST) -> str:
    """`load` of `tl.load(...)`, `min` of `min(...)`, else ''."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.attr if node.func.value.id in ("tl", "triton", "language") else ""
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _stores(node: ast.AST) -> bool:
    return _called(node) == "store" or _called(node) in _ATOMIC


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(d) or ast.unparse(d) == "jit" for d in function.decorator_list)


def _is_launch(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def _number(node: ast.AST) -> int | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if type(node.operand.value) is int else None
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _plus(node: ast.expr, amount: int) -> ast.expr:
    return ast.BinOp(node, ast.Add() if amount > 0 else ast.Sub(), ast.Constant(abs(amount)))


def _with(call: ast.Call, **changes) -> ast.Call:
    return ast.Call(**{"func": call.func, "args": call.args, "keywords": call.keywords, **changes})


def _swapped(items: list, i: int, value) -> list:
    return [*items[:i], value, *items[i + 1 :]]


# -- the edits ----------------------------------------------------------------------------------------------------------


def _drop_mask(node, scope):
    if _called(node) == "load" or _stores(node):
        kept = [k for k in node.keywords if k.arg not in ("mask", "other")]
        least = 1 if _called(node) == "load" else 2
        if len(kept) < len(node.keywords) or len(node.args) > least:
            yield _with(node, args=node.args[:least], keywords=kept)


def _drop_conjunct(node, scope):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield from (node.left, node.right)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(ast.And(), rest)


def _widen_mask(node, scope):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield ast.BinOp(node.left, ast.BitOr(), node.right)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        yield ast.BoolOp(ast.Or(), node.values)


_NEIGHBOUR = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


def _boundary(node, scope):
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _NEIGHBOUR:
        yield ast.Compare(node.left, [_NEIGHBOUR[type(node.ops[0])]()], node.comparators)


def _drop_clamp(node, scope):
    if _called(node) in ("minimum", "maximum", "min", "max", "clamp", "where"):
        positional = node.args[1:] if _called(node) == "where" else node.args[:1] if _called(node) == "clamp" else node.args
        if len(positional) >= 2 or _called(node) == "clamp":
            yield from positional


def _off_by_one(node, scope):
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        if _number(node.right) == 1:
            yield node.left
        elif _number(node.left) == 1 and isinstance(node.op, ast.Add):
            yield node.right
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Lt, ast.GtE)):
        yield ast.Compare(node.left, node.ops, [_plus(node.comparators[0], -1)])
    if _called(node) == "load" or _stores(node):
        yield node.args[0], _plus(node.args[0], 1)
    if _stores(node) and len(node.args) > 1:
        yield node.args[1], _plus(node.args[1], 1)
    if _called(node) == "range" and len(node.args) > 1:
        yield _with(node, args=_swapped(node.args, 1, _plus(node.args[1], -1)))
        if len(node.args) == 2:
            yield _with(node, args=_swapped(node.args, 1, _plus(node.args[1], 1)))


def _floor(node, scope):
    if _called(node) == "cdiv":
        yield ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and isinstance(node.left, ast.BinOp):
        top = node.left  # (a + b - 1) // b
        if isinstance(top.op, ast.Sub) and _number(top.right) == 1 and isinstance(top.left, ast.BinOp):
            if ast.dump(top.left.right) == ast.dump(node.right):
                yield ast.BinOp(top.left.left, ast.FloorDiv(), node.right)


def _drop_widening(node, scope):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to" and node.args:
        if ast.unparse(node.args[0]) in ("tl.int64", "tl.uint64"):
            yield node.func.value
    if _called(node) == "cast" and len(node.args) > 1 and ast.unparse(node.args[1]) in ("tl.int64", "tl.uint64"):
        yield node.args[0]


def _is_stride(name: str) -> bool:
    return "stride" in name or "pitch" in name


def _other_stride(node, scope):
    if isinstance(node, ast.Name) and _is_stride(node.id) and isinstance(node.ctx, ast.Load) and node.id in scope.arguments:
        others = [a for a in scope.arguments if _is_stride(a) and a != node.id]
        sibling = [a for a in others if a[:-1] == node.id[:-1]]
        after = [a for a in others if scope.arguments.index(a) > scope.arguments.index(node.id)]
        for name in (sibling or after or others)[:1]:
            yield ast.Name(name, ast.Load())
    if isinstance(node, ast.Subscript) and _number(node.slice) in (0, 1):
        names = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)]
        if any(_is_stride(n) for n in names):
            yield ast.Subscript(node.value, ast.Constant(1 - node.slice.value), ast.Load())


def _swap_arguments(node, scope):
    if not isinstance(node, ast.Call) or not (_is_launch(node) or _called(node) in scope.kernels or _called(node) == "where"):
        return
    for i in range(1 if _called(node) == "where" else 0, len(node.args) - 1):
        a, b = node.args[i], node.args[i + 1]
        if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred) and ast.dump(a) != ast.dump(b):
            span = dict(lineno=a.lineno, col_offset=a.col_offset, end_lineno=b.end_lineno, end_col_offset=b.end_col_offset)
            yield ast.Tuple([a, b], ast.Load(), **span), ast.Tuple([b, a], ast.Load())


def _drop_store(node, scope):
    if isinstance(node, ast.Expr) and _stores(node.value):
        yield ast.Pass()


def _wrong_axis(node, scope):
    if _called(node) in ("program_id", "num_programs"):
        held = [*node.args, *(k.value for k in node.keywords if k.arg == "axis")]
        if held and _number(held[0]) is not None:
            axis = ast.Constant(1 if _number(held[0]) == 0 else _number(held[0]) - 1)
            yield _with(node, args=[axis], keywords=[])


def _drop_branch(node, scope):
    if isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)


def _always_never(node, scope):
    for value in (True, False):
        yield ast.Constant(value)


def _sentinel(node, scope):
    if _called(node) == "load":
        for i, keyword in enumerate(node.keywords):
            if keyword.arg == "other" and _number(keyword.value) in (0, -1):
                new = ast.keyword("other", ast.Constant(-1 if _number(keyword.value) == 0 else 0))
                yield _with(node, keywords=_swapped(node.keywords, i, new))
    places = {"where": (1, 2), "full": (1,), "store": (1,)}.get(_called(node), ())
    for i in places:
        if i < len(node.args) and _number(node.args[i]) in (0, -1):
            yield _with(node, args=_swapped(node.args, i, ast.Constant(-1 if _number(node.args[i]) == 0 else 0)))


def _short_grid(node, scope):
    if _is_launch(node):
        grid = node.func.slice
        sizes = grid.elts if isinstance(grid, ast.Tuple) else [] if isinstance(grid, (ast.Lambda, ast.Name)) else [grid]
        for size in sizes:
            if _number(size) is None and not isinstance(size, ast.Starred):
                yield size, ast.Call(ast.Name("max", ast.Load()), [_plus(size, -1), ast.Constant(1)], [])


OPERATORS = (
    Operator("drop-mask", "the unmasked access of a lane past the end",
             "tl.store(out + i, x, mask=i < n)", "tl.store(out + i, x)", _drop_mask),
    Operator("drop-conjunct", "one of two bounds is forgotten (rows but not columns)",
             "(row < rows) & (column < width)", "row < rows", _drop_conjunct),
    Operator("widen-mask", "bounds joined by or",
             "(row < rows) & (column < width)", "(row < rows) | (column < width)", _widen_mask),
    Operator("boundary", "`<=` for `<`: one cell too many, or too few", "column < width", "column <= width", _boundary),
    Operator("drop-clamp", "a length, top-k or slot that is not clamped, or a choice that is always taken",
             "tl.minimum(length, topk)", "length", _drop_clamp),
    Operator("off-by-one", "an offset, bound or stored value that is one off",
             "tl.store(out + i, x)", "out + i + 1", _off_by_one),
    Operator("floor", "the last, partial block or page is forgotten", "tl.cdiv(n, size)", "n // size", _floor, launches=True),
    Operator("drop-widening", "an offset past 2^31 elements wraps", "row.to(tl.int64) * width", "row", _drop_widening),
    Operator("other-stride", "rows addressed with the pitch of another tensor or dimension",
             "row * table_stride_0", "table_stride_1", _other_stride),
    Operator("swap-arguments", "two arguments of a call changed places", "_kernel[(1,)](out, lengths)", "lengths, out",
             _swap_arguments, launches=True),
    Operator("drop-store", "an output that stays as it was", "tl.store(out + i, x)", "pass", _drop_store),
    Operator("wrong-axis", "the program's index along another axis of the grid",
             "tl.program_id(0)", "tl.program_id(1)", _wrong_axis),
    Operator("drop-branch", "a mode or an option that is always taken, or never", "if HAS_REAL: pass", "True", _drop_branch),
    Operator("sentinel", "-1 for 0 as the value of what is not there, or 0 for -1",
             "tl.load(p, mask=m, other=0)", "tl.load(p, mask=m, other=-1)", _sentinel),
    Operator("short-grid", "one program too few", "_kernel[(n, 1)](out)", "max(n - 1, 1)", _short_grid, launches=True),
)


# -- a file's mutants ---------------------------------------------------------------------------------------------------


def mutants(source: str, functions: frozenset[str] | None = None) -> list[Mutant]:
    """Every mutant of the kernels of a file and of their launches, in order; `functions` limits to functions of these names.

    >>> text = '@triton.jit\\ndef k(out, n):\\n    i = tl.arange(0, 8)\\n    tl.store(out + i, i, mask=i < n)\\n'
    >>> for m in mutants(text): print(m.identity)
    k: drop-mask: tl.store(out + i, i, mask=i < n) -> tl.store(out + i, i)
    k: boundary: i < n -> i <= n
    k: off-by-one: out + i -> out + i + 1
    k: off-by-one: i -> i + 1
    k: off-by-one: i < n -> i < n - 1
    k: drop-store: tl.store(out + i, i, mask=i < n) -> pass
    """
    tree = ast.parse(source)
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    kernels = frozenset(f.name for f in defined if _is_kernel(f))
    found: list[Mutant] = []
    for function in defined:
        kernel = function.name in kernels
        if functions is not None and function.name not in functions:
            continue
        scope = Scope(tuple(a.arg for a in (*function.args.posonlyargs, *function.args.args)), kernels)
        seen: Counter = Counter()
        for statement in _statements(function):
            for operator, node, new in _edits(statement, scope, kernel):
                change = f"{_text(node)} -> {_text(new)}"
                key = (operator.name, change)
                span = tuple(starts[line - 1] + column for line, column in (
                    (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
                text = _text(new) if isinstance(new, (ast.Pass, ast.Tuple)) else f"({_text(new)})"
                found.append(Mutant(function.name, operator.name, change, seen[key], _lines(statement), span, text))
                seen[key] += 1
    return found


def _text(node: ast.AST) -> str:
    """A node as Python; of the pair of arguments that change places, without parentheses."""
    return ast.unparse(node)[1:-1] if isinstance(node, ast.Tuple) else ast.unparse(node)


def _statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt):
                yield node


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement that belong to no statement inside it."""
    yield statement
    todo = [c for c in ast.iter_child_nodes(statement) if not isinstance(c, ast.stmt)]
    while todo:
        node = todo.pop(0)
        yield node
        todo[:0] = [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.stmt)]


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """The first and last line of a statement, of its head where it holds others."""
    body = getattr(statement, "body", None)
    return statement.lineno, max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno


def _edits(statement: ast.stmt, scope: Scope, kernel: bool) -> Iterator[tuple[Operator, ast.AST, ast.AST]]:
    launch = any(_is_launch(n) for n in _own(statement))
    for operator in OPERATORS:
        if not (kernel or (operator.launches and launch)):
            continue
        for node in _own(statement):
            for edit in operator.edits(node, scope):
                part, new = edit if isinstance(edit, tuple) else (node, edit)
                if _text(new) != _text(part):
                    yield operator, part, new
        if operator.name == "drop-branch" and isinstance(statement, ast.If) and not isinstance(statement.test, ast.Constant):
            for new in _always_never(statement.test, scope):
                yield operator, statement.test, new
