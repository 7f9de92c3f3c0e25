"""SGLang's kernels of the seqlens family."""

import torch
import triton

from . import _upstream

VERSION = _upstream.version()
_kernel = _upstream.kernel("seqlens_expand_kernel")

# The kernel clamps negative lengths since #30378.
VARIANTS = {"seqlens_expand": {"clamp": "zero" if "tl.maximum" in _upstream.source("seqlens_expand_kernel") else "none"}}
MISSING = {} if _kernel else {"seqlens_expand": "this SGLang has no seqlens_expand_kernel"}


def _seqlens_expand(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Launch the kernel on the given output; the offsets are what upstream's wrapper passes it."""
    n = extend_seq_lens.numel()
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=extend_seq_lens.device)
    offsets[1:] = torch.cumsum(extend_seq_lens, dim=0)
    _kernel[(n,)](extend_seq_lens, seq_lens, offsets, seqlens_expanded, n, BLOCK=triton.next_power_of_2(max_q_len))


def supports(case):
    """What seqlens_expand_triton says or assumes of its inputs."""
    extends = [r["extend_len"] for r in case["case"]["requests"]] if case["contract"] == "seqlens_expand" else [1]
    if not extends:
        return "at least one request (the grid is (N,))"
    if max(extends) + case["case"].get("extra", 0) < 1:
        return "max_q_len of at least 1 (BLOCK = next_power_of_2(max_q_len))"
    if any(place["kind"] in ("strided", "expanded") for place in case["layout"]["places"].values()):
        return "unit stride of every input (docstring: extend_seq_lens [N], seq_lens [N])"
    return True


if _kernel:
    seqlens_expand = _seqlens_expand
