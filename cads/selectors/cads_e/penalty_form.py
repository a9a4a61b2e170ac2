"""CADS-E as published: the plain penalty form, live (Wan, Zhang, Jin; NeurIPS 2025, arXiv 2510.16806).

    min_s min_theta  E_m [ L_val(theta) + alpha ( L_tr(theta; m) - l*_C(m) ) ],   m_i ~ Bernoulli(s_i)

theta, the target model, takes steps on the target and on draws from the policy, in the proportion 1 : alpha. u, the
reference model, takes steps on draws from the policy alone, and its losses stand for l*. Both train once, a step of
each in turn, and the policy takes a step with them: along

    alpha ( d_i - mean_j d_j ) / sum(s),     d_i = l_i(theta) - l_i(u)

at each example i of the batch, from the losses that the steps compute anyway. The expected size falls from N to the
size that is wanted, as in PBCS (Zhou et al., ICML 2022). `docs/published.md` says what of this the abstract states.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import ROUNDING, SELECT, Ledger, PlannedLedger
from cads.data.ids import best_first
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.token_batches import by_id
from cads.errors import ConfigError, NotAffordableError
from cads.monitor import Monitor
from cads.search.allowance import BudgetSplit, split_budget
from cads.search.choice import Choice
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.stages import Stages, Steps, UpdatePolicy
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.cads_e.live_gap import Estimator, KDraw, LiveGap, RaoBlackwellised, ReferenceRider, TargetRider
from cads.task import Task
from cads.training.in_turn import fit_in_turn
from cads.training.learners import SingleLearner

log = logging.getLogger(__name__)

ALLOWANCE = 2.0
"""Selection FLOPs in units of the training FLOPs: theta and u train for about C each, so that u's loss is l*_C."""
PASSES = 4.0
"""Passes over what is kept that the final training makes, unless `fraction` says otherwise: up to four are nearly as
good as fresh data (Muennighoff et al., 2023, arXiv 2305.16264)."""
MAX_KEPT = 0.5
"""Largest share of the pool that is kept, unless `fraction` says otherwise."""
MIN_STEPS = 40
"""Fewest steps of both models: with fewer they know nothing that tells examples apart."""
CURVE_POINTS = 200
"""Largest number of points of a curve."""
NO_STEPS_AFFORDABLE = (
    "the allowance does not buy enough steps of the two models of the penalty: the full pool is returned"
)

EstimatorName = Literal["rao-blackwell", "k-draw"]


@dataclass
class PenalizedExamples:
    """CADS-E by the plain penalty: two models train alongside, and their losses move the probability of each example.

    Raises:
        ConfigError: if an option is out of range.
    """

    alpha: float = 1.0
    """Weight of the penalty. Of each batch of the target model, alpha / (1 + alpha) is drawn from the pool."""
    fraction: float | None = None
    """Share of the pool to keep; null: as much as the final training passes over four times, but at most half."""
    estimator: EstimatorName = "rao-blackwell"
    """Of the gradient: without sampling at the examples of the batch ("rao-blackwell"), or by the scores of whole
    masks ("k-draw")."""
    draws: int = 5
    """Masks of each step of "k-draw"."""
    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: 2, or less if the budget counts selection."""

    method: ClassVar[str] = "cads-e-penalty"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be positive and finite")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction = {self.fraction}: a share of the pool, above 0 and at most 1")
        if self.estimator not in get_args(EstimatorName):
            raise ConfigError(f"estimator = {self.estimator!r}: choose from {list(get_args(EstimatorName))}")
        if self.draws < 2:
            raise ConfigError(f"draws = {self.draws}: it must be at least 2")

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose examples; see `cads.selector.Selector`."""
        try:
            split, n_steps = self._affordable(task, budget)
            choice = self._search(task, split, n_steps, seed, ledger, monitor or Monitor())
        except NotAffordableError as error:
            log.warning("%s: %s", self.method, error)
            choice = Choice.full_pool(task.pool, str(error))
        return choice.selection(
            task.pool, method=self.method, seed=seed, budget=budget, ledger=ledger, config=asdict(self)
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.selector.Selector`."""
        try:
            split, n_steps = self._affordable(task, budget)
        except NotAffordableError as error:
            return PlannedLedger(note=str(error))
        costs = PlannedInnerLoop(task, split.selection_flops)
        for stage in self.stages(costs, n_steps):
            costs.charge(stage)
        # Both models are in memory at once.
        costs.ledger.trained = [(task, 2)]
        return costs.ledger

    def stages(self, costs: InnerLoopCosts, n_steps: int) -> Stages:
        """Steps of both models, and of the policy; see `cads.search.stages`."""
        reference_flops, target_flops = self._step_flops(costs.task)
        yield Steps("u", n_steps * reference_flops, n_steps)
        yield Steps("theta", n_steps * target_flops, n_steps)
        yield UpdatePolicy(n_steps * self._estimator().flops(len(costs.task.pool)))

    def _affordable(self, task: Task, budget: Budget) -> tuple[BudgetSplit, int]:
        """FLOPs for training and for selection, and the steps that the latter buy.

        Raises:
            NotAffordableError: if they buy too few steps.
            BudgetError: if the budget does not buy one step of the final training.
            ConfigError: if the batches of theta would hold too few examples of target or pool.
        """
        split = split_budget(task, budget, self.allowance, ALLOWANCE)
        n_shared, needed = self._n_shared(task), 2 if self.estimator == "rao-blackwell" else self.draws
        if not needed <= n_shared < task.recipe.batch_size:
            raise ConfigError(
                f"alpha = {self.alpha}: of a batch of {task.recipe.batch_size} the target model would take {n_shared} "
                f"examples from the pool, and it needs at least {needed}, and some from the target too: choose an "
                "alpha nearer to 1, or raise batch_size"
            )
        per_step = sum(self._step_flops(task)) + self._estimator().flops(len(task.pool))
        n_steps = int(split.selection_flops / per_step * ROUNDING)
        if n_steps < MIN_STEPS:
            raise NotAffordableError(NO_STEPS_AFFORDABLE)
        return split, n_steps

    def _search(
        self, task: Task, split: BudgetSplit, n_steps: int, seed: int, ledger: Ledger, monitor: Monitor
    ) -> Choice:
        selection_ledger = Ledger(limit=split.selection_flops)
        inner = InnerLoop(task, selection_ledger, monitor)
        try:
            live, n_taken = self._train(inner, split.train_flops, n_steps, seed)
            inner.learn(n_taken * self._estimator().flops(len(task.pool)))
        finally:
            ledger.merge(selection_ledger)
        probability = live.probabilities()
        selected = np.zeros(len(task.pool), dtype=bool)
        selected[best_first(task.pool.ids, probability)[: self._size(task, split.train_flops)]] = True
        monitor.histogram("outer/probabilities", probability, n_taken)
        monitor.panels(task.pool, probability, n_taken, task.describe)
        return Choice(
            selected=selected,
            score=probability,
            probability=probability,
            source_probability=_source_means(task.pool, probability),
            notes={"steps": n_taken, "expected_size": float(live.policy.size)},
        )

    def _train(self, inner: InnerLoop, train_flops: float, n_steps: int, seed: int) -> tuple[LiveGap, int]:
        """Train u and theta in turn while the policy moves; returns it, and the steps that were taken."""
        task, trainer = inner.task, inner.trainer
        step_flops = self._step_flops(task)
        live = LiveGap(
            task.pool,
            size=self._size(task, train_flops),
            alpha=self.alpha,
            estimator=self._estimator(),
            batch_size=task.recipe.batch_size,
            n_shared=self._n_shared(task),
            n_steps=n_steps,
            flops=n_steps * sum(step_flops),
            price=lambda batches: sum(map(task.costs.usage, batches)) + task.costs.optimizer_step,
            seed=derive(seed, "draws"),
        )

        def watch(step: int) -> None:
            if step % max(1, n_steps // CURVE_POINTS) == 0:
                inner.monitor.scalar("outer/target_model_loss", live.losses[0], step)
                inner.monitor.scalar("outer/loss_within_reach", live.losses[1], step)
                inner.monitor.scalar("outer/gap", live.losses[0] - live.losses[1], step)
                inner.monitor.scalar("outer/expected_size", float(live.policy.size), step)
                inner.monitor.scalar("outer/entropy", live.policy.entropy(), step)

        reference = ReferenceRider(live)
        target_stream = ShuffledStream(by_id(task.target), derive(seed, "target order"))
        target = TargetRider(live, reference, task.target, target_stream, watch)
        model_seed, order = derive(seed, "model"), derive(seed, "training")
        runs = [
            trainer.prepare(
                SingleLearner(task, task.model(model_seed)), rider, n_steps * flops * ROUNDING, order, SELECT, name
            )
            for name, rider, flops in zip(("u", "theta"), (reference, target), step_flops, strict=True)
        ]
        fits = fit_in_turn(trainer, runs, n_steps)
        return live, len(fits[1].losses)

    def _estimator(self) -> Estimator:
        return RaoBlackwellised() if self.estimator == "rao-blackwell" else KDraw(self.draws)

    def _n_shared(self, task: Task) -> int:
        """Examples of the pool in a batch of theta."""
        return task.recipe.batch_size - round(task.recipe.batch_size / (1 + self.alpha))

    def _step_flops(self, task: Task) -> tuple[float, float]:
        """FLOPs of a mean step of u and of theta."""
        batch_size, n_shared = task.recipe.batch_size, self._n_shared(task)
        pool, target = (task.costs.per_usage(part, batch_size) for part in (task.pool, task.target))
        return batch_size * pool, n_shared * pool + (batch_size - n_shared) * target

    def _size(self, task: Task, train_flops: float) -> int:
        """How many examples are kept: at least one."""
        n = len(task.pool)
        if self.fraction is not None:
            return max(1, round(self.fraction * n))
        usages = train_flops / task.costs.per_usage(task.pool, task.recipe.batch_size)
        return max(1, round(min(MAX_KEPT * n, usages / PASSES)))


def _source_means(pool: Pool, probability: np.ndarray) -> dict[str, float]:
    """The mean probability of each source, to the same bits in any order of the pool; empty without sources."""
    if pool.sources is None:
        return {}
    order = by_id(pool)
    means = np.bincount(pool.sources[order], weights=probability[order]) / pool.source_sizes
    return dict(zip(pool.source_names, means.tolist(), strict=True))
