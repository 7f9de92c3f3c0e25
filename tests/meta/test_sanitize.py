"""`ci/sanitize` is red where it could not see: without the tool, without a GPU, with a blind tool, without cases."""

import xml.etree.ElementTree as xml

import pytest

from ci import sanitizer as sanitize
from harness import devices, registry
from harness.client import Worker, WorkerOptions


class Pretended:
    """Stands for a worker under a tool: an ordinary worker, and a tool that reports what `says` gives for a function."""

    says = {}

    def __init__(self, command, tool, subject, options):
        self.worker = Worker(WorkerOptions(subject), list(registry.contracts().values()))
        self._stock, self._news = self.worker.run, []
        self.worker.run = self._run

    def _run(self, header, blobs):
        self._news += self.says.get(header["transform"], [])
        return self._stock(header, blobs)

    def news(self):
        news, self._news = self._news, []
        return news

    def close(self):
        self.worker.close()
        return self.news()


SEEN = {"read_before_write": ["Uninitialized __global__ memory read of size 4 bytes"]}


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A machine with a GPU and a tool, whose reports the test chooses; faults that run on a CPU."""
    faults = tmp_path / "faults.py"
    faults.write_text("import torch\n\n\ndef honest(*, seqlens, cu_seqlens):\n    cu_seqlens[0] = 0\n"
                      "    cu_seqlens[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)\n\n\nread_before_write = honest\n")
    monkeypatch.setattr(sanitize, "FAULTS", faults)
    monkeypatch.setattr(sanitize, "find_tool", lambda: "tool")
    monkeypatch.setattr(devices, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(sanitize, "Sanitized", Pretended)
    monkeypatch.setattr(Pretended, "says", SEEN)

    def lane(*arguments):
        return sanitize.main(["--tool", "initcheck", "--report", str(tmp_path), *arguments])

    return lane


def test_without_the_tool(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not on the PATH" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda: "tool")
    monkeypatch.setattr(devices, "gpus", lambda: ())
    assert sanitize.main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().out


def test_a_tool_that_misses_a_planted_fault(pretended, monkeypatch, capsys):
    monkeypatch.setattr(Pretended, "says", {})
    assert pretended("--only", "cu_seqlens") == 2
    assert "does not see the planted fault read_before_write" in capsys.readouterr().out


def test_a_tool_that_complains_about_an_honest_call(pretended, monkeypatch, capsys):
    monkeypatch.setattr(Pretended, "says", {**SEEN, "honest": ["Invalid read"]})
    assert pretended("--only", "cu_seqlens") == 2
    assert "in an honest call" in capsys.readouterr().out


def test_no_case_to_run(pretended, capsys):
    assert pretended("--only", "no such case") == 2
    assert "nothing was run" in capsys.readouterr().out


def test_out_of_time(pretended, capsys):
    assert pretended("--only", "cu_seqlens", "--limit", "0") == 2
    assert "took more than 0 s" in capsys.readouterr().out


def test_a_tool_for_shared_memory_gets_no_far_table(pretended, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "NOT_FAR", ("initcheck",))
    assert pretended("--only", "decode 2^31") == 2
    said = capsys.readouterr().out
    assert "left out: decode 2^31 cells away: initcheck takes minutes" in said and "none of the 0 cases" in said
    assert sanitize.size(sanitize.EXAMPLES["decode 128k"]) < sanitize.FAR < sanitize.size(
        sanitize.EXAMPLES["decode 2^31 cells away"])


def test_what_does_not_fit_into_the_gpu_is_left_out_and_named(pretended, monkeypatch, capsys):
    monkeypatch.setattr(devices, "memory", lambda gpu: 24 << 30)
    assert pretended("--only", "2^31 cells") == 2
    assert "left out: decode 2^31 cells away: takes 30 GiB, and this GPU has 24" in capsys.readouterr().out
    assert sanitize.left_out("memcheck", 24 << 30, 80 << 30) == sanitize.left_out("memcheck", 24 << 30, 0) == ""


def test_clean_cases_and_a_finding_that_names_its_case(pretended, monkeypatch, tmp_path, capsys):
    assert pretended("--only", "seqlens") == 0
    monkeypatch.setattr(Pretended, "says", {**SEEN, "nsa_cache_seqlens": ["Uninitialized __global__ memory read of size 4"]})
    assert pretended("--only", "seqlens") == 1
    assert "Uninitialized" in capsys.readouterr().out
    cases = xml.parse(tmp_path / "sanitize.xml").getroot().findall("testcase")
    failed = [c.get("name") for c in cases if c.find("failure") is not None]
    assert failed and all("nsa_cache_seqlens" in name for name in failed) and len(cases) > len(failed)
