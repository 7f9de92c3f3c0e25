"""The index_cache family in plain PyTorch: a second opinion on the oracles, and the baseline of the kernels."""

import torch


def get_k(*, buf, page_indices, k_out, seq_len, page_size):
    """A page's keys as a [page_size, 128] block, the blocks one behind the other."""
    k_out[:seq_len] = _part(buf, page_indices, seq_len, page_size, 0, 128)


def get_s(*, buf, page_indices, s_out, seq_len, page_size):
    """Likewise for the scales, which start behind the keys."""
    s_out[:seq_len] = _part(buf, page_indices, seq_len, page_size, page_size * 128, 4)


def get_k_and_s(*, buf, page_indices, seq_lens, k_out, s_out, seq_len_sum, max_seq_len, page_size):
    """One request after the other, concatenated."""
    lengths = seq_lens.tolist()
    for out, first, width in ((k_out, 0, 128), (s_out, page_size * 128, 4)):
        parts = [_part(buf, row, n, page_size, first, width) for row, n in zip(page_indices, lengths)]
        out[:seq_len_sum] = torch.cat(parts) if parts else out[:0]


def _part(buf, pages, seq_len: int, page_size: int, first: int, width: int) -> torch.Tensor:
    used = pages[: -(-seq_len // page_size)].long()
    blocks = buf[:, first : first + page_size * width].index_select(0, used)
    return blocks.reshape(-1, width)[:seq_len]


def set_k_and_s(*, buf, loc, index_k, index_k_scale, page_size):
    """Two scatters of bytes."""
    _scatter(buf, loc, index_k[: len(loc)].view(torch.uint8), index_k_scale[: len(loc)], page_size)


def fused_store_index_cache(*, buf, key, loc, page_size, scale_fmt):
    """Quantise, then scatter."""
    x = key[: len(loc)].float()
    scale = x.abs().amax(1).clamp(min=1e-4) / 448
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    _scatter(buf, loc, _quantise(x, scale[:, None]), scale, page_size)


def _quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.where(scale > 0, x / scale, 0.0).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8)


def _scatter(buf, loc, codes, scale, page_size: int) -> None:
    page, place = loc.long()[:, None] // page_size, loc.long()[:, None] % page_size
    steps = torch.arange(128, device=buf.device)
    buf[page, place * 128 + steps] = codes
    parts = scale.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    buf[page, page_size * 128 + place * 4 + steps[:4]] = parts.view(-1, 4)


def quantize_k_cache(*, cache_k, quant_k_cache):
    """All tiles at once."""
    n = len(cache_k)
    tiles = cache_k[:, :512].float().reshape(n, 4, 128)
    scale = tiles.abs().amax(2) / 448
    quant_k_cache[:n, :512] = _quantise(tiles, scale[..., None]).reshape(n, 512)
    quant_k_cache[:n, 512:528] = scale.contiguous().view(torch.uint8).reshape(n, 16)
    quant_k_cache[:n, 528:656] = cache_k[:, 512:576].contiguous().view(torch.uint8)


def dequantize_k_cache(*, quant_k_cache, k_cache):
    """All tiles at once."""
    n = len(quant_k_cache)
    parts = quant_k_cache[:, :656].split((512, 16, 128), 1)
    codes, scale, rope = (p.clone(memory_format=torch.contiguous_format) for p in parts)
    codes = codes.view(torch.float8_e4m3fn).float().view(n, 4, 128)
    scale = scale.view(torch.float32)
    k_cache[:n, :512] = (codes * scale[..., None]).view(n, 512).bfloat16()
    k_cache[:n, 512:576] = rope.view(torch.bfloat16)


def dequantize_k_cache_paged(*, quant_k_cache, page_table_1_flattened, k_cache):
    """Gather, then dequantise."""
    dequantize_k_cache(quant_k_cache=quant_k_cache.index_select(0, page_table_1_flattened.long()), k_cache=k_cache)
