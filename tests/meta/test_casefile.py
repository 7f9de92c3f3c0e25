"""Case files: they round-trip, and nothing but data of a known format gets in."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import casefile, registry
from harness.differential import Example
from harness.generation import each_distinct
from oracles.seqlens import Req, SeqlensExpand
from strategies import domain, sessions

CONTRACTS = registry.contracts()


@given(st.sampled_from(sorted(CONTRACTS)).flatmap(lambda n: domain.outside(CONTRACTS[n])))
def test_every_example_survives_the_file(tmp_path_factory, example):
    path = tmp_path_factory.mktemp("case") / "case.json"
    casefile.write(path, casefile.document(example, example.contract.rules(), "kernels", {"torch": "2"}, None))
    assert casefile.read(path).example == example


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_what_supports_is_asked_travels_as_json(name):
    def visit(example):
        (call,) = casefile.encode_calls(example)
        assert set(json.loads(json.dumps(call))["case"]) == {f.name for f in fields(example.steps[0])}

    each_distinct(domain.of(CONTRACTS[name]), 3, visit)


@given(sessions.replays(CONTRACTS["draft_extend_metadata"]))
def test_sessions_survive_the_file(tmp_path_factory, example):
    path = tmp_path_factory.mktemp("case") / "case.json"
    casefile.write(path, casefile.document(example, {}, "kernels", {}, None))
    assert casefile.read(path).example == example


@pytest.fixture
def content():
    return casefile.document(Example((SeqlensExpand((Req(1, 2),)),)), {"clamp": "zero"}, "kernels", {}, None)


def refused(tmp_path, content) -> str:
    path = tmp_path / "case.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(casefile.CaseFileError) as error:
        casefile.read(path)
    return str(error.value).replace(str(tmp_path), "")  # its name has that of the test in it


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_refused(tmp_path, content, number):
    assert f"format_version {number}; this version reads 2" in refused(tmp_path, {**content, "format_version": number})


def test_a_default_that_changes_makes_no_other_case_of_a_saved_one(tmp_path, content, monkeypatch):
    path = casefile.write(tmp_path / "case.json", content)
    before, init = casefile.read(path).example, SeqlensExpand.__init__
    others = tuple(d + 1 if type(d) is int else d for d in init.__defaults__)
    monkeypatch.setattr(init, "__defaults__", others)
    assert SeqlensExpand((Req(1, 2),)) != before.steps[0]
    assert casefile.read(path).example == before


def test_a_field_that_was_cut_out_is_noticed(tmp_path, content):
    del content["steps"][0]["case"]["spare"]
    assert "digest" in refused(tmp_path, content)


def test_an_edited_case_is_refused(tmp_path, content):
    content["steps"][0]["case"]["requests"][0]["seq_len"] = 3
    assert "digest" in refused(tmp_path, content)


def test_only_the_familys_case_types_are_built(tmp_path, content):
    content["steps"][0]["case"]["type"] = "Path"
    assert "no case type 'Path'" in refused(tmp_path, content)


@pytest.mark.parametrize(("change", "says"), [
    ({"steps": [{"contract": "nothing", "case": {}}]}, "unknown contract"),
    ({"steps": None}, "malformed"),
    ({"layout": {}}, "incomplete"),
    ({"steps": []}, "malformed (it has no steps)"),
    ({"program_order": "x"}, "malformed"),
    ({"subject": None}, "'subject' is None, and must be a str"),
    ({"finding": "none"}, "'finding' is 'none', and must be a dict"),
    ({"fills": {"seed": "x"}}, "malformed"),
    ({"layout": {"places": {}, "aliases": [["a", "b", "c"]]}}, "malformed"),
])
def test_malformed_files_are_refused(tmp_path, content, change, says):
    said = refused(tmp_path, {**content, **change})
    assert says in said and len(said.splitlines()) == 1


def test_unknown_fields_and_other_files_are_refused(tmp_path, content):
    content["steps"][0]["case"]["colour"] = 1
    assert "no field 'colour'" in refused(tmp_path, content)
    assert "not readable" in refused(tmp_path, "{")
    assert "no format_version" in refused(tmp_path, "{}")
