"""Runs that take steps in turn, so that each can learn from the steps of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run
from cads.runtime.lockstep import StepReporter
from cads.training.loop import TrainingLoop, TrainingRun
from cads.training.result import TrainResult


def fit_in_turn(trainer: TrainingLoop, runs: Sequence[TrainingRun], n_steps: int) -> list[TrainResult]:
    """Let each of `runs` take a step, and then each another, until one of them cannot pay for its next step.

    A journal records them as one operation, which resumes after the last round of steps. What their riders share is
    part of the state of the first one's rider: it is restored before the first of them draws a batch.

    Args:
        runs: not yet begun; each a single model. n_steps: the most steps of each.

    Raises:
        NonFiniteError: if one of them met a loss or gradient that is not finite. Others: as `Trainer.fit`.
    """

    def compute(progress: StepReporter) -> State:
        train: Callable[[], State] = partial(_take_turns, trainer, runs, n_steps, progress)
        for run in runs:
            train = trainer.sharding(run, train)
        try:
            return train()
        finally:
            for run in runs:
                run.train_state.charge(trainer.ledger, run.phase, run.stage)

    key = [n_steps, *(run.journal_key for run in runs)]
    states = _apart(replay_or_run("training in turn", key, trainer.ledger, compute), len(runs))
    return [trainer.finish(run, state) for run, state in zip(runs, states, strict=True)]


def _take_turns(trainer: TrainingLoop, runs: Sequence[TrainingRun], n_steps: int, progress: StepReporter) -> State:
    """All rounds of steps that are left."""
    restored: list[State | None] = [None] * len(runs)
    done = 0
    if progress.restored is not None:
        states = _apart(progress.restored, len(runs))
        restored, done = [*states], len(states[0].tensors["losses"])
        if done >= n_steps:
            for run, state in zip(runs, states, strict=True):
                run.train_state.restore(state, None)
            return _together([run.train_state.state(None) for run in runs])
    ends: dict[int, State] = {}
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def present() -> State:
        return _together(
            [run.train_state.state(optimizers[k], everywhere=False) for k, run in enumerate(runs)],
        )

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        walks = [stack.enter_context(closing(trainer.walk(*pair))) for pair in zip(runs, restored, strict=True)]
        while not ends and done < n_steps:
            for k, walk in enumerate(walks):
                try:
                    optimizers[k] = next(walk)
                except StopIteration as end:
                    ends[k] = end.value
                    break
            else:
                done += 1
                progress.step(present)
    return _together([ends.get(k) or run.train_state.state(None) for k, run in enumerate(runs)])


def _together(states: Sequence[State]) -> State:
    """Several states as one, which `_apart` takes apart."""
    values = {str(k): state.values for k, state in enumerate(states)}
    return State(values, {f"{k}/{name}": x for k, state in enumerate(states) for name, x in state.tensors.items()})


def _apart(state: State, count: int) -> list[State]:
    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): x for name, x in state.tensors.items() if name.startswith(prefix)}

    return [State(state.values[str(k)], part(f"{k}/")) for k in range(count)]
