"""Numbers as people read them: times, bytes, and counts of examples or tokens."""

from __future__ import annotations

import math

SHORT_TIMES = (("s", 60.0), ("min", 60.0), ("h", 24.0), ("d", 365.25), ("y", math.inf))
COUNTS = (("", 1e3), ("k", 1e3), ("M", 1e3), ("G", 1e3), ("T", math.inf))


def duration(seconds: float) -> str:
    """A time in the largest unit that leaves a number above 1."""
    for unit, length in SHORT_TIMES:
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= length
    raise AssertionError("the last unit has no end")


def size(n_bytes: float) -> str:
    """Bytes in a short form."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def short_count(n: float) -> str:
    """A count in at most six characters: 817, 12.3k, 4.56M."""
    for unit, length in COUNTS:
        # Rounding must not give a fourth digit: 999,600 is 1M, not 1e+03k.
        if n < length * (0.9995 if unit else 1):
            return f"{n:.3g}{unit}"
        n /= length
    raise AssertionError("the last unit has no end")
