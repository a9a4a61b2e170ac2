"""What a ranker does, stage by stage: one description, from which `rank_plan` charges and `rank` works.

A plan charges for each stage and runs nothing; a ranking carries the stages out, and charges for what they spend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from cads.accounting.ledger import ROUNDING, SELECT, Ledger, PlannedLedger
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.errors import DataError
from cads.monitor import Monitor
from cads.scoring.pool_scores import planned_flops
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer


class RankingStage(Protocol):
    """One stage of a ranking."""

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """Charge `ledger` for the stage, with the models and examples of `task`; nothing is run."""
        ...


@dataclass(frozen=True)
class TrainOnTarget:
    """Train the task's model on the target.

    Attributes:
        name: what the ledger calls it.
        passes: over the target; 0 are free, and leave the initial weights.
    """

    name: str
    passes: float

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """To the step; see `RankingStage`."""
        _charge_training(task, task.target, self.passes, ledger, name=self.name)

    def run(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> nn.Module:
        """The trained model."""
        if not self.passes:
            return on_training_device(task, task.model(seed))
        batches = BatchStream(task.pool, [], task.recipe.batch_size, target=task.target, target_fraction=1.0, seed=seed)
        flops = _flops(task, task.target, self.passes)
        trainer = Trainer(task, ledger, monitor)
        return trainer.fit(task.model(seed), batches, flops, seed=seed, phase=SELECT, stage=self.name).models[0]


@dataclass(frozen=True)
class TrainOnPool:
    """Train models on the whole pool.

    Attributes:
        name: what the ledger calls it.
        passes: of each model over the pool; 0 are free, and leave the initial weights.
        n_models: how many.
    """

    name: str
    passes: float
    n_models: int = 1

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """To the step; see `RankingStage`."""
        _charge_training(task, task.pool, self.passes, ledger, name=self.name, n_models=self.n_models)

    def run(
        self, task: Task, *, seeds: Sequence[int], ledger: Ledger, monitor: Monitor | None = None
    ) -> list[nn.Module]:
        """The trained models, one for each of `n_models` seeds; a seed sets the initial weights and the data order.

        Raises:
            DataError: if a model diverges.
        """
        if not self.passes:
            return [on_training_device(task, task.model(seed)) for seed in seeds]
        # The order is drawn over the sorted ids, so that a permuted pool gives the same models.
        streams = [ShuffledStream(by_id(task.pool), derive(seed, "order")) for seed in seeds]
        batches = BatchStream(task.pool, streams, task.recipe.batch_size)
        models = [task.model(seed) for seed in seeds]
        fit = Trainer(task, ledger, monitor).fit_replicas(
            models, batches, _flops(task, task.pool, self.passes), seed=seeds[0], phase=SELECT, stage=self.name
        )
        if fit.diverged.any():
            raise DataError(
                f"{self.name}: {fit.diverged.sum()} of {len(seeds)} models met a loss that is not finite: "
                "lower the learning rate, or look at the pool"
            )
        return fit.models


@dataclass(frozen=True)
class ReadPool:
    """One forward pass of each of some models over a pool.

    Attributes:
        name: what the ledger calls it.
        tokens: padded tokens of a batch; None: see `score_pool`.
        n_models: how many.
        pool: what is read; None for the pool of the task.
    """

    name: str
    tokens: int | None = None
    n_models: int = 1
    pool: Pool | None = None

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """Padding included; see `RankingStage`."""
        flops = planned_flops(task.costs.forward, self.pool_of(task), tokens=self.tokens)
        ledger.charge(SELECT, self.name, self.n_models * flops)
        ledger.scored.append(task)

    def pool_of(self, task: Task) -> Pool:
        """What is read of `task`."""
        return self.pool or task.pool


@dataclass(frozen=True)
class Priced:
    """Work whose price is known before it is done: a plan and a ranking may charge the same.

    Attributes:
        name: what the ledger calls it.
        flops: what it costs.
        usages, tokens: what of them it takes.
    """

    name: str
    flops: float
    usages: int = 0
    tokens: int = 0

    def charge(self, task: Task, ledger: Ledger) -> None:
        """The price, to a plan or for what is done; see `RankingStage`."""
        ledger.charge(SELECT, self.name, self.flops, usages=self.usages, tokens=self.tokens)


def _charge_training(
    task: Task, pool: Pool, passes: float, ledger: PlannedLedger, *, name: str, n_models: int = 1
) -> None:
    """Charge `ledger` what training `n_models` models for `passes` over `pool` costs; 0 passes are free."""
    if not passes:
        return
    batch_size, steps = task.recipe.batch_size, _steps(task, pool, passes)
    usages = n_models * steps * batch_size
    tokens = round(usages * task.costs.tokens_per_example(pool))
    ledger.charge(SELECT, name, usages * task.costs.per_usage(pool, batch_size), usages=usages, tokens=tokens)
    ledger.trained.append((task, n_models))


def on_training_device(task: Task, model: nn.Module) -> nn.Module:
    """`model` on the device where the task trains."""
    return model.to(Trainer(task, Ledger()).accelerator.device)


def _steps(task: Task, pool: Pool, passes: float) -> int:
    """Optimizer steps of `passes` over `pool`, at least 1."""
    return max(1, round(passes * len(pool) / task.recipe.batch_size))


def _flops(task: Task, pool: Pool, passes: float) -> float:
    """FLOPs that pay for the steps of `passes` over `pool`."""
    batch_size = task.recipe.batch_size
    return _steps(task, pool, passes) * batch_size * task.costs.per_usage(pool, batch_size) * ROUNDING
