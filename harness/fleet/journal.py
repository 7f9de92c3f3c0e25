"""What is done, one JSON line per task, appended as soon as it is known: a campaign that is killed loses what was in flight.

The first line is the plan. A later one is what a task did (`shard.Line`), or that a process died with it in hand. Case files
are written before the line that names them. Lines may come twice: an example counts once, whoever tried it.
"""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from harness import casefile
from harness.client import UsageError, shown_path
from harness.fleet.plan import Plan, Task
from harness.fleet.shard import KINDS, Line, case_name
from harness.results import Result, red

NAME, CASES = "journal.jsonl", "cases"
ATTEMPTS = 3  # a task whose process died so often is left, as INFRA


@dataclass
class Look:
    """What all shards of one (subject, transform, lane) have done so far."""

    shards: int = 0
    seconds: float = 0.0
    first: int = 0
    checks: str = ""
    cells: set[str] = field(default_factory=set)
    reported: list[Result] = field(default_factory=list)
    met: list[Result] = field(default_factory=list)
    also: set[str] = field(default_factory=set)
    news: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # tasks that were given up
    tried: int = 0  # in all shards; an example of two of them is here twice
    _digests: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        self.shards += not line.partial
        self.seconds += line.seconds
        self.checks = line.checks
        self.cells |= set(line.cells)
        self.reported += [Result(**r) for r in line.results]
        self.met += [Result(**r) for r in line.met]
        self.also |= set(line.also)
        self.news += line.news
        for kind, text in line.tried.items():
            self._digests.setdefault(kind, []).append(base64.b64decode(text))
            self.tried += len(self._digests[kind][-1]) // 8

    def counted(self) -> dict[str, int]:
        """How many distinct examples of each kind; 8 bytes of memory each while it counts."""
        joined = {kind: b"".join(self._digests.get(kind, [])) for kind in KINDS}
        return {kind: len(np.unique(np.frombuffer(raw, np.uint64))) for kind, raw in joined.items()}

    @property
    def reached(self) -> bool:
        """Whether there is anything to say about it yet."""
        return bool(self.shards or self.lost or self.reported or self.met or self.counted()["counted"])

    @property
    def results(self) -> list[Result]:
        """Every finding of every shard. One that was only met is shown as the shard that shrunk it has it, if one did."""
        shrunk = {r.cause: r for r in self.reported}
        return self.reported + [replace(shrunk.get(r.cause, r), test=r.test) for r in self.met]

    @property
    def causes(self) -> set[tuple]:
        return {r.cause for r in self.results if red(r)}


class State:
    """A campaign as its journal tells it."""

    def __init__(self, campaign: str, plan: Plan, header: list[str], missing: dict[tuple[str, str, str], str]):
        self.campaign, self.plan, self.header, self.missing = campaign, plan, header, missing
        self.looks: dict[tuple[str, str, str], Look] = {look: Look() for look in plan.looks}
        self.done: set[str] = set()
        self.died: dict[str, int] = {}  # task -> how often

    def add(self, entry: dict) -> None:
        """Take in one line."""
        task = Task(**entry["task"])
        look = self.looks.setdefault((task.subject, task.transform, task.lane), Look())
        if "died" in entry:
            self.died[task.key] = self.died.get(task.key, 0) + 1
            look.news.append(f"{task.name}: {entry['died']}" + (f"; in hand: {entry['case']}" if entry["case"] else ""))
            if self.lost(task):
                look.lost.append(task.name)
            return
        line = Line(**entry)
        look.add(line)
        if not line.partial:
            self.done.add(task.key)

    def lost(self, task: Task) -> bool:
        """Whether a task was given up."""
        return self.died.get(task.key, 0) >= ATTEMPTS

    @property
    def seconds(self) -> float:
        """Core-seconds, or GPU-seconds, that shards were busy."""
        return sum(look.seconds for look in self.looks.values()) * (self.plan.gpus or 1)

    @property
    def tried(self) -> int:
        return sum(look.tried for look in self.looks.values())

    @property
    def causes(self) -> set[tuple]:
        return set().union(*(look.causes for look in self.looks.values()))


class Journal:
    """The file, and the folder of cases beside it."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME

    def vacant(self) -> None:
        """Raises:
        UsageError: the folder holds a campaign already.
        """
        if self.path.exists():
            raise UsageError(f"{shown_path(self.folder)} holds a campaign: --resume it, or name another --folder")

    def begin(self, state: State) -> None:
        """Write the plan down.

        Raises:
            UsageError: the folder holds a campaign already.
        """
        self.vacant()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._append({"campaign": state.campaign, "plan": state.plan.dump(), "header": state.header, "at": time.time(),
                      "missing": [[*look, why] for look, why in state.missing.items()]})

    def read(self, into: State | None = None) -> State:
        """What is done; added to what another journal said, where that is given.

        Raises:
            UsageError: there is no campaign in the folder.
        """
        lines = self._lines()
        first = next(lines, None)
        if first is None or "plan" not in first:
            raise UsageError(f"{shown_path(self.folder)} holds no campaign (no {NAME} that begins with a plan)")
        missing = {tuple(look): why for *look, why in first["missing"]}
        state = into or State(first["campaign"], Plan.load(first["plan"]), first["header"], missing)
        for entry in lines:
            state.add(entry)
        return state

    def _lines(self) -> Iterator[dict]:
        """Whole lines; a driver that was killed may have left half of one, which is cut off."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = 0
            for raw in file:
                if not raw.endswith(b"\n"):
                    file.truncate(end)
                    return
                end += len(raw)
                yield json.loads(raw)

    def finished(self, line: dict) -> dict:
        """Keep what a task did; its cases first. Returns the entry."""
        for name, content in line.pop("cases").items():
            casefile.write(self.folder / CASES / name, content)
        for folder, found in ((CASES, line["results"]), (f"{CASES}/met", line["met"])):
            for result in found:
                result["path"] = shown_path(self.folder / folder / Path(result["path"]).name)
        return self._append({**line, "cases": {}, "at": time.time()})

    def died(self, task: Task, why: str, case: dict | None) -> dict:
        """Keep that a process died, or could not do its task, and the case that it had in hand."""
        path = ""
        if case:
            path = shown_path(casefile.write(self.folder / CASES / case_name(case), case))
        return self._append({"died": why.strip().splitlines()[-1], "task": asdict(task), "case": path, "at": time.time()})

    def _append(self, entry: dict) -> dict:
        with self.path.open("a") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        return entry

