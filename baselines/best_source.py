"""The best single source, by a trial on each: what a user without a selector would try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.search.source_search import RungSearch, best_of_runs, fidelity, train_draws
from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.seeding import derive


@dataclass
class BestSource(RungSearch):
    """Trains on each source alone for a share of the training budget C, and returns the best on the target."""

    share: float = 0.25
    """Share of C for which each source is trained; raised to 40 steps, but never above what the allowance buys."""

    method: ClassVar[str] = "best-source"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and at most 1")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """One rung, with a trial for each source."""
        n = len(space.sizes)
        affordable_share = (allowance / n - costs.measuring_flops) / train_flops
        share = min(fidelity(costs, train_flops, self.share), affordable_share)
        if share * train_flops < costs.step_flops:
            return []
        return [Rung(share, share * train_flops, share, n)]

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train on each source and take the best."""
        (rung,) = self.rungs(inner, space, train_flops)
        masks = np.eye(len(space.sizes))
        runs = train_draws(inner, space, masks, rung, derive(seed, "runs"), rung.stage)
        best = masks[best_of_runs(runs.objective)]
        return best, BernoulliPolicy(best)
