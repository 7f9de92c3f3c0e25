"""What several ways of testing make of the museum: their rows, as a file and as docs/comparison.md."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.museum import catalogue, plain, run

TOOLS = {"suite": "the suite", "redzones": "red zones only", "equal": "ordinary test", "viz": "triton-viz 3.0",
         "memcheck": "memcheck", "initcheck": "initcheck"}
SEEN, SLOW, UNABLE, ALARM = "seen", "too slow", "cannot run it", "also in the clean twin"
WORDS = """\
Written by `tests/museum/compare.py`; do not edit.

```sh
python -m tests.museum.compare --viz triton-sanitizer
python -m tests.museum.compare --only memcheck --only initcheck --out report/gpu.json    # on a GPU
python -m tests.museum.compare --merge report/comparison.json --merge report/gpu.json --write
```

The same bugs, strategies and examples for every column (seed 0, up to {budget} counted examples; {limit:.0f} s for what is not
the suite): examples and seconds to the first sign of the bug; empty: not seen.

- *The suite*: a finding of the kind that the [museum](museum.md) declares.
- *Red zones only*: canaries around and between rows. A call that dies of our guard pages does not count.
- *Ordinary test*: contiguous tensors of the contract's first dtype, zeroed outputs, what must be written compared by
  `torch.equal`; each call of a session on tensors of its own; no tensor of more than 2^24 cells. It has the suite's strategies
  and oracles, which is most of what finds bugs. Crashes are Triton's interpreter reading or writing what is not there.
- *triton-viz*: its sanitizer over the same calls, results not compared. It and the next two look at Triton kernels, so exhibits
  in PyTorch or plain Python are n/a. Its false alarms are `while` loops over loaded data, into whose bodies it looks although
  the condition is false from the start; what it cannot run is a division in the address of a load that is part of an address.
- *memcheck*, *initcheck*: compute-sanitizer on a GPU, every tensor an allocation of its own, 2 KiB of padding (memcheck), only
  cells that may be read initialised (initcheck), no tensor of more than 6 GiB; kernel compilation is not counted.

Anything raised counts as a sign, as it does in a test. A sign that the clean twin shows as well is none: *also in the clean
twin* is a false alarm, *cannot run it* something that the tool does not have, *too slow* what takes longer than that limit,
or {cpu:.0f} s for one example ({cuda:.0f} s on a GPU).
"""
ELSEWHERE = """\
## Where another way is ahead

None of the others needs a contract: triton-viz and compute-sanitizer judge any kernel as it stands, and an ordinary test needs
only a reference. compute-sanitizer sees compiled code, so what Triton's compiler, PyTorch's kernels or CUDA C++ do with an
address; here only the suite's GPU tier does. triton-viz's report shows the expression that an address came from. An ordinary
test's call is cheaper: no second run on other contents, no shadow memory, no new process for a session. By exhibit:
"""


@dataclass
class Column:
    """What one way of testing makes of the exhibits: by id, whether it was seen, how, after what; and where it ran."""

    on: str = ""
    rows: dict[str, dict] = field(default_factory=dict)


def page(columns: dict[str, Column]) -> str:
    """The tables as Markdown."""
    bugs, tools = catalogue.bugs(), [tool for tool in TOOLS if tool in columns]
    ids = sorted({name for c in columns.values() for name in c.rows})
    words = WORDS.format(budget=run.BUDGET, limit=plain.LIMIT, **plain.PATIENCE)
    lines = ["# The museum under other ways of testing", "", words,
             "| column | seen | of | false alarms | cannot run | too slow | median seconds | on |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    lines += [summary(tool, columns[tool]) for tool in tools]
    lines += ["", ELSEWHERE, *_ahead(columns, tools), "", "## By exhibit", "",
              "| id | bug | " + " | ".join(TOOLS[t] for t in tools) + " |", "| --- | --- |" + " ---: |" * len(tools)]
    for name in ids:
        cells = [cell(columns[t].rows[name]) if name in columns[t].rows else "n/a" for t in tools]
        lines.append(f"| {name} | {bugs[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ahead(columns: dict[str, Column], tools: list[str]) -> Iterator[str]:
    """Where another column sees more than the suite, or sees it sooner."""
    yield "| column | not seen by the suite | in fewer examples | in less than half the time |"
    yield "| --- | --- | --- | --- |"
    for tool in tools[1:]:
        rows = {name: row for name, row in columns[tool].rows.items() if verdict(row) == SEEN}
        suite = {name: columns["suite"].rows[name] for name in rows}
        more = [name for name in rows if verdict(suite[name]) != SEEN]
        fewer, faster = ([n for n, row in rows.items() if n not in more and row[what] * times < suite[n][what]]
                         for what, times in (("examples", 1), ("seconds", 2)))
        yield f"| {TOOLS[tool]} | " + " | ".join(" ".join(names) for names in (more, fewer, faster)) + " |"


def verdict(row: dict) -> str:
    """What a row counts as: seen, not seen, too slow, a false alarm, or something that the tool cannot run."""
    if row["how"] in (plain.LATE, "hang"):  # tools slow a call down, and no exhibit loops for ever
        return SLOW
    if not row["seen"]:
        return ""
    return SEEN if not row["twin"] else UNABLE if _raised(row["twin"]) else ALARM


def _raised(how: str) -> bool:
    return how.isidentifier() and how.endswith("Error")


def cell(row: dict) -> str:
    """A row's place in the table."""
    counts = verdict(row)
    if counts != SEEN:
        return f"{counts} ({row['twin']})" if counts == UNABLE else counts
    how = f" ({row['how']})" if row["how"] == "crash" or _raised(row["how"]) else ""
    return f"{row['examples']}, {row['seconds']:.2f} s{how}"


def summary(tool: str, column: Column) -> str:
    """A column in one line."""
    counts = Counter(map(verdict, column.rows.values()))
    found = [row["seconds"] for row in column.rows.values() if verdict(row) == SEEN]
    numbers = " | ".join(str(counts[v]) for v in (ALARM, UNABLE, SLOW))
    median = f"{statistics.median(found):.2f}" if found else ""
    return f"| {TOOLS[tool]} | {len(found)} | {len(column.rows)} | {numbers} | {median} | {column.on} |"


def read(path: Path) -> dict[str, Column]:
    """The columns of a file that an earlier run wrote."""
    return {tool: Column(**column) for tool, column in json.loads(path.read_text()).items()}


def save(path: Path, columns: dict[str, Column]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({tool: asdict(column) for tool, column in columns.items()}, indent=1) + "\n")


def merged(files: list[Path]) -> dict[str, Column]:
    """Rows of all files; of one exhibit in one column, the last."""
    columns: dict[str, Column] = {}
    for path in files:
        for tool, column in read(path).items():
            into = columns.setdefault(tool, Column())
            into.on = column.on
            into.rows.update(column.rows)
    return columns
