"""An online rule like ADAPT (Zhao et al., ICLR 2026, arXiv 2605.05227): examples that are like the target weigh more.

From the paper, as far as summaries of it say: no example is dropped, and each has a weight, its own learning rate,

    w(x) = sigmoid(s(x) / tau),   s(x) = mean over the target of cos(phi(x), phi(v)),   tau = 1,

where phi is the present model's representation. That of the target is computed anew every R steps.

Ours: phi is the input of the last layer. The label is no part of it, as an answer is of a text's; so s is the mean over
the target examples of the same label. R, the number of target examples that are compared with, the share of the target
in each batch and the balanced draws. The clipping of weights is left out: they are between sigmoid(-1) and sigmoid(1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cads.accounting.ledger import SELECT
from cads.data.batch import Batch
from cads.data.token_batches import by_id
from cads.errors import ConfigError
from cads.seeding import derive
from cads.task import Task
from cads.tasks.last_layer import last_layer_inputs
from experiments.rivals.online_rule import OnlineRider, OnlineRule, OnlineRun, forward_flops
from experiments.rivals.subset import feature_width, read_rows

ANCHORS = 256
"""Most examples of the target that are compared with."""
REFRESH = 100
"""R, steps."""
READING_TARGET, SIMILARITIES = "features of the target", "similarities"


@dataclass
class Adapt(OnlineRule):
    """Weighs the loss of each example by its likeness to the target."""

    temperature: float = 1.0
    """tau."""

    method: ClassVar[str] = "adapt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature}: it must be above 0")

    def prices(self, task: Task, n_steps: int) -> dict[str, float]:
        """The target is read every R steps. Features of a batch are there anyway: their products are paid for."""
        anchors = min(ANCHORS, len(task.target)) * (forward_flops(task)[1] + 3 * feature_width(task))
        return {
            READING_TARGET: -(-n_steps // REFRESH) * anchors,
            SIMILARITIES: n_steps * task.recipe.batch_size * 5.0 * feature_width(task),
        }

    def rider(self, run: OnlineRun) -> OnlineRider:
        """See `OnlineRule`."""
        return _Rider(run, self.temperature, self.prices(run.task, 1))

    def trained_task(self, task: Task, rider: OnlineRider) -> Task:
        """The task with weighted losses."""
        assert isinstance(rider, _Rider)
        weighted = copy.copy(task)
        weighted.training_losses = rider.weighted_losses  # type: ignore[method-assign]
        return weighted


class _Rider(OnlineRider):
    """Keeps all candidates; `counts` adds up their weights.

    Args:
        temperature: tau. prices: FLOPs of one reading of the target, and of the similarities of a step, by stage.
    """

    def __init__(self, run: OnlineRun, temperature: float, prices: dict[str, float]) -> None:
        super().__init__(run, run.task.recipe.batch_size - run.n_target)
        self._temperature, self._prices = temperature, prices
        self._weights: list[Tensor] = []
        order = by_id(run.task.target)
        self._anchors = np.random.default_rng(derive(run.seed, "anchors")).permutation(order)[:ANCHORS]

    def kept(self, step: int, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """All; the target is read first, if it is time."""
        if step % REFRESH == 0:
            self.memory = {"anchors": self._class_means()}
        return np.arange(len(candidates))

    def weighted_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """w(x) l(x) of each example, nats, shape (B,); the features are those of the pass that gives the losses."""
        task, ledger = self.run.task, self.run.ledger
        losses: list[Tensor] = []
        assert isinstance(model, torch.nn.Module)
        features = last_layer_inputs(model, lambda: losses.append(task.training_losses(model, batch)), task.name)
        ledger.charge(SELECT, SIMILARITIES, self._prices[SIMILARITIES] * len(batch) / self.batch_size)
        with torch.no_grad():
            means = self.memory["anchors"].to(features.device)
            similarity = (functional.normalize(features.float(), dim=1) * means[batch.labels]).sum(dim=1)
            weights = torch.sigmoid(similarity / self._temperature)
        self._weights.append(weights)
        return losses[0] * weights

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        weights = torch.cat(self._weights)[: len(self.drawn[0])].double().cpu().numpy()
        self._weights.clear()
        np.add.at(self.counts, self.drawn[0], weights)

    def _class_means(self) -> Tensor:
        """The mean direction of the features of each class of the target, shape (C, D); 0 without an example."""
        task = self.run.task
        rows = read_rows(
            task,
            task.target,
            self.run.model,
            lambda m, batch: functional.normalize(task.features(m, batch).float(), dim=1),
            ledger=self.run.ledger,
            stage=READING_TARGET,
            positions=self._anchors,
        )
        self.run.ledger.charge(SELECT, READING_TARGET, 3.0 * rows.size)
        labels = np.asarray(task.groups(task.target))[self._anchors]
        members = np.eye(len(task.classes))[labels]
        means = members.T @ rows / np.maximum(members.sum(axis=0), 1)[:, None]
        return torch.from_numpy(means).float()
