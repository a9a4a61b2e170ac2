"""The loss of each example from what a model gives and from the labels: the signal of a step in another trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cads.errors import ConfigError
from cads.tasks.language.output_head import logits_at
from cads.tasks.language.task import answer_losses, mean_answer_losses
from cads.tasks.language.tokens import IGNORED, PAD_TO

ExampleLosses = Callable[[Any, Tensor | None], Tensor]
"""(outputs of the model, labels) -> the loss of each example, nats, shape (B,), with a gradient."""


def example_losses(outputs: Any, labels: Tensor | None) -> Tensor:
    """The loss of each example, nats, shape (B,): the same operations as those of `cads train`.

    Args:
        outputs: with `logits`, or the logits: (B, T, V) of tokens, or (B, C) of classes.
        labels: tokens, -100 where there is no loss, shape (B, T); or numbers of classes, int64, shape (B,).

    Raises:
        ConfigError: if labels and logits are neither.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if labels is not None and logits is not None and not labels.is_floating_point():
        if labels.dim() == 2 and logits.dim() == 3:
            return _sequence_losses(logits, labels)
        if labels.dim() == 1 and logits.dim() == 2:
            return functional.cross_entropy(logits, labels, reduction="none")
    shapes = [None if x is None else tuple(x.shape) for x in (logits, labels)]
    raise ConfigError(
        f"logits and labels of shapes {shapes} are those of no language model and no classifier: give `losses`, a "
        "function of outputs and labels that returns the loss of each example"
    )


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each sequence over its answer tokens. A token is predicted at the position before it."""
    length = labels.shape[1]
    answers = answer_columns(labels)
    positions = (answers - 1).clamp(min=0) + length * torch.arange(len(labels), device=labels.device)[:, None]
    at_answers = logits_at(logits, positions, (len(labels), length))
    # Nothing predicts the first token, whatever its label says.
    tokens = labels.gather(1, answers).masked_fill(answers == 0, IGNORED)
    return mean_answer_losses(*answer_losses(at_answers, tokens))


def answer_columns(labels: Tensor) -> Tensor:
    """The columns of the answer tokens of each sequence, filled up with 0, int64, shape (B, A); see `Tokens.batch`."""
    is_answer = labels != IGNORED
    is_answer[:, 0] = False
    counts = is_answer.sum(dim=1, keepdim=True)
    width = min(-(-max(1, int(counts.max())) // PAD_TO) * PAD_TO, labels.shape[1])
    columns = torch.argsort(is_answer.logical_not().byte(), dim=1, stable=True)[:, :width]
    return torch.where(torch.arange(width, device=labels.device) < counts, columns, 0)
