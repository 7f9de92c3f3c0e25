"""What a long campaign climbs towards with `hypothesis.target()`: where the bugs of these kernels were."""

import math

from harness.contract import tensors_of
from harness.differential import Example
from harness.tensors import Input, Region

FAR = 31.0  # log2 of the first element that a 32-bit offset does not reach


def aims(example: Example) -> dict[str, float]:
    """How far an example goes: the largest element offset of any tensor (log2, at most 31), the live cells of its inputs
    (pages, where the input is a page table; log2), and the share of padding beside them."""
    tensors = {name: t for case in example.steps for name, t in tensors_of(case.arguments()).items()}
    if not tensors:
        return {}
    sizes = [math.prod(t.shape) for t in tensors.values()]
    offset = FAR if any(p.kind == "far" for p in example.layout.places.values()) else math.log2(1 + max(sizes))
    live, slack = (sum(_cells(t, region) for t in tensors.values()) for region in (Region.LIVE, Region.SLACK))
    return {"offset": min(offset, FAR), "live": math.log2(1 + live), "padding": slack / max(live + slack, 1)}


def _cells(tensor, region: Region) -> int:
    return sum(s.stop - s.start for s in tensor.spans if s.region is region) if isinstance(tensor, Input) else 0
