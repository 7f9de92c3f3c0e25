"""The report: whole in one file, the same to every reader, right in a browser, and valid when the run was stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness import pictures, rendering, report
from harness.progress import Count
from harness.report import Run
from harness.results import Result, bucketed
from harness.verdicts import Row
from measure import needs

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "link", "img", "rect", "hr"}
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), "")


def finding(transform="seqlens_expand", check="states", label="DEFECT", case="Case()", where="", **more) -> Result:
    picture = {"tensor": "out", "row": 2, "column": 60, "wrong": [[0, 1], [1, 0]],
               "expected": [["1", "2", "any"], ["-1999999999", "5", "rule"]], "actual": [["1", "<3>", "9"], ["1", "5", "6"]],
               "state": [["WRITTEN", "WRITTEN", "DONT_CARE"], ["UNTOUCHED", "WRITTEN", "JUDGED"]]}
    cells = [["[row 2, col 61]", "2", "<3>", "WRITTEN", "token 1 of request 0"]]
    return Result("mine.py", transform, label, "out[row 2, col 61] is <3>, and must be 2", case, check, "out",
                  "failures/seqlens_expand-00000000.json", where=where, differences=cells, picture=picture, **more)


def some_run(**more) -> Run:
    rows = [Row("mine.py", "seqlens_expand", "inside", "DEFECT", 60, 5, 0, 1.5, "all 5", ["a <note>"]),
            Row("mine.py", "cu_seqlens", "inside", "PASS", 60, 5, 2, 0.5, "all 5")]
    remark = finding("cu_seqlens", "unchecked", "UNCHECKED PRECONDITION (the total fits int32)")
    return Run(["plumbline <test>"], rows, [finding(), remark], 12.0, 8, 8, slowest=[("test_a", 3.0)], **more)


def test_a_report_takes_whatever_a_subject_says(tmp_path, monkeypatch):
    """Under a locale without UTF-8, and with half of a surrogate pair, which no encoding has."""
    stock = Path.write_text
    plain = lambda path, text, encoding="ascii", errors=None: stock(path, text, encoding, errors)
    monkeypatch.setattr(Path, "write_text", plain)
    run = some_run()
    run.results[0].sentence = "raised ValueError: \udc80 – Größe"
    report.write(tmp_path, run)
    for name in ("summary.md", "index.html"):
        assert "\\udc80 – Größe" in (tmp_path / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.targets = [], [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.targets += [given[k] for k in ("href", "src", "action") if k in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


@pytest.fixture
def folder(tmp_path):
    assert report.write(tmp_path, some_run()) == []
    return tmp_path


def test_the_page_is_one_well_formed_file_without_script(folder):
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert page.count("script") == 0 and not re.search(r"url\(|@import|https?://", text)
    assert all(target.startswith("#") for target in page.targets)
    ids = {given["id"] for _, given in page.tags if "id" in given}
    assert {target[1:] for target in page.targets} <= ids
    assert page.count("details") == page.count("summary") and page.count("figure") == 8
    assert all("aria-label" in given or "aria-hidden" in given for tag, given in page.tags if tag == "svg")
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_the_finding_and_escapes_what_kernels_say(folder):
    text = (folder / "index.html").read_text()
    said = "".join(Page(text).text)
    assert "1 of 2 transforms with findings" in said and "ci/replay failures/seqlens_expand-00000000.json" in said
    assert "token 1 of request 0" in said and "out[row 2, col 61] is <3>, and must be 2" in said and "<3>" not in text


def test_pictures_show_expected_actual_state_and_difference():
    shown = dict(pictures.panels(finding().picture))
    assert list(shown) == ["expected", "actual", "state", "difference"]
    assert all(svg.count("<rect") == 6 and svg.count(" wrong") == 2 for svg in shown.values())
    assert ">≠<" in shown["difference"] and ">+2000000000<" in shown["difference"] and "60</text>" in shown["expected"]


def test_a_wide_picture_keeps_the_first_wrong_cell():
    wide = {**finding().picture, "wrong": [[0, 14]], **{k: [["1234567890"] * 16] for k in ("expected", "actual", "state")}}
    svg = dict(pictures.panels(wide))["actual"]
    assert svg.count("<rect") < 16 and svg.count(" wrong") == 1


def test_findings_of_one_cause_are_one_bucket():
    same = [finding(case="Case(long)", test="a"), finding(test="b"), finding(where="k.py:3", test="c")]
    first, second = bucketed(same)
    assert (first.case, first.also, second.where) == ("Case()", ["a"], "k.py:3")


def test_annotations_are_as_many_as_github_shows():
    lines = report.annotations([finding(where=f"kernels/k.py:{n}", traceback="x") for n in range(12)])
    assert len(lines) == 10 and lines[-1].endswith("::3 more findings: see the job summary and the artifact")
    assert lines[0].startswith("::error file=kernels/k.py,line=0,title=DEFECT seqlens_expand::out[row 2, col 61] is <3>")
    assert "%0Acase Case()%0Aci/replay" in lines[0] and "\n" not in lines[0]
    assert len(report.annotations([finding(where=f"{n}:1") for n in range(10)])) == 10
    assert report.annotations([finding(label="UNCHECKED PRECONDITION (x)")]) == []


def test_tables_of_other_commands_are_shown_or_asked_for(tmp_path):
    rows = [{"bug": "sglang#1", "seen": True, "hunts": [{"seed": 1}, {"seed": 2}]}]
    (tmp_path / "museum.json").write_text(json.dumps(rows))
    report.write(tmp_path, some_run())
    said = " ".join("".join(Page((tmp_path / "index.html").read_text()).text).split())
    assert "sglang#1" in said and "yes" in said and "seed 1; seed 2" in said
    assert "Not made in this run. ci/mutate makes it." in said


def test_the_coverage_matrix_has_every_lane():
    rows = [Row("b.py", "t", "inside", "PASS", 60), Row("b.py", "t", "outside", "UNCHECKED PRECONDITION"),
            Row("a.py", "t", "replays", "DEFECT", 3), Row("a.py", "u", "inside", "NOT PROVIDED")]
    assert report.coverage(rows) == (["a: replays", "a: inside", "b: inside", "b: outside"],
                                     [("t", ["3 ✗", "", "60", "tried"]), ("u", ["", "–", "", ""])])


def test_a_stopped_run_says_so_everywhere(tmp_path):
    report.write(tmp_path, some_run(interrupted=True))
    assert "interrupted: 8 of 8 tests ran" in (tmp_path / "summary.md").read_text()
    assert "This report is partial" in (tmp_path / "index.html").read_text()


def test_a_kernels_own_traceback_stays_whole():
    lines = ["Traceback (most recent call last):", '  File "mine.py", line 3, in f', "    boom()", "", "ValueError: boom"]
    text = rendering.finding(finding(check="raised", traceback="\n".join(lines)))
    assert text.endswith("\n".join("  | " + line for line in lines))


def test_progress_in_words():
    now = [0.0]
    count = Count(lambda: now[0])
    count.total = 4
    count.begin("t.py::test_a[x]")
    now[0] = 10.0
    assert count.text() == "0/4 tests, 0:10; running test_a[x] (10 s)"
    count.end("t.py::test_a[x]")
    count.failed = 1
    assert count.text() == "1/4 tests, 0:10, about 0:30 left, 1 failed"


SLOW = """
import time
def cal_padded_tokens(**given):
    time.sleep(1)
def cu_seqlens(*, seqlens, cu_seqlens):
    raise ValueError("known at once")
"""


def test_ctrl_c_leaves_a_valid_partial_report(tmp_path):
    """The gate's processes as a terminal would stop them: an interrupt for each, while one test is done and one is not."""
    (tmp_path / "slow.py").write_text(SLOW)
    out = open(tmp_path / "out", "w+")
    gate = "import sys; from harness.gate import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", gate, sys.executable, "-m", "pytest", "-q", "--progress", "tests/test_seqlens.py", "-k",
               "differential and (cu_ or cal_)", f"--subject={tmp_path / 'slow.py'}", f"--report={tmp_path / 'report'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    said = lambda: (tmp_path / "out").read_text()
    deadline = time.monotonic() + 90
    while "FAILED" not in said() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 2, said()
    (row,) = json.loads((tmp_path / "report" / "verdicts.json").read_text())
    assert (row["transform"], row["verdict"]) == ("cu_seqlens", "DEFECT")
    assert "interrupted: 1 of 2 tests ran" in (tmp_path / "report" / "summary.md").read_text()
    assert "This report is partial" in "".join(Page((tmp_path / "report" / "index.html").read_text()).text)


@pytest.fixture
def chromium():
    """A real browser; where there is none the test is skipped aloud, or fails where nothing may be skipped."""
    needs(CHROMIUM, "chromium: apt-get install chromium")
    return CHROMIUM


def test_in_a_browser(chromium, folder, tmp_path):
    """It lays out without script, nothing is wider than the window, and details open by themselves for the first finding."""
    probe = ("<script>addEventListener('load', () => { const shown = [...document.querySelectorAll('svg.grid')].filter("
             "e => e.checkVisibility() && e.getBoundingClientRect().height > 20).length; "
             "const d = document.documentElement; document.title = [d.scrollWidth <= d.clientWidth, shown, "
             "document.querySelectorAll('details[open]').length, "
             "getComputedStyle(document.body).backgroundColor].join('|'); })</script>")
    page = folder / "probed.html"
    page.write_text((folder / "index.html").read_text().replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    windows = {"light": ["--window-size=1280,900"], "dark": ["--window-size=500,900", *dark]}  # the second is a narrow one
    titles = {}
    for name, extra in windows.items():
        done = subprocess.run([chromium, *flags, *extra, f"--user-data-dir={tmp_path / name}", "--dump-dom", page.as_uri()],
                              capture_output=True, text=True, timeout=60)
        titles[name] = re.search("<title>(.*?)</title>", done.stdout).group(1).split("|")
    assert titles == {"light": ["true", "4", "1", "rgb(251, 251, 250)"], "dark": ["true", "4", "1", "rgb(21, 24, 28)"]}
