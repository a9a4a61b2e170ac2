"""One run: selection that rides on the training of the final model, whose budget covers both.

The penalty form of CADS (arXiv 2510.16806) compares theta, fitted to the target, with a reference u, trained on the
pool. Here u is the final model itself: it begins on everything, target and pool together, its losses say which
examples to go on with, and the same run continues on draws weighted by that. The first part is no cost of selection,
and neither are the losses of u on what it has trained on: they come from its own steps. What selection takes
beside that, theta and its pass over the pool, follows from the budget, down to nothing.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.special import expit

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.accounting.operations import candidates_flops
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.errors import ConfigError, NotAffordableError
from cads.monitor import Monitor
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.stages import FitTarget, ScorePool
from cads.seeding import derive
from cads.selection import Selection
from cads.selector import full_pool_selection
from cads.task import Task
from cads.training.final import fit_final_model
from cads.training.result import TrainResult
from cads.training.run_state import RunSegment

log = logging.getLogger(__name__)

THETA_PASSES = (5, 20)
"""Passes over the target below which theta knows too little to be worth its cost, and the most it is given."""
PRETRAINED_SHARE, PRETRAINED_STEPS = 0.1, 16
"""Of models that are pretrained, theta takes this share of the allowance, and of C, at most, and this many steps at
least: fewer do not tell examples apart, and more than twice as many add nothing (`experiments/results`). u is trained
for as much."""
SHARPNESS = 4.0
"""k in the weights `sigmoid(1 - k z)`."""
TOO_SMALL = "the budget is too small to tell examples apart in one run: everything is trained on, with the target"
NO_ALLOWANCE = "allowance = 0 leaves nothing for telling examples apart: everything is trained on, with the target"


@dataclass(frozen=True)
class OneRunSplit:
    """How a run is divided, and what is made of what it tells.

    Attributes:
        share: of C, that theta and passes over the pool may take; what they take is missing from the training.
        first: share of the training that u takes on everything before examples are told apart. Where it is no whole
            pass over the pool, most of the budget would be gone before anything is known of each example: then nothing
            is selected.
        reach_weight: c2/c1 of l(u) in the signal `l(theta) - (c2/c1) l(u)`.
        theta_steps: mean steps of theta without which nothing is selected; 0 where theta may be missing.
    """

    share: float
    first: float
    reach_weight: float
    theta_steps: int


FROM_SCRATCH = OneRunSplit(share=0.05, first=0.2, reach_weight=-1.0, theta_steps=0)
"""With 5,000 examples of which half are mislabelled, a share of 0.083 at 10 passes cost what it brought, and 0.05 at 30
passes did not. After a fifth of the training u has learned little by heart, so that its losses tell what does not fit
rather than what can be reached: the weight is negative."""
PRETRAINED = OneRunSplit(share=0.13, first=0.25, reach_weight=1.0, theta_steps=PRETRAINED_STEPS)
"""What a pretrained model finds easy need not be worth anything: only what theta loses beside u tells. A few steps of
theta are enough, but both passes over the pool have to be paid."""


@dataclass(frozen=True)
class SplitFlops:
    """How C is divided, in FLOPs.

    Attributes:
        theta: fitting theta to the target. scoring: its pass over the pool; both 0 where they do not pay.
        reading: the pass of u over the pool; 0 where its own training steps tell.
        weighing: from losses to weights.
    """

    theta: float
    scoring: float
    reading: float
    weighing: float


@dataclass
class OnlineSelector(ABC):
    """Begins the run of the final model, and selects what it goes on with.

    The budget is that of the whole run, whether it counts selection or not: selection is part of training here. The
    model is the one that is trained; a proxy has no part in it. Nothing is compared on the target.

    Raises:
        ConfigError: if `target_fraction` or `allowance` is out of range.
    """

    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: a share of the budget, see `OneRunSplit`."""
    target_fraction: float = 0.3
    """Share of each batch that is drawn from the target, throughout; at least 0 and below 1."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 <= self.target_fraction < 1:
            raise ConfigError(f"target_fraction = {self.target_fraction}: it must be at least 0 and below 1")
        if self.allowance is not None and not (math.isfinite(self.allowance) and self.allowance >= 0):
            raise ConfigError(
                f"allowance = {self.allowance}: it must be finite and >= 0, in units of the training FLOPs"
            )

    @staticmethod
    @abstractmethod
    def weigh(pool: Pool, z: np.ndarray) -> np.ndarray:
        """Weights in (0, 1) for the rest of the run, from the standardised signal of each example; shape (N,) each."""

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge to "select"; what it charges to "train" is the first part of the final run."""
        self._check(task)
        costs = PlannedInnerLoop(task, budget.flops(task))
        try:
            parts = self._split(costs)
        except NotAffordableError as error:
            return PlannedLedger(note=str(error))
        if parts.theta:
            costs.charge(FitTarget(parts.theta))
            costs.charge(ScorePool(len(task.pool), "R"))
        if parts.reading:
            costs.charge(ScorePool(len(task.pool), "l*"))
        costs.learn(parts.weighing)
        return costs.ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Begin the run and weigh the pool for the rest of it; see `cads.selector.Selector`.

        Returns:
            a Selection with a `warm_start`; without one, where the budget is too small to select in.
        """
        self._check(task)
        monitor = monitor or Monitor()
        spent = Ledger(limit=budget.flops(task))
        inner = InnerLoop(task, spent, monitor)
        everything = full_pool_selection(task, budget, method=self.method, seed=seed, ledger=ledger, notes={})
        everything = replace(everything, target_fraction=self.target_fraction, config=asdict(self))
        try:
            parts = self._split(inner)
        except NotAffordableError as error:
            log.warning("%s: %s", self.method, error)
            return replace(everything, notes={"one run": str(error)})
        try:
            from_theta = self._theta(inner, parts, seed)
            fit = self._begin(inner, parts, everything, seed)
            from_u = self._reference(inner, parts, fit)
            inner.learn(parts.weighing)
        finally:
            ledger.merge(spent)
        z = standardised(from_theta - one_run_split(task).reach_weight * from_u, task.groups(task.pool))
        weights = self.weigh(task.pool, z)
        watch(monitor, task, z, weights)
        return Selection.from_pool(
            task.pool,
            selected=np.ones(len(task.pool), dtype=bool),
            source_probability=source_means(task.pool, weights),
            score=weights,
            probability=weights,
            weighted=True,
            target_fraction=self.target_fraction,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            notes={"one run": "selected", "theta": bool(parts.theta), "first": float(fit.flops[-1])},
            warm_start=fit.state,
        )

    def _check(self, task: Task) -> None:
        """Refuse what can be known before anything is spent: a pool that cannot be weighed, a target that leaves none.

        Raises:
            ConfigError, DataError: with the remedy.
        """
        self.weigh(task.pool, np.zeros(len(task.pool)))
        batch_size = task.recipe.batch_size
        if round(self.target_fraction * batch_size) == batch_size:
            raise ConfigError(
                f"target_fraction = {self.target_fraction} leaves nothing of a batch of {batch_size} for the pool: "
                "lower it"
            )

    def _split(self, costs: InnerLoopCosts) -> SplitFlops:
        """How the budget is divided.

        Raises:
            BudgetError: if it does not buy one step.
            NotAffordableError: if it is too small to select in.
        """
        task, total = costs.task, costs.ledger.left
        check_step(task, total)
        split = one_run_split(task)
        too_small = NotAffordableError(NO_ALLOWANCE if self.allowance == 0 else TOO_SMALL)
        batch_size, n = task.recipe.batch_size, len(task.pool)
        from_target = round(self.target_fraction * batch_size)
        most = total * (split.share if self.allowance is None else self.allowance / (1 + self.allowance))
        weighing = candidates_flops(n, 1)
        reading = 0.0 if own_losses_tell(task) else costs.scoring_flops(n)
        scoring = costs.scoring_flops(n)
        few, many = (costs.target_flops(1.0, passes, total) for passes in THETA_PASSES)
        if split.theta_steps:
            few = costs.target_steps_flops(split.theta_steps)
        theta = min(many, most - scoring - reading - weighing)
        if theta < few or theta < costs.target_step_flops:
            if split.theta_steps:
                raise too_small
            theta = scoring = 0.0
        if theta + scoring + reading + weighing > most:
            raise too_small
        first = split.first * (total - theta - scoring - reading - weighing)
        of_pool, of_target = (task.costs.per_usage(pool, batch_size) for pool in (task.pool, task.target))
        step = of_pool * (batch_size - from_target) + of_target * from_target
        if int(first / step) * (batch_size - from_target) < n:
            raise too_small
        return SplitFlops(theta, scoring, reading, weighing)

    def _theta(self, inner: InnerLoop, parts: SplitFlops, seed: int) -> np.ndarray:
        """Losses of the pool under theta, nats, shape (N,); 0 where there is no theta."""
        n = len(inner.task.pool)
        if not parts.theta:
            return np.zeros(n)
        theta = inner.fit_target(parts.theta, seed=derive(seed, "theta"), stage="theta")
        return inner.losses(theta, np.arange(n), stage="R")

    def _begin(self, inner: InnerLoop, parts: SplitFlops, everything: Selection, seed: int) -> TrainResult:
        """Train the first part of the final model, with the course of the learning rate over all of it."""
        horizon = inner.ledger.left - parts.reading - parts.weighing
        first = one_run_split(inner.task).first * horizon
        return fit_final_model(
            inner.trainer, everything, first, seed=seed, segment=RunSegment(horizon=horizon, keep=True)
        )

    def _reference(self, inner: InnerLoop, parts: SplitFlops, fit: TrainResult) -> np.ndarray:
        """Losses of the pool under u, nats, shape (N,); NaN for what it has not seen, where its own steps tell."""
        if parts.reading:
            return inner.losses(fit.models[0], np.arange(len(inner.task.pool)), stage="l*")
        assert fit.example_losses is not None
        return fit.example_losses


def one_run_split(task: Task) -> OneRunSplit:
    """How its run is divided."""
    return PRETRAINED if task.pretrained else FROM_SCRATCH


def own_losses_tell(task: Task) -> bool:
    """Whether the losses of training steps are those of the examples, and each is in one in every pass.

    Not where training weighs examples, and not where batches are made up of similar lengths.
    """
    return type(task).training_losses is Task.training_losses and lengths(task.pool) is None


def standardised(signal: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """The signal (shape (N,)) at mean 0 and deviation 1 within each group; 0 where it is NaN or does not vary."""
    z = np.zeros(len(signal))
    codes = np.zeros(len(signal), dtype=np.int64) if groups is None else np.asarray(groups)
    for group in np.unique(codes):
        known = (codes == group) & np.isfinite(signal)
        values = signal[known]
        if len(values) and (deviation := float(values.std())) > 0:
            z[known] = (values - values.mean()) / deviation
    return z


def by_example(pool: Pool, z: np.ndarray) -> np.ndarray:
    """CADS-E: `s_i = sigmoid(1 - k z_i)`, shape (N,)."""
    return np.asarray(expit(1 - SHARPNESS * z))


def by_source(pool: Pool, z: np.ndarray) -> np.ndarray:
    """CADS-S: the same of the mean of z in the source of each example, shape (N,).

    Raises:
        DataError: if the pool has no sources.
    """
    sizes = pool.source_sizes
    assert pool.sources is not None
    means = np.bincount(pool.sources, weights=z, minlength=len(sizes)) / sizes
    return np.asarray(expit(1 - SHARPNESS * means))[pool.sources]


def source_means(pool: Pool, weights: np.ndarray) -> dict[str, float]:
    """The mean weight of each source; empty where the pool has none."""
    if pool.sources is None:
        return {}
    means = np.bincount(pool.sources, weights=weights) / pool.source_sizes
    return dict(zip(pool.source_names, means.tolist(), strict=True))


def watch(monitor: Monitor, task: Task, z: np.ndarray, weights: np.ndarray) -> None:
    """Record the signal, the weights, and their means by source."""
    monitor.histogram("outer/signal", z, 0)
    monitor.histogram("outer/probabilities", weights, 0)
    watch_sources(monitor, task.pool, weights, 0)
    monitor.panels(task.pool, weights, 0, task.describe)


def watch_sources(monitor: Monitor, pool: Pool, weights: np.ndarray, step: int) -> None:
    """Record the mean weight in each source, where there are sources."""
    if means := source_means(pool, weights):
        monitor.probabilities(pool.source_names, np.array(list(means.values())), step)
