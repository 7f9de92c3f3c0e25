"""The mutation of kernels: every operator makes its edit, and no outcome is taken for another."""

import json
from collections import Counter

import pytest

from harness import layout, mutate, registry
from harness.client import UsageError
from harness.differential import Example, check
from harness.layout import Layout, Place
from harness.mutant_lanes import KILLED, SURVIVED, UNREACHED, Name, Result, Setup, Target, drawn, planted
from harness.mutant_ledger import Entry, killers, learn, ledger
from harness.mutants import OPERATORS, mutants
from harness.mutate import Plan, Score, run
from oracles.page_table import GatherPageTable, Req
from oracles.seqlens import CuSeqlens
from strategies import domain

KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def _kernel(out, lengths, table_stride_0, table_stride_1, n):
    i = tl.arange(0, 8)
    {}


def launch(out, lengths, n):
    {}
"""


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_an_operator_makes_the_edit_of_its_example(operator):
    launch = "_kernel[" in operator.before
    source = KERNEL.format(*(("pass", operator.before) if launch else (operator.before, "pass")))
    made = {m.change.split(" -> ")[1]: m for m in mutants(source) if m.operator == operator.name}
    assert operator.after in made
    mutated = made[operator.after].applied(source)
    compile(mutated, "mutant.py", "exec")
    changed = [(a, b) for a, b in zip(source.splitlines(), mutated.splitlines()) if a != b]
    assert len(changed) == 1 and operator.after in changed[0][1]


def test_only_kernels_and_launches_are_mutated():
    source = KERNEL.format("tl.store(out + i, i, mask=i < n)", "return n + 1 if n < 8 else _kernel[(n,)](out, n)")
    assert {(m.function, m.operator) for m in mutants(source) if m.function == "launch"} == {
        ("launch", "swap-arguments"), ("launch", "short-grid")}


def test_a_mutant_keeps_its_name_when_lines_move():
    source = KERNEL.format("tl.store(out + i, i + 1, mask=i < n)", "pass")
    names = [m.identity for m in mutants(source)]
    assert len(set(names)) == len(names) > 5
    assert [m.identity for m in mutants("# moved\n\n" + source)] == names


# -- end to end: one subject of which some mutants are killed, one survives, one raises ---------------------------------

SUBJECT = """\
import triton
import triton.language as tl


@triton.jit
def _sum(lengths, out, stride, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(lengths + i * stride, mask=i < n, other=0)
    x = tl.maximum(x, 0)
    tl.store(out, 0)
    tl.store(out + 1 + i, tl.cumsum(x, 0), mask=i < n)


def supports(case):
    return len(case["case"]["lengths"]) * case["case"]["repeat"] <= 8 or "at most 8 requests"


def cu_seqlens(*, seqlens, cu_seqlens):
    _sum[(1,)](seqlens, cu_seqlens, seqlens.stride(0), len(seqlens), BLOCK=8)
"""


def test_a_hole_is_a_survivor_and_an_incompetent_mutant_is_no_kill(tmp_path, capsys):
    file, report = tmp_path / "summing.py", tmp_path / "report.json"
    file.write_text(SUBJECT)
    assert mutate.main([str(file), "--family", "seqlens", "--examples", "20", "-n", "1", "--json", str(report)]) == 1
    (target,) = json.loads(report.read_text())["targets"]
    became = {r["mutant"]: r for r in target["results"]}
    assert len(became) == target["mutants"] > 15
    survived = {name for name, r in became.items() if r["outcome"] == SURVIVED}
    assert "_sum: drop-clamp: tl.maximum(x, 0) -> x" in survived  # no length is negative
    assert all(name in capsys.readouterr().out for name in list(survived)[:1])
    raising = became["cu_seqlens: swap-arguments: cu_seqlens, seqlens.stride(0) -> seqlens.stride(0), cu_seqlens"]
    assert raising["outcome"] == "incompetent" and "raised" in raising["sentence"]
    killed = became["_sum: boundary: i < n -> i <= n #2"]
    assert killed["outcome"] == KILLED and killed["buffer"].startswith("cu_seqlens") and "cu_seqlens" in killed["sentence"]
    assert sum(target[k] for k in ("killed", "timeout", "survived", "unreached", "incompetent")) == target["mutants"]
    seen = target["killed"] + target["timeout"]
    assert target["score"] == round(seen / (seen + target["survived"]), 3)


@pytest.mark.parametrize(("shape", "whose"), [("family", "{}"), ("file", "{}/pkg/sub/c.py"), ("path", "sglang")])
def test_a_mutant_lies_in_a_copy_of_its_folder_in_which_it_alone_differs(tmp_path, shape, whose):
    root, copy = tmp_path / "root", tmp_path / "copy"
    for name in ("pkg/a.py", "pkg/sub/b.py", "pkg/sub/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    copy.mkdir()
    target = Target("c", root / "pkg/sub/c.py", root, shape, "sglang", ())
    loaded, paths = planted(target, "mutated", copy, Setup("sglang", "python", ("elsewhere",)))
    assert loaded == whose.format(copy) and paths == ((str(copy), "elsewhere") if shape == "path" else ("elsewhere",))
    names = ("pkg/a.py", "pkg/sub/b.py", "pkg/sub/c.py")
    assert [(copy / name).read_text() for name in names] == ["pkg/a.py", "pkg/sub/b.py", "mutated"]
    assert (root / "pkg/sub/c.py").read_text() == "pkg/sub/c.py"


# -- without workers: what the command makes of what became of the mutants ----------------------------------------------


class Lanes:
    """Stands in for the lanes: every mutant is killed, except that `surviving` are not, and that `unreached` are reached by no
    example; the user may lose patience."""

    surviving: frozenset = frozenset()
    unreached: frozenset = frozenset()
    patience = 10**6

    def __init__(self, *_):
        self.tried, self.asked = 0, []

    def everywhere(self, method, *_):
        return [["cu_seqlens"]]

    def spread(self, method, tasks):
        for task in tasks:
            self.asked.append((method, *task[1:]))
            if method in ("probes", "killers"):
                yield []
            else:
                self.tried += 1
                if self.tried > self.patience:
                    raise KeyboardInterrupt
                name = task[1].identity
                became = SURVIVED if name in self.surviving else UNREACHED if name in self.unreached else KILLED
                yield Result(name, 1, became, sentence="seen", name=Name("cu_seqlens", "inside", 3))

    def close(self):
        pass


@pytest.fixture
def target(tmp_path):
    (tmp_path / "seqlens.py").write_text(SUBJECT)
    return Target("seqlens", tmp_path / "seqlens.py", tmp_path, "family", "kernels", ("seqlens",))


def scored(target, entries, surviving=(), unreached=(), **plan):
    score, lanes = Score("seqlens", 0), Lanes()
    lanes.surviving, lanes.unreached = frozenset(surviving), frozenset(unreached)
    run(target, lanes, Plan(entries, plan.pop("killers", {}), 30, **plan), score, lambda score: None)
    return score, lanes


CLAMP = "_sum: drop-clamp: tl.maximum(x, 0) -> x"
ARGUED = Entry("equivalent", "no length is negative")


def test_the_ledger_excuses_a_survivor_and_counts_blind_spots_apart(target):
    assert [r.mutant for r in scored(target, {}, [CLAMP])[0].open] == [CLAMP]
    excused, _ = scored(target, {CLAMP: ARGUED}, [CLAMP])
    assert (excused.open, excused.stale, excused.row()["equivalent"], excused.row()["blind spots"]) == ([], [], 1, 0)
    blind, _ = scored(target, {CLAMP: Entry("blind spot: needs a GPU", "it is")}, [CLAMP])
    assert (blind.open, blind.row()["equivalent"], blind.row()["blind spots"]) == ([], 0, 1)


def test_mutants_that_no_example_executes_are_open_and_not_in_the_score(target):
    row = scored(target, {}, unreached=[CLAMP])[0].row()
    assert (row["survived"], row["unreached"], row["score"]) == (0, 1, 1.0)
    assert scored(target, {}, surviving=[CLAMP])[0].row()["score"] < 1


def test_a_ledger_entry_that_is_killed_or_gone_is_stale(target):
    stale = scored(target, {CLAMP: ARGUED, "_sum: boundary: a < b -> a <= b": ARGUED})[0].stale
    assert [text.split(": ")[-1] for text in stale] == ["there is no such mutant", "it is killed (seen)"]


def test_only_what_the_killers_leave_meets_the_campaign_and_the_ledger_only_in_full(target):
    known = {Name("cu_seqlens", "inside", 3): 5}

    def asked(entries, **plan):
        return [task[0] for task in scored(target, entries, [CLAMP], killers=known, **plan)[1].asked]

    every = len(target.mutants())
    assert asked({CLAMP: ARGUED}) == ["killers"] + every * ["attempt"]
    rounds = 2 * ["probes", "attempt"]  # 24 examples, then 30
    assert asked({}) == ["killers"] + every * ["attempt"] + rounds
    assert asked({CLAMP: ARGUED}, full=True) == ["killers"] + every * ["attempt"] + rounds


def test_killers_are_kept_by_name(tmp_path):
    kept = tmp_path / "killers.json"
    first = {Name("cu_seqlens", "inside", 3): 5, Name("seqlens_expand", "beside", 0): 1}
    learn("seqlens", Counter(first), kept)
    learn("draft", Counter({Name("assign_req_to_token_pool", "inside", 7): 2}), kept)
    assert killers(kept)["seqlens"] == first and set(killers(kept)) == {"draft", "seqlens"}
    learn("seqlens", Counter(), kept)
    assert killers(kept)["seqlens"] == {}


def test_our_killers_are_examples_of_the_gate():
    for family, known in killers().items():
        for name in known:
            assert registry.contracts()[name.transform].family == family, name
            assert name.side == "beside" or name.number < mutate.GATE, name


def test_an_example_has_the_same_number_however_many_are_drawn():
    strategy = domain.of(registry.contracts()["cu_seqlens"])
    assert [repr(e) for e in drawn(strategy, 40)[:9]] == [repr(e) for e in drawn(strategy, 9)]


def test_a_stale_ledger_is_exit_1_and_a_true_one_exit_0(tmp_path, monkeypatch):
    book = tmp_path / "ledger.toml"
    monkeypatch.setattr(mutate, "Lanes", Lanes)
    book.write_text("")
    assert mutate.main(["seqlens", "--ledger", str(book)]) == 0
    book.write_text('[[entry]]\nfamily = "seqlens"\nkind = "equivalent"\nbecause = "it is"\n'
                    'mutants = ["_gone: boundary: a < b -> a <= b"]\n')
    assert mutate.main(["seqlens", "--ledger", str(book)]) == 1


@pytest.mark.parametrize(("entry", "says"), [
    ('kind = "equivalent"', "no argument"), ('because = "it is"', "of kind ''"),
    ('kind = "blind spot"\nbecause = "it is"', "needs ..."),
])
def test_a_ledger_entry_without_an_argument_or_a_kind_is_an_error_of_use(tmp_path, entry, says):
    book = tmp_path / "ledger.toml"
    book.write_text(f'[[entry]]\nfamily = "seqlens"\n{entry}\nmutants = ["a"]\n')
    with pytest.raises(UsageError, match=says):
        ledger(book)


def test_the_table_is_written_into_its_part_of_the_page(tmp_path, monkeypatch):
    page = tmp_path / "mutation.md"
    monkeypatch.setattr(mutate, "PAGE", page)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    page.write_text("a\n<!-- ci/mutate --write: kernels -->\nold\n<!-- end -->\nb\n")
    mutate.written("kernels", "new")
    assert page.read_text() == "a\n<!-- ci/mutate --write: kernels -->\nnew\n<!-- end -->\nb\n"
    with pytest.raises(UsageError, match="has no part"):
        mutate.written("sglang", "new")


def test_an_interrupted_run_leaves_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "Lanes", type("Impatient", (Lanes,), {"patience": 7}))
    report = tmp_path / "report.json"
    assert mutate.main(["seqlens", "--json", str(report)]) == 1
    content = json.loads(report.read_text())
    assert not content["finished"] and len(content["targets"][0]["results"]) == 7


@pytest.mark.parametrize(("given", "says"), [
    (["nothing"], "neither a family"), (["--changed", "no-such-base"], "--changed no-such-base"),
    (["seqlens", "--changed", "HEAD"], "give it or targets"), (["seqlens", "--again", "no-such-file"], "no-such-file"),
    (["seqlens", "--write"], "--write publishes all our kernels"),
    (["page_table", "seqlens:foo"], "seqlens:foo: nothing to mutate in a function of that name"),
    (["seqlens:foo"], "seqlens.py has _"), (["seqlens:foo", "--list"], "seqlens.py has _"),
    ([f"{mutate.ROOT}/harness/kept.py"], "kept.py has no Triton function that could be; it has "),
    ([f"{mutate.ROOT}/README.md"], "README.md is no Python file"),
])
def test_errors_of_use_are_one_line_and_exit_2(given, says, capsys):
    assert mutate.main(given) == 2
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1


def test_every_entry_of_our_ledger_is_a_mutant():
    for family, entries in ledger().items():
        names = {m.identity for m in mutate.family(family).mutants()}
        assert set(entries) <= names, (family, set(entries) - names)


def test_the_published_operators_are_those_of_the_command():
    assert mutate.operators() in (mutate.ROOT / "docs" / "mutation.md").read_text()


@pytest.mark.parametrize("kind", ["contiguous", "pitched", "far"])
def test_the_windows_of_a_large_output_do_not_overlap(kind):
    """What survivors brought to light: a byte in two windows made kernels look wrong near the ends of long rows."""
    case = GatherPageTable((Req(0, 33_000), Req(1, 9)), draft_tokens=5)
    placed = layout.place(case.contract, case.arguments(), Layout({"page_table_1": Place(kind)}), 0, 0)
    block = placed.views["page_table_1"].block
    ends = sorted((w.offset, w.offset + len(w.image)) for w in placed.windows if w.block == block)
    assert placed.sizes[block] > layout.DENSE_LIMIT and ends
    assert all(stop <= start for (_, stop), (start, _) in zip(ends, ends[1:]))


class _Counting:
    """A worker that counts the calls that reach it."""

    def __init__(self, worker):
        self._worker, self.calls = worker, 0
        self.options, self.describe = worker.options, worker.describe

    def run(self, header, blobs):
        self.calls += 1
        return self._worker.run(header, blobs)


@pytest.mark.parametrize(("fault", "thorough", "calls"), [("unwritten", True, 2), ("unwritten", False, 1),
                                                          ("honest_sum", False, 2)])
def test_a_mutant_is_run_no_further_than_its_first_finding(fault, thorough, calls, planted):
    worker = _Counting(planted(fault))
    found = check(Example((CuSeqlens((3, 5)),)), worker, registry.contracts()["cu_seqlens"].rules(), thorough=thorough)
    assert worker.calls == calls and bool(found) == (fault == "unwritten")
