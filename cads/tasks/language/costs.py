"""FLOPs of sequences: a law in length and number of answers, fitted to a few counted batches."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from cads.accounting.costs import Costs, ExampleCost, MeasuredAccounting, PaperAccounting, Workload
from cads.accounting.nominal import forward_flops, training_flops
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.scoring.pool_scores import planned_flops
from cads.tasks.language.tokens import IGNORED, PAD_TO

log = logging.getLogger(__name__)

PROBES = ((4, 1), (8, 1), (12, 1), (12, 6))
"""Lengths and answers, in units of `PAD_TO`, of the counted batches. The longest example is counted as a check."""
TOLERANCE = 1e-6
"""Relative error of the law above which every shape is counted by itself."""


class SequenceWorkload(Workload, Protocol):
    """The interface of a task whose examples are sequences."""

    @property
    def pad(self) -> int:
        """The token id of padding."""
        ...

    @property
    def longest_example(self) -> tuple[int, int]:
        """T and A of the longest example, padding included."""
        ...


class LanguageCosts(Costs):
    """Costs of `LanguageTask`, whose examples have many shapes.

    `measured`: an example of T positions with the head at A of them costs `a + b T + c T^2 + d A`: all linears
    but the head are applied at every position, attention to every pair of positions. The four coefficients are solved
    from four counted batches and checked on the longest example. A model that does not follow this law is counted
    shape by shape. A packed batch costs as much as its rows.

    `paper`: cost depends on the tokens of an example without padding, so examples of one shape differ in cost.
    """

    task: SequenceWorkload

    def __init__(self, task: SequenceWorkload, accounting: str = "measured") -> None:
        super().__init__(task, accounting)
        self.task = task
        self._passes: WeakKeyDictionary[Pool, float] = WeakKeyDictionary()

    def forward(self, batch: Batch) -> float:
        """One forward pass of all of `batch`."""
        return self._rows(batch).forward if self._in_rows(batch) else super().forward(batch)

    def usage(self, batch: Batch) -> float:
        """One forward and backward pass of all of `batch`."""
        return self._rows(batch).usage if self._in_rows(batch) else super().usage(batch)

    def forward_pool(self, pool: Pool) -> float:
        """One forward pass over all of `pool`, batched as for scoring: sorted by length, padding included."""
        if pool not in self._passes:
            self._passes[pool] = planned_flops(self.forward, pool)
        return self._passes[pool]

    def usages(self, pool: Pool) -> np.ndarray:
        """One forward and backward pass of each example of `pool` by itself, without padding; shape (N,)."""
        if not isinstance(self._accounting, PaperAccounting):
            return super().usages(pool)
        return self._nominal(pool, 1.0).usage * _lengths(pool)

    def _mean(self, pool: Pool) -> ExampleCost:
        if not isinstance(self._accounting, PaperAccounting):
            return super()._mean(pool)
        if pool not in self._pools:
            self._pools[pool] = self._nominal(pool, float(_lengths(pool).mean()))
        return self._pools[pool]

    def _nominal(self, pool: Pool, tokens: float) -> ExampleCost:
        """2ND FLOPs of a forward pass and 6ND of forward and backward, for N parameters and D tokens."""
        n, _ = self.task.nominal(self.model, pool.batch([0]))
        return ExampleCost(forward_flops(n, tokens), training_flops(n, tokens), tokens)

    def _in_rows(self, batch: Batch) -> bool:
        """Whether a batch is priced by its packed rows; packing makes no difference to `paper` accounting."""
        return "row" in batch.inputs and not isinstance(self._accounting, PaperAccounting)

    def _price(self, batch: Batch) -> ExampleCost:
        if isinstance(self._accounting, PaperAccounting):
            # Batches of one shape differ in their padding, so a cached price would be wrong.
            return self._accounting.price(batch)
        if not isinstance(self._accounting, MeasuredAccounting) or self._law is None:
            return super()._price(batch)
        return self._by_law(batch.inputs["input_ids"].shape[1], batch.inputs["answers"].shape[1], 1)

    def _rows(self, batch: Batch) -> ExampleCost:
        """Cost of a packed batch: of its rows, with the head at the answers of its examples."""
        rows = int(batch.inputs["row"].max() - batch.inputs["row"].min()) + 1
        length = batch.tokens // rows
        n_answers = batch.inputs["answers"].numel()
        if isinstance(self._accounting, MeasuredAccounting) and self._law is not None:
            return self._by_law(length, n_answers, rows)
        # Without the law, each row is priced as one example with an equal share of the answers.
        row = super()._price(self._probe(length, min(length, -(-n_answers // rows))))
        return ExampleCost(row.forward * rows, row.usage * rows, batch.tokens)

    def _by_law(self, length: int, n_answers: int, rows: int) -> ExampleCost:
        assert self._law is not None
        forward, usage = rows * (self._law[:, :3] @ [1, length, length**2]) + self._law[:, 3] * n_answers
        return ExampleCost(float(round(forward)), float(round(usage)), rows * length)

    @cached_property
    def _law(self) -> np.ndarray | None:
        """(a, b, c, d) of forward and of forward+backward, shape (2, 4); None if costs do not follow the law."""
        longest = self.task.longest_example
        probe_shapes = [(t * PAD_TO, a * PAD_TO) for t, a in PROBES]
        if longest[0] <= probe_shapes[-1][0]:
            return None  # There are few shapes: each is counted.
        probe_costs = np.array([super(LanguageCosts, self)._price(self._probe(*shape))[:2] for shape in probe_shapes])
        law = np.linalg.solve(np.array([[1, t, t * t, a] for t, a in probe_shapes], dtype=float), probe_costs).T
        measured = np.array(super()._price(self._probe(*longest))[:2])
        t, a = longest
        error = float(np.abs(law @ [1, t, t * t, a] / measured - 1).max())
        if error > TOLERANCE:
            log.warning(
                "%s: the FLOPs of a sequence follow no quadratic law in its length (off by %.2g at %d positions): "
                "every shape is counted by itself",
                self.task.name,
                error,
                t,
            )
            return None
        return law

    def _probe(self, length: int, n_answers: int) -> Batch:
        """A batch of one example of T = `length` positions with A = `n_answers` answers."""
        ids = torch.full((1, length), self.task.pad, dtype=torch.int64)
        answers = torch.arange(1, 1 + n_answers).clamp(max=length - 1)[None]
        labels = torch.full_like(ids, IGNORED).scatter(1, answers, ids)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "answers": answers,
            "weight": torch.ones(1),
        }
        return Batch(inputs, labels, torch.zeros(1, dtype=torch.int64), length, n_answers)


def _lengths(pool: Pool) -> np.ndarray:
    """Tokens of each sequence of a pool of text, int64, shape (N,)."""
    sizes = lengths(pool)
    assert sizes is not None
    return sizes
