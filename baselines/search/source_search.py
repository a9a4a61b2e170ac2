"""What the published ways of choosing sources share: a search paid from an allowance, and a draw that it ends with."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.subsample import subsample
from cads.errors import DataError
from cads.estimators.design import distinct
from cads.policies.base import Policy
from cads.search.base import Search, check_reference, guard_message
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.source_selection import nonempty, source_selection
from cads.search.space import SearchSpace, SubsetSpace
from cads.seeding import derive
from cads.selection import Selection

LEAST_STEPS = 40
"""Steps of the shortest run: below it validation losses are noise."""
GUARD_SHARE = 1 / 4
"""Share of C for which the guard trains the choice and the full pool."""
OVERDRAWN = 64
"""Masks drawn for each one wanted, of which the distinct ones that select something are taken."""


@dataclass
class SourceSearch(Search):
    """A search over subsets or mixtures of the sources; the guard is two runs more, of the choice and the full pool."""

    guard: bool = False
    """Train the choice and the full pool for a quarter of C, and return the better on the target."""

    ranges_over: ClassVar[type[SearchSpace]] = SubsetSpace

    @abstractmethod
    def plan_choose(self, costs: PlannedInnerLoop, space: SearchSpace, train_flops: float) -> bool:
        """Charge `purse` for what `choose` would do; False if the allowance does not buy it."""

    @abstractmethod
    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """The draw (S,) to train on, and the policy that it comes from."""

    def plan_search(self, costs: PlannedInnerLoop, train_flops: float) -> bool:
        """What `search` would do; see `Search`."""
        if not self.plan_choose(costs, self.ranges_over(costs.task.pool), train_flops):
            return False
        if self.guard:
            costs.run(2, self._guard_rung(costs, train_flops).flops, stage="guard")
        return True

    def available(self, costs: InnerLoopCosts, train_flops: float) -> float:
        """FLOPs for the search: what is left without the guard's runs."""
        if not self.guard:
            return costs.ledger.left
        return max(0.0, costs.ledger.left - 2 * (self._guard_rung(costs, train_flops).flops + costs.measuring_flops))

    def run_search(self, inner: InnerLoop, budget: Budget, train_flops: float, seed: int, ledger: Ledger) -> Selection:
        """Choose, and compare the choice with the full pool if the guard is on; see `Search`."""
        space = self.ranges_over(inner.task.pool)
        draw, policy = self.choose(inner, space, train_flops, seed)
        notes = {}
        if self.guard:
            pair = np.stack([space.full, draw])
            runs = train_draws(inner, space, pair, self._guard_rung(inner, train_flops), derive(seed, "guard"), "guard")
            check_reference(float(runs.objective[0]), "guard")
            beaten = bool(runs.objective[1] < runs.objective[0])
            draw = draw if beaten else space.full
            notes["guard"] = guard_message(beaten)
        return source_selection(
            inner.task,
            space,
            draw,
            policy,
            budget=budget,
            method=self.method,
            seed=seed,
            ledger=ledger,
            config=asdict(self),
            notes=notes,
        )

    def _guard_rung(self, costs: InnerLoopCosts, train_flops: float) -> Rung:
        share = fidelity(costs, train_flops, GUARD_SHARE)
        return Rung(share, share * train_flops, share, 2)


@dataclass
class RungSearch(SourceSearch):
    """A search that is nothing but short runs, rung by rung, each measured on the target."""

    @abstractmethod
    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """The runs that `allowance` buys; empty if it does not buy a search."""

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of learning from a rung, after `runs` runs in all."""
        return 0.0

    def rungs(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> list[Rung]:
        """The runs, with room for learning from each rung."""
        allowance = self.available(costs, train_flops)
        most = self.schedule(costs, space, train_flops, allowance)
        learning = len(most) * self.learning(space, sum(rung.n_trials for rung in most))
        return self.schedule(costs, space, train_flops, allowance - learning)

    def plan_choose(self, costs: PlannedInnerLoop, space: SearchSpace, train_flops: float) -> bool:
        """Charge for all rungs."""
        rungs, done = self.rungs(costs, space, train_flops), 0
        for rung in rungs:
            costs.run(rung.n_trials, rung.flops, stage=rung.stage)
            done += rung.n_trials
            if flops := self.learning(space, done):
                costs.learn(flops)
        return bool(rungs)


def fidelity(costs: InnerLoopCosts, train_flops: float, share: float) -> float:
    """`share` of the training, or more if that would be less than `LEAST_STEPS` steps; at most all of it."""
    return min(1.0, max(share, LEAST_STEPS * costs.step_flops / train_flops))


def train_draws(
    inner: InnerLoop, space: SearchSpace, draws: np.ndarray, rung: Rung, seed: int, stage: str
) -> InnerRuns:
    """Train each draw (K, S) on the rung's share of the pool, all from the same weights; as
    `cads.search.rungs.run_rung`.

    Raises:
        DataError: if all of them met a loss that is not finite: there is nothing to choose by.
    """
    positions = subsample(inner.task.pool, rung.data_fraction, derive(seed, "subsample"))
    streams = [space.stream(draw, positions, seed) for draw in draws]
    runs = inner.run(streams, rung.flops, seed=seed, stage=stage)
    if not np.isfinite(runs.objective).any():
        raise DataError(
            f"{stage}: all {len(draws)} runs met a loss that is not finite, and nothing can be chosen by them: lower "
            "the learning rate, or look at the pool"
        )
    return runs


def random_masks(space: SearchSpace, count: int, seed: int, *, full_first: bool) -> np.ndarray:
    """Distinct, non-empty masks, each source in with probability 1/2; float, shape (K, S), K <= count."""
    drawn = nonempty(space.policy().sample(OVERDRAWN * count, np.random.default_rng(seed))).astype(np.float64)
    return distinct([space.full, *drawn] if full_first else list(drawn))[:count]


def kept(probabilities: np.ndarray) -> np.ndarray:
    """The sources with a probability above 1/2, and at least the likeliest: 0 or 1, shape (S,)."""
    chosen = probabilities > 0.5
    chosen[np.argmax(probabilities)] = True
    return chosen.astype(np.float64)


def best_of_runs(objective: np.ndarray) -> int:
    """The run with the least objective; those that diverged (NaN) are last."""
    return int(np.argmin(np.where(np.isfinite(objective), objective, np.inf)))
