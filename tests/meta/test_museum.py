"""The museum: nothing of the denominator is missing, and the measurement itself fails where it must."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry
from harness.client import ROOT
from tests.museum import report, run
from tests.museum.catalogue import EXHIBITS, GPU_ONLY, NOT_EXPRESSIBLE, _read, bugs

BUGS = bugs()


def bodies() -> dict[str, str]:
    """The docstring of every exhibit."""
    found: dict[str, str] = {}
    for path in (ROOT / "tests" / "museum").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "exhibit":
                    assert call.args[0].value not in found
                    found[call.args[0].value] = ast.get_docstring(node) or ""
    return found


def test_every_bug_is_an_exhibit_or_says_why_not():
    places = [*EXHIBITS, *GPU_ONLY, *NOT_EXPRESSIBLE]
    assert len(places) == len(set(places)) and set(places) == set(BUGS)
    assert set(bodies()) == {*EXHIBITS, *GPU_ONLY}
    assert all(NOT_EXPRESSIBLE.values())


def test_at_most_a_tenth_of_p0_is_not_expressible():
    p0 = [b.id for b in BUGS.values() if b.priority == "P0"]
    assert len(p0) == 49 and len([i for i in p0 if i in NOT_EXPRESSIBLE]) <= len(p0) / 10


def test_every_docstring_names_its_upstream_numbers_trigger_and_symptom():
    for name, text in bodies().items():
        numbers = re.findall(r"#(\d+)|\b([0-9a-f]{8})\b", BUGS[name].upstream)
        missing = [n for pair in numbers for n in pair if n and n not in text]
        assert not missing and "Trigger:" in text and "Symptom:" in text, (name, missing)


def test_the_catalogue_names_contracts_and_lanes():
    for exhibit in (*EXHIBITS.values(), *GPU_ONLY.values()):
        assert exhibit.contract in registry.contracts() and exhibit.lane in ("inside", "replays", "serving")
    with pytest.raises(AssertionError, match="B001 is declared twice"):
        _read("B001 | a | inside | states x\nB001 | b | inside | states x")


def test_the_page_lists_every_bug():
    page = report.PAGE.read_text()
    assert sorted(re.findall(r"^(?:\| |- )(B\d{3})\b", page, re.M)) == sorted(BUGS)
    assert set(json.loads(report.GOLDEN.read_text())["cases"]) == set(EXHIBITS)


@pytest.fixture(scope="module")
def lying_room():
    room = run.Room(Path(__file__).with_name("museum_subject.py"))
    yield room
    room.worker.close()


def test_an_exhibit_that_is_not_faulty_is_missed_and_a_faulty_twin_is_reported(lying_room):
    exhibit = EXHIBITS["B045"]
    result = report.Result("B045", [run.hunt(lying_room, exhibit, 0)], run.twin(lying_room, exhibit, 20))
    assert result.hunts[0].kind == "" and result.hunts[0].examples >= run.BUDGET
    missed, unclean = report.complaints([result], None)
    assert missed == "B045: not caught"
    assert unclean.startswith("B045: its clean twin is not clean: returned ")
    assert report.recall([result]) == [0.0]


def test_a_finding_of_another_kind_does_not_count(lying_room):
    exhibit = run.Exhibit("B045_clean", "draft_decode_slices", (("states", "result"),))
    assert run.hunt(lying_room, exhibit, 0).kind == ""
    caught = run.Exhibit("B045_clean", "draft_decode_slices", (("returned", "result"),))
    assert run.hunt(lying_room, caught, 0).kind == "returned result"


def test_a_case_that_shrinks_less_is_reported():
    result = report.Result("B045", [report.Hunt(0, 1, 0.1, "returned result")], "", "DraftDecodeSlices(lengths=[1, 1])", 2)
    assert report.complaints([result], {"B045": {"requests": 2, "case": "another"}}) == []
    assert "golden.json has another" in report.complaints([result], {"B045": {"requests": 1, "case": "another"}})[0]


def test_the_command_measures_one_exhibit(tmp_path):
    command = [sys.executable, "-m", "harness.gate", "--museum", "B045", "--seeds", "2", "-n", "1", "--report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "museum.json").read_text())
    assert (result["caught by"], result["seeds"], result["twin"]) == ("returned result", "2/2", "clean") and result["shrunk"]


@pytest.mark.parametrize(("arguments", "says"), [
    (["B000"], "B000 is no exhibit"), (["B062"], "--device cuda"), (["--seeds", "0"], "at least 1"),
    (["--write", "B001"], "needs all exhibits")])
def test_errors_of_use_are_one_line_and_exit_2(arguments, says, capsys):
    assert run.main(arguments) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert says in line
