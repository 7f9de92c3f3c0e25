"""The topk_transform family in plain PyTorch: gathers for the index transforms, torch.topk row by row for the selections."""

import torch


def transform_index_page_table_decode(*, page_table, topk_indices, result):
    """A gather along the rows."""
    rows, topk = topk_indices.shape
    result[:rows, :topk] = _gathered(page_table[:rows], topk_indices)


def transform_index_page_table_prefill(*, page_table, topk_indices, cu_seqlens_q, result, extend_lens_cpu, output_num_tokens,
                                       page_table_is_expanded):
    """A gather along the rows of each token's request, then padding."""
    count, topk = topk_indices.shape
    tokens = sum(extend_lens_cpu)
    lengths = torch.tensor(extend_lens_cpu, dtype=torch.long, device=topk_indices.device)
    rows = torch.arange(tokens if page_table_is_expanded else len(lengths), device=topk_indices.device)
    owner = rows if page_table_is_expanded else rows.repeat_interleave(lengths)
    result[tokens : count if output_num_tokens is None else output_num_tokens, :topk] = -1
    result[:tokens, :topk] = _gathered(page_table[owner], topk_indices[:tokens])


def transform_index_ragged(*, topk_indices, topk_indices_offset, result):
    """Addition where there is an index."""
    rows, topk = topk_indices.shape
    moved = topk_indices + topk_indices_offset[:rows, None]
    result[:rows, :topk] = torch.where(topk_indices == -1, topk_indices, moved)


def pad_topk_indices(*, topk_indices, result, num_tokens):
    """Padding along the rows."""
    padded = torch.nn.functional.pad(topk_indices, (0, 0, 0, num_tokens - len(topk_indices)), value=-1)
    result[:num_tokens, : padded.shape[1]] = padded


def fast_topk(*, score, lengths, row_starts, indices, topk):
    """Positions."""
    for b, keys in enumerate(_best(score, lengths, row_starts, topk)):
        _fill(indices[b, :topk], keys)


def fast_topk_transform_paged(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk):
    """Slots in the row's request's table."""
    owner = torch.arange(len(lengths), device=lengths.device)
    if cu_seqlens_q is not None:
        owner = torch.searchsorted(cu_seqlens_q.contiguous(), owner, right=True) - 1
    for b, keys in enumerate(_best(score, lengths, row_starts, topk)):
        _fill(dst_page_table[b, :topk], page_table[owner[b], keys])


def fast_topk_transform_ragged(*, score, lengths, row_starts, topk_indices_offset, topk_indices_ragged, topk):
    """Positions from the row's offset on."""
    for b, keys in enumerate(_best(score, lengths, row_starts, topk)):
        _fill(topk_indices_ragged[b, :topk], keys + topk_indices_offset[b])


def topk_transform_v2(*, score, lengths, real_page_table, page_indices, topk, page_size):
    """Slots by the row's pages."""
    for b, keys in enumerate(_best(score, lengths, None, topk)):
        page = torch.div(keys, page_size, rounding_mode="floor")
        _fill(page_indices[b, :topk], real_page_table[b, page] * page_size + keys - page * page_size)


def _gathered(table, indices):
    slots = torch.nn.functional.pad(table, (1, 0), value=-1)  # column 0 is what every negative index gets
    return slots.gather(1, indices.long().clamp(min=-1) + 1).int()


def _best(score, lengths, row_starts, topk):
    """Per row the positions of its keys, the best of them if there are more than `topk`."""
    starts = [0] * len(lengths) if row_starts is None else row_starts.tolist()
    for b, (length, start) in enumerate(zip(lengths.clamp(min=0).tolist(), starts)):
        short = length <= topk
        yield torch.arange(length, device=score.device) if short else score[b, start : start + length].topk(topk).indices


def _fill(row, values):
    row[len(values) :] = -1
    row[: len(values)] = values
