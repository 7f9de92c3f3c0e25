"""Planted faults in the page_table family: one function per fault, modelled on real ones, each in place of a contract."""

import torch
import triton
import triton.language as tl
from first_results import keep

# -- honest bodies that the faults spoil --------------------------------------------------------------------------------


def _rows(req_pool_indices, row_repeats, bs_idx, bs, draft_tokens) -> list[int]:
    """The request of every row."""
    chosen = range(bs) if bs_idx is None else bs_idx.tolist()
    repeats = [draft_tokens] * bs if row_repeats is None else row_repeats[:bs].tolist()
    return [i for i in chosen for _ in range(repeats[i])]


def _gather(owners, req_to_token, req_pool_indices, cache_seqlens, page_table_1, tail=False, max_len=0, **rest):
    for row, i in enumerate(owners):
        n = max_len if tail else int(cache_seqlens[i])
        page_table_1[row, :n] = req_to_token[int(req_pool_indices[i]), :n]


def _batch(call) -> list[int]:
    names = ("req_pool_indices", "row_repeats", "bs_idx", "bs", "draft_tokens")
    return _rows(**{n: call[n] for n in names})


# -- gather_page_table --------------------------------------------------------------------------------------------------


def rows_dealt_out(**call):
    """`repeat` for `repeat_interleave`: rows a b a b instead of a a b b."""
    owners = _batch(call)
    if call["row_repeats"] is None and call["bs_idx"] is None and call["bs"]:
        owners = [row % call["bs"] for row in range(len(owners))]
    _gather(owners, **call)


def stale_repeats(**call):
    """The repeats of the step before, with the same sum (SGLang #15429)."""
    if call["row_repeats"] is not None:
        call = {**call, "row_repeats": call["row_repeats"][: call["bs"]].flip(0)}
    _gather(_batch(call)[: call["total_rows"]], **call)


def at_least_one_row(**call):
    """A request without rows gets one."""
    if call["row_repeats"] is not None:
        call = {**call, "row_repeats": call["row_repeats"][: call["bs"]].clamp(min=1)}
    _gather(_batch(call)[: call["total_rows"]], **call)


def selection_ignored(**call):
    """As many rows as were selected, of the first requests (SGLang #18280)."""
    owners = _batch(call)
    if call["bs_idx"] is not None and call["row_repeats"] is None:
        owners = [k // call["draft_tokens"] for k in range(len(owners))]
    _gather(owners, **{**call, "cache_seqlens": call["cache_seqlens"].clamp(max=call["max_len"])})


def slots_in_a_row(*, req_to_token, req_pool_indices, cache_seqlens, page_table_1, **call):
    """The first slot and its successors (SGLang #15469)."""
    for row, i in enumerate(_batch({**call, "req_pool_indices": req_pool_indices})):
        n = int(cache_seqlens[i])
        if n:
            page_table_1[row, :n] = req_to_token[int(req_pool_indices[i]), 0] + torch.arange(n)


def tail_copied(**call):
    """All columns, as upstream's gather does, without saying so."""
    _gather(_batch(call), tail=True, **call)


def pitch_is_the_width(*, req_to_token, req_pool_indices, cache_seqlens, page_table_1, **call):
    """The pitch of the request table is taken from its shape."""
    _launch(req_to_token, req_to_token.shape[1], torch.int64, req_pool_indices, cache_seqlens, page_table_1, call)


def offset_in_32_bits(*, req_to_token, req_pool_indices, cache_seqlens, page_table_1, **call):
    """slot * pitch in 32 bits (SGLang #34725)."""
    _launch(req_to_token, req_to_token.stride(0), torch.int32, req_pool_indices, cache_seqlens, page_table_1, call)


def _launch(table, pitch, dtype, req_pool_indices, cache_seqlens, page_table_1, call):
    for row, i in enumerate(_batch({**call, "req_pool_indices": req_pool_indices})):
        _one_row[(1,)](table, page_table_1, req_pool_indices[i].to(dtype), row, int(cache_seqlens[i]), pitch, table.stride(1),
                       *page_table_1.stride(), BLOCK=256)


@triton.jit(do_not_specialize=["row", "length", "table_pitch", "table_step", "out_pitch", "out_step"])
def _one_row(table, out, slot, row, length, table_pitch, table_step, out_pitch, out_step, BLOCK: tl.constexpr):
    """The offset of a row has the dtype of its slot."""
    offset = tl.load(slot)
    offset = offset * table_pitch.to(offset.dtype)
    for start in range(0, length, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        tokens = tl.load(table + offset + column * table_step, mask=column < length, other=0)
        tl.store(out + row.to(tl.int64) * out_pitch + column * out_step, tokens, mask=column < length)


# -- real_page_table ----------------------------------------------------------------------------------------------------


def _pages(page_table_1, out, page_size, pages):
    rows = len(page_table_1)
    out[:rows, : pages.shape[1]] = torch.div(pages, page_size, rounding_mode="floor")


def rounds_towards_zero(*, page_table_1, real_page_table, page_size):
    """-1 // 64 as in C (SGLang #36477 copies such a -1)."""
    pages = page_table_1[:, ::page_size]
    real_page_table[: len(pages), : pages.shape[1]] = torch.div(pages, page_size, rounding_mode="trunc")


def tokens_for_pages(*, page_table_1, real_page_table, page_size):
    """The first columns instead of every page_size-th (SGLang #23757)."""
    _pages(page_table_1, real_page_table, page_size, page_table_1[:, : -(-page_table_1.shape[1] // page_size)])


def cut_page_dropped(*, page_table_1, real_page_table, page_size):
    """Whole pages only."""
    whole = page_table_1.shape[1] // page_size
    _pages(page_table_1, real_page_table, page_size, page_table_1[:, : whole * page_size : page_size])


def page_of_the_last_token(*, page_table_1, real_page_table, page_size):
    """The last token of a page stands for it: right where pages are whole."""
    columns = page_table_1.shape[1]
    last = (torch.arange(0, columns, page_size) + page_size - 1).clamp(max=max(columns - 1, 0))
    _pages(page_table_1, real_page_table, page_size, page_table_1[:, last])


# -- results kept by address and size -----------------------------------------------------------------------------------


def kept_flattened(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """The slots of the first batch on these buffers."""
    def fill():
        flat = [page_table_1[i, :n] for i, n in enumerate(seq_lens[:bs].tolist())]
        page_table_1_flattened[:total_len] = torch.cat(flat) if flat else torch.empty(0, dtype=torch.int32)

    keep(fill, page_table_1_flattened[:total_len], (page_table_1, seq_lens), bs, max_len)


def kept_offsets(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """The offsets of the first batch on these buffers."""
    keep(lambda: _offsets(cu_seqlens_k[:bs], extend_seq_lens[:bs].long(), topk_indices_offset),
         topk_indices_offset[:total_len], (cu_seqlens_k, extend_seq_lens), bs)


def kept_boundaries(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """The boundaries of the first batch on these buffers."""
    if mode == "extend":
        keep(lambda: _bounds(extend_seq_lens[:bs], cu_seqlens_q), cu_seqlens_q[: bs + 1], (extend_seq_lens,), mode)
    else:
        _bounds(_ones(mode, bs, draft_tokens, extend_num_tokens), cu_seqlens_q)


# -- page_table_1_flattened ---------------------------------------------------------------------------------------------


def shared_slots_once(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """A slot that an earlier request had is left out (SGLang #15086)."""
    seen, flat = set(), []
    for i in range(bs):
        row = page_table_1[i, : int(seq_lens[i])].tolist()
        flat += [slot for slot in row if slot not in seen]
        seen |= set(row)
    page_table_1_flattened[: len(flat)] = torch.tensor(flat, dtype=torch.int32)


def rows_of_full_width(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """Request i begins at i * max_len, where that fits."""
    for i in range(bs):
        room = page_table_1_flattened[i * max_len : total_len]
        n = min(len(room), int(seq_lens[i]))
        room[:n] = page_table_1[i, :n]


def padded_requests_not_summed(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """The total leaves out requests of length 1 behind the others (SGLang #26880)."""
    lengths = seq_lens[:bs].tolist()
    real = bs
    while real > 1 and lengths[real - 1] == 1:
        real -= 1
    end = 0
    for i in range(real):
        page_table_1_flattened[end : end + lengths[i]] = page_table_1[i, : lengths[i]]
        end += lengths[i]


# -- topk_indices_offset ------------------------------------------------------------------------------------------------


def _offsets(starts, extends, out):
    values = torch.repeat_interleave(starts, extends)
    out[: len(values)] = values


def query_base(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """The start among the query tokens instead of the keys (SGLang #12583)."""
    extends = extend_seq_lens[:bs].long()
    _offsets((torch.cumsum(extends, 0) - extends).int(), extends, topk_indices_offset)


def end_for_start(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """cu_seqlens_k[1:]."""
    _offsets(cu_seqlens_k[1 : bs + 1], extend_seq_lens[:bs].long(), topk_indices_offset)


def idle_requests_skipped(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """Requests without query tokens are dropped from the lengths, and not from the starts."""
    extends = extend_seq_lens[:bs].long()
    extends = extends[extends > 0]
    _offsets(cu_seqlens_k[: len(extends)], extends, topk_indices_offset)


# -- cu_seqlens_q, max_seq_len_q ----------------------------------------------------------------------------------------


def _bounds(lengths, out):
    out[0] = 0
    out[1 : len(lengths) + 1] = torch.cumsum(lengths, 0)


def _ones(mode, bs, draft_tokens, extend_num_tokens):
    return torch.ones({"decode": bs, "target_verify": bs * draft_tokens}.get(mode, extend_num_tokens), dtype=torch.int64)


def verify_has_one_row_per_request(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """Verify planned as a decode (FlashInfer #3871)."""
    draft_tokens = 1 if mode == "target_verify" else draft_tokens
    _bounds(extend_seq_lens[:bs] if mode == "extend" else _ones(mode, bs, draft_tokens, extend_num_tokens), cu_seqlens_q)


def leftover_lengths(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """A decode takes the lengths of an earlier extend where there are any."""
    lengths = extend_seq_lens[:bs] if mode == "extend" else _ones(mode, bs, draft_tokens, extend_num_tokens)
    if mode == "decode" and extend_seq_lens is not None:
        lengths = extend_seq_lens[:bs] % 7
    _bounds(lengths, cu_seqlens_q)


def total_missing(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """`arange(rows)` for `arange(rows + 1)`."""
    if mode == "extend":
        _bounds(extend_seq_lens[:bs], cu_seqlens_q)
    else:
        rows = len(_ones(mode, bs, draft_tokens, extend_num_tokens))
        cu_seqlens_q[:rows] = torch.arange(rows)


def longest_is_the_last_boundary(*, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin):
    """max(indptr) (FlashInfer #1930)."""
    if mode == "extend" and (round_robin or any(extend_prefix_lens)):
        return sum(extend_seq_lens) if extend_seq_lens else 1
    return max_seq_len_k if mode == "extend" else 1


def nothing_selected_is_an_error(*, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin):
    """max() of an empty list."""
    if mode == "extend" and (round_robin or any(extend_prefix_lens)):
        return max(extend_seq_lens)
    return max_seq_len_k if mode == "extend" else 1
