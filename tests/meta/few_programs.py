"""Our kernels with small tiles, so few programs that each walks over several tiles of a short row, and a small cache.

As they stand one pass of their programs covers tens of thousands of columns, which takes Triton's interpreter minutes. The
folder of the kernels is PLUMBLINE_KERNELS, so that a faulty copy can be looked at in the same way.
"""

import importlib
import inspect
import os
import sys
import types

PACKAGE = "plumbline_few_programs"
FEW = {
    "index_cache": {"BLOCK_TOKENS": 8, "MOST_PROGRAMS": 4},
    "indexer": {"ROW_TILE": (2, 4), "MOST_SPLITS": 2},
    "kv_indices": {"BLOCK": 8, "DRAFT_BLOCK": 8, "MOST_SPLITS": 3},
    "metadata": {"BLOCK_COLUMNS": 8, "BLOCK_PAGES": 2, "PROGRAMS": 4, "LEAST_SPLITS": 3, "KEPT_CELLS": 64},
    "metadata_copy": {"BLOCK_ITEMS": 8, "TILE": 16, "MOST_ROWS": 2, "MOST_PROGRAMS": 6},
    "mla_block_table": {"BLOCK_COLUMNS": 4, "MOST_SPLITS": 3},
    "page_table": {"BLOCK_COLUMNS": 8, "MOST_SPLITS": 3},
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
    for family in FEW:
        globals().update({n: f for n, f in vars(_module(family)).items() if inspect.isfunction(f) and n[0] != "_"})
