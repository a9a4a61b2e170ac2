"""Which draws to try first: those from which a regression learns most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAIR_SCALE = 0.5
"""Pairs of sources are expected to matter half as much as single sources."""
MOST_COLUMNS = 256
"""Above it pairs are left out, of designs as of regressions: their number grows with the square of that of sources."""
PRIOR = 0.1
"""Ridge that stands for what is known beforehand."""


def d_optimal(draws: np.ndarray, count: int, taken: int = 1) -> np.ndarray:
    """The first `taken` of `draws` (M, S), and those that with them make a D-optimal design, one after another.

    Each step takes the draw with the largest leverage given those taken before, which multiplies the determinant
    of the information matrix of a regression on sources and pairs of sources by most (Fedorov, Theory of Optimal
    Experiments, 1972). Ties go to the first.

    Returns:
        indices into draws, int64, shape (min(count, M),).
    """
    x = _columns(draws)
    inverse = np.eye(x.shape[1]) / PRIOR
    leverage = np.einsum("mp,mp->m", x, x) / PRIOR
    design: list[int] = []
    best = 0
    while len(design) < min(count, len(draws)):
        design.append(best)
        # Sherman and Morrison: the inverse after one more row, and every leverage under it.
        v = inverse @ x[best]
        scale = 1 + float(x[best] @ v)
        leverage -= (x @ v) ** 2 / scale
        inverse -= np.outer(v, v) / scale
        leverage[best] = -np.inf
        best = len(design) if len(design) < taken else int(np.argmax(np.round(leverage, 9)))
    return np.array(design, dtype=np.int64)


def spaced(draws: np.ndarray, count: int) -> np.ndarray:
    """`count` of `draws` (M, S), spaced evenly, the first and the last among them; all if there are no more."""
    return draws[np.unique(np.linspace(0, len(draws) - 1, min(count, len(draws))).round().astype(np.int64))]


def n_columns(n_sources: int) -> int:
    """P, columns of a design or a regression: each source, each pair unless they are too many, and one more."""
    full = 1 + n_sources + n_sources * (n_sources - 1) // 2
    return full if full <= MOST_COLUMNS else 1 + n_sources


def pairs(x: np.ndarray) -> np.ndarray:
    """The products of every two columns of x (K, S): (K, S (S - 1) / 2), or none, (K, 0), where they are too many."""
    n_sources = x.shape[1]
    if n_columns(n_sources) == 1 + n_sources:
        return x[:, :0]
    i, j = np.triu_indices(n_sources, k=1)
    return np.asarray(x[:, i] * x[:, j])


def _columns(draws: np.ndarray) -> np.ndarray:
    """One, each source, and each pair, on the scale -1 to 1; shape (M, P)."""
    lowest, highest = draws.min(axis=0), draws.max(axis=0)
    spread = np.where(highest > lowest, highest - lowest, 1.0)
    x = np.where(highest > lowest, 2 * (draws - lowest) / spread - 1, 1.0)
    return np.hstack([np.ones((len(x), 1)), x, PAIR_SCALE * pairs(x)])


def distinct(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows without repetitions, in order of first appearance, shape (M, S)."""
    seen: dict[bytes, np.ndarray] = {}
    for row in rows:
        seen.setdefault(np.ascontiguousarray(row).tobytes(), row)
    return np.array(list(seen.values()))
