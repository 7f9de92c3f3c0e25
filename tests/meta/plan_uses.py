"""Uses and misuses of plans in Triton's interpreter, in a process of its own: one JSON object, from the name of a use to what
came of it (an error, or whether the plan and the plain call agree)."""

import importlib
import json
import os
import sys
import threading
import types
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.modules["planned"] = types.ModuleType("planned")
sys.modules["planned"].__path__ = [str(ROOT / "kernels")]

import torch  # noqa: E402

from bench import rows, sizes  # noqa: E402
from harness import registry  # noqa: E402
from harness.contract import Role  # noqa: E402
from harness.worker import interpreter  # noqa: E402

KernelInterface = importlib.import_module("triton.runtime.jit").KernelInterface
for shim in (interpreter.loop_bounds_from_memory, interpreter.scalar_and_vector_masks):
    shim(importlib.import_module("triton.runtime.interpreter"))
Plan = importlib.import_module("planned._plan").Plan
remembering = importlib.import_module("planned._launch")._remembering
UNSET = 77


def function(name: str):
    return getattr(importlib.import_module(f"planned.{registry.contracts()[name].family}"), name)


def arguments(name: str = "cu_seqlens", size=sizes.Size(3, 70)) -> dict:
    return rows.materialise(sizes.case(name, size), "cpu")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def agrees(name: str) -> bool:
    """Whether a plan that was bound to other inputs writes what the plain call writes, byte for byte."""
    contract = registry.contracts()[name]
    wanted, got = arguments(name), arguments(name)
    function(name)(**wanted)
    new = tuple(a.name for a in contract.args if a.role is Role.IN and isinstance(got[a.name], torch.Tensor))
    plan = Plan(function(name), new=new, **{**got, **{n: torch.zeros_like(got[n]) for n in new}})
    plan(*(got[n] for n in new))
    return all(torch.equal(rows._bits(a), rows._bits(b)) for a, b in zip(tensors(wanted), tensors(got)))


def tensors(given: dict) -> list[torch.Tensor]:
    return [t for value in given.values() for t in (value if isinstance(value, list) else [value])
            if isinstance(t, torch.Tensor)]


def misuses() -> dict:
    """Name -> a function that should raise."""
    seqlens, sums = ints(1, 2, 3, 4), torch.full((9,), UNSET, dtype=torch.int32)
    bind = partial(Plan, function("cu_seqlens"), cu_seqlens=sums, seqlens=seqlens)
    once = bind(new=("seqlens",))
    pair = torch.zeros(16, dtype=torch.int32)

    def moved(change):
        given = {"seqlens": ints(1, 2, 3), "cu_seqlens": torch.zeros(4, dtype=torch.int32)}
        plan = Plan(function("cu_seqlens"), **given)
        change(given["cu_seqlens"])
        plan()

    return {
        "binding writes nothing": lambda: sums.tolist(),
        "resized": lambda: moved(lambda t: t.resize_(10_000_000)),
        "set to other memory": lambda: moved(lambda t: t.set_(torch.zeros(4, dtype=torch.int32))),
        "another dtype": lambda: once(seqlens.long()),
        "another shape": lambda: once(seqlens[:3]),
        "another stride": lambda: once(pair[:8:2]),
        "another alignment": lambda: once(pair[1:5]),
        "no tensor": lambda: once([1, 2, 3, 4]),
        "too few": lambda: once(),
        "an output as input": lambda: once(sums[4:8]),
        "an output as new": lambda: bind(new=("cu_seqlens",)),
        "one tensor for two new ones": lambda: twice(new=("extend_seq_lens", "seq_lens")),
        "a new one that a bound one is": lambda: twice(new=("seq_lens",)),
        "memory as new": lambda: Plan(function("update_rope_guarded"), new=("memory",), **overlapping(tokens=2)),
        "lengths of another type at one address": lambda: alias(torch.arange(1, 4), torch.int32, 1),
        "lengths of another pitch at one address": lambda: alias(torch.arange(1, 7, dtype=torch.int32), torch.int32, 2),
        "lengths far apart": lambda: far("seqlens"),
        "more tokens than a grid has": lambda: function("pad_sequence_with_mask")(
            input_emb=None, offsets=None, lengths=None, output=None, attn_mask=None, bs=1, max_len=600_000),
        "an unknown name": lambda: bind(new=("lengths",)),
        "what the call refuses": lambda: Plan(function("cu_seqlens"), seqlens=seqlens, cu_seqlens=sums[:4]),
        "a copy in the call": lambda: Plan(function("update_rope_guarded"), **overlapping()),
        "after the misuses": lambda: (once(seqlens), sums.tolist())[1],
    }


def remembered() -> dict:
    """What a call that remembers its checks makes of calls that look alike, and of those that do not."""
    runs: list[int] = []

    def counted(**given):
        runs.append(1)
        function("cu_seqlens")(**given)

    def checked(call, **given) -> list:
        """How often the transform has run so far, and what came."""
        told = outcome(lambda: call(**given))
        return [len(runs), told or given["cu_seqlens"].tolist()]

    call, lengths, sums = remembering(counted), ints(1, 2), torch.zeros(3, dtype=torch.int32)
    results = {"first": checked(call, seqlens=lengths, cu_seqlens=sums)}
    lengths += 3
    results["other contents"] = checked(call, seqlens=lengths, cu_seqlens=sums)
    results["another place"] = checked(call, seqlens=ints(7, 7), cu_seqlens=sums)
    results["a shorter output"] = checked(call, seqlens=lengths, cu_seqlens=sums[:2])
    results["refused again"] = checked(call, seqlens=lengths, cu_seqlens=sums[:2])
    numbers = remembering(function("nsa_cache_seqlens"))
    given = arguments("nsa_cache_seqlens") | {"padded_rows": 1}
    numbers(**given)
    results["True for 1"] = outcome(lambda: numbers(**given | {"padded_rows": True}))
    memory = torch.arange(64 * 8 * 64 + 1, dtype=torch.float32)
    copying = remembering(function("update_rope_guarded"))
    for _ in range(2):  # a call that copies is made plainly, every time
        copying(**{**overlapping(), "memory": memory})
    results["a copy in the call"] = memory[:3].tolist()
    return results


def twice(new: tuple[str, ...]):
    """One tensor for both lengths, as of an extend without a prefix."""
    given = arguments("indexer_k_start_end")
    return Plan(function("indexer_k_start_end"), new=new, **given | {"seq_lens": given["extend_seq_lens"]})


def alias(lengths: torch.Tensor, dtype: torch.dtype, step: int):
    """Decode metadata whose cache_seqlens begin where seq_lens do, and are other cells."""
    given = arguments("decode_metadata")
    views = [lengths.view(dtype)[:3], *given["cache_seqlens"][1:]]
    function("decode_metadata")(**given | {"seq_lens": lengths[::step], "cache_seqlens": views})


def far(name: str):
    """Three lengths, the last of which lies past element 2^31 from the first."""
    spread = torch.empty_strided((3,), (2**30 + 7,), dtype=torch.int32, device="meta")
    importlib.import_module("planned._checks").tensor(name, spread, (torch.int32,), (3,), torch.device("meta"))


def threads() -> dict:
    """One thread binds a plan while another one does, and goes on when that one is done."""
    stock, plans = KernelInterface.__getitem__, {}
    inside, go_on = ({name: threading.Event() for name in "ab"} for _ in range(2))

    def bind(name: str) -> None:
        def slow(**given):
            inside[name].set()
            go_on[name].wait(5)
            function("cu_seqlens")(**given)

        plans[name] = Plan(slow, seqlens=ints(3, 0, 4), cu_seqlens=torch.zeros(4, dtype=torch.int32))

    first, second = (threading.Thread(target=bind, args=name) for name in "ab")
    first.start()
    inside["a"].wait(5)
    second.start()
    inside["b"].wait(0.5)
    for name, thread in zip("ab", (first, second)):
        go_on[name].set()
        thread.join()
    return {"as it was": KernelInterface.__getitem__ is stock, "launches": [plans[n].launches for n in "ab"],
            "written": [list(plans[n].written) for n in "ab"]}


def overlapping(tokens: int = 64) -> dict:
    """A write-back between overlapping views; of 64 tokens, which are too large for one program."""
    shape = (tokens, 8, 64)
    return dict(memory=torch.zeros(64 * 8 * 64 + 1), shape=shape, dst_offset=0, dst_strides=(512, 64, 1), src_offset=1,
                src_strides=(512, 64, 1))


def outcome(use) -> object:
    try:
        return use()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps({"agrees": {n: agrees(n) for n in sizes.SIZES}, "remembered": remembered(),
                      "threads": threads(), "uses": {n: outcome(u) for n, u in misuses().items()}}))
