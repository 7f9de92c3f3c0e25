"""The verdict of every (subject, transform), and what a gate concludes from them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

PASS, DEFECT, INTERMITTENT = "PASS", "DEFECT", "INTERMITTENT"
UNCHECKED, NOT_PROVIDED, INFRA = "UNCHECKED PRECONDITION", "NOT PROVIDED", "INFRA"
RED = (DEFECT, INTERMITTENT)


@dataclass
class Row:
    """One line of the verdict table."""

    subject: str
    transform: str
    lane: str
    verdict: str
    counted: int = 0
    degenerate: int = 0
    unsupported: int = 0
    seconds: float = 0.0
    checks: str = ""
    notes: list[str] = field(default_factory=list)

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Row":
        return cls(**json.loads(text))


def merged(rows: Sequence[Row]) -> list[Row]:
    """The lanes of each (subject, transform) as one line; what lies outside the contract becomes a note."""
    table: dict[tuple[str, str], Row] = {}
    order = [INFRA, DEFECT, INTERMITTENT, PASS, UNCHECKED, NOT_PROVIDED]
    for row in rows:
        key = (row.subject, row.transform)
        if key not in table:
            table[key] = Row(row.subject, row.transform, "all", NOT_PROVIDED, checks=row.checks)
        line = table[key]
        line.seconds += row.seconds
        line.notes += row.notes
        line.checks = line.checks or row.checks
        if row.lane == "inside":
            line.counted, line.degenerate, line.unsupported = row.counted, row.degenerate, row.unsupported
        if row.verdict != UNCHECKED and order.index(row.verdict) < order.index(line.verdict):
            line.verdict = row.verdict
    return sorted(table.values(), key=lambda r: (r.subject, r.transform))


def exit_code(rows: Sequence[Row]) -> int:
    """0 clean, 1 a finding, 2 the gate could not do its job: nothing ran, or something could not run."""
    lines = merged(rows)
    if any(line.verdict in RED for line in lines):
        return 1
    ran = [line for line in lines if line.verdict == PASS]
    idle = [line for line in ran if line.counted == 0]
    return 2 if not ran or idle or any(line.verdict == INFRA for line in lines) else 0
