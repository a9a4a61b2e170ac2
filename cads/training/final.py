"""The value of a `Selection`: train the final model on it within the budget, and measure it on the test set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.data.balanced_stream import balanced_stream
from cads.data.streams import Stream
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, CheckpointError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run
from cads.runtime.lockstep import StepReporter
from cads.runtime.processes import active_group
from cads.seeding import derive
from cads.selection import Selection
from cads.task import Metrics, Task
from cads.training.evaluations import RESULTS, evaluate, evaluation_record, in_one_piece, write_results
from cads.training.result import TrainResult
from cads.training.trainer import Trainer

log = logging.getLogger(__name__)

NEARLY_ALL = 0.95
"""Share of the pool from which on a selection is as good as none."""


@dataclass
class TrainedModel:
    """A trained model and what it cost.

    Attributes:
        model: trained, on the training device.
        metrics: on the test set.
        ledger: selection, training and evaluation.
        train_result: losses and FLOPs of the training.
        utilisation: FLOP/s of the training, divided by those of matrix products on the devices of all processes; 0 if
            the time of the training is not known.
        task: that was trained; it writes the model.
        evaluations: the metrics of each further evaluation, by its name; they are among `metrics` too.
        about: data, budget and selection, as JSON values, for `results.json` and the model card.
        validation: metrics on the target while it was trained; see `cads.training.validation`.
    """

    model: nn.Module
    metrics: Metrics
    ledger: Ledger
    train_result: TrainResult
    utilisation: float
    task: Task
    evaluations: dict[str, Metrics] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    validation: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path | str, *, merge: bool = False) -> Path:
        """Write the model in the format of its task, then `results.json` and the model card.

        Args:
            merge: merge an adapter into the weights of its base model.

        Raises:
            CheckpointError, OSError: if it cannot be written, for example to a full disk; if the written model is not
                the trained one.
        """
        folder = Path(folder)
        save_model(self.task, self.model, folder, merge=merge)
        self.save_results(folder)
        return folder

    def save_results(self, folder: Path) -> None:
        """Write `results.json` and the model card beside the model in `folder`."""
        results = {
            "metrics": self.metrics,
            "steps": len(self.train_result.losses),
            "skipped_batches": self.train_result.skipped,
            "utilisation": self.utilisation,
            "ledger": self.ledger.to_json(),
            **self.about,
        }
        if self.validation:
            results["validation"] = self.validation
        if self.evaluations:
            records = {n: evaluation_record(self.task, n, metrics) for n, metrics in self.evaluations.items()}
            results["evaluations"] = records
        write_results(folder, results)


def save_model(task: Task, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
    """Write a trained model in the format of its task; the results of an earlier model there are removed.

    Arguments, raises: as `TrainedModel.save`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        task.save(model, folder, merge=merge)
    except SafetensorError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder} ({error}): make room and give the same command again"
        ) from error
    (folder / RESULTS).unlink(missing_ok=True)


def final_training_flops(task: Task, budget: Budget, selection: Selection) -> float:
    """FLOPs that remain for training: the budget, less the cost of selection if the budget must cover it.

    Raises:
        BudgetError: if nothing remains.
    """
    total = budget.flops(task)
    if not budget.count_selection:
        return total
    remaining = total - selection.ledger.total(SELECT).flops
    if remaining <= 0:
        raise BudgetError(
            f"selection spent {total - remaining:.4g} of {total:.4g} FLOPs: nothing is left to train with; "
            "raise the budget, or do not count selection"
        )
    return remaining


def train(
    task: Task,
    selection: Selection,
    budget: Budget,
    *,
    seed: int,
    monitor: Monitor | None = None,
    evaluations: Sequence[str] = (),
    save: Callable[[nn.Module], None] | None = None,
) -> TrainedModel:
    """Train a fresh model on `selection` within `budget` and measure it on the test set.

    If the selector has trained the final model (`selection.trained`), that model is measured, and nothing is trained.

    Args:
        evaluations: names of further evaluations of the task (`Task.evaluate`); each is charged the FLOPs it executes.
        save: is given the trained model before it is tested; all processes call it. A resumed run calls it again.

    Raises:
        SelectionError: if a selected id is not in the pool. A pool with the same ids and other contents is
            used, with a warning: the scores may come from another representation of the same examples.
        BudgetError: if the budget does not buy one step.
    """
    monitor = monitor or Monitor()
    for name in evaluations:
        task.check_evaluation(name)
    if selection.pool_hash != task.pool.content_hash:
        log.warning(
            "the contents or the order of the %s are not those that the selection was made from: make sure that "
            "its ids mean the same examples",
            task.pool.name,
        )
    ledger = Ledger()
    ledger.merge(selection.ledger)
    trainer = Trainer(task, ledger, monitor)
    if selection.trained is None:
        _say_nearly_all(selection)
        _say_rounded(selection, task.recipe.batch_size)
        result = fit_final_model(trainer, selection, final_training_flops(task, budget, selection), seed=seed)
    else:
        _say_finished(task, selection, budget, seed)
        # The stored state lacks the frozen weights: they are those of the seed of the run.
        model = task.model(derive(selection.seed, "final model"))
        result = trainer.restore(model, selection.trained, selection.ledger.total(TRAIN).seconds)

    if save is not None:
        save(result.models[0])

    def test(progress: StepReporter) -> State:
        with in_one_piece("test", progress, ledger=ledger, monitor=monitor):
            state = State(dict(task.metrics(result.models[0], task.test)))
        ledger.charge(EVALUATE, "test", task.costs.forward_pool(task.test))
        return state

    test_state = replay_or_run("test", [], ledger, test)
    metrics: Metrics = {name: test_state.number(name) for name in test_state.values}
    further: dict[str, Metrics] = {}
    for name in evaluations:
        further[name] = evaluate(task, result.models[0], name, ledger=ledger, monitor=monitor)
        metrics |= further[name]
    peak = matmul_flops_per_second(str(trainer.accelerator.device), task.recipe.precision) * active_group().size
    utilisation = result.flops_per_second / peak
    monitor.scalar("trainer/mfu", utilisation, len(result.losses))
    monitor.ledger(ledger)
    for name, value in metrics.items():
        monitor.scalar(f"test/{name}", value, 0)
    about = _about(task, selection, budget, seed)
    return TrainedModel(
        result.models[0], metrics, ledger, result, utilisation, task, further, about, list(monitor.validation)
    )


def _about(task: Task, selection: Selection, budget: Budget, seed: int) -> dict[str, Any]:
    """What a run was given: data, budget and selection, as JSON values."""
    parts = {name: getattr(task, name) for name in ("pool", "target", "test")}
    data = {name: {"examples": len(part), "hash": task.identity[name]} for name, part in parts.items()}
    return {
        "data": {"task": task.name, "base_model": task.base_model, **data},
        "budget": {
            "given": str(budget),
            "flops": budget.flops(task),
            # A selector that trained the final model had one budget for everything.
            "covers_selection": budget.count_selection or selection.trained is not None,
            "seed": seed,
        },
        "selection": {
            "method": selection.method,
            "seed": selection.seed,
            "examples": len(selection.ids),
            "selected": int(selection.selected.sum()),
            "target_fraction": selection.target_fraction,
            "shares": selection.shares,
            "notes": _ends(task, selection, budget)
            | {name: note for name, note in selection.notes.items() if isinstance(note, str)},
        },
    }


def _ends(task: Task, selection: Selection, budget: Budget) -> dict[str, str]:
    """The note on an end before that of the budget, if `stop_passes` gives one."""
    if selection.stop_passes is None or stop_flops(task, selection) >= final_training_flops(task, budget, selection):
        return {}
    return {"end": f"training ended after {selection.stop_passes:g} passes over what is selected, as it was asked to"}


def _say_finished(task: Task, selection: Selection, budget: Budget, seed: int) -> None:
    """Warn of a budget or a seed that is not that of the finished run of `selection`."""
    said = "%s has no effect: %s trained the final model while it selected, with %s; select again for another model"
    if budget.flops(task) != selection.budget.flops(task):
        log.warning(said, f"a budget of {budget}", selection.method, selection.budget)
    if seed != selection.seed:
        log.warning(said, f"the seed {seed}", selection.method, f"the seed {selection.seed}")


def _say_nearly_all(selection: Selection) -> None:
    """Warn of a selection that tells examples apart by score and yet keeps nearly all of the pool."""
    share = selection.effective_share
    if share >= NEARLY_ALL and np.ptp(selection.score):
        log.warning(
            "%s keeps %d of %d examples, in effect %.3g %% of the pool: the model trains on nearly everything, and "
            "its score says little of the method; a smaller budget keeps less, as does the `fraction` of a ranking",
            selection.method,
            int(selection.selected.sum()),
            len(selection.ids),
            100 * share,
        )


def _say_rounded(selection: Selection, batch_size: int) -> None:
    """Warn of a share of the target that is rounded to none of a batch, or to all of it."""
    share, n_target = selection.target_fraction, round(selection.target_fraction * batch_size)
    if 0 < share < 1 and n_target in (0, batch_size):
        log.warning(
            "target_fraction = %.3g of a batch of %d is rounded to %d examples: the model trains on the %s alone; "
            "raise batch_size, or choose another share",
            share,
            batch_size,
            n_target,
            "target" if n_target else "pool",
        )


def fit_final_model(trainer: Trainer, selection: Selection, flops: float, *, seed: int) -> TrainResult:
    """Train the final model on `selection` for at most `flops`, which are charged to "train"; see `Trainer.fit`."""
    task = trainer.task
    streams: list[Stream] = []
    target_stream: Stream | None = None
    if selection.target_fraction < 1:
        groups = task.groups(task.pool) if selection.balanced else None
        streams.append(selection.stream(task.pool, derive(seed, "order"), groups))
    if selection.balanced:
        target_stream = balanced_stream(by_id(task.target), task.groups(task.target), derive(seed, "target order"))
    flops = min(flops, stop_flops(task, selection))
    draws = BatchStream(
        task.pool,
        streams,
        task.recipe.batch_size,
        target=task.target,
        target_fraction=selection.target_fraction,
        target_stream=target_stream,
        seed=derive(seed, "target order"),
    )
    model = task.model(derive(seed, "final model"))
    return trainer.fit(model, draws, flops, seed=derive(seed, "training"), phase=TRAIN, stage="final model")


def stop_flops(task: Task, selection: Selection) -> float:
    """FLOPs after which training ends, whatever the budget; infinite without `stop_passes`."""
    if selection.stop_passes is None:
        return math.inf
    batch_size = task.recipe.batch_size
    pass_flops = task.costs.per_usage(task.pool, batch_size) * int(selection.selected.sum())
    if selection.target_fraction:
        pass_flops += task.costs.per_usage(task.target, batch_size) * len(task.target)
    return selection.stop_passes * pass_flops


def load_trained(task: Task, folder: Path) -> nn.Module:
    """The trained model in `folder`, on the device on which the task trains.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    return task.load(folder).to(Trainer(task, Ledger()).accelerator.device)
