"""The cross-entropy of large vocabularies where their logits stand, when gradients are taken on a CPU.

torch writes three more tables of their size, forward and backward; memory that is new each time costs more than what is
computed in it. For 574 positions of 49,152 logits this takes 0.04 s on one core, and torch 0.2, or 0.9 within a pass of
a model of 135M parameters, of which that is a tenth (torch 2.14).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from baselines.kernels.matmul import FROZEN_LINEAR
from baselines.kernels.override import Replaced

LARGE = 2**20
"""Logits, 4 MB as float32, above which their table is not written again; and of rows that are computed at once."""
FORGETFUL = {"MmBackward0", "AddmmBackward0", "ToCopyBackward0", FROZEN_LINEAR}
"""Steps of autograd that do not need what they wrote, so that it may be overwritten."""
DEFAULTS = {name: p.default for name, p in inspect.signature(functional.cross_entropy).parameters.items()}
"""Of the options of `cross_entropy`, all of which it passes on to modes."""
VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SliceBackward0"}
"""Steps that wrote nothing."""


class LogitsInPlace(Replaced):
    """In the block, `cross_entropy` of large tables of logits of tokens is `losses_in_place`, if nothing else needs
    them to go back; others are left to torch."""

    def __init__(self) -> None:
        super().__init__(functional.cross_entropy)

    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `baselines.kernels.override.Replaced`."""
        given = {name: value for name, value in kwargs.items() if value != DEFAULTS[name]}
        ignored = given.pop("ignore_index", DEFAULTS["ignore_index"])
        if given != {"reduction": "none"} or len(args) != 2 or not _is_large(*args) or not _is_forgotten(args[0]):
            return None
        return losses_in_place(args[0], args[1], ignored)


def losses_in_place(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """`torch.nn.functional.cross_entropy(..., reduction="none")`, which overwrites the logits; to go back through once.

    Args:
        logits: (N, V), contiguous. labels: (N,), each in 0 .. V-1 or `ignore_index`, where the loss is 0.

    Returns:
        nats, shape (N,).
    """
    losses: Tensor = _InPlace.apply(logits, labels, ignore_index)
    return losses


class _InPlace(torch.autograd.Function):
    """The gradient of a row is softmax(logits) - onehot(label), times that of its loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        # Shares the version with `logits`: whoever has kept those for the way back is told that they have changed.
        table = logits.detach()
        counted = labels != ignore_index
        places = torch.where(counted, labels, 0)[:, None]
        losses = -table.gather(1, places)
        total = torch.empty_like(losses)
        rows = max(1, LARGE // table.shape[1])
        for part, its_total, its_loss in zip(*(x.split(rows) for x in (table, total, losses)), strict=True):
            largest = part.amax(dim=1, keepdim=True)
            its_total.copy_(part.sub_(largest).exp_().sum(dim=1, keepdim=True))
            its_loss.add_(largest + its_total.log())
        ctx.save_for_backward(table, total, places, counted)
        return losses.squeeze(1).mul_(counted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        table, total, places, counted = ctx.saved_tensors
        gradient = (gradient * counted)[:, None]
        table.mul_(gradient / total).scatter_add_(1, places, -gradient)
        return table, None, None


def _is_large(logits: Any, labels: Any) -> bool:
    return (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.dim() == 2
        and logits.numel() > LARGE
        and logits.dtype == torch.float32
        and logits.device.type == "cpu"
        and logits.is_contiguous()
        and labels.dim() == 1
    )


def _is_forgotten(logits: Tensor) -> bool:
    """Whether autograd, which has recorded how the logits arose, does not need their values."""
    step = logits.grad_fn
    while step is not None and step.name() in VIEWS:
        step = step.next_functions[0][0]
    return step is not None and torch.is_grad_enabled() and step.name() in FORGETFUL
