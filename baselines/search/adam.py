"""Adam's direction for the few parameters of a policy (Kingma and Ba 2015, arXiv 1412.6980)."""

from __future__ import annotations

import numpy as np

BETAS = (0.9, 0.999)
EPSILON = 1e-8
FLOPS = 14
"""FLOPs per parameter and step: two moments (3 and 4), their corrections (2), root, epsilon, quotient, step (2)."""


class Adam:
    """Adam's moments of the gradients so far.

    Args:
        n: number of parameters.
    """

    def __init__(self, n: int) -> None:
        self._m, self._v, self._steps = np.zeros(n), np.zeros(n), 0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """m_hat / (sqrt(v_hat) + eps) after this gradient (n,), shape (n,): subtract it times a learning rate."""
        b1, b2 = BETAS
        self._steps += 1
        self._m = b1 * self._m + (1 - b1) * gradient
        self._v = b2 * self._v + (1 - b2) * gradient**2
        m, v = self._m / (1 - b1**self._steps), self._v / (1 - b2**self._steps)
        return np.asarray(m / (np.sqrt(v) + EPSILON))
