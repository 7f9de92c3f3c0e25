"""Every command in the documents is run, and prints what the document shows; those marked `gpu` or `long` are parsed.

A block ```` ```python NAME ```` is a file that the reader writes; `console` shows commands (`$ ...`) with their output, of
which `...` leaves out lines; `sh` shows commands alone.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from ci import released, sanitizer
from harness import gate, mutate, replay
from harness.fleet import main as campaigns

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/tutorial.md", "docs/howto.md", "docs/reference.md", "docs/ci.md", "docs/explanation.md",
         "docs/mutation.md", "docs/campaigns.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^```(\S+)[ ]?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSERS = {"ci/gate": gate.arguments, "ci/replay": replay.arguments, "ci/sanitize": sanitizer.arguments,
           "ci/releases": released.arguments, "ci/mutate": mutate.arguments, "ci/campaign": campaigns.arguments,
           "ci/bench": bench.arguments}


def blocks(page: str):
    """(language, what follows it, text) of every fenced block."""
    return [match.groups() for match in FENCE.finditer((ROOT / page).read_text())]


def commands(text: str) -> list[list[str]]:
    """The commands of a `sh` block, without environment and remarks."""
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [[w for k, w in enumerate(line) if k or "=" not in w] for line in words if line]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder of the reader's, from which the commands look as they do at the root."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("ci", "failures", "tests"):
        (ROOT / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, folder: Path) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder),
                   "PYTEST_XDIST_AUTO_NUM_WORKERS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the pages show the CPU tier
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=170, input="c\n" * 9 * ("--pdb" in command))  # go on, each time
    return done.stdout.replace(f"{folder}/", "")


def shows(output: str, expected: list[str]) -> str:
    """The first expected line that does not follow in the output, or ''."""
    lines = iter(output.splitlines())
    for want in expected:
        if want != "..." and not any(want.rstrip() in line for line in lines):
            return want
    return ""


@pytest.mark.parametrize("page", [p for p in PAGES if "```console" in (ROOT / p).read_text()])
def test_what_the_page_shows_happens(page, elsewhere):
    for language, name, text in blocks(page):
        if language == "python":
            (elsewhere / name).write_text(text)
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if language == "console" else ():
            command, *expected = part.splitlines()
            output = run(command, elsewhere)
            assert expected and not shows(output, expected), f"{page}: $ {command}\n{output}"


def test_a_page_that_lies_is_noticed():
    assert shows("one\ntwo\n", ["one", "..."]) == "" and shows("one\ntwo\n", ["two", "one"]) == "one"


@pytest.mark.parametrize("page", PAGES)
def test_every_other_command_is_run_or_at_least_parsed(page, elsewhere, capsys, pytestconfig):
    for language, mark, text in blocks(page):
        for command in commands(text) if language == "sh" else ():
            if mark in ("gpu", "long") or "--help" in command:
                _parse(command, capsys, pytestconfig)
            else:
                assert not mark and "ERROR" not in run(shlex.join(command), elsewhere), command


def _parse(command: list[str], capsys, pytestconfig) -> None:
    """A command that takes a GPU or hours: its options exist, and so do the files of the checkout that it names."""
    program, *arguments = command
    if program == "timeout":
        program, *arguments = arguments[-3:]
    if program in PARSERS:
        try:
            PARSERS[program]().parse_args(arguments)
        except SystemExit as stopped:
            assert stopped.code == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"
        return
    assert program in ("ci/test", ".venv/bin/python", "python", "pytest"), command
    options = [a.split("=")[0] for a in arguments if a.startswith("--")]
    known = pytestconfig._parser.optparser.format_help()
    assert all(option in known for option in options), command
    assert all((ROOT / a).exists() for a in arguments if a.startswith(("tests/", "docs/"))), command


def test_unknown_options_in_a_page_are_noticed(capsys, pytestconfig):
    with pytest.raises(AssertionError, match="--profil weekly"):
        _parse(["ci/gate", "--profil", "weekly"], capsys, pytestconfig)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", (ROOT / page).read_text())
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        assert not target or target.startswith("http") or ((ROOT / page).parent / target).exists(), target


def test_every_option_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text()
    for parser in (gate.arguments(), replay.arguments(), campaigns.arguments()):
        options = {o for action in parser._actions for o in action.option_strings} - {"-h", "--help"}
        assert not [o for o in options if f"`{o}" not in text and f"`{o.lstrip('-')}" not in text]
