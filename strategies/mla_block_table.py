"""Cases of the mla_block_table family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.mla_block_table import (CalcPaddedBlocks, MlaBlockTable, MlaMetadata, MlaMetadataSizes, MlaMultiStepDraft,
                                     PadDraftExtendQuery, PadSequenceWithMask, Req, Tokens, UnpadDraftExtendOutput)
from strategies.common import (
    SLOT, any_slot, around, batch_floor, choice, crowd, either, lengths, made_once, many, repeats, spare)

PAGE_SIZES = (64, 32, 16, 128, 1, 2)
MODES = ("decode", "target_verify", "draft_extend")
FAR_WIDTH = 2**20
TABLES = ((4, 0), (4, 1), (5, 7), (9, 130), (4, 0), (4, FAR_WIDTH), (4096, 0), (4096, FAR_WIDTH))
REQUEST_BLOCK = 1024  # batches longer than this cross a block of requests in our kernels


def _seq(page_size: int = 64, most: int = 8300) -> st.SearchStrategy[int]:
    """Lengths around pages, and around the 4,096 tokens that a block table is padded to."""
    anything = lengths(*around(page_size, 2 * page_size, 8192), most=most)
    return either(anything, anything, choice(4096, 4095, 4097)) if most > 4096 else anything


# -- host integers and lengths ------------------------------------------------------------------------------------------


@st.composite
def calc_padded_blocks(draw) -> CalcPaddedBlocks:
    """Page sizes of every kind, also those that divide neither 128 nor 4,096."""
    page_size = draw(either(choice(64, 32, 1, 16, 128), st.integers(1, 128)))
    longest = lengths(*around(128, 4096, 8192, page_size), most=2**20)
    return CalcPaddedBlocks(tuple(draw(st.lists(longest, min_size=draw(batch_floor()), max_size=4))), page_size)


@made_once
@st.composite
def _extends(draw, seq: st.SearchStrategy[int], slots: st.SearchStrategy[int], width: int) -> Req:
    """A request with a prefix, without one, idle, or padded (one key, `width` queries)."""
    slot, extend, prefix = draw(slots), draw(st.integers(0, width)), draw(seq)
    kind = draw(choice(*("prefix",) * 5, "fresh", "padded"))
    if kind == "padded":
        return Req(slot, 1, width)
    return Req(slot, extend + (prefix if kind == "prefix" else 0), extend)


@st.composite
def mla_metadata_sizes(draw, max_requests: int = 4) -> MlaMetadataSizes:
    """Every mode; contexts that end at a multiple of 4,096 and requests that reach it."""
    mode = draw(choice(*MODES, "extend", "draft_extend"))
    width, page_size = draw(st.integers(1, 8)), draw(choice(*PAGE_SIZES))
    graph = mode != "extend" and draw(st.booleans())
    request = _extends(_seq(page_size), choice(0), width)
    batch = draw(st.lists(request, min_size=draw(batch_floor()), max_size=max_requests))
    longest = max([r.seq_len for r in batch], default=0)
    return MlaMetadataSizes(tuple(batch), mode, width, page_size, graph, draw(choice(0, 1, 100, -longest % 4096)))


@st.composite
def mla_metadata(draw, max_requests: int = 6) -> MlaMetadata:
    """Every mode, ragged and uniform draft extends, and now and then more than one block of requests."""
    mode = draw(choice(*MODES, "extend", "extend", "extend", "draft_extend", "draft_extend", "draft_extend"))
    width = draw(st.integers(1, 8))
    ragged = mode == "draft_extend" and draw(choice(True, True, False))
    seq = lengths(*around(4096), most=2**20)
    request = _real(choice(0), seq, 300) if mode == "extend" else _extends(seq, choice(0), width)
    batch = draw(st.lists(request, min_size=draw(batch_floor()), max_size=max_requests))
    return MlaMetadata(tuple(batch), draw(repeats(REQUEST_BLOCK // 2 + 1)), mode, width, ragged, draw(spare()))


@made_once
def _real(slots: st.SearchStrategy[int], seq: st.SearchStrategy[int], width: int) -> st.SearchStrategy[Req]:
    """A request with at least as many keys as queries."""
    return st.builds(lambda slot, extend, prefix: Req(slot, prefix + extend, extend), slots, st.integers(0, width), seq)


# -- block tables -------------------------------------------------------------------------------------------------------


@st.composite
def _frame(draw) -> dict:
    """Everything but the requests: page size, new or captured table, widths, capacities, req_to_token."""
    slots, table_extra = draw(choice(*TABLES))
    page_size = draw(choice(*PAGE_SIZES))
    return dict(
        slots=slots, table_extra=table_extra, page_size=page_size, fresh=draw(st.booleans()),
        padded=draw(st.booleans()) if page_size >= 16 else draw(many(5)), extra=draw(choice(0, 1, 5, 64)),
        spare=draw(spare()), aligned=draw(st.booleans()), shared=draw(choice(False, False, True)),
        content=draw(st.integers(0, 255)),
    )


def _most(page_size: int) -> int:
    """Longest drawn sequence: 8,192 keys and more on pages of 16 tokens or more."""
    return 8300 if page_size >= 16 else 1100


@st.composite
def _batch(draw, request: st.SearchStrategy[Req], padding: st.SearchStrategy[Req], most: int) -> tuple[Req, ...]:
    """Real requests own distinct slots; padded ones stand behind them on any slot, also another's."""
    real = draw(st.lists(request, min_size=draw(batch_floor()), max_size=most, unique_by=SLOT))
    return (*real, *draw(st.lists(padding, max_size=draw(choice(0, 0, 2)))))


@st.composite
def mla_block_table(draw, max_requests: int = 4) -> MlaBlockTable:
    """Decode, verify, ragged and captured draft extends; tables as wide as padded or as needed."""
    frame, mode, width = draw(_frame()), draw(choice(*MODES, "draft_extend")), draw(st.integers(1, 8))
    ragged = mode == "draft_extend" and draw(choice(True, True, False))
    slots = any_slot(frame["slots"])
    request = _real(slots, _seq(frame["page_size"], _most(frame["page_size"])), width)
    batch = draw(_batch(request, st.builds(Req, slots, choice(1), choice(width)), max_requests))
    if draw(many(15)) and batch:
        frame.update(repeat=-(-65 // len(batch)), padded=False, extra=0)
        batch = tuple(replace(r, seq_len=r.extend_len + r.seq_len % 33) for r in batch)
    return MlaBlockTable(batch, mode=mode, draft_tokens=width, ragged=ragged, **frame)


@st.composite
def mla_multi_step_draft(draw, max_requests: int = 3) -> MlaMultiStepDraft:
    """2 to 8 steps, with and without the template's buffers; padded requests at position 0 or at their length."""
    frame, steps = draw(_frame()), draw(choice(2, 3, 4, 5, 3, 8))
    slots = any_slot(frame["slots"])
    seq = _seq(frame["page_size"], min(_most(frame["page_size"]), 4200))
    real = draw(st.lists(st.builds(Req, slots, seq), min_size=draw(batch_floor()), max_size=max_requests,
                         unique_by=SLOT))
    padding = draw(st.lists(st.builds(Req, slots, choice(1)), max_size=draw(choice(0, 0, 2))))
    idle = draw(choice(0, len(padding)))
    template = draw(choice(True, True, False))
    return MlaMultiStepDraft((*real, *padding), steps=steps, template=template, idle=idle, **frame)


# -- padding ------------------------------------------------------------------------------------------------------------


@st.composite
def _packed(draw, most: int = 4) -> dict:
    """Ragged, idle and equal extends; extends that differ although their sum divides evenly; rows of 1 to 520 numbers."""
    width = draw(choice(1, 2, 3, 4, 5, 8, 9, 17))
    request = st.builds(Tokens, either(st.integers(0, width), choice(width)), choice(0, 0, 0, 1, 3))
    requests = draw(st.lists(request, min_size=draw(batch_floor()), max_size=most))
    if draw(choice(False, False, True)) and len(requests) > 1:
        total = sum(r.count + r.dropped for r in requests)
        requests[-1] = replace(requests[-1], dropped=requests[-1].dropped + -total % len(requests))
    heads, head_dim = draw(choice((1, 1), (2, 3), (3, 5), (1, 64), (4, 8)))
    requests = crowd(draw, requests) if heads * head_dim <= 15 and width <= 3 else requests
    if draw(many(12)):
        heads, head_dim = draw(choice((65, 3), (2, 130), (1, 300), (4, 130)))
    return dict(requests=tuple(requests), heads=heads, head_dim=head_dim, extra=draw(choice(0, 1, 3)),
                spare=draw(spare()), content=draw(st.integers(0, 255)))


@st.composite
def pad_draft_extend_query(draw) -> PadDraftExtendQuery:
    """Extends of a draft, or a verify cut at its draft tokens."""
    return PadDraftExtendQuery(**draw(_packed()))


@st.composite
def unpad_draft_extend_output(draw) -> UnpadDraftExtendOutput:
    """The same shapes, the other way round."""
    return UnpadDraftExtendOutput(**draw(_packed()))


@st.composite
def pad_sequence_with_mask(draw) -> PadSequenceWithMask:
    """The same, and sequences longer than a row."""
    case = PadSequenceWithMask(**draw(_packed()))
    return replace(case, extra=draw(choice(case.extra, case.extra, -1, -2)))


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


def _refilled(captured, requests: tuple, content: int, **changes):
    """The captured case with other requests on tables of the same width; whether a row's rest is cleared is captured."""
    case = replace(captured, requests=requests, repeat=1, padded=False, extra=0, content=content, **changes)
    return replace(case, extra=captured.max_blocks() - case.max_blocks())


def _room(captured) -> int:
    """Keys that fit a row of the captured table."""
    return captured.max_blocks() * captured.page_size


@st.composite
def mla_block_table_replay(draw, captured: MlaBlockTable) -> MlaBlockTable:
    """As many requests as captured: some new, the rest padded."""
    count, width, most = len(captured.batch), captured.draft_tokens, min(_room(captured), 4300)
    added = width if captured.mode == "target_verify" else max(width, captured.widest) if captured.ragged else 0
    slots = any_slot(captured.slots)
    if most < added + 1:
        return replace(captured, content=draw(st.integers(0, 255)))
    seq = lengths(*around(captured.page_size), most=most - added)
    request = st.builds(lambda slot, n, extend: Req(slot, n, min(extend, n)), slots, seq, st.integers(0, width))
    real = draw(st.lists(request, max_size=count, unique_by=SLOT))
    padding = st.builds(Req, slots, choice(1), choice(width))
    batch = (*real, *draw(st.lists(padding, min_size=count - len(real), max_size=count - len(real))))
    return _refilled(captured, batch, draw(st.integers(0, 255)))


@st.composite
def mla_multi_step_draft_replay(draw, captured: MlaMultiStepDraft) -> MlaMultiStepDraft:
    """No request longer than the one captured in its place, so that the template's lists fit; the last ones may idle."""
    slots, idle = any_slot(captured.slots), draw(st.integers(0, len(captured.batch)))
    real = len(captured.batch) - idle
    batch = tuple(Req(draw(slots), draw(lengths(most=r.seq_len)) if i < real else min(r.seq_len, 1))
                  for i, r in enumerate(captured.batch))
    case = _refilled(captured, batch, draw(st.integers(0, 255)), idle=draw(choice(0, idle)), list_extra=0)
    return replace(case, list_extra=captured.entries() - case.entries())


@st.composite
def mla_metadata_replay(draw, captured: MlaMetadata) -> MlaMetadata:
    """Other lengths in the same mode; a captured draft extend keeps its width."""
    request = _real(choice(0), lengths(most=2**20), captured.draft_tokens)
    count = len(captured.requests)
    return replace(captured, requests=tuple(draw(st.lists(request, min_size=count, max_size=count))))


@st.composite
def _repacked(draw, captured):
    """Fewer kept tokens per request on the same buffers, whose sizes are captured."""
    requests = []
    for r in captured.requests:
        count = draw(st.integers(0, r.count))
        requests.append(Tokens(count, r.count + r.dropped - count))
    case = replace(captured, requests=tuple(requests), content=draw(st.integers(0, 255)), extra=0)
    return replace(case, extra=captured.longest() - case.longest())


pad_draft_extend_query_replay = unpad_draft_extend_output_replay = pad_sequence_with_mask_replay = _repacked
