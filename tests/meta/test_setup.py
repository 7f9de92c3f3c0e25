"""The first command on a fresh machine: the environment is made once, and what goes wrong with that is no finding."""

import importlib.util
import subprocess
import sys
import threading
import time

import pytest

from harness.client import ROOT


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """ci/setup.py on a machine with nothing; `setup.installed` is what was run, and takes a moment."""
    spec = importlib.util.spec_from_file_location("ci_setup", ROOT / "ci" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.installed = []

    def install(command, check):
        time.sleep(0.05)
        module.installed.append(command)
        (tmp_path / ".venv").mkdir(exist_ok=True)

    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "suits", lambda python, extras=True: python != sys.executable and len(module.installed) >= 3)
    monkeypatch.setattr(module.subprocess, "run", install)
    return module


def test_two_first_commands_make_one_environment(setup):
    found: list[str] = []
    both = [threading.Thread(target=lambda: found.append(setup.python())) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert found == [str(setup.VENV / "bin" / "python")] * 2
    assert len(setup.installed) == 3 and "--clear" in setup.installed[0]


def test_an_environment_that_cannot_be_made_is_exit_2_in_one_line(setup, monkeypatch, capsys):
    def fails(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(setup.subprocess, "run", fails)
    monkeypatch.setattr(sys, "argv", ["ci/gate"])
    with pytest.raises(SystemExit) as ended:
        setup.run("-m", "harness.gate")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("ci/gate: .venv could not be set up: status 1 of `")


def test_the_callers_paths_are_made_absolute_and_nothing_else(setup, tmp_path, monkeypatch):
    """ci/test runs pytest in the root, and may be called from any folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("kernels", "lib", "venv"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "venv" / "python").symlink_to(sys.executable)
    (tmp_path / "linked.py").symlink_to(tmp_path / "mine.py")
    for given, wanted in (
        (["--subject", "kernels"], ["--subject", "kernels"]),
        (["--subject=kernels", "-k", "lib"], ["--subject=kernels", "-k", "lib"]),
        (["--subject", "mine.py"], ["--subject", f"{tmp_path}/mine.py"]),
        (["--subject=mine.py"], [f"--subject={tmp_path}/mine.py"]),
        (["mine.py::test_it", "tests/test_draft.py"], [f"{tmp_path}/mine.py::test_it", "tests/test_draft.py"]),
        (["linked.py"], [f"{tmp_path}/mine.py"]),
        (["--subject-path", "lib", "--inline"], ["--subject-path", f"{tmp_path}/lib", "--inline"]),
        (["--subject-python=venv/python"], [f"--subject-python={tmp_path}/venv/python"]),
        (["--subject-python", "python3", "--report", "new"], ["--subject-python", "python3", "--report", f"{tmp_path}/new"]),
    ):
        assert setup.with_paths(given) == wanted
