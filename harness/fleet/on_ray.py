"""Tasks on Ray: one actor per core or share of a GPU, replaced when it dies, on this machine or on a cluster."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from harness import devices
from harness.client import ROOT, UsageError, shown_path
from harness.fleet.engine import Answer, Order, answered
from harness.fleet.plan import Plan, Task
from harness.fleet.shard import Runner, inflight, work

NEEDS_RAY = f"Ray is not here: {shown_path(sys.executable)} -m pip install 'ray>=2.40' (the extra 'fleet'), or --engine xdist"
TICK = 0.5  # seconds
STAYS_HERE = ["/.git", "/.venv", "/.hypothesis", "/failures", "/report"]  # what the nodes of a cluster need not have


def load():
    """Ray, which tells nobody that it is used.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(NEEDS_RAY) from None
    return ray


def join(address: str, processes: int) -> None:
    """Start a local Ray, or join a running one (`auto`, or host:port); one that this process has already stays.

    Raises:
        UsageError: Ray is not installed, or none answers.
    """
    ray = load()
    if ray.is_initialized():
        return
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if not address:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init("local", num_cpus=processes or os.cpu_count(), num_gpus=len(devices.gpus()), include_dashboard=False,
                 runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
        return
    try:
        ray.init(address, runtime_env={"working_dir": str(ROOT), "excludes": STAYS_HERE}, **quiet)
    except ConnectionError as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"--ray {address}: no Ray answers ({why}); start one: ray start --head") from None


def device(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where Ray has GPUs.

    Raises:
        UsageError: CUDA is wanted, and Ray has no GPU.
    """
    has = bool(load().cluster_resources().get("GPU"))
    if wanted == "cuda" and not has:
        raise UsageError("--device cuda: this Ray has no GPU")
    return ("cuda" if has else "cpu") if wanted == "auto" else wanted


class OnRay:
    """A pool of actors that grows and shrinks with the cluster."""

    def __init__(self, plan: Plan, campaign: str, folder: Path, processes: int = 0):
        self._ray, self._plan, self._folder, self._most = load(), plan, folder, processes
        takes = {"num_gpus": plan.gpus, "num_cpus": 0} if plan.gpus else {"num_cpus": 1}
        self._actor = self._ray.remote(max_restarts=0, **takes)(Runner)
        self._arguments = (plan.dump(), campaign, str(folder))
        self._idle: list = []
        self._flying: dict = {}  # reference -> (actor, task)

    def run(self, next_order: Callable[[], Order | None]) -> Iterator[Answer | None]:
        while True:
            more = self._hand_out(next_order)
            if not self._flying:
                if more:  # no core or GPU is there at the moment
                    time.sleep(TICK)
                    yield None
                    continue
                return
            ready, _ = self._ray.wait(list(self._flying), timeout=TICK)
            if not ready:
                yield None
            for reference in ready:
                yield self._answer(reference)

    def _hand_out(self, next_order) -> bool:
        """Give tasks to actors while there are both. Returns whether tasks may be left."""
        room = self._slots() - len(self._flying)
        while room > 0:
            order = next_order()
            if order is None:
                return False
            actor = self._idle.pop() if self._idle else self._actor.remote(*self._arguments)
            self._flying[actor.run.remote(asdict(order.task), order.seconds)] = (actor, order.task)
            room -= 1
        return True

    def _slots(self) -> int:
        has = self._ray.cluster_resources()
        slots = int(has.get("GPU", 0) / self._plan.gpus + 1e-9) if self._plan.gpus else int(has.get("CPU", 0))
        return min(slots, self._most) if self._most else slots

    def _answer(self, reference) -> Answer:
        actor, task = self._flying.pop(reference)
        try:
            reply = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            return self._died(task, f"its process died ({_cause(error)})")
        except self._ray.exceptions.RayTaskError as error:
            return self._died(task, str(error))
        self._idle.append(actor)
        return answered(task, reply)

    def _died(self, task: Task, why: str) -> Answer:
        return Answer(task, None, why, inflight(work(self._folder, task)))

    def hurry(self) -> None:
        """What is in flight takes seconds: it may finish."""

    def close(self) -> None:
        """End the actors; what is in flight is lost."""
        for actor in [*self._idle, *(actor for actor, _ in self._flying.values())]:
            self._ray.kill(actor)


def _cause(error) -> str:
    """Why an actor died, in one line: how its process ended, or the error that kept it from starting."""
    ended = re.search(r"Worker exit detail: ([^.]*\.[^.]*)\.", str(error))
    return ended[1] if ended else str(error).strip().splitlines()[-1].strip()
