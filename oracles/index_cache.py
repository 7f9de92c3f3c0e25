"""The indexer's key cache and the quantised MLA latents: byte layouts, gathers, stores and quantisation.

| transform                | fills           | from                                                        |
| ------------------------ | --------------- | ----------------------------------------------------------- |
| get_k                    | k_out           | buf, page_indices of one request                            |
| get_s                    | s_out           | buf, page_indices of one request                            |
| get_k_and_s              | k_out, s_out    | buf, page_indices and seq_lens of a batch                   |
| set_k_and_s              | buf             | loc, index_k, index_k_scale                                 |
| fused_store_index_cache  | buf             | key (bfloat16, quantised on the way), loc                   |
| quantize_k_cache         | quant_k_cache   | cache_k                                                     |
| dequantize_k_cache       | k_cache         | quant_k_cache                                               |
| dequantize_k_cache_paged | k_cache         | quant_k_cache, page_table_1_flattened                       |

A page of the index cache `buf` holds page_size tokens: first 128 bytes of e4m3 key for each of them, then 4 bytes of
float32 scale (little endian) for each. Slot `l` is token `l % page_size` of page `l // page_size`.

A row of `quant_k_cache` holds one token's latent in 656 bytes: 512 e4m3, 4 float32 scales (one per tile of 128), and the
64 bfloat16 of the rotary part as they are.

Quantised numbers are judged by what they mean, code times scale: within half a step of e4m3 of the number that came in. So
either neighbour of a tie is right, and a byte in the wrong place is not.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import floats, hashing
from harness.contract import (ANY_STRIDES, INT, ROWS_STRIDED, Arg, Case, Contract, Precondition, Role, Scalar, Variant,
                              beyond)
from harness.states import Judge
from harness.tensors import Input, Output, Region, Span, dense, runs, table, vector

HEAD_DIM, SCALE_BYTES = 128, 4
TOKEN_BYTES = HEAD_DIM + SCALE_BYTES
FP8_MAX = 448.0
LEAST_ABSMAX = 1e-4  # of an index key: the scale of a zero key is not zero
TILE, NOPE, ROPE = 128, 512, 64
TILES = NOPE // TILE
LATENT, LATENT_BYTES = NOPE + ROPE, NOPE + 4 * TILES + 2 * ROPE
SCALE_ERROR = 2.0**-21  # of a scale: a division or a multiplication by a reciprocal in float32, 4 units in the last place
PRODUCT_ERROR = 2.0**-20  # of x * (1 / scale) in float32, where it decides which neighbour of a tie is taken
LEAST_INVERTIBLE = 2.0**-128  # 1 / scale overflows float32 from here down

BYTE_ROWS = ("contiguous", "offset", "pitched")  # a page or a token is one run of bytes
FAR_ROWS = (*BYTE_ROWS, "far")
FAR_STRIDED = (*ROWS_STRIDED, "far")


def key_bytes(token: int, count: int = 1) -> slice:
    """Where the keys of `count` tokens lie in a page."""
    return slice(token * HEAD_DIM, (token + count) * HEAD_DIM)


def scale_bytes(page_size: int, token: int, count: int = 1) -> slice:
    """Where the scales of `count` tokens lie in a page."""
    first = page_size * HEAD_DIM
    return slice(first + token * SCALE_BYTES, first + (token + count) * SCALE_BYTES)


# -- what quantised numbers may be --------------------------------------------------------------------------------------


def half_step(size: np.ndarray) -> np.ndarray:
    """Half the distance between the e4m3 numbers around each `size`.

    >>> half_step(np.array([1.0, 1.99, 448.0, 0.001, 0.0])).tolist()
    [0.0625, 0.0625, 16.0, 0.0009765625, 0.0009765625]
    """
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)  # below 2^-6 the steps stay as they are
    return np.where(size == 0, 2.0**-10, 2.0 ** (exponent - 4.0))


def nearest_scale(x: np.ndarray, least: float = 0.0) -> float:
    """The scale that takes the largest number of `x` to the largest of e4m3."""
    return max(float(np.max(np.abs(x))), least) / FP8_MAX


def scale_complaint(scale: float, expected: float, rule: str) -> str | None:
    """What is wrong with a stored scale.

    fp32  the expected one, within 4 units in the last place
    bf16  the expected one, rounded to bfloat16
    ue8m0 the least power of two that is not smaller, where "smaller" is known to 4 units in the last place
    """
    if rule == "ue8m0":
        power = scale > 0 and math.frexp(scale)[0] == 0.5
        fits = expected * (1 - SCALE_ERROR) <= scale < 2 * expected * (1 + SCALE_ERROR)
        return None if power and fits else f"the scale is {scale}, must be the least power of two from {expected} on"
    bound = max(expected * (2.0**-8 if rule == "bf16" else SCALE_ERROR), 2.0**-149)
    return None if abs(scale - expected) <= bound else f"the scale is {scale}, must be {expected} within {bound}"


def codes_complaint(codes: np.ndarray, scale: float, x: np.ndarray) -> str | None:
    """What is wrong with the stored codes, given the stored scale: every code times scale is the nearest to its number."""
    meant = floats.decode(codes, "float8_e4m3fn") * scale
    sizes = np.abs(x) / scale * (1 + PRODUCT_ERROR) if scale else np.zeros(len(x))
    bounds = half_step(sizes) * scale + np.abs(x) * PRODUCT_ERROR
    wrong = np.flatnonzero(~(np.abs(meant - x) <= bounds))
    if not len(wrong):
        return None
    j = wrong[0]
    return f"number {j} is {meant[j]} (code 0x{int(codes[j]):02x}, scale {scale}), must be {x[j]} within {bounds[j]}"


def quantised(x: np.ndarray, least: float = 0.0, rule: str = "fp32") -> Judge:
    """Judges the codes of `x` followed by the 4 bytes of their scale."""

    def complaint(actual: np.ndarray) -> str | None:
        scale = stored_scale(actual[len(x) :])
        wrong = scale_complaint(scale, nearest_scale(x, least), rule)
        return wrong or codes_complaint(actual[: len(x)].astype(np.uint8), scale, x)

    return Judge("quantised", complaint)


def scale_only(x: np.ndarray, rule: str) -> Judge:
    """Judges the 4 bytes of a scale whose codes are nobody's business."""
    return Judge("scale", lambda actual: scale_complaint(stored_scale(actual), nearest_scale(x), rule))


def stored_scale(four_bytes: np.ndarray) -> float:
    """The little-endian float32 in 4 bytes.

    >>> stored_scale(np.array([0, 0, 0x80, 0x3F]))
    1.0
    """
    return float(four_bytes.astype(np.uint8).view("<f4")[0])


# -- numbers to quantise ------------------------------------------------------------------------------------------------

KINDS = ("random", "zero", "outlier", "edge", "ties", "tiny", "huge")


def numbers(kind: str, seed: int, name: str, count: int = 128) -> np.ndarray:
    """Finite bfloat16 numbers.

    random   of every sign and of many magnitudes            outlier  one number far larger than the others
    edge     the largest is 448 times a power of two, so that the scale is a power of two
    ties     the same with scale 1, the others halfway between two e4m3 numbers
    tiny     subnormal in bfloat16; their scale has no float32 reciprocal
    huge     near the largest bfloat16
    """
    raw = hashing.cells(seed, name, np.arange(count)).astype(np.uint64)
    sign = np.where(raw & np.uint64(1), -1.0, 1.0)
    fraction = (128 + (raw >> np.uint64(1)) % np.uint64(128)).astype(np.float64) / 128
    exponent = ((raw >> np.uint64(20)) % np.uint64(17)).astype(np.float64) - 8
    top = int(raw[0] >> np.uint64(40)) % count
    x = sign * fraction * 2.0**exponent
    if kind == "zero":
        return np.zeros(count)
    if kind == "outlier":
        x = x / 2.0**12
        x[top] = sign[top] * 48.0
    elif kind == "edge":
        x[top] = sign[top] * FP8_MAX * 2.0 ** (2 + exponent[top])
        x = np.where(np.abs(x) > abs(x[top]), 0.0, x)
    elif kind == "ties":
        steps = 2 * ((raw >> np.uint64(1)) % np.uint64(8)).astype(np.float64) + 17
        x = sign * steps * 2.0 ** np.minimum(exponent // 2, 3)
        x[top] = sign[top] * FP8_MAX
    elif kind == "tiny":
        x = sign * ((raw >> np.uint64(1)) % np.uint64(128)).astype(np.float64) * 2.0**-133
        x[top] = 2.0**-127
    elif kind == "huge":
        x = x * 2.0**119
    return x


# -- reading the index cache --------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _IndexCache(Case):
    """An index cache of `pages` pages. `content`: which bytes and which page tables."""

    page_size: int = 1
    pages: int = 4
    content: int = 0
    spare: int = 0

    def page_bytes(self) -> int:
        return self.page_size * TOKEN_BYTES

    def pages_of(self, owner: int, count: int) -> list[int]:
        """The first `count` pages of a request; the first and the last page of the cache come up often."""
        raw = hashing.cells(self.content, f"pages of {owner}", np.arange(count)).tolist()
        return [{0: 0, 1: self.pages - 1}.get(r % 8, (r >> 8) % self.pages) for r in raw]

    def cache(self, tokens: dict[int, int], keys: bool = True, scales: bool = True) -> Input:
        """The first `tokens[p]` tokens of page p are LIVE, the rest of those pages SLACK, every other page FORBIDDEN."""
        pitch, spans = self.page_bytes(), []
        for page, count in sorted(tokens.items()):
            if 0 <= page < self.pages:
                start = end = page * pitch
                for part in [key_bytes(0, count)] * keys + [scale_bytes(self.page_size, 0, count)] * scales:
                    first, last = start + part.start, start + part.stop
                    spans += [Span(end, first, Region.SLACK), Span(first, last, Region.LIVE, self.bytes_at(first, last))]
                    end = last
                spans.append(Span(end, start + pitch, Region.SLACK))
        return Input((self.pages, pitch), tuple(s for s in spans if s.stop > s.start))

    def bytes_at(self, first: int, last: int) -> np.ndarray:
        """What the cache holds there."""
        return (hashing.cells(self.content, "cache", np.arange(first, last)) & np.uint64(255)).astype(np.int64)


@dataclass(frozen=True, repr=False)
class GetK(_IndexCache):
    """`seq_len` tokens of one request. `first_page` replaces its first page; `missing` page indices are left out."""

    seq_len: int = 0
    first_page: int | None = None
    missing: int = 0

    def needed(self) -> int:
        return -(-self.seq_len // self.page_size)

    def batch_size(self) -> int:
        return self.needed()

    def dims(self) -> dict[str, int]:
        return {"pages": 1, "page_bytes": self.page_bytes(), "needed": self.needed(), "tokens": self.seq_len}

    @cached_property
    def page_indices(self) -> list[int]:
        pages = self.pages_of(0, self.needed())
        return pages if self.first_page is None else [self.first_page, *pages[1:]]

    def live(self) -> dict[int, int]:
        tokens: dict[int, int] = {}
        for j, page in enumerate(self.page_indices):
            tokens[page] = max(tokens.get(page, 0), min(self.page_size, self.seq_len - j * self.page_size))
        return tokens

    def arguments(self) -> dict:
        return {
            "buf": self.cache(self.live(), scales=False),
            "page_indices": vector(self.page_indices[: self.needed() - self.missing], self.spare),
            "k_out": Output((self.seq_len + self.spare, HEAD_DIM)),
            "seq_len": self.seq_len, "page_size": self.page_size,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "page_indices":
            return f"page {index[0]} of the request"
        if name == "buf":
            return f"page {index[0]}"
        if index[0] >= self.seq_len:
            return f"it is past the request's {self.seq_len} tokens"
        page, token = self.page_indices[index[0] // self.page_size], index[0] % self.page_size
        return f"token {token} of page {page}"


@dataclass(frozen=True, repr=False)
class GetS(GetK):
    """The same for the scales."""

    def arguments(self) -> dict:
        arguments = super().arguments()
        del arguments["k_out"]
        arguments["buf"] = self.cache(self.live(), keys=False)
        arguments["s_out"] = Output((self.seq_len + self.spare, SCALE_BYTES))
        return arguments


def get_k(*, buf, page_indices, k_out, seq_len, page_size, variant):
    """Row t is the 128 key bytes of token t.

    Two tokens a page, three tokens: the whole of page 1, and the first token of page 0.

    >>> from harness.states import Cells
    >>> buf = np.arange(2 * 264).reshape(2, 264) % 256
    >>> out = Cells((3, 128))
    >>> get_k(buf=buf, page_indices=[1, 0], k_out=out, seq_len=3, page_size=2, variant={})
    >>> out.value[:, 0].tolist(), out.value[:, 127].tolist()
    ([8, 136, 0], [135, 7, 127])
    """
    for t in range(seq_len):
        k_out[t, :] = buf[page_indices[t // page_size], key_bytes(t % page_size)]


def get_s(*, buf, page_indices, s_out, seq_len, page_size, variant):
    """Row t is the 4 scale bytes of token t; they lie behind all keys of the page.

    >>> from harness.states import Cells
    >>> buf = np.arange(2 * 264).reshape(2, 264) % 256
    >>> out = Cells((3, 4))
    >>> get_s(buf=buf, page_indices=[1, 0], s_out=out, seq_len=3, page_size=2, variant={})
    >>> out
    Cells([8 9 10 11]
          [12 13 14 15]
          [0 1 2 3])
    """
    for t in range(seq_len):
        s_out[t, :] = buf[page_indices[t // page_size], scale_bytes(page_size, t % page_size)]


@dataclass(frozen=True)
class Req:
    """A request of `seq_len` cached tokens."""

    seq_len: int


@dataclass(frozen=True, repr=False)
class GetKAndS(_IndexCache):
    """`requests`, `repeat` times over.

    shared      whether all requests have the same pages (a common prefix)
    max_extra   max_seq_len beyond the longest request
    width_extra table columns beyond what the longest request needs;   columns_missing  table columns left out
    sum_missing how far seq_len_sum falls short;   first_page  replaces the first page of the first request
    """

    requests: tuple[Req, ...] = ()
    repeat: int = 1
    shared: bool = False
    max_extra: int = 0
    width_extra: int = 0
    columns_missing: int = 0
    sum_missing: int = 0
    first_page: int | None = None

    @cached_property
    def batch(self) -> tuple[Req, ...]:
        return self.requests * self.repeat

    def needed(self, i: int) -> int:
        return -(-self.batch[i].seq_len // self.page_size)

    def longest(self) -> int:
        return max([r.seq_len for r in self.batch], default=0)

    def total(self) -> int:
        return sum(r.seq_len for r in self.batch) - self.sum_missing

    def width(self) -> int:
        return -(-self.longest() // self.page_size) + self.width_extra - self.columns_missing

    def batch_size(self) -> int:
        return len(self.batch)

    def dims(self) -> dict[str, int]:
        return {"pages": 1, "page_bytes": self.page_bytes(), "bs": len(self.batch), "width": 0, "tokens": self.total()}

    def row(self, i: int) -> list[int]:
        """The pages of request i."""
        pages = self.pages_of(0 if self.shared else i, self.needed(i))
        return pages if self.first_page is None or i else [self.first_page, *pages[1:]]

    def arguments(self) -> dict:
        tokens: dict[int, int] = {}
        rows = {}
        for i, r in enumerate(self.batch):
            rows[i] = self.row(i)[: self.width()]
            for j, page in enumerate(rows[i]):
                tokens[page] = max(tokens.get(page, 0), min(self.page_size, r.seq_len - j * self.page_size))
        return {
            "buf": self.cache(tokens),
            "page_indices": table((len(self.batch), self.width()), rows),
            "seq_lens": vector([r.seq_len for r in self.batch]),
            "k_out": Output((self.total() + self.spare, HEAD_DIM)),
            "s_out": Output((self.total() + self.spare, SCALE_BYTES)),
            "seq_len_sum": self.total(), "max_seq_len": self.longest() + self.max_extra, "page_size": self.page_size,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name in ("seq_lens", "page_indices"):
            return f"request {index[0]}"
        if name == "buf":
            return f"page {index[0]}"
        first = 0
        for i, r in enumerate(self.batch):
            if index[0] < first + r.seq_len:
                token = index[0] - first
                return f"token {token} of request {i}, in page {self.row(i)[token // self.page_size]}"
            first += r.seq_len
        return f"it is past the batch's {first} tokens"


def get_k_and_s(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size, variant):
    """The keys and scales of every request, one request behind the other.

    >>> from harness.states import Cells
    >>> buf = np.arange(3 * 132).reshape(3, 132) % 256
    >>> k, s = Cells((4, 128)), Cells((4, 4))
    >>> get_k_and_s(buf=buf, page_indices=np.array([[2, 0], [1, 9]]), seq_lens=[2, 1], k_out=k, s_out=s, seq_len_sum=3,
    ...             max_seq_len=2, page_size=1, variant={})
    >>> k.value[:, 0].tolist(), k.state[:, 0].tolist()
    ([8, 0, 132, 0], [1, 1, 1, 0])
    >>> s
    Cells([136 137 138 139]
          [128 129 130 131]
          [4 5 6 7]
          [. . . .])
    """
    row = 0
    for i in range(len(seq_lens)):
        for first in range(0, seq_lens[i], page_size):
            page, count = page_indices[i, first // page_size], min(page_size, seq_lens[i] - first)
            k_out[row : row + count] = buf[page, key_bytes(0, count)].reshape(count, HEAD_DIM)
            s_out[row : row + count] = buf[page, scale_bytes(page_size, 0, count)].reshape(count, SCALE_BYTES)
            row += count


# -- writing the index cache --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token to store in slot `loc`. `kind`: which numbers its key has (see `numbers`)."""

    loc: int
    kind: str = "random"


@dataclass(frozen=True, repr=False)
class SetKAndS(_IndexCache):
    """`tokens`, then `padded` tokens of a padded batch: they all go to slot 0, which holds nothing that is read, and are
    equal, as the stores of one slot have no order. `last`: slots count from the end of the cache. `spare`: rows of the
    payload behind them; the number of tokens is that of `loc`."""

    tokens: tuple[Token, ...] = ()
    padded: int = 0
    last: bool = False

    @cached_property
    def stored(self) -> tuple[Token, ...]:
        end = self.pages * self.page_size - 1
        placed = tuple(replace(t, loc=end - t.loc) for t in self.tokens) if self.last else self.tokens
        return placed + (Token(0),) * self.padded

    def batch_size(self) -> int:
        return len(self.stored)

    def dims(self) -> dict[str, int]:
        return {"pages": 1, "page_bytes": self.page_bytes(), "tokens": len(self.stored)}

    def label(self, i: int) -> str:
        return f"token {i}" if i < len(self.tokens) else "padding"

    def codes(self, i: int) -> np.ndarray:
        raw = hashing.cells(self.content, f"{self.label(i)}'s key", np.arange(HEAD_DIM))
        return (raw & np.uint64(255)).astype(np.uint8)

    def scale(self, i: int) -> float:
        raw = int(hashing.cells(self.content, f"{self.label(i)}'s scale", np.arange(1))[0])
        return float(np.float32((1 + raw % 2**23 / 2**23) * 2.0 ** (raw % 41 - 20)))

    def buffer(self) -> Output:
        return Output((self.pages, self.page_bytes()))

    def payload(self, rows: list[np.ndarray]) -> Input:
        """A key for every token, then the spare rows."""
        live = {i * HEAD_DIM: row for i, row in enumerate(rows)}
        return runs((len(rows) + self.spare, HEAD_DIM), live, Region.SLACK)

    def arguments(self) -> dict:
        count = len(self.stored)
        keys = [floats.decode(self.codes(i), "float8_e4m3fn") for i in range(count)]
        return {
            "buf": self.buffer(),
            "loc": vector([t.loc for t in self.stored]),
            "index_k": self.payload(keys),
            "index_k_scale": vector(np.array([self.scale(i) for i in range(count)], dtype=np.float64), self.spare),
            "page_size": self.page_size,
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name != "buf":
            count = len(self.stored)
            return f"token {index[0]}" if index[0] < count else f"it is past the {count} tokens"
        page, byte = index
        keys = self.page_size * HEAD_DIM
        token = byte // HEAD_DIM if byte < keys else (byte - keys) // SCALE_BYTES
        part = f"key byte {byte % HEAD_DIM}" if byte < keys else f"scale byte {(byte - keys) % SCALE_BYTES}"
        return f"{part} of slot {page * self.page_size + token}"


@dataclass(frozen=True, repr=False)
class FusedStoreIndexCache(SetKAndS):
    """Keys in bfloat16. `ue8m0`: scales are powers of two."""

    ue8m0: bool = False

    def arguments(self) -> dict:
        arguments = super().arguments()
        del arguments["index_k"], arguments["index_k_scale"]
        keys = [numbers(t.kind, self.content, f"{self.label(i)}'s key") for i, t in enumerate(self.stored)]
        arguments["key"] = self.payload(keys)
        arguments["scale_fmt"] = "ue8m0" if self.ue8m0 else None
        return arguments


def set_k_and_s(*, buf, loc, index_k, index_k_scale, page_size, variant):
    """Token i's key and scale into slot loc[i]; nothing else of the page changes.

    Two tokens a page; slot 3 is the second token of page 1. A scale of 1.0 is the bytes 0, 0, 0x80, 0x3f.

    >>> from harness.states import Cells
    >>> buf = Cells((2, 264))
    >>> set_k_and_s(buf=buf, loc=[3], index_k=np.full((1, 128), 1.5), index_k_scale=[1.0], page_size=2, variant={})
    >>> buf.value[1, 128:256].tolist() == [0x3C] * 128, buf.value[1, 260:264].tolist()
    (True, [0, 0, 128, 63])
    >>> int(buf.state.sum())  # and no other cell
    132
    """
    for i in range(len(loc)):
        page, token = loc[i] // page_size, loc[i] % page_size
        keys, scales = (page, key_bytes(token)), (page, scale_bytes(page_size, token))
        if _padding(loc, i):
            buf.free(keys, "slot 0 takes the padded tokens")
            buf.free(scales, "slot 0 takes the padded tokens")
        else:
            buf[keys] = floats.encode(index_k[i, 0:HEAD_DIM], "float8_e4m3fn")
            buf[scales] = np.array([index_k_scale[i]], dtype="<f4").view(np.uint8)


def fused_store_index_cache(*, buf, key, loc, page_size, scale_fmt, variant):
    """Token i's key, quantised with one scale of its own, into slot loc[i].

    The scale takes the largest number of the key, but at least 1e-4, to 448: here 224 / 448. `ue8m0` takes the least
    power of two from there on.

    >>> from harness.states import Cells
    >>> buf = Cells((1, 132))
    >>> key = np.zeros((1, 128)); key[0, :2] = [224.0, -1.0]
    >>> fused_store_index_cache(buf=buf, key=key, loc=[0], page_size=1, scale_fmt=None, variant={})
    >>> right = np.zeros(132, np.uint8); right[:2] = [0x7E, 0xC0]; right[128:] = [0, 0, 0, 0x3F]
    >>> buf.judges[0][1].complaint(right)  # 448 * 0.5, -2 * 0.5, and the scale 0.5
    >>> right[131] = 0x40
    >>> buf.judges[0][1].complaint(right)
    'the scale is 2.0, must be 0.5 within 2.384185791015625e-07'
    """
    rule = "fp32" if scale_fmt is None else scale_fmt
    for i in range(len(loc)):
        page, token = loc[i] // page_size, loc[i] % page_size
        cells = np.r_[key_bytes(token), scale_bytes(page_size, token)]
        if _padding(loc, i):
            buf.free((page, cells), "slot 0 takes the padded tokens")
        else:
            buf.judge((page, cells), quantised(key[i, 0:HEAD_DIM], LEAST_ABSMAX, rule))


def _padding(loc, i: int) -> bool:
    """Whether a token is padding: several tokens have slot 0."""
    return loc[i] == 0 and sum(1 for other in loc if other == 0) > 1


# -- MLA latents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latent:
    """One token's latent: which numbers its four tiles have (see `numbers`)."""

    tiles: tuple[str, ...] = ("random", "random", "random", "random")


@dataclass(frozen=True, repr=False)
class QuantizeKCache(Case):
    """Latents to quantise, `repeat` times over."""

    latents: tuple[Latent, ...]
    repeat: int = 1
    content: int = 0
    spare: int = 0

    @cached_property
    def all(self) -> tuple[Latent, ...]:
        return self.latents * self.repeat

    def batch_size(self) -> int:
        return len(self.all)

    def dims(self) -> dict[str, int]:
        return {"tokens": len(self.all)}

    def latent(self, i: int) -> np.ndarray:
        tiles = [numbers(kind, self.content, f"tile {t} of token {i}") for t, kind in enumerate(self.all[i].tiles)]
        return np.concatenate([*tiles, numbers("random", self.content, f"rope of token {i}", ROPE)])

    def arguments(self) -> dict:
        count = len(self.all)
        rows = np.array([self.latent(i) for i in range(count)], dtype=np.float64).reshape(count, LATENT)
        return {"cache_k": dense(rows), "quant_k_cache": Output((count + self.spare, LATENT_BYTES))}

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if index[0] >= len(self.all):
            return f"it is past the {len(self.all)} tokens"
        return f"token {index[0]}" if name == "cache_k" else f"{part_of_latent(index[1])} of token {index[0]}"


def part_of_latent(byte: int) -> str:
    """What a byte of a quantised latent belongs to."""
    if byte < NOPE:
        return f"number {byte % TILE} of tile {byte // TILE}"
    if byte < NOPE + 4 * TILES:
        return f"byte {byte % 4} of the scale of tile {(byte - NOPE) // 4}"
    return f"byte {byte % 2} of rotary number {(byte - NOPE - 4 * TILES) // 2}"


def quantize_k_cache(*, cache_k, quant_k_cache, variant):
    """512 numbers in four tiles with a scale each; the 64 rotary ones are copied.

    >>> from harness.states import Cells
    >>> out = Cells((1, 656))
    >>> row = np.zeros((1, 576)); row[0, 0], row[0, 512] = 448.0, 1.0
    >>> quantize_k_cache(cache_k=row, quant_k_cache=out, variant={"scale": "fp32", "tiny": "exact"})
    >>> [name for name, judge in zip("0123", out.judges)], out.value[0, 528:532].tolist()
    (['0', '1', '2', '3'], [128, 63, 0, 0])
    >>> tile = np.zeros(132, np.uint8); tile[0], tile[130:] = 0x7E, [0x80, 0x3F]
    >>> out.judges[0][1].complaint(tile)
    """
    for i in range(len(cache_k)):
        for t in range(TILES):
            x = cache_k[i, t * TILE : (t + 1) * TILE]
            codes = np.arange(t * TILE, (t + 1) * TILE)
            scale = np.arange(NOPE + 4 * t, NOPE + 4 * t + 4)
            if variant["tiny"] == "undefined" and nearest_scale(x) <= LEAST_INVERTIBLE:
                quant_k_cache.free((i, codes), "1 / scale is infinite")
                quant_k_cache.judge((i, scale), scale_only(x, variant["scale"]))
            else:
                quant_k_cache.judge((i, np.r_[codes, scale]), quantised(x, rule=variant["scale"]))
        quant_k_cache[i, NOPE + 4 * TILES :] = floats.encode(cache_k[i, NOPE:], "bfloat16").astype("<u2").view(np.uint8)


@dataclass(frozen=True)
class Slot:
    """A token of a request, by its slot in the cache."""

    slot: int


@dataclass(frozen=True, repr=False)
class DequantizeKCache(Case):
    """`count` quantised latents. `nan`: some codes mean NaN, as a quantiser leaves that divided zero by zero."""

    count: int
    content: int = 0
    spare: int = 0
    nan: bool = False

    def batch_size(self) -> int:
        return self.count

    def dims(self) -> dict[str, int]:
        return {"tokens": self.count}

    def row(self, slot: int) -> np.ndarray:
        """The 656 bytes of a slot: any code, finite scales of many magnitudes, any rotary number."""
        raw = hashing.cells(self.content, f"slot {slot}", np.arange(LATENT_BYTES))
        row = (raw & np.uint64(255)).astype(np.uint8)
        if not self.nan:
            row[:NOPE] = np.where(row[:NOPE] & 127 == 127, row[:NOPE] ^ 1, row[:NOPE])
        exponents = (raw[:TILES] >> np.uint64(8)) % np.uint64(81)
        scales = (1 + (raw[:TILES] >> np.uint64(20)) % np.uint64(2**23) / 2**23) * 2.0 ** (exponents.astype(np.float64) - 40)
        row[NOPE : NOPE + 4 * TILES] = scales.astype("<f4").view(np.uint8)
        return row.astype(np.int64)

    def arguments(self) -> dict:
        rows = np.array([self.row(i) for i in range(self.count)], dtype=np.int64).reshape(self.count, LATENT_BYTES)
        return {"quant_k_cache": dense(rows), "k_cache": Output((self.count + self.spare, LATENT))}

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "quant_k_cache":
            return f"{part_of_latent(index[1])} of slot {index[0]}"
        return f"token {index[0]}" if index[0] < self.count else f"it is past the {self.count} tokens"


@dataclass(frozen=True, repr=False)
class DequantizeKCachePaged(DequantizeKCache):
    """The latents of `tokens` from a cache of `slots` slots. `from_end`: slots count from the end of the cache."""

    count: int = 0
    tokens: tuple[Slot, ...] = ()
    slots: int = 8
    from_end: bool = False

    @cached_property
    def table(self) -> list[int]:
        return [self.slots - 1 - t.slot if self.from_end else t.slot for t in self.tokens]

    def batch_size(self) -> int:
        return len(self.tokens)

    def dims(self) -> dict[str, int]:
        return {"slots": 1, "tokens": len(self.tokens)}

    def arguments(self) -> dict:
        live = {s * LATENT_BYTES: self.row(s) for s in set(self.table) if 0 <= s < self.slots}
        return {
            "quant_k_cache": runs((self.slots, LATENT_BYTES), live),
            "page_table_1_flattened": vector(self.table),
            "k_cache": Output((len(self.tokens) + self.spare, LATENT)),
        }

    def meaning(self, name: str, index: tuple[int, ...]) -> str:
        if name == "quant_k_cache":
            return f"{part_of_latent(index[1])} of slot {index[0]}"
        past = index[0] >= len(self.tokens)
        return f"it is past the {len(self.tokens)} tokens" if past else f"token {index[0]}, slot {self.table[index[0]]}"


def dequantize_k_cache(*, quant_k_cache, k_cache, variant):
    """Code times scale, to bfloat16; the rotary numbers are copied.

    >>> from harness.states import Cells
    >>> row = np.zeros((1, 656), np.int64); row[0, :2], row[0, 514:516], row[0, 528:530] = [0x38, 0x7F], [0x80, 0x3F], [0, 0x40]
    >>> out = Cells((2, 576))
    >>> dequantize_k_cache(quant_k_cache=row, k_cache=out, variant={})
    >>> out.judges[0][1].complaint(np.r_[1.0, np.zeros(126)])  # code 0x38 is 1, the scale 1.0; NaN is apart
    >>> out.value[0, 1], out.value[0, 512]
    (np.float64(nan), np.float64(2.0))
    """
    for i in range(len(quant_k_cache)):
        _dequantize(quant_k_cache[i, 0:LATENT_BYTES], k_cache, i)


def dequantize_k_cache_paged(*, quant_k_cache, page_table_1_flattened, k_cache, variant):
    """The same for the slots that the table names, in its order, as often as it names them.

    >>> from harness.states import Cells
    >>> cache = np.zeros((3, 656), np.int64); cache[2, 528:530] = [0x80, 0x3F]
    >>> out = Cells((2, 576))
    >>> dequantize_k_cache_paged(quant_k_cache=cache, page_table_1_flattened=[2, 0], k_cache=out, variant={})
    >>> out.value[:, 512].tolist()
    [1.0, 0.0]
    """
    for i in range(len(page_table_1_flattened)):
        _dequantize(quant_k_cache[page_table_1_flattened[i], 0:LATENT_BYTES], k_cache, i)


def _dequantize(row, k_cache, i: int) -> None:
    for t in range(TILES):
        scale = stored_scale(row[NOPE + 4 * t : NOPE + 4 * t + 4])
        columns = np.arange(t * TILE, (t + 1) * TILE)
        meant = floats.decode(row[columns].astype(np.uint8), "float8_e4m3fn") * scale
        known = ~np.isnan(meant)
        k_cache[i, columns[~known]] = meant[~known]
        k_cache.judge((i, columns[known]), to_bfloat16(meant[known]))
    rope = np.ascontiguousarray(row[NOPE + 4 * TILES :]).astype(np.uint8).view("<u2")
    k_cache[i, NOPE:] = floats.decode(rope, "bfloat16")


def to_bfloat16(expected: np.ndarray) -> Judge:
    """The nearest bfloat16, where a product rounded to float32 first may take either neighbour of a tie.

    >>> to_bfloat16(np.array([1.0, 1.01171875])).complaint(np.array([1.0, 1.015625]))
    >>> to_bfloat16(np.array([1.01])).complaint(np.array([1.0]))
    'number 0 is 1.0, must be 1.01 to the nearest bfloat16'
    """

    def complaint(actual: np.ndarray) -> str | None:
        low, high = (floats.rounded(expected * (1 + e), "bfloat16") for e in (-(2.0**-23), 2.0**-23))
        bad = np.flatnonzero((actual != low) & (actual != high))
        return f"number {bad[0]} is {actual[bad[0]]}, must be {expected[bad[0]]} to the nearest bfloat16" if len(bad) else None

    return Judge("to_bfloat16", complaint)


# -- contracts ----------------------------------------------------------------------------------------------------------

_BUF_DOC = "the index cache: keys, then scales, of every page"
_PAGE_SIZE = Scalar("page_size", "tokens per page")
_PAGES_EXIST = Precondition("pages exist", "0 <= page_indices < buf.shape[0]", "index_buf_accessor: unchecked",
                            lambda c: tuple(replace(c, first_page=p) for p in beyond(c.pages)
                                            if c.batch_size() and _has_a_page(c)))
_PAGES_COVER = Precondition("the pages cover seq_len", "len(page_indices) * page_size >= seq_len", "_get_k_triton: unchecked",
                            lambda c: replace(c, missing=1, spare=0) if c.needed() else None)


def _has_a_page(case) -> bool:
    return case.requests[0].seq_len > 0 if isinstance(case, GetKAndS) else case.needed() > 0


_READ = Arg("buf", Role.IN, ("pages", "page_bytes"), ("uint8",), _BUF_DOC, FAR_ROWS, cells="live, slack, forbidden")


_PAGE_INDICES = Arg("page_indices", Role.IN, ("needed",), INT, "page of every page position", ANY_STRIDES, cells="live, slack")
_WRITTEN = dict(cells="written, untouched")
_K_OUT = Arg("k_out", Role.OUT, ("tokens", str(HEAD_DIM)), ("uint8",), "e4m3 key of every token, as bytes", FAR_ROWS,
             **_WRITTEN)
_S_OUT = Arg("s_out", Role.OUT, ("tokens", str(SCALE_BYTES)), ("uint8",), "float32 scale of every token, as bytes", BYTE_ROWS,
             **_WRITTEN)


GET_K = Contract(
    name="get_k",
    family="index_cache",
    doc="The key bytes of one request's tokens, gathered from the index cache.",
    origin="SGLang nsa/index_buf_accessor.py GetK",
    case=GetK,
    oracle=get_k,
    args=(_READ, _PAGE_INDICES, _K_OUT),
    scalars=(Scalar("seq_len", "tokens to gather"), _PAGE_SIZE),
    preconditions=(_PAGES_EXIST, _PAGES_COVER),
    capturable=True,
    frozen_by_capture=("seq_len", "page_size"),
    upstream_names=("GetK", "_get_k_triton"),
)

GET_S = Contract(
    name="get_s",
    family="index_cache",
    doc="The scale bytes of one request's tokens, gathered from the index cache.",
    origin="SGLang nsa/index_buf_accessor.py GetS",
    case=GetS,
    oracle=get_s,
    args=(_READ, _PAGE_INDICES, _S_OUT),
    scalars=(Scalar("seq_len", "tokens to gather"), _PAGE_SIZE),
    preconditions=(_PAGES_EXIST, _PAGES_COVER),
    capturable=True,
    frozen_by_capture=("seq_len", "page_size"),
    upstream_names=("GetS", "_get_s_triton"),
)


def _narrower(case: GetKAndS) -> GetKAndS | None:
    needed = -(-case.longest() // case.page_size)
    return replace(case, width_extra=0, columns_missing=needed - needed // 2) if needed else None


GET_K_AND_S = Contract(
    name="get_k_and_s",
    family="index_cache",
    doc="The keys and scales of a ragged batch, packed one request behind the other.",
    origin="SGLang #16043 GetKAndS, as re-landed for more than 128K tokens in #19319",
    case=GetKAndS,
    oracle=get_k_and_s,
    args=(
        _READ,
        Arg("page_indices", Role.IN, ("bs", "width"), INT, "pages of every request", (*ROWS_STRIDED, "expanded", "far"),
            cells="live, slack"),
        Arg("seq_lens", Role.IN, ("bs",), INT, "tokens of every request", ANY_STRIDES, sets_size=True, cells="live"),
        _K_OUT,
        _S_OUT,
    ),
    scalars=(
        Scalar("seq_len_sum", "sum of seq_lens: the rows to fill"),
        Scalar("max_seq_len", "at least the longest seq_len"),
        _PAGE_SIZE,
    ),
    preconditions=(
        _PAGES_EXIST,
        Precondition("the table covers every request", "page_indices.shape[1] * page_size >= max(seq_lens)",
                     "_get_k_and_s_triton_kernel masks the page, and reads the cache all the same", _narrower),
        Precondition("seq_len_sum is the sum", "seq_len_sum == sum(seq_lens)",
                     "_get_k_and_s_triton: the outputs have seq_len_sum rows (SGLang #18280)",
                     lambda c: replace(c, sum_missing=1, spare=0) if c.longest() else None),
        Precondition("max_seq_len covers every request", "max(seq_lens) <= max_seq_len",
                     "_get_k_and_s_triton: its grid", lambda c: replace(c, max_extra=-1) if c.longest() >= 2 else None),
    ),
    capturable=True,
    frozen_by_capture=("bs", "seq_len_sum", "max_seq_len", "page_size"),
    upstream_names=("GetKAndS", "_get_k_and_s_triton"),
)


def _outside(case: SetKAndS) -> tuple[SetKAndS, ...]:
    return tuple(replace(case, tokens=(replace(case.tokens[0], loc=slot), *case.tokens[1:]), last=False, padded=0)
                 for slot in beyond(case.pages * case.page_size) if case.tokens)


_WRITE = Arg("buf", Role.OUT, ("pages", "page_bytes"), ("uint8",), _BUF_DOC, FAR_ROWS, cells="written, untouched, don't care")
_LOC = Arg("loc", Role.IN, ("tokens",), INT, "slot of every token", ANY_STRIDES, sets_size=True, cells="live")
_STORE_PRECONDITIONS = (
    Precondition("slots exist", "0 <= loc < buf.shape[0] * page_size", "unchecked", _outside),
    Precondition("no slot twice", "loc is distinct; only padded tokens, all equal, share slot 0",
                 "SetKAndS: programs store in no order; its own comparison clears token 0"),
)

SET_K_AND_S = Contract(
    name="set_k_and_s",
    family="index_cache",
    doc="Keys and scales into their slots of the index cache.",
    origin="SGLang nsa/index_buf_accessor.py SetKAndS",
    case=SetKAndS,
    oracle=set_k_and_s,
    args=(
        _WRITE,
        _LOC,
        Arg("index_k", Role.IN, ("tokens", str(HEAD_DIM)), ("float8_e4m3fn",), "key of every token", FAR_STRIDED,
            cells="live, slack"),
        Arg("index_k_scale", Role.IN, ("tokens",), ("float32",), "scale of every token", ANY_STRIDES, cells="live, slack"),
    ),
    scalars=(_PAGE_SIZE,),
    preconditions=_STORE_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=("tokens", "page_size"),
    upstream_names=("SetKAndS", "_set_k_and_s_triton"),
)

FUSED_STORE_INDEX_CACHE = Contract(
    name="fused_store_index_cache",
    family="index_cache",
    doc="bfloat16 keys, quantised to e4m3 with one scale each, into their slots of the index cache.",
    origin="SGLang fused_store_index_k_cache; scale_fmt of act_quant, which stands in for it followed by SetKAndS",
    case=FusedStoreIndexCache,
    oracle=fused_store_index_cache,
    args=(
        replace(_WRITE, cells="judged, untouched, don't care"),
        _LOC,
        Arg("key", Role.IN, ("tokens", str(HEAD_DIM)), ("bfloat16",), "key of every token, finite", FAR_STRIDED,
            cells="live, slack"),
    ),
    scalars=(_PAGE_SIZE, Scalar("scale_fmt", "None, or 'ue8m0' for scales that are powers of two")),
    preconditions=_STORE_PRECONDITIONS,
    capturable=True,
    frozen_by_capture=("tokens", "page_size", "scale_fmt"),
    upstream_names=("fused_store_index_k_cache", "act_quant + SetKAndS"),
)

QUANTIZE_K_CACHE = Contract(
    name="quantize_k_cache",
    family="index_cache",
    doc="MLA latents to 656 bytes each: e4m3 with a scale per tile of 128, and the rotary part as it is.",
    origin="SGLang nsa/quant_k_cache.py quantize_k_cache",
    case=QuantizeKCache,
    oracle=quantize_k_cache,
    args=(
        Arg("cache_k", Role.IN, ("tokens", str(LATENT)), ("bfloat16",), "latents, finite", FAR_STRIDED, sets_size=True,
            cells="live"),
        Arg("quant_k_cache", Role.OUT, ("tokens", str(LATENT_BYTES)), ("uint8",), "the bytes of every token", FAR_ROWS,
            cells="written, judged, untouched"),
    ),
    variants=(
        Variant("scale", {
            "fp32": "SGLang quantize_k_cache: the scale is computed in float32",
            "bf16": "SGLang _quantize_k_cache_ref: in bfloat16",
        }),
        Variant("tiny", {
            "exact": "a tile whose scale has no float32 reciprocal is quantised like any other; a zero tile stays zero",
            "undefined": "SGLang quantize_k_cache multiplies by 1 / scale, without an epsilon 'as the ref impl'",
        }),
    ),
    capturable=True,
    frozen_by_capture=("tokens",),
    upstream_names=("quantize_k_cache", "_quantize_k_cache_fast"),
)

_DEQUANTIZED = Arg("k_cache", Role.OUT, ("tokens", str(LATENT)), ("bfloat16",), "latents", FAR_ROWS,
                   cells="written, judged, untouched")

DEQUANTIZE_K_CACHE = Contract(
    name="dequantize_k_cache",
    family="index_cache",
    doc="Quantised MLA latents back to bfloat16.",
    origin="SGLang nsa/dequant_k_cache.py dequantize_k_cache",
    case=DequantizeKCache,
    oracle=dequantize_k_cache,
    args=(
        Arg("quant_k_cache", Role.IN, ("tokens", str(LATENT_BYTES)), ("uint8",), "the bytes of every token", FAR_ROWS,
            sets_size=True, cells="live"),
        _DEQUANTIZED,
    ),
    capturable=True,
    frozen_by_capture=("tokens",),
    upstream_names=("dequantize_k_cache", "_dequantize_k_cache_fast"),
)

DEQUANTIZE_K_CACHE_PAGED = Contract(
    name="dequantize_k_cache_paged",
    family="index_cache",
    doc="The quantised MLA latents of the slots that a table names, in bfloat16.",
    origin="SGLang nsa/dequant_k_cache.py dequantize_k_cache_paged",
    case=DequantizeKCachePaged,
    oracle=dequantize_k_cache_paged,
    args=(
        Arg("quant_k_cache", Role.IN, ("slots", str(LATENT_BYTES)), ("uint8",), "the bytes of every slot", FAR_ROWS,
            cells="live, forbidden"),
        Arg("page_table_1_flattened", Role.IN, ("tokens",), INT, "slot of every token", ANY_STRIDES, sets_size=True,
            cells="live"),
        _DEQUANTIZED,
    ),
    preconditions=(
        Precondition("slots exist", "0 <= page_table_1_flattened < slots", "dequantize_k_cache_paged: unchecked there",
                     lambda c: tuple(replace(c, tokens=(Slot(s), *c.tokens[1:]), from_end=False)
                                     for s in beyond(c.slots) if c.tokens)),
    ),
    capturable=True,
    frozen_by_capture=("tokens",),
    upstream_names=("dequantize_k_cache_paged", "dequantize_k_cache_paged_dsa"),
)

CONTRACTS = (GET_K, GET_S, GET_K_AND_S, SET_K_AND_S, FUSED_STORE_INDEX_CACHE, QUANTIZE_K_CACHE, DEQUANTIZE_K_CACHE,
             DEQUANTIZE_K_CACHE_PAGED)
