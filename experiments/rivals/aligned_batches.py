"""An online rule like OPUS (arXiv 2602.05400): each step trains on those candidates that point where the target does.

Each step draws twice the examples that it needs. The utility of a candidate is the inner product of its gradient with
that of the step's target examples, both in the weights of the last layer (g = (p - y) h^T, so no gradient is formed),
and a Boltzmann draw by utility keeps half. OPUS's preconditioner, sketches and penalty of redundancy are left out.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING, SELECT, TRAIN, Ledger, PlannedLedger
from cads.data.balanced_stream import balanced_stream
from cads.data.batch import Batch
from cads.data.token_batches import by_id
from cads.data.training_batches import joined
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.pool_scores import evaluating
from cads.scoring.reference_models import device_of
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.selector import finished
from cads.task import Task
from cads.training.precision import autocast
from cads.training.rider import Rider
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from experiments.rivals.subset import feature_width, labels_of

CANDIDATES = 2
"""Candidates for each pool example of a step."""
TEMPERATURE = 0.5
"""Of the Boltzmann draw, in standard deviations of the utilities of a step."""
SCORING = "utilities"


@dataclass
class AlignedBatches:
    """Selects as it trains: the budget covers the utilities of all candidates and the one run."""

    target_fraction: float = 0.3
    """Share of each batch that is the target's; the gradient of these examples is what candidates are compared with."""

    method: ClassVar[str] = "aligned-batches"

    def __post_init__(self) -> None:
        if not 0 < self.target_fraction < 1:
            raise ConfigError(f"target_fraction = {self.target_fraction}: it must be above 0 and below 1")

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge to "select"; see `cads.selector.Selector`."""
        ledger = PlannedLedger()
        ledger.charge(SELECT, SCORING, self._steps(task, budget) * self._scoring_flops(task))
        return ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Train the final model; see `cads.selector.Selector`."""
        labels_of(task, task.pool)
        limit = budget.flops(task) * ROUNDING if budget.count_selection else None
        run_ledger, n_steps = Ledger(limit=limit), self._steps(task, budget)
        model = task.model(derive(seed, "final model"))
        rider = _Rider(task, model, run_ledger, self._scoring_flops(task), n_steps, self._n_target(task), seed)
        try:
            fit = Trainer(task, run_ledger, monitor).fit(
                model,
                rider,
                n_steps * self._step_flops(task) * ROUNDING,
                seed=derive(seed, "training"),
                phase=TRAIN,
                stage="final model",
                segment=RunSegment(keep=True),
            )
        finally:
            ledger.merge(run_ledger)
        assert fit.state is not None
        return Selection.from_pool(
            task.pool,
            selected=rider.counts > 0,
            score=rider.counts,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            target_fraction=self.target_fraction,
            trained=finished(fit.state),
        )

    def _n_target(self, task: Task) -> int:
        return min(task.recipe.batch_size - 1, max(1, round(self.target_fraction * task.recipe.batch_size)))

    def _step_flops(self, task: Task) -> float:
        """The most that a step costs, whichever examples it holds."""
        usage = max(task.costs.usages(task.pool).max(), task.costs.usages(task.target).max())
        return float(usage * task.recipe.batch_size + task.costs.optimizer_step)

    def _scoring_flops(self, task: Task) -> float:
        """One forward pass over the candidates and the target's examples of a step, and their inner products."""
        n_target = self._n_target(task)
        n_candidates = CANDIDATES * (task.recipe.batch_size - n_target)
        forward = [task.costs.forward_pool(pool) / len(pool) for pool in (task.pool, task.target)]
        products = 2 * (n_candidates + n_target) * feature_width(task) * len(task.classes)
        return n_candidates * forward[0] + n_target * forward[1] + products

    def _steps(self, task: Task, budget: Budget) -> int:
        total, step = budget.flops(task), self._step_flops(task)
        price = step + self._scoring_flops(task) if budget.count_selection else step
        check_step(task, total * step / price)
        return int(total / price * ROUNDING)


class _Rider(Rider):
    """Draws each batch by the present model.

    Attributes:
        counts: how often each pool example was trained on, shape (N,).
    """

    def __init__(
        self, task: Task, model: nn.Module, ledger: Ledger, price: float, n_steps: int, n_target: int, seed: int
    ) -> None:
        super().__init__(task.pool, task.recipe.batch_size)
        self.counts = np.zeros(len(task.pool))
        self._task, self._model, self._ledger, self._price, self._n_steps = task, model, ledger, price, n_steps
        self._n_target, self._seed = n_target, seed
        self._pool_rows = balanced_stream(by_id(task.pool), task.groups(task.pool), derive(seed, "order"))
        self._target_rows = balanced_stream(by_id(task.target), task.groups(task.target), derive(seed, "target order"))
        self._drawn = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[Batch]:
        """See `Rider`. The batch after the last step is drawn, but not trained on: it has no utilities."""
        count, n_target = self.batch_size - self._n_target, self._n_target
        candidates = self._pool_rows.take(step * CANDIDATES * count, CANDIDATES * count)
        targets = self._target_rows.take(step * n_target, n_target)
        kept = np.arange(count)
        if step < self._n_steps:
            noise = np.random.default_rng((self._seed, step)).gumbel(size=len(candidates))
            utility = self._utilities(candidates, targets)
            kept = np.argsort(-(utility / (utility.std() + 1e-12) / TEMPERATURE + noise), kind="stable")[:count]
        self._drawn = candidates[np.sort(kept)], targets
        return joined([self._task.pool.batch(self._drawn[0]), self._task.target.batch(targets)], 1)

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        np.add.at(self.counts, self._drawn[0], 1)

    def ids(self, batches: list[Batch]) -> list[str]:
        """See `Rider`."""
        pools = (self._task.pool, self._task.target)
        return [i for pool, rows in zip(pools, self._drawn, strict=True) for i in pool.ids.take(rows).to_pylist()]

    def fingerprint(self) -> str:
        """See `Rider`."""
        return hashlib.sha256(f"aligned batches {self._seed} {self._n_steps} {self._n_target}".encode()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        """See `Rider`."""
        return {"counts": torch.from_numpy(self.counts.copy())}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Rider`."""
        self.counts = state["counts"].numpy().copy()

    def _utilities(self, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """<g_i, g_target> of each candidate, shape (n,); its FLOPs are charged."""
        task, device = self._task, device_of(self._model)
        self._ledger.charge(SELECT, SCORING, self._price)
        with (
            self._ledger.timed(SELECT, SCORING),
            evaluating(self._model),
            autocast(task.recipe.precision, device),
        ):
            pool, target = (
                self._errors_and_features(x.batch(rows).to(device))
                for x, rows in ((task.pool, candidates), (task.target, targets))
            )
            gradient = target[0].T @ target[1] / len(targets)
            return ((pool[0] @ gradient) * pool[1]).sum(dim=1).double().cpu().numpy()

    def _errors_and_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """p - y, shape (B, C), and h, shape (B, D): the gradient of the last layer's weights is their outer product."""
        read: list[Tensor] = []
        layer = [m for m in self._model.modules() if isinstance(m, nn.Linear)][-1]
        hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            logits = self._task.logits(self._model, batch)
        finally:
            hook.remove()
        error = torch.softmax(logits.float(), dim=1) - functional.one_hot(batch.labels, logits.shape[1])
        return error, read[-1].float().flatten(1)
