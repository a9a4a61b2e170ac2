"""A pseudo-random permutation whose elements are computed one by one, by a Feistel cipher."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 6
"""Of the cipher that does so."""


def feistel_permutation(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 takes `places`, int64 like them.

    A Feistel network on pairs of digits in base m, the least m with m^2 >= n; what falls on n or above (at most
    2 sqrt(n) + 1 of the m^2 pairs stand for that) goes through it again until it does not.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method "generalized Feistel" with
    cycle walking; the round function is the finalizer of SplitMix64.

    Args:
        places: in 0..n-1. keys: uint64, one a round.
    """
    m = np.uint64(math.isqrt(n - 1) + 1)
    found = np.asarray(places, dtype=np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], m)
        for key in keys:
            left, right = right, (left + _mixed(right ^ key) % m) % m
        found[outside] = left * m + right
        outside = found >= n
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
