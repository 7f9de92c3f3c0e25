"""`ci/releases`: versions side by side, every finding judged, nothing left out silently."""

import json
import zipfile

import pytest

from ci import released

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


def test_a_finding_without_a_judgement_is_red(lane, capsys):
    status, page = lane(JUDGED, {"0.5.9": ("DEFECT", [finding(buffer="k_out write-outside")])})
    assert status == 1 and "not judged" in page
    assert "no judgement on get_k, memory, k_out write-outside" in capsys.readouterr().out


@pytest.mark.parametrize(("entry", "needs"), [
    (JUDGED.replace('issue = "#1"\n', ""), "issue"), (JUDGED.replace("upstream issue", "defect"), "contract"),
    (JUDGED.replace("upstream issue", "odd"), "kind"), (JUDGED.replace('says = "The page offset wraps."\n', ""), "says")])
def test_a_judgement_must_say_what_it_rests_on(entry, needs, tmp_path):
    (tmp_path / "judgements.toml").write_text(entry)
    with pytest.raises(ValueError, match=needs):
        released.load(tmp_path / "judgements.toml")


def test_the_judgements_that_are_here_are_complete():
    for entry in released.load(released.JUDGEMENTS):
        assert entry["findings"] and entry["says"]


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


def test_versions_with_the_same_kernels_are_run_once(lane):
    """The newest stands for all of them; its findings are theirs."""
    status, page = lane(JUDGED, {"0.5.9": ("PASS", []), "0.5.10": ("DEFECT", [finding()])}, apart=False)
    assert status == 0 and "| `get_k` | 1 | 1 |" in page


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
