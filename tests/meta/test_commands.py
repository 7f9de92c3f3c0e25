"""The commands as a user runs them: a faulty kernel through the gate, its case through ci/replay, and every exit code."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

from harness import casefile, devices, gate, registry, replay, report
from harness.client import subject_name
from harness.differential import Example
from harness.gate import _conclude
from harness.report import Run
from harness.verdicts import Row, exit_code, merged
from harness.worker.main import wrong_pair
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


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PLUMBLINE", "GITHUB", "CI"))}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env={**kept, **environment},
                          capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Off by one only for requests after the first."""
    path = tmp_path_factory.mktemp("kernels") / "mine.py"
    path.write_text(WRONG)
    return path


@pytest.fixture(scope="module")
def red(mine, tmp_path_factory):
    """What a gate's lanes make of it, as GitHub would see it: the output, the report's folder, and the saved case."""
    folder = tmp_path_factory.mktemp("report")
    chosen = "(seqlens_expand or cu_seqlens) and not replays"
    done = run("pytest", "-q", "-n", "1", "-m", "gate", "tests/test_seqlens.py", "-k", chosen, f"--subject={mine}",
               f"--report={folder}", f"--junitxml={folder / 'junit.xml'}", "-o", "junit_family=xunit2",
               "-o", f"cache_dir={folder / 'cache'}", GITHUB_ACTIONS="true")
    line = next(x for x in done.stdout.splitlines() if x.startswith("  replay    ci/replay"))
    yield done, folder, line.split()[2]
    (ROOT / line.split()[2]).unlink(missing_ok=True)


def test_a_failure_is_a_sentence_a_case_cells_and_commands(red):
    done, _, path = red
    assert done.returncode == 1, done.stdout + done.stderr
    text = done.stdout.split("test_differential[seqlens_expand-mine] _")[1]
    lines = text.splitlines()[1:]
    assert lines[0].startswith("DEFECT  seqlens_expand: seqlens_expanded[") and "of request 1" in lines[0]
    starts = [line.split()[0] for line in lines[:9] if line.strip()]
    assert [s for s in starts if s != "layout"][:5] == ["DEFECT", "case", "variant", "check", "cell"]
    assert path in text and "ci/replay --keep" in text
    assert len(casefile.read(ROOT / path).example.steps[0].batch) <= 2
    for noise in ("Traceback", "hypothesis", "falsifying", "[gw0]", "Failed:", "FoundWrong"):
        assert noise not in done.stdout


def test_the_last_failure_again_reads_the_same(red, mine):
    """`--lf -x` in one process: the failed test alone, and the very same text."""
    done, folder, _ = red
    cache = f"cache_dir={folder / 'cache'}"
    again = run("pytest", "-q", "--lf", "-x", "tests/test_seqlens.py", f"--subject={mine}", "-o", cache)
    text = lambda output: output.split(" FAILURES ")[1].split("\n\nsubject ")[0].splitlines()[2:]
    last = again.stdout.splitlines()[-1]
    assert again.returncode == 1 and "1 failed" in last and "passed" not in last
    assert text(again.stdout) == text(done.stdout)


def test_the_report_says_the_same_to_people_and_to_programs(red):
    done, folder, path = red
    table = json.loads((folder / "verdicts.json").read_text())
    assert {(r["transform"], r["verdict"]) for r in table} == {("seqlens_expand", "DEFECT"), ("cu_seqlens", "NOT PROVIDED")}
    finding, *remarks = json.loads((folder / "findings.json").read_text())
    assert all(r["label"].startswith("UNCHECKED PRECONDITION") for r in remarks)
    assert finding["path"] == path and finding["picture"]["wrong"]
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("# plumbline: 1 of 1 transforms with findings") and f"ci/replay {path}" in summary
    assert finding["differences"][0][4] in summary
    assert done.stdout.count("::error title=DEFECT seqlens_expand::") == 1


def test_junit_is_what_viewers_accept(red):
    suite = xml.parse(red[1] / "junit.xml").getroot().find("testsuite")
    assert int(suite.get("tests")) == len(suite.findall("testcase")) > 2 and suite.get("failures") == "1"
    assert all(case.get("classname") and case.get("name") and float(case.get("time")) >= 0 for case in suite)
    assert not list(suite.iter("properties"))
    (failure,) = suite.iter("failure")
    assert failure.text.startswith("DEFECT  seqlens_expand:")


def test_the_case_replays_until_it_is_fixed(red, mine, capsys):
    path = red[2]
    right = mine.with_name("right.py")
    right.write_text(RIGHT.format(fault=""))
    assert replay.main([str(ROOT / path), "--bisect", str(mine), str(mine.with_name("gone.py")), str(right)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["mine.py", "FAILED"], ["gone.py", "ERROR"], ["right.py", "FIXED"]]
    assert lines[4] == "first fixed: right.py (before it: mine.py)"


def test_every_version_shows_its_own_file(red, mine, tmp_path, capsys):
    """The case names its subject by its full path, which must not win over the folders."""
    for name, file, fault in (("old", mine.name, " + (i > 0)"), ("none", "other.py", ""), ("new", mine.name, "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(RIGHT.format(fault=fault))
    with zipfile.ZipFile(tmp_path / "newer.whl", "w") as wheel:
        wheel.write(tmp_path / "new" / mine.name, f"{mine.parent.name}/{mine.name}")
    versions = [tmp_path / name for name in ("old", "none", "new", "newer.whl")]
    assert replay.main([str(ROOT / red[2]), "--bisect", *map(str, versions)]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines[:4]] == [["old", "FAILED"], ["none", "ERROR"], ["new", "FIXED"], ["newer.whl", "FIXED"]]
    assert lines[1][2].startswith(f"it has no {mine.name}, which is the subject")


def test_a_case_replays_from_another_folder_as_the_failure_names_it(red, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert replay.main([red[2]]) == 1
    assert capsys.readouterr().out.startswith("DEFECT  seqlens_expand: ")


def test_the_gate_keeps_the_callers_interpreter(tmp_path, monkeypatch):
    """pytest runs in the root. The Python of a virtual environment is a link, and another Python where the link leads."""
    asked = []
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gate, "run", lambda command: asked.append(command) or 0)
    monkeypatch.setattr(gate, "_impossible", lambda options: "")
    gate.main(["--report", str(tmp_path), "--subject-python", "./python"])
    assert f"--subject-python={tmp_path / 'python'}" in asked[-1]


def test_pdb_stops_on_the_first_line_of_the_kernel(red, mine):
    done = subprocess.run([sys.executable, "-m", "harness.replay", red[2], "--inline", "--pdb"], cwd=ROOT, text=True,
                          input="p seq_lens.shape\nc\nc\n", capture_output=True, timeout=100)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "FAILED"
    assert f"{mine}(" in done.stdout and "torch.Size(" in done.stdout


def test_a_debugger_that_is_left_gives_no_verdict(case):
    done = subprocess.run([sys.executable, "-m", "harness.replay", str(case), "--inline", "--pdb"], cwd=ROOT, text=True,
                          input="q\n", capture_output=True, timeout=120)
    assert done.returncode == 2 and "the debugger was left in the middle of a call: no verdict" in done.stdout, done
    assert "DEFECT" not in done.stdout


@pytest.fixture
def case(tmp_path):
    contract = registry.contracts()["seqlens_expand"]
    example = Example((SeqlensExpand((Req(1, 1), Req(1, 4))),))
    return casefile.write(tmp_path / "case.json", casefile.document(example, contract.rules(), "kernels", {}, None))


# -- errors of use: one line, what to do, exit 2 ------------------------------------------------------------------------


WRONG_USES = {
    "no such case": (["missing.json"], "not readable as a case file"),
    "unknown subject": (["CASE", "--subject", "no_such_module"], "neither a built-in"),
    "no such file": (["CASE", "--subject", "missing.py"], "no such file"),
    "not provided": (["CASE", "--subject", "EMPTY"], "does not provide seqlens_expand"),
    "wrong signature": (["CASE", "--subject", "POSITIONAL"], "write def seqlens_expand(*, extend_seq_lens, seq_lens, "),
    "debugger without --inline": (["CASE", "--pdb"], "--pdb needs --inline"),
    "no interpreter": (["CASE", "--subject-python", "/bin/false"], "the worker did not start"),
    "missing interpreter": (["CASE", "--subject-python", "/no/such/python"],
                            "--subject-python /no/such/python: cannot be started (No such file or directory); it must be"),
    "interpreter is a folder": (["CASE", "--subject-python", "/"], "--subject-python /: cannot be started (Permission denied)"),
    "versions of kernels": (["CASE", "--bisect", "/tmp"], "--bisect /tmp: the subject kernels is the same in every version"),
    "no GPU": (["CASE", "--cuda"], "--cuda: no GPU is visible here"),
    "no GPU for memcheck": (["CASE", "--memcheck"], "--memcheck: no GPU is visible here"),
    "no GPU for cuda-gdb": (["CASE", "--cuda-gdb"], "--cuda-gdb: no GPU is visible here"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG_USES.values(), ids=WRONG_USES)
def test_wrong_uses_of_replay(case, arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ())
    files = {"CASE": case, "EMPTY": tmp_path / "empty.py", "POSITIONAL": tmp_path / "positional.py"}
    files["EMPTY"].write_text("")
    files["POSITIONAL"].write_text("def seqlens_expand(lengths, out): ...")
    assert replay.main([str(files.get(a, a)) for a in arguments]) == 2
    out = capsys.readouterr().out
    assert out.startswith("ERROR   ") and says in out and len(out.splitlines()) == 1


@pytest.mark.parametrize("tool", ["compute-sanitizer", "cuda-gdb"])
def test_a_missing_cuda_tool(case, tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ("a GPU",))
    for variable in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert replay.main([str(case), "--memcheck" if tool == "compute-sanitizer" else "--cuda-gdb"]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"ERROR   {tool} is not on the PATH") and len(out.splitlines()) == 1


def test_a_case_of_a_newer_format(case, capsys):
    case.write_text(json.dumps({**json.loads(case.read_text()), "format_version": 3}))
    assert replay.main([str(case)]) == 2
    assert "format_version 3; this version reads 2: use the version" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "says"), [
    (["--subject", "missing.py"], "missing.py: no such file"),
    (["--subject-python", "/no/such/python"], "--subject-python /no/such/python: cannot be started"),
    (["--require-gpu"], "--require-gpu: no GPU is visible here"),
    (["--overflow"], "--overflow: Triton's checks of integer overflow are compiled in, and no GPU is in use here"),
    (["--device", "tpu"], "known are auto, cpu, cuda"),
    (["-n", "many"], "-n many: it must be a number, auto or logical"),
    (["--variant", "seqlens_expand:clamp=bad"], "--variant seqlens_expand:clamp=bad: seqlens_expand has no variant clamp=bad"),
    (["--report", __file__], f"--report {__file__}: File exists"),
    (["--subject", "EMPTY"], "empty.py: it has no function with the name of a contract, as "),
], ids=["no such subject", "no such interpreter", "no GPU", "overflow without a GPU", "unknown device", "no number",
        "no such rule", "report is a file", "nothing provided"])
def test_wrong_uses_of_the_gate(arguments, says, capsys, monkeypatch, tmp_path):
    (tmp_path / "empty.py").touch()
    arguments = [str(tmp_path / "empty.py") if a == "EMPTY" else a for a in arguments]
    monkeypatch.setattr(devices, "gpus", lambda: ())
    monkeypatch.setattr(gate, "run", lambda command: pytest.fail("nothing may run"))
    assert gate.main(arguments) == 2
    out = capsys.readouterr().out
    assert says in out and len(out.splitlines()) == 1


def test_a_pair_of_triton_and_numpy_that_does_not_work():
    assert wrong_pair("3.6.0", "2.4.6") == wrong_pair("3.9.0+git1", "2.0.1") == ""
    for pair in (("3.5.1", "2.4.6"), ("3.7.1", "1.26.4")):
        assert wrong_pair(*pair).startswith(f"Triton {pair[0]} with NumPy {pair[1]}: ") and "pip install" in wrong_pair(*pair)


def test_a_missing_extra_is_one_line_and_the_rest_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (tmp_path / "index.html").write_text("of an earlier run")
    assert report.write(tmp_path, Run(["header"], [row("PASS")])) == [report.NEEDS_JINJA]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["findings.json", "summary.md", "verdicts.json"]


def test_a_subject_that_cannot_be_imported_is_exit_2(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import a_module_that_is_not_there\n")
    done = run("pytest", "-q", "tests/test_seqlens.py", "-k", "cu_seqlens and differential", f"--subject={broken}")
    assert done.returncode == 2
    assert "importing it failed: No module named 'a_module_that_is_not_there'" in done.stdout
    assert "Traceback" not in done.stdout


WRONG_VARIANTS = {
    '{"gather_page_table": {"tail": "none"}}': "gather_page_table has no variant tail=none; it knows {'tail': ['strict'",
    '{"gather_page_table": {"tale": "strict"}}': "gather_page_table has no variant tale=strict; it knows {'tail': ['strict'",
    '{"gather_pages": {"tail": "strict"}}': "VARIANTS names 'gather_pages', which is no contract; known are ",
    '{"gather_page_table": "strict"}': """VARIANTS is {'gather_page_table': 'strict'}; it must be {"contract": {"rule": """,
    '{"gather_page_table": {"tail": None}}': "VARIANTS is {'gather_page_table': {'tail': None}}; it must be ",
    '["gather_page_table"]': "VARIANTS is ['gather_page_table']; it must be ",
}


@pytest.mark.parametrize(("variants", "says"), WRONG_VARIANTS.items(), ids=WRONG_VARIANTS)
def test_a_subject_with_variants_that_there_are_not(variants, says, case, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(f"VARIANTS = {variants}\n" + RIGHT.format(fault=""))
    assert replay.main([str(case), "--subject", str(mine), "--inline"]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"ERROR   --subject {mine}: VARIANTS") and says in out and len(out.splitlines()) == 1


def test_errors_of_use_under_pytest_are_exit_2_and_no_traceback(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text('VARIANTS = {"cu_seqlens": {"tail": "nonesuch"}}\ndef cu_seqlens(*, seqlens, cu_seqlens): ...\n')
    for option, says in ((f"--subject={mine}", "cu_seqlens has no variant tail=nonesuch"),
                         ("--subject-python=/no/such/python", "--subject-python /no/such/python: cannot be started")):
        done = run("pytest", "-q", "tests/test_seqlens.py", "-k", "cu_seqlens and differential", option)
        assert done.returncode == 2 and says in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(("option", "says"), [
    ("--profile=fast", "known are"), ("--device=tpu", "known are"), ("--variant=nothing:a=b", "unknown contract"),
    ("--variant=decode_metadata:tail=long", "has no variant tail=long"),
], ids=["profile", "device", "contract", "variant"])
def test_wrong_options_are_refused(option, says, pytestconfig):
    """pytest's own kind of usage error, which ends it with status 4 and one line."""
    plugins = pytestconfig.pluginmanager.get_plugins()
    (doorway,) = (p for p in plugins if getattr(p, "__file__", "") == str(ROOT / "conftest.py"))
    name, value = option.removeprefix("--").split("=", 1)
    options = Namespace(**{"profile": "quick", "device": "cpu", "require_gpu": False, "overflow": False, "variant": [],
                           name: [value] if name == "variant" else value})
    with pytest.raises(pytest.UsageError, match=says):
        doorway.pytest_configure(Namespace(option=options, stash={}))


# -- what a gate concludes ----------------------------------------------------------------------------------------------


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
    ids=lambda value: " + ".join(r.verdict for r in value) or "nothing" if isinstance(value, list) else f"exit {value}",
)
def test_exit_codes(rows, code):
    assert exit_code(rows) == code


def test_the_worst_lane_decides_a_line():
    assert merged([row("PASS"), row("DEFECT", "replays")])[0].verdict == "DEFECT"


def test_a_gate_without_verdicts_or_with_a_crashed_pytest_is_exit_2(tmp_path):
    assert _conclude(0, tmp_path / "verdicts.json") == 2
    report.write(tmp_path, Run([], [row("PASS")]))
    assert _conclude(3, tmp_path / "verdicts.json") == 2
    assert _conclude(5, tmp_path / "verdicts.json") == 2
    assert _conclude(0, tmp_path / "verdicts.json") == 0
    assert _conclude(1, tmp_path / "verdicts.json") == 1


def test_a_gate_runs_the_self_checks_first_and_stops_where_it_is_blind(monkeypatch, tmp_path, capsys):
    asked = []

    def pretend(command):
        asked.append(" ".join(command))
        return statuses[len(asked) - 1]

    monkeypatch.setattr(gate, "run", pretend)
    monkeypatch.setattr(gate, "_impossible", lambda options: "")
    for statuses, says in (([1], "a planted fault was not seen"), ([0, 2], "this gate is blind"), ([0, 0, 0], "no verdict")):
        asked.clear()
        assert gate.main(["--report", str(tmp_path)]) == 2 and says in capsys.readouterr().out
        assert len(asked) == len(statuses)
    assert "selfcheck" in asked[0] and "tests.museum.run --in-a-gate" in asked[1]
    assert "-m gate" in asked[2] and "--subject=eager" in asked[2]


def test_keep_adds_the_case_to_the_corpus(case, monkeypatch, tmp_path):
    monkeypatch.setattr(replay, "CORPUS", tmp_path / "corpus")
    replay._keep(case)
    assert casefile.read(tmp_path / "corpus" / "case.json").example == casefile.read(case).example


def test_a_subject_inside_the_checkout_is_named_as_any_checkout_would():
    assert subject_name(str(ROOT / "kernels" / "seqlens.py")) == "kernels/seqlens.py"
    assert subject_name("/elsewhere/mine.py") == "/elsewhere/mine.py"
    assert subject_name("sglang") == "sglang"


def test_a_folder_is_a_subject_from_wherever_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "package", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    assert subject_name("mine") == str(tmp_path / "mine")
    assert subject_name("./package") == str(tmp_path / "package")
    assert (subject_name("package"), subject_name("kernels")) == ("package", "kernels")


def test_cu_seqlens_case_prints_as_python():
    assert repr(CuSeqlens((3, 5), spare=1)) == "CuSeqlens(lengths=[3, 5], spare=1)"
