"""Batches of several steps that are loaded together are those that each step would load."""

import numpy as np
import pytest
import torch

from cads.data.window_loader import WindowLoader


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_has_its_rows_and_those_of_the_pool_come_first(features, workers):
    task, rng = features(n=40), np.random.default_rng(0)
    sizes = [(3, 2), (5, 0), (0, 4), (1, 1)]
    steps = [(rng.integers(0, 40, n), rng.integers(0, len(task.target), m)) for n, m in sizes]
    loader = WindowLoader(task.pool, task.target, workers=workers)
    for _ in range(2):
        loader.begin(steps)
        for pool_rows, target_rows in steps:
            (batch,) = next(loader)
            parts = [p.batch(rows) for p, rows in ((task.pool, pool_rows), (task.target, target_rows)) if len(rows)]
            assert torch.equal(batch.inputs["x"], torch.cat([part.inputs["x"] for part in parts]))
            assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
            assert batch.positions.tolist() == [*pool_rows.tolist(), *target_rows.tolist()]
            assert batch.tokens == sum(part.tokens for part in parts)


def test_texts_of_other_lengths_stay_in_batches_of_their_own(texts):
    task = texts(batch_size=8, n=40)
    rows = np.arange(6), np.arange(4)
    loader = WindowLoader(task.pool, task.target, workers=0)
    loader.begin([rows])
    assert [batch.positions.tolist() for batch in next(loader)] in ([[*rows[0], *rows[1]]], [[*rows[0]], [*rows[1]]])
    with pytest.raises(StopIteration):
        next(loader)
