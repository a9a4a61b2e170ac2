"""l*_C(m), the training loss that budget C can reach on mask m: trained, extrapolated, or fitted over masks.

The penalty form of the bilevel problem (CADS, arXiv 2510.16806) needs nothing else of the inner problem.
"""

from __future__ import annotations

import numpy as np

from cads.errors import ConfigError
from cads.estimators.design import pairs
from cads.estimators.loss_curves import FLOOR


def effective_size(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Kish's effective number of examples, `(sum w n)^2 / sum w^2 n`; for a mask, the examples it selects.

    Args:
        weights: of one example of each source, shape (M, S), not all 0 in a row; a mask is weights 0 and 1.
        sizes: n, examples in each source, shape (S,).

    Returns:
        shape (M,).
    """
    weights = np.asarray(weights, dtype=np.float64)
    return np.asarray((weights @ sizes) ** 2 / (weights**2 @ sizes))


def mean_over_sources(weights: np.ndarray, sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """R(m): the mean loss of the examples that the mask m selects, or the weighted mean under weights m.

    Args:
        weights: as in `effective_size`, shape (M, S).
        sizes: examples in each source, shape (S,).
        losses: mean loss in each source, nats, shape (S,).

    Returns:
        nats, shape (M,).
    """
    amounts = np.asarray(weights, dtype=np.float64) * sizes
    return np.asarray(amounts @ losses / amounts.sum(axis=1))


class ReachableLossModel:
    """l*_C of any mask of sources, fitted to a few: `log l*` is linear in mixture ratios, their pairs and log size.

    A fit on ratios alone misleads, since the amount of data matters as much as the mixture. The loss of a union is
    no combination of the losses of its parts (two easy problems make a hard one), hence the pairs
    (`cads.estimators.design.pairs`).

    Args:
        weights: the masks or weights that were trained on, as in `effective_size`, shape (K, S).
        reached: l*_C of each, nats, shape (K,); losses that are not finite are left out.
        sizes: examples in each source, shape (S,).
        ridge: strength of the shrinkage of all but the intercept, relative to K.

    Raises:
        ConfigError: if no run reached a finite loss.
    """

    def __init__(self, weights: np.ndarray, reached: np.ndarray, sizes: np.ndarray, ridge: float = 1e-2) -> None:
        self._sizes = np.asarray(sizes, dtype=np.float64)
        finite = np.isfinite(reached)
        if not finite.any():
            raise ConfigError(
                "no run reached a finite training loss, so the loss within reach cannot be fitted: lower learning_rate"
            )
        x = self._features(weights[finite])
        y = np.log(np.maximum(reached[finite], FLOOR))
        self._x_mean, self._y_mean = x.mean(axis=0), y.mean()
        x = x - self._x_mean
        # The dual form has as many unknowns as runs: fewer than pairs where sources are many.
        gram = x @ x.T + ridge * len(x) * np.eye(len(x))
        self._coefficients = x.T @ np.linalg.solve(gram, y - self._y_mean)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """l*_C of each row of `weights`, shape (M, S): nats, shape (M,)."""
        return np.asarray(np.exp((self._features(weights) - self._x_mean) @ self._coefficients + self._y_mean))

    def _features(self, weights: np.ndarray) -> np.ndarray:
        """Mixture ratios, their pairs and the log of the effective size, shape (M, P)."""
        amounts = np.asarray(weights, dtype=np.float64) * self._sizes
        ratios = amounts / amounts.sum(axis=1, keepdims=True)
        size = np.log(effective_size(weights, self._sizes))[:, None]
        return np.hstack([ratios, pairs(ratios), size])
