"""Training on a GPU: skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_trains_there_within_the_budget(features, precision):
    task, ledger = features(batch_size=8, precision=precision), Ledger()
    batches = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 8)
    flops = Budget(2, "epochs").flops(task)
    result = Trainer(task, ledger).fit(task.model(0), batches, flops, seed=0, phase=TRAIN, stage="model")
    assert {p.device.type for p in result.models[0].parameters()} == {"cuda"}
    assert np.isfinite(result.losses).all()
    assert 0 < ledger.total(TRAIN).flops <= flops
