"""Positions of several groups of examples, interleaved so that every stretch holds each group in its share."""

from __future__ import annotations

import numpy as np

from cads.data.streams import ShuffledStream, Stream
from cads.errors import DataError
from cads.seeding import derive

CYCLE = 1024
"""Fewest positions whose groups are laid out together."""


class BalancedStream:
    """Each group in its share, each example of a group in turn. Every element is a function of the seed and its index.

    Within a cycle the groups are spread evenly: two stretches of equal length differ by about one example of a group.

    Args:
        positions: of the examples, int64, shape (n,).
        groups: the group of each, int >= 0, shape (n,).
        shares: of the groups, shape (G,); those of groups without an example must be 0.
        seed: of the order.

    Raises:
        DataError: if there is no position, or a group without an example has a share.
    """

    def __init__(self, positions: np.ndarray, groups: np.ndarray, shares: np.ndarray, seed: int) -> None:
        counts = np.bincount(groups, minlength=len(shares))
        if not len(positions) or (shares[counts == 0] > 0).any():
            raise DataError("nothing to draw from: every group with a share needs an example")
        self._period, self._seed = len(positions), seed
        self._per_cycle = apportioned(shares, max(CYCLE, len(positions)))
        self._length = int(self._per_cycle.sum())
        self._groups = np.flatnonzero(self._per_cycle)
        self._streams = [ShuffledStream(positions[groups == g], derive(seed, "group", int(g))) for g in self._groups]
        self._cycle: tuple[int, np.ndarray] = (-1, positions)

    @property
    def period(self) -> int:
        """The number of examples."""
        return self._period

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1, int64, shape (count,)."""
        parts = []
        while count > 0:
            cycle, offset = divmod(start, self._length)
            parts.append(self._positions(cycle)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _positions(self, cycle: int) -> np.ndarray:
        """All positions of a cycle; the last one is cached."""
        if self._cycle[0] != cycle:
            rng = np.random.default_rng((self._seed, cycle))
            counts = self._per_cycle[self._groups]
            taken = [s.take(cycle * int(n), int(n)) for s, n in zip(self._streams, counts, strict=True)]
            places = [(np.arange(n) + rng.random()) / n for n in counts]
            self._cycle = (cycle, np.concatenate(taken)[np.argsort(np.concatenate(places), kind="stable")])
        return self._cycle[1]


def apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """`total` in whole numbers in proportion to `shares` (shape (G,), sum > 0), by largest remainders, int64, (G,).

    Every positive share gets at least one.
    """
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    rest = max(0, total - int(counts.sum()))
    counts[np.argsort(-(exact - counts), kind="stable")[:rest]] += 1
    return np.maximum(counts, np.asarray(shares) > 0)


def balanced_shares(counts: np.ndarray) -> np.ndarray:
    """The shares of groups in a population, from a sample of it; shape (G,) each, the sum is 1.

    The sample's shares are shrunk to equal ones by as much as their scatter is that of chance: with
    chi2 = sum (n_g - m)^2 / m, m the mean count, the weight of equal shares is min(1, (G - 1) / chi2), after James and
    Stein. A random sample of balanced groups so gives equal shares, a sample of unbalanced ones its own. A group that
    the sample lacks gets no share.
    """
    present = counts > 0
    sizes = counts[present].astype(np.float64)
    mean = sizes.mean()
    chi2 = float(((sizes - mean) ** 2).sum() / mean)
    equal = 1.0 if chi2 <= len(sizes) - 1 else (len(sizes) - 1) / chi2
    shares = np.zeros(len(counts))
    shares[present] = equal / len(sizes) + (1 - equal) * sizes / sizes.sum()
    return shares


def balanced_stream(positions: np.ndarray, groups: np.ndarray | None, seed: int) -> Stream:
    """The examples at `positions` with their groups in even turns, in `balanced_shares`.

    Args:
        groups: of all examples of the pool, int, shape (N,); None: there are none, and an epoch follows another.
    """
    if groups is None:
        return ShuffledStream(positions, seed)
    selected_groups = np.asarray(groups)[positions].astype(np.int64)
    return BalancedStream(positions, selected_groups, balanced_shares(np.bincount(selected_groups)), seed)
