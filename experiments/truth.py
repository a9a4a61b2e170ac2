"""The truth of small worlds: the value of every subset of sources, trained for C with several seeds.

Results are kept on disk, in files named by a hash of all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, Ledger
from cads.data.streams import ShuffledStream, Stream
from cads.data.token_batches import in_id_order
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.estimators.enumeration import enumerate_masks
from cads.runtime.atomic_files import whole_file
from cads.seeding import derive
from cads.selection import Selection
from cads.task import Task
from cads.training.trainer import Trainer

TRUTH_VERSION = 2
"""Part of every result's key: raise it when the contents of a result change their meaning."""
REPLICAS = 16
"""Models that are trained at once: more do not make the training of small dense networks on a CPU faster."""
ENUMERATED = 6
"""Largest number of sources for which all subsets are trained."""
CHOSEN_ON, MEASURED_ON = slice(0, None, 2), slice(1, None, 2)
"""The seeds on which the best subset is chosen, and the seeds on which it and all other choices are measured."""


@dataclass
class Truth:
    """Test loss and accuracy of models trained on subsets of the sources.

    Attributes:
        masks: the subsets, bool, shape (M, S).
        losses: calibrated test loss, nats, shape (M, seeds). accuracy: on the test set, shape (M, seeds).
            NaN where a subset was not trained with a seed.
        flops: of the training of one model.
        exhaustive: whether `masks` has all subsets, or only those that a search has trained.
    """

    masks: np.ndarray
    losses: np.ndarray
    accuracy: np.ndarray
    flops: float
    exhaustive: bool = True

    @property
    def best(self) -> tuple[int, int]:
        """Rows of the subsets with the least loss and with the highest accuracy on the seeds to choose on."""
        return (
            int(np.nanargmin(self.losses[:, CHOSEN_ON].mean(axis=1))),
            int(np.nanargmax(self.accuracy[:, CHOSEN_ON].mean(axis=1))),
        )

    @property
    def floor(self) -> tuple[float, float]:
        """The bias of choosing the best of many noisy means, in loss (nats) and in accuracy: no regret is more precise.

        The best mean on the seeds to measure on is better by this much than the mean, on the same seeds, of the subset
        that is best on the seeds to choose on.
        """
        loss, accuracy = self.losses[:, MEASURED_ON].mean(axis=1), self.accuracy[:, MEASURED_ON].mean(axis=1)
        best_loss, best_accuracy = self.best
        return float(loss[best_loss] - np.nanmin(loss)), float(np.nanmax(accuracy) - accuracy[best_accuracy])

    def row(self, mask: np.ndarray) -> int | None:
        """The row of a subset in `masks`, or None if it was not trained with all seeds."""
        rows = np.flatnonzero((self.masks == mask).all(axis=1))
        return int(rows[0]) if len(rows) and np.isfinite(self.losses[rows[0]]).all() else None

    def regret(self, mask: np.ndarray) -> tuple[float, float]:
        """(regret in loss, regret in accuracy) of a subset; see `regret_of`."""
        row = self.row(mask)
        if row is None:
            raise ConfigError(f"the subset {np.asarray(mask).astype(int).tolist()} was not trained: measure it first")
        return self.regret_of(self.losses[row, MEASURED_ON], self.accuracy[row, MEASURED_ON])

    def regret_of(self, losses: np.ndarray, accuracy: np.ndarray) -> tuple[float, float]:
        """(regret in loss, regret in accuracy) of models with these losses and accuracies.

        The best of many noisy means is biased. So the best subset is chosen on the even seeds, by the lowest loss (the
        highest accuracy), and its value is taken from the odd seeds.

        Args:
            losses, accuracy: on the test set, with the seeds to measure on.
        """
        best_loss, best_accuracy = self.best
        return (
            float(np.mean(losses) - self.losses[best_loss, MEASURED_ON].mean()),
            float(self.accuracy[best_accuracy, MEASURED_ON].mean() - np.mean(accuracy)),
        )


def train_streams(
    task: Task, runs: Sequence[tuple[Stream, int]], flops: float, target_fraction: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Train a model on each stream for `flops`, in batched replicas, and measure it on the test set.

    Args:
        runs: for each model, the stream to train on and the seed of the initial weights.
        target_fraction: share of each batch that is drawn from the target.

    Returns:
        calibrated test loss (M,), test accuracy (M,).
    """
    losses, accuracy = [], []
    trainer = Trainer(task, Ledger())
    for start in range(0, len(runs), REPLICAS):
        chunk = runs[start : start + REPLICAS]
        draws = BatchStream(
            task.pool,
            [stream for stream, _ in chunk],
            task.recipe.batch_size,
            target=task.target,
            target_fraction=target_fraction,
            seed=derive(chunk[0][1], "target order"),
        )
        models = [task.model(derive(seed, "model")) for _, seed in chunk]
        fit = trainer.fit_replicas(models, draws, flops, seed=chunk[0][1], phase=EVALUATE, stage="truth")
        for model in fit.models:
            metrics = task.metrics(model, task.test)
            losses.append(metrics["calibrated_loss"])
            accuracy.append(metrics["accuracy"])
    return np.array(losses), np.array(accuracy)


def train_masks(task: Task, masks: Iterable[np.ndarray], flops: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a model on each subset for `flops`, all from the same weights and in the same order.

    Returns:
        calibrated test loss (M,), test accuracy (M,).
    """
    pool, order = task.pool, derive(seed, "order")
    streams = [ShuffledStream(in_id_order(pool, pool.positions_in(m)), order) for m in masks]
    return train_streams(task, [(stream, seed) for stream in streams], flops)


def truth(task: Task, budget: Budget, seeds: int, cache: Path) -> Truth:
    """The truth of a task of at most 6 sources, all subsets; read from `cache` where it was computed before."""
    masks = enumerate_masks(len(task.pool.source_names))[1:]
    flops = budget.flops(task)
    losses, accuracy = [], []
    for seed in range(seeds):
        file = cache / f"{content_key(task, flops, seed)}.json"
        if not file.exists():
            results = train_masks(task, masks, flops, seed=derive(seed, "truth"))
            write_whole(file, {"losses": results[0].tolist(), "accuracy": results[1].tolist()})
        record = json.loads(file.read_text())
        losses.append(record["losses"])
        accuracy.append(record["accuracy"])
    return Truth(masks, np.array(losses).T, np.array(accuracy).T, flops)


def worth(
    task: Task, selection: Selection, flops: float, seeds: Sequence[int], cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Test loss and accuracy of models trained on a Selection; read from `cache` where they were computed before.

    Args:
        seeds: of the truth; one model is trained with each.

    Returns:
        calibrated test loss (seeds,), test accuracy (seeds,).
    """
    digest = hashlib.sha256(json.dumps([selection.target_fraction, selection.weighted]).encode())
    digest.update(selection.selected.tobytes())
    if selection.weighted:
        digest.update(selection.probability.tobytes())
    key_fields: list[Any] = [digest.hexdigest(), list(seeds)]
    if selection.target_fraction > 0:
        key_fields.append(task.target.content_hash)
    file = cache / f"{content_key(task, flops, key_fields)}.json"
    if not file.exists():
        runs: list[tuple[Stream, int]] = []
        for seed in (derive(s, "truth") for s in seeds):
            order = derive(seed, "order")
            uses_pool = selection.target_fraction < 1
            runs.append(
                (selection.stream(task.pool, order) if uses_pool else ShuffledStream(np.arange(1), order), seed)
            )
        results = train_streams(task, runs, flops, selection.target_fraction)
        write_whole(file, {"losses": results[0].tolist(), "accuracy": results[1].tolist()})
    record = json.loads(file.read_text())
    return np.array(record["losses"]), np.array(record["accuracy"])


def content_key(task: Task, flops: float, extra_fields: Any) -> str:
    """Hash of the contents of pool and test set, recipe, network, budget and `extra_fields`, for a file's name.

    Args:
        extra_fields: all else that the contents of the file depend on, as JSON values.
    """
    settings = [
        TRUTH_VERSION,
        task.pool.content_hash,
        task.test.content_hash,
        task.recipe.result_fields(),
        flops,
        extra_fields,
    ]
    network = str(task.model(0))
    return hashlib.sha256(json.dumps([*settings, network], sort_keys=True).encode()).hexdigest()[:24]


def write_whole(file: Path, record: Any) -> None:
    """Write JSON to a file, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole_file(file, json.dumps(record))
