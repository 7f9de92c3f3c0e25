"""A finding's picture as inline SVG: what an output must hold around its first wrong cell, what it holds, each cell's state,
and the difference."""

from html import escape

WIDEST = 11  # characters of a cell's text
ROW = 22
CHARACTER = 7.2
MOST_WIDTH = 620.0  # of one panel, in pixels


def panels(picture: dict) -> list[tuple[str, str]]:
    """(title, SVG) for expected, actual, state and difference. Colours are classes; the page's style sheet sets them."""
    grids = {name: picture[name] for name in ("expected", "actual", "state")} | {"difference": _delta(picture)}
    width = max(len(_short(text)) for grid in grids.values() for row in grid for text in row) * CHARACTER + 12
    kept = _columns(picture, width)
    return [(title, _svg(title, grid, picture, kept, width)) for title, grid in grids.items()]


def _columns(picture: dict, width: float) -> range:
    """The columns that fit, with the first wrong cell among them."""
    every = len(picture["expected"][0])
    most = max(1, min(every, int((MOST_WIDTH - 60) / width)))
    first = min(column for _, column in picture["wrong"])
    start = max(0, min(first - most // 3, every - most))
    return range(start, start + most)


def _delta(picture: dict) -> list[list[str]]:
    wrong = {tuple(w) for w in picture["wrong"]}
    return [[_change(must, got) if (r, c) in wrong else "·" for c, (must, got) in enumerate(zip(expected, actual))]
            for r, (expected, actual) in enumerate(zip(picture["expected"], picture["actual"]))]


def _change(must: str, got: str) -> str:
    """By how much a wrong cell is off, for integers."""
    try:
        return f"{int(got) - int(must):+d}"
    except ValueError:
        return "≠"


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[:6] + "…" + text[-4:]


def _svg(title: str, grid, picture: dict, kept: range, width: float) -> str:
    rows = len(grid)
    labels = [str(picture["row"] + r) for r in range(rows)]
    left = max(map(len, labels)) * CHARACTER + 10
    across, down = left + width * len(kept) + 1, ROW * (rows + 1) + 1
    wrong = {tuple(w) for w in picture["wrong"]}
    parts = [f'<svg class="grid" viewBox="0 0 {across:.0f} {down}" width="{across:.0f}" height="{down}" role="img" '
             f'aria-label="{escape(title)} of {escape(picture["tensor"])}, rows from {labels[0]}, columns from '
             f'{picture["column"] + kept.start}">']
    for k, c in enumerate(kept):
        parts.append(_label(left + width * (k + 0.5), ROW * 0.7, str(picture["column"] + c), "middle"))
    for r in range(rows):
        parts.append(_label(left - 6, ROW * (r + 1.7), labels[r], "end"))
        for k, c in enumerate(kept):
            kind = " ".join(["cell", picture["state"][r][c].lower(), *(["wrong"] if (r, c) in wrong else [])])
            text, x, y = grid[r][c], left + width * k, ROW * (r + 1)
            parts.append(f'<g class="{kind}"><title>{escape(_cell(picture, r, c))}</title>'
                         f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="{ROW - 2}" rx="2"/>'
                         f'<text x="{x + width / 2 - 1:.1f}" y="{y + ROW * 0.67:.1f}" text-anchor="middle">'
                         f"{escape(_short(text))}</text></g>")
    return "".join(parts) + "</svg>"


def _cell(picture: dict, r: int, c: int) -> str:
    return (f"row {picture['row'] + r}, col {picture['column'] + c}: expected {picture['expected'][r][c]}, "
            f"actual {picture['actual'][r][c]}, {picture['state'][r][c]}")


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
