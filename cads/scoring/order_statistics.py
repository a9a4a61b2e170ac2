"""The median of more numbers than memory holds, exactly: digits of its binary form are found pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

DIGITS = (16, 16, 16, 16)
"""Bits of a float64 that each pass over the numbers determines, the highest first."""
SIGN = np.uint64(1 << 63)

Passes = Callable[[], Iterable[np.ndarray]]
"""Gives all numbers, a piece at a time, each time it is called."""


def median(passes: Passes, count: int) -> float:
    """The median of `count` finite numbers (float64), as `np.median` gives it."""
    middle = [(count - 1) // 2, count // 2]
    low = order_statistic(passes, middle[0])
    return low if middle[0] == middle[1] else (low + order_statistic(passes, middle[1])) / 2


def order_statistic(passes: Passes, position: int) -> float:
    """The number at `position`, counted from 0, in ascending order. Memory: one piece."""
    known, shift = np.uint64(0), 64
    for bits in DIGITS:
        above, shift = shift, shift - bits
        counts = np.zeros(1 << bits, dtype=np.int64)
        for piece in passes():
            keys = _ordered(piece)
            if above < 64:
                keys = keys[keys >> np.uint64(above) == known]
            digit = (keys >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
            counts += np.bincount(digit.astype(np.int64), minlength=1 << bits)
        ends = np.cumsum(counts)
        chosen = int(np.searchsorted(ends, position, side="right"))
        position -= int(ends[chosen] - counts[chosen])
        known = np.uint64((int(known) << bits) | chosen)
    return float(_restored(known))


def _ordered(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the values, shape (n,)."""
    # Adding 0 makes one zero of the two.
    bits = (np.asarray(values, dtype=np.float64) + 0.0).view(np.uint64)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _restored(key: np.uint64) -> np.float64:
    bits = key & ~SIGN if key & SIGN else ~key
    return np.array([bits], dtype=np.uint64).view(np.float64)[0]
