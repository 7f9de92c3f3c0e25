"""Faulty transforms of the index_cache family, as small as the real faults were. Run as a subject; `test_faults_index_cache.py`
puts one at a time in a contract's place."""

import torch
import triton
import triton.language as tl

PAGE = 132  # bytes of a page per token


# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _rows(buf, pages, count, page_size, scales):
    token = torch.arange(count)
    width, first = (4, page_size * 128) if scales else (128, 0)
    page, place = pages.long()[token // page_size], token % page_size
    return buf[page[:, None], first + place[:, None] * width + torch.arange(width)]


def _gather(buf, page_indices, seq_lens, k_out, s_out, page_size):
    first = 0
    for row, count in zip(page_indices, seq_lens.tolist()):
        k_out[first : first + count] = _rows(buf, row, count, page_size, False)
        s_out[first : first + count] = _rows(buf, row, count, page_size, True)
        first += count


def _put(buf, loc, codes, scale_bytes, page_size):
    codes, scale_bytes = codes[: len(loc)], scale_bytes[: len(loc)]
    page, place = loc.long()[:, None] // page_size, loc.long()[:, None] % page_size
    buf[page, place * 128 + torch.arange(128)] = codes
    buf[page, page_size * 128 + place * 4 + torch.arange(4)] = scale_bytes


def _bytes(scale):
    return scale.contiguous().view(torch.uint8).view(*scale.shape, 4)


def _quantise(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def _store(buf, key, loc, page_size, scale_fmt, least=1e-4, quantise=_quantise):
    x = key.float()
    scale = x.abs().amax(1).clamp(min=least) / 448
    if scale_fmt:
        scale = 2 ** torch.ceil(torch.log2(scale))
    _put(buf, loc, quantise(x, scale[:, None]), _bytes(scale), page_size)


# -- gathers ------------------------------------------------------------------------------------------------------------


@triton.jit
def _narrow_offsets(buf, pages, out, pitch, first, PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    page = tl.load(pages + token // PAGE_SIZE).to(tl.int32)
    byte = tl.arange(0, WIDTH)
    tl.store(out + token * WIDTH + byte, tl.load(buf + page * pitch + first + token % PAGE_SIZE * WIDTH + byte))


def _by_token(buf, pages, out, seq_len, page_size, first, width, scales):
    if out.stride(0) == width and pages.stride(0) == 1 and seq_len:
        _narrow_offsets[(seq_len,)](buf, pages, out, buf.stride(0), first, PAGE_SIZE=page_size, WIDTH=width)
    else:
        out[:seq_len] = _rows(buf, pages, seq_len, page_size, scales)


def narrow_page_offset(*, buf, page_indices, k_out, seq_len, page_size):
    """page * bytes in 32 bits (SGLang #34725)."""
    _by_token(buf, page_indices, k_out, seq_len, page_size, 0, 128, False)


def narrow_scale_offset(*, buf, page_indices, s_out, seq_len, page_size):
    """The same, only for the scales."""
    _by_token(buf, page_indices, s_out, seq_len, page_size, page_size * 128, 4, True)


def scales_beside_keys(*, buf, page_indices, s_out, seq_len, page_size):
    """Every token's scale is taken to follow its key."""
    token = torch.arange(seq_len)
    page, place = page_indices.long()[token // page_size], token % page_size
    s_out[:seq_len] = buf[page[:, None], place[:, None] * PAGE + 128 + torch.arange(4)]


def whole_pages(*, buf, page_indices, k_out, seq_len, page_size):
    """The rest of the last page is copied too, where there is room."""
    count = min(-(-seq_len // page_size) * page_size, len(k_out))
    k_out[:count] = _rows(buf, page_indices, count, page_size, False)


def pages_in_order(*, buf, page_indices, k_out, seq_len, page_size):
    """The pages are taken to be consecutive."""
    if seq_len:
        pages = (int(page_indices[0]) + torch.arange(-(-seq_len // page_size))) % len(buf)
        k_out[:seq_len] = _rows(buf, pages, seq_len, page_size, False)


def first_request_only(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """Every request is gathered from the first row of the table."""
    table = page_indices[:1].expand(page_indices.shape) if len(page_indices) else page_indices
    _gather(buf, table, seq_lens, k_out, s_out, page_size)


def padded_requests(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """Requests start max_seq_len rows apart, as if they were padded."""
    for i, (row, count) in enumerate(zip(page_indices, seq_lens.tolist())):
        first = i * min(max_seq_len, max(seq_lens.tolist()))
        count = max(0, min(count, len(k_out) - first))
        k_out[first : first + count] = _rows(buf, row, count, page_size, False)
        s_out[first : first + count] = _rows(buf, row, count, page_size, True)


def sum_of_all_lanes(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """A request's first row is the sum of the lengths of a whole block, from the second block on."""
    lengths = seq_lens.tolist()
    _gather(buf, page_indices, seq_lens, k_out, s_out, page_size)
    if len(lengths) > 32:
        first = sum(lengths[:32])
        k_out[first:seq_len_sum] = k_out[: seq_len_sum - first].clone()


@triton.jit
def _nothing(out):
    return


def token_on_grid_y(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """One program per token along y (SGLang #16043)."""
    if len(seq_lens) and max_seq_len:
        _gather(buf, page_indices, seq_lens, k_out, s_out, page_size)
        _nothing[(1, max_seq_len if max_seq_len > 65535 else 1)](k_out)


@triton.jit
def _load_pages(table, pitch, step, last, BLOCK: tl.constexpr):
    tl.load(table + tl.program_id(0) * pitch + (last + tl.arange(0, BLOCK)) * step)


def page_past_the_width(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """The page of one token past the end is looked up, also past the table (SGLang #19319)."""
    _gather(buf, page_indices, seq_lens, k_out, s_out, page_size)
    if len(seq_lens) and int(seq_lens[-1]) > 0 and page_indices.stride(0):
        last = int(seq_lens[-1]) // page_size
        _load_pages[(1,)](page_indices[-1:], 0, page_indices.stride(1), last, BLOCK=1)


def table_pitch_from_shape(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """The table's pitch is taken from its shape."""
    flat = page_indices.as_strided(page_indices.shape, (page_indices.shape[1] * page_indices.stride(1), page_indices.stride(1)))
    _gather(buf, flat.clamp(0, len(buf) - 1), seq_lens, k_out, s_out, page_size)


# -- stores -------------------------------------------------------------------------------------------------------------


def lost_write(*, buf, loc, index_k, index_k_scale, page_size):
    """A cache that is not contiguous is copied, and the copy written."""
    _put(buf.contiguous(), loc, index_k.view(torch.uint8), _bytes(index_k_scale), page_size)


def page_and_place_swapped(*, buf, loc, index_k, index_k_scale, page_size):
    """Slots are taken to run across pages first."""
    pages = len(buf)
    other = loc.long() % pages * page_size + loc.long() // pages
    _put(buf, other, index_k.view(torch.uint8), _bytes(index_k_scale), page_size)


def scale_of_another(*, buf, loc, index_k, index_k_scale, page_size):
    """Every token gets the first one's scale."""
    _put(buf, loc, index_k.view(torch.uint8), _bytes(index_k_scale[:1].expand(len(loc))), page_size)


@triton.jit
def _put_narrow(buf, loc, codes, pitch, PAGE_SIZE: tl.constexpr):
    token, byte = tl.program_id(0), tl.arange(0, 128)
    slot = tl.load(loc + token).to(tl.int32)
    start = slot // PAGE_SIZE * pitch.to(tl.int32) + slot % PAGE_SIZE * 128
    tl.store(buf + start + byte, tl.load(codes + token * 128 + byte))


def narrow_store(*, buf, loc, index_k, index_k_scale, page_size):
    """page * bytes in 32 bits, in the writer."""
    codes = index_k.view(torch.uint8)
    _put(buf, loc, codes, _bytes(index_k_scale), page_size)
    if len(loc) and codes.is_contiguous() and loc.is_contiguous():
        _put_narrow[(len(loc),)](buf, loc, codes, buf.stride(0), PAGE_SIZE=page_size)


def whole_page_written(*, buf, loc, index_k, index_k_scale, page_size):
    """Key and scale of a slot's neighbour are set to zero."""
    for slot in loc.tolist():
        other = slot ^ 1
        if other // page_size == slot // page_size and other % page_size < page_size:
            nothing = torch.zeros(1, PAGE, dtype=torch.uint8)
            _put(buf, torch.tensor([other]), nothing[:, :128], nothing[:, 128:], page_size)
    _put(buf, loc, index_k.view(torch.uint8), _bytes(index_k_scale), page_size)


@triton.jit
def _load_slots(loc, step):
    tl.load(loc + tl.program_id(0) * step)


def tokens_of_the_payload(*, buf, loc, index_k, index_k_scale, page_size):
    """There are as many tokens as rows of index_k, not as slots (vLLM's slot_mapping): loc is read past its end."""
    _put(buf, loc, index_k.view(torch.uint8), _bytes(index_k_scale), page_size)
    if len(index_k):
        _load_slots[(len(index_k),)](loc, loc.stride(0))


def tokens_of_the_key(*, buf, key, loc, page_size, scale_fmt):
    """Likewise as many as rows of key."""
    _store(buf, key, loc, page_size, scale_fmt)
    if len(key):
        _load_slots[(len(key),)](loc, loc.stride(0))


def truncated_codes(*, buf, key, loc, page_size, scale_fmt):
    """Numbers are rounded towards zero."""

    def towards_zero(x, scale):
        code = _quantise(x, scale)
        above = code.view(torch.float8_e4m3fn).float().abs() > (x / scale).abs()
        return code - above.to(torch.uint8)

    _store(buf, key, loc, page_size, scale_fmt, quantise=towards_zero)


def no_least_scale(*, buf, key, loc, page_size, scale_fmt):
    """The scale of a zero key is zero."""
    _store(buf, key, loc, page_size, scale_fmt, least=0.0)


def scale_rounded_down(*, buf, key, loc, page_size, scale_fmt):
    """The power of two is the one below: the largest numbers are cut."""
    if scale_fmt:
        scale = 2 ** torch.floor(torch.log2(key.float().abs().amax(1).clamp(min=1e-4) / 448))
        _put(buf, loc, _quantise(key.float(), scale[:, None]), _bytes(scale), page_size)
    else:
        _store(buf, key, loc, page_size, scale_fmt)


def scale_format_ignored(*, buf, key, loc, page_size, scale_fmt):
    """Scales are never powers of two."""
    _store(buf, key, loc, page_size, None)


def inverse_scale_stored(*, buf, key, loc, page_size, scale_fmt):
    """1 / scale is stored for the scale."""
    x = key.float()
    scale = x.abs().amax(1).clamp(min=1e-4) / 448
    if scale_fmt:
        scale = 2 ** torch.ceil(torch.log2(scale))
    _put(buf, loc, _quantise(x, scale[:, None]), _bytes(1 / scale), page_size)


def fp32_scale_from_bf16(*, buf, key, loc, page_size, scale_fmt):
    """The scale is rounded to bfloat16."""
    x = key.float()
    scale = (x.abs().amax(1).clamp(min=1e-4) / 448).bfloat16().float()
    if scale_fmt:
        return _store(buf, key, loc, page_size, scale_fmt)
    return _put(buf, loc, _quantise(x, scale[:, None]), _bytes(scale), page_size)


# -- latents ------------------------------------------------------------------------------------------------------------


def _latents(cache_k, out, tile_scale=lambda scale: scale, inverse=False, order=(0, 1, 2, 3)):
    n = len(cache_k)
    tiles = cache_k[:, :512].float().reshape(n, 4, 128)
    scale = tile_scale(tiles.abs().amax(2) / 448)
    codes = (tiles * (1 / scale[..., None])).clamp(-448, 448) if inverse else tiles / scale[..., None].clamp(min=2.0**-149)
    out[:n, :512] = codes.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).reshape(n, 512)
    out[:n, 512:528] = _bytes(scale[:, list(order)].contiguous()).reshape(n, 16)
    out[:n, 528:656] = cache_k[:, 512:576].contiguous().view(torch.uint8)


def zero_by_zero(*, cache_k, quant_k_cache):
    """A zero tile is multiplied by an infinite reciprocal."""
    _latents(cache_k, quant_k_cache, inverse=True)


def one_scale(*, cache_k, quant_k_cache):
    """One scale for the whole latent."""
    _latents(cache_k, quant_k_cache, lambda scale: scale.amax(1, keepdim=True).expand(scale.shape).contiguous())


def scales_reversed(*, cache_k, quant_k_cache):
    """The scales of the tiles in the wrong order."""
    _latents(cache_k, quant_k_cache, order=(3, 2, 1, 0))


def rope_quantised(*, cache_k, quant_k_cache):
    """The rotary part loses its last bit."""
    _latents(cache_k, quant_k_cache)
    rope = cache_k[:, 512:576].contiguous().view(torch.int16) & -2
    quant_k_cache[: len(cache_k), 528:656] = rope.view(torch.uint8)


def _meant(cache, rows, out, truncate=False, tile_of=lambda tiles: tiles):
    n = len(rows)
    row = torch.stack([cache[int(r), :656] for r in rows]) if n else cache[:0, :656].clone()
    codes = row[:, :512].clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn).float().view(n, 4, 128)
    scale = tile_of(row[:, 512:528].clone(memory_format=torch.contiguous_format).view(torch.float32))
    x = codes * scale[..., None]
    if truncate:
        x = (x.contiguous().view(torch.int32) & -65536).view(torch.float32)
    out[:n, :512] = x.view(n, 512).bfloat16()
    out[:n, 512:576] = row[:, 528:656].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def truncated_bfloat16(*, quant_k_cache, k_cache):
    """The low half of the float32 is dropped."""
    _meant(quant_k_cache, range(len(quant_k_cache)), k_cache, truncate=True)


def first_scale_for_all(*, quant_k_cache, k_cache):
    """Every tile takes the first scale."""
    _meant(quant_k_cache, range(len(quant_k_cache)), k_cache, tile_of=lambda s: s[:, :1].expand(s.shape))


def slot_by_position(*, quant_k_cache, page_table_1_flattened, k_cache):
    """The position is taken for the slot."""
    _meant(quant_k_cache, [i % len(quant_k_cache) for i in range(len(page_table_1_flattened))], k_cache)


@triton.jit
def _touch_slot(cache, table, pitch):
    tl.load(cache + tl.load(table).to(tl.int32) * pitch)


def narrow_slot_offset(*, quant_k_cache, page_table_1_flattened, k_cache):
    """slot * 656 in 32 bits."""
    _meant(quant_k_cache, page_table_1_flattened.tolist(), k_cache)
    if len(page_table_1_flattened) and quant_k_cache.stride(0) < 2**31:
        _touch_slot[(1,)](quant_k_cache, page_table_1_flattened, quant_k_cache.stride(0))


def unique_slots(*, quant_k_cache, page_table_1_flattened, k_cache):
    """Slots are taken to be distinct (SGLang #15086): a slot's second row is not filled."""
    table = page_table_1_flattened.tolist()
    for i, slot in enumerate(table):
        if slot not in table[:i]:
            _meant(quant_k_cache, [slot], k_cache[i : i + 1])
