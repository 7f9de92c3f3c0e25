"""Triton kernels of the index_cache family: one launch each, no synchronisation, nothing allocated.

Caches are addressed by bytes with 64-bit offsets, so any page pitch and any alignment is right, and a slot or page that
lies outside the cache touches nothing. Arithmetic is in float32. A pool's page size is a compile-time constant; lengths
and batch size are not. Plain `triton.jit`, so that of aligned tensors the compiler knows pitches and alignment, and moves 16
bytes at once where it would move one.
"""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._launch import remembered

HEAD_DIM, SCALE_BYTES = 128, 4
TOKEN_BYTES = HEAD_DIM + SCALE_BYTES
LATENT, LATENT_BYTES = 576, 656
BLOCK_TOKENS, BLOCK_REQUESTS, MOST_PROGRAMS = 128, 32, 512
STORE_TOKENS, LATENT_TOKENS = 16, 4
UINT8, FP8, BF16, FP32 = (torch.uint8,), (torch.float8_e4m3fn,), (torch.bfloat16,), (torch.float32,)


# -- reading the index cache --------------------------------------------------------------------------------------------


@triton.jit
def _copy_bytes(source, start, target, row, pitch, wanted, COUNT: tl.constexpr):
    """`COUNT` bytes from each `start` of the source into each `row` of the target."""
    byte = tl.arange(0, COUNT)
    data = tl.load(source + start[:, None] + byte[None, :], mask=wanted[:, None], other=0)
    tl.store(target + (row * pitch)[:, None] + byte[None, :], data, mask=wanted[:, None])


@triton.jit(do_not_specialize=["seq_len", "pages"])
def _get(buf, page_indices, out, seq_len, pages, buf_pitch, index_step, out_pitch, PAGE_SIZE: tl.constexpr,
         FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of tokens. The bytes of a page's first token start at FIRST, and each token has COUNT."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = token < seq_len
    page = tl.load(page_indices + token // PAGE_SIZE * index_step, mask=wanted, other=0).to(tl.int64)
    wanted = wanted & (page >= 0) & (page < pages)
    _copy_bytes(buf, page * buf_pitch + FIRST + token % PAGE_SIZE * COUNT, out, token, out_pitch, wanted, COUNT)


@triton.jit(do_not_specialize=["rows", "pages", "width", "table_pitch", "table_step", "len_step"])
def _get_k_and_s(buf, page_indices, seq_lens, k_out, s_out, rows, pages, width, buf_pitch, table_pitch, table_step, len_step,
                 k_pitch, s_pitch, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
                 BLOCK_REQUESTS: tl.constexpr):
    """Programs (i, ...) share the token blocks of request i; its first row is the sum of the lengths before it."""
    request, block, lane = tl.program_id(0), tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    length = tl.load(seq_lens + request.to(tl.int64) * len_step).to(tl.int64)
    if block >= length:  # the grid is made for the longest request
        return
    first = tl.zeros((), tl.int64)
    for start in range(0, request, BLOCK_REQUESTS):
        before = start + tl.arange(0, BLOCK_REQUESTS)
        first += tl.sum(tl.load(seq_lens + before.to(tl.int64) * len_step, mask=before < request, other=0).to(tl.int64), 0)
    table = page_indices + request.to(tl.int64) * table_pitch
    for start in range(block, length, tl.num_programs(1) * BLOCK):
        token = (start + lane).to(tl.int64)
        row, position = first + token, token // PAGE_SIZE
        wanted = (token < length) & (row < rows) & (position < width)
        page = tl.load(table + position * table_step, mask=wanted, other=0).to(tl.int64)
        wanted = wanted & (page >= 0) & (page < pages)
        key = page * buf_pitch + token % PAGE_SIZE * HEAD_DIM
        scale = page * buf_pitch + PAGE_SIZE * HEAD_DIM + token % PAGE_SIZE * 4
        _copy_bytes(buf, key, k_out, row, k_pitch, wanted, HEAD_DIM)
        _copy_bytes(buf, scale, s_out, row, s_pitch, wanted, 4)


@remembered
def get_k(*, buf, page_indices, k_out, seq_len, page_size):
    """Fill `k_out[:seq_len]` with the keys of a request's tokens (oracles/index_cache.py has the layout of a page).

    Args:
        buf: uint8 [pages, >= page_size * 132], any pitch. page_indices: int32 or int64 [>= ceil(seq_len / page_size)], any
        stride. k_out: uint8 [>= seq_len, >= 128], any pitch. seq_len, page_size: integers.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _get_part("k_out", buf, page_indices, k_out, seq_len, page_size, 0, HEAD_DIM)


@remembered
def get_s(*, buf, page_indices, s_out, seq_len, page_size):
    """Fill `s_out[:seq_len]` with the scales of a request's tokens. Arguments as for `get_k`; s_out: uint8 [>= seq_len, 4]."""
    _get_part("s_out", buf, page_indices, s_out, seq_len, page_size, HEAD_DIM, SCALE_BYTES)


def _get_part(name: str, buf, page_indices, out, seq_len, page_size, before: int, count: int) -> None:
    device = checks.device_of("buf", buf)
    checks.positive("seq_len", seq_len, 0)
    checks.positive("page_size", page_size)
    _check_cache(buf, page_size, device)
    checks.tensor("page_indices", page_indices, checks.INT, (triton.cdiv(seq_len, page_size),), device)
    checks.tensor(name, out, UINT8, (seq_len, count), device, unit_stride=True)
    checks.own_cells(name, out)
    checks.apart({name: out}, {"buf": buf, "page_indices": page_indices})
    if seq_len:
        _get[(triton.cdiv(seq_len, BLOCK_TOKENS),)](
            buf, page_indices, out, seq_len, buf.shape[0], buf.stride(0), page_indices.stride(0), out.stride(0),
            PAGE_SIZE=page_size, FIRST=page_size * before, COUNT=count, BLOCK=BLOCK_TOKENS)


@remembered
def get_k_and_s(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """Fill `k_out[:seq_len_sum]` and `s_out[:seq_len_sum]` with the keys and scales of every request's tokens, in order.

    Args:
        buf: uint8 [pages, >= page_size * 132], any pitch. page_indices: int32 or int64 [bs, width], any strides.
        seq_lens: int32 or int64 [bs], any stride. k_out, s_out: uint8 [>= seq_len_sum, >= 128 and 4], any pitch.
        max_seq_len: how many tokens the launch is made for; longer requests are gathered all the same.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device = checks.device_of("buf", buf)
    for name, value, least in (("seq_len_sum", seq_len_sum, 0), ("max_seq_len", max_seq_len, 0), ("page_size", page_size, 1)):
        checks.positive(name, value, least)
    _check_cache(buf, page_size, device)
    bs = _length("seq_lens", seq_lens)
    checks.tensor("seq_lens", seq_lens, checks.INT, (bs,), device)
    checks.tensor("page_indices", page_indices, checks.INT, (bs, 0), device)
    outputs = {"k_out": k_out, "s_out": s_out}
    for (name, out), count in zip(outputs.items(), (HEAD_DIM, SCALE_BYTES)):
        checks.tensor(name, out, UINT8, (seq_len_sum, count), device, unit_stride=True)
        checks.own_cells(name, out)
    checks.apart(outputs, {"buf": buf, "page_indices": page_indices, "seq_lens": seq_lens})
    if bs == 0 or max_seq_len == 0:
        return
    blocks = min(triton.cdiv(max_seq_len, BLOCK_TOKENS), max(1, MOST_PROGRAMS // bs))
    _get_k_and_s[(bs, blocks)](
        buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, buf.shape[0], page_indices.shape[1], buf.stride(0),
        *page_indices.stride(), seq_lens.stride(0), k_out.stride(0), s_out.stride(0), PAGE_SIZE=page_size,
        HEAD_DIM=HEAD_DIM, BLOCK=BLOCK_TOKENS, BLOCK_REQUESTS=BLOCK_REQUESTS)


# -- writing the index cache --------------------------------------------------------------------------------------------


@triton.jit
def _place(loc, loc_step, tokens, pages, pitch, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens of a program, the bytes where their pages start, their place in the page, and which of them exist."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(loc + token * loc_step, mask=token < tokens, other=-1).to(tl.int64)
    wanted = (slot >= 0) & (slot < pages.to(tl.int64) * PAGE_SIZE)
    return token, slot // PAGE_SIZE * pitch, slot % PAGE_SIZE, wanted


@triton.jit
def _byte(value, which):
    """One byte of each float32, little endian: stores and loads of bytes are right at any alignment."""
    return ((value.to(tl.int32, bitcast=True) >> (8 * which)) & 255).to(tl.uint8)


@triton.jit
def _codes(x, scale):
    """e4m3 codes of x / scale, as bytes; zeros where the scale is zero."""
    scaled = tl.where(scale > 0, x / tl.where(scale > 0, scale, 1.0), 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "pages"])
def _set_k_and_s(buf, loc, key, scale, tokens, pages, pitch, loc_step, key_pitch, key_step, scale_step,
                 PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of tokens."""
    token, page, place, wanted = _place(loc, loc_step, tokens, pages, pitch, PAGE_SIZE, BLOCK)
    byte = tl.arange(0, HEAD_DIM)
    codes = tl.load(key + (token * key_pitch)[:, None] + (byte * key_step)[None, :], mask=wanted[:, None], other=0.0)
    codes = codes.to(tl.uint8, bitcast=True)
    tl.store(buf + (page + place * HEAD_DIM)[:, None] + byte[None, :], codes, mask=wanted[:, None])
    scales = tl.load(scale + token * scale_step, mask=wanted, other=0.0)
    four, last = tl.arange(0, 4)[None, :], page + PAGE_SIZE * HEAD_DIM + place * 4
    tl.store(buf + last[:, None] + four, _byte(scales[:, None], four), mask=wanted[:, None])


@triton.jit(do_not_specialize=["tokens", "pages"])
def _fused_store(buf, loc, key, tokens, pages, pitch, loc_step, key_pitch, key_step, UE8M0: tl.constexpr,
                 PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of tokens: scale, quantise, store."""
    token, page, place, wanted = _place(loc, loc_step, tokens, pages, pitch, PAGE_SIZE, BLOCK)
    byte = tl.arange(0, HEAD_DIM)
    x = tl.load(key + (token * key_pitch)[:, None] + (byte * key_step)[None, :], mask=wanted[:, None], other=0.0)
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-4) / 448.0
    if UE8M0:  # round the exponent up: scales are normal numbers
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(buf + (page + place * HEAD_DIM)[:, None] + byte[None, :], _codes(x, scale[:, None]), mask=wanted[:, None])
    four, last = tl.arange(0, 4)[None, :], page + PAGE_SIZE * HEAD_DIM + place * 4
    tl.store(buf + last[:, None] + four, _byte(scale[:, None], four), mask=wanted[:, None])


@remembered
def set_k_and_s(*, buf, loc, index_k, index_k_scale, page_size):
    """Store keys and scales into their slots of the index cache; slots outside the cache are left out.

    Args:
        buf: uint8 [pages, >= page_size * 132], any pitch. loc: int32 or int64 [n], any stride. index_k: float8_e4m3fn
        [>= n, >= 128], any strides. index_k_scale: float32 [>= n] or [>= n, 1], any stride.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device, tokens = _check_store(buf, loc, page_size)
    checks.tensor("index_k", index_k, FP8, (tokens, HEAD_DIM), device)
    column = isinstance(index_k_scale, torch.Tensor) and index_k_scale.dim() == 2
    checks.tensor("index_k_scale", index_k_scale, FP32, (tokens, 1) if column else (tokens,), device)
    checks.apart({"buf": buf}, {"loc": loc, "index_k": index_k, "index_k_scale": index_k_scale})
    if tokens:
        _set_k_and_s[(triton.cdiv(tokens, STORE_TOKENS),)](
            buf, loc, index_k, index_k_scale, tokens, buf.shape[0], buf.stride(0), loc.stride(0),
            *index_k.stride(), index_k_scale.stride(0), PAGE_SIZE=page_size, HEAD_DIM=HEAD_DIM, BLOCK=STORE_TOKENS)


@remembered
def fused_store_index_cache(*, buf, key, loc, page_size, scale_fmt):
    """Quantise keys to e4m3 with one scale each, and store both into their slots; slots outside the cache are left out.

    Args:
        buf, loc: as for `set_k_and_s`. key: bfloat16 [>= n, >= 128], any strides, finite.
        scale_fmt: None for the scale max(absmax, 1e-4) / 448; "ue8m0" rounds it up to a power of two.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")
    device, tokens = _check_store(buf, loc, page_size)
    checks.tensor("key", key, BF16, (tokens, HEAD_DIM), device)
    checks.apart({"buf": buf}, {"loc": loc, "key": key})
    if tokens:
        _fused_store[(triton.cdiv(tokens, STORE_TOKENS),)](
            buf, loc, key, tokens, buf.shape[0], buf.stride(0), loc.stride(0), *key.stride(), UE8M0=scale_fmt == "ue8m0",
            PAGE_SIZE=page_size, HEAD_DIM=HEAD_DIM, BLOCK=STORE_TOKENS)


# -- MLA latents --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _quantize_k_cache(latents, out, tokens, pitch, step, out_pitch, BLOCK: tl.constexpr):
    """One program per block of tokens: 4 tiles of 128 numbers, then the 64 rotary ones."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = token < tokens
    source, target = token * pitch, token * out_pitch
    column = 128 * tl.arange(0, 4)[:, None] + tl.arange(0, 128)[None, :]
    x = tl.load(latents + source[:, None, None] + (column * step)[None, :, :], mask=wanted[:, None, None], other=0.0)
    x = x.to(tl.float32)
    scale = (tl.max(tl.abs(x), 2) / 448.0)[:, :, None]
    tl.store(out + target[:, None, None] + column[None, :, :], _codes(x, scale), mask=wanted[:, None, None])
    four = tl.arange(0, 4)[None, :]
    place = 512 + 4 * tl.arange(0, 4)[:, None] + four
    tl.store(out + target[:, None, None] + place[None, :, :], _byte(scale, four[None, :, :]), mask=wanted[:, None, None])
    rotary = tl.arange(0, 64)
    bits = tl.load(latents + source[:, None] + ((512 + rotary) * step)[None, :], mask=wanted[:, None], other=0.0)
    bits = bits.to(tl.uint16, bitcast=True)
    first = out + (target + 528)[:, None] + (2 * rotary)[None, :]
    tl.store(first, (bits & 255).to(tl.uint8), mask=wanted[:, None])
    tl.store(first + 1, (bits >> 8).to(tl.uint8), mask=wanted[:, None])


@triton.jit(do_not_specialize=["tokens", "slots"])
def _dequantize_k_cache(cache, page_table, out, tokens, slots, pitch, table_step, out_pitch, PAGED: tl.constexpr,
                        BLOCK: tl.constexpr):
    """One program per block of tokens; a token whose slot is not in the cache is left out."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = token
    if PAGED:
        slot = tl.load(page_table + token * table_step, mask=token < tokens, other=-1).to(tl.int64)
    wanted = (token < tokens) & (slot >= 0) & (slot < slots)
    source, target = slot * pitch, token * out_pitch
    column = 128 * tl.arange(0, 4)[:, None] + tl.arange(0, 128)[None, :]
    codes = tl.load(cache + source[:, None, None] + column[None, :, :], mask=wanted[:, None, None], other=0)
    four = tl.arange(0, 4)[None, :]
    place = 512 + 4 * tl.arange(0, 4)[:, None] + four
    parts = tl.load(cache + source[:, None, None] + place[None, :, :], mask=wanted[:, None, None], other=0)
    scale = tl.sum(parts.to(tl.int32) << (8 * four)[None, :, :], 2).to(tl.float32, bitcast=True)
    x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, :, None]
    tl.store(out + target[:, None, None] + column[None, :, :], x.to(tl.bfloat16), mask=wanted[:, None, None])
    rotary = tl.arange(0, 64)
    first = cache + (source + 528)[:, None] + (2 * rotary)[None, :]
    low = tl.load(first, mask=wanted[:, None], other=0).to(tl.uint16)
    high = tl.load(first + 1, mask=wanted[:, None], other=0).to(tl.uint16)
    tl.store(out + target[:, None] + (512 + rotary)[None, :], (low | (high << 8)).to(tl.bfloat16, bitcast=True),
             mask=wanted[:, None])


@remembered
def quantize_k_cache(*, cache_k, quant_k_cache):
    """Fill `quant_k_cache[:n]` with the 656 bytes of every latent.

    Args:
        cache_k: bfloat16 [n, >= 576], any strides, finite. quant_k_cache: uint8 [>= n, >= 656], any pitch (a float8_e4m3fn
        cache is passed as its uint8 view).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    device, tokens = checks.device_of("cache_k", cache_k), _length("cache_k", cache_k, 2)
    checks.tensor("cache_k", cache_k, BF16, (tokens, LATENT), device)
    checks.tensor("quant_k_cache", quant_k_cache, UINT8, (tokens, LATENT_BYTES), device, unit_stride=True)
    checks.own_cells("quant_k_cache", quant_k_cache)
    checks.apart({"quant_k_cache": quant_k_cache}, {"cache_k": cache_k})
    if tokens:
        _quantize_k_cache[(triton.cdiv(tokens, LATENT_TOKENS),)](
            cache_k, quant_k_cache, tokens, *cache_k.stride(), quant_k_cache.stride(0), BLOCK=LATENT_TOKENS)


@remembered
def dequantize_k_cache(*, quant_k_cache, k_cache):
    """Fill `k_cache[:n]` with the latents that `quant_k_cache` means.

    Args:
        quant_k_cache: uint8 [n, >= 656], any pitch. k_cache: bfloat16 [>= n, >= 576], any pitch.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _dequantize(quant_k_cache, None, k_cache)


@remembered
def dequantize_k_cache_paged(*, quant_k_cache, page_table_1_flattened, k_cache):
    """Fill `k_cache[:n]` with the latents of n slots; a row whose slot lies outside the cache is left as it was.

    Args:
        quant_k_cache: uint8 [slots, >= 656], any pitch. page_table_1_flattened: int32 or int64 [n], any stride.
        k_cache: bfloat16 [>= n, >= 576], any pitch.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written.
    """
    _length("page_table_1_flattened", page_table_1_flattened)
    _dequantize(quant_k_cache, page_table_1_flattened, k_cache)


def _dequantize(cache, page_table, out) -> None:
    device, slots = checks.device_of("quant_k_cache", cache), _length("quant_k_cache", cache, 2)
    tokens = slots if page_table is None else page_table.shape[0]
    checks.tensor("quant_k_cache", cache, UINT8, (slots, LATENT_BYTES), device, unit_stride=True)
    inputs = {"quant_k_cache": cache}
    if page_table is not None:
        checks.tensor("page_table_1_flattened", page_table, checks.INT, (tokens,), device)
        inputs["page_table_1_flattened"] = page_table
    checks.tensor("k_cache", out, BF16, (tokens, LATENT), device, unit_stride=True)
    checks.own_cells("k_cache", out)
    checks.apart({"k_cache": out}, inputs)
    if tokens:
        step = 0 if page_table is None else page_table.stride(0)
        _dequantize_k_cache[(triton.cdiv(tokens, LATENT_TOKENS),)](
            cache, cache if page_table is None else page_table, out, tokens, slots, cache.stride(0), step, out.stride(0),
            PAGED=page_table is not None, BLOCK=LATENT_TOKENS)


# -- checks -------------------------------------------------------------------------------------------------------------


def _check_cache(buf, page_size: int, device) -> None:
    checks.tensor("buf", buf, UINT8, (0, page_size * TOKEN_BYTES), device, unit_stride=True)


def _check_store(buf, loc, page_size) -> tuple[torch.device, int]:
    """The checks that both stores share; returns the device and the number of tokens."""
    device, tokens = checks.device_of("buf", buf), _length("loc", loc)
    checks.positive("page_size", page_size)
    _check_cache(buf, page_size, device)
    checks.own_cells("buf", buf)
    checks.tensor("loc", loc, checks.INT, (tokens,), device)
    return device, tokens


def _length(name: str, value, rank: int = 1) -> int:
    if not isinstance(value, torch.Tensor) or value.dim() != rank:
        raise TypeError(f"{name} must be a {rank}-D tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return value.shape[0]
