"""The capped simplex, and work on long arrays in blocks that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cads.errors import ConfigError

Floats = NDArray[np.float64]

BLOCK = 2**16
"""Items that are worked on at once: 512 kB as float64, which a core keeps in its cache. So the time of an item does
not depend on how many there are, and no temporary array is as long as the policy."""


def project_capped_simplex(s: ArrayLike, k: float) -> Floats:
    """Euclidean projection onto {0 <= x <= 1, sum x <= k}: x = clip(s - tau, 0, 1) with the least tau >= 0.

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
    """`project_capped_simplex` of a checked `point`, in its place."""
    if k == 0:
        point[:] = 0.0
        return point
    # tau >= 0, so negative entries end at 0 wherever they start.
    np.maximum(point, 0.0, out=point)
    if _clipped_sum(point, 0.0)[0] > k:
        # A large tau is coarser than the sum must be. Subtracting it is exact for the entries near it, so each
        # solve starts 52 bits finer than the last: two for entries of ordinary size, 20 for the largest float64.
        for _ in range(20):
            tau = _threshold(point, k)
            if tau == 0:
                break
            point -= tau
    return np.clip(point, 0.0, 1.0, out=point)


def _threshold(s: Floats, k: float) -> float:
    """Root of sum clip(s - tau, 0, 1) = k in tau, 0 < k < N: piecewise linear and non-increasing in tau.

    Newton is exact once it stands on the root's linear piece (the root's active set); every third step halves
    the bracket, for s whose pieces would make Newton cycle.
    """
    low, high = float(s.min()) - 1.0, float(s.max())
    tau = float(np.clip(0.0, low, high))
    rounding = 4 * np.finfo(float).eps * (k + s.size)
    iteration = 0
    while True:
        total, free = _clipped_sum(s, tau)
        excess = total - k
        if abs(excess) <= rounding:
            return tau
        low, high = (tau, high) if excess > 0 else (low, tau)
        iteration += 1
        newton = tau + excess / free if free and iteration % 3 else np.nan
        following = newton if low < newton < high else low / 2 + high / 2
        if not low < following < high:
            return tau
        tau = following


def _clipped_sum(s: Floats, tau: float) -> tuple[float, int]:
    """The sum of x = clip(s - tau, 0, 1), and how many x lie strictly between 0 and 1."""
    total, free = 0.0, 0
    buffer = np.empty(min(BLOCK, s.size))
    for part in blocks(s.size):
        x = buffer[: part.stop - part.start]
        np.clip(np.subtract(s[part], tau, out=x), 0.0, 1.0, out=x)
        total += float(x.sum())
        free += np.count_nonzero((x > 0) & (x < 1))
    return total, free


def blocks(n: int) -> Iterator[slice]:
    """The slices of at most `BLOCK` that make up 0..n-1."""
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def finite_array(name: str, values: ArrayLike, dimensions: int = 1) -> Floats:
    """`values` as non-empty float64 with that many dimensions.

    Raises:
        ConfigError: naming `name`, if they are not numbers, not finite, empty or of another shape.
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
    """Refuse a cap that is none.

    Raises:
        ConfigError: if k is not a finite number >= 0.
    """
    if not (np.isfinite(k) and k >= 0):
        raise ConfigError(f"the cap must be a finite number >= 0, got {k}")
