"""Ridge regression, its strength chosen by leave-one-out: predicts the objective of untried draws from a few trials.

It shares no code with the control variate of CADS, so that a change of CADS leaves the baselines as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cads.accounting.operations import regression_flops

STRENGTHS = np.logspace(-6, 2, 17)
"""Strengths of shrinkage that are tried, relative to the number of rows."""
MAX_PAIRED = 128
"""Sources above which a regression is linear: a few dozen trials cannot determine more than 8,256 columns."""
BLOCK_VALUES = 2**24
"""Feature values that are in memory at once during prediction: 128 MB."""


class Ridge:
    """y ~ a + b . x, with b shrunk towards 0 on standardised columns.

    Args:
        x: shape (K, P). y: shape (K,); rows whose y is not finite are left out.
        weights: weight of each row, shape (K,), > 0; None for equal weights.

    Attributes:
        loo_error: root mean square of the left-out residuals, in the unit of y.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> None:
        finite = np.isfinite(y)
        x, y = x[finite], y[finite]
        w = np.ones(len(y)) if weights is None else weights[finite] / weights[finite].mean()
        self._x_mean, self._y_mean = w @ x / w.sum(), float(w @ y / w.sum())
        self._scale = np.sqrt(w @ (x - self._x_mean) ** 2 / w.sum())
        self._scale[self._scale < 1e-9] = np.inf
        root_weights = np.sqrt(w)
        z, target = root_weights[:, None] * (x - self._x_mean) / self._scale, root_weights * (y - self._y_mean)
        u, d, vt = np.linalg.svd(z, full_matrices=False)
        projected = u.T @ target
        self.loo_error, self._slope = np.inf, np.zeros(x.shape[1])
        for strength in STRENGTHS * len(y):
            shrinkage = d**2 / (d**2 + strength)
            # The hat matrix of slope and intercept: its diagonal gives the left-out residuals in closed form.
            leverage = np.minimum((u**2 * shrinkage).sum(axis=1) + w / w.sum(), 1 - 1e-6)
            error = float(np.sqrt(np.mean(((target - u @ (shrinkage * projected)) / (1 - leverage)) ** 2)))
            if error < self.loo_error:
                self.loo_error, self._slope = error, vt.T @ (d / (d**2 + strength) * projected)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The prediction for each row of x (M, P), shape (M,)."""
        return np.asarray(self._y_mean + (x - self._x_mean) / self._scale @ self._slope)


def with_pairs(x: np.ndarray) -> np.ndarray:
    """The columns and their pairwise products: (K, S) -> (K, `n_paired_columns(S)`).

    Only the columns if there are more than `MAX_PAIRED`.
    """
    if x.shape[1] > MAX_PAIRED:
        return x
    i, j = np.triu_indices(x.shape[1], k=1)
    return np.hstack([x, x[:, i] * x[:, j]])


def n_paired_columns(n_sources: int) -> int:
    """How many columns `with_pairs` gives."""
    return n_sources if n_sources > MAX_PAIRED else n_sources * (n_sources + 1) // 2


def predict(ridge: Ridge, x: np.ndarray, features: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The prediction for each row of x (M, S), shape (M,), with the features of one block in memory at a time."""
    block_rows = max(1, BLOCK_VALUES // features(x[:1]).shape[1])
    return np.concatenate([ridge(features(x[start : start + block_rows])) for start in range(0, len(x), block_rows)])


def pairs_flops(n_sources: int, runs: int, predicted: int) -> float:
    """FLOPs to fit `Ridge` on pairs to `runs` rows, and to predict `predicted` other rows."""
    columns = float(n_paired_columns(n_sources))
    return regression_flops(runs, columns) + 3 * predicted * columns
