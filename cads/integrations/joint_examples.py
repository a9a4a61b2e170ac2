"""Pool and target as one sequence of examples, as another trainer reads them: what a step holds, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.data.training_batches import joined
from cads.data.window_loader import Rows
from cads.errors import ConfigError, DataError
from cads.task import Task
from cads.tasks.language.task import LanguageTask
from cads.tasks.language.tokens import concatenated, tokens_of


class StepPrice(NamedTuple):
    """The cost of the examples of a step.

    Attributes:
        usage: FLOPs of forward and backward. forward: FLOPs of one forward pass.
        tokens: positions that are computed, padding included. answer_tokens: positions with a loss.
    """

    usage: float
    forward: float
    tokens: int
    answer_tokens: int


class JointExamples:
    """The examples of a task: row i of the pool has the number i, and row j of the target the number N + j.

    Args:
        task: with pool and target.

    Raises:
        ConfigError: if the examples of a batch share rows: another trainer cannot tell their losses apart.
    """

    def __init__(self, task: Task) -> None:
        if isinstance(task, LanguageTask) and task.settings.packing:
            raise ConfigError("packing: another trainer does not tell the examples of a packed row apart; leave it out")
        self.pool, self.target = task.pool, task.target
        self._costs = task.costs
        self.are_tokens = isinstance(task, LanguageTask)
        self._fixed: np.ndarray | None = None
        if lengths(task.pool) is None and lengths(task.target) is None:
            self._fixed = np.concatenate([self._prices(pool) for pool in (task.pool, task.target)])

    def __len__(self) -> int:
        return len(self.pool) + len(self.target)

    def __getstate__(self) -> dict[str, Any]:
        """What worker processes get: the examples, and no model."""
        return {**vars(self), "_costs": None}

    def numbers(self, rows: Rows) -> np.ndarray:
        """The numbers of the rows of one step, those of the pool first; int64, shape (B,)."""
        return np.concatenate([rows[0], rows[1] + len(self.pool)])

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of these numbers, those of the pool first, padded together.

        Raises:
            DataError: if they have different shapes.
        """
        in_pool = numbers < len(self.pool)
        pairs = ((self.pool, numbers[in_pool]), (self.target, numbers[~in_pool] - len(self.pool)))
        present = [(pool, rows) for pool, rows in pairs if len(rows)]
        if self.are_tokens:
            parts = [tokens_of(pool).take(rows) for pool, rows in present]
            return concatenated(parts).batch(np.arange(len(numbers)))
        batches = joined([pool.batch(rows) for pool, rows in present], 1)
        if len(batches) > 1:
            raise DataError(
                f"examples of the {self.pool.name} and of the {self.target.name} have different shapes, "
                f"{batches[0].shape} and {batches[1].shape}: another trainer cannot batch them"
            )
        return batches[0]

    def ids(self, numbers: np.ndarray) -> list[str]:
        """The ids of these examples."""
        in_pool = numbers < len(self.pool)
        pairs = ((self.pool, numbers[in_pool]), (self.target, numbers[~in_pool] - len(self.pool)))
        return [i for pool, rows in pairs for i in pool.ids.take(pa.array(rows)).to_pylist()]

    def answers(self, numbers: np.ndarray) -> np.ndarray:
        """Answer tokens of each of these sequences, int64, shape (B,)."""
        in_pool = numbers < len(self.pool)
        pool_counts, target_counts = tokens_of(self.pool).answers, tokens_of(self.target).answers
        return np.where(
            in_pool,
            pool_counts[np.where(in_pool, numbers, 0)],
            target_counts[np.where(in_pool, 0, numbers - len(self.pool))],
        )

    def price(self, numbers: np.ndarray, size: int) -> StepPrice:
        """The price of a step on these examples, in micro-batches of `size`, each padded by itself."""
        if self._fixed is not None:
            usage, forward, tokens, answers = self._fixed[numbers].sum(axis=0).tolist()
            return StepPrice(usage, forward, round(tokens), round(answers))
        batches = [self.batch(numbers[start : start + size]) for start in range(0, len(numbers), size)]
        prices = [(self._costs.usage(b), self._costs.forward(b), b.tokens, b.answer_tokens) for b in batches]
        usage, forward, tokens, answers = np.sum(prices, axis=0).tolist()
        return StepPrice(usage, forward, round(tokens), round(answers))

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of a forward pass on inputs of this shape, (B, ...), which may be none of these examples."""
        count = shape[0]
        # Counting the FLOPs of a shape that is new may take gradients.
        with torch.inference_mode(False), torch.enable_grad():
            if not self.are_tokens:
                return self._costs.forward_pool(self.target) / len(self.target) * count
            return self._costs.forward(_sequences(count, shape[1]))

    @property
    def cheapest(self) -> float:
        """FLOPs of forward and backward of the cheapest example, without padding."""
        return min(float(self._costs.usages(pool).min()) for pool in (self.pool, self.target))

    def _prices(self, pool: Pool) -> np.ndarray:
        """Of each example, whose cost follows from its shape: the fields of `StepPrice`, float64, shape (N, 4)."""
        representatives, codes = pool.examples.shapes()
        batches = [pool.batch([r]) for r in representatives]
        prices = [(self._costs.usage(b), self._costs.forward(b), b.tokens, b.answer_tokens) for b in batches]
        return np.array(prices, dtype=np.float64)[codes]


def _sequences(count: int, length: int) -> Batch:
    """Sequences of some length, whatever they say, by whose shape a forward pass is priced."""
    ids = torch.zeros(count, length, dtype=torch.int64)
    answers = torch.ones(count, min(2, length), dtype=torch.int64).clamp(max=length - 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "answers": answers}
    inputs["weight"] = torch.ones(count)
    return Batch(inputs, ids, torch.arange(count), ids.numel(), ids.numel())
