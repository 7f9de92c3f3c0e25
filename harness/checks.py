"""The five checks, on what a call left in memory. Each takes plain arrays and returns findings; none can be skipped
silently, and `tests/meta` shows each of them failing alone."""

from collections.abc import Sequence

import numpy as np

from harness import floats
from harness.client import shown_path
from harness.contract import Role, base_name
from harness.findings import Difference, Found, Picture
from harness.layout import Observed, Placed, View
from harness.states import Cells, State

MOST_DIFFERENCES = 6
CROP = (10, 16)  # rows and columns of a picture


def states(placed: Placed, observed: Observed, expected: dict[str, Cells], case) -> list[Found]:
    """Check 1: every output cell as its state says; integers exactly."""
    found = []
    for name, cells in expected.items():
        wrong, judged = _wrong_cells(placed, observed, name, cells)
        found += judged
        if len(wrong):
            found.append(_describe_cells(placed, observed, name, cells, wrong, case))
    return found


def _wrong_cells(placed: Placed, observed: Observed, name: str, cells: Cells) -> tuple[np.ndarray, list[Found]]:
    before, after = whole(placed, name, None), whole(placed, name, observed)
    view = placed.views[name]
    state, value = cells.state.reshape(-1), floats.rounded(cells.value.reshape(-1), view.name)
    meant = floats.decode(after, view.name)
    wrong = np.where(state == State.WRITTEN, _differs(meant, value), (state == State.UNTOUCHED) & _differs_bytes(after, before))
    found = []
    for members, judge in cells.judges:
        complaint = judge.complaint(meant[members])
        if complaint:
            cell = cell_name(view, int(members[0]))
            found.append(Found("states", base_name(name), f"{name}{cell} and the cells judged with it: {complaint}"))
    return np.flatnonzero(wrong), found


def differing(placed: Placed, observed: Observed, name: str, cells: Cells) -> np.ndarray:
    """The flat indices of the cells that are not as the oracle states; judged cells are not among them."""
    return _wrong_cells(placed, observed, name, cells)[0]


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return a != b


def _differs_bytes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = a.dtype.itemsize
    return (np.ascontiguousarray(a).view(np.uint8).reshape(-1, size)
            != np.ascontiguousarray(b).view(np.uint8).reshape(-1, size)).any(axis=1)


def whole(placed: Placed, name: str, observed: Observed | None) -> np.ndarray:
    """The bits of all cells of an output, in logical order."""
    runs = placed.cells(name, observed.windows if observed else None)
    parts = [runs[start] for start in sorted(runs)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=placed.views[name].dtype)


def _describe_cells(placed, observed, name, cells: Cells, wrong: np.ndarray, case) -> Found:
    before, after = whole(placed, name, None), whole(placed, name, observed)
    view = placed.views[name]
    was, now = floats.decode(before, view.name), floats.decode(after, view.name)
    rows = []
    for flat in wrong[:MOST_DIFFERENCES].tolist():
        index = tuple(int(i) for i in np.unravel_index(flat, view.shape))
        state = State(int(cells.state.reshape(-1)[flat]))
        must = floats.rounded(cells.value.reshape(-1)[flat], view.name) if state is State.WRITTEN else was[flat]
        rows.append(Difference(cell_name(view, flat), str(must), str(now[flat]), state.name, case.meaning(name, index)))
    first = rows[0]
    where = f"{name}{first.cell}"
    because = f"; {first.meaning}" if first.meaning else ""
    if first.state == State.UNTOUCHED.name:
        sentence = f"{where} was overwritten ({first.expected} became {first.actual}){because}"
    elif not _differs_bytes(after[wrong[:1]], before[wrong[:1]])[0]:
        sentence = f"{where} was not written: it still holds {first.actual}, and must be {first.expected}{because}"
    else:
        sentence = f"{where} is {first.actual}, and must be {first.expected}{because}"
    if len(wrong) > 1:
        sentence += f" (and {len(wrong) - 1} more cells)"
    return Found("states", base_name(name), sentence, tuple(rows), picture=_picture(name, cells, view, was, now, wrong))


def _picture(name: str, cells: Cells, view: View, was: np.ndarray, now: np.ndarray, wrong: np.ndarray) -> Picture:
    """A crop of the output with its first wrong cell in it; all but the last dimension are rows."""
    columns = max(view.shape[-1], 1)
    rows = len(now) // columns
    row, column = divmod(int(wrong[0]), columns)
    top, left = (max(0, min(at - size // 3, n - size)) for at, n, size in ((row, rows, CROP[0]), (column, columns, CROP[1])))
    flat = np.arange(len(now)).reshape(rows, columns)[top : top + CROP[0], left : left + CROP[1]]
    states, values = cells.state.reshape(-1), floats.rounded(cells.value.reshape(-1), view.name)

    def must(k: int) -> str:
        return {State.WRITTEN: str(values[k]), State.UNTOUCHED: str(was[k]), State.JUDGED: "rule"}.get(State(states[k]), "any")

    bad = np.isin(flat, wrong)
    return Picture(name, top, left, _text(flat, must), _text(flat, lambda k: str(now[k])),
                   _text(flat, lambda k: State(states[k]).name), tuple((int(r), int(c)) for r, c in zip(*np.nonzero(bad))))


def _text(flat: np.ndarray, say) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(say(k) for k in row) for row in flat.tolist())


def cell_name(view: View, flat: int) -> str:
    """`[3]` or `[row 1, col 65]`."""
    index = [int(i) for i in np.unravel_index(flat, view.shape)]
    return f"[row {index[0]}, col {index[1]}]" if len(index) == 2 else f"[{', '.join(map(str, index))}]"


def inputs(placed: Placed, observed: Observed, written: Sequence[str], moved: Sequence[str]) -> list[Found]:
    """Check 2: `in` arguments unchanged, bit for bit, and not changed and put back either: `written` names the tensors that
    PyTorch operations wrote to (what a kernel writes is the memory tier's business). `moved` names the arguments, outputs
    too, whose tensor objects were made to show other memory: a caller, or a captured graph, goes on with the old one."""
    found = [Found("inputs", base_name(n), f"after the call the tensor object {n} no longer shows the memory that was passed")
             for n in moved]
    outputs = {v.block for n, v in placed.views.items() if placed.contract.arg(n).role is not Role.IN}
    for name, view in placed.views.items():
        if placed.contract.arg(name).role is not Role.IN:
            continue
        same = all(observed.windows[p.window] is placed.windows[p.window].image for p in placed.pieces[name])
        after = {} if same else placed.cells(name, observed.windows)
        for start, before in () if same else placed.cells(name).items():
            changed = np.flatnonzero(_differs_bytes(after[start], before))
            if len(changed):
                flat = start + int(changed[0])
                was, now = (floats.decode(cells[changed[0]], view.name) for cells in (before, after[start]))
                found.append(Found("inputs", base_name(name),
                                   f"the input {name}{cell_name(view, flat)} was changed from {was} to {now}"))
                break
        else:
            if name in written and view.block not in outputs:  # what lies on an output's memory shows its writes
                found.append(Found("inputs", base_name(name), f"the input {name} was written to by a PyTorch operation, though "
                                                              "at the end it held what it held before"))
    return found


def written(placed: Placed, observed: Observed) -> str:
    """The first tensor whose memory changed, or ''."""
    for window, now in zip(placed.windows, observed.windows):
        if (window.image != now).any():
            return _tensor_at(placed, window.block)
    return _tensor_at(placed, observed.stray[0][0]) if observed.stray else ""


def redzones(placed: Placed, observed: Observed) -> list[Found]:
    """Check 3: the bytes before, after and between the rows of every tensor intact."""
    found = []
    for block, byte, data in observed.stray:
        name = _tensor_at(placed, block)
        found.append(Found("redzones", base_name(name),
                           f"{len(data)} bytes were written outside {name}, at {position(placed.views[name], byte)}"))
    return found


def _tensor_at(placed: Placed, block: int) -> str:
    return next(n for n, v in placed.views.items() if v.block == block)


def position(view: View, byte: int) -> str:
    """Where a byte lies relative to a tensor: `[row 3, col 129]: row has 128 columns`, or `[8]: it has 8 elements`."""
    index = view.locate(byte)
    cell = view.start + view.dtype.itemsize * sum(i * s for i, s in zip(index, view.strides))
    if byte // view.dtype.itemsize != cell // view.dtype.itemsize and 0 <= index[-1] < view.shape[-1] - 1:
        return f", between {list(index)} and the cell behind it, which are {view.strides[-1]} elements apart"
    if len(index) == 1:
        return f"[{index[0]}]: it has {view.shape[0]} element{'' if view.shape[0] == 1 else 's'}"
    if len(index) == 2:
        return f"[row {index[0]}, col {index[1]}]: it has {view.shape[0]} rows of {view.shape[1]} columns"
    return f"[{', '.join(map(str, index))}]: its shape is {view.shape}"


def interference(first: tuple[Placed, Observed], second: tuple[Placed, Observed], expected: dict[str, Cells],
                 case) -> list[Found]:
    """Check 4: with other prior outputs and other slack, the LIVE-determined cells are the same, the rest untouched."""
    found = []
    for name, cells in expected.items():
        view = first[0].views[name]
        bits, prior_bits = whole(second[0], name, second[1]), whole(second[0], name, None)
        a, b, prior = (floats.decode(x, view.name) for x in (whole(first[0], name, first[1]), bits, prior_bits))
        state = cells.state.reshape(-1)
        moved = (state == State.WRITTEN) & _differs(a, b)
        touched = (state == State.UNTOUCHED) & _differs_bytes(bits, prior_bits)
        wrong = np.flatnonzero(moved | touched)
        if len(wrong):
            flat = int(wrong[0])
            meaning = case.meaning(name, tuple(int(i) for i in np.unravel_index(flat, view.shape)))
            what = (f"is {a[flat]} or {b[flat]}, depending on what outputs and unused input cells held before" if moved[flat]
                    else f"was overwritten ({prior[flat]} became {b[flat]}) when memory held other values before")
            found.append(Found("interference", base_name(name),
                               f"{name}{cell_name(view, flat)} {what}" + (f"; {meaning}" if meaning else "")))
        for members, judge in cells.judges:
            complaint = judge.complaint(b[members])
            if complaint:
                found.append(Found("interference", base_name(name), f"{name}: with other prior contents, {complaint}"))
    return found


def memory(placed: Placed, reported: list[dict]) -> list[Found]:
    """Check 5: the memory tier's own findings, in terms of tensors, cells and programs."""
    return [_memory_finding(placed, f) for f in reported]


_VERB = {"read-outside": "load from", "write-outside": "store to", "read-forbidden": "load from",
         "write-input": "store to the input", "uninitialised": "load of the unwritten output", "race": "race on"}


def _memory_finding(placed: Placed, f: dict) -> Found:
    program = "({}, {}, {})".format(*f["program"])
    where = shown_path(f["where"])
    by = f"; program {program} at {where}" if f["where"] else ""
    if f["rule"] == "grid":
        return Found("memory", "grid", f"launch with the grid {f['detail']}, which hardware refuses{by}", where=where)
    if f["block"] is None or f["block"] >= len(placed.sizes):
        return Found("memory", f"{f['rule']} nowhere", f"{_VERB[f['rule']]} an address that belongs to no tensor{by}",
                     where=where)
    name = _tensor_at(placed, f["block"])
    view = placed.views[name]
    sentence = f"{_VERB[f['rule']]} {name}{position(view, f['byte'])}"
    if f["rule"] == "read-forbidden":
        sentence += ", a cell of no request in the batch"
    if f["rule"] == "race":
        sentence += ", which another program of the same launch changes or reads in no defined order"
    return Found("memory", f"{base_name(name)} {f['rule']}", sentence + by, where=where)
