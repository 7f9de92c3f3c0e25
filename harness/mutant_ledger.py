"""What `ci/mutate` remembers: mutants that nothing can notice, each with its argument, and examples that kill many."""

import json
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness import casefile
from harness.client import ROOT, UsageError
from harness.mutant_lanes import BESIDE, INSIDE, Name

LEDGER = ROOT / "tests" / "meta" / "equivalent_mutants.toml"
KILLERS = ROOT / "tests" / "meta" / "mutant_killers.json"
EQUIVALENT, BLIND = "equivalent", "blind spot"


@dataclass(frozen=True)
class Entry:
    """Why nothing notices a mutant. `equivalent`: it does the same for everything in the contract. `blind spot: needs ...`: it
    does not, and what it would take to see it is beyond the CPU tier."""

    kind: str
    because: str

    @property
    def blind(self) -> bool:
        return self.kind != EQUIVALENT


def ledger(path: Path = LEDGER) -> dict[str, dict[str, Entry]]:
    """For every family, its mutants that nothing can notice.

    Raises:
        UsageError: an entry without an argument, of no known kind, or a mutant that is there twice.
    """
    found: dict[str, dict[str, Entry]] = {}
    for entry in tomllib.loads(path.read_text()).get("entry", []) if path.exists() else []:
        kind, because = entry.get("kind", ""), entry.get("because", "").strip()
        if not because:
            raise UsageError(f"{path}: an entry of {entry.get('family')} has no argument (`because`)")
        if kind != EQUIVALENT and not kind.startswith(f"{BLIND}: needs "):
            raise UsageError(f"{path}: an entry of {entry.get('family')} is of kind {kind!r}, which is neither {EQUIVALENT!r} "
                             f"nor '{BLIND}: needs ...'")
        family = found.setdefault(entry["family"], {})
        for identity in entry["mutants"]:
            if identity in family:
                raise UsageError(f"{path}: {entry['family']}: {identity} is there twice")
            family[identity] = Entry(kind, because)
    return found


def killers(path: Path = KILLERS) -> dict[str, dict[Name, int]]:
    """For every family, the examples that killed mutants in the last run that learned, and how many each."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return {family: {Name(transform, side, int(number)): kills for transform, sides in held.items()
                     for side, numbers in sides.items() for number, kills in numbers.items()}
            for family, held in known.items()}


def learn(family: str, kills: Counter, path: Path = KILLERS) -> None:
    """Keep the examples that killed a family's mutants, instead of those that were kept for it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    held: dict = {}
    for name, count in sorted(kills.items(), key=lambda item: (item[0].transform, item[0].side, item[0].number)):
        held.setdefault(name.transform, {INSIDE: {}, BESIDE: {}})[name.side][str(name.number)] = count
    known[family] = {transform: {side: n for side, n in sides.items() if n} for transform, sides in held.items()}
    casefile.write(path, {family: known[family] for family in sorted(known)})
