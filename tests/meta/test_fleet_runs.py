"""Whole campaigns with what goes wrong in a long one: on Ray and pytest-xdist, with a real Redis that comes and goes, with
processes and a driver that are killed."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from measure import needs

from harness import replay
from harness.client import subject_name
from harness.fleet import main
from harness.fleet.journal import Journal, State
from harness.fleet.memory import LEASE, Shared
from harness.fleet.shard import Runner

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = subject_name(str(Path(__file__).with_name("fleet_subject.py")))


class Redis:
    """A redis-server on a free port of loopback, which can be stopped and started again; it forgets everything then."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url, self._folder = f"redis://127.0.0.1:{self.port}/0", folder
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(lambda: self.asked("PING") == "PONG")

    def asked(self, *words: str) -> str:
        return subprocess.run(["redis-cli", "-p", str(self.port), *words], capture_output=True, text=True).stdout.strip()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def until(what, seconds: float = 150.0):
    """Wait for something to be true, and return it."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return answer


@pytest.fixture
def redis(tmp_path):
    needs(importlib.util.find_spec("redis"), "redis: pip install 'redis>=5' (the extra 'fleet')")
    needs(shutil.which("redis-server"), "redis-server: apt-get install redis-server")
    server = Redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def on_ray():
    """One local Ray for all tests of this file; campaigns in this process use it, others join it at this address."""
    needs(importlib.util.find_spec("ray"), "ray: pip install 'ray>=2.40' (the extra 'fleet')")
    import ray

    from harness.fleet.on_ray import join

    join("", 2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def campaign(folder: Path, *arguments: str) -> int:
    return main.main(["--subject", SUBJECT, "--profile", "quick", "-n", "2", "--seed", "5", "--folder", str(folder),
                      "--database", str(folder / "examples"), *arguments])


def lines(folder: Path) -> list[dict]:
    """What the journal says of tasks."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]


def counted(state: State) -> dict:
    return {look: so_far.counted() for look, so_far in state.looks.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(state)`: what the same plan counts in one process without Redis, and with nothing going wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started: list[Runner] = []

    def count(state: State, *looks) -> dict:
        plan = replace(state.plan, redis="", database=str(folder / "examples"), looks=looks or state.plan.looks)
        runner = Runner(plan.dump(), "alone", str(folder), workers=started[0].workers if started else None)
        started.append(runner)
        alone = State("alone", plan, [], {})
        for task in plan.tasks():
            alone.add(runner.run(asdict(task)))
        return counted(alone)

    yield count
    for runner in started[:1]:
        runner.close(SUBJECT)


def process_at_work(folder: Path) -> int:
    """The process that has a case in hand."""
    return int(until(lambda: next(folder.glob("work/*/*/inflight-*.json"), None)).parent.name)


def test_one_shard_at_a_time_has_a_root_cause(redis, tmp_path):
    one, other = (Shared(redis.url, "c0ffee", tmp_path) for _ in range(2))
    cause = ("mine.py", "cu_seqlens", "states", "cu_seqlens")
    assert one.claim(cause, "#0") and not other.claim(cause, "#1") and one.claim(cause, "#0")
    (key,) = redis.asked("KEYS", "plumbline:*").split()
    assert 0 < int(redis.asked("TTL", key)) <= LEASE
    one.release(cause)
    assert other.claim(cause, "#1")
    other.settle(cause, "#1")
    assert not one.claim(cause, "#0") and other.claim(cause, "#1"), "a task that is run again saves its case again"
    redis.stop()
    assert one.claim(cause, "#0") and "has not answered" in one.news()[0]
    assert Shared(redis.url, "c0ffee", tmp_path, read_only=True).claim(cause, "#2")


def test_what_one_shard_finds_another_replays_first(on_ray, redis, tmp_path):
    """Two campaigns on machines that share nothing but Redis."""
    chosen = ("-k", "cu_seqlens", "--shards", "2", "--shard-examples", "40", "--redis", redis.url)
    first, second = tmp_path / "first", tmp_path / "second"
    assert campaign(first, *chosen) == 1
    assert redis.asked("EXISTS", "hypothesis-example:plumbline/fleet_subject_cu_seqlens/inside") == "1"
    assert campaign(second, *chosen, "--seed", "6", "--shard-examples", "10") == 1
    shrunk = [[r["case"] for line in lines(folder) for r in line["results"]] for folder in (first, second)]
    assert len(shrunk[0]) == len(shrunk[1]) == 1, "shrunk once, whichever shards met it"
    for line in (x for x in lines(second) if x["task"]["lane"] == "inside"):
        assert line["first"] <= 2 and [r["case"] for r in line["results"] + line["met"]] == shrunk[0]
    for folder in (first, second):
        (finding,) = json.loads((folder / "findings.json").read_text())
        assert finding["also"] and len(list((folder / "cases").glob("*.json"))) == 1
        assert replay.main([finding["path"]]) == replay.FAILED
        assert all((folder / name).stat().st_size for name in ("index.html", "junit.xml", "summary.md", "verdicts.json"))


def test_a_killed_process_a_segfault_and_a_lost_redis_lose_and_double_nothing(on_ray, redis, undisturbed, tmp_path):
    folder = tmp_path / "campaign"

    def trouble():
        os.kill(process_at_work(folder), signal.SIGKILL)
        until(lambda: len(lines(folder)) >= 2)
        redis.stop()
        so_far = len(lines(folder))
        until(lambda: len(lines(folder)) >= so_far + 3)
        redis.start()

    troubles = threading.Thread(target=trouble)
    troubles.start()
    code = campaign(folder, "-k", "seqlens_expand,nsa_cache_seqlens", "--shards", "5", "--shard-examples", "20",
                    "--redis", redis.url)
    troubles.join()
    state = Journal(folder).read()
    assert code == 1 and len(state.done) == 20 and sum(state.died.values()) == 1
    news = [text for so_far in state.looks.values() for text in so_far.news]
    assert any("process died" in text and "in hand: " in text for text in news), news
    assert any("Redis has not answered" in text for text in news), news
    (dead,) = [line for line in lines(folder) if "died" in line]
    assert (ROOT / dead["case"]).exists() or Path(dead["case"]).exists()
    verdicts = {row["transform"]: row["verdict"] for row in json.loads((folder / "verdicts.json").read_text())}
    assert verdicts["seqlens_expand"] == "PASS" and verdicts["nsa_cache_seqlens"] == "DEFECT"
    (finding,) = json.loads((folder / "findings.json").read_text())
    assert "SIGSEGV" in finding["sentence"] and replay.main([finding["path"]]) == replay.FAILED
    right = (SUBJECT, "seqlens_expand", "inside")
    assert counted(state)[right] == undisturbed(state, right)[right]


def test_a_driver_that_was_killed_is_resumed(on_ray, undisturbed, tmp_path):
    folder = tmp_path / "campaign"
    chosen = ["-k", "seqlens_expand", "--subject", SUBJECT, "--profile", "quick", "--shards", "6", "--shard-examples", "15",
              "--seed", "5", "--database", str(folder / "examples"), "--folder", str(folder)]
    driver = subprocess.Popen([sys.executable, "-m", "harness.fleet.main", *chosen, "--ray", on_ray], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: (folder / "journal.jsonl").exists() and len(lines(folder)) >= 2)
    driver.kill()
    driver.wait()
    before = Journal(folder).read()
    assert 2 <= len(before.done) < 12
    assert main.main(["--resume", "--folder", str(folder), "-n", "2"]) == 0
    after = Journal(folder).read()
    assert len(after.done) == 12 == len(lines(folder)), "nothing was done twice"
    assert counted(after) == undisturbed(after)


def test_the_same_tasks_under_xdist_where_a_process_is_killed(undisturbed, tmp_path):
    folder = tmp_path / "campaign"
    killer = threading.Thread(target=lambda: os.kill(process_at_work(folder), signal.SIGKILL))
    killer.start()
    assert campaign(folder, "--engine", "xdist", "-n", "1", "-k", "seqlens_expand", "--shards", "3",
                    "--shard-examples", "15") == 0
    killer.join()
    state = Journal(folder).read()
    assert len(state.done) == 6 and sum(state.died.values()) == 1
    assert counted(state) == undisturbed(state)
    assert main.main(["--merge", str(folder), "--folder", str(tmp_path / "merged")]) == 0
    first, merged = (json.loads((f / "verdicts.json").read_text()) for f in (folder, tmp_path / "merged"))
    assert first == merged and first[0]["counted"] >= 40
