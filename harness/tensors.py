"""What a tensor argument holds before a call: which cells decide the result, which may be read, which must not be.

LIVE       decides the result.
SLACK      may be read and must not matter: spare capacity of a captured buffer, a table row past the request's length.
FORBIDDEN  must not be read: the table rows of requests that are not in the batch.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from harness import floats


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
        """What an oracle sees: the live values of a 1-D tensor, the array of a wholly live one, else a `Table`."""
        live = [s for s in self.spans if s.region is Region.LIVE and s.stop > s.start]
        filled = sum(s.stop - s.start for s in live)
        leading = filled == max((s.stop for s in live), default=0)
        if leading and (len(self.shape) == 1 or filled == math.prod(self.shape)):
            values = np.concatenate([s.values for s in live]) if live else np.zeros(0, dtype=np.int64)
            return values if len(self.shape) == 1 else values.reshape(self.shape)
        return Table(self.shape, tuple(sorted(live, key=lambda s: s.start)))

    def rounded(self, name: str) -> "Input":
        """The same input with the numbers that a tensor of this float dtype holds instead of its own."""
        return replace(self, spans=tuple(s if s.values is None else replace(s, values=floats.rounded(
            s.values, name).astype(np.float64)) for s in self.spans))


@dataclass(frozen=True)
class Output:
    """An `out` tensor: only its shape; its prior contents are drawn by the engine."""

    shape: tuple[int, ...]


def _numbers(values) -> np.ndarray:
    """Integers as int64, anything else as float64."""
    values = np.asarray(values)
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def vector(values, spare: int = 0) -> Input:
    """A 1-D input whose cells are all LIVE, followed by `spare` cells of unused capacity."""
    values = _numbers(values)
    n = len(values)
    return Input((n + spare,), (Span(0, n, Region.LIVE, values), Span(n, n + spare, Region.SLACK)))


def dense(values) -> Input:
    """An input of any rank whose cells are all LIVE."""
    values = _numbers(values)
    return Input(values.shape, (Span(0, values.size, Region.LIVE, values.reshape(-1)),))


def runs(shape: tuple[int, ...], live: dict[int, np.ndarray], rest: Region = Region.FORBIDDEN) -> Input:
    """An input of any rank: `live[start]` are the LIVE cells from flat index `start` on, every other cell is `rest`."""
    spans, end = [], 0
    for start, values in sorted(live.items()):
        spans += [Span(end, start, rest), Span(start, start + len(values), Region.LIVE, _numbers(values))]
        end = start + len(values)
    spans.append(Span(end, math.prod(shape), rest))
    return Input(tuple(shape), tuple(s for s in spans if s.stop > s.start and s.region is not Region.FORBIDDEN))


def table(shape: tuple[int, int], rows: dict[int, np.ndarray]) -> Input:
    """A 2-D input: `rows[r]` is the LIVE prefix of row r, the rest of that row SLACK, every other row FORBIDDEN."""
    width = shape[1]
    spans = []
    for r, values in sorted(rows.items()):
        start, mid, stop = r * width, r * width + len(values), (r + 1) * width
        spans.append(Span(start, mid, Region.LIVE, _numbers(values)))
        spans.append(Span(mid, stop, Region.SLACK))
    return Input(tuple(shape), tuple(spans))


@dataclass(frozen=True)
class Table:
    """An input with cells that are not LIVE, as an oracle sees it. Reading one of those is an error of the oracle.

    `table[row, 0:n]`, `table[page, token, 0:n:2]`: one index per dimension, of which the last may be a slice.
    """

    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    _starts: list[int] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_starts", [s.start for s in self.spans])

    def __getitem__(self, index):
        *outer, last = index
        row = 0
        for i, n in zip(outer, self.shape):
            row = row * n + int(i)
        row *= self.shape[-1]
        if not isinstance(last, slice):
            return self._cells(row + int(last), 1, 1)[0]
        picked = range(last.start or 0, self.shape[-1] if last.stop is None else last.stop, last.step or 1)
        return self._cells(row + picked.start, len(picked), picked.step)

    def _cells(self, start: int, count: int, step: int) -> np.ndarray:
        if not count:
            return np.zeros(0, dtype=np.int64)
        k = bisect_right(self._starts, start) - 1
        stop = start + (count - 1) * step + 1
        if k < 0 or stop > self.spans[k].stop:
            width = self.shape[-1]
            live = 0 if k < 0 else max(0, self.spans[k].stop - start)
            first = start % width
            raise LookupError(f"the oracle read row {start // width}, columns [{first}, {first + stop - start}), of which "
                              f"{live} are LIVE")
        first = self.spans[k].start
        return self.spans[k].values[start - first : stop - first : step]
