"""Block tables and metadata of the TRT-LLM MLA attention backend, and the padding of ragged queries around it.

| transform                 | fills                                     | from                                              |
| ------------------------- | ----------------------------------------- | ------------------------------------------------- |
| calc_padded_blocks        | (returns a number of columns)             | max_seq_len, page_size                            |
| mla_metadata_sizes        | (returns the host integers of a batch)    | lengths on the host, mode, page_size              |
| mla_metadata              | seq_lens_k, seq_lens_q, cu_seqlens_q      | seq_lens, extend_seq_lens or extend_prefix_lens   |
| mla_block_table           | block_table                               | seq_lens, req_pool_indices, req_to_token          |
| mla_multi_step_draft      | block_table, seq_lens_k of every step     | the same, once for all draft steps                |
| pad_draft_extend_query    | padded_q                                  | q, seq_lens_q, cu_seqlens_q                       |
| unpad_draft_extend_output | output                                    | raw_out, seq_lens_q, cu_seqlens_q                 |
| pad_sequence_with_mask    | output, attn_mask                         | input_emb, offsets, lengths                       |

The backend sees `keys` of a request, by mode:

| mode          | query tokens       | keys                                                    |
| ------------- | ------------------ | ------------------------------------------------------- |
| decode        | 1                  | seq_len                                                 |
| target_verify | draft_tokens       | seq_len + draft_tokens                                  |
| draft_extend  | extend_len, ragged | seq_len - extend_len + the longest extend_len           |
| draft_extend  | draft_tokens, all  | seq_len (a captured graph: no extend_seq_lens)          |
| extend        | seq_len - prefix   | those same tokens (ragged prefill: no block table)      |

A ragged draft extend pads every request's queries *at the end* to the longest, so its keys reach as far as they do.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import hashing
from harness.contract import (ANY_STRIDES, INT, INT32, ROWS_STRIDED, Arg, Case, Contract, Kind, Precondition, Role, Scalar,
                              Variant, beyond)
from harness.tensors import Input, Output, Region, runs, table, vector

FAR_ROWS = (*ROWS_STRIDED, "far")
FLOATS = ("bfloat16", "float8_e4m3fn", "float16", "float32")
MODES = ("decode", "target_verify", "draft_extend", "extend")
TRTLLM_TOKENS = 128  # the attention kernel takes its table in units of this many tokens
WRITER_TOKENS = 4096  # the table writer's unit


@dataclass(frozen=True)
class Req:
    """A request that owns row `slot` of req_to_token; `extend_len` of its `seq_len` keys are new."""

    slot: int
    seq_len: int
    extend_len: int = 0


# -- calc_padded_blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CalcPaddedBlocks(Case):
    """`lengths` are the keys of a batch's requests, of which the longest counts."""

    lengths: tuple[int, ...]
    page_size: int = 64

    def batch_size(self) -> int:
        return len(self.lengths)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        return {"max_seq_len": max(self.lengths, default=0), "page_size": self.page_size}


def calc_padded_blocks(*, max_seq_len, page_size, variant):
    """The columns of a block table for rows of up to `max_seq_len` keys: whole units of its reader and of its writer.

    65 keys on pages of 64 need 2 columns; the writer fills 4096 / 64 at a time:

    >>> calc_padded_blocks(max_seq_len=65, page_size=64, variant={})
    64
    >>> calc_padded_blocks(max_seq_len=4097, page_size=32, variant={})
    256

    No number of columns does for pages of more than 128 tokens:

    >>> calc_padded_blocks(max_seq_len=65, page_size=256, variant={})
    """
    if page_size > TRTLLM_TOKENS:
        return None
    blocks = -(-max_seq_len // page_size)
    while blocks % (TRTLLM_TOKENS // page_size) or blocks % (WRITER_TOKENS // page_size):
        blocks += 1
    return blocks


_PAGE_SIZE = Precondition(
    "pages of at most 128 tokens", "1 <= page_size <= 128",
    "_calc_padded_blocks: 'block_num % (128 / page_size) == 0'",
    lambda c: replace(c, page_size=256) if c.page_size <= TRTLLM_TOKENS else None)

CALC_PADDED_BLOCKS = Contract(
    name="calc_padded_blocks",
    family="mla_block_table",
    doc="How many columns a block table has: enough, and a multiple of what its reader and its writer need.",
    origin="SGLang trtllm_mla_backend._calc_padded_blocks",
    case=CalcPaddedBlocks,
    oracle=calc_padded_blocks,
    kind=Kind.HOST,
    scalars=(
        Scalar("max_seq_len", "keys of the longest row, 0 or more"),
        Scalar("page_size", "tokens per page, 1 to 128; more must be refused"),
    ),
    preconditions=(_PAGE_SIZE,),
    upstream_names=("_calc_padded_blocks",),
)


# -- mla_metadata_sizes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MlaMetadataSizes(Case):
    """`graph`: for a captured graph, whose buffers are as large as `max_context_len` demands.
    `context_extra`: how far max_context_len exceeds the longest sequence."""

    requests: tuple[Req, ...]
    mode: str = "decode"
    draft_tokens: int = 1
    page_size: int = 64
    graph: bool = False
    context_extra: int = 0

    def batch_size(self) -> int:
        return len(self.requests)

    def dims(self) -> dict[str, int]:
        return {}

    def arguments(self) -> dict:
        ragged = self.mode == "extend" or self.mode == "draft_extend" and not self.graph
        return {
            "seq_lens": [r.seq_len for r in self.requests],
            "extend_seq_lens": [r.extend_len for r in self.requests] if ragged else None,
            "mode": self.mode,
            "draft_tokens": self.draft_tokens,
            "page_size": self.page_size,
            "max_context_len": max([r.seq_len for r in self.requests], default=0) + self.context_extra,
            "graph": self.graph,
        }


def mla_metadata_sizes(*, seq_lens, extend_seq_lens, mode, draft_tokens, page_size, max_context_len, graph, variant):
    """What the host must know of a batch: query tokens, the longest row of keys, and the columns of the block table.

    A ragged draft extend whose shorter request is the longer sequence: its queries are padded to 3, so its keys end at
    4096 - 1 + 3, on a page that a table for 4096 keys does not have.

    >>> batch = dict(seq_lens=[4096, 10], extend_seq_lens=[1, 3], mode="draft_extend", draft_tokens=4, page_size=64,
    ...              max_context_len=8192, graph=False)
    >>> mla_metadata_sizes(**batch, variant={"reach": "keys"})
    {'max_seq_len_q': 3, 'sum_seq_lens_q': 4, 'max_seq_len_k': 4098, 'max_seq_len': 4098, 'max_blocks': 128}
    >>> mla_metadata_sizes(**batch, variant={"reach": "sequence"})
    {'max_seq_len_q': 3, 'sum_seq_lens_q': 4, 'max_seq_len_k': 4096, 'max_seq_len': 4099, 'max_blocks': 64}
    """
    bs = len(seq_lens)
    queries = extend_seq_lens
    if queries is None:
        queries = [1 if mode == "decode" else draft_tokens] * bs
    widest = max(queries, default=0)
    added = draft_tokens if mode == "target_verify" else 0
    longest = max_context_len if graph else max(seq_lens, default=0)

    if mode == "extend":
        columns, reach, told = 0, widest, widest
    elif variant["reach"] == "sequence":
        reach = longest if graph else longest + added
        columns = calc_padded_blocks(max_seq_len=reach, page_size=page_size, variant={})
        told = reach + (0 if mode == "decode" else widest)
    else:
        reach = longest + added
        if extend_seq_lens is not None:
            for seq_len, extend_len in zip(seq_lens, extend_seq_lens):
                reach = max(reach, seq_len - extend_len + widest)
        columns = calc_padded_blocks(max_seq_len=reach, page_size=page_size, variant={})
        told = reach
    return {"max_seq_len_q": widest, "sum_seq_lens_q": sum(queries), "max_seq_len_k": reach, "max_seq_len": told,
            "max_blocks": columns}


REACH = Variant("reach", {
    "keys": "the table writer's bound (#27320): every page of every row's keys has a column",
    "sequence": "SGLang trtllm_mla_backend: from the longest sequence or max_context_len alone; draft tokens are counted "
                "twice in the length that the kernel is told",
})

MLA_METADATA_SIZES = Contract(
    name="mla_metadata_sizes",
    family="mla_block_table",
    doc="The host integers of a batch's metadata: query tokens, longest row of keys, columns of the block table.",
    origin="SGLang trtllm_mla_backend: init_forward_metadata, init_cuda_graph_state, forward_extend",
    case=MlaMetadataSizes,
    oracle=mla_metadata_sizes,
    kind=Kind.HOST,
    scalars=(
        Scalar("seq_lens", "list: keys per request, new tokens included (target_verify: without the draft tokens)"),
        Scalar("extend_seq_lens", "list: query tokens per request; None in decode, target_verify and captured draft_extend"),
        Scalar("mode", "decode, target_verify, draft_extend or extend"),
        Scalar("draft_tokens", "query tokens per request of target_verify and of a captured draft_extend"),
        Scalar("page_size", "tokens per page, 1 to 128"),
        Scalar("max_context_len", "longest sequence that the model takes"),
        Scalar("graph", "whether the sizes are those of a captured graph"),
    ),
    variants=(REACH,),
    upstream_names=("TRTLLMMLADecodeMetadata", "TRTLLMMLAPrefillMetadata"),
)


# -- mla_metadata -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class MlaMetadata(Case):
    """`requests`, `repeat` times over. `ragged`: a draft extend of unequal extends (eager); else a captured one."""

    requests: tuple[Req, ...]
    repeat: int = 1
    mode: str = "decode"
    draft_tokens: int = 1
    ragged: bool = False
    spare: int = 0

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch)}

    def arguments(self) -> dict:
        bs, mode = len(self.batch), self.mode
        extends = vector([r.extend_len for r in self.batch], self.spare)
        prefixes = vector([r.seq_len - r.extend_len for r in self.batch], self.spare)
        queries = mode in ("draft_extend", "extend")
        return {
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "extend_seq_lens": extends if mode == "draft_extend" and self.ragged else None,
            "extend_prefix_lens": prefixes if mode == "extend" else None,
            "seq_lens_k": Output((bs + self.spare,)) if mode != "extend" else None,
            "seq_lens_q": Output((bs + self.spare,)) if queries else None,
            "cu_seqlens_q": Output((bs + 1 + self.spare,)) if queries else None,
            "bs": bs,
            "mode": mode,
            "draft_tokens": self.draft_tokens,
            "max_seq_len_q": max([r.extend_len for r in self.batch], default=0) if self.ragged else self.draft_tokens,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        bs, i = len(self.batch), index[0]
        if name == "cu_seqlens_q" and i == bs:
            return "the total"
        return f"request {i}" if i < bs else f"it is past the batch's {bs} requests"


def mla_metadata(*, seq_lens, extend_seq_lens, extend_prefix_lens, seq_lens_k, seq_lens_q, cu_seqlens_q, bs, mode,
                 draft_tokens, max_seq_len_q, variant):
    """Keys and query tokens of every request, and where its queries start.

    >>> from harness.states import Cells
    >>> keys, queries, starts = Cells((2,)), Cells((2,)), Cells((4,))
    >>> mla_metadata(seq_lens=[10, 7], extend_seq_lens=[1, 3], extend_prefix_lens=None, seq_lens_k=keys, seq_lens_q=queries,
    ...              cu_seqlens_q=starts, bs=2, mode="draft_extend", draft_tokens=4, max_seq_len_q=3, variant={})
    >>> keys, queries, starts
    (Cells([12 7]), Cells([1 3]), Cells([0 1 4 .]))
    """
    start = 0
    for i in range(bs):
        if mode == "decode":
            seq_lens_k[i] = seq_lens[i]
        elif mode == "target_verify":
            seq_lens_k[i] = seq_lens[i] + draft_tokens
        elif mode == "draft_extend" and extend_seq_lens is None:
            seq_lens_k[i] = seq_lens[i]
            queries = draft_tokens
        elif mode == "draft_extend":
            seq_lens_k[i] = seq_lens[i] - extend_seq_lens[i] + max_seq_len_q
            queries = extend_seq_lens[i]
        else:
            queries = seq_lens[i] - extend_prefix_lens[i]
        if mode in ("draft_extend", "extend"):
            seq_lens_q[i] = queries
            cu_seqlens_q[i] = start
            start += queries
    if mode in ("draft_extend", "extend"):
        cu_seqlens_q[bs] = start


MLA_METADATA = Contract(
    name="mla_metadata",
    family="mla_block_table",
    doc="Lengths of keys and queries of every request, in every mode.",
    origin="SGLang trtllm_mla_backend.init_forward_metadata and its CUDA-graph capture and replay",
    case=MlaMetadata,
    oracle=mla_metadata,
    args=(
        Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request", ANY_STRIDES, cells="live, slack"),
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES,
            optional="given exactly in a ragged draft_extend", cells="live, slack"),
        Arg("extend_prefix_lens", Role.IN, ("bs",), INT, "cached keys per request", ANY_STRIDES,
            optional="given exactly in extend", cells="live, slack"),
        Arg("seq_lens_k", Role.OUT, ("bs",), INT32, "keys per row of the block table",
            optional="absent in extend", cells="written, untouched"),
        Arg("seq_lens_q", Role.OUT, ("bs",), INT32, "query tokens per request", may_alias=("extend_seq_lens",),
            optional="given in draft_extend and extend", cells="written, untouched"),
        Arg("cu_seqlens_q", Role.OUT, ("bs + 1",), INT32, "prefix sums of seq_lens_q",
            optional="given in draft_extend and extend", cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests in the (padded) batch"),
        Scalar("mode", "decode, target_verify, draft_extend or extend"),
        Scalar("draft_tokens", "query tokens per request of target_verify and of a captured draft_extend"),
        Scalar("max_seq_len_q", "the longest extend_seq_len of a ragged draft_extend"),
    ),
    preconditions=(
        Precondition("sums fit int32", "sum of query tokens < 2**31", "cu_seqlens_q is int32"),
    ),
    capturable=True,
    frozen_by_capture=("bs", "mode", "draft_tokens", "max_seq_len_q"),
    upstream_names=("TRTLLMMLADecodeMetadata", "TRTLLMMLAPrefillMetadata", "_apply_cuda_graph_metadata"),
)


# -- block tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _Tables(Case):
    """What the writers of block tables share.

    repeat        how many times over the batch holds `requests`
    fresh         the table is new: entries past a row's pages become -1 (eager); else they stay (a captured buffer)
    padded        max_blocks as calc_padded_blocks has it, else just enough;   extra  columns beyond that
    spare         capacity of tables and lengths beyond what the batch needs
    slots         rows of req_to_token;   table_extra  its columns beyond the longest row of keys
    aligned       whether the tokens of a page are contiguous in it;   shared  whether all requests share their pages
    content       which table contents
    """

    requests: tuple[Req, ...]
    repeat: int = 1
    page_size: int = 64
    fresh: bool = False
    padded: bool = False
    extra: int = 0
    spare: int = 0
    slots: int = 4
    table_extra: int = 0
    aligned: bool = True
    shared: bool = False
    content: int = 0

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def keys(self, i: int) -> int:
        """Keys in row i."""
        return self.batch[i].seq_len

    def tokens_read(self, i: int) -> int:
        """Tokens of request i that req_to_token must hold."""
        return self.keys(i)

    @cached_property
    def longest(self) -> int:
        return max([self.tokens_read(i) for i in range(len(self.batch))], default=0)

    def pages(self, i: int) -> int:
        return -(-self.keys(i) // self.page_size)

    def longest_keys(self) -> int:
        return max([self.keys(i) for i in range(len(self.batch))], default=0)

    def max_blocks(self) -> int:
        keys = self.longest_keys()
        if self.padded:
            return calc_padded_blocks(max_seq_len=keys, page_size=self.page_size, variant={}) + self.extra
        return -(-keys // self.page_size) + self.extra

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.batch), "max_blocks": self.max_blocks()}

    def arguments(self) -> dict:
        return {
            "seq_lens": vector([r.seq_len for r in self.batch], self.spare),
            "req_pool_indices": vector([r.slot for r in self.batch], self.spare),
            "req_to_token": self.req_to_token(),
            "bs": len(self.batch),
            "max_blocks": self.max_blocks(),
            "page_size": self.page_size,
            "fresh": self.fresh,
        }

    def block_table(self) -> Output:
        return Output((len(self.batch) + self.spare, self.max_blocks() + self.spare))

    def req_to_token(self):
        """The rows that the batch's requests own, live as far as they are read; every other row is forbidden."""
        width = max(self.longest + self.table_extra, 0)
        live: dict[int, int] = {}
        for i, r in enumerate(self.batch):
            if 0 <= r.slot < self.slots:
                live[r.slot] = max(live.get(r.slot, 0), min(self.tokens_read(i), width))
        return table((self.slots, width), {s: self.tokens(s, n) for s, n in live.items()})

    def tokens(self, slot: int, count: int) -> np.ndarray:
        """KV slots of the first `count` tokens of the request in row `slot`."""
        return hashing.kv_slots(self.content, 0 if self.shared else slot + 1, count, self.page_size, self.aligned)

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        base, i, bs = name.split("[")[0], index[0], len(self.batch)
        if base == "req_to_token":
            return f"slot {i}"
        if base in ("kv_indptr", "kv_indices"):
            return f"the index list of draft step {i}, which a block table does not need"
        if i >= bs:
            return f"it is past the batch's {bs} requests"
        if base != "block_table":
            return f"request {i}"
        if index[1] < self.pages(i):
            return f"token {index[1] * self.page_size} of request {i} (slot {self.batch[i].slot})"
        return f"it is past the {self.pages(i)} pages of request {i}, which has {self.keys(i)} keys"


@dataclass(frozen=True, repr=False)
class MlaBlockTable(_Tables):
    """`ragged`: a draft extend of unequal extends (eager); else all have `draft_tokens` (captured)."""

    mode: str = "decode"
    draft_tokens: int = 1
    ragged: bool = False

    @cached_property
    def widest(self) -> int:
        return max([r.extend_len for r in self.batch], default=0)

    def keys(self, i: int) -> int:
        r = self.batch[i]
        if self.mode == "target_verify":
            return r.seq_len + self.draft_tokens
        if self.mode == "draft_extend" and self.ragged:
            return r.seq_len - r.extend_len + self.widest
        return r.seq_len

    def arguments(self) -> dict:
        ragged = self.mode == "draft_extend" and self.ragged
        return {
            **super().arguments(),
            "extend_seq_lens": vector([r.extend_len for r in self.batch], self.spare) if ragged else None,
            "block_table": self.block_table(),
            "mode": self.mode,
            "draft_tokens": self.draft_tokens,
            "max_seq_len_q": self.widest if ragged else self.draft_tokens,
        }


@dataclass(frozen=True, repr=False)
class MlaMultiStepDraft(_Tables):
    """`steps` speculative steps, of which the first costs no attention: steps - 1 backends. `template`: whether the
    buffers of the kv-index template are there, `list_extra` their columns beyond what the batch's lists need; the last
    `idle` requests are padded ones at position 0 (an EAGLE draft graph)."""

    steps: int = 2
    template: bool = True
    list_extra: int = 0
    idle: int = 0

    def tokens_read(self, i: int) -> int:
        """The template also lists the draft tokens of every step."""
        return self.keys(i) + (self.steps if self.template else 0)

    def dims(self) -> dict[str, int]:
        return {**super().dims(), "steps": self.steps}

    def entries(self) -> int:
        """Columns of kv_indices: what the last step's lists need, and more."""
        return sum(r.seq_len for r in self.batch) + len(self.batch) * self.steps + self.list_extra

    def positions(self) -> list[int]:
        real = len(self.batch) - self.idle
        return [r.seq_len if i < real else 0 for i, r in enumerate(self.batch)]

    def arguments(self) -> dict:
        bs = len(self.batch)
        return {
            **super().arguments(),
            "positions": vector(self.positions(), self.spare) if self.template else None,
            "block_table": [self.block_table() for _ in range(self.steps - 1)],
            "seq_lens_k": [Output((bs + self.spare,)) for _ in range(self.steps - 1)],
            "kv_indptr": Output((self.steps, bs + 1 + self.spare)) if self.template else None,
            "kv_indices": Output((self.steps, self.entries() + self.spare)) if self.template else None,
            "steps": self.steps,
        }


def mla_block_table(*, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, block_table, bs, max_blocks, page_size,
                    fresh, mode, draft_tokens, max_seq_len_q, variant):
    """Row i lists the pages of request i's keys: entry q is the page of its token `q * page_size`.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> R = table((2, 5), {0: [4, 5, 2], 1: [8, 9, 6, 7, 0]}).view()
    >>> def fill(out, fresh):
    ...     mla_block_table(seq_lens=[2, 4], extend_seq_lens=None, req_pool_indices=[0, 1], req_to_token=R, block_table=out,
    ...                     bs=2, max_blocks=4, page_size=2, fresh=fresh, mode="target_verify", draft_tokens=1,
    ...                     max_seq_len_q=1, variant={})
    ...     return out

    A new table says where a row ends; a captured one keeps what it held, older requests' pages among it:

    >>> fill(Cells((2, 4)), fresh=True)
    Cells([2 1 -1 -1]
          [4 3 0 -1])
    >>> fill(Cells((2, 4)), fresh=False)
    Cells([2 1 . .]
          [4 3 0 .])
    """
    for i in range(bs):
        if mode == "target_verify":
            keys = seq_lens[i] + draft_tokens
        elif extend_seq_lens is not None:
            keys = seq_lens[i] - extend_seq_lens[i] + max_seq_len_q
        else:
            keys = seq_lens[i]
        _row(block_table, i, keys, req_to_token, req_pool_indices[i], max_blocks, page_size, fresh)


def mla_multi_step_draft(*, seq_lens, req_pool_indices, positions, req_to_token, block_table, seq_lens_k, kv_indptr,
                         kv_indices, bs, max_blocks, page_size, fresh, steps, variant):
    """Block tables and lengths of every draft step. All steps see the batch's own lengths: the backend reads the keys
    of step s as those before the first draft token.

    >>> from harness.states import Cells
    >>> from harness.tensors import table
    >>> R = table((1, 4), {0: [6, 7, 3, 2]}).view()
    >>> out, lens, ptr, ind = Cells((1, 2)), Cells((1,)), Cells((2, 2)), Cells((2, 4))
    >>> def fill(template):
    ...     mla_multi_step_draft(seq_lens=[2], req_pool_indices=[0], positions=[2], req_to_token=R, block_table=[out],
    ...                          seq_lens_k=[lens], kv_indptr=ptr, kv_indices=ind, bs=1, max_blocks=2, page_size=2,
    ...                          fresh=True, steps=2, variant={"kv_index_template": template})
    >>> fill("skipped")
    >>> out, lens, ptr
    (Cells([3 -1]), Cells([2]), Cells([. .]
          [. .]))

    Before #26241 the index lists of another backend were built as well, which nothing reads:

    >>> fill("built")
    >>> ptr, ind
    (Cells([. 3]
          [. 4]), Cells([6 7 3 .]
          [6 7 3 2]))
    """
    for s in range(steps - 1):
        for i in range(bs):
            _row(block_table[s], i, seq_lens[i], req_to_token, req_pool_indices[i], max_blocks, page_size, fresh)
            seq_lens_k[s][i] = seq_lens[i]
    if variant["kv_index_template"] == "built" and kv_indices is not None:
        for step in range(steps):
            start = 0
            for i in range(bs):
                count = seq_lens[i] + step + 1
                kv_indices[step, start : start + count] = req_to_token[req_pool_indices[i], 0:count]
                start += count
                kv_indptr[step, i + 1] = sum(positions[: i + 1]) + (i + 1) * (step + 1)


def _row(block_table, i, keys, req_to_token, slot, max_blocks, page_size, fresh):
    pages = -(-keys // page_size)
    block_table[i, 0:pages] = req_to_token[slot, 0:keys:page_size] // page_size
    if fresh:
        block_table[i, pages:max_blocks] = -1


KV_INDEX_TEMPLATE = Variant("kv_index_template", {
    "skipped": "SGLang #26241: the backend reads block tables only, so the index lists of all steps are not built",
    "built": "SGLang before #26241: inherited from the FlashInfer MLA backend, with its buffer of steps * bs * context",
})


def _first_request(case, **changes):
    return replace(case, requests=(replace(case.requests[0], **changes), *case.requests[1:])) if case.requests else None


def _last_page_outside(case):
    """The first token of the longest row's last page is one column past req_to_token."""
    last = (case.longest_keys() - 1) // case.page_size * case.page_size
    return replace(case, table_extra=last - case.longest) if last > 0 else None


def _too_narrow(case):
    return replace(case, padded=False, extra=-1) if case.longest_keys() else None


_TABLE_PRECONDITIONS = (
    Precondition("slots exist", "0 <= req_pool_indices < req_to_token.shape[0]", "create_flashmla_kv_indices_triton: unchecked",
                 lambda c: tuple(_first_request(c, slot=s) for s in beyond(c.slots) if c.requests)),
    Precondition("pages fit the row", "ceil(keys / page_size) <= max_blocks",
                 "create_flashmla_kv_indices_triton: unchecked; mla_metadata_sizes promises it", _too_narrow),
    Precondition("tokens exist", "the first token of every page is a column of req_to_token",
                 "create_flashmla_kv_indices_triton: unchecked", _last_page_outside),
)

_TABLE_INPUTS = (
    Arg("seq_lens", Role.IN, ("bs",), INT, "keys per request", ANY_STRIDES, cells="live, slack"),
    Arg("req_pool_indices", Role.IN, ("bs",), INT, "row of req_to_token that each request owns", ANY_STRIDES,
        cells="live, slack"),
    Arg("req_to_token", Role.IN, ("1", "0"), INT32, "KV slot of every token of every request", ROWS_STRIDED,
        cells="live, slack, forbidden"),
)

_TABLE_SCALARS = (
    Scalar("bs", "requests in the (padded) batch"),
    Scalar("max_blocks", "columns of the table; at least the pages of the longest row"),
    Scalar("page_size", "tokens per page"),
    Scalar("fresh", "whether entries past a row's pages become -1 (a new table) or stay (a captured one)"),
)

MLA_BLOCK_TABLE = Contract(
    name="mla_block_table",
    family="mla_block_table",
    doc="The pages of every request's keys, row by row.",
    origin="SGLang trtllm_mla_backend._create_block_kv_indices, and its CUDA-graph capture and replay",
    case=MlaBlockTable,
    oracle=mla_block_table,
    args=(
        _TABLE_INPUTS[0],
        Arg("extend_seq_lens", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES,
            optional="given exactly in a ragged draft_extend", cells="live, slack"),
        *_TABLE_INPUTS[1:],
        Arg("block_table", Role.OUT, ("bs", "max_blocks"), INT32, "page of every page position", FAR_ROWS,
            cells="written, untouched"),
    ),
    scalars=(
        *_TABLE_SCALARS,
        Scalar("mode", "decode, target_verify or draft_extend"),
        Scalar("draft_tokens", "query tokens per request of target_verify"),
        Scalar("max_seq_len_q", "the longest extend_seq_len of a ragged draft_extend"),
    ),
    preconditions=_TABLE_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=("bs", "max_blocks", "page_size", "fresh", "mode", "draft_tokens", "max_seq_len_q"),
    upstream_names=("_create_block_kv_indices", "_apply_cuda_graph_metadata", "create_flashmla_kv_indices_triton"),
)

MLA_MULTI_STEP_DRAFT = Contract(
    name="mla_multi_step_draft",
    family="mla_block_table",
    doc="Block tables and lengths of all draft steps, without the index lists that this backend does not read.",
    origin="SGLang #26241 TRTLLMMLAMultiStepDraftBackend",
    case=MlaMultiStepDraft,
    oracle=mla_multi_step_draft,
    args=(
        *_TABLE_INPUTS[:2],
        Arg("positions", Role.IN, ("bs",), INT, "position of every request's first draft token", ANY_STRIDES,
            optional="only the kv-index template reads it", cells="live, slack"),
        _TABLE_INPUTS[2],
        Arg("block_table", Role.OUT, ("bs", "max_blocks"), INT32, "page of every page position, per step", FAR_ROWS,
            per_backend=True, cells="written, untouched"),
        Arg("seq_lens_k", Role.OUT, ("bs",), INT32, "keys per request, per step", per_backend=True, cells="written, untouched"),
        Arg("kv_indptr", Role.OUT, ("steps", "bs + 1"), INT32, "where each request's list starts, per step", ROWS_STRIDED,
            optional="a backend without the kv-index template has no such buffer", cells="untouched"),
        Arg("kv_indices", Role.OUT, ("steps", "0"), INT32, "KV slots of every request, per step; built: sum(seq_lens) + "
            "bs * steps columns", ROWS_STRIDED,
            optional="a backend without the kv-index template has no such buffer", cells="untouched"),
    ),
    scalars=(*_TABLE_SCALARS, Scalar("steps", "speculative_num_steps, at least 2; one backend less; one branch (topk 1)")),
    variants=(KV_INDEX_TEMPLATE,),
    preconditions=_TABLE_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=("bs", "max_blocks", "page_size", "fresh", "steps"),
    upstream_names=("TRTLLMMLAMultiStepDraftBackend", "common_template", "generate_draft_decode_kv_indices"),
)


# -- padding of ragged queries ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The tokens of a request in a packed tensor: `count` of them count, `dropped` behind them do not."""

    count: int
    dropped: int = 0


@dataclass(frozen=True, repr=False)
class _Packed(Case):
    """Packed rows of `requests`, beside a padded tensor with one row of `longest + extra` tokens per request.

    spare    capacity of every tensor beyond what the batch needs, in requests and tokens
    missing  rows that the packed tensor lacks;   early  how far in front of where they are the starts say they are
    content  which contents: any float32 numbers, which a tensor of a smaller dtype holds rounded
    """

    requests: tuple[Tokens, ...]
    heads: int = 1
    head_dim: int = 1
    extra: int = 0
    spare: int = 0
    missing: int = 0
    early: int = 0
    content: int = 0

    def batch_size(self) -> int:
        return len(self.requests)

    def starts(self) -> list[int]:
        """Where each request's tokens start, and where the last one's end."""
        starts = [0]
        for r in self.requests:
            starts.append(starts[-1] + r.count + r.dropped)
        return starts

    def given_starts(self) -> list[int]:
        """What the caller says of them."""
        return [start - self.early for start in self.starts()]

    def rows(self) -> int:
        return self.starts()[-1] - self.missing

    def longest(self) -> int:
        return max([r.count for r in self.requests], default=0) + self.extra

    def dims(self) -> dict[str, int]:
        return {"bs": len(self.requests), "rows": self.rows(), "longest": self.longest(), "heads": self.heads,
                "head_dim": self.head_dim}

    def numbers(self, start: int, count: int) -> np.ndarray:
        """Cells of the input, by flat index."""
        return hashing.anything(self.content, "numbers", start + np.arange(count))

    def packed(self, *row: int) -> Input:
        """The packed input with rows of shape `row`; dropped tokens are slack."""
        size, live = int(np.prod(row)), {}
        for start, r in zip(self.starts(), self.requests):
            count = max(min(r.count, self.rows() - start), 0)
            if count * size:
                live[start * size] = self.numbers(start * size, count * size)
        return runs((self.rows() + self.spare, *row), live, Region.SLACK)

    def lengths(self) -> Input:
        return vector([r.count for r in self.requests], self.spare)

    def owner(self, row: int) -> str:
        """Whose packed row this is."""
        starts = self.starts()
        for i, r in enumerate(self.requests):
            if starts[i] <= row < starts[i + 1]:
                kept = "token" if row - starts[i] < r.count else "dropped token"
                return f"{kept} {row - starts[i]} of request {i}"
        return f"it is past the batch's {starts[-1]} tokens"

    def place(self, request: int, token: int) -> str:
        """What stands at a padded place."""
        if request >= len(self.requests):
            return f"it is past the batch's {len(self.requests)} requests"
        if token < self.requests[request].count:
            return f"token {token} of request {request}"
        return f"padding behind the {self.requests[request].count} tokens of request {request}"


@dataclass(frozen=True, repr=False)
class PadDraftExtendQuery(_Packed):
    """The padded tensor is a corner of a larger buffer where it is laid out with a pitch."""

    def arguments(self) -> dict:
        row = (self.heads, self.head_dim)
        return {
            "q": self.packed(*row),
            "seq_lens_q": self.lengths(),
            "cu_seqlens_q": vector(self.given_starts(), self.spare),
            "padded_q": Output((len(self.requests) + self.spare, self.longest() + self.spare, *row)),
            "bs": len(self.requests),
            "max_seq_len_q": self.longest(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "padded_q":
            return self.place(*index[:2])
        return self.owner(index[0]) if name == "q" else f"request {index[0]}"


@dataclass(frozen=True, repr=False)
class UnpadDraftExtendOutput(_Packed):
    """The other way round: the padded tensor is read, and the packed one written."""

    def arguments(self) -> dict:
        bs, width, row = len(self.requests), self.longest() + self.spare, (self.heads, self.head_dim)
        size, live = self.heads * self.head_dim, {}
        for i, r in enumerate(self.requests):
            count = min(r.count, width)
            if count * size:
                live[i * width * size] = self.numbers(i * width * size, count * size)
        return {
            "raw_out": runs((bs + self.spare, width, *row), live, Region.SLACK),
            "cu_seqlens_q": vector(self.given_starts(), self.spare),
            "seq_lens_q": self.lengths(),
            "output": Output((self.rows() + self.spare, *row)),
            "bs": bs,
            "max_seq_len_q": self.longest(),
            "sum_seq_lens_q": self.rows(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "output":
            return self.owner(index[0])
        return self.place(*index[:2]) if name == "raw_out" else f"request {index[0]}"


@dataclass(frozen=True, repr=False)
class PadSequenceWithMask(_Packed):
    """Rows of `heads * head_dim` numbers. A negative `extra` cuts the longest sequences."""

    def longest(self) -> int:
        return max(super().longest(), 0)

    def dims(self) -> dict[str, int]:
        places = len(self.requests) * self.longest()
        return {**super().dims(), "hidden": self.heads * self.head_dim, "places": places}

    def arguments(self) -> dict:
        bs, hidden = len(self.requests), self.heads * self.head_dim
        return {
            "input_emb": self.packed(hidden),
            "offsets": vector(self.given_starts()[:-1], self.spare),
            "lengths": self.lengths(),
            "output": Output((bs + self.spare, self.longest() + self.spare, hidden)),
            "attn_mask": Output((bs * self.longest() + self.spare,)),
            "bs": bs,
            "max_len": self.longest(),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "output":
            return self.place(*index[:2])
        if name == "attn_mask":
            return self.place(*divmod(index[0], self.longest())) if self.longest() else "it is past the batch"
        return self.owner(index[0]) if name == "input_emb" else f"request {index[0]}"


def pad_draft_extend_query(*, q, seq_lens_q, cu_seqlens_q, padded_q, bs, max_seq_len_q, variant):
    """One row per request, its queries at the front. The places behind them stay: the caller zeroes a new batch's.

    Requests with 1 and 3 query tokens; their sum is a multiple of their number, and still they are no (2, 2) batch:

    >>> from harness.states import Cells
    >>> out = Cells((2, 3, 1, 1))
    >>> pad_draft_extend_query(q=np.array([5, 6, 7, 8]).reshape(4, 1, 1), seq_lens_q=[1, 3], cu_seqlens_q=[0, 1, 4],
    ...                        padded_q=out, bs=2, max_seq_len_q=3, variant={})
    >>> out.value.reshape(2, 3), out.state.reshape(2, 3)
    (array([[5, 0, 0],
           [6, 7, 8]]), array([[1, 0, 0],
           [1, 1, 1]], dtype=uint8))
    """
    _, _, heads, head_dim = padded_q.shape
    for i in range(bs):
        for t in range(seq_lens_q[i]):
            for h in range(heads):
                padded_q[i, t, h] = q[cu_seqlens_q[i] + t, h, 0:head_dim]


def unpad_draft_extend_output(*, raw_out, cu_seqlens_q, seq_lens_q, output, bs, max_seq_len_q, sum_seq_lens_q, variant):
    """The rows of all requests, one after the other. The rows of dropped tokens stay: a caller that reads them zeroes them.

    >>> from harness.states import Cells
    >>> out = Cells((4, 1, 1))
    >>> unpad_draft_extend_output(raw_out=np.array([5, 0, 6, 7]).reshape(2, 2, 1, 1), cu_seqlens_q=[0, 2, 4],
    ...                           seq_lens_q=[1, 2], output=out, bs=2, max_seq_len_q=2, sum_seq_lens_q=4, variant={})
    >>> out.value.reshape(4), out.state.reshape(4)
    (array([5, 0, 6, 7]), array([1, 0, 1, 1], dtype=uint8))
    """
    _, heads, head_dim = output.shape
    for i in range(bs):
        for t in range(seq_lens_q[i]):
            for h in range(heads):
                output[cu_seqlens_q[i] + t, h] = raw_out[i, t, h, 0:head_dim]


def pad_sequence_with_mask(*, input_emb, offsets, lengths, output, attn_mask, bs, max_len, variant):
    """One row of `max_len` places per sequence, with zeros behind a shorter one and without the end of a longer one; and
    a flat mask that says which places hold tokens.

    >>> from harness.states import Cells
    >>> out, mask = Cells((2, 2, 1)), Cells((4,))
    >>> pad_sequence_with_mask(input_emb=np.array([[5], [6], [7], [8]]), offsets=[0, 1], lengths=[1, 3], output=out,
    ...                        attn_mask=mask, bs=2, max_len=2, variant={})
    >>> out.value.reshape(2, 2), mask
    (array([[5, 0],
           [6, 7]]), Cells([1 0 1 1]))
    """
    hidden = output.shape[2]
    for i in range(bs):
        for t in range(max_len):
            inside = t < lengths[i]
            output[i, t] = input_emb[offsets[i] + t, 0:hidden] if inside else 0
            attn_mask[i * max_len + t] = inside


def _row_missing(case: _Packed) -> tuple[_Packed, ...]:
    """The packed tensor ends just before the last token that counts; the first tokens lie in front of it."""
    last = max((start + r.count for start, r in zip(case.starts(), case.requests) if r.count), default=0)
    return (replace(case, missing=case.starts()[-1] - last + 1, spare=0), replace(case, early=2)) if last else ()


_TOO_LONG = Precondition(
    "lengths fit the row", "seq_lens_q <= max_seq_len_q", "pad_draft_extend_query: padded_q [batch_size, max_seq_len, ...]",
    lambda c: replace(c, extra=-1, spare=0) if any(r.count for r in c.requests) else None)


def _rows_exist(source: str) -> Precondition:
    return Precondition("rows exist", "every start is at least 0, start + length at most the rows of the packed tensor", source,
                        _row_missing)


_SEQ_LENS_Q = Arg("seq_lens_q", Role.IN, ("bs",), INT, "query tokens per request", ANY_STRIDES, cells="live, slack")
_CU_SEQLENS_Q = Arg("cu_seqlens_q", Role.IN, ("bs + 1",), INT, "where each request's tokens start", ANY_STRIDES,
                    cells="live, slack")

PAD_DRAFT_EXTEND_QUERY = Contract(
    name="pad_draft_extend_query",
    family="mla_block_table",
    doc="Packed queries of unequal extends as one row per request.",
    origin="SGLang pad_draft_extend_query_kernel",
    case=PadDraftExtendQuery,
    oracle=pad_draft_extend_query,
    args=(
        Arg("q", Role.IN, ("rows", "heads", "head_dim"), FLOATS, "packed queries", FAR_ROWS, sets_size=True,
            cells="live, slack"),
        _SEQ_LENS_Q,
        _CU_SEQLENS_Q,
        Arg("padded_q", Role.OUT, ("bs", "longest", "heads", "head_dim"), FLOATS, "one row of queries per request", FAR_ROWS,
            dtype_of="q", cells="written, untouched"),
    ),
    scalars=(Scalar("bs", "requests"), Scalar("max_seq_len_q", "places per row, at least the longest request")),
    preconditions=(_TOO_LONG, _rows_exist("pad_draft_extend_query_kernel: unchecked")),
    capturable=True,
    frozen_by_capture=("bs", "max_seq_len_q"),
    upstream_names=("pad_draft_extend_query_kernel",),
)

UNPAD_DRAFT_EXTEND_OUTPUT = Contract(
    name="unpad_draft_extend_output",
    family="mla_block_table",
    doc="The padded rows of all requests, packed again.",
    origin="SGLang unpad_draft_extend_output_kernel",
    case=UnpadDraftExtendOutput,
    oracle=unpad_draft_extend_output,
    args=(
        Arg("raw_out", Role.IN, ("bs", "longest", "heads", "head_dim"), FLOATS, "one row of outputs per request", FAR_ROWS,
            cells="live, slack"),
        _CU_SEQLENS_Q,
        _SEQ_LENS_Q,
        Arg("output", Role.OUT, ("rows", "heads", "head_dim"), FLOATS, "packed outputs", FAR_ROWS,
            dtype_of="raw_out", cells="written, untouched"),
    ),
    scalars=(
        Scalar("bs", "requests"),
        Scalar("max_seq_len_q", "places per row that may hold tokens, at least the longest request"),
        Scalar("sum_seq_lens_q", "packed rows"),
    ),
    preconditions=(_TOO_LONG, _rows_exist("unpad_draft_extend_output_kernel: unchecked")),
    capturable=True,
    frozen_by_capture=("bs", "max_seq_len_q", "sum_seq_lens_q"),
    upstream_names=("unpad_draft_extend_output_kernel",),
)

PAD_SEQUENCE_WITH_MASK = Contract(
    name="pad_sequence_with_mask",
    family="mla_block_table",
    doc="Packed sequences as zero-padded rows, and a mask of the places that hold tokens.",
    origin="SGLang pad_sequence_with_mask (aiter draft extend)",
    case=PadSequenceWithMask,
    oracle=pad_sequence_with_mask,
    args=(
        Arg("input_emb", Role.IN, ("rows", "hidden"), FLOATS, "packed tokens", FAR_ROWS, sets_size=True, cells="live, slack"),
        Arg("offsets", Role.IN, ("bs",), INT, "where each sequence starts", ANY_STRIDES, cells="live, slack"),
        Arg("lengths", Role.IN, ("bs",), INT, "tokens per sequence", ANY_STRIDES, cells="live, slack"),
        Arg("output", Role.OUT, ("bs", "longest", "hidden"), FLOATS, "zero-padded rows", FAR_ROWS,
            dtype_of="input_emb", cells="written, untouched"),
        Arg("attn_mask", Role.OUT, ("places",), ("bool",), "whether a place holds a token", cells="written, untouched"),
    ),
    scalars=(Scalar("bs", "sequences"), Scalar("max_len", "places per row; longer sequences are cut")),
    preconditions=(_rows_exist("pad_sequence_with_mask_kernel: unchecked"),),
    upstream_names=("pad_sequence_with_mask_kernel",),
)

CONTRACTS = (CALC_PADDED_BLOCKS, MLA_METADATA_SIZES, MLA_METADATA, MLA_BLOCK_TABLE, MLA_MULTI_STEP_DRAFT,
             PAD_DRAFT_EXTEND_QUERY, UNPAD_DRAFT_EXTEND_OUTPUT, PAD_SEQUENCE_WITH_MASK)
