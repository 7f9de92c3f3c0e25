"""SGLang's fused DSA metadata kernels, through their own wrappers, one backend after the other."""

from . import _upstream

VERSION = _upstream.version()
_fused = _upstream.home("fused_dsa_decode_metadata")

VARIANTS = {name: {"tail": "block"} for name in ("decode_metadata", "target_verify_metadata", "draft_extend_metadata")}
MISSING = {} if _fused else {name: "this SGLang has no fused DSA metadata kernels" for name in VARIANTS}


def _decode_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, nsa_cache_seqlens,
                     nsa_cu_seqlens_k, page_table_1, real_page_table, bs, max_len, index_topk, page_size):
    for b in range(len(cache_seqlens)):
        _fused.fused_dsa_decode_metadata(
            _in(seq_lens, bs), _in(req_pool_indices, bs), _upstream.cuda(req_to_token), _in(cache_seqlens[b], bs),
            _in(cu_seqlens_k[b], bs + 1), _upstream.cuda(page_table_1[b]), _in(nsa_cache_seqlens[b], bs),
            _in(nsa_cu_seqlens_k[b], bs + 1), _upstream.cuda(real_page_table[b]), bs, max_len, index_topk, page_size)


def _target_verify_metadata(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, seqlens_expanded,
                            nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, paged_mqa_ctx_lens_2d, bs,
                            max_len, index_topk, page_size, draft_tokens):
    rows = bs * draft_tokens
    for b in range(len(cache_seqlens)):
        _fused.fused_dsa_target_verify_metadata(
            _in(seq_lens, bs), _in(req_pool_indices, bs), _upstream.cuda(req_to_token), _in(cache_seqlens[b], bs),
            _in(cu_seqlens_k[b], bs + 1), _upstream.cuda(page_table_1[b]), _in(seqlens_expanded[b], rows),
            _in(nsa_cache_seqlens[b], rows), _in(nsa_cu_seqlens_k[b], rows + 1), _upstream.cuda(real_page_table[b]), bs,
            max_len, index_topk, page_size, draft_tokens, _upstream.cuda(paged_mqa_ctx_lens_2d[b]))


def _draft_extend_metadata(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
                           seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, page_table_1, real_page_table, bs,
                           total_len, max_len, index_topk, page_size, max_extend_len, static_extend_len):
    for b in range(len(cache_seqlens)):
        _fused.fused_dsa_draft_extend_metadata(
            _in(seq_lens, bs), _in(extend_seq_lens, bs), _in(req_pool_indices, bs), _upstream.cuda(req_to_token),
            _in(cache_seqlens[b], bs), _in(cu_seqlens_k[b], bs + 1), _upstream.cuda(page_table_1[b]),
            _in(seqlens_expanded[b], total_len), _in(nsa_cache_seqlens[b], total_len),
            _in(nsa_cu_seqlens_k[b], total_len + 1), _upstream.cuda(real_page_table[b]), bs, total_len, max_len, index_topk,
            page_size, max_extend_len, bs * max_extend_len, static_extend_len)


def supports(case):
    """What the kernels take for granted: `req_idx * stride` is computed in the dtype of req_pool_indices."""
    fields, place = case["case"], case["layout"]["places"].get("req_pool_indices", {})
    longest = max([r["seq_len"] for r in fields["requests"]], default=0)
    width = longest + fields.get("draft_tokens", 0) + fields["max_extra"] + fields["table_extra"]
    if fields["slots"] * 2 * width >= 2**31 and place.get("dtype") != "int64":
        return "int64 req_pool_indices for a request table of 2^31 elements or more (the runners pass int64)"
    return True


def _in(tensor, count: int):
    """The part that upstream's callers pass: buffers are sliced to the batch first."""
    return _upstream.cuda(tensor[:count])


if _fused:
    decode_metadata = _decode_metadata
    target_verify_metadata = _target_verify_metadata
    draft_extend_metadata = _draft_extend_metadata
