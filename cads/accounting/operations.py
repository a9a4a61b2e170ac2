"""FLOPs of the work outside the model in closed form: projections, similarities, BM25, clusters, policy updates.

One addition, multiplication, division, root or exponential is one FLOP. Comparisons and look-ups are free.
"""

from __future__ import annotations

from cads.errors import ConfigError

ADAM_DIRECTION_FLOPS = 10
"""Per parameter: first moment 3, second moment 4, epsilon, root and division."""
BM25_WEIGHT_FLOPS = 7
"""Per posting: `idf tf (k1 + 1) / (tf + k1 (1 - b + b l / mean l))`, `1 - b + b l / mean l` once a text."""
CONTROL_FLOPS = 4
"""Per feature of a draw: computation 1, standardisation 2, weighting 1."""


def projection_flops(n: float, dimension: float, projected: float) -> float:
    """n dense projections of vectors in `dimension` to `projected`: 2 n D d."""
    return 2 * _nonnegative(n, "n") * _nonnegative(dimension, "dimension") * _nonnegative(projected, "projected")


def sketch_flops(n: float, dimension: float, nonzeros: int = 1) -> float:
    """n sparse projections (CountSketch, SJLT): each entry is signed and added to `nonzeros` entries of the sketch."""
    return 2 * _nonnegative(n, "n") * _nonnegative(dimension, "dimension") * _nonnegative(nonzeros, "nonzeros")


def normalisation_flops(n: float, dimension: float) -> float:
    """n vectors divided by their norms: square, sum and division."""
    return 3 * _nonnegative(n, "n") * _nonnegative(dimension, "dimension")


def similarity_flops(n_queries: float, n_items: float, dimension: float) -> float:
    """All inner products of queries and items: 2 m n d."""
    return (
        2
        * _nonnegative(n_queries, "n_queries")
        * _nonnegative(n_items, "n_items")
        * _nonnegative(dimension, "dimension")
    )


def kmeans_flops(n: float, n_clusters: float, dimension: float, rounds: int) -> float:
    """k-means of n vectors: all distances once for k-means++, then distances and means in each round of Lloyd."""
    distances = similarity_flops(n_clusters, n, dimension)
    return distances + _nonnegative(rounds, "rounds") * (distances + n * dimension)


def bm25_flops(n_postings: float, n_matches: float) -> float:
    """Okapi BM25: the weight of each posting (a distinct term of a text), then the sum of weights for the queries.

    Args:
        n_postings: distinct terms, summed over the texts; at most the tokens of the pool.
        n_matches: pairs of a query term and a posting of that term; a repeated query term counts again.
    """
    return BM25_WEIGHT_FLOPS * _nonnegative(n_postings, "n_postings") + 2 * _nonnegative(n_matches, "n_matches")


def adam_direction_flops(n: float, dimension: float) -> float:
    """n gradients converted to update directions with the moments of Adam (LESS)."""
    return ADAM_DIRECTION_FLOPS * _nonnegative(n, "n") * _nonnegative(dimension, "dimension")


def regression_flops(n_rows: float, n_columns: float) -> float:
    """A ridge regression by a thin singular value decomposition, `6 m n^2 + 20 n^3` for m >= n.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, figure 8.6.1.
    """
    m, n = max(n_rows, n_columns), min(n_rows, n_columns)
    return 6 * _nonnegative(m, "m") * _nonnegative(n, "n") ** 2 + 20 * n**3


def source_policy_flops(n_sources: int, n_features: int, n_drawn: int, n_runs: float, steps: int) -> float:
    """`search`: a policy over S sources, updated by `steps` of the gradient after a rung of trials.

    This is an approximation, and the lengths of searches depend on it. It counts a regression on P columns, whose
    prediction is computed again in each step. `cads.estimators.control_variate` costs more: it has 2P columns (phi, and
    phi log f), and it also fits l*, the training loss within reach of the budget, with as many unknowns as trials.
    Enumerated masks cost less: the prediction for all of them is computed once.

    Args:
        n_sources: S.
        n_features: P, the number of features of the regression.
        n_drawn: draws on which the regression is evaluated for its own gradient.
        n_runs: number of trials so far.
        steps: number of policy updates.
    """
    s, p = _nonnegative(n_sources, "n_sources"), _nonnegative(n_features, "n_features")
    control = CONTROL_FLOPS * _nonnegative(n_drawn, "n_drawn") * p
    gradient = n_drawn * s * (s + 1)
    corrected = 9 * _nonnegative(n_runs, "n_runs") * s
    return regression_flops(n_runs, p) + control + _nonnegative(steps, "steps") * (control + gradient + corrected)


def design_flops(n_draws: float, n_columns: float, n_taken: float) -> float:
    """`search`: a D-optimal design of `n_taken` draws, by rank-one updates of the inverse and of every leverage."""
    m, p = _nonnegative(n_draws, "n_draws"), _nonnegative(n_columns, "n_columns")
    return 2 * m * p + _nonnegative(n_taken, "n_taken") * (4 * p**2 + 2 * m * p + 3 * m)


def _nonnegative(value: float, name: str) -> float:
    """The value, if it is at least 0.

    Raises:
        ConfigError: if it is not.
    """
    if not value >= 0:
        raise ConfigError(f"{name} = {value}: it must be >= 0")
    return value
