"""Direct bilevel selection of sources: every outer step trains K masks for all of C (PBCS, Zhou et al., ICML 2022).

    g = 1/(K - 1) sum_k (F_k - mean F) grad_s log p(m_k; s),   F_k = L_val(theta_C(m_k))

theta_C(m) is the model trained on mask m for the training budget C, and s are the policy's probabilities. CADS is
measured against this search: it assumes and approximates nothing, but spends K C in each outer step.

The recipe of PBCS is that of its authors' code (github.com/x-zho14/Probabilistic-Bilevel-Coreset-Selection): the
gradient is clipped, Adam's rate falls along a cosine, and the largest expected size falls to the one that is wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np

from baselines.search.adam import FLOPS as ADAM_FLOPS
from baselines.search.adam import Adam
from baselines.search.source_search import RungSearch, threshold, train_draws
from cads.errors import ConfigError
from cads.estimators.score_function import Baseline, direct
from cads.policies.annealing import annealed_size, cosine
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import project_capped_simplex
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.source_choice import nonempty
from cads.search.space import SearchSpace
from cads.seeding import derive

RATE = 5e-2
"""Adam's learning rate for s, from the PBCS recipe."""
CLIP_NORM = 3.0
"""Largest norm of a gradient, from the PBCS recipe."""
START = 0.5
"""Each probability at the start."""
SCORE_FLOPS = 6
"""FLOPs per entry of a mask: 4 for its score, 2 to weight and sum it."""
CLIP_FLOPS = 3
"""FLOPs per source: square, sum, scale."""
OVERSAMPLING = 64
"""Masks drawn for each one needed, since empty masks are dropped."""


@dataclass
class Bilevel(RungSearch):
    """Projected Adam steps on score-function gradients of the true bilevel objective."""

    draws: int = 5
    """K, the number of masks trained in each outer step."""
    share: float = 1.0
    """Share of C for which each mask is trained."""
    cap: float | None = None
    """Largest expected number of sources, sum(s), at the end; it falls from half of them. Null for no limit."""
    baseline: Baseline = "loo"
    """Subtracted from each value: the mean of the other values ("loo"), of all values ("mean"), or nothing ("none")."""

    method: ClassVar[str] = "bilevel"
    default_allowance: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # One draw minus its own mean is zero, and with one draw there are no others to average.
        if self.draws < (min_draws := 1 if self.baseline == "none" else 2):
            raise ConfigError(
                f"draws = {self.draws}: with baseline = {self.baseline!r} it must be at least {min_draws}"
            )
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and at most 1")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap > 0):
            raise ConfigError(f"cap = {self.cap}: it must be positive and finite, or null")
        if self.baseline not in get_args(Baseline):
            raise ConfigError(f"baseline = {self.baseline!r}: choose from {list(get_args(Baseline))}")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """One rung of K masks for each outer step that the allowance buys."""
        flops = self.share * train_flops
        if flops < costs.step_flops * (1 - 1e-9):
            return []
        steps = int(allowance / (self.draws * (flops + costs.measuring_flops)))
        return [Rung(self.share, flops, 1.0, self.draws)] * steps

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of a score-function gradient, its clipping and a step of Adam."""
        return float(len(space.sizes) * (SCORE_FLOPS * self.draws + CLIP_FLOPS + ADAM_FLOPS))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Take outer steps from s = 1/2, then keep the sources with s > 1/2, and at least the likeliest source."""
        n = len(space.sizes)
        policy, adam = BernoulliPolicy(np.full(n, START)), Adam(n)
        rungs = self.rungs(inner, space, train_flops)
        for step, rung in enumerate(rungs):
            progress = step / len(rungs)
            rng = np.random.default_rng(derive(seed, "masks", step))
            masks = nonempty(policy.sample(OVERSAMPLING * self.draws, rng))[: self.draws]
            # If s is so low that almost all masks are empty, masks of the likeliest source alone fill the gap.
            likeliest = np.arange(n) == np.argmax(policy.probabilities)
            masks = np.concatenate([masks, np.tile(likeliest, (self.draws - len(masks), 1))])
            runs = train_draws(inner, space, masks.astype(np.float64), rung, derive(seed, "outer", step), rung.stage)
            values, finite = runs.objective, np.isfinite(runs.objective)
            values = np.where(finite, values, values[finite].max())
            gradient = clipped(direct(values, policy.score(masks), self.baseline))
            policy.cap = self._cap_at(progress, n)
            policy.step(adam(gradient), RATE * cosine(progress))
            inner.learn(self.learning(space, self.draws))
            inner.monitor.scalar("outer/objective", float(np.mean(values)), step)
            inner.monitor.probabilities(space.pool.source_names, policy.probabilities, step)
        if self.cap is not None:
            # With few outer steps the last of them comes before the end of the annealing.
            policy = BernoulliPolicy(project_capped_simplex(policy.probabilities, self.cap), cap=self.cap)
        return threshold(policy.probabilities), policy

    def _cap_at(self, progress: float, n: int) -> float | None:
        """The largest expected size at a share `progress` of the outer steps; None: no limit."""
        return None if self.cap is None else annealed_size(max(self.cap, START * n), self.cap, progress)


def clipped(gradient: np.ndarray) -> np.ndarray:
    """The gradient with a norm of at most `CLIP_NORM`."""
    norm = float(np.linalg.norm(gradient))
    return gradient * (CLIP_NORM / norm) if norm > CLIP_NORM else gradient
