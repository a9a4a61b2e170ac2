"""Diversity: clusters of similar examples take turns in a ranking, so that its head is not full of near-duplicates.

Source: clustering and ranking (CaR, Ge et al. 2024, arXiv 2402.18191): k-means, and the best examples of each cluster.
The alternatives are worse here: k-centre picks outliers first, and the cost of facility location grows with the square
of the pool.
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
"""Examples of the pool, for each cluster, from which the centres are learned."""
ROUNDS = 10
"""Iterations of Lloyd's algorithm, after k-means++ initialisation."""


def cluster_sample(pool: Pool, count: int) -> Pool:
    """The examples from which `count` centres are learned: the same ones in any order of the pool."""
    permutation = np.random.default_rng(derive(0, "clusters")).permutation(len(pool))
    return pool.subset(by_id(pool)[permutation[: count * SAMPLED_PER_CLUSTER]], f"sample of the {pool.name}")


def cluster_centres(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres of k-means, shape (K, D): `count` of them, or as many as there are distinct vectors (shape (n, D))."""
    unique_vectors = np.unique(vectors, axis=0)
    if len(unique_vectors) <= count:
        return unique_vectors
    centres, _ = kmeans2(unique_vectors, count, iter=ROUNDS, minit="++", rng=np.random.default_rng(seed))
    return np.asarray(centres)


def nearest_centre(vectors: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre (K, D) to each vector (B, D), int64, shape (B,); the first one on ties."""
    return torch.argmin(centres.square().sum(dim=1) - 2 * vectors @ centres.T, dim=1)


def take_turns(ids: pa.Array, score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Scores that rank the best example of every group first, then the second best, and so on, in order of `score`.

    Args:
        score, group: score and group index of each example, shape (N,).

    Returns:
        minus the rank within the group (0 for the best), plus at most 1/2 in proportion to `score`; shape (N,).
    """
    order = best_first(ids, score)
    members = order[np.argsort(group[order], kind="stable")]
    sizes = np.bincount(group)
    rank_in_group = np.empty(len(group))
    rank_in_group[members] = np.arange(len(members)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    spread = score.max() - score.min()
    return (score - score.min()) / (2 * spread or 1) - rank_in_group
