"""The warm-up of LESS: short training on a random part of the pool; each epoch ends with weights and Adam's moments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from baselines.random import random_scores
from cads.accounting.ledger import ROUNDING, SELECT, Ledger, PlannedLedger
from cads.data.batch import Batch
from cads.data.hashing import add_tensors
from cads.data.ids import rank_by_score
from cads.data.streams import ShuffledStream
from cads.data.token_batches import by_id, lengths
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, CheckpointError, ConfigError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.sharded import load_part
from cads.seeding import derive
from cads.task import Task
from cads.training.run_state import OPTIMIZER, WEIGHTS, RunSegment
from cads.training.trainer import Trainer

STAGE = "warm-up"
LEARNER = "model."
"""Prefix that the trainer puts before the parameter names of its model."""
MOMENTS = ("/exp_avg", "/exp_avg_sq")
"""Suffixes of the first and second moment in Adam's state, after the name of the parameter."""
PARTS = ("parameters", "first", "second", "buffers")
"""The fields of a checkpoint that hold tensors by name."""
PLANNED_STEPS = 64
"""Minimum number of batches whose cost a plan averages if examples have lengths."""


@dataclass
class Checkpoint:
    """A model at the end of an epoch: its trainable parameters, buffers and optimizer state, by parameter name.

    Attributes:
        parameters: the trainable parameters.
        first, second: moments of Adam, of the same shapes; empty if the optimizer has none.
        buffers: for example running means of batch normalisation.
        steps: number of updates so far. rate: mean learning rate of the epoch.
    """

    parameters: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    buffers: dict[str, Tensor]
    steps: int
    rate: float

    def load_into(self, model: nn.Module) -> None:
        """Load these weights into `model`.

        Raises:
            CheckpointError: if `model` has other parameters.
        """
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        if trainable != self.parameters.keys():
            unmatched = sorted(trainable ^ self.parameters.keys())
            raise CheckpointError(f"the checkpoint is of another model: only one of the two has {unmatched[:3]}")
        load_part(model, {**self.parameters, **self.buffers})

    def need_moments(self) -> None:
        """Refuse a checkpoint without Adam's moments.

        Raises:
            CheckpointError: if moments are missing; the message names the parameters.
        """
        missing = sorted(self.parameters.keys() - (self.first.keys() & self.second.keys()))
        if missing:
            raise CheckpointError(
                f"the checkpoint of step {self.steps} has no moments of Adam for {len(missing)} of "
                f"{len(self.parameters)} parameters, such as {missing[:3]}: train it with adamw and keep the "
                "optimizer's state, or rank with recipe = 'sgd'"
            )

    @property
    def content_hash(self) -> str:
        """Hash of all tensors and the step: two checkpoints with the same hash give the same features."""
        digest = hashlib.sha256(str(self.steps).encode())
        for part in PARTS:
            add_tensors(digest, getattr(self, part))
        return digest.hexdigest()


@dataclass(frozen=True)
class Schedule:
    """The length of the warm-up: a stage of a ranking, which `warm_up` carries out.

    Attributes:
        examples: number of examples drawn from the pool.
        steps: steps per epoch, at least one. epochs: number of epochs, and so of checkpoints.
    """

    examples: int
    steps: int
    epochs: int

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """With the padding of random parts of the pool; see `cads.scoring.stages.Stage`."""
        usages = self.epochs * self.steps * task.recipe.batch_size
        tokens = round(usages * task.costs.tokens_per_example(task.pool))
        ledger.charge(SELECT, STAGE, warmup_flops(task, self), usages=usages, tokens=tokens)
        ledger.trained.append((task, 1))


def schedule(task: Task, share: float, epochs: int) -> Schedule:
    """A share of the pool, but at least one batch, in whole steps."""
    n, batch_size = len(task.pool), task.recipe.batch_size
    examples = min(n, max(batch_size, round(share * n)))
    return Schedule(examples, max(1, round(examples / batch_size)), epochs)


def warmup_flops(task: Task, plan: Schedule) -> float:
    """FLOPs of the warm-up, if its batches are padded like those of random parts of the pool on average."""
    pool, batch_size, steps = task.pool, task.recipe.batch_size, plan.epochs * plan.steps
    if lengths(pool) is None:
        return steps * batch_size * task.costs.per_usage(pool, batch_size)
    rng, ids = np.random.default_rng(0), by_id(pool)
    batches: list[Batch] = []
    while len(batches) < PLANNED_STEPS:
        positions = ids[rng.choice(len(pool), plan.examples, replace=False)]
        stream = BatchStream(pool, [ShuffledStream(positions, 0)], batch_size)
        batches += [b for step in range(min(plan.steps, PLANNED_STEPS)) for b in stream.step(step)]
    return steps * (float(np.mean([task.costs.usage(b) for b in batches])) + task.costs.optimizer_step)


def warm_up(
    task: Task, plan: Schedule, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
) -> list[Checkpoint]:
    """Train fresh weights on `plan.examples` random examples; the draw does not depend on the order of the pool.

    Each epoch is a segment of one training run. A resumed run takes finished epochs from its journal, and continues the
    epoch that was interrupted.

    Returns:
        one checkpoint per epoch, on the CPU.

    Raises:
        BudgetError: if the FLOPs left in the ledger do not pay for all epochs.
    """
    rank = rank_by_score(task.pool.ids, random_scores(task.pool, derive(seed, STAGE)))
    positions = np.argsort(rank, kind="stable")[: plan.examples]
    stream = BatchStream(task.pool, [ShuffledStream(positions, derive(seed, STAGE, "order"))], task.recipe.batch_size)
    step_flops = [sum(task.costs.usage(b) for b in stream.step(i)) for i in range(plan.epochs * plan.steps)]
    # Slightly more than the steps cost, so that rounding does not lose the last step of an epoch.
    epoch_ends = np.cumsum(np.add(step_flops, task.costs.optimizer_step))[plan.steps - 1 :: plan.steps] * ROUNDING
    trainer, model = Trainer(task, ledger, monitor), task.model(seed)
    checkpoints: list[Checkpoint] = []
    start: State | None = None
    for epoch, end in enumerate(epoch_ends.tolist()):
        segment = RunSegment(start, horizon=float(epoch_ends[-1]), keep=True)
        fit = trainer.fit(model, stream, end, seed=seed, phase=SELECT, stage=STAGE, segment=segment)
        if len(fit.flops) < (epoch + 1) * plan.steps:
            raise BudgetError(
                f"{STAGE}: epoch {epoch + 1} of {plan.epochs} ends after {len(fit.flops)} of "
                f"{(epoch + 1) * plan.steps} steps, since {ledger.left:.4g} FLOPs are left: raise the budget, or lower "
                "warmup_share or checkpoints"
            )
        start = fit.state
        assert start is not None
        # The learning rate of a step is taken at the midpoint of its FLOPs.
        midpoints = fit.flops - np.diff(fit.flops, prepend=0.0) / 2
        rates = [task.recipe.rate(midpoint / epoch_ends[-1]) for midpoint in midpoints[-plan.steps :]]
        checkpoints.append(_checkpoint(fit.models[0], start, len(fit.flops), float(np.mean(rates))))
    return checkpoints


def _checkpoint(model: nn.Module, state: State, steps: int, rate: float) -> Checkpoint:
    """The resume state of a training run as a checkpoint, by the names of the model's parameters."""
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (WEIGHTS, OPTIMIZER)}
    for key, tensor in state.tensors.items():
        for prefix, part in parts.items():
            if key.startswith(prefix + LEARNER):
                part[key.removeprefix(prefix + LEARNER)] = tensor
    weights, persistent = parts[WEIGHTS], model.state_dict().keys()
    first, second = (
        {n.removesuffix(moment): x for n, x in parts[OPTIMIZER].items() if n.endswith(moment)} for moment in MOMENTS
    )
    return Checkpoint(
        {n: weights[n] for n, p in model.named_parameters() if p.requires_grad},
        first,
        second,
        {n: weights[n] for n, _ in model.named_buffers() if n in persistent},
        steps,
        rate,
    )


def need_adam(task: Task) -> None:
    """Refuse a task whose optimizer has no moments of Adam.

    Raises:
        ConfigError: if the optimizer is not adamw; the message says what to do.
    """
    if task.recipe.optimizer != "adamw":
        raise ConfigError(
            f"optimizer = {task.recipe.optimizer!r} keeps no moments of Adam, which this recipe of less needs: "
            "train with adamw, or give --options.recipe sgd"
        )
