"""The commands as a user runs them: a faulty kernel through the gate, its case through ci/replay, and every exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import casefile, registry, verdicts
from harness.differential import Example
from harness.gate import _conclude
from harness.verdicts import Row, exit_code, merged
from oracles.seqlens import CuSeqlens, Req, SeqlensExpand

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
import torch

def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    row = 0
    for i, (extend, seq) in enumerate(zip(extend_seq_lens.tolist(), seq_lens.tolist())):
        for t in range(extend):
            seqlens_expanded[row] = max(seq - extend + 1 + t, 0){fault}
            row += 1
"""
WRONG = RIGHT.format(fault=" + (i > 0)")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PLUMBLINE"))}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=400)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(WRONG)
    return path


def test_a_wrong_kernel_from_the_gate_to_a_fixed_case(mine, tmp_path):
    """Off by one only for requests after the first: red gate, one sentence, at most 2 requests, FAILED, then FIXED."""
    done = run("harness.gate", "--profile", "quick", "--subject", str(mine), "--report", str(tmp_path / "report"), "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.split("test_differential[seqlens_expand-mine]")[1].splitlines()
    finding = next(line for line in lines if line.startswith("DEFECT  seqlens_expand: seqlens_expanded["))
    assert "and must be" in finding and "of request 1" in finding
    path = next(line.split()[2] for line in lines if line.strip().startswith("replay    ci/replay"))
    saved = casefile.read(ROOT / path)
    assert len(saved.example.steps[0].batch) <= 2
    assert "Traceback" not in done.stdout and "hypothesis" not in finding

    again = run("harness.replay", path)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (1, "FAILED")
    mine.write_text(RIGHT.format(fault=""))
    mended = run("harness.replay", path)
    assert mended.returncode == 0 and mended.stdout.startswith("FIXED   seqlens_expand")
    inline = run("harness.replay", path, "--inline")
    assert inline.returncode == 0, inline.stdout + inline.stderr

    table = json.loads((tmp_path / "report" / "verdicts.json").read_text())
    assert {(r["transform"], r["verdict"]) for r in table} >= {("seqlens_expand", "DEFECT"), ("cu_seqlens", "NOT PROVIDED")}
    assert "DEFECT" in (tmp_path / "report" / "summary.md").read_text()
    assert "<failure" in (tmp_path / "report" / "junit.xml").read_text()
    (ROOT / path).unlink()


@pytest.fixture
def case(tmp_path):
    contract = registry.contracts()["seqlens_expand"]
    example = Example((SeqlensExpand((Req(1, 1), Req(1, 4))),))
    return casefile.write(tmp_path / "case.json", casefile.document(example, contract.rules(), "kernels", {}, None))


def test_replay_on_our_kernel_says_fixed(case):
    assert run("harness.replay", str(case)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.json"], "not readable as a case file"),
        (["CASE", "--subject", "no_such_module"], "neither a built-in"),
        (["CASE", "--subject", "missing.py"], "no such file"),
        (["CASE", "--pdb"], "--pdb needs --inline"),
        (["CASE", "--subject-python", "/bin/false"], "the worker did not start"),
    ],
)
def test_replay_errors_are_one_line_and_exit_2(case, arguments, says):
    done = run("harness.replay", *(str(case) if a == "CASE" else a for a in arguments))
    assert done.returncode == 2
    assert done.stdout.startswith("ERROR   ") and says in done.stdout and len(done.stdout.splitlines()) == 1


def test_a_subject_that_cannot_be_imported_is_exit_2(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import a_module_that_is_not_there\n")
    done = run("pytest", "-q", "tests/test_seqlens.py", "-k", "cu_seqlens and differential", f"--subject={broken}")
    assert done.returncode == 2
    assert "importing it failed: No module named 'a_module_that_is_not_there'" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(("option", "says"), [
    ("--profile=fast", "known are"), ("--device=tpu", "known are"), ("--variant=nothing:a=b", "unknown contract"),
    ("--variant=decode_metadata:tail=long", "has no variant tail=long"),
])
def test_wrong_options_are_refused(option, says):
    done = run("pytest", "-q", "tests/test_corpus.py", option)
    assert done.returncode == 4 and says in done.stderr


def row(verdict: str, lane: str = "inside", counted: int = 5, transform: str = "t") -> Row:
    return Row("s", transform, lane, verdict, counted)


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([row("PASS")], 0),
        ([row("PASS"), row("UNCHECKED PRECONDITION", "outside")], 0),
        ([row("PASS"), row("NOT PROVIDED", transform="u")], 0),
        ([row("PASS"), row("DEFECT", "replays")], 1),
        ([row("PASS"), row("INTERMITTENT", transform="u")], 1),
        ([row("PASS"), row("INFRA", transform="u")], 2),
        ([row("PASS", counted=0)], 2),
        ([row("NOT PROVIDED")], 2),
        ([], 2),
    ],
)
def test_exit_codes(rows, code):
    assert exit_code(rows) == code


def test_the_worst_lane_decides_a_line():
    assert merged([row("PASS"), row("DEFECT", "replays")])[0].verdict == "DEFECT"


def test_a_gate_without_verdicts_or_with_a_crashed_pytest_is_exit_2(tmp_path):
    assert _conclude(0, tmp_path / "verdicts.json") == 2
    verdicts.write(tmp_path, [row("PASS")], [])
    assert _conclude(3, tmp_path / "verdicts.json") == 2
    assert _conclude(5, tmp_path / "verdicts.json") == 2
    assert _conclude(0, tmp_path / "verdicts.json") == 0
    assert _conclude(1, tmp_path / "verdicts.json") == 1


def test_keep_adds_the_case_to_the_corpus(case, monkeypatch, tmp_path):
    from harness import replay

    monkeypatch.setattr(replay, "CORPUS", tmp_path / "corpus")
    assert replay.main([str(case), "--keep"]) == 0
    assert casefile.read(tmp_path / "corpus" / "case.json").example == casefile.read(case).example


def test_cu_seqlens_case_prints_as_python():
    assert repr(CuSeqlens((3, 5), spare=1)) == "CuSeqlens(lengths=[3, 5], spare=1)"
