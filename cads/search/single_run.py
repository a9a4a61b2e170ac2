"""Selection in one run: the final model's own training selects its examples, and the budget covers both.

The penalty form of CADS (arXiv 2510.16806) compares theta, the target model trained on the target, with u, a reference
model trained on the pool. Here u is the final model itself. It begins on everything, target and pool together. Its
losses then tell which examples to continue with, and the same run continues on draws weighted by that.

The first part of the run is training, no cost of selection. Where the losses of u come from its own training steps,
they cost nothing either. The other costs of selection, theta and passes over the pool, follow from the budget; they may
be 0.
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
"""Fewest passes over the target with which theta is worth its cost, and most passes that it makes."""
PRETRAINED_SHARE, PRETRAINED_STEPS = 0.1, 16
"""For pretrained models: theta's largest share of the allowance and of C, and its fewest steps. Fewer steps do not tell
examples apart, and more than twice as many add nothing (`experiments/results`). u is trained for as many FLOPs."""
SHARPNESS = 4.0
"""k in the weights `sigmoid(1 - k z)`."""
TOO_SMALL = "the budget is too small to tell examples apart in one run: everything is trained on, with the target"
NO_ALLOWANCE = "allowance = 0 leaves nothing for telling examples apart: everything is trained on, with the target"


@dataclass(frozen=True)
class OneRunSplit:
    """How a run is divided, and how its losses become a signal.

    Attributes:
        share: largest share of C for theta and passes over the pool. The training is shorter by what they take.
        first: share of the training in which u sees everything, before examples are weighed. If it is less than one
            pass over the pool, nothing is selected: most of the budget would be spent before each example is known.
        reach_weight: c2/c1 of l(u) in the signal `l(theta) - (c2/c1) l(u)`.
        theta_steps: mean steps of theta without which nothing is selected; 0 if theta may be missing.
    """

    share: float
    first: float
    reach_weight: float
    theta_steps: int


FROM_SCRATCH = OneRunSplit(share=0.05, first=0.2, reach_weight=-1.0, theta_steps=0)
"""With 5,000 examples of which half are mislabelled, a share of 0.083 at 10 passes cost as much as it gained, and 0.05
at 30 passes cost less than it gained. After a fifth of the training u has memorised little, so that its losses tell
what does not fit rather than what can be reached: the weight is negative."""
PRETRAINED = OneRunSplit(share=0.13, first=0.25, reach_weight=1.0, theta_steps=PRETRAINED_STEPS)
"""Examples that a pretrained model finds easy need not be useful: only the difference of the losses of theta and u
tells. A few steps of theta are enough, but both passes over the pool are paid for."""


@dataclass(frozen=True)
class SplitFlops:
    """How C is divided, in FLOPs.

    Attributes:
        theta: training theta on the target. scoring: its pass over the pool. Both are 0 if not worth their cost.
        reading: the pass of u over the pool; 0 if the losses of its training steps are used.
        weighing: computing weights from losses.
    """

    theta: float
    scoring: float
    reading: float
    weighing: float


@dataclass
class OnlineSelector(ABC):
    """Begins the run of the final model, and selects what it continues with.

    The budget is that of the whole run, whether it counts selection or not: selection is part of training here. A proxy
    is not used. Nothing is compared on the target.

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
        """What `select` would charge to "select". It also charges the first part of the final run to "train"."""
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
            a Selection with a `warm_start`; without one if the budget is too small for selection.
        """
        self._check(task)
        monitor = monitor or Monitor()
        run_ledger = Ledger(limit=budget.flops(task))
        inner = InnerLoop(task, run_ledger, monitor)
        full_pool = full_pool_selection(task, budget, method=self.method, seed=seed, ledger=ledger, notes={})
        full_pool = replace(full_pool, target_fraction=self.target_fraction, config=asdict(self))
        try:
            parts = self._split(inner)
        except NotAffordableError as error:
            log.warning("%s: %s", self.method, error)
            return replace(full_pool, notes={"one run": str(error)})
        try:
            target_model_losses = self._theta(inner, parts, seed)
            fit = self._begin(inner, parts, full_pool, seed)
            reference_losses = self._reference(inner, parts, fit)
            inner.learn(parts.weighing)
        finally:
            ledger.merge(run_ledger)
        z = standardised(
            target_model_losses - one_run_split(task).reach_weight * reference_losses, task.groups(task.pool)
        )
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
        """Check, before any cost, that the pool can be weighed and that batches hold examples of the pool.

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
            NotAffordableError: if it is too small for selection.
        """
        task, total = costs.task, costs.ledger.left
        check_step(task, total)
        split = one_run_split(task)
        too_small = NotAffordableError(NO_ALLOWANCE if self.allowance == 0 else TOO_SMALL)
        batch_size, n = task.recipe.batch_size, len(task.pool)
        from_target = round(self.target_fraction * batch_size)
        max_flops = total * (split.share if self.allowance is None else self.allowance / (1 + self.allowance))
        weighing = candidates_flops(n, 1)
        reading = 0.0 if own_losses_tell(task) else costs.scoring_flops(n)
        scoring = costs.scoring_flops(n)
        min_theta, max_theta = (costs.target_flops(1.0, passes, total) for passes in THETA_PASSES)
        if split.theta_steps:
            min_theta = costs.target_steps_flops(split.theta_steps)
        theta = min(max_theta, max_flops - scoring - reading - weighing)
        if theta < min_theta or theta < costs.target_step_flops:
            if split.theta_steps:
                raise too_small
            theta = scoring = 0.0
        if theta + scoring + reading + weighing > max_flops:
            raise too_small
        first = split.first * (total - theta - scoring - reading - weighing)
        pool_usage, target_usage = (task.costs.per_usage(pool, batch_size) for pool in (task.pool, task.target))
        step = pool_usage * (batch_size - from_target) + target_usage * from_target
        if int(first / step) * (batch_size - from_target) < n:
            raise too_small
        return SplitFlops(theta, scoring, reading, weighing)

    def _theta(self, inner: InnerLoop, parts: SplitFlops, seed: int) -> np.ndarray:
        """Losses of the pool under theta, nats, shape (N,); 0 if the split has no theta."""
        n = len(inner.task.pool)
        if not parts.theta:
            return np.zeros(n)
        theta = inner.fit_target(parts.theta, seed=derive(seed, "theta"), stage="theta")
        return inner.losses(theta, np.arange(n), stage="R")

    def _begin(self, inner: InnerLoop, parts: SplitFlops, full_pool: Selection, seed: int) -> TrainResult:
        """Train the first part of the final run, with the learning-rate schedule of the whole run."""
        horizon = inner.ledger.left - parts.reading - parts.weighing
        first = one_run_split(inner.task).first * horizon
        return fit_final_model(
            inner.trainer, full_pool, first, seed=seed, segment=RunSegment(horizon=horizon, keep=True)
        )

    def _reference(self, inner: InnerLoop, parts: SplitFlops, fit: TrainResult) -> np.ndarray:
        """Losses of the pool under u, nats, shape (N,); from its own steps, NaN for examples that it has not seen."""
        if parts.reading:
            return inner.losses(fit.models[0], np.arange(len(inner.task.pool)), stage="l*")
        assert fit.example_losses is not None
        return fit.example_losses


def one_run_split(task: Task) -> OneRunSplit:
    """How a run of the task is divided."""
    return PRETRAINED if task.pretrained else FROM_SCRATCH


def own_losses_tell(task: Task) -> bool:
    """Whether training steps give the plain loss of each example once per pass.

    They do not if the task has training losses of its own, such as weighted ones, or if batches hold similar lengths.
    """
    return type(task).training_losses is Task.training_losses and lengths(task.pool) is None


def standardised(signal: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """The signal (shape (N,)) with mean 0 and deviation 1 in each group; 0 where it is NaN or does not vary."""
    z = np.zeros(len(signal))
    codes = np.zeros(len(signal), dtype=np.int64) if groups is None else np.asarray(groups)
    for group in np.unique(codes):
        mask = (codes == group) & np.isfinite(signal)
        values = signal[mask]
        if len(values) and (deviation := float(values.std())) > 0:
            z[mask] = (values - values.mean()) / deviation
    return z


def by_example(pool: Pool, z: np.ndarray) -> np.ndarray:
    """CADS-E: `s_i = sigmoid(1 - k z_i)`, shape (N,)."""
    return np.asarray(expit(1 - SHARPNESS * z))


def by_source(pool: Pool, z: np.ndarray) -> np.ndarray:
    """CADS-S: `sigmoid(1 - k z)` of the mean z of each example's source, shape (N,).

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
    """Record the mean weight in each source, if there are sources."""
    if means := source_means(pool, weights):
        monitor.probabilities(pool.source_names, np.array(list(means.values())), step)
