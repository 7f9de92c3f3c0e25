"""Every kernel compiles for a GPU: the interpreter is no compiler, and takes what one refuses. No GPU is needed for this."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from harness import registry
from harness.client import ROOT
from harness.contract import Kind

COMPILE = Path(__file__).with_name("compile_kernels.py")
ONE_ROW_DOES_NOT_FIT = """
import triton
import triton.language as tl

from . import _checks as checks


@triton.jit
def _zero(out, BLOCK_ROWS: tl.constexpr):
    row = tl.arange(0, BLOCK_ROWS)
    tl.store(out + row, tl.trans(row[:, None]) if BLOCK_ROWS == 1 else row)


def cu_seqlens(*, seqlens, cu_seqlens):
    _zero[(1,)](cu_seqlens, BLOCK_ROWS=min(len(seqlens), 2))
"""


def compiled(folder: Path, names: list[str], cache: Path) -> list[list]:
    done = subprocess.run([sys.executable, str(COMPILE), str(folder), *names], capture_output=True, text=True, timeout=280,
                          env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_every_kernel_compiles(tmp_path):
    names = [n for n, c in registry.contracts().items() if c.kind is Kind.BUFFER]
    answers = compiled(ROOT / "kernels", names, tmp_path)
    assert {name for name, _, _ in answers} == set(names)
    assert [answer for answer in answers if answer[2]] == []


def test_a_kernel_that_does_not_compile_for_one_request_is_seen(tmp_path):
    for shared in ("_checks.py", "_jit.py", "_launch.py"):
        shutil.copy(ROOT / "kernels" / shared, tmp_path)
    (tmp_path / "seqlens.py").write_text(ONE_ROW_DOES_NOT_FIT)
    one, several = compiled(tmp_path, ["cu_seqlens"], tmp_path / "cache")
    assert one[2].startswith("_zero: ") and several == ["cu_seqlens", 3, ""]
