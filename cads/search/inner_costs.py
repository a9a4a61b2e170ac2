"""The costs of inner runs, and planning them without running any."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.data.pool import Pool
from cads.data.token_batches import by_id
from cads.scoring.pool_scores import planned_flops
from cads.search.constants import constants_of
from cads.search.fidelity import Rung, data_fraction, fidelity_schedule
from cads.search.stages import FitTarget, ScorePool, Stage, Steps, Trials, UpdatePolicy
from cads.task import Task


class InnerLoopCosts:
    """The costs of inner runs of a task, and the ledger that is charged for them.

    Attributes:
        n_trials: models that have been trained on the pool and measured so far.
        fitted: the part of the target on which the target model is trained.
        measured: the part of the target on which models are measured.

    Args:
        task: what is trained.
        ledger: charged for training and for measuring.
        held_out: whether the target model, theta, is trained on one half of the target, and models are measured on the
            other half. Where theta decides on single examples, measuring on its own training data would favour them.
    """

    def __init__(self, task: Task, ledger: Ledger, *, held_out: bool = False) -> None:
        self.task = task
        self.ledger = ledger
        self.n_trials = 0
        self.fitted = self.measured = task.target
        if held_out and len(task.target) > 1:
            ids, order = by_id(task.target), np.random.default_rng(0).permutation(len(task.target))
            self.fitted = task.target.subset(ids[np.sort(order[::2])], "target, half for the target model")
            self.measured = task.target.subset(ids[np.sort(order[1::2])], "target, half to measure on")

    @property
    def step_flops(self) -> float:
        """One mean training step on the pool."""
        return self._step(self.task.pool)

    @cached_property
    def target_step_flops(self) -> float:
        """One step of the target model on the most expensive examples of the target, whose lengths may differ.

        So many FLOPs buy a step, whichever examples are drawn first.
        """
        costs, batch_size = self.task.costs, self.task.recipe.batch_size
        return float(costs.usages(self.fitted).max() + costs.optimizer_step / batch_size) * batch_size

    def target_steps_flops(self, count: float) -> float:
        """`count` mean steps of the target model, or one step on the most expensive examples if that takes more."""
        return max(self.target_step_flops, count * self._step(self.fitted))

    @property
    def measuring_flops(self) -> float:
        """Measuring one model on the target."""
        return self.task.costs.forward_pool(self.measured)

    def scoring_flops(self, count: int) -> float:
        """One forward pass over `count` examples of the pool."""
        return self._scoring_flops / len(self.task.pool) * count

    @cached_property
    def _scoring_flops(self) -> float:
        return planned_flops(self.task.costs.forward, self.task.pool)

    def target_flops(self, share: float, passes: float, train_flops: float) -> float:
        """For the target model: a share of the final training, but at most `passes` passes over the target."""
        batch_size = self.task.recipe.batch_size
        return min(share * train_flops, passes * self._step(self.fitted) / batch_size * len(self.fitted))

    def fidelity_schedule(self, train_flops: float, per_rung: float = 0.0, reserved: float = 0.0) -> list[Rung]:
        """The rungs that the rest of the ledger's limit buys, less `reserved` FLOPs.

        Args:
            train_flops: of the final training. per_rung: further FLOPs of each rung.
        """
        return fidelity_schedule(
            train_flops,
            self.ledger.left - reserved,
            self.step_flops,
            self.measuring_flops,
            self.passes(train_flops),
            per_rung,
            constants=constants_of(self.task),
        )

    def deciding_rung(self, fidelity: float, train_flops: float, n_trials: int) -> Rung:
        """A rung that decides: no longer trials follow. `data_fraction` gives its share of the data."""
        data = data_fraction(fidelity, self.passes(train_flops), constants_of(self.task), decides=True)
        return Rung(fidelity, fidelity * train_flops, data, n_trials)

    def passes(self, train_flops: float) -> float:
        """The passes over the pool that `train_flops` buy."""
        return train_flops * self.task.recipe.batch_size / (self.step_flops * len(self.task.pool))

    def learn(self, flops: float) -> None:
        """Charge for an update of the policy."""
        self.ledger.charge(SELECT, "policy", flops)

    def pay_steps(self, steps: Steps) -> None:
        """Charge for training steps on the pool, in mean examples."""
        usages = steps.n_steps * self.task.recipe.batch_size
        tokens = round(usages * self.task.costs.tokens_per_example(self.task.pool))
        self.ledger.charge(SELECT, steps.name, steps.flops, usages=usages, tokens=tokens)

    def _step(self, pool: Pool) -> float:
        batch_size = self.task.recipe.batch_size
        return self.task.costs.per_usage(pool, batch_size) * batch_size


class PlannedInnerLoop(InnerLoopCosts):
    """Charges for stages as `InnerLoop` would, and runs nothing."""

    ledger: PlannedLedger

    def __init__(self, task: Task, limit: float, *, held_out: bool = False) -> None:
        super().__init__(task, PlannedLedger(limit), held_out=held_out)

    def charge(self, stage: Stage) -> None:
        """Charge for a stage, at the cost of mean examples where the stage names no FLOPs."""
        match stage:
            case FitTarget(flops, name):
                self._train(self.fitted, 1, flops, name)
            case ScorePool(count, name, flops):
                self._score(count, name, flops)
            case Trials(rung, _, probe):
                self._train(self.task.pool, rung.n_trials, rung.flops, stage.stage)
                self.ledger.charge(SELECT, f"{stage.stage}, measuring", rung.n_trials * self.measuring_flops)
                self.n_trials += rung.n_trials
                if probe is not None:
                    self.charge(probe)
            case Steps():
                self.pay_steps(stage)
                self.ledger.trained.append((self.task, 1))
            case UpdatePolicy(flops):
                self.learn(flops)

    def _score(self, count: int, name: str, flops: float | None) -> None:
        tokens = round(count * self.task.costs.tokens_per_example(self.task.pool))
        self.ledger.charge(SELECT, name, self.scoring_flops(count) if flops is None else flops, tokens=tokens)
        self.ledger.scored.append(self.task)

    def _train(self, pool: Pool, runs: int, flops: float, stage: str) -> None:
        step = self._step(pool)
        steps = int(min(flops, self.ledger.left / runs) / step * (1 + 1e-12))
        usages = runs * steps * self.task.recipe.batch_size
        tokens = round(usages * self.task.costs.tokens_per_example(pool))
        self.ledger.charge(SELECT, stage, runs * steps * step, usages=usages, tokens=tokens)
        self.ledger.trained.append((self.task, runs))
