"""What a tensor argument holds before a call: which cells decide the result, which may be read, which must not be.

LIVE       decides the result.
SLACK      may be read and must not matter: spare capacity of a captured buffer, a table row past the request's length.
FORBIDDEN  must not be read: the table rows of requests that are not in the batch.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class Region(IntEnum):
    FORBIDDEN = 0
    SLACK = 1
    LIVE = 2


@dataclass(frozen=True)
class Span:
    """Cells `start <= i < stop` of a tensor, by flat logical index. `values` only where LIVE."""

    start: int
    stop: int
    region: Region
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Input:
    """An `in` or `inout` tensor: its shape and its spans; what no span covers is FORBIDDEN."""

    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def view(self) -> "np.ndarray | Table":
        """What an oracle sees: the live values of a 1-D tensor, or a `Table`."""
        if len(self.shape) == 1:
            live = [s for s in self.spans if s.region is Region.LIVE]
            return np.concatenate([s.values for s in live]) if live else np.zeros(0, dtype=np.int64)
        return Table(self.shape, self.spans)


@dataclass(frozen=True)
class Output:
    """An `out` tensor: only its shape; its prior contents are drawn by the engine."""

    shape: tuple[int, ...]


def vector(values, spare: int = 0) -> Input:
    """A 1-D input whose cells are all LIVE, followed by `spare` cells of unused capacity."""
    values = np.asarray(values, dtype=np.int64)
    n = len(values)
    return Input((n + spare,), (Span(0, n, Region.LIVE, values), Span(n, n + spare, Region.SLACK)))


def table(shape: tuple[int, int], rows: dict[int, np.ndarray]) -> Input:
    """A 2-D input: `rows[r]` is the LIVE prefix of row r, the rest of that row SLACK, every other row FORBIDDEN."""
    width = shape[1]
    spans = []
    for r, values in sorted(rows.items()):
        start, mid, stop = r * width, r * width + len(values), (r + 1) * width
        spans.append(Span(start, mid, Region.LIVE, np.asarray(values, dtype=np.int64)))
        spans.append(Span(mid, stop, Region.SLACK))
    return Input(tuple(shape), tuple(spans))


@dataclass(frozen=True)
class Table:
    """A 2-D input as an oracle sees it. Reading a cell that is not LIVE is an error of the oracle."""

    shape: tuple[int, int]
    spans: tuple[Span, ...]
    _rows: dict[int, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self):
        live = {s.start // self.shape[1]: s.values for s in self.spans if s.region is Region.LIVE and s.stop > s.start}
        object.__setattr__(self, "_rows", live)

    def __getitem__(self, index) -> np.ndarray:
        row, columns = index
        live = self._rows.get(int(row), np.zeros(0, dtype=np.int64))
        if not isinstance(columns, slice):
            columns = slice(int(columns), int(columns) + 1)
        start, stop, step = columns.start or 0, columns.stop, columns.step or 1
        if stop > len(live) and len(range(start, stop, step)) and range(start, stop, step)[-1] >= len(live):
            raise LookupError(f"the oracle read row {row}, columns [{start}, {stop}), of which {len(live)} are LIVE")
        return live[start:stop:step]
