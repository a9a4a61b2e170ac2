"""The state of a training run: weights, optimizer, losses and FLOPs spent, to be stored and resumed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.errors import CheckpointError
from cads.runtime.checkpoint import State
from cads.training.learners import Learner
from cads.training.rider import Rider

WEIGHTS, OPTIMIZER, RIDER = "weights/", "optimizer/", "rider/"
EXAMPLE_LOSSES = "example_losses"
VALIDATION, RECORD = "validation", ("step", "flops", "seconds", "metrics")
"""Key of the measurements on the target, and the fields of each."""


@dataclass(frozen=True)
class RunSegment:
    """One segment of a training run.

    Attributes:
        start: the state at the end of the segment before; None for the first.
        horizon: FLOPs of the whole run, over which the learning rate is scheduled; None if this segment is the last.
        keep: whether its `TrainResult` holds the state to resume from, and the loss of each example.
        planned: the horizon of the segments before, if this one ends the run earlier than they expected: the rate falls
            from where they left it to 0. None: the same.
    """

    start: State | None = None
    horizon: float | None = None
    keep: bool = False
    planned: float | None = None

    def journal_key(self) -> list[Any]:
        """What this segment adds to the key of an operation; empty for a run in one segment."""
        if self == FULL_RUN:
            return []
        key = [None if self.start is None else self.start.digest, self.horizon, self.keep]
        return key if self.planned is None else [*key, self.planned]


FULL_RUN = RunSegment()
"""A run in one segment."""


def read_already() -> bool:
    """No step is unread."""
    return True


@dataclass
class TrainState:
    """The state of one training run of K replicas.

    Attributes:
        learner: what is trained.
        replicas: K.
        scaler: of the loss, where the precision needs one.
        losses: mean loss of the batch of each step, nats, K a step; NaN where a batch was skipped.
        spent: FLOPs of one replica after each step.
        total: FLOPs of one replica so far, including those of a step that failed.
        counts: usages, tokens and answer tokens so far, int64, shape (3,).
        diverged: replicas that met a loss or gradient that is not finite, bool, shape (K,).
        skipped: batches that were skipped because of such a loss or gradient.
        overflows: latest steps in a row that the scaler has skipped, since their gradients were not finite.
        seconds: wall-clock time, in all processes that worked on it.
        example_losses: the latest loss of each pool example in its own training step, nats, shape (N,), NaN before
            the first; None if they are not kept.
        failure: why it stopped early, or None.
        rider: draws its batches and learns from its losses, or None.
        validation: measurements on the target in this segment; see `cads.training.validation`.
        settle: reads and records steps that were taken and are not in `losses` yet; tells whether the last is good.
        is_current: whether this object already follows the run; if not, its state is still to be restored, from a
            journal or another process.
    """

    learner: Learner
    replicas: int
    scaler: torch.amp.GradScaler | None = None
    losses: list[np.ndarray] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    total: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    diverged: np.ndarray = field(init=False)
    skipped: int = 0
    overflows: int = 0
    seconds: float = 0.0
    failure: dict[str, Any] | None = None
    is_current: bool = False
    example_losses: np.ndarray | None = None
    rider: Rider | None = None
    validation: list[dict[str, Any]] = field(default_factory=list)
    settle: Callable[[], bool] = read_already
    _charged_before: tuple[float, np.ndarray] = field(default_factory=lambda: (0.0, np.zeros(3, dtype=np.int64)))
    _buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.diverged = np.zeros(self.replicas, dtype=bool)

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return len(self.losses)

    @property
    def skipped_in_a_row(self) -> int:
        """Batches since the last update of the weights, skipped by the run or by the scaler."""
        bad = sum(1 for _ in itertools.takewhile(lambda loss: np.isnan(loss).all(), reversed(self.losses)))
        return max(bad, self.overflows)

    def mean_loss(self, step: int) -> float:
        """Mean over the replicas that have not diverged, nats; NaN if all have."""
        return math.nan if self.diverged.all() else float(self.losses[step][~self.diverged].mean())

    def use(self, learner: Learner) -> None:
        """Train `learner` from now on, which holds the same weights in another form."""
        self.learner = learner

    def mark_current(self) -> None:
        """This object follows the run from now on: no state needs to be restored into it."""
        self.is_current = True

    def count_overflow(self, finite: bool) -> None:
        """Count a step whose gradients overflowed, or begin to count anew after a `finite` one."""
        self.overflows = 0 if finite else self.overflows + 1

    def charge_step(self, cost: float, pieces: Sequence[Batch]) -> None:
        """Count a step on `pieces`, which costs `cost` FLOPs a replica."""
        self.total += cost
        self.counts += np.sum([(len(p), p.tokens, p.answer_tokens) for p in pieces], axis=0)

    def remember_buffers(self) -> None:
        """Copy the buffers that a forward pass changes (running means), before a step; boolean masks never change."""
        self._buffers = [(x, x.clone()) for x in self.learner.buffers() if x.dtype != torch.bool]

    @property
    def remembered_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers, and what they were before the last step."""
        return self._buffers

    def put_buffers_back(self) -> None:
        """Undo the changes that the forward pass on a bad batch made to buffers."""
        for x, before in self._buffers:
            x.copy_(before)

    def record_step(self, loss: np.ndarray, total: float) -> None:
        """Record a finished step, its `loss`, nats, shape (K,), and the FLOPs of one replica after it."""
        self.losses.append(loss)
        self.spent.append(total)

    def fail(self, ids: list[str], loss: float, norm: float, rate: float) -> None:
        """Record a failure at this step, on the examples `ids`, at the learning rate `rate`, for `NonFiniteError`."""
        step, skipped = self.steps, self.skipped_in_a_row
        after = f", after {skipped} batches skipped in a row" if skipped else ""
        self.failure = {
            "message": f"loss {loss:g} and gradient norm {norm:g} at step {step} (learning rate {rate:.3g}, examples "
            f"{ids[:5]}{'...' if len(ids) > 5 else ''}){after}: "
            "the weights were not updated; look at these examples, lower the learning rate or set clip_norm",
            "step": step,
            "ids": ids,
            "learning_rate": rate,
        }

    def record_example_losses(self, positions: np.ndarray, losses: np.ndarray) -> None:
        """Record the finite ones of the losses (nats, shape (n,)) of the pool examples at `positions`."""
        if self.example_losses is not None:
            finite = np.isfinite(losses)
            self.example_losses[positions[finite]] = losses[finite]

    def charge(self, ledger: Ledger, phase: str, stage: str) -> None:
        """Charge a ledger for the run, without what was spent before `resume_from`."""
        total_before, counts_before = self._charged_before
        usages, tokens, answers = (self.counts - counts_before).tolist()
        flops = (self.total - total_before) * self.replicas
        ledger.charge(phase, stage, flops, usages=usages, tokens=tokens, answer_tokens=answers, seconds=self.seconds)

    def state(self, optimizer: torch.optim.Optimizer | None, *, everywhere: bool = True) -> State:
        """All that is needed to resume the run; without the optimizer, all that a finished run needs.

        Frozen weights are left out: training does not change them.

        Args:
            everywhere: whether sharded tensors are gathered in all processes, or in the first alone.
        """
        self.settle()
        values = {
            "total": self.total,
            "counts": self.counts.tolist(),
            "diverged": self.diverged.tolist(),
            "skipped": self.skipped,
            "seconds": self.seconds,
            "failure": self.failure,
            # All runs of a trainer share one scaler: the next run begins with the scale at the end of this one.
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        if self.scaler is not None:
            values["overflows"] = self.overflows
        if self.validation:
            values[VALIDATION] = list(self.validation)
        changed = [(f"{WEIGHTS}{name}", x) for name, x in changing(self.learner)]
        if optimizer is not None:
            changed += [(f"{OPTIMIZER}{name}", x) for name, x in optimizer_state(self.learner, optimizer).items()]
        tensors = self.learner.gather(changed, everywhere=everywhere)
        tensors["losses"] = torch.from_numpy(np.array(self.losses, dtype=np.float64).reshape(-1, self.replicas))
        tensors["spent"] = torch.tensor(self.spent, dtype=torch.float64)
        if self.example_losses is not None:
            tensors[EXAMPLE_LOSSES] = torch.from_numpy(self.example_losses)
        if self.rider is not None:
            tensors |= {RIDER + name: x for name, x in self.rider.state().items()}
        return State(values, tensors)

    def resume_from(self, start: State, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore the end of an earlier segment of the run, which has already been charged.

        Raises:
            CheckpointError: if it is the state of another model.
        """
        # An optimizer changes the tensors it is given in place: `start` must stay as it is.
        self.restore(start.detached(), optimizer)
        self.seconds = 0.0
        self._charged_before = (self.total, self.counts.copy())

    def restore(self, state: State, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore `state`.

        Raises:
            CheckpointError: if it is the state of another model.
        """
        try:
            self._restore(state, optimizer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the state of a training run is corrupt: {type(error).__name__}: {error}") from error

    def _restore(self, state: State, optimizer: torch.optim.Optimizer | None) -> None:
        values, tensors = state.values, state.tensors
        current = dict(changing(self.learner))
        _check_names(set(current), {n.removeprefix(WEIGHTS) for n in tensors if n.startswith(WEIGHTS)})
        with torch.no_grad():
            for name, x in current.items():
                stored = tensors[WEIGHTS + name]
                if stored.shape != x.shape or stored.dtype != x.dtype:
                    raise CheckpointError(
                        f"the weights {name} have shape {tuple(x.shape)} and type {x.dtype}, in the checkpoint "
                        f"{tuple(stored.shape)} and {stored.dtype}: it is of another model"
                    )
                x.copy_(self.learner.shard(stored, x))
        if optimizer is not None:
            load_optimizer_state(
                self.learner,
                optimizer,
                {n.removeprefix(OPTIMIZER): x for n, x in tensors.items() if n.startswith(OPTIMIZER)},
            )
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])
        self.losses = list(tensors["losses"].numpy().reshape(-1, self.replicas))
        self.spent = tensors["spent"].tolist()
        self.total = float(values["total"])
        self.counts = np.array(values["counts"], dtype=np.int64).reshape(3)
        self.diverged = np.array(values["diverged"], dtype=bool).reshape(self.replicas)
        self.skipped, self.seconds = int(values["skipped"]), float(values["seconds"])
        self.overflows = int(values.get("overflows", 0))
        self.failure = _checked(values["failure"])
        self.validation = [{name: record[name] for name in RECORD} for record in values.get(VALIDATION, [])]
        if self.example_losses is not None and EXAMPLE_LOSSES in tensors:
            self.example_losses = tensors[EXAMPLE_LOSSES].numpy().reshape(self.example_losses.shape).copy()
        rider_tensors = {n.removeprefix(RIDER): x for n, x in tensors.items() if n.startswith(RIDER)}
        if self.rider is not None and rider_tensors:
            self.rider.restore(rider_tensors)
        if len(self.losses) != len(self.spent) or not (self.losses or self.failure):
            raise ValueError(f"{len(self.losses)} losses for {len(self.spent)} steps")


def changing(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a learner that training changes, by name: trainable parameters and buffers."""
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    yield from learner.named_buffers()


def optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state by `<parameter>/<key>`, such as `model.0.weight/exp_avg_sq`."""
    tensors = {}
    for name, parameter in learner.named_parameters():
        for key, x in optimizer.state.get(parameter, {}).items():
            if isinstance(x, Tensor):
                tensors[f"{name}/{key}"] = x
    return tensors


def load_optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    """Restore what `optimizer_state` returned.

    Raises:
        CheckpointError: if `stored` names a parameter that the learner lacks, or one of another shape.
    """
    parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    _check_names(set(parameters), {name.rpartition("/")[0] for name in stored}, allow_missing=True)
    for name, x in stored.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if x.dim() and x.shape != parameter.shape:
            shape = tuple(x.shape)
            raise CheckpointError(f"the optimizer's {key} of {owner} has shape {shape}: it is of another model")
        optimizer.state[parameter][key] = learner.shard(x, parameter)


def _checked(failure: Any) -> dict[str, Any] | None:
    """Return `failure` if its fields are the arguments of `NonFiniteError`, or it is None."""
    if failure is None:
        return None
    fields = {"message": str, "step": int, "ids": list, "learning_rate": float}
    if set(failure) != set(fields) or not all(isinstance(failure[name], kind) for name, kind in fields.items()):
        raise TypeError(f"failure = {failure!r}")
    return dict(failure)


def _check_names(current: set[str], stored: set[str], *, allow_missing: bool = False) -> None:
    unexpected, missing = sorted(stored - current), [] if allow_missing else sorted(current - stored)
    if unexpected or missing:
        raise CheckpointError(
            f"the checkpoint is of another model: it has {unexpected[:3] or 'nothing'} beyond this one, and lacks "
            f"{missing[:3] or 'nothing'}"
        )
