"""`ci/replay --script`: a case as one Python file of literals that needs torch, Triton and the kernel, and no plumbline."""

import itertools
import pprint
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness import floats, layout as layouts
from harness.checks import differing, whole
from harness.client import ROOT, UsageError
from harness.contract import Kind, Role
from harness.differential import HARM_ONLY, Example, Step, expect, plan, run_steps, wire_arguments
from harness.findings import CheckOptions, Found
from harness.layout import INIT, Observed, Placed, WRITE
from harness.states import State
from harness.worker.subject import BUILT_IN

BODY = ROOT / "harness" / "worker" / "standalone.py"
ANY_DEVICE = 'DEVICE = "cuda" if torch.cuda.is_available() else "cpu"'
INTERPRETED = 'DEVICE = "cpu"  # Triton\'s interpreter, where this was found; "cuda" runs the compiled kernel'
SHIMS = ("poison", "loop_bounds_from_memory", "poison_masked_lanes", "scalar_and_vector_masks", "narrow_float_casts",
         "integer_sums_wrap", "first_config_of_autotune")
MARK = "Needs torch, Triton and the kernel, and nothing of plumbline, which wrote it."
ONLY_HERE = {"race": "a race", "grid": "a launch grid that hardware refuses"}
MOST_CELLS = 200_000
MARGIN = {"cpu": 60.0, "cuda": 300.0}  # seconds beyond the run's limit: torch is imported, and a GPU's kernels compile


def write(path: Path, example: Example, worker, rules: Mapping[str, str], found: list[Found]) -> str:
    """Write the script and run it once; returns what there is to say about it.

    Raises:
        UsageError: the finding cannot be shown outside this suite, or the file is another's or cannot be written.
    """
    _may_write(path, _subject(worker, example.contract))
    first = _first_anywhere(found)
    steps = _host_steps(example, rules) if example.contract.kind is Kind.HOST else _steps(example, worker, rules, first)
    watched = bool(first) and (first.check == "memory" or "load" in first.sentence or "store" in first.sentence)
    status, limit = 0, worker.options.run_limit + MARGIN[worker.options.device]
    for shims in (False, True):
        _save(path, _text(example, worker, first, steps, watched, shims))
        try:
            status, said = _run(worker.options.python, path, limit)
        except subprocess.TimeoutExpired:
            return f"run once: it does not end, and was stopped after {limit:.0f} s"
        other = bool(first) and first.check == "states" and status == 1 and not said  # an error of the bare interpreter
        if bool(status) == bool(found) and (shims or not other):
            return "run once: it " + ("fails" if found else "passes") + (", with the interpreter's shims" if shims else "")
    return "run once: it " + ("passes, though the case fails; the suite sees more (docs/explanation.md)" if found else
                              f"ends with status {status}, though the case is right")


def _may_write(path: Path, subject: dict) -> None:
    """Raises UsageError where something is there that no --script wrote: the kernel itself, for one."""
    own = Path(subject.get("file") or Path(subject.get("folder", ""), f"{subject['module']}.py"))
    try:
        if not path.exists():
            return
        if own.exists() and own.samefile(path):
            raise UsageError(f"--script {path}: that is the kernel under test; name another file")
        if not path.is_file() or not _a_script(path.read_text(encoding="utf-8", errors="replace")):
            raise UsageError(f"--script {path}: that is there, and no script that --script wrote; name another file")
    except OSError as error:
        raise UsageError(f"--script {path}: cannot be read ({error.strerror})") from None


def _a_script(text: str) -> bool:
    """Whether the comment at the head of a file says that it was written here."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return any(line.startswith(f"# {MARK}") for line in head)


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"--script {path}: cannot be written ({error.strerror}: {error.filename})") from None


def _first_anywhere(found: list[Found]) -> Found | None:
    """The first finding that shows outside this suite, or None where nothing was found."""
    anywhere = [f for f in found if not _only_here(f)]
    if found and not anywhere:
        raise UsageError(f"{_only_here(found[0])} shows only in the shadow memory: no script; replay the case with ci/replay")
    return anywhere[0] if anywhere else None


def _only_here(found: Found) -> str:
    """What nothing but the shadow memory sees, in words; or ''."""
    return next((said for rule, said in ONLY_HERE.items() if found.check == "memory" and found.buffer.endswith(rule)), "")


def _run(python: str, path: Path, limit: float) -> tuple[int, bool]:
    """The script's exit status, and whether it said what is wrong. Its output is a file, so that no process that it leaves
    behind can hold a pipe open."""
    with tempfile.TemporaryFile() as output:
        done = subprocess.run([python, "-I", str(path.resolve())], cwd=path.parent, timeout=limit, stdin=subprocess.DEVNULL,
                              stdout=output, stderr=subprocess.DEVNULL)
        output.seek(0)
        return done.returncode, b"WRONG, call" in output.read()


def _host_steps(example: Example, rules: Mapping[str, str]) -> list[dict]:
    arguments = example.steps[0].arguments()
    return [{"memory": {}, "tensors": {}, "arguments": wire_arguments(arguments), "written": {}, "free": {}, "meaning": {},
             "access": {}, "refused": [], "returned": expect(example.contract, arguments, rules)}]


def _steps(example: Example, worker, rules: Mapping[str, str], first: Found | None) -> list[dict]:
    """The literals of every call up to the one that goes wrong, from the run that shows the finding."""
    stated = not example.breaks_contract
    planned = plan(example, rules, stated)
    for run in (0, 1):
        done, found = run_steps(example, planned, worker, CheckOptions() if stated else HARM_ONLY, run)
        if first is None or any(_same(first, f) for f in found):
            break
    last = first.step if first else len(planned) - 1
    prior, steps = None, []
    for k, step in enumerate(planned[: last + 1]):
        placed = layouts.place(step.case.contract, step.arguments, example.layout, example.seed, run, prior)
        observed = done[k][1] if k < len(done) else None
        steps.append(_literals(step, placed, observed))
        prior = layouts.Prior(placed, observed, prior) if observed else prior
    return steps


def _same(first: Found, found: Found) -> bool:
    """Whether a run shows the finding; one outside the contract is filed under its precondition."""
    return first.kind == found.kind or (first.check == "unchecked" and first.sentence == found.sentence)


def _literals(step: Step, placed: Placed, observed: Observed | None) -> dict:
    """One call as plain data; positions count in elements of a memory, cells by their flat logical index. Where the oracle was
    not asked, every cell of an output is free."""
    owner = {}
    for name, view in placed.views.items():
        owner.setdefault(view.block, name)
    memory, base, access = {}, {}, {name: [] for name in owner.values()}
    for block, name in owner.items():
        memory[name], base[block] = _memory(placed, block, name)
    size = {block: placed.views[name].dtype.itemsize for block, name in owner.items()}
    for block, byte, count, stride, flags in placed.access:
        allowed = (1 if flags & WRITE else 0) | (2 if flags & INIT else 0)
        access[owner[block]].append(((byte - base[block]) // size[block], count, max(stride // size[block], 1), allowed))
    tensors = {n: (owner[v.block], v.shape, v.strides, (v.start - base[v.block]) // v.dtype.itemsize)
               for n, v in placed.views.items()}
    written, free, refused, meaning = {}, {}, [], {}
    if step.expected is None:
        outputs = [n for n in placed.views if step.case.contract.arg(n).role is not Role.IN]
        free = {n: {0: int(np.prod(placed.views[n].shape))} for n in outputs}
    for name, cells in (step.expected or {}).items():
        view, state = placed.views[name], cells.state.reshape(-1)
        if view.shape != cells.shape:
            state = state[: view.shape[0]]
        free[name] = {int(lo): int(hi - lo) for lo, hi in _stretches(np.isin(state, (State.DONT_CARE, State.JUDGED)))}
        bits = _signed(floats.encode(floats.rounded(cells.value.reshape(-1)[: len(state)], view.name), view.name))
        written[name] = {int(lo): bits[lo:hi].tolist() for lo, hi in _stretches(state == State.WRITTEN)}
        if observed is not None:
            meaning |= _meanings(step, placed, observed, name, cells)
            refused += _refusals(placed, observed, name, cells)
    return {"memory": memory, "tensors": tensors, "arguments": wire_arguments(step.arguments), "written": written, "free": free,
            "meaning": meaning, "access": access, "refused": refused}


def _memory(placed: Placed, block: int, name: str) -> tuple[tuple, int]:
    """A block as (dtype, elements, contents by run), without what lies before and behind its cells; and its first byte.

    The first cell keeps its place modulo 16 bytes, which decides the code that Triton compiles."""
    view = placed.views[name]
    itemsize = view.dtype.itemsize
    low, high = placed.sizes[block], 0
    ranges = []
    for p in placed.pieces[name]:
        start = placed.windows[p.window].offset + p.offset
        stop = start + (p.count - 1) * p.step + itemsize
        low, high = min(low, start), max(high, stop)
        ranges.append((p.window, start, stop))
    if not ranges:
        return (view.name, 0, {}), view.start
    base = low // 16 * 16
    dense = len({w for w, _, _ in ranges}) == 1
    if dense:
        ranges = [(ranges[0][0], base if base >= placed.windows[ranges[0][0]].offset else low, high)]
    if sum(stop - start for _, start, stop in ranges) // itemsize > MOST_CELLS:
        raise UsageError(f"{name} alone has more than {MOST_CELLS:,} elements to write down: no script")
    runs = {}
    for window, start, stop in ranges:
        image = placed.windows[window].image[start - placed.windows[window].offset : stop - placed.windows[window].offset]
        runs[(start - base) // itemsize] = _signed(image.view(view.dtype)).tolist()
    return (view.name, (high - base) // itemsize, runs), base


def _signed(values: np.ndarray) -> np.ndarray:
    """Values as the script writes them: floats as the bits of a signed integer (uint8 where there are 8)."""
    if values.dtype.kind == "f" or values.dtype == np.uint16:
        return values.view(f"i{values.dtype.itemsize}")
    return values.view(np.uint8) if values.dtype.kind == "b" else values


def _stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    """The runs of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def _meanings(step: Step, placed: Placed, observed: Observed, name: str, cells) -> dict:
    wrong = differing(placed, observed, name, cells)[:8].tolist()
    shape = placed.views[name].shape
    said = {(name, k): step.case.meaning(name, tuple(int(i) for i in np.unravel_index(k, shape))) for k in wrong}
    return {key: text for key, text in said.items() if text}


def _refusals(placed: Placed, observed: Observed, name: str, cells) -> list[tuple]:
    """Judged cells have no one right answer: the script knows the answer that was refused, and why."""
    bits = whole(placed, name, observed)
    meant = floats.decode(bits, placed.views[name].name)
    said = [(members, judge.complaint(meant[members])) for members, judge in cells.judges]
    return [(name, members.tolist(), _signed(bits[members]).tolist(), text) for members, text in said if text]


def _text(example: Example, worker, first: Found | None, steps: list[dict], watched: bool, shims: bool) -> str:
    contract = example.contract
    says = first.sentence if first else "a case that was right when this was written"
    head = [f"{contract.name}: {says}", f"Case: {example!r}",
            f"{MARK} Exit status 1 while the kernel is wrong, 0 when it is right."]
    comment = "".join(textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="#   ") + "\n" for line in head)
    literals = "SUBJECT = " + _literal(_subject(worker, contract)) + "\n\nSTEPS = " + _literal(steps) + "\n"
    unusual = "inf, nan = float('inf'), float('nan')\n\n" if re.search(r"\b(inf|nan)\b", literals) else ""
    call = f"main(SUBJECT, STEPS, {watched}{', SHIMS' if shims else ''})"
    body = BODY.read_text(encoding="utf-8")
    if worker.options.device == "cpu":
        assert ANY_DEVICE in body
        body = body.replace(ANY_DEVICE, INTERPRETED)
    tail = f'\n\nif __name__ == "__main__":\n    sys.exit({call})\n'
    return comment + "\n" + unusual + literals + "\n" + body + (_shims() if shims else "") + tail


def _literal(value) -> str:
    return pprint.pformat(value, width=120, compact=True, sort_dicts=False)


def _subject(worker, contract) -> dict:
    """Where the script finds the kernel."""
    spec, paths = worker.options.subject, [str(Path(p).resolve()) for p in worker.options.paths]
    path = (ROOT / "kernels" / BUILT_IN[spec] if spec in BUILT_IN else ROOT / spec).resolve()
    if path.suffix == ".py":
        return {"file": str(path), "function": contract.name, "paths": paths}
    if path.is_dir():
        return {"folder": str(path), "module": contract.family, "function": contract.name, "paths": paths}
    return {"module": spec, "function": contract.name, "paths": paths}


def _shims() -> str:
    """The closed gaps of Triton's interpreter that this case needs, from the worker's own source."""
    source = [BODY.with_name(name).read_text(encoding="utf-8") for name in ("interpreter.py", "shadow.py")]
    found = []
    for name in SHIMS:
        text = next(t for t in source if f"\ndef {name}(" in t)
        found.append(re.search(rf"^def {name}\(.*?(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE).group().rstrip())
    return "\n\nimport numpy as np  # noqa: E402\n\n\n" + "\n\n\n".join(found) + f"\n\n\nSHIMS = ({', '.join(SHIMS[1:])})\n"
