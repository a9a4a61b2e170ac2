"""Random search: the best of J random subsets of the sources, without any model of the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.search.source_search import RungSearch, best_of_runs, fidelity, random_masks, train_draws
from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.seeding import derive


@dataclass
class BestOf(RungSearch):
    """Trains as many random masks as the allowance buys, the full pool included, and returns the best on the target."""

    share: float = 0.25
    """Share of the training budget C for which each mask is trained; raised where it would be fewer than 40 steps."""

    method: ClassVar[str] = "best-of"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and at most 1")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """One rung of J masks."""
        share = fidelity(costs, train_flops, self.share)
        runs = int(allowance / (share * train_flops + costs.measuring_flops))
        runs = runs if space.count is None else min(runs, space.count)
        return [Rung(share, share * train_flops, share, runs)] if runs >= 2 else []

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train all masks and take the best."""
        (rung,) = self.rungs(inner, space, train_flops)
        masks = random_masks(space, rung.n_trials, derive(seed, "masks"), full_first=True)
        runs = train_draws(inner, space, masks, rung, derive(seed, "runs"), rung.stage)
        best = masks[best_of_runs(runs.objective)]
        return best, BernoulliPolicy(best)
