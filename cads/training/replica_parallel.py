"""Replicas spread over processes: each trains on one process alone, and all end with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cads.data.training_batches import BatchStream
from cads.errors import NonFiniteError
from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run_parallel
from cads.runtime.lockstep import Operation, OperationStatus, StepReporter
from cads.runtime.processes import active_group
from cads.training.learners import StackedReplicas
from cads.training.result import TrainResult
from cads.training.run_state import OPTIMIZER, WEIGHTS, TrainState

if TYPE_CHECKING:
    from cads.training.loop import TrainingLoop, TrainingRun


def train_stacked_chunks(trainer: TrainingLoop, models: Sequence[nn.Module], run: TrainingRun) -> TrainResult:
    """Train a batched model of K replicas in contiguous chunks, one a process.

    Where examples differ in cost, a chunk alone would be padded otherwise, and cost something else than within the
    whole: then the first process trains all of it.

    Args:
        models: the replicas. run: of all of them, which has not begun.

    Raises: as `Trainer.fit_replicas`.
    """
    world, count = active_group(), len(models)
    chunks = np.array_split(np.arange(count), world.size if _cost_alike(run.draws) else 1)

    def part(progress: StepReporter, standing: list[OperationStatus]) -> State:
        rows = chunks[world.rank] if world.rank < len(chunks) else np.arange(0)
        if not len(rows):
            return State()
        learner = StackedReplicas(trainer.task, [models[k] for k in rows])
        train_state = TrainState(learner, len(rows), trainer.accelerator.scaler)
        begun = standing[0].state
        progress.restored = None if begun is None else _rows_of(begun, rows, count)
        draws = run.draws.for_streams(*(run.draws.streams[k] for k in rows))
        return trainer.steps(replace(run, train_state=train_state, draws=draws), progress)

    def join(parts: list[State]) -> list[State | None]:
        return [_joined([part for part in parts if part.tensors])]

    def settle(state: State) -> None:
        _settle(trainer, run, state)
        # The first process has shown its chunk.
        run.train_state.begun = True

    (state,) = replay_or_run_parallel([Operation("training", run.journal_key, settle)], trainer.ledger, part, join)
    return trainer.finish(run, state)


def train_one_per_rank(trainer: TrainingLoop, runs: Sequence[TrainingRun]) -> list[TrainResult | None]:
    """Train single replicas, as many at a time as there are processes.

    Returns:
        the fit of each; None where it met a loss that is not finite.
    """
    size = active_group().size
    waves = [runs[start : start + size] for start in range(0, len(runs), size)]
    return [fit for wave in waves for fit in _train_wave(trainer, wave)]


def _train_wave(trainer: TrainingLoop, runs: Sequence[TrainingRun]) -> list[TrainResult | None]:
    """Train at most one replica a process."""
    rank = active_group().rank

    def part(progress: StepReporter, standing: list[OperationStatus]) -> State:
        if rank >= len(runs) or standing[rank].finished:
            return State()
        begun = standing[rank].state
        if begun is not None and begun.values["failure"] is not None:
            # It has failed, and waited for the others: the step that failed is not paid for again.
            return begun
        progress.restored = begun
        return trainer.steps(runs[rank], progress)

    def join(parts: list[State]) -> list[State | None]:
        return [state if state.tensors else None for state in parts[: len(runs)]]

    def settle(run: TrainingRun, state: State) -> None:
        # They train at the same time.
        state.values["seconds"] /= len(runs)
        _settle(trainer, run, state)

    operations = [Operation("training", run.journal_key, partial(settle, run)) for run in runs]
    states = replay_or_run_parallel(operations, trainer.ledger, part, join)
    fits: list[TrainResult | None] = []
    for run, state in zip(runs, states, strict=True):
        try:
            fits.append(trainer.finish(run, state))
        except NonFiniteError:
            fits.append(None)
    return fits


def _settle(trainer: TrainingLoop, run: TrainingRun, state: State) -> None:
    """Take in what was trained, here or elsewhere, and charge for it."""
    run.train_state.learner.to(trainer.accelerator.device).train()
    run.train_state.restore(state, None)
    run.train_state.charge(trainer.ledger, run.phase, run.stage)


def _cost_alike(draws: BatchStream) -> bool:
    """Whether all examples have one shape, so that replicas take the same steps whichever train beside them."""
    return len(draws.pool.examples.shapes()[0]) == 1


def _joined(parts: Sequence[State]) -> State:
    """The state of all replicas from those of chunks, which have taken the same steps."""
    first = parts[0]
    tensors = {name: _along(name, x, [part.tensors[name] for part in parts]) for name, x in first.tensors.items()}
    values = dict(first.values)
    values["counts"] = np.sum([part.values["counts"] for part in parts], axis=0).tolist()
    values["diverged"] = [there for part in parts for there in part.values["diverged"]]
    values["seconds"] = max(part.values["seconds"] for part in parts)
    return State(values, tensors)


def _along(name: str, x: Tensor, parts: list[Tensor]) -> Tensor:
    """One tensor of a course from those of chunks; what has no axis for replicas is alike in all."""
    axis = _axis(name, x)
    return x if axis is None else torch.cat(parts, dim=axis)


def _rows_of(state: State, rows: np.ndarray, count: int) -> State:
    """The state of some of `count` replicas, in a row, which take equal parts in all counts."""
    index = torch.from_numpy(rows)
    tensors = {}
    for name, x in state.tensors.items():
        axis = _axis(name, x)
        tensors[name] = x if axis is None else x.index_select(axis, index)
    values = dict(state.values)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    # Shares of all chunks add up to the whole.
    values["counts"] = [n * stop // count - n * start // count for n in values["counts"]]
    values["diverged"] = [values["diverged"][k] for k in rows]
    return State(values, tensors)


def _axis(name: str, x: Tensor) -> int | None:
    """Where the replicas stand in a tensor of the course of a batched model; None if nowhere."""
    if name == "losses":
        return 1
    return 0 if x.dim() and name.startswith((WEIGHTS, OPTIMIZER)) else None
