"""`ci/releases`: versions side by side, every finding judged, nothing left out silently."""

import json
import zipfile
from types import SimpleNamespace

import pytest

from ci import released
from kernels.sglang import _upstream

JUDGED = """
[[judgement]]
transform = "get_k"
findings = ["memory: buf read-outside"]
kind = "upstream issue"
issue = "#1"
says = "The page offset wraps."
"""


@pytest.fixture
def lane(monkeypatch, tmp_path):
    """`lane(judgements, versions)`: reports as runs leave them, folders of versions, and `ci/releases` over them."""

    def run(judgements, versions, *options, apart=True):
        folders = []
        for version, (verdict, findings) in versions.items():
            folder = tmp_path / f"unpacked-{version}"
            (folder / f"sglang-{version}.dist-info").mkdir(parents=True)
            kernels = folder / "sglang" / "kernels" / "ops" / "cache.py"
            kernels.parent.mkdir(parents=True)
            kernels.write_text(f"@triton.jit\ndef _get_k_triton_kernel():\n    'as in {version if apart else 'all'}'\n")
            report = tmp_path / "report" / version / "index_cache"
            report.mkdir(parents=True)
            row = {"transform": "get_k", "verdict": verdict, "seconds": 1.0}
            (report / "verdicts.json").write_text(json.dumps([row, {**row, "transform": "get_s", "verdict": "NOT PROVIDED"}]))
            (report / "findings.json").write_text(json.dumps(findings))
            (report / "stamp").write_text(released.jobs({version: folder})[0].stamp)
            folders.append(str(folder))
        (tmp_path / "judgements.toml").write_text(judgements or "judgement = []")
        monkeypatch.setattr(released, "JUDGEMENTS", tmp_path / "judgements.toml")
        status = released.main([*folders, "--from-report", "--report", str(tmp_path / "report"),
                                "--page", str(tmp_path / "page.md"), *options])
        return status, (tmp_path / "page.md").read_text()

    return run


def finding(buffer="buf read-outside", case="GetK(long, long)", **changes):
    return {"transform": "get_k", "check": "memory", "buffer": buffer, "sentence": "load from nowhere", "case": case, **changes}


def test_versions_side_by_side(lane):
    status, page = lane(JUDGED, {"0.5.10": ("PASS", []), "0.5.9": ("DEFECT", [finding(), finding(case="GetK()")])})
    assert status == 0
    assert "| transform | 0.5.9 | 0.5.10 |" in page and "| `get_k` | 1 | · |" in page and "get_s" not in page
    assert "### 1. `get_k`: upstream issue (#1)" in page and "- versions 0.5.9; not in 0.5.10" in page
    assert "case `GetK()`" in page


REPAIRED = JUDGED + 'repair = "#2"\nbug = "The page offset wraps"\n'


def test_a_repaired_bug_stands_with_its_versions(lane):
    _, page = lane(REPAIRED, {"0.5.8": ("PASS", []), "0.5.9": ("DEFECT", [finding()]), "0.5.10": ("PASS", [])})
    assert "| The page offset wraps | #2 | `get_k` | 0.5.9 | 0.5.10 | `GetK(long, long)` |" in page
    assert "## 0.5.10, judged strictly" in page and "- nothing found: `get_k`" in page


def test_a_repair_does_not_count_while_the_newest_release_has_the_bug(lane):
    _, page = lane(REPAIRED, {"0.5.9": ("PASS", []), "0.5.10": ("DEFECT", [finding()])})
    assert "The page offset wraps |" not in page and "- upstream issue: `get_k` (1)" in page


def test_a_finding_without_a_judgement_is_red(lane, capsys):
    status, page = lane(JUDGED, {"0.5.9": ("DEFECT", [finding(buffer="k_out write-outside")])})
    assert status == 1 and "not judged" in page
    assert "no judgement on get_k, memory, k_out write-outside" in capsys.readouterr().out


@pytest.mark.parametrize(("entry", "needs"), [
    (JUDGED.replace('issue = "#1"\n', ""), "issue"), (JUDGED.replace("upstream issue", "defect"), "contract"),
    (JUDGED.replace("upstream issue", "odd"), "kind"), (JUDGED.replace('says = "The page offset wraps."\n', ""), "says"),
    (JUDGED + 'repair = "#2"', "bug")])
def test_a_judgement_must_say_what_it_rests_on(entry, needs, tmp_path):
    (tmp_path / "judgements.toml").write_text(entry)
    with pytest.raises(ValueError, match=needs):
        released.load(tmp_path / "judgements.toml")


def test_the_judgements_that_are_here_are_complete():
    for entry in released.load(released.JUDGEMENTS):
        assert entry["findings"] and entry["says"]


def test_an_unknown_family_is_an_error_of_use(tmp_path, capsys):
    assert released.main([str(tmp_path), "-k", "seqlens,index_cash"]) == 2
    assert "no family index_cash" in capsys.readouterr().out


def test_a_folder_without_a_version_is_an_error_of_use(tmp_path, capsys):
    assert released.main([str(tmp_path)]) == 2
    assert "holds no sglang-VERSION.dist-info" in capsys.readouterr().out


def test_a_version_without_a_verdict_is_an_error(lane, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(released, "_check", lambda folder, job, options: 3)
    wheel = tmp_path / "sglang-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang-1.0.dist-info/METADATA", "Version: 1.0")
        archive.writestr("sglang/native.so", "not needed")
        archive.writestr("sglang/kernels/ops/cache.py", "@triton.jit\ndef _get_k_triton_kernel():\n    pass\n")
    assert released.main([str(wheel), "--report", str(tmp_path)]) == 2
    assert "no verdict on index_cache of 1.0" in capsys.readouterr().out


def test_only_the_adapter_that_says_so_is_left_to_a_gpu():
    left = {f.stem for f in (released.ROOT / "kernels" / "sglang").glob("[a-z]*.py")} - {f.stem for f in released.ADAPTERS}
    assert left == {"metadata_copy"}


def test_versions_with_the_same_kernels_are_run_once(lane):
    """The newest stands for all of them; its findings are theirs."""
    status, page = lane(JUDGED, {"0.5.9": ("PASS", []), "0.5.10": ("DEFECT", [finding()])}, apart=False)
    assert status == 0 and "| `get_k` | 1 | 1 |" in page


@pytest.mark.parametrize("stamp", [None, "of another adapter"])
def test_a_report_that_is_not_there_or_by_another_adapter_is_an_error_of_use(stamp, lane, tmp_path, capsys):
    lane(JUDGED, {"0.5.9": ("PASS", [])})
    kept = tmp_path / "report" / "0.5.9" / "index_cache" / "stamp"
    kept.write_text(stamp) if stamp else kept.unlink()
    assert released.main([str(tmp_path / "unpacked-0.5.9"), "--from-report", "--report", str(tmp_path / "report")]) == 2
    assert "no report on index_cache of 0.5.9" in capsys.readouterr().out


def test_families_that_were_not_asked_for_stay_on_the_page(lane):
    status, page = lane(JUDGED, {"0.5.9": ("PASS", [])}, "-k", "seqlens")
    assert status == 0 and "| `get_k` | · |" in page


def test_a_changed_helper_is_another_kernel(tmp_path):
    adapter, package = tmp_path / "adapter.py", tmp_path / "sglang"
    adapter.write_text('kernel("_kernel")\n')
    (package / "kernels" / "ops").mkdir(parents=True)
    prints = []
    for helper in ("a", "b"):
        file = package / "kernels" / "ops" / "some.py"
        file.write_text(f"@triton.jit\ndef _help():\n    {helper}\n\n@triton.jit\ndef _kernel():\n    _help()\n")
        released.definitions.cache_clear()
        prints.append(released.fingerprint(adapter, package))
    assert len(set(prints)) == 2 and all(prints)


def test_a_host_function_counts_where_an_adapter_asks_for_it(tmp_path):
    """Its own text, and only that: the rest of its file belongs to the runtime."""
    adapter, package = tmp_path / "adapter.py", tmp_path / "sglang"
    adapter.write_text('function_of("pad_lengths", {})\n')
    file = package / "kernels" / "ops" / "some.py"
    file.parent.mkdir(parents=True)
    prints = []
    for body, other in (("a", "x"), ("a", "y"), ("b", "y")):
        file.write_text(f"import {other}\n\ndef pad_lengths():\n    {body}\n")
        released.definitions.cache_clear()
        prints.append(released.fingerprint(adapter, package))
    assert prints[0] == prints[1] != prints[2]


def test_a_host_function_runs_without_its_module(monkeypatch, tmp_path):
    """Decorators, annotations and imports of the runtime are stood in for; abstract methods are passed over."""
    (tmp_path / "host.py").write_text(
        "import runtime\n\nclass Base:\n    @abstractmethod\n    def twice(self): ...\n\n"
        "class Real(Base):\n    @runtime.compiled\n    def twice(self, x: runtime.Tensor):\n"
        "        from native import double\n        return double(x) + BIAS\n")
    monkeypatch.setattr(_upstream, "root", lambda: tmp_path)
    twice = _upstream.function_of("twice", {"BIAS": 1}, "host.py", {"native": SimpleNamespace(double=lambda x: 2 * x)})
    assert twice(None, 20) == 41
    assert _upstream.function_of("thrice", {}, "host.py") is None
