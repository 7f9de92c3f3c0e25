"""One case of every transform for a batch of requests and a context length, as a serving engine would have it."""

from collections.abc import Callable
from dataclasses import dataclass

from harness.contract import Case
from oracles import (draft, head_gates, index_cache, indexer, kv_indices, metadata, metadata_copy, mla_block_table, mqa_logits,
                     page_table, schedule, seqlens, topk_transform)

PAGE, TOPK, DRAFTS, SMS, BACKENDS = 64, 2048, 4, 132, 3
BATCHES = (1, 8, 32, 64, 256)
CONTEXTS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)
MOST_CELLS = 18_000_000  # of inputs that are made on the host: batch 8 with context 1M has 8.4 million of a table


@dataclass(frozen=True)
class Size:
    """`batch` requests of `context` keys each."""

    batch: int
    context: int

    def __str__(self) -> str:
        unit = f"{self.context >> 20}M" if self.context >= 1 << 20 else f"{self.context >> 10}k"
        return f"batch {self.batch}, context {unit if self.context >= 1024 else self.context}"


def sweep(quick: bool = False) -> list[Size]:
    """The sizes of the table: the two that headlines are about first, then every batch and every context."""
    first = [Size(8, 8 << 10), Size(64, 128 << 10)]
    if quick:
        return first
    rest = [Size(b, 8 << 10) for b in BATCHES] + [Size(8, c) for c in CONTEXTS]
    return list(dict.fromkeys(first + rest))


@dataclass(frozen=True)
class Sized:
    """How a transform's case grows: `cells(size)` bounds the input cells that the host makes, so that what is too much is
    left out before it is made. `by_context`: whether anything but host numbers depends on the context."""

    case: Callable[[int, int], Case]
    cells: Callable[[int, int], int] = lambda b, n: b * n
    by_context: bool = True


def _each(make):
    """One request per slot."""
    return lambda b, n: tuple(make(i, n) for i in range(b))


def _rows(make):
    return Sized(make, lambda b, n: b, by_context=False)


_draft_reqs = _each(lambda i, n: draft.Req(i, n))
_extents = _each(lambda i, n: draft.Extent(i, n - DRAFTS, DRAFTS))
_kv_reqs = _each(lambda i, n: kv_indices.Req(i, n))
_mla_reqs = _each(lambda i, n: mla_block_table.Req(i, n, DRAFTS))
_scores = lambda b, n: 4 * b * n
_cache = lambda b, n: 132 * b * n

SIZES: dict[str, Sized] = {
    # draft
    "assign_req_to_token_pool": Sized(lambda b, n: draft.AssignReqToTokenPool(requests=_extents(b, n), slots=b)),
    "assign_extend_cache_locs": Sized(lambda b, n: draft.AssignExtendCacheLocs(requests=_extents(b, n), slots=b)),
    "assign_extend_cache_locs_uniform": Sized(lambda b, n: draft.AssignExtendCacheLocsUniform(
        requests=_draft_reqs(b, n), slots=b, draft_tokens=DRAFTS, positions=True)),
    "assign_draft_cache_locs": Sized(lambda b, n: draft.AssignDraftCacheLocs(
        requests=_draft_reqs(b, n), slots=b, topk=4, num_steps=DRAFTS, page_size=PAGE)),
    "assign_draft_cache_locs_contiguous": Sized(lambda b, n: draft.AssignDraftCacheLocsContiguous(
        requests=_draft_reqs(b, n), slots=b, topk=1, num_steps=DRAFTS, with_positions=True)),
    "create_extend_after_decode_spec_info": _rows(lambda b, n: draft.CreateExtendAfterDecode(
        (draft.Accepted(n, DRAFTS),), repeat=b, num_steps=DRAFTS)),
    # head_gates
    "project_and_scale_head_gates": _rows(lambda b, n: head_gates.ProjectAndScale(b, hidden=7168)),
    "logits_head_gate": _rows(lambda b, n: head_gates.LogitsHeadGate(b, hidden=7168)),
    "apply_q_scale_and_softmax_scale": _rows(lambda b, n: head_gates.ApplyScales(b)),
    "fused_logits_head_gate": _rows(lambda b, n: head_gates.FusedLogitsHeadGate(b)),
    "update_rope_guarded": _rows(lambda b, n: head_gates.UpdateRope(b, heads=64, rope_dim=64, head_dim=192, source="apart")),
    # index_cache
    "get_k": Sized(lambda b, n: index_cache.GetK(page_size=PAGE, pages=b * n // PAGE, seq_len=b * n), _cache),
    "get_s": Sized(lambda b, n: index_cache.GetS(page_size=PAGE, pages=b * n // PAGE, seq_len=b * n), _cache),
    "get_k_and_s": Sized(lambda b, n: index_cache.GetKAndS(
        page_size=PAGE, pages=b * n // PAGE, requests=(index_cache.Req(n),), repeat=b), _cache),
    "set_k_and_s": _rows(lambda b, n: index_cache.SetKAndS(
        page_size=PAGE, pages=b // PAGE + 1, tokens=tuple(index_cache.Token(i) for i in range(b)))),
    "fused_store_index_cache": _rows(lambda b, n: index_cache.FusedStoreIndexCache(
        page_size=PAGE, pages=b // PAGE + 1, tokens=tuple(index_cache.Token(i) for i in range(b)))),
    "quantize_k_cache": _rows(lambda b, n: index_cache.QuantizeKCache((index_cache.Latent(),), repeat=b)),
    "dequantize_k_cache": _rows(lambda b, n: index_cache.DequantizeKCache(b)),
    "dequantize_k_cache_paged": _rows(lambda b, n: index_cache.DequantizeKCachePaged(
        tokens=tuple(index_cache.Slot(i) for i in range(b)), slots=b)),
    # indexer
    "indexer_k_start_end": _rows(lambda b, n: indexer.IndexerKStartEnd((indexer.Req(DRAFTS, n),), times=b)),
    "cp_round_robin_split_q_seqs": _rows(lambda b, n: indexer.CpRoundRobinSplitQSeqs((1023,), times=b, cp_size=8, cp_rank=3)),
    "cp_round_robin_split": _rows(lambda b, n: indexer.CpRoundRobinSplit(1024 * b, cp_size=8, cp_rank=3)),
    "cp_round_robin_split_rows": Sized(lambda b, n: indexer.CpRoundRobinSplitRows(128 * b, cp_size=8, cp_rank=3, columns=576),
                                       lambda b, n: 128 * 576 * b, by_context=False),
    "cp_zigzag_split": _rows(lambda b, n: indexer.CpZigzagSplit((indexer.Req(1024, n),), times=b, cp_size=8, cp_rank=3)),
    # kv_indices
    "create_flashinfer_kv_indices": Sized(lambda b, n: kv_indices.FlashinferKvIndices(_kv_reqs(b, n), slots=b)),
    "create_flashmla_kv_indices": Sized(lambda b, n: kv_indices.FlashmlaKvIndices(_kv_reqs(b, n), slots=b, page_size=PAGE)),
    "generate_draft_decode_kv_indices": Sized(lambda b, n: kv_indices.DraftDecode(
        _kv_reqs(b, n), slots=b, topk=1, num_steps=DRAFTS)),
    # metadata: three draft backends
    "decode_metadata": Sized(lambda b, n: metadata.Decode(
        tuple(metadata.Req(i, n) for i in range(b)), page_size=PAGE, backends=BACKENDS, slots=b)),
    "target_verify_metadata": Sized(lambda b, n: metadata.TargetVerify(
        tuple(metadata.Req(i, n - DRAFTS) for i in range(b)), page_size=PAGE, backends=BACKENDS, slots=b, draft_tokens=DRAFTS,
        ctx_lens=True)),
    "draft_extend_metadata": Sized(lambda b, n: metadata.DraftExtend(
        tuple(metadata.ExtendReq(i, n, DRAFTS) for i in range(b)), page_size=PAGE, backends=BACKENDS, slots=b)),
    "fused_metadata_copy": Sized(lambda b, n: metadata_copy.MetadataCopy((1,), repeat=b, width=n, page_size=PAGE)),
    "fused_metadata_copy_multi": Sized(lambda b, n: metadata_copy.MetadataCopyMulti(
        (1,), repeat=b, width=n, page_size=PAGE, backends=(metadata_copy.Backend(),) * BACKENDS)),
    # mla_block_table
    "mla_metadata": _rows(lambda b, n: mla_block_table.MlaMetadata((mla_block_table.Req(0, n),), repeat=b)),
    "mla_block_table": Sized(lambda b, n: mla_block_table.MlaBlockTable(_mla_reqs(b, n), slots=b, padded=True)),
    "mla_multi_step_draft": Sized(lambda b, n: mla_block_table.MlaMultiStepDraft(
        _mla_reqs(b, n), slots=b, steps=DRAFTS, padded=True)),
    "pad_draft_extend_query": _rows(lambda b, n: mla_block_table.PadDraftExtendQuery(
        (mla_block_table.Tokens(DRAFTS),) * b, heads=16, head_dim=576)),
    "unpad_draft_extend_output": _rows(lambda b, n: mla_block_table.UnpadDraftExtendOutput(
        (mla_block_table.Tokens(DRAFTS),) * b, heads=16, head_dim=512)),
    "pad_sequence_with_mask": _rows(lambda b, n: mla_block_table.PadSequenceWithMask(
        (mla_block_table.Tokens(DRAFTS),) * b, heads=16, head_dim=128)),
    # mqa_logits: one query token per request against the keys of all
    "mqa_logits": Sized(lambda b, n: mqa_logits.MqaLogits((mqa_logits.Req(1, n),) * b, heads=64, head_dim=128),
                        lambda b, n: 128 * b * n + b * b * n),
    "topk_ragged_chunked": Sized(lambda b, n: mqa_logits.TopkRaggedChunked(
        (mqa_logits.Req(1, n),) * b, index_topk=TOPK, max_rows=8), lambda b, n: 4 * b * b * n),
    "topk_paged_chunked": Sized(lambda b, n: mqa_logits.TopkPagedChunked(
        (mqa_logits.Req(1, n),) * b, index_topk=TOPK, max_rows=8), lambda b, n: 4 * b * b * n),
    # page_table
    "gather_page_table": Sized(lambda b, n: page_table.GatherPageTable(
        tuple(page_table.Req(i, n) for i in range(b)), slots=b, draft_tokens=1)),
    "real_page_table": Sized(lambda b, n: page_table.RealPageTable(("aligned",) * b, columns=n, page_size=PAGE)),
    "page_table_1_flattened": Sized(lambda b, n: page_table.PageTable1Flattened((n,), times=b)),
    "topk_indices_offset": _rows(lambda b, n: page_table.TopkIndicesOffset((page_table.ExtendReq(1024, n),), times=b)),
    "cu_seqlens_q": _rows(lambda b, n: page_table.CuSeqlensQ("extend", (DRAFTS,), times=b)),
    # schedule
    "paged_mqa_schedule": _rows(lambda b, n: schedule.PagedMqaSchedule((n,), repeat=b, num_sms=SMS)),
    "paged_mqa_walk": _rows(lambda b, n: schedule.PagedMqaWalk((n,) * b, num_sms=SMS)),
    "flashmla_schedule": _rows(lambda b, n: schedule.FlashmlaSchedule((n,), repeat=b, num_parts=SMS)),
    # seqlens
    "seqlens_expand": _rows(lambda b, n: seqlens.SeqlensExpand((seqlens.Req(1024, n),), repeat=b)),
    "cu_seqlens": _rows(lambda b, n: seqlens.CuSeqlens((n,), repeat=b)),
    "nsa_cache_seqlens": _rows(lambda b, n: seqlens.NsaCacheSeqlens((n,), repeat=b)),
    # topk_transform
    "transform_index_page_table_decode": Sized(lambda b, n: topk_transform.TransformDecode(
        (topk_transform.IndexRow(n),) * b, topk=TOPK, width=n), _scores),
    "transform_index_page_table_prefill": Sized(lambda b, n: topk_transform.TransformPrefill(
        (topk_transform.IndexRequest(DRAFTS, n),) * b, topk=TOPK, width=n, sums=True), _scores),
    "transform_index_ragged": Sized(lambda b, n: topk_transform.TransformRagged(
        tuple(topk_transform.RaggedRow(n, i * n) for i in range(b)), topk=TOPK), _scores),
    "pad_topk_indices": Sized(lambda b, n: topk_transform.PadTopkIndices(
        (topk_transform.IndexRow(n),) * b, topk=TOPK, padding=8), _scores),
    "fast_topk": Sized(lambda b, n: topk_transform.FastTopk((topk_transform.Row(n),) * b, topk=TOPK, width=n), _scores),
    "fast_topk_transform_paged": Sized(lambda b, n: topk_transform.FastTopkPaged(
        (topk_transform.Request((topk_transform.Row(n),)),) * b, topk=TOPK, width=n, decode=True), _scores),
    "fast_topk_transform_ragged": Sized(lambda b, n: topk_transform.FastTopkRagged(
        tuple(topk_transform.Row(n, offset=i * n) for i in range(b)), topk=TOPK, width=n), _scores),
    "topk_transform_v2": Sized(lambda b, n: topk_transform.TopkTransformV2(
        (topk_transform.Row(n),) * b, topk=TOPK, width=n), _scores),
}


def ragged_decode(size: Size) -> Case:
    """`decode_metadata` for lengths spread evenly from half the context to all of it, as requests of different ages have."""
    steps, half = max(size.batch - 1, 1), size.context // 2
    return metadata.Decode(
        tuple(metadata.Req(i, size.context - half * (size.batch - 1 - i) // steps) for i in range(size.batch)),
        page_size=PAGE, backends=BACKENDS, slots=size.batch)


def case(name: str, size: Size) -> Case | None:
    """The transform's case of this size; None where its inputs are more than a benchmark should make."""
    sized = SIZES[name]
    return sized.case(size.batch, size.context) if sized.cells(size.batch, size.context) <= MOST_CELLS else None
