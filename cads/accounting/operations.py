"""What the work around a model costs in closed form: projections, similarities, BM25, clusters, policy updates.

One FLOP is one addition, multiplication, division, root or exponential of two numbers; comparisons and look-ups
are free.
"""

from __future__ import annotations

from cads.errors import ConfigError

ADAM_DIRECTION_FLOPS = 10
"""Per parameter: first moment 3, second moment 4, epsilon, root and division."""
BM25_WEIGHT_FLOPS = 7
"""Per posting: `idf tf (k1 + 1) / (tf + k1 (1 - b + b l / mean l))`, with the last factor computed once a text."""
CANDIDATE_FLOPS = 15
"""Per example: the signal 2, its mean 1 and deviation 4, standardised 2, the step 2, the logistic function 4."""
CONTROL_FLOPS = 4
"""Per feature of a draw: computed, standardised (2) and weighed."""


def projection_flops(n: float, dimension: float, projected: float) -> float:
    """n dense projections of vectors in `dimension` to `projected`: 2 n D d."""
    return 2 * _count(n, "n") * _count(dimension, "dimension") * _count(projected, "projected")


def sketch_flops(n: float, dimension: float, nonzeros: int = 1) -> float:
    """n sparse projections (CountSketch, SJLT): each entry is signed and added to `nonzeros` places."""
    return 2 * _count(n, "n") * _count(dimension, "dimension") * _count(nonzeros, "nonzeros")


def normalisation_flops(n: float, dimension: float) -> float:
    """n vectors divided by their norms: square, sum and divide."""
    return 3 * _count(n, "n") * _count(dimension, "dimension")


def similarity_flops(n_queries: float, n_items: float, dimension: float) -> float:
    """All inner products of queries and items: 2 m n d."""
    return 2 * _count(n_queries, "n_queries") * _count(n_items, "n_items") * _count(dimension, "dimension")


def kmeans_flops(n: float, n_clusters: float, dimension: float, rounds: int) -> float:
    """k-means of n vectors, by k-means++ and Lloyd: all distances once, and distances and means in each round."""
    distances = similarity_flops(n_clusters, n, dimension)
    return distances + _count(rounds, "rounds") * (distances + n * dimension)


def bm25_flops(n_postings: float, n_matches: float) -> float:
    """Okapi BM25: the weight of each posting (a distinct term of a text), then its sum over the queries.

    Args:
        n_postings: distinct terms, summed over the texts; at most the tokens of the pool.
        n_matches: pairs of a query term and a posting of that term; a repeated query term counts again.
    """
    return BM25_WEIGHT_FLOPS * _count(n_postings, "n_postings") + 2 * _count(n_matches, "n_matches")


def adam_direction_flops(n: float, dimension: float) -> float:
    """n gradients turned into the directions that Adam's moments give them (LESS)."""
    return ADAM_DIRECTION_FLOPS * _count(n, "n") * _count(dimension, "dimension")


def candidates_flops(n_examples: float, n_candidates: float) -> float:
    """CADS-E: the probability of every example under every candidate policy."""
    return CANDIDATE_FLOPS * _count(n_examples, "n_examples") * _count(n_candidates, "n_candidates")


def regression_flops(n_rows: float, n_columns: float) -> float:
    """A ridge regression by a thin singular value decomposition, `6 m n^2 + 20 n^3` for m >= n.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, figure 8.6.1.
    """
    m, n = max(n_rows, n_columns), min(n_rows, n_columns)
    return 6 * _count(m, "m") * _count(n, "n") ** 2 + 20 * n**3


def source_policy_flops(n_sources: int, n_features: int, n_drawn: int, n_runs: float, steps: int) -> float:
    """CADS-S: a policy over S sources, moved by `steps` corrected gradients after a rung of short runs.

    A round number, on which the lengths of searches depend: a regression on P columns, which is read off anew in each
    step. `cads.estimators.control_variate` has 2P columns (phi, and phi log f) and l* is fitted besides, in as many
    unknowns as there are
    runs; where masks are enumerated, on the other hand, all of them are read off once.

    Args:
        n_sources: S. n_features: P, of the control variate.
        n_drawn: draws on which the control is evaluated for its own gradient.
        n_runs: short runs so far. steps: of the policy.
    """
    s, p = _count(n_sources, "n_sources"), _count(n_features, "n_features")
    control = CONTROL_FLOPS * _count(n_drawn, "n_drawn") * p
    gradient = n_drawn * s * (s + 1)
    corrected = 9 * _count(n_runs, "n_runs") * s
    return regression_flops(n_runs, p) + control + _count(steps, "steps") * (control + gradient + corrected)


def design_flops(n_draws: float, n_columns: float, n_taken: float) -> float:
    """CADS-S: a D-optimal design of some draws, by rank-one updates of the inverse and of every leverage."""
    m, p = _count(n_draws, "n_draws"), _count(n_columns, "n_columns")
    return 2 * m * p + _count(n_taken, "n_taken") * (4 * p**2 + 2 * m * p + 3 * m)


def _count(value: float, name: str) -> float:
    if not value >= 0:
        raise ConfigError(f"{name} = {value}: it must be >= 0")
    return value
