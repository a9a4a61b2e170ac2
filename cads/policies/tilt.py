"""Weights of sources by an exponential tilt: mirror descent on the simplex from the shares that sources come with.

The Rao-Blackwellised gradient of the penalty in the weight of source s is `zbar_s - mean` (the mean excess of its
losses, in standard deviations). Entropic mirror descent of length kappa gives v_s in proportion to exp(-kappa zbar_s).
"""

from __future__ import annotations

import numpy as np


def tilted(excess: np.ndarray, sharpness: float, floor: float, max_difference: float = np.inf) -> np.ndarray:
    """`exp(-sharpness (excess - min))`, at least `floor`; the largest is 1. Shape (S,).

    Args:
        excess: zbar, shape (S,). max_difference: largest difference from the smallest that counts.
    """
    return np.maximum(np.exp(-sharpness * np.minimum(excess - excess.min(), max_difference)), floor)
