"""The rows of the table: a transform at a size, measured as one subject offers it."""

import importlib
import time
from functools import partial

import numpy as np
import torch

from bench import measure, sizes
from harness import casefile, registry
from harness.contract import Case, Contract, Role, tensors_of
from harness.differential import Example
from harness.tensors import Input, Output, Region
from harness.worker.subject import Subject

LARGE = 1 << 30  # bytes of outputs above which written cells are not counted


class Bench:
    """One subject on one device; `each` seconds a measurement."""

    def __init__(self, subject: Subject, spec: str, device: str, each: float):
        self.subject, self.spec, self.device, self.each = subject, spec, device, each
        self.wait = torch.cuda.synchronize if device != "cpu" else lambda: None
        self.own = spec == "kernels"

    def floors(self) -> list[dict]:
        """What no kernel goes below: an empty launch, and the bandwidth of a large copy."""
        if self.device == "cpu":
            return []
        import triton

        copy = {"floor": "a copy of 1 GiB", "bytes_per_us": round(measure.copy_bandwidth())}
        empty = triton.jit(_nothing)
        launch = lambda: empty[(1,)]()
        try:
            launch()
            return [copy, {"floor": "an empty launch", **self.times(launch, self.plans.Plan(launch))}]
        except Exception as error:  # the table stands without it
            return [copy, {"floor": "an empty launch", "failed": f"{type(error).__name__}: {error}"}]

    @property
    def plans(self):
        return importlib.import_module("plumbline_kernels._plan")

    def row(self, name: str, batch: int, context: int) -> dict:
        """Everything about one transform at one size, or why there is nothing."""
        contract, size = registry.contracts()[name], sizes.Size(batch, context)
        function = self.subject.function(contract.family, name)
        if function is None:
            return {"not_provided": self.subject.describe(contract.family, name, contract.names)["missing"] or "not provided"}
        case = sizes.case(name, size)
        if case is None:
            return {"left_out": f"inputs of more than {sizes.MOST_CELLS:,} cells"}
        reason = self.supports(case)
        if reason:
            return {"unsupported": reason}
        return self.case(case)

    def case(self, case: Case) -> dict:
        """The times of one case that the subject supports; of our own kernels also the bytes that it needs moved."""
        start, contract = time.monotonic(), case.contract
        function = self.subject.function(contract.family, contract.name)
        arguments = materialise(case, self.device)
        result = {}
        call = partial(function, **arguments)
        if self.own:
            result |= moved(case, arguments, call)
        else:
            call()
        self.wait()
        result["prepare_s"] = round(time.monotonic() - start, 2)
        plan = None
        if self.own:
            try:
                plan = self.plan(contract, function, arguments)
            except self.plans.Unplannable as error:
                result["no_plan"] = str(error)
        return {**result, **self.times(call, plan)}

    def supports(self, case: Case) -> str:
        (seen,) = casefile.encode_calls(Example((case,)))
        dtypes = {n: {"kind": "contiguous", "dtype": dtype_of(case.contract, n), "guard": "right"}
                  for n in tensors_of(case.arguments())}
        return self.subject.supports(case.contract.family, {**seen, "layout": {"places": dtypes, "aliases": []}})

    def plan(self, contract: Contract, function, arguments: dict):
        """A plan that takes every one-dimensional input anew: lengths, slots, offsets. Tables and weights stay."""
        new = tuple(a.name for a in contract.args if a.role is Role.IN and not a.per_backend
                    and isinstance(arguments[a.name], torch.Tensor) and arguments[a.name].dim() == 1)
        return partial(self.plans.Plan(function, new=new, **arguments), *(arguments[n].clone() for n in new))

    def times(self, call, plan=None) -> dict:
        """Host and GPU microseconds of a call, of its plan, and of the replay of its graph."""
        times = {"host": measure.host(call, self.wait, self.each).json()}
        if plan is not None:
            plan()
            times["plan_host"] = measure.host(plan, self.wait, self.each).json()
        if self.device == "cpu":
            return times
        try:
            return times | self.gpu_times(call, plan)
        except RuntimeError as error:  # the host's times stand; a context that is lost shows at the next row
            return {**times, "gpu_failed": str(error).strip().split("\n")[0][:160]}

    def gpu_times(self, call, plan) -> dict:
        gpu, how = measure.gpu(call, self.each)
        times = {"gpu": gpu.json(), "gpu_how": how}
        if how.startswith("graph"):
            times["replay_host"] = measure.host(measure.captured(call, 1).replay, self.wait, self.each / 2).json()
            if plan is not None:
                times["plan_gpu"] = measure.gpu(plan, self.each)[0].json()
        return times


def dtype_of(contract: Contract, name: str) -> str:
    """The dtype that engines pass: slots and lengths of requests in 64 bits where the contract takes those."""
    arg = contract.arg(name)
    wide = arg.name in ("req_pool_indices", "seq_lens") and contract.family == "metadata"
    return "int64" if wide else arg.dtypes[0]


def materialise(case: Case, device: str) -> dict:
    """The case's arguments as contiguous tensors. Cells that are not live, and outputs, are 0."""

    def tensor(name: str, spec):
        if not isinstance(spec, (Input, Output)):
            return spec
        dtype = getattr(torch, dtype_of(case.contract, name))
        made = torch.zeros(spec.shape, dtype=dtype, device=device)
        flat = made.reshape(-1)
        for span in spec.spans if isinstance(spec, Input) else ():
            if span.region is Region.LIVE and span.stop > span.start:
                flat[span.start : span.stop] = torch.from_numpy(np.ascontiguousarray(span.values)).to(dtype).to(device)
        return made

    return {n: [tensor(n, v) for v in value] if isinstance(value, list) and any(isinstance(v, (Input, Output)) for v in value)
            else tensor(n, value) for n, value in case.arguments().items()}


def moved(case: Case, arguments: dict, call) -> dict:
    """The bytes that the contract needs: live cells of inputs read once, and every cell that the call writes. Cells count
    as written that are equal after two calls on outputs that were not."""
    specs, tensors = tensors_of(case.arguments()), _flat(arguments)
    live = {n: sum(s.stop - s.start for s in spec.spans if s.region is Region.LIVE)
            for n, spec in specs.items() if isinstance(spec, Input)}
    read = sum(count * tensors[n].element_size() for n, count in live.items())
    outputs = {n: tensors[n] for n, spec in specs.items() if isinstance(spec, Output)}
    if sum(t.numel() * t.element_size() for t in outputs.values()) > LARGE:
        call()
        return {"read_bytes": read, "written_bytes": None}
    after = []
    for byte in (0x11, 0x22):
        for t in outputs.values():
            t.view(torch.uint8).fill_(byte) if t.numel() else None
        call()
        after.append({n: t.clone() for n, t in outputs.items()} if byte == 0x11 else outputs)
    written = 0
    for n, t in outputs.items():
        same = _bits(after[0][n]) == _bits(t)
        written += int(same.sum()) * t.element_size()
    return {"read_bytes": read, "written_bytes": written}


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _flat(arguments: dict) -> dict:
    flat = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            flat.update({f"{name}[{b}]": t for b, t in enumerate(value)})
        else:
            flat[name] = value
    return flat


def _nothing():
    """The empty kernel."""
