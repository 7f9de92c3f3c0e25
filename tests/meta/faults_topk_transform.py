"""Faults of the topk_transform family, each as small as the real one that it is modelled on."""

import torch
import triton
import triton.language as tl

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _positions(score, lengths, row_starts, topk, best=None):
    """Per row the positions of its keys."""
    best = best or (lambda keys, k: keys.topk(k).indices)
    starts = [0] * len(lengths) if row_starts is None else row_starts.tolist()
    for b, (length, start) in enumerate(zip(lengths.clamp(min=0).tolist(), starts)):
        yield torch.arange(length) if length <= topk else best(score[b, start : start + length], topk)


def _fill(row, values):
    row[len(values) :] = -1
    row[: len(values)] = values


def _select(score, lengths, row_starts, out, topk, name=lambda b, keys: keys, best=None):
    for b, keys in enumerate(_positions(score, lengths, row_starts, topk, best)):
        _fill(out[b, :topk], name(b, keys))


def _owners(cu_seqlens_q, rows):
    if cu_seqlens_q is None:
        return list(range(rows))
    ends = cu_seqlens_q.tolist()
    return [i for i in range(len(ends) - 1) for _ in range(ends[i], ends[i + 1])]


def _look_up(page_table, topk_indices, result, owners, negative=lambda i: i < 0):
    for t, owner in enumerate(owners):
        for j, i in enumerate(topk_indices[t].tolist()):
            result[t, j] = -1 if negative(i) else page_table[owner, i]


def _prefill_owners(extend_lens_cpu):
    return [i for i, n in enumerate(extend_lens_cpu) for _ in range(n)]


def honest_topk(*, score, lengths, row_starts, indices, topk):
    _select(score, lengths, row_starts, indices, topk)


# -- index transforms ---------------------------------------------------------------------------------------------------


@triton.jit
def _gather_row(table, indices, result, pitch, index_pitch, result_pitch, topk, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    j = tl.arange(0, BLOCK)
    index = tl.load(indices + row * index_pitch + j, mask=j < topk, other=-1)
    slot = tl.load(table + row * pitch + index, mask=index >= 0, other=-1)
    tl.store(result + row * result_pitch + j, slot, mask=j < topk)


def _gathered(pitch, wide, page_table, topk_indices, result):
    """By the kernel where it can, that is for small rows with unit column stride."""
    rows, topk = topk_indices.shape
    dense = all(t.stride(1) == 1 for t in (page_table, topk_indices, result))
    if rows and topk <= 128 and dense and page_table.shape[1]:
        _gather_row[(rows,)](page_table, topk_indices, result, pitch(page_table), topk_indices.stride(0), result.stride(0),
                             topk, WIDE=wide, BLOCK=128)
    else:
        _look_up(page_table, topk_indices, result, range(rows))


def pitch_from_shape(*, page_table, topk_indices, result):
    """The row pitch is the width, also of a slice or of a row that is expanded."""
    _gathered(lambda table: table.shape[1], True, page_table, topk_indices, result)


def int32_rows(*, page_table, topk_indices, result):
    """row * pitch in 32 bits."""
    _gathered(lambda table: table.stride(0), False, page_table, topk_indices, result)


def only_minus_one(*, page_table, topk_indices, result):
    """Only -1 is taken for no index; other negatives count from the end."""
    columns = page_table.shape[1]
    for t, row in enumerate(topk_indices.tolist()):
        for j, i in enumerate(row):
            result[t, j] = -1 if i == -1 or i < -columns else page_table[t, i]


def holes_untouched(*, page_table, topk_indices, result):
    """Places without an index keep what they held."""
    for t, row in enumerate(topk_indices.tolist()):
        for j, i in enumerate(row):
            if i >= 0:
                result[t, j] = page_table[t, i]


def row_of_the_token(*, page_table, topk_indices, result, extend_lens_cpu, output_num_tokens, **rest):
    """The token's number is taken for its request's."""
    tokens = sum(extend_lens_cpu)
    result[tokens : output_num_tokens or len(topk_indices), : topk_indices.shape[1]] = -1
    _look_up(page_table, topk_indices, result, [min(t, len(page_table) - 1) for t in range(tokens)])


def empty_requests_skipped(*, page_table, topk_indices, result, extend_lens_cpu, output_num_tokens, page_table_is_expanded,
                           **rest):
    """A request without tokens does not count as a row of the table."""
    tokens = sum(extend_lens_cpu)
    owners = range(tokens) if page_table_is_expanded else _prefill_owners([n for n in extend_lens_cpu if n])
    rows = len(topk_indices) if output_num_tokens is None else output_num_tokens
    result[tokens:rows, : topk_indices.shape[1]] = -1
    _look_up(page_table, topk_indices, result, owners)


def padding_forgotten(*, page_table, topk_indices, result, extend_lens_cpu, page_table_is_expanded, **rest):
    """Rows behind the tokens keep what they held."""
    tokens = sum(extend_lens_cpu)
    _look_up(page_table, topk_indices, result, range(tokens) if page_table_is_expanded else _prefill_owners(extend_lens_cpu))


def offset_on_everything(*, topk_indices, topk_indices_offset, result):
    """The offset is added to -1 too."""
    rows, topk = topk_indices.shape
    result[:rows, :topk] = topk_indices + topk_indices_offset[:rows, None]


def zeros_for_padding(*, topk_indices, result, num_tokens):
    """Key 0 instead of none."""
    rows, topk = topk_indices.shape
    result[:rows, :topk] = topk_indices
    result[rows:num_tokens, :topk] = 0


def padding_overflows(*, topk_indices, result, num_tokens):
    """Every row that the buffer has is padded."""
    rows, topk = topk_indices.shape
    result[:rows, :topk] = topk_indices
    result[rows:, :topk] = -1


# -- selections ---------------------------------------------------------------------------------------------------------


def ties_overflow(*, score, lengths, row_starts, indices, topk):
    """Of keys equal to the threshold only two are written; the places of the rest keep what they held (SGLang #30512)."""
    for b, keys in enumerate(_positions(score, lengths, row_starts, topk)):
        if int(lengths[b]) <= topk:
            _fill(indices[b, :topk], keys)
            continue
        row = score[b, 0 if row_starts is None else int(row_starts[b]) :][: int(lengths[b])]
        equal = [p for p in keys.tolist() if row[p] == row[keys].min()]
        kept = [p for p in keys.tolist() if p not in equal[2:]]
        indices[b, : len(kept)] = torch.tensor(kept, dtype=torch.int32)


def short_of_infinities(*, score, lengths, row_starts, indices, topk):
    """Scores that an fp16 cannot hold are lost, and -1 stands in their places (SGLang #30645)."""
    def best(keys, k):
        found = keys.topk(k).indices
        return torch.where(keys[found].abs() > 65504, torch.tensor(-1), found)

    _select(score, lengths, row_starts, indices, topk, best=best)


def nothing_above_nan(*, score, lengths, row_starts, indices, topk):
    """A row of NaN alone gives what happened to lie in a scratch buffer (vLLM #49896)."""
    def best(keys, k):
        return keys.topk(k).indices if not keys.isnan().all() else torch.full((k,), 123456)

    _select(score, lengths, row_starts, indices, topk, best=best)


def candidates_cut(*, score, lengths, row_starts, indices, topk):
    """Only the first 4,096 keys of the threshold's bin are looked at (SGLang #36807)."""
    _select(score, lengths, row_starts, indices, topk, best=lambda keys, k: keys[:4096].topk(k).indices)


def candidate_list_of_16384(*, score, lengths, row_starts, indices, topk):
    """The keys of the threshold's bin go to a list of 16,384; the rest of them is dropped (SGLang before #17747)."""
    def best(keys, k):
        bins = keys.half().view(torch.int16) >> 8  # in the order of the scores, which are positive in the example
        threshold = bins[keys.topk(k).indices].min()
        listed = (bins == threshold).nonzero()[:, 0][:16384]
        kept = torch.cat([(bins > threshold).nonzero()[:, 0], listed])
        return kept[keys[kept].topk(k).indices]

    _select(score, lengths, row_starts, indices, topk, best=best)


def positions_of_16_bits(*, score, lengths, row_starts, indices, topk):
    """Positions are kept in 16 bits."""
    _select(score, lengths, row_starts, indices, topk, name=lambda b, keys: keys & 0xFFFF)


def no_row_starts(*, score, lengths, row_starts, indices, topk):
    """Columns are counted from 0 (SGLang #12583)."""
    _select(score, lengths, None, indices, topk)


def absolute_columns(*, score, lengths, row_starts, indices, topk):
    """Columns of the score instead of positions from the row's start."""
    starts = [0] * len(lengths) if row_starts is None else row_starts.tolist()
    _select(score, lengths, row_starts, indices, topk, name=lambda b, keys: keys + starts[b])


def reads_past_the_length(*, score, lengths, row_starts, indices, topk):
    """The row is rounded up to a vector of four (FlashInfer #2308)."""
    starts = [0] * len(lengths) if row_starts is None else row_starts.tolist()
    for b, (length, start) in enumerate(zip(lengths.clamp(min=0).tolist(), starts)):
        rounded = min(-(-length // 4) * 4, score.shape[1] - start)
        _fill(indices[b, :topk],
              torch.arange(length) if length <= topk else score[b, start : start + rounded].topk(topk).indices)


def twice_the_best(*, score, lengths, row_starts, indices, topk):
    """The best key stands twice, and the last one is lost."""
    def best(keys, k):
        found = keys.topk(k).indices
        return torch.cat([found[:1], found[:-1]]) if k > 1 else found

    _select(score, lengths, row_starts, indices, topk, best=best)


def one_short(*, score, lengths, row_starts, indices, topk):
    """A row of more than topk keys ends in -1."""
    _select(score, lengths, row_starts, indices, topk, best=lambda keys, k: keys.topk(k - 1).indices)


def mode_by_shape(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk):
    """As many requests as rows: decode, also where one has two rows and another none."""
    rows = len(lengths)
    guessed = row_starts is None and len(page_table) == rows
    owners = list(range(rows)) if guessed else _owners(cu_seqlens_q, rows)
    _select(score, lengths, row_starts, dst_page_table, topk, name=lambda b, keys: page_table[owners[b], keys])


def unsigned_length(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk):
    """A negative length is a very large one where the keys are copied in order."""
    owners = _owners(cu_seqlens_q, len(lengths))
    _select(score, lengths, row_starts, dst_page_table, topk, name=lambda b, keys: page_table[owners[b], keys])
    for b in range(len(lengths)):
        if lengths[b] < 0:
            _fill(dst_page_table[b, :topk], page_table[owners[b], :topk])


def positions_for_slots(*, score, lengths, row_starts, page_table, cu_seqlens_q, dst_page_table, topk):
    """Rows of at most topk keys hold positions, as if the table were the identity."""
    owners = _owners(cu_seqlens_q, len(lengths))
    _select(score, lengths, row_starts, dst_page_table, topk,
            name=lambda b, keys: keys if len(keys) < topk else page_table[owners[b], keys])


def offset_of_the_first(*, score, lengths, row_starts, topk_indices_offset, topk_indices_ragged, topk):
    """Every row has the first row's offset."""
    _select(score, lengths, row_starts, topk_indices_ragged, topk, name=lambda b, keys: keys + topk_indices_offset[0])


def offset_on_padding(*, score, lengths, row_starts, topk_indices_offset, topk_indices_ragged, topk):
    """The offset is added to -1 too."""
    _select(score, lengths, row_starts, topk_indices_ragged, topk)
    topk_indices_ragged[: len(lengths), :topk] += topk_indices_offset[: len(lengths), None]


def offset_in_the_page_lost(*, score, lengths, real_page_table, page_indices, topk, page_size):
    """The page's first slot for every key in it."""
    _select(score, lengths, None, page_indices, topk, name=lambda b, keys: real_page_table[b, keys // page_size] * page_size)


def pages_of_the_row_before(*, score, lengths, real_page_table, page_indices, topk, page_size):
    """Row 0's table for every row."""
    def name(b, keys):
        return real_page_table[0, (keys // page_size).clamp(max=real_page_table.shape[1] - 1)] * page_size + keys % page_size

    _select(score, lengths, None, page_indices, topk, name=name)


def _whole_vectors(score):
    if score.stride(0) % 4 or score.data_ptr() % 16:
        raise ValueError(f"score.stride(0) is {score.stride(0)} at address {score.data_ptr()}: no whole vectors")


def sixteen_bytes_at_once(*, score, lengths, real_page_table, page_indices, topk, page_size):
    """Refuses rows that its vector loads could not read."""
    def name(b, keys):
        return real_page_table[b, keys // page_size] * page_size + keys % page_size

    _whole_vectors(score)
    _select(score, lengths, None, page_indices, topk, name=name)


def sixteen_bytes_at_once_from_any_row(*, score, lengths, row_starts, indices, topk):
    """The same for a score that promises no such pitch."""
    _whole_vectors(score)
    honest_topk(score=score, lengths=lengths, row_starts=row_starts, indices=indices, topk=topk)


_counted: dict[int, int] = {}


def counter_left(*, score, lengths, row_starts, indices, topk):
    """A counter of written places is not cleared for the next call on the same buffer (vLLM #41444)."""
    used = _counted.get(indices.data_ptr(), 0)
    _select(score, lengths, row_starts, indices, topk)
    if used and len(lengths):
        indices[0, :topk] = indices[0, :topk].roll(1)
        indices[0, 0] = -1
    _counted[indices.data_ptr()] = used + 1
