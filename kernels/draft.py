"""Triton kernels of the draft family: no synchronisation, nothing allocated, one launch each.

`assign_draft_cache_locs` takes two launches: it takes the padding out of out_cache_loc in place, across requests, so every
new slot must be in the table before the first one is overwritten.

One program per request; a request's place in a ragged list is a masked sum over the requests before it. Rows of the request
table and all sums are 64 bits wide. What only the device knows (a slot outside the table, a list too short) is masked.
"""

import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BLOCK, BLOCK_REQUESTS = 128, 32
COST = {"assign_draft_cache_locs": {"launches": 2}}


@jit
def _extents(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, slots, columns, cells, pool_stride,
             row_stride, column_stride, start_stride, end_stride, loc_stride, INTO_TABLE: tl.constexpr,
             BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    zero = tl.zeros((), tl.int64)
    before = zero
    for first in range(0, request, BLOCK_REQUESTS):
        j = first + tl.arange(0, BLOCK_REQUESTS).to(tl.int64)
        start_j = tl.load(start_offset + j * start_stride, mask=j < request, other=0).to(tl.int64)
        end_j = tl.load(end_offset + j * end_stride, mask=j < request, other=0).to(tl.int64)
        before += tl.sum(tl.maximum(end_j - start_j, 0), 0)

    start = tl.load(start_offset + (zero + request) * start_stride).to(tl.int64)
    end = tl.load(end_offset + (zero + request) * end_stride).to(tl.int64)
    slot = tl.load(req_pool_indices + (zero + request) * pool_stride).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    row = req_to_token + slot * row_stride
    count = tl.where(there, tl.minimum(end - start, cells - before), 0).to(tl.int32)
    for first in range(0, count, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        column = start + token
        held = (token < count) & (column >= 0) & (column < columns)
        if INTO_TABLE:
            locs = tl.load(out_cache_loc + (before + token) * loc_stride, mask=held, other=0)
            tl.store(row + column * column_stride, locs.to(tl.int32), mask=held)
        else:
            locs = tl.load(row + column * column_stride, mask=held, other=0)
            tl.store(out_cache_loc + before + token, locs, mask=held)


@remembered
def assign_req_to_token_pool(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    """Put every request's new slots into its columns of the request table (oracles/draft.py has the contract).

    Args:
        req_pool_indices, start_offset, end_offset: int32 or int64 [>= bs], any stride.
        req_to_token: int32 [slots, columns], any strides. out_cache_loc: int32 or int64, any stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or req_to_token shares memory with another; nothing was written.
    """
    inputs = dict(req_pool_indices=req_pool_indices, start_offset=start_offset, end_offset=end_offset)
    device = _check_batch(inputs, req_to_token, bs)
    checks.tensor("out_cache_loc", out_cache_loc, checks.INT, (0,), device)
    checks.own_cells("req_to_token", req_to_token)
    checks.apart({"req_to_token": req_to_token}, {**inputs, "out_cache_loc": out_cache_loc})
    _launch_extents(inputs, req_to_token, out_cache_loc, bs, True)


@remembered
def assign_extend_cache_locs(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    """Read the slots of every request's columns, one request after the other; what is behind them stays.

    Args:
        req_pool_indices, req_to_token, start_offset, end_offset: as for `assign_req_to_token_pool`.
        out_cache_loc: int32 or int64, unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or out_cache_loc shares memory with another; nothing was written.
    """
    inputs = dict(req_pool_indices=req_pool_indices, start_offset=start_offset, end_offset=end_offset)
    device = _check_batch(inputs, req_to_token, bs)
    _check_outputs({"out_cache_loc": (out_cache_loc, (0,))}, {**inputs, "req_to_token": req_to_token}, device)
    _launch_extents(inputs, req_to_token, out_cache_loc, bs, False)


def _launch_extents(inputs, req_to_token, out_cache_loc, bs: int, into_table: bool) -> None:
    if bs == 0:
        return
    pool, start, end = inputs.values()
    _extents[(bs,)](
        pool, req_to_token, start, end, out_cache_loc, *req_to_token.shape, out_cache_loc.numel(), pool.stride(0),
        req_to_token.stride(0), req_to_token.stride(1), start.stride(0), end.stride(0), out_cache_loc.stride(0),
        INTO_TABLE=into_table, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK)


@jit
def _uniform(req_pool_indices, req_to_token, starts, out_cache_loc, positions, slots, columns, count, positions_each, slope,
             pool_stride, row_stride, column_stride, start_stride, position_row_stride, position_stride,
             HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr):
    """`count` slots from each start; `positions_each` positions per request, each `slope` more than the one before."""
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + request * start_stride).to(tl.int64)
    slot = tl.load(req_pool_indices + request * pool_stride).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    row = req_to_token + slot * row_stride
    for first in range(0, count, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        column = start + token
        held = there & (token < count) & (column >= 0) & (column < columns)
        locs = tl.load(row + column * column_stride, mask=held, other=0)
        tl.store(out_cache_loc + request * count + token, locs, mask=held)
        if HAS_POSITIONS:
            tl.store(positions + request * position_row_stride + token * position_stride, start + token * slope,
                     mask=token < positions_each)


@remembered
def assign_extend_cache_locs_uniform(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs,
                                     draft_token_num):
    """Read `draft_token_num` slots from every request's start on; fill in the columns' numbers where wanted.

    Args:
        req_pool_indices, start_offset: int32 or int64 [>= bs], any stride. req_to_token: int32 [slots, columns], any strides.
        out_cache_loc: int32 or int64 [>= bs * draft_token_num], unit stride.
        positions_out: int32 or int64 [>= bs, >= draft_token_num], any strides, or None.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs share memory; nothing was written.
    """
    checks.positive("draft_token_num", draft_token_num)
    inputs = dict(req_pool_indices=req_pool_indices, start_offset=start_offset)
    device = _check_batch(inputs, req_to_token, bs)
    outputs = {"out_cache_loc": (out_cache_loc, (bs * draft_token_num,)),
               "positions_out": (positions_out, (bs, draft_token_num))}
    _check_outputs(outputs, {**inputs, "req_to_token": req_to_token}, device)
    given = positions_out is not None
    strides = (positions_out.stride(0), positions_out.stride(1)) if given else (0, 0)
    _launch_uniform(inputs, req_to_token, out_cache_loc, positions_out, bs, draft_token_num, draft_token_num, 1, strides)


@remembered
def assign_draft_cache_locs_contiguous(*, req_pool_indices, req_to_token, seq_lens, out_cache_loc, positions, bs, topk,
                                       num_steps):
    """Read the `topk * num_steps` slots behind every request; fill in the branches' positions where wanted.

    Args:
        req_pool_indices, seq_lens: int32 or int64 [>= bs], any stride. req_to_token: int32 [slots, columns], any strides.
        out_cache_loc: int32 or int64 [>= bs * topk * num_steps], unit stride.
        positions: int32 or int64 [>= bs * topk], unit stride, or None.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs share memory; nothing was written.
    """
    checks.positive("topk", topk)
    checks.positive("num_steps", num_steps)
    inputs = dict(req_pool_indices=req_pool_indices, seq_lens=seq_lens)
    device = _check_batch(inputs, req_to_token, bs)
    outputs = {"out_cache_loc": (out_cache_loc, (bs * topk * num_steps,)), "positions": (positions, (bs * topk,))}
    _check_outputs(outputs, {**inputs, "req_to_token": req_to_token}, device)
    _launch_uniform(inputs, req_to_token, out_cache_loc, positions, bs, topk * num_steps, topk, 0, (topk, 1))


def _launch_uniform(inputs, req_to_token, out_cache_loc, positions, bs, count, positions_each, slope, strides) -> None:
    if bs == 0:
        return
    pool, start = inputs.values()
    _uniform[(bs,)](
        pool, req_to_token, start, out_cache_loc, out_cache_loc if positions is None else positions, *req_to_token.shape,
        count, positions_each, slope, pool.stride(0), req_to_token.stride(0), req_to_token.stride(1), start.stride(0),
        *strides, HAS_POSITIONS=positions is not None, BLOCK=BLOCK)


@jit
def _after_decode(accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, cells, tokens, token_stride, seq_stride,
                  accept_stride, BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    zero = tl.zeros((), tl.int64)
    before = zero
    for first in range(0, request, BLOCK_REQUESTS):
        j = first + tl.arange(0, BLOCK_REQUESTS).to(tl.int64)
        accept_j = tl.load(accept_lens + j * accept_stride, mask=j < request, other=0).to(tl.int64)
        before += tl.sum(tl.maximum(accept_j, 0), 0)
    seq = tl.load(seq_lens + (zero + request) * seq_stride).to(tl.int64)
    accept = tl.load(accept_lens + (zero + request) * accept_stride).to(tl.int64)
    count = tl.minimum(accept, cells - before).to(tl.int32)
    for first in range(0, count, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(positions + before + token, seq - accept + token, mask=token < count)
    last = before + accept - 1
    some = (accept >= 1) & (last < tokens)
    tl.store(bonus_tokens + request, tl.load(accept_tokens + last * token_stride, mask=some, other=0), mask=some)


@remembered
def create_extend_after_decode_spec_info(*, accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, bs, num_steps):
    """Positions of the accepted tokens, and each request's last accepted token.

    Args:
        accept_tokens: int32 or int64, any stride. seq_lens, accept_lens: int32 or int64 [>= bs], any stride.
        positions, bonus_tokens [>= bs]: int32 or int64, unit stride.
        num_steps: accepted for the contract's sake; this kernel needs no bound.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs share memory; nothing was written.
    """
    checks.positive("bs", bs, 0)
    device = checks.device_of("accept_tokens", accept_tokens)
    inputs = dict(accept_tokens=accept_tokens, seq_lens=seq_lens, accept_lens=accept_lens)
    for name, value in inputs.items():
        checks.tensor(name, value, checks.INT, (0 if name == "accept_tokens" else bs,), device)
    _check_outputs({"positions": (positions, (0,)), "bonus_tokens": (bonus_tokens, (bs,))}, inputs, device,
                   needed=("positions", "bonus_tokens"))
    if bs == 0:
        return
    _after_decode[(bs,)](
        accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, positions.numel(), accept_tokens.numel(),
        accept_tokens.stride(0), seq_lens.stride(0), accept_lens.stride(0), BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK)


@triton.jit
def _new_slots(seq, topk, num_steps, page_size, PAGED: tl.constexpr):
    """Tokens on the last, partly filled page, the distance of branches, and new slots, of requests with `seq` tokens."""
    if PAGED:
        partial = seq % page_size
        apart = (partial + num_steps + page_size - 1) // page_size * page_size
        count = apart * topk - partial
    else:
        partial, apart, count = seq * 0, seq * 0 + num_steps, seq * 0 + topk * num_steps
    return partial, apart, count


@jit
def _draft_into_table(req_pool_indices, req_to_token, seq_lens, out_cache_loc, slots, columns, cells, topk, num_steps,
                      page_size, pool_stride, row_stride, column_stride, seq_stride, PAGED: tl.constexpr,
                      BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    zero = tl.zeros((), tl.int64)
    before = zero
    for first in range(0, request, BLOCK_REQUESTS):
        j = first + tl.arange(0, BLOCK_REQUESTS).to(tl.int64)
        seq_j = tl.load(seq_lens + j * seq_stride, mask=j < request, other=0).to(tl.int64)
        partial_j, apart_j, count_j = _new_slots(seq_j, topk, num_steps, page_size, PAGED)
        before += tl.sum(tl.where(j < request, count_j, 0), 0)
    seq = tl.load(seq_lens + (zero + request) * seq_stride).to(tl.int64)
    partial, apart, count = _new_slots(seq, topk, num_steps, page_size, PAGED)
    slot = tl.load(req_pool_indices + (zero + request) * pool_stride).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    row = req_to_token + slot * row_stride
    held = tl.where(there, tl.minimum(count, cells - before), 0).to(tl.int32)
    for first in range(0, held, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        column = seq + token
        inside = (token < held) & (column >= 0) & (column < columns)
        locs = tl.load(out_cache_loc + before + token, mask=inside, other=0)
        tl.store(row + column * column_stride, locs.to(tl.int32), mask=inside)


@jit
def _draft_from_table(req_pool_indices, req_to_token, seq_lens, out_cache_loc, source, target, slots, columns, copies, topk,
                      num_steps, page_size, pool_stride, row_stride, column_stride, seq_stride, BLOCK_REQUESTS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """The drafts' slots of one branch per program, and the copies of its partial page."""
    request, branch = tl.program_id(0), tl.program_id(1)
    zero = tl.zeros((), tl.int64)
    before = zero
    for first in range(0, request, BLOCK_REQUESTS):
        j = first + tl.arange(0, BLOCK_REQUESTS).to(tl.int64)
        seq_j = tl.load(seq_lens + j * seq_stride, mask=j < request, other=0).to(tl.int64)
        before += tl.sum(seq_j % page_size, 0)
    seq = tl.load(seq_lens + (zero + request) * seq_stride).to(tl.int64)
    partial, apart, count = _new_slots(seq, topk, num_steps, page_size, True)
    slot = tl.load(req_pool_indices + (zero + request) * pool_stride).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    row = req_to_token + slot * row_stride
    for first in range(0, num_steps, BLOCK):
        draft = first + tl.arange(0, BLOCK).to(tl.int64)
        column = seq + branch * apart + draft
        held = there & (draft < num_steps) & (column >= 0) & (column < columns)
        locs = tl.load(row + column * column_stride, mask=held, other=0)
        tl.store(out_cache_loc + ((zero + request) * topk + branch) * num_steps + draft, locs, mask=held)
    copied = tl.where(branch > 0, partial, 0).to(tl.int32)
    for first in range(0, copied, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        own = seq - partial + token
        copy = own + branch * apart
        cell = (topk - 1) * before + (branch - 1) * partial + token
        held = there & (token < copied) & (copy < columns) & (cell < copies)
        tl.store(source + cell, tl.load(row + own * column_stride, mask=held, other=0), mask=held)
        tl.store(target + cell, tl.load(row + copy * column_stride, mask=held, other=0), mask=held)


@remembered
def assign_draft_cache_locs(*, req_pool_indices, req_to_token, seq_lens, extend_lens, num_new_pages_per_topk, out_cache_loc,
                            source_cache_loc, target_cache_loc, last_page_lens_cumsum, bs, topk, num_steps, page_size):
    """Put new slots into the table behind each request, and keep the drafts' slots in front of out_cache_loc, in place.

    Args:
        req_pool_indices, seq_lens: int32 or int64 [>= bs], any stride. req_to_token: int32 [slots, columns], any strides.
        out_cache_loc: int32 or int64 [>= bs * topk * num_steps], unit stride.
        extend_lens, num_new_pages_per_topk, last_page_lens_cumsum: int32 or int64 [>= bs], any stride, with page_size > 1 and
            topk > 1 and only then. This kernel computes them itself.
        source_cache_loc, target_cache_loc: int32 or int64, unit stride, likewise. Copies that they do not hold are cut.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs share memory; nothing was written.
    """
    for name, value in (("topk", topk), ("num_steps", num_steps), ("page_size", page_size)):
        checks.positive(name, value)
    inputs = dict(req_pool_indices=req_pool_indices, seq_lens=seq_lens)
    device = _check_batch(inputs, req_to_token, bs)
    derived = dict(extend_lens=extend_lens, num_new_pages_per_topk=num_new_pages_per_topk,
                   last_page_lens_cumsum=last_page_lens_cumsum)
    lists = dict(source_cache_loc=source_cache_loc, target_cache_loc=target_cache_loc)
    paged = page_size > 1 and topk > 1
    for name, value in {**derived, **lists}.items():
        if (value is not None) != paged:
            raise ValueError(f"{name} must be {'given' if paged else 'None'} for page_size {page_size} and topk {topk}")
    if paged:
        for name, value in derived.items():
            checks.tensor(name, value, checks.INT, (bs,), device)
    outputs = {"out_cache_loc": (out_cache_loc, (bs * topk * num_steps,)), **{n: (t, (0,)) for n, t in lists.items() if paged}}
    others = {**inputs, **(derived if paged else {})}
    _check_outputs(outputs, others, device, inout={"req_to_token": req_to_token})
    if bs == 0:
        return
    table = (req_pool_indices.stride(0), req_to_token.stride(0), req_to_token.stride(1), seq_lens.stride(0))
    _draft_into_table[(bs,)](
        req_pool_indices, req_to_token, seq_lens, out_cache_loc, *req_to_token.shape, out_cache_loc.numel(), topk, num_steps,
        page_size, *table, PAGED=paged, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK)
    if paged:
        copies = min(source_cache_loc.numel(), target_cache_loc.numel())
        _draft_from_table[(bs, topk)](
            req_pool_indices, req_to_token, seq_lens, out_cache_loc, source_cache_loc, target_cache_loc, *req_to_token.shape,
            copies, topk, num_steps, page_size, *table, BLOCK_REQUESTS=BLOCK_REQUESTS, BLOCK=BLOCK)


def _check_batch(inputs: dict, req_to_token, bs):
    """The batch's vectors and the table; returns their device."""
    checks.positive("bs", bs, 0)
    device = checks.device_of("req_to_token", req_to_token)
    checks.tensor("req_to_token", req_to_token, checks.INT32, (1, 0), device)
    for name, value in inputs.items():
        checks.tensor(name, value, checks.INT, (bs,), device)
    return device


def _check_outputs(outputs: dict, inputs: dict, device, inout=None, needed=("out_cache_loc",)) -> None:
    """Outputs (those that may be missing are None), apart from one another and from everything else."""
    given = {n: (t, least) for n, (t, least) in outputs.items() if t is not None or n in needed}
    for name, (value, least) in given.items():
        checks.tensor(name, value, checks.INT, least, device, unit_stride=len(least) == 1)
    written = {**{n: t for n, (t, _) in given.items()}, **(inout or {})}
    for name, value in written.items():
        checks.own_cells(name, value)
    checks.apart(written, inputs)
