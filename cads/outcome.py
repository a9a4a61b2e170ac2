"""What a Selection is worth: train the final model on it within the budget, and measure it on the test set."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from cads.budget import EVALUATE, SELECT, TRAIN, Budget, Ledger
from cads.draws import Draws, Stream
from cads.errors import BudgetError
from cads.monitor import Monitor
from cads.seeds import derive
from cads.selection import Selection
from cads.speed import matmul_flops_per_second
from cads.task import Metrics, Task
from cads.trainer import Fit, Trainer

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """A trained model and what it cost.

    Attributes:
        model: trained, on the training device.
        metrics: on the test set.
        ledger: selection, training and evaluation.
        fit: the course of the training.
        utilisation: FLOP/s of the training over those of a matrix product on the same device.
    """

    model: nn.Module
    metrics: Metrics
    ledger: Ledger
    fit: Fit
    utilisation: float

    def save(self, folder: Path | str) -> Path:
        """Write `model.safetensors` and `results.json`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().cpu().contiguous() for name, x in self.model.state_dict().items()}
        partial = _beside(folder / "model.safetensors")
        save_file(weights, partial)
        os.replace(partial, folder / "model.safetensors")
        results = {
            "metrics": self.metrics,
            "steps": len(self.fit.losses),
            "utilisation": self.utilisation,
            "ledger": self.ledger.to_json(),
        }
        partial = _beside(folder / "results.json")
        partial.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(partial, folder / "results.json")
        return folder


def _beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def training_flops(task: Task, budget: Budget, selection: Selection) -> float:
    """What is left for training: the budget, less the cost of selection if the budget must cover it.

    Raises:
        BudgetError: if nothing is left.
    """
    total = budget.flops(task)
    if not budget.count_selection:
        return total
    left = total - selection.ledger.total(SELECT).flops
    if left <= 0:
        raise BudgetError(
            f"selection spent {total - left:.4g} of {total:.4g} FLOPs: nothing is left to train with; "
            "raise the budget, or do not count selection"
        )
    return left


def train_on(task: Task, selection: Selection, budget: Budget, *, seed: int, monitor: Monitor | None = None) -> Outcome:
    """Train a fresh model on `selection` within `budget` and measure it on the test set.

    Raises:
        SelectionError: if a selected id is not in the pool. A pool with the same ids and other contents is
            used, with a warning: scores may well come from another model's view of the same examples.
        BudgetError: if the budget does not buy one step.
    """
    monitor = monitor or Monitor()
    flops = training_flops(task, budget, selection)
    if selection.pool_hash != task.pool.content_hash:
        log.warning(
            "the contents or the order of the %s are not those that the selection was made from: make sure that "
            "its ids mean the same examples",
            task.pool.name,
        )
    ledger = Ledger()
    ledger.merge(selection.ledger)
    streams: list[Stream] = []
    if selection.target_fraction < 1:
        streams.append(selection.stream(task.pool, derive(seed, "order")))
    draws = Draws(
        task.pool,
        streams,
        task.recipe.batch_size,
        target=task.target,
        target_fraction=selection.target_fraction,
        seed=derive(seed, "target order"),
    )
    model = task.model(derive(seed, "final model"))
    trainer = Trainer(task, ledger, monitor)
    fit = trainer.fit(model, draws, flops, seed=derive(seed, "training"), phase=TRAIN, stage="final model")
    ledger.charge(EVALUATE, "test", task.costs.forward_pool(task.test))
    with ledger.timed(EVALUATE, "test"):
        metrics = task.metrics(fit.models[0], task.test)
    limit = matmul_flops_per_second(str(trainer.accelerator.device), task.recipe.precision)
    utilisation = fit.flops_per_second / limit
    monitor.scalar("trainer/mfu", utilisation, len(fit.losses))
    monitor.ledger(ledger)
    for name, value in metrics.items():
        monitor.scalar(f"test/{name}", value, 0)
    return Outcome(fit.models[0], metrics, ledger, fit, utilisation)
