"""How a finding reads: one sentence in the domain's words, the shrunk case, the differing cells, the commands."""

from pathlib import Path

from harness.campaign import Report
from harness.client import ROOT


def shown_path(path: Path) -> str:
    """A path as the user types it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def finding(contract_name: str, rules: dict[str, str], report: Report) -> str:
    """The text of one finding."""
    found, path = report.found, shown_path(report.path)
    label = f"INTERMITTENT {report.intermittent}" if report.intermittent else "DEFECT"
    if found.check == "unchecked":
        label = f"UNCHECKED PRECONDITION ({found.buffer})"
    lines = [f"{label}  {contract_name}: {found.sentence}"]
    lines.append(f"  case      {report.example.steps[0] if len(report.example.steps) == 1 else list(report.example.steps)}")
    if repr(report.example.layout) != "default":
        lines.append(f"  layout    {report.example.layout}")
    if rules:
        lines.append(f"  variant   {', '.join(f'{k}={v}' for k, v in rules.items())}")
    lines.append(f"  check     {found.check} ({found.buffer})")
    lines += _table(found.differences)
    lines.append(f"  replay    ci/replay {path}        (--inline --pdb)")
    lines.append(f"  keep      ci/replay --keep {path}  (adds it to tests/corpus)")
    if found.traceback:
        lines += ["", *("  | " + line for line in found.traceback.rstrip().splitlines())]
    return "\n".join(lines)


def _table(differences) -> list[str]:
    if not differences:
        return []
    rows = [("cell", "expected", "actual", "state", "meaning")]
    rows += [(d.cell, d.expected, d.actual, d.state, d.meaning) for d in differences]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return ["  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
