"""Kernels whose programs walk over several tiles hold to the oracles when they do, and a wrong step shows."""

import shutil
from pathlib import Path

import pytest

from harness import devices, registry
from harness.campaign import Campaign, Profile
from harness.client import ROOT, Worker, WorkerOptions
from strategies import domain

HERE = Path(__file__).parent
WALKING = (  # transforms whose programs walk over tiles
    "cp_round_robin_split_rows", "create_flashinfer_kv_indices", "create_flashmla_kv_indices", "decode_metadata",
    "draft_extend_metadata", "fused_metadata_copy", "fused_metadata_copy_multi", "gather_page_table",
    "generate_draft_decode_kv_indices", "get_k_and_s", "mla_block_table", "mla_multi_step_draft", "page_table_1_flattened",
    "real_page_table", "target_verify_metadata",
)
WRONG = (  # what one pass of the programs over rows that the cache can keep does not show
    ("metadata", "step = (parts - 1) * BLOCK_COLUMNS", "step = parts * BLOCK_COLUMNS", "decode_metadata"),
    ("metadata", 'tl.load(block, eviction_policy="evict_first")', 'tl.load(block + 1, eviction_policy="evict_first")',
     "decode_metadata"),
    ("metadata", "range(first, stop, BLOCK_PAGES)", "range(first, stop, stop - first)", "decode_metadata"),
    ("metadata_copy", "columns, tl.num_programs(1) * BLOCK_COLUMNS)", "columns, tl.num_programs(0) * BLOCK_COLUMNS)",
     "fused_metadata_copy"),
)


def verdict(worker: Worker, transform: str, folder: Path, examples: int = 25) -> str:
    contract = registry.contracts()[transform]
    profile = Profile("few programs", examples, derandomize=True, shrink=False)
    return Campaign(contract, worker, contract.rules(), domain.of(contract), profile, folder=folder).run().verdict


def worker_of(folder: Path, device: str = "cpu") -> Worker:
    environment = devices.environment(device, 0) | {"PLUMBLINE_KERNELS": str(folder)}
    options = WorkerOptions(str(HERE / "few_programs.py"), device, environment=environment)
    return Worker(options, [registry.contracts()[name] for name in WALKING])


@pytest.fixture(scope="module", params=["cpu", "cuda"] if devices.gpus() else ["cpu"])
def worker(request):
    found = worker_of(ROOT / "kernels", request.param)
    yield found
    found.close()


@pytest.mark.parametrize("transform", WALKING)
def test_programs_that_walk_over_tiles_miss_none(worker, transform, tmp_path):
    assert verdict(worker, transform, tmp_path) == "PASS"


@pytest.mark.parametrize(("family", "right", "wrong", "transform"), WRONG)
def test_what_only_many_tiles_show_is_found(family, right, wrong, transform, tmp_path):
    copy = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", copy)
    text = (copy / f"{family}.py").read_text()
    assert text.count(right) == 1
    (copy / f"{family}.py").write_text(text.replace(right, wrong))
    faulty = worker_of(copy)
    try:
        assert verdict(faulty, transform, tmp_path) == "DEFECT"
    finally:
        faulty.close()
