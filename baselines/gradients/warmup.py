"""The warm-up of LESS: short training on a random part of the pool, one checkpoint an epoch, Adam's moments kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from baselines.random import random_scores
from cads.accounting.ledger import ROUNDING, SELECT, Ledger
from cads.data.batch import Batch
from cads.data.ids import rank_by_score
from cads.data.streams import ShuffledStream
from cads.data.token_batches import lengths
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, CheckpointError, ConfigError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.seeding import derive
from cads.task import Task
from cads.training.run_state import OPTIMIZER, WEIGHTS, RunSegment
from cads.training.trainer import Trainer

STAGE = "warm-up"
LEARNER = "model."
"""What the trainer puts before the names of the one model it trains."""
MOMENTS = ("/exp_avg", "/exp_avg_sq")
"""How the state of Adam names its moments, after the name of the parameter."""
PARTS = ("parameters", "first", "second", "buffers")
"""What a checkpoint holds, each by name."""
PLANNED_STEPS = 64
"""Batches, at least, that a plan prices where examples have lengths."""


@dataclass
class Checkpoint:
    """A model at the end of an epoch: what is trained of it, and the state of its optimizer, by parameter name.

    Attributes:
        parameters: the trainable parameters.
        first, second: moments of Adam, of the same shapes; empty if the optimizer has none.
        buffers: such as running means of batch normalisation.
        steps: updates so far. rate: mean learning rate of the epoch.
    """

    parameters: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    buffers: dict[str, Tensor]
    steps: int
    rate: float

    def load_into(self, model: nn.Module) -> None:
        """Give `model` these weights.

        Raises:
            CheckpointError: if it has other parameters.
        """
        state = model.state_dict(keep_vars=True)
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        if wanted != self.parameters.keys():
            odd = sorted(wanted ^ self.parameters.keys())
            raise CheckpointError(f"the checkpoint is of another model: {odd[:3]} stand on one side only")
        with torch.no_grad():
            for name, value in {**self.parameters, **self.buffers}.items():
                if name not in state or state[name].shape != value.shape:
                    raise CheckpointError(f"the checkpoint is of another model: {name!r} has shape {value.shape}")
                state[name].copy_(value)

    def need_moments(self) -> None:
        """Refuse a checkpoint without Adam's moments.

        Raises:
            CheckpointError: naming the parameters.
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
        """Of all tensors: two checkpoints with the same hash give the same features."""
        digest = hashlib.sha256(str(self.steps).encode())
        for part in PARTS:
            update_digest(digest, getattr(self, part))
        return digest.hexdigest()


@dataclass(frozen=True)
class Schedule:
    """How long the warm-up is.

    Attributes:
        examples: how many are drawn from the pool.
        steps: of one epoch, at least one. epochs: checkpoints.
    """

    examples: int
    steps: int
    epochs: int


def schedule(task: Task, share: float, epochs: int) -> Schedule:
    """A share of the pool, though at least a batch, in whole steps."""
    n, batch = len(task.pool), task.recipe.batch_size
    examples = min(n, max(batch, round(share * n)))
    return Schedule(examples, max(1, round(examples / batch)), epochs)


def planned_flops(task: Task, plan: Schedule) -> float:
    """What the warm-up costs, if its batches are padded as those of random parts of the pool are on average."""
    pool, batch, steps = task.pool, task.recipe.batch_size, plan.epochs * plan.steps
    if lengths(pool) is None:
        return steps * batch * task.costs.per_usage(pool, batch)
    rng = np.random.default_rng(0)
    drawn: list[Batch] = []
    while len(drawn) < PLANNED_STEPS:
        chosen = rng.choice(len(pool), plan.examples, replace=False)
        draws = BatchStream(pool, [ShuffledStream(chosen, 0)], batch)
        drawn += [b for step in range(min(plan.steps, PLANNED_STEPS)) for b in draws.step(step)]
    return steps * (float(np.mean([task.costs.usage(b) for b in drawn])) + task.costs.optimizer_step)


def warm_up(
    task: Task, plan: Schedule, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
) -> list[Checkpoint]:
    """Train fresh weights on `plan.examples` random examples; what is drawn does not depend on their order in the pool.

    Each epoch is a part of one training run: a run that is gone through again takes the epochs that are done from its
    journal, and goes on in the one that was under way.

    Returns:
        one checkpoint an epoch, on the CPU.

    Raises:
        BudgetError: if what the ledger has left does not pay for all epochs.
    """
    order = rank_by_score(task.pool.ids, random_scores(task.pool, derive(seed, STAGE)))
    chosen = np.argsort(order, kind="stable")[: plan.examples]
    draws = BatchStream(task.pool, [ShuffledStream(chosen, derive(seed, STAGE, "order"))], task.recipe.batch_size)
    steps = [sum(task.costs.usage(b) for b in draws.step(i)) for i in range(plan.epochs * plan.steps)]
    # A hair more than the steps cost, so that rounding does not lose the last of an epoch.
    ends = np.cumsum(np.add(steps, task.costs.optimizer_step))[plan.steps - 1 :: plan.steps] * ROUNDING
    trainer, model = Trainer(task, ledger, monitor), task.model(seed)
    found: list[Checkpoint] = []
    start: State | None = None
    for epoch, end in enumerate(ends.tolist()):
        segment = RunSegment(start, horizon=float(ends[-1]), keep=True)
        fit = trainer.fit(model, draws, end, seed=seed, phase=SELECT, stage=STAGE, segment=segment)
        if len(fit.flops) < (epoch + 1) * plan.steps:
            raise BudgetError(
                f"{STAGE}: epoch {epoch + 1} of {plan.epochs} ends after {len(fit.flops)} of "
                f"{(epoch + 1) * plan.steps} steps, since {ledger.left:.4g} FLOPs are left: raise the budget, or lower "
                "warmup_share or checkpoints"
            )
        start = fit.state
        assert start is not None
        # The learning rate of a step is that in the middle of what it costs.
        middles = fit.flops - np.diff(fit.flops, prepend=0.0) / 2
        rates = [task.recipe.rate(middle / ends[-1]) for middle in middles[-plan.steps :]]
        found.append(_checkpoint(fit.models[0], start, len(fit.flops), float(np.mean(rates))))
    return found


def _checkpoint(model: nn.Module, state: State, steps: int, rate: float) -> Checkpoint:
    """What a training run keeps to go on from, by the names of the model's parameters."""
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (WEIGHTS, OPTIMIZER)}
    for key, x in state.tensors.items():
        for prefix, part in parts.items():
            if key.startswith(prefix + LEARNER):
                part[key.removeprefix(prefix + LEARNER)] = x
    weights, kept = parts[WEIGHTS], model.state_dict().keys()
    first, second = (
        {n.removesuffix(moment): x for n, x in parts[OPTIMIZER].items() if n.endswith(moment)} for moment in MOMENTS
    )
    return Checkpoint(
        {n: weights[n] for n, p in model.named_parameters() if p.requires_grad},
        first,
        second,
        {n: weights[n] for n, _ in model.named_buffers() if n in kept},
        steps,
        rate,
    )


def need_adam(task: Task) -> None:
    """Refuse a task whose recipe leaves no moments of Adam.

    Raises:
        ConfigError: with the remedy.
    """
    if task.recipe.optimizer != "adamw":
        raise ConfigError(
            f"optimizer = {task.recipe.optimizer!r} keeps no moments of Adam, which this recipe of less needs: "
            "train with adamw, or give --options.recipe sgd"
        )


def update_digest(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to a digest: names, shapes, types and bytes, in the order of the names."""
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}\0".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
