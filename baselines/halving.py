"""Successive halving over masks of sources: the bar that a policy gradient has to earn its place against.

Random masks on a small share of the data and of C, a ridge regression on sources and pairs of them, fewer masks on
twice as much, again, and the best of the last is returned. The full pool is among them throughout, and everything is
measured relative to it at the same fidelity (Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943, for the halving).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.search.ridge import Ridge, pairs_flops, predict, with_pairs
from baselines.search.source_search import RungSearch, best_of_runs, fidelity, random_masks, train_draws
from cads.estimators.design import distinct
from cads.estimators.enumeration import enumerate_masks
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.base import check_reference
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.seeding import derive

LADDER = ((1 / 16, 16), (1 / 8, 7), (1 / 4, 4))
"""Shares of C (and of each source), and how many masks are trained for each: 2.875 C in all."""
ENUMERATED, SAMPLED = 12, 4096
"""Up to this many sources every mask is predicted; above, this many random ones."""


@dataclass
class Halving(RungSearch):
    """16 masks at C/16, 7 at C/8, 4 at C/4, or in that proportion what the allowance buys."""

    method: ClassVar[str] = "halving"
    default_allowance: ClassVar[float] = 3.0

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """The rungs, each of at least two masks; the last are left out where the allowance does not buy them.

        Shares that come to the same number of steps, the least there may be, are one rung.
        """
        most = _count(space)
        for rung_index in range(len(LADDER), 0, -1):
            kept = LADDER[:rung_index]
            whole = sum(share * count for share, count in kept)
            parts: dict[float, float] = {}
            for share, count in kept:
                f = fidelity(costs, train_flops, share)
                parts[f] = parts.get(f, 0.0) + allowance * share * count / whole
            rungs = [
                Rung(f, f * train_flops, f, min(most, int(part / (f * train_flops + costs.measuring_flops))))
                for f, part in parts.items()
            ]
            if all(rung.n_trials >= 2 for rung in rungs):
                return rungs
        return []

    def learning(self, space: SearchSpace, runs: int) -> float:
        """The regression, and its prediction for all masks."""
        return pairs_flops(len(space.sizes), runs, _count(space))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Rung by rung, the full pool first in each."""
        everything = _all(space)
        draws, delta_objective, trust = np.empty((0, len(space.sizes))), np.empty(0), np.empty(0)
        masks = here = np.empty((0, 0))
        predicted = np.empty(0)
        for rung_index, rung in enumerate(self.rungs(inner, space, train_flops)):
            if rung_index == 0:
                masks = random_masks(space, rung.n_trials, derive(seed, "masks"), full_first=True)
            else:
                ranked = everything[np.argsort(predicted, kind="stable")]
                masks = distinct([space.full, *ranked])[: rung.n_trials]
            runs = train_draws(inner, space, masks, rung, derive(seed, "rung", rung_index), rung.stage)
            check_reference(float(runs.objective[0]), rung.stage)
            here = runs.objective - runs.objective[0]
            draws, delta_objective = np.concatenate([draws, masks]), np.concatenate([delta_objective, here])
            trust = np.concatenate([trust, np.full(len(masks), rung.fidelity)])
            predicted = predict(Ridge(with_pairs(draws), delta_objective, trust), everything, with_pairs)
            inner.learn(self.learning(space, len(delta_objective)))
            inner.monitor.scalar(
                "outer/best_gain", float(np.min(here, initial=0.0, where=np.isfinite(here))), rung_index
            )
        best = masks[best_of_runs(here)]
        return best, BernoulliPolicy(best)


def _count(space: SearchSpace) -> int:
    """How many masks are predicted."""
    n = len(space.sizes)
    return 2**n - 1 if n <= ENUMERATED else SAMPLED


def _all(space: SearchSpace) -> np.ndarray:
    """The masks that are predicted, float, shape (M, S); at random, some may be there twice."""
    n = len(space.sizes)
    if n <= ENUMERATED:
        return enumerate_masks(n)[1:].astype(np.float64)
    masks = np.random.default_rng(0).random((SAMPLED, n)) < 0.5
    masks[~masks.any(axis=1)] = True
    return masks.astype(np.float64)
