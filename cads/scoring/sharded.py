"""Scoring a pool file by file: what is done once, what is done for each file, and what files tell each other.

    prepare -> survey of each file -> combine -> values of each file -> merge

`prepare` sees the target alone, such as to fine-tune a scorer on it. A survey counts what scores of all files need,
such as the document frequencies of words; most methods need none. Values depend on the example, on what was prepared
and combined, and on the other examples of the same file at most through the rounding of padded batches. So the result
does not depend on how files are divided among shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cads.accounting.ledger import Ledger, PlannedLedger
from cads.errors import CheckpointError, ConfigError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.task import Task

Values = Callable[[Task, Ledger], np.ndarray]
"""One number for each example of the pool of a task, float64, shape (n,); charges the ledger."""
SampleTask = Callable[[list[dict[str, Any]]], Task]
"""A task whose pool is some rows of the files, as JSON values."""


@dataclass(frozen=True)
class PoolPart:
    """One file of a pool.

    Attributes:
        task: its pool are the examples of the file. path: the file, on this machine. n_files: of the whole pool.
    """

    task: Task
    path: Path
    n_files: int


class ShardedScoring(ABC):
    """How one method scores a pool file by file.

    Attributes:
        method: its name. config: its options. cut: how the ranking is cut.
        surveys: whether files are surveyed before any is scored.
        nearest_median: whether examples rank by how near their values are to the median of all; if not, by the values,
            the highest first.
    """

    surveys = False
    nearest_median = False

    def __init__(self, method: str, config: dict[str, Any], cut: Cut) -> None:
        self.method, self.config, self.cut = method, config, cut

    def prepare(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> State:
        """What is computed once, on the target of `task` alone; its pool is that of the first file."""
        return State()

    def survey(self, part: PoolPart, prepared: State, *, seed: int, ledger: Ledger) -> pa.Table:
        """What the scores of all files need to know of this one."""
        raise NotImplementedError(f"{self.method} surveys no files")

    def combine(
        self,
        surveys: Iterable[pa.Table],
        task: Task,
        prepared: State,
        *,
        sample: SampleTask,
        seed: int,
        ledger: Ledger,
        monitor: Monitor | None = None,
    ) -> State:
        """What is computed once from the surveys, in the order of the files; with what was prepared.

        Args:
            task: as for `prepare`. sample: makes a task of rows that a survey has kept.
        """
        return prepared

    @abstractmethod
    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """What gives the values of each file.

        Args:
            task: as for `prepare`: its models are those of all files. state: what `prepare` and `combine` have made.
        """

    @abstractmethod
    def plan(self, task: Task) -> PlannedLedger:
        """What `values` will charge for the pool of `task`; nothing is computed."""

    def notes(self, state: State) -> dict[str, Any]:
        """Remarks for the Selection."""
        return {}

    def source_probability(self, state: State) -> dict[str, float]:
        """The probability of each source, for methods that choose sources."""
        return {}


def not_sharded(method: str, reason: str) -> ConfigError:
    """The refusal of a method or an option that needs the whole pool at once."""
    return ConfigError(f"{method} cannot be scored in shards: {reason}")


def trained_part(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and the persistent buffers of a model, on the CPU, by name."""
    kept = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: x for name, x in model.named_parameters() if x.requires_grad}
    tensors |= {name: x for name, x in model.named_buffers() if name in kept}
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}


def load_part(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what `trained_part` has given into `model`.

    Raises:
        CheckpointError: if it is of another model.
    """
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in state or state[name].shape != value.shape:
                raise CheckpointError(f"the checkpoint is of another model: {name!r} has shape {value.shape}")
            state[name].copy_(value)
