"""What a subject must do with every cell of an output.

An oracle receives one `Cells` per output and says, cell by cell, what must hold afterwards. A cell that it does not
mention is UNTOUCHED: the prior bytes must still be there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class State(IntEnum):
    UNTOUCHED = 0
    WRITTEN = 1
    DONT_CARE = 2
    JUDGED = 3


@dataclass(frozen=True)
class Judge:
    """A named rule for cells that have more than one right answer.

    `complaint(actual)` takes the judged cells as a flat array and returns None, or one clause saying what is wrong.
    """

    name: str
    complaint: Callable[[np.ndarray], str | None]


def one_of(*allowed: float) -> Judge:
    """Every cell holds one of `allowed`."""

    def complaint(actual: np.ndarray) -> str | None:
        wrong = [a for a in actual.tolist() if a not in allowed]
        return f"{wrong[0]} is none of {list(allowed)}" if wrong else None

    return Judge("one_of", complaint)


def same_multiset(expected: list) -> Judge:
    """The cells hold exactly the values of `expected`, in any order."""

    def complaint(actual: np.ndarray) -> str | None:
        got, want = sorted(actual.tolist()), sorted(expected)
        return None if got == want else f"the values {got} are not {want} in any order"

    return Judge("same_multiset", complaint)


def within(expected: np.ndarray, bound: np.ndarray) -> Judge:
    """Every cell differs from `expected` by at most `bound` (absolute, per cell; NaN never passes)."""

    def complaint(actual: np.ndarray) -> str | None:
        error = np.abs(actual.astype(np.float64) - expected)
        bad = np.flatnonzero(~(error <= bound))
        if not len(bad):
            return None
        i = int(bad[0])
        return f"cell {i} is {actual[i]}, must be {expected[i]} within {bound[i]}"

    return Judge("within", complaint)


class Cells:
    """The states of one output, written by an oracle like an array.

    >>> out = Cells((4,))
    >>> out[1] = 7
    >>> out.free(slice(2, 3), "inside the last block")
    >>> out
    Cells([. 7 ? .])

    A row of the text is a row along the last dimension.
    """

    def __init__(self, shape: tuple[int, ...], before=None):
        self.shape = tuple(shape)
        self.before = before
        self.state = np.zeros(self.shape, dtype=np.uint8)
        self.value = np.zeros(self.shape, dtype=np.int64)
        self.judges: list[tuple[np.ndarray, Judge]] = []

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, index, value) -> None:
        """WRITTEN: the subject must leave exactly `value`."""
        if np.asarray(value).dtype.kind == "f" and self.value.dtype.kind != "f":
            self.value = self.value.astype(np.float64)
        self.value[index] = value
        self.state[index] = State.WRITTEN

    def free(self, index, reason: str) -> None:
        """DON'T CARE, for a `reason` that the reader of the oracle needs: cells already WRITTEN keep their state."""
        picked = self.state[index]
        self.state[index] = np.where(picked == State.UNTOUCHED, State.DONT_CARE, picked)

    def judge(self, index, judge: Judge) -> None:
        """JUDGED: the cells at `index`, together, must satisfy `judge`."""
        self.state[index] = State.JUDGED
        member = np.zeros(self.shape, dtype=bool)
        member[index] = True
        self.judges.append((np.flatnonzero(member), judge))

    def __repr__(self) -> str:
        signs = {State.UNTOUCHED: ".", State.DONT_CARE: "?", State.JUDGED: "~"}
        columns = max(self.shape[-1], 1)
        rows, values = self.state.reshape(-1, columns), self.value.reshape(-1, columns)
        text = [
            "[" + " ".join(signs.get(State(s), str(v)) for s, v in zip(row, vals)) + "]"
            for row, vals in zip(rows.tolist(), values.tolist())
        ]
        return "Cells(" + "\n      ".join(text) + ")"
