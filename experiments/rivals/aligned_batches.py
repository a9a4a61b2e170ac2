"""An online rule like OPUS (arXiv 2602.05400): each step trains on those candidates that point where the target does.

Each step draws twice the examples that it needs. The utility of a candidate is the inner product of its gradient with
that of the step's target examples, both in the weights of the last layer (g = (p - y) h^T, so no gradient is formed),
and a Boltzmann draw by utility keeps half. OPUS's preconditioner, sketches and penalty of redundancy are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cads.accounting.ledger import SELECT
from cads.data.batch import Batch
from cads.scoring.pool_scores import evaluating
from cads.scoring.reference_models import device_of
from cads.task import Task
from cads.tasks.last_layer import last_layer_inputs
from cads.training.precision import autocast
from experiments.rivals.online_rule import OnlineRider, OnlineRule, OnlineRun, forward_flops
from experiments.rivals.subset import feature_width

CANDIDATES = 2
"""Candidates for each pool example of a step."""
TEMPERATURE = 0.5
"""Of the Boltzmann draw, in standard deviations of the utilities of a step."""
SCORING = "utilities"


@dataclass
class AlignedBatches(OnlineRule):
    """Trains on the candidates of each step whose gradients are most like that of the step's target examples."""

    method: ClassVar[str] = "aligned-batches"

    def prices(self, task: Task, n_steps: int) -> dict[str, float]:
        """See `OnlineRule`."""
        return {SCORING: n_steps * self._scoring_flops(task)}

    def rider(self, run: OnlineRun) -> OnlineRider:
        """See `OnlineRule`."""
        return _Rider(run, CANDIDATES * self.n_pool(run.task), self._scoring_flops(run.task))

    def _scoring_flops(self, task: Task) -> float:
        """One forward pass over the candidates and the target's examples of a step, and their inner products."""
        n_target, n_candidates = self.n_target(task), CANDIDATES * self.n_pool(task)
        in_pool, in_target = forward_flops(task)
        products = 2 * (n_candidates + n_target) * feature_width(task) * len(task.classes)
        return n_candidates * in_pool + n_target * in_target + products


class _Rider(OnlineRider):
    """Draws by utility.

    Args:
        price: FLOPs of the utilities of a step.
    """

    def __init__(self, run: OnlineRun, n_candidates: int, price: float) -> None:
        super().__init__(run, n_candidates)
        self._price = price

    def kept(self, step: int, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """A Boltzmann draw without replacement; see `OnlineRider`."""
        noise = np.random.default_rng((self.run.seed, step)).gumbel(size=len(candidates))
        utility = self._utilities(candidates, targets)
        return np.argsort(-(utility / (utility.std() + 1e-12) / TEMPERATURE + noise), kind="stable")[: self.n_kept]

    def _utilities(self, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """<g_i, g_target> of each candidate, shape (n,); its FLOPs are charged."""
        task, model, ledger = self.run.task, self.run.model, self.run.ledger
        device = device_of(model)
        ledger.charge(SELECT, SCORING, self._price)
        with ledger.timed(SELECT, SCORING), evaluating(model), autocast(task.recipe.precision, device):
            pool, target = (
                self._errors_and_features(x.batch(rows).to(device))
                for x, rows in ((task.pool, candidates), (task.target, targets))
            )
            gradient = target[0].T @ target[1] / len(targets)
            return ((pool[0] @ gradient) * pool[1]).sum(dim=1).double().cpu().numpy()

    def _errors_and_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """p - y, shape (B, C), and h, shape (B, D): the gradient of the last layer's weights is their outer product."""
        task, model = self.run.task, self.run.model
        logits: list[Tensor] = []
        features = last_layer_inputs(model, lambda: logits.append(task.logits(model, batch)), task.name)
        error = torch.softmax(logits[0].float(), dim=1) - functional.one_hot(batch.labels, logits[0].shape[1])
        return error, features.float()
