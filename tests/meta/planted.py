"""A subject full of faults: one function per fault, each standing in for the contract that the test names.

Every fault is as small as the real ones are; `tests/meta` shows which check sees it.
"""

import ctypes
import os
import time

import torch
import triton
import triton.language as tl
from first_results import keep

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _expand(extend_seq_lens, seq_lens, out):
    row = 0
    for extend, seq in zip(extend_seq_lens.tolist(), seq_lens.tolist()):
        for t in range(extend):
            out[row] = max(seq - extend + 1 + t, 0)
            row += 1


def _sum(seqlens, out):
    out[0] = 0
    out[1 : len(seqlens) + 1] = torch.cumsum(seqlens, 0)


def _decode(seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, nsa_cache_seqlens, nsa_cu_seqlens_k,
            page_table_1, real_page_table, bs, max_len, index_topk, page_size, slots=None):
    slots = req_pool_indices[:bs].tolist() if slots is None else slots
    lengths = seq_lens[:bs].tolist()
    for b in range(len(cache_seqlens)):
        cache_seqlens[b][:bs] = torch.tensor(lengths)
        _sum(torch.tensor(lengths, dtype=torch.int32), cu_seqlens_k[b])
        clipped = torch.tensor(lengths, dtype=torch.int32).clamp(max=index_topk)
        nsa_cache_seqlens[b][:bs] = clipped
        _sum(clipped, nsa_cu_seqlens_k[b])
        for row, (slot, length) in enumerate(zip(slots, lengths)):
            if page_table_1[b] is not None:
                page_table_1[b][row, :length] = req_to_token[slot, :length]
            if real_page_table[b] is not None:
                real_page_table[b][row, : -(-length // page_size)] = req_to_token[slot, :length:page_size] // page_size


def honest_sum(*, seqlens, cu_seqlens):
    _sum(seqlens, cu_seqlens)


# -- wrong values -------------------------------------------------------------------------------------------------------


def rows_of_the_first_batch(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Expanded once for a captured batch, and kept for its replays."""
    keep(lambda: _expand(extend_seq_lens, seq_lens, seqlens_expanded), seqlens_expanded[:total_len], (), len(seq_lens))


def sums_of_the_first_batch(*, seqlens, cu_seqlens):
    """The same for sums."""
    keep(lambda: _sum(seqlens, cu_seqlens), cu_seqlens[: len(seqlens) + 1], ())


def off_by_one(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """Only the requests after the first are off by one."""
    _expand(extend_seq_lens, seq_lens, seqlens_expanded)
    first = int(extend_seq_lens[0]) if len(extend_seq_lens) else 0
    seqlens_expanded[first:total_len] += 1


def unwritten(*, seqlens, cu_seqlens):
    """The total is missing."""
    keep = cu_seqlens[len(seqlens)].clone()
    _sum(seqlens, cu_seqlens)
    cu_seqlens[len(seqlens)] = keep


def stale_when_larger(*, seqlens, cu_seqlens):
    """An old value survives where it is larger."""
    n = len(seqlens) + 1
    old = cu_seqlens[:n].clone()
    _sum(seqlens, cu_seqlens)
    cu_seqlens[:n] = torch.maximum(old, cu_seqlens[:n])


def tail_written(*, page_table_1, seq_lens, bs, **rest):
    """The table is cleared past the length."""
    _decode(page_table_1=page_table_1, seq_lens=seq_lens, bs=bs, **rest)
    for table in page_table_1:
        for row in range(bs if table is not None else 0):
            table[row, int(seq_lens[row]) :] = 0


def wrong_slot(*, bs, **rest):
    """The row number is taken for the request's slot."""
    _decode(bs=bs, **rest, slots=list(range(bs)))


def cu0_clobbered(*, seqlens, cu_seqlens):
    """Index 0 gets the total."""
    _sum(seqlens, cu_seqlens)
    cu_seqlens[0] = cu_seqlens[len(seqlens)] + 1


def two_faults(*, seq_lens, nsa_cache_seqlens, page_table_1, bs, **rest):
    """Independent: no top-k clip, and the first column of the table."""
    _decode(seq_lens=seq_lens, nsa_cache_seqlens=nsa_cache_seqlens, page_table_1=page_table_1, bs=bs, **rest)
    for b in range(len(nsa_cache_seqlens)):
        nsa_cache_seqlens[b][:bs] = seq_lens[:bs]
        if page_table_1[b] is not None and bs and int(seq_lens[0]) > 0:
            page_table_1[b][0, 0] += 1


# -- dependence on what nothing may depend on ---------------------------------------------------------------------------


def slack_matters(*, seq_lens, req_pool_indices, req_to_token, cache_seqlens, bs, **rest):
    """The slot behind the last token decides about the length."""
    _decode(seq_lens=seq_lens, req_pool_indices=req_pool_indices, req_to_token=req_to_token, cache_seqlens=cache_seqlens,
            bs=bs, **rest)
    for i in range(bs):
        slot, length = int(req_pool_indices[i]), int(seq_lens[i])
        if length < req_to_token.shape[1]:
            for cache in cache_seqlens:
                cache[i] += int(req_to_token[slot, length]) & 1


def prior_matters(*, seqlens, cu_seqlens):
    """Index 0 is only written where something negative stood."""
    if int(cu_seqlens[0]) < 0:
        _sum(seqlens, cu_seqlens)
    else:
        keep = cu_seqlens[0].clone()
        _sum(seqlens, cu_seqlens)
        cu_seqlens[0] = keep


_seen: set[tuple[int, int]] = set()


def left_from_previous(*, seqlens, cu_seqlens):
    """Work is done once per address and size; later calls find what the first one left."""
    key = (cu_seqlens.data_ptr(), len(seqlens))
    if key not in _seen:
        _sum(seqlens, cu_seqlens)
    _seen.add(key)


# -- memory -------------------------------------------------------------------------------------------------------------


def write_input(*, extend_seq_lens, seq_lens, seqlens_expanded, total_len, max_q_len):
    """An input is changed after use, by PyTorch: no memory tier looks."""
    _expand(extend_seq_lens, seq_lens, seqlens_expanded)
    seq_lens[: len(extend_seq_lens)] += 1


def gap_written(*, page_table_1, **rest):
    """One cell of the gap between two rows is written, by PyTorch."""
    _decode(page_table_1=page_table_1, **rest)
    for table in page_table_1:
        if table is not None and table.shape[0] > 1 and table.stride(0) > table.shape[1] * table.stride(1):
            table.as_strided((1,), (1,), table.storage_offset() + (table.shape[1] - 1) * table.stride(1) + 1)[0] = 77


@triton.jit
def _touch(target, index, MODE: tl.constexpr):
    if MODE == 0:
        tl.load(target + index)
    elif MODE == 1:
        tl.store(target + index, 7)
    elif MODE == 2:
        tl.atomic_add(target + index, 0)
    elif MODE == 3:
        tl.store(target + index, tl.load(target + index))


def write_past_end(*, seqlens, cu_seqlens):
    """One store behind the last element."""
    _sum(seqlens, cu_seqlens)
    _touch[(1,)](cu_seqlens, len(cu_seqlens), MODE=1)


def launches_twice(*, seqlens, cu_seqlens):
    """Right, in two launches."""
    _sum(seqlens, cu_seqlens)
    for _ in range(2):
        _touch[(1,)](cu_seqlens, 0, MODE=3)


def jump(*, seqlens, cu_seqlens):
    """A store that reaches the other tensor."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens):
        _touch[(1,)](cu_seqlens, (seqlens.data_ptr() - cu_seqlens.data_ptr()) // 4, MODE=1)


def read_outside(*, seqlens, cu_seqlens):
    """A load behind the last element that nothing depends on."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens):
        _touch[(1,)](seqlens, (len(seqlens) - 1) * seqlens.stride(0) + 1, MODE=0)


def write_outside_unchanged(*, seqlens, cu_seqlens):
    """An atomic that adds nothing, behind the last element."""
    _sum(seqlens, cu_seqlens)
    _touch[(1,)](cu_seqlens, len(cu_seqlens), MODE=2)


def write_input_unchanged(*, seqlens, cu_seqlens):
    """An input is stored back as it was."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens):
        _touch[(1,)](seqlens, 0, MODE=3)


def uninitialised(*, seqlens, cu_seqlens):
    """An output is loaded before it was written."""
    _touch[(1,)](cu_seqlens, 0, MODE=0)
    _sum(seqlens, cu_seqlens)


def read_forbidden(*, req_to_token, req_pool_indices, bs, **rest):
    """A row of no request is read and dropped."""
    _decode(req_to_token=req_to_token, req_pool_indices=req_pool_indices, bs=bs, **rest)
    free = sorted(set(range(req_to_token.shape[0])) - set(req_pool_indices[:bs].tolist()))
    if free and req_to_token.shape[1]:
        _touch[(1,)](req_to_token, free[-1] * req_to_token.stride(0), MODE=0)


@triton.jit
def _read_row(table, row, columns, pitch, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.load(table + row * pitch + column, mask=column <= columns, other=0)


def read_past_row(*, req_to_token, req_pool_indices, bs, **rest):
    """`<=` for `<`: one column past each row, inside the same storage."""
    _decode(req_to_token=req_to_token, req_pool_indices=req_pool_indices, bs=bs, **rest)
    width = req_to_token.shape[1]
    if req_to_token.stride(1) == 1 and width < 4000:
        for slot in req_pool_indices[:bs].tolist():
            _read_row[(1,)](req_to_token, slot, width, req_to_token.stride(0), BLOCK=4096)


@triton.jit
def _gather(out, table, slots, lengths, out_pitch, table_pitch, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int32)
    if WIDE:
        slot = slot.to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tokens = tl.load(table + slot * table_pitch + column, mask=column < length, other=0)
        tl.store(out + row * out_pitch + column, tokens, mask=column < length)


def _tables(pitch, wide, *, req_to_token, req_pool_indices, seq_lens, page_table_1, bs, **rest):
    simple = req_to_token.stride(1) == 1 and seq_lens.stride(0) == 1 and req_pool_indices.stride(0) == 1
    _decode(req_to_token=req_to_token, req_pool_indices=req_pool_indices, seq_lens=seq_lens, bs=bs, **rest,
            page_table_1=page_table_1 if not simple else [None] * len(page_table_1))
    for table in page_table_1:
        if simple and bs and table is not None:
            if table.stride(1) == 1:
                _gather[(bs,)](table, req_to_token, req_pool_indices, seq_lens, pitch(table), req_to_token.stride(0), WIDE=wide,
                               BLOCK=256)
            else:
                for row in range(bs):
                    n = int(seq_lens[row])
                    table[row, :n] = req_to_token[int(req_pool_indices[row]), :n]


def pitch_from_shape(**call):
    """The row pitch is taken from the shape."""
    _tables(lambda table: table.shape[1], True, **call)


def int32_wrap(**call):
    """slot * pitch in 32 bits."""
    _tables(lambda table: table.stride(0), False, **call)


@triton.jit
def _both_write(out, last):
    program = tl.program_id(0)
    tl.store(out, last - program)


def race(*, seqlens, cu_seqlens):
    """Two programs write index 0; in program order the right one is last."""
    _sum(seqlens, cu_seqlens)
    _both_write[(2,)](cu_seqlens, 1)


@triton.jit
def _nothing(out):
    return


def empty_grid(*, seqlens, cu_seqlens):
    """A launch with one program per request, also where there is none."""
    _sum(seqlens, cu_seqlens)
    _nothing[(len(seqlens),)](cu_seqlens)


def always_empty_grid(*, seqlens, cu_seqlens):
    """A launch that does nothing, of no program."""
    _sum(seqlens, cu_seqlens)
    _nothing[(0,)](cu_seqlens)


def huge_grid(*, seqlens, cu_seqlens):
    """Too many programs along y, each of which would write."""
    _sum(seqlens, cu_seqlens)
    _touch[(1, 65536)](cu_seqlens, 0, MODE=1)


# -- the process --------------------------------------------------------------------------------------------------------


def segfault(*, seqlens, cu_seqlens):
    """A native crash, for batches with more than one request."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens) > 1:
        ctypes.string_at(0)


def endless_loop(*, seqlens, cu_seqlens):
    """No return, for batches with more than one request."""
    _sum(seqlens, cu_seqlens)
    while len(seqlens) > 1:
        time.sleep(0.01)


def quiet_exit(*, seqlens, cu_seqlens):
    """The process ends as if all were well."""
    _sum(seqlens, cu_seqlens)
    if len(seqlens) > 1:
        os._exit(0)


def raises(*, seqlens, cu_seqlens):
    """An exception, after something was written."""
    _sum(seqlens, cu_seqlens)
    raise RuntimeError("planted")


_calls = 0


def sometimes(*, seqlens, cu_seqlens):
    """Wrong every third time."""
    global _calls
    _calls += 1
    _sum(seqlens, cu_seqlens)
    if _calls % 3 == 0:
        cu_seqlens[0] = 1


# -- a toy contract with the roles and states that the real families do not use yet -------------------------------------


def toy(*, values, order, halves):
    """values += 1 in place; order is any permutation of them; halves within rounding; the last cell is free."""
    n = len(values) - 1
    order[:n] = values[:n].flip(0)
    halves[:n] = values[:n] / 2
    values[:n] += 1
    values[n] = 99


def toy_wrong_inout(*, values, order, halves):
    toy(values=values, order=order, halves=halves)
    values[0] += 1


def toy_wrong_order(*, values, order, halves):
    toy(values=values, order=order, halves=halves)
    order[0] = order[1]


def toy_wrong_float(*, values, order, halves):
    toy(values=values, order=order, halves=halves)
    halves[1] *= 1.001


def toy_nan(*, values, order, halves):
    toy(values=values, order=order, halves=halves)
    halves[0] = float("nan")


# -- a toy with every float dtype and three dimensions ------------------------------------------------------------------


def convert(*, numbers, fp8, bf16, cube, copy, flags, weights, live):
    """Convert with torch's rounding; copy the live pages."""
    fp8.copy_(numbers.to(torch.float8_e4m3fn))
    bf16.copy_(numbers)
    for page in live:
        copy[page] = (cube[page].float() * weights.float()).to(copy.dtype)
        flags[page] = True


def convert_truncates(*, bf16, numbers, **rest):
    convert(bf16=bf16, numbers=numbers, **rest)
    bf16.view(torch.int16).copy_(numbers.view(torch.int32) >> 16)


def convert_wrong_plane(*, cube, copy, live, **rest):
    convert(cube=cube, copy=copy, live=live, **rest)
    for page in live:
        copy[page, 1] = cube[page, 0]


def convert_flags_all(*, flags, **rest):
    convert(flags=flags, **rest)
    flags[:] = True


def convert_writes_dead_page(*, copy, **rest):
    convert(copy=copy, **rest)
    copy[1] = 0


def convert_between_pages(*, copy, **rest):
    convert(copy=copy, **rest)
    torch.as_strided(copy, (3, 7), (copy.stride(0), 1))[0, 6] = 1


@triton.jit
def _sum_pages(cube, out, pitch):
    lanes = tl.arange(0, 4)
    value = tl.load(cube + lanes * pitch)
    tl.store(out + lanes, value > 0)


def convert_reads_dead_page(*, cube, flags, **rest):
    convert(cube=cube, flags=flags, **rest)
    _sum_pages[(1,)](cube, torch.empty(4), cube.stride(0))
