"""Every saved case, replayed on every subject that provides its transform."""

from pathlib import Path

import pytest

from harness import casefile, lanes

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.gate
@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_saved_case(path, subject, session, record_property):
    lanes.kept(session, subject, casefile.read(path).example, record_property)


def test_the_corpus_is_not_empty():
    assert CORPUS
