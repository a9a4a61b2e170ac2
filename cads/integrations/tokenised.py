"""A task of tokenised sequences and a model that is there already, such as those of another trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from cads.data.pool import Pool
from cads.errors import DataError
from cads.recipe import TrainConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.language.settings import LanguageSettings, Weighting
from cads.tasks.language.task import LanguageTask
from cads.tasks.language.tokens import IGNORED, Tokens

log = logging.getLogger(__name__)

USED = ("input_ids", "labels", "attention_mask")
"""Columns that are read; an attention mask says nothing beyond the length of a sequence."""

TokenRows = Iterable[Mapping[str, Any]]
"""Rows with `input_ids`, and `labels` that are -100 where there is no loss: a `datasets.Dataset`, or a list."""


class TokenisedTask(LanguageTask):
    """A language task on sequences of tokens, with the weights of a given model as initial weights."""

    def describe(self, pool: Pool, positions: np.ndarray) -> list[str] | None:  # type: ignore[override]
        """The examples as text, or None without a tokenizer."""
        return None if self.tokenizer is None else super().describe(pool, positions)


class GivenModel:
    """Makes copies of one model, as it is when this object is made or later.

    Args:
        model: a causal language model of transformers, with adapters or without.

    Attributes:
        name, dtype: of the model. peft: None, since its adapters are not made here.
        base_size: number of its weights. digest: a hash of its architecture.
    """

    peft = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.base_size = sum(p.numel() for p in model.parameters())
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        self.digest = hashlib.sha256(json.dumps([type(model).__name__, shapes], sort_keys=True).encode()).hexdigest()

    def build(self, seed: int) -> nn.Module:
        """A copy of the model, on the CPU."""
        model: nn.Module = copy.deepcopy(self._model)
        return model.cpu()


def tokenised_task(
    model: Any,
    pool: TokenRows,
    target: TokenRows,
    *,
    recipe: TrainConfig,
    test: TokenRows | None = None,
    source_column: str | None = "source",
    tokenizer: Any = None,
    weighting: Weighting = "example",
    gradient_checkpointing: bool = False,
) -> LanguageTask:
    """A task of sequences that are tokenised already. They need no ids.

    Args:
        model: a causal language model of transformers; copies of it are trained by `cads.train`.
        pool: the candidates. target: what selection optimises for. test: held out; None: the target.
        recipe: batch size, optimizer, learning rate and precision.
        source_column: column of the pool with the source of each row; without such a column there are no sources.
        tokenizer: to show examples as text, and for the token that fills batches up.
        weighting: as the setting of a language task.
        gradient_checkpointing: whether the model recomputes layers in the backward pass, which costs FLOPs.

    Raises:
        DataError: if rows have no answer token, are longer than the context of the model, or labels are not input ids.
    """
    models = GivenModel(model)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    pools = [
        _pool(rows, name, context, pad, source_column if name == "pool" else None)
        for name, rows in (("pool", pool), ("target", target), ("test", target if test is None else test))
    ]
    settings = LanguageSettings(
        model=models.name,
        pool=[TextSource(path="rows")],
        weighting=weighting,
        gradient_checkpointing=gradient_checkpointing,
        trainer_compatible=True,
    )
    return TokenisedTask(pools, models, tokenizer, settings=settings, recipe=recipe, counts={})  # type: ignore[arg-type]


def _pool(rows: TokenRows, name: str, context: int, pad: int, source_column: str | None) -> Pool:
    """The rows as a pool. Its ids are the numbers of its rows."""
    ids, labels, sources, unused, n_unlabelled = [], [], [], set(), 0
    for row in rows:
        ids.append(np.asarray(row["input_ids"], dtype=np.int32))
        n_unlabelled += "labels" not in row
        labels.append(np.asarray(row["labels"] if "labels" in row else row["input_ids"], dtype=np.int64))
        if source_column is not None and source_column in row:
            sources.append(str(row[source_column]))
        unused |= set(row) - {*USED, source_column}
    if not ids:
        raise DataError(f"the {name} has no row: give at least one")
    if n_unlabelled:
        log.warning("%d rows of the %s have no labels: all of their tokens are learned", n_unlabelled, name)
    if unused:
        log.warning("columns of the %s that are not used: %s", name, sorted(unused))
    sizes = np.array([len(x) for x in ids])
    _check(ids, labels, sizes, name, context)
    flat_labels = np.concatenate(labels)
    loss_mask = flat_labels != IGNORED
    tokens = Tokens(
        ids=np.concatenate(ids),
        loss_mask=loss_mask,
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        texts=pa.repeat("", len(ids)),
        pad=pad,
        max_length=context,
    )
    if (without := np.flatnonzero(tokens.answers == 0)).size:
        raise DataError(
            f"{without.size} rows of the {name}, such as {without[:3].tolist()}, have no label that can be predicted: "
            "remove them"
        )
    numbers = [f"{name}-{i:010d}" for i in range(len(ids))]
    if not sources:
        return Pool(numbers, tokens, name=name)
    if len(sources) < len(ids):
        raise DataError(f"{len(ids) - len(sources)} rows of the {name} have no {source_column!r}: give one to each")
    names, codes = np.unique(np.array(sources), return_inverse=True)
    return Pool(numbers, tokens, codes.reshape(-1), names.tolist(), name=name)


def _check(ids: list[np.ndarray], labels: list[np.ndarray], sizes: np.ndarray, name: str, context: int) -> None:
    """Refuse rows that are too long, and labels that are not the input ids at their positions."""
    if (long := np.flatnonzero(sizes > context)).size:
        raise DataError(
            f"{long.size} rows of the {name}, such as {long[:3].tolist()}, have more than the {context} tokens of the "
            "model's context: cut them"
        )
    other = [
        i
        for i, (x, y) in enumerate(zip(ids, labels, strict=True))
        if x.shape != y.shape or ((y != IGNORED) & (y != x)).any()
    ]
    if other:
        raise DataError(
            f"the labels of {len(other)} rows of the {name}, such as {other[:3]}, are not their input_ids: give the "
            "same tokens, and -100 where there is no loss"
        )
