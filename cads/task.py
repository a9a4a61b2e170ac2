"""The interface between data and models on one side and the selection algorithms on the other.

A `Task` is a pool, a target, a test set, a way to build the model, the loss of one example, and the recipe by which the
final model is trained. The rest of cads uses data and models only through these classes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import CheckpointError, ConfigError, DataError
from cads.runtime.atomic_files import atomic_file

if TYPE_CHECKING:
    from cads.accounting.costs import Costs
    from cads.recipe import TrainConfig

log = logging.getLogger(__name__)

LEAK_TOLERANCE = 0.01
"""Share of target or test set that may have exact copies in another pool; a larger share is refused as a leak."""

NO_TARGET = (
    "no target is given: %s examples are taken out of the pool for it, and selection can only favour what the pool "
    "has; name checked examples of what the model is to be good at"
)
"""What is said where the target is drawn from the user's own pool; the number is put in."""

TEST_OF_TARGET = "no test set is given: %s of the %s examples of the target are held out as one"
TEST_OF_POOL = (
    "no test set is given: %s examples are taken out of the pool for it, which may be as wrong as those of the pool"
)
"""What is said where the test set is drawn from the user's own target or pool; the numbers are put in."""

Metrics = dict[str, float]
Objective = Callable[["Task", nn.Module, Pool], float]
"""Any metric of a trained model on a pool, lower is better: (task, model, pool) -> value."""


@dataclass(frozen=True)
class ObjectiveValue:
    """The outer objective of a model.

    Attributes:
        value: lower is better.
        by_example: the values of single examples whose mean is `value`, float64, shape (N,); None if it is no mean.
    """

    value: float
    by_example: np.ndarray | None = None


@dataclass(frozen=True)
class StepwiseEvaluation:
    """An evaluation of a trained model in steps that do not depend on each other, so that it can stop between them.

    Attributes:
        sizes: number of examples of each step.
        step: (number of a step) -> one value for each of its examples, float64, shape (n,).
        metrics: (the values of all steps, in order, float64, shape (N,)) -> the metrics.
    """

    sizes: Sequence[int]
    step: Callable[[int], np.ndarray]
    metrics: Callable[[np.ndarray], Metrics]

    def run(self) -> Metrics:
        """The metrics, computed without a stop."""
        return self.metrics(np.concatenate([self.step(i) for i in range(len(self.sizes))]))


class Task(ABC):
    """Data, a model and a recipe: what is learned, from which examples, and how the final model is trained.

    Attributes:
        name: what results and messages call it.
        pool: the candidate examples.
        target: the examples that selection optimises for.
        test: held-out examples that no selector sees.
        recipe: how the model is trained: batch size, optimizer, learning rate, precision.
        outer: the metric of `metrics` (lower is better) that selection minimises on the target.
        maximised: metrics where higher is better; none of them can be `outer`.
        averaged: metrics that are the mean of one value per example; see `metrics_by_example`.
        pretrained: whether models start from weights for which some examples are already easier than others.
        n_descriptors: numbers that describe an example; 0 if the task has none, see `descriptors`.
        descriptor_flops: FLOPs for those of one example.
        bags: whether they are the shares of words in a bag of words, with sum 1.
        source_outer: the outer metric of selectors that choose whole sources; None for `outer`.
        accounting: how FLOPs are counted: `measured`, `analytic` or `paper`.
        mergeable: whether the models have adapters that can be merged into the base weights.
        proxy: a task with the same data and a smaller proxy model, which selectors use in place of the final model;
            None if they use the final model.
        base_model: name or folder of the model that training starts from; None if it starts from scratch.
        classes: the names of the classes that labels number; () without classes.
        counts: what was left out of the data, by the reason, as JSON values; written to `data.json`.
    """

    name: str = "task"
    outer: str = "loss"
    maximised: tuple[str, ...] = ("accuracy",)
    averaged: tuple[str, ...] = ()
    pretrained: bool = False
    n_descriptors: int = 0
    descriptor_flops: float = 0.0
    bags: bool = False
    source_outer: str | None = None
    accounting: str = "measured"
    mergeable: bool = False
    proxy: Task | None = None
    base_model: str | None = None
    classes: tuple[str, ...] = ()
    counts: Mapping[str, Any] = MappingProxyType({})
    pool: Pool
    target: Pool
    test: Pool
    recipe: TrainConfig

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh model on the CPU; the same seed gives the same weights."""

    @abstractmethod
    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example, in nats, shape (B,)."""

    def training_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The losses whose mean a training step minimises, shape (B,); `losses`, unless examples are weighted."""
        return self.losses(model, batch)

    @abstractmethod
    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Metrics of `model` on all of `pool`, among them "loss" (nats per example) and `outer`.

        This is one forward pass over the pool, which the caller charges.
        """

    def groups(self, pool: Pool) -> np.ndarray | None:
        """Groups within which examples compete for selection (for classifiers the labels), int, shape (N,), or None.

        Hard classes have higher losses. Without groups, selection by loss would drop most of their examples.
        """
        return None

    def loss_groups(self, pool: Pool) -> np.ndarray | None:
        """Groups within which losses are comparable, int, shape (N,), or None: `groups`, unless a task has finer ones.

        Groups of pool and target have the same codes.
        """
        return self.groups(pool)

    @property
    def guess_loss(self) -> float | None:
        """The loss of a guess (nats), which is that of a wrong label; None if the answers of examples are no labels."""
        return None

    def descriptors(self, pool: Pool, positions: np.ndarray) -> np.ndarray:
        """Numbers that describe each example and that no model computes, float32, shape (n, n_descriptors).

        By them a pool without sources is compared with the target. Each example costs `descriptor_flops`.

        Raises:
            ConfigError: if the task has none.
        """
        raise ConfigError(f"{self.name} has no descriptors: name the sources of the pool")

    def subtasks(self, pool: Pool) -> np.ndarray | None:
        """The subtask of each example of the target, int, shape (N,), or None if there is only one.

        A selector that scores by similarity takes the mean within a subtask and then the best subtask.
        """
        return None

    def texts(self, pool: Pool) -> list[str]:
        """The prompt of each example as text, never its answer; for selectors that compare words.

        Raises:
            ConfigError: if the examples are not text.
        """
        raise ConfigError(f"{self.name} has no text: choose a selector that does not compare words")

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Logits of the classes of a classifier, shape (B, C); labels are class numbers, shape (B,).

        Raises:
            ConfigError: if the task is not classification.
        """
        raise ConfigError(f"{self.name} has no classes: choose a selector that does not compare class probabilities")

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The input of the last layer of `model`, one vector an example, shape (B, D), in which examples are compared.

        Raises:
            ConfigError: if the model has no such layer.
        """
        raise ConfigError(f"{self.name} has no features of its own: name an encoder")

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of pool, target and test: tasks with equal configuration and identity give the same results."""
        return {name: getattr(self, name).content_hash for name in ("pool", "target", "test")}

    @cached_property
    def costs(self) -> Costs:
        """The cost of one example, counted once per shape."""
        from cads.accounting.costs import Costs

        return Costs(self, self.accounting)

    def to_time(self) -> tuple[Task, float] | None:
        """The task on whose steps a plan measures the speed of training; None if there is none.

        A task of shapes alone has none, or makes one with examples. Weights may be random.

        Returns:
            the task; and how many times longer all of the data takes to read than its data, at least 1.
        """
        return self, 1.0

    def describe(self, pool: Pool, positions: np.ndarray) -> list[str] | None:
        """The examples at `positions` as text for people to read, or None if they are not text."""
        return None

    def save(self, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
        """Write a trained model to an existing folder: by default as `model.safetensors`, written atomically.

        Raises:
            CheckpointError: if the adapters were merged, and the written model is not the trained one.
            ConfigError: if `merge` is set and the models have no adapters.
        """
        self.check_merge(merge)
        weights: dict[str, Tensor] = {}
        stored: set[int] = set()
        for name, x in model.state_dict().items():
            weights[name] = x.detach().cpu().contiguous()
            if weights[name].untyped_storage().data_ptr() in stored:
                weights[name] = weights[name].clone()  # safetensors refuse tensors that share memory
            stored.add(weights[name].untyped_storage().data_ptr())
        with atomic_file(folder / "model.safetensors") as partial:
            save_file(weights, partial)

    def load(self, folder: Path) -> nn.Module:
        """The trained model that `save` wrote to `folder`, on the CPU. A task that defines `save` defines this too.

        Raises:
            CheckpointError: if there is none, or it is of another model.
        """
        model = self.model(0)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"the model in {folder} cannot be loaded ({error}): train it anew with --overwrite true"
            ) from error
        return model

    def check_merge(self, merge: bool) -> None:
        """Refuse to merge adapters if the models have none.

        Raises:
            ConfigError: if `merge` is set and the models have no adapters.
        """
        if merge and not self.mergeable:
            raise ConfigError(f"merge = true: the models of {self.name} have no adapters to merge")

    def check_evaluation(self, name: str) -> None:
        """Refuse an evaluation that this task does not have, before anything is trained for it.

        Raises:
            ConfigError: if no evaluation has that name, or something it needs is missing.
        """
        raise ConfigError(f"evaluation {name!r} is unknown: {self.name} has none beside its test metrics")

    def evaluate(self, model: nn.Module, name: str) -> Metrics:
        """A further evaluation of a trained model, by name; see `check_evaluation`."""
        self.check_evaluation(name)
        return {}

    def stepwise_evaluation(self, model: nn.Module, name: str) -> StepwiseEvaluation | None:
        """The same evaluation in steps, which a run records; None if it has none: then a stopped one begins anew."""
        return None

    def evaluation_settings(self, name: str) -> dict[str, Any]:
        """What the result of an evaluation depends on beside data and model, as JSON values.

        When one of them changes, a trained model is evaluated again.
        """
        return {}

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """(N, D) of `paper` accounting: the parameters of `model`, and the tokens of `batch`.

        Raises:
            ConfigError: if these numbers are not defined for the task.
        """
        return float(sum(p.numel() for p in model.parameters())), float(batch.tokens)

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """The values whose means are the `averaged` metrics, float64, shape (N,) each.

        This is one forward pass over the pool, which the caller charges.
        """
        return {}

    def objective(
        self, model: nn.Module, outer: str | Objective | None = None, pool: Pool | None = None
    ) -> ObjectiveValue:
        """The outer objective of `model` on the target, or on `pool`: a metric by name, or any callable.

        Lower is better.

        Raises:
            ConfigError: if `outer` names no metric of this task.
        """
        outer, pool = self.outer if outer is None else outer, pool or self.target
        if callable(outer):
            return ObjectiveValue(float(outer(self, model, pool)))
        if outer in self.averaged:
            by_example = self.metrics_by_example(model, pool)[outer]
            return ObjectiveValue(float(by_example.mean()), by_example)
        metrics = self.metrics(model, pool)
        minimised = sorted(set(metrics) - set(self.maximised))
        if outer not in minimised:
            raise ConfigError(
                f"outer = {outer!r} is no metric of {self.name} that can be minimised: choose from {minimised}"
            )
        return ObjectiveValue(metrics[outer])

    def check_outer(self, outer: str | Objective | None) -> None:
        """Refuse an unknown name of an outer objective before any FLOP is spent, by evaluating it on one example.

        Raises:
            ConfigError: naming the metrics that can be minimised.
        """
        if isinstance(outer, str):
            self.objective(self.model(0), outer, self.target.subset(np.arange(1), self.target.name))

    def copies(self) -> dict[str, list[str]]:
        """Ids of the examples of target and test set whose exact copies are in the pool, by the name of the set."""
        contents = self.pool.digests
        return {
            held_out.name: held_out.ids.filter(pc.is_in(held_out.digests, value_set=contents)).to_pylist()
            for held_out in (self.target, self.test)
        }

    def check(self) -> None:
        """Refuse pools that leak into one another, by id or by content: target into pool or test set, test into pool.

        Raises:
            DataError: with the number of examples that are in both, and the first of them.
        """
        pool, target, test = ((x, x.digests) for x in (self.pool, self.target, self.test))
        for (held_out, contents), (other, other_contents) in ((target, pool), (target, test), (test, pool)):
            shared = held_out.ids.filter(pc.is_in(held_out.ids, value_set=other.ids))
            if len(shared):
                raise DataError(
                    f"{len(shared)} ids of the {held_out.name} are also in the {other.name}, such as "
                    f"{shared[:3].to_pylist()}: the {held_out.name} must be held out from the {other.name}"
                )
            copied = pc.is_in(contents, value_set=other_contents)
            copies = sorted(held_out.ids.filter(copied).to_pylist())
            if len(copies) > LEAK_TOLERANCE * len(held_out):
                raise DataError(
                    f"{len(copies)} of {len(held_out)} {held_out.name} examples have exact copies in the "
                    f"{other.name}, such as {copies[:3]}: remove them from one side"
                )
            if copies:
                log.warning(
                    "%d of %d %s examples have exact copies in the %s, such as %s",
                    len(copies),
                    len(held_out),
                    held_out.name,
                    other.name,
                    copies[:3],
                )
