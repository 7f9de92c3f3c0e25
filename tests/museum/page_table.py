"""Page tables of eager passes, and the query boundaries beside them."""

import torch
import triton
import triton.language as tl

from exhibit import exhibit, put, sums

# -- the page-1 table -----------------------------------------------------------------------------------------------------


@triton.jit
def _copy_rows(table, slots, lengths, out, table_row, table_step, out_row, out_step, BOUNDED: tl.constexpr,
               BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot, length = tl.load(slots + row), tl.load(lengths + row)
    for block in range(0, length, BLOCK):
        column = block + tl.arange(0, BLOCK)
        there = column < (length if BOUNDED else column + 1)
        value = tl.load(table + slot * table_row + column * table_step, mask=there, other=0)
        tl.store(out + row * out_row + column * out_step, value, mask=column < length)


def _repeats(call) -> list[int]:
    rows = call["row_repeats"]
    return [call["draft_tokens"]] * call["bs"] if rows is None else rows[: call["bs"]].tolist()


def _owners(call, repeats) -> list[int]:
    chosen = range(call["bs"]) if call["bs_idx"] is None else call["bs_idx"].tolist()
    return [i for i in chosen for _ in range(repeats[i])]


def _gather(call, owners, lengths_of=None, strides=None, bounded=True) -> None:
    table, out = call["req_to_token"], call["page_table_1"]
    slots = torch.tensor([int(call["req_pool_indices"][i]) for i in owners], dtype=torch.int64)
    lengths = torch.tensor([int(call["cache_seqlens"][i]) for i in lengths_of or owners], dtype=torch.int64)
    if owners:
        _copy_rows[(len(owners),)](table, slots, lengths, out, *(strides or table.stride()), *out.stride(), BOUNDED=bounded,
                                   BLOCK=256)


@exhibit("B105")
def columns_beyond_the_row(faulty, **call):
    """vLLM #28760, #53982, #54296. Trigger: a position behind the last column. Symptom: the neighbour row's page, or an illegal
    access in the last row."""
    _gather(call, _owners(call, _repeats(call)), bounded=not faulty)


@exhibit("B142")
def strides_exchanged(faulty, **call):
    """aiter #1815. Trigger: 65 requests. Symptom: stride 1 where stride 0 belongs: accesses outside the table."""
    strides = call["req_to_token"].stride()
    _gather(call, _owners(call, _repeats(call)), strides=strides[::-1] if faulty else strides)


@exhibit("B012")
def lengths_of_all_requests(faulty, **call):
    """SGLang #18280. Trigger: 3 requests, of which the rank has 0 and 2. Symptom: the rows are the rank's, the lengths the
    batch's."""
    owners = _owners(call, _repeats(call))
    chosen = list(dict.fromkeys(owners))
    _gather(call, owners, [chosen.index(i) for i in owners] if faulty else owners)


@exhibit("B070")
def membership_by_value(faulty, **call):
    """SGLang #28718. Trigger: 2 requests that share a page. Symptom: what belongs to a rank is found by value, so shared pages
    come twice or from the wrong request."""
    owners = _owners(call, _repeats(call))
    slots = call["req_pool_indices"][: call["bs"]].tolist()
    _gather(call, [slots.index(slots[i]) for i in owners] if faulty else owners)


_last: dict = {}


@exhibit("B020")
def repeats_of_the_host(faulty, **call):
    """SGLang #15429. Trigger: accept lengths [1, 3], then [3, 1]. Symptom: the host's list is one step late, so rows belong to
    the wrong requests although their number is right."""
    repeats = _repeats(call)
    late, _last["repeats"] = _last.get("repeats", repeats), repeats
    _gather(call, _owners(call, late if faulty else repeats)[: call["total_rows"]])


@exhibit("B151")
def owners_behind_the_live_tokens(faulty, **call):
    """TensorRT-LLM #12657. Trigger: a batch that shrinks. Symptom: the map from tokens to requests is not refreshed behind the
    live tokens, which own requests that have left."""
    owners = _owners(call, _repeats(call))
    stale = _last.get("owners", [])[len(owners) :]
    _last["owners"] = owners + stale
    _gather(call, owners + stale if faulty else owners)


# -- tables of pages ------------------------------------------------------------------------------------------------------


def _paged(table, out, page_size) -> None:
    out[: table.shape[0], : -(-table.shape[1] // page_size)] = torch.div(table[:, ::page_size], page_size,
                                                                         rounding_mode="floor")


@exhibit("B039")
def pages_in_a_row(faulty, *, page_table_1, real_page_table, page_size):
    """SGLang #15469. Trigger: pages of 4 tokens that are not neighbours. Symptom: page numbers count up from the first; right
    only where slots were allocated together."""
    _paged(page_table_1, real_page_table, page_size)
    if faulty:
        for row in real_page_table[: len(page_table_1), : -(-page_table_1.shape[1] // page_size)]:
            row[1:] = row[:1] + torch.arange(1, len(row))


@triton.jit
def _page_groups(table, out, table_row, table_step, out_row, out_step, columns, page_size, BOUNDED: tl.constexpr,
                 GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for block in range(0, columns, GROUP * page_size):
        column = block + tl.arange(0, GROUP) * page_size
        there = column < (columns if BOUNDED else column + 1)
        slot = tl.load(table + row * table_row + column * table_step, mask=there, other=0).to(tl.int64)
        page = tl.where(slot < 0, -((page_size - 1 - slot) // page_size), slot // page_size)
        tl.store(out + row * out_row + column // page_size * out_step, page, mask=column < columns)


@exhibit("B110")
def groups_past_the_row(faulty, *, page_table_1, real_page_table, page_size):
    """vLLM #50302, #39324. Trigger: a row that is no multiple of what the kernel loads at once. Symptom: it reads on behind the
    row; values are masked afterwards."""
    rows, columns = page_table_1.shape
    if rows and columns:
        _page_groups[(rows,)](page_table_1, real_page_table, *page_table_1.stride(), *real_page_table.stride(), columns,
                              page_size, BOUNDED=not faulty, GROUP=128)


@exhibit("B028")
def translation_kept(faulty, *, page_table_1, real_page_table, page_size):
    """SGLang #25889. Trigger: the mapping changes between two translations. Symptom: a cache by identity answers with freed
    slots, and foreign KV is overwritten."""
    key = (page_table_1.data_ptr(), page_table_1.shape, page_size)
    fresh = torch.zeros(page_table_1.shape[0], -(-page_table_1.shape[1] // page_size), dtype=torch.int32)
    _paged(page_table_1, fresh, page_size)
    answer = _last.setdefault(key, fresh) if faulty else fresh
    real_page_table[: fresh.shape[0], : fresh.shape[1]] = answer


# -- ragged lists ---------------------------------------------------------------------------------------------------------


@exhibit("B021")
def room_for_distinct_slots(faulty, *, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """SGLang #15086. Trigger: 2 requests with a common prefix. Symptom: the workspace has room for every slot once, and the
    gather wants shared ones twice."""
    slots = [slot for row, n in zip(page_table_1[:bs], seq_lens.tolist()) for slot in row[:n].tolist()]
    put(page_table_1_flattened, slots[: len(set(slots))] if faulty else slots)


@exhibit("B168")
def padding_owned_by_the_last(faulty, *, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """TokenSpeed #969. Trigger: 5 tokens in a bucket of 8. Symptom: the search for an owner is clipped, so padding continues
    the last request and changes its state."""
    starts, extends = cu_seqlens_k.tolist(), extend_seq_lens[:bs].tolist()
    offsets = [starts[i] for i, n in enumerate(extends) for _ in range(n)]
    if faulty and bs:
        offsets += [starts[bs - 1]] * (len(topk_indices_offset) - len(offsets))
    put(topk_indices_offset, offsets)


def _query_lengths(call) -> list[int]:
    if call["mode"] == "extend":
        return call["extend_seq_lens"][: call["bs"]].tolist()
    rows = {"decode": call["bs"], "target_verify": call["bs"] * call["draft_tokens"]}
    return [1] * rows.get(call["mode"], call["extend_num_tokens"])


@exhibit("B132")
def verify_as_decode(faulty, **call):
    """FlashInfer #3871. Trigger: 3 query tokens per request. Symptom: a verify is planned with one row per request; the rest is
    never written."""
    lengths = _query_lengths(call)
    put(call["cu_seqlens_q"], sums(lengths[: call["bs"]] if faulty and call["mode"] == "target_verify" else lengths))


@exhibit("B076")
def arange_too_small(faulty, **call):
    """vLLM #39277. Trigger: more tokens than requests times drafts. Symptom: reads behind a helper table of that size."""
    helper = call["bs"] * call["draft_tokens"] + 1
    answer = sums(_query_lengths(call))
    put(call["cu_seqlens_q"], answer[:helper] if faulty and call["mode"] == "draft_extend" else answer)


@exhibit("B128")
def largest_sum(faulty, *, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin):
    """FlashInfer #1930. Trigger: 2 requests. Symptom: the longest query is taken from the sums, not from their differences: a
    launch and a workspace that are too large."""
    if mode != "extend":
        return 1
    if round_robin or any(extend_prefix_lens):
        return (sum(extend_seq_lens) if faulty else max(extend_seq_lens)) if extend_seq_lens else 1
    return max_seq_len_k
