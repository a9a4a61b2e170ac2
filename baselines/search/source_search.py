"""What the published methods that choose sources share: a search paid from an allowance that ends with one draw."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cads.accounting.stage_labels import stage_label
from cads.data.subsample import subsample
from cads.data.token_batches import in_id_order
from cads.errors import DataError, NotAffordableError
from cads.estimators.design import distinct_rows
from cads.policies.base import Policy
from cads.search.base import NO_SEARCH_AFFORDABLE, Search, check_reference, guard_message
from cads.search.choice import Choice
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.source_choice import nonempty, source_choice
from cads.search.space import SearchSpace, SubsetSpace
from cads.search.stages import Stages, Trials, UpdatePolicy
from cads.seeding import derive

MIN_STEPS = 40
"""Fewest steps of a trial: with fewer, validation losses are noise."""
GUARD_SHARE = 1 / 4
"""Share of the training budget C for which the guard trains the chosen draw and the full pool."""
OVERSAMPLING = 64
"""Masks drawn for each one needed, since empty and duplicate masks are dropped."""


@dataclass
class SourceSearch(Search):
    """A search over subsets or mixtures of the sources; the guard adds two trials, of choice and full pool."""

    guard: bool = False
    """Train the choice and the full pool for a quarter of C, and return the better on the target. With fewer than 20
    target examples that cannot be told: then nothing is searched, and the full pool is returned."""

    ranges_over: ClassVar[type[SearchSpace]] = SubsetSpace

    @abstractmethod
    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """What `choose` does, stage by stage; see `cads.search.stages`.

        Raises:
            NotAffordableError: if the allowance does not buy it.
        """

    @abstractmethod
    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """The draw (S,) to train on, and the policy it comes from."""

    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """The search, and the guard's two trials if it is on; see `Search`."""
        yield from self.search_stages(costs, self.ranges_over(costs.task.pool), train_flops)
        if self.guard:
            yield Trials(self._guard_rung(costs, train_flops), "guard")

    def available(self, costs: InnerLoopCosts, train_flops: float) -> float:
        """FLOPs for the search: what the ledger has left, less the guard's trials."""
        if not self.guard:
            return costs.ledger.left
        return max(0.0, costs.ledger.left - 2 * (self._guard_rung(costs, train_flops).flops + costs.measuring_flops))

    def run_search(self, inner: InnerLoop, train_flops: float, seed: int) -> Choice:
        """Choose, and compare the choice with the full pool if the guard is on; see `Search`."""
        space = self.ranges_over(inner.task.pool)
        draw, policy = self.choose(inner, space, train_flops, seed)
        notes: dict[str, object] = {}
        if self.guard:
            pair = np.stack([space.full, draw])
            runs = train_draws(inner, space, pair, self._guard_rung(inner, train_flops), derive(seed, "guard"), "guard")
            check_reference(float(runs.objective[0]), "guard")
            beaten = bool(runs.objective[1] < runs.objective[0])
            draw = draw if beaten else space.full
            notes["guard"] = guard_message(guard=True, chosen=beaten)
        return source_choice(space, draw, policy, notes)

    def _guard_rung(self, costs: InnerLoopCosts, train_flops: float) -> Rung:
        share = fidelity(costs, train_flops, GUARD_SHARE)
        return Rung(share, share * train_flops, share, 2)


@dataclass
class RungSearch(SourceSearch):
    """A search that consists of trials, rung by rung, each measured on the target."""

    @abstractmethod
    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """The rungs that `allowance` buys; empty if it does not buy a search."""

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of learning from a rung, after `runs` trials in all."""
        return 0.0

    def rungs(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> list[Rung]:
        """The rungs, with FLOPs set aside for learning from each."""
        allowance = self.available(costs, train_flops)
        rungs = self.schedule(costs, space, train_flops, allowance)
        learning_flops = len(rungs) * self.learning(space, sum(rung.n_trials for rung in rungs))
        return self.schedule(costs, space, train_flops, allowance - learning_flops)

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """The trials of each rung, and learning from all trials so far; see `SourceSearch`."""
        rungs = self.rungs(costs, space, train_flops)
        if not rungs:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        for rung in rungs:
            yield Trials(rung)
            if flops := self.learning(space, costs.n_trials):
                yield UpdatePolicy(flops)


def fidelity(costs: InnerLoopCosts, train_flops: float, share: float) -> float:
    """`share` of the training budget, raised to `MIN_STEPS` steps if it is fewer; at most 1."""
    return min(1.0, max(share, MIN_STEPS * costs.step_flops / train_flops))


def train_draws(
    inner: InnerLoop, space: SearchSpace, draws: np.ndarray, rung: Rung, seed: int, stage: str
) -> InnerRuns:
    """Train each draw (K, S) on the rung's share of the pool, all from the same initial weights.

    `cads.search.rungs.run_rung` does the same for CADS.

    Raises:
        DataError: if all runs met a loss that is not finite, so that no draw can be chosen.
    """
    pool = inner.task.pool
    positions = in_id_order(pool, subsample(pool, rung.data_fraction, derive(seed, "subsample")))
    streams = [space.stream(draw, positions, seed) for draw in draws]
    runs = inner.run(streams, rung.flops, seed=seed, stage=stage)
    if not np.isfinite(runs.objective).any():
        raise DataError(
            f"{stage_label(stage)}: all {len(draws)} runs met a loss that is not finite, and nothing can be "
            "chosen by them: lower the learning rate, or look at the pool"
        )
    return runs


def random_masks(space: SearchSpace, count: int, seed: int, *, full_first: bool) -> np.ndarray:
    """Distinct, non-empty masks that hold each source with probability 1/2; float, shape (K, S), K <= count."""
    masks = nonempty(space.policy().sample(OVERSAMPLING * count, np.random.default_rng(seed))).astype(np.float64)
    return distinct_rows([space.full, *masks] if full_first else list(masks))[:count]


def threshold(probabilities: np.ndarray) -> np.ndarray:
    """The mask of the sources with a probability above 1/2, and at least the likeliest: 0 or 1, shape (S,)."""
    mask = probabilities > 0.5
    mask[np.argmax(probabilities)] = True
    return mask.astype(np.float64)


def best_of_runs(objective: np.ndarray) -> int:
    """The index of the run with the lowest objective; runs that diverged (NaN) come last."""
    return int(np.argmin(np.where(np.isfinite(objective), objective, np.inf)))
