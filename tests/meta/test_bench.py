"""ci/bench end to end in Triton's interpreter, where its times mean nothing; and its arithmetic on made-up times."""

import importlib.util
import json
import subprocess
import sys

import pytest

from bench import __main__ as bench
from bench import render, rows, sizes
from harness import registry
from harness.client import ROOT
from harness.contract import Kind
from measure import needs

SMALL = sizes.Size(8, 8 << 10)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_measures_every_transform_of_a_family_for_both_subjects(tmp_path):
    out = tmp_path / "bench.json"
    done = run("--device", "cpu", "--quick", "--family", "seqlens", "--each", "0.001", "--seconds", "180", "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    names = {n for n, c in registry.contracts().items() if c.family == "seqlens" and c.kind is not Kind.HOST}
    assert {(r["subject"], r["transform"]) for r in results["rows"]} == {(s, n) for s in ("kernels", "eager") for n in names}
    for row in results["rows"]:
        assert "host" in row, row
        assert row["host"]["median"] > 0 and row["host"]["low"] <= row["host"]["high"], row
        if row["subject"] == "kernels":
            assert row["plan_host"]["samples"] >= 1
    (sums,) = (r for r in results["rows"] if r["subject"] == "kernels" and r["transform"] == "cu_seqlens")
    assert (sums["read_bytes"], sums["written_bytes"]) == (2 * 4, 3 * 4)


def test_a_row_that_fails_and_one_that_ends_its_process_are_told_and_the_rest_is_measured(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def cu_seqlens(*, seqlens, cu_seqlens):\n    raise RuntimeError('no luck')\n"
        "def nsa_cache_seqlens(**_):\n    os._exit(3)\n"
        "def seqlens_expand(**_):\n    pass\n")
    lines = tmp_path / "lines.jsonl"
    lines.touch()
    request = {"subject": str(tmp_path / "mine.py"), "name": "mine", "device": "cpu", "paths": [str(ROOT)], "out": str(lines),
               "seconds": 60, "each": 0.001}
    wanted = [[n, 2, 64] for n in ("cu_seqlens", "nsa_cache_seqlens", "seqlens_expand")]
    bench.measure(request, wanted, tmp_path / "request.json")
    found = {r["transform"]: r for r in bench.collect(lines)["rows"]}
    assert "RuntimeError: no luck (mine.py:3)" in found["cu_seqlens"]["failed"]
    assert "the process ended (exit 3" in found["nsa_cache_seqlens"]["failed"]
    assert found["seqlens_expand"]["host"]["samples"] >= 1


def test_every_transform_has_sizes_and_the_headlines_come_first():
    options = bench.parse([])
    chosen = bench.wanted(options, "cuda")
    assert {n for n, _ in chosen} == {n for n, c in registry.contracts().items() if c.kind is not Kind.HOST}
    assert chosen[0] == ("decode_metadata", SMALL)
    grown = {(s.batch, s.context) for n, s in chosen if n == "decode_metadata"}
    assert grown >= {(64, 128 << 10), (256, 8 << 10), (8, 1 << 20)}
    assert sum(n == "cu_seqlens" for n, _ in chosen) == len(sizes.BATCHES)


@pytest.mark.parametrize(("batch", "context", "lengths"), [(3, 8, (4, 6, 8)), (1, 8, (8,)), (2, 7, (4, 7))])
def test_ragged_lengths_reach_from_half_the_context_to_all_of_it(batch, context, lengths):
    assert tuple(r.seq_len for r in sizes.ragged_decode(sizes.Size(batch, context)).batch) == lengths


@pytest.mark.parametrize("arguments, told", [
    (["--family", "nothing"], "--family nothing: known are draft,"),
    (["--upstream", "0.5.23"], "NAME=DIR"),
    (["--colour"], "unrecognized arguments: --colour"),
])
def test_an_error_of_use_is_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.parse(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def results() -> dict:
    """Three subjects, one size: ours at 8 µs and 2 µs, eager slower on the host and faster on the GPU."""
    time = lambda us: {"median": us, "low": us - 1, "high": us + 1, "samples": 9}
    at = {"batch": SMALL.batch, "context": SMALL.context}

    def row(subject, transform="decode_metadata", **times):
        return {"subject": subject, "transform": transform, **at, **{k: time(v) for k, v in times.items()}}

    ours = {**row("kernels", host=40, plan_host=8, replay_host=4, gpu=2), "read_bytes": 1000, "written_bytes": 3000,
            "gpu_how": "graph of 20 calls"}
    return {"when": "2026-01-01", "machine": {"kernels": {"device": "a GPU"}, "eager": {}, "0.5.10.post1": {}, "0.5.23": {}},
            "floors": [{"floor": "a copy of 1 GiB", "bytes_per_us": 4000}, {"floor": "an empty launch", "gpu": time(1)}],
            "rows": [ours, {**ours, "transform": "ragged_decode", "gpu": time(1.5)}, row("eager", host=100, gpu=1),
                     row("0.5.10.post1", "precompute", host=72, gpu=9), row("0.5.10.post1", "multi_copy", host=8, gpu=4),
                     row("0.5.23", "three_decodes", host=50, gpu=6)]}


def test_the_headlines_are_ratios_of_one_run():
    told = "\n".join(render.headlines(render.Results(results())))
    assert "3 draft backends, batch 8, context 8k: plan 8.0 µs host, 2.0 µs GPU; checked call 40.0 µs host" in told
    assert "floor 1.0 µs GPU (an empty launch 1.0 µs): 2.00 times the floor" in told
    assert ("lengths from half of it to all of it: 1.5 µs GPU, 1.50 times the floor for these, 0.38 of 0.5.10.post1's copy\n"
            in told)
    assert "0.5.10.post1: precompute 72.0 µs and fused copy 8.0 µs host, 4.0 µs GPU: plan 0.10 of both" in told
    assert "3 fused decodes 50.0 µs host, 6.0 µs GPU: plan 0.16 and checked call 0.80 of it on the host, 0.33 on" in told


def test_the_page_says_where_eager_is_faster():
    page = render.page(render.Results(results()), "images/gpu.png", "images/host.png")
    assert "| `decode_metadata` | batch 8, context 8k | 40.0 (39.0-41.0) | 8.0 (7.0-9.0) | 4.0 (3.0-5.0) |" in page
    assert "slower than eager (GPU 2.00x)" in page


def test_the_plots_are_drawn_beside_the_page(tmp_path):
    needs(importlib.util.find_spec("matplotlib"), "matplotlib: pip install matplotlib (the extra 'bench')")
    measured = tmp_path / "bench.json"
    measured.write_text(json.dumps(results()))
    assert bench.main(["--render", str(measured), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "performance.md").read_text().count("](images/") == 2
    for name in ("performance-gpu-time.png", "performance-host-time.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")


def test_cells_that_a_call_leaves_alone_are_not_counted_as_written():
    case = sizes.SIZES["cu_seqlens"].case(3, 64)
    arguments = rows.materialise(case, "cpu")
    found = rows.moved(case, arguments, lambda: arguments["cu_seqlens"][:2].fill_(5))
    assert found == {"read_bytes": 12, "written_bytes": 8}
