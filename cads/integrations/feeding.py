"""How another trainer gets the examples of a run: a data set, a sampler that draws them, and a collator."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.table import InMemoryTable
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cads.data.batch import Batch
from cads.errors import ConfigError, DataError
from cads.integrations.joint_examples import JointExamples
from cads.integrations.stepped_run import SteppedRun
from cads.task import Task
from cads.tasks.language.tokens import IGNORED, Tokens, tokens_of


class RunDataset(Dataset[int]):
    """The numbers of examples of pool and target, which `Collator` reads.

    Its length is that of one window: what is drawn beyond depends on losses that are not known yet. The trainer takes a
    window for an epoch.

    Args:
        run: whose examples they are.
    """

    def __init__(self, run: SteppedRun) -> None:
        self._length = run.window * run.batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> int:
        return number


class RunSequences(datasets.Dataset):
    """The sequences of pool and target, by number: `input_ids` and `labels`. TRL takes nothing but a `Dataset`.

    It has the length of a `RunDataset`.

    Args:
        run: whose examples they are.
    """

    def __init__(self, run: SteppedRun) -> None:
        nothing = pa.repeat(pa.scalar([], pa.list_(pa.int64())), run.window * run.batch_size)
        super().__init__(InMemoryTable(pa.table({"input_ids": nothing, "labels": nothing})))
        self._examples = run.examples

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """The sequence of this number."""
        n = len(self._examples.pool)
        pool, row = (self._examples.pool, number) if number < n else (self._examples.target, number - n)
        tokens = tokens_of(pool)
        begin, end = tokens.offsets[row : row + 2]
        ids, learned = np.array(tokens.ids[begin:end]), np.array(tokens.loss_mask[begin:end])
        # Nothing predicts the first token.
        learned[0] = False
        return {"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORED).tolist()}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, list[int]]]:
        """The sequences of these numbers."""
        return [self[number] for number in numbers]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """The first sequences."""
        return (self[number] for number in range(min(len(self), len(self._examples))))

    def remove_columns(self, column_names: str | list[str], new_fingerprint: str | None = None) -> RunSequences:
        """The same: the trainer removes what its model does not take, and there is nothing else here."""
        return self

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the sequences are tokenised, cut and labelled.

        Raises:
            ConfigError: with the setting by which TRL leaves them as they are.
        """
        raise ConfigError(
            "the sequences of the selection are ready to be trained on: give SFTConfig "
            "dataset_kwargs={'skip_prepare_dataset': True}, and neither packing nor padding_free"
        )

    filter = shuffle = select = select_columns = map


class RunSampler(Sampler[int]):
    """The numbers of the examples of the next steps, one window an epoch.

    Args:
        run: that draws them.

    Attributes:
        skipped: numbers that the next epoch begins with, which the trainer leaves out since it trained on them before
            it was stopped.
    """

    def __init__(self, run: SteppedRun) -> None:
        self._run, self.skipped = run, 0

    def __len__(self) -> int:
        return self._run.window * self._run.batch_size

    def __iter__(self) -> Iterator[int]:
        skipped, self.skipped = self.skipped, 0
        yield from [0] * skipped
        for numbers in self._run.upcoming():
            yield from numbers.tolist()


class Collator:
    """Batches of the examples of a run, and of sequences with `input_ids` and `labels`, such as those of an evaluation.

    Args:
        task: whose examples they are. examples: the same, by number.
    """

    def __init__(self, task: Task, examples: JointExamples) -> None:
        self._examples = examples
        self._task: Task | None = None
        self._signature: inspect.Signature | None = None
        if not examples.are_tokens:
            self._signature = inspect.signature(task.costs.model.forward)
            # Worker processes get the task, and no model.
            self._task = copy.copy(task)
            vars(self._task).pop("costs", None)

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """The arguments of the model, and the labels.

        Raises:
            DataError: if sequences have no labels.
        """
        if self._examples.are_tokens:
            return self._sequences(features)
        if isinstance(features[0], Mapping):
            from transformers import default_data_collator

            return dict(default_data_collator(list(features)))
        batch = self._examples.batch(np.array(features, dtype=np.int64))
        return {**self._arguments(batch), "labels": batch.labels}

    def _sequences(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if missing := {"input_ids", "labels"} - set(features[0]):
            raise DataError(f"sequences without {sorted(missing)}: give `input_ids`, and `labels` with -100 elsewhere")
        ids = [np.asarray(feature["input_ids"], dtype=np.int32) for feature in features]
        labels = np.concatenate([np.asarray(feature["labels"], dtype=np.int64) for feature in features])
        first = tokens_of(self._examples.pool)
        tokens = Tokens(
            ids=np.concatenate(ids),
            loss_mask=labels != IGNORED,
            offsets=np.concatenate([[0], np.cumsum([len(x) for x in ids])]),
            texts=pa.repeat("", len(ids)),
            pad=first.pad,
            max_length=first.max_length,
        )
        batch = tokens.batch(np.arange(len(ids)))
        return {name: batch.inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": batch.labels}

    def _arguments(self, batch: Batch) -> dict[str, Tensor]:
        """What the task would call its model with, by the names that the model gives to its arguments."""
        assert self._task is not None
        assert self._signature is not None

        def called(*args: Any, **kwargs: Any) -> Any:
            raise _CalledError(args, kwargs)

        try:
            self._task.losses(called, batch)
        except _CalledError as call:
            return dict(self._signature.bind(*call.args[0], **call.args[1]).arguments)
        raise DataError(f"the losses of {self._task.name} call no model: another trainer cannot compute them")


class _CalledError(Exception):
    """Ends the losses of a task where they call the model; holds its arguments."""


def joined_losses(parts: Sequence[Tensor]) -> np.ndarray:
    """Losses of micro-batches, float64, in one transfer."""
    return torch.cat([x.detach().reshape(-1) for x in parts]).cpu().double().numpy()
