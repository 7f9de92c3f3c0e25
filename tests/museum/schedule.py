"""Plans of paged kernels, and the walk along one.

The FlashMLA plans start from the eager reference: how blocks are dealt out is long, and no part of these bugs.
"""

import torch
import triton
import triton.language as tl
from eager.schedule import flashmla_schedule

from exhibit import elsewhere, exhibit, replayed

# -- where every SM starts ------------------------------------------------------------------------------------------------


def _splits(context_lens) -> list[int]:
    lengths = context_lens[:, -1] if context_lens.dim() == 2 else context_lens
    return [-(-n // 256) for n in lengths.tolist()]


def _starts(splits, num_sms) -> list[list[int]]:
    share, left = divmod(sum(splits), num_sms)
    entries = []
    for sm in range(num_sms + 1):
        row, rest = 0, sm * share + min(sm, left)
        while row < len(splits) and rest >= splits[row]:
            rest -= splits[row]
            row += 1
        entries.append([row, rest])
    return entries


def _fill(schedule, entries) -> None:
    schedule[: len(entries), :2] = torch.tensor(entries, dtype=torch.int32)


@exhibit("B004")
def schedule_of_the_capture(faulty, **call):
    """SGLang #24635. Trigger: a replay with other lengths by the precomputed path. Symptom: lengths are refreshed, the schedule
    is not; the kernel that walks along it never ends."""
    if not (faulty and replayed("B004")):
        _fill(call["schedule"], _starts(_splits(call["context_lens"]), call["num_sms"]))


@exhibit("B077")
def pitch_of_the_slice(faulty, *, context_lens, schedule, num_sms):
    """vLLM #42135, #40987. Trigger: 2 live columns of a buffer of 4. Symptom: rows are looked for 2 elements apart; the first
    is right."""
    if faulty and context_lens.dim() == 2:
        context_lens = context_lens.as_strided(context_lens.shape, (context_lens.shape[1], 1), context_lens.storage_offset())
    _fill(schedule, _starts(_splits(context_lens.clamp(min=0)), num_sms))


@exhibit("B146")
def folded_rows(faulty, *, context_lens, schedule, num_sms):
    """aiter #3310. Trigger: heads and 2 query tokens folded into the batch. Symptom: the plan names folded rows where its
    reader wants requests."""
    fold = context_lens.shape[1] if faulty and context_lens.dim() == 2 else 1
    _fill(schedule, [[row * fold, split] for row, split in _starts(_splits(context_lens), num_sms)])


@exhibit("B097")
def workspace_that_moved(faulty, *, context_lens, schedule, num_sms):
    """vLLM #45487, #40648. Trigger: a workspace grows after the capture. Symptom: the graph has the old one's address."""
    workspace = torch.tensor(_starts(_splits(context_lens), num_sms), dtype=torch.int32)
    schedule[: num_sms + 1, :2] = _captured.setdefault("workspace", workspace) if faulty else workspace


_captured: dict = {}


@triton.jit
def _first_with_keys(lengths, found, step, rows, BOUNDED: tl.constexpr):
    row, keys = 0, 0
    while keys == 0 and (row < rows or not BOUNDED):
        keys = tl.load(lengths + row * step)
        row += 1
    tl.store(found, tl.where(keys == 0, row, row - 1))


@exhibit("B135")
def search_past_the_rows(faulty, *, context_lens, schedule, num_sms):
    """DeepGEMM #353 (TensorRT-LLM #14940). Trigger: all lengths 0. Symptom: no segment is found, and the search reads the entry
    behind the last."""
    lengths = context_lens[:, -1] if context_lens.dim() == 2 else context_lens
    entries = _starts(_splits(context_lens), num_sms)
    if not any(_splits(context_lens)):
        found = torch.zeros(1, dtype=torch.int32)
        _first_with_keys[(1,)](lengths, found, lengths.stride(0), len(lengths), BOUNDED=not faulty)
        entries = [[int(found), 0]] * (num_sms + 1)
    _fill(schedule, entries)


@triton.jit
def _publish(entries, schedule, row_step, column_step, CLEARS: tl.constexpr):
    sm = tl.program_id(0)
    if CLEARS and sm == 0:
        tl.store(schedule + tl.num_programs(0) // 2 * row_step, 0)
    for column in range(2):
        tl.store(schedule + sm * row_step + column * column_step, tl.load(entries + sm * 2 + column))


@exhibit("B023")
def cleared_while_others_write(faulty, *, context_lens, schedule, num_sms):
    """SGLang #32467, #32470. Trigger: 128 ragged requests. Symptom: scratch is cleared a second time, without a barrier, when
    other warps have published there: 1,998 of 2,000 plans are wrong. Here programs stand for warps, which the CPU tier has
    not."""
    entries = torch.tensor(_starts(_splits(context_lens), num_sms), dtype=torch.int32)
    _publish[(num_sms + 1,)](entries, schedule, *schedule.stride(), CLEARS=faulty)


# -- the walk -------------------------------------------------------------------------------------------------------------


@triton.jit
def _walk(lengths, schedule, owner, lengths_step, plan_row, plan_column, owner_row, owner_column, rows,
          TESTS_FIRST: tl.constexpr):
    sm = tl.program_id(0)
    row, split = tl.load(schedule + sm * plan_row), tl.load(schedule + sm * plan_row + plan_column)
    last, end = tl.load(schedule + (sm + 1) * plan_row), tl.load(schedule + (sm + 1) * plan_row + plan_column)
    while (row < last) | ((row == last) & (split < end)):
        splits = (tl.load(lengths + row * lengths_step) + 255) // 256
        if split < splits:
            tl.store(owner + row * owner_row + split * owner_column, sm)
            split += 1
        else:
            row, split = row + 1, 0
            if (not TESTS_FIRST) or row < rows:
                tl.load(lengths + row * lengths_step)


@exhibit("B134")
def sentinel_looked_up(faulty, *, context_lens, schedule, owner, num_sms, max_splits):
    """DeepGEMM #344 (SGLang #26541). Trigger: any batch whose lengths end at the end of a page. Symptom: the length of the
    request behind the last is read and not used; an illegal access now and then."""
    _walk[(num_sms,)](context_lens, schedule, owner, context_lens.stride(0), *schedule.stride(), *owner.stride(),
                      len(context_lens), TESTS_FIRST=not faulty)


@exhibit("B139")
def counter_not_reset(faulty, *, context_lens, schedule, owner, num_sms, max_splits):
    """FlashAttention 1a58058a, 897c8453. Trigger: a plan that is used twice. Symptom: the tile counter starts where the first
    run ended, so the second does nothing."""
    tile = _captured.get("tile", 0) if faulty else 0
    for sm in range(tile, num_sms):
        (row, split), end = schedule[sm].tolist(), schedule[sm + 1].tolist()
        while [row, split] < end:
            if split < -(-int(context_lens[row]) // 256):
                owner[row, split] = sm
                split += 1
            else:
                row, split = row + 1, 0
    _captured["tile"] = num_sms


# -- FlashMLA's parts -----------------------------------------------------------------------------------------------------


@exhibit("B060")
def plan_of_equal_size(faulty, **call):
    """SGLang #24632, #30439. Trigger: a plan for short lengths, a run with long ones. Symptom: the plan is kept as long as the
    batch has the same size; partial results are read that nobody wrote."""
    key = ("plan", call["num_rows"], call["num_parts"])
    if not (faulty and key in _captured):
        flashmla_schedule(**call)
    _captured[key] = True


@exhibit("B086")
def fresh_scheduler_tensors(faulty, **call):
    """vLLM #21691, #35175. Trigger: a replay with other lengths. Symptom: the planner returns new tensors, which one
    precision's path does not copy to where the graph reads."""
    fresh = faulty and call["topk"] == -1 and replayed("B086")
    flashmla_schedule(**(elsewhere(call, "tile_scheduler_metadata", "num_splits") if fresh else call))


@exhibit("B085")
def tail_of_the_old_plan(faulty, **call):
    """vLLM #19106, #20057, #25490, #27128, #28702. Trigger: a replay with a smaller plan. Symptom: the parts that have nothing
    to do keep the work of the plan before."""
    plan = call["tile_scheduler_metadata"]
    before = plan.clone()
    flashmla_schedule(**call)
    for part in range(call["num_parts"]):
        if faulty and plan[part, 0] > plan[part, 1]:
            plan[part] = before[part]


@exhibit("B125")
def no_work_no_item(faulty, **call):
    """FlashInfer #868. Trigger: lengths [0, 3]. Symptom: a request without keys has no work item, and its row of the output is
    never written."""
    flashmla_schedule(**call)
    counts = call["num_splits"][: call["num_rows"] + 1].diff()
    if faulty and call["topk"] == -1:
        counts[call["cache_seqlens"][: call["num_rows"]] == 0] = 0
        call["num_splits"][1 : call["num_rows"] + 1] = torch.cumsum(counts, 0)


@exhibit("B131")
def parts_of_the_capture(faulty, **call):
    """FlashInfer #639. Trigger: a uniform capture, a ragged replay. Symptom: tiles follow the present lengths, the grid and the
    partial buffers those of the capture."""
    lengths = _captured.setdefault("lengths", call["cache_seqlens"].clone())
    flashmla_schedule(**call)
    if faulty:
        flashmla_schedule(**{**elsewhere(call, "num_splits"), "cache_seqlens": lengths})
