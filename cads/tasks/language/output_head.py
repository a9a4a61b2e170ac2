"""The output head of a causal language model at chosen positions: the logits that an answer needs, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from cads.errors import DataError
from cads.tasks.language.unpacked_rows import unpacked_rows


class HeadPositions:
    """The positions at which the output head computes during one call of a model.

    Attributes:
        positions: indices into the flattened positions of the call, shape (B, A).
        shape: rows and positions of the call.
        used: whether the hook of the head has restricted it to `positions`.
    """

    def __init__(self, positions: Tensor, shape: tuple[int, int]) -> None:
        self.positions, self.shape, self.used = positions, shape, False


_head_positions: ContextVar[HeadPositions | None] = ContextVar("head_positions", default=None)


def restrict_head(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of an output head: of the hidden states (R, T, D), those at `HeadPositions`, (B, A, D)."""
    head_positions = _head_positions.get()
    if head_positions is None or not args or args[0].dim() != 3 or tuple(args[0].shape[:2]) != head_positions.shape:
        return None
    head_positions.used = True
    return (args[0].flatten(0, 1)[head_positions.positions], *args[1:])


def logits_at(logits: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Of the logits of all positions those at `positions`, shape (B, A, V).

    Args:
        logits: shape (R, T or more, V).
        positions: indices into the R * T positions, shape (B, A).
        shape: (R, T).

    Raises:
        DataError: if there are not that many logits.
    """
    rows, length = shape
    if logits.dim() != 3 or logits.shape[1] < length:
        raise DataError(f"the model gives logits of shape {tuple(logits.shape)} for {rows} x {length} tokens")
    # Prompt tuning puts virtual tokens in front.
    return logits[:, -length:].flatten(0, 1)[positions]


def answer_logits(model: Any, inputs: Mapping[str, Tensor], positions: Tensor, *, full: bool = False) -> Tensor:
    """Logits of a causal language model at `positions` alone, shape (B, A, V).

    The head computes nothing else. Whatever a model does to its logits after the head it still does. If the head cannot
    be restricted, or `full` is set, all logits are computed and the others dropped, which gives the same numbers at a
    higher cost.

    Args:
        positions: indices into the flattened positions of the batch, shape (B, A).
    """
    rows, length = inputs["input_ids"].shape
    unpacked = unpacked_rows() if "attention_mask" not in inputs else nullcontext()
    if full:
        with unpacked:
            return logits_at(model(**inputs).logits, positions, (rows, length))
    head_positions = HeadPositions(positions, (rows, length))
    token = _head_positions.set(head_positions)
    try:
        with unpacked:
            logits: Tensor = model(**inputs).logits
    finally:
        _head_positions.reset(token)
    return logits if head_positions.used else logits_at(logits, positions, (rows, length))


def last_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The inputs of the head of a causal language model, (B, T, D); logits are computed at one position per row."""
    rows, length = input_ids.shape
    token = _head_positions.set(
        HeadPositions(torch.zeros(rows, 1, dtype=torch.int64, device=input_ids.device), (rows, length))
    )
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    finally:
        _head_positions.reset(token)
    # Prompt tuning puts virtual tokens in front.
    hidden: Tensor = output.hidden_states[-1][:, -length:]
    return hidden
