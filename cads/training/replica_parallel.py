"""Replicas spread over processes: each trains on one process alone; all processes get all trained replicas."""

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

    If examples differ in shape, a chunk alone would be padded otherwise than within all K, and so differ in cost:
    then the first process trains all replicas.

    Args:
        models: the K replicas. run: of all K, not yet begun.

    Raises: as `Trainer.fit_replicas`.
    """
    world, count = active_group(), len(models)
    chunks = np.array_split(np.arange(count), world.size if _equal_costs(run.draws) else 1)

    def part(progress: StepReporter, statuses: list[OperationStatus]) -> State:
        rows = chunks[world.rank] if world.rank < len(chunks) else np.arange(0)
        if not len(rows):
            return State()
        learner = StackedReplicas(trainer.task, [models[k] for k in rows])
        train_state = TrainState(learner, len(rows), trainer.accelerator.scaler)
        stored = statuses[0].state
        progress.resume_from(None if stored is None else _rows_of(stored, rows, count))
        draws = run.draws.for_streams(*(run.draws.streams[k] for k in rows))
        return trainer.steps(replace(run, train_state=train_state, draws=draws), progress)

    def join(parts: list[State]) -> list[State | None]:
        return [_join_states([part for part in parts if part.tensors])]

    def commit(state: State) -> None:
        _commit(trainer, run, state)
        # The first process has already shown the progress of its chunk.
        run.train_state.mark_current()

    (state,) = replay_or_run_parallel([Operation("training", run.journal_key, commit)], trainer.ledger, part, join)
    return trainer.finish(run, state)


def train_one_per_rank(trainer: TrainingLoop, runs: Sequence[TrainingRun]) -> list[TrainResult | None]:
    """Train single replicas, as many at a time as there are processes.

    Returns:
        the result of each; None where it met a loss that is not finite.
    """
    size = active_group().size
    waves = [runs[start : start + size] for start in range(0, len(runs), size)]
    return [fit for wave in waves for fit in _train_wave(trainer, wave)]


def _train_wave(trainer: TrainingLoop, runs: Sequence[TrainingRun]) -> list[TrainResult | None]:
    """Train at most one replica a process."""
    rank = active_group().rank

    def part(progress: StepReporter, statuses: list[OperationStatus]) -> State:
        if rank >= len(runs) or statuses[rank].finished:
            return State()
        stored = statuses[rank].state
        if stored is not None and stored.values["failure"] is not None:
            # The run had failed and waited for the others: its failed step is not taken and charged again.
            return stored
        progress.resume_from(stored)
        return trainer.steps(runs[rank], progress)

    def join(parts: list[State]) -> list[State | None]:
        return [state if state.tensors else None for state in parts[: len(runs)]]

    def commit(run: TrainingRun, state: State) -> None:
        # The replicas train at the same time.
        state.values["seconds"] /= len(runs)
        _commit(trainer, run, state)

    operations = [Operation("training", run.journal_key, partial(commit, run)) for run in runs]
    states = replay_or_run_parallel(operations, trainer.ledger, part, join)
    fits: list[TrainResult | None] = []
    for run, state in zip(runs, states, strict=True):
        try:
            fits.append(trainer.finish(run, state))
        except NonFiniteError:
            fits.append(None)
    return fits


def _commit(trainer: TrainingLoop, run: TrainingRun, state: State) -> None:
    """Restore the state of a run, trained in this or another process, and charge the ledger for it."""
    run.train_state.learner.to(trainer.accelerator.device).train()
    run.train_state.restore(state, None)
    run.train_state.charge(trainer.ledger, run.phase, run.stage)


def _equal_costs(draws: BatchStream) -> bool:
    """Whether all examples have one shape, so that the steps of a replica do not depend on the others in its chunk."""
    return len(draws.pool.examples.shapes()[0]) == 1


def _join_states(parts: Sequence[State]) -> State:
    """The state of all replicas from the states of chunks, which have taken the same steps."""
    first = parts[0]
    tensors = {name: _join_tensor(name, x, [part.tensors[name] for part in parts]) for name, x in first.tensors.items()}
    values = dict(first.values)
    values["counts"] = np.sum([part.values["counts"] for part in parts], axis=0).tolist()
    values["diverged"] = [flag for part in parts for flag in part.values["diverged"]]
    values["seconds"] = max(part.values["seconds"] for part in parts)
    return State(values, tensors)


def _join_tensor(name: str, x: Tensor, parts: list[Tensor]) -> Tensor:
    """One tensor of all replicas from those of chunks; one without a replica axis is the same in all chunks."""
    axis = _axis(name, x)
    return x if axis is None else torch.cat(parts, dim=axis)


def _rows_of(state: State, rows: np.ndarray, count: int) -> State:
    """The state of the contiguous replicas `rows` out of `count`, with an equal share of the counts for each."""
    index = torch.from_numpy(rows)
    tensors = {}
    for name, x in state.tensors.items():
        axis = _axis(name, x)
        tensors[name] = x if axis is None else x.index_select(axis, index)
    values = dict(state.values)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    # Rounded so that the shares of all chunks sum to the count.
    values["counts"] = [n * stop // count - n * start // count for n in values["counts"]]
    values["diverged"] = [values["diverged"][k] for k in rows]
    return State(values, tensors)


def _axis(name: str, x: Tensor) -> int | None:
    """The axis of the replicas in a tensor of a batched model's state; None if it has none."""
    if name == "losses":
        return 1
    return 0 if x.dim() and name.startswith((WEIGHTS, OPTIMIZER)) else None
