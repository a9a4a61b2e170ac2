"""Projection onto the capped simplex, and iteration over long arrays in blocks that fit in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cads.errors import ConfigError

Floats = NDArray[np.float64]

BLOCK = 2**16
"""Items that are processed at once: 512 kB as float64, which fits in a core's cache. The time per item does not depend
on the number of items, and no temporary array is as long as the policy."""


def project_capped_simplex(s: ArrayLike, k: float) -> Floats:
    """Euclidean projection onto {0 <= x <= 1, sum x <= k}: x = clip(s - tau, 0, 1) with the smallest tau >= 0.

    The threshold is found by safeguarded Newton steps, O(N) time each and O(N) memory; the sum is exact to
    rounding, whatever the magnitude of s.

    Args:
        s: shape (N,), finite.
        k: the largest sum, >= 0.

    Raises:
        ConfigError: if s is empty, not finite or not one-dimensional, or k is not a number >= 0.
    """
    point = finite_array("s", s)
    check_cap(k)
    return project(point.copy(), k)


def project(point: Floats, k: float) -> Floats:
    """`project_capped_simplex` of `point`, which is already checked, in place."""
    if k == 0:
        point[:] = 0.0
        return point
    # tau >= 0, so negative entries end at 0 wherever they start.
    np.maximum(point, 0.0, out=point)
    if _clipped_sum(point, 0.0)[0] > k:
        # A large tau is rounded more coarsely than the sum allows. Subtracting it is exact for the entries near it, so
        # each solve starts 52 bits finer than the last: entries of ordinary size take 2 solves, the largest float64 20.
        for _ in range(20):
            tau = _threshold(point, k)
            if tau == 0:
                break
            point -= tau
    return np.clip(point, 0.0, 1.0, out=point)


def project_to_sum(s: ArrayLike, k: float) -> Floats:
    """Euclidean projection onto {0 <= x <= 1, sum x = k}: x = clip(s - tau, 0, 1).

    Args:
        s: shape (N,), finite.
        k: the sum, from 0 to N.

    Raises:
        ConfigError: as `project_capped_simplex`, or if k exceeds N.
    """
    point = finite_array("s", s)
    check_cap(k)
    if k > point.size:
        raise ConfigError(f"{point.size} probabilities cannot sum to {k}")
    # The sum is fixed, so adding a constant does not change the projection. With the smallest entry at 1 the entries
    # would be clipped to a sum of N: sum <= k binds, and the projection onto it is that onto sum = k.
    return project(point - point.min() + 1.0, k)


def _threshold(s: Floats, k: float) -> float:
    """Root of sum clip(s - tau, 0, 1) = k in tau, 0 < k < N: piecewise linear and non-increasing in tau.

    A Newton step is exact once tau lies on the root's linear piece (the root's active set). Every third step halves
    the bracket, for s whose pieces would make Newton cycle.
    """
    low, high = float(s.min()) - 1.0, float(s.max())
    tau = float(np.clip(0.0, low, high))
    rounding = 4 * np.finfo(float).eps * (k + s.size)
    iteration = 0
    while True:
        total, n_interior = _clipped_sum(s, tau)
        excess = total - k
        if abs(excess) <= rounding:
            return tau
        low, high = (tau, high) if excess > 0 else (low, tau)
        iteration += 1
        newton = tau + excess / n_interior if n_interior and iteration % 3 else np.nan
        next_tau = newton if low < newton < high else low / 2 + high / 2
        if not low < next_tau < high:
            return tau
        tau = next_tau


def _clipped_sum(s: Floats, tau: float) -> tuple[float, int]:
    """The sum of x = clip(s - tau, 0, 1), and how many x lie strictly between 0 and 1."""
    total, n_interior = 0.0, 0
    buffer = np.empty(min(BLOCK, s.size))
    for block in blocks(s.size):
        x = buffer[: block.stop - block.start]
        np.clip(np.subtract(s[block], tau, out=x), 0.0, 1.0, out=x)
        total += float(x.sum())
        n_interior += np.count_nonzero((x > 0) & (x < 1))
    return total, n_interior


def blocks(n: int) -> Iterator[slice]:
    """The slices of at most `BLOCK` items that make up 0..n-1."""
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def finite_array(name: str, values: ArrayLike, dimensions: int = 1) -> Floats:
    """`values` as a non-empty float64 array with `dimensions` dimensions.

    Raises:
        ConfigError: naming `name`, if they are not numbers, not finite, empty or of another number of dimensions.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be numbers: {error}") from error
    if array.ndim != dimensions or array.size == 0:
        raise ConfigError(f"{name} must be non-empty with {dimensions} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ConfigError(f"{name} must be finite, but entry {int(np.argmin(np.isfinite(array)))} is not")
    return array


def check_cap(k: float) -> None:
    """Refuse a cap that is not a finite number >= 0.

    Raises:
        ConfigError: naming the cap.
    """
    if not (np.isfinite(k) and k >= 0):
        raise ConfigError(f"the cap must be a finite number >= 0, got {k}")
