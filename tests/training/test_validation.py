"""The validation curve: evenly spaced, to the last step, charged to evaluation, and without any effect."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from cads import api
from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN
from cads.cli.main import main
from cads.monitor import CURVE_POINTS, Monitor
from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.validation import FEWEST_EXAMPLES, LARGEST_SHARE, Validation


def small(n_target=100):
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=16, n_pool=300, n_target=n_target, n_test=40, sources=sources)
    return config.build(TrainConfig(batch_size=16))


@cache
def run(points, method="full", budget="32 epochs"):
    monitor = Monitor(validation_points=points)
    return api.train(small(), budget, method=method, monitor=monitor)


@pytest.mark.parametrize("method", ["full", "cads"])
def test_watching_changes_nothing_but_the_account_of_evaluation(method):
    plain, watched = run(0, method), run(20, method)
    for one, other in zip(plain.model.state_dict().values(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert plain.metrics == watched.metrics
    assert np.array_equal(plain.train_result.losses, watched.train_result.losses)
    for phase in (SELECT, TRAIN):
        assert plain.ledger.total(phase).flops == watched.ledger.total(phase).flops
    assert plain.validation == []
    spent = watched.ledger.entries[EVALUATE, "validation"].flops
    assert 0 < spent <= 1.1 * LARGEST_SHARE * watched.ledger.total(TRAIN).flops


def test_a_selection_is_the_same_whether_its_training_was_watched_or_not():
    chosen = [api.select(small(), "8 epochs", monitor=Monitor(validation_points=points)) for points in (0, 20)]
    assert (EVALUATE, "validation") in chosen[1].ledger.entries
    assert chosen[0].content_hash == chosen[1].content_hash


@pytest.mark.parametrize("method", ["full", "cads"])
def test_points_are_evenly_spaced_and_the_last_step_is_among_them(method):
    result = run(20, method)
    steps = [record["step"] for record in result.validation]
    assert 10 < len(steps) <= 21
    assert steps[-1] == len(result.train_result.losses)
    assert steps == sorted(set(steps))
    gaps = np.diff([0, *steps])
    assert gaps[:-1].max() <= 2 * np.median(gaps)
    first, last = result.validation[0]["metrics"], result.validation[-1]["metrics"]
    assert last["loss"] < first["loss"]
    assert set(last) == set(result.metrics)


def test_the_last_point_is_the_metric_of_the_trained_model():
    result = run(20, "full")
    task = small()
    validation = Validation.of(task, TRAIN, Budget.parse("32 epochs").flops(task), 20)
    assert validation is not None
    expected = task.metrics(result.model, validation.pool)
    assert result.validation[-1]["metrics"] == expected


@pytest.mark.parametrize("share", [0.5, 3.0, 30.0, 1e5])
def test_it_costs_no_more_than_its_share(share):
    """`share`: the training in units of a point on all of the target."""
    task = small(200)
    horizon = share * task.costs.forward_pool(task.target) / LARGEST_SHARE
    validation = Validation.of(task, TRAIN, horizon, 20)
    if validation is None:
        assert share < 1, "two points of the fewest examples are affordable from here on"
        return
    assert validation.points * validation.flops <= LARGEST_SHARE * horizon * (1 + 1e-9)
    assert len(validation.pool) >= FEWEST_EXAMPLES
    assert validation.points >= 2
    if share > 20:
        assert (validation.points, len(validation.pool)) == (20, 200)


def test_trials_and_unwanted_curves_have_none():
    task = small()
    assert Validation.of(task, SELECT, 1e12, 20) is None
    assert Validation.of(task, TRAIN, 1e12, 0) is None


class Curves(Monitor):
    """Keeps the points of curves."""

    def __init__(self):
        super().__init__()
        self.points = {}

    def scalar(self, tag, value, step):
        self.points.setdefault(tag, []).append((step, value))


@pytest.mark.parametrize("method", ["full", "cads"])
def test_curves_count_steps_and_reach_the_last_one(method):
    monitor = Curves()
    result = api.train(small(), "32 epochs", method=method, monitor=monitor)
    n_steps = len(result.train_result.losses)
    points = monitor.points["final model/training_loss"]
    assert n_steps > CURVE_POINTS
    assert (points[0][0], points[-1][0]) == (1, n_steps)
    assert len(points) <= 2 * (CURVE_POINTS + 2)
    for step, loss in points:
        assert loss == result.train_result.losses[step - 1, 0]
    if method == "cads":
        assert monitor.points["outer/target_share"][-1][0] == n_steps


def test_a_run_that_goes_on_has_the_curve_of_one_that_did_not_stop(tmp_path, monkeypatch):
    from cads.runtime.signals import Interrupted
    from cads.training.loop import TrainingLoop

    (tmp_path / "c.yaml").write_text(
        "task: {hidden: 16, n_pool: 300, n_target: 100, n_test: 40}\ntrain: {batch_size: 16}\n"
        "budget: 16 epochs\nmethod: full\ncheckpoint: {every_steps: 40}\n"
    )
    words = ["train", str(tmp_path / "c.yaml"), "--track", "null"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    step, taken = TrainingLoop._step, [0]

    def stopping(self, *arguments):
        taken[0] += 1
        if taken[0] == 150:
            raise Interrupted("stopped", 15)
        return step(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_step", stopping)
    assert main([*words, "--out", str(tmp_path / "stopped")]) == 128 + 15
    assert main([*words, "--out", str(tmp_path / "stopped")]) == 0
    whole, stopped = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "stopped"))
    assert whole["validation"] == stopped["validation"]
    flops = [[(e["phase"], e["stage"], e["flops"]) for e in results["ledger"]] for results in (whole, stopped)]
    assert flops[0] == flops[1]
