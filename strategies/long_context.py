"""Fixed cases with many live cells: contexts of 128k to 1M tokens, one huge row among tiny ones, offsets around 2^31.

Minutes in the interpreter, seconds on a GPU: they are run there, and under compute-sanitizer.
"""

from harness.differential import Example
from harness.layout import Layout, Place
from oracles.metadata import Decode, DraftExtend, ExtendReq, Req, TargetVerify
from oracles.seqlens import CuSeqlens, NsaCacheSeqlens, SeqlensExpand
from oracles.seqlens import Req as Lengths

TINY = tuple(Req(slot, 1 + slot % 3) for slot in range(2, 66))
FAR = Layout({"page_table_1[0]": Place("far"), "real_page_table[0]": Place("far")})

EXAMPLES: dict[str, Example] = {
    "decode 128k": Example((Decode((Req(1, 131072), Req(0, 131071), Req(3, 1)), page_size=64),)),
    "decode 256k, page 1": Example((Decode((Req(1, 262144), Req(2, 7)), backends=3),)),
    "decode 1M": Example((Decode((Req(1, 2**20), Req(2, 2**20 - 63)), page_size=64, wide=False),)),
    "decode one huge row among tiny ones": Example((Decode((Req(1, 2**18), *TINY), page_size=64, slots=80),)),
    "decode 2^31 cells away": Example((Decode((Req(4095, 4097), Req(2047, 65)), slots=4096, table_extra=2**20), ), FAR),
    "verify 128k": Example((TargetVerify((Req(1, 131072 - 4), Req(3, 65)), page_size=64, draft_tokens=4),)),
    "draft extend 128k": Example((DraftExtend((ExtendReq(1, 131072, 3), ExtendReq(2, 5, 4)), page_size=64),)),
    "128k new tokens": Example((SeqlensExpand((Lengths(131072, 2**20), Lengths(0, 5), Lengths(3, 3))),)),
    "sums of 64k lengths": Example((CuSeqlens((2**15, 1, 0), repeat=21846),)),
    "clip of 64k rows": Example((NsaCacheSeqlens((1, 2048, 131072), repeat=21846, padded_rows=65552),)),
}
