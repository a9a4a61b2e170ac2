"""Rivals of the policy gradient that exist for `experiments.policy_gradient` alone: searches without a gradient."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from baselines.live_penalty import PROBES_PER_SOURCE, LivePenalty
from baselines.search.source_search import SourceSearch, best_of_runs, threshold, train_draws
from cads.accounting.budget import Budget
from cads.accounting.operations import regression_flops
from cads.data.draws import draw_by_source
from cads.errors import NotAffordableError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.scoring.pool_scores import reading_flops
from cads.search.base import NO_SEARCH_AFFORDABLE
from cads.search.choice import Choice
from cads.search.constants import constants_of
from cads.search.fidelity import Rung, data_fraction
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.search.stages import FitTarget, ScorePool, Stages, Trials, UpdatePolicy
from cads.seeding import derive
from cads.selectors.cads_s.penalty_form import PenalizedSources
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import Strata
from cads.selectors.search.selector import PolicySearch
from cads.selectors.search.trials import TrialHistory
from cads.task import Task

ORIGINS = ("first rung", "in part", "policy")
THETA_SHARE, THETA_PASSES = 0.2, 8
"""The target model takes this share of the allowance, and makes no more passes over the target than this."""
PROBES = 8
"""Examples of each source that the target model judges: as many as `cads` probes."""
SHORTEST = 1 / 16
"""Share of C of the shortest trial, as in `search`."""
SMALLEST = 1 / 8
"""Share of the sources or examples in the shortest prefix."""
FEWEST_PREFIXES, MOST_PREFIXES = 4, 8
"""How many prefixes are tried."""
BATCH = 4
"""Trials of Thompson sampling between two updates of the posterior."""
MOST_MASKS, MOST_ROUNDS, FEWEST_MASKS = 16, 5, 3
"""Of `cads-s-penalty`: its masks, and turns of model and policy."""
PROBING_SHARE, LIVE_ROUNDS = 0.5, 20
"""Of `live-penalty`: most of the allowance for measuring losses, and most rounds."""


@dataclass
class Traced(PolicySearch):
    """`search` that notes where the trials of later rungs, and the choice, come from; see `origin`."""

    def _conclude(self, space: SearchSpace, policy: Policy, history: TrialHistory) -> Choice:
        choice = super()._conclude(space, policy, history)
        is_first = history.fidelity == history.fidelity[0]
        first = {row.tobytes() for row in history.draws[is_first]}
        later = [origin(row, first) for row in history.draws[~is_first]]
        last, delta_objective = history.latest
        choice.notes["later trials"] = [later.count(name) for name in ORIGINS]
        choice.notes["chosen"] = origin(last[1 + int(np.argmin(delta_objective[1:]))], first) if len(last) > 1 else ""
        return choice


def origin(draw: np.ndarray, first: Container[bytes]) -> str:
    """Where a draw (S,) comes from: the first rung (before any step), a neighbour of another, or the moved policy."""
    if draw.tobytes() in first:
        return ORIGINS[0]
    return ORIGINS[2] if np.isin(draw, (0, 1)).all() else ORIGINS[1]


@dataclass
class UnchargedSteps(Traced):
    """`search` whose steps of the policy cost nothing: its trials are as many and as long as without any steps."""

    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """Those of a search without steps."""
        return PolicySearch(**asdict(self) | {"policy_steps": 0}).stages(costs, train_flops)


def prefix_shares(count: int) -> np.ndarray:
    """The shares of `count` prefixes: a geometric sequence from everything to `SMALLEST`, shape (count,)."""
    return np.geomspace(1.0, SMALLEST, count)


def prefix_trials(costs: InnerLoopCosts, train_flops: float, available: float) -> Rung:
    """One trial for each prefix, which share what is there.

    There are as many prefixes as trials of C/16 are affordable, from 4 to 8; if need be, the trials are shorter.

    Raises:
        NotAffordableError: if that buys fewer than two.
    """
    fewest = constants_of(costs.task).min_steps * costs.step_flops
    count, most = (
        int(available / (flops + costs.measuring_flops)) for flops in (max(SHORTEST * train_flops, fewest), fewest)
    )
    count = min(max(count, FEWEST_PREFIXES), MOST_PREFIXES, most)
    if count < 2:
        raise NotAffordableError(NO_SEARCH_AFFORDABLE)
    flops = min(train_flops, (available / count - costs.measuring_flops) * (1 - 1e-9))
    return deciding_rung(costs, flops / train_flops, train_flops, count)


def deciding_rung(costs: InnerLoopCosts, fidelity: float, train_flops: float, n_trials: int) -> Rung:
    """A rung after which no longer trials follow."""
    data = data_fraction(fidelity, costs.passes(train_flops), constants_of(costs.task), decides=True)
    return Rung(fidelity, fidelity * train_flops, data, n_trials)


@dataclass
class SignalPrefix(SourceSearch):
    """A line search: sources in the order of the signal of `cads`, prefixes of geometric sizes, and the best of them.

    The signal is the loss of a model of the target on 8 examples of each source, standardised within classes.
    """

    method: ClassVar[str] = "prefix"

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """The target model, the signal, and one rung of prefixes."""
        theta, positions, rung = self._plan_of(costs, train_flops)
        yield FitTarget(theta)
        yield ScorePool(len(positions), "R", reading_flops(costs.task.costs.forward, costs.task.pool, positions))
        yield Trials(rung)

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Rank, try, and take the best prefix."""
        theta_flops, positions, rung = self._plan_of(inner, train_flops)
        theta = inner.fit_target(theta_flops, seed=derive(seed, "theta"), stage="theta")
        strata = Strata.of(inner.task)
        excess = SourceExcess(strata.n_sources, strata.n_groups, math.inf)
        losses = inner.losses(theta, positions, stage="R")
        excess.add(losses, strata.sources[positions], strata.groups[positions], np.ones(len(positions)))
        n = len(space.sizes)
        sizes = np.maximum(1, np.round(prefix_shares(rung.n_trials) * n)).astype(int)
        draws = space.nested(np.argsort(excess.mean, kind="stable"))[n - sizes]
        runs = train_draws(inner, space, draws, rung, derive(seed, "trials"), rung.stage)
        best = draws[best_of_runs(runs.objective)]
        return best, BernoulliPolicy(best)

    def _plan_of(self, costs: InnerLoopCosts, train_flops: float) -> tuple[float, np.ndarray, Rung]:
        """FLOPs of the target model, positions of the probes, and the trials."""
        available = self.available(costs, train_flops)
        theta = costs.target_flops(THETA_SHARE * available / train_flops, THETA_PASSES, train_flops)
        positions = np.concatenate(draw_by_source(costs.task.pool, PROBES, derive(0, "probes")))
        reading = reading_flops(costs.task.costs.forward, costs.task.pool, positions)
        if theta < costs.target_step_flops:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        return theta, positions, prefix_trials(costs, train_flops, available - theta - reading)


@dataclass
class ThompsonSampling(SourceSearch):
    """Thompson sampling: a Gaussian posterior over the effect of each source, from short trials on subsets.

    The objective of a subset less that of the full pool is minus the sum of the effects b_s of the sources that it
    leaves out, and noise. A priori b_s ~ N(0, t^2). A trial keeps the sources whose sampled effect is not positive. In
    the end those are kept whose mean effect is not.
    """

    method: ClassVar[str] = "thompson"

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """Trials and an update of the posterior, in turn."""
        for rung, learning in self._rounds(costs, space, train_flops):
            yield Trials(rung)
            yield UpdatePolicy(learning)

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Sample, try and learn; the full pool is the first trial."""
        n, rng = len(space.sizes), np.random.default_rng(derive(seed, "thompson"))
        posterior = EffectPosterior(n)
        for index, (rung, learning) in enumerate(list(self._rounds(inner, space, train_flops))):
            draws = [posterior.sample(rng) <= 0 for _ in range(rung.n_trials)]
            if index == 0:
                draws[0] = np.ones(n, dtype=bool)
            masks = np.array([m if m.any() else np.ones(n, dtype=bool) for m in draws], dtype=np.float64)
            # The weights and the order of all rounds are the same: the full pool is tried once.
            runs = train_draws(inner, space, masks, rung, derive(seed, "trials"), rung.stage)
            posterior.add(masks, runs.objective)
            inner.learn(learning)
        probabilities = np.where(posterior.mean <= 0, 1.0, 0.0)
        if not probabilities.any():
            probabilities[np.argmin(posterior.mean)] = 1.0
        return threshold(probabilities), BernoulliPolicy(probabilities)

    def _rounds(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Iterator[tuple[Rung, float]]:
        """The trials of each round, and FLOPs of learning from them.

        Raises:
            NotAffordableError: if fewer than three trials are affordable.
        """
        available, n_sources = self.available(costs, train_flops), len(space.sizes)
        fidelity = min(1.0, max(SHORTEST, constants_of(costs.task).min_steps * costs.step_flops / train_flops))
        rung = deciding_rung(costs, fidelity, train_flops, BATCH)
        count = int(available / (rung.flops + costs.measuring_flops))

        def rounds() -> list[tuple[int, float]]:
            sizes = [min(BATCH, count - done) for done in range(0, count, BATCH)]
            totals = np.cumsum(sizes)
            return [(k, _learning_flops(int(t), n_sources)) for k, t in zip(sizes, totals, strict=True)]

        while count * (rung.flops + costs.measuring_flops) + sum(x for _, x in rounds()) > available:
            count -= 1
        if count < 3:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        for size, learning in rounds():
            yield deciding_rung(costs, fidelity, train_flops, size), learning


def _learning_flops(runs: int, n_sources: int) -> float:
    """FLOPs of the posterior, and of the samples of the next round."""
    return regression_flops(runs, n_sources) + 4 * BATCH * runs * n_sources


class EffectPosterior:
    """The effects b of S sources, given trials: y = X b + e, where X is -1 for a source that is left out, else 0.

    t^2, the variance of an effect, is that which explains the mean square of y; the noise of a trial is taken to be
    half as large as the effects of half of the sources.
    """

    def __init__(self, n_sources: int) -> None:
        self._n, self._x, self._y = n_sources, np.empty((0, n_sources)), np.empty(0)
        self._reference = math.nan

    def add(self, masks: np.ndarray, objective: np.ndarray) -> None:
        """Add trials, masks (K, S) and objectives (K,); the very first is the full pool. NaN: the worst so far."""
        if math.isnan(self._reference):
            self._reference = float(objective[0])
        y = objective - self._reference
        y = np.where(np.isfinite(y), y, np.nanmax(y, initial=0.0))
        self._x, self._y = np.concatenate([self._x, masks - 1]), np.concatenate([self._y, y])

    @property
    def mean(self) -> np.ndarray:
        """The posterior mean of each effect, shape (S,)."""
        return self._update(np.zeros(self._n), np.zeros(len(self._y)))

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """A draw from the posterior, shape (S,): a draw from the prior, corrected by the trials (Matheron's rule)."""
        scale = math.sqrt(float(np.mean(self._y**2)) / (0.75 * self._n)) if self._y.any() else 1.0
        prior = rng.normal(size=self._n) * scale
        return self._update(prior, rng.normal(size=len(self._y)) * scale * math.sqrt(self._n / 4))

    def _update(self, prior: np.ndarray, noise: np.ndarray) -> np.ndarray:
        gram = self._x @ self._x.T + self._n / 4 * np.eye(len(self._y))
        return np.asarray(prior + self._x.T @ np.linalg.solve(gram, self._y - self._x @ prior - noise))


def affordable_penalty(task: Task, budget: Budget, allowance: float) -> PenalizedSources | None:
    """`cads-s-penalty` with as many rounds, and then masks, as the allowance buys; None if it buys too few masks.

    Args:
        allowance: in units of the budget.
    """
    for rounds in range(MOST_ROUNDS, 0, -1):
        for masks in range(MOST_MASKS, FEWEST_MASKS - 1, -1):
            selector = PenalizedSources(rounds=rounds, masks=masks)
            if 0 < selector.plan(task, budget).total().flops <= allowance * budget.flops(task):
                return selector
    return None


def affordable_live_penalty(task: Task, budget: Budget, allowance: float) -> LivePenalty:
    """`live-penalty` with as many rounds as leave half of the allowance for its two models."""
    probes = np.concatenate(draw_by_source(task.pool, PROBES_PER_SOURCE, 0))
    per_round = 2 * reading_flops(task.costs.forward, task.pool, probes)
    rounds = int(PROBING_SHARE * allowance * budget.flops(task) / per_round)
    return LivePenalty(allowance=allowance, rounds=min(LIVE_ROUNDS, max(1, rounds)))
