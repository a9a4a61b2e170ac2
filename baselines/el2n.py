"""EL2N: the distance of a briefly trained classifier's class probabilities from the label.

Source: Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021, arXiv 2107.07075, definition 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from baselines.similarity.pool_losses import Order, check_order, in_order
from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.pool_scores import score_pool
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes, device_of
from cads.scoring.stages import ReadPool, TrainOnPool
from cads.seeding import derive
from cads.task import Task

WARM_UP, SCORING = "warm-up", "errors"


@dataclass
class El2n(Ranker):
    """The L2 norm of softmax(logits) - onehot(label), averaged over a few models early in training."""

    models: int = 3
    """Number of models, each with its own initial weights and order of the pool."""
    warm_up: float = 1.0
    """Training passes of each model over the pool."""
    order: Order = "high"
    """Which examples come first: high as in the paper; low for noisy labels."""

    method: ClassVar[str] = "el2n"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)
        check_passes(warm_up=self.warm_up)
        if self.models < 1:
            raise ConfigError(f"models = {self.models}: it must be at least 1")

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Train the models, and score the pool with each; see `cads.scoring.ranker.Ranker`."""
        scorer = self.scorer_of(task)
        warming, scoring = self.stages(scorer)
        seeds = [derive(seed, "el2n", k) for k in range(warming.n_models)]
        models = warming.run(scorer, seeds=seeds, ledger=ledger, monitor=monitor)
        errors = np.zeros(len(scorer.pool))
        for model in models:
            errors += score_pool(
                scorer.pool,
                partial(error_norms, scorer, model.eval()),
                scorer.costs.forward,
                ledger=ledger,
                stage=scoring.name,
                device=device_of(model),
                tokens=scoring.tokens,
                precision=scorer.recipe.precision,
            )
        score = in_order(errors / len(models), self.order)
        return self.ranking(task, score, seed=seed, ledger=ledger, pool=scorer.pool)

    def stages(self, scorer: Task) -> tuple[TrainOnPool, ReadPool]:
        """Training and one forward pass over the pool for each model; see `cads.scoring.ranker.Ranker`."""
        _check_classes(scorer)
        return TrainOnPool(WARM_UP, self.warm_up, self.models), ReadPool(SCORING, n_models=self.models)


def error_norms(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """||softmax(logits) - onehot(label)||_2 of each example, between 0 and sqrt(2), shape (B,)."""
    logits = task.logits(model, batch).double()
    return torch.linalg.vector_norm(
        functional.softmax(logits, dim=1) - functional.one_hot(batch.labels, logits.shape[1]), dim=1
    )


def _check_classes(task: Task) -> None:
    """Make a task without classes raise its error before anything is trained."""
    with torch.no_grad():
        task.logits(task.costs.model.eval(), task.pool.batch(np.zeros(1, dtype=np.int64)))
