"""The inner loop: train a model, or K replicas of one, until the next step would exceed the budget."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cads.budget import Ledger
from cads.draws import Draws
from cads.errors import BudgetError, ConfigError, DataError, NonFiniteError
from cads.monitor import Monitor
from cads.replicas import Learner, Single, Stacked, can_stack
from cads.seeds import derive
from cads.task import Batch, Task

TAIL = 0.1
"""Share of the steps, at the end, over which the training loss of a fit is averaged."""


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

    def rate(self, progress: float) -> float:
        """The learning rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        after = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
        return self.learning_rate * (1 - min(1.0, after)) if self.schedule == "linear" else self.learning_rate


@dataclass
class Fit:
    """What training left behind, for K replicas.

    Attributes:
        models: the trained models, on the training device.
        losses: the mean loss of each step's batch, nats, shape (steps, K).
        flops: what one replica has spent after each step, shape (steps,).
        diverged: replicas that met a non-finite loss, bool, shape (K,); their weights mean nothing.
        seconds: wall-clock time.
    """

    models: list[nn.Module]
    losses: np.ndarray
    flops: np.ndarray
    diverged: np.ndarray
    seconds: float

    @property
    def flops_per_second(self) -> float:
        """Achieved by all replicas together."""
        return float(self.flops[-1]) * len(self.diverged) / self.seconds

    @property
    def training_loss(self) -> np.ndarray:
        """Mean loss over the last steps (nats, shape (K,)): the training loss that the budget reached."""
        return self.losses[-max(1, round(TAIL * len(self.losses))) :].mean(axis=0)


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

    def fit(self, model: nn.Module, draws: Draws, flops: float, *, seed: int, phase: str, stage: str) -> Fit:
        """Train `model` in place on `draws` for at most `flops`, and at most what the ledger has left.

        Raises:
            BudgetError: if not even one step is affordable.
            DataError: if a batch has no answer token.
            NonFiniteError: if the loss or the gradient becomes NaN or infinite, before the update.
        """
        return self._run(Single(self.task, model), draws, flops, seed=seed, phase=phase, stage=stage)

    def fit_replicas(
        self, models: Sequence[nn.Module], draws: Draws, flops: float, *, seed: int, phase: str, stage: str
    ) -> Fit:
        """Train K models, each on its own stream of `draws`, each for at most `flops`.

        Dense models train as one batched model (`torch.func`), others one after another; both give the same
        losses to 1e-5. A replica that diverges is marked, and does not disturb the others.
        """
        flops = min(flops, self.ledger.left / len(models))
        way = self.task.recipe.replicas
        if way == "batched" or (way == "auto" and len(models) > 1 and can_stack(models[0])):
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

    def _run(self, learner: Learner, draws: Draws, flops: float, *, seed: int, phase: str, stage: str) -> Fit:
        recipe, replicas = self.task.recipe, draws.replicas
        parameters = [p for p in learner.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError(f"the model of {self.task.name} has no trainable parameter")
        flops = min(flops, self.ledger.left / replicas)
        if not math.isfinite(flops):
            raise BudgetError(f"{phase}/{stage}: a run needs a finite budget, not {flops} FLOPs")
        plain = _optimizer(recipe, parameters, scaled=self.accelerator.scaler is not None)
        prepared, wrapped = self.accelerator.prepare(learner, plain)
        # accelerate's wrapper adds 0.4 ms a step (it searches for packages) and is needed for loss scaling alone.
        optimizer = plain if self.accelerator.scaler is None else wrapped
        learner.train()
        losses: list[np.ndarray] = []
        spent: list[float] = []
        total, counts = 0.0, np.zeros(3, dtype=np.int64)
        diverged = np.zeros(replicas, dtype=bool)
        started = time.perf_counter()
        try:
            with self.monitor.progress(stage, flops) as progress, torch.random.fork_rng():
                for step, pieces in enumerate(self._load(draws)):
                    cost = self._cost(pieces) / replicas + self.task.costs.optimizer_step
                    if total + cost > flops:
                        break
                    _check_answers(draws, pieces, step)
                    self._seed(derive(seed, step))
                    rate = recipe.rate((total + cost / 2) / flops)
                    _set_rate(optimizer, rate)
                    total += cost
                    counts += np.sum([(len(p), p.tokens, p.answer_tokens) for p in pieces], axis=0)
                    loss = self._backward(prepared, pieces, replicas)
                    scaler = self.accelerator.scaler
                    if scaler is not None:
                        scaler.unscale_(plain)
                    norm = learner.clip(recipe.clip_norm)
                    # A scaler expects gradients that overflow: it skips the step and lowers its scale.
                    bad = ~(np.isfinite(loss) & (np.isfinite(norm) | (scaler is not None)))
                    if bad.any() and isinstance(learner, Single):
                        raise self._non_finite(draws, pieces, loss, norm, step, rate)
                    diverged |= bad
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    losses.append(loss)
                    spent.append(total)
                    progress(total, math.nan if diverged.all() else float(loss[~diverged].mean()), rate)
        finally:
            # accelerate keeps whatever it has prepared; a run that failed has cost what it has cost.
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()
            seconds = time.perf_counter() - started
            self.ledger.charge(
                phase,
                stage,
                total * replicas,
                usages=int(counts[0]),
                tokens=int(counts[1]),
                answer_tokens=int(counts[2]),
                seconds=seconds,
            )
        if not losses:
            raise BudgetError(
                f"{phase}/{stage}: {flops:.4g} FLOPs do not buy one step of {recipe.batch_size} examples, "
                f"which costs {cost:.4g}: raise the budget or lower batch_size"
            )
        return Fit(learner.trained(), np.stack(losses), np.array(spent), diverged, seconds)

    def _seed(self, seed: int) -> None:
        """Seed the global generators that dropout draws from (`torch.manual_seed` is slow without a GPU)."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _load(self, draws: Draws) -> Iterator[list[Batch]]:
        loader = DataLoader(
            _Steps(draws),
            batch_size=None,
            sampler=_Count(),
            num_workers=self.task.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            collate_fn=_identity,
        )
        yield from loader

    def _cost(self, pieces: list[Batch]) -> float:
        return sum(self.task.costs.usage(piece) for piece in pieces)

    def _backward(self, learner: nn.Module, pieces: list[Batch], replicas: int) -> np.ndarray:
        """Accumulate the gradient of the mean loss of each replica; returns those means, shape (K,)."""
        micro = [m for piece in pieces for m in piece.split(self.task.recipe.accumulate, replicas)]
        whole = sum(len(m) for m in micro) / replicas
        loss = np.zeros(replicas)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(learner):
                means = learner(batch.to(self.accelerator.device)).sum(dim=1) / whole
                self.accelerator.backward(means.sum())
            loss += means.detach().double().cpu().numpy()
        return loss

    def _non_finite(
        self, draws: Draws, pieces: list[Batch], loss: np.ndarray, norm: np.ndarray, step: int, rate: float
    ) -> NonFiniteError:
        ids = draws.ids(pieces)
        return NonFiniteError(
            f"loss {loss[0]:g} and gradient norm {norm[0]:g} at step {step} (learning rate {rate:.3g}, examples "
            f"{ids[:5]}{'...' if len(ids) > 5 else ''}): the weights were not updated; look at these examples, "
            "lower the learning rate or set clip_norm",
            step=step,
            ids=ids,
            learning_rate=rate,
        )


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
    """0, 1, 2, ..."""

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield step
            step += 1


def _identity(pieces: list[Batch]) -> list[Batch]:
    return pieces


def _optimizer(recipe: TrainConfig, parameters: list[nn.Parameter], *, scaled: bool) -> torch.optim.Optimizer:
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
    return Fit(models, losses, flops, diverged, sum(f.seconds for f in sound))
