"""The inner loop: train a model, or K replicas of one, until the next step would exceed the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.data.loader import check_answers, fingerprint, load_steps
from cads.data.training_batches import Draws
from cads.errors import BudgetError, ConfigError, NonFiniteError
from cads.monitor import Advance, Monitor
from cads.recipe import TrainConfig
from cads.runtime.checkpoint import State
from cads.runtime.lockstep import Progress
from cads.runtime.processes import current, everyone
from cads.seeding import derive
from cads.task import Task
from cads.training.gradient import accumulate, mixes_examples
from cads.training.learners import Learner, Single
from cads.training.result import Fit
from cads.training.run_state import EXAMPLE_LOSSES, WHOLE, Course, Leg

MOST_SKIPPED = 20
"""Batches in a row that a run skips, or its scaler, before it is given up: then it is not the batch that is wrong."""


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
        draws: Draws,
        flops: float,
        seed: int,
        phase: str,
        stage: str,
        leg: Leg = WHOLE,
    ) -> TrainingRun:
        """A run that has not begun.

        Raises:
            BudgetError: if its budget is not finite.
            ConfigError: if there is nothing to train.
        """
        if not any(p.requires_grad for p in learner.parameters()):
            raise ConfigError(f"the model of {self.task.name} has no trainable parameter")
        before = 0.0 if leg.start is None else leg.start.number("total")
        flops = min(flops, before + self.ledger.left / draws.replicas)
        if not math.isfinite(flops):
            raise BudgetError(f"{phase}/{stage}: a run needs a finite budget, not {flops} FLOPs")
        course = Course(learner, draws.replicas, self.accelerator.scaler)
        if leg.keep:
            course.example_losses = np.full(len(draws.pool), np.nan)
        about = [phase, stage, flops, seed, type(learner).__name__, self.task.recipe.decisive(), fingerprint(draws)]
        return TrainingRun(course, draws, flops, seed, phase, stage, [*about, *leg.about()], leg)

    def finish(self, run: TrainingRun, state: State) -> Fit:
        """What a run has left behind, which ended in `state`, in this process or in another.

        Raises:
            NonFiniteError: if it met a loss or gradient that is NaN or infinite.
        """
        course, leg = run.course, run.leg
        if not course.begun:
            course.learner.to(self.accelerator.device).train()
            course.restore(state, None)
            with self.monitor.progress(run.stage, run.flops) as advance:
                _show(course, self.task.recipe, run.horizon, advance)
        if course.failure is not None:
            raise NonFiniteError(**course.failure)
        losses, spent = np.stack(course.losses), np.array(course.spent)
        kept = state.detached() if leg.keep else None
        if kept is not None:
            del kept.tensors[EXAMPLE_LOSSES]
            # They are in the ledger; without them the same seed leaves the same bytes.
            kept.values["seconds"] = 0.0
        known = (course.diverged, course.seconds, course.skipped)
        before = 0.0 if leg.start is None else leg.start.number("total")
        return Fit(course.learner.trained(), losses, spent, *known, before, kept, course.example_losses)

    def _train(self, run: TrainingRun, progress: Progress) -> State:
        """Train, and charge for it: a run that failed has cost what it has cost."""
        try:
            return self.steps(run, progress)
        finally:
            run.course.charge(self.ledger, run.phase, run.stage)

    def steps(self, run: TrainingRun, progress: Progress) -> State:
        """Train from where `progress` stands until the next step would exceed the budget; nothing is charged.

        Raises: as `fit`.
        """
        if not self._shards:
            return self._steps(run, progress)
        from cads.training.fsdp import divided

        return divided(self.task, run.course, self.accelerator.device, lambda: self._steps(run, progress))

    def _steps(self, run: TrainingRun, progress: Progress) -> State:
        course, recipe = run.course, self.task.recipe
        course.begun = True
        plain = _optimizer(recipe, course.learner, scaled=course.scaler is not None)
        prepared, wrapped = self._placed(course.learner, plain)
        world = current()
        # Examples that are divided among processes meet other dropout in each.
        own = () if world.first or mixes_examples(course.learner) else ("process", world.rank)
        # accelerate's wrapper adds 0.4 ms a step (it searches for packages) and is needed for loss scaling alone.
        optimizer = plain if course.scaler is None else wrapped
        course.learner.train()
        if run.leg.start is not None:
            course.go_on_from(run.leg.start, plain)
        if progress.restored is not None:
            course.restore(progress.restored, plain)
        before, started = course.seconds, time.perf_counter()
        try:
            with self.monitor.progress(run.stage, run.flops) as advance, torch.random.fork_rng():
                _show(course, recipe, run.horizon, advance)
                for pieces in self._load(run):
                    cost = self._cost(pieces) / course.replicas + self.task.costs.optimizer_step
                    if course.total + cost > run.flops:
                        break
                    rate = self._step(run, prepared, optimizer, plain, pieces, cost, own)
                    if course.failure is not None:
                        break
                    advance(course.total, course.mean_loss(-1), rate)
                    course.seconds = before + time.perf_counter() - started
                    progress.step(lambda: course.state(plain, everywhere=False))
        finally:
            # accelerate keeps whatever it has prepared.
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()
            course.seconds = before + time.perf_counter() - started
        if not course.steps and course.failure is None:
            raise BudgetError(
                f"{run.phase}/{run.stage}: {run.flops:.4g} FLOPs do not buy one step of {recipe.batch_size} examples, "
                f"which costs {cost:.4g}: raise the budget or lower batch_size"
            )
        # What a run that failed leaves is its last good state, optimizer included; so is what one leaves to go on from.
        last = plain if run.leg.keep or course.failure is not None else None
        return course.state(last, everywhere=run.leg.keep)

    def _step(
        self,
        run: TrainingRun,
        learner: Learner,
        optimizer: Any,
        plain: torch.optim.Optimizer,
        pieces: list[Batch],
        cost: float,
        own: tuple[Any, ...],
    ) -> float:
        """Take one step: pay, backward, judge, update.

        Args:
            learner, optimizer: as they were prepared; `plain` is the optimizer within.
            pieces: its batch. cost: of it, FLOPs a replica. own: what sets the dropout of this process apart.

        Returns:
            the learning rate.
        """
        course, recipe = run.course, self.task.recipe
        check_answers(run.draws, pieces, course.steps)
        self._seed(derive(run.seed, course.steps, *own))
        rate = recipe.rate((course.total + cost / 2) / run.horizon)
        _set_rate(optimizer, rate)
        course.pay(cost, pieces)
        course.remember_buffers()
        loss = self._backward(run, learner, pieces)
        if course.scaler is not None:
            course.scaler.unscale_(plain)
        norm = course.learner.clip(recipe.clip_norm)
        if self._judge(run, pieces, loss, norm, rate):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return rate

    def _judge(self, run: TrainingRun, pieces: list[Batch], loss: np.ndarray, norm: np.ndarray, rate: float) -> bool:
        """Note the losses of a step (nats, shape (K,)) in its course; returns whether to update the weights."""
        course = run.course
        # A scaler expects gradients that overflow: it skips the step and lowers its scale, though not for ever.
        forgiven = course.scaler is not None and course.overflows < MOST_SKIPPED
        bad = ~(np.isfinite(loss) & (np.isfinite(norm) | forgiven))
        lost = bad.any() and isinstance(course.learner, Single)
        if not lost:
            course.diverged |= bad
            course.note(loss)
        else:
            course.put_buffers_back()
            if not self._skips or course.skipped_in_a_row >= MOST_SKIPPED:
                course.fail(run.draws.ids(pieces), float(loss[0]), float(norm[0]), rate)
            else:
                course.skipped += 1
                course.note(np.full(1, np.nan))
                self.monitor.scalar(f"{run.stage}/skipped_batches", course.skipped, course.steps)
        if course.scaler is not None:
            course.overflows = 0 if np.isfinite(norm).all() else course.overflows + 1
            if lost:
                course.scaler.update()
        return not lost

    @property
    def _skips(self) -> bool:
        return self.task.recipe.non_finite == "skip"

    @property
    def _shards(self) -> bool:
        return self.task.recipe.sharding == "full" and current().size > 1

    def _seed(self, seed: int) -> None:
        """Seed the global generators that dropout draws from (`torch.manual_seed` is slow without a GPU)."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _placed(self, learner: Learner, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Learner and optimizer as accelerate prepares them: on their device, in their precision."""
        if everyone().size == 1:
            prepared, wrapped = self.accelerator.prepare(learner, optimizer)
            return prepared, wrapped
        # Gradients of several processes are added up in `accumulate`, which knows of shares without an example.
        model = self.accelerator.prepare_model(learner, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def _load(self, run: TrainingRun) -> Iterator[list[Batch]]:
        pin = self.accelerator.device.type == "cuda"
        return load_steps(run.draws, run.course.steps, self.task.recipe.workers, pin=pin)

    def _cost(self, pieces: list[Batch]) -> float:
        return sum(self.task.costs.usage(piece) for piece in pieces)

    def _backward(self, run: TrainingRun, learner: Learner, pieces: list[Batch]) -> np.ndarray:
        """Accumulate the gradient of the mean loss of each replica; returns those means, shape (K,)."""
        replicas = run.course.replicas
        micro = [m for piece in pieces for m in piece.split(self.task.recipe.accumulate, replicas)]
        n_kept = run.draws.from_pool if run.leg.keep else 0
        found = accumulate(self.accelerator, learner, micro, replicas, current(), n_kept)
        if run.leg.keep:
            run.course.see(found.positions, found.each)
        return found.loss


@dataclass
class TrainingRun:
    """One run of the trainer: how far it has come, and what it was asked for.

    Attributes:
        about: what a journal knows it by.
    """

    course: Course
    draws: Draws
    flops: float
    seed: int
    phase: str
    stage: str
    about: list[Any]
    leg: Leg = WHOLE

    @property
    def horizon(self) -> float:
        """FLOPs that the learning rate follows."""
        return self.flops if self.leg.horizon is None else self.leg.horizon


def _show(course: Course, recipe: TrainConfig, flops: float, advance: Advance) -> None:
    """Show the steps that another process has taken."""
    for step, spent in enumerate(course.spent):
        middle = (spent + (course.spent[step - 1] if step else 0.0)) / 2
        advance(spent, course.mean_loss(step), recipe.rate(middle / flops))


def _optimizer(recipe: TrainConfig, learner: Learner, *, scaled: bool) -> torch.optim.Optimizer:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    # Where loss scaling skips the first step, fused SGD (PyTorch 2.14) goes on with momentum it has never written; and
    # it takes no tensors that are divided over processes.
    fused = not (scaled or learner.together)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True, fused=fused)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _accelerator(precision: str) -> Accelerator:
    """An accelerator of this precision; accelerate keeps one global state, which is renewed when it differs."""
    state = AcceleratorState._shared_state
    if state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:
        raise ConfigError(f"precision = {precision!r} does not run on {accelerator.device}: use 'no' or 'bf16'")
    return accelerator
