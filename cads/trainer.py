"""The inner loop: train a model, or K replicas of one, until the next step would exceed the budget."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cads.budget import Ledger
from cads.checkpoint import State
from cads.course import EXAMPLE_LOSSES, Course
from cads.draws import Draws
from cads.errors import BudgetError, ConfigError, DataError, NonFiniteError
from cads.journal import Progress, perform
from cads.monitor import Advance, Monitor
from cads.replicas import Learner, Single, Stacked, can_stack
from cads.seeds import derive
from cads.task import Batch, Task

TAIL = 0.1
"""Share of the steps, at the end, over which the training loss of a fit is averaged."""

MOST_SKIPPED = 20
"""Batches in a row that are skipped before a run is given up: then it is not the batch that is wrong."""

AfterStep = Callable[[int, float, torch.optim.Optimizer], None]
"""(step, learning rate, optimizer): looks at the model and its optimizer's state after an update."""


@dataclass
class TrainConfig:
    """How a model is trained: the same recipe for the final model and for every inner run of a selector."""

    batch_size: int = 32
    """Examples a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled for AdamW, L2 for SGD."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate over the budget, after the warm-up; cosine and linear end at 0."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises linearly."""
    clip_norm: float | None = 1.0
    """Largest gradient norm, or null."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision ("no" is float32)."""
    accumulate: int = 1
    """Pieces into which a batch is split to save memory (gradient accumulation)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or gradient is NaN or infinite: the run stops before the update, or leaves the batch
    out, pays for it and counts it (replicas then train one by one)."""
    workers: int = 0
    """Processes that load data."""
    replicas: Literal["auto", "batched", "loop"] = "auto"
    """How the inner runs of a selector train: as one batched model where it is dense, or one by one."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(get_args(hint))}")
        for name in ("batch_size", "accumulate", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}: it must be positive")
        for name in ("weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be >= 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup = {self.warmup}: a share of the budget, at least 0 and below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm = {self.clip_norm}: it must be positive, or null for no clipping")
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate = {self.accumulate} splits a batch of only {self.batch_size} examples")
        if self.non_finite == "skip" and self.replicas == "batched":
            raise ConfigError("non_finite = 'skip' needs replicas = 'auto' or 'loop': batched ones share each update")

    def rate(self, progress: float) -> float:
        """The learning rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        after = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
        return self.learning_rate * (1 - min(1.0, after)) if self.schedule == "linear" else self.learning_rate


@dataclass(frozen=True)
class Leg:
    """One part of a training run that is done in parts.

    Attributes:
        start: where the part before it ended; None at the beginning.
        horizon: FLOPs of the whole run, which the learning rate follows; None if this part is the last.
        keep: whether its `Fit` holds the state to go on from, and the loss of each example.
    """

    start: State | None = None
    horizon: float | None = None
    keep: bool = False

    def about(self) -> list[Any]:
        """What a journal has to know of it; nothing of a run in one part."""
        if self == WHOLE:
            return []
        return [None if self.start is None else self.start.digest, self.horizon, self.keep]


WHOLE = Leg()
"""A run in one part."""


@dataclass
class Fit:
    """What training left behind, for K replicas.

    Attributes:
        models: the trained models, on the training device.
        losses: the mean loss of each step's batch, nats, shape (steps, K); NaN where the batch was skipped.
        flops: what one replica has spent after each step, shape (steps,).
        diverged: replicas that met a non-finite loss, bool, shape (K,); their weights mean nothing.
        seconds: wall-clock time.
        skipped: batches that were left out since their loss or gradient was not finite.
        before: FLOPs of one replica that were spent in earlier parts of the run, as `flops` and `losses` tell.
        state: to go on from, on the CPU, if it was to be kept.
        example_losses: of each pool example in its latest training step, nats, shape (N,), NaN where it was in none;
            if they were to be kept.
    """

    models: list[nn.Module]
    losses: np.ndarray
    flops: np.ndarray
    diverged: np.ndarray
    seconds: float
    skipped: int = 0
    before: float = 0.0
    state: State | None = None
    example_losses: np.ndarray | None = None

    @property
    def flops_per_second(self) -> float:
        """Achieved by all replicas together."""
        return float(self.flops[-1] - self.before) * len(self.diverged) / self.seconds

    @property
    def training_loss(self) -> np.ndarray:
        """Mean loss over the last steps (nats, shape (K,)): the training loss that the budget reached.

        Skipped batches have no part in it; where a replica diverged it is NaN.
        """
        tail = self.losses[-max(1, round(TAIL * len(self.losses))) :]
        known = np.isfinite(tail)
        reached = np.where(known, tail, 0.0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
        return np.where(self.diverged | ~known.any(axis=0), np.nan, reached)


class Trainer:
    """Trains on a task within budgets and charges a ledger for it.

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

    def fit(
        self,
        model: nn.Module,
        draws: Draws,
        flops: float,
        *,
        seed: int,
        phase: str,
        stage: str,
        after_step: AfterStep | None = None,
        leg: Leg = WHOLE,
    ) -> Fit:
        """Train `model` in place on `draws` for at most `flops`, and at most what the ledger has left.

        Args:
            flops: what a run has spent when it ends, earlier parts included; they are not charged again.
            after_step: called after each update. A run that is watched is not written to a journal.
            leg: which part of a run it is. A later part goes on with the step, the weights and the optimizer of the
                one before it, so that two parts with the same draws equal one.

        Raises:
            BudgetError: if not even one step is affordable.
            CheckpointError: if the run began with another model.
            DataError: if a batch has no answer token.
            NonFiniteError: if the loss or the gradient becomes NaN or infinite, before the update.
        """
        learner = Single(self.task, model)
        return self._run(learner, draws, flops, seed=seed, phase=phase, stage=stage, after_step=after_step, leg=leg)

    def fit_replicas(
        self, models: Sequence[nn.Module], draws: Draws, flops: float, *, seed: int, phase: str, stage: str
    ) -> Fit:
        """Train K models, each on its own stream of `draws`, each for at most `flops`.

        Dense models train as one batched model (`torch.func`), others one after another; both give the same
        losses to 1e-5. A replica that diverges is marked, and does not disturb the others.
        """
        flops = min(flops, self.ledger.left / len(models))
        way = self.task.recipe.replicas
        if way == "batched" or (way == "auto" and len(models) > 1 and can_stack(models[0]) and not self._skips):
            learner = Stacked(self.task, models)
            return self._run(learner, draws, flops, seed=seed, phase=phase, stage=stage)
        fits: list[Fit | None] = []
        for model, stream in zip(models, draws.streams, strict=True):
            alone = draws.only(stream)
            try:
                fits.append(self.fit(model, alone, flops, seed=seed, phase=phase, stage=stage))
            except NonFiniteError:
                fits.append(None)
        return _gather(list(models), fits)

    def _run(
        self,
        learner: Learner,
        draws: Draws,
        flops: float,
        *,
        seed: int,
        phase: str,
        stage: str,
        after_step: AfterStep | None = None,
        leg: Leg = WHOLE,
    ) -> Fit:
        recipe, replicas = self.task.recipe, draws.replicas
        if not any(p.requires_grad for p in learner.parameters()):
            raise ConfigError(f"the model of {self.task.name} has no trainable parameter")
        before = 0.0 if leg.start is None else leg.start.number("total")
        flops = min(flops, before + self.ledger.left / replicas)
        if not math.isfinite(flops):
            raise BudgetError(f"{phase}/{stage}: a run needs a finite budget, not {flops} FLOPs")
        course = Course(learner, replicas, self.accelerator.scaler)
        if leg.keep:
            course.example_losses = np.full(len(draws.pool), np.nan)
        run = _Run(course, draws, flops, seed, phase, stage, after_step, leg)
        if after_step is None:
            about = [phase, stage, flops, seed, type(learner).__name__, asdict(recipe), _fingerprint(draws)]
            about += leg.about()
            state = perform("training", about, self.ledger, lambda progress: self._train(run, progress))
        else:
            state = self._train(run, Progress())
        if not course.begun:
            learner.to(self.accelerator.device).train()
            course.restore(state, None)
            with self.monitor.progress(stage, flops) as advance:
                _show(course, recipe, run.horizon, advance)
        if course.failure is not None:
            raise NonFiniteError(**course.failure)
        losses, spent = np.stack(course.losses), np.array(course.spent)
        kept = state.detached() if leg.keep else None
        if kept is not None:
            del kept.tensors[EXAMPLE_LOSSES]
            # They are in the ledger; without them the same seed leaves the same bytes.
            kept.values["seconds"] = 0.0
        known = (course.diverged, course.seconds, course.skipped)
        return Fit(learner.trained(), losses, spent, *known, before, kept, course.example_losses)

    def _train(self, run: _Run, progress: Progress) -> State:
        """Train from where `progress` stands until the next step would exceed the budget."""
        course, recipe = run.course, self.task.recipe
        course.begun = True
        plain = _optimizer(recipe, course.learner, scaled=course.scaler is not None)
        prepared, wrapped = self.accelerator.prepare(course.learner, plain)
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
                for pieces in self._load(run.draws, course.steps):
                    cost = self._cost(pieces) / course.replicas + self.task.costs.optimizer_step
                    if course.total + cost > run.flops:
                        break
                    _check_answers(run.draws, pieces, course.steps)
                    self._seed(derive(run.seed, course.steps))
                    rate = recipe.rate((course.total + cost / 2) / run.horizon)
                    _set_rate(optimizer, rate)
                    course.pay(cost, pieces)
                    course.remember_buffers()
                    loss = self._backward(run, prepared, pieces)
                    if course.scaler is not None:
                        course.scaler.unscale_(plain)
                    norm = course.learner.clip(recipe.clip_norm)
                    if self._judge(run, pieces, loss, norm, rate):
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if course.failure is not None:
                        break
                    if run.after_step is not None:
                        run.after_step(course.steps - 1, rate, plain)
                    advance(course.total, course.mean_loss(-1), rate)
                    course.seconds = before + time.perf_counter() - started
                    progress.step(lambda: course.state(plain))
        finally:
            # accelerate keeps whatever it has prepared; a run that failed has cost what it has cost.
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()
            course.seconds = before + time.perf_counter() - started
            course.charge(self.ledger, run.phase, run.stage)
        if not course.steps and course.failure is None:
            raise BudgetError(
                f"{run.phase}/{run.stage}: {run.flops:.4g} FLOPs do not buy one step of {recipe.batch_size} examples, "
                f"which costs {cost:.4g}: raise the budget or lower batch_size"
            )
        # What a run that failed leaves is its last good state, optimizer included; so is what one leaves to go on from.
        return course.state(plain if run.leg.keep or course.failure is not None else None)

    def _judge(self, run: _Run, pieces: list[Batch], loss: np.ndarray, norm: np.ndarray, rate: float) -> bool:
        """Note the losses of a step (nats, shape (K,)) in its course; returns whether to update the weights."""
        course = run.course
        # A scaler expects gradients that overflow: it skips the step and lowers its scale.
        bad = ~(np.isfinite(loss) & (np.isfinite(norm) | (course.scaler is not None)))
        if not (bad.any() and isinstance(course.learner, Single)):
            course.diverged |= bad
            course.note(loss)
            return True
        course.put_buffers_back()
        if not self._skips or course.skipped_in_a_row >= MOST_SKIPPED:
            course.failure = _failure(run, pieces, loss, norm, rate)
            return False
        course.skipped += 1
        course.note(np.full(1, np.nan))
        self.monitor.scalar(f"{run.stage}/skipped_batches", course.skipped, course.steps)
        if course.scaler is not None:
            course.scaler.update()
        return False

    @property
    def _skips(self) -> bool:
        return self.task.recipe.non_finite == "skip"

    def _seed(self, seed: int) -> None:
        """Seed the global generators that dropout draws from (`torch.manual_seed` is slow without a GPU)."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _load(self, draws: Draws, start: int) -> Iterator[list[Batch]]:
        loader = DataLoader(
            _Steps(draws),
            batch_size=None,
            sampler=_Count(start),
            num_workers=self.task.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            collate_fn=_identity,
        )
        yield from loader

    def _cost(self, pieces: list[Batch]) -> float:
        return sum(self.task.costs.usage(piece) for piece in pieces)

    def _backward(self, run: _Run, learner: nn.Module, pieces: list[Batch]) -> np.ndarray:
        """Accumulate the gradient of the mean loss of each replica; returns those means, shape (K,)."""
        replicas, from_pool = run.course.replicas, run.draws.from_pool
        micro = [m for piece in pieces for m in piece.split(self.task.recipe.accumulate, replicas)]
        whole = sum(len(m) for m in micro) / replicas
        loss = np.zeros(replicas)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(learner):
                each = learner(batch.to(self.accelerator.device))
                means = each.sum(dim=1) / whole
                self.accelerator.backward(means.sum())
            if run.leg.keep:
                count = min(len(batch), from_pool)
                run.course.see(batch.positions[:count].numpy(), each[0, :count])
                from_pool -= count
            loss += means.detach().double().cpu().numpy()
        return loss


@dataclass
class _Run:
    """One run of the trainer: how far it has come, and what it was asked for."""

    course: Course
    draws: Draws
    flops: float
    seed: int
    phase: str
    stage: str
    after_step: AfterStep | None
    leg: Leg = WHOLE

    @property
    def horizon(self) -> float:
        """FLOPs that the learning rate follows."""
        return self.flops if self.leg.horizon is None else self.leg.horizon


def _failure(run: _Run, pieces: list[Batch], loss: np.ndarray, norm: np.ndarray, rate: float) -> dict[str, Any]:
    """What `NonFiniteError` has to say, as JSON values."""
    ids, step, skipped = run.draws.ids(pieces), run.course.steps, run.course.skipped_in_a_row
    return {
        "message": f"loss {loss[0]:g} and gradient norm {norm[0]:g} at step {step} (learning rate {rate:.3g}, examples "
        f"{ids[:5]}{'...' if len(ids) > 5 else ''}){f', after {skipped} batches skipped in a row' if skipped else ''}: "
        "the weights were not updated; look at these examples, lower the learning rate or set clip_norm",
        "step": step,
        "ids": ids,
        "learning_rate": rate,
    }


def _show(course: Course, recipe: TrainConfig, flops: float, advance: Advance) -> None:
    """Show the steps that another process has taken."""
    for step, spent in enumerate(course.spent):
        middle = (spent + (course.spent[step - 1] if step else 0.0)) / 2
        advance(spent, course.mean_loss(step), recipe.rate(middle / flops))


def _fingerprint(draws: Draws) -> str:
    """What is trained on, as far as the first step tells."""
    digest = hashlib.sha256(f"{draws.batch_size} {draws.replicas}".encode())
    for stream in draws.streams:
        digest.update(stream.take(0, draws.batch_size).tobytes())
    return digest.hexdigest()


def _check_answers(draws: Draws, pieces: list[Batch], step: int) -> None:
    if not sum(p.answer_tokens for p in pieces):
        raise DataError(
            f"no answer token in the batch of step {step} (examples {draws.ids(pieces)[:5]}): there is nothing to "
            "learn from them; remove them, or keep more of them when they are cut"
        )


class _Steps(Dataset[list[Batch]]):
    """The steps of `draws` as a map-style dataset, for `DataLoader`."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def __getitem__(self, step: int) -> list[Batch]:
        return self._draws.batches(step)


class _Count:
    """start, start + 1, ..."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _identity(pieces: list[Batch]) -> list[Batch]:
    return pieces


def _optimizer(recipe: TrainConfig, learner: Learner, *, scaled: bool) -> torch.optim.Optimizer:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    # Where loss scaling skips the first step, fused SGD (PyTorch 2.14) goes on with momentum it has never written.
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True, fused=not scaled)


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


def _gather(models: list[nn.Module], fits: list[Fit | None]) -> Fit:
    """One Fit of K replicas from fits made one by one (None where a replica diverged)."""
    sound = [f for f in fits if f is not None]
    diverged = np.array([f is None for f in fits])
    if not sound:
        return Fit(models, np.full((1, len(models)), np.nan), np.array([np.nan]), diverged, 0.0)
    # Where examples differ in cost so do the numbers of steps: the ends of the courses are put side by side.
    steps = min(len(f.losses) for f in sound)
    missing = np.full(steps, np.nan)
    losses = np.stack([missing if f is None else f.losses[-steps:, 0] for f in fits], axis=1)
    flops = np.mean([f.flops[-steps:] for f in sound], axis=0)
    return Fit(models, losses, flops, diverged, sum(f.seconds for f in sound), sum(f.skipped for f in sound))
