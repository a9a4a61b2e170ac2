"""The regression h(m) of the objective on trials: the penalty, and a ridge regression on what it leaves.

h can be the control variate of `cads.estimators.score_function.corrected`. That estimator is unbiased only if h was
fitted to other draws than those it corrects, and these are independent draws from the policy. `search` fits h to the
draws it has, which are chosen: it follows the gradient of h (`cads.selectors.search.policy_gradient`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from cads.errors import ConfigError

RIDGES = np.logspace(-3, 3, 13)
"""Ridge strengths, among which the leave-one-out error chooses. They are relative to the number of trials, each of
weight 1 at most."""

READ_OFF_FACTOR = 2.0
"""h is evaluated at this multiple of the highest fidelity measured, at most at 1 (the whole budget). Trends over
fidelity continue, but a fit to three fidelities does not extrapolate far."""

Function = Callable[[np.ndarray], np.ndarray]


class ControlVariate:
    """h(m; f) = c1 R(m) - c2 l*(m) + (w + v log f) . phi(m), fitted to objectives measured at fidelities f.

    R is the training loss of theta, the target model, on the draw, and l* the training loss within reach of the
    budget. c1, c2 >= 0 are fitted first (`fit_control`). A ridge regression on phi is then fitted to the residuals;
    its strength is chosen by the leave-one-out error. Where the penalty does not predict F, c1 and c2 vanish; where
    it predicts F exactly, the regression vanishes. With alpha the penalty is that of the penalty form,
    alpha (R - l*).

    Args:
        draws: the draws of the trials, shape (K, S).
        values: the measured objective F, shape (K,); values that are not finite are left out.
        weights: weight of each value in the regression, shape (K,), > 0.
        fidelity: share of the budget that each trial had, shape (K,).
        features: phi, maps draws (M, S) to (M, P).
        target_loss: R, maps draws to nats (M,).
        reachable_loss: l*, maps draws to nats (M,).
        alpha: fixed value of c1 = c2; None to fit them.

    Attributes:
        c1, c2: the weights of the penalty.
        horizon: the fidelity at which h is evaluated by default.
        loo_error: root mean square of the leave-one-out residuals of the regression, weighted by `weights`, in the
            unit of the values.
    """

    def __init__(
        self,
        draws: np.ndarray,
        values: np.ndarray,
        weights: np.ndarray,
        fidelity: np.ndarray,
        *,
        features: Function,
        target_loss: Function,
        reachable_loss: Function,
        alpha: float | None = None,
    ) -> None:
        finite = np.isfinite(values)
        draws, values, weights = draws[finite], values[finite], weights[finite]
        self._features, self.target_loss, self.reachable_loss = features, target_loss, reachable_loss
        fixed = None if alpha is None else (alpha, alpha)
        self.c1, self.c2 = fixed or fit_control(values, target_loss(draws), reachable_loss(draws))
        x, y = self._inputs(draws, fidelity[finite]), values - self._penalty(draws)
        total_weight = weights.sum()
        self._x_mean, self._y_mean = weights @ x / total_weight, float(weights @ y / total_weight)
        x = x - self._x_mean
        self._x_scale = np.sqrt(weights @ x**2 / total_weight)
        self._x_scale[self._x_scale < 1e-9] = np.inf
        self.horizon = min(1.0, READ_OFF_FACTOR * float(fidelity[finite].max()))
        root_weights = np.sqrt(weights)[:, None]
        self._coefficients, error = _ridge(root_weights * (x / self._x_scale), root_weights[:, 0] * (y - self._y_mean))
        self.loo_error = error / float(np.sqrt(weights.mean()))

    def __call__(self, draws: np.ndarray, fidelity: float | None = None) -> np.ndarray:
        """h of each row of draws (M, S) after a trial of that fidelity (None: the horizon), shape (M,)."""
        inputs = self._inputs(draws, np.full(len(draws), self.horizon if fidelity is None else fidelity))
        x = (inputs - self._x_mean) / self._x_scale
        return np.asarray(self._penalty(draws) + self._y_mean + x @ self._coefficients)

    def _inputs(self, draws: np.ndarray, fidelity: np.ndarray) -> np.ndarray:
        """phi, and its interaction with the fidelity, phi log f, which vanishes at f = 1; shape (M, 2 P)."""
        x = self._features(draws)
        return np.hstack([x, x * np.log(fidelity)[:, None]])

    def _penalty(self, draws: np.ndarray) -> np.ndarray:
        """c1 R - c2 l* of each row of draws (M, S), shape (M,)."""
        return self.c1 * self.target_loss(draws) - self.c2 * self.reachable_loss(draws)


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of the ridge regression with the smallest leave-one-out error, and that error (root mean square).

    One singular value decomposition serves all strengths. The diagonal of the hat matrix gives the leave-one-out
    residuals in closed form.
    """
    u, d, vt = np.linalg.svd(x, full_matrices=False)
    min_error, coefficients = np.inf, np.zeros(x.shape[1])
    projected = u.T @ y
    for strength in RIDGES * len(y):
        shrink = d**2 / (d**2 + strength)
        leverage = np.minimum((u**2 * shrink).sum(axis=1) + 1 / len(y), 1 - 1e-6)
        error = float(np.sqrt(np.mean(((y - u @ (shrink * projected)) / (1 - leverage)) ** 2)))
        if error < min_error:
            min_error = error
            coefficients = vt.T @ (d / (d**2 + strength) * projected)
    return coefficients, min_error


def fit_control(
    values: ArrayLike, training_losses: ArrayLike, reachable: ArrayLike, ridge: float = 1.0
) -> tuple[float, float]:
    """Weights (c1, c2) of the control h = c1 R - c2 l*, from the triples (F, R, l*) measured so far.

    c1, c2 >= 0 minimise sum_k (F_k - a - c1 R_k + c2 l*_k)^2 over a free intercept a, with F, R and l* scaled
    to unit variance and ridge (c1^2 + c2^2) added in that scale. The shrinkage is like ridge / K, so that few
    triples give small weights. Triples with a number that is not finite are dropped; an input without
    variation has weight 0. `cads.estimators.score_function.corrected` stays unbiased only with weights from triples
    other than the draws it is given, which must be independent draws from the policy.

    Args:
        values: F, shape (K,).
        training_losses: R, shape (K,).
        reachable: l*, the training loss within reach of the budget, shape (K,).
        ridge: >= 0, in units of triples.

    Returns:
        c1 and c2, in units of F per unit of loss.

    Raises:
        ConfigError: if shapes disagree or ridge is negative or not finite.
    """
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge must be finite and >= 0, got {ridge}")
    f, r, reachable_loss = (np.asarray(column, dtype=np.float64) for column in (values, training_losses, reachable))
    if f.ndim != 1 or f.shape != r.shape or f.shape != reachable_loss.shape:
        raise ConfigError(f"triples need three equal lengths, got {f.shape}, {r.shape}, {reachable_loss.shape}")
    triples = np.column_stack([f, r, -reachable_loss])
    triples = triples[np.isfinite(triples).all(axis=1)]
    if len(triples) < 2:
        return 0.0, 0.0
    # Divided by the largest entry first, since the variance of very large losses would overflow.
    scale = np.maximum(np.abs(triples).max(axis=0), np.finfo(float).tiny)
    deviations = triples / scale
    deviations -= deviations.mean(axis=0)
    spread = deviations.std(axis=0)
    varies = spread > 1e-12
    standardised = np.where(varies, deviations, 0.0) / np.where(varies, spread, 1.0)
    design = np.vstack([standardised[:, 1:], np.sqrt(ridge) * np.eye(2)])
    weights, _ = nnls(design, np.concatenate([standardised[:, 0], np.zeros(2)]))
    deviation = np.where(varies, spread * scale, 1.0)
    c1, c2 = weights * deviation[0] / deviation[1:]
    return float(c1), float(c2)
