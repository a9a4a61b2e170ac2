"""The only door between data and models on one side and the selection algorithms on the other.

A `Task` is a pool, a target, a test set, a way to build the model, the loss of one example, and the recipe
by which the final model will be trained. Everything else in cads is written against these classes.
"""

from __future__ import annotations

import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from safetensors.torch import save_file
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cads.accounting.costs import Costs
    from cads.recipe import TrainConfig

log = logging.getLogger(__name__)

LEAK_TOLERANCE = 0.01
"""Share of the target that may have exact copies in the pool or the test set before it is called a leak."""


Metrics = dict[str, float]
Objective = Callable[["Task", nn.Module, Pool], float]
"""Any metric of a trained model on a pool, lower is better: (task, model, target) -> value."""


@dataclass(frozen=True)
class ObjectiveValue:
    """The outer objective of a model.

    Attributes:
        value: lower is better.
        by_example: what it is the mean of, float64, shape (N,); None where it is the mean of nothing.
    """

    value: float
    by_example: np.ndarray | None = None


class Task(ABC):
    """What is to be learned, from what, and how the final model is trained.

    Attributes:
        pool: the candidates. target: what selection optimises for. test: held out, seen by no selector.
        recipe: how the model is trained: batch size, optimizer, learning rate, precision.
        outer: the metric of `metrics` (lower is better) that selection minimises on the target.
        maximised: metrics of which more is better: none of them can be `outer`.
        averaged: metrics that are means of a value of each example, see `metrics_by_example`.
        pretrained: whether models begin with weights that find some examples easier than others.
        source_outer: another one where whole sources are chosen; None for the same.
        accounting: how FLOPs are counted: `measured`, `analytic` or `paper`.
        mergeable: whether its models have adapters that can be written into the weights they stand on.
        proxy: the same data for a smaller model, on which selectors may work in place of the one that is trained;
            None if they work on that one.
    """

    name: str = "task"
    outer: str = "loss"
    maximised: tuple[str, ...] = ("accuracy",)
    averaged: tuple[str, ...] = ()
    pretrained: bool = False
    source_outer: str | None = None
    accounting: str = "measured"
    mergeable: bool = False
    proxy: Task | None = None
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
        """What a training step takes the mean of, shape (B,): the losses, unless examples weigh differently."""
        return self.losses(model, batch)

    @abstractmethod
    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Metrics of `model` on all of `pool`, among them "loss" (nats per example) and `outer`.

        It is one forward pass over the pool; the caller charges it.
        """

    def groups(self, pool: Pool) -> np.ndarray | None:
        """Groups within which examples compete for selection (for classifiers the labels), int, shape (N,), or None.

        Hard classes have higher losses: without groups a selector by losses would thin them out.
        """
        return None

    def subtasks(self, pool: Pool) -> np.ndarray | None:
        """The subtask of each example of the target, int, shape (N,), or None if there is only one.

        A selector that scores by similarity takes the mean within a subtask and then the best subtask.
        """
        return None

    def texts(self, pool: Pool) -> list[str]:
        """What each example asks, as text, never the answer: for selectors that compare words.

        Raises:
            ConfigError: if the examples are not text.
        """
        raise ConfigError(f"{self.name} has no text: choose a selector that does not compare words")

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Scores of the classes of a classifier, shape (B, C); labels are class numbers, shape (B,).

        Raises:
            ConfigError: if the task is no classification.
        """
        raise ConfigError(f"{self.name} has no classes: choose a selector that does not compare class probabilities")

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the last layer of `model` reads, one vector an example, shape (B, D): a space to compare examples in.

        Raises:
            ConfigError: if the model has no such layer.
        """
        raise ConfigError(f"{self.name} has no features of its own: name an encoder")

    @property
    def identity(self) -> dict[str, str]:
        """What data it is: two tasks of one configuration with the same identity give the same results."""
        return {name: getattr(self, name).content_hash for name in ("pool", "target", "test")}

    @cached_property
    def costs(self) -> Costs:
        """What one example costs, counted once per shape."""
        from cads.accounting.costs import Costs

        return Costs(self, self.accounting)

    def describe(self, pool: Pool, positions: np.ndarray) -> list[str] | None:
        """The examples at `positions` as text, to look at, or None where they are none."""
        return None

    def save(self, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
        """Write a trained model to an existing folder: here `model.safetensors`, whole or not at all.

        Raises:
            ConfigError: if adapters are to be merged and there are none.
        """
        self.check_merge(merge)
        weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
        handle, partial = tempfile.mkstemp(prefix=".model.", dir=folder)
        os.close(handle)
        save_file(weights, partial)
        os.replace(partial, folder / "model.safetensors")

    def check_merge(self, merge: bool) -> None:
        """Refuse to merge what cannot be merged.

        Raises:
            ConfigError: if `merge` is asked for and the models have no adapters.
        """
        if merge and not self.mergeable:
            raise ConfigError(f"merge = true: the models of {self.name} have no adapters to merge")

    def check_evaluation(self, name: str) -> None:
        """Refuse an evaluation that this task does not have, before anything is trained for it.

        Raises:
            ConfigError: if there is none of that name, or it lacks something.
        """
        raise ConfigError(f"evaluation {name!r} is unknown: {self.name} has none beside its test metrics")

    def evaluate(self, model: nn.Module, name: str) -> Metrics:
        """A further evaluation of a trained model, by name; see `check_evaluation`."""
        self.check_evaluation(name)
        return {}

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """(N, D) of `paper` accounting: the parameters of `model`, and the tokens of `batch`.

        Raises:
            ConfigError: if this task has no such numbers.
        """
        return float(sum(p.numel() for p in model.parameters())), float(batch.tokens)

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """What `averaged` names, float64, shape (N,) each; one forward pass over the pool, which the caller charges."""
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
        known = sorted(set(metrics) - set(self.maximised))
        if outer not in known:
            raise ConfigError(
                f"outer = {outer!r} is no metric of {self.name} that can be minimised: choose from {known}"
            )
        return ObjectiveValue(metrics[outer])

    def check_outer(self, outer: str | Objective | None) -> None:
        """Refuse an outer objective by a name that is not known, before anything is spent: it is tried on one example.

        Raises:
            ConfigError: naming those there are.
        """
        if isinstance(outer, str):
            self.objective(self.model(0), outer, self.target.subset(np.arange(1), self.target.name))

    def check(self) -> None:
        """Refuse a target that leaks into the pool or the test set, by id or by content.

        Raises:
            DataError: naming the first examples that stand on both sides.
        """
        contents = self.target.digests
        for other in (self.pool, self.test):
            shared = self.target.ids.filter(pc.is_in(self.target.ids, value_set=other.ids))
            if len(shared):
                raise DataError(
                    f"{len(shared)} ids of the target are also in the {other.name}, such as "
                    f"{shared[:3].to_pylist()}: the target must be held out from both pool and test"
                )
            copied = pc.is_in(contents, value_set=other.digests)
            copies = self.target.ids.filter(copied).to_pylist()
            if len(copies) > LEAK_TOLERANCE * len(self.target):
                raise DataError(
                    f"{len(copies)} of {len(self.target)} target examples have exact copies in the "
                    f"{other.name}, such as {sorted(copies)[:3]}: remove them from one side"
                )
            if copies:
                log.warning("%d target examples have exact copies in the %s", len(copies), other.name)
