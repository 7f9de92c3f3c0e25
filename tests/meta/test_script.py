"""`ci/replay --script`: the file needs nothing of the suite, fails by itself, and passes once the kernel is right."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry, script
from harness.client import UsageError, Worker, WorkerOptions
from harness.differential import Example, expect, replay
from harness.findings import Found
from harness.layout import Layout, Place
from oracles.draft import AssignExtendCacheLocs, Extent
from oracles.seqlens import CalPaddedTokens, CuSeqlens, Req, SeqlensExpand

KERNELS = """
import torch, triton, triton.language as tl

@triton.jit
def sums(lengths, out, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(lengths + lanes)                          # no mask: reads past the end
    x = tl.where(lanes < n, x, 0)
    tl.store(out + 1 + lanes, tl.cumsum(x, 0), mask=lanes < n)
    tl.store(out, tl.zeros((), tl.int32))

def cu_seqlens(*, seqlens, cu_seqlens):
    sums[(1,)](seqlens, cu_seqlens, len(seqlens), BLOCK=8)

def seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    row = 0
    for i, (extend, seq) in enumerate(zip(extend_seq_lens.tolist(), seq_lens.tolist())):
        for t in range(extend):
            seqlens_expanded[row] = seq - extend + 1 + t + (i > 0)
            row += 1

def cal_padded_tokens(*, global_num_tokens, **rest):
    return -1

def assign_extend_cache_locs(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    done = 0
    for slot, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()):
        out_cache_loc[done : done + end - start] = req_to_token[slot, start:end]  # raises when it has written already
        done += end - start
"""
ENDS = """
import sys

def cu_seqlens(*, seqlens, cu_seqlens):
    sys.exit(0)
"""
HANGS = """
import time

def cu_seqlens(*, seqlens, cu_seqlens):
    while True:
        time.sleep(0.1)
"""
STRIDED = Layout({"extend_seq_lens": Place("strided", "int64", "left"), "seq_lens": Place("offset", "int64")})
CASES = {  # what is wrong -> the example, and what the script says
    "values": (Example((SeqlensExpand((Req(2, 5), Req(1, 4))),), STRIDED), "seqlens_expanded[2] is 5, and must be 4"),
    "memory": (Example((CuSeqlens((3, 5)),)), "load from seqlens[2] of 2, where that is not allowed"),
    "returned": (Example((CalPaddedTokens((3, 5)),)), "returned -1, and must return 5"),
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "mine.py"
    path.write_text(KERNELS)
    return path


@pytest.fixture(scope="module")
def worker(mine):
    worker = Worker(WorkerOptions(str(mine)), list(registry.contracts().values()))
    yield worker
    worker.close()


def run(path):
    return subprocess.run([sys.executable, "-I", path.name], cwd=path.parent, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(("example", "says"), CASES.values(), ids=CASES)
def test_the_script_fails_as_the_case_does(example, says, worker, tmp_path):
    rules = example.contract.rules()
    found = replay(example, worker, rules)
    assert found
    assert script.write(tmp_path / "case.py", example, worker, rules, found) == "run once: it fails"
    text = (tmp_path / "case.py").read_text()
    assert "harness" not in text and "oracles" not in text
    done = run(tmp_path / "case.py")
    assert done.returncode == 1 and says in done.stdout + done.stderr


def test_a_folder_of_kernels_has_a_script(mine, tmp_path):
    (tmp_path / "seqlens.py").write_text(mine.read_text())
    example, says = CASES["values"]
    rules = example.contract.rules()
    worker = Worker(WorkerOptions(str(tmp_path)), list(registry.contracts().values()))
    try:
        found = replay(example, worker, rules)
        assert script.write(tmp_path / "case.py", example, worker, rules, found) == "run once: it fails"
    finally:
        worker.close()
    assert says in run(tmp_path / "case.py").stdout


def test_an_error_of_the_bare_interpreter_is_not_taken_for_the_finding(tmp_path):
    (tmp_path / "tuned.py").write_text((Path(__file__).parent / "autotuned.py").read_text() + "\n\ncu_seqlens = wrong\n")
    example, rules = Example((CuSeqlens((3, 5)),)), registry.contracts()["cu_seqlens"].rules()
    worker = Worker(WorkerOptions(str(tmp_path / "tuned.py")), list(registry.contracts().values()))
    try:
        found = replay(example, worker, rules)
        said = script.write(tmp_path / "case.py", example, worker, rules, found)
    finally:
        worker.close()
    assert said == "run once: it fails, with the interpreter's shims"
    assert "cu_seqlens[1] is 4, and must be 3" in run(tmp_path / "case.py").stdout


def test_the_script_passes_once_the_kernel_is_right(worker, mine, tmp_path):
    example, _ = CASES["values"]
    rules = example.contract.rules()
    script.write(tmp_path / "case.py", example, worker, rules, replay(example, worker, rules))
    right = KERNELS.replace(" + (i > 0)", "")
    (tmp_path / "right.py").write_text(right)
    text = (tmp_path / "case.py").read_text().replace(str(mine), str(tmp_path / "right.py"))
    (tmp_path / "case.py").write_text(text)
    assert run(tmp_path / "case.py").returncode == 0


def test_a_script_overwrites_nothing_but_a_script(worker, mine, tmp_path):
    example, _ = CASES["returned"]
    rules = example.contract.rules()
    write = lambda path: script.write(path, example, worker, rules, replay(example, worker, rules))
    (tmp_path / "notes.py").write_text("# mine\n")
    (tmp_path / "link.py").symlink_to(mine)
    for path, says in ((mine, "kernel under test"), (tmp_path / "link.py", "kernel under test"), (tmp_path, "no script that"),
                       (tmp_path / "notes.py", "no script that"), (tmp_path / "notes.py" / "case.py", "cannot be written")):
        with pytest.raises(UsageError, match=says) as refused:
            write(path)
        assert "\n" not in str(refused.value)
    assert mine.read_text() == KERNELS and (tmp_path / "notes.py").read_text() == "# mine\n"
    assert write(tmp_path / "case.py") == write(tmp_path / "case.py") == "run once: it fails"


def test_a_kernel_is_no_script_whatever_its_comment_says(tmp_path):
    (tmp_path / "mine.py").write_text(f"# {script.MARK}\n{KERNELS}")
    with pytest.raises(UsageError, match="kernel under test"):
        script._may_write(tmp_path / "mine.py", {"file": str(tmp_path / "mine.py"), "function": "cu_seqlens"})


def test_a_race_has_no_script(worker, tmp_path):
    example, _ = CASES["memory"]
    race = Found("memory", "cu_seqlens race", "race on cu_seqlens[0]")
    with pytest.raises(UsageError, match="a race shows only in the shadow memory"):
        script.write(tmp_path / "case.py", example, worker, {}, [race])
    assert not (tmp_path / "case.py").exists()


def test_a_finding_beside_a_race_has_a_script(worker, tmp_path):
    example, says = CASES["memory"]
    rules = example.contract.rules()
    race = Found("memory", "cu_seqlens race", "race on cu_seqlens[0]")
    found = [race, *replay(example, worker, rules)]
    assert script.write(tmp_path / "case.py", example, worker, rules, found) == "run once: it fails"
    assert says in run(tmp_path / "case.py").stdout and "race" not in (tmp_path / "case.py").read_text().splitlines()[0]


def test_a_broken_precondition_has_a_script_without_expectations(worker, tmp_path):
    """The oracle has no answer for a slot that does not exist; what the script shows is what the kernel does."""
    case = AssignExtendCacheLocs((Extent(0, 0, 2), Extent(9, 0, 2)), slots=4)
    example = Example((case,), outside="slots exist")
    assert example.breaks_contract
    with pytest.raises(LookupError, match="the oracle read row 9"):
        expect(case.contract, case.arguments(), {})
    found = replay(example, worker, {})
    assert [f.check for f in found] == ["unchecked"]
    assert script.write(tmp_path / "case.py", example, worker, {}, found) == "run once: it fails"
    assert "IndexError: index 9 is out of bounds" in run(tmp_path / "case.py").stderr
    fine = Example((AssignExtendCacheLocs((Extent(0, 0, 2),)),), outside="slots exist")
    assert script.write(tmp_path / "fine.py", fine, worker, {}, []) == "run once: it passes"


def test_a_kernel_that_ends_the_process_is_not_right(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    worker = Worker(WorkerOptions(str(tmp_path / "ends.py")), list(registry.contracts().values()))
    example = Example((CuSeqlens((3, 5)),))
    said = script.write(tmp_path / "case.py", example, worker, {}, replay(example, worker, {}))
    worker.close()
    assert said == "run once: it fails" and "raised SystemExit: 0" in run(tmp_path / "case.py").stdout


def test_a_kernel_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setitem(script.MARGIN, "cpu", 2.0)
    worker = Worker(WorkerOptions(str(tmp_path / "hangs.py"), run_limit=1.0), list(registry.contracts().values()))
    example = Example((CuSeqlens((3, 5)),))
    found = replay(example, worker, {})
    said = script.write(tmp_path / "case.py", example, worker, {}, found)
    worker.close()
    assert found[0].kind == ("fault", "hang") and said == "run once: it does not end, and was stopped after 3 s"
