"""The guard's test: whether the best of several candidates is better than the full pool on the target."""

from __future__ import annotations

from scipy.stats import norm

SIGNIFICANCE_Z = 2.0
"""Standard errors by which a choice must beat the full pool. Trials on similar data differ by less than a target of a
few hundred examples can resolve."""


def critical_z(n_candidates: int) -> float:
    """Standard errors by which the best of `n_candidates` must beat the full pool; at least 1 candidate.

    If none is better, it does so no more often than a single one by `SIGNIFICANCE_Z` (Bonferroni's inequality, which
    holds however the candidates depend on each other).
    """
    return float(norm.isf(norm.sf(SIGNIFICANCE_Z) / n_candidates))


def beats_full_pool(delta_objective: float, stderr: float, n_candidates: int) -> bool:
    """Whether the best of `n_candidates` is better than the full pool by more than the target can tell by chance.

    Args:
        delta_objective: its objective less that of the full pool; NaN where it diverged.
        stderr: standard error of that difference over the examples of the target, which both trials share; 0 where the
            objective is not a mean over them: then any gain counts.
        n_candidates: that the search has looked at, in all rungs: all are measured on the same target.
    """
    return bool(delta_objective < 0 and delta_objective < -critical_z(n_candidates) * stderr)
