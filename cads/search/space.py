"""The search spaces of policies over sources: subsets of the sources, or mixtures of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from cads.data.pool import Pool
from cads.data.streams import ShuffledStream, Stream, WeightedStream
from cads.estimators.control_variate import Function
from cads.estimators.design import n_columns, pairs
from cads.estimators.reachable_loss import effective_size
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.mixture import MixturePolicy

EXPLORED = 0.1
"""Smallest distance of probabilities from 0 and 1 while candidates are drawn."""
SOFTENED = 0.25
"""Weight, between 0 and 1, with which a doubtful source is tried."""
SIGMA = 0.15
"""Standard deviation of the ratios of the mixture policy."""


class SearchSpace(ABC):
    """The draws of a policy over sources, and what each draw means for training.

    Args:
        pool: with sources.
        sizes: examples in each source, shape (S,).
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.sizes = pool.source_sizes.astype(np.float64)

    @property
    @abstractmethod
    def full(self) -> np.ndarray:
        """The draw that means the whole pool, shape (S,)."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """The number of draws, or None if they are a continuum."""

    @abstractmethod
    def policy(self) -> Policy:
        """The policy with which the search starts."""

    @abstractmethod
    def explore(self, policy: Policy) -> Policy:
        """The policy from which candidates are drawn: its probabilities are kept away from 0 and 1."""

    @abstractmethod
    def weights(self, draws: np.ndarray) -> np.ndarray:
        """The weight of one example of each source, (K, S) -> (K, S)."""

    def neighbours(self, draw: np.ndarray, value: Function) -> list[np.ndarray]:
        """Draws close to `draw` that the policy cannot draw; `value` predicts the objective, which is minimised."""
        return []

    def nested(self, order: np.ndarray) -> np.ndarray:
        """The full draw, that without the last source of `order` (S,), without the last two, ...: shape (S, S)."""
        n = len(self.sizes)
        ranks = np.empty(n, dtype=np.int64)
        ranks[order] = np.arange(n)
        return np.asarray(self.full * (ranks < np.arange(n, 0, -1)[:, None]))

    @abstractmethod
    def stream(self, draw: np.ndarray, positions: np.ndarray, seed: int) -> Stream:
        """The training stream of one draw (S,), among `positions` of the pool."""

    @property
    def n_features(self) -> int:
        """P, the columns of `features`."""
        return n_columns(len(self.sizes))

    def features(self, draws: np.ndarray) -> np.ndarray:
        """phi for the regression, shape (K, P): sources, `cads.estimators.design.pairs`, and log of effective size."""
        x = np.asarray(draws, dtype=np.float64)
        size = np.log(effective_size(self.weights(draws), self.sizes))[:, None]
        return np.hstack([x, pairs(x), size])


class SubsetSpace(SearchSpace):
    """Subsets of sources, by a Bernoulli policy. A draw holds the weight of each source: 1 in, 0 out.

    A weight between 0 and 1 stands for training on many draws of a policy: some of them hold the source.
    """

    @property
    def full(self) -> np.ndarray:
        """All sources."""
        return np.ones(len(self.sizes))

    @property
    def count(self) -> int:
        """Every mask but the empty one."""
        return 2 ** len(self.sizes) - 1

    def policy(self) -> Policy:
        """Each source with probability 1/2."""
        return BernoulliPolicy(np.full(len(self.sizes), 0.5))

    def explore(self, policy: Policy) -> Policy:
        """The policy with clipped probabilities."""
        assert isinstance(policy, BernoulliPolicy)
        return BernoulliPolicy(np.clip(policy.probabilities, EXPLORED, 1 - EXPLORED))

    def weights(self, draws: np.ndarray) -> np.ndarray:
        """0 or 1."""
        return np.asarray(draws, dtype=np.float64)

    def neighbours(self, draw: np.ndarray, value: Function) -> list[np.ndarray]:
        """The draw with its best missing source added in part, and that with its worst source removed in part."""
        partial_draws = []
        for inside in (0, 1):
            flipped = [np.where(np.arange(len(draw)) == j, 1 - draw, draw) for j in np.flatnonzero(draw == inside)]
            flipped = [f for f in flipped if f.any()]
            if flipped:
                best = flipped[int(np.argmin(value(np.array(flipped))))]
                partial_draws.append(np.where(best != draw, SOFTENED, draw))
        return partial_draws

    def stream(self, draw: np.ndarray, positions: np.ndarray, seed: int) -> Stream:
        """Epochs over the examples of the chosen sources; weighted draws if a source is chosen in part."""
        assert self.pool.sources is not None
        position_weights = draw[self.pool.sources[positions]]
        if np.isin(draw, (0, 1)).all():
            return ShuffledStream(positions[position_weights == 1], seed)
        return WeightedStream(position_weights, seed, positions)


class MixtureSpace(SearchSpace):
    """Ratios of sources, by truncated Gaussians."""

    @property
    def full(self) -> np.ndarray:
        """Ratios in proportion to the sizes."""
        return self.sizes / self.sizes.sum()

    @property
    def count(self) -> None:
        """None: ratios are a continuum."""

    def policy(self) -> Policy:
        """Truncated Gaussians around the proportional mixture."""
        return MixturePolicy(self.full, SIGMA)

    def explore(self, policy: Policy) -> Policy:
        """The policy itself, whose width does not shrink."""
        return policy

    def nested(self, order: np.ndarray) -> np.ndarray:
        """Ratios in proportion to the sizes of the sources that each draw holds."""
        draws = super().nested(order)
        return np.asarray(draws / draws.sum(axis=1, keepdims=True))

    def weights(self, draws: np.ndarray) -> np.ndarray:
        """Ratio over size."""
        return np.asarray(draws / draws.sum(axis=1, keepdims=True) / self.sizes)

    def stream(self, draw: np.ndarray, positions: np.ndarray, seed: int) -> Stream:
        """Draws with replacement in proportion to the weights."""
        assert self.pool.sources is not None
        return WeightedStream(self.weights(draw[None])[0][self.pool.sources[positions]], seed, positions)
