"""CPU time of a step of `cads` beside that of plain training, in one run.

    python -m experiments.step_time --out experiments/results/step_time.md

Plain training, joint with 30 % of the target in each batch, and `cads` alternate, `ROUNDS` times each. `cads` goes
without its first phase here, so that all its steps draw, weigh and learn. A step's time is what a run of twice the
length takes longer, over its further steps.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.errors import CadsError
from cads.runtime.atomic_files import whole_file
from cads.task import Task
from cads.training import final
from experiments.online import COMPARE_VISION, Method, world_named

ROUNDS = 7
"""Measurements of each method; the first is not counted."""
CASES: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("noise", {"hidden": 64}, 7.0),
    ("noise", {"hidden": 2048}, 7.0),
    (COMPARE_VISION, {}, 3.0),
    (COMPARE_VISION, {"channels": 64}, 1.0),
)
"""World, changes of its network, and passes over the pool."""
PLAIN = Method("plain", "joint", {"target_fraction": 0.3})
ONLINE = Method("cads", "cads", changed={"first_passes": 0.0})


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step in each round, shape (rounds,) each."""

    name: str
    batch_size: int
    plain: np.ndarray
    online: np.ndarray

    def row(self) -> str:
        """Medians, and the median and range of the ratio of a round."""
        ratio = self.online / self.plain
        medians = f"{np.median(self.plain):.2f} | {np.median(self.online):.2f}"
        return (
            f"| {self.name} | {self.batch_size} | {medians} | {np.median(ratio):.3f} | "
            f"{ratio.min():.3f} to {ratio.max():.3f} |"
        )


def measure(world_name: str, changes: dict[str, Any], passes: float) -> Times:
    """Both methods in turn on one world."""
    world = world_named(world_name)
    images = replace(world.task, **changes)
    task = replace(world, task=images).build()
    seconds = np.array([[step_seconds(task, method, passes) for method in (PLAIN, ONLINE)] for _ in range(ROUNDS)])
    plain, online = 1000 * seconds[1:].T
    size = {"mlp": f" of {images.hidden}", "cnn": f" of {images.channels} channels"}.get(images.model, "")
    return Times(f"{world_name}, {images.model}{size}", world.train.batch_size, plain, online)


def step_seconds(task: Task, method: Method, passes: float) -> float:
    """Mean CPU seconds of a step in the second half of `passes`: of that run less those of one of half the length."""
    seconds, steps = zip(*(run_seconds(task, method, part * passes) for part in (1.0, 0.5)), strict=True)
    return (seconds[0] - seconds[1]) / (steps[0] - steps[1])


def run_seconds(task: Task, method: Method, passes: float) -> tuple[float, float]:
    """CPU seconds of a run, and its steps."""
    budget, started = Budget.parse(f"{passes} epochs"), time.process_time()
    selection = method.build().select(task, budget, seed=0, ledger=Ledger())
    usages = final.train(task, selection, budget, seed=0).ledger.total(TRAIN).usages
    return time.process_time() - started, usages / task.recipe.batch_size


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        times = [measure(*case) for case in CASES]
    except CadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "experiments.step_time", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        "# CPU time of a step of `cads` beside that of plain training",
        f"    {command}",
        f"One process, one thread, {ROUNDS - 1} rounds of both in turn; the ratio is that of a round.",
        "| world and model | batch | plain, ms | `cads`, ms | ratio, median | range |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(t.row() for t in times),
    ]
    text = "\n\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        whole_file(options.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
