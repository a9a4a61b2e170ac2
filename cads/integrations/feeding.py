"""How another trainer gets the examples of a run: a data set, a sampler that draws them, and a collator."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cads.data.batch import Batch
from cads.errors import DataError
from cads.integrations.joint_examples import JointExamples
from cads.integrations.stepped_run import SteppedRun
from cads.task import Task
from cads.tasks.language.tokens import IGNORED, Tokens, tokens_of


class RunDataset(Dataset[Any]):
    """The examples of pool and target, by number.

    Its length is that of one window: what is drawn beyond depends on losses that are not known yet. The trainer takes a
    window for an epoch. Sequences come as `input_ids` and `labels`; other examples as their numbers, which `Collator`
    reads.

    Args:
        run: whose examples they are.
    """

    def __init__(self, run: SteppedRun) -> None:
        self._examples, self._length = run.examples, run.window * run.batch_size
        self.column_names = ["input_ids", "labels"] if run.examples.are_tokens else ["number"]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """The first examples."""
        return (self[number] for number in range(min(self._length, len(self._examples))))

    def __getitem__(self, number: int) -> Any:
        if not self._examples.are_tokens:
            return number
        n = len(self._examples.pool)
        pool, row = (self._examples.pool, number) if number < n else (self._examples.target, number - n)
        tokens = tokens_of(pool)
        begin, end = tokens.offsets[row : row + 2]
        ids, learned = np.array(tokens.ids[begin:end]), np.array(tokens.loss_mask[begin:end])
        # Nothing predicts the first token.
        learned[0] = False
        return {"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORED).tolist()}


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
        self._task, self._examples = task, examples
        self._signature: inspect.Signature | None = None
        if not examples.are_tokens:
            self._signature = inspect.signature(task.costs.model.forward)

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
