"""The gradient of one step, accumulated over micro-batches and summed over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cads.data.batch import Batch
from cads.runtime.processes import ProcessGroup
from cads.training.learners import Learner


@dataclass(frozen=True)
class Accumulated:
    """The losses of the step whose gradient was accumulated.

    Attributes:
        loss: mean over the batch of each replica, nats, shape (K,).
        example_losses: of the first `n_kept` examples of the batch, nats, shape (n,).
        positions: of these examples, int64, shape (n,).
    """

    loss: np.ndarray
    example_losses: np.ndarray
    positions: np.ndarray


class StepLosses:
    """The losses of one step, on the device until they are read: each transfer would make the host wait for it.

    Args:
        replicas: K.
        n_kept: number of examples of the first replica whose losses are kept.
        positions: of these examples, int64, shape (n,).
    """

    def __init__(self, replicas: int, n_kept: int, positions: np.ndarray) -> None:
        self._means: list[Tensor] = []
        self._kept: list[tuple[int, Tensor]] = []
        self._replicas, self._n_kept, self._positions = replicas, n_kept, positions
        self._summed: Accumulated | None = None

    def add(self, means: Tensor, losses: Tensor, offset: int) -> None:
        """Add a micro-batch.

        Args:
            means: its part of the mean loss of each replica, shape (K,).
            losses: of its examples, shape (K, B).
            offset: of its first example in the batch of a replica.
        """
        self._means.append(means.detach())
        if (count := min(losses.shape[1], self._n_kept - offset)) > 0:
            self._kept.append((offset, losses[0, :count].detach()))

    @property
    def on_device(self) -> list[Tensor]:
        """What is still to be transferred."""
        return [] if self._summed is not None else [*self._means, *(losses for _, losses in self._kept)]

    def are_finite(self) -> Tensor:
        """Whether all mean losses are finite, on the device, shape ()."""
        return torch.stack(self._means).isfinite().all()

    def read(self, values: Sequence[np.ndarray]) -> Accumulated:
        """The losses, of the `values` of `on_device`."""
        if self._summed is not None:
            return self._summed
        loss, example_losses = np.zeros(self._replicas), np.zeros(self._n_kept)
        for means in values[: len(self._means)]:
            loss += means
        for (offset, _), losses in zip(self._kept, values[len(self._means) :], strict=True):
            example_losses[offset : offset + len(losses)] = losses
        return Accumulated(loss, example_losses, self._positions)

    def replace_by(self, accumulated: Accumulated) -> None:
        """Replace the losses by sums over processes, which are on the host already."""
        self._summed = accumulated


def read_together(steps: Sequence[tuple[StepLosses, Tensor]]) -> list[tuple[Accumulated, np.ndarray]]:
    """Losses and gradient norms (shape (K,)) of some steps: one transfer for all of them."""
    counts = [len(losses.on_device) + 1 for losses, _ in steps]
    values = _transferred([x for losses, norms in steps for x in (*losses.on_device, norms)])
    results, start = [], 0
    for (losses, _), count in zip(steps, counts, strict=True):
        *own, norm = values[start : start + count]
        results.append((losses.read(own), norm))
        start += count
    return results


def _transferred(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """The values of some vectors on one device, float64, in one transfer."""
    if not tensors:
        return []
    device = tensors[0].device
    # Types are widened only: no value changes.
    values = torch.cat([x.reshape(-1).to(device) for x in tensors]).cpu().double().numpy()
    return np.split(values, np.cumsum([x.numel() for x in tensors])[:-1])


def mixes_examples(model: nn.Module) -> bool:
    """Whether the loss of an example depends on the others in its micro-batch: then a batch cannot be divided."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def accumulate(
    accelerator: Accelerator,
    learner: Learner,
    pieces: Sequence[Batch],
    replicas: int,
    group: ProcessGroup,
    n_kept: int = 0,
) -> StepLosses:
    """Leave the gradient of the mean loss of each replica in the parameters of `learner`.

    Each process computes its share of every micro-batch, which may be empty. The sum over the processes is the gradient
    of the whole batch. If examples of a micro-batch mix (`mixes_examples`), every process computes all of it, and the
    gradient is the mean over the processes. If the learner is collective, a process with an empty share computes one
    example with weight zero.

    Args:
        learner: gives losses of shape (K, B). pieces: micro-batches of one step; each has examples of all K replicas.
        group: the processes that train this model together.
        n_kept: number of examples of the first replica whose losses are returned; all, if examples have `log_odds`.
    """
    n = sum(len(piece) for piece in pieces)
    divisor = n / replicas
    weighed = pieces[0].log_odds is not None
    weight_sums: list[Tensor] = []
    divided = group.size > 1 and not mixes_examples(learner)
    if group.size > 1 and not divided:
        divisor *= group.size
    positions = np.concatenate([piece.positions[: len(piece) // replicas].numpy() for piece in pieces])[:n_kept]
    step_losses, offset = StepLosses(replicas, n_kept, positions), 0
    for piece in pieces:
        start, share = _share(piece, group) if divided else (0, piece)
        if share is not None:
            share = share.to(accelerator.device)
            losses = learner(share)
            means = losses.sum(dim=1) / divisor
            weights = example_weights(losses, share.log_odds)
            if weights is None:
                accelerator.backward(means.sum())
            else:
                weight_sums.append(weights.sum())
                accelerator.backward((losses * weights).sum() / divisor)
            step_losses.add(means, losses, offset + start)
        elif learner.is_collective:
            accelerator.backward(0.0 * learner(piece.split(len(piece))[0].to(accelerator.device)).sum())
        offset += len(piece) // replicas
    if group.size > 1:
        local = step_losses.read(_transferred(step_losses.on_device))
        example_losses = local.example_losses if divided else local.example_losses / group.size
        summed = Accumulated(*_sum_over_processes(learner, local.loss, example_losses, group), positions)
        step_losses.replace_by(summed)
    if weighed:
        # The gradient is that of the weighted mean, sum_i w_i l_i / sum_i w_i.
        if group.size == 1:
            total = torch.stack(weight_sums).sum()
        else:
            log_odds = torch.cat([piece.log_odds for piece in pieces if piece.log_odds is not None])
            weights = example_weights(torch.from_numpy(summed.example_losses), log_odds)
            assert weights is not None
            total = weights.sum().to(accelerator.device)
        gradients = [p.grad for p in learner.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, n / total.clamp(min=1.0))
    return step_losses


def example_weights(losses: Tensor, log_odds: Tensor | None) -> Tensor | None:
    """w_i = sigmoid(log_odds_i - l_i), without a gradient; of the shape of `losses`. None without log odds.

    This is one mirror-descent step of the Bernoulli probability of each example; see `cads.policies.label_odds`.
    """
    return None if log_odds is None else torch.sigmoid(log_odds - losses.detach())


def _share(piece: Batch, world: ProcessGroup) -> tuple[int, Batch | None]:
    """The offset of this process's share within a micro-batch, and the share; None if there are too few examples."""
    shares = piece.split(world.size)
    own_share = shares[world.rank] if world.rank < len(shares) else None
    return sum(len(share) for share in shares[: world.rank]), own_share


def _sum_over_processes(
    learner: Learner, loss: np.ndarray, example_losses: np.ndarray, world: ProcessGroup
) -> tuple[np.ndarray, np.ndarray]:
    """Sum losses and gradients over all processes; returns the losses, and leaves the gradients in the parameters."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    summed = world.all_reduce_sum(np.concatenate([loss, example_losses, learner.has_grad()]))
    loss, example_losses, with_gradient = np.split(summed, [len(loss), len(loss) + len(example_losses)])
    if not learner.is_collective:
        world.add_gradients(parameters, with_gradient > 0)
        return loss, example_losses
    for parameter, has_gradient in zip(parameters, with_gradient > 0, strict=True):
        if not has_gradient:
            parameter.grad = None
    return loss, example_losses
