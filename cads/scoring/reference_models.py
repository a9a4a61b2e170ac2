"""Models that score examples: the task they are of, the passes they are trained for, their device."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import torch
from torch import nn

from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.task import Task


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


def in_pool_order(values: np.ndarray, scored: Pool, pool: Pool) -> np.ndarray:
    """Values in the order of `scored`, shape (N,), in the order of `pool`, which holds the same examples."""
    if scored.ids.equals(pool.ids):
        return values
    return np.asarray(values[pc.index_in(pool.ids, value_set=scored.ids).to_numpy()])


def check_passes(**passes: float) -> None:
    """Refuse numbers of passes that are negative or not finite.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in passes.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} = {value}: a number of passes, at least 0")


def device_of(model: nn.Module) -> torch.device:
    """The device of the weights of `model`."""
    return next(model.parameters()).device
