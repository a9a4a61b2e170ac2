"""The share of each training batch that is drawn from the target."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np

from cads.errors import ConfigError

TargetFraction = float | Literal["by size"]
"""A share of each batch, or the target's share of all examples that are trained on."""
BY_SIZE = "by size"
MAX_TARGET = 0.6
"""Largest share of the target "by size"."""

Count = TypeVar("Count", float, np.ndarray)


def share_by_size(n_target: int, n_pool: Count, max_share: float = MAX_TARGET) -> Count:
    """The target as one more source: n_T / (n_T + N), at most `max_share`; `n_pool`: N, the examples of the pool."""
    share: Count = np.minimum(max_share, n_target / (n_target + n_pool))
    return share


def target_share(fraction: TargetFraction, n_target: int, n_pool: Count) -> Count:
    """What `fraction` means for N examples of the pool, given as a number or as an array."""
    return share_by_size(n_target, n_pool) if isinstance(fraction, str) else 0.0 * n_pool + fraction


def check_target_fraction(fraction: TargetFraction, *, zero: bool = True) -> None:
    """Refuse what is no share of a batch that holds examples of the pool too.

    Args:
        zero: whether a share of 0, the pool alone, is allowed.

    Raises:
        ConfigError: naming the value.
    """
    is_share = not isinstance(fraction, str) and 0 <= fraction < 1 and (zero or fraction > 0)
    if not is_share and fraction != BY_SIZE:
        least = "at least 0 and below 1" if zero else "above 0 and below 1"
        raise ConfigError(f"target_fraction = {fraction!r}: it must be {least}, or '{BY_SIZE}'")
