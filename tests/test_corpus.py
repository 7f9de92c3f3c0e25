"""Every saved case, replayed on every subject that provides its transform."""

from pathlib import Path

import pytest

from harness import casefile
from harness.differential import replay

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.gate
@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_saved_case(path, subject, session):
    saved = casefile.read(path)
    name = saved.example.contract.name
    worker = session.worker(subject)
    if worker.describe[name]["provided"]:
        found = replay(saved.example, worker, session.rules(subject, name))
        assert [f.sentence for f in found] == []


def test_the_corpus_is_not_empty():
    assert CORPUS
