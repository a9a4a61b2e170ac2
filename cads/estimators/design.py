"""D-optimal designs: the draws to try first, from which a regression learns most. They are no sample of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAIR_SCALE = 0.5
"""Pairs of sources are expected to matter half as much as single sources."""
MAX_COLUMNS = 256
"""Above this number designs and regressions leave pairs out, since pairs grow with the square of the sources."""
PRIOR = 0.1
"""Prior precision of each coefficient: the ridge that is added to the information matrix."""


def d_optimal(draws: np.ndarray, count: int, taken: int = 1) -> np.ndarray:
    """A greedy D-optimal design of `count` draws, which begins with the first `taken` of `draws` (M, S).

    Each step takes the draw with the largest leverage given the draws taken before. It multiplies the determinant
    of the information matrix of a regression on sources and pairs of sources by the largest factor (Fedorov, Theory
    of Optimal Experiments, 1972). Ties go to the first draw.

    Returns:
        indices into draws, int64, shape (min(count, M),).
    """
    x = _columns(draws)
    inverse = np.eye(x.shape[1]) / PRIOR
    leverage = np.einsum("mp,mp->m", x, x) / PRIOR
    design: list[int] = []
    candidate = 0
    while len(design) < min(count, len(draws)):
        design.append(candidate)
        # Sherman-Morrison update of the inverse for one more row, and of every leverage.
        v = inverse @ x[candidate]
        scale = 1 + float(x[candidate] @ v)
        leverage -= (x @ v) ** 2 / scale
        inverse -= np.outer(v, v) / scale
        leverage[candidate] = -np.inf
        candidate = len(design) if len(design) < taken else int(np.argmax(np.round(leverage, 9)))
    return np.array(design, dtype=np.int64)


def spaced(draws: np.ndarray, count: int) -> np.ndarray:
    """`count` of `draws` (M, S), evenly spaced from the first to the last; all of them if `count` is at least M."""
    return draws[np.unique(np.linspace(0, len(draws) - 1, min(count, len(draws))).round().astype(np.int64))]


def n_columns(n_sources: int) -> int:
    """P, columns of a design or a regression: one per source, one per pair unless they are too many, and one more.

    The last one is the intercept of a design, and the log of the effective size in a regression.
    """
    full = 1 + n_sources + n_sources * (n_sources - 1) // 2
    return full if full <= MAX_COLUMNS else 1 + n_sources


def pairs(x: np.ndarray) -> np.ndarray:
    """The products of every two columns of x (K, S): shape (K, S (S - 1) / 2), or (K, 0) where they are too many."""
    n_sources = x.shape[1]
    if n_columns(n_sources) == 1 + n_sources:
        return x[:, :0]
    i, j = np.triu_indices(n_sources, k=1)
    return np.asarray(x[:, i] * x[:, j])


def _columns(draws: np.ndarray) -> np.ndarray:
    """The design matrix, shape (M, P): ones, sources scaled to -1..1 (1 if constant), and `PAIR_SCALE` times pairs."""
    minimum, maximum = draws.min(axis=0), draws.max(axis=0)
    spread = np.where(maximum > minimum, maximum - minimum, 1.0)
    x = np.where(maximum > minimum, 2 * (draws - minimum) / spread - 1, 1.0)
    return np.hstack([np.ones((len(x), 1)), x, PAIR_SCALE * pairs(x)])


def distinct_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows without repetitions, in order of first appearance, shape (M, S)."""
    seen: dict[bytes, np.ndarray] = {}
    for row in rows:
        seen.setdefault(np.ascontiguousarray(row).tobytes(), row)
    return np.array(list(seen.values()))
