"""The merged report of a campaign, through the same code as a gate's: index.html, summary.md, verdicts, findings, JUnit."""

import json
import xml.etree.ElementTree as xml
from pathlib import Path

from harness import registry, rendering, report
from harness.fleet.journal import Look, State
from harness.report import Run
from harness.results import bucketed, red
from harness.verdicts import DEFECT, INFRA, INTERMITTENT, NOT_PROVIDED, PASS, Row
from strategies import coverage


def rows(state: State) -> list[Row]:
    """One row for each (subject, transform, lane) that was looked at."""
    made = [_row(look, so_far) for look, so_far in state.looks.items() if so_far.reached]
    return made + [Row(*look, NOT_PROVIDED, notes=[why] if why else []) for look, why in state.missing.items()]


def _row(look: tuple[str, str, str], so_far: Look) -> Row:
    row = Row(*look, PASS, **so_far.counted(), seconds=so_far.seconds, checks=so_far.checks)
    bad = [r for r in so_far.results if red(r)]
    if bad:
        row.verdict = DEFECT if any(r.label == DEFECT for r in bad) else INTERMITTENT
    elif so_far.lost:
        row.verdict = INFRA
        row.notes += [f"given up, its process died each time: {name}" for name in so_far.lost]
    elif look[2] == "inside" and not row.counted:
        row.verdict = INFRA
        row.notes.append(f"no example was tried; the subject declined {row.unsupported}")
    reported = {f"{r.check} ({r.buffer})" for r in so_far.results}
    row.notes += [f"also seen, not shrunk: {kind}" for kind in sorted(so_far.also - reported)] + so_far.news
    return row


def rates(state: State) -> list[dict]:
    """What each transform's share of the campaign was worth: the report's table `Campaign`."""
    unit = "GPU-second" if state.plan.gpus else "core-second"
    table = []
    for (subject, transform, lane), so_far in state.looks.items():
        if not so_far.tried:
            continue
        wanted = {": ".join(cell) for cell in coverage.cells(registry.contracts()[transform])}
        spent = so_far.seconds * (state.plan.gpus or 1)
        distinct = sum(so_far.counted().values())
        table.append({
            "subject": Path(subject).stem, "transform": transform, "lane": lane, "shards": so_far.shards,
            "examples tried": so_far.tried, "distinct": distinct, "cells": f"{len(so_far.cells & wanted)}/{len(wanted)}",
            "findings": len(so_far.causes), f"{unit}s": round(spent, 2),
            f"examples per {unit}": round(so_far.tried / spent, 1) if spent else None,
            f"findings per {unit}": round(len(so_far.causes) / spent, 5) if spent else None,
        })
    return table


def outcome(state: State) -> str:
    """The campaign in one line."""
    unit = "GPU-second" if state.plan.gpus else "core-second"
    found, spent = len(state.causes), state.seconds
    rate = f", {found / spent:.4g} findings per {unit}" if spent else ""
    return f"campaign {state.campaign}: {state.tried:,} examples in {spent:,.1f} {unit}s, {found} root causes{rate}"


def write(folder: Path, state: State, seconds: float) -> Run:
    """Leave the report in a folder.

    Returns:
        What it was made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = state.plan.size or len(state.done)
    unseen = [look for look, so_far in state.looks.items() if not so_far.reached]
    lines = [*state.header, outcome(state)]
    lines += [f"not reached: {', '.join(sorted({transform for _, transform, _ in unseen}))}"] if unseen else []
    run = Run(lines, rows(state), [r for look in state.looks.values() for r in look.results], seconds,
              len(state.done), size, interrupted=bool(unseen))
    (folder / "campaign.json").write_text(json.dumps(rates(state), indent=1) + "\n", encoding="utf-8")
    junit(folder / "junit.xml", run)
    for said in report.write(folder, run):
        print(said)
    return run


def junit(path: Path, run: Run) -> None:
    """A test case for each (subject, transform, lane), as pytest would have written it (the xunit2 format)."""
    suite = xml.Element("testsuite", name="plumbline", tests=str(len(run.rows)), errors="0", skipped="0", failures="0",
                        time=f"{run.seconds:.3f}")
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for row in run.rows:
        case = xml.SubElement(suite, "testcase", classname=f"{Path(row.subject).stem}.{row.lane}", name=row.transform,
                              time=f"{row.seconds:.3f}")
        found = [r for r in bucketed(run.results) if red(r) and (r.subject, r.transform) == (row.subject, row.transform)]
        if row.verdict in (DEFECT, INTERMITTENT):
            _say(case, "failure", found[0].sentence, "\n\n".join(map(rendering.finding, found)), counts)
        elif row.verdict == INFRA:
            _say(case, "error", row.notes[0], "\n".join(row.notes), counts)
        elif row.verdict == NOT_PROVIDED:
            _say(case, "skipped", "the subject has no such function", "", counts)
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", str(counts["error"]))
    suite.set("skipped", str(counts["skipped"]))
    whole = xml.Element("testsuites")
    whole.append(suite)
    xml.ElementTree(whole).write(path, encoding="utf-8", xml_declaration=True)


def _say(case: xml.Element, tag: str, message: str, text: str, counts: dict[str, int]) -> None:
    xml.SubElement(case, tag, message=report.plain(message)).text = report.plain(text)
    counts[tag] += 1
