"""Lengths: expansion, sums, padding."""

import torch

from exhibit import exhibit, put, sums


@exhibit("B003")
def lengths_below_zero(faulty, *, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """SGLang #30378. Trigger: a padded row, one key and a draft width of 4. Symptom: lengths -2, -1, 0, 1, which top-k reads
    as unsigned and walks off its row."""
    rows = [seq - extend + 1 + j for extend, seq in zip(extend_seq_lens.tolist(), seq_lens.tolist()) for j in range(extend)]
    put(seqlens_expanded, rows if faulty else [max(n, 0) for n in rows])


@exhibit("B069")
def padding_of_one(faulty, *, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """SGLang #1779, #1782, #1469. Trigger: a batch padded to its bucket. Symptom: the pad value of another consumer, so NaN
    or garbage rows."""
    rows = [min(n, index_topk) for n in seqlens_expanded.tolist()]
    rows += [1 if faulty else 0] * (padded_rows - len(rows))
    put(nsa_cache_seqlens, rows)
    put(nsa_cu_seqlens_k, sums(rows))


@exhibit("B130")
def dirty_workspace(faulty, *, seqlens, cu_seqlens):
    """FlashInfer #1643, #1584, #2002. Trigger: the first use of a workspace that nobody has zeroed. Symptom: illegal accesses
    or a hang, as counters start anywhere."""
    counter = torch.empty(1, dtype=torch.int32) if faulty else torch.zeros(1, dtype=torch.int32)
    cu_seqlens[0] = counter[0]
    for i, n in enumerate(seqlens.tolist()):
        counter += n
        cu_seqlens[i + 1] = counter[0]


@exhibit("B153")
def scratch_of_the_capture(faulty, *, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k, index_topk, padded_rows):
    """TensorRT-LLM #14297, #16290. Trigger: scratch that the op gives back to the allocator before its last consumer has run.
    Symptom: illegal accesses far downstream."""
    n = max(len(seqlens_expanded), padded_rows)
    scratch = torch.zeros(n, dtype=torch.int32)
    scratch[: len(seqlens_expanded)] = seqlens_expanded.clamp(max=index_topk)
    nsa_cache_seqlens[:n] = scratch
    if faulty:
        scratch = torch.empty(n, dtype=torch.int32)
    put(nsa_cu_seqlens_k, sums(scratch.tolist()))


@exhibit("B017")
def aligned_without_context_parallelism(faulty, *, global_num_tokens, dp_rank, dp_size, attn_tp_size, attn_cp_size,
                                        extend_in_batch, round_robin):
    """SGLang #26911. Trigger: 3 tokens, context parallelism off. Symptom: a phantom token, NaN in the draft's logits."""
    def up(n, multiple):
        return -(-n // multiple) * multiple

    counts = [up(up(n, attn_tp_size), attn_cp_size * 2 if faulty else attn_cp_size) for n in global_num_tokens]
    own = counts[dp_rank] if len(counts) > 1 else counts[0]
    wasteful = 2 * sum(counts) < max(counts) * dp_size
    rows = own if wasteful or (extend_in_batch and dp_size > 1) else max(counts)
    return -(-rows // attn_cp_size) if round_robin else rows
