"""SGLang's indexer: key ranges, and the round-robin split over context-parallel ranks.

The split's query counts on the device are a Triton kernel; the rest are host functions on PyTorch tensors, executed alone.
"""

import types

import torch

from . import _indexer, _upstream

VERSION = _upstream.version()
_kernel = _upstream.kernel("_dsa_cp_interleave_q_seqs_kernel", "nsa_cp_round_robin_split_q_seqs_kernel",
                           "dsa_cp_round_robin_split_q_seqs_kernel")
_SPLIT = ("nsa_cp_round_robin_split_data", "dsa_cp_round_robin_split_data")
_counts = _upstream.first_of("nsa_cp_round_robin_split_q_seqs_cpu", "dsa_cp_round_robin_split_q_seqs_cpu")
_split = _upstream.first_of("nsa_cp_round_robin_split_data", "dsa_cp_round_robin_split_data")
_ranges = _upstream.file_of("_cal_indexer_k_start_end")

MISSING = {name: reason for name, there, reason in (
    ("cp_round_robin_split_q_seqs", _kernel, "this SGLang has no round-robin split kernel"),
    ("cp_round_robin_split_q_seqs_cpu", _counts, "this SGLang has no round-robin split on the host"),
    ("cp_round_robin_split", _split, "this SGLang has no round-robin split of its own"),
    ("cp_round_robin_split_rows", _split, "this SGLang has no round-robin split of its own"),
    ("indexer_k_start_end", _ranges or _indexer.HAS_LOOP, "this SGLang has no indexer"),
) if not there}


def _ranks(cp_size: int, cp_rank: int) -> dict:
    """Up to 0.5.8 the ranks of context parallelism are those of tensor parallelism."""
    parallel = types.SimpleNamespace(attn_cp_size=cp_size, attn_cp_rank=cp_rank)
    size, rank = lambda: cp_size, lambda: cp_rank
    return {"torch": torch, "get_attention_tp_size": size, "get_attention_tp_rank": rank, "get_attention_cp_size": size,
            "get_attention_cp_rank": rank, "get_parallel": lambda: parallel}


def _cp_round_robin_split_q_seqs(*, extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank):
    """Launch the kernel as upstream's wrapper does, on the given outputs."""
    _kernel[(1,)](extend_seq_lens, q_lens, bs_idx, bs, cp_size, cp_rank)


def _cp_round_robin_split_q_seqs_cpu(*, extend_seq_lens, cp_size, cp_rank):
    q_lens, bs_idx = _upstream.function_of(_counts, _ranks(cp_size, cp_rank))(extend_seq_lens)
    return {"q_lens": q_lens, "bs_idx": bs_idx}


def _cp_round_robin_split(*, x, split, cp_size, cp_rank, **_):
    part = _upstream.function_of(_split, _ranks(cp_size, cp_rank))(x)
    split[tuple(slice(n) for n in part.shape)] = part


def _indexer_k_start_end(*, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank):
    extends, lengths = extend_seq_lens[:bs].tolist(), seq_lens[:bs].tolist()
    find = _inside if _indexer.RANGES_INSIDE else _outside
    for out, values in zip((ks, ke, token_to_batch_idx), find(extends, lengths, ks.device, cp_size, cp_rank)):
        out[:total_len] = values


def _outside(extends, lengths, device, cp_size, cp_rank):
    split = _upstream.function_of(_split, _ranks(cp_size, cp_rank)) if _split else None
    find = _upstream.function_of("_cal_indexer_k_start_end", {
        "torch": torch, **dict.fromkeys(_SPLIT, split), "is_cp_v2_active": lambda batch: False,
        "can_nsa_prefill_cp_round_robin_split": lambda batch: True, "can_dsa_prefill_cp_round_robin_split": lambda batch: True})
    first, owned = 0, []  # the requests that own a token of the rank
    for i, n in enumerate(extends):
        owned += [i] if (cp_rank - first) % cp_size < n else []
        first += n
    mode = types.SimpleNamespace(is_extend_without_speculative=lambda: True, is_target_verify=lambda: False)
    batch = types.SimpleNamespace(forward_mode=mode, batch_size=len(extends), seq_lens_cpu=torch.tensor(lengths),
                                  extend_seq_lens_cpu=extends)
    ranges, owner = find(types.SimpleNamespace(device=device), batch, None if cp_size == 1 else owned)
    return *ranges, owner


def _inside(extends, lengths, device, cp_size, cp_rank):
    """The ranges that the loop computes; it keeps no request per token, so the batch's own are filled in."""
    calls = []
    seen = [n - e + 1 + t for e, n in zip(extends, lengths) for t in range(e)]
    _indexer.run(extends=extends, lengths=lengths, seen=torch.tensor(seen, dtype=torch.int32, device=device),
                 logits=torch.zeros((len(seen), sum(lengths)), device=device), index_topk=1, token_nums=len(seen),
                 max_rows=len(seen), device=device, page_table=torch.zeros((len(extends), 1 + max(lengths)), device=device),
                 scores_of=lambda ks, ke: calls.append((ks, ke)))
    requests = torch.arange(len(extends), device=device).repeat_interleave(torch.tensor(extends, device=device))
    return *calls[0], requests


def supports(case):
    """What the kernel and the host functions take for granted."""
    name, fields = case["contract"], case["case"]
    place = case["layout"]["places"].get("extend_seq_lens", {})
    if name == "cp_round_robin_split_q_seqs" and place.get("kind") in ("strided", "expanded"):
        return "unit stride of extend_seq_lens (request bs is loaded from in_seqs_ptr + bs)"
    if name != "indexer_k_start_end":
        return True
    if not any(r["extend_len"] for r in fields["requests"]):
        return "at least one query token (the lists are concatenated)"
    if fields["cp_size"] > 1 and (_indexer.RANGES_INSIDE or not _split):
        return "no context parallelism (this version has none, or splits elsewhere)"
    return True


if _kernel:
    cp_round_robin_split_q_seqs = _cp_round_robin_split_q_seqs
if _counts:
    cp_round_robin_split_q_seqs_cpu = _cp_round_robin_split_q_seqs_cpu
if _split:
    cp_round_robin_split = cp_round_robin_split_rows = _cp_round_robin_split
if "indexer_k_start_end" not in MISSING:
    indexer_k_start_end = _indexer_k_start_end
