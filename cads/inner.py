"""Short runs for the outer loop: what they cost, and training and measuring them on the target."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import nn

from cads.budget import SELECT, Ledger, PlannedLedger
from cads.checkpoint import State
from cads.draws import Draws, Stream
from cads.journal import perform, perform_apart
from cads.monitor import Monitor
from cads.optimizer import Rung, data_share, ladder
from cads.processes import current
from cads.rounds import Operation, Progress, Standing
from cads.scoring import planned_flops, score_pool
from cads.task import Measured, Objective, Pool, Task
from cads.trainer import Trainer

BY_EXAMPLE = "by_example"
"""What journals call the objective of each example."""


@dataclass
class Runs:
    """K inner runs.

    Attributes:
        objective: outer objective of each on the target, shape (K,); NaN where the run diverged.
        errors: standard error of the objective less that of the first run, over the examples of the target, which all
            runs share, shape (K,); 0 where the objective is not a mean over them.
        losses: training losses of each step, nats, shape (steps, K).
        flops: compute of one run after each step, shape (steps,).
        reached: training loss over the last steps, nats, shape (K,).
        models: the trained models.
        first: what the first run measured; None where it diverged.
    """

    objective: np.ndarray
    losses: np.ndarray
    flops: np.ndarray
    reached: np.ndarray
    models: list[nn.Module]
    errors: np.ndarray
    first: Measured | None = None

    def followed_by(self, more: Runs) -> Runs:
        """These and `more`, which were made for as many FLOPs and measured beside the first of these."""
        # As `cads.fit.side_by_side` has runs whose numbers of steps differ.
        steps = min(len(self.losses), len(more.losses))
        flops = [runs.flops[-steps:] for runs in (self, more)]
        return Runs(
            np.concatenate([self.objective, more.objective]),
            np.hstack([self.losses[-steps:], more.losses[-steps:]]),
            np.average(flops, axis=0, weights=[len(self.models), len(more.models)]),
            np.concatenate([self.reached, more.reached]),
            [*self.models, *more.models],
            np.concatenate([self.errors, more.errors]),
            self.first,
        )


class Purse:
    """What inner runs of a task cost, and the ledger that pays for them.

    Args:
        task: what is trained.
        ledger: charged for training and for measuring.
        held_out: whether theta is fitted to one half of the target and models are measured on the other. Where
            theta decides on single examples, a measure on what it was fitted to would flatter them.
    """

    def __init__(self, task: Task, ledger: Ledger, *, held_out: bool = False) -> None:
        self.task = task
        self.ledger = ledger
        self.fitted = self.measured = task.target
        if held_out and len(task.target) > 1:
            order = np.random.default_rng(0).permutation(len(task.target))
            self.fitted = task.target.part(np.sort(order[::2]), "target, half for theta")
            self.measured = task.target.part(np.sort(order[1::2]), "target, half to measure on")

    @property
    def step_flops(self) -> float:
        """One mean training step on the pool."""
        return self._step(self.task.pool)

    @cached_property
    def target_step_flops(self) -> float:
        """One step of theta on the dearest examples of the target, which may differ in length from those of the pool.

        What buys it buys a step, whatever is drawn first.
        """
        costs, batch_size = self.task.costs, self.task.recipe.batch_size
        return float(costs.usages(self.fitted).max() + costs.optimizer_step / batch_size) * batch_size

    def target_steps_flops(self, count: float) -> float:
        """`count` mean steps of theta on the target, or a step on its dearest examples if that takes more."""
        return max(self.target_step_flops, count * self._step(self.fitted))

    @property
    def measuring_flops(self) -> float:
        """Measuring one model on the target."""
        return self.task.costs.forward_pool(self.measured)

    def scoring_flops(self, count: int) -> float:
        """One forward pass over `count` examples of the pool."""
        return self._scoring_flops / len(self.task.pool) * count

    @cached_property
    def _scoring_flops(self) -> float:
        return planned_flops(self.task.costs.forward, self.task.pool)

    def target_flops(self, share: float, passes: float, training: float) -> float:
        """For theta: a share of the final training, but no more passes over the target than `passes`."""
        batch_size = self.task.recipe.batch_size
        return min(share * training, passes * self._step(self.fitted) / batch_size * len(self.fitted))

    def ladder(self, training: float, per_rung: float = 0.0) -> list[Rung]:
        """The short runs that what is left of the ledger buys for a final training of `training` FLOPs."""
        left, passes, pretrained = self.ledger.left, self.passes(training), self.task.pretrained
        return ladder(training, left, self.step_flops, self.measuring_flops, passes, per_rung, pretrained=pretrained)

    def deciding_rung(self, fidelity: float, training: float, runs: int) -> Rung:
        """One of runs that decide, on the data that `data_share` gives them."""
        data = data_share(fidelity, self.passes(training), decides=True, pretrained=self.task.pretrained)
        return Rung(fidelity, fidelity * training, data, runs)

    def passes(self, training: float) -> float:
        """Over the pool, that `training` FLOPs buy."""
        return training * self.task.recipe.batch_size / (self.step_flops * len(self.task.pool))

    def learn(self, flops: float) -> None:
        """Pay for moving a policy."""
        self.ledger.charge(SELECT, "policy", flops)

    def _step(self, pool: Pool) -> float:
        batch_size = self.task.recipe.batch_size
        return self.task.costs.per_usage(pool, batch_size) * batch_size


class Planned(Purse):
    """Charges for runs as `Inner` would, and runs nothing."""

    ledger: PlannedLedger

    def __init__(self, task: Task, limit: float, *, held_out: bool = False) -> None:
        super().__init__(task, PlannedLedger(limit), held_out=held_out)

    def run(self, runs: int, flops: float, *, stage: str) -> None:
        """Train `runs` models on the pool, and measure them."""
        self._train(self.task.pool, runs, flops, stage)
        self.ledger.charge(SELECT, f"{stage}, measuring", runs * self.measuring_flops)

    def losses(self, count: int, *, stage: str, flops: float | None = None) -> None:
        """Score `count` examples of the pool for `flops`, or at the price of a mean example."""
        tokens = round(count * self.task.costs.tokens_per_example(self.task.pool))
        self.ledger.charge(SELECT, stage, self.scoring_flops(count) if flops is None else flops, tokens=tokens)
        self.ledger.scored.append(self.task)

    def fit_target(self, flops: float, *, stage: str) -> None:
        """Train theta on the target."""
        self._train(self.fitted, 1, flops, stage)

    def _train(self, pool: Pool, runs: int, flops: float, stage: str) -> None:
        step = self._step(pool)
        steps = int(min(flops, self.ledger.left / runs) / step * (1 + 1e-12))
        usages = runs * steps * self.task.recipe.batch_size
        tokens = round(usages * self.task.costs.tokens_per_example(pool))
        self.ledger.charge(SELECT, stage, runs * steps * step, usages=usages, tokens=tokens)
        self.ledger.trained.append((self.task, runs))


class Inner(Purse):
    """Trains from the task's initial weights and measures on the target; all of it is charged to "select".

    Args:
        task: what is trained.
        ledger: charged for training and for measuring.
        monitor: shows progress.
        outer: the objective, by name or callable; None for the task's own.
        held_out: see `Purse`.
    """

    def __init__(
        self,
        task: Task,
        ledger: Ledger,
        monitor: Monitor,
        outer: str | Objective | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        super().__init__(task, ledger, held_out=held_out)
        self.monitor = monitor
        self._outer = outer
        self.trainer = Trainer(task, ledger, monitor)

    def run(
        self, streams: Sequence[Stream], flops: float, *, seed: int, stage: str, beside: Measured | None = None
    ) -> Runs:
        """Train one replica a stream for `flops` each, all from the same initial weights, and measure them.

        Equal seeds give equal initial weights and dropout, so that differences between replicas come from
        their data alone.

        Args:
            beside: what errors are of the difference to; None for what the first run measures.
        """
        models = [self.task.model(seed) for _ in streams]
        draws = Draws(self.task.pool, streams, self.task.recipe.batch_size)
        fit = self.trainer.fit_replicas(models, draws, flops, seed=seed, phase=SELECT, stage=stage)
        objective = np.full(len(models), np.nan)
        sound = np.flatnonzero(~fit.diverged)
        found = self.measure_each([fit.models[k] for k in sound], f"{stage}, measuring")
        errors = np.zeros(len(models))
        for k, measured in zip(sound, found, strict=True):
            objective[k] = measured.value
            errors[k] = paired_error(measured, beside or found[0])
        first = None if fit.diverged[0] else found[0]
        return Runs(objective, fit.losses, fit.flops, fit.training_loss, fit.models, errors, first)

    def measure_each(self, models: Sequence[nn.Module], stage: str) -> list[Measured]:
        """The outer objective of each model on the target; several processes measure one each at a time."""
        size = current().size
        if size == 1:
            return [self.measure(model, stage) for model in models]
        waves = [models[start : start + size] for start in range(0, len(models), size)]
        return [value for wave in waves for value in self._measure_wave(wave, stage)]

    def measure(self, model: nn.Module, stage: str) -> Measured:
        """The outer objective of one model on the target."""

        def compute(_: Progress) -> State:
            self.ledger.charge(SELECT, stage, self.measuring_flops)
            with self.ledger.timed(SELECT, stage):
                return self._objective(model)

        return _measured(perform("measuring", [stage], self.ledger, compute))

    def _measure_wave(self, models: Sequence[nn.Module], stage: str) -> list[Measured]:
        """Measure at most one model a process."""
        rank = current().rank

        def part(_: Progress, standing: list[Standing]) -> State:
            if rank >= len(models) or standing[rank].finished:
                return State()
            started = time.perf_counter()
            found = self._objective(models[rank])
            return State({**found.values, "seconds": time.perf_counter() - started}, found.tensors)

        def join(parts: list[State]) -> list[State | None]:
            return [state if state.values else None for state in parts[: len(models)]]

        def settle(state: State) -> None:
            self.ledger.charge(SELECT, stage, self.measuring_flops)
            # They are measured at the same time.
            self.ledger.charge(SELECT, stage, 0.0, seconds=state.values.pop("seconds") / len(models))

        operations = [Operation("measuring", [stage], settle) for _ in models]
        states = perform_apart(operations, self.ledger, part, join)
        return [_measured(state) for state in states]

    def _objective(self, model: nn.Module) -> State:
        device = self.trainer.accelerator.device
        found = self.task.objective(model.to(device), self._outer, self.measured)
        by_example = {} if found.by_example is None else {BY_EXAMPLE: torch.from_numpy(found.by_example)}
        return State({"objective": found.value}, by_example)

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
        )

    def fit_target(
        self,
        flops: float,
        *,
        seed: int,
        stage: str,
        model: nn.Module | None = None,
        stream: Stream | None = None,
        target_fraction: float = 1.0,
    ) -> nn.Module:
        """theta: a model trained on the target (or its half) for `flops`.

        Args:
            model: where to go on from; None for fresh weights.
            stream: of pool examples that fill up each batch beside `target_fraction` of the target.
        """
        draws = Draws(
            self.task.pool,
            [] if stream is None else [stream],
            self.task.recipe.batch_size,
            target=self.fitted,
            target_fraction=target_fraction,
            seed=seed,
        )
        start = self.task.model(seed) if model is None else model
        fit = self.trainer.fit(start, draws, flops, seed=seed, phase=SELECT, stage=stage)
        return fit.models[0]


def _measured(state: State) -> Measured:
    by_example = state.tensors.get(BY_EXAMPLE)
    return Measured(state.number("objective"), None if by_example is None else by_example.numpy())


def paired_error(one: Measured, other: Measured) -> float:
    """Standard error of the difference of two objectives that are means over the same examples; else 0."""
    if one.by_example is None or other.by_example is None or len(one.by_example) < 2:
        return 0.0
    difference = one.by_example - other.by_example
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))
