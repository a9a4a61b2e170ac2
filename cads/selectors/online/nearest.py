"""Texts of the pool that are of the target's kind: as near to the target as its own texts are to each other.

Texts are compared by the cosine of their tokens: the square roots of the shares, weighed by how rare each token is. The
nearness of a text is its cosine with the k-th nearest of the n texts of the target, k = `NEIGHBOURS` n. A text of the
pool passes if it is nearer than the least near `LEVEL` of the target are to the rest of the target: the conformal test
of novelty by nearest neighbours (Laxhammar and Falkman 2010). Of texts that come from where the target comes from about
`LEVEL` fail, and more where the target has fewer than 40. A text that shares no token with its neighbours never passes.

A few texts of the target that are unlike all others would let everything pass. So the test may be stricter: it has the
threshold that best tells the target from what is unlike it, by Youden's index (1950),

    max_t  P( nearness of a text of the target >= t ) - P( nearness of an unlike text >= t )

It is the same threshold if some of the unlike texts are of the target's kind after all.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

NEIGHBOURS = 0.1
"""Share of the target that a text must be near to."""
LEVEL = 0.05
"""Share of texts of the target's kind that do not pass, about."""
MOST = 512
"""Texts of the target that others are compared with, at most."""


class Nearness:
    """Nearness to texts of the target.

    Args:
        target: shares of tokens of these texts, shape (n, D); at least two, `MOST` at most.
        pool: the same of a sample of the pool; both say how rare a token is.
        unlike: which of that sample are unlike the target, as far as is known; bool, shape (n,).

    Attributes:
        least: the nearness from which a text passes, a cosine.
    """

    def __init__(self, target: np.ndarray, pool: np.ndarray, unlike: np.ndarray) -> None:
        with_token = np.count_nonzero(target, axis=0) + np.count_nonzero(pool, axis=0)
        self._rarity = np.log((1 + len(target) + len(pool)) / (1 + with_token))
        self._target = self._vectors(target)
        self._k = max(1, round(NEIGHBOURS * len(target)))
        cosines = self._cosines(target)
        np.fill_diagonal(cosines, -1.0)
        own = self._of_kth(cosines)
        self.least = float(np.quantile(own, LEVEL))
        if unlike.any():
            self.least = youden(own, self._of_kth(self._cosines(pool[unlike])), self.least)

    def passes(self, shares: np.ndarray) -> np.ndarray:
        """Whether texts with these shares of tokens, shape (n, D), are of the target's kind; bool, shape (n,)."""
        nearness = self._of_kth(self._cosines(shares))
        return np.asarray((nearness >= self.least) & (nearness > 0))

    def _vectors(self, shares: np.ndarray) -> csr_array:
        x = csr_array(shares, dtype=np.float64)
        x.data = np.sqrt(x.data) * self._rarity[x.indices]
        norms = np.sqrt(x.power(2).sum(axis=1))
        x.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(x.indptr))
        return x

    def _cosines(self, shares: np.ndarray) -> np.ndarray:
        return np.asarray((self._vectors(shares) @ self._target.T).toarray())

    def _of_kth(self, cosines: np.ndarray) -> np.ndarray:
        return np.partition(cosines, -self._k, axis=1)[:, -self._k]


def youden(own: np.ndarray, others: np.ndarray, least: float) -> float:
    """The threshold, `least` or one of `own` above it, that best tells `own` from `others`; the lowest of equals."""
    thresholds = np.concatenate([[least], np.sort(own[own > least])])
    below = [np.searchsorted(np.sort(x), thresholds) for x in (own, others)]
    return float(thresholds[np.argmax(below[1] * len(own) - below[0] * len(others))])


def nearness_flops(n: int, n_target: int, n_tokens: float) -> float:
    """FLOPs of comparing `n` texts of `n_tokens` tokens, and the target itself: for each token 4, and 2 for each pair.

    All texts are charged for, since which are compared is not known beforehand.
    """
    compared = min(MOST, n_target)
    return n_tokens * (4 + 2 * compared) * (n + compared)
