"""The declaration of a transform, made once; every generic check takes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

from harness.tensors import Input, Output


class Role(str, Enum):
    IN = "in"
    OUT = "out"
    INOUT = "inout"


class Kind(str, Enum):
    """What a call is. A session is no kind of contract: it is an example of several steps on the same outputs."""

    BUFFER = "buffer"  # fills tensors in place
    HOST = "host"  # a function of host values that returns a host value


INT = ("int32", "int64")
INT32 = ("int32",)
ANY_STRIDES = ("contiguous", "offset", "pitched", "strided", "expanded")
UNIT_STRIDE = ("contiguous", "offset")
ROWS_STRIDED = ("contiguous", "offset", "pitched", "strided")


@dataclass(frozen=True)
class Arg:
    """A tensor argument. `shape` names the least size of each dimension in terms of the case's `dims()`.

    `cells` says what its cells are: regions of an input (live, slack, forbidden), states of an output (written, judged,
    untouched, don't care), both for an inout argument. It is documentation that a test compares with what is drawn.
    """

    name: str
    role: Role
    shape: tuple[str, ...]
    dtypes: tuple[str, ...]
    doc: str
    layouts: tuple[str, ...] = UNIT_STRIDE
    per_backend: bool = False
    optional: str | None = None
    may_alias: tuple[str, ...] = ()
    cells: str = ""
    sets_size: bool = False  # its own length is the size that `shape` names
    dtype_of: str | None = None  # the argument whose dtype this one has, of the same `dtypes`
    pitch: int = 1  # rows begin at multiples of so many cells, as kernels need that read 16 bytes at once

    def least_shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sum(int(t) if t.strip().isdigit() else dims[t.strip()] for t in s.split("+")) for s in self.shape)


@dataclass(frozen=True)
class Scalar:
    """A host argument."""

    name: str
    doc: str


@dataclass(frozen=True)
class Variant:
    """A rule that upstream has changed on purpose. `choices` maps each choice to its source; the first is ours."""

    name: str
    choices: Mapping[str, str]


@dataclass(frozen=True)
class Precondition:
    """What a caller owes. Inside them a wrong answer is a DEFECT, outside it is an unchecked precondition.

    `broken(case)` returns the same case with this one precondition violated, or several such cases, or None where it cannot
    be: a bound has two sides, and a value just past it is another matter than one far away.
    """

    name: str
    doc: str
    source: str
    broken: Callable[["Case"], "Case | tuple[Case, ...] | None"] | None = None


def beyond(size: int) -> tuple[int, int, int]:
    """Indices that an axis of `size` cells does not have: just past it, far past it, and in front of it."""
    return size, size + 3, -1


class Case:
    """One call of a transform: frozen dataclass of plain values, printable as Python, written to case files as JSON."""

    contract: ClassVar["Contract"]

    def dims(self) -> dict[str, int]:
        """The sizes that the contract's shapes name."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Every argument by name: `Input`, `Output`, a list of them (one per backend), None, or a host value."""
        raise NotImplementedError

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        """What cell `index` of argument `name` is about, in the domain's words."""
        return ""

    def batch_size(self) -> int:
        """How many requests the case has; examples with fewer than 2 are counted apart."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                shown.append(f"{f.name}={_python(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _python(value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_python(v) for v in value) + "]"
    return repr(value)


@dataclass(frozen=True, eq=False)  # a declaration equals itself alone
class Contract:
    """A transform: its name (upstream's), arguments, rules and oracle.

    `oracle` is called by keyword with every argument: live values for inputs, `Cells` for outputs (lists of them for
    arguments per backend; those of an inout argument hold its live values as `before`), host values as they are, and
    `variant`, the chosen rules.
    """

    name: str
    family: str
    doc: str
    origin: str
    case: type[Case]
    oracle: Callable[..., Any]
    args: tuple[Arg, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    variants: tuple[Variant, ...] = ()
    preconditions: tuple[Precondition, ...] = ()
    kind: Kind = Kind.BUFFER
    capturable: bool = False
    frozen_by_capture: tuple[str, ...] = ()
    upstream_names: tuple[str, ...] = ()

    def __post_init__(self):
        if not is_dataclass(self.case):
            raise TypeError(f"{self.name}: the case type {self.case.__name__} must be a dataclass")
        self.case.contract = self

    @property
    def names(self) -> list[str]:
        """What a subject's function is called with, by keyword."""
        return [a.name for a in self.args] + [s.name for s in self.scalars]

    def arg(self, name: str) -> Arg:
        """The declaration behind an argument or one of its per-backend tensors (`page_table_1[2]`)."""
        base = base_name(name)
        return next(a for a in self.args if a.name == base)

    def rules(self, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
        """The full set of variant choices, ours where `chosen` is silent."""
        rules = {v.name: next(iter(v.choices)) for v in self.variants}
        for name, choice in (chosen or {}).items():
            known = {v.name: list(v.choices) for v in self.variants}
            if choice not in known.get(name, ()):
                raise ValueError(f"{self.name} has no variant {name}={choice}; it knows {known or 'none'}")
            rules[name] = choice
        return rules


def base_name(name: str) -> str:
    return name.split("[")[0]


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Input | Output]:
    """Every tensor of a call by its full name; the tensors of a per-backend argument are numbered."""
    flat: dict[str, Input | Output] = {}
    for name, value in arguments.items():
        if isinstance(value, (Input, Output)):
            flat[name] = value
        elif isinstance(value, list):
            flat.update({f"{name}[{b}]": t for b, t in enumerate(value) if isinstance(t, (Input, Output))})
    return flat
