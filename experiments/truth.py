"""The truth of small worlds: every subset of sources trained for C, several seeds, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cads.budget import EVALUATE, Budget, Ledger
from cads.draws import Draws, Epochs
from cads.estimator import enumerate_masks
from cads.seeds import derive
from cads.task import Task
from cads.trainer import Trainer

TRUTH_VERSION = 1
REPLICAS = 16
"""Models that are trained at once: more does not speed a small dense network up on a CPU."""


@dataclass
class Truth:
    """What every subset of the sources comes to.

    Attributes:
        masks: bool, shape (M, S).
        losses: calibrated test loss, nats, shape (M, seeds). accuracy: on the test set, shape (M, seeds).
        flops: of one training.
    """

    masks: np.ndarray
    losses: np.ndarray
    accuracy: np.ndarray
    flops: float

    def regret(self, mask: np.ndarray) -> tuple[float, float]:
        """(regret in loss, regret in accuracy) of a subset, the best being chosen on half of the seeds.

        The best of many noisy means flatters itself: the best subset is the one with the least loss on the even
        seeds, and what it is worth is read off the odd ones, as for `mask`.
        """
        odd = slice(1, None, 2)
        here = int(np.flatnonzero((self.masks == mask).all(axis=1))[0])
        best_loss = int(np.argmin(self.losses[:, ::2].mean(axis=1)))
        best_accuracy = int(np.argmax(self.accuracy[:, ::2].mean(axis=1)))
        return (
            float(self.losses[here, odd].mean() - self.losses[best_loss, odd].mean()),
            float(self.accuracy[best_accuracy, odd].mean() - self.accuracy[here, odd].mean()),
        )


def train_masks(task: Task, masks: Iterable[np.ndarray], flops: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train each subset for `flops`, all from the same weights and in the same order.

    Returns:
        calibrated test loss (M,), test accuracy (M,).
    """
    masks = list(masks)
    losses, accuracy = [], []
    trainer = Trainer(task, Ledger())
    for start in range(0, len(masks), REPLICAS):
        chunk = masks[start : start + REPLICAS]
        streams = [Epochs(task.pool.in_sources(mask), derive(seed, "order")) for mask in chunk]
        draws = Draws(task.pool, streams, task.recipe.batch_size)
        models = [task.model(derive(seed, "model")) for _ in chunk]
        fit = trainer.fit_replicas(models, draws, flops, seed=seed, phase=EVALUATE, stage="truth")
        for model in fit.models:
            metrics = task.metrics(model, task.test)
            losses.append(metrics["calibrated_loss"])
            accuracy.append(metrics["accuracy"])
    return np.array(losses), np.array(accuracy)


def truth(task: Task, budget: Budget, seeds: int, cache: Path) -> Truth:
    """The truth for all subsets of at most 6 sources; read from `cache` where it was found before."""
    masks = enumerate_masks(len(task.pool.source_names))[1:]
    flops = budget.flops(task)
    losses, accuracy = [], []
    for seed in range(seeds):
        settings = [TRUTH_VERSION, task.pool.content_hash, task.test.content_hash, asdict(task.recipe), flops, seed]
        network = str(task.model(0))
        key = hashlib.sha256(json.dumps([*settings, network], sort_keys=True).encode()).hexdigest()[:24]
        file = cache / f"{key}.json"
        if not file.exists():
            found = train_masks(task, masks, flops, seed=derive(seed, "truth"))
            cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"losses": found[0].tolist(), "accuracy": found[1].tolist()}))
            os.replace(partial, file)
        record = json.loads(file.read_text())
        losses.append(record["losses"])
        accuracy.append(record["accuracy"])
    return Truth(masks, np.array(losses).T, np.array(accuracy).T, flops)
