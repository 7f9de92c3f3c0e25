"""Campaigns over many processes, part by part: plans, the journal, the shared memory, the merged report, wrong uses."""

import base64
import importlib.util
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis.database import InMemoryExampleDatabase
from measure import needs

from harness import campaign, registry
from harness.campaign import Profile
from harness.client import Worker, WorkerOptions
from harness.differential import Example
from harness.fleet import main, memory, summary
from harness.fleet.aim import aims
from harness.fleet.engine import Answer
from harness.fleet.journal import ATTEMPTS, Journal, State
from harness.fleet.memory import Tolerant
from harness.fleet.plan import Plan, Task, sharded
from harness.fleet.shard import Runner, digest
from harness.kept import Kept
from harness.layout import Layout, Place
from harness.results import Result
from oracles.metadata import Decode, Req
from oracles.seqlens import CuSeqlens
from strategies import domain

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = str(Path(__file__).with_name("fleet_subject.py"))
LOOKS = ((SUBJECT, "cu_seqlens", "inside"), (SUBJECT, "seqlens_expand", "inside"))


def a_plan(**changes) -> Plan:
    return replace(Plan(LOOKS, "quick", 3, 20, seed=7, python=sys.executable, database="/nowhere"), **changes)


def a_state(plan: Plan) -> State:
    return State("c0ffee", plan, ["header"], {})


def b64(*examples: int) -> str:
    return base64.b64encode(b"".join(n.to_bytes(8) for n in examples)).decode()


def a_line(task: Task, *examples: int, partial: bool = False, **more) -> dict:
    return {"task": asdict(task), "seconds": 2.0, "partial": partial, "tried": {"counted": b64(*examples)}, "cells": [],
            "results": [], "met": [], "cases": {}, "also": [], "first": 0, "checks": "all 5", "news": [], **more}


# -- plans ----------------------------------------------------------------------------------------------------------------


def test_a_plan_is_data_and_every_transform_comes_once_before_any_comes_twice():
    plan = a_plan()
    again = Plan.load(json.loads(json.dumps(plan.dump())))
    assert again == plan and list(again.tasks()) == list(plan.tasks()) and len(list(plan.tasks())) == plan.size == 6
    assert [(t.transform, t.shard) for t in plan.tasks()][:3] == [("cu_seqlens", 0), ("seqlens_expand", 0), ("cu_seqlens", 1)]


def test_the_parts_of_a_matrix_are_the_whole():
    parts = [a_plan(part=(k, 4)) for k in range(4)]
    assert sorted(t.key for p in parts for t in p.tasks()) == sorted(t.key for t in a_plan().tasks())
    assert [p.size for p in parts] == [2, 2, 1, 1]


def test_shards_make_up_a_profile():
    for name, profile in campaign.PROFILES.items():
        shards, examples = sharded(name)
        assert shards * examples >= profile.counted > (shards - 1) * examples


# -- the journal ----------------------------------------------------------------------------------------------------------


def test_an_example_counts_once_and_a_torn_line_not_at_all(tmp_path):
    plan = a_plan()
    first, second, third = list(plan.tasks())[:3]
    journal, state = Journal(tmp_path), a_state(plan)
    journal.begin(state)
    for line in (a_line(first, 1, 2, 3), a_line(third, 3, 4), a_line(first, 1, 2, 3), a_line(second, 1, partial=True)):
        journal.finished(line)
    with journal.path.open("a") as file:
        file.write('{"task": {"shard": 2')
    read = journal.read()
    assert read.looks[LOOKS[0]].counted()["counted"] == 4 and read.looks[LOOKS[1]].counted()["counted"] == 1
    assert read.done == {first.key, third.key} and read.plan == plan
    journal.finished(a_line(second, 9))
    assert journal.read().done == {first.key, second.key, third.key}


def test_a_task_that_ends_every_process_is_given_up_with_its_case(tmp_path):
    plan = a_plan(looks=LOOKS[:1], shards=1)
    (task,) = plan.tasks()
    journal, state = Journal(tmp_path), a_state(plan)
    journal.begin(state)
    driver = main.Driver(journal, state, main.arguments().parse_args([]))
    case = {"subject": "mine.py", "contract": "cu_seqlens", "digest": "0123456789"}
    for _ in range(ATTEMPTS):
        assert driver.next_order().task == task
        driver._keep(Answer(task, None, "its process died (SIGKILL)", case))
    assert driver.next_order() is None and journal.read().lost(task)
    assert json.loads((tmp_path / "cases" / "mine-cu_seqlens-01234567.json").read_text()) == case
    (row,) = summary.rows(journal.read())
    assert row.verdict == "INFRA" and "given up" in row.notes[0] and "mine-cu_seqlens-01234567.json" in row.notes[1]


@pytest.mark.parametrize(("budget", "says"), [(["--examples", "3"], "--examples"), (["--gpu-seconds", "1.5"], "--gpu-seconds"),
                                              (["--wall", "0.001"], "--wall")])
def test_a_spent_budget_hands_out_nothing_more(budget, says, tmp_path):
    plan, options = a_plan(), main.arguments().parse_args(budget)
    journal, state = Journal(tmp_path), a_state(plan)
    journal.begin(state)
    driver = main.Driver(journal, state, options)
    if says != "--wall":
        driver._keep(Answer(driver.next_order().task, a_line(next(plan.tasks()), 1, 2, 3)))
    else:
        time.sleep(0.01)
    assert driver.next_order() is None and driver.stopped == f"{says} is spent"


# -- the report -----------------------------------------------------------------------------------------------------------


def test_the_merged_report_has_a_cause_once_and_says_what_it_cost(tmp_path):
    plan = a_plan()
    tasks = list(plan.tasks())
    found = dict(subject=SUBJECT, transform="cu_seqlens", label="DEFECT", sentence="wrong", case="Case()", check="states",
                 buffer="out", path="x.json")
    shrunk, met = asdict(Result(**found, test="#0")), asdict(Result(**{**found, "case": "C()"}, test="#1"))
    state = a_state(plan)
    state.add(a_line(tasks[0], 1, 2, results=[shrunk]))
    state.add(a_line(tasks[2], 2, 3, met=[met]))
    state.add(a_line(tasks[1], 1))
    run = summary.write(tmp_path, state, 3.0)
    rows = {r.transform: (r.verdict, r.counted) for r in run.rows}
    assert rows == {"cu_seqlens": ("DEFECT", 3), "seqlens_expand": ("PASS", 1)}
    (finding,) = json.loads((tmp_path / "findings.json").read_text())
    assert finding["case"] == "Case()" and finding["also"] == ["#1"]
    table = {r["transform"]: r for r in json.loads((tmp_path / "campaign.json").read_text())}
    assert table["cu_seqlens"]["findings per core-second"] == 0.25 and table["cu_seqlens"]["distinct"] == 3
    page = (tmp_path / "index.html").read_text()
    assert "Campaign" in page and "in 6.0 core-seconds" in page
    suite = xml.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    assert next(suite.iter("failure")).text.startswith("DEFECT  cu_seqlens: wrong")


def test_what_was_not_reached_is_named(tmp_path):
    state = a_state(a_plan())
    first, second = list(state.plan.tasks())[:2]
    state.add(a_line(first, 1))
    state.add({**a_line(second, partial=True), "tried": {"degenerate": b64(5)}})
    run = summary.write(tmp_path, state, 1.0)
    assert [r.transform for r in run.rows] == ["cu_seqlens"] and run.header[-1] == "not reached: seqlens_expand"
    assert run.colour == "unsure" and run.partial


# -- what shards know of each other ---------------------------------------------------------------------------------------


class Away(InMemoryExampleDatabase):
    """A database that can be switched off."""

    here = True

    def save(self, key, value):
        if not self.here:
            raise ConnectionError("switched off")
        super().save(key, value)


def test_what_was_to_be_told_is_told_when_redis_is_back(monkeypatch):
    needs(importlib.util.find_spec("redis"), "redis: pip install 'redis>=5' (the extra 'fleet')")
    monkeypatch.setattr(memory, "PAUSE", 0.0)
    shared = memory.Shared("redis://127.0.0.1:1/0", "c0ffee", Path("/nowhere"))
    inner = Away()
    database = Tolerant(inner, shared)
    inner.here = False
    database.save(b"key", b"value")
    assert "has not answered" in shared.news()[0] and not list(database.fetch(b"key"))
    inner.here = True
    assert list(database.fetch(b"key")) == [b"value"]
    assert "is back" in shared.news()[0] and not shared.news()


def test_what_was_only_looked_past_stays_in_the_database():
    class Looking:
        last = "looked past"

    inner, looking = InMemoryExampleDatabase(), Looking()
    inner.save(b"key", b"value")
    Kept(inner, looking).delete(b"key", b"value")
    Kept(inner, looking).save(b"key", b"what ended the search")
    assert list(inner.fetch(b"key")) == [b"value"]
    looking.last = "passed"
    Kept(inner, looking).delete(b"key", b"value")
    assert not list(inner.fetch(b"key"))


def test_a_night_keeps_what_it_found_and_under_the_name_of_its_transform(monkeypatch, tmp_path):
    """Hypothesis' own key is one for all transforms, and a second round would delete what the first one saved."""
    database = InMemoryExampleDatabase()
    worker = Worker(WorkerOptions(SUBJECT), list(registry.contracts().values()))
    try:
        for name in ("seqlens_expand", "cu_seqlens"):
            contract = registry.contracts()[name]
            night = campaign.Campaign(contract, worker, contract.rules(), domain.of(contract),
                                      Profile("night", 30, derandomize=False, later_seconds=0.3, shrink=False), folder=tmp_path)
            monkeypatch.setattr(night, "_database", lambda: database)
            outcome = night.run()
            assert outcome.verdict == ("DEFECT" if name == "cu_seqlens" else "PASS")
    finally:
        worker.close()
    keys = {key.decode() for key, values in database.data.items() if values}
    assert "plumbline/fleet_subject_cu_seqlens/inside" in keys and all("cu_seqlens" in key for key in keys), keys


def test_a_shard_tries_the_same_examples_again_and_another_seed_others(tmp_path):
    """Being guided is another search; without --target nothing of it shows."""
    plan = a_plan(looks=LOOKS[1:], examples=10, database=str(tmp_path / "db"))
    workers, task, tried = {}, asdict(next(plan.tasks())), {}
    try:
        for name, changes in {"one": {}, "again": {}, "elsewhere": {"seed": 8}, "guided": {"target": True}}.items():
            runner = Runner(replace(plan, **changes).dump(), "c", str(tmp_path), workers=workers)
            line = runner.run(task)
            tried[name] = line["tried"]["counted"]
            assert line["cells"] and 0 < len(base64.b64decode(tried[name])) <= 10 * 8
    finally:
        runner.close(SUBJECT)
    assert tried["one"] == tried["again"] and len(set(tried.values())) == 3
    assert not list((tmp_path / "work").glob("*/*"))


def test_aims_rise_with_what_they_aim_at():
    small, padded = Example((CuSeqlens((1, 2)),)), Example((Decode((Req(1, 10), Req(0, 2))),))
    far = Example((CuSeqlens((1, 2)),), Layout({"cu_seqlens": Place("far")}))
    many = Example((CuSeqlens((1,) * 50),))
    assert aims(far)["offset"] == 31 > aims(many)["offset"] > aims(small)["offset"]
    assert aims(many)["live"] > aims(small)["live"] and aims(padded)["padding"] > aims(small)["padding"] == 0
    assert digest(small) != digest(padded)


# -- wrong uses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "arguments", "says"), [
    ("ray", [], "pip install 'ray>="),
    ("redis", ["--engine", "xdist", "--redis", "redis://localhost"], "pip install 'redis>="),
])
def test_without_the_extra_there_is_one_line_that_names_it(hidden, arguments, says, tmp_path):
    code = f"import sys; sys.modules[{hidden!r}] = None; from harness.fleet.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments, "--folder", str(tmp_path / "campaign")], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stderr, done.stderr
    (line,) = done.stdout.splitlines()
    assert says in line and "(the extra 'fleet')" in line and not (tmp_path / "campaign").exists()


@pytest.mark.parametrize(("arguments", "says"), [
    (["-k", "nothing"], "-k nothing: neither a family nor a transform"),
    (["--shards", "0"], "--shards 0 has no end"),
    (["--variant", "nothing:a=b"], "unknown contract"),
    (["--resume"], "holds no campaign"),
    (["--merge", "nowhere"], "holds no campaign"),
    (["--subject", "no_such_module"], "no_such_module"),
])
def test_wrong_uses_are_one_line(arguments, says, tmp_path, capsys):
    assert main.main(["--engine", "xdist", "--folder", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ci/campaign: ") and says in line


def test_a_folder_with_a_campaign_is_not_overwritten(tmp_path, capsys):
    Journal(tmp_path).begin(a_state(a_plan()))
    assert main.main(["--engine", "xdist", "--folder", str(tmp_path), "--subject", SUBJECT, "-k", "cu_seqlens"]) == 2
    assert "--resume" in capsys.readouterr().out
