"""All exhibits as one subject: `B001`, `B001_clean`, and so on."""

import importlib

from exhibit import EXHIBITS

for family in ("seqlens", "metadata", "metadata_copy", "mla", "kv_indices", "draft", "indexer", "index_cache", "mqa_logits",
               "page_table", "schedule", "topk", "streams"):
    importlib.import_module(family)
globals().update(EXHIBITS)
