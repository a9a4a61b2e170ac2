"""The signal: how much higher the losses of each source are than those of others on examples of the same group.

A class that is hard has high losses in every source. The loss of example i is therefore standardised within its group
g (the class of an image, the length of an answer), z_i = (l_i - mu_g) / sigma_g, and the signal of a source is the mean
of z over its examples, shrunk to 0 by one pseudo-example. Where labels may be wrong, means are over the right ones.
"""

from __future__ import annotations

import numpy as np

PSEUDO = 5.0
"""Examples by which the moments of a group are shrunk to those of all groups."""


class SourceExcess:
    """Running means of standardised losses, by source.

    Args:
        n_sources: S. n_groups: G.
        memory: rows over which the means reach back.
    """

    def __init__(self, n_sources: int, n_groups: int, memory: float) -> None:
        self._memory = memory
        self._moments = np.zeros((3, n_groups))
        self._sums = np.zeros((3, n_sources))

    def add(
        self,
        losses: np.ndarray,
        sources: np.ndarray,
        groups: np.ndarray,
        weights: np.ndarray,
        right: np.ndarray | None = None,
    ) -> None:
        """Add the losses of n examples, nats, shape (n,) each.

        Args:
            sources, groups: codes of the examples.
            weights: the inverse of how often a source is drawn: the moments are those of the pool as it comes.
            right: the probability that the label is right: what is wrong in a source does not count against the rest.
                None: all labels are.
        """
        right = np.ones(len(losses)) if right is None else right
        kept = np.isfinite(losses) & (right > 0)
        losses, sources, groups, weights, right = (x[kept] for x in (losses, sources, groups, weights, right))
        decay = np.exp(-len(losses) / self._memory)
        n_sources, n_groups = self._sums.shape[1], self._moments.shape[1]
        moments = (1.0, losses, losses**2)
        new = [np.bincount(groups, weights=weights * right * x, minlength=n_groups) for x in moments]
        self._moments = decay * self._moments + np.array(new)
        mean, deviation = self._mean_and_deviation()
        z = (losses - mean[groups]) / deviation[groups]
        new = [np.bincount(sources, weights=right * x, minlength=n_sources) for x in (1.0, z, z**2)]
        self._sums = decay * self._sums + np.array(new)

    @property
    def mean(self) -> np.ndarray:
        """zbar of each source, standard deviations, shape (S,)."""
        return self._sums[1] / (self._sums[0] + 1)

    @property
    def stderr(self) -> np.ndarray:
        """The standard error of `mean`, shape (S,); that of one example for sources without any."""
        n = np.maximum(self._sums[0], 1.0)
        return np.sqrt(np.maximum(self._sums[2] / n - (self._sums[1] / n) ** 2, 0.0).clip(min=0.1) / n)

    def reachable(self, group_shares: np.ndarray) -> float:
        """l*: the mean loss of the groups, nats, in the shares that are drawn (shape (G,))."""
        mean, _ = self._mean_and_deviation()
        return float(group_shares @ mean / group_shares.sum())

    def state(self) -> np.ndarray:
        """All sums, shape (3, G + S)."""
        return np.concatenate([self._moments, self._sums], axis=1)

    def restore(self, state: np.ndarray) -> None:
        """Go on from `state`."""
        n_groups = self._moments.shape[1]
        self._moments, self._sums = state[:, :n_groups].copy(), state[:, n_groups:].copy()

    def _mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the losses of each group, shape (G,), shrunk to those of all."""
        count, total, square = self._moments
        n = max(count.sum(), 1e-12)
        pooled = total.sum() / n
        pooled_square = square.sum() / n
        mean = (total + PSEUDO * pooled) / (count + PSEUDO)
        variance = (square + PSEUDO * pooled_square) / (count + PSEUDO) - mean**2
        return mean, np.sqrt(np.maximum(variance, 1e-12))
