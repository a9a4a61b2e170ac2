"""The subsets or mixtures of sources of the next trials."""

from __future__ import annotations

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.estimators.design import d_optimal, distinct_rows, spaced
from cads.policies.base import Policy
from cads.search.rungs import SAMPLED
from cads.search.source_choice import nonempty
from cads.search.space import SearchSpace
from cads.selectors.search.trials import TrialHistory


def sample_candidates(space: SearchSpace, policy: Policy, seed: int) -> np.ndarray:
    """Draws of the policy with its probabilities kept away from 0 and 1, shape (M, S)."""
    return nonempty(space.explore(policy).sample(SAMPLED, np.random.default_rng(seed))).astype(np.float64)


def initial_design(
    space: SearchSpace, sampled: np.ndarray, target_losses: np.ndarray, count: int, *, single: bool
) -> np.ndarray:
    """The draws of the first rung, the full pool first, shape (K, S), K <= `count`.

    The first draws leave out the sources of largest R (target_losses, shape (S,)), one after another. The rest are the
    most informative of the sampled candidates: a D-optimal design.

    Args:
        single: whether the source of least R is tried alone even if not all nested subsets can be tried. Models that
            memorise one source do better with two.
    """
    nested = space.nested(np.argsort(target_losses, kind="stable")) if target_losses.any() else space.full[None]
    if not single and 2 < count < len(nested):
        nested = nested[:-1]
    is_small = count <= len(space.sizes)
    nested = spaced(nested, count if is_small else max(1, count // 2))
    candidates = distinct_rows([*nested, *sampled])
    return candidates[d_optimal(candidates, count, taken=len(nested))]


def promote(
    space: SearchSpace, sampled: np.ndarray, control: ControlVariate, trials: TrialHistory, count: int
) -> np.ndarray:
    """The draws of a later rung, the full pool first, shape (K, S), K <= `count`.

    They are the best draw of the latest rung, and the candidates, sampled or tried before, with the best predicted
    objective. The neighbours of the best candidate come before the rest.
    """
    candidates = distinct_rows([*sampled, *trials.draws])
    ranked = candidates[np.argsort(trials.value(candidates, control), kind="stable")]
    tried = {row.tobytes() for row in trials.draws}
    neighbours = [row for row in space.neighbours(ranked[0], control) if row.tobytes() not in tried]
    draws, delta_objective = trials.latest
    return distinct_rows([space.full, draws[np.argmin(delta_objective)], ranked[0], *neighbours, *ranked[1:]])[:count]
