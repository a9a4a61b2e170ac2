"""A task from arrays: inputs and labels of each example, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.hashing import ROWS, row_digests
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.tasks.custom.example_loss import Loss
from cads.tasks.custom.modules import FreshModels
from cads.tasks.custom.splits import labelled_pool, target_and_test
from cads.tasks.custom.task import ModuleTask

Arrays = Tensor | np.ndarray
"""Examples one after another, shape (N, ...)."""
SINGLE, NUMBERED = "x", "x{}"
"""Names of the only input, and of each of several that have no names."""


class TensorExamples:
    """Inputs and labels of N examples, of one shape each.

    Args:
        inputs: by name, each of shape (N, ...). labels: shape (N, ...).
        dtype: to which numbers with a point are converted, a batch at a time; those of the model.
        name: of the pool, in messages.

    Raises:
        DataError: if lengths differ, or values are missing or infinite.
    """

    def __init__(self, inputs: Mapping[str, Arrays], labels: Arrays, dtype: torch.dtype, name: str) -> None:
        self._inputs, self._labels = dict(inputs), labels
        self._dtype = dtype
        lengths = {key: len(x) for key, x in {**self._inputs, "labels": self._labels}.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the {name} has inputs and labels of different lengths: {lengths}")
        for key, x in {**self._inputs, "labels": self._labels}.items():
            _check_finite(x, key, name)

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, positions: np.ndarray) -> Batch:
        """The examples at `positions`."""
        index = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        inputs = {key: self._converted(_rows(x, index)) for key, x in self._inputs.items()}
        labels = self._converted(_rows(self._labels, index))
        return Batch(inputs, labels, index, tokens=len(index), answer_tokens=len(index))

    def take(self, positions: np.ndarray) -> TensorExamples:
        """The examples at `positions`, copied."""
        taken = object.__new__(TensorExamples)
        index = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        taken._inputs = {key: _rows(x, index) for key, x in self._inputs.items()}
        taken._labels, taken._dtype = _rows(self._labels, index), self._dtype
        return taken

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """All examples have the same shape."""
        return np.zeros(1, dtype=np.int64), np.zeros(len(self), dtype=np.int64)

    @cached_property
    def labels(self) -> Tensor | None:
        """Whole numbers as labels, int64, shape (N,); None if they are others."""
        labels = _rows(self._labels, torch.arange(len(self))) if self._labels.ndim == 1 else None
        return None if labels is None or labels.is_floating_point() or labels.is_complex() else labels.to(torch.int64)

    def digests(self) -> pa.Array:
        """A hash of the inputs of each example."""
        return pa.concat_arrays([row_digests(block) for block in self._blocks(self._inputs)])

    def label_digest(self) -> bytes:
        """A hash of all labels, in order."""
        digest = hashlib.blake2b(str((self._labels.dtype, tuple(self._labels.shape))).encode(), digest_size=16)
        for block in self._blocks({"labels": self._labels}):
            digest.update(block.data)
        return digest.digest()

    def _blocks(self, arrays: Mapping[str, Arrays]) -> Iterator[np.ndarray]:
        """The bytes of the examples, some at a time, uint8, shape (n, L)."""
        for start in range(0, len(self), ROWS):
            index = torch.arange(start, min(start + ROWS, len(self)))
            rows = [_rows(x, index).contiguous().reshape(len(index), -1).view(torch.uint8) for x in arrays.values()]
            yield np.ascontiguousarray(torch.cat(rows, dim=1).numpy())

    def _converted(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x.to(self._dtype)
        return x if x.dtype in (torch.bool, torch.uint8) and x.dim() > 1 else x.to(torch.int64)


class TensorTask(ModuleTask):
    """A task from a module, a loss, and arrays of inputs and labels.

        task = TensorTask(model, pool=(X, y), target=(X_val, y_val), loss=nn.MSELoss(reduction="none"))
        trained = cads.train(task, "10 epochs")

    X is a tensor or array of shape (N, ...), for `model(x)`; a tuple of them, for `model(x0, x1)`; or a mapping, for
    `model(**inputs)`. y has shape (N,) or (N, ...). Numbers with a point become those of the model, whole ones int64.

    Args:
        model: a `torch.nn.Module`, from whose weights every model starts; or a function that makes one.
        pool: the candidates, (X, y); or a mapping from the name of each source to its (X, y).
        target: what selection optimises for, (X, y).
        test: held out, (X, y); None: a half of the target.
        loss: one number for each example from output and labels, such as `nn.MSELoss(reduction="none")`, or any
            function of the two.
        sources: the name of the source of each example of the pool; None: none.
        ids: of the examples of the pool, unique; None: they are numbered.
        classes: names of the classes that labels number, or how many there are; None: all of them, if the loss is the
            cross entropy of whole numbers, otherwise none; () for none.
        metrics: further ones, by name: (output, labels) -> one number for each example, lower is better.
        recipe: how models are trained; None: `TrainConfig()`.
        pretrained: the weights already know the task in part, so that some examples are easier than others.
        data_seed: draws the test set from the target, if none is given.
        name: of the task, in tables.

    Raises:
        ConfigError: if model or loss cannot be used, with the remedy.
        DataError: if arrays do not fit together, or have values that are missing or infinite.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        pool: tuple[Any, Any] | Mapping[str, tuple[Any, Any]],
        target: tuple[Any, Any],
        loss: Loss,
        test: tuple[Any, Any] | None = None,
        sources: Sequence[Any] | np.ndarray | None = None,
        ids: Sequence[Any] | None = None,
        classes: Sequence[str] | int | None = None,
        metrics: Mapping[str, Loss] | None = None,
        recipe: TrainConfig | None = None,
        pretrained: bool = False,
        data_seed: int = 0,
        name: str = "tensors",
    ) -> None:
        models = FreshModels(model)
        if isinstance(pool, Mapping):
            _check_sources(pool, sources)
            parts = [_arrays(part, f"source {source!r}") for source, part in pool.items()]
            sources = [str(source) for source, part in zip(pool, parts, strict=True) for _ in range(len(part.labels))]
            candidates = _joined(parts)
        else:
            candidates = _arrays(pool, "pool")
        given = [candidates, _arrays(target, "target"), *([] if test is None else [_arrays(test, "test set")])]
        _check_shapes(given)
        names = ("pool", "target", "test set")
        examples = [
            TensorExamples(x.inputs, x.labels, models.dtype, part) for x, part in zip(given, names, strict=False)
        ]
        super().__init__(
            labelled_pool(examples[0], sources, ids),
            *target_and_test(examples[1], None if test is None else examples[2], data_seed),
            models=models,
            loss=loss,
            call=call_by_name if candidates.named else call_in_order,
            classes=classes,
            metrics=metrics,
            recipe=recipe,
            pretrained=pretrained,
            name=name,
        )


@dataclass(frozen=True)
class _Arrays:
    """Inputs by name, and labels; `named`: whether the user named the inputs; `part`: what the data is, in words."""

    inputs: dict[str, Any]
    labels: Any
    named: bool
    part: str


def call_in_order(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
    """The output of a model whose inputs have no names."""
    return model(*inputs.values())


def call_by_name(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
    """The output of a model whose inputs are named as its arguments."""
    return model(**inputs)


def named_inputs(x: Any) -> dict[str, Any]:
    """Inputs by name: those of a mapping as they are, and those of a tuple by their numbers."""
    if isinstance(x, Mapping):
        return {str(key): part for key, part in x.items()}
    if isinstance(x, tuple):
        return {NUMBERED.format(i): part for i, part in enumerate(x)}
    return {SINGLE: x}


def _arrays(pair: Any, name: str) -> _Arrays:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"the {name} is {type(pair).__name__}: give a pair (X, y) of inputs and labels")
    x, y = pair
    inputs = {key: _numbers(part, f"input {key} of the {name}") for key, part in named_inputs(x).items()}
    if not inputs:
        raise DataError(f"the {name} has no inputs: give at least one array")
    return _Arrays(inputs, _numbers(y, f"labels of the {name}"), isinstance(x, Mapping), name)


def _joined(parts: Sequence[_Arrays]) -> _Arrays:
    """Sources one after another."""
    _check_shapes(parts)
    inputs = {key: _concatenated([part.inputs[key] for part in parts]) for key in parts[0].inputs}
    return _Arrays(inputs, _concatenated([part.labels for part in parts]), parts[0].named, "pool")


def _concatenated(arrays: Sequence[Arrays]) -> Arrays:
    if len(arrays) == 1:
        return arrays[0]
    return torch.cat([x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in arrays])


def _check_sources(pool: Mapping[str, Any], sources: Any) -> None:
    if sources is not None:
        raise ConfigError("sources are given, and the pool has names of sources already: give one of the two")
    if not pool:
        raise DataError("pool is an empty mapping: give (X, y) by the name of each source")


def _check_shapes(parts: Sequence[_Arrays]) -> None:
    shapes = [{key: tuple(x.shape[1:]) for key, x in {**p.inputs, "labels": p.labels}.items()} for p in parts]
    for part, shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"an example of the {parts[0].part} has the shapes {shapes[0]}, and one of the {part.part} has "
                f"{shape}: give the same inputs everywhere, and labels of one shape, such as by y[:, None]"
            )


def _numbers(x: Any, name: str) -> Arrays:
    """An array of numbers; tensors come to the CPU."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
    else:
        try:
            x = np.asarray(x)
        except (ValueError, TypeError) as error:
            raise DataError(f"{name} are no array: {error}") from error
        if x.dtype.kind not in "biuf":
            raise DataError(f"{name} are {x.dtype}, and not numbers: encode them first (and make sparse ones dense)")
        if x.dtype.kind == "u" and x.dtype.itemsize > 1:
            x = x.astype(np.int64)
    if not x.ndim:
        raise DataError(f"{name} are one number: give one for each example, shape (N, ...)")
    return x


def _rows(x: Arrays, index: Tensor) -> Tensor:
    """The rows at `index`, copied."""
    if isinstance(x, Tensor):
        return x.index_select(0, index)
    rows = x[index.numpy()]
    return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="), copy=False))


def _check_finite(x: Arrays, key: str, name: str) -> None:
    """Refuse values that are missing or infinite.

    Raises:
        DataError: with the first examples.
    """
    kind = x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"
    if not kind:
        return
    bad: list[int] = []
    for start in range(0, len(x), ROWS):
        index = torch.arange(start, min(start + ROWS, len(x)))
        finite = torch.isfinite(_rows(x, index)).reshape(len(index), -1).all(dim=1)
        bad += index[~finite].tolist()
    if bad:
        raise DataError(
            f"{len(bad)} of {len(x)} examples of the {name} have missing or infinite values in {key}, such as rows "
            f"{bad[:3]}: fill them in, or leave these rows out"
        )
