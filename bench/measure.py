"""Times of one call: on the host, on the GPU, and of a captured graph.

host   perf_counter_ns around each call, in bursts; the GPU is waited for between bursts, never inside one.
gpu    CUDA events around a graph that holds the call `copies` times, divided by that. The host enqueues all rounds while
       the GPU is still busy with something else: a host that is slow for a moment is not counted. The L2 cache is not
       flushed: calls come one after another, as the steps of a decode loop do. What the kernel measured before asked the
       cache to keep is let go.
"""

import ctypes
import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch

BURST = 20
HEAD_START = 5_000_000  # cycles, some 3 ms: what thirty rounds take to enqueue on a host five times slower than it should be


@dataclass(frozen=True)
class Spread:
    """Microseconds: the median, the quartiles, and how many samples."""

    median: float
    low: float
    high: float
    samples: int

    def json(self) -> dict:
        return {k: round(v, 3) for k, v in asdict(self).items()}


def spread(samples: list[float]) -> Spread:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Spread(median, low, high, len(samples))


def host(call, wait, seconds: float) -> Spread:
    """Microseconds that the caller is busy."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        wait()
        for _ in range(BURST):
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) / 1000)
            if time.perf_counter() > end:
                break
    wait()
    return spread(samples)


def waits(call) -> bool:
    """Whether a call makes the host wait for the GPU, so that no graph can hold it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def captured(call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of `copies` calls. (torch.cuda.graph would collect garbage first, which takes longer than the rest.)"""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph.capture_begin()
        try:
            for _ in range(copies):
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def gpu(call, seconds: float) -> tuple[Spread, str]:
    """Microseconds of GPU time of a call, and how they were taken."""
    let_go_of_kept_lines()
    once = _between_events(call, 3)[-1]
    copies = max(1, min(20, math.ceil(1000 / max(once, 1))))
    if waits(call):
        return spread(_between_events(call, 9)), "events around calls that wait for the GPU"
    replay = captured(call, copies).replay
    _between_events(replay, 2)
    rounds = max(5, min(30, int(seconds * 1e6 / (copies * max(once, 1) + 50))))
    return spread([t / copies for t in _between_events(replay, rounds)]), f"graph of {copies} calls"


def let_go_of_kept_lines() -> None:
    """Lines of the L2 cache that a kernel loaded with `evict_last` are as any others from now on."""
    torch.cuda.synchronize()
    if status := ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache():
        raise RuntimeError(f"cuCtxResetPersistingL2Cache failed with status {status}")


def _between_events(call, rounds: int) -> list[float]:
    """Microseconds of GPU time between an event before and one after each call."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda._sleep(HEAD_START)
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1000 for a, b in pairs]


def copy_bandwidth() -> float:
    """Bytes per microsecond that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = _between_events(lambda: target.copy_(source), 10)[3:]
    return 2 * source.numel() / statistics.median(times)
