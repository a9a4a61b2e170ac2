"""Which subsets or mixtures of sources to try next."""

from __future__ import annotations

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.estimators.design import d_optimal, distinct, spaced
from cads.policies.base import Policy
from cads.search.rungs import SAMPLED
from cads.search.source_selection import nonempty
from cads.search.space import SearchSpace
from cads.selectors.cads_s.trials import TrialHistory


def sample_candidates(space: SearchSpace, policy: Policy, seed: int) -> np.ndarray:
    """What a policy that is kept away from certainty draws, shape (M, S)."""
    return nonempty(space.explore(policy).sample(SAMPLED, np.random.default_rng(seed))).astype(np.float64)


def initial_design(
    space: SearchSpace, proposed: np.ndarray, risk: np.ndarray, count: int, *, alone: bool
) -> np.ndarray:
    """The draws of the first rung, the full pool first, shape (K, S), K <= `count`.

    The sources without those of the largest risk (shape (S,)), one after another, and of those that the policy proposes
    the ones from which most can be learned besides.

    Args:
        alone: whether the source of least risk alone is tried in any case, or where all of them can be tried. Models
            that learn it by heart do better with two.
    """
    known = space.nested(np.argsort(risk, kind="stable")) if risk.any() else space.full[None]
    if not alone and 2 < count < len(known):
        known = known[:-1]
    few = count <= len(space.sizes)
    known = spaced(known, count if few else max(1, count // 2))
    candidates = distinct([*known, *proposed])
    return candidates[d_optimal(candidates, count, taken=len(known))]


def promote(
    space: SearchSpace, proposed: np.ndarray, control: ControlVariate, trials: TrialHistory, count: int
) -> np.ndarray:
    """The draws of a later rung, the full pool first, shape (K, S), K <= `count`.

    The best of the latest rung, and what promises most of what the policy proposes and of what was tried, with the
    neighbours of the very best.
    """
    candidates = distinct([*proposed, *trials.draws])
    ranked = candidates[np.argsort(trials.value(candidates, control), kind="stable")]
    tried = {row.tobytes() for row in trials.draws}
    near = [n for n in space.neighbours(ranked[0], control) if n.tobytes() not in tried]
    draws, delta_objective = trials.latest
    return distinct([space.full, draws[np.argmin(delta_objective)], ranked[0], *near, *ranked[1:]])[:count]
