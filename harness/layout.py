"""Where the tensors of a call lie in memory, and what every byte around them holds beforehand.

A `Layout` is drawn beside the case. `place` turns both into blocks (one allocation each) made of windows (byte images);
what a window does not cover is zero, so a 16 GiB table costs only the rows that matter.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from harness import floats, hashing
from harness.contract import Arg, Contract, Role, tensors_of
from harness.tensors import Input, Region

PAGE = 4096
LEAD = 256  # least red zone in front of a tensor, bytes
DENSE_LIMIT = 1 << 20  # larger blocks are described by windows instead of one image
SLACK_WINDOW = 4096  # cells of slack that are filled beside the live cells of a sparse block
FAR_ELEMENTS = 1 << 31  # a `far` tensor's last row starts just past this element

WRITE, INIT = 1, 2  # what the shadow memory lets a cell do; a cell without INIT must not be read


@dataclass(frozen=True)
class Place:
    """How one tensor is laid out.

    kind   contiguous | offset (starts inside its storage) | pitched (row pitch wider than the row) |
           strided (every second element) | expanded (equal elements or rows are one, stride 0) |
           far (last row past 2^31 elements)
    guard  which end lies flush against inaccessible memory
    """

    kind: str = "contiguous"
    dtype: str | None = None
    guard: str = "right"


@dataclass(frozen=True)
class Layout:
    """The places that differ from the default, tensors that share memory as (tensor, of), and the program order."""

    places: Mapping[str, Place] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    order: int = 0

    def place(self, name: str) -> Place:
        return self.places.get(name, _DEFAULT)

    def __repr__(self) -> str:
        parts = [f"{n}={p.kind}{'/' + p.dtype if p.dtype else ''}/{p.guard}" for n, p in sorted(self.places.items())]
        parts += [f"{a}=shares {b}" for a, b in self.aliases]
        parts += [f"program order {self.order}"] if self.order else []
        return ", ".join(parts) or "default"


_DEFAULT = Place()


@dataclass(frozen=True)
class View:
    """A strided tensor inside a block. Offsets and strides are in elements; `start` is the first cell's byte.

    A row is everything under one first index; the cells of a row lie `strides[-1]` apart. `name` is the dtype's name,
    `dtype` the NumPy dtype of its bits.
    """

    block: int
    start: int
    storage_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    name: str

    @property
    def dtype(self) -> np.dtype:
        return floats.storage(self.name)

    @property
    def columns(self) -> int:
        return row_cells(self.shape)

    def byte_of(self, flat: int) -> int:
        """The byte where the cell with flat logical index `flat` starts."""
        element = 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            flat, index = divmod(flat, size)
            element += index * stride
        return self.start + self.dtype.itemsize * element

    def locate(self, byte: int) -> tuple[int, ...]:
        """The logical index nearest to a byte; the last one may lie outside the tensor."""
        rest = (byte - self.start) // self.dtype.itemsize
        index = []
        for size, stride in zip(self.shape[:-1], self.strides[:-1]):
            index.append(min(max(rest // stride, 0), size - 1) if stride else 0)
            rest -= index[-1] * stride
        return (*index, rest // (self.strides[-1] or 1))


def row_cells(shape: tuple[int, ...]) -> int:
    """The cells of one row: of everything under one first index."""
    return shape[0] if len(shape) == 1 else math.prod(shape[1:])


@dataclass
class Window:
    block: int
    offset: int
    image: np.ndarray


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's cells inside one window: `count` cells from flat index `start`, `step` bytes apart."""

    window: int
    start: int
    count: int
    offset: int
    step: int


@dataclass
class Placed:
    """A call in memory: what the worker needs, and how to read back what it did."""

    contract: Contract
    arguments: dict
    sizes: list[int]
    guards: list[str]
    views: dict[str, View]
    windows: list[Window]
    pieces: dict[str, list[Piece]]
    access: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def cells(self, name: str, windows: list[np.ndarray] | None = None) -> dict[int, np.ndarray]:
        """The cells of a tensor by flat start index, as views into `windows` (default: the images before the call)."""
        dtype = self.views[name].dtype
        return {
            p.start: np.ndarray((p.count,), dtype, (windows[p.window] if windows else self.windows[p.window].image),
                                p.offset, (p.step,))
            for p in self.pieces[name]
        }

    def request(self) -> tuple[dict, list[np.ndarray]]:
        """The memory part of the message to the worker, and the byte blobs it refers to."""
        header = {
            "blocks": [{"bytes": s, "guard": g} for s, g in zip(self.sizes, self.guards)],
            "windows": [[w.block, w.offset, len(w.image)] for w in self.windows],
            "tensors": {
                n: {"block": v.block, "start": v.start, "storage_offset": v.storage_offset, "shape": list(v.shape),
                    "strides": list(v.strides), "dtype": v.name}
                for n, v in self.views.items()
            },
            "access": self.access,
        }
        return header, [w.image for w in self.windows]


@dataclass
class Observed:
    """Memory after a call: the windows as they are now, and the bytes that changed where no tensor has a cell."""

    windows: list[np.ndarray]
    stray: list[tuple[int, int, bytes]]  # block, byte, what stands there now


def held(contract: Contract, arguments: dict, layout: Layout) -> dict:
    """The arguments with the numbers that their tensors hold in this layout. Contents of an argument that has several float
    dtypes carry the mantissa of the longest one, so that a copy through a shorter one shows; the oracle must see them as
    rounded as the subject does. Every other argument's contents are numbers of its dtype already."""
    found = dict(arguments)
    for name, value in arguments.items():
        dtypes = contract.arg(name).dtypes if isinstance(value, Input) else ()
        if len(dtypes) > 1 and floats.is_float(dtypes[0]):
            found[name] = value.rounded(layout.place(name).dtype or dtypes[0])
    return found


def place(contract: Contract, arguments: dict, layout: Layout, seed: int, run: int, prior: "Prior | None" = None) -> Placed:
    """Lay out one call. Runs with different `run` have the same LIVE cells and different everything else."""
    builder = _Builder(contract, layout, seed, run, prior)
    tensors = tensors_of(arguments)
    shared = dict(layout.aliases)
    for name in sorted(tensors, key=lambda n: n in shared):
        builder.add(name, tensors[name], shared.get(name))
    return Placed(contract, arguments, builder.sizes, builder.guards, builder.views, builder.windows, builder.pieces,
                  builder.access)


class Prior:
    """Output contents that earlier steps left behind: the cells by (tensor, flat start)."""

    def __init__(self, placed: Placed, observed: Observed, earlier: "Prior | None" = None):
        self.cells = {**(earlier.cells if earlier else {}), **{n: placed.cells(n, observed.windows) for n in placed.views}}

    def __contains__(self, name: str) -> bool:
        return name in self.cells


class _Builder:
    def __init__(self, contract: Contract, layout: Layout, seed: int, run: int, prior: Prior | None):
        self.contract, self.layout, self.seed, self.run, self.prior = contract, layout, seed, run, prior
        self.sizes: list[int] = []
        self.guards: list[str] = []
        self.views: dict[str, View] = {}
        self.windows: list[Window] = []
        self.pieces: dict[str, list[Piece]] = {}
        self.access: list[tuple[int, int, int, int, int]] = []

    def add(self, name: str, tensor, alias_of: str | None) -> None:
        arg = self.contract.arg(name)
        spot = self.layout.place(name)
        if alias_of is not None:
            self._share(name, tensor, alias_of)
        else:
            self._allocate(name, tensor, spot, arg)
            self._fill(name, tensor)
        self._grant(name, tensor, arg.role)

    def _allocate(self, name, tensor, spot: Place, arg: Arg) -> None:
        dtype_name = spot.dtype or arg.dtypes[0]
        strides, storage_offset = strides_of(spot.kind, tensor, arg.pitch)
        dtype = floats.storage(dtype_name)
        cells = math.prod(tensor.shape)
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, strides)) + 1 if cells else 0
        extent = -(-reach // arg.pitch) * arg.pitch * dtype.itemsize
        size = -(-(extent + LEAD) // PAGE) * PAGE
        start = size - extent if spot.guard == "right" else storage_offset * dtype.itemsize
        self.sizes.append(size)
        self.guards.append(spot.guard)
        view = View(len(self.sizes) - 1, start, storage_offset, tensor.shape, strides, dtype_name)
        self.views[name] = view
        self.pieces[name] = []
        if size <= DENSE_LIMIT:
            self._dense(name, view)
        else:
            self._sparse(name, view, tensor)

    def _dense(self, name: str, view: View) -> None:
        window = self._window(name, view.block, 0, self.sizes[view.block])
        rows, columns = (1 if len(view.shape) == 1 else view.shape[0]), view.columns
        pitch = 0 if rows == 1 else view.strides[0]
        if pitch == columns * view.strides[-1]:
            rows, columns = 1, rows * columns  # the rows follow one another without a gap
        for r in range(rows if columns else 0):
            offset = view.start + r * pitch * view.dtype.itemsize
            step = view.strides[-1] * view.dtype.itemsize
            self.pieces[name].append(Piece(window, r * columns, columns, offset, step))

    def _sparse(self, name: str, view: View, tensor) -> None:
        """One window per run of cells that matters, with a poisoned margin where the neighbours are no cells."""
        size, itemsize, step = self.sizes[view.block], view.dtype.itemsize, view.strides[-1] * view.dtype.itemsize
        gap = (view.strides[0] - view.columns * view.strides[-1]) * itemsize if len(view.shape) > 1 else 0
        gaps = gap != 0
        # No byte may lie in two windows: what one shows of it, the other would overwrite.
        margin = 0 if isinstance(tensor, Input) else min(LEAD, gap // 2) if gaps else LEAD
        for start, stop in _runs(tensor, view.columns if gaps else math.prod(view.shape)):
            first, last = view.byte_of(start), view.byte_of(stop - 1) + itemsize
            lo, hi = max(0, first - margin), min(size, last + margin)
            window = self._window(name, view.block, lo, hi - lo)
            self.pieces[name].append(Piece(window, start, stop - start, first - lo, step))

    def _window(self, name: str, block: int, offset: int, size: int) -> int:
        words = hashing.cells(self.seed, f"{name}/around/{self.run}", np.arange(-(-size // 8)) + offset)
        self.windows.append(Window(block, offset, words.view(np.uint8)[:size].copy()))
        return len(self.windows) - 1

    def _fill(self, name: str, tensor) -> None:
        runs = self._cells(name)
        before = self._before(name, runs)
        for start, cells in runs.items():
            if self.prior is not None and name in self.prior and not isinstance(tensor, Input):
                cells[:] = self.prior.cells[name][start]
                continue
            cells[:] = before[start]
            for span in tensor.spans if isinstance(tensor, Input) else ():
                lo, hi = max(span.start, start), min(span.stop, start + len(cells))
                if lo >= hi or span.region is Region.FORBIDDEN:
                    continue
                if span.region is Region.LIVE:
                    values = span.values[lo - span.start : hi - span.start]
                    cells[lo - start : hi - start] = floats.encode(values, self.views[name].name)
                else:
                    cells[lo - start : hi - start] = self._slack(name, np.arange(lo, hi))

    def _before(self, name: str, runs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """The poison of every run of cells, hashed in one go."""
        if not runs:
            return {}
        index = np.concatenate([np.arange(start, start + len(cells)) for start, cells in runs.items()])
        values = self._bits(name, "prior", index)
        cuts = np.cumsum([len(cells) for cells in runs.values()])[:-1]
        return dict(zip(runs, np.split(values, cuts)))

    def _slack(self, name: str, index: np.ndarray) -> np.ndarray:
        """Plausible leftovers: non-negative integers of every magnitude, any bits of a float; different in each run."""
        if floats.is_float(self.views[name].name):
            return self._bits(name, "slack", index)
        raw = hashing.cells(self.seed, f"{name}/slack/{self.run}", index)
        return ((raw & np.uint64(0x7FFFFFFF)) >> (raw >> np.uint64(59))).astype(np.int64)

    def _bits(self, name: str, what: str, index: np.ndarray) -> np.ndarray:
        return hashing.poison(self.seed, f"{name}/{what}/{self.run}", index, self.views[name].dtype)

    def _cells(self, name: str) -> dict[int, np.ndarray]:
        dtype = self.views[name].dtype
        return {p.start: np.ndarray((p.count,), dtype, self.windows[p.window].image, p.offset, (p.step,))
                for p in self.pieces[name]}

    def _share(self, name: str, tensor, other: str) -> None:
        view = self.views[other]
        shape = (min(tensor.shape[0], view.shape[0]),)
        self.views[name] = View(view.block, view.start, view.storage_offset, shape, view.strides, view.name)
        self.pieces[name] = [Piece(p.window, p.start, min(p.count, shape[0]), p.offset, p.step) for p in self.pieces[other]]

    def _grant(self, name: str, tensor, role: Role) -> None:
        """Tell the shadow memory what each run of cells may be used for."""
        view = self.views[name]
        if isinstance(tensor, Input):
            may = {Region.LIVE: INIT, Region.SLACK: INIT, Region.FORBIDDEN: 0}
            extra = WRITE if role is Role.INOUT else 0
            spans = [(s.start, s.stop, may[s.region] | (extra if s.region is Region.LIVE else 0)) for s in tensor.spans]
        else:
            spans = [(0, math.prod(view.shape), WRITE)]
        for start, stop, flags in spans:
            for lo, hi in _by_row(start, stop, view.columns):
                step = view.strides[-1] * view.dtype.itemsize
                self.access.append((view.block, view.byte_of(lo), hi - lo, step, flags))


def strides_of(kind: str, tensor, multiple: int = 1) -> tuple[tuple[int, ...], int]:
    """Strides and storage offset, in elements, of a layout kind for a tensor's shape. The row pitch is a `multiple`, and so
    is the offset: what reads whole vectors needs both."""
    shape = tensor.shape
    storage_offset = -(-3 // multiple) * multiple if kind == "offset" else 0
    step = 2 if kind == "strided" else 1
    if len(shape) == 1:
        return (0 if kind == "expanded" and _constant(tensor) else step,), storage_offset
    inner = [step * math.prod(shape[k + 1 :]) for k in range(1, len(shape))]
    pitch = row_cells(shape) * step
    if kind == "expanded" and _equal_rows(tensor):
        pitch = 0
    elif kind in ("pitched", "strided"):
        pitch += 5
    elif kind == "far" and shape[0] > 1:
        pitch = max(pitch, FAR_ELEMENTS // (shape[0] - 1) + 7)
    if multiple > 1:
        pitch = -(-max(pitch, 1) // multiple) * multiple
    return (pitch, *inner), storage_offset


def _constant(tensor) -> bool:
    """Whether one stored element can stand for the whole tensor."""
    if not isinstance(tensor, Input):
        return False
    live = [s for s in tensor.spans if s.stop > s.start]
    return all(s.region is Region.LIVE for s in live) and len({v for s in live for v in s.values.tolist()}) == 1


def _equal_rows(tensor) -> bool:
    """Whether one stored row can stand for every row of the tensor."""
    if not isinstance(tensor, Input):
        return False
    columns = row_cells(tensor.shape)
    rows: list[list] = [[] for _ in range(tensor.shape[0])]
    for span in tensor.spans:
        for lo, hi in _by_row(span.start, span.stop, columns):
            values = None if span.values is None else span.values[lo - span.start : hi - span.start].tolist()
            rows[lo // columns].append((lo % columns, hi - lo, span.region, values))
    return len(rows) > 1 and all(row == rows[0] for row in rows)


def _runs(tensor, columns: int) -> list[tuple[int, int]]:
    """The runs of cells of a sparse tensor that get a window, cut after every `columns` cells. Of a long run that is not
    LIVE only the ends get one."""
    if not isinstance(tensor, Input):
        return [(start, start + columns) for start in range(0, math.prod(tensor.shape), columns)]
    runs: list[tuple[int, int]] = []
    for span in tensor.spans:
        if span.region is not Region.LIVE and span.stop - span.start > 2 * SLACK_WINDOW:
            runs += _by_row(span.start, span.start + SLACK_WINDOW, columns)
            runs += _by_row(span.stop - SLACK_WINDOW, span.stop, columns)
        else:
            runs += _by_row(span.start, span.stop, columns)
    return runs


def _by_row(start: int, stop: int, columns: int):
    """Cut a run of flat indices at the row ends."""
    while start < stop:
        end = min(stop, (start // columns + 1) * columns)
        yield start, end
        start = end


def changes(blocks: list[int], data: list) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """What a worker says that a call changed: for each of `blocks` two blobs, of positions (int64) and of bytes."""
    return [(block, np.frombuffer(positions, np.int64), np.frombuffer(values, np.uint8))
            for block, positions, values in zip(blocks, data[::2], data[1::2])]


def observe(placed: Placed, changes: list[tuple[int, np.ndarray, np.ndarray]]) -> Observed:
    """Memory after a call that changed bytes: their block, their positions in it, ascending, and what stands there now. A
    window without a change is the very image from before."""
    images = [w.image for w in placed.windows]
    windows: dict[int, list[int]] = {}
    for k, window in enumerate(placed.windows):
        windows.setdefault(window.block, []).append(k)
    stray = []
    for block, positions, values in changes:
        covered = np.zeros(len(positions), dtype=bool)
        pieces = _pieces(placed, block)
        for k in windows.get(block, ()):
            window = placed.windows[k]
            lo, hi = np.searchsorted(positions, (window.offset, window.offset + len(window.image)))
            if lo < hi:
                there = positions[lo:hi] - window.offset
                images[k] = window.image.copy()
                images[k][there] = values[lo:hi]
                covered[lo:hi] |= _owned_bytes(len(window.image), pieces.get(k, ()))[there]
        if not covered.all():
            stray += _stray(block, positions, values, covered)
    return Observed(images, stray)


def _stray(block: int, positions: np.ndarray, values: np.ndarray, covered: np.ndarray) -> list[tuple[int, int, bytes]]:
    """Of every run of changed bytes the part from the first one on that belongs to no cell."""
    found = []
    for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) > 1) + 1):
        outside = np.flatnonzero(~covered[run])
        if len(outside):
            found.append((block, int(positions[run[outside[0]]]), values[run[outside[0]] : run[-1] + 1].tobytes()))
    return found


def _pieces(placed: Placed, block: int) -> dict[int, list[tuple[Piece, int]]]:
    """For every window of a block the runs of cells in it, with the size of a cell."""
    found: dict[int, list[tuple[Piece, int]]] = {}
    for name, view in placed.views.items():
        for piece in placed.pieces[name] if view.block == block else ():
            found.setdefault(piece.window, []).append((piece, view.dtype.itemsize))
    return found


def _owned_bytes(size: int, pieces: Iterable[tuple[Piece, int]]) -> np.ndarray:
    """Which bytes of a window belong to a cell of some tensor."""
    owned = np.zeros(size, dtype=bool)
    for piece, itemsize in pieces:
        np.lib.stride_tricks.as_strided(owned[piece.offset :], (piece.count, itemsize), (piece.step, 1))[:] = True
    return owned
