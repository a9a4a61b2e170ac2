"""The inner loop: train a model, or K replicas of one, until the next step would exceed the budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cads.accounting.ledger import TRAIN, Ledger
from cads.accounting.stage_labels import stage_label, stage_tag
from cads.data.batch import Batch
from cads.data.loader import check_answers, fingerprint, load_steps
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, ConfigError, NonFiniteError
from cads.monitor import Advance, Monitor
from cads.recipe import TrainConfig
from cads.runtime.checkpoint import State
from cads.runtime.lockstep import StepReporter
from cads.runtime.processes import active_group, world_group
from cads.seeding import derive
from cads.task import Task
from cads.training.device_settings import SHORT_RUN, loading_workers, prepare_device
from cads.training.gradient import StepLosses, accumulate, mixes_examples
from cads.training.learners import Learner, SingleLearner
from cads.training.optimizers import build_optimizer, set_rate, unwrap
from cads.training.precision import check_types
from cads.training.result import TrainResult
from cads.training.rider import Rider, follow
from cads.training.run_state import EXAMPLE_LOSSES, FULL_RUN, VALIDATION, RunSegment, TrainState, read_already
from cads.training.unread import READ_TOGETHER, UnreadStep, UnreadSteps, reads_later
from cads.training.validation import Validation, show

log = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""Batches in a row that a run or its scaler skips before the run fails: then the fault is not in single batches."""
WHOLE = 0.999
"""Share of the horizon from which on a segment is the last: what remains is no step."""

Walk = Generator[torch.optim.Optimizer, None, State]
"""A training run that waits after each step; see `TrainingLoop.walk`."""


class TrainingLoop:
    """Steps of a training run: prepared, taken until the next one would exceed the budget, and finished.

    Args:
        task: whose model, losses, recipe and costs are used.
        ledger: charged for every step.
        monitor: shows progress and records curves.
    """

    def __init__(self, task: Task, ledger: Ledger, monitor: Monitor | None = None) -> None:
        self.task = task
        self.ledger = ledger
        self.monitor = monitor or Monitor()
        self.accelerator = _accelerator(task.recipe.precision)
        if self._shards:
            from cads.training.fsdp import check_backend

            check_backend(self.accelerator.device)

    def prepare(
        self,
        learner: Learner,
        draws: BatchStream,
        flops: float,
        seed: int,
        phase: str,
        stage: str,
        segment: RunSegment = FULL_RUN,
    ) -> TrainingRun:
        """A run that has not begun.

        Raises:
            BudgetError: if its budget is not finite.
            ConfigError: if there is nothing to train.
        """
        if not any(p.requires_grad for p in learner.parameters()):
            raise ConfigError(f"the model of {self.task.name} has no trainable parameter")
        self._check_types(learner)
        before = 0.0 if segment.start is None else segment.start.number("total")
        flops = min(flops, before + self.ledger.left / draws.replicas)
        if not math.isfinite(flops):
            raise BudgetError(f"{phase}/{stage_label(stage)}: a run needs a finite budget, not {flops} FLOPs")
        rider = draws if isinstance(draws, Rider) else None
        keeps_losses = segment.keep and rider is None
        train_state = TrainState(
            learner,
            draws.replicas,
            self.accelerator.scaler,
            example_losses=np.full(len(draws.pool), np.nan) if keeps_losses else None,
            rider=rider,
        )
        journal_key = [
            phase,
            stage,
            flops,
            seed,
            type(learner).__name__,
            self.task.recipe.result_fields(),
            draws.fingerprint() if isinstance(draws, Rider) else fingerprint(draws),
        ]
        key = [*journal_key, *segment.journal_key()]
        horizon = flops if segment.horizon is None else segment.horizon
        points = self.monitor.validation_points
        if points and self._shards:
            if phase == TRAIN:
                log.warning("sharding: full: no validation curve, since the model is whole nowhere while it trains")
            points = 0
        validation = Validation.of(self.task, phase, horizon, points)
        return TrainingRun(train_state, draws, flops, seed, phase, stage, key, segment, validation)

    def finish(self, run: TrainingRun, state: State) -> TrainResult:
        """The result of a run that ended in `state`, in this process or in another.

        Raises:
            NonFiniteError: if it met a loss or gradient that is NaN or infinite.
        """
        train_state, segment = run.train_state, run.segment
        if not train_state.is_current:
            train_state.learner.to(self.accelerator.device).train()
            train_state.restore(state, None)
            with self.monitor.progress(run.stage, run.flops, run.before) as advance:
                self._replay_progress(run, advance)
        if train_state.failure is not None:
            raise NonFiniteError(**train_state.failure)
        losses, spent = np.stack(train_state.losses), np.array(train_state.spent)
        end = state.detached() if segment.keep else None
        if end is not None:
            end.tensors.pop(EXAMPLE_LOSSES, None)
            end.values.pop(VALIDATION, None)
            # The ledger has the seconds; without them the same seed gives the same bytes.
            end.values["seconds"] = 0.0
        outcome = (train_state.diverged, train_state.seconds, train_state.skipped)
        return TrainResult(
            train_state.learner.trained(), losses, spent, *outcome, run.before, end, train_state.example_losses
        )

    def _train(self, run: TrainingRun, progress: StepReporter) -> State:
        """Train, and charge the ledger, also for a run that failed."""
        try:
            return self.steps(run, progress)
        finally:
            run.train_state.charge(self.ledger, run.phase, run.stage)
            if run.validation is not None:
                run.validation.charge(self.ledger, run.train_state.validation)

    def steps(self, run: TrainingRun, progress: StepReporter) -> State:
        """Train, from `progress.restored` if any, until the next step would exceed the budget; no ledger is charged.

        Raises: as `fit`.
        """
        return self.sharding(run, lambda: self._steps(run, progress))()

    def sharding(self, run: TrainingRun, train: Callable[[], State]) -> Callable[[], State]:
        """`train`, which takes steps of `run`; while it does, the model is sharded, if the recipe asks for it."""
        if not self._shards:
            return train
        from cads.training.fsdp import divided

        return lambda: divided(self.task, run.train_state, self.accelerator.device, train)

    def _steps(self, run: TrainingRun, progress: StepReporter) -> State:
        walk = self.walk(run, progress.restored)
        with closing(walk):
            try:
                while True:
                    progress.step(partial(run.train_state.state, next(walk), everywhere=False))
            except StopIteration as end:
                state: State = end.value
                return state

    def walk(self, run: TrainingRun, restored: State | None) -> Walk:
        """Train from `restored`, if any, a step at a time, until the next one would exceed the budget.

        Yields:
            after each step: the optimizer. While it waits, another run may take a step.

        Returns:
            the state at the end.

        Raises: as `fit`.
        """
        train_state, recipe = run.train_state, self.task.recipe
        train_state.mark_current()
        learner, is_scaled = train_state.learner, train_state.scaler is not None
        # Fused SGD does not take sharded tensors.
        torch_optimizer = build_optimizer(recipe, learner, fused=not (is_scaled or learner.is_collective))
        prepared, wrapped = self._prepare(train_state.learner, torch_optimizer)
        world = active_group()
        # Where examples are divided among processes, each process draws other dropout masks.
        dropout_key = () if world.first or mixes_examples(train_state.learner) else ("process", world.rank)
        # accelerate's wrapper adds 0.4 ms a step (it searches for packages) and is needed for loss scaling alone.
        optimizer = torch_optimizer if train_state.scaler is None else wrapped
        train_state.learner.train()
        if run.segment.start is not None:
            train_state.resume_from(run.segment.start, torch_optimizer)
        if restored is not None:
            train_state.restore(restored, torch_optimizer)
        clock = time.perf_counter()
        try:
            with self.monitor.progress(run.stage, run.flops, run.before) as advance, torch.random.fork_rng():
                self._replay_progress(run, advance)
                train_state.settle = partial(self._settle, run, advance)
                for pieces in self._load(run):
                    cost = self._cost(pieces) / train_state.replicas + self.task.costs.optimizer_step
                    if train_state.total + cost > run.flops:
                        break
                    self._step(run, prepared, optimizer, torch_optimizer, pieces, cost, dropout_key)
                    if self._reads_now(run):
                        train_state.settle()
                    if train_state.failure is not None:
                        break
                    train_state.seconds += time.perf_counter() - clock
                    self._validate(run)
                    yield torch_optimizer
                    clock = time.perf_counter()
                train_state.settle()
                train_state.seconds += time.perf_counter() - clock
                self._validate(run, at_end=True)
        finally:
            # It refers to the run, which would stay in memory until a garbage collection.
            train_state.settle = read_already
            # accelerate keeps references to all that it has prepared.
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()
            unwrap(train_state.learner, torch_optimizer, wrapped)
        if not train_state.steps and train_state.failure is None:
            raise BudgetError(
                f"{run.phase}/{stage_label(run.stage)}: {run.flops:.4g} FLOPs do not buy one step of "
                f"{recipe.batch_size} examples, which costs {cost:.4g}: raise the budget or lower batch_size"
            )
        # A failed run returns its last good state, with that of the optimizer; so does a segment that keeps its state.
        kept_optimizer = torch_optimizer if run.segment.keep or train_state.failure is not None else None
        return train_state.state(kept_optimizer, everywhere=run.segment.keep)

    def _step(
        self,
        run: TrainingRun,
        learner: Learner,
        optimizer: Any,
        torch_optimizer: torch.optim.Optimizer,
        pieces: list[Batch],
        cost: float,
        dropout_key: tuple[Any, ...],
    ) -> None:
        """Take one step: count its cost, accumulate the gradient, check it, and update the weights.

        Args:
            learner, optimizer: as prepared by accelerate; `torch_optimizer` is the one within the wrapper.
            pieces: the batch. cost: of the step, FLOPs a replica. dropout_key: seeds this process's masks.
        """
        train_state, recipe = run.train_state, self.task.recipe
        number = train_state.steps + len(run.unread)
        check_answers(run.draws, pieces, number)
        self._seed(derive(run.seed, number, *dropout_key))
        rate = run.rate(recipe, train_state.total + cost / 2)
        set_rate(optimizer, rate)
        train_state.charge_step(cost, pieces)
        train_state.remember_buffers()
        step_losses = self._backward(run, learner, pieces)
        if train_state.scaler is not None:
            train_state.scaler.unscale_(torch_optimizer)
        norms = train_state.learner.clip(recipe.clip_norm)
        later = self._reads_later(run)
        ids = partial(run.draws.ids, pieces)
        # A rider knows those of its last step alone.
        names = ids() if later and train_state.rider is not None else None
        step = UnreadStep(step_losses, norms, rate, train_state.total, ids if names is None else lambda: names)
        run.unread.add(step)
        if later and isinstance(train_state.learner, SingleLearner):
            run.unread.update(torch_optimizer, step, train_state.remembered_buffers)
        elif later or train_state.settle():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _reads_later(self, run: TrainingRun) -> bool:
        """Whether the device goes on to further steps before the host has read the losses of one."""
        alone = active_group().size == 1 and not run.train_state.learner.is_collective
        return alone and reads_later(self.accelerator) and not self._skips

    def _reads_now(self, run: TrainingRun) -> bool:
        """Whether all that is unread is to be read before the next step."""
        rider = run.train_state.rider
        full = len(run.unread) >= READ_TOGETHER or (rider is not None and rider.needs_losses)
        return full or self._is_measured(run)

    def _settle(self, run: TrainingRun, advance: Advance) -> bool:
        """Read and record the steps that are unread, but for those after a failure; returns whether the last is good.

        This is the one point at which the host waits for the device.
        """
        train_state, good = run.train_state, True
        for step, accumulated, norm in run.unread.take():
            if train_state.rider is not None:
                train_state.rider.observe(accumulated.example_losses)
            elif run.segment.keep:
                train_state.record_example_losses(accumulated.positions, accumulated.example_losses)
            good = self._apply_nonfinite_policy(run, step, accumulated.loss, norm)
            if train_state.failure is not None:
                break
            advance(step.total, train_state.mean_loss(-1), step.rate)
        return good

    def _apply_nonfinite_policy(self, run: TrainingRun, step: UnreadStep, loss: np.ndarray, norm: np.ndarray) -> bool:
        """Record a step by its losses and gradient norms (shape (K,)); returns whether to update the weights."""
        train_state = run.train_state
        # A scaler expects gradients to overflow: it skips the step and lowers its scale, up to `MAX_SKIPPED` times.
        overflow_allowed = train_state.scaler is not None and train_state.overflows < MAX_SKIPPED
        non_finite = ~(np.isfinite(loss) & (np.isfinite(norm) | overflow_allowed))
        rejected = non_finite.any() and isinstance(train_state.learner, SingleLearner)
        if not rejected:
            train_state.diverged |= non_finite
            train_state.record_step(loss, step.total)
        else:
            train_state.put_buffers_back()
            if not self._skips or train_state.skipped_in_a_row >= MAX_SKIPPED:
                train_state.fail(step.ids(), float(loss[0]), float(norm[0]), step.rate)
            else:
                train_state.skipped += 1
                train_state.record_step(np.full(1, np.nan), step.total)
                tag = f"{stage_tag(run.stage)}/skipped_batches"
                self.monitor.scalar(tag, train_state.skipped, train_state.steps)
        if train_state.scaler is not None:
            train_state.count_overflow(np.isfinite(norm).all())
            if rejected:
                train_state.scaler.update()
        return not rejected

    def _is_measured(self, run: TrainingRun, *, at_end: bool = False) -> bool:
        """Whether a point of the validation curve is due, or the run has ended."""
        train_state, validation = run.train_state, run.validation
        if validation is None:
            return False
        records = train_state.validation
        last = records[-1]["flops"] if records else run.before
        ends = at_end and run.flops >= WHOLE * validation.horizon
        return (ends and train_state.total > last) or validation.is_due(train_state.total, last)

    def _validate(self, run: TrainingRun, *, at_end: bool = False) -> None:
        """Measure the model on the target, if a point of the validation curve is due, or at the end of the run."""
        train_state, validation = run.train_state, run.validation
        measured = self._is_measured(run, at_end=at_end)
        if validation is None or not measured or train_state.failure is not None or not train_state.steps:
            return
        learner, records = train_state.learner, train_state.validation
        records.append(validation.measure(learner.trained()[0], train_state.steps, train_state.total))
        learner.train()
        show(self.monitor, records[-1])

    def _replay_progress(self, run: TrainingRun, advance: Advance) -> None:
        """Show the steps of this segment that are already in its state, taken by another process or before."""
        train_state, recipe = run.train_state, self.task.recipe
        for step, spent in enumerate(train_state.spent):
            if spent > run.before:
                middle = (spent + (train_state.spent[step - 1] if step else 0.0)) / 2
                advance(spent, train_state.mean_loss(step), run.rate(recipe, middle))
        for record in train_state.validation:
            show(self.monitor, record)

    def _check_types(self, learner: Learner) -> None:
        """Refuse weights and inputs that do not go with the device or the precision; see `check_types`."""
        task, device = self.task, self.accelerator.device
        inputs = task.pool.batch(np.zeros(1, dtype=np.int64)).inputs if device.type == "mps" else {}
        check_types(learner, inputs, precision=task.recipe.precision, device=device, name=task.name)

    @property
    def _skips(self) -> bool:
        return self.task.recipe.non_finite == "skip"

    @property
    def _shards(self) -> bool:
        return self.task.recipe.sharding == "full" and active_group().size > 1

    def _seed(self, seed: int) -> None:
        """Seed the global generators that dropout draws from (`torch.manual_seed` is slow without a GPU)."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _prepare(self, learner: Learner, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Learner and optimizer as accelerate prepares them: on their device, in their precision."""
        if world_group().size == 1:
            prepared, wrapped = self.accelerator.prepare(learner, optimizer)
            return prepared, wrapped
        # `accumulate` sums the gradients of several processes: it handles shares without an example.
        model = self.accelerator.prepare_model(learner, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def _load(self, run: TrainingRun) -> Iterator[list[Batch]]:
        kind, recipe = self.accelerator.device.type, self.task.recipe
        pin = kind == "cuda"
        if isinstance(run.draws, Rider):
            return follow(run.draws, run.train_state.steps, pin=pin)
        workers = loading_workers(recipe, kind)
        if workers and recipe.workers is None:
            step = self.task.costs.per_usage(run.draws.pool, recipe.batch_size) * recipe.batch_size
            workers = workers if run.flops - run.train_state.total > SHORT_RUN * step else 0
        return load_steps(run.draws, run.train_state.steps, workers, pin=pin)

    def _cost(self, pieces: list[Batch]) -> float:
        return sum(self.task.costs.usage(piece) for piece in pieces)

    def _backward(self, run: TrainingRun, learner: Learner, pieces: list[Batch]) -> StepLosses:
        """Accumulate the gradient of the mean loss of each replica."""
        replicas = run.train_state.replicas
        micro_batches = [m for piece in pieces for m in piece.split(self.task.recipe.accumulate, replicas)]
        draws = run.draws
        n_kept = draws.batch_size if isinstance(draws, Rider) else draws.from_pool if run.segment.keep else 0
        return accumulate(self.accelerator, learner, micro_batches, replicas, active_group(), n_kept)


@dataclass
class TrainingRun:
    """One run of the trainer: its state, and its arguments.

    Attributes:
        journal_key: arguments of its operation in a journal.
        validation: measures the model on the target, or None.
        unread: its steps whose losses the host has not read yet.
    """

    train_state: TrainState
    draws: BatchStream
    flops: float
    seed: int
    phase: str
    stage: str
    journal_key: list[Any]
    segment: RunSegment = FULL_RUN
    validation: Validation | None = None
    unread: UnreadSteps = field(default_factory=UnreadSteps)

    @property
    def horizon(self) -> float:
        """FLOPs over which the learning rate is scheduled."""
        return self.flops if self.segment.horizon is None else self.segment.horizon

    @property
    def before(self) -> float:
        """FLOPs of earlier segments."""
        return 0.0 if self.segment.start is None else self.segment.start.number("total")

    def rate(self, recipe: TrainConfig, spent: float) -> float:
        """The learning rate once `spent` FLOPs are spent, earlier segments included."""
        return segment_rate(recipe, spent, horizon=self.horizon, planned=self.segment.planned, before=self.before)


def segment_rate(recipe: TrainConfig, spent: float, *, horizon: float, planned: float | None, before: float) -> float:
    """The learning rate within a segment of a run, once the run has spent `spent` FLOPs.

    Args:
        horizon: FLOPs over which the rate is scheduled. planned: the horizon of the segments before, if this one ends
            earlier than they expected, or None. before: FLOPs of these segments.
    """
    if planned is None or not before:
        return recipe.rate(spent / horizon)
    return recipe.rate(before / planned) * recipe.decay((spent - before) / (horizon - before))


def _accelerator(precision: str) -> Accelerator:
    """An accelerator of this precision; accelerate's global state is reset if it has another one."""
    state = AcceleratorState._shared_state
    if state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    prepare_device(accelerator.device.type)
    if precision != "no" and not accelerator.native_amp:
        raise ConfigError(f"precision = {precision!r} does not run on {accelerator.device}: use 'no' or 'bf16'")
    return accelerator
