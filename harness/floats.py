"""The number formats that NumPy lacks: bfloat16 and float8 e4m3fn, as raw bits on one side and float64 on the other.

Every other dtype name is NumPy's own; for those `encode` is a cast and `decode` gives the cells as they are.
"""

from functools import lru_cache

import numpy as np

_RAW = {"bfloat16": np.dtype(np.uint16), "float8_e4m3fn": np.dtype(np.uint8)}


@lru_cache(maxsize=None)
def storage(name: str) -> np.dtype:
    """The NumPy dtype that holds a cell's bits."""
    return _RAW.get(name) or np.dtype(name)


@lru_cache(maxsize=None)
def is_float(name: str) -> bool:
    return name in _RAW or np.dtype(name).kind == "f"


def decode(raw: np.ndarray, name: str) -> np.ndarray:
    """What the bits mean: float64 for the formats that NumPy lacks.

    >>> decode(np.array([0x38, 0xB8, 0x7E, 0x01], np.uint8), "float8_e4m3fn").tolist()
    [1.0, -1.0, 448.0, 0.001953125]
    >>> decode(np.array([0x3F80, 0xFF80], np.uint16), "bfloat16").tolist()
    [1.0, -inf]
    """
    return _meanings(name)[raw] if name in _RAW else raw


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """The bits of the nearest representable numbers, ties to even. Beyond the largest: inf, or the largest where there is
    no inf, as the hardware's saturating conversion does.

    >>> encode(np.array([1.0, 464.0, 1e9, float("nan")]), "float8_e4m3fn").tolist()
    [56, 126, 126, 127]
    >>> [hex(bits) for bits in encode(np.array([1.00390625, 1.01171875]), "bfloat16")]
    ['0x3f80', '0x3f82']
    """
    values = np.asarray(values)
    if name not in _RAW:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(name)
    sign_bit = 1 << (8 * _RAW[name].itemsize - 1)
    ascending = _positive(name)
    size = np.abs(values.astype(np.float64))
    above = np.minimum(np.searchsorted(ascending, size), len(ascending) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = ascending[above] - size, size - ascending[below]
    odd_below = below % 2 == 1
    code = np.where((to_above < to_below) | ((to_above == to_below) & odd_below), above, below)
    code = np.where(size >= ascending[-1], len(ascending) - 1, code)
    if name == "float8_e4m3fn":
        code = np.minimum(code, len(ascending) - 2)
    code = np.where(np.isnan(size), sign_bit - 1, code)
    return (code | np.where(np.signbit(values), sign_bit, 0)).astype(_RAW[name])


def rounded(values, name: str) -> np.ndarray:
    """`values` as a tensor of this dtype would hold them.

    >>> rounded([1.01, 300.0], "float8_e4m3fn").tolist()
    [1.0, 288.0]
    """
    return decode(encode(np.asarray(values), name), name)


@lru_cache(maxsize=None)
def _meanings(name: str) -> np.ndarray:
    codes = np.arange(1 << (8 * _RAW[name].itemsize))
    if name == "bfloat16":
        with np.errstate(invalid="ignore"):
            return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size))


@lru_cache(maxsize=None)
def _positive(name: str) -> np.ndarray:
    """The non-negative numbers by code, ascending; behind the largest stands the number that would follow it."""
    last = {"bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}[name]
    return np.append(_meanings(name)[:last], {"bfloat16": 2.0**128, "float8_e4m3fn": 480.0}[name])
