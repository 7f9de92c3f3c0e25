"""The measurement of the suite's own speed: what it counts, what it adds up, and what it refuses."""

import json

import pytest

from harness import speed
from harness.client import UsageError
from harness.speed import Measured


def measured(form, cpu, family="seqlens", cases="drawn", counted=10):
    return Measured("cu_seqlens", family, form, cases, counted, seconds=2 * cpu, cpu=cpu, worker=[0.1, 0.3, 0.1], launches=20)


def test_rates_are_sums_over_a_family_and_ratios_are_by_processor_time():
    lines = speed.rows([measured("fast", 0.5), measured("fast", 1.5), measured("stock", 8.0), measured("stock", 2.0),
                        measured("fast", 1.0, "draft"), measured("stock", 2.0, "draft"),
                        measured("fast", 0.5, cases="three requests"), measured("stock", 1.0, cases="three requests")], "cpu")
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["seqlens"] == ("5", "10", "20", "200.0", "10.0", "30.0", "10.0", "150.0", "2.0", "5.0")
    assert by_name["draft"][-1] == "2.0" and by_name["seqlens, three requests"][1] == "20"
    assert by_name["**median over families**"][-1] == "3.5"
    assert len({len(line) for line in lines} | {len(speed.HEAD_CPU)}) == 1


def test_a_gpu_has_no_stock_form():
    lines = speed.rows([measured("fast", 0.5)], "cuda")
    assert {len(line) for line in lines} == {len(speed.HEAD)}


def test_both_forms_of_one_transform_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "speed.json"
    assert speed.main(["--device", "cpu", "--only", "cu_seqlens", "--examples", "2", "--json", str(file)]) == 0
    kept = [Measured(**m) for m in json.loads(file.read_text())]
    assert {(m.form, m.cases) for m in kept} == {(f, c) for f in ("fast", "stock") for c in ("drawn", "three requests")}
    assert all(m.counted == 2 and m.launches >= 4 and m.cpu > 0 and sum(m.worker) < m.seconds for m in kept)
    assert "| seqlens, three requests |" in capsys.readouterr().out


def test_a_campaign_with_a_finding_is_no_measurement(monkeypatch, capsys):
    found = measured("fast", 1.0)
    found.finding = "cu_seqlens[0] was not written"
    monkeypatch.setattr(speed, "run", lambda options: [found])
    assert speed.main([]) == 1
    assert "cu_seqlens has a finding, so its speed says little: cu_seqlens[0] was not written" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (["--only", "cu_seqlen"], "--only cu_seqlen: neither a family nor a transform"),
    (["--device", "tpu"], "--device tpu"),
])
def test_errors_of_use_are_one_line(words, says, capsys):
    assert speed.main(words) == 2
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1


def test_a_subject_is_found_from_wherever_it_is_typed(tmp_path, monkeypatch):
    asked = []

    def worker(options, contracts):
        asked.append(options.subject)
        raise UsageError("enough")

    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "Worker", worker)
    assert speed.main(["--device", "cpu", "--subject", "mine.py"]) == 2 and asked == [str(tmp_path / "mine.py")]


def test_the_page_keeps_one_table_for_each_device(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    marks = "".join(f"<!-- {d}: {w} of the table that --write makes -->\n" for d in ("cpu", "cuda") for w in ("start", "end"))
    page.write_text(f"before\n{marks}after\n")
    monkeypatch.setattr(speed, "PAGE", page)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    for text in ("first", "second"):
        speed._keep(text, "cpu")
    assert "second" in page.read_text() and "first" not in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
