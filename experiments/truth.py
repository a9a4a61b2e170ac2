"""The truth of small worlds: every subset of sources trained for C, several seeds, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, Ledger
from cads.data.streams import ShuffledStream, Stream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.estimators.enumeration import enumerate_masks
from cads.seeding import derive
from cads.selection import Selection
from cads.task import Task
from cads.training.trainer import Trainer

TRUTH_VERSION = 1
REPLICAS = 16
"""Models that are trained at once: more does not speed a small dense network up on a CPU."""
ENUMERATED = 6
"""Sources whose subsets are all trained."""
CHOSEN_ON, MEASURED_ON = slice(0, None, 2), slice(1, None, 2)
"""The seeds on which the best subset is chosen, and those on which it, and everything else, is measured."""


@dataclass
class Truth:
    """What the subsets of the sources come to.

    Attributes:
        masks: bool, shape (M, S).
        losses: calibrated test loss, nats, shape (M, seeds). accuracy: on the test set, shape (M, seeds).
            NaN where a subset was not trained with a seed.
        flops: of one training.
        exhaustive: whether all subsets are here, or only those that a search came across.
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
        """How much the best mean of the seeds to measure on flatters itself, in loss (nats) and in accuracy.

        It lies this far above the best subset as chosen on the other seeds: no regret is known more closely.
        """
        loss, accuracy = self.losses[:, MEASURED_ON].mean(axis=1), self.accuracy[:, MEASURED_ON].mean(axis=1)
        best_loss, best_accuracy = self.best
        return float(loss[best_loss] - np.nanmin(loss)), float(np.nanmax(accuracy) - accuracy[best_accuracy])

    def row(self, mask: np.ndarray) -> int | None:
        """Where a subset stands, or None if it was not trained with all seeds."""
        found = np.flatnonzero((self.masks == mask).all(axis=1))
        return int(found[0]) if len(found) and np.isfinite(self.losses[found[0]]).all() else None

    def regret(self, mask: np.ndarray) -> tuple[float, float]:
        """(regret in loss, regret in accuracy) of a subset; see `regret_of`."""
        here = self.row(mask)
        if here is None:
            raise ConfigError(f"the subset {np.asarray(mask).astype(int).tolist()} was not trained: measure it first")
        return self.regret_of(self.losses[here, MEASURED_ON], self.accuracy[here, MEASURED_ON])

    def regret_of(self, losses: np.ndarray, accuracy: np.ndarray) -> tuple[float, float]:
        """(regret in loss, regret in accuracy) of what came to these on the seeds to measure on.

        The best of many noisy means flatters itself: the best subset is the one with the least loss (the highest
        accuracy) on the even seeds, and what it is worth is read off the odd ones.
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
        runs: what to train on, and the seed of the initial weights.
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
    """Train each subset for `flops`, all from the same weights and in the same order.

    Returns:
        calibrated test loss (M,), test accuracy (M,).
    """
    return train_streams(
        task, [(ShuffledStream(task.pool.positions_in(m), derive(seed, "order")), seed) for m in masks], flops
    )


def truth(task: Task, budget: Budget, seeds: int, cache: Path) -> Truth:
    """The truth for all subsets of at most 6 sources; read from `cache` where it was found before."""
    masks = enumerate_masks(len(task.pool.source_names))[1:]
    flops = budget.flops(task)
    losses, accuracy = [], []
    for seed in range(seeds):
        file = cache / f"{content_key(task, flops, seed)}.json"
        if not file.exists():
            found = train_masks(task, masks, flops, seed=derive(seed, "truth"))
            write_whole(file, {"losses": found[0].tolist(), "accuracy": found[1].tolist()})
        record = json.loads(file.read_text())
        losses.append(record["losses"])
        accuracy.append(record["accuracy"])
    return Truth(masks, np.array(losses).T, np.array(accuracy).T, flops)


def worth(
    task: Task, selection: Selection, flops: float, seeds: Sequence[int], cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    """What a Selection comes to when trained with seeds of the truth; read from `cache` where it is known.

    Returns:
        calibrated test loss (seeds,), test accuracy (seeds,).
    """
    digest = hashlib.sha256(json.dumps([selection.target_fraction, selection.weighted]).encode())
    digest.update(selection.selected.tobytes())
    if selection.weighted:
        digest.update(selection.probability.tobytes())
    about: list[Any] = [digest.hexdigest(), list(seeds)]
    if selection.target_fraction > 0:
        about.append(task.target.content_hash)
    file = cache / f"{content_key(task, flops, about)}.json"
    if not file.exists():
        runs: list[tuple[Stream, int]] = []
        for seed in (derive(s, "truth") for s in seeds):
            order = derive(seed, "order")
            some = selection.target_fraction < 1
            runs.append((selection.stream(task.pool, order) if some else ShuffledStream(np.arange(1), order), seed))
        found = train_streams(task, runs, flops, selection.target_fraction)
        write_whole(file, {"losses": found[0].tolist(), "accuracy": found[1].tolist()})
    record = json.loads(file.read_text())
    return np.array(record["losses"]), np.array(record["accuracy"])


def content_key(task: Task, flops: float, about: Any) -> str:
    """Name of what depends on the contents of pool and test set, the recipe, the network, the budget and `about`."""
    settings = [
        TRUTH_VERSION,
        task.pool.content_hash,
        task.test.content_hash,
        task.recipe.result_fields(),
        flops,
        about,
    ]
    network = str(task.model(0))
    return hashlib.sha256(json.dumps([*settings, network], sort_keys=True).encode()).hexdigest()[:24]


def write_whole(file: Path, record: Any) -> None:
    """Write JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(record))
    os.replace(partial, file)
