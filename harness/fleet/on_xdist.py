"""The same tasks under pytest-xdist: every task is a test, handed out in waves, without Ray.

Answers come as files in `inbox`, written whole, so that a test process that dies takes nothing with it but its task. A task
that no file answers when its wave is over is one whose process died.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from harness import devices
from harness.client import ROOT
from harness.fleet.engine import Answer, Order, answered
from harness.fleet.plan import Plan, Task
from harness.fleet.shard import inflight, work

FOLDER = "PLUMBLINE_CAMPAIGN"  # the environment variable that tells the tests where `wave.json` and `until.json` are
TICK = 0.2  # seconds
TASKS_PER_PROCESS = 16  # in a wave, which costs the start of pytest and of the workers


class OnXdist:
    """pytest processes, as many as `-n` says; a wave of tasks at a time."""

    def __init__(self, plan: Plan, campaign: str, folder: Path, processes: int = 0):
        self._plan, self._campaign, self._folder = plan, campaign, folder
        self._processes = processes or devices.worker_count(plan.device) or os.cpu_count() or 1
        self._pytest: subprocess.Popen | None = None

    def run(self, next_order: Callable[[], Order | None]) -> Iterator[Answer | None]:
        while wave := self._wave(next_order):
            yield from self._fly(wave)

    def _wave(self, next_order) -> list[Order]:
        wave: list[Order] = []
        while len(wave) < TASKS_PER_PROCESS * self._processes and (order := next_order()):
            wave.append(order)
        return wave

    def _fly(self, wave: list[Order]) -> Iterator[Answer | None]:
        inbox = self._folder / "inbox"
        inbox.mkdir(parents=True, exist_ok=True)
        for left in inbox.iterdir():
            left.unlink()
        self._say("until", time.time() + min(order.seconds for order in wave))
        self._say("wave", {"plan": self._plan.dump(), "campaign": self._campaign, "driver": os.getpid(),
                           "tasks": [asdict(order.task) for order in wave]})
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(self._processes), "--dist=load", "--maxschedchunk=1",
                   "-p", "no:cacheprovider", "-o", "addopts=", f"--device={self._plan.device}",
                   str(Path(__file__).with_name("wave.py"))]
        waiting = {work(self._folder, order.task).name: order.task for order in wave}
        with (self._folder / "pytest.log").open("w") as log:
            self._pytest = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                            start_new_session=True,  # Ctrl-C is for the driver
                                            env={**os.environ, FOLDER: str(self._folder)})
            over = False
            while not over:
                over = self._pytest.poll() is not None
                yield from self._collect(inbox, waiting)
                if not over:
                    yield None
                    time.sleep(TICK)
        for task in waiting.values():
            yield Answer(task, None, f"its process died, see {self._folder / 'pytest.log'}", inflight(work(self._folder, task)))

    def _collect(self, inbox: Path, waiting: dict[str, Task]) -> Iterator[Answer]:
        for path in sorted(inbox.glob("*.json")):
            yield answered(waiting.pop(path.stem), json.loads(path.read_text()))
            path.unlink()

    def _say(self, name: str, what) -> None:
        part = self._folder / f"{name}.part"
        part.write_text(json.dumps(what))
        part.replace(self._folder / f"{name}.json")

    def hurry(self) -> None:
        """The rest of the wave has no time left."""
        self._say("until", 0.0)

    def close(self) -> None:
        """End pytest; what is in flight is lost."""
        if self._pytest and self._pytest.poll() is None:
            self._pytest.terminate()
            self._pytest.wait()
