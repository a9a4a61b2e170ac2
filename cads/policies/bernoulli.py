"""A policy over masks: independent Bernoulli variables, one per example or source."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from cads.errors import ConfigError
from cads.policies.base import Policy, _check_count
from cads.policies.simplex import Floats, blocks, check_cap, project

Masks = NDArray[np.bool_]

CAP_TOLERANCE = 1e-6
"""How far a sum of probabilities may exceed its cap by rounding, relative to max(1, cap)."""


class BernoulliPolicy(Policy):
    """Masks m in {0, 1}^n of independent items, P(m_i = 1) = s_i (CADS-E and CADS-S, arXiv 2510.16806).

    Args:
        probabilities: s, shape (n,), each in [0, 1].
        floor: the score's denominators use s clipped into [floor, 1 - floor], see `score`.
        cap: the largest expected number of selected items, sum(s) <= cap; None for no cap.

    Raises:
        ConfigError: if an argument is not finite or outside its range, or the probabilities exceed the cap.
    """

    _parameter = "probabilities"
    _settings = ("floor", "cap")

    def __init__(self, probabilities: ArrayLike, floor: float = 1e-3, cap: float | None = None) -> None:
        super().__init__(probabilities)
        if not 0 < floor < 0.5:
            raise ConfigError(f"floor must be in (0, 0.5), got {floor}")
        if cap is not None:
            check_cap(cap)
            if self._values.sum() > cap + CAP_TOLERANCE * max(1.0, cap):
                raise ConfigError(
                    f"probabilities sum to {self._values.sum()}, above cap {cap}: "
                    "pass project_capped_simplex(probabilities, cap)"
                )
        self.floor = floor
        self.cap = cap

    @property
    def probabilities(self) -> Floats:
        """A copy of s, shape (n,)."""
        return self._values.copy()

    def sample(self, count: int, rng: np.random.Generator) -> Masks:
        """Draw masks, bool (count, n).

        The uniforms are float32: probabilities are honoured to 2^-24, exactly at 0 and 1.
        """
        masks = np.empty((_check_count(count), self.n), dtype=np.bool_)
        for row in masks:
            # The random numbers do not depend on the size of the blocks in which they are drawn.
            for block in blocks(self.n):
                np.less(rng.random(block.stop - block.start, dtype=np.float32), self._values[block], out=row[block])
        return masks

    def log_prob(self, draws: Masks) -> Floats:
        """log p(m; s) = sum_i m_i log s_i + (1 - m_i) log(1 - s_i), masks (K, n) -> (K,) nats."""
        total = np.zeros(len(self._checked(draws)))
        for block in blocks(self.n):
            s = self._values[block]
            with np.errstate(divide="ignore"):
                log_selected, log_rejected = np.log(s), np.log1p(-s)
            for k, row in enumerate(draws[:, block]):
                total[k] += np.where(row, log_selected, log_rejected).sum()
        return total

    def score(self, draws: Masks) -> Floats:
        """Score d log p / d s_i = (m_i - s_i) / (c_i (1 - c_i)), c = clip(s, floor, 1 - floor), masks (K, n).

        It is the gradient of `log_prob` wherever s lies in [floor, 1 - floor]. Elsewhere it is the gradient
        times s(1 - s) / (c(1 - c)) <= 1: still of mean zero, and bounded by 1 / (floor (1 - floor)). At s = 0 and
        s = 1 it is zero for the only mask that can be drawn there: the probability of such an item changes only by
        another gradient or by the projection.
        """
        score = np.empty(self._checked(draws).shape)
        for block in blocks(self.n):
            s = self._values[block]
            clipped = np.clip(s, self.floor, 1 - self.floor)
            variance = clipped * (1 - clipped)
            np.subtract(draws[:, block], s, out=score[:, block])
            score[:, block] /= variance
        return score

    def entropy(self) -> float:
        """Entropy -sum_i [ s_i log s_i + (1 - s_i) log(1 - s_i) ], in nats."""
        s_blocks = (self._values[block] for block in blocks(self.n))
        return sum(float((entr(s) + entr(1 - s)).sum()) for s in s_blocks)

    def _project(self, values: Floats) -> Floats:
        return project(values, self.n if self.cap is None else self.cap)

    def _checked(self, draws: NDArray[Any]) -> NDArray[Any]:
        if draws.dtype != np.bool_:
            raise ConfigError(f"masks must be bool, got {draws.dtype}: pass draws.astype(bool)")
        return super()._checked(draws)
