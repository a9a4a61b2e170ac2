"""The gradient of one step: piece by piece, to save memory, and process by process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cads.data.batch import Batch
from cads.runtime.processes import ProcessGroup
from cads.training.learners import Learner


@dataclass(frozen=True)
class Accumulated:
    """What the gradient of a step has told beside.

    Attributes:
        loss: mean over the batch of each replica, nats, shape (K,).
        each: of the first examples of the batch, as many as were asked for, nats, shape (n,).
        positions: of these examples, int64, shape (n,).
    """

    loss: np.ndarray
    example_losses: np.ndarray
    positions: np.ndarray


def mixes_examples(model: nn.Module) -> bool:
    """Whether the loss of an example depends on the others in its piece: then a batch cannot be divided."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def accumulate(
    accelerator: Accelerator,
    learner: Learner,
    pieces: Sequence[Batch],
    replicas: int,
    group: ProcessGroup,
    n_kept: int = 0,
) -> Accumulated:
    """Leave the gradient of the mean loss of each replica in the parameters of `learner`.

    Each process takes its share of every piece, which may be empty, and the sum over the processes is the gradient of
    the whole batch. Where examples of a piece mix, all take the whole, and the mean over them counts. Where a pass
    is one of all processes, those with an empty share take an example that counts nothing.

    Args:
        learner: gives losses of shape (K, B). pieces: of one step, each with its share of all K replicas.
        world: the processes that train this model together.
        n_kept: how many examples of the first replica to tell the losses of.
    """
    whole = sum(len(piece) for piece in pieces) / replicas
    divided = group.size > 1 and not mixes_examples(learner)
    if group.size > 1 and not divided:
        whole *= group.size
    loss, each, place = np.zeros(replicas), np.zeros(n_kept), 0
    for piece in pieces:
        begin, own = _share(piece, group) if divided else (0, piece)
        if own is not None:
            losses = learner(own.to(accelerator.device))
            means = losses.sum(dim=1) / whole
            accelerator.backward(means.sum())
            room = each[place + begin : place + begin + losses.shape[1]]
            if len(room):
                room[:] = losses[0, : len(room)].detach().double().cpu().numpy()
            loss += means.detach().double().cpu().numpy()
        elif learner.is_collective:
            accelerator.backward(0.0 * learner(piece.split(len(piece))[0].to(accelerator.device)).sum())
        place += len(piece) // replicas
    if group.size > 1:
        loss, each = _added(learner, loss, each if divided else each / group.size, group)
    positions = np.concatenate([piece.positions[: len(piece) // replicas].numpy() for piece in pieces])[:n_kept]
    return Accumulated(loss, each, positions)


def _share(piece: Batch, world: ProcessGroup) -> tuple[int, Batch | None]:
    """Where the share of this process begins in a piece, and the share; None if there are too few examples."""
    shares = piece.split(world.size)
    own = shares[world.rank] if world.rank < len(shares) else None
    return sum(len(share) for share in shares[: world.rank]), own


def _added(learner: Learner, loss: np.ndarray, each: np.ndarray, world: ProcessGroup) -> tuple[np.ndarray, np.ndarray]:
    """The losses of all processes; their gradients are added up in place."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    whole = world.all_reduce_sum(np.concatenate([loss, each, learner.has_grad()]))
    loss, each, with_gradient = np.split(whole, [len(loss), len(loss) + len(each)])
    if not learner.is_collective:
        world.add_gradients(parameters, with_gradient > 0)
        return loss, each
    for parameter, there in zip(parameters, with_gradient > 0, strict=True):
        if not there:
            parameter.grad = None
    return loss, each
