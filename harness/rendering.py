"""How a finding reads in a terminal: one sentence in the domain's words, the shrunk case, the differing cells, the commands."""

from harness.results import Result


def finding(result: Result) -> str:
    """The text of one finding."""
    lines = [f"{result.label}  {result.transform}: {result.sentence}", f"  case      {result.case}"]
    lines += [f"  layout    {result.layout}"] if result.layout else []
    lines += [f"  variant   {result.variant}"] if result.variant else []
    lines.append(f"  check     {result.check} ({result.buffer})")
    lines += _table(result.differences)
    lines.append(f"  replay    ci/replay {result.replay}        (--inline --pdb | --cuda | --memcheck | --script)")
    lines.append(f"  keep      ci/replay --keep {result.path}  (adds it to tests/corpus)")
    if result.traceback:
        lines += ["", *("  | " + line for line in result.traceback.rstrip().splitlines())]
    return "\n".join(lines)


def repeated(result: Result, first: str) -> str:
    """A finding whose root cause was shown already."""
    cause = f"at {result.where}" if result.where else f"{result.check} ({result.buffer})"
    return (f"{result.label}  {result.transform}: {result.sentence}\n"
            f"  the same cause, {cause}, as {first}\n"
            f"  case      {result.case}\n  replay    ci/replay {result.replay}")


def _table(differences: list[list[str]]) -> list[str]:
    if not differences:
        return []
    rows = [["cell", "expected", "actual", "state", "meaning"], *differences]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return ["  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
