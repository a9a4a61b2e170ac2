"""Which subsets or mixtures of sources to try next."""

from __future__ import annotations

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.estimators.design import d_optimal, distinct, spaced
from cads.policies.base import Policy
from cads.search.rungs import SAMPLED
from cads.search.source_choice import nonempty
from cads.search.space import SearchSpace
from cads.selectors.cads_s.trials import TrialHistory


def sample_candidates(space: SearchSpace, policy: Policy, seed: int) -> np.ndarray:
    """What a policy that is kept away from certainty draws, shape (M, S)."""
    return nonempty(space.explore(policy).sample(SAMPLED, np.random.default_rng(seed))).astype(np.float64)


def initial_design(
    space: SearchSpace, sampled: np.ndarray, risk: np.ndarray, count: int, *, single: bool
) -> np.ndarray:
    """The draws of the first rung, the full pool first, shape (K, S), K <= `count`.

    The first draws leave out the sources of largest risk (shape (S,)), one after another. The rest are those of the
    sampled candidates from which most can be learned: a D-optimal design.

    Args:
        single: whether the source of least risk is tried alone even where not all nested subsets can be tried. Models
            that learn it by heart do better with two.
    """
    nested = space.nested(np.argsort(risk, kind="stable")) if risk.any() else space.full[None]
    if not single and 2 < count < len(nested):
        nested = nested[:-1]
    is_small = count <= len(space.sizes)
    nested = spaced(nested, count if is_small else max(1, count // 2))
    candidates = distinct([*nested, *sampled])
    return candidates[d_optimal(candidates, count, taken=len(nested))]


def promote(
    space: SearchSpace, sampled: np.ndarray, control: ControlVariate, trials: TrialHistory, count: int
) -> np.ndarray:
    """The draws of a later rung, the full pool first, shape (K, S), K <= `count`.

    They are the best of the latest rung, and the candidates, sampled or tried before, that promise most. The neighbours
    of the most promising one come before the rest.
    """
    candidates = distinct([*sampled, *trials.draws])
    ranked = candidates[np.argsort(trials.value(candidates, control), kind="stable")]
    tried = {row.tobytes() for row in trials.draws}
    near = [n for n in space.neighbours(ranked[0], control) if n.tobytes() not in tried]
    draws, delta_objective = trials.latest
    return distinct([space.full, draws[np.argmin(delta_objective)], ranked[0], *near, *ranked[1:]])[:count]
