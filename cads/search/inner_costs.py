"""The costs of inner runs, and planning them without running any."""

from __future__ import annotations

from functools import cached_property

from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.data.pool import Pool
from cads.scoring.pool_scores import planned_flops
from cads.search.constants import constants_of
from cads.search.fidelity import Rung, fidelity_schedule
from cads.search.stages import FitTarget, ScorePool, Stage, Steps, Trials, UpdatePolicy
from cads.task import Task


class InnerLoopCosts:
    """The costs of inner runs of a task, and the ledger that is charged for them.

    Attributes:
        n_trials: models that have been trained on the pool and measured so far.

    Args:
        task: what is trained.
        ledger: charged for training and for measuring.
    """

    def __init__(self, task: Task, ledger: Ledger) -> None:
        self.task = task
        self.ledger = ledger
        self.n_trials = 0

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
        return float(costs.usages(self.task.target).max() + costs.optimizer_step / batch_size) * batch_size

    @property
    def measuring_flops(self) -> float:
        """Measuring one model on the target."""
        return self.task.costs.forward_pool(self.task.target)

    def scoring_flops(self, count: int) -> float:
        """One forward pass over `count` examples of the pool."""
        return self._scoring_flops / len(self.task.pool) * count

    @cached_property
    def _scoring_flops(self) -> float:
        return planned_flops(self.task.costs.forward, self.task.pool)

    def target_flops(self, share: float, passes: float, train_flops: float) -> float:
        """For the target model: a share of the final training, but at most `passes` passes over the target."""
        target, batch_size = self.task.target, self.task.recipe.batch_size
        return min(share * train_flops, passes * self._step(target) / batch_size * len(target))

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

    def passes(self, train_flops: float) -> float:
        """The passes over the pool that `train_flops` buy."""
        return train_flops * self.task.recipe.batch_size / (self.step_flops * len(self.task.pool))

    def learn(self, flops: float, name: str = "policy") -> None:
        """Charge for an update of the policy."""
        self.ledger.charge(SELECT, name, flops)

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

    def __init__(self, task: Task, limit: float) -> None:
        super().__init__(task, PlannedLedger(limit))

    def charge(self, stage: Stage) -> None:
        """Charge for a stage, at the cost of mean examples where the stage names no FLOPs."""
        match stage:
            case FitTarget(flops, name):
                self._train(self.task.target, 1, flops, name)
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
            case UpdatePolicy(flops, name):
                self.learn(flops, name)

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
