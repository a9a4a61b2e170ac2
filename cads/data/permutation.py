"""A pseudo-random permutation by a Feistel cipher: any element can be computed without the others."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 6
"""Rounds of the Feistel cipher."""


def feistel_permutation(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The elements at `indices` of a keyed permutation of 0..n-1, int64, shape (B,).

    A Feistel network on pairs of digits in base m, where m is the smallest integer with m^2 >= n. At most
    2 sqrt(n) + 1 of the m^2 pairs encode a number of n or above. Such a result is encrypted again until it is below n.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method "generalized Feistel" with
    cycle walking; the round function is the finalizer of SplitMix64.

    Args:
        indices: in 0..n-1, shape (B,).
        n: length of the permutation.
        keys: one a round, uint64, shape (`ROUNDS`,).
    """
    m = np.uint64(math.isqrt(n - 1) + 1)
    elements = np.asarray(indices, dtype=np.uint64)
    out_of_range = np.ones(len(elements), dtype=bool)
    while out_of_range.any():
        left, right = np.divmod(elements[out_of_range], m)
        for key in keys:
            left, right = right, (left + _round_function(right ^ key) % m) % m
        elements[out_of_range] = left * m + right
        out_of_range = elements >= n
    return elements.astype(np.int64)


def _round_function(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
