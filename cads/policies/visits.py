"""How often the examples of each source are visited, where each further visit of an example is worth less.

The x-th visit of an example of source s is worth u_s / (1 + x / h): half of the first one after h visits. The visits
that a run can pay for are worth most where

    max  sum_s n_s u_s h log(1 + x_s / h)    subject to    sum_s n_s x_s = total,  x_s >= 0,

that is, `x_s = h max(0, u_s / level - 1)`: water filling. A short run visits the best source alone. The longer the run,
the nearer the visits come to being in proportion to the worth.
"""

from __future__ import annotations

import numpy as np

from cads.errors import ConfigError


def visits(worth: np.ndarray, sizes: np.ndarray, total: float, half: float) -> np.ndarray:
    """Visits x of an example of each source, shape (S,).

    Args:
        worth: u, of the first visit, not all 0, shape (S,). sizes: n, examples of each source, shape (S,).
        total: visits of all examples, > 0. half: h, visits after which one more is worth half of the first.

    Raises:
        ConfigError: if a number is not as said above, or all sources are empty.
    """
    if not (min(worth.min(), sizes.min()) >= 0 and min(worth.max(), sizes.max(), total, half) > 0):
        raise ConfigError(f"visits: worth {worth}, sizes {sizes}, total {total} and half {half} must be positive")
    order = np.argsort(-worth, kind="stable")
    n, best = sizes[order], worth[order]
    # The level if the k best sources are visited; it is right for the most of them that are all above it.
    levels = half * np.cumsum(n * best) / (total + half * np.cumsum(n))
    level = levels[np.flatnonzero(best > levels)[-1]]
    return np.asarray(half * np.maximum(worth / level - 1, 0.0))
