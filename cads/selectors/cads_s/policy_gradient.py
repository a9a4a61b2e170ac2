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
"""Largest change of a probability in a step of the policy; it falls to 0 over the steps after a rung."""
MAX_IMPORTANCE_RATIO = 5.0
"""Importance ratios of the current policy to the one that drew the masks are clipped at this."""


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
    """Move the policy by `steps` along the corrected gradient, on the trials of the latest rung.

    Importance ratios weigh the trials as the policy moves away from the one that drew them. The first draw is the full
    pool: the policy did not draw it, and it is not used as a sample. With fewer than two samples, the gradient is that
    of the control variate alone.
    """
    is_sample = np.isfinite(delta_objective)
    is_sample[0] = False
    if isinstance(policy, BernoulliPolicy):
        is_sample &= np.isin(draws, (0, 1)).all(axis=1)
        draws = draws.astype(bool)
    draws, delta_objective = draws[is_sample], delta_objective[is_sample]
    control_values = control(draws, fidelity)
    start_log_prob = space.explore(policy).log_prob(draws)
    masks = None
    if isinstance(policy, BernoulliPolicy) and policy.n <= ENUMERATED:
        masks = enumerate_masks(policy.n)
        values = np.empty(len(masks))
        values[1:] = control(masks[1:])
        values[0] = values[1:].max()
    for step in range(steps):
        explored = space.explore(policy)
        ratio = np.minimum(np.exp(explored.log_prob(draws) - start_log_prob), MAX_IMPORTANCE_RATIO)
        if masks is not None:
            slope = expected_gradient(values, source_marginals(explored))
        else:
            sampled = nonempty(explored.sample(SAMPLED, np.random.default_rng(derive(seed, "control", step))))
            slope = direct(control(sampled), explored.score(sampled))
        gradient = slope
        if len(draws) >= 2:
            gradient = corrected(delta_objective, control_values, slope, ratio[:, None] * explored.score(draws))
        largest = float(np.abs(gradient).max())
        if largest == 0:
            break
        policy.step(gradient / largest, POLICY_STEP * (1 - step / steps))
    return policy
