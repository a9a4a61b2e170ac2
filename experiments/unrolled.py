"""Gradient-based bilevel selection of sources: the hypergradient through the unrolled steps of the inner training.

    min_a L_val(theta_n(w)),   w = sigmoid(a),
    theta_{t+1} = theta_t - rate grad [ sum_i w_{s(i)} l_i(theta_t) / sum_i w_{s(i)} ]  (i of batch t, source s(i))

Every outer step trains from fresh weights by SGD on all sources, each example weighed by its source, and takes the
derivative in a through the last steps: reverse mode as in Maclaurin, Duvenaud and Adams (ICML 2015, arXiv 1502.03492),
truncated as in Shaban, Cheng, Hatch and Boots (AISTATS 2019, arXiv 1810.10667). It is a reference to measure CADS
against: memory grows with the steps that are differentiated, and the outer objective must be differentiable.
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
from baselines.search.source_search import SourceSearch, kept
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.measured import count_flops
from cads.accounting.transformer import trainable_size
from cads.data.batch import Batch
from cads.data.streams import ShuffledStream
from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.seeding import derive
from cads.task import Task

UPDATE_FLOPS = 2
"""Per parameter: a step of SGD, `theta - rate g`."""
REVERSED = 3
"""An update and its derivative, in units of the update: that of a product is two products."""
SIGMOID_FLOPS = 8
"""Per source: the weight 4, and its derivative 4."""
COUNTED = 3
"""Unrolled steps that are counted; each more costs what the last of them has added."""

Parameters = dict[str, Tensor]


class WeightedSgd:
    """The inner training: SGD on batches whose examples are weighed by their sources.

    Args:
        task: whose losses are used. model: its network; the weights in it are not used.
        rate: of SGD.

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
        """The parameters after a step; `weights`: of the examples of `batch`, shape (B,)."""

        def loss(parameters: Parameters) -> Tensor:
            return weights @ self.losses(parameters, batch) / weights.sum()

        gradient = grad(loss)(parameters)
        return {name: x - self.rate * gradient[name] for name, x in parameters.items()}

    def hypergradient(
        self, logits: Tensor, parameters: Parameters, steps: list[tuple[Batch, Tensor]], target: Batch
    ) -> tuple[Tensor, float]:
        """Derivative in a of the mean loss on the target after `steps`, and that loss.

        Args:
            logits: a, shape (S,). parameters: theta where the derivative begins: it does not depend on a.
            steps: the batches, and the source of each of their examples, int64, shape (B,).

        Returns:
            shape (S,), and nats.
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
    """What the allowance buys.

    Attributes:
        outer: outer steps. plain, unrolled: steps of each inner training before and within the derivative.
        plain_flops: of one plain step. unrolled_flops: of all unrolled steps, the target and the derivative.
    """

    outer: int
    plain: int
    unrolled: int
    plain_flops: float
    unrolled_flops: float


@dataclass
class Unrolled(SourceSearch):
    """Weights of sources by hypergradients; sources with a weight above 1/2 are kept.

    The objective is the mean loss on the target, whatever `outer` says: that is for the guard alone.
    """

    share: float = 1.0
    """Share of C for which each outer step trains."""
    unroll: int = 64
    """Last steps of each training that are differentiated."""
    rate: float = 0.1
    """Of the inner SGD."""
    outer_rate: float = 0.3
    """Adam's rate for a: few outer steps are affordable."""

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
        """As many outer steps as the allowance buys; each trains on as many examples as `share` of C would."""
        task = costs.task
        n_steps = int(self.share * train_flops / costs.step_flops * (1 + 1e-9))
        unrolled = min(self.unroll, n_steps)
        if not unrolled:
            return Schedule(0, 0, 0, 0.0, 0.0)
        update = UPDATE_FLOPS * trainable_size(task.costs.model)
        plain_flops = costs.step_flops - task.costs.optimizer_step + update
        unrolled_flops = unrolled_products(task, unrolled) + unrolled * REVERSED * update
        each = (n_steps - unrolled) * plain_flops + unrolled_flops + self.learning(space)
        outer = int(self.available(costs, train_flops) / each)
        return Schedule(outer, n_steps - unrolled, unrolled, plain_flops, unrolled_flops)

    def learning(self, space: SearchSpace) -> float:
        """FLOPs of moving the weights of the sources."""
        return float(len(space.sizes) * (SIGMOID_FLOPS + ADAM_FLOPS))

    def plan_choose(self, costs: PlannedInnerLoop, space: SearchSpace, train_flops: float) -> bool:
        """Charge for all outer steps."""
        schedule = self.schedule(costs, space, train_flops)
        for _ in range(schedule.outer):
            self._charge(costs, schedule)
            costs.learn(self.learning(space))
        costs.ledger.trained.append((costs.task, 1))
        return schedule.outer > 0

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Outer steps from w = 1/2."""
        task, n = inner.task, len(space.sizes)
        sgd = WeightedSgd(task, task.model(0).train(), self.rate)
        schedule = self.schedule(inner, space, train_flops)
        logits, adam = np.zeros(n), Adam(n)
        for step in range(schedule.outer):
            self._charge(inner, schedule)
            started = time.perf_counter()
            gradient, value = outer_gradient(sgd, logits, schedule, derive(seed, "outer", step))
            inner.ledger.charge(SELECT, "unrolled steps", 0.0, seconds=time.perf_counter() - started)
            if np.isfinite(gradient).all():
                logits = logits - self.outer_rate * adam(gradient)
            inner.learn(self.learning(space))
            inner.monitor.scalar("outer/objective", value, step)
            inner.monitor.probabilities(space.pool.source_names, expit(logits), step)
        return kept(expit(logits)), BernoulliPolicy(expit(logits))

    def _charge(self, costs: InnerLoopCosts, schedule: Schedule) -> None:
        ledger: Ledger = costs.ledger
        size = costs.task.recipe.batch_size
        for stage, steps, flops in (
            ("plain steps", schedule.plain, schedule.plain * schedule.plain_flops),
            ("unrolled steps", schedule.unrolled, schedule.unrolled_flops),
        ):
            tokens = round(steps * size * costs.task.costs.tokens_per_example(costs.task.pool))
            ledger.charge(SELECT, stage, flops, usages=steps * size, tokens=tokens)


def outer_gradient(sgd: WeightedSgd, logits: np.ndarray, schedule: Schedule, seed: int) -> tuple[np.ndarray, float]:
    """Train from fresh weights, and the hypergradient through the last steps.

    Returns:
        shape (S,), and the mean loss on the target, nats.
    """
    task = sgd.task
    parameters = {name: x.detach() for name, x in task.model(seed).named_parameters()}
    # In the precision of the network, so that the weighted loss has it too.
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

    A few steps are executed and counted; all after the second cost the same.
    """
    sgd = WeightedSgd(task, task.model(0).train(), 0.1)
    counts = [float(_count(sgd, n)) for n in range(1, min(steps, COUNTED) + 1)]
    return counts[-1] + (steps - COUNTED) * (counts[-1] - counts[-2]) if steps > COUNTED else counts[-1]


def _count(sgd: WeightedSgd, steps: int) -> int:
    logits = np.zeros(len(sgd.task.pool.source_names))
    return count_flops(lambda: outer_gradient(sgd, logits, Schedule(1, 0, steps, 0.0, 0.0), 0))
