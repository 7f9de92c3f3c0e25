"""`_get_topk_ragged` of SGLang's indexer, as a host function: the loop over chunks of rows, and the key ranges in front of it.

Scores are DeepGEMM's and the selections are compiled kernels: stand-ins hand out the given scores and select with PyTorch.
"""

import contextlib
import types

import torch

from . import _upstream

METADATA = next((f for f in ("srt/layers/attention/dsa/dsa_indexer_metadata.py", "srt/layers/attention/dsa_backend.py",
                             "srt/layers/attention/nsa_backend.py")
                 if _upstream.root() and "def topk_transform(" in _upstream.text(f)), "")
BACKEND = "srt/layers/attention/dsa/dsa_topk_backend.py"
HAS_LOOP = bool(_upstream.file_of("_get_topk_ragged"))
HAS_RAGGED = "TopkTransformMethod.RAGGED" in _upstream.text(METADATA) + _upstream.text(BACKEND)
# Up to 0.5.7 the loop computes the key ranges itself.
RANGES_INSIDE = HAS_LOOP and not _upstream.file_of("_cal_indexer_k_start_end")


def run(*, extends, lengths, seen, logits, index_topk, token_nums, max_rows, device, ranges=None, page_table=None,
        offsets=None, scores_of=None):
    """Upstream's selection for a batch of requests with `extends` query tokens and `lengths` keys.

    `seen`: keys per query token; `ranges`: their first keys, ends and requests, where the version is told; `page_table`
    with a row per request for the paged selection, `offsets` for the ragged one; `scores_of(ks, ke)` sees every call.
    """
    torch_here = _upstream.Torch(device)
    budget = max_rows * logits.shape[1] * 4
    chunks = max_rows < len(seen)

    def scores(q, kv, weights, ks, ke, clean_logits):
        if scores_of:
            scores_of(ks, ke)
        return logits[q[:, 0, 0].to(logits.device)]

    engine = _Engine(torch_here, scores, (chunks, budget))
    attention = types.SimpleNamespace(
        page_table_1=page_table, topk_indices_offset=offsets, token_to_batch_idx=ranges and ranges[2], real_page_table=None,
        cu_seqlens_q=torch.tensor([0, *torch.tensor(extends).cumsum(0)], dtype=torch.int32, device=device))
    metadata = engine.metadata(attention, "PAGED" if offsets is None else "RAGGED", lengths, seen, ranges)
    batch = types.SimpleNamespace(
        forward_mode=types.SimpleNamespace(is_extend_without_speculative=lambda: True), batch_size=len(extends),
        seq_lens_cpu=torch.tensor(lengths), extend_seq_lens_cpu=extends, token_to_kv_pool=engine.pool)
    indexer = types.SimpleNamespace(
        index_topk=index_topk, _MQA_LOGITS_BYTES_PER_ELEM=4, _with_real_sm_count=contextlib.nullcontext,
        _should_chunk_mqa_logits=lambda rows, keys, device: (chunks, engine.memory(budget)),
        _pad_heads_for_deep_gemm=lambda q, weights: (q, weights, None), _mask_init_and_local_tokens=lambda *_: None,
        _get_mqa_logits_budget_bytes=lambda index: budget)
    rows = torch.arange(token_nums).view(-1, 1, 1)
    given = {"forward_batch": batch, "layer_id": 0, "q_fp8": _Rows(rows), "weights": rows, "metadata": metadata}
    if "enable_dual_stream" in engine.loop.__code__.co_varnames:
        given["enable_dual_stream"] = False
    return engine.loop(indexer, **given)


class _Rows:
    """Queries that are only their row numbers, on "a device with an index"."""

    device = types.SimpleNamespace(index=0, type="cuda")

    def __init__(self, rows):
        self.rows, self.shape = rows, rows.shape

    def __getitem__(self, part):
        return self.rows[part]


class _Engine:
    """What the loop reads from its modules."""

    def __init__(self, torch_here, scores, chunking):
        always, never = (types.SimpleNamespace(get=lambda on=on: on) for on in (True, False))
        select = types.SimpleNamespace(fast_topk_transform_fused=_paged, fast_topk_transform_ragged_fused=_ragged,
                                       fast_topk_v2=None)
        self.pool = types.SimpleNamespace(
            page_size=64, index_page_size=64, get_index_k_scale_buffer=_keys_and_scales,
            get_index_k_continuous=lambda layer, n, pages: torch.empty((n, 128), dtype=torch.uint8),
            get_index_k_scale_continuous=lambda layer, n, pages: torch.empty((n, 4), dtype=torch.uint8))
        scope = {
            "torch": torch_here, "TYPE_CHECKING": False, "_is_hip": False, "_is_xpu": False, "_is_fp8_fnuz": False,
            "_use_aiter_preshuffle": False, "NSA_FUSE_TOPK": True, "get_token_to_kv_pool": lambda: self.pool,
            "deep_gemm": types.SimpleNamespace(fp8_mqa_logits=scores), "resolve_fp8_mqa_logits_fn": lambda: scores,
            "mqa_logits_should_chunk": lambda **_: chunking, "TopkTransformMethod": _Methods,
            "envs": types.SimpleNamespace(SGLANG_NSA_FUSE_TOPK=always, SGLANG_DSA_FUSE_TOPK=always,
                                          SGLANG_OPT_USE_TOPK_V2=never),
        }
        scope["compute_cu_seqlens"] = _upstream.function_of("compute_cu_seqlens", {"torch": torch})
        self.loop = _upstream.function_of("_get_topk_ragged", scope)
        self._transform = _upstream.function_of("topk_transform", scope, METADATA, {"sgl_kernel": select})
        select_by = _upstream.function_of("topk_transform", scope, BACKEND, {"sgl_kernel": select})
        self._backend = types.SimpleNamespace(is_sgl_kernel=lambda: True, should_use_topk_v2=lambda: False)
        if select_by:
            self._backend.topk_transform = types.MethodType(select_by, self._backend)

    @staticmethod
    def memory(budget: int) -> int:
        """What `_should_chunk_mqa_logits` tells: a budget, or before #25299 the free memory, half of which it is."""
        return budget if "logits_budget_bytes" in _upstream.source("_get_topk_ragged") else 2 * budget

    def metadata(self, attention, method, lengths, seen, ranges):
        counts = torch.tensor(lengths)
        metadata = types.SimpleNamespace(
            attn_metadata=attention, topk_transform_method=method, force_unfused_topk=False, topk_backend=self._backend,
            get_seqlens_expanded=lambda: seen, get_indexer_kvcache_range=lambda: ranges[:2],
            get_token_to_batch_idx=lambda: ranges[2], get_indexer_seq_len_cpu=lambda: counts,
            get_indexer_seq_len=lambda: counts, **{name: lambda: [None] * len(lengths) for name in _TABLES})
        metadata.topk_transform = types.MethodType(self._transform, metadata)
        return metadata


class _Methods:
    PAGED, RAGGED = "PAGED", "RAGGED"


_TABLES = ("get_page_table_64", "get_page_table_1", "get_logical_page_table")


def _keys_and_scales(layer, lengths, pages, total=None, longest=None):
    count = lengths if total is None else total
    return torch.empty((count, 128), dtype=torch.uint8), torch.empty((count, 4), dtype=torch.uint8)


# -- the compiled selections: the signature of sgl_kernel's functions, the arithmetic of their documentation -------------


def _best(score, lengths, topk, row_starts):
    """For every row, the positions of its best keys."""
    for row, length in enumerate(lengths.tolist()):
        first = 0 if row_starts is None else int(row_starts[row])
        keys = torch.arange(max(length, 0), device=score.device)
        if length > topk:
            keys = score[row, first : first + length].topk(topk).indices
        yield row, keys


def _paged(score, lengths, page_table_size_1, cu_seqlens_q, topk, row_starts=None):
    """One row of the table per request: as many as rows (decode), or found by the prefix sums of the rows."""
    ends = cu_seqlens_q[1:].tolist()
    result = torch.full((len(score), topk), -1, dtype=torch.int32, device=score.device)
    for row, keys in _best(score, lengths, topk, row_starts):
        request = row if len(ends) == len(score) else next(i for i, end in enumerate(ends) if row < end)
        result[row, : len(keys)] = page_table_size_1[request, keys]
    return result


def _ragged(score, lengths, topk_indices_offset, topk, row_starts=None):
    result = torch.full((len(score), topk), -1, dtype=torch.int32, device=score.device)
    for row, keys in _best(score, lengths, topk, row_starts):
        result[row, : len(keys)] = keys + topk_indices_offset[row]
    return result
