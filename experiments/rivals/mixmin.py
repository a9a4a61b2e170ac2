"""MixMin (Thudi et al., 2025, arXiv 2502.10510): the mixture of source models that fits the target best.

One small model is trained on each source. The best mixture of sources is taken to be that of the models' predictions,

    min_lambda  -mean_i log sum_k lambda_k p_k(y_i | x_i)   over the target,

a convex problem, which EM solves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cads.data.token_batches import by_id
from cads.errors import NonFiniteError, NotAffordableError
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.search.base import NO_SEARCH_AFFORDABLE
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, SearchSpace
from cads.search.stages import Stages, Trials, UpdatePolicy
from cads.seeding import derive
from cads.task import Objective
from experiments.rivals.mixtures import TRIAL_SHARE, MixtureRival
from experiments.rivals.subset import labels_of

LEAST_STEPS = 10
"""Fewest steps of the model of a source."""
ITERATIONS = 200
"""Of EM."""
DIVERGED = 50.0
"""Loss of a model that diverged, nats."""


@dataclass
class MixMin(MixtureRival):
    """A model of each source, trained for C/8 or what the allowance buys, and the convex fit of their mixture."""

    outer: str | Objective | None = "loss"
    """The loss of each example of the target, which is what the mixture is fitted to."""

    method: ClassVar[str] = "mixmin"

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """One trial for each source."""
        n_sources = len(space.sizes)
        allowed = (allowance - _fit_flops(costs, n_sources)) / n_sources - costs.measuring_flops
        flops = min(TRIAL_SHARE * train_flops, allowed)
        return [Rung(flops / train_flops, flops, 1.0, n_sources)] if flops >= LEAST_STEPS * costs.step_flops else []

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """The trials, and the fit; see `RungSearch`."""
        labels_of(costs.task, costs.task.pool)
        if not (rungs := self.rungs(costs, space, train_flops)):
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        yield Trials(rungs[0])
        yield UpdatePolicy(_fit_flops(costs, len(space.sizes)))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train, measure on the target, and fit."""
        (rung,), pool = self.rungs(inner, space, train_flops), inner.task.pool
        losses = np.full((len(inner.task.target), rung.n_trials), DIVERGED)
        for k, draw in enumerate(np.eye(rung.n_trials)):
            stream = space.stream(draw, by_id(pool), derive(seed, "source", k))
            try:
                measured = inner.run([stream], rung.flops, seed=derive(seed, "model"), stage=rung.stage).reference
            except NonFiniteError:
                continue
            if measured is not None and measured.by_example is not None:
                losses[:, k] = np.minimum(measured.by_example, DIVERGED)
        inner.learn(_fit_flops(inner, rung.n_trials))
        best = best_mixture(losses)
        return best, MixturePolicy(best, SIGMA)


def best_mixture(losses: np.ndarray) -> np.ndarray:
    """lambda of the best mixture of K models, shape (K,).

    Args:
        losses: -log p_k(y_i | x_i), nats, shape (n, K).
    """
    likelihood = np.exp(losses.min(axis=1, keepdims=True) - losses)
    mixture = np.full(losses.shape[1], 1 / losses.shape[1])
    for _ in range(ITERATIONS):
        joint = likelihood * mixture
        mixture = (joint / joint.sum(axis=1, keepdims=True)).mean(axis=0)
    return np.asarray(mixture)


def _fit_flops(costs: InnerLoopCosts, n_sources: int) -> float:
    """FLOPs of EM: product, sum, quotient and mean in each iteration."""
    return 4.0 * ITERATIONS * n_sources * len(costs.task.target)
