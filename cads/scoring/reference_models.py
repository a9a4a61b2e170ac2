"""Models that score examples: trained a little on the pool or on the target, for a number of passes."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc
import torch
from torch import nn

from cads.accounting.ledger import ROUNDING, SELECT, Ledger, PlannedLedger
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer


def proxy_of(task: Task) -> Task:
    """The task whose model scores examples: the proxy that the task names, or the task itself.

    Raises:
        ConfigError: if the proxy is about other examples, or examples of another kind.
    """
    proxy = task.proxy
    if proxy is None:
        return task
    for mine, its in ((task.pool, proxy.pool), (task.target, proxy.target)):
        if len(mine) != len(its) or not pc.all(pc.is_in(mine.ids, value_set=its.ids)).as_py():
            raise ConfigError(
                f"{proxy.name} scores for {task.name}, and its {its.name} has other ids: the scorer's task must hold "
                "the same examples"
            )
        own, its_own = (sorted(pool.batch([0]).inputs) for pool in (mine, its))
        if not set(own) & set(its_own):
            raise ConfigError(
                f"{proxy.name} scores for {task.name}, and reads {its_own} of the {its.name} where the task reads "
                f"{own}: the scorer's task must be of the same kind"
            )
    return proxy


def check_passes(**passes: float) -> None:
    """Refuse numbers of passes that are negative or not finite.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in passes.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} = {value}: a number of passes, at least 0")


def plan_training(task: Task, part: Pool, passes: float, ledger: PlannedLedger, *, stage: str, models: int = 1) -> None:
    """Charge `ledger` as training `models` models for `passes` over `part` will; 0 passes are free."""
    if not passes:
        return
    batch_size, steps = task.recipe.batch_size, _steps(task, part, passes)
    usages = models * steps * batch_size
    tokens = round(usages * task.costs.tokens_per_example(part))
    ledger.charge(SELECT, stage, usages * task.costs.per_usage(part, batch_size), usages=usages, tokens=tokens)
    ledger.trained.append((task, models))


def train_on_pool(
    task: Task,
    passes: float,
    *,
    seeds: Sequence[int],
    ledger: Ledger,
    monitor: Monitor | None = None,
    stage: str,
) -> list[nn.Module]:
    """One model a seed (of its initial weights and of the order of its data), trained for `passes` over the pool.

    Raises:
        DataError: if one diverges.
    """
    if not passes:
        return [_placed(task, task.model(seed)) for seed in seeds]
    # The order is drawn over the sorted ids: a permuted pool gives the same models.
    streams = [ShuffledStream(by_id(task.pool), derive(seed, "order")) for seed in seeds]
    draws = BatchStream(task.pool, streams, task.recipe.batch_size)
    models = [task.model(seed) for seed in seeds]
    fit = Trainer(task, ledger, monitor).fit_replicas(
        models, draws, _flops(task, task.pool, passes), seed=seeds[0], phase=SELECT, stage=stage
    )
    if fit.diverged.any():
        raise DataError(
            f"{stage}: {fit.diverged.sum()} of {len(seeds)} models met a loss that is not finite: "
            "lower the learning rate, or look at the pool"
        )
    return fit.models


def train_on_target(
    task: Task, passes: float, *, seed: int, ledger: Ledger, monitor: Monitor | None = None, stage: str
) -> nn.Module:
    """The task's model, trained for `passes` over the target."""
    if not passes:
        return _placed(task, task.model(seed))
    draws = BatchStream(task.pool, [], task.recipe.batch_size, target=task.target, target_fraction=1.0, seed=seed)
    flops = _flops(task, task.target, passes)
    trainer = Trainer(task, ledger, monitor)
    return trainer.fit(task.model(seed), draws, flops, seed=seed, phase=SELECT, stage=stage).models[0]


def device_of(model: nn.Module) -> torch.device:
    """Where the weights of `model` are."""
    return next(model.parameters()).device


def _placed(task: Task, model: nn.Module) -> nn.Module:
    return model.to(Trainer(task, Ledger()).accelerator.device)


def _steps(task: Task, part: Pool, passes: float) -> int:
    return max(1, round(passes * len(part) / task.recipe.batch_size))


def _flops(task: Task, part: Pool, passes: float) -> float:
    batch_size = task.recipe.batch_size
    return _steps(task, part, passes) * batch_size * task.costs.per_usage(part, batch_size) * ROUNDING
