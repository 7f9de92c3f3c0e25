"""Kernels with several configs, between which Triton chooses by measuring on a GPU."""

import triton
import triton.language as tl


def _sums(lengths, out, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.cumsum(tl.load(lengths + i, mask=i < n, other=0) + WRONG)
    tl.store(out, 0)
    tl.store(out + 1 + i, total, mask=i < n)


def _tuned(*wrong: int, **options):
    configs = [triton.Config({"WRONG": w, "BLOCK": 1024}, num_warps=k + 1) for k, w in enumerate(wrong)]
    return triton.autotune(configs, key=["n"], **options)(triton.jit(_sums))


_right, _second_wrong, _wrong = _tuned(0, 0), _tuned(0, 1), _tuned(1, 0)
_first_pruned = _tuned(1, 0, prune_configs_by={"early_config_prune": lambda configs, given, **_: configs[given["n"] * 0 + 1 :]})


def right(*, seqlens, cu_seqlens):
    _right[(1,)](seqlens, cu_seqlens, len(seqlens))


def wrong(*, seqlens, cu_seqlens):
    _wrong[lambda meta: (meta["BLOCK"] // 1024,)](seqlens, cu_seqlens, len(seqlens))


def second_wrong(*, seqlens, cu_seqlens):
    _second_wrong[(1,)](seqlens, cu_seqlens, len(seqlens))


def first_pruned(*, seqlens, cu_seqlens):
    _first_pruned[(1,)](seqlens, cu_seqlens, len(seqlens))
