"""The mla_block_table family: differential campaigns, replays on the same tables, wrong calls, and relations.

| group        | would catch                                                                                        |
| ------------ | -------------------------------------------------------------------------------------------------- |
| differential | seq_lens taken with or without the extend (SGLang #26651), tokens for pages (#23757), contiguous    |
|              | slots assumed (#15469), queries viewed as equal extends, a pitch ignored, needless lists (#26241)  |
| replays      | pages of an earlier, longer request where a row ends (#24401), lengths kept from the last call     |
| far          | 32-bit row and slot offsets (#34725, #20389)                                                       |
| outside      | rows that need more columns than there are, slots that do not exist, queries longer than a row     |
| relations    | an oracle that is consistently wrong; tables too narrow for a batch (#19016, #29379)               |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import differential, lanes, registry
from harness.differential import Example
from harness.floats import rounded
from harness.layout import Layout, Place
from harness.misuse import Misuse, attempt
from harness.states import Cells, State
from oracles import mla_block_table as oracle
from oracles.mla_block_table import (CalcPaddedBlocks, MlaBlockTable, MlaMetadata, MlaMetadataSizes, MlaMultiStepDraft,
                                     PadDraftExtendQuery, PadSequenceWithMask, Req, Tokens, UnpadDraftExtendOutput)
from oracles.metadata import Decode
from oracles.metadata import Req as SlotReq
from strategies import domain, sessions
from strategies import mla_block_table as cases

FAMILY = "mla_block_table"
few = settings(max_examples=40)  # tables are large


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


CAPTURED = ("mla_metadata", "mla_block_table", "mla_multi_step_draft", "pad_draft_extend_query", "unpad_draft_extend_output",
            "pad_sequence_with_mask")


@pytest.mark.gate
@pytest.mark.parametrize("captured", CAPTURED)
def test_replays(subject, captured, session, record_property):
    lanes.replays(session, subject, captured, sessions.replays(registry.contracts()[captured]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


FAR_CASES = [
    Example((MlaBlockTable((Req(4095, 130), Req(0, 3), Req(2048, 1)), slots=4096, table_extra=2**20 - 130, fresh=True),),
            Layout({"block_table": Place("far")})),
    Example((MlaMultiStepDraft((Req(4095, 65), Req(1, 64)), steps=3, slots=4096, table_extra=2**20 - 68),),
            Layout({"block_table[0]": Place("far"), "block_table[1]": Place("far", guard="left")})),
    Example((PadDraftExtendQuery((Tokens(1), Tokens(3), Tokens(2)), heads=2, head_dim=3),),
            Layout({"q": Place("far"), "padded_q": Place("far")})),
    Example((UnpadDraftExtendOutput((Tokens(1), Tokens(3), Tokens(2)), heads=2, head_dim=3),),
            Layout({"raw_out": Place("far"), "output": Place("far")})),
    Example((PadSequenceWithMask((Tokens(1), Tokens(3), Tokens(2)), head_dim=5),),
            Layout({"input_emb": Place("far"), "output": Place("far")})),
]


@pytest.mark.gate
@pytest.mark.parametrize("example", FAR_CASES, ids=lambda e: e.contract.name)
def test_far(subject, example, session):
    """Rows past element 2^31 of a table, of a request table, of queries and of outputs."""
    lanes.fixed(session, subject, example)


@pytest.mark.gate
def test_query_lengths_in_place(subject, session):
    """An eager draft extend keeps extend_seq_lens itself as its seq_lens_q."""
    case = MlaMetadata((Req(0, 10, 1), Req(0, 7, 3), Req(0, 9, 0)), mode="draft_extend", ragged=True, spare=1)
    lanes.fixed(session, subject, Example((case,), Layout(aliases=(("seq_lens_q", "extend_seq_lens"),))))


def test_long_rows(session):
    """131,072 keys beside very few, on a table as wide as padding makes it."""
    case = MlaBlockTable((Req(1, 131072), Req(3, 2)), mode="target_verify", draft_tokens=4, padded=True, fresh=True)
    assert differential.check(Example((case,)), session.worker("kernels"), case.contract.rules()) == []


WRONG_CALLS = [
    (MlaMetadata((Req(0, 10, 1), Req(0, 7, 3)), mode="draft_extend", draft_tokens=4, ragged=True), 20),
    (MlaMetadata((Req(0, 10, 1), Req(0, 7, 3)), mode="extend"), 18),
    (MlaBlockTable((Req(1, 65, 1), Req(0, 130, 2)), mode="draft_extend", ragged=True), 18),
    (MlaMultiStepDraft((Req(1, 65), Req(0, 130)), steps=3), 34),
    (PadDraftExtendQuery((Tokens(1), Tokens(3)), heads=2, head_dim=3), 18),
    (UnpadDraftExtendOutput((Tokens(1), Tokens(3)), heads=2, head_dim=3), 20),
    (PadSequenceWithMask((Tokens(1), Tokens(3)), heads=2, head_dim=3), 20),
]


@pytest.mark.parametrize(("case", "least"), WRONG_CALLS, ids=lambda c: c.contract.name if hasattr(c, "contract") else "")
def test_wrong_calls_are_refused_before_a_write(case, least, session):
    assert lanes.refusals(session, "kernels", case) >= least


SCALARS = [
    (CalcPaddedBlocks((65,)), "page_size", 256), (CalcPaddedBlocks((65,)), "page_size", 0),
    (CalcPaddedBlocks((65,)), "max_seq_len", -1),
    (MlaMetadataSizes((Req(0, 3, 1),)), "page_size", 129), (MlaMetadataSizes((Req(0, 3, 1),)), "mode", "prefill"),
    (MlaMetadataSizes((Req(0, 3, 1),), "extend"), "extend_seq_lens", [1, 1]),
    (MlaMetadata((Req(0, 3, 1),)), "mode", "idle"), (MlaMetadata((Req(0, 3, 1),)), "bs", -1),
    (MlaBlockTable((Req(0, 3, 1),)), "mode", "extend"), (MlaBlockTable((Req(0, 3, 1),)), "page_size", 0),
    (MlaBlockTable((Req(0, 3, 1),)), "fresh", 1), (MlaBlockTable((Req(0, 3, 1),)), "max_blocks", 9),
    (MlaMultiStepDraft((Req(0, 3),)), "steps", 1), (MlaMultiStepDraft((Req(0, 3),)), "block_table", []),
    (PadDraftExtendQuery((Tokens(1),)), "max_seq_len_q", -1), (UnpadDraftExtendOutput((Tokens(1),)), "sum_seq_lens_q", 2),
    (PadSequenceWithMask((Tokens(1),)), "max_len", 2),
]


@pytest.mark.parametrize(("case", "name", "value"), SCALARS,
                         ids=lambda v: v.contract.name if hasattr(v, "contract") else str(v))
def test_wrong_host_values_are_refused_by_name(case, name, value, session):
    answer = attempt(case, Misuse(name, name, {**case.arguments(), name: value}, Layout()), session.worker("kernels"))
    named = name if name not in ("max_blocks", "sum_seq_lens_q", "max_len") else {
        "max_blocks": "block_table", "sum_seq_lens_q": "output", "max_len": "output"}[name]
    assert answer.error in ("TypeError", "ValueError") and named in answer.message and not answer.wrote, answer


@pytest.mark.parametrize(("case", "name"), [
    (PadDraftExtendQuery((Tokens(1), Tokens(3))), "padded_q"), (UnpadDraftExtendOutput((Tokens(1), Tokens(3))), "output"),
    (PadSequenceWithMask((Tokens(1), Tokens(3))), "output"),
], ids=lambda v: v if isinstance(v, str) else v.contract.name)
def test_two_float_dtypes_in_one_copy_are_refused(case, name, session):
    misuse = Misuse("mixed", name, case.arguments(), Layout({name: Place(dtype="float16")}))
    answer = attempt(case, misuse, session.worker("kernels"))
    assert answer.error == "TypeError" and name in answer.message and not answer.wrote


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case, **rules) -> dict[str, Cells]:
    """The oracle's cells by full name."""
    return differential.expect(case.contract, case.arguments(), case.contract.rules(rules))


def shown(cells: Cells) -> list:
    """States and values, comparable."""
    return list(zip(cells.state.reshape(-1).tolist(), cells.value.reshape(-1).tolist()))


def filled(cells: Cells, blank) -> np.ndarray:
    """What a buffer that held `blank` everywhere holds afterwards."""
    return np.where(cells.state == State.WRITTEN, cells.value, blank)


def sizes(case, reach="keys") -> dict[str, int]:
    return oracle.mla_metadata_sizes(**case.arguments(), variant={"reach": reach})


@pytest.mark.parametrize(("keys", "page_size", "columns"), [
    (0, 64, 0), (1, 64, 64), (4096, 64, 64), (4097, 64, 128), (1, 32, 128), (4097, 32, 256), (1, 128, 32), (1, 1, 4096),
    (100, 48, 170), (8161, 48, 340),
])
def test_padded_blocks_by_hand(keys, page_size, columns):
    assert oracle.calc_padded_blocks(max_seq_len=keys, page_size=page_size, variant={}) == columns


@given(st.integers(0, 20000), st.integers(1, 128))
def test_padded_blocks_hold_the_keys_and_whole_units_and_no_more(keys, page_size):
    columns = oracle.calc_padded_blocks(max_seq_len=keys, page_size=page_size, variant={})
    reader, writer = 128 // page_size, 4096 // page_size
    assert columns * page_size >= keys and columns % reader == 0 and columns % writer == 0
    assert (columns - np.lcm(reader, writer)) * page_size < keys or columns == 0


@few
@given(cases.mla_block_table().filter(lambda c: c.page_size > 1))
def test_a_block_table_is_the_real_page_table_and_says_where_it_ends(case):
    """The same pages as the metadata of a decode of the same keys; -1 behind them in a new table."""
    case = replace(case, fresh=True)
    keys = [case.keys(i) for i in range(len(case.batch))]
    frame = dict(page_size=case.page_size, slots=case.slots, aligned=case.aligned, shared=case.shared, content=case.content)
    decode = Decode(tuple(SlotReq(r.slot, n) for r, n in zip(case.batch, keys)), wide=False, **frame)
    real, table = answer(decode)["real_page_table[0]"], answer(case)["block_table"]
    for i, n in enumerate(keys):
        pages = -(-n // case.page_size)
        assert table.value[i, :pages].tolist() == real.value[i, :pages].tolist()
        assert (table.value[i, pages : case.max_blocks()] == -1).all()
        assert (table.state[i, case.max_blocks() :] == State.UNTOUCHED).all()


@few
@given(cases.mla_block_table())
def test_a_new_table_is_a_captured_one_that_held_minus_ones(case):
    new, captured = (answer(replace(case, fresh=f))["block_table"] for f in (True, False))
    width = case.max_blocks()
    assert (filled(new, -1)[:, :width] == filled(captured, -1)[:, :width]).all()


@few
@given(cases.mla_block_table().filter(lambda c: c.batch), st.data())
def test_after_two_replays_a_row_holds_the_second_one_and_then_what_the_first_left(first, data):
    first = replace(first, fresh=False)
    second = data.draw(cases.mla_block_table_replay(first))
    one, two = (answer(c)["block_table"] for c in (first, second))
    held = filled(two, filled(one, -7))
    for i in range(len(second.batch)):
        mine, older = second.pages(i), first.pages(i)
        assert held[i, :mine].tolist() == two.value[i, :mine].tolist()
        assert held[i, mine:older].tolist() == one.value[i, mine:older].tolist()


@few
@given(cases.mla_block_table(), st.integers(1, 8))
def test_verify_of_d_tokens_is_decode_of_d_keys_more(case, width):
    case = replace(case, mode="decode", ragged=False, draft_tokens=width)
    longer = replace(case, requests=tuple(replace(r, seq_len=r.seq_len + width) for r in case.requests))
    assert shown(answer(replace(case, mode="target_verify"))["block_table"]) == shown(answer(longer)["block_table"])


@few
@given(cases.mla_block_table(), st.integers(0, 8))
def test_a_ragged_draft_extend_of_equal_extends_is_the_captured_one(case, width):
    equal = tuple(Req(r.slot, r.seq_len + width, width) for r in case.requests)
    eager, captured = (replace(case, requests=equal, mode="draft_extend", ragged=r) for r in (True, False))
    assert shown(answer(eager)["block_table"]) == shown(answer(captured)["block_table"])


@few
@given(cases.mla_block_table(), st.randoms(use_true_random=False))
def test_permuting_requests_permutes_rows(case, random):
    order = list(range(len(case.batch)))
    random.shuffle(order)
    moved = replace(case, requests=tuple(case.batch[i] for i in order), repeat=1)
    before, after = answer(case)["block_table"], answer(moved)["block_table"]
    for row, i in enumerate(order):
        assert (after.value[row] == before.value[i]).all() and (after.state[row] == before.state[i]).all()


@few
@given(cases.mla_block_table(), st.integers(0, 3))
def test_padded_requests_change_nothing_before_them(case, slot):
    case = replace(case, ragged=False)
    longer = replace(case, requests=(*case.batch, Req(slot, 1, case.draft_tokens)), repeat=1, padded=False, extra=0)
    longer = replace(longer, extra=max(case.max_blocks() - longer.max_blocks(), 0))
    rows, width = len(case.batch), case.max_blocks()
    before, after = answer(case)["block_table"], answer(longer)["block_table"]
    assert (before.value[:rows, :width] == after.value[:rows, :width]).all()
    metadata = {f: getattr(case, f) for f in ("mode", "draft_tokens")}
    short, full = (answer(MlaMetadata(c.batch, **metadata)) for c in (case, longer))
    for name in short:
        assert shown(full[name])[: len(short[name])] == shown(short[name])


@given(cases.mla_metadata(), cases.mla_metadata())
def test_two_batches_at_once_are_each_with_shifted_starts(a, b):
    widest = max([r.extend_len for r in (*a.batch, *b.batch)], default=0)
    a, b = (replace(c, requests=(*c.batch, Req(0, widest, widest)), repeat=1, mode=a.mode, draft_tokens=a.draft_tokens,
                    ragged=a.ragged, spare=0) for c in (a, b))
    one, two, both = answer(a), answer(b), answer(replace(a, requests=(*a.batch, *b.batch)))
    for name in both:
        first, second = one[name].value.tolist(), two[name].value.tolist()
        if name == "cu_seqlens_q":
            second = [first[-1] + start for start in second[1:]]
        assert both[name].value.tolist() == first + second


@given(cases.mla_metadata().filter(lambda c: c.batch))
def test_the_host_sizes_are_those_of_the_tensors(case):
    graph = case.mode == "draft_extend" and not case.ragged
    host = sizes(MlaMetadataSizes(case.batch, case.mode, case.draft_tokens, graph=graph))
    got = answer(case)
    if "cu_seqlens_q" in got:
        assert got["cu_seqlens_q"].value[len(case.batch)] == host["sum_seq_lens_q"]
        assert max(got["seq_lens_q"].value[: len(case.batch)]) == host["max_seq_len_q"]
    if "seq_lens_k" in got:
        assert max(got["seq_lens_k"].value[: len(case.batch)]) == host["max_seq_len_k"]


def _table_of(case: MlaMetadataSizes) -> MlaBlockTable:
    ragged = case.mode == "draft_extend" and not case.graph
    return MlaBlockTable(case.requests, mode=case.mode, draft_tokens=case.draft_tokens, ragged=ragged,
                         page_size=case.page_size)


SIZED = cases.mla_metadata_sizes().filter(lambda c: c.mode != "extend")


@given(SIZED)
def test_a_table_of_the_host_sizes_has_a_column_for_every_page(case):
    table, host = _table_of(case), sizes(case)
    for i in range(len(case.requests)):
        assert table.pages(i) <= host["max_blocks"] and table.keys(i) <= host["max_seq_len_k"] <= host["max_seq_len"]


@pytest.mark.parametrize("case", [
    MlaMetadataSizes((Req(0, 4096, 1), Req(1, 10, 3)), "draft_extend"),
    MlaMetadataSizes((Req(0, 4093), Req(1, 10)), "target_verify", draft_tokens=4, graph=True, context_extra=3),
], ids=lambda c: c.mode)
def test_upstreams_sizes_leave_the_last_page_without_a_column(case):
    """Unequal extends (their keys reach past the longest sequence), and drafts at the end of the context."""
    table, narrow, wide = _table_of(case), sizes(case, "sequence"), sizes(case)
    assert table.pages(0) == narrow["max_blocks"] + 1 == 65 and wide["max_blocks"] == 128


@given(SIZED)
def test_upstreams_verify_counts_the_draft_tokens_twice(case):
    case = replace(case, mode="target_verify", graph=False)
    assert sizes(case, "sequence")["max_seq_len"] == sizes(case)["max_seq_len"] + (case.draft_tokens if case.requests else 0)


# -- draft steps --------------------------------------------------------------------------------------------------------


@few
@given(cases.mla_multi_step_draft())
def test_tables_and_lengths_are_the_same_with_and_without_the_index_lists(case):
    skipped, built = (answer(case, kv_index_template=t) for t in ("skipped", "built"))
    for name in skipped:
        if name.startswith(("block_table", "seq_lens_k")):
            assert shown(skipped[name]) == shown(built[name])
        else:
            assert (skipped[name].state == State.UNTOUCHED).all()


@few
@given(cases.mla_multi_step_draft())
def test_every_step_sees_the_lengths_of_a_decode(case):
    """Index lists of other backends grow by one token a step; block tables do not."""
    got = answer(case, kv_index_template="built")
    frame = {f: getattr(case, f) for f in oracle._Tables.__dataclass_fields__}
    decode = MlaBlockTable(**{**frame, "table_extra": case.table_extra + case.longest - max(
        [r.seq_len for r in case.batch], default=0)})
    for s in range(case.steps - 1):
        assert shown(got[f"block_table[{s}]"]) == shown(answer(decode)["block_table"])
        assert got[f"seq_lens_k[{s}]"].value[: len(case.batch)].tolist() == [r.seq_len for r in case.batch]


@few
@given(cases.mla_multi_step_draft().filter(lambda c: c.template and not c.idle))
def test_index_lists_are_row_prefixes_and_their_starts_agree(case):
    got = answer(case, kv_index_template="built")
    for s in range(case.steps):
        starts = [0, *got["kv_indptr"].value[s, 1 : len(case.batch) + 1].tolist()]
        assert [b - a for a, b in zip(starts, starts[1:])] == [r.seq_len + s + 1 for r in case.batch]
        for i, r in enumerate(case.batch):
            assert got["kv_indices"].value[s, starts[i] : starts[i + 1]].tolist() == case.tokens(
                r.slot, r.seq_len + s + 1).tolist()
        assert (got["kv_indices"].state[s, starts[-1] :] == State.UNTOUCHED).all()


def test_index_lists_of_idle_requests_disagree_with_their_starts():
    """A padded request stands at position 0 but has one key: its list starts where the one before it ends, and the next
    start is a token early."""
    got = answer(MlaMultiStepDraft((Req(0, 5), Req(1, 1), Req(2, 1)), idle=2), kv_index_template="built")
    assert got["kv_indptr"].value[0].tolist() == [0, 6, 7, 8]
    assert (got["kv_indices"].state[0] == State.WRITTEN).sum() == 6 + 2 + 2


# -- padding ------------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return bool(np.array_equal(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), equal_nan=True))


def padded(case: PadDraftExtendQuery, blank=0) -> np.ndarray:
    return filled(answer(case)["padded_q"], blank)


@pytest.mark.parametrize("shorter", ["float8_e4m3fn", "bfloat16", "float16"])
def test_contents_are_float32_numbers_that_no_shorter_format_holds(shorter):
    numbers = PadDraftExtendQuery((Tokens(40),), heads=4, head_dim=4).numbers(0, 640)
    assert same(rounded(numbers, "float32"), numbers)
    kept = rounded(numbers, shorter).astype(np.float64) == numbers
    assert kept.mean() < 0.1 and np.isnan(numbers).any() and (numbers == 0).any()
    if shorter != "bfloat16":
        narrow = rounded(numbers, "bfloat16")
        assert not same(rounded(narrow, shorter), narrow)


@given(cases.pad_draft_extend_query())
def test_unpadding_a_padded_batch_gives_the_batch(case):
    arguments, starts = case.arguments(), case.starts()
    out = Cells((starts[-1], case.heads, case.head_dim))
    oracle.unpad_draft_extend_output(
        raw_out=padded(case), cu_seqlens_q=starts, seq_lens_q=[r.count for r in case.requests], output=out,
        bs=len(case.requests), max_seq_len_q=case.longest(), sum_seq_lens_q=starts[-1], variant={})
    q = arguments["q"].view()
    for i, r in enumerate(case.requests):
        for t in range(r.count):
            for h in range(case.heads):
                assert same(out.value[starts[i] + t, h], q[starts[i] + t, h, 0 : case.head_dim])
        assert (out.state[starts[i] + r.count : starts[i + 1]] == State.UNTOUCHED).all()


@given(cases.unpad_draft_extend_output(), st.integers(-9, 9))
def test_padding_an_unpadded_batch_zeroes_what_lies_behind_each_request(case, dirt):
    """The padded tensor comes back as it was, zero where no token is, whatever stood there."""
    case, size = replace(case, spare=0), case.heads * case.head_dim
    row = (case.heads, case.head_dim)
    raw = np.full((len(case.requests), case.longest(), *row), float(dirt))
    for i, r in enumerate(case.requests):
        raw[i, : r.count] = case.numbers(i * case.longest() * size, r.count * size).reshape(r.count, *row)
    flat = filled(answer(case)["output"], dirt)
    out = Cells(raw.shape)
    oracle.pad_draft_extend_query(q=flat, seq_lens_q=[r.count for r in case.requests], cu_seqlens_q=case.starts(),
                                  padded_q=out, bs=len(case.requests), max_seq_len_q=case.longest(), variant={})
    back = filled(out, 0)
    for i, r in enumerate(case.requests):
        assert same(back[i, : r.count], raw[i, : r.count]) and not back[i, r.count :].any()


def test_unequal_extends_whose_sum_divides_evenly_are_no_rectangle():
    """[1, 3] extends of two requests: viewed as (2, 2), the second token of request 1 would be request 0's."""
    case = PadDraftExtendQuery((Tokens(1), Tokens(3)))
    q = case.arguments()["q"].view()
    got = padded(case)[..., 0, 0]
    assert same(got[0], [q[0, 0, 0], 0, 0]) and same(got[1], q[1:4, 0, 0])
    assert not same(got[:, :2], q.reshape(2, 2))


@given(cases.pad_sequence_with_mask())
def test_the_mask_is_where_the_tokens_are(case):
    got, width = answer(case), case.longest()
    mask = got["attn_mask"].value[: len(case.requests) * width].reshape(len(case.requests), width)
    for i, r in enumerate(case.requests):
        kept = min(r.count, width)
        assert mask[i].tolist() == [True] * kept + [False] * (width - kept)
        assert not got["output"].value[i, kept:width].any()
    assert (got["output"].state[: len(case.requests), :width] == State.WRITTEN).all()


@given(cases.pad_sequence_with_mask().filter(lambda c: c.extra >= 0))
def test_padding_with_zeros_is_padding_queries_into_zeros(case):
    fields = {f: getattr(case, f) for f in case.__dataclass_fields__}
    queries = replace(PadDraftExtendQuery(**fields), heads=1, head_dim=case.heads * case.head_dim)
    bs, width = len(case.requests), case.longest()
    assert same(answer(case)["output"].value[:bs, :width], padded(queries)[:bs, :width, 0])
