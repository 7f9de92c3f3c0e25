"""The metadata_copy family: differential campaigns, replays on the same buffers, wrong calls, and relations.

| group        | would catch                                                                                            |
| ------------ | ------------------------------------------------------------------------------------------------------ |
| differential | what SGLang #17554 cannot see by comparing slices of zero-filled buffers: cleared tails, a written     |
|              | index 0 of the prefix sums; one backend's pitch used for all, backends past the third                  |
| replays      | a batch taken for the one before (#26313), tails of a longer one cleared                               |
| far          | 32-bit row offsets                                                                                     |
| outside      | geometry and partners that the CUDA kernel leaves unchecked: rows running into rows, null destinations |
| misuse       | a kernel that accepts what it cannot honour, also of an empty batch                                    |
| relations    | an oracle that is consistently wrong; a precomputed batch that is not the replayed one (#14781)        |
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import differential, hashing, lanes, layout, registry
from harness.differential import Example
from harness.layout import Layout, Place
from harness.misuse import Misuse, attempt
from harness.states import Cells, State
from harness.tensors import Output
from oracles import metadata_copy
from oracles.metadata import Decode, DraftExtend, ExtendReq, Req, TargetVerify
from oracles.metadata_copy import DECODE, DRAFT_EXTEND, TARGET_VERIFY, Backend, MetadataCopy, MetadataCopyMulti
from strategies import domain, metadata, sessions
from strategies.metadata_copy import fused_metadata_copy, fused_metadata_copy_multi

FAMILY = "metadata_copy"


@pytest.mark.gate
def test_differential(subject, transform, session, record_property):
    lanes.inside(session, subject, transform, domain.of(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_replays(subject, transform, session, record_property):
    lanes.replays(session, subject, transform, sessions.replays(registry.contracts()[transform]), record_property)


@pytest.mark.gate
def test_outside_the_contract(subject, transform, session, record_property):
    lanes.outside(session, subject, transform, domain.outside(registry.contracts()[transform]), record_property)


FAR_CASES = [
    Example((MetadataCopy((1, 1, 1), width=130, page_size=64, more_rows=1),),
            Layout({"page_indices_src": Place("far"), "page_table_1_dst": Place("far"),
                    "real_page_table_dst": Place("far", guard="left")})),
    Example((MetadataCopyMulti((1, 1), width=70, page_size=64, backends=(Backend(), Backend(columns=3))),),
            Layout({"page_table_1_dst[0]": Place("far"), "page_table_1_dst[1]": Place("far", guard="left"),
                    "real_page_table_dst[1]": Place("far")})),
]


@pytest.mark.gate
@pytest.mark.parametrize("example", FAR_CASES, ids=lambda e: e.contract.name)
def test_far(subject, example, session):
    """Rows past element 2^31 of sources and destinations."""
    lanes.fixed(session, subject, example)


COMBINATIONS = {
    f"mode_{mode}-pages_of_{page}-{len(flashmla)}_flashmla": MetadataCopy(
        (2, 0, 3), width=130, forward_mode=mode, page_size=page, spare=1, backend=Backend(columns=2, pages=1), **flashmla)
    for mode in (DECODE, TARGET_VERIFY, DRAFT_EXTEND) for page in (1, 64)
    for flashmla in ({}, {"num_splits": True}, {"num_splits": True, "parts": 3})
}


@pytest.mark.gate
@pytest.mark.parametrize("case", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_mode_with_and_without_real_pages_and_flashmla(subject, case, session):
    """SGLang compiles a kernel for each of them."""
    lanes.fixed(session, subject, Example((case,)))


FULL = dict(width=70, page_size=64, num_splits=True, parts=3)
WRONG_CALLS = {
    "decode": MetadataCopy((1, 1, 1), expanded=False, **FULL),
    "verify": MetadataCopy((3, 3), forward_mode=TARGET_VERIFY, more_rows=1, **FULL),
    "extend": MetadataCopy((2, 0, 3), forward_mode=DRAFT_EXTEND, **FULL),
    "empty": MetadataCopy((), forward_mode=TARGET_VERIFY, **FULL),
    "one_backend": MetadataCopyMulti((1, 1, 1), backends=(Backend(columns=2),), **FULL),
    "two_backends": MetadataCopyMulti((1, 1, 1), width=70),
}


@pytest.mark.parametrize("case", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_refused_before_a_write(case, session):
    assert lanes.refusals(session, "kernels", case) >= 50


DECODED, VERIFIED, MULTI = WRONG_CALLS["decode"], WRONG_CALLS["verify"], WRONG_CALLS["one_backend"]
REFUSED = [
    (DECODED, "forward_mode", {"forward_mode": 3}),
    (DECODED, "forward_mode", {"forward_mode": True}),
    (DECODED, "forward_mode", {"forward_mode": "decode"}),
    (DECODED, "bs", {"bs": -1}),
    (DECODED, "page_indices_src", {"bs": 4}),
    (MULTI, "page_indices_src", {"bs": 4}),
    (DECODED, "max_len", {"max_len": -1}),
    (DECODED, "page_indices_src", {"max_len": 71}),
    (VERIFIED, "max_seqlen_k", {"max_seqlen_k": -1}),
    (VERIFIED, "page_indices_src", {"max_seqlen_k": 71}),
    (VERIFIED, "seqlens_expanded_size", {"seqlens_expanded_size": None}),
    (VERIFIED, "nsa_cache_seqlens_src", {"seqlens_expanded_size": 7}),
    (VERIFIED, "seqlens_expanded_src", {"seqlens_expanded_src": None}),
    (VERIFIED, "seqlens_expanded_dst", {"seqlens_expanded_dst": None}),
    (DECODED, "real_page_table_src", {"real_page_table_src": None}),
    (DECODED, "real_page_table_dst", {"real_page_table_dst": None}),
    (DECODED, "flashmla_num_splits_src", {"flashmla_num_splits_src": None}),
    (DECODED, "flashmla_num_splits_dst", {"flashmla_num_splits_dst": None}),
    (DECODED, "flashmla_metadata_src", {"flashmla_metadata_src": None}),
    (DECODED, "flashmla_metadata_dst", {"flashmla_metadata_dst": None}),
    (DECODED, "flashmla_num_splits_src", {"flashmla_num_splits_src": None, "flashmla_num_splits_dst": None}),
    (DECODED, "flashmla_metadata_dst", {"flashmla_metadata_dst": Output((3, 9))}),
    (MULTI, "bs", {"bs": 1.0}),
    (MULTI, "max_len", {"max_len": "70"}),
    (MULTI, "real_page_table_dst", {"real_page_table_dst": [None]}),
    (MULTI, "cache_seqlens_dst", {"cache_seqlens_dst": []}),
]


@pytest.mark.parametrize(("case", "argument", "changes"), REFUSED,
                         ids=[f"{c.contract.name}-{'-'.join(x)}-{k}" for k, (c, _, x) in enumerate(REFUSED)])
def test_missing_partners_and_impossible_sizes_are_refused_before_a_write(case, argument, changes, session):
    answer = attempt(case, Misuse("", argument, {**case.arguments(), **changes}, Layout()), session.worker("kernels"))
    assert answer.error in ("TypeError", "ValueError") and argument in answer.message and not answer.wrote, answer


def on_memory_of(case, session, changed: dict[str, dict]) -> tuple[str, bool]:
    """Call our kernel with some tensors moved onto other memory: what it said, and whether it wrote."""
    placed = layout.place(case.contract, case.arguments(), Layout(), seed=0, run=0)
    memory, blobs = placed.request()
    for name, view in changed.items():
        left = memory["tensors"][name]
        memory["tensors"].update({f"{name}, unmoved": left, name: {**left, **view}})
    header = {"family": FAMILY, "transform": case.contract.name, "order": 0, "rules": [],
              "steps": [{"memory": memory, "arguments": differential.wire_arguments(case.arguments())}]}
    reply, data = session.worker("kernels").run(header, blobs)
    return (reply["steps"][0]["raised"] or {"message": ""})["message"], bool(data)


def at(case, name: str) -> dict:
    """Where a tensor lies."""
    view = layout.place(case.contract, case.arguments(), Layout(), seed=0, run=0).request()[0]["tensors"][name]
    return {"block": view["block"], "start": view["start"]}


def test_backends_share_lengths_only_cell_by_cell(session):
    case = replace(WRONG_CALLS["two_backends"], spare=3)
    first = at(case, "cache_seqlens_dst[0]")
    assert on_memory_of(case, session, {"cache_seqlens_dst[1]": first}) == ("", True)
    for view in (first, at(case, "cache_seqlens_src")):
        said, wrote = on_memory_of(case, session, {"cache_seqlens_dst[1]": {**view, "shape": [3], "strides": [2]}})
        assert "cache_seqlens_dst[1]" in said and "share memory, and must not" in said and not wrote


def test_a_real_page_table_that_is_the_page_table_is_refused(session):
    """For page size 1 SGLang's record holds one tensor under both names; a copy of both would write it twice."""
    case = replace(WRONG_CALLS["decode"], page_size=2)
    said, wrote = on_memory_of(case, session, {"real_page_table_dst": at(case, "page_table_1_dst")})
    assert "share memory" in said and "real_page_table_dst" in said and not wrote


def test_decode_accepts_the_lengths_as_expanded_lengths_too(session):
    """In SGLang's decode record both are one tensor, of the source as of the destination."""
    case = replace(WRONG_CALLS["decode"], expanded=True)
    aliases = (("seqlens_expanded_src", "cache_seqlens_src"), ("seqlens_expanded_dst", "cache_seqlens_dst"))
    answer = attempt(case, Misuse("", "", case.arguments(), Layout(aliases=aliases)), session.worker("kernels"))
    assert answer.error == "" and answer.wrote


# -- relations between answers of the oracles ---------------------------------------------------------------------------


def answer(case) -> dict[str, tuple]:
    """The states and values of every destination, comparable."""
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules())
    return {n: (c.state.tolist(), c.value.tolist()) for n, c in cells.items()}


def alone(case: MetadataCopyMulti, b: int) -> MetadataCopy:
    """The single copy into backend b."""
    backend = case.backends[b]
    frame = {f: getattr(case, f) for f in case.__dataclass_fields__ if f != "backends"}
    if not backend.real:
        frame["page_size"] = 1
    if not backend.flashmla:
        frame.update(num_splits=False, parts=0)
    return MetadataCopy(**frame, expanded=False, backend=backend)


@given(fused_metadata_copy_multi())
def test_one_copy_into_all_backends_is_a_copy_into_each(case):
    together = answer(case)
    for b in range(len(case.backends)):
        own = {n.removesuffix(f"[{b}]"): a for n, a in together.items() if n.endswith(f"[{b}]")}
        assert own == answer(alone(case, b))


@given(fused_metadata_copy_multi(), st.randoms(use_true_random=False))
def test_the_order_of_the_backends_does_not_matter(case, random):
    order = random.sample(range(len(case.backends)), len(case.backends))
    moved = answer(replace(case, backends=tuple(case.backends[b] for b in order)))
    for name, cells in answer(case).items():
        base, b = name.removesuffix("]").split("[")
        assert moved[f"{base}[{order.index(int(b))}]"] == cells


@given(fused_metadata_copy())
def test_verify_and_extend_copy_alike(case):
    assert answer(replace(case, forward_mode=TARGET_VERIFY, expanded=True)) == answer(
        replace(case, forward_mode=DRAFT_EXTEND, expanded=True))


@given(fused_metadata_copy())
def test_decode_is_verify_of_one_token_without_the_expanded_lengths(case):
    case = replace(case, requests=(1,) * len(case.requests), more_rows=0, expanded=True)
    decode, verify = (answer(replace(case, forward_mode=m)) for m in (DECODE, TARGET_VERIFY))
    expanded = decode.pop("seqlens_expanded_dst")[0]
    assert State.WRITTEN not in expanded and verify.pop("seqlens_expanded_dst")[0].count(State.WRITTEN) == case.n()
    assert decode == verify


@given(st.one_of(fused_metadata_copy(), fused_metadata_copy_multi()))
def test_every_written_cell_holds_the_source_cell_of_its_own_place(case):
    bs, n, rows = len(case.batch), case.n(), case.rows()
    single = isinstance(case, MetadataCopy)
    last = {"cache_seqlens": (0, bs), "cu_seqlens_k": (1, bs + 1), "nsa_cache_seqlens": (0, n), "nsa_cu_seqlens_k": (1, n + 1),
            "flashmla_num_splits": (0, n + 1), "seqlens_expanded": (0, n if case.mode != DECODE else 0)}
    shapes = {"page_table_1": (rows, case.width), "real_page_table": (rows, case.pages()),
              "flashmla_metadata": (case.parts, 8)}
    for name, cells in differential.expect(case.contract, case.arguments(), {}).items():
        base = (name if single else name.split("[")[0]).removesuffix("_dst")
        expected = np.zeros(cells.shape, dtype=bool)
        if base in last:
            first, stop = last[base]
            expected[first:stop] = True
            assert cells.value[first:stop].tolist() == case.numbers(base, stop)[0, first:].tolist()
        else:
            height, width = shapes[base]
            expected[:height, :width] = True
            source = "page_indices" if base == "page_table_1" else base
            assert (cells.value[:height, :width] == case.numbers(source, width, height)).all()
        assert ((cells.state == State.WRITTEN) == expected).all() and set(np.unique(cells.state)) <= {0, State.WRITTEN}


PRECOMPUTED = st.one_of(metadata.decode_metadata(), metadata.target_verify_metadata(), metadata.draft_extend_metadata())


def copied(case, fresh: dict[str, Cells], like: dict[str, Cells]) -> dict[str, Cells]:
    """The copy oracle's answer, from `fresh` buffers, where unwritten cells hold garbage, into buffers of other sizes."""
    garbage = lambda name, shape: hashing.cells(1, name, np.arange(np.prod(shape))).reshape(shape).astype(np.int32)
    source = {n: np.where(c.state == State.WRITTEN, c.value, garbage(n, c.shape)) for n, c in fresh.items()}
    target = {n: Cells(c.shape) for n, c in like.items()}
    mode = {Decode: DECODE, TargetVerify: TARGET_VERIFY, DraftExtend: DRAFT_EXTEND}[type(case)]
    names = {"page_indices_src": "page_table_1"}
    arguments = {}
    for arg in registry.contracts()["fused_metadata_copy"].args:
        base = names.get(arg.name, arg.name[:-4])
        arguments[arg.name] = (source if arg.name.endswith("_src") else target).get(base)
    width, other = case.max_len(), -1
    metadata_copy.fused_metadata_copy(
        **arguments, forward_mode=mode, bs=len(case.batch), max_len=width if mode == DECODE else other,
        max_seqlen_k=other if mode == DECODE else width, seqlens_expanded_size=case.rows(), variant={})
    return target


@given(PRECOMPUTED)
def test_a_precomputed_batch_copied_is_the_batch_replayed(case):
    """On live cells the same; besides them the copy fills the rest of the source's rows, and neither touches anything else."""
    case = replace(case, backends=1, wide=True, spare=0, row_spare=0, repeat=min(case.repeat, 3))
    case = replace(case, ctx_lens=False) if isinstance(case, TargetVerify) else case

    def replayed(case, cu0: str) -> dict[str, Cells]:
        cells = differential.expect(case.contract, case.arguments(), case.contract.rules({"cu0": cu0}))
        return {n.removesuffix("[0]"): c for n, c in cells.items()}

    direct = replayed(replace(case, spare=3), "kept")
    copy = copied(case, replayed(case, "written"), direct)
    rows = case.rows()
    rest = {"page_table_1": (rows, case.max_len()), "real_page_table": (rows, case.pages())}
    for name, cells in direct.items():
        live, filled = cells.state == State.WRITTEN, copy[name].state == State.WRITTEN
        assert (copy[name].value[live] == cells.value[live]).all() and (filled | ~live).all()
        beyond = filled & ~live
        if name in rest:
            height, width = rest[name]
            beyond[:height, :width] = False
        assert not beyond.any() and (cells.state[~live] == State.UNTOUCHED).all()


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
def test_the_live_prefix_arrives_whole_at_the_blocks_of_the_generation_kernels(length):
    """Those leave columns past the last block of 128 unwritten, garbage that the copy carries along."""
    case = DraftExtend((ExtendReq(1, length, 2), ExtendReq(0, 3, 1)), max_extra=300)
    cells = differential.expect(case.contract, case.arguments(), case.contract.rules({"tail": "block"}))
    fresh = {n.removesuffix("[0]"): c for n, c in cells.items()}
    wide = copied(case, fresh, fresh)["page_table_1"].value
    for row, (slot, keys) in enumerate([(1, length), (1, length), (0, 3)]):
        assert wide[row, :keys].tolist() == case.tokens(slot, keys).tolist()


def test_a_decode_batch_by_hand():
    """Two requests, two columns of three, a real page table, split counts and one part."""
    case = Decode((Req(1, 2), Req(0, 1)), page_size=2, max_extra=1)
    fresh = {n.removesuffix("[0]"): c for n, c in differential.expect(case.contract, case.arguments(), case.contract.rules())
             .items()}
    fresh["flashmla_num_splits"], fresh["flashmla_metadata"] = Cells((3,)), Cells((1, 8))
    fresh["flashmla_num_splits"][0:3] = [0, 1, 2]
    fresh["flashmla_metadata"][0, 0:8] = [0, 0, 1, 1, 0, 0, 0, 0]
    got = copied(case, fresh, {n: Cells(tuple(s + 1 for s in c.shape)) for n, c in fresh.items()})
    assert repr(got["cache_seqlens"]) == "Cells([2 1 .])"
    assert repr(got["cu_seqlens_k"]) == "Cells([. 2 3 .])"
    assert repr(got["nsa_cu_seqlens_k"]) == "Cells([. 2 3 .])"
    assert repr(got["flashmla_num_splits"]) == "Cells([0 1 2 .])"
    assert got["flashmla_metadata"].value[0, :8].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert got["page_table_1"].value[0, :2].tolist() == case.tokens(1, 2).tolist()
    assert got["real_page_table"].value[1, 0] == case.tokens(0, 1)[0] // 2
    assert (got["page_table_1"].state[:, 3] == State.UNTOUCHED).all()
