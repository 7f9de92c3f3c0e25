"""SGLang's kernel of the indexer family: the per-rank query counts of the round-robin split."""

from . import _upstream

VERSION = _upstream.version()
_kernel = _upstream.kernel("_dsa_cp_interleave_q_seqs_kernel", "nsa_cp_round_robin_split_q_seqs_kernel",
                           "dsa_cp_round_robin_split_q_seqs_kernel")

MISSING = {} if _kernel else {"cp_round_robin_split_q_seqs": "this SGLang has no round-robin split kernel"}


def _cp_round_robin_split_q_seqs(*, extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank):
    """Launch the kernel as upstream's wrapper does, on the given outputs."""
    _kernel[(1,)](extend_seq_lens, q_lens, bs_idx, bs, cp_size, cp_rank)


def supports(case):
    """What the kernel takes for granted: lengths side by side."""
    place = case["layout"]["places"].get("extend_seq_lens", {})
    if case["contract"] == "cp_round_robin_split_q_seqs" and place.get("kind") in ("strided", "expanded"):
        return "unit stride of extend_seq_lens (request bs is loaded from in_seqs_ptr + bs)"
    return True


if _kernel:
    cp_round_robin_split_q_seqs = _cp_round_robin_split_q_seqs
