"""The pool as strata: sources and groups of likeness, which get weights, and classes, whose shares are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cads.data.balanced_stream import balanced_shares
from cads.data.cell_draws import CellDraws
from cads.data.pool import Pool
from cads.data.token_batches import by_id
from cads.task import Task


@dataclass(frozen=True)
class Strata:
    """The source, the likeness and the group of each pool example.

    Attributes:
        sources: code of the source, int, shape (N,); all 0, and no memory, without sources.
        groups: code of the group within which losses are compared, shape (N,), of the smallest unsigned type that
            holds it; all 0 without groups.
        likeness: code of how much it looks like the target, uint8, shape (N,); all 0, and no memory, where that is not
            told.
        n_sources, n_groups: S and G.
        group_shares: share of each group in what is drawn from the pool, shape (G,): as in the target, see
            `balanced_shares`. A group that the target lacks counts as if it had one example.
        likeness_weights: of the codes of likeness, the largest 1, shape (L,).
    """

    sources: np.ndarray
    groups: np.ndarray
    n_sources: int
    n_groups: int
    group_shares: np.ndarray
    likeness: np.ndarray
    likeness_weights: np.ndarray

    @classmethod
    def of(cls, task: Task) -> Strata:
        """The strata of a task."""
        pool, n_target = task.pool, len(task.target)
        sources = np.broadcast_to(np.int32(0), len(pool)) if pool.sources is None else pool.sources
        groups, target_groups = (_groups(task, part) for part in (pool, task.target))
        n_groups = 1 + int(max(groups.max(), target_groups.max()))
        shares = balanced_shares(np.bincount(target_groups, minlength=n_groups))
        counts = np.bincount(groups, minlength=n_groups)
        shares = np.where(counts > 0, np.where(shares > 0, shares, 1 / n_target), 0.0)
        if not shares.any():
            shares = counts.astype(np.float64)
        alike = np.broadcast_to(np.uint8(0), len(pool))
        return cls(sources, groups, source_count(pool), n_groups, shares / shares.sum(), alike, np.ones(1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of sources, codes of likeness and groups: (S, L, G)."""
        return self.n_sources, len(self.likeness_weights), self.n_groups

    @property
    def importance(self) -> np.ndarray:
        """How much each example counts if groups have `group_shares`, float64, shape (N,), with sum 1."""
        counts = np.bincount(self.groups, minlength=self.n_groups)
        return (self.group_shares / np.maximum(counts, 1))[self.groups]

    def told_apart(self, likeness: np.ndarray, weights: np.ndarray) -> Strata:
        """The same strata, divided by `likeness` (codes, shape (N,)) with their weights, shape (L,)."""
        return replace(self, likeness=likeness, likeness_weights=weights)

    def as_they_come(self, counted: np.ndarray) -> Strata:
        """The same strata, with the groups in the shares that the weights of likeness leave them.

        Args:
            counted: how much each example counts, shape (N,), see `counted_once`.
        """
        counts = np.bincount(self.groups, counted * self.likeness_weights[self.likeness], self.n_groups)
        return replace(self, group_shares=counts / counts.sum())

    def cells(self, pool: Pool, seed: int) -> CellDraws:
        """Draws from each cell; cell (s L + l) G + g is that of source s, likeness l and group g."""
        return CellDraws(self.cells_of(slice(None)), int(np.prod(self.shape)), by_id(pool), pool.code_contents(), seed)

    def cells_of(self, rows: np.ndarray | slice) -> np.ndarray:
        """The cell of examples, int64, shape (n,)."""
        _, n_likeness, n_groups = self.shape
        return (self.sources[rows].astype(np.int64) * n_likeness + self.likeness[rows]) * n_groups + self.groups[rows]


def counted_once(pool: Pool) -> np.ndarray:
    """How much each example counts if equal contents count once: 1/k for each of k copies, float64, shape (N,)."""
    codes = pool.code_contents()
    return np.asarray(1 / np.bincount(codes)[codes])


def source_count(pool: Pool) -> int:
    """Number of sources; 1 without any."""
    return 1 if pool.sources is None else len(pool.source_names)


def _groups(task: Task, pool: Pool) -> np.ndarray:
    groups = task.loss_groups(pool)
    if groups is None:
        return np.broadcast_to(np.uint8(0), len(pool))
    return groups.astype(np.min_scalar_type(int(groups.max())))
