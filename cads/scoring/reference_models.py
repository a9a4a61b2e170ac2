"""Models that score examples, trained for a number of passes over the pool (reference model) or the target (target
model)."""

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
        ConfigError: if the proxy has other examples, or examples of another kind.
    """
    proxy = task.proxy
    if proxy is None:
        return task
    for pool, proxy_pool in ((task.pool, proxy.pool), (task.target, proxy.target)):
        if len(pool) != len(proxy_pool) or not pc.all(pc.is_in(pool.ids, value_set=proxy_pool.ids)).as_py():
            raise ConfigError(
                f"{proxy.name} scores for {task.name}, and its {proxy_pool.name} has other ids: the scorer's task must "
                "hold the same examples"
            )
        inputs, proxy_inputs = (sorted(part.batch([0]).inputs) for part in (pool, proxy_pool))
        if not set(inputs) & set(proxy_inputs):
            raise ConfigError(
                f"{proxy.name} scores for {task.name}, and reads {proxy_inputs} of the {proxy_pool.name} where the "
                f"task reads {inputs}: the scorer's task must be of the same kind"
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


def plan_training(task: Task, pool: Pool, passes: float, ledger: PlannedLedger, *, stage: str, models: int = 1) -> None:
    """Charge `ledger` what training `models` models for `passes` over `pool` costs; 0 passes are free."""
    if not passes:
        return
    batch_size, steps = task.recipe.batch_size, _steps(task, pool, passes)
    usages = models * steps * batch_size
    tokens = round(usages * task.costs.tokens_per_example(pool))
    ledger.charge(SELECT, stage, usages * task.costs.per_usage(pool, batch_size), usages=usages, tokens=tokens)
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
    """One model per seed, trained for `passes` over the pool; a seed sets the initial weights and the data order.

    Raises:
        DataError: if a model diverges.
    """
    if not passes:
        return [_placed(task, task.model(seed)) for seed in seeds]
    # The order is drawn over the sorted ids, so that a permuted pool gives the same models.
    streams = [ShuffledStream(by_id(task.pool), derive(seed, "order")) for seed in seeds]
    batches = BatchStream(task.pool, streams, task.recipe.batch_size)
    models = [task.model(seed) for seed in seeds]
    fit = Trainer(task, ledger, monitor).fit_replicas(
        models, batches, _flops(task, task.pool, passes), seed=seeds[0], phase=SELECT, stage=stage
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
    batches = BatchStream(task.pool, [], task.recipe.batch_size, target=task.target, target_fraction=1.0, seed=seed)
    flops = _flops(task, task.target, passes)
    trainer = Trainer(task, ledger, monitor)
    return trainer.fit(task.model(seed), batches, flops, seed=seed, phase=SELECT, stage=stage).models[0]


def device_of(model: nn.Module) -> torch.device:
    """The device of the weights of `model`."""
    return next(model.parameters()).device


def _placed(task: Task, model: nn.Module) -> nn.Module:
    """`model` on the device where the task trains."""
    return model.to(Trainer(task, Ledger()).accelerator.device)


def _steps(task: Task, pool: Pool, passes: float) -> int:
    """Optimizer steps of `passes` over `pool`, at least 1."""
    return max(1, round(passes * len(pool) / task.recipe.batch_size))


def _flops(task: Task, pool: Pool, passes: float) -> float:
    """FLOPs that pay for the steps of `passes` over `pool`."""
    batch_size = task.recipe.batch_size
    return _steps(task, pool, passes) * batch_size * task.costs.per_usage(pool, batch_size) * ROUNDING
