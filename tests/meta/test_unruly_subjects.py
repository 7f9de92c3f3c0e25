"""Subjects that end the process, return what they should not, hang, or are wrong on one fixed case alone: findings all the
same, and the next transform is not made to pay for them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from harness import casefile, lanes, registry, replay
from harness.campaign import Campaign, Profile, case_path
from harness.client import ROOT, Limits, UsageError, Worker, WorkerOptions
from harness.differential import Example
from harness.worker.subject import Subject, SubjectError
from oracles.seqlens import CuSeqlens, Req, SeqlensExpand
from strategies import domain

UNRULY = """
import sys
import numpy as np

def page_table_1_flattened(**given):
    sys.exit(0)

def topk_indices_offset(**given):
    raise KeyboardInterrupt("half of \\ud83d")

def max_seq_len_q(**given):
    return np.int64(-3)

def real_page_table(*, page_table_1, page_size, real_page_table):
    rows, columns = page_table_1.shape
    wrong = (rows, columns) == (3, 130)  # as a fixed case is, and hardly a drawn one
    real_page_table[:rows, : -(-columns // page_size)] = page_table_1[:, ::page_size] // page_size + wrong
"""


def run(subject, tests: str, *arguments: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PLUMBLINE", "GITHUB", "CI"))}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "gate", "-p", "no:cacheprovider", tests,
                           f"--subject={subject}", *arguments], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def unruly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unruly")
    (folder / "mine.py").write_text(UNRULY)
    names = "1_flattened or topk_indices_offset or max_seq_len_q or real_page_table"
    yield run(folder / "mine.py", "tests/test_page_table.py", "-k", f"(differential or far) and ({names})",
              f"--report={folder}"), folder
    for path in (ROOT / "failures").glob("*.json"):
        if json.loads(path.read_text()).get("subject", "").startswith(str(folder)):
            path.unlink()


def test_whatever_ends_a_call_is_a_finding(unruly):
    done, _ = unruly
    assert done.returncode == 1 and "INFRA" not in done.stdout, done.stdout
    assert "raised SystemExit: 0" in done.stdout and "raised KeyboardInterrupt: half of \\ud83d" in done.stdout


def test_a_value_of_another_type_is_shown_as_it_is(unruly):
    assert "returned np.int64(-3) (a numpy.int64), and must return" in unruly[0].stdout


def test_a_finding_of_a_fixed_case_is_a_red_verdict(unruly):
    done, folder = unruly
    (row,) = (r for r in json.loads((folder / "verdicts.json").read_text()) if r["transform"] == "real_page_table")
    assert row["verdict"] == "DEFECT" and row["counted"] > 20, row
    assert "pass" not in (folder / "summary.md").read_text().splitlines()[0]


KEEPS = """
import torch

_kept = {}

def cu_seqlens(*, seqlens, cu_seqlens):
    n = len(seqlens)
    if n not in _kept:
        _kept[n] = torch.cumsum(seqlens, 0).clone()
    cu_seqlens[1 : n + 1] = _kept[n]
    cu_seqlens[0] = 0
"""


def test_what_only_earlier_calls_make_wrong_is_never_called_fixed(tmp_path, capsys):
    """A cache by batch size: the case alone is right."""
    (tmp_path / "mine.py").write_text(KEEPS)
    done = run(tmp_path / "mine.py", "tests/test_seqlens.py", "-k", "cu_seqlens and differential")
    assert "DEFECT  cu_seqlens:" in done.stdout and "; only after earlier calls in the same process" in done.stdout, done.stdout
    path = ROOT / next(line.split()[2] for line in done.stdout.splitlines() if line.startswith("  replay "))
    try:
        assert replay.main([str(path)]) == replay.main([str(path), "--bisect", str(tmp_path / "mine.py")]) == replay.ERROR
        assert replay.main([str(path), "--keep"]) == replay.ERROR
    finally:
        path.unlink()
    said = capsys.readouterr().out
    assert "FIXED" not in said and "Run the gate again" in said and "--keep" in said


FULL = """
import errno, sys, pytest
from harness import casefile

def write(path, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

casefile.write = write
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_case_that_cannot_be_saved_is_no_verdict_on_the_subject(tmp_path):
    (tmp_path / "mine.py").write_text(KEEPS.replace("if n not in _kept:", "if True:").replace(".clone()", ".clone() + 1"))
    done = subprocess.run([sys.executable, "-c", FULL, "-q", "-n", "0", "-m", "gate", "-p", "no:cacheprovider",
                           "tests/test_seqlens.py", "-k", "cu_seqlens and differential", f"--subject={tmp_path / 'mine.py'}"],
                          cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "INFRA  [Errno 28] No space left on device" in done.stdout, done.stdout
    assert "NOT PROVIDED" not in done.stdout and "Traceback" not in done.stdout


def test_supports_that_raises_is_an_error_of_use(tmp_path):
    (tmp_path / "mine.py").write_text("def supports(case):\n    return case['nope']\n\n\ndef cu_seqlens(**given):\n    pass\n")
    done = run(tmp_path / "mine.py", "tests/test_seqlens.py", "-k", "cu_seqlens and differential")
    assert done.returncode == 2 and "supports() raised KeyError: 'nope' on a case of seqlens" in done.stdout, done.stdout


@pytest.mark.parametrize(("answer", "becomes"), [
    ("True", ""), ("np.True_", ""), ("False", "supports() said no"), ("np.False_", "supports() said no"),
    ("None", "supports() said no"), ("''", "supports() said no"), ("'too long'", "too long"),
])
def test_what_supports_may_answer(answer, becomes, tmp_path):
    (tmp_path / "mine.py").write_text(f"import numpy as np\n\ndef supports(case):\n    return {answer}\n")
    assert Subject(str(tmp_path / "mine.py"), ROOT).supports("seqlens", {}) == becomes


def test_another_answer_of_supports_is_an_error_of_use(tmp_path):
    (tmp_path / "mine.py").write_text("def supports(case):\n    return 1\n")
    worker = Worker(WorkerOptions(str(tmp_path / "mine.py")), list(registry.contracts().values()))
    with pytest.raises(UsageError, match=r"mine.py: supports\(\) answered 1, and must answer True, .* on a case of seqlens"):
        worker.supports("seqlens", [{}])
    worker.close()


def test_a_module_of_a_folder_that_cannot_be_imported_is_an_error_of_use(tmp_path):
    (tmp_path / "seqlens.py").write_text("raise RuntimeError('boom')\n")
    says = f"--subject {tmp_path}: importing {tmp_path}/seqlens.py raised RuntimeError: boom"
    with pytest.raises(UsageError, match=re.escape(says)):
        Worker(WorkerOptions(str(tmp_path)), list(registry.contracts().values()))


@pytest.mark.parametrize("table", ["COST = 2", "COST = {'cu_seqlens': 2}", "MISSING = ['cu_seqlens']",
                                   "MISSING = {'cu_seqlens': None}"])
def test_a_table_that_is_none_is_named(table, tmp_path):
    (tmp_path / "mine.py").write_text(f"{table}\n")
    with pytest.raises(SubjectError, match=r"mine.py: (COST|MISSING) is .*; it must be \{\"contract\": "):
        Subject(str(tmp_path / "mine.py"), ROOT).describe("seqlens", "cu_seqlens", [])


def test_a_version_may_be_any_value(tmp_path):
    (tmp_path / "mine.py").write_text("VERSION = (2, 1)\n")
    assert Subject(str(tmp_path / "mine.py"), ROOT).describe("seqlens", "cu_seqlens", [])["version"] == "(2, 1)"


def test_two_subjects_keep_a_file_each_for_one_case(tmp_path):
    def saved(subject: str):
        content = casefile.document(Example((CuSeqlens((3, 5)),)), {}, subject, {}, None)
        return casefile.write(case_path(tmp_path, content), content)

    subjects = {"kernels", "/elsewhere/mine.py", "/another/mine.py"}
    assert saved("kernels") == saved("kernels") and len({saved(s) for s in subjects}) == 3
    assert {json.loads(p.read_text())["subject"] for p in tmp_path.iterdir()} == subjects


def test_a_hang_of_one_transform_leaves_the_next_its_time(planted, tmp_path):
    worker = planted("honest_sum")
    worker.limits.hung, worker.limits.slowest = True, 0.001
    assert worker.limits.now() == 0.3
    profile = Profile("few", 3, derandomize=True)
    contract = registry.contracts()["cu_seqlens"]
    assert Campaign(contract, worker, {}, domain.of(contract), profile, folder=tmp_path).run().verdict == "PASS"
    assert not worker.limits.hung and worker.limits.now() == worker.limits.run


def test_a_kept_case_outside_the_contract_is_informative():
    case = SeqlensExpand((Req(-2, 3), Req(2, 5)), total_len=2)
    example = replace(Example((case,)), outside="lengths are not negative")
    told: list = []
    harmful = SimpleNamespace(describe={"seqlens_expand": {"provided": True, "selective": False}}, versions={}, limits=Limits(),
                              options=SimpleNamespace(device="cpu", under=()), run=None)
    found = SimpleNamespace(check="unchecked", buffer="out", sentence="harm", where="", differences=(), picture=None,
                            traceback="")
    session = SimpleNamespace(worker=lambda subject: harmful, rules=lambda subject, name: {"clamp": "zero"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "replay", lambda *_: [found])
        content = {"contract": "seqlens_expand", "digest": "0" * 64, "subject": "mine"}
        patch.setattr(lanes.casefile, "document", lambda *_: content)
        patch.setattr(lanes.casefile, "write", lambda path, content: path)
        lanes.kept(session, "mine", example, lambda name, value: told.append((name, json.loads(value)["label"])))
        assert told == [("finding", "UNCHECKED PRECONDITION (out)")]
        with pytest.raises(lanes.FoundWrong):
            lanes.fixed(session, "kernels", example)


def test_a_replay_line_names_the_folders_that_the_run_was_given(tmp_path):
    (tmp_path / "elsewhere.py").write_text("def cu_seqlens(*, seqlens, cu_seqlens):\n    pass\n")
    done = run("elsewhere", "tests/test_seqlens.py", "-k", "cu_seqlens and differential", "--subject-path", str(tmp_path))
    (line, *_) = [line for line in done.stdout.splitlines() if line.startswith("  replay ")]
    command = line.split("(")[0].split()[2:]
    assert command[1:] == ["--subject-path", str(tmp_path)], done.stdout
    again = subprocess.run([sys.executable, "-m", "harness.replay", *command], cwd=ROOT, capture_output=True, text=True,
                           timeout=100)
    (ROOT / command[0]).unlink()
    assert again.returncode == 1 and "FAILED" in again.stdout, again.stdout + again.stderr
    assert f"  replay    ci/replay {' '.join(command)} " in again.stdout  # the replay's own line does as well
