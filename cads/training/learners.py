"""What the trainer trains: one model, or K replicas of a dense model batched into one."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cads.data.batch import Batch
from cads.errors import ConfigError
from cads.task import Task

STACKABLE = (
    nn.Sequential,
    nn.Linear,
    nn.Flatten,
    nn.Identity,
    nn.LayerNorm,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Dropout,
)
"""Modules without buffers whose batched form is one matrix product, so that K small steps become one."""


def can_stack(model: nn.Module) -> bool:
    """Whether replicas of `model` train faster as one batched model than one by one."""
    return next(model.buffers(), None) is None and all(isinstance(m, STACKABLE) for m in model.modules())


class Learner(nn.Module):
    """Anything the trainer can train: `forward(batch)` gives the losses (nats) of K replicas, shape (K, B).

    Attributes:
        is_collective: whether each pass, forward and backward, is a collective operation of all processes, which sums
            their gradients.
    """

    is_collective = False

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradient of each replica to norm `max_norm` at most; returns the norms before, shape (K,)."""

    @abstractmethod
    def trained(self) -> list[nn.Module]:
        """The K models with their current weights."""

    def has_grad(self) -> np.ndarray:
        """Which trainable parameters this process has a gradient of, bool, one a parameter."""
        return np.array([p.grad is not None for p in self.parameters() if p.requires_grad])

    def gather(self, tensors: Iterable[tuple[str, Tensor]], *, everywhere: bool) -> dict[str, Tensor]:
        """Tensors with the shapes of its parameters, by name; those that are sharded over processes are gathered.

        Args:
            everywhere: whether all processes get them, or the first alone.
        """
        return dict(tensors)

    def shard(self, x: Tensor, like: Tensor) -> Tensor:
        """The shard of the whole tensor `x` that this process holds of `like`, on the device of `like`."""
        return x.to(like.device)


class SingleLearner(Learner):
    """One model."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Batch) -> Tensor:
        """Losses of the batch, shape (1, B)."""
        return self._task.training_losses(self.model, batch)[None]

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by the global norm."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if max_norm is None else max_norm)
        return norm.detach()[None]

    def trained(self) -> list[nn.Module]:
        """The model itself."""
        return [self.model]


class StackedReplicas(Learner):
    """K replicas of one architecture: parameters stacked to (K, ...), the forward pass vectorised over K.

    Gradients stay separate, since the loss of replica k depends on slice k alone; AdamW and SGD are
    elementwise, so each replica takes the steps it would take alone.

    Raises:
        ConfigError: if the models have buffers (batch normalisation), which cannot be stacked.
    """

    def __init__(self, task: Task, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if next(models[0].buffers(), None) is not None:
            raise ConfigError("replicas = 'batched' needs a model without buffers: use 'auto' or 'loop'")
        self._task = task
        self._models = tuple(models)
        self._skeleton = (copy.deepcopy(models[0]).to("meta"),)
        self._names = [name for name, _ in models[0].named_parameters()]
        columns = zip(*(m.parameters() for m in models), strict=True)
        self.stacked = nn.ParameterList(_stacked(column) for column in columns)

    def forward(self, batch: Batch) -> Tensor:
        """Losses of the batch, which holds B examples for each replica in turn; shape (K, B)."""
        split = batch.map(lambda x: x.unflatten(0, (len(self._models), -1)))
        parameters = dict(zip(self._names, self.stacked, strict=True))

        def replica_losses(parameters: dict[str, Tensor], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self._skeleton[0], parameters, args, kwargs)

            replica_batch = Batch(inputs, labels, batch.positions[: len(labels)], batch.tokens, batch.answer_tokens)
            return self._task.training_losses(model, replica_batch)

        self._skeleton[0].train(self.training)
        # One dropout mask for all: trained alone, each replica would draw it from the same seed.
        return vmap(replica_losses, randomness="same")(parameters, split.inputs, split.labels)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip each replica by its own norm, as `torch.nn.utils.clip_grad_norm_` would."""
        gradients = [p.grad for p in self.stacked if p.grad is not None]
        norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in gradients]).norm(dim=0)
        if max_norm is not None:
            scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
            for g in gradients:
                g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
        return norms

    def trained(self) -> list[nn.Module]:
        """The models given at the start, with their weights written back."""
        with torch.no_grad():
            for k, model in enumerate(self._models):
                model.to(self.stacked[0].device)
                for parameter, stacked in zip(model.parameters(), self.stacked, strict=True):
                    parameter.copy_(stacked[k])
        return list(self._models)


def _stacked(column: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter of K models, shape (K, ...); frozen if it is frozen in them."""
    return nn.Parameter(torch.stack([p.detach() for p in column]), requires_grad=column[0].requires_grad)
