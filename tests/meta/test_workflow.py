"""The workflow files are what GitHub accepts, and call what is there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from measure import needs

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def lint(path: Path) -> subprocess.CompletedProcess:
    """check-jsonschema with the schema that it carries; skipped aloud without it, or failed where nothing may be skipped."""
    needs(importlib.util.find_spec("check_jsonschema"), "check-jsonschema: pip install check-jsonschema (the extra 'dev')")
    return subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)],
                          capture_output=True, text=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_github_accepts_it(path, tmp_path):
    done = lint(path)
    assert done.returncode == 0, done.stdout
    (tmp_path / "broken.yml").write_text(path.read_text().replace("runs-on:", "runs_on:"))
    assert lint(tmp_path / "broken.yml").returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_it_runs_commands_that_are_there_and_keeps_what_they_leave(path):
    text = path.read_text()
    called = set(re.findall(r"\bci/\w+\b(?!\.)", text))
    assert {"ci/gate", "ci/test", "ci/sanitize"} <= called
    assert all((ROOT / name).exists() for name in called)
    jobs = re.split(r"^  (\w+):\n", text.split("\njobs:\n")[1], flags=re.MULTILINE)[1:]
    for name, job in zip(jobs[::2], jobs[1::2]):
        assert all(kept in job for kept in ("report/summary.md", "upload-artifact", "failures/", "timeout-minutes")), name


@pytest.mark.parametrize(("may_not_skip", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_tool_is_red_where_nothing_may_be_skipped(may_not_skip, outcome, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_NO_SKIPS", may_not_skip)
    with pytest.raises(outcome, match="needs a tool"):
        needs(None, "a tool")
    needs("/usr/bin/tool", "a tool")
