"""Losses file by file, under models that are trained on the target once, or not at all: ppl, loss and rho."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from baselines.similarity.pool_losses import pool_losses
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.scoring.reference_models import in_pool_order, proxy_of
from cads.scoring.sharded import ShardedScoring, Values, load_part, trained_part
from cads.scoring.stages import ReadPool, TrainOnTarget, on_training_device
from cads.task import Task


@dataclass(frozen=True)
class JudgedLoss:
    """A loss of each example, and the model that gives it.

    Attributes:
        fitting: of the model to the target; None or 0 passes: the initial weights. reading: the pass over the pool.
        seed: of the model. sign: with which the loss counts in a value.
    """

    fitting: TrainOnTarget | None
    reading: ReadPool
    seed: int
    sign: float = 1.0

    @property
    def fitted(self) -> bool:
        """Whether the model is trained."""
        return self.fitting is not None and self.fitting.passes > 0


class ShardedLosses(ShardedScoring):
    """The sum of some losses of each example, with their signs.

    Args:
        losses: of one seed. nearest_median: see `ShardedScoring`. autocast: compute in bfloat16.
    """

    def __init__(
        self,
        method: str,
        config: dict[str, Any],
        cut: Cut,
        losses: Sequence[JudgedLoss],
        *,
        nearest_median: bool = False,
        autocast: bool = False,
    ) -> None:
        super().__init__(method, config, cut)
        self.nearest_median = nearest_median
        self._losses, self._autocast = losses, autocast

    def prepare(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> State:
        """Fit the models to the target."""
        scorer, state = proxy_of(task), State()
        for i, loss in enumerate(self._losses):
            if loss.fitting is not None and loss.fitted:
                model = loss.fitting.run(scorer, seed=loss.seed, ledger=ledger, monitor=monitor)
                state.tensors |= {f"{i}/{name}": x for name, x in trained_part(model).items()}
        return state

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """See `ShardedScoring`."""
        scorer = proxy_of(task)
        models = [self._model(i, scorer, state) for i in range(len(self._losses))]

        def values(part: Task, ledger: Ledger) -> np.ndarray:
            part_scorer = proxy_of(part)
            total = np.zeros(len(part_scorer.pool))
            for loss, model in zip(self._losses, models, strict=True):
                found = pool_losses(part_scorer, model, loss.reading, ledger=ledger, autocast=self._autocast)
                total += loss.sign * found
            return in_pool_order(total, part_scorer.pool, part.pool)

        return values

    def plan(self, task: Task) -> PlannedLedger:
        """The passes over the pool."""
        ledger, scorer = PlannedLedger(), proxy_of(task)
        for loss in self._losses:
            loss.reading.charge(scorer, ledger)
        return ledger

    def _model(self, i: int, scorer: Task, state: State) -> nn.Module:
        model = scorer.model(self._losses[i].seed)
        if self._losses[i].fitted:
            prefix = f"{i}/"
            load_part(model, {n.removeprefix(prefix): x for n, x in state.tensors.items() if n.startswith(prefix)})
        return on_training_device(scorer, model)
