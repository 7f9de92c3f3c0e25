"""Our kernels with small tiles and so few programs that each walks over several tiles of a short row.

As they stand one pass of their programs covers tens of thousands of columns, which takes Triton's interpreter minutes. The
folder of the kernels is PLUMBLINE_KERNELS, so that a faulty copy can be looked at in the same way.
"""

import importlib
import os
import sys
import types

PACKAGE = "plumbline_few_programs"
FEW = {
    "index_cache": {"BLOCK_TOKENS": 8, "MOST_PROGRAMS": 4},
    "indexer": {"ROW_TILE": (2, 4), "MOST_SPLITS": 2},
    "kv_indices": {"BLOCK": 8, "DRAFT_BLOCK": 8, "MOST_SPLITS": 3},
    "metadata": {"BLOCK_COLUMNS": 8, "PROGRAMS": 4, "LEAST_SPLITS": 3},
    "metadata_copy": {"BLOCK_ITEMS": 8, "TILE": 16, "MOST_ROWS": 2, "MOST_PROGRAMS": 6},
    "mla_block_table": {"BLOCK_COLUMNS": 4, "MOST_SPLITS": 3},
    "page_table": {"BLOCK_COLUMNS": 8, "MOST_SPLITS": 3},
}
TRANSFORMS = {
    "cp_round_robin_split_rows": "indexer",
    "create_flashinfer_kv_indices": "kv_indices",
    "create_flashmla_kv_indices": "kv_indices",
    "decode_metadata": "metadata",
    "draft_extend_metadata": "metadata",
    "fused_metadata_copy": "metadata_copy",
    "fused_metadata_copy_multi": "metadata_copy",
    "gather_page_table": "page_table",
    "generate_draft_decode_kv_indices": "kv_indices",
    "get_k_and_s": "index_cache",
    "mla_block_table": "mla_block_table",
    "mla_multi_step_draft": "mla_block_table",
    "page_table_1_flattened": "page_table",
    "real_page_table": "page_table",
    "target_verify_metadata": "metadata",
}


def _module(family: str):
    module = importlib.import_module(f"{PACKAGE}.{family}")
    for name, value in FEW[family].items():
        getattr(module, name)  # a constant that is gone is an error
        setattr(module, name, value)
    return module


if folder := os.environ.get("PLUMBLINE_KERNELS"):
    sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    sys.modules[PACKAGE].__path__ = [folder]
    globals().update({name: getattr(_module(family), name) for name, family in TRANSFORMS.items()})
