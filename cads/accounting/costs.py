"""What one usage costs, in FLOPs of forward and of forward+backward: one interface, three accountings.

`measured` runs each shape of example once under `FlopCounterMode`; `analytic` adds up closed forms; `paper` is
2ND and 6ND. Each shape is worked out once and cached, so that counting is a look-up while a model trains.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.closed_form import check_layers, product_flops
from cads.accounting.measured import PROBE_SIZE, count_flops
from cads.accounting.nominal import forward_flops, training_flops
from cads.accounting.transformer import read_transformer, trainable_size
from cads.data.batch import Batch, Shape
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig

log = logging.getLogger(__name__)

AccountingName = Literal["measured", "analytic", "paper"]

ADAMW_FLOPS = 15
"""Per parameter: decay 2, first moment 3, second moment 4, bias corrections 2, and one each for root,
epsilon, division and update."""
SGD_FLOPS = 6
"""Per parameter: decay 2, momentum 2, update 2."""
CLIP_FLOPS = 3
"""Per parameter: square, sum, scale."""


class ExampleCost(NamedTuple):
    """Of one example: FLOPs of forward and of forward+backward, and the tokens they are for."""

    forward: float
    usage: float
    tokens: float


class Workload(Protocol):
    """What is accounted for: examples, a model and its losses. Every `cads.task.Task` is one."""

    name: str
    pool: Pool
    recipe: TrainConfig

    @property
    def costs(self) -> Costs:
        """What one example costs."""
        ...

    def model(self, seed: int) -> nn.Module:
        """A fresh model."""
        ...

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example, nats, shape (B,)."""
        ...

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """(N, D) of `paper` accounting: parameters and tokens."""
        ...


class Accounting(ABC):
    """A way to say what an example costs on the model of a task.

    Args:
        task: whose model, losses and recipe are used.

    Raises:
        ConfigError: if the task cannot be accounted for in this way.
    """

    name: AccountingName

    def __init__(self, task: Workload) -> None:
        self.task = task

    @cached_property
    def model(self) -> nn.Module:
        """A model of the task, trainable as it will be trained; its weights are not used."""
        return self.task.model(0)

    @abstractmethod
    def price(self, batch: Batch) -> ExampleCost:
        """Of one example of the shape of `batch`."""

    @property
    def optimizer_step(self) -> float:
        """One update of the trainable parameters, with clipping if the recipe asks for it."""
        recipe = self.task.recipe
        per_parameter = ADAMW_FLOPS if recipe.optimizer == "adamw" else SGD_FLOPS
        return float(trainable_size(self.model) * (per_parameter + (CLIP_FLOPS if recipe.clip_norm else 0)))

    def _probe(self, batch: Batch) -> Batch:
        return batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))


class MeasuredAccounting(Accounting):
    """What is executed, counted by running it."""

    name = "measured"

    def price(self, batch: Batch) -> ExampleCost:
        """Runs one batch.

        Raises:
            DataError: if it cannot run.
        """
        probe = self._probe(batch)
        model = self.model.train()

        def forward() -> Tensor:
            return self.task.losses(model, probe).mean()

        with torch.random.fork_rng():
            try:
                usage = count_flops(lambda: forward().backward())
                with torch.no_grad():
                    once = count_flops(forward)
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(f"an example of shape {batch.shape} cannot run through the model: {error}") from error
        model.zero_grad(set_to_none=True)
        return ExampleCost(once / PROBE_SIZE, usage / PROBE_SIZE, batch.tokens / len(batch))


class AnalyticAccounting(Accounting):
    """Closed forms: of a transformer by its config, of other models by their linears and convolutions."""

    name = "analytic"

    def __init__(self, task: Workload) -> None:
        super().__init__(task)
        self._transformer = read_transformer(self.model)
        if self._transformer is None:
            check_layers(self.model)
        elif "input_ids" not in task.pool.batch(np.zeros(1, dtype=np.int64)).inputs:
            raise ConfigError("a transformer has a closed form for `input_ids` alone, and this task has other inputs")

    def price(self, batch: Batch) -> ExampleCost:
        """Adds up one example.

        Raises:
            DataError: if it cannot run.
        """
        tokens = batch.tokens / len(batch)
        try:
            if self._transformer is not None:
                # A task that learns from answers alone says where they are; the head computes nothing else.
                answers = batch.inputs.get("answers")
                head_positions = None if answers is None else answers.shape[-1]
                once, usage = self._transformer.flops(batch.inputs["input_ids"].shape[-1], head_positions)
                return ExampleCost(once, usage, tokens)
            probe = self._probe(batch).to("meta")
            found = product_flops(self.model.train(), lambda model: self.task.losses(model, probe))
        except ConfigError as error:
            raise DataError(f"an example of shape {batch.shape} cannot run through the model: {error}") from error
        return ExampleCost(found.forward / PROBE_SIZE, found.usage / PROBE_SIZE, tokens)


class PaperAccounting(Accounting):
    """2ND and 6ND, with the N and D that the task states; the optimizer is free."""

    name = "paper"
    optimizer_step = 0.0

    def __init__(self, task: Workload) -> None:
        super().__init__(task)
        self.price(task.pool.batch(np.zeros(1, dtype=np.int64)))

    def price(self, batch: Batch) -> ExampleCost:
        """From the size of the model and the number of tokens."""
        n, d = self.task.nominal(self.model, batch)
        d /= len(batch)
        return ExampleCost(forward_flops(n, d), training_flops(n, d), d)


ACCOUNTINGS: dict[str, type[Accounting]] = {
    x.name: x for x in (MeasuredAccounting, AnalyticAccounting, PaperAccounting)
}


class Costs:
    """What the examples of a task cost on its model, in FLOPs.

    Args:
        task: whose model and losses are counted.
        accounting: `measured`, `analytic` or `paper`. A model without a closed form is measured, with a warning.

    Attributes:
        accounting: the one that is used.

    Raises:
        ConfigError: if there is no such accounting, or the task does not support it.
    """

    def __init__(self, task: Workload, accounting: str = "measured") -> None:
        if accounting not in ACCOUNTINGS:
            raise ConfigError(f"accounting = {accounting!r}: choose from {list(ACCOUNTINGS)}")
        self._accounting: Accounting
        try:
            self._accounting = ACCOUNTINGS[accounting](task)
        except ConfigError as error:
            if accounting != AnalyticAccounting.name:
                raise
            log.warning("the cost of %s falls back to `measured` accounting: %s", task.name, error)
            self._accounting = MeasuredAccounting(task)
        self.accounting = self._accounting.name
        self._cache: dict[Shape, ExampleCost] = {}
        self._pools: WeakKeyDictionary[Pool, ExampleCost] = WeakKeyDictionary()

    def forward(self, batch: Batch) -> float:
        """One forward pass of all of `batch`."""
        return self._price(batch).forward * len(batch)

    def usage(self, batch: Batch) -> float:
        """One forward and backward pass of all of `batch`."""
        return self._price(batch).usage * len(batch)

    @cached_property
    def optimizer_step(self) -> float:
        """One update of the trainable parameters, with clipping if the recipe asks for it."""
        return self._accounting.optimizer_step

    @property
    def model(self) -> nn.Module:
        """The model that is accounted for; its weights mean nothing."""
        return self._accounting.model

    def per_usage(self, pool: Pool, batch_size: int) -> float:
        """Mean cost of using one example of `pool` in training, with its share of the optimizer step."""
        return self._mean(pool).usage + self.optimizer_step / batch_size

    def usages(self, pool: Pool) -> np.ndarray:
        """One forward and backward pass of each example of `pool` by itself, without padding; shape (N,)."""
        representatives, codes = pool.examples.shapes()
        usages = [self._price(pool.batch([r])).usage for r in representatives]
        return np.array(usages, dtype=np.float64)[codes]

    def forward_pool(self, pool: Pool) -> float:
        """One forward pass over all of `pool`, without padding."""
        return self._mean(pool).forward * len(pool)

    def tokens_per_example(self, pool: Pool) -> float:
        """Mean number of tokens that the model computes on, without padding."""
        return self._mean(pool).tokens

    def _mean(self, pool: Pool) -> ExampleCost:
        if pool not in self._pools:
            representatives, codes = pool.examples.shapes()
            prices = np.array([self._price(pool.batch([r])) for r in representatives])
            mean = np.bincount(codes, minlength=len(prices)) @ prices / len(pool)
            self._pools[pool] = ExampleCost(*mean.tolist())
        return self._pools[pool]

    def _price(self, batch: Batch) -> ExampleCost:
        shape = batch.shape
        price = self._cache.get(shape)
        if price is None:
            price = self._cache[shape] = self._accounting.price(batch)
        return price
