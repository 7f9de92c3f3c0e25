"""The index cache: gathers and stores of keys and scales, and latents by slot."""

import torch
import triton
import triton.language as tl

from exhibit import exhibit


@triton.jit
def _gather(buf, pages, out, pitch, page_step, out_row, PAGE: tl.constexpr, TOKENS_PER_ENTRY: tl.constexpr,
            FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    token = tl.program_id(0)
    page = tl.load(pages + token // TOKENS_PER_ENTRY * page_step)
    page = page.to(tl.int64) if WIDE else page.to(tl.int32)
    byte = tl.arange(0, WIDTH)
    value = tl.load(buf + (page * pitch + FIRST + token % PAGE * WIDTH) + byte)
    tl.store(out + token.to(tl.int64) * out_row + byte, value)


@exhibit("B013")
def page_times_bytes(faulty, *, buf, page_indices, k_out, seq_len, page_size):
    """SGLang #34725. Trigger: a page from number 254,201 on, of 8,448 bytes. Symptom: the product wraps, and the key is another
    page's."""
    if seq_len:
        _gather[(seq_len,)](buf, page_indices, k_out, buf.stride(0), page_indices.stride(0), k_out.stride(0), PAGE=page_size,
                            TOKENS_PER_ENTRY=page_size, FIRST=0, WIDTH=128, WIDE=not faulty)


@exhibit("B144")
def table_by_the_token(faulty, *, buf, page_indices, s_out, seq_len, page_size):
    """aiter #4825, #5591. Trigger: pages of 64 tokens. Symptom: the table of pages is read with the token's number; 5,968 of
    6,000 are wrong."""
    if seq_len:
        _gather[(seq_len,)](buf, page_indices, s_out, buf.stride(0), page_indices.stride(0), s_out.stride(0), PAGE=page_size,
                            TOKENS_PER_ENTRY=1 if faulty else page_size, FIRST=page_size * 128, WIDTH=4, WIDE=True)


@triton.jit
def _pages_of_tokens(table, lengths, pages, table_row, table_step, length_step, pages_row, width, BLOCK: tl.constexpr,
                     PAGE: tl.constexpr, BOUNDED: tl.constexpr):
    request = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = token < tl.load(lengths + request * length_step)
    column = token // PAGE
    there = column < (width if BOUNDED else column + 1)
    page = tl.load(table + request.to(tl.int64) * table_row + column * table_step, mask=there, other=0)
    tl.store(pages + request * pages_row + token, page, mask=live)


def _packed(call, block, bounded=True) -> None:
    """Pages of all tokens by the kernel, then a copy per token."""
    table, seqs, page_size = call["page_indices"], call["seq_lens"], call["page_size"]
    bs, longest = len(seqs), call["max_seq_len"]
    if not bs or not longest:
        return
    pages = torch.zeros(bs, longest, dtype=torch.int64)
    _pages_of_tokens[(bs, -(-longest // block))](
        table, seqs, pages, *table.stride(), seqs.stride(0), longest, table.shape[1], BLOCK=block, PAGE=page_size,
        BOUNDED=bounded)
    owners = [(i, t) for i, n in enumerate(seqs.tolist()) for t in range(n)]
    _copy(call, enumerate(owners), pages)


def _block(call) -> int:
    """Tokens per program, more of them on the path for long contexts."""
    return 4096 if call["max_seq_len"] > 4096 else 256


def _copy(call, tokens, pages) -> None:
    buf, page_size = call["buf"], call["page_size"]
    for row, (i, t) in tokens:
        page, place = int(pages[i, t]), t % page_size
        call["k_out"][row, :128] = buf[page, place * 128 : place * 128 + 128]
        first = page_size * 128 + place * 4
        call["s_out"][row, :4] = buf[page, first : first + 4]


@exhibit("B011")
def table_without_its_width(faulty, **call):
    """SGLang #16043, re-landed in #19319. Trigger: a table of exactly the pages needed, and a block of 256 tokens over its end.
    Symptom: the load reads past the row of the table, an illegal access for the last request."""
    _packed(call, _block(call), bounded=not faulty)


@exhibit("B137")
def tokens_on_the_y_axis(faulty, **call):
    """FlashMLA #182, #173, #92 (and SGLang #16043). Trigger: more than 65,535 rows, one program each. Symptom: the launch is
    refused. Here the path for long contexts has it."""
    block = _block(call)
    _packed(call, 1 if faulty and block > 256 else block)


@exhibit("B075")
def owner_of_no_token(faulty, **call):
    """vLLM #40772. Trigger: 5 tokens on the device, a grid for the host's bound of 8. Symptom: a token behind the total matches
    no request, and a left-over owner is used."""
    seqs, page_size = call["seq_lens"].tolist(), call["page_size"]
    owners = [(i, t) for i, n in enumerate(seqs) for t in range(n)]
    if faulty and owners:
        bound = min(len(call["k_out"]), len(call["s_out"]), len(seqs) * call["max_seq_len"])
        owners += [owners[-1]] * (bound - len(owners))
    longest = max(seqs, default=0)
    pages = call["page_indices"][:, : -(-longest // page_size)].repeat_interleave(page_size, dim=1)
    _copy(call, enumerate(owners), pages)


# -- stores ---------------------------------------------------------------------------------------------------------------


def _store(buf, loc, keys, scales, page_size) -> None:
    for i, slot in enumerate(loc):
        page, place = divmod(slot, page_size)
        buf[page, place * 128 : place * 128 + 128] = keys[i, :128]
        first = page_size * 128 + place * 4
        buf[page, first : first + 4] = scales[i]


def _bytes(index_k_scale):
    return index_k_scale.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(-1, 4)


@exhibit("B050")
def padding_on_live_slots(faulty, *, buf, loc, index_k, index_k_scale, page_size):
    """SGLang #24743. Trigger: a replay of 4, then of 1 in the same bucket. Symptom: the tail of the translated slots is not
    cleared, and padding is stored over live keys."""
    slots = loc.tolist()
    captured = list(range(1, len(slots) + 1))  # what an earlier batch left in the second pool's buffer
    if faulty and slots.count(0) > 1:
        slots = [s or min(c, buf.shape[0] * page_size - 1) for s, c in zip(slots, captured)]
    _store(buf, slots, index_k.view(torch.uint8), _bytes(index_k_scale), page_size)


@exhibit("B126")
def dense_keys(faulty, *, buf, loc, index_k, index_k_scale, page_size):
    """FlashInfer #527. Trigger: keys that are a slice of a wider tensor. Symptom: rows are read as if they were dense."""
    keys = index_k.view(torch.uint8)
    if faulty and len(keys):
        keys = keys.as_strided(keys.shape, (keys.shape[1], 1), keys.storage_offset())
    _store(buf, loc.tolist(), keys, _bytes(index_k_scale), page_size)


@triton.jit
def _latents(cache, slots, out, pitch, slot_step, WIDE: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token * slot_step)
    slot = slot.to(tl.int64) if WIDE else slot.to(tl.int32)
    byte = tl.arange(0, 1024)
    tl.store(out + token * 656 + byte, tl.load(cache + slot * pitch + byte, mask=byte < 656), mask=byte < 656)


@exhibit("B124")
def slot_times_bytes(faulty, *, quant_k_cache, page_table_1_flattened, k_cache):
    """FlashInfer #3136, #1290. Trigger: a page past 2^31 bytes. Symptom: the 32-bit product wraps, zeros are read."""
    n = len(page_table_1_flattened)
    rows = torch.zeros(n, 656, dtype=torch.uint8)
    if n:
        _latents[(n,)](quant_k_cache, page_table_1_flattened, rows, quant_k_cache.stride(0), page_table_1_flattened.stride(0),
                       WIDE=not faulty)
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().view(n, 4, 128)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    k_cache[:n, :512] = (codes * scales[..., None]).view(n, 512).bfloat16()
    k_cache[:n, 512:576] = rows[:, 528:].contiguous().view(torch.bfloat16)
