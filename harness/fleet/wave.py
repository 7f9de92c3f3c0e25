"""A wave of tasks as pytest tests: `ci/campaign --engine xdist` runs this file."""

import json
import os
import time
from pathlib import Path

import pytest

from harness.fleet.on_xdist import FOLDER
from harness.fleet.plan import Task
from harness.fleet.shard import Runner, work

ORDERED = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
WAVE = json.loads((ORDERED / "wave.json").read_text()) if ORDERED else {"tasks": []}


@pytest.fixture(scope="session")
def runner():
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return Runner(WAVE["plan"], WAVE["campaign"], str(ORDERED), number)


@pytest.mark.parametrize("task", [Task(**t) for t in WAVE["tasks"]], ids=lambda task: task.key)
def test_shard(task, runner):
    try:
        os.kill(WAVE["driver"], 0)
    except ProcessLookupError:
        pytest.exit("the driver is gone")
    reply = runner.run(vars(task), json.loads((ORDERED / "until.json").read_text()) - time.time())
    answer = ORDERED / "inbox" / f"{work(ORDERED, task).name}.json"
    answer.with_suffix(".part").write_text(json.dumps(reply))
    answer.with_suffix(".part").replace(answer)
    assert "error" not in reply, reply
