"""One example through everything: place it twice, run it on a worker, apply the five checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness import checks, layout as layouts
from harness.client import Fault
from harness.contract import Case, Contract, Kind, Role
from harness.findings import CheckOptions, Found
from harness.layout import Layout, Observed, Placed
from harness.states import Cells
from harness.tensors import Input, Output

HARM_ONLY = CheckOptions(checks=("inputs", "redzones", "memory"))


@dataclass(frozen=True)
class Example:
    """What is drawn, replayed and saved: the steps of one call or session, their layout, and the fill seed."""

    steps: tuple[Case, ...]
    layout: Layout = field(default_factory=Layout)
    seed: int = 0
    outside: str = ""  # the precondition that the example breaks on purpose

    @property
    def contract(self) -> Contract:
        return self.steps[0].contract

    @property
    def breaks_contract(self) -> bool:
        """Whether a precondition is broken: no result is right then, and the oracle may have none."""
        return self.outside in {p.name for p in self.contract.preconditions}

    def __repr__(self) -> str:
        steps = repr(self.steps[0]) if len(self.steps) == 1 else "[" + ", ".join(map(repr, self.steps)) + "]"
        return steps if repr(self.layout) == "default" else f"{steps}  # layout: {self.layout!r}"


def expect(contract: Contract, arguments: dict[str, Any], rules: Mapping[str, str]) -> dict[str, Cells] | Any:
    """What the oracle says about a call: `Cells` per output tensor, or a host function's result."""
    outputs: dict[str, Cells] = {}

    def cells(name: str, tensor: Output | Input) -> Cells:
        outputs[name] = Cells(tensor.shape, tensor.view() if isinstance(tensor, Input) else None)
        return outputs[name]

    given = {}
    for name, value in arguments.items():
        arg = next((a for a in contract.args if a.name == name), None)
        if arg is None or value is None:
            given[name] = value
        elif isinstance(value, list):
            given[name] = [None if t is None else cells(f"{name}[{b}]", t) for b, t in enumerate(value)]
        elif arg.role is Role.IN:
            given[name] = value.view()
        else:
            given[name] = cells(name, value)
    result = contract.oracle(**given, variant=dict(rules))
    return result if contract.kind is Kind.HOST else outputs


def wire_arguments(arguments: dict[str, Any]) -> dict[str, dict]:
    """The arguments as the worker assembles them."""
    wired = {}
    for name, value in arguments.items():
        if isinstance(value, (Input, Output)):
            wired[name] = {"tensor": name}
        elif isinstance(value, list) and any(isinstance(t, (Input, Output)) for t in value):
            wired[name] = {"tensors": [f"{name}[{b}]" if t is not None else None for b, t in enumerate(value)]}
        else:
            wired[name] = {"value": value}
    return wired


@dataclass(frozen=True)
class Step:
    """A step's case with what is computed from it once: its arguments, and what the oracle expects."""

    case: Case
    arguments: dict[str, Any]
    expected: Any


def plan(example: Example, rules: Mapping[str, str], states_matter: bool) -> list[Step]:
    """The example's steps, with the oracle's answers where `states_matter`."""
    steps = []
    for case in example.steps:
        arguments = layouts.held(case.contract, case.arguments(), example.layout)
        steps.append(Step(case, arguments, expect(case.contract, arguments, rules) if states_matter else None))
    return steps


def check(example: Example, worker, rules: Mapping[str, str], options: CheckOptions = CheckOptions(),
          thorough: bool = True) -> list[Found]:
    """Everything that is wrong with a subject on one example, most direct findings first; if not `thorough`, no more than
    what the first run shows that shows anything."""
    if example.contract.kind is Kind.HOST:
        return _check_host(example, worker, rules)
    steps = plan(example, rules, bool({"states", "interference"} & set(options.checks)))
    first, found = run_steps(example, steps, worker, options, run=0)
    if any(f.check in ("raised", "fault") for f in found) or (found and not thorough):
        return _unique(found)
    if "interference" in options.checks:
        second, later = run_steps(example, steps, worker, options, run=1)
        found += [f for f in later if f.check in ("raised", "fault", "memory")]
        if len(second) == len(first):
            known = {f.buffer for f in found if f.check == "states"}
            for step, a, b in zip(steps, first, second):
                found += [f for f in checks.interference(a, b, step.expected, step.case) if f.buffer not in known]
    return _unique(found)


def harm(example: Example, reason: str, worker, rules: Mapping[str, str]) -> list[Found]:
    """What a subject does outside its contract, where it may refuse (raise before it writes) or survive.

    Surviving a broken precondition means that no memory is harmed, since no result is right; surviving an example that
    only the subject declined means that the result is right.
    """
    options = HARM_ONLY if example.breaks_contract else CheckOptions()
    found = [f for f in check(example, worker, rules, options) if f.check != "raised" or f.wrote]
    return [replace(f, check="unchecked", buffer=reason) for f in found[:1]]


def replay(example: Example, worker, rules: Mapping[str, str]) -> list[Found]:
    """What is wrong on a saved example, inside the contract or outside it."""
    return harm(example, example.outside, worker, rules) if example.outside else check(example, worker, rules)


def _unique(found: list[Found]) -> list[Found]:
    seen: dict[tuple[str, str], Found] = {}
    for f in found:
        seen.setdefault(f.kind, f)
    return list(seen.values())


def run_steps(example: Example, steps: list[Step], worker, options: CheckOptions,
              run: int) -> tuple[list[tuple[Placed, Observed]], list[Found]]:
    """Run every step once; each step of a session starts from what the one before left in the outputs."""
    done: list[tuple[Placed, Observed]] = []
    found: list[Found] = []
    prior = None
    for k, planned in enumerate(steps):
        case, arguments = planned.case, planned.arguments
        placed = layouts.place(case.contract, arguments, example.layout, example.seed, run, prior)
        memory, blobs = placed.request()
        header = {
            "family": case.contract.family, "transform": case.contract.name, "order": example.layout.order * (run + 1),
            "mode": _mode(case.contract, worker, run),
            "rules": list(options.rules) if "memory" in options.checks else [],
            "steps": [{"memory": memory, "arguments": wire_arguments(arguments)}],
        }
        reply, data = worker.run(header, blobs)
        if isinstance(reply, Fault):
            return done, [Found("fault", reply.kind, f"{reply.detail} of {case.contract.name}", step=k)]
        step = reply["steps"][0]
        observed = layouts.observe(placed, layouts.changes(step["changes"], data))
        if step["raised"]:
            seen = checks.memory(placed, step["findings"]) if "memory" in options.checks else []  # may be what made it raise
            return done, [*(_at(f, k) for f in seen), _raised(step["raised"], k, checks.written(placed, observed))]
        found += [_at(f, k) for f in _inspect(placed, observed, step, planned, options)]
        done.append((placed, observed))
        prior = layouts.Prior(placed, observed, prior)
    return done, found


def _mode(contract: Contract, worker, run: int) -> str:
    """The second run of a GPU is a captured graph where both sides allow it, else a stream behind a late producer."""
    if run == 0 or worker.options.device == "cpu" or worker.options.under:
        return "plain"
    return "graph" if contract.capturable and worker.describe[contract.name]["capturable"] else "side stream"


def _inspect(placed, observed, reply: dict, step: Step, options: CheckOptions) -> list[Found]:
    found = []
    if "memory" in options.checks:
        found += checks.memory(placed, reply["findings"])
    if "states" in options.checks:
        found += checks.states(placed, observed, step.expected, step.case)
    if "inputs" in options.checks:
        found += checks.inputs(placed, observed, reply["written"], reply["moved"])
    if "redzones" in options.checks:
        found += checks.redzones(placed, observed)
    return found


def _at(found: Found, step: int) -> Found:
    return found if step == 0 else replace(found, sentence=f"step {step}: {found.sentence}", step=step)


def _raised(error: dict, step: int, wrote: str) -> Found:
    after = f" after it had written to {wrote}" if wrote else ""
    return Found("raised", error["type"], f"raised {error['type']}{after}: {error['message']}", step=step,
                 traceback=error["traceback"], wrote=wrote)


def _shown(got) -> str:
    """What a host function returned, as its author would write it."""
    if isinstance(got, dict) and set(got) == {"type", "text"}:
        return f"{got['text']} (a {got['type']})"
    return "a tensor" if isinstance(got, dict) and set(got) == {"tensor"} else repr(got)


def _check_host(example: Example, worker, rules) -> list[Found]:
    """A host function: its result equals the oracle's, and its arguments are as they were."""
    case = example.steps[0]
    arguments = case.arguments()
    empty = {"blocks": [], "windows": [], "tensors": {}, "access": []}
    header = {"family": case.contract.family, "transform": case.contract.name, "order": 0, "rules": [],
              "steps": [{"memory": empty, "arguments": wire_arguments(arguments)}]}
    reply, _ = worker.run(header, [])
    if isinstance(reply, Fault):
        return [Found("fault", reply.kind, f"{reply.detail} of {case.contract.name}")]
    step = reply["steps"][0]
    if step["raised"]:
        return [_raised(step["raised"], 0, "")]
    want, got = expect(case.contract, arguments, rules), step["returned"]
    found = []
    if got != want or type(got) is not type(want):
        found.append(Found("returned", "result", f"returned {_shown(got)}, and must return {want!r}"))
    for name, value in arguments.items():
        if step["host"][name] != value:
            found.append(Found("inputs", name, f"the argument {name} was changed from {value!r} to {step['host'][name]!r}"))
    return found


