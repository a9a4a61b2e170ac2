"""Diversity: groups of alike examples take turns in a ranking, so that its head is not the same example over and over.

Source: clustering and ranking (CaR, Ge et al. 2024, arXiv 2402.18191): k-means, and of each cluster the best. k-means
where others take k-centre, which looks for outliers first, or facility location, whose cost grows with the square of
the pool.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from cads.data.ids import best_first
from cads.data.pool import Pool
from cads.data.token_batches import by_id
from cads.seeding import derive

SAMPLED_PER_CLUSTER = 100
"""Examples of the pool for each cluster from which centres are learned."""
ROUNDS = 10
"""Of Lloyd's algorithm, after k-means++."""


def cluster_sample(pool: Pool, count: int) -> Pool:
    """The examples from which `count` centres are learned: the same ones in any order of the pool."""
    drawn = np.random.default_rng(derive(0, "clusters")).permutation(len(pool))
    return pool.subset(by_id(pool)[drawn[: count * SAMPLED_PER_CLUSTER]], f"sample of the {pool.name}")


def cluster_centres(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres of k-means, shape (K, D): `count` of them, or as many as there are different vectors (shape (n, D))."""
    different = np.unique(vectors, axis=0)
    if len(different) <= count:
        return different
    centres, _ = kmeans2(different, count, iter=ROUNDS, minit="++", rng=np.random.default_rng(seed))
    return np.asarray(centres)


def nearest_centre(vectors: Tensor, centres: Tensor) -> Tensor:
    """The nearest of the centres (K, D) to each vector (B, D), int64, shape (B,); the first of equals."""
    return torch.argmin(centres.square().sum(dim=1) - 2 * vectors @ centres.T, dim=1)


def take_turns(ids: pa.Array, score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Scores by which the best of every group come first, then the second best, and so on, in order of `score`.

    Args:
        score, group: of each example, shape (N,).

    Returns:
        minus the place within the group, 0 for its best, and less than 1 by score on top; shape (N,).
    """
    order = best_first(ids, score)
    members = order[np.argsort(group[order], kind="stable")]
    sizes = np.bincount(group)
    place = np.empty(len(group))
    place[members] = np.arange(len(members)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    spread = score.max() - score.min()
    return (score - score.min()) / (2 * spread or 1) - place
