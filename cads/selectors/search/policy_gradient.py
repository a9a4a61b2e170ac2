"""Moving a source policy along the gradient of the regression h, with what h leaves of the trials.

    g = grad_s E[h] + 1/(K - 1) sum_k (F_k - h_k - mean (F - h)) score_k

The second term would make g an unbiased estimate of grad_s E[F] if the K draws were independent draws from the policy
and h were fitted to others (`cads.estimators.score_function.corrected`). Here neither holds. The draws are nested,
D-optimal, or the best so far, since they must find a good subset; and h is fitted to them, since there are no others.
So g is the gradient of a regression, moved towards the trials where it does not fit them. It is biased by all that h
errs where nothing was tried: by 0.2 to 0.8 of the gradient's length in the first rung, in worlds that can be enumerated
(`tests/selectors/test_policy_gradient.py`).
"""

from __future__ import annotations

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.estimators.enumeration import enumerate_masks, expected_gradient
from cads.estimators.score_function import corrected, direct
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import Floats
from cads.search.rungs import ENUMERATED, SAMPLED
from cads.search.source_choice import nonempty, source_marginals
from cads.search.space import SearchSpace
from cads.seeding import derive

POLICY_STEP = 0.05
"""Largest change of a probability in a step of the policy; it falls to 0 over the steps after a rung."""
MAX_IMPORTANCE_RATIO = 5.0
"""Importance ratios of the current policy to the one before the rung are clipped at this."""


class RegressionGradient:
    """The gradient g of the regression and of its residuals on the trials of the latest rung.

    Importance ratios weigh the residuals as the policy moves. The first draw is the full pool, which no policy
    proposed: it has no part in the residuals. With fewer than two other draws, g is the gradient of E[h] alone.

    Args:
        space: of the draws.
        policy: before the rung.
        control: h.
        draws: of the rung, shape (K, S), the full pool first. delta_objective: F of each, shape (K,).
        fidelity: of the rung.
        seed: of the draws for grad E[h], where masks are too many to enumerate.
    """

    def __init__(
        self,
        space: SearchSpace,
        policy: Policy,
        control: ControlVariate,
        draws: np.ndarray,
        delta_objective: np.ndarray,
        fidelity: float,
        seed: int,
    ) -> None:
        is_sample = np.isfinite(delta_objective)
        is_sample[0] = False
        if isinstance(policy, BernoulliPolicy):
            is_sample &= np.isin(draws, (0, 1)).all(axis=1)
            draws = draws.astype(bool)
        self._space, self._control, self._seed = space, control, seed
        self._draws, self._values = draws[is_sample], delta_objective[is_sample]
        self._predicted = control(self._draws, fidelity)
        self._start_log_prob = space.explore(policy).log_prob(self._draws)
        self._enumerated: np.ndarray | None = None
        if isinstance(policy, BernoulliPolicy) and policy.n <= ENUMERATED:
            masks = enumerate_masks(policy.n)
            values = np.empty(len(masks))
            values[1:] = control(masks[1:])
            values[0] = np.max(values[1:])
            self._enumerated = values

    def of_regression(self, policy: Policy, step: int = 0) -> Floats:
        """The gradient of E[h] in the parameters of `policy`, as explored, shape (S,); sampled anew in each `step`."""
        explored = self._space.explore(policy)
        if self._enumerated is not None:
            return expected_gradient(self._enumerated, source_marginals(explored))
        rng = np.random.default_rng(derive(self._seed, "control", step))
        sampled = nonempty(explored.sample(SAMPLED, rng))
        return direct(self._control(sampled), explored.score(sampled))

    def at(self, policy: Policy, step: int = 0) -> Floats:
        """g at `policy`, shape (S,)."""
        slope = self.of_regression(policy, step)
        if len(self._draws) < 2:
            return slope
        explored = self._space.explore(policy)
        ratio = np.minimum(np.exp(explored.log_prob(self._draws) - self._start_log_prob), MAX_IMPORTANCE_RATIO)
        return corrected(self._values, self._predicted, slope, ratio[:, None] * explored.score(self._draws))


def ascend_policy(policy: Policy, gradient: RegressionGradient, steps: int) -> Policy:
    """Move the policy by `steps` along the gradient."""
    for step in range(steps):
        g = gradient.at(policy, step)
        largest = float(np.abs(g).max())
        if largest == 0:
            break
        policy.step(g / largest, POLICY_STEP * (1 - step / steps))
    return policy
