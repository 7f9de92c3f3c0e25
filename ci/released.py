"""`ci/releases`: the gate's lanes over released versions of SGLang, one table of version x transform x verdict.

Exit 0 where every finding has a judgement in `kernels/sglang/judgements.toml`, 1 where one has none, 2 where a version could
not be checked.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.client import ROOT, shown_path
from kernels.sglang._upstream import definitions

SUBJECT = "sglang"
JUDGEMENTS = ROOT / "kernels" / SUBJECT / "judgements.toml"
# The lanes here are the CPU's; an adapter whose kernels need a GPU says ON_A_GPU_ONLY.
ADAPTERS = [file for file in sorted((ROOT / "kernels" / SUBJECT).glob("[a-z]*.py"))
            if "\nON_A_GPU_ONLY = True\n" not in file.read_text()]
PAGE = ROOT / "docs" / "releases.md"
# Rules that upstream changed as the repair of a bug: older versions are held to the newer one.
STRICT = ("seqlens_expand:clamp=zero",)  # #30378
KINDS = ("upstream issue", "defect", "unchecked precondition")
Cause = tuple[str, str, str]  # transform, check, buffer


@dataclass(frozen=True)
class Release:
    """What one version's run left behind."""

    version: str
    verdicts: dict[str, str]
    findings: dict[Cause, dict]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ci/releases", description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="+", type=Path, help="a wheel, or a folder that one was unpacked or installed in")
    parser.add_argument("--profile", default="quick", help="how much to try (default: quick)")
    parser.add_argument("-k", dest="only", default="", help="run only these families, comma-separated; others stay as reported")
    parser.add_argument("-n", dest="jobs", type=int, default=os.cpu_count(), help="families at a time (default: one a core)")
    parser.add_argument("--outside", action="store_true", help="also what kernels do outside their contracts (twice the time)")
    parser.add_argument("--report", type=Path, default=ROOT / "report" / "releases", help="a folder for each version's report")
    parser.add_argument("--from-report", action="store_true", help="write the page from reports that are there; run nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write (default: docs/releases.md)")
    return parser


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    only = set(filter(None, options.only.split(",")))
    if unknown := only - {adapter.stem for adapter in ADAPTERS}:
        print(f"ci/releases: no family {', '.join(sorted(unknown))}; there are {', '.join(a.stem for a in ADAPTERS)}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folders = {_version(folder): folder for folder in (_folder(path, Path(scratch)) for path in options.release)}
        if "" in folders:
            print(f"ci/releases: {folders['']} holds no {SUBJECT}-VERSION.dist-info; give a wheel, or its unpacked folder")
            return 2
        every = jobs(dict(sorted(folders.items(), key=lambda item: _order(item[0]))))
        asked = [job for job in every if not only or job.family in only]
        if not options.from_report:
            with ThreadPoolExecutor(options.jobs) as pool:
                statuses = list(pool.map(lambda job: _check(folders[job.versions[-1]], job, options), asked))
            failed = [job.name for job, status in zip(asked, statuses) if status not in (0, 1)]
            if failed:
                print(f"ci/releases: no verdict on {', '.join(failed)}; the logs are in {options.report}")
                return 2
    if missing := [job.name for job in asked if not job.reported(options.report)]:
        print(f"ci/releases: {options.report} has no report on {', '.join(missing)} by today's adapters; "
              "run without --from-report")
        return 2
    # Families that were not asked for stay on the page if all their versions have a report that still stands.
    lost = {job.family for job in every if not job.reported(options.report)}
    if lost:
        print(f"ci/releases: not on the page, since they have no report by today's adapters: {', '.join(sorted(lost))}")
    shown = [job for job in every if job.family not in lost]
    releases = [_release(options.report, v, shown) for v in sorted(folders, key=_order)]
    judgements = load(JUDGEMENTS)
    options.page.write_text(page(releases, judgements, options.profile, sorted({job.family for job in shown})))
    unjudged = sorted({cause for r in releases for cause in r.findings if judgement(cause, r.version, judgements) is None})
    for cause in unjudged:
        print(f"ci/releases: no judgement on {', '.join(cause)}; {shown_path(JUDGEMENTS)} says how to add one")
    print(f"{options.page}: {len(releases)} versions, {len({c for r in releases for c in r.findings})} findings")
    return 1 if unjudged else 0


# -- running ------------------------------------------------------------------------------------------------------------


def _folder(path: Path, scratch: Path) -> Path:
    """A wheel's Python files in a folder of their own; a folder as it is."""
    if path.suffix != ".whl":
        return path.resolve()
    folder = scratch / path.stem
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith((".py", "METADATA"))])
    return folder


def _version(folder: Path) -> str:
    found = sorted(folder.glob(f"{SUBJECT}-*.dist-info"))
    return found[0].name.removeprefix(f"{SUBJECT}-").removesuffix(".dist-info") if found else ""


def _order(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")]


@dataclass(frozen=True)
class Job:
    """A family's lanes on versions whose kernels are the same text: the last of them is run. `stamp` is of that text and of
    the adapter's, and is kept with the report."""

    family: str
    versions: tuple[str, ...]
    stamp: str

    @property
    def name(self) -> str:
        return f"{self.family} of {self.versions[-1]}"

    def folder(self, reports: Path) -> Path:
        return reports / self.versions[-1] / self.family

    def reported(self, reports: Path) -> bool:
        """Whether there is a report on these kernels by this adapter."""
        stamp = self.folder(reports) / "stamp"
        return stamp.exists() and stamp.read_text() == self.stamp


def jobs(folders: dict[str, Path]) -> list[Job]:
    """What is to be run for these versions, oldest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for adapter in ADAPTERS:
        for version, folder in folders.items():
            groups.setdefault((adapter.stem, fingerprint(adapter, folder / SUBJECT)), []).append(version)
    return [Job(family, tuple(versions), _stamp(family, text)) for (family, text), versions in groups.items() if text]


def _stamp(family: str, text: str) -> str:
    adapter = ROOT / "kernels" / SUBJECT / f"{family}.py"
    return hashlib.sha256("".join([text, adapter.read_text(), *(f.read_text() for f in _shared(adapter))]).encode()).hexdigest()


def _shared(adapter: Path) -> list[Path]:
    """The modules that several adapters share and this one imports."""
    imported = re.findall(r"from \. import (.+)", adapter.read_text())
    return [adapter.parent / f"{name}.py" for line in imported for name in line.split(", ")]


def fingerprint(adapter: Path, package: Path) -> str:
    """A hash of all that an adapter takes from a version, or '' where it takes nothing: every string in it that names a
    function of the version, or a file, of which it then takes the functions that it names."""
    text = adapter.read_text() + "".join(file.read_text() for file in _shared(adapter) if file.stem != "_upstream")
    tree = ast.parse(text)
    strings = _strings(tree)
    asked = {argument.value for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("_of")
             for argument in n.args if isinstance(argument, ast.Constant) and len(n.args) < 3}  # the third names a file
    homes = definitions(package)
    taken = []
    for name in sorted(strings):
        if name.endswith(".py") and (package / name).is_file():
            taken += _named(strings, ast.parse((package / name).read_text()))
        elif name in homes:
            file = (package / homes[name]).read_text()
            if f'home("{name}")' in text:
                taken.append(file)
            elif name.startswith("_") or name in asked or _is_kernel(name, ast.parse(file)):
                taken += _with_helpers(name, ast.parse(file))
    return hashlib.sha256("".join(taken).encode()).hexdigest() if taken else ""


def _strings(tree: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _named(names: set[str], file: ast.Module) -> list[str]:
    """The text of functions and methods; where several classes have a method of that name, which classes."""
    found = defaultdict(list)
    for outer in ast.walk(file):
        for node in getattr(outer, "body", []) if isinstance(outer, (ast.Module, ast.ClassDef)) else []:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found[node.name].append((getattr(outer, "name", ""), ast.unparse(node)))
    return [same[0][1] if len(same) == 1 else repr([name for name, _ in same]) for same in found.values()]


def _is_kernel(name: str, file: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == name and "triton.jit" in map(ast.unparse, node.decorator_list)
               for node in file.body)


def _with_helpers(name: str, file: ast.Module) -> list[str]:
    """A function and what it calls in the same file."""
    functions = {node.name: node for node in ast.walk(file) if isinstance(node, ast.FunctionDef)}
    wanted, texts = [name], []
    for wanted_name in wanted:
        texts.append(ast.unparse(functions[wanted_name]))
        called = {n.id for n in ast.walk(functions[wanted_name]) if isinstance(n, ast.Name)}
        wanted += sorted(n for n in called if n in functions and n not in wanted)
    return texts


def _check(folder: Path, job: Job, options) -> int:
    """pytest's status on the gate's lanes of one family of one version."""
    report = job.folder(options.report).resolve()
    shutil.rmtree(report, ignore_errors=True)
    report.mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gate", f"tests/test_{job.family}.py",
               "--device=cpu", f"--subject={SUBJECT}", f"--subject-path={folder}", f"--profile={options.profile}",
               f"--report={report}", *(f"--variant={v}" for v in STRICT), *([] if options.outside else ["-k", "not outside"])]
    with (report / "log.txt").open("w") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if status in (0, 1):
        for finding in json.loads((report / "findings.json").read_text()):
            shutil.copy(ROOT / finding["path"], report)
        (report / "stamp").write_text(job.stamp)
    what = {0: "clean", 1: "findings"}.get(status, f"no verdict (pytest: {status})")
    print(f"{job.family} of {', '.join(job.versions)}: {what}", flush=True)
    return status


def _release(report: Path, version: str, jobs: list[Job]) -> Release:
    """What the families' jobs that stand for a version found."""
    verdicts, findings = {}, {}
    for job in jobs:
        folder = job.folder(report)
        if version in job.versions:
            rows = json.loads((folder / "verdicts.json").read_text())
            verdicts |= {r["transform"]: r["verdict"] for r in rows if r["verdict"] != "NOT PROVIDED"}
            found = json.loads((folder / "findings.json").read_text())
            findings |= {(f["transform"], f["check"], f["buffer"]): f for f in found if f["check"] != "unchecked"}
    return Release(version, verdicts, findings)


# -- judgements ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[dict]:
    """The judgements, checked.

    Raises:
        ValueError: an entry lacks a field, or its kind is unknown; a defect must quote the contract that it breaks.
    """
    entries = tomllib.loads(path.read_text()).get("judgement", [])
    for entry in entries:
        lacks = {"transform", "findings", "kind", "says"} - entry.keys()
        if entry.get("kind") == "defect" and not entry.get("contract"):
            lacks.add("contract")
        if entry.get("kind") == "upstream issue" and not entry.get("issue"):
            lacks.add("issue")
        if entry.get("repair") and not entry.get("bug"):
            lacks.add("bug")
        if lacks or entry["kind"] not in KINDS:
            raise ValueError(f"{path.name}: {entry}: " + (f"needs {', '.join(sorted(lacks))}" if lacks else f"kind: {KINDS}"))
    return entries


def judgement(cause: Cause, version: str, judgements: list[dict]) -> int | None:
    """Which judgement a finding falls under: the first that names its transform, `check: buffer` and version."""
    transform, check, buffer = cause
    name = f"{check}: {buffer}"
    return next((i for i, j in enumerate(judgements) if transform == j["transform"]
                 and _order(j.get("since", "0")) <= _order(version) and any(name.startswith(f) for f in j["findings"])), None)


# -- the page -----------------------------------------------------------------------------------------------------------


def page(releases: list[Release], judgements: list[dict], profile: str, families: list[str]) -> str:
    """The table and the findings, as Markdown."""
    transforms = sorted({t for r in releases for t in r.verdicts})
    numbers = _numbers(releases, judgements)
    lines = ["# Released versions of SGLang under the suite", "",
             f"Written by `ci/releases --profile {profile}`. A dot is PASS; a number is a finding below; empty: this version "
             "has no kernel for the transform. Versions whose kernels of a family are the same text are run once. "
             f"Families: {', '.join(families)}.", "",
             "| transform | " + " | ".join(r.version for r in releases) + " |", "| --- |" + " :-: |" * len(releases)]
    for t in transforms:
        cells = [_cell(r, t, numbers) for r in releases]
        lines.append(f"| `{t}` | " + " | ".join(cells) + " |")
    lines += _repaired(releases, judgements) + _newest(releases[-1], judgements, numbers)
    lines += ["", "## Findings", "",
              "The run keeps every finding as a case file, `report/releases/VERSION/FAMILY/TRANSFORM-*.json`. `ci/replay CASE "
              "--subject-path FOLDER` replays it on the unpacked wheel; with `--script` it writes it as one Python file.", ""]
    for number in sorted(set(numbers.values())):
        lines += _finding(number, [where for where, n in numbers.items() if n == number], releases, judgements)
    return "\n".join(lines).rstrip() + "\n"


def _repaired(releases: list[Release], judgements: list[dict]) -> list[str]:
    """What upstream has repaired since: findings whose judgement names the repair, and which no later release has."""
    versions = [r.version for r in releases]
    places: dict[str, list[tuple[str, Cause, dict]]] = defaultdict(list)
    for release in releases:
        for cause, found in release.findings.items():
            which = judgement(cause, release.version, judgements)
            if which is not None and "repair" in judgements[which]:
                places[judgements[which]["repair"]].append((release.version, cause, {**judgements[which], **found}))
    rows = []
    for repair, found in places.items():
        last = max(versions.index(version) for version, *_ in found)
        if last + 1 < len(versions):
            first = min(versions.index(version) for version, *_ in found)
            case = min((f["case"] for *_, f in found), key=lambda text: (len(text), text))
            names = ", ".join(sorted({f"`{cause[0]}`" for _, cause, _ in found}))
            rows.append((first, f"| {found[0][2]['bug']} | {repair} | {names} | {versions[first]} | {versions[last + 1]} "
                                f"| `{case}` |"))
    return ["", "## Bugs that upstream has repaired since", "",
            f"{len(rows)} of the findings below are bugs that a later release no longer has because the code was changed to "
            "repair them. *In*: the first release checked that has it; *gone*: the first that has it no longer.", "",
            "| bug | repair | transform | in | gone | smallest case |", "| --- | --- | --- | --- | --- | --- |",
            *[row for _, row in sorted(rows)]] if rows else []


def _newest(release: Release, judgements: list[dict], numbers: dict[tuple[Cause, str], int]) -> list[str]:
    """Every transform of the newest release, by what is to be said of it."""
    said: dict[str, list[str]] = defaultdict(list)
    transforms = sorted(t for t in release.verdicts if " " not in t)  # "metadata sessions" is a lane of several
    for t in transforms:
        kinds = {numbers[c, release.version]: judgement(c, release.version, judgements) for c in release.findings if c[0] == t}
        for number, which in sorted(kinds.items()):
            said["not judged" if which is None else judgements[which]["kind"]].append(f"`{t}` ({number})")
        if not kinds:
            said["nothing found"].append(f"`{t}`")
    order = [kind for kind in ("not judged", *KINDS, "nothing found") if said[kind]]
    return ["", f"## {release.version}, judged strictly", "",
            f"{len(transforms)} transforms. A defect breaks what the kernel, its docstring or its caller says; the "
            "numbers are those of the findings below.", "", *[f"- {kind}: {', '.join(said[kind])}" for kind in order]]


def _numbers(releases: list[Release], judgements: list[dict]) -> dict[tuple[Cause, str], int]:
    """A number for every finding of every version; findings under one judgement share it."""
    groups: dict[object, int] = {}
    numbers = {}
    for cause, version in sorted((c, r.version) for r in releases for c in r.findings):
        which = judgement(cause, version, judgements)
        numbers[cause, version] = groups.setdefault(cause if which is None else which, len(groups) + 1)
    return numbers


def _cell(release: Release, transform: str, numbers: dict[tuple[Cause, str], int]) -> str:
    found = sorted({numbers[c, release.version] for c in release.findings if c[0] == transform})
    return ", ".join(map(str, found)) or ("·" if release.verdicts.get(transform) in ("PASS", "UNCHECKED PRECONDITION") else "")


def _finding(number: int, places: list[tuple[Cause, str]], releases: list[Release], judgements: list[dict]) -> list[str]:
    """One finding: what it is, in which versions, whose contract it breaks, and its smallest case."""
    which = judgement(*places[0], judgements)
    found = [r.findings[cause] for r in releases for cause, version in places if version == r.version]
    affected = [r.version for r in releases if r.version in {version for _, version in places}]
    shortest = min(found, key=lambda f: (len(f["case"]), f["case"]))
    entry = judgements[which] if which is not None else {"kind": "not judged", "says": shortest["sentence"]}
    transform = places[0][0][0]
    clean = [r.version for r in releases if r.verdicts.get(transform) == "PASS"]
    lines = [f"### {number}. `{transform}`: {entry['kind']}" + (f" ({entry['issue']})" if entry.get("issue") else ""), "",
             entry["says"], "", f"- versions {', '.join(affected)}" + (f"; not in {', '.join(clean)}" if clean else "")]
    lines += [f"- contract: {entry['contract']}"] if entry.get("contract") else []
    sentence = re.sub(rf"/\S*?/({SUBJECT}/)", r"\1", shortest["sentence"])  # a file of the release, wherever it was unpacked
    lines += [f"- {shortest['check']} ({shortest['buffer']}): {sentence}", f"- case `{shortest['case']}`"]
    lines += [f"- layout `{shortest['layout']}`"] if shortest.get("layout") else []
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
