"""The inner runs of the outer loop: training models on the pool or the target, and measuring them on the target."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.streams import Stream
from cads.data.training_batches import BatchStream
from cads.errors import NonFiniteError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run, replay_or_run_parallel
from cads.runtime.lockstep import Operation, OperationStatus, StepReporter
from cads.runtime.processes import active_group
from cads.scoring.pool_scores import score_pool
from cads.search.inner_costs import InnerLoopCosts
from cads.task import Objective, ObjectiveValue, Task
from cads.training.learners import SingleLearner
from cads.training.loop import TrainingRun
from cads.training.precision import autocast
from cads.training.result import TrainResult, stack_results
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer

BY_EXAMPLE = "by_example"
"""Name of the objective of each example in journals."""
MEASURED = "measured"
"""Name of what a trial has measured, beside the state of its training, in journals."""


@dataclass
class InnerRuns:
    """K inner runs.

    Attributes:
        objective: outer objective of each run on the target, shape (K,); NaN where the run diverged.
        losses: training losses of each step, nats, shape (steps, K).
        flops: compute of one run after each step, shape (steps,).
        final_train_loss: training loss over the last steps, nats, shape (K,).
        models: the trained models of the first runs; empty unless they are used further (`InnerLoop.run`).
        stderr: standard error of the difference between the objective and that of the first run, shape (K,), over the
            examples of the target, which all runs share; 0 where the objective is not a mean over them.
        reference: the objective of the first run; None where it diverged.
    """

    objective: np.ndarray
    losses: np.ndarray
    flops: np.ndarray
    final_train_loss: np.ndarray
    models: list[nn.Module]
    stderr: np.ndarray
    reference: ObjectiveValue | None = None

    def followed_by(self, more: InnerRuns) -> InnerRuns:
        """These runs and `more`, which took as many FLOPs each and whose `stderr` refers to the first of these.

        The result holds no models.
        """
        # Where numbers of steps differ, the last ones are kept, as in `cads.training.result.stack_results`.
        steps = min(len(self.losses), len(more.losses))
        flops = [runs.flops[-steps:] for runs in (self, more)]
        return InnerRuns(
            np.concatenate([self.objective, more.objective]),
            np.hstack([self.losses[-steps:], more.losses[-steps:]]),
            np.average(flops, axis=0, weights=[len(self.objective), len(more.objective)]),
            np.concatenate([self.final_train_loss, more.final_train_loss]),
            [],
            np.concatenate([self.stderr, more.stderr]),
            self.reference,
        )


class InnerLoop(InnerLoopCosts):
    """Trains from the task's initial weights and measures on the target. All costs are charged to "select".

    Args:
        task: whose model is trained.
        ledger: charged for training and for measuring.
        monitor: shows progress.
        outer: the objective, by name or callable; None for the task's own.
    """

    def __init__(self, task: Task, ledger: Ledger, monitor: Monitor, outer: str | Objective | None = None) -> None:
        super().__init__(task, ledger)
        self.monitor = monitor
        self._outer = outer
        self.trainer = Trainer(task, ledger, monitor)

    def run(
        self,
        streams: Sequence[Stream],
        flops: float,
        *,
        seed: int,
        stage: str,
        reference: ObjectiveValue | None = None,
        keep: int | None = None,
        horizon: float | None = None,
    ) -> InnerRuns:
        """Train one replica per stream for `flops` each, all from the same initial weights, and measure them.

        Equal seeds give equal initial weights and dropout, so that replicas differ only in their data. Replicas that
        train one by one are measured one by one too, and no more of them are in memory than there are processes.

        Args:
            reference: the objective from which `stderr` takes the difference; None for that of the first run.
            keep: number of the first models that the result holds. None: the model of a single run, and none of
                several, of which only the measurements are compared.
            horizon: FLOPs over which the learning rate is scheduled, if it shall not fall to its end with these runs.
        """
        count, segment = len(streams), RunSegment(horizon=horizon)
        keep = int(count == 1) if keep is None else keep
        self.n_trials += count
        draws = BatchStream(self.task.pool, streams, self.task.recipe.batch_size)
        models = [self.task.model(seed)]
        if self.trainer.batches(models[0], count):
            fit, measurements = self._run_batched(models, draws, flops, seed, stage, segment)
            fit = replace(fit, models=fit.models[:keep])
        else:
            fit, measurements = self._run_one_by_one(models, draws, flops, seed, stage, keep, segment)
        converged = [m for m in measurements if m is not None]
        objective, standard_errors = np.full(count, np.nan), np.zeros(count)
        for k, measurement in enumerate(measurements):
            if measurement is not None:
                objective[k] = measurement.value
                standard_errors[k] = paired_error(measurement, reference or converged[0])
        return InnerRuns(
            objective, fit.losses, fit.flops, fit.training_loss, fit.models, standard_errors, measurements[0]
        )

    def _run_batched(
        self, models: list[nn.Module], draws: BatchStream, flops: float, seed: int, stage: str, segment: RunSegment
    ) -> tuple[TrainResult, list[ObjectiveValue | None]]:
        """Train all replicas, of which `models` has the first, as one model; see `_run_one_by_one`."""
        models += [self.task.model(seed) for _ in draws.streams[1:]]
        fit = self.trainer.fit_replicas(models, draws, flops, seed=seed, phase=SELECT, stage=stage, segment=segment)
        return fit, self._measure(fit.models, fit.diverged, stage)

    def _run_one_by_one(
        self,
        models: list[nn.Module],
        draws: BatchStream,
        flops: float,
        seed: int,
        stage: str,
        keep: int,
        segment: RunSegment,
    ) -> tuple[TrainResult, list[ObjectiveValue | None]]:
        """Train and measure as many replicas at a time as there are processes; only these are in memory.

        Args:
            models: the first model; empty afterwards.

        Returns:
            the result, which holds the first `keep` models; and the measurement of each, None where it diverged.
        """
        flops = min(flops, self.ledger.left / draws.replicas)
        fits: list[TrainResult | None] = []
        kept_models: list[nn.Module] = []
        measurements: list[ObjectiveValue | None] = []
        # Processes that divide each model train one at a time.
        sharded = self.task.recipe.sharding == "full"
        size = 1 if sharded else active_group().size
        for start in range(0, draws.replicas, size):
            wave = draws.for_streams(*draws.streams[start : start + size])
            models += [self.task.model(seed) for _ in range(wave.replicas - len(models))]
            run_wave = self._run_sharded if sharded else self._run_wave
            new, measured = run_wave(models, wave, flops, seed, stage, segment)
            fits += [None if fit is None else replace(fit, models=[]) for fit in new]
            measurements += measured
            kept_models += models[: max(0, keep - start)]
            # The next models are made only when these are gone.
            models.clear()
            del new
        return stack_results(kept_models, fits), measurements

    def _run_sharded(
        self,
        models: Sequence[nn.Module],
        draws: BatchStream,
        flops: float,
        seed: int,
        stage: str,
        segment: RunSegment,
    ) -> tuple[list[TrainResult | None], list[ObjectiveValue | None]]:
        """Train and measure one replica, of which each process holds a part."""
        fits = self.trainer.fit_one_by_one(models, draws, flops, seed=seed, phase=SELECT, stage=stage, segment=segment)
        return fits, self._measure(models, np.array([fit is None for fit in fits]), stage)

    def _run_wave(
        self,
        models: Sequence[nn.Module],
        draws: BatchStream,
        flops: float,
        seed: int,
        stage: str,
        segment: RunSegment,
    ) -> tuple[list[TrainResult | None], list[ObjectiveValue | None]]:
        """Train and measure at most as many replicas as there are processes."""
        runs = [
            self.trainer.prepare(
                SingleLearner(self.task, model), draws.for_streams(stream), flops, seed, SELECT, stage, segment
            )
            for model, stream in zip(models, draws.streams, strict=True)
        ]
        fits: list[TrainResult | None] = []
        measurements: list[ObjectiveValue | None] = []
        for run, state in zip(runs, self._trials(runs, f"{stage}, measuring"), strict=True):
            training, measured = _split(state)
            measurements.append(None if measured is None else _measured(measured))
            try:
                fits.append(self.trainer.finish(run, training))
            except NonFiniteError:
                fits.append(None)
        return fits, measurements

    def _trials(self, runs: Sequence[TrainingRun], stage: str) -> list[State]:
        """Train and measure single replicas, at most one a process.

        A trial is one operation: were there two, their order in journals would depend on the number of processes.

        Args:
            stage: of measuring.
        """
        name, rank = "training and measuring", active_group().rank

        def commit(run: TrainingRun, state: State) -> None:
            training, measured = _split(state)
            # The replicas train, and are measured, at the same time.
            training.values["seconds"] /= len(runs)
            run.train_state.learner.to(self.trainer.accelerator.device).train()
            run.train_state.restore(training, None)
            run.train_state.charge(self.ledger, run.phase, run.stage)
            if measured is not None:
                seconds = measured.number("seconds") / len(runs)
                self.ledger.charge(SELECT, stage, self.measuring_flops, seconds=seconds)

        if active_group().size == 1:
            (run,) = runs

            def compute(progress: StepReporter) -> State:
                state = self._trial(run, progress)
                commit(run, state)
                return state

            return [replay_or_run(name, [run.journal_key, stage], self.ledger, compute)]

        def part(progress: StepReporter, statuses: list[OperationStatus]) -> State:
            if rank >= len(runs) or statuses[rank].finished:
                return State()
            progress.resume_from(statuses[rank].state)
            return self._trial(runs[rank], progress)

        def join(parts: list[State]) -> list[State | None]:
            return [state if state.tensors else None for state in parts[: len(runs)]]

        operations = [Operation(name, [run.journal_key, stage], partial(commit, run)) for run in runs]
        return replay_or_run_parallel(operations, self.ledger, part, join)

    def _trial(self, run: TrainingRun, progress: StepReporter) -> State:
        """Train one replica and measure it unless it diverged; see `_split`."""
        stored = progress.restored
        if stored is not None and (stored.values["failure"] is not None or MEASURED in stored.values):
            # It had ended and waited for the others: nothing is done or charged again.
            return stored
        state = self.trainer.steps(run, progress)
        if state.values["failure"] is not None:
            return state
        started = time.perf_counter()
        measured = self._objective(run.train_state.learner.trained()[0])
        values = {**measured.values, "seconds": time.perf_counter() - started}
        tensors = {f"{MEASURED}/{name}": x for name, x in measured.tensors.items()}
        return State({**state.values, MEASURED: values}, {**state.tensors, **tensors})

    def _measure(self, models: Sequence[nn.Module], diverged: np.ndarray, stage: str) -> list[ObjectiveValue | None]:
        """The outer objective of each model; None where it diverged (bool, shape (K,))."""
        converged = np.flatnonzero(~diverged).tolist()
        values = self.evaluate_all([models[k] for k in converged], f"{stage}, measuring")
        by_model = dict(zip(converged, values, strict=True))
        return [by_model.get(k) for k in range(len(models))]

    def evaluate_all(self, models: Sequence[nn.Module], stage: str) -> list[ObjectiveValue]:
        """The outer objective of each model on the target. Several processes measure one model each at a time."""
        size = active_group().size
        if size == 1:
            return [self.evaluate(model, stage) for model in models]
        waves = [models[start : start + size] for start in range(0, len(models), size)]
        return [value for wave in waves for value in self._evaluate_on_ranks(wave, stage)]

    def evaluate(self, model: nn.Module, stage: str) -> ObjectiveValue:
        """The outer objective of one model on the target."""

        def compute(_: StepReporter) -> State:
            self.ledger.charge(SELECT, stage, self.measuring_flops)
            with self.ledger.timed(SELECT, stage):
                return self._objective(model)

        return _measured(replay_or_run("measuring", [stage], self.ledger, compute))

    def _evaluate_on_ranks(self, models: Sequence[nn.Module], stage: str) -> list[ObjectiveValue]:
        """Measure at most one model per process."""
        rank = active_group().rank

        def measure_on_rank(_: StepReporter, statuses: list[OperationStatus]) -> State:
            if rank >= len(models) or statuses[rank].finished:
                return State()
            started = time.perf_counter()
            objective = self._objective(models[rank])
            return State({**objective.values, "seconds": time.perf_counter() - started}, objective.tensors)

        def join(states_by_rank: list[State]) -> list[State | None]:
            return [state if state.values else None for state in states_by_rank[: len(models)]]

        def commit(state: State) -> None:
            self.ledger.charge(SELECT, stage, self.measuring_flops)
            # The models are measured at the same time, so that each takes its part of the seconds.
            self.ledger.charge(SELECT, stage, 0.0, seconds=state.values.pop("seconds") / len(models))

        operations = [Operation("measuring", [stage], commit) for _ in models]
        states = replay_or_run_parallel(operations, self.ledger, measure_on_rank, join)
        return [_measured(state) for state in states]

    def _objective(self, model: nn.Module) -> State:
        device = self.trainer.accelerator.device
        with autocast(self.task.recipe.precision, device):
            objective = self.task.objective(model.to(device), self._outer, self.task.target)
        by_example = {} if objective.by_example is None else {BY_EXAMPLE: torch.from_numpy(objective.by_example)}
        return State({"objective": objective.value}, by_example)

    def losses(self, model: nn.Module, positions: np.ndarray, *, stage: str) -> np.ndarray:
        """The loss of each pool example at `positions` (shape (n,)), nats, shape (n,); one forward pass."""
        device = self.trainer.accelerator.device
        model.to(device).eval()
        return score_pool(
            self.task.pool,
            partial(self.task.losses, model),
            self.task.costs.forward,
            ledger=self.ledger,
            stage=stage,
            device=device,
            positions=positions,
            precision=self.task.recipe.precision,
        )

    def fit_target(self, flops: float, *, seed: int, stage: str) -> nn.Module:
        """The target model, theta: trained from fresh weights on the target for `flops`."""
        task = self.task
        draws = BatchStream(task.pool, [], task.recipe.batch_size, target=task.target, target_fraction=1.0, seed=seed)
        fit = self.trainer.fit(task.model(seed), draws, flops, seed=seed, phase=SELECT, stage=stage)
        return fit.models[0]

    def fit_on(
        self,
        flops: float,
        *,
        horizon: float,
        before: TrainResult | None,
        seed: int,
        stage: str,
        stream: Stream,
        target_fraction: float,
    ) -> TrainResult:
        """Go on with a run for `flops` on other draws: its step, optimizer and learning rate stay as they were.

        Args:
            horizon: FLOPs of the whole run, over which the learning rate is scheduled.
            before: what the run has done so far; None to begin it.
            seed: of the run: of its weights, and of the order of the target. The same in all calls.
            stream: of the pool examples that fill each batch.
            target_fraction: the target's share of each batch.
        """
        draws = BatchStream(
            self.task.pool,
            [stream],
            self.task.recipe.batch_size,
            target=self.task.target,
            target_fraction=target_fraction,
            seed=seed,
        )
        model = self.task.model(seed) if before is None else before.models[0]
        spent, start = (0.0, None) if before is None else (float(before.flops[-1]), before.state)
        segment = RunSegment(start=start, horizon=horizon, keep=True)
        return self.trainer.fit(model, draws, spent + flops, seed=seed, phase=SELECT, stage=stage, segment=segment)


def _split(state: State) -> tuple[State, State | None]:
    """The states of training and of measuring in that of a trial; None for the latter if it was not measured."""
    prefix = f"{MEASURED}/"
    training = State(
        {name: value for name, value in state.values.items() if name != MEASURED},
        {name: x for name, x in state.tensors.items() if not name.startswith(prefix)},
    )
    if MEASURED not in state.values:
        return training, None
    tensors = {name.removeprefix(prefix): x for name, x in state.tensors.items() if name.startswith(prefix)}
    return training, State(state.values[MEASURED], tensors)


def _measured(state: State) -> ObjectiveValue:
    by_example = state.tensors.get(BY_EXAMPLE)
    return ObjectiveValue(state.number("objective"), None if by_example is None else by_example.numpy())


def paired_error(one: ObjectiveValue, other: ObjectiveValue) -> float:
    """Standard error of the difference of two objectives over the same examples; 0 if they are not means over them."""
    if one.by_example is None or other.by_example is None or len(one.by_example) < 2:
        return 0.0
    difference = one.by_example - other.by_example
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))
