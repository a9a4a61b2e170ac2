"""Cheap features of an example: the inputs of an amortised policy.

Some are free (source, group, length). The others come from one forward pass of a small model: its loss, and where the
task has classes the entropy and the margin of their probabilities. Columns are identified by name, so that a new shard
gets the same columns as the sample that a policy was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import lengths, scoring_batches
from cads.errors import ConfigError
from cads.policies.simplex import Floats
from cads.runtime.journal import map_shards
from cads.scoring.pool_scores import batching_key, check_finite
from cads.task import Task
from cads.training.precision import autocast

SOURCE, GROUP, LENGTH = "source: ", "group: ", "log length"
LOSS, ENTROPY, MARGIN = "loss", "entropy", "margin"
MOST_LEVELS = 256
"""Largest number of sources, or of groups, that get a column each: with more, the features would not be cheap."""

Kind = Literal["loss", "confidence", "source", "length"]
KINDS: tuple[Kind, ...] = get_args(Kind)
""""confidence" stands for entropy and margin."""


class FreeFeatures:
    """Columns that cost no FLOPs: one for each source and each group (1 or 0), and the log of the length.

    Args:
        task: gives the groups, which have columns whatever the kinds.
        pool: the examples.
        kinds: of the other columns.
    """

    def __init__(self, task: Task, pool: Pool, kinds: Sequence[Kind] = KINDS) -> None:
        self._sources, self._source_names = pool.sources, pool.source_names
        self._groups, self._lengths = task.groups(pool), lengths(pool)
        self.names = free_names(pool, kinds)
        groups = [] if self._groups is None else np.unique(self._groups).tolist()
        self._group_of_name = {f"{GROUP}{group}": group for group in groups}
        if len(groups) <= MOST_LEVELS:
            self.names += self._group_of_name

    def values(self, names: Sequence[str], positions: np.ndarray) -> Floats:
        """The columns `names` of the examples at `positions` (shape (n,)), shape (n, len(names)).

        A source or a group that this pool does not have is a column of zeros.

        Raises:
            ConfigError: if a name is not that of a free column, or these examples have no length.
        """
        columns = np.zeros((len(positions), len(names)))
        for column, name in zip(columns.T, names, strict=True):
            if name.startswith(SOURCE):
                if self._sources is not None and (source := name.removeprefix(SOURCE)) in self._source_names:
                    column[:] = self._sources[positions] == self._source_names.index(source)
            elif name.startswith(GROUP):
                if self._groups is not None and name in self._group_of_name:
                    column[:] = self._groups[positions] == self._group_of_name[name]
            elif name == LENGTH and self._lengths is not None:
                column[:] = np.log(np.maximum(self._lengths[positions], 1))
            else:
                raise ConfigError(
                    f"the feature {name!r} is not free here: compute it with the model that the policy was learned with"
                )
        return columns


class ReadFeatures:
    """Columns that one forward pass of a model gives: its loss, and for classifiers entropy and margin.

    Args:
        task: gives the losses and the class scores.
        model: in evaluation mode, on `device`.
        kinds: of the columns.
    """

    def __init__(self, task: Task, model: nn.Module, device: torch.device | str, kinds: Sequence[Kind] = KINDS) -> None:
        self.task, self.model, self.device = task, model, device
        self.names = read_names(task, kinds)

    def __call__(self, batch: Batch) -> Tensor:
        """The columns of a batch, shape (B, len(names)).

        Loss and entropy are in nats. The margin is the log probability of the label minus the largest of another class.
        The model runs in the precision of the task's recipe.
        """
        model: Any = _CachedForward(self.model) if len(self.names) > 1 else self.model
        columns = []
        if LOSS in self.names:
            with autocast(self.task.recipe.precision, self.device):
                losses = self.task.losses(model, batch)
            columns.append(_double(losses))
        if ENTROPY in self.names:
            with autocast(self.task.recipe.precision, self.device):
                logits = self.task.logits(model, batch)
            log_p = torch.log_softmax(_double(logits), dim=1)
            labels = batch.labels[:, None].to(log_p.device)
            log_p_label = log_p.gather(1, labels)[:, 0]
            log_p_other = log_p.scatter(1, labels, -torch.inf).amax(dim=1)
            # With a single class there is no other.
            margin = log_p_label - log_p_other if log_p.shape[1] > 1 else torch.zeros_like(log_p_label)
            columns += [-(log_p.exp() * log_p).sum(dim=1), margin]
        return torch.stack(columns, dim=1)

    def of(self, pool: Pool, positions: np.ndarray, *, ledger: Ledger, stage: str) -> Floats:
        """The columns of the examples at `positions` (shape (n,)), shape (n, len(names)), charged batch by batch.

        Raises:
            DataError: if a number is not finite, naming the examples.
        """
        batches = scoring_batches(pool, positions=positions)

        def shard(i: int) -> np.ndarray:
            batch = pool.batch(batches[i])
            ledger.charge(SELECT, stage, self.task.costs.forward(batch), tokens=batch.tokens)
            with ledger.timed(SELECT, stage), torch.inference_mode():
                return self(batch.to(self.device)).cpu().numpy()

        read = map_shards("reading", [stage, len(positions), *batching_key()], ledger, len(batches), shard)
        row_of_position = np.empty(len(pool), dtype=np.int64)
        row_of_position[np.concatenate(batches)] = np.arange(len(positions))
        columns = np.asarray(read[row_of_position[positions]])
        check_finite(columns.sum(axis=1), pool, stage, positions)
        return columns


def free_names(pool: Pool, kinds: Sequence[Kind] = KINDS) -> list[str]:
    """The names of the columns that cost nothing and can differ between examples of one group."""
    names = []
    if "source" in kinds and pool.sources is not None and 1 < len(pool.source_names) <= MOST_LEVELS:
        names += [SOURCE + name for name in pool.source_names]
    if "length" in kinds and callable(getattr(pool.examples, "lengths", None)):
        names.append(LENGTH)
    return names


def read_names(task: Task, kinds: Sequence[Kind] = KINDS) -> list[str]:
    """The names of the columns that a forward pass gives for this task."""
    names = [LOSS] if "loss" in kinds else []
    if "confidence" in kinds and type(task).logits is not Task.logits:
        names += [ENTROPY, MARGIN]
    return names


class _CachedForward:
    """A model that caches its last forward pass: losses and class scores of a batch share it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: tuple[Any, Any] | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self._last is None or not _equal_inputs(self._last[0], (inputs, options)):
            self._last = (inputs, options), self._model(*inputs, **options)
        return self._last[1]


def _double(x: Tensor) -> Tensor:
    """`x` in float64: on its device, or on the CPU if that has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _equal_inputs(a: Any, b: Any) -> bool:
    """Whether two inputs of a model are equal: equal tensors at equal positions and under equal names."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal_inputs, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_inputs(a[name], b[name]) for name in a)
    return a is b or (isinstance(a, bool | int | float | str) and a == b)
