"""What a run leaves behind: verdicts.json, findings.json and summary.md always, index.html where Jinja2 is."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import pictures
from harness.client import ROOT
from harness.results import Result, bucketed, plain, red
from harness.verdicts import RED, Row, merged

NEEDS_JINJA = "report: no index.html, Jinja2 is not here; pip install 'jinja2>=3.1' (the extra 'report'); the rest was written"
MOST_ANNOTATIONS = 10  # what GitHub shows per step and kind
SLOTS = {  # file in the report's folder -> its heading, what it shows, what writes it
    "campaign.json": ("Campaign", "examples, coverage and findings of each transform, and what they cost", "ci/campaign"),
    "museum.json": ("Museum", "upstream's known bugs, re-created: which check sees each", "ci/gate --museum"),
    "mutants.json": ("Mutants", "small changes of our kernels: which the gate sees", "ci/mutate"),
}


@dataclass
class Run:
    """Everything that a report is made of."""

    header: Sequence[str]
    rows: list[Row]
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    ran: int = 0
    collected: int = 0
    interrupted: bool = False
    slowest: list[tuple[str, float]] = field(default_factory=list)

    @property
    def partial(self) -> str:
        """Why this is not the whole run, or ''."""
        return f"interrupted: {self.ran} of {self.collected} tests ran" if self.interrupted else ""

    @property
    def verdict(self) -> str:
        """The run in one clause."""
        lines = merged(self.rows)
        bad = [r for r in lines if r.verdict in RED]
        broken = [r for r in lines if r.verdict == "INFRA"]
        passed = sum(r.verdict == "PASS" for r in lines)
        subjects = len({r.subject for r in lines})
        what = "transforms" if subjects == 1 else f"transforms of {subjects} subjects"
        parts = [f"{len(bad)} of {len(bad) + passed} {what} with findings" if bad else f"{passed} {what} pass"]
        parts += [f"{len(broken)} could not be checked"] if broken else []
        return ", ".join(parts + ([self.partial] if self.partial else []))

    @property
    def colour(self) -> str:
        """How the run ended: good, bad, or neither."""
        lines = merged(self.rows)
        if any(r.verdict in RED for r in lines):
            return "bad"
        whole = lines and not self.partial and all(r.verdict != "INFRA" for r in lines)
        return "good" if whole and any(r.verdict == "PASS" for r in lines) else "unsure"


def write(folder: Path, run: Run) -> list[str]:
    """Leave the run behind for people and for programs; returns what there is to say about it."""
    folder.mkdir(parents=True, exist_ok=True)
    buckets = bucketed(run.results)
    _put(folder / "summary.md", markdown(run, buckets))
    _put(folder / "verdicts.json", json.dumps([asdict(r) for r in merged(run.rows)], indent=1) + "\n")
    _put(folder / "findings.json", json.dumps([asdict(r) for r in buckets], indent=1) + "\n")
    try:
        page = html(run, buckets, slots(folder))
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        (folder / "index.html").unlink(missing_ok=True)
        return [NEEDS_JINJA]
    _put(folder / "index.html", page)
    return []


def _put(path: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a subject's text may have what UTF-8 has not
    part.replace(path)


def markdown(run: Run, buckets: Sequence[Result]) -> str:
    """The run for a job summary: the findings first, each with its first differing cell and the line that replays it."""
    lines = [f"# plumbline: {run.verdict}", ""]
    for r in buckets:
        lines += [f"**{r.label}** `{r.transform}` ({_name(r.subject)}): {_line(r.sentence)}", "",
                  f"- case `{_line(r.case, 400)}`", f"- replay `ci/replay {r.replay}`"]
        lines += [f"- also met by {len(r.also)} other tests"] if r.also else []
        lines.append("")
    lines += ["| subject | transform | examples | degenerate | unsupported | checks | seconds | verdict |",
              "| --- | --- | ---: | ---: | ---: | --- | ---: | --- |"]
    for r in merged(run.rows):
        lines.append(f"| {_name(r.subject)} | {r.transform} | {r.counted} | {r.degenerate} | {r.unsupported} | {r.checks} | "
                     f"{r.seconds:.1f} | {r.verdict} |")
    notes = [f"- {_name(r.subject)} {r.transform}: {_line(n)}" for r in merged(run.rows) for n in r.notes]
    lines += ["", *notes] if notes else []
    return "\n".join([*lines, "", *(f"- {h}" for h in run.header)]) + "\n"


def _name(subject: str) -> str:
    return Path(subject).stem


def _line(text: str, most: int = 600) -> str:
    """Text for one line of Markdown."""
    text = " ".join(plain(text).split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"


def annotations(buckets: Sequence[Result]) -> list[str]:
    """GitHub's workflow commands for the findings, as many as it shows."""
    bad = [r for r in buckets if red(r)]
    lines = []
    for r in bad[: MOST_ANNOTATIONS if len(bad) <= MOST_ANNOTATIONS else MOST_ANNOTATIONS - 1]:
        file, _, line = r.where.rpartition(":")
        place = f"file={_property(file)},line={line}," if file and not file.startswith("/") else ""
        lines.append(f"::error {place}title={_property(f'{r.label} {r.transform}')}::"
                     + _message(f"{r.sentence}\ncase {r.case}\nci/replay {r.replay}"))
    if len(bad) > MOST_ANNOTATIONS:
        lines.append(f"::error title=plumbline::{len(bad) - len(lines)} more findings: see the job summary and the artifact")
    return lines


def _message(text: str) -> str:
    return "%0A".join(plain(line).replace("%", "%25") for line in text.splitlines())


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def coverage(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Which lane looked at which transform of which subject, and how many examples it had; a finding is marked."""
    columns = list(dict.fromkeys((r.subject, r.lane) for r in sorted(rows, key=lambda r: r.subject)))
    cells = {(r.transform, r.subject, r.lane): _looked(r) for r in rows}
    lines = [(t, [cells.get((t, *c), "") for c in columns]) for t in sorted({r.transform for r in rows})]
    return [f"{_name(subject)}: {lane}" for subject, lane in columns], lines


def _looked(row: Row) -> str:
    if row.verdict == "NOT PROVIDED":
        return "–"
    return ("tried" if row.lane == "outside" else str(row.counted)) + (" ✗" if row.verdict in RED else "")


def slots(folder: Path) -> list[dict]:
    """The tables that other commands left in the folder; a line saying how to make them for those that are not there."""
    found = []
    for name, (heading, shows, maker) in SLOTS.items():
        slot = {"heading": heading, "shows": shows, "maker": maker, "columns": [], "rows": []}
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            slot["rows"] = [{name: _flat(value) for name, value in row.items()} for row in content]
            slot["columns"] = list(dict.fromkeys(column for row in slot["rows"] for column in row))
        found.append(slot)
    return found


def _flat(value) -> str:
    """A JSON value in one cell of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(v)}" for name, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(_flat, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def html(run: Run, buckets: Sequence[Result], tables: Sequence[dict]) -> str:
    """The run as one self-contained page.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(ROOT / "harness" / "templates"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"stem": _name, "plain": plain,
                            "panels": lambda p: [(t, Markup(svg)) for t, svg in pictures.panels(p)]}
    lines = merged(run.rows)
    lanes, matrix = coverage(run.rows)
    return environment.get_template("report.html").render(
        run=run, findings=[r for r in buckets if red(r)], remarks=[r for r in buckets if not red(r)], lines=lines, slots=tables,
        lanes=lanes, matrix=matrix,
        longest=max((r.seconds for r in lines), default=0) or 1, slowest_of=max((s for _, s in run.slowest), default=0) or 1)
