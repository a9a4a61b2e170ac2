"""Expectations and gradients of a Bernoulli policy over few items, by enumerating all masks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cads.errors import ConfigError
from cads.policies.simplex import Floats, finite_array

MAX_ENUMERATED = 16
"""Largest number of items whose 2^n masks are enumerated."""


def enumerate_masks(n: int) -> NDArray[np.bool_]:
    """All masks of n items, bool (2^n, n): item i is selected in row r if bit i of r is set.

    Raises:
        ConfigError: if n is not within 1..16.
    """
    if not 1 <= n <= MAX_ENUMERATED:
        raise ConfigError(f"enumeration is for 1 to {MAX_ENUMERATED} items, got {n}: sample masks instead")
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.bool_)


def expected(function_values: ArrayLike, s: ArrayLike) -> float:
    """Exact E_m[h(m)] = sum_m h(m) prod_i s_i^{m_i} (1 - s_i)^{1 - m_i}: the reference for estimators by sampling.

    Args:
        function_values: h in the order of `enumerate_masks`, shape (2^n,).
        s: inclusion probabilities, shape (n,).

    Raises:
        ConfigError: if shapes disagree, n > 16, or a number is outside its range.
    """
    h, factors, _ = _enumerated(function_values, s)
    return float(h @ factors.prod(axis=1))


def expected_gradient(values: ArrayLike, s: ArrayLike) -> Floats:
    """Exact gradient of `expected` in s: E[h | m_i = 1] - E[h | m_i = 0], shape (n,), also at s_i = 0 and 1.

    Args:
        values: h in the order of `enumerate_masks`, shape (2^n,).
        s: inclusion probabilities, shape (n,).

    Raises:
        ConfigError: as `expected`.
    """
    h, factors, masks = _enumerated(values, s)
    gradient = np.empty(masks.shape[1])
    for i in range(gradient.size):
        probability_of_others = np.delete(factors, i, axis=1).prod(axis=1)
        gradient[i] = h @ np.where(masks[:, i], probability_of_others, -probability_of_others)
    return gradient


def _enumerated(values: ArrayLike, s: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return h (2^n,), the factors s_i or 1 - s_i of each mask's probability (2^n, n), and the masks."""
    inclusion = _probabilities(s)
    masks = enumerate_masks(inclusion.size)
    h = finite_array("values", values, 1)
    if h.size != len(masks):
        raise ConfigError(f"{inclusion.size} items have {len(masks)} masks, got {h.size} values")
    return h, np.where(masks, inclusion, 1 - inclusion), masks


def _probabilities(s: ArrayLike) -> Floats:
    """`s` as a float64 array of shape (n,), checked to be within [0, 1]."""
    inclusion = finite_array("s", s, 1)
    if inclusion.min() < 0 or inclusion.max() > 1:
        raise ConfigError(f"s must be in [0, 1], got {inclusion.min()} to {inclusion.max()}")
    return inclusion
