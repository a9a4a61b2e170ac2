"""A policy over mixture ratios of sources: a Gaussian on the simplex."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, ndtr, ndtri

from cads.errors import ConfigError
from cads.policies.base import Policy, _check_count
from cads.policies.simplex import Floats, project_capped_simplex

SIGMA_RANGE = (1e-6, 1e6)
"""Smaller: a draw equals its mean in float32. Larger: a draw is uniform. (1 / sigma)^2 stays far from overflow."""


class MixturePolicy(Policy):
    """Ratios r in [0, 1]^n of n sources, r_j independent Gaussians (mu_j, sigma) truncated to [0, 1].

    A draw divided by its sum is the mixture (`ratios`). Density, score and entropy are those of the draw
    before that division. With a_j = -mu_j / sigma, b_j = (1 - mu_j) / sigma and Z_j = Phi(b_j) - Phi(a_j):
    p(r_j) = phi((r_j - mu_j) / sigma) / (sigma Z_j).

    Args:
        means: mu, shape (n,), each in [0, 1], not all 0; `step` keeps them on the probability simplex.
        sigma: the common standard deviation before truncation, within `SIGMA_RANGE`.

    Raises:
        ConfigError: if an argument is not finite or outside its range.
    """

    _parameter = "means"
    _settings = ("sigma",)

    def __init__(self, means: ArrayLike, sigma: float) -> None:
        super().__init__(means)
        if self._values.sum() == 0:
            raise ConfigError("means are all 0: at least one source needs a positive mean")
        if not SIGMA_RANGE[0] <= sigma <= SIGMA_RANGE[1]:
            raise ConfigError(f"sigma must be in [{SIGMA_RANGE[0]}, {SIGMA_RANGE[1]}], got {sigma}")
        self.sigma = sigma

    @property
    def means(self) -> Floats:
        """A copy of mu, shape (n,)."""
        return self._values.copy()

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        """Draw r = mu + sigma Phi^-1( Phi(a) + u Z ), u uniform on (0, 1): float64 (count, n)."""
        a, b, mass = self._truncation()
        # A uniform of exactly 0 would have an infinite quantile.
        uniforms = np.maximum(rng.random((_check_count(count), self.n)), 2.0**-54)
        # Each quantile is computed from its nearer tail, since rounding near 1 loses digits of the probability.
        lower = ndtr(a) + uniforms * mass
        upper = ndtr(-b) + (1 - uniforms) * mass
        quantiles = np.where(lower <= upper, ndtri(lower), -ndtri(upper))
        return np.clip(self._values + self.sigma * quantiles, 0.0, 1.0)

    def ratios(self, draws: NDArray[Any]) -> Floats:
        """Divide each draw by its sum, (K, n) -> (K, n): rows are mixtures.

        Raises:
            ConfigError: if a draw is negative, not finite or sums to 0.
        """
        total = self._checked(draws).sum(axis=1, keepdims=True)
        if not (np.isfinite(total).all() and (draws >= 0).all() and (total > 0).all()):
            raise ConfigError("a draw of ratios must be finite, non-negative and not all 0")
        return draws / total

    def log_prob(self, draws: NDArray[Any]) -> Floats:
        """log p(r; mu) = -sum_j [ (r_j - mu_j)^2 / (2 sigma^2) + log(sigma sqrt(2 pi) Z_j) ], in nats."""
        _, _, mass = self._truncation()
        in_support = ((self._checked(draws) >= 0) & (draws <= 1)).all(axis=1)
        squares = (((draws - self._values) / self.sigma) ** 2).sum(axis=1)
        normaliser = np.log(self.sigma * np.sqrt(2 * np.pi) * mass).sum()
        return np.where(in_support, -squares / 2 - normaliser, -np.inf)

    def score(self, draws: NDArray[Any]) -> Floats:
        """d log p / d mu_j = (r_j - mu_j) / sigma^2 - (phi(a_j) - phi(b_j)) / (sigma Z_j), (K, n)."""
        a, b, mass = self._truncation()
        # expm1 keeps phi(a) - phi(b) accurate for large sigma, where both densities approach phi(0).
        density_difference = (np.expm1(-(a**2) / 2) - np.expm1(-(b**2) / 2)) / np.sqrt(2 * np.pi)
        return (self._checked(draws) - self._values) / self.sigma**2 - density_difference / (self.sigma * mass)

    def entropy(self) -> float:
        """Entropy sum_j [ log(sqrt(2 pi e) sigma Z_j) + (a_j phi(a_j) - b_j phi(b_j)) / (2 Z_j) ] in nats."""
        a, b, mass = self._truncation()
        boundary = (a * np.exp(-(a**2) / 2) - b * np.exp(-(b**2) / 2)) / np.sqrt(2 * np.pi)
        return float((np.log(np.sqrt(2 * np.pi * np.e) * self.sigma * mass) + boundary / (2 * mass)).sum())

    def _project(self, values: Floats) -> Floats:
        # The simplex fixes the sum, so adding a constant does not change the projection. With the largest entry at 1
        # the constraint sum <= 1 binds: the projection onto {0 <= x <= 1, sum x <= 1} is that onto the simplex.
        return project_capped_simplex(values - values.max() + 1.0, 1.0)

    def _truncation(self) -> tuple[Floats, Floats, Floats]:
        """Return a, b and Z, each (n,). Since a <= 0 <= b, Z is a sum of two terms >= 0, without cancellation."""
        a = -self._values / self.sigma
        b = (1 - self._values) / self.sigma
        return a, b, (erf(b / np.sqrt(2)) + erf(-a / np.sqrt(2))) / 2
