"""The contracts fit together: attention that reads nothing but metadata and the cache equals attention as one would write
it down from the requests alone.

| path   | knows                                                                | and never sees          |
| ------ | -------------------------------------------------------------------- | ----------------------- |
| dense  | each request's tokens, prefix and new query tokens                   | any metadata            |
| sparse | the metadata that the oracles write, and a cache addressed by slot   | the requests            |

Both pick the same top-k keys of every query token by the same scores, so the results agree exactly or a contract is wrong:
an off-by-one in a length, a row of another request, a page number for a slot.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import hashing, registry
from harness.differential import expect
from harness.states import Cells, State
from harness.tensors import table
from oracles import indexer, page_table, seqlens, topk_transform
from oracles.metadata import Decode, DraftExtend, ExtendReq, Req
from strategies import metadata as strategies

DIM = 4
MODES = {"decode_metadata": strategies.decode_metadata, "target_verify_metadata": strategies.target_verify_metadata,
         "draft_extend_metadata": strategies.draft_extend_metadata}


# -- what a slot of the cache and a query token hold --------------------------------------------------------------------


def numbers(name: str, index: np.ndarray) -> np.ndarray:
    """A number in [-1, 1) for every index."""
    return hashing.cells(0, name, index).astype(np.float64) / 2.0**63 - 1


def keys(slots: np.ndarray) -> np.ndarray:
    """[len(slots), DIM]: what the cache holds at each slot. Keys serve as values."""
    return np.stack([numbers(f"key {d}", slots) for d in range(DIM)], axis=1)


def query(row: int) -> np.ndarray:
    return np.array([numbers(f"query {d}", np.array([row]))[0] for d in range(DIM)])


def scores(row: int, slots: np.ndarray) -> np.ndarray:
    """How the indexer ranks keys for a query token."""
    return numbers(f"score {row}", slots)


def attention(row: int, slots: np.ndarray) -> np.ndarray:
    """Softmax attention of a query token over the keys at `slots`; zeros without keys."""
    if not len(slots):
        return np.zeros(DIM)
    weights = np.exp(keys(slots) @ query(row))
    return weights @ keys(slots) / weights.sum()


# -- dense: from the requests -------------------------------------------------------------------------------------------


def visible(case, i: int) -> list[int]:
    """Keys that each query token of request i sees: causal, the token itself included."""
    keys_in_all, new = case.kv_len(i), case.rows_of(i)
    return [max(keys_in_all - new + 1 + t, 0) for t in range(new)]


def dense(case) -> list[np.ndarray]:
    out = []
    for i, request in enumerate(case.batch):
        tokens = case.tokens(request.slot, case.kv_len(i))
        for count in visible(case, i):
            best = np.argsort(-scores(len(out), tokens[:count]), kind="stable")[: case.index_topk]
            out.append(attention(len(out), tokens[np.sort(best)]))
    return out


# -- sparse: from the metadata ------------------------------------------------------------------------------------------


class Misled(Exception):
    """The metadata send the consumer where nothing was written."""


def written(cells: Cells, index) -> np.ndarray:
    """Cells that the transform must have written."""
    if not (cells.state[index] == State.WRITTEN).all():
        raise Misled(f"the consumer reads {index}, which nobody wrote")
    return cells.value[index]


def slot_of(record: dict, case, row: int, positions: np.ndarray) -> np.ndarray:
    """KV slots of some positions of a row, through whichever table the record has."""
    if record.get("page_table_1[0]") is not None:
        return written(record["page_table_1[0]"], (row, positions))
    page = written(record["real_page_table[0]"], (row, positions // case.page_size))
    return page * case.page_size + positions % case.page_size


def sparse(case, record: dict) -> list[np.ndarray]:
    expanded = record.get("seqlens_expanded[0]", record["cache_seqlens[0]"])
    starts = record["nsa_cu_seqlens_k[0]"]
    ragged = np.full(int(written(starts, case.rows())), -1)
    out = []
    for row in range(case.rows()):
        all_slots = slot_of(record, case, row, np.arange(written(expanded, row)))
        kept = written(record["nsa_cache_seqlens[0]"], row)
        best = np.sort(np.argsort(-scores(row, all_slots), kind="stable")[:kept])
        start, stop = written(starts, row), written(starts, row + 1)
        if stop - start != len(best):
            raise Misled(f"row {row} has {len(best)} keys and {stop - start} cells for them")
        ragged[start:stop] = slot_of(record, case, row, best)
        out.append(attention(row, ragged[start:stop]))
    if (ragged < 0).any():
        raise Misled("the ragged slots have a hole")
    return out


@st.composite
def cases(draw, name: str):
    """One backend; pages are contiguous where only the real table exists."""
    case = draw(MODES[name]())
    return replace(case, backends=1, repeat=1, page_size=draw(st.sampled_from((1, 64, 16))), aligned=True,
                   wide=draw(st.booleans())) if case.page_size > 1 else replace(case, backends=1, repeat=1)


def fitting(case):
    return replace(case, wide=case.wide or case.page_size == 1)


def agree(case, record) -> bool:
    try:
        a, b = dense(case), sparse(case, record)
    except Misled:
        return False
    return len(a) == len(b) and all(np.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(a, b))


def record_of(case) -> dict:
    return expect(case.contract, case.arguments(), case.contract.rules())


@pytest.mark.parametrize("name", sorted(MODES))
def test_sparse_attention_over_metadata_is_dense_attention(name):
    seen = set()

    @given(cases(name).map(fitting))
    def property(case):
        seen.update({f"page {case.page_size}", f"wide {case.wide}"})
        assert agree(case, record_of(case))

    property()
    assert {"page 1", "page 64", "wide True", "wide False"} <= seen


# -- an extend with prefixes: through the prefill families --------------------------------------------------------------


def filled(transform, shape: tuple[int, ...], name: str, **given) -> np.ndarray:
    """The values of one output of an oracle; every cell must have been written."""
    out = Cells(shape)
    transform(**given, **{name: out})
    return written(out, ...)


def extend_tables(case) -> dict:
    """What an extend computes before attention: from lengths, slots and the request table alone."""
    bs, rows = len(case.batch), case.rows()
    seqs, extends = [r.seq_len for r in case.batch], [r.extend_len for r in case.batch]
    lengths = dict(bs=bs, extend_seq_lens=extends)
    wide = Cells((bs, max(seqs, default=0)))
    page_table.gather_page_table(
        req_to_token=case.req_to_token().view(), req_pool_indices=[r.slot for r in case.batch], cache_seqlens=seqs,
        row_repeats=None, bs_idx=None, page_table_1=wide, bs=bs, total_rows=bs, draft_tokens=1, max_len=wide.shape[1],
        variant={"tail": "strict"})
    slots = table(wide.shape, {i: written(wide, (i, slice(0, n))) for i, n in enumerate(seqs)}).view()
    pages = Cells((bs, -(-wide.shape[1] // case.page_size)))
    page_table.real_page_table(page_table_1=np.where(wide.state == State.WRITTEN, wide.value, 0), real_page_table=pages,
                               page_size=case.page_size, variant={})
    sums = filled(seqlens.cu_seqlens, (bs + 1,), "cu_seqlens", seqlens=seqs, variant={})
    ks, ke, owner = Cells((rows,)), Cells((rows,)), Cells((rows,))
    indexer.indexer_k_start_end(**lengths, seq_lens=seqs, ks=ks, ke=ke, token_to_batch_idx=owner, total_len=rows, cp_size=1,
                                cp_rank=0, variant={})
    return {
        "slots": slots, "pages": written(pages, ...),
        "ragged": filled(page_table.page_table_1_flattened, (sum(seqs),), "page_table_1_flattened", page_table_1=slots,
                         seq_lens=seqs, bs=bs, max_len=wide.shape[1], total_len=sum(seqs), variant={}),
        "offset": filled(page_table.topk_indices_offset, (rows,), "topk_indices_offset", **lengths, cu_seqlens_k=sums,
                         total_len=rows, variant={}),
        "expanded": filled(seqlens.seqlens_expand, (rows,), "seqlens_expanded", extend_seq_lens=extends, seq_lens=seqs,
                           total_len=rows, max_q_len=max(extends, default=0), variant={"clamp": "zero"}),
        "ks": written(ks, ...), "ke": written(ke, ...), "owner": written(owner, ...), "extends": extends,
    }


def extend_attention(case, tables: dict) -> dict[str, list[np.ndarray]]:
    """Attention of every query token by each way to its keys: slots of its request, places in the ragged keys, pages."""
    rows, topk = case.rows(), case.index_topk
    best = np.full((rows, topk), -1)
    for row in range(rows):
        seen = tables["ragged"][tables["ks"][row] : tables["ke"][row]]
        if len(seen) != tables["expanded"][row]:
            raise Misled(f"row {row} has {len(seen)} keys in the ragged batch, and sees {tables['expanded'][row]}")
        order = np.sort(np.argsort(-scores(row, seen), kind="stable")[:topk])
        best[row, : len(order)] = order
    paged = filled(topk_transform.transform_index_page_table_prefill, (rows, topk), "result", page_table=tables["slots"],
                   topk_indices=best, cu_seqlens_q=None, extend_lens_cpu=tables["extends"], output_num_tokens=None,
                   page_table_is_expanded=False, variant={})
    ragged = filled(topk_transform.transform_index_ragged, (rows, topk), "result", topk_indices=best,
                    topk_indices_offset=tables["offset"], variant={})
    if rows and ragged.max() >= len(tables["ragged"]):
        raise Misled(f"there are {len(tables['ragged'])} ragged keys, and {ragged.max()} is read")
    real = tables["pages"][tables["owner"][:, None], best // case.page_size] * case.page_size + best % case.page_size
    ways = {"paged": paged, "ragged": np.append(tables["ragged"], -1)[ragged], "real": np.where(best < 0, -1, real)}
    return {way: [attention(row, found[row][found[row] >= 0]) for row in range(rows)] for way, found in ways.items()}


def extends() -> st.SearchStrategy:
    """Prefixes and fresh prompts, requests without new tokens; whole pages, so that a page number says where a slot is."""
    def fit(case, page_size, topk):
        requests = tuple(replace(r, seq_len=max(r.seq_len % 200, r.extend_len)) for r in case.requests)
        return replace(case, requests=requests, repeat=1, backends=1, aligned=True, page_size=page_size, index_topk=topk,
                       max_extra=0, extend_extra=0)

    return st.builds(fit, strategies.draft_extend_metadata(), st.sampled_from((1, 64)), st.sampled_from((4, 64, 1)))


def extends_agree(case, tables) -> bool:
    try:
        ways = extend_attention(case, tables)
    except Misled:
        return False
    reference = dense(case)
    return all(len(found) == len(reference) and all(np.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(found, reference))
               for found in ways.values())


@settings(max_examples=40)
@given(extends())
def test_an_extend_attends_alike_by_slots_by_ragged_places_and_by_pages(case):
    assert extends_agree(case, extend_tables(case))


@pytest.mark.parametrize("fault", ["ks", "ke", "offset", "owner", "expanded", "ragged", "pages"])
def test_an_extend_notices_a_table_that_is_wrong(fault):
    case = DraftExtend((ExtendReq(1, 70, 3), ExtendReq(2, 9, 2)), index_topk=4, page_size=64)
    tables = extend_tables(case)
    tables[fault] = np.roll(tables[fault], 1, axis=0) if fault in ("owner", "ragged", "pages", "offset") else tables[fault] - 1
    assert not extends_agree(case, tables)


WRONG = {
    "a length too long": lambda r: _add(r, "nsa_cache_seqlens[0]", -1),
    "sums shifted": lambda r: _add(r, "nsa_cu_seqlens_k[0]", 1),
    "the next slot": lambda r: _add(r, "page_table_1[0]", 1),
    "a row of another request": lambda r: _roll(r, "page_table_1[0]"),
    "one key too few": lambda r: _add(r, "cache_seqlens[0]", -1),
}


def _add(record, name, by):
    record[name].value += by


def _roll(record, name):
    record[name].value[:] = np.roll(record[name].value, 1, axis=0)


@pytest.mark.parametrize("fault", sorted(WRONG))
def test_it_notices_metadata_that_is_wrong(fault):
    case = Decode((Req(1, 9), Req(2, 9), Req(3, 9)), index_topk=4)
    record = record_of(case)
    assert agree(case, record)
    WRONG[fault](record)
    assert not agree(case, record)


def test_every_mode_of_the_metadata_family_is_here():
    assert sorted(MODES) == sorted(n for n, c in registry.contracts().items() if c.family == "metadata")
