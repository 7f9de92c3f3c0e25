"""Cell contents from a counter hash: stable across versions, and any cell can be computed without its neighbours."""

import zlib
from functools import lru_cache

import numpy as np

from harness import floats

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


_MASK = 2**64 - 1


def splitmix64(counter: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014) of every counter of an array, uint64 in and out."""
    z = counter + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=1024)
def stream(seed: int, name: str) -> int:
    """The key of one named stream of cells: splitmix64 of one counter."""
    z = (((seed << 32) ^ zlib.crc32(name.encode())) + int(_GOLDEN)) & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def cells(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """The uint64 cell of stream `name` at every position in the array `index`."""
    return splitmix64(np.atleast_1d(index).astype(np.uint64) * _GOLDEN + np.uint64(stream(seed, name)))


def poison(seed: int, name: str, index: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cells of any dtype whose bits are the low bits of the hash (floats may be NaN or infinite)."""
    dtype = np.dtype(dtype)
    raw = cells(seed, name, index).view(np.uint8).reshape(-1, 8)[:, : dtype.itemsize]
    if dtype.kind == "b":
        raw = raw & 1
    return np.ascontiguousarray(raw).view(dtype).reshape(-1)


def anything(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """Float32 numbers of which every part counts: NaN, zeros and normal numbers of either sign with a whole mantissa, from
    2^-9 to 2^9; one in eight is 2^40 times larger or smaller, which a float16 does not hold. A copy through any other format
    changes some of them."""
    raw = cells(seed, name, index)
    coarse = floats.decode((raw & np.uint64(255)).astype(np.uint8), "float8_e4m3fn")
    fine = (raw >> np.uint64(8) & np.uint64(2**20 - 1)).astype(np.float64) / 2**23
    far = np.select([raw >> np.uint64(60) == 0, raw >> np.uint64(60) == 1], [2.0**40, 2.0**-40], 1.0)
    return floats.rounded(coarse * (1 + fine) * far, "float32").astype(np.float64)


def kv_slots(content: int, owner: int, count: int, page_size: int = 1, aligned: bool = True) -> np.ndarray:
    """KV slots of the first `count` tokens of an owner: pages anywhere, the tokens of a page side by side, or with
    `aligned` off every token anywhere."""
    position = np.arange(count)
    if not aligned:
        return (cells(content, f"token {owner}", position) % np.uint64(2**31)).astype(np.int64)
    pages = cells(content, f"page {owner}", position // page_size) % np.uint64(2**31 // page_size)
    return pages.astype(np.int64) * page_size + position % page_size
