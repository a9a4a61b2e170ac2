"""A task from data sets: of the library `datasets`, or of `torch.utils.data`, read an example at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.data.hashing import digests
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.runtime.signals import Interrupted
from cads.tasks.custom.example_loss import Loss
from cads.tasks.custom.modules import FreshModels
from cads.tasks.custom.splits import labelled_pool, target_and_test
from cads.tasks.custom.task import ModuleTask
from cads.tasks.custom.tensors import call_by_name, call_in_order, named_inputs

log = logging.getLogger(__name__)

LABELS = ("label", "labels", "y", "target", "targets")
"""Columns that are recognised as the label, the first that is there."""
READ_AT_ONCE = 256
"""Examples that are in memory at once while a data set is read whole."""
SHOWN = 3
"""Examples that a message names."""

Collate = Callable[[list[Any]], tuple[Any, Any]]
"""As for `torch.utils.data.DataLoader`: the items of a batch -> its inputs and its labels."""


class ItemCollator:
    """Makes a batch of items: pairs (inputs, label), or mappings from names to values.

    Args:
        inputs: names of the values that the model reads; None: all but the label.
        label: name of the label; None: the first of `LABELS`.
        collate: makes inputs and labels of the items instead.
        dtype: to which numbers with a point are converted.
    """

    def __init__(
        self, inputs: Sequence[str] | None, label: str | None, collate: Collate | None, dtype: torch.dtype
    ) -> None:
        self._inputs, self._label, self._collate, self._dtype = inputs, label, collate, dtype
        self._said = False

    def __call__(self, items: list[Any], name: str) -> tuple[dict[str, Tensor], Tensor, bool]:
        """Inputs by name, labels, and whether the inputs have names of their own.

        Args:
            name: of the data set, in messages.

        Raises:
            DataError: if items cannot be read as such, or have different shapes.
        """
        if self._collate is not None:
            try:
                inputs, labels = self._collate(items)
            except Exception as error:  # It is the user's own code.
                raise DataError(f"collate cannot make inputs and labels of {len(items)} items: {error}") from error
            named = isinstance(inputs, Mapping)
            return (
                {k: self._tensor(x, k, name) for k, x in named_inputs(inputs).items()},
                self._tensor(labels, "labels", name),
                named,
            )
        pairs = [self._pair(item, name) for item in items]
        keys = list(pairs[0][0])
        inputs = {key: self._stacked([x[key] for x, _ in pairs], key, name) for key in keys}
        named = isinstance(items[0], Mapping) and len(keys) > 1
        named = named or (not isinstance(items[0], Mapping) and isinstance(items[0][0], Mapping))
        return inputs, self._stacked([y for _, y in pairs], "the label", name), named

    def _pair(self, item: Any, name: str) -> tuple[dict[str, Any], Any]:
        if not isinstance(item, Mapping):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise DataError(
                    f"items of the {name} are {type(item).__name__}: they must be pairs (inputs, label), or mappings "
                    "from names to values; or give collate, as to a DataLoader"
                )
            return named_inputs(item[0]), item[1]
        label = self._label or next((key for key in LABELS if key in item), None)
        if label is None or label not in item:
            raise DataError(f"the {name} has columns {list(item)}: name the label (label=) and inputs (inputs=)")
        inputs = [key for key in item if key != label] if self._inputs is None else list(self._inputs)
        absent = [key for key in inputs if key not in item]
        if absent or not inputs:
            raise DataError(f"the {name} has columns {list(item)}, and not the inputs {absent or 'that a model needs'}")
        if not self._said and (self._label is None or self._inputs is None):
            log.info("%s: label %s, inputs %s (label= and inputs= name others)", name, label, ", ".join(inputs))
            self._said = True
        return {key: item[key] for key in inputs}, item[label]

    def _stacked(self, values: list[Any], key: str, name: str) -> Tensor:
        tensors = [self._tensor(value, key, name) for value in values]
        if len({tuple(x.shape) for x in tensors}) > 1:
            shapes = list(dict.fromkeys(str(tuple(x.shape)) for x in tensors))
            raise DataError(
                f"{key} of the {name} has different shapes, such as {', '.join(shapes[:SHOWN])}: pad all examples to "
                "one, or give collate, which pads those of a batch"
            )
        return torch.stack(tensors)

    def _tensor(self, value: Any, key: str, name: str) -> Tensor:
        try:
            x = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{key} of the {name} is {type(value).__name__} ({value!r:.40}), and no number or tensor: leave it out "
                "(inputs= names what the model reads), encode it, or give collate"
            ) from error
        if x.is_floating_point():
            return x.to(self._dtype)
        return x if x.dtype in (torch.bool, torch.uint8) and x.dim() else x.to(torch.int64)


class DatasetExamples:
    """The examples of a map-style data set, which are read when a batch needs them.

    All are read once at the start, to know their shapes and labels and to hash them.

    Args:
        dataset: has a length, and items by their number.
        collator: makes batches of items.
        name: of the pool, in messages.

    Raises:
        DataError: if it cannot be read, has no example, gives other values each time, or values that are not finite.
    """

    def __init__(self, dataset: Any, collator: ItemCollator, name: str) -> None:
        self._dataset, self._collator, self._name = dataset, collator, name
        if not len(dataset):
            raise DataError(f"the {name} is empty: it needs at least one example")
        self._index = np.arange(len(dataset))
        self._read_all()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def named(self) -> bool:
        """Whether the inputs are named as arguments of the model."""
        return self._named

    @property
    def labels(self) -> Tensor | None:
        """Whole numbers as labels, int64, shape (N,); None if they are others."""
        return self._labels

    def batch(self, positions: np.ndarray) -> Batch:
        """The examples at `positions`, read anew."""
        positions = np.asarray(positions, dtype=np.int64)
        inputs, labels, _ = self._collator(self._items(self._index[positions]), self._name)
        index = torch.from_numpy(positions)
        return Batch(inputs, labels, index, tokens=len(index), answer_tokens=len(index))

    def take(self, positions: np.ndarray) -> DatasetExamples:
        """The examples at `positions`; nothing is read."""
        taken = object.__new__(DatasetExamples)
        taken.__dict__.update(self.__dict__)
        taken._index, taken._codes = self._index[positions], self._codes[positions]
        taken._digests = self._digests.take(pa.array(positions))
        taken._label_digests = self._label_digests.take(pa.array(positions))
        taken._labels = None if self._labels is None else self._labels[torch.as_tensor(positions)]
        return taken

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Examples of equal shape cost the same."""
        _, representatives, codes = np.unique(self._codes, return_index=True, return_inverse=True)
        return representatives, codes

    def digests(self) -> pa.Array:
        """A hash of the inputs of each example."""
        return self._digests

    def label_digest(self) -> bytes:
        """A hash of all labels, in order."""
        return hashlib.blake2b(b"".join(self._label_digests.to_pylist()), digest_size=16).digest()

    def _read_all(self) -> None:
        numbers: dict[Any, int] = {}
        codes, inputs, labels, whole, bad = [], [], [], [], []
        for start in range(0, len(self._index), READ_AT_ONCE):
            items = self._items(self._index[start : start + READ_AT_ONCE])
            for i, item in enumerate(items, start):
                x, y, self._named = self._collator([item], self._name)
                codes.append(numbers.setdefault(tuple((k, tuple(v.shape)) for k, v in x.items()), len(numbers)))
                inputs.append(_bytes(*x.values()))
                labels.append(_bytes(y))
                if y.dim() == 1 and not y.is_floating_point():
                    whole.append(int(y))
                if not all(bool(torch.isfinite(v).all()) for v in (*x.values(), y)):
                    bad.append(i)
        if bad:
            raise DataError(
                f"{len(bad)} of {len(self)} examples of the {self._name} have missing or infinite values, such as "
                f"items {bad[:SHOWN]}: fill them in, or leave them out"
            )
        again, _, _ = self._collator(self._items(self._index[:1]), self._name)
        if not np.array_equal(_bytes(*again.values()), inputs[0]):
            raise DataError(
                f"item 0 of the {self._name} is another each time it is read, as under random augmentation: then no "
                "run can be repeated. Augment in the model, in training mode (torchvision.transforms.v2)"
            )
        self._codes = np.array(codes, dtype=np.int64)
        self._digests, self._label_digests = digests(inputs), digests(labels)
        self._labels = torch.tensor(whole) if len(whole) == len(self) else None

    def _items(self, index: np.ndarray) -> list[Any]:
        try:
            return [self._dataset[i] for i in index.tolist()]
        except Interrupted:
            raise
        except Exception as error:  # It is the user's own code.
            raise DataError(f"an item of the {self._name} cannot be read: {type(error).__name__}: {error}") from error


class DatasetTask(ModuleTask):
    """A task from a module, a loss, and data sets of `datasets` or `torch.utils.data`, which are read as they are used.

        task = DatasetTask(model, pool=train_set, target=val_set, loss=nn.CrossEntropyLoss(reduction="none"))
        trained = cads.train(task, "10 epochs")

    Items are pairs (inputs, label), for `model(inputs)`; or mappings, such as the rows of a `datasets.Dataset`: of one
    input for `model(x)`, of several for `model(**inputs)`. Tensors, arrays, images (as arrays) and numbers are read.

    Args:
        model: a `torch.nn.Module`, from whose weights every model starts; or a function that makes one.
        pool: the candidates, map-style; or a mapping from the name of each source to its data set.
        target: what selection optimises for.
        loss: one number for each example from output and labels, such as `nn.CrossEntropyLoss(reduction="none")`.
        test: held out; None: a half of the target.
        inputs: names of what the model reads in items that are mappings; None: all but label, id and source.
        label: its name in them; None: label, labels, y, target or targets.
        source_column: name of the source in the items of the pool, for `datasets`; None: no sources.
        id_column: name of the id in the items of the pool, for `datasets`; None: examples are numbered.
        collate: makes (inputs, labels) of a list of items, as for a `DataLoader`; for examples of different shapes. A
            batch costs what its padded inputs cost.
        classes, metrics, recipe, pretrained, data_seed, name: as for `TensorTask`.

    Raises:
        ConfigError: if model or loss cannot be used, with the remedy.
        DataError: if a data set cannot be read, or gives other values each time.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        pool: Any,
        target: Any,
        loss: Loss,
        test: Any = None,
        inputs: Sequence[str] | str | None = None,
        label: str | None = None,
        source_column: str | None = None,
        id_column: str | None = None,
        collate: Collate | None = None,
        classes: Sequence[str] | int | None = None,
        metrics: Mapping[str, Loss] | None = None,
        recipe: TrainConfig | None = None,
        pretrained: bool = False,
        data_seed: int = 0,
        name: str = "data set",
    ) -> None:
        models = FreshModels(model)
        sources: list[str] | None = None
        if isinstance(pool, Mapping) and not hasattr(pool, "column_names"):
            pool, sources = _joined(pool, source_column)
        _refuse_splits(pool, "pool")
        if sources is None and source_column is not None:
            sources = _column(pool, source_column)
        ids = None if id_column is None else _column(pool, id_column)
        if isinstance(inputs, str):
            inputs = [inputs]
        parts = {"pool": pool, "target": target, **({} if test is None else {"test set": test})}
        described = [key for key in (source_column, id_column) if key is not None]
        parts = {part: _readable(x, part, described if inputs is None else []) for part, x in parts.items()}
        collator = ItemCollator(inputs, label, collate, models.dtype)
        examples = {part: DatasetExamples(x, collator, part) for part, x in parts.items()}
        super().__init__(
            labelled_pool(examples["pool"], sources, ids),
            *target_and_test(examples["target"], examples.get("test set"), data_seed),
            models=models,
            loss=loss,
            call=call_by_name if examples["pool"].named else call_in_order,
            classes=classes,
            metrics=metrics,
            recipe=recipe,
            pretrained=pretrained,
            name=name,
        )


def _readable(dataset: Any, name: str, described: Sequence[str]) -> Any:
    """The data set, checked to be map-style: of one of `datasets` the columns of ids and sources are left out."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError(
            f"the {name} is {type(dataset).__name__}, which has no length or no items by number: give a map-style data "
            "set, such as list(stream), or datasets.Dataset.from_generator(...)"
        )
    _refuse_splits(dataset, name)
    columns = getattr(dataset, "column_names", None)
    return dataset.remove_columns([c for c in described if c in columns]) if columns and described else dataset


def _refuse_splits(dataset: Any, name: str) -> None:
    if isinstance(dataset, Mapping):
        raise ConfigError(f"the {name} has several splits, {list(dataset)}: give one of them")


def _column(dataset: Any, name: str) -> list[str]:
    """The values of a column of a `datasets.Dataset`, as text."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        raise ConfigError(
            f"column {name!r}: the pool is {type(dataset).__name__}, and only data sets of the library `datasets` have "
            "columns; give the pool as a mapping from the name of each source to its data set"
        )
    if name not in columns:
        raise DataError(f"the pool has columns {list(columns)}, and not {name!r}")
    return [str(value) for value in dataset.with_format(None)[name]]


def _joined(pool: Mapping[str, Any], source_column: str | None) -> tuple[Any, list[str]]:
    """Data sets of several sources as one, and the name of the source of each example."""
    if source_column is not None:
        raise ConfigError("source_column is given, and the pool has names of sources already: give one of the two")
    if not pool:
        raise DataError("pool is an empty mapping: give a data set by the name of each source")
    parts = [_readable(part, f"source {source!r}", ()) for source, part in pool.items()]
    sources = [str(source) for source, part in zip(pool, parts, strict=True) for _ in range(len(part))]
    return (parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts)), sources


def _bytes(*tensors: Tensor) -> np.ndarray:
    """The bytes of tensors, one after another, uint8, shape (L,)."""
    return torch.cat([x.contiguous().reshape(-1).view(torch.uint8) for x in tensors]).numpy()
