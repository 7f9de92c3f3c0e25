"""Cases of the metadata_copy family."""

from dataclasses import replace

from hypothesis import strategies as st

from oracles.metadata_copy import DECODE, DRAFT_EXTEND, TARGET_VERIFY, Backend, MetadataCopy, MetadataCopyMulti
from strategies.common import around, batch_floor, choice, either, lengths, many, rounded, spare, up

PAGE_SIZES = (1, 64, 1, 2, 16, 128, 32)
PARTS = (3, 40, 5, 132, 1)  # 132: an H200
FLASHMLA = (None, PARTS, PARTS, PARTS, (0,))  # rows of its metadata; None: no split counts either
BLOCKS = around(128, 256)  # columns around the blocks of the kernels that precompute and copy
ITEM_BLOCK = 256  # batches longer than this cross a block of our kernel, and of SGLang's
ROW_BLOCK = 16  # a block of our kernel's rows
TOKENS = choice(1, 2, 0, 3, 5, 8)  # query tokens of a request


@st.composite
def _frame(draw) -> dict:
    """Everything but the requests and the backends."""
    page_size = draw(choice(*PAGE_SIZES))
    parts = draw(choice(*FLASHMLA))
    edges = choice(1, page_size, 2 * page_size)
    width = either(lengths(*around(page_size, 2 * page_size)), edges, choice(*BLOCKS))
    return dict(
        width=draw(st.integers(1025, 2100) if draw(many(10)) else width),
        page_size=page_size,
        num_splits=parts is not None,
        parts=draw(choice(*parts)) if parts else 0,
        more_rows=draw(choice(0, 0, 0, 1, 2)),
        more_columns=draw(choice(0, 0, 1, 130)),
        spare=draw(spare()),
        row_spare=draw(choice(0, 0, 1)),
        content=draw(st.integers(0, 255)),
    )


def _backends() -> st.SearchStrategy[Backend]:
    """Row pitches of its own for every backend."""
    return st.builds(Backend, columns=choice(0, 1, 5, 130), pages=choice(0, 1, 4))


def _requests(draw, frame: dict, tokens: st.SearchStrategy[int], most: int) -> tuple[int, ...]:
    """A batch; now and then one of more requests than a block of items, with narrow tables. Large batches and wide tables
    have at most one token per request, which the interpreter can take."""
    requests = tuple(draw(st.lists(tokens, min_size=draw(batch_floor()), max_size=most)))
    if draw(many(9)) and requests:
        most = draw(choice(ITEM_BLOCK, ROW_BLOCK))
        frame.update(repeat=-(-(most + 1) // len(requests)), width=frame["width"] % 35)
    large = "repeat" in frame or frame["width"] > 1024
    return tuple(min(n, 1) for n in requests) if large else requests


def _rounded(draw, frame: dict, backends: list[Backend]) -> list[Backend]:
    """The backends; now and then they and the frame have rows that all begin at multiples of 16 bytes."""
    if not draw(rounded()):
        return backends
    frame.update(width=frame["width"] + up(frame["width"]), more_columns=frame["more_columns"] // 4 * 4,
                 spare=frame["spare"] // 3 * 4)
    return [replace(b, columns=b.columns + up(b.columns)) for b in backends]


@st.composite
def fused_metadata_copy(draw, max_requests: int = 4) -> MetadataCopy:
    """Every mode: decode with as many query tokens as requests or another number, verify with one width, ragged extends."""
    mode = draw(choice(DECODE, TARGET_VERIFY, DRAFT_EXTEND))
    frame = draw(_frame())
    tokens = draw(choice(TOKENS, st.integers(0, 1), TOKENS, choice(0)))
    if mode == TARGET_VERIFY:
        tokens = choice(draw(st.integers(1, 8)))
    elif mode == DECODE and draw(st.booleans()):
        tokens = choice(1)
    requests = _requests(draw, frame, tokens, max_requests)
    other = draw(choice(-1, 0, frame["width"] // 2, frame["width"], frame["width"] + 1))
    expanded = mode != DECODE or draw(st.booleans())
    (backend,) = _rounded(draw, frame, [draw(_backends())])
    return MetadataCopy(requests, forward_mode=mode, other_width=other, expanded=expanded, backend=backend, **frame)


@st.composite
def fused_metadata_copy_multi(draw, max_requests: int = 4) -> MetadataCopyMulti:
    """1 to 6 backends, some of them without a real page table or FlashMLA buffers."""
    frame = draw(_frame())
    tokens = draw(choice(choice(1), TOKENS))
    requests = _requests(draw, frame, tokens, max_requests)
    large = "repeat" in frame or frame["width"] > 1024
    count = min(draw(choice(1, 2, 3, 4, 2, 3, 5, 6)), 2 if large else 6)
    backends = draw(st.lists(_backends(), min_size=count, max_size=count))
    if len(backends) > 1:
        for feature in draw(choice((), (), ("real",), ("flashmla",), ("real", "flashmla"))):
            lacks = draw(st.lists(st.integers(0, len(backends) - 1), min_size=1, max_size=len(backends) - 1, unique=True))
            backends = [replace(b, **{feature: k not in lacks}) for k, b in enumerate(backends)]
    return MetadataCopyMulti(requests, backends=tuple(_rounded(draw, frame, backends)), **frame)


# -- replays on the buffers of a captured case --------------------------------------------------------------------------


def _on_the_buffers(captured, requests: tuple[int, ...], width: int, content: int):
    """Another batch of as many requests and no more rows, on destinations of the captured sizes."""
    case = replace(captured, requests=requests, repeat=1, width=width, content=content, row_spare=0, more_columns=0)
    return replace(case, row_spare=captured.row_spare + captured.n() - case.n())


def _grown(backend: Backend, captured, case) -> Backend:
    return replace(backend, columns=backend.columns + captured.width - case.width,
                   pages=backend.pages + captured.pages() - case.pages())


@st.composite
def _replayed(draw, captured):
    """The tables shrink and grow, an extend accepts fewer tokens or none; now and then over the contents of before."""
    requests = captured.batch
    if captured.mode == DRAFT_EXTEND:
        requests = tuple(draw(st.integers(0, tokens)) for tokens in requests)
    width = draw(either(choice(0, captured.width), lengths(most=captured.width)))
    content = draw(either(choice(captured.content), st.integers(0, 255)))
    return _on_the_buffers(captured, requests, width, content)


@st.composite
def fused_metadata_copy_replay(draw, captured: MetadataCopy) -> MetadataCopy:
    """Another batch on the same buffers; verify and decode keep their rows, an extend accepts fewer tokens."""
    case = draw(_replayed(captured))
    return replace(case, backend=_grown(captured.backend, captured, case))


@st.composite
def fused_metadata_copy_multi_replay(draw, captured: MetadataCopyMulti) -> MetadataCopyMulti:
    """Another decode batch on the same buffers."""
    case = draw(_replayed(captured))
    return replace(case, backends=tuple(_grown(b, captured, case) for b in captured.backends))
