"""Which GPUs this machine has, without importing anything that would initialise them."""

import os
import shutil
import subprocess
from functools import lru_cache

NO_OVERFLOW = "--overflow: Triton's checks of integer overflow are compiled in, and no GPU is in use here"
WORKERS_PER_GPU = 8  # forked workers hold a context of their own, about half a GiB each


@lru_cache(maxsize=None)
def gpus() -> tuple[str, ...]:
    """The identifiers of the visible GPUs; none where the driver's tool is missing or finds none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(d.strip() for d in visible.split(",") if d.strip() not in ("", "-1"))
    if not shutil.which("nvidia-smi"):
        return ()
    answer = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True)
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()) if answer.returncode == 0 else ()


def model(gpu: str) -> str:
    """What the maker calls a GPU, e.g. NVIDIA H100 80GB HBM3."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", gpu]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or gpu


def memory(gpu: str) -> int:
    """Bytes of memory that a GPU has in all; 0 if the driver's tool is missing or does not say."""
    if not shutil.which("nvidia-smi"):
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", gpu]
    mebibytes = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return int(mebibytes) << 20 if mebibytes.isdigit() else 0


def resolve(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where a GPU is."""
    return ("cuda" if gpus() else "cpu") if wanted == "auto" else wanted


def environment(device: str, worker: int, overflow: bool = False) -> dict[str, str]:
    """What a worker's process must see before it imports CUDA: one GPU, round robin; and whether Triton compiles its checks
    of integer overflow into the kernels."""
    if device != "cuda":
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus()[worker % len(gpus())], **({"TRITON_DEBUG": "1"} if overflow else {})}


def worker_count(device: str) -> int | None:
    """How many test processes `-n auto` starts; None leaves it to pytest-xdist."""
    return min(os.cpu_count() or 1, WORKERS_PER_GPU * len(gpus())) if device == "cuda" else None
