"""The cost of one example in FLOPs, forward and forward+backward: one interface, three accountings.

`measured` runs each shape of example once under `FlopCounterMode`. `analytic` adds up closed forms. `paper` is 2ND and
6ND. The cost of each shape is cached, so that counting is a look-up while a model trains.
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
from cads.accounting.hollow import hollow
from cads.accounting.measured import PROBE_SIZE, count_flops, uncounted_operations
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
    """The cost of one example: FLOPs of forward and of forward+backward, and the number of tokens."""

    forward: float
    usage: float
    tokens: float


class Workload(Protocol):
    """What accounting needs: examples, a model and its losses. Every `cads.task.Task` is one."""

    name: str
    pool: Pool
    recipe: TrainConfig

    @property
    def costs(self) -> Costs:
        """The cost of one example."""
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
    """A method that computes the cost of an example on the model of a task.

    Args:
        task: whose model, losses and recipe are used.

    Raises:
        ConfigError: if the method does not apply to the task.
    """

    name: AccountingName

    def __init__(self, task: Workload) -> None:
        self.task = task

    @cached_property
    def model(self) -> nn.Module:
        """A model of the task on the CPU, with `requires_grad` as in training, and zeros for weights (`hollow`)."""
        return hollow(self.task.model(0))

    @abstractmethod
    def price(self, batch: Batch) -> ExampleCost:
        """The cost of one example of the shape of `batch`."""

    @property
    def optimizer_step(self) -> float:
        """FLOPs of one update of the trainable parameters, with clipping if the recipe clips."""
        recipe = self.task.recipe
        per_parameter = ADAMW_FLOPS if recipe.optimizer == "adamw" else SGD_FLOPS
        return float(trainable_size(self.model) * (per_parameter + (CLIP_FLOPS if recipe.clip_norm else 0)))

    def _probe(self, batch: Batch) -> Batch:
        """`PROBE_SIZE` copies of the first example."""
        return batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))


class MeasuredAccounting(Accounting):
    """The FLOPs that are executed, counted while one batch runs."""

    name = "measured"

    def __init__(self, task: Workload) -> None:
        super().__init__(task)
        self._looked_for_uncounted = False

    def price(self, batch: Batch) -> ExampleCost:
        """Run one batch and count. Operations that do products and are not counted are named in a warning.

        Raises:
            DataError: if the batch cannot run through the model.
            ConfigError: if nothing of what it runs through is counted.
        """
        probe = self._probe(batch)
        model = self.model.train()

        def forward() -> Tensor:
            return self.task.losses(model, probe).mean()

        with torch.random.fork_rng():
            try:
                usage = count_flops(lambda: self._named(lambda: forward().backward()))
                with torch.no_grad():
                    forward_only = count_flops(forward)
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(f"an example of shape {batch.shape} cannot run through the model: {error}") from error
        model.zero_grad(set_to_none=True)
        if not usage:
            raise ConfigError(
                f"the model of {self.task.name} has no operation whose FLOPs are counted, so that no budget can be "
                "kept: write its products as such (nn.Linear, nn.Conv2d, x @ w), not as sums of elementwise ones"
            )
        return ExampleCost(forward_only / PROBE_SIZE, usage / PROBE_SIZE, batch.tokens / len(batch))

    def _named(self, run: Callable[[], Any]) -> None:
        """Run, and the first time warn of what is not counted."""
        if self._looked_for_uncounted:
            run()
            return
        self._looked_for_uncounted = True
        if names := uncounted_operations(run):
            log.warning(
                "%s: the FLOPs of %s are not counted, so that it costs more than the ledger says; budgets are kept "
                "in what is counted",
                self.task.name,
                ", ".join(names),
            )


class AnalyticAccounting(Accounting):
    """Closed forms: for a transformer from its config, for other models from their linears and convolutions."""

    name = "analytic"

    def __init__(self, task: Workload) -> None:
        super().__init__(task)
        self._transformer = read_transformer(self.model)
        if self._transformer is None:
            check_layers(self.model)
        elif "input_ids" not in task.pool.batch(np.zeros(1, dtype=np.int64)).inputs:
            raise ConfigError("a transformer has a closed form for `input_ids` alone, and this task has other inputs")

    def price(self, batch: Batch) -> ExampleCost:
        """Add up the closed forms for one example.

        Raises:
            DataError: if the example cannot run through the model.
        """
        tokens = batch.tokens / len(batch)
        try:
            if self._transformer is not None:
                # A task whose loss is on answer tokens alone gives their positions: the head computes only those.
                answers = None if getattr(self.task, "full_logits", False) else batch.inputs.get("answers")
                head_positions = None if answers is None else answers.shape[-1]
                forward, usage = self._transformer.flops(batch.inputs["input_ids"].shape[-1], head_positions)
                return ExampleCost(forward, usage, tokens)
            probe = self._probe(batch).to("meta")
            flops = product_flops(self.model.train(), lambda model: self.task.losses(model, probe))
        except ConfigError as error:
            raise DataError(f"an example of shape {batch.shape} cannot run through the model: {error}") from error
        return ExampleCost(flops.forward / PROBE_SIZE, flops.usage / PROBE_SIZE, tokens)


class PaperAccounting(Accounting):
    """2ND and 6ND, with N and D from `Workload.nominal`; the optimizer step costs nothing."""

    name = "paper"
    optimizer_step = 0.0

    def __init__(self, task: Workload) -> None:
        super().__init__(task)
        self.price(task.pool.batch(np.zeros(1, dtype=np.int64)))

    def price(self, batch: Batch) -> ExampleCost:
        """The cost from the number of parameters and tokens."""
        n, d = self.task.nominal(self.model, batch)
        d /= len(batch)
        return ExampleCost(forward_flops(n, d), training_flops(n, d), d)


ACCOUNTINGS: dict[str, type[Accounting]] = {
    x.name: x for x in (MeasuredAccounting, AnalyticAccounting, PaperAccounting)
}


class Costs:
    """The cost of the examples of a task on its model, in FLOPs.

    Args:
        task: whose model and losses are counted.
        accounting: `measured`, `analytic` or `paper`. A model without a closed form is measured, with a warning.

    Attributes:
        accounting: the name of the accounting in use.

    Raises:
        ConfigError: if the accounting is unknown, or the task does not support it.
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
        """FLOPs of one forward pass of all examples of `batch`."""
        return self._price(batch).forward * len(batch)

    def usage(self, batch: Batch) -> float:
        """FLOPs of one forward and backward pass of all examples of `batch`."""
        return self._price(batch).usage * len(batch)

    @cached_property
    def optimizer_step(self) -> float:
        """FLOPs of one update of the trainable parameters, with clipping if the recipe clips."""
        return self._accounting.optimizer_step

    @property
    def model(self) -> nn.Module:
        """The model whose cost is counted: on the CPU, and with zeros for weights, which take no memory."""
        return self._accounting.model

    def per_usage(self, pool: Pool, batch_size: int) -> float:
        """Mean FLOPs of one usage of an example of `pool` in training, with its share of the optimizer step."""
        return self._mean(pool).usage + self.optimizer_step / batch_size

    def usages(self, pool: Pool) -> np.ndarray:
        """FLOPs of one forward and backward pass of each example of `pool`, without padding; float64, shape (N,)."""
        representatives, codes = pool.examples.shapes()
        usages = [self._price(pool.batch([r])).usage for r in representatives]
        return np.array(usages, dtype=np.float64)[codes]

    def forward_pool(self, pool: Pool) -> float:
        """FLOPs of one forward pass over all of `pool`, without padding."""
        return self._mean(pool).forward * len(pool)

    def tokens_per_example(self, pool: Pool) -> float:
        """Mean number of tokens of an example that the model computes on, without padding."""
        return self._mean(pool).tokens

    def _mean(self, pool: Pool) -> ExampleCost:
        """The mean cost over all examples of `pool`; cached for each pool."""
        if pool not in self._pools:
            representatives, codes = pool.examples.shapes()
            prices = np.array([self._price(pool.batch([r])) for r in representatives])
            mean = np.bincount(codes, minlength=len(prices)) @ prices / len(pool)
            self._pools[pool] = ExampleCost(*mean.tolist())
        return self._pools[pool]

    def _price(self, batch: Batch) -> ExampleCost:
        """The cost of one example of `batch`; cached for each shape."""
        shape = batch.shape
        price = self._cache.get(shape)
        if price is None:
            price = self._cache[shape] = self._accounting.price(batch)
        return price
