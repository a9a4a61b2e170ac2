"""Gradient-based bilevel selection of sources: the hypergradient through the unrolled steps of the inner training.

    min_a L_val(theta_n(w)),   w = sigmoid(a),
    theta_{t+1} = theta_t - rate grad [ sum_i w_{s(i)} l_i(theta_t) / sum_i w_{s(i)} ]  (i of batch t, source s(i))

Here theta is the model of the inner training. Every outer step trains it from fresh weights by SGD on all sources, each
example weighed by its source, and takes the derivative in a through the last steps. Reverse mode is as in Maclaurin,
Duvenaud and Adams (ICML 2015, arXiv 1502.03492), truncation as in Shaban, Cheng, Hatch and Boots (AISTATS 2019, arXiv
1810.10667). The method is a reference that CADS is compared with. Its memory grows with the steps that are
differentiated, and its outer objective must be differentiable.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from baselines.search.adam import FLOPS as ADAM_FLOPS
from baselines.search.adam import Adam
from baselines.search.source_search import SourceSearch, threshold
from cads.accounting.ledger import SELECT
from cads.accounting.measured import count_flops
from cads.accounting.transformer import trainable_size
from cads.data.batch import Batch
from cads.data.streams import ShuffledStream
from cads.errors import ConfigError, NotAffordableError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.base import NO_SEARCH_AFFORDABLE
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.search.stages import Stages, Steps, UpdatePolicy
from cads.seeding import derive
from cads.task import Task

UPDATE_FLOPS = 2
"""FLOPs of a step of SGD, `theta - rate g`, for each parameter."""
UPDATE_AND_REVERSE = 3
"""Cost of an update and its derivative in units of the update: the derivative of a product takes two products."""
SIGMOID_FLOPS = 8
"""FLOPs for each source: 4 for the weight, and 4 for its derivative."""
COUNTED_STEPS = 3
"""Unrolled steps whose FLOPs are counted; each further step costs as much as the last of them added."""

Parameters = dict[str, Tensor]
"""Parameters of the inner model by name."""


class WeightedSgd:
    """The inner training: SGD on batches whose examples are weighed by their sources.

    Args:
        task: whose losses are minimised. model: its network; the weights in it are not used.
        rate: learning rate of SGD.

    Raises:
        ConfigError: if the model has buffers, which a pure function of its parameters cannot change.
    """

    def __init__(self, task: Task, model: nn.Module, rate: float) -> None:
        if next(model.buffers(), None) is not None:
            raise ConfigError(f"the model of {task.name} has buffers: unrolling needs one without, such as an mlp")
        self.task, self.model, self.rate = task, model, rate

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        """The loss of each example, nats, shape (B,)."""

        def model(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, parameters, args, kwargs)

        return self.task.training_losses(model, batch)

    def step(self, parameters: Parameters, weights: Tensor, batch: Batch) -> Parameters:
        """The parameters after a step; `weights` are those of the examples in `batch`, shape (B,)."""

        def loss(parameters: Parameters) -> Tensor:
            return (weights * self.losses(parameters, batch)).sum() / weights.sum()

        gradient = grad(loss)(parameters)
        return {name: x - self.rate * gradient[name] for name, x in parameters.items()}

    def hypergradient(
        self, logits: Tensor, parameters: Parameters, steps: list[tuple[Batch, Tensor]], target: Batch
    ) -> tuple[Tensor, float]:
        """Derivative in a of the mean loss on the target after `steps`, and that loss.

        Args:
            logits: a, shape (S,).
            parameters: theta before the first of `steps`; they count as independent of a.
            steps: the batch of each step, and the source of each of its examples, int64, shape (B,).
            target: all examples of the target.

        Returns:
            the derivative, shape (S,), and the loss, nats.
        """

        def validation(logits: Tensor) -> Tensor:
            w, theta = torch.sigmoid(logits), parameters
            for batch, sources in steps:
                theta = self.step(theta, w[sources], batch)
            return self.task.losses(lambda *args: functional_call(self.model, theta, args), target).mean()

        gradient, value = grad_and_value(validation)(logits)
        return gradient, float(value)


@dataclass(frozen=True)
class Schedule:
    """The numbers of steps that the allowance pays for, and their costs.

    Attributes:
        outer: outer steps.
        plain: steps of each inner training before those that are differentiated. unrolled: those that are.
        plain_flops: of one plain step. unrolled_flops: of all unrolled steps, the target and the derivative.
    """

    outer: int
    plain: int
    unrolled: int
    plain_flops: float
    unrolled_flops: float

    @property
    def steps(self) -> tuple[Steps, Steps]:
        """The stages of one outer step."""
        return (
            Steps("plain steps", self.plain * self.plain_flops, self.plain),
            Steps("unrolled steps", self.unrolled_flops, self.unrolled),
        )


@dataclass
class Unrolled(SourceSearch):
    """Weights of sources by hypergradients; sources with a weight above 1/2 are kept.

    The objective is always the mean loss on the target. The option `outer` applies to the guard alone.
    """

    share: float = 1.0
    """Share of C for which each outer step trains."""
    unroll: int = 64
    """Last steps of each training that are differentiated."""
    rate: float = 0.1
    """Learning rate of the inner SGD."""
    outer_rate: float = 0.3
    """Learning rate of Adam for a; it is large, since the allowance pays for few outer steps."""

    method: ClassVar[str] = "unrolled"
    default_allowance: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and at most 1")
        if self.unroll < 1:
            raise ConfigError(f"unroll = {self.unroll}: at least one step must be differentiated")
        for name in ("rate", "outer_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be positive and finite")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Schedule:
        """As many outer steps as the allowance pays for; each trains on as many examples as `share` of C pays for."""
        task = costs.task
        n_steps = int(self.share * train_flops / costs.step_flops * (1 + 1e-9))
        unrolled = min(self.unroll, n_steps)
        if not unrolled:
            return Schedule(0, 0, 0, 0.0, 0.0)
        update = UPDATE_FLOPS * trainable_size(task.costs.model)
        plain_flops = costs.step_flops - task.costs.optimizer_step + update
        unrolled_flops = unrolled_products(task, unrolled) + unrolled * UPDATE_AND_REVERSE * update
        outer_flops = (n_steps - unrolled) * plain_flops + unrolled_flops + self.learning(space)
        outer = int(self.available(costs, train_flops) / outer_flops)
        return Schedule(outer, n_steps - unrolled, unrolled, plain_flops, unrolled_flops)

    def learning(self, space: SearchSpace) -> float:
        """FLOPs of one update of the weights of the sources."""
        return float(len(space.sizes) * (SIGMOID_FLOPS + ADAM_FLOPS))

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """All outer steps; see `SourceSearch`."""
        schedule = self.schedule(costs, space, train_flops)
        if not schedule.outer:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        for _ in range(schedule.outer):
            yield from schedule.steps
            yield UpdatePolicy(self.learning(space))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Outer steps from w = 1/2."""
        task, n = inner.task, len(space.sizes)
        sgd = WeightedSgd(task, task.model(0).train(), self.rate)
        schedule = self.schedule(inner, space, train_flops)
        logits, adam = np.zeros(n), Adam(n)
        for step in range(schedule.outer):
            for steps in schedule.steps:
                inner.pay_steps(steps)
            started = time.perf_counter()
            gradient, value = outer_gradient(sgd, logits, schedule, derive(seed, "outer", step))
            inner.ledger.charge(SELECT, "unrolled steps", 0.0, seconds=time.perf_counter() - started)
            if np.isfinite(gradient).all():
                logits = logits - self.outer_rate * adam(gradient)
            inner.learn(self.learning(space))
            inner.monitor.scalar("outer/objective", value, step)
            inner.monitor.probabilities(space.pool.source_names, np.asarray(expit(logits)), step)
        probability = np.asarray(expit(logits))
        return threshold(probability), BernoulliPolicy(probability)


def outer_gradient(sgd: WeightedSgd, logits: np.ndarray, schedule: Schedule, seed: int) -> tuple[np.ndarray, float]:
    """Train from fresh weights, and take the hypergradient through the last steps.

    Returns:
        the hypergradient, shape (S,), and the mean loss on the target, nats.
    """
    task = sgd.task
    parameters = {name: x.detach() for name, x in task.model(seed).named_parameters()}
    # The weights have the precision of the network, so that the weighted loss has it too.
    a = torch.tensor(logits, dtype=next(iter(parameters.values())).dtype)
    w, batches = torch.sigmoid(a), Batches(task, seed)
    for step in range(schedule.plain):
        batch, sources = batches(step)
        parameters = sgd.step(parameters, w[sources], batch)
    steps = [batches(schedule.plain + step) for step in range(schedule.unrolled)]
    gradient, value = sgd.hypergradient(a, parameters, steps, task.target.batch(np.arange(len(task.target))))
    return gradient.double().numpy(), value


class Batches:
    """The batches of one inner training: epochs over the whole pool.

    Raises:
        DataError: if the pool has no sources.
    """

    def __init__(self, task: Task, seed: int) -> None:
        assert task.pool.sources is not None
        self._pool, self._size = task.pool, task.recipe.batch_size
        self._sources = torch.from_numpy(task.pool.sources.astype(np.int64))
        self._stream = ShuffledStream(np.arange(len(task.pool)), derive(seed, "order"))

    def __call__(self, step: int) -> tuple[Batch, Tensor]:
        """The batch of a step, and the source of each of its examples, int64, shape (B,)."""
        positions = self._stream.take(step * self._size, self._size)
        return self._pool.batch(positions), self._sources[torch.from_numpy(positions)]


def unrolled_products(task: Task, steps: int) -> float:
    """FLOPs of the matrix products of one hypergradient through `steps` steps: forward, backward and reverse.

    At most `COUNTED_STEPS` steps are executed and counted: all steps after the second cost the same.
    """
    sgd = WeightedSgd(task, task.model(0).train(), 0.1)
    counts = [float(_count(sgd, n)) for n in range(1, min(steps, COUNTED_STEPS) + 1)]
    return counts[-1] + (steps - COUNTED_STEPS) * (counts[-1] - counts[-2]) if steps > COUNTED_STEPS else counts[-1]


def _count(sgd: WeightedSgd, steps: int) -> int:
    logits = np.zeros(len(sgd.task.pool.source_names))
    return count_flops(lambda: outer_gradient(sgd, logits, Schedule(1, 0, steps, 0.0, 0.0), 0))
