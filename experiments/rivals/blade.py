"""An online rule like BLADE (Wang et al., 2026, arXiv 2606.18650): trains on what a model that knows the target can do.

From the paper, as far as its abstract and summaries say: bilevel selection with a penalty in place of the inner problem
gives two models, u, which is trained on the selection, and w, which is trained on the target as well. Of the candidates
of each step those are kept whose excess loss l(u) - l(w) is the largest, a share gamma = .6. At intervals, a fifth of
the run, w starts again from u, and is trained for .3 of an interval.

Ours: examples in place of tokens. Half of each batch of w is the target's. The other half is what u was trained on
since the last start of w, and all of the pool at first. w has an optimizer and a schedule of its own. u is trained on
the target too, for the same share of each batch as the other rivals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cads.accounting.ledger import ROUNDING, SELECT
from cads.data.balanced_stream import balanced_stream
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.scoring.pool_scores import evaluating
from cads.scoring.reference_models import device_of
from cads.seeding import derive
from cads.task import Task
from cads.training.precision import autocast
from cads.training.trainer import Trainer
from experiments.rivals.online_rule import OnlineRider, OnlineRule, OnlineRun, forward_flops, step_flops

KEPT = 0.6
"""gamma, the share of the candidates that is trained on."""
INTERVALS = 5
"""Starts of w."""
REFERENCE = 0.3
"""Steps of w as a share of those of an interval."""
EXCESS, REFERENCE_STAGE = "excess losses", "u"


@dataclass
class Blade(OnlineRule):
    """Trains on the candidates of each step with the largest excess loss."""

    method: ClassVar[str] = "blade"

    def prices(self, task: Task, n_steps: int) -> dict[str, float]:
        """Both models read all candidates; w is trained once an interval."""
        interval = _interval(n_steps)
        return {
            EXCESS: n_steps * self._scoring_flops(task),
            REFERENCE_STAGE: -(-n_steps // interval) * _reference_steps(interval) * step_flops(task),
        }

    def rider(self, run: OnlineRun) -> OnlineRider:
        """See `OnlineRule`."""
        return BladeRider(run, self._n_candidates(run.task), self._scoring_flops(run.task))

    def _n_candidates(self, task: Task) -> int:
        return round(self.n_pool(task) / KEPT)

    def _scoring_flops(self, task: Task) -> float:
        return 2 * self._n_candidates(task) * forward_flops(task)[0]


class BladeRider(OnlineRider):
    """Keeps the candidates with the largest excess loss; `memory` holds the weights of w.

    Args:
        price: FLOPs of the excess losses of a step.
    """

    def __init__(self, run: OnlineRun, n_candidates: int, price: float) -> None:
        super().__init__(run, n_candidates)
        self._price, self._interval = price, _interval(run.n_steps)

    def kept(self, step: int, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """See `OnlineRider`."""
        if step % self._interval == 0:
            self.memory = {**self.trained_reference(step), "before": torch.from_numpy(self.counts.copy())}
        return np.argsort(-self._excess(candidates), kind="stable")[: self.n_kept]

    def trained_reference(self, step: int) -> dict[str, Tensor]:
        """The weights of w: those of u, trained on the target and on what u was trained on since the last time."""
        task, seed = self.run.task, derive(self.run.seed, "reference", step)
        order, groups = by_id(task.pool), task.groups(task.pool)
        recent = self.counts > (self.memory["before"].numpy() if self.memory else self.counts)
        rows = order[recent[order]] if recent.any() else order
        batches = BatchStream(
            task.pool,
            [balanced_stream(rows, groups, seed)],
            task.recipe.batch_size,
            target=task.target,
            target_fraction=0.5,
            target_stream=balanced_stream(by_id(task.target), task.groups(task.target), derive(seed, "target")),
            seed=seed,
        )
        reference = copy.deepcopy(self.run.model)
        flops = _reference_steps(self._interval) * step_flops(task) * ROUNDING
        Trainer(task, self.run.ledger).fit(reference, batches, flops, seed=seed, phase=SELECT, stage=REFERENCE_STAGE)
        return {name: x.detach().clone() for name, x in reference.state_dict().items()}

    def _excess(self, candidates: np.ndarray) -> np.ndarray:
        """l(u) - l(w) of each candidate, nats, shape (n,); its FLOPs are charged."""
        task, model, ledger = self.run.task, self.run.model, self.run.ledger
        device = device_of(model)
        weights = {name: x.to(device) for name, x in self.memory.items() if name != "before"}
        ledger.charge(SELECT, EXCESS, self._price)
        batch = task.pool.batch(candidates).to(device)
        with ledger.timed(SELECT, EXCESS), evaluating(model), autocast(task.recipe.precision, device):
            excess = task.losses(model, batch) - task.losses(with_weights(model, weights), batch)
        return excess.double().cpu().numpy()


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """The model with other weights."""
    return lambda *args, **kwargs: functional_call(model, weights, args, kwargs)


def _interval(n_steps: int) -> int:
    """Steps between two starts of w."""
    return max(1, -(-n_steps // INTERVALS))


def _reference_steps(interval: int) -> int:
    """Steps of w in an interval."""
    return max(1, round(REFERENCE * interval))
