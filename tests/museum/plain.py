"""The museum as an ordinary test sees it: contiguous tensors, outputs filled with zeros, `torch.equal` on what must be written.

    python tests/museum/plain.py equal            that test
    triton-sanitizer tests/museum/plain.py viz    the kernels under triton-viz's sanitizer, results not compared

The strategies are the gate's own, which is more than such tests have. A line of JSON per exhibit: whether it was seen, after
how many examples and seconds, and whether the same was said of its clean twin. `compare.py` runs both and makes the table.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT / "kernels"), str(ROOT)]
if sys.argv[1:2] == ["equal"]:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from harness import floats  # noqa: E402
from harness.contract import Kind, tensors_of  # noqa: E402
from harness.differential import expect  # noqa: E402
from harness.states import State  # noqa: E402
from harness.tensors import Input, Region  # noqa: E402
from tests.museum import run  # noqa: E402
from tests.museum.catalogue import EXHIBITS  # noqa: E402

LARGEST = 1 << 24  # cells of a tensor; an ordinary test allocates what it passes
LIMIT = 20.0
TWIN = 20  # examples on which the clean twin must pass
OWN_FAULT = 70


class Seen(BaseException):
    """The test failed."""


def plain_call(case, function, rules) -> bool:
    """One call on contiguous tensors and zeroed outputs; whether something that must be written is not as it must be."""
    contract, arguments = case.contract, case.arguments()
    flat = tensors_of(arguments)
    if any(np.prod(t.shape, dtype=float) > LARGEST for t in flat.values()):
        return False
    made = {name: _tensor(contract.arg(name).dtypes[0], tensor) for name, tensor in flat.items()}
    given = {name: [made.get(f"{name}[{b}]") for b in range(len(value))] if _listed(value) else made.get(name, value)
             for name, value in arguments.items()}
    returned = function(**given)
    want = expect(contract, arguments, rules)
    if contract.kind is Kind.HOST:
        return returned != want
    return any(_wrong(made[name], cells, contract.arg(name).dtypes[0]) for name, cells in want.items())


def _listed(value) -> bool:
    return isinstance(value, list) and any(hasattr(v, "shape") or v is None for v in value)


def _tensor(dtype: str, tensor) -> torch.Tensor:
    values = np.zeros(int(np.prod(tensor.shape)), dtype=np.float64 if floats.is_float(dtype) else np.int64)
    for span in tensor.spans if isinstance(tensor, Input) else ():
        if span.region is Region.LIVE:
            values[span.start : span.stop] = span.values
    return torch.from_numpy(values).to(getattr(torch, dtype)).reshape(tensor.shape)


def _wrong(tensor: torch.Tensor, cells, dtype: str) -> bool:
    """`torch.equal` on the live cells, and the judges, which stand for `allclose` and comparing sets."""
    now = tensor.reshape(-1).to(torch.float64 if floats.is_float(dtype) else torch.int64)
    written = torch.from_numpy(np.flatnonzero(cells.state.reshape(-1) == State.WRITTEN))
    value = torch.from_numpy(np.asarray(floats.rounded(cells.value.reshape(-1), dtype)))[written].to(now.dtype)
    same = torch.equal(torch.nan_to_num(now[written]), torch.nan_to_num(value))
    return not same or any(judge.complaint(now.numpy()[index]) for index, judge in cells.judges)


def hunt(exhibit, function: str, counted: int, compares: bool) -> dict:
    """The first example on which the function is seen to be wrong."""
    import subject

    function, rules, tried = subject.EXHIBITS[function], run.rules(exhibit), 0
    started = time.monotonic()

    def visit(example) -> None:
        nonlocal tried
        tried += 1
        try:
            wrong = [plain_call(case, function, rules) for case in example.steps]
        except Exception as error:  # the test fails, whatever was raised: that is what is counted
            raise Seen(type(error).__name__) from None
        except SystemExit:  # how triton-viz ends a process
            raise Seen("sanitizer") from None
        if compares and any(wrong):
            raise Seen("values")

    try:
        run.search(exhibit, run.budget(exhibit, counted), 0, visit)
    except Seen as seen:
        return {"seen": True, "how": str(seen), "examples": tried, "seconds": time.monotonic() - started}
    except run.Over:
        pass
    return {"seen": False, "examples": tried, "seconds": time.monotonic() - started}


def isolated(exhibit, *what) -> dict:
    """`hunt` in a child: a crash or a hang is something a test shows, too."""
    started, (reader, writer) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        _child(writer, exhibit, *what)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], LIMIT)
    data = os.read(reader, 4096) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == OWN_FAULT:
        raise RuntimeError(f"{exhibit.id}: {data.decode()}")
    ended = {"seen": True, "how": "crash" if ready else "hang", "examples": 0, "seconds": time.monotonic() - started}
    return json.loads(data) if data else ended


def _child(writer: int, exhibit, *what) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        os.write(writer, json.dumps(hunt(exhibit, *what)).encode())
        os._exit(0)
    except BaseException:  # not the exhibit's: `hunt` keeps those
        os.write(writer, traceback.format_exc()[-3000:].encode())
        os._exit(OWN_FAULT)


def main(tool: str, *ids: str) -> None:
    for name in ids or EXHIBITS:
        exhibit, compares = EXHIBITS[name], tool == "equal"
        result = isolated(exhibit, name, run.BUDGET, compares)
        if result["seen"]:
            result["false_alarm"] = isolated(exhibit, f"{name}_clean", TWIN, compares)["seen"]
        print(json.dumps({"id": name, "tool": tool, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
