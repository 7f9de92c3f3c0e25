"""What the exhibits share: two functions from one body, outputs filled from lists, and what a process remembers.

An exhibit's body takes `faulty` first and the contract's arguments by keyword. With True it is the bug, with False its clean
twin, so a line that asks for `faulty` is the whole difference. Titles and upstream numbers are in `bugs.csv`, what should
catch each in `catalogue.py`. The bugs are retold in the terms of this suite's contracts; none is upstream's code.
"""

from functools import partial

import torch

EXHIBITS = {}
_calls: dict[str, int] = {}


def exhibit(bug: str):
    """Keep a body as two functions that a worker finds by name: `B001` and `B001_clean`."""

    def keep(body):
        EXHIBITS[bug], EXHIBITS[f"{bug}_clean"] = partial(body, True), partial(body, False)
        return body

    return keep


def replayed(bug: str) -> bool:
    """Whether this process has run the exhibit before, as the replay of what the first call captured."""
    _calls[bug] = _calls.get(bug, 0) + 1
    return _calls[bug] > 1


def put(out, values: list) -> None:
    """The first cells of a 1-D output."""
    out[: len(values)] = torch.tensor(values, dtype=torch.int64).to(out.dtype)


def sums(lengths: list) -> list[int]:
    """Exclusive prefix sums, with the total at the end."""
    result = [0]
    for n in lengths:
        result.append(result[-1] + n)
    return result


def elsewhere(call: dict, *names: str) -> dict:
    """The call with fresh tensors for some outputs: what a graph has captured stays as it is."""
    return {n: v if n not in names else _copy(v) for n, v in call.items()}


def _copy(value):
    return [_copy(v) for v in value] if isinstance(value, list) else None if value is None else value.clone()
