"""The cost of counting FLOPs: the share of a training step's time that is spent on it.

    python -m experiments.flops_overhead --out experiments/results/flops_overhead.md

The calls of the counter that a training step makes are timed within a run. Each shape is counted once, before that.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cads.accounting.costs import Costs
from cads.accounting.ledger import TRAIN, Ledger
from cads.accounting.measured import attention_self_test
from cads.data.batch import Batch
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import CadsError
from cads.recipe import TrainConfig
from cads.task import Task
from cads.tasks.vision.config import VisionConfig
from cads.training.trainer import Trainer

ALLOWED = 0.01
"""Share of a step's time that counting may take."""
WARM_UP = 50
"""Training steps before those that are timed."""


class TimedCosts(Costs):
    """Costs that add up the time spent on counting while a model trains.

    Attributes:
        seconds: that each call of `usage` took.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.seconds: list[float] = []

    def usage(self, batch: Batch) -> float:
        """`Costs.usage`, timed; the time of reading the clock is subtracted."""
        before, begin = time.perf_counter(), time.perf_counter()
        flops = super().usage(batch)
        self.seconds.append(time.perf_counter() - begin - (begin - before))
        return flops


@dataclass
class Row:
    """One network: seconds of a step, of counting in it, and of counting its shape once."""

    name: str
    batch_size: int
    step: float
    counting: float
    once: float

    @property
    def share(self) -> float:
        """Share of a step's time that counting takes."""
        return self.counting / self.step


def measure(name: str, batch_size: int, steps: int, config: VisionConfig) -> Row:
    """Train on the images of `config`, and time the steps and the counting."""
    task = config.build(TrainConfig(batch_size=batch_size))
    costs = TimedCosts(task)
    task.costs = costs
    begin = time.perf_counter()
    step = costs.per_usage(task.pool, batch_size) * batch_size
    once = time.perf_counter() - begin
    trainer, stream = Trainer(task, Ledger()), ShuffledStream(np.arange(len(task.pool)), 0)
    draws, model = BatchStream(task.pool, [stream], batch_size), task.model(0)
    trainer.fit(model, draws, WARM_UP * step, seed=0, phase=TRAIN, stage="warm-up")
    costs.seconds.clear()
    fit = trainer.fit(model, draws, steps * step, seed=0, phase=TRAIN, stage="timed")
    # The median: other jobs on the machine now and then interrupt a call of a microsecond for milliseconds.
    return Row(name, batch_size, fit.seconds / len(fit.losses), float(np.median(costs.seconds)), once)


def report(rows: list[Row], command: str) -> str:
    """The text of the results file."""
    worst = max(rows, key=lambda row: row.share)
    lines = [
        "# What counting FLOPs costs",
        "",
        f"    {command}",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads. Digits (8x8 images). Every step of the trainer "
        "looks up the FLOPs of its batch by shape; the time of that look-up (median) over the mean "
        "time of a step. Counting a shape for the first time happens once in a run.",
        "",
        f"The largest share is {worst.share:.2%} ({worst.name}, batch {worst.batch_size}); {ALLOWED:.0%} is allowed.",
        "",
        "| network | batch | step, ms | counting in it, ms | share | counting a shape once, ms |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {r.name} | {r.batch_size} | {1e3 * r.step:.3f} | {1e3 * r.counting:.4f} | {r.share:.2%} "
            f"| {1e3 * r.once:.1f} |"
            for r in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Write the table; returns 1 if a share is above `ALLOWED`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=500, help="training steps that are timed")
    options = parser.parse_args(arguments)
    # The first use of the counter loads modules; their time is no part of counting a shape.
    attention_self_test()
    digits = partial(VisionConfig, dataset="digits")
    try:
        rows = [
            measure("MLP, 16 hidden units", 8, options.steps, digits(model="mlp", hidden=16)),
            measure("MLP, 128 hidden units", 64, options.steps, digits(model="mlp", hidden=128)),
            measure("CNN", 64, options.steps, digits(model="cnn")),
        ]
        command = shlex.join(["python", "-m", "experiments.flops_overhead", *(arguments or sys.argv[1:])])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(rows, command))
    except (CadsError, OSError) as error:
        show(f"error: {error}")
        return 1
    worst = max(row.share for row in rows)
    show(f"largest share {worst:.2%}: {options.out}")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
