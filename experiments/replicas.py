"""Speed-up of training K replicas of a dense network as one batched model instead of one after another.

    python -m experiments.replicas [--world WORLD.yaml] [--out experiments/results/replicas.md]

Both modes take the same training steps. All times are of one run on one machine; each is the best of several.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.seeding import derive
from cads.tasks.vision.task import VisionTask
from cads.training.trainer import Trainer
from experiments.truth import REPLICAS
from experiments.worlds import read_world

PASSES = Budget(1, "epochs")
REPEATS = 3
HIDDEN = (64, 256)
"""Hidden units: those of the worlds, and those of a network whose time goes mostly into matrix products."""
COUNTS = (4, REPLICAS, 31)
"""Numbers of replicas K."""
PROFILED = 12
"""Operations that the profile lists."""
HEADER = (
    "hidden",
    "K",
    "looped, s",
    "batched, s",
    "ratio",
    "batched, FLOP/s",
    "of a product's",
    "largest difference of losses",
)


def train(task: VisionTask, replicas: int, mode: str) -> tuple[float, float, np.ndarray]:
    """Train once in the mode `loop` or `batched`.

    Returns:
        seconds, FLOPs, and the losses of all steps, shape (steps, K).
    """
    task.recipe.replicas = "batched" if mode == "batched" else "loop"
    ledger = Ledger()
    streams = [ShuffledStream(np.arange(len(task.pool)), derive(0, k)) for k in range(replicas)]
    draws = BatchStream(task.pool, streams, task.recipe.batch_size)
    models = [task.model(k) for k in range(replicas)]
    started = time.perf_counter()
    fit = Trainer(task, ledger).fit_replicas(models, draws, PASSES.flops(task), seed=0, phase="train", stage="replicas")
    return time.perf_counter() - started, ledger.total().flops, fit.losses


def compare(task: VisionTask, hidden: int, replicas: int, limit: float) -> list[str]:
    """A row of the table; the two modes take turns, so that other jobs on the machine disturb both alike.

    Args:
        hidden: hidden units of the network. limit: FLOP/s of a large matrix product.
    """
    times: dict[str, list[float]] = {"loop": [], "batched": []}
    losses, flops = {}, 0.0
    for _ in range(REPEATS):
        for mode, mode_times in times.items():
            seconds, flops, losses[mode] = train(task, replicas, mode)
            mode_times.append(seconds)
    looped, batched = min(times["loop"]), min(times["batched"])
    rate = flops / batched
    return [
        str(hidden),
        str(replicas),
        f"{looped:.2f}",
        f"{batched:.2f}",
        f"{looped / batched:.1f}",
        f"{rate:.2g}",
        f"{rate / limit:.1%}",
        f"{np.abs(losses['loop'] - losses['batched']).max():.1g}",
    ]


def operations(task: VisionTask) -> list[list[str]]:
    """The operations that a batched training spends most time on: name, share of the CPU time, calls per step."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        _, _, losses = train(task, REPLICAS, "batched")
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [
        [f"`{e.key.split('#')[0]}`", f"{e.self_cpu_time_total / total:.1%}", f"{e.count / len(losses):.1f}"]
        for e in events[:PROFILED]
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("experiments/configs/worlds/noise.yaml"))
    parser.add_argument("--out", type=Path, help="write the tables here")
    args = parser.parse_args(argv)
    world = read_world(args.world)
    limit = matmul_flops_per_second("cpu", world.train.precision)
    rows, profiled = [], []
    for hidden in HIDDEN:
        world.task.hidden = hidden
        task = world.build()
        train(task, 2, "batched")
        for replicas in COUNTS:
            rows.append(compare(task, hidden, replicas, limit))
            print(" ".join(rows[-1]), flush=True)
        if hidden == HIDDEN[0]:
            profiled = operations(task)
    if args.out:
        command = f"python -m experiments.replicas {shlex.join(sys.argv[1:] if argv is None else argv)}"
        setup = (
            f"World `{world.name}`: an MLP on {len(task.pool)} images, batches of {task.recipe.batch_size}, {PASSES}, "
            f"float32, {torch.get_num_threads()} threads; a large matrix product runs at {limit:.2g} FLOP/s. The best "
            f"of {REPEATS} times; the two modes take turns."
        )
        title = f"Where the time goes at K = {REPLICAS}, {HIDDEN[0]} hidden units:"
        args.out.write_text(
            f"# Replicas: batched against one by one\n\n    {command}\n\n{setup}\n\n{_table(HEADER, rows)}\n{title}\n\n"
            + _table(("operation", "share of CPU time", "calls a step"), profiled)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
