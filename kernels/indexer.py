"""Triton kernels of the indexer family: one launch each, no synchronisation, nothing allocated.

Of the tokens before number g, `(g + cp_size - 1 - cp_rank) // cp_size` belong to a rank under round robin. So a request's
share, and where it begins in the rank's rows, follow from the sum of the lengths before it alone.
"""

import torch
import triton
import triton.language as tl

from . import _checks as checks
from ._jit import jit
from ._launch import remembered

BLOCK_REQUESTS, BLOCK_TOKENS, MOST_SPLITS = 32, 128, 32
ROW_TILE = (1, 1024)


@triton.jit
def _lengths(values, j, stride, mask):
    """Lengths as 64-bit numbers, none below 0."""
    return tl.maximum(tl.load(values + j * stride, mask=mask, other=0).to(tl.int64), 0)


@jit
def _indexer_k_start_end(extends, seqs, ks, ke, owners, total_len, cp_size, cp_rank, extend_stride, seq_stride,
                         BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per request: sum up what lies before it, then write its tokens of this rank."""
    request = tl.program_id(0)
    shift = cp_size - 1 - cp_rank
    first = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    place = tl.zeros((), tl.int32)
    for start in range(0, request, BLOCK_REQUESTS):
        j = start + tl.arange(0, BLOCK_REQUESTS)
        earlier = j < request
        extend_j = _lengths(extends, j, extend_stride, earlier)
        ends = first + tl.cumsum(extend_j, 0)
        share = (ends + shift) // cp_size - (ends - extend_j + shift) // cp_size
        here = earlier & ((share > 0) | (cp_size == 1))
        base += tl.sum(tl.where(here, _lengths(seqs, j, seq_stride, earlier), 0), 0)
        place += tl.sum(here.to(tl.int32), 0)
        first += tl.sum(extend_j, 0)

    extend = tl.maximum(tl.load(extends + request * extend_stride).to(tl.int64), 0)
    visible = tl.load(seqs + request * seq_stride).to(tl.int64) - extend + 1
    before = (first + shift) // cp_size
    count = (first + extend + shift) // cp_size - before
    for start in range(0, count.to(tl.int32), BLOCK):
        k = start + tl.arange(0, BLOCK)
        row = before + k
        token = row * cp_size + cp_rank - first
        fits = (k < count) & (row < total_len)
        tl.store(ks + row, (base + token * 0).to(tl.int32), mask=fits)
        tl.store(ke + row, (base + visible + token).to(tl.int32), mask=fits)
        tl.store(owners + row, place + k * 0, mask=fits)


@remembered
def indexer_k_start_end(*, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank):
    """Fill `[:total_len]` of ks, ke and token_to_batch_idx for the rank's query tokens (oracles/indexer.py).

    Args:
        extend_seq_lens, seq_lens: int32 or int64 [>= bs], any stride.
        ks, ke, token_to_batch_idx: int32 [>= total_len], unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs overlap; nothing was written.
    """
    checks.positive("total_len", total_len, 0)
    device = _requests(bs, cp_size, cp_rank, extend_seq_lens=extend_seq_lens, seq_lens=seq_lens)
    outputs = dict(ks=ks, ke=ke, token_to_batch_idx=token_to_batch_idx)
    _outputs(outputs, dict.fromkeys(outputs, total_len), device, dict(extend_seq_lens=extend_seq_lens, seq_lens=seq_lens))
    if bs == 0 or total_len == 0:
        return
    _indexer_k_start_end[(bs,)](extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, total_len, cp_size, cp_rank,
                                extend_seq_lens.stride(0), seq_lens.stride(0), BLOCK_REQUESTS=BLOCK_REQUESTS,
                                BLOCK=BLOCK_TOKENS)


@jit
def _cp_round_robin_split_q_seqs(extends, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank, stride, BLOCK: tl.constexpr):
    """One program: the requests that own a token move up to the front, block by block."""
    shift = cp_size - 1 - cp_rank
    first = tl.zeros((), tl.int64)
    place = tl.zeros((), tl.int32)
    for start in range(0, bs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        extend = _lengths(extends, j, stride, j < bs)
        ends = first + tl.cumsum(extend, 0)
        share = (ends + shift) // cp_size - (ends - extend + shift) // cp_size
        here = ((j < bs) & (share > 0)).to(tl.int32)
        target = place + tl.cumsum(here, 0) - 1
        fits = (here > 0) & (target < num_selected)
        tl.store(q_lens + target, share, mask=fits)
        tl.store(bs_idx + target, j, mask=fits)
        first += tl.sum(extend, 0)
        place += tl.sum(here, 0)


@remembered
def cp_round_robin_split_q_seqs(*, extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank):
    """Fill `[:num_selected]` of q_lens and bs_idx with the rank's counts above 0 and their requests.

    Args:
        extend_seq_lens: int32 or int64 [>= bs], any stride. q_lens: int32 or int64, bs_idx: int32, both [>= num_selected],
        unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs overlap; nothing was written.
    """
    checks.positive("num_selected", num_selected, 0)
    device = _requests(bs, cp_size, cp_rank, extend_seq_lens=extend_seq_lens)
    outputs = dict(q_lens=q_lens, bs_idx=bs_idx)
    _outputs(outputs, dict.fromkeys(outputs, num_selected), device, dict(extend_seq_lens=extend_seq_lens),
             dtypes={"q_lens": checks.INT})
    _cp_round_robin_split_q_seqs[(1,)](extend_seq_lens, q_lens, bs_idx, bs, num_selected, cp_size, cp_rank,
                                       extend_seq_lens.stride(0), BLOCK=1024)


def cp_round_robin_split_q_seqs_cpu(*, extend_seq_lens, cp_size, cp_rank):
    """The rank's counts above 0 and their requests, as lists.

    Raises:
        ValueError: cp_size below 1, or cp_rank outside it.
    """
    _rank(cp_size, cp_rank)
    first, q_lens, bs_idx = 0, [], []
    for i, extend in enumerate(extend_seq_lens):
        count = len(range((cp_rank - first) % cp_size, extend, cp_size))
        if count:
            q_lens.append(count)
            bs_idx.append(i)
        first += extend
    return {"q_lens": q_lens, "bs_idx": bs_idx}


@jit
def _every_nth_row(x, out, count, columns, cp_size, cp_rank, x_stride_0, x_stride_1, out_stride_0, out_stride_1,
                   BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Program (tile of rows, part): tiles of the part's columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    token = row * cp_size + cp_rank
    lanes = part * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, columns - part * BLOCK_COLUMNS, tl.num_programs(1) * BLOCK_COLUMNS):
        column = (start + lanes).to(tl.int64)
        fits = (row < count)[:, None] & (column < columns)[None, :]
        values = tl.load(x + token[:, None] * x_stride_0 + column[None, :] * x_stride_1, mask=fits, other=0)
        tl.store(out + row[:, None] * out_stride_0 + column[None, :] * out_stride_1, values, mask=fits)


@remembered
def cp_round_robin_split(*, x, split, cp_size, cp_rank):
    """Fill `split` with the values of the rank's tokens.

    Args:
        x: int32 or int64 [tokens], any stride. split: int32 or int64 [>= the rank's tokens], unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or they overlap; nothing was written.
    """
    count, _ = _split_arguments(x, split, cp_size, cp_rank, rank=1)
    if count:
        _every_nth_row[(triton.cdiv(count, 512), 1)](x, split, count, 1, cp_size, cp_rank, x.stride(0), 1, split.stride(0), 1,
                                                     BLOCK_ROWS=512, BLOCK_COLUMNS=1)


@remembered
def cp_round_robin_split_rows(*, x, split, cp_size, cp_rank):
    """Fill `split` with the rows of the rank's tokens.

    Args:
        x: int32 or int64 [tokens, columns], any strides. split: int32 or int64 [>= the rank's tokens, >= columns], any
        strides.
    Raises:
        TypeError, ValueError: an argument is not as above, or they overlap; nothing was written.
    """
    count, columns = _split_arguments(x, split, cp_size, cp_rank, rank=2)
    if count and columns:
        grid = (triton.cdiv(count, ROW_TILE[0]), min(triton.cdiv(columns, ROW_TILE[1]), MOST_SPLITS))
        _every_nth_row[grid](x, split, count, columns, cp_size, cp_rank, *x.stride(), *split.stride(), BLOCK_ROWS=ROW_TILE[0],
                             BLOCK_COLUMNS=ROW_TILE[1])


def _split_arguments(x, split, cp_size, cp_rank, rank: int) -> tuple[int, int]:
    """Check a split; returns the rank's tokens and the columns."""
    _rank(cp_size, cp_rank)
    device = checks.device_of("x", x)
    checks.tensor("x", x, checks.INT, (0,) * rank, device)
    count = len(range(cp_rank, x.shape[0], cp_size))
    checks.tensor("split", split, checks.INT, (count, *x.shape[1:]), device, unit_stride=rank == 1)
    checks.own_cells("split", split)
    checks.apart({"split": split}, {"x": x})
    return count, x.shape[-1]


@triton.jit
def _segment(length, segment, parts):
    """Start and size of a segment of a request that is cut into `parts`, the first ones one longer."""
    base = length // parts
    rest = length % parts
    return segment * base + tl.minimum(segment, rest), base + (segment < rest)


@jit
def _cp_zigzag_split(extends, seqs, tokens, q_lens, kv_lens, bs, num_tokens, total_len, cp_size, cp_rank, extend_stride,
                     seq_stride, BLOCK_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per request: sum up what lies before it, then write its two segments."""
    request = tl.program_id(0)
    parts = 2 * cp_size
    late = parts - 1 - cp_rank
    total = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int64)
    row_early = tl.zeros((), tl.int64)
    row_late = tl.zeros((), tl.int64)
    for start in range(0, bs, BLOCK_REQUESTS):
        j = start + tl.arange(0, BLOCK_REQUESTS)
        length = _lengths(extends, j, extend_stride, j < bs)
        early_start, early_size = _segment(length, cp_rank, parts)
        late_start, late_size = _segment(length, late, parts)
        total += tl.sum(length, 0)
        first += tl.sum(tl.where(j < request, length, 0), 0)
        row_early += tl.sum(tl.where(j < request, early_size, 0), 0)
        row_late += tl.sum(tl.where(j < bs - 1, early_size, 0) + tl.where(j < request, late_size, 0), 0)

    # The last request takes the padding; its early segment, too, lies before every late one.
    padding = tl.maximum(num_tokens - total, 0)
    last = tl.maximum(tl.load(extends + (bs - 1) * extend_stride).to(tl.int64), 0) + padding
    last_start, last_size = _segment(last, cp_rank, parts)
    row_late += last_size

    extend = tl.maximum(tl.load(extends + request * extend_stride).to(tl.int64), 0)
    prefix = tl.load(seqs + request * seq_stride).to(tl.int64) - extend
    length = extend + tl.where(request == bs - 1, padding, 0)
    for half in tl.static_range(2):
        begin, size = _segment(length, late if half else cp_rank, parts)
        row = row_late if half else row_early
        tl.store(q_lens + half * bs + request, size.to(tl.int32))
        tl.store(kv_lens + half * bs + request, (prefix + begin + size).to(tl.int32))
        for start in range(0, size.to(tl.int32), BLOCK):
            k = start + tl.arange(0, BLOCK)
            tl.store(tokens + row + k, (first + begin + k).to(tl.int32), mask=(k < size) & (row + k < total_len))


@remembered
def cp_zigzag_split(*, extend_seq_lens, seq_lens, token_indices, q_lens, kv_lens, bs, num_tokens, total_len, cp_size, cp_rank):
    """Fill `token_indices[:total_len]`, `q_lens[:2 * bs]` and `kv_lens[:2 * bs]` for the rank's two segments per request.

    Args:
        extend_seq_lens, seq_lens: int32 or int64 [>= bs], any stride.
        token_indices [>= total_len], q_lens, kv_lens [>= 2 * bs]: int32, unit stride.
    Raises:
        TypeError, ValueError: an argument is not as above, or outputs overlap; nothing was written.
    """
    checks.positive("num_tokens", num_tokens, 0)
    checks.positive("total_len", total_len, 0)
    device = _requests(bs, cp_size, cp_rank, extend_seq_lens=extend_seq_lens, seq_lens=seq_lens)
    outputs = dict(token_indices=token_indices, q_lens=q_lens, kv_lens=kv_lens)
    _outputs(outputs, dict(token_indices=total_len, q_lens=2 * bs, kv_lens=2 * bs), device,
             dict(extend_seq_lens=extend_seq_lens, seq_lens=seq_lens))
    if bs == 0:
        return
    _cp_zigzag_split[(bs,)](extend_seq_lens, seq_lens, token_indices, q_lens, kv_lens, bs, num_tokens, total_len, cp_size,
                                cp_rank, extend_seq_lens.stride(0), seq_lens.stride(0), BLOCK_REQUESTS=BLOCK_REQUESTS,
                                BLOCK=BLOCK_TOKENS)


def cp_zigzag_metadata(*, extend_seq_lens, seq_lens, num_tokens, cp_size, cp_rank):
    """The lists by which a batch is split into zigzag segments, and put together again (oracles/indexer.py).

    Raises:
        ValueError: cp_size below 1, cp_rank outside it, lists of different lengths, or fewer num_tokens than extend_seq_lens
        has in all.
    """
    _rank(cp_size, cp_rank)
    bs, parts, late = len(extend_seq_lens), 2 * cp_size, 2 * cp_size - 1 - cp_rank
    padding = num_tokens - sum(extend_seq_lens)
    if len(seq_lens) != bs or padding < 0:
        raise ValueError(f"seq_lens must have {bs} entries, got {len(seq_lens)}; num_tokens must be at least "
                         f"{sum(extend_seq_lens)}, got {num_tokens}")

    def cut(length: int) -> list[int]:
        base, rest = divmod(length, parts)
        return [base + 1] * rest + [base] * (parts - rest)

    def gathered(request: int, segment: int) -> int:
        """Where a segment stands when all ranks are gathered, each with its early segments before its late ones."""
        rank = min(segment, parts - 1 - segment)
        return (2 * rank + (segment >= cp_size)) * bs + request

    segments = [cut(n) for n in extend_seq_lens[:-1]] + [cut(n + padding) for n in extend_seq_lens[-1:]]
    prefixes = [s - e for s, e in zip(seq_lens, extend_seq_lens)]
    tokens = [sum(s[rank] + s[-1 - rank] for s in segments) for rank in range(cp_size)]
    return {
        "can_split": cp_size > 1 and min(extend_seq_lens, default=0) >= parts,
        "split_list": sum(segments, []),
        "zigzag_index": [i * parts + s for s in (cp_rank, late) for i in range(bs)],
        "per_rank_actual_token": tokens,
        "max_rank_len": [max(tokens)] * cp_size,
        "reverse_split_len": [s[k] for rank in range(cp_size) for k in (rank, -1 - rank) for s in segments],
        "cp_reverse_index": [gathered(i, s) for i in range(bs) for s in range(parts)],
        "q_lens_prev": [s[cp_rank] for s in segments],
        "q_lens_next": [s[late] for s in segments],
        "kv_lens_prev": [p + sum(s[: cp_rank + 1]) for p, s in zip(prefixes, segments)],
        "kv_lens_next": [p + sum(s[: late + 1]) for p, s in zip(prefixes, segments)],
    }


def _rank(cp_size, cp_rank) -> None:
    checks.positive("cp_size", cp_size)
    checks.positive("cp_rank", cp_rank, 0)
    if cp_rank >= cp_size:
        raise ValueError(f"cp_rank must be below {cp_size}, got {cp_rank}")


def _requests(bs, cp_size, cp_rank, **lengths) -> torch.device:
    """Check the batch size, the rank and the lengths of the requests; returns their device."""
    checks.positive("bs", bs, 0)
    _rank(cp_size, cp_rank)
    device = checks.device_of(*next(iter(lengths.items())))
    for name, value in lengths.items():
        checks.tensor(name, value, checks.INT, (bs,), device)
    return device


def _outputs(outputs: dict, least: dict[str, int], device, inputs: dict, dtypes: dict = {}) -> None:
    """1-D outputs of unit stride, of their own cells, apart from each other and from the inputs."""
    for name, value in outputs.items():
        checks.tensor(name, value, dtypes.get(name, checks.INT32), (least[name],), device, unit_stride=True)
        checks.own_cells(name, value)
    checks.apart(outputs, inputs)
