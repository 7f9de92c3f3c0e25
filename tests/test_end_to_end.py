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
from hypothesis import given
from hypothesis import strategies as st

from harness import hashing, registry
from harness.differential import expect
from harness.states import Cells, State
from oracles.metadata import Decode, Req
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
