"""A 4,096 x 1,048,576 request table costs what its live rows cost."""

import os
import time
from pathlib import Path

from harness.differential import Example, check
from oracles.metadata import Decode, Req

SMALL = Decode((Req(3, 130), Req(0, 3)), slots=4, table_extra=2**20 - 130)
LARGE = Decode((Req(4095, 130), Req(0, 3)), slots=4096, table_extra=2**20 - 130)


def peak(pid: int) -> int:
    """Most resident memory of a process so far, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def measured(worker, case) -> tuple[float, int]:
    """Seconds of the second check, and peak memory of this process and the subject's child together."""
    worker.restart_child()
    rules = case.contract.rules()
    assert check(Example((case,)), worker, rules) == []
    started = time.monotonic()
    assert check(Example((case,)), worker, rules) == []
    return time.monotonic() - started, peak(os.getpid()) + peak(worker.child)


def test_far_table_is_cheap(session):
    worker = session.worker("kernels")
    _, small = measured(worker, SMALL)
    seconds, large = measured(worker, LARGE)
    assert seconds < 1.0
    assert large - small <= 32 << 20
