"""The comparison with other ways of testing: each column sees what it can and nothing else, and the page says so."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from harness import devices
from harness.client import ROOT
from harness.sanitized import CannotRun
from tests.museum import catalogue, compare, comparison, plain
from tests.museum.comparison import Column

ROW = {"seen": True, "how": "values", "examples": 3, "seconds": 0.25, "twin": ""}
UNSEEN = {"seen": False, "how": "", "examples": 200, "seconds": 2.0}


def script(path, text: str, head: str = "import json, sys, time") -> str:
    """A program that stands for another."""
    path.write_text(f"#!{sys.executable}\n{head}\n{text}\n")
    path.chmod(0o755)
    return str(path)


# -- an ordinary test -----------------------------------------------------------------------------------------------------


def test_an_ordinary_test_sees_wrong_values_and_not_a_stale_tail_that_zeros_hide():
    done = subprocess.run([sys.executable, compare.PLAIN, "equal", "B045", "B064"], capture_output=True, text=True, check=True)
    on, wrong, stale = map(json.loads, done.stdout.splitlines())
    assert "Triton" in on["on"]
    assert (wrong["id"], wrong["seen"], wrong["how"], wrong["twin"]) == ("B045", True, "values", "")
    assert (stale["id"], stale["seen"], stale["how"]) == ("B064", False, "") and stale["examples"] >= 200


def test_a_clean_twin_that_is_not_clean_is_reported():
    hunts = {"B045": ROW, "B045_clean": {**ROW, "how": "sanitizer"}}
    tried = []
    result = plain.with_twin("B045", lambda name, counted: tried.append((name, counted)) or dict(hunts[name]))
    assert result["twin"] == "sanitizer" and tried == [("B045", compare.run.BUDGET), ("B045_clean", plain.TWIN)]
    late = plain.with_twin("B045", lambda name, counted: tried.append((name, counted)) or {**ROW, "examples": 90})
    assert late["twin"] == "values" and tried[-1] == ("B045_clean", 90)


def test_kernels_are_found_through_helpers():
    found = compare.kernels()
    assert {"B013", "B105"} <= found < set(catalogue.EXHIBITS) and not found & {"B045", "B097"}


# -- processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


@pytest.mark.parametrize(("said", "result"), [
    (b'\n...{"seen": false}', {"seen": False}), (b"\n..", {"seen": True, "how": "crash", "examples": 2})])
def test_a_process_reports_or_crashed(pipe, said, result):
    os.write(pipe[1], said)
    os.close(pipe[1])
    told = plain.watch(pipe[0], 5.0)
    assert told | result == told


def test_a_process_without_news_hangs(pipe):
    os.write(pipe[1], b"\n.")
    told = plain.watch(pipe[0], 0.05)
    os.close(pipe[1])
    assert (told["how"], told["examples"]) == ("hang", 1)


@pytest.mark.parametrize("said", [b'\n.{"fault": "Traceback\\nKeyError: 7"}', b""])
def test_an_error_of_its_own_is_no_sign_of_a_bug(pipe, said):
    os.write(pipe[1], said)
    os.close(pipe[1])
    with pytest.raises(RuntimeError, match="KeyError: 7" if said else "before its first example"):
        plain.watch(pipe[0], 5.0)


# -- compute-sanitizer, pretended -----------------------------------------------------------------------------------------

TOOL = """
import os
if sys.argv[1:] == ["--version"]:
    sys.exit(print("Version 2025.1"))
log = sys.argv[sys.argv.index("--log-file") + 1].replace("%p", str(os.getpid()))
with open(log, "w") as file:
    print("========= COMPUTE-SANITIZER", file=file)
os.environ["LOG"] = log
rest = sys.argv[sys.argv.index(SELF_PYTHON) :]
os.execv(rest[0], rest)
"""
SUBJECTS = """
import os
_, tool, name, counted, folder = sys.argv
if name == "no_gpu":
    sys.exit("RuntimeError: no CUDA")
says = lambda: print("========= Invalid __global__ read of size 4 bytes", file=open(os.environ["LOG"], "a"))
print("\\n..", end="", flush=True)
result = {"seen": False, "how": "", "examples": 2, "seconds": 0.1}
if name == "at_once":
    says()
    result |= {"seen": True, "how": "RuntimeError"}
if name in ("too_late", "too_late_clean"):
    says()
if name == "dies":
    os._exit(1)
if name == "own":
    result = {"fault": "Traceback\\nKeyError: 7"}
print(json.dumps(result))
"""


@pytest.fixture
def memcheck(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "PLAIN", script(tmp_path / "plain.py", SUBJECTS))
    monkeypatch.setattr(devices, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(devices, "model", lambda gpu: gpu)
    tool = script(tmp_path / "tool", TOOL.replace("SELF_PYTHON", repr(sys.executable)), "import sys")

    def run(*names) -> Column:
        column = Column()
        list(compare.sanitized("memcheck", list(names), column, tool, 4))
        return column

    return run


def test_what_the_tool_writes_belongs_to_the_function_that_ran(memcheck):
    column = memcheck("at_once", "too_late", "dies", "silent")
    assert column.on == f"a GPU, {plain.ON}, compute-sanitizer 2025.1, 4 processes"
    seen = {name: (row["seen"], row["how"], row.get("twin")) for name, row in column.rows.items()}
    assert seen == {"at_once": (True, "sanitizer", ""), "too_late": (True, "sanitizer", "sanitizer"),
                    "dies": (True, "crash", ""), "silent": (False, "", None)}
    assert column.rows["at_once"]["said"] == ["Invalid __global__ read of size 4 bytes"]


def test_a_tool_that_sees_nothing_proves_nothing(memcheck):
    with pytest.raises(CannotRun, match="saw nothing at all"):
        memcheck("silent")


def test_an_exhibit_without_a_result_is_named(memcheck):
    with pytest.raises(CannotRun, match="memcheck has no result for 1: own: KeyError: 7"):
        memcheck("own", "at_once")
    with pytest.raises(CannotRun, match="1: no_gpu: .* before its first example RuntimeError: no CUDA"):
        memcheck("no_gpu", "at_once")


# -- the page and the command ---------------------------------------------------------------------------------------------


def test_the_page_tells_all_outcomes_apart():
    rows = {"B001": ROW, "B002": UNSEEN, "B003": {**UNSEEN, "how": plain.LATE}, "B004": {**ROW, "how": "hang"},
            "B005": {**ROW, "twin": "values"}, "B006": {**ROW, "twin": "NotImplementedError"}, "B008": {**ROW, "how": "crash"}}
    suite = {name: {**ROW, "examples": 4, "seconds": 0.4} for name in rows} | {"B008": UNSEEN}
    text = comparison.page({"equal": Column("", {"B001": {**ROW, "seconds": 0.1}}), "suite": Column("", suite)})
    assert "| ordinary test |  | B001 | B001 |" in text
    text = comparison.page({"viz": Column("here", {"B001": ROW}), "equal": Column("there", rows), "suite": Column("", suite)})
    assert "| ordinary test | 2 | 7 | 1 | 1 | 2 | 0.25 | there |" in text
    assert text.index("| ordinary test |") < text.index("| triton-viz 3.0 |")
    assert "| ordinary test | B008 | B001 |  |" in text and "| triton-viz 3.0 |  | B001 |  |" in text
    cells = {line[2:6]: [c.strip() for c in line.split("|")[4:-1]] for line in text.splitlines() if line.startswith("| B0")}
    assert cells == {"B001": ["3, 0.25 s", "3, 0.25 s"], "B002": ["", "n/a"], "B003": ["too slow", "n/a"],
                     "B004": ["too slow", "n/a"], "B005": ["also in the clean twin", "n/a"],
                     "B006": ["cannot run it (NotImplementedError)", "n/a"], "B008": ["3, 0.25 s (crash)", "n/a"]}


def test_columns_are_merged_and_later_rows_win(tmp_path):
    comparison.save(tmp_path / "a", {"equal": Column("x", {"B001": ROW, "B002": ROW}), "suite": Column("x", {"B001": ROW})})
    comparison.save(tmp_path / "b", {"equal": Column("y", {"B002": UNSEEN})})
    merged = comparison.merged([tmp_path / "a", tmp_path / "b"])
    assert merged["equal"] == Column("y", {"B001": ROW, "B002": UNSEEN}) and merged["suite"].on == "x"


def test_a_crash_loses_no_row(tmp_path, monkeypatch, capsys):
    tool = script(tmp_path / "viz", 'print(json.dumps({"id": sys.argv[3], "seen": False, "how": ""}))\nsys.exit(3)')
    monkeypatch.setattr(compare, "kernels", lambda: {"B011", "B013"})
    assert compare.main(["B011", "B013", "--only", "viz", "--viz", tool, "--out", str(tmp_path / "out")]) == 2
    assert "ended with status 3" in capsys.readouterr().out
    assert list(comparison.read(tmp_path / "out")["viz"].rows) == ["B011"]


def test_no_page_is_written_with_columns_that_lack_exhibits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "kernels", lambda: {"B001", "B002"})
    monkeypatch.setattr(compare, "PAGE", tmp_path / "page")
    monkeypatch.setattr(catalogue, "EXHIBITS", {"B001": None, "B002": None})
    both = {"suite": Column("x", {"B001": UNSEEN, "B002": UNSEEN})}
    assert compare.main(["--only", "viz", "--viz", "true", "--write", "--out", str(tmp_path / "out")]) == 2
    assert "suite lacks 2" in capsys.readouterr().out
    comparison.save(tmp_path / "a", both | {"viz": Column("x", {"B001": UNSEEN})})
    assert compare.main(["--merge", str(tmp_path / "a"), "--write", "--out", str(tmp_path / "out")]) == 2
    assert "viz lacks 1 of the exhibits" in capsys.readouterr().out and not compare.PAGE.exists()
    comparison.save(tmp_path / "a", both | {"viz": both["suite"]})
    assert compare.main(["--merge", str(tmp_path / "a"), "--write", "--out", str(tmp_path / "out")]) == 0
    assert "| B002 |" in compare.PAGE.read_text()


@pytest.mark.parametrize(("given", "says"), [
    (["--only", "viz"], "needs --viz COMMAND"), (["B000"], "B000 is no exhibit"), (["--merge", "nowhere"], "does not exist"),
    (["--only", "memcheck"], "no GPU is visible here")])
def test_errors_of_use_are_one_line_and_exit_2(given, says, monkeypatch, capsys):
    monkeypatch.setattr(devices, "gpus", lambda: ())
    assert compare.main(given) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert says in line


def test_the_page_is_the_commands():
    text = compare.PAGE.read_text()
    assert all(f"| {name} |" in text for name in catalogue.EXHIBITS)
    commands = re.findall(r"^python -m tests.museum.compare ([^#\n]*)", text, re.M)
    assert len(commands) == 3 and all(compare.arguments().parse_args(shlex.split(c)) for c in commands)
    assert compare.PAGE.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()
