"""How much is scored at once follows the device, through one function that plans and passes share."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import PartialState

from cads.accounting.ledger import SELECT, Ledger
from cads.data import token_batches
from cads.data.token_batches import device_type, scoring_batches, scoring_limits
from cads.errors import CheckpointError
from cads.runtime.checkpoint import CheckpointConfig
from cads.runtime.journal import Journal
from cads.scoring.pool_scores import planned_flops, reading_flops, score_pool
from cads.scoring.stages import ReadPool


def on(monkeypatch, kind):
    """This process computes on a device of another kind, as far as batches go."""
    monkeypatch.setattr(PartialState, "_shared_state", {"device": torch.device(kind)})


def test_a_cpu_scores_what_it_scored():
    assert scoring_limits("cpu") == (512, 1024)


@pytest.mark.parametrize("kind", ["cuda", "cuda:1", "mps", "xpu"])
def test_other_devices_score_more_at_once(kind):
    cpu, other = scoring_limits("cpu"), scoring_limits(torch.device(kind))
    assert all(a < b for a, b in zip(cpu, other, strict=True))


def test_the_device_is_the_one_that_accelerate_chooses(monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert device_type() == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_type() == "cpu"
    on(monkeypatch, "mps")
    assert device_type() == "mps"
    assert scoring_limits() == scoring_limits("mps")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("data", ["texts", "features"])
def test_what_is_planned_is_charged_on_every_device(request, monkeypatch, kind, data):
    task = request.getfixturevalue(data)()
    monkeypatch.setattr(token_batches, "SCORED_TOKENS", 64)
    monkeypatch.setattr(token_batches, "ACCELERATOR_TOKENS", 256)
    on(monkeypatch, kind)
    ledger, model = Ledger(), task.model(0).eval()
    score_pool(task.pool, partial(task.losses, model), task.costs.forward, ledger=ledger, stage="s")
    planned = planned_flops(task.costs.forward, task.pool)
    assert ledger.total(SELECT).flops == pytest.approx(planned, rel=1e-12)
    assert planned == pytest.approx(reading_flops(task.costs.forward, task.pool, np.arange(len(task.pool))), rel=1e-12)
    assert ReadPool("s").tokens is None
    most = max(task.pool.batch(rows).tokens for rows in scoring_batches(task.pool))
    if data == "texts":
        # Rows are padded to a multiple of 8.
        assert (most < 128) == (kind == "cpu")


def test_results_do_not_depend_on_how_much_is_scored_at_once(texts, monkeypatch):
    task, scores = texts(), []
    model = task.model(0).eval()
    for kind in ("cpu", "cuda"):
        on(monkeypatch, kind)
        scores.append(
            score_pool(task.pool, partial(task.losses, model), task.costs.forward, ledger=Ledger(), stage="s")
        )
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_a_pass_that_began_on_another_device_is_refused(texts, monkeypatch, tmp_path):
    """Its batches are others, so that those that are done are not those of this device."""
    task = texts()
    model = task.model(0).eval()

    def work(kind):
        on(monkeypatch, kind)
        with Journal(tmp_path / "journal", {}, CheckpointConfig(every_seconds=None, every_steps=1)).open():
            return score_pool(task.pool, partial(task.losses, model), task.costs.forward, ledger=Ledger(), stage="s")

    first = work("cpu")
    np.testing.assert_array_equal(first, work("cpu"))
    with pytest.raises(CheckpointError, match="--overwrite true"):
        work("cuda")
