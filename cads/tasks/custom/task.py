"""Any module and any loss as a task: what tensors and data sets share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cads.data.batch import Batch
from cads.data.pool import Examples, Pool
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.scoring.pool_scores import evaluating
from cads.task import Metrics, Task
from cads.tasks.custom.example_loss import ExampleLoss, Loss
from cads.tasks.custom.modules import FreshModels
from cads.tasks.last_layer import last_layer_inputs
from cads.training.learners import can_stack

log = logging.getLogger(__name__)

EVALUATED_AT_ONCE = 1024
"""Most examples of a forward pass in which metrics are computed."""
TOLERANCE = 1e-3
"""Relative difference of a loss alone and in a batch that rounding explains."""
SHOWN = 6
"""Numbers of an input or label that are shown."""


class LabelledExamples(Examples, Protocol):
    """The payload of a pool of a `ModuleTask`."""

    @property
    def labels(self) -> Tensor | None:
        """One whole number for each example, int64, shape (N,); None if labels are something else."""
        ...


class ModuleTask(Task):
    """A module and a loss of your own, on pools of any tensors; see `TensorTask` and `DatasetTask`.

    With classes, examples compete within their class, and wrong labels are told from right ones by their loss. Without
    classes a task is a regression to cads: sources are weighed by their losses, and single examples are not.

    Args:
        pool, target, test: pools whose payloads are `LabelledExamples`.
        models: makes the models.
        loss: (output of the model, labels) -> one number for each example; lower is better.
        call: gives the output of a model for the inputs of a batch.
        classes: the names of the classes or their number; None: classes, if the loss is the cross entropy of whole
            numbers, otherwise none; () for none.
        metrics: further ones by name, (output, labels) -> one number for each example; lower is better.
        recipe: how models are trained. pretrained: see `Task`. name: of the task, in tables.

    Raises:
        ConfigError: if model, loss or recipe cannot be used. DataError: if labels are no classes.
    """

    averaged: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        pool: Pool,
        target: Pool,
        test: Pool,
        *,
        models: FreshModels,
        loss: Loss,
        call: Callable[[Callable[..., Any], Mapping[str, Tensor]], Any],
        classes: Sequence[str] | int | None = None,
        metrics: Mapping[str, Loss] | None = None,
        recipe: TrainConfig | None = None,
        pretrained: bool = False,
        name: str = "own task",
    ) -> None:
        self.pool, self.target, self.test = pool, target, test
        self.recipe = TrainConfig() if recipe is None else recipe
        self.pretrained = pretrained
        self.name = name
        self._models, self._loss, self._call = models, ExampleLoss(loss), call
        self._metrics = {key: ExampleLoss(metric) for key, metric in (metrics or {}).items()}
        taken = sorted({"loss", "error", "accuracy"} & set(self._metrics))
        if taken:
            raise ConfigError(f"metrics {taken} are those of the task itself: name yours otherwise")
        n_outputs = self._check_model()
        self.classes = self._class_names(classes, n_outputs)
        self.averaged = ("loss", *(("error",) if self.classes else ()), *self._metrics)
        self._check_replicas()

    def model(self, seed: int) -> nn.Module:
        """A fresh model on the CPU."""
        return self._models.build(seed)

    def output(self, model: Callable[..., Any], batch: Batch) -> Any:
        """What the model says of a batch."""
        return self._call(model, batch.inputs)

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example, shape (B,)."""
        output = self.output(model, batch)
        if batch.labels.is_meta:
            # Shapes alone are asked for, and a loss of one's own may look at values.
            return torch.empty(len(batch.labels), device="meta")
        return self._loss(output, batch.labels)

    def groups(self, pool: Pool) -> np.ndarray | None:
        """The classes, or None without any."""
        labels = _labels(pool)
        return labels.numpy() if self.classes and labels is not None else None

    @property
    def guess_loss(self) -> float | None:
        """That of equal probabilities of all classes; None without classes, or with another loss."""
        return math.log(len(self.classes)) if self.classes and self._loss.is_cross_entropy else None

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The output of a classifier, shape (B, C).

        Raises:
            ConfigError: if the task has no classes.
        """
        if not self.classes:
            return super().logits(model, batch)
        logits: Tensor = self.output(model, batch)
        return logits

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The inputs of the last linear layer of `model`, shape (B, D).

        Raises:
            ConfigError: if the model has no linear layer.
        """
        return last_layer_inputs(model, lambda: self.output(model, batch), self.name)

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Mean loss and further metrics, in evaluation mode; with classes, error and accuracy too."""
        means = {name: float(values.mean()) for name, values in self.metrics_by_example(model, pool).items()}
        return {**means, "accuracy": 1 - means["error"]} if self.classes else means

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """All `metrics` but the accuracy."""
        device = next(model.parameters()).device
        parts: dict[str, list[Tensor]] = {name: [] for name in self.averaged}
        with evaluating(model):
            for batch in pool.batches(EVALUATED_AT_ONCE):
                here = batch.to(device)
                output = self.output(model, here)
                parts["loss"].append(self._loss(output, here.labels))
                if self.classes:
                    parts["error"].append((output.argmax(dim=1) != here.labels).double())
                for name, metric in self._metrics.items():
                    parts[name].append(metric(output, here.labels))
        return {name: torch.cat(values).cpu().double().numpy() for name, values in parts.items()}

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of data and weights, and the name of the loss, whose code no hash covers."""
        return super().identity | {"model": self._models.digest, "loss": self._loss.name}

    def describe(self, pool: Pool, positions: np.ndarray) -> list[str]:
        """Labels, and the first numbers of the inputs."""
        batch = pool.batch(positions)
        return [
            "; ".join(
                [f"label {_shown(batch.labels[i])}", *(f"{name} {_shown(x[i])}" for name, x in batch.inputs.items())]
            )
            for i in range(len(batch))
        ]

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """Undefined: examples have no tokens.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"`paper` accounting counts tokens, and {self.name} has none: use measured or analytic")

    def _check_model(self) -> int:
        """Refuse a model and a loss that do not go together, by a few examples of the target.

        Returns:
            the number of outputs of the model, 0 if they are no table.
        """
        model = self.model(0)
        batches = [self.target.batch(np.arange(k) % len(self.target)) for k in (2, 3)]
        with evaluating(model):
            outputs = []
            for batch in batches:
                try:
                    outputs.append(self.output(model, batch))
                except Exception as error:  # The model is the user's own code.
                    shapes = {name: (tuple(x.shape), x.dtype) for name, x in batch.inputs.items()}
                    raise ConfigError(f"the model cannot be called with inputs {shapes}: {error}") from error
            for loss in (self._loss, *self._metrics.values()):
                loss.check(outputs[0], batches[0].labels, outputs[1], batches[1].labels)
            together = self.losses(model, batches[1])
            alone = torch.cat([self.losses(model, batches[1].part(i, i + 1)) for i in range(3)])
        if not torch.allclose(together, alone, rtol=TOLERANCE, atol=TOLERANCE * float(alone.abs().max()) + 1e-6):
            raise ConfigError(
                f"the loss of an example is {alone.tolist()} alone and {together.tolist()} beside others: it must not "
                "depend on the other examples of a batch in evaluation mode, nor on chance"
            )
        output = outputs[0]
        return int(output.shape[1]) if isinstance(output, Tensor) and output.dim() == 2 else 0

    def _class_names(self, classes: Sequence[str] | int | None, n_outputs: int) -> tuple[str, ...]:
        parts = (self.pool, self.target, self.test)
        whole = all(_labels(part) is not None for part in parts)
        if classes is None:
            if not (self._loss.is_cross_entropy and whole and n_outputs > 1):
                return ()
            log.info("%s: labels are taken for %d classes, as the loss is their cross entropy", self.name, n_outputs)
            classes = n_outputs
        if isinstance(classes, str):
            raise ConfigError(f"classes = {classes!r}: give their names as a list, or their number")
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(map(str, classes))
        if not names:
            return ()
        if not whole:
            raise DataError(
                f"{len(names)} classes are named, and labels are no whole numbers: number the classes from 0"
            )
        if len(names) != n_outputs:
            raise ConfigError(f"{len(names)} classes are named, and the model gives {n_outputs} numbers an example")
        for part in parts:
            labels = _labels(part)
            assert labels is not None
            if labels.min() < 0 or labels.max() >= len(names):
                raise DataError(
                    f"labels of the {part.name} reach from {int(labels.min())} to {int(labels.max())}, and there are "
                    f"{len(names)} classes, numbered from 0"
                )
        self._say_absent_classes(names)
        return names

    def _say_absent_classes(self, names: Sequence[str]) -> None:
        """Warn of classes of target and test set that the pool lacks."""
        in_pool = torch.unique(_labels(self.pool))
        for part in (self.target, self.test):
            labels = _labels(part)
            assert labels is not None
            absent = labels[~torch.isin(labels, in_pool)]
            if len(absent):
                log.warning(
                    "%d of %d examples of the %s are of classes that the pool lacks: %s",
                    *(len(absent), len(labels), part.name, ", ".join(names[i] for i in torch.unique(absent)[:5])),
                )

    def _check_replicas(self) -> None:
        """Train replicas one by one if model or loss cannot be vectorised.

        Raises:
            ConfigError: if the recipe asks for batched ones.
        """
        model = self.model(0)
        if self.recipe.replicas == "loop" or not can_stack(model):
            return
        batch = self.target.batch(np.arange(2) % len(self.target))
        parameters = {name: torch.stack([p.detach()] * 2) for name, p in model.named_parameters()}
        pairs = batch.map(lambda x: torch.stack([x, x]))

        def losses(weights: dict[str, Tensor], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, weights, args, kwargs)

            return self.losses(call, replace(batch, inputs=inputs, labels=labels))

        try:
            with torch.random.fork_rng(devices=[]):
                vmap(losses, randomness="same")(parameters, pairs.inputs, pairs.labels)
        except Exception as error:  # The loss is the user's own code.
            if self.recipe.replicas == "batched":
                raise ConfigError(
                    f"replicas = 'batched': torch.vmap cannot vectorise {self._loss.name} ({error}): use 'auto' or "
                    "'loop'"
                ) from error
            log.info("%s: replicas train one by one, as torch.vmap cannot vectorise the loss: %s", self.name, error)
            self.recipe = replace(self.recipe, replicas="loop")


def _labels(pool: Pool) -> Tensor | None:
    labels: Tensor | None = getattr(pool.examples, "labels", None)
    return labels


def _shown(x: Tensor) -> str:
    values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in x.flatten()[:SHOWN].tolist()]
    more = " ..." if x.numel() > SHOWN else ""
    return values[0] if x.dim() == 0 else f"[{' '.join(values)}{more}]"
