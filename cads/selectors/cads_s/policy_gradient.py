"""Moving a source policy along the corrected estimator."""

from __future__ import annotations

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.estimators.enumeration import enumerate_masks, expected_gradient
from cads.estimators.score_function import corrected, direct
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.rungs import ENUMERATED, SAMPLED
from cads.search.source_choice import nonempty, source_marginals
from cads.search.space import SearchSpace
from cads.seeding import derive

POLICY_STEP = 0.05
"""Length of the steps of the policy in the largest probability; it falls to 0 over those after a rung."""
MAX_IMPORTANCE_RATIO = 5.0
"""Importance ratios above it are cut off, when a policy has moved away from where its masks were drawn."""


def ascend_policy(
    space: SearchSpace,
    policy: Policy,
    control: ControlVariate,
    draws: np.ndarray,
    delta_objective: np.ndarray,
    fidelity: float,
    steps: int,
    seed: int,
) -> Policy:
    """Move the policy by `steps` along the corrected gradient, on the latest runs, weighted as it moves away from them.

    The first draw is the full pool, which the policy did not propose: it is no sample. With fewer than two
    samples the control variate is all there is.
    """
    sound = np.isfinite(delta_objective)
    sound[0] = False
    if isinstance(policy, BernoulliPolicy):
        sound &= np.isin(draws, (0, 1)).all(axis=1)
        draws = draws.astype(bool)
    draws, delta_objective = draws[sound], delta_objective[sound]
    held = control(draws, fidelity)
    start = space.explore(policy).log_prob(draws)
    masks = None
    if isinstance(policy, BernoulliPolicy) and policy.n <= ENUMERATED:
        masks = enumerate_masks(policy.n)
        values = np.empty(len(masks))
        values[1:] = control(masks[1:])
        values[0] = values[1:].max()
    for step in range(steps):
        here = space.explore(policy)
        ratio = np.minimum(np.exp(here.log_prob(draws) - start), MAX_IMPORTANCE_RATIO)
        if masks is not None:
            slope = expected_gradient(values, source_marginals(here))
        else:
            drawn = nonempty(here.sample(SAMPLED, np.random.default_rng(derive(seed, "control", step))))
            slope = direct(control(drawn), here.score(drawn))
        gradient = slope
        if len(draws) >= 2:
            gradient = corrected(delta_objective, held, slope, ratio[:, None] * here.score(draws))
        largest = float(np.abs(gradient).max())
        if largest == 0:
            break
        policy.step(gradient / largest, POLICY_STEP * (1 - step / steps))
    return policy
