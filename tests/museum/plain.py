"""The museum as tests and tools outside this suite see it: contiguous tensors, outputs filled with zeros.

    python tests/museum/plain.py equal            `torch.equal` on what must be written
    triton-sanitizer tests/museum/plain.py viz    kernels under triton-viz's sanitizer, results not compared
    compute-sanitizer --tool memcheck --log-file FOLDER/log-%p python tests/museum/plain.py memcheck B011 200 FOLDER
                                                  one function on a GPU, up to 200 examples, results not compared

    python tests/museum/plain.py kernels          no test: which exhibits launch Triton kernels

The strategies are the gate's own, which is more than such tests have. The first two print a line of JSON per exhibit: whether
it was seen, after how many examples and seconds, and whether the same was said of its clean twin. `compare.py` runs them all.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from types import CodeType, FunctionType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ON_A_GPU = ("memcheck", "initcheck")
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT / "kernels"), str(ROOT)]
    if sys.argv[1:2] == ["equal"]:
        os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

from harness import floats  # noqa: E402
from harness.contract import Kind, tensors_of  # noqa: E402
from harness.differential import expect  # noqa: E402
from harness.sanitized import told  # noqa: E402
from harness.states import State  # noqa: E402
from harness.tensors import Input, Region  # noqa: E402
from tests.museum import run  # noqa: E402
from tests.museum.catalogue import EXHIBITS  # noqa: E402

ON = f"torch {torch.__version__}, Triton {triton.__version__}, Hypothesis {hypothesis.__version__}"
LARGEST = {"cpu": 1 << 24, "cuda": 6 << 30}  # cells, bytes: what such a test allocates for one tensor
PATIENCE = {"cpu": 20.0, "cuda": 60.0}  # seconds without news: a hang
START = 120.0  # and before the first example
LIMIT = 60.0  # seconds for one function
LATE = "out of time"
TWIN = 20  # examples on which the clean twin must pass, at least


class Seen(BaseException):
    """The test failed, or the tool complained."""


# -- one call -------------------------------------------------------------------------------------------------------------


def plain_call(case, function, rules, tool: str) -> bool:
    """One call on contiguous tensors; whether something that must be written is not as it must be. Tools compare nothing."""
    contract, arguments = case.contract, case.arguments()
    flat = tensors_of(arguments)
    if any(_too_large(t, contract.arg(name).dtypes[0], tool) for name, t in flat.items()):
        return False
    made = {name: _tensor(contract.arg(name).dtypes[0], tensor, tool) for name, tensor in flat.items()}
    given = {name: [made.get(f"{name}[{b}]") for b in range(len(value))] if _listed(value) else made.get(name, value)
             for name, value in arguments.items()}
    returned = function(**given)
    if tool != "equal":
        return False
    want = expect(contract, arguments, rules)
    if contract.kind is Kind.HOST:
        return returned != want
    return any(_wrong(made[name], cells, contract.arg(name).dtypes[0]) for name, cells in want.items())


def _listed(value) -> bool:
    return isinstance(value, list) and any(hasattr(v, "shape") or v is None for v in value)


def _too_large(tensor, dtype: str, tool: str) -> bool:
    size = np.prod(tensor.shape, dtype=float)
    return size * getattr(torch, dtype).itemsize > LARGEST["cuda"] if tool in ON_A_GPU else size > LARGEST["cpu"]


def _tensor(dtype: str, tensor, tool: str) -> torch.Tensor:
    """The live cells as they are, all others zero; for initcheck, what must not be read was never written."""
    make = torch.empty if tool == "initcheck" else torch.zeros
    made = make(tensor.shape, dtype=getattr(torch, dtype))
    for span in tensor.spans if isinstance(tensor, Input) else ():
        cells = made.view(-1)[span.start : span.stop]
        if span.region is Region.LIVE:
            cells.copy_(torch.from_numpy(np.ascontiguousarray(span.values)).to(made.dtype))
        elif span.region is Region.SLACK:
            cells.zero_()
    return made


def _wrong(tensor: torch.Tensor, cells, dtype: str) -> bool:
    """`torch.equal` on the live cells, and the judges, which stand for `allclose` and comparing sets."""
    now = tensor.reshape(-1).to(torch.float64 if floats.is_float(dtype) else torch.int64)
    written = torch.from_numpy(np.flatnonzero(cells.state.reshape(-1) == State.WRITTEN))
    value = torch.from_numpy(np.asarray(floats.rounded(cells.value.reshape(-1), dtype)))[written].to(now.dtype)
    same = torch.equal(torch.nan_to_num(now[written]), torch.nan_to_num(value))
    return not same or any(judge.complaint(now.numpy()[index]) for index, judge in cells.judges)


# -- one exhibit ----------------------------------------------------------------------------------------------------------


def hunt(exhibit, function: str, counted: int, tool: str, news=lambda: [], tick=lambda: None) -> dict:
    """The first example on which the function is seen to be wrong. `news`: what a tool has written since the start."""
    import subject

    function, rules, tried, compiling = subject.EXHIBITS[function], run.rules(exhibit), 0, Compiling(tool)
    homes = {sys.modules[f.func.__module__] for f in subject.EXHIBITS.values()} | {sys.modules["exhibit"]}
    memories = [v for home in homes for v in vars(home).values() if type(v) is dict and not v]
    started, late = time.monotonic(), ""

    def visit(example) -> None:
        nonlocal tried, late
        if time.monotonic() - started - compiling.seconds > LIMIT:
            late = LATE
            raise run.Over
        tried += 1
        tick()
        if exhibit.lane != "inside":  # a session starts in a process that has seen none
            for memory in memories:
                memory.clear()
        try:
            wrong = [plain_call(case, function, rules, tool) for case in example.steps]
            if tool in ON_A_GPU:
                torch.cuda.synchronize()
        except Exception as error:  # the test fails, whatever was raised: that is what is counted
            raise Seen("sanitizer" if news() else type(error).__name__) from None
        except SystemExit:  # how triton-viz ends a process
            raise Seen("sanitizer") from None
        if news() or any(wrong):
            raise Seen("values" if any(wrong) else "sanitizer")

    result = {}
    try:
        run.search(exhibit, run.budget(exhibit, counted), 0, visit)
    except Seen as seen:
        result = {"seen": True, "how": str(seen)}
    except run.Over:
        pass
    return {"seen": False, "how": late, **result, "examples": tried, "seconds": time.monotonic() - started - compiling.seconds}


class Compiling:
    """Seconds that Triton takes to compile kernels for a GPU: no part of a test's time."""

    def __init__(self, tool: str):
        self.seconds = self._since = 0.0
        if tool in ON_A_GPU:
            triton.knobs.runtime.jit_cache_hook = self._starts
            triton.knobs.runtime.kernel_load_start_hook.add(self._ends)

    def _starts(self, **_) -> None:
        self._since = time.monotonic()

    def _ends(self, *_) -> None:
        self.seconds += time.monotonic() - self._since


def launches(name: str) -> bool:
    """Whether an exhibit's body, or a helper that it calls, names a Triton kernel."""
    import subject

    return _names_a_kernel(subject.EXHIBITS[name].func, ())


def _names_a_kernel(function: FunctionType, above: tuple) -> bool:
    values = [function.__globals__.get(name) for name in _names(function.__code__)]
    return any(isinstance(v, KernelInterface) for v in values) or any(
        isinstance(v, FunctionType) and v not in above and _names_a_kernel(v, (*above, function)) for v in values)


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


# -- processes: a crash or a hang is something a test shows, too ----------------------------------------------------------


def report(out: int, name: str, counted: int, tool: str, news=lambda: []) -> None:
    """A newline, a dot per example and the result, into a file descriptor."""
    try:
        os.write(out, b"\n")
        result = hunt(EXHIBITS[name.removesuffix("_clean")], name, counted, tool, news, lambda: os.write(out, b"."))
    except BaseException:  # not the exhibit's: `hunt` keeps those
        result = {"fault": traceback.format_exc()[-3000:]}
    os.write(out, json.dumps(result).encode())


def watch(reader: int, patience: float) -> dict:
    """What a process reports, or how it ended instead.

    Raises:
        RuntimeError: it failed by an error of its own.
    """
    data, started = b"", time.monotonic()
    while select.select([reader], [], [], patience if data else START)[0]:
        chunk = os.read(reader, 1 << 16)
        started = started if data else time.monotonic()
        data += chunk
        if not chunk:
            break
    else:
        chunk = None
    result = data[data.find(b"{") :] if b"{" in data else b""
    if b'{"fault"' in result or not data:
        raise RuntimeError(json.loads(result)["fault"] if result else "the process ended, or hung, before its first example")
    tried = data.count(b".", 0, len(data) - len(result))
    ended = {"seen": True, "how": "hang" if chunk is None else "crash", "examples": tried,
             "seconds": time.monotonic() - started}
    return json.loads(result) if result else ended


def isolated(name: str, counted: int, tool: str) -> dict:
    """`hunt` in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _quiet(1, 2)
        report(writer, name, counted, tool)
        os._exit(0)
    os.close(writer)
    try:
        return watch(reader, PATIENCE["cpu"])
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _quiet(*streams: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)


def with_twin(name: str, hunted) -> dict:
    """`hunted(function, examples)` of an exhibit; if it is seen, what of its clean twin is, in as many examples."""
    result = hunted(name, run.BUDGET)
    if result["seen"]:
        twin = hunted(f"{name}_clean", max(TWIN, result["examples"]))
        result["twin"] = twin["how"] if twin["seen"] else ""
    return result


def main(tool: str, *given: str) -> None:
    if tool in ON_A_GPU:
        return on_a_gpu(tool, *given)
    if tool == "kernels":
        return print(*filter(launches, EXHIBITS))
    print(json.dumps({"on": ON}), flush=True)
    hunt(EXHIBITS["B045"], "B045_clean", 1, tool)  # forks inherit what is loaded once; no tensor here, so no thread
    for name in given or EXHIBITS:
        print(json.dumps({"id": name, **with_twin(name, lambda *what: isolated(*what, tool))}), flush=True)


def on_a_gpu(tool: str, name: str, counted: str, folder: str) -> None:
    """In this process: a fork has no use of its parent's GPU."""
    out = os.dup(1)
    _quiet(1)
    torch.set_default_device("cuda")
    torch.zeros(1).add_(1).tolist()
    report(out, name, int(counted), tool, lambda: told(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
