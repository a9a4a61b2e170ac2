"""Direct bilevel selection of sources: every outer step trains K masks for all of C (PBCS, Zhou et al., ICML 2022).

    g = 1/(K - 1) sum_k (F_k - mean F) grad_s log p(m_k; s),   F_k = L_val(theta_C(m_k))

This is what CADS is measured against: nothing is assumed and nothing is approximated, but K C is spent a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np

from baselines.search.adam import FLOPS as ADAM_FLOPS
from baselines.search.adam import Adam
from baselines.search.source_search import RungSearch, kept, train_draws
from cads.errors import ConfigError
from cads.estimators.score_function import Baseline, direct
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import project_capped_simplex
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.source_selection import nonempty
from cads.search.space import SearchSpace
from cads.seeding import derive

RATE = 5e-2
"""Adam's rate for s, of the PBCS recipe."""
SCORE_FLOPS = 6
"""Per entry of a mask: its score 4, weighed and summed 2."""
REDRAWN = 64
"""Masks drawn for each one wanted, since the empty one is passed over."""


@dataclass
class Bilevel(RungSearch):
    """Score-function gradients of the true bilevel objective, and projected Adam steps on them."""

    draws: int = 5
    """K, masks that are trained in each outer step."""
    share: float = 1.0
    """Share of C for which each is trained."""
    cap: float | None = None
    """Largest expected number of sources, sum(s); null for no limit."""
    baseline: Baseline = "loo"
    """What is subtracted from each value: the mean of the others, of all ("mean"), or nothing ("none")."""

    method: ClassVar[str] = "bilevel"
    default_allowance: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # The mean of one value is that value, and of the others there are none.
        if self.draws < (least := 1 if self.baseline == "none" else 2):
            raise ConfigError(f"draws = {self.draws}: with baseline = {self.baseline!r} it must be at least {least}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and at most 1")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap > 0):
            raise ConfigError(f"cap = {self.cap}: it must be positive and finite, or null")
        if self.baseline not in get_args(Baseline):
            raise ConfigError(f"baseline = {self.baseline!r}: choose from {list(get_args(Baseline))}")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """As many outer steps as the allowance buys."""
        flops = self.share * train_flops
        if flops < costs.step_flops * (1 - 1e-9):
            return []
        steps = int(allowance / (self.draws * (flops + costs.measuring_flops)))
        return [Rung(self.share, flops, 1.0, self.draws)] * steps

    def learning(self, space: SearchSpace, runs: int) -> float:
        """A score-function gradient and a step of Adam."""
        return float(len(space.sizes) * (SCORE_FLOPS * self.draws + ADAM_FLOPS))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Outer steps from s = 1/2; the sources with s > 1/2, and at least the likeliest."""
        n = len(space.sizes)
        start = project_capped_simplex(np.full(n, 0.5), n if self.cap is None else self.cap)
        policy, adam = BernoulliPolicy(start, cap=self.cap), Adam(n)
        for step, rung in enumerate(self.rungs(inner, space, train_flops)):
            rng = np.random.default_rng(derive(seed, "masks", step))
            masks = nonempty(policy.sample(REDRAWN * self.draws, rng))[: self.draws]
            # Where s is so low that hardly a mask is not empty, the likeliest source stands in.
            likeliest = np.arange(n) == np.argmax(policy.probabilities)
            masks = np.concatenate([masks, np.tile(likeliest, (self.draws - len(masks), 1))])
            runs = train_draws(inner, space, masks.astype(np.float64), rung, derive(seed, "outer", step), rung.stage)
            values, sound = runs.objective, np.isfinite(runs.objective)
            values = np.where(sound, values, values[sound].max())
            policy.step(adam(direct(values, policy.score(masks), self.baseline)), RATE)
            inner.learn(self.learning(space, self.draws))
            inner.monitor.scalar("outer/objective", float(np.mean(values)), step)
            inner.monitor.probabilities(space.pool.source_names, policy.probabilities, step)
        return kept(policy.probabilities), policy
