"""What a gate's worth of examples covers: `python -m strategies.coverage` prints the matrix, writes docs/coverage.md and
report/coverage.json.

Cells come from the declarations (every layout, dtype and alias of every argument, every flag of a case) and from a checklist
by field name: what real bugs needed. A cell that a transform cannot reach is listed in EXEMPT with its reason; any other
empty one is a hole.
"""

import argparse
import json
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from harness import registry
from harness.campaign import PROFILES
from harness.client import ROOT
from harness.contract import Case, Contract, base_name, tensors_of
from harness.differential import Example
from harness.generation import each_distinct
from strategies import domain

BUDGET = PROFILES["gate"].counted
CHECKLIST = {  # field of a case -> values that must come up
    "page_size": (1, 16, 32, 64, 128),
    "draft_tokens": (1, 2, 3, 4, 5, 8),
    "cp_size": (1, 2, 3, 4, 8),
    "num_steps": (2, 3, 4, 5, 8),
    "backends": (1, 2, 3, 4),
}
LENGTHS = ("seq_len", "length", "extend_len", "accept_len", "count", "keys")
_ROWS = "the interpreter takes milliseconds for each request: long batches are left to the GPU's long-context cases"
EXEMPT = (  # transform or family; dimension and the start of the cell's name; why
    ("set_k_and_s", ("requests", "more than 16"), _ROWS),
    ("fused_store_index_cache", ("requests", "more than 16"), _ROWS),
    ("create_flashinfer_kv_indices", ("requests", "more than 16"), _ROWS),
    ("create_flashmla_kv_indices", ("requests", "more than 16"), _ROWS),
    ("mla_multi_step_draft", ("requests", "more than 16"), _ROWS),
    ("mqa_logits", ("requests", "more than 16"), _ROWS),
    ("topk_ragged_chunked", ("requests", "more than 16"), _ROWS),
    ("topk_paged_chunked", ("requests", "more than 16"), _ROWS),
    ("paged_mqa_walk", ("requests", "more than 16"), _ROWS),
    ("flashmla_schedule", ("requests", "0"), "a precondition: at least one request"),
    ("get_k", ("lengths", "ragged"), "one request a call"),
    ("get_k", ("lengths", "very short"), "one request a call"),
    ("get_s", ("lengths", "ragged"), "one request a call"),
    ("get_s", ("lengths", "very short"), "one request a call"),
    ("dequantize_k_cache", ("lengths", "ragged"), "one run of tokens a call"),
    ("dequantize_k_cache", ("lengths", "very short"), "one run of tokens a call"),
    ("dequantize_k_cache_paged", ("lengths", ""), "a list of tokens; nothing has a length"),
    ("create_extend_after_decode_spec_info", ("lengths", "0"), "a precondition: a request accepts at least one token"),
    ("create_flashinfer_kv_indices", ("values", "page_size"), "a list of tokens; the page size only shapes the request table"),
    ("create_flashinfer_kv_indices", ("pairs", ""), "a list of tokens; the page size only shapes the request table"),
    ("pad_draft_extend_query", ("lengths", "very short"), "at most 17 query tokens a request"),
    ("unpad_draft_extend_output", ("lengths", "very short"), "at most 17 query tokens a request"),
    ("metadata", ("pairs", "wide False, page_size 1"), "pages of one token are always tried at full width"),
    ("draft_decode_slices", ("flags", "forget_padding True"), "only a broken precondition sets it"),
    ("transform_index_ragged", ("flags", "below True"), "only a broken precondition sets it"),
)
DIMENSIONS = ("requests", "lengths", "pages", "values", "flags", "pairs", "layouts", "dtypes", "memory")

Cell = tuple[str, str]  # dimension, what


def cells(contract: Contract) -> set[Cell]:
    """Every cell that a gate's worth of examples of this contract should fill."""
    return {cell for cell in {*declared(contract), *shaped(contract)} if not exempt(contract, cell)}


def exempt(contract: Contract, cell: Cell) -> str:
    """Why this transform cannot reach a cell, or ''."""
    return next((reason for name, (dimension, what), reason in EXEMPT
                 if name in (contract.name, contract.family) and cell[0] == dimension and cell[1].startswith(what)), "")


def declared(contract: Contract) -> Iterator[Cell]:
    """From the arguments: layouts, dtypes, guarded ends, shared memory, absence."""
    for arg in contract.args:
        yield from (("layouts", f"{arg.name} {kind}") for kind in arg.layouts)
        yield from (("dtypes", f"{arg.name} {dtype}") for dtype in arg.dtypes)
        yield from (("memory", f"{arg.name} on {other}") for other in arg.may_alias)
        yield ("memory", f"{arg.name} flush on the left")
        if arg.optional:
            yield from (("flags", f"{arg.name} {there}") for there in ("given", "None"))
    if contract.args:
        yield ("memory", "programs out of order")


def shaped(contract: Contract) -> Iterator[Cell]:
    """From the fields of the case."""
    has = _fields(contract.case)
    if contract.args:
        yield from (("requests", n) for n in ("0", "1", "2", "3 or more", "more than 16"))
    if set(LENGTHS) & set(has):
        yield from (("lengths", n) for n in ("0", "1", "ragged", "very short beside very long"))
        if "page_size" in has:
            yield from (("pages", n) for n in ("one before a page", "whole pages", "one past a page"))
    for name, values in CHECKLIST.items():
        yield from (("values", f"{name} {value}") for value in values if name in has)
    flags = [name for name, kind in has.items() if kind is bool]
    yield from (("flags", f"{name} {value}") for name in flags for value in (False, True))
    if "page_size" in has:
        yield from (("pairs", f"{name} {value}, page_size {page}") for name in flags for value in (False, True)
                    for page in CHECKLIST["page_size"])


def of(example: Example) -> set[Cell]:
    """The cells that one example fills."""
    contract, found = example.contract, set()
    for case in example.steps:
        found |= _of_case(case) | _of_layout(example, case)
    return found if contract.args else {c for c in found if c[0] not in ("requests", "memory")}


def _of_case(case: Case) -> set[Cell]:
    size = case.batch_size()
    found = {("requests", str(size) if size < 3 else "3 or more")} | ({("requests", "more than 16")} if size > 16 else set())
    plain = {f.name: getattr(case, f.name) for f in fields(case)}
    requests = list(_inner(plain.values()))
    lengths = {name: [getattr(r, name) for r in requests if isinstance(getattr(r, name, None), int)] for name in LENGTHS}
    lengths |= {name: [plain[name]] for name in LENGTHS if isinstance(plain.get(name), int)}
    for values in filter(None, lengths.values()):
        found |= {("lengths", str(n)) for n in (0, 1) if n in values}
        found |= {("lengths", "ragged")} if len(set(values)) > 1 else set()
        found |= {("lengths", "very short beside very long")} if max(values) >= 16 * (min(values) + 1) else set()
        found |= _around_pages(values, plain.get("page_size"))
    counts = {name: len(value) if isinstance(value, tuple) else value for name, value in plain.items() if name in CHECKLIST}
    found |= {("values", f"{name} {value}") for name, value in counts.items()}
    flags = {(name, value) for name, value in plain.items() if isinstance(value, bool)}
    flags |= {(f.name, getattr(r, f.name)) for r in requests for f in fields(r) if isinstance(getattr(r, f.name), bool)}
    found |= {("flags", f"{name} {value}") for name, value in flags}
    found |= {("pairs", f"{name} {value}, page_size {plain['page_size']}") for name, value in flags if "page_size" in plain}
    return found


def _inner(values) -> Iterator:
    """The requests in a case's fields, and the rows in those."""
    for value in values:
        for item in value if isinstance(value, tuple) else ():
            if is_dataclass(item):
                yield item
                yield from _inner(getattr(item, f.name) for f in fields(item))


def _around_pages(lengths: list[int], page: int | None) -> set[Cell]:
    if not page or page == 1:
        return set()
    tests = {"one before a page": page - 1, "whole pages": 0, "one past a page": 1 % page}
    return {("pages", name) for name, rest in tests.items() if any(n > 0 and n % page == rest for n in lengths)}


def _of_layout(example: Example, case: Case) -> set[Cell]:
    contract, arguments, layout = case.contract, case.arguments(), example.layout
    found = set()
    for name in tensors_of(arguments):
        arg, place = contract.arg(name), layout.places.get(name)
        found.add(("layouts", f"{arg.name} {place.kind if place else 'contiguous'}"))
        found.add(("dtypes", f"{arg.name} {place and place.dtype or arg.dtypes[0]}"))
        if place and place.guard == "left":
            found.add(("memory", f"{arg.name} flush on the left"))
    for arg in contract.args:
        if arg.optional:
            given = arguments[arg.name]
            there = [t is not None for t in given] if isinstance(given, list) else [given is not None]
            found |= {("flags", f"{arg.name} {'given' if t else 'None'}") for t in there}
    found |= {("memory", f"{base_name(x)} on {base_name(y)}") for a, b in layout.aliases for x, y in ((a, b), (b, a))}
    return found | ({("memory", "programs out of order")} if layout.order else set())


def _fields(kind: type) -> dict[str, type]:
    """The names and types of a case's fields, and of its requests'."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name not in {f.name for f in fields(kind)}:
            continue
        inner = [t for t in typing.get_args(hint) if isinstance(t, type) and is_dataclass(t)]
        for request in inner:
            found |= _fields(request)
        found[name] = hint
    return found


def drawn(contract: Contract, visit=lambda example: None) -> Counter:
    """How often each cell comes up in a gate's worth of examples; `visit` sees each of them."""
    seen: Counter = Counter()

    def count(example: Example) -> None:
        seen.update(of(example))
        visit(example)

    each_distinct(domain.of(contract), BUDGET, count)
    return seen


# -- the page -----------------------------------------------------------------------------------------------------------


def matrix(counts: dict[str, Counter]) -> dict[str, dict[str, dict[str, int]]]:
    """transform -> dimension -> cell -> how many examples have it."""
    table = {}
    for name, seen in counts.items():
        wanted = cells(registry.contracts()[name])
        table[name] = {d: {what: seen[d, what] for dim, what in sorted(wanted) if dim == d} for d in DIMENSIONS}
    return table


def page(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """The matrix as Markdown: cells filled, and the rarest of them."""
    lines = ["# What the generators cover", "", f"Written by `python -m strategies.coverage`: {BUDGET} distinct examples for "
             "each transform, as in the gate. A column says how many cells there are and how often the rarest came up; no cell "
             "may be empty. `strategies/coverage.py` has the cells and the exemptions.", "",
             "| transform | " + " | ".join(DIMENSIONS) + " |", "| --- |" + " ---: |" * len(DIMENSIONS)]
    for name, row in table.items():
        shown = [f"{len(row[d])}, {min(row[d].values())}x" if row[d] else "" for d in DIMENSIONS]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    lines += ["", "## Out of reach", "", "| transform | cell | why |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {dimension}: {what} | {why} |"
              for name, (dimension, what), why in EXEMPT]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> None:
    kept = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("python -m strategies.coverage", description=__doc__, formatter_class=kept).parse_args(given)
    table = matrix({name: drawn(contract) for name, contract in registry.contracts().items()})
    (ROOT / "docs" / "coverage.md").write_text(page(table), encoding="utf-8")
    (ROOT / "report").mkdir(exist_ok=True)
    (ROOT / "report" / "coverage.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    holes = [f"{name}: {d}: {what}" for name, row in table.items() for d in DIMENSIONS for what, n in row[d].items() if not n]
    print(*holes, sep="\n")
    print(f"{sum(len(row[d]) for row in table.values() for d in DIMENSIONS)} cells, {len(holes)} empty")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
