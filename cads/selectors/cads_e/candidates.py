"""Candidate selections of examples from standardised signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from cads.accounting.operations import candidates_flops

SHARPNESS = 3.0
"""Slope of the logits in the standardised signal."""


@dataclass(frozen=True)
class Signals:
    """The losses from which candidates are computed.

    Attributes:
        from_theta: losses under theta, the target model, nats, shape (N,).
        from_u: losses under u, the reference model, nats, shape (N,); None without u.
        steps: share of the pool that is kept and weight of l*, the losses under u, for each candidate.
        groups: positions of the examples of each group, within which examples compete; one for all of them by default.
    """

    from_theta: np.ndarray
    from_u: np.ndarray | None
    steps: Sequence[tuple[float, float]]
    groups: Sequence[np.ndarray | slice] = (slice(None),)

    @classmethod
    def of(
        cls,
        from_theta: np.ndarray,
        from_u: np.ndarray | None,
        steps: Sequence[tuple[float, float]],
        groups: np.ndarray | None = None,
    ) -> Signals:
        """Signals with `groups` as the group of each example, shape (N,), or None."""
        if groups is None:
            return cls(from_theta, from_u, steps)
        order = np.argsort(groups, kind="stable")
        return cls(from_theta, from_u, steps, np.split(order, np.flatnonzero(np.diff(groups[order])) + 1))

    @property
    def everything(self) -> Candidate:
        """The full pool."""
        return Candidate(self, 0.0, 1.0)

    @property
    def candidates(self) -> list[Candidate]:
        """Policies one gradient step away from the uniform one."""
        return [Candidate(self, weight, kept) for kept, weight in self.steps]


@dataclass(frozen=True)
class Candidate:
    """A policy over examples, by its recipe: probabilities are computed on demand, which saves memory for large pools.

    Attributes:
        signals: the losses from which it is computed. reach_weight: c2/c1, the weight of l*.
        kept: share of the pool with s_i > 1/2, the length of the step; 1 for all of it.
    """

    signals: Signals
    reach_weight: float
    kept: float

    @property
    def flops(self) -> float:
        """FLOPs of computing the probabilities."""
        return 0.0 if self.kept == 1 else candidates_flops(len(self.signals.from_theta), 1)

    def probability(self) -> np.ndarray:
        """s of each example, shape (N,).

        The Rao-Blackwellised gradient in s_i is proportional to `l_i(theta) - (c2/c1) l_i(u)` minus its mean. A
        step in the logits leaves `s_i = sigmoid(k (q - z_i))`, z the standardised signal; its length is given by
        the share of the pool with s_i > 1/2, so q is that quantile of z, in each group.
        """
        from_theta, from_u = self.signals.from_theta, self.signals.from_u
        if self.kept == 1:
            return np.ones(len(from_theta))
        signal = from_theta if from_u is None else from_theta - self.reach_weight * from_u
        z = signal - signal.mean()
        z /= max(float(signal.std()), 1e-12)
        for group in self.signals.groups:
            z[group] -= np.quantile(z[group], self.kept)
        z *= -SHARPNESS
        return np.asarray(expit(z))


def most_probable(probability: np.ndarray) -> np.ndarray:
    """The most probable mask, bool, shape (N,); if it is empty, all examples: groups of one example have s = 1/2."""
    selected = probability > 0.5
    return selected if selected.any() else np.ones(len(selected), dtype=bool)


def entropy(probability: np.ndarray) -> float:
    """Mean entropy of one example's selection, nats."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())
