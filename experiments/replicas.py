"""How much faster K replicas of a dense network train as one batched model than one after another.

    python -m experiments.replicas [--out experiments/results/replicas.md]

Both ways take the same steps; all times are of one run on one machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from cads.budget import Budget, Ledger
from cads.draws import Draws, Epochs
from cads.seeds import derive
from cads.tasks.vision import VisionConfig, VisionTask
from cads.trainer import TrainConfig, Trainer

PASSES = Budget(8, "epochs")
REPEATS = 3
HEADER = ["hidden", "K", "looped, s", "batched, s", "ratio", "batched, FLOP/s", "largest difference of losses"]


def seconds(task: VisionTask, replicas: int, way: str) -> tuple[float, float, np.ndarray]:
    """The best time of `REPEATS` for one way of training; its FLOPs, and the losses of all steps."""
    task.recipe.replicas = "batched" if way == "batched" else "loop"
    best, losses, ledger = float("inf"), np.empty(0), Ledger()
    for _ in range(REPEATS):
        ledger = Ledger()
        streams = [Epochs(np.arange(len(task.pool)), derive(0, k)) for k in range(replicas)]
        draws = Draws(task.pool, streams, task.recipe.batch_size)
        models = [task.model(k) for k in range(replicas)]
        started = time.perf_counter()
        fit = Trainer(task, ledger).fit_replicas(
            models, draws, PASSES.flops(task), seed=0, phase="train", stage="replicas"
        )
        best, losses = min(best, time.perf_counter() - started), fit.losses
    return best, ledger.total().flops, losses


def main(argv: list[str] | None = None) -> int:
    """Measure and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table here")
    given = parser.parse_args(argv)
    rows = []
    for hidden in (64, 256):
        task = VisionConfig(hidden=hidden).build(TrainConfig())
        for replicas in (4, 16):
            looped, _, one = seconds(task, replicas, "loop")
            batched, flops, other = seconds(task, replicas, "batched")
            difference = float(np.abs(one - other).max())
            rows.append(
                [
                    str(hidden),
                    str(replicas),
                    f"{looped:.2f}",
                    f"{batched:.2f}",
                    f"{looped / batched:.1f}",
                    f"{flops / batched:.2g}",
                    f"{difference:.1g}",
                ]
            )
            print(" ".join(rows[-1]))
    lines = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *rows]]
    if given.out:
        command = f"    python -m experiments.replicas --out {given.out}"
        about = f"Digits, an MLP, batches of 32, {PASSES}, float32, {torch.get_num_threads()} threads."
        given.out.write_text(
            "# Replicas: batched against one by one\n\n" + f"{command}\n\n{about}\n\n" + "\n".join(lines)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
