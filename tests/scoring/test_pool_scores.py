"""Scoring: batches that keep to their budget, the same results whatever the batch, every FLOP charged."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cads.accounting.costs import ExampleCost
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.measured import Counted, count_flops
from cads.data.pool import Pool
from cads.data.token_batches import budget_batches, by_id, lengths, scoring_batches
from cads.errors import ConfigError, DataError
from cads.scoring import pool_scores
from cads.scoring.pool_scores import planned_flops, reading_flops, score_pool
from cads.scoring.reference_models import proxy_of
from cads.scoring.stages import TrainOnPool, TrainOnTarget


def score(task, model, pool=None, **options):
    ledger = Ledger()
    model.eval()
    losses = partial(task.losses, model)
    result = score_pool(pool or task.pool, losses, task.costs.forward, ledger=ledger, stage="scores", **options)
    return result, ledger


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.randoms())
def test_batches_keep_to_their_budget(length, tokens, random):
    ids = [f"id-{i:03d}" for i in range(len(length))]
    batches = budget_batches(np.array(length), pa.array(ids), tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(length)))
    for rows in batches:
        widest = max(length[i] for i in rows)
        assert len(rows) == 1 or widest * len(rows) <= tokens
    order = list(range(len(length)))
    random.shuffle(order)
    mixed = budget_batches(np.array([length[i] for i in order]), pa.array([ids[i] for i in order]), tokens)
    assert [[ids[i] for i in rows] for rows in batches] == [[ids[order[i]] for i in rows] for rows in mixed]


def test_examples_are_sorted_so_that_little_is_padding(texts):
    task = texts(n=300)
    length = lengths(task.pool)
    assert (length == task.pool.examples.lengths()).all()
    padded = sum(task.pool.batch(rows).tokens for rows in scoring_batches(task.pool, tokens=128))
    at_best = sum(-(-n // 8) * 8 for n in length)
    assert padded <= 1.15 * at_best


def test_without_lengths_batches_are_of_one_size(features, monkeypatch):
    monkeypatch.setattr("cads.data.token_batches.SCORED_EXAMPLES", 64)
    task = features(n=200)
    assert lengths(task.pool) is None
    assert [len(rows) for rows in scoring_batches(task.pool)] == [64, 64, 64, 8]
    monkeypatch.setattr("cads.data.token_batches.SCORED_VALUES", 60)
    assert len(scoring_batches(task.pool)[0]) == 10


@pytest.mark.parametrize("kind", ["texts", "sentences", "features", "images"])
def test_batches_of_any_size_agree_with_one_at_a_time(request, kind):
    task = request.getfixturevalue(kind)()
    model = task.model(0).eval()
    with torch.no_grad():
        alone = [float(task.losses(model, task.pool.batch([i]))) for i in range(len(task.pool))]
    for tokens in (1, 100, 512):
        assert score(task, model, tokens=tokens)[0] == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["texts", "sentences", "features", "images"])
def test_reading_some_examples_costs_what_is_said_before(request, kind):
    task = request.getfixturevalue(kind)()
    some = np.flatnonzero(np.random.default_rng(0).random(len(task.pool)) < 0.3)
    said = reading_flops(task.costs.forward, task.pool, some)
    assert score(task, task.model(0), positions=some)[1].total().flops == said > 0


def test_a_permutation_changes_not_a_bit(texts):
    task = texts()
    order = np.random.default_rng(3).permutation(len(task.pool))
    mixed = Pool(task.pool.ids.take(pa.array(order)), task.pool.examples.take(order))
    assert (score(task, task.model(0))[0][order] == score(task, task.model(0), mixed)[0]).all()


def test_some_positions_alone(texts):
    task, positions = texts(), np.array([7, 3, 61])
    assert score(task, task.model(0), positions=positions)[0] == pytest.approx(
        score(task, task.model(0))[0][positions], rel=1e-5
    )


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("tokens", [1, 128, 512])
def test_what_is_executed_is_charged_and_planned(request, kind, tokens):
    task = request.getfixturevalue(kind)()
    model, executed = task.model(0).eval(), 0
    with torch.no_grad():
        for rows in scoring_batches(task.pool, tokens=tokens):
            batch = task.pool.batch(rows)
            executed += count_flops(lambda batch=batch: task.losses(model, batch))
    _, ledger = score(task, model, tokens=tokens)
    assert ledger.total(SELECT).flops == executed
    assert planned_flops(task.costs.forward, task.pool, tokens=tokens) == pytest.approx(executed, rel=1e-12)


def test_a_plan_of_many_batches_looks_at_some(texts, monkeypatch):
    task = texts(n=2000)
    at_once = planned_flops(task.costs.forward, task.pool, tokens=64)
    monkeypatch.setattr(pool_scores, "PLANNED_BATCHES", 60)
    assert planned_flops(task.costs.forward, task.pool, tokens=64) == pytest.approx(at_once, rel=0.02)


def test_features_are_counted_without_the_head(texts):
    task = texts()
    model = task.model(0)
    price = Counted(partial(task.features, model))
    batch = task.pool.batch(np.arange(5))
    executed = count_flops(lambda: task.features(model, batch))
    assert price(batch) == executed < task.costs.forward(batch)


def test_scores_that_are_not_finite_name_their_examples(features):
    task = features(n=20)
    model = task.model(0)
    rows = task.pool.examples.rows
    rows[4] = math.nan
    try:
        with pytest.raises(DataError, match="pool-4"):
            score(task, model)
    finally:
        rows[4] = 0


def test_a_budget_without_tokens_is_refused(texts):
    with pytest.raises(ConfigError, match="0 tokens"):
        scoring_batches(texts().pool, tokens=0)


class TestScorers:
    @pytest.mark.parametrize("passes", [0, 0.05, 1, 2.5])
    def test_training_is_planned_to_the_step(self, images, passes):
        task, planned, spent = images(batch_size=8), PlannedLedger(), Ledger()
        on_pool, on_target = TrainOnPool("u", passes, 2), TrainOnTarget("theta", passes)
        on_pool.charge(task, planned)
        on_target.charge(task, planned)
        on_pool.run(task, seeds=[0, 1], ledger=spent)
        on_target.run(task, seed=0, ledger=spent)
        assert planned.total().flops == pytest.approx(spent.total().flops, rel=1e-9)
        assert planned.total().usages == spent.total().usages
        if passes >= 1:
            assert spent.total().usages == 2 * round(passes * 25) * 8 + round(passes * 7.5) * 8

    def test_no_passes_are_the_initial_weights(self, images):
        task = images()
        for model in (
            TrainOnPool("u", 0).run(task, seeds=[5], ledger=Ledger())[0],
            TrainOnTarget("t", 0).run(task, seed=5, ledger=Ledger()),
        ):
            for mine, its in zip(model.parameters(), task.model(5).parameters(), strict=True):
                assert torch.equal(mine.cpu(), its)

    def test_a_permuted_pool_trains_the_same_model(self, images):
        task = images(batch_size=8)
        order = np.random.default_rng(3).permutation(len(task.pool))
        other = copy.copy(task)
        other.pool = Pool(task.pool.ids.take(pa.array(order)), task.pool.examples.take(order))
        assert by_id(other.pool).tolist() != by_id(task.pool).tolist()
        one, two = (TrainOnPool("u", 1).run(t, seeds=[0], ledger=Ledger())[0] for t in (task, other))
        for mine, its in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(mine, its)

    def test_the_proxy_scores_and_must_hold_the_same_examples(self, images):
        task, proxy = images(), images(model="cnn")
        assert proxy_of(task) is task
        task = copy.copy(task)
        task.proxy = proxy
        assert proxy_of(task) is proxy
        task.proxy = copy.copy(proxy)
        task.proxy.pool = proxy.pool.subset(np.arange(5), "pool")
        with pytest.raises(ConfigError, match="the same examples"):
            proxy_of(task)

    def test_models_that_diverge_are_refused(self, images):
        task = images(batch_size=8, learning_rate=1e30, clip_norm=None, optimizer="sgd")
        with pytest.raises(DataError, match="not finite"):
            TrainOnPool("u", 3, 2).run(task, seeds=[0, 1], ledger=Ledger())


def test_the_model_is_evaluated_not_trained(features):
    task = features(dropout=0.5)
    model = task.model(0)
    assert isinstance(model, nn.Module)
    assert (score(task, model)[0] == score(task, model)[0]).all()


def test_a_large_model_on_a_large_pool_does_not_overflow(features):
    """Closed forms give whole numbers, and their sum over a pool can be more than 64 bits hold."""
    pool = features().pool
    assert planned_flops(lambda batch: 2**62 * len(batch), pool) == pytest.approx(2.0**62 * len(pool))
    task = features()
    task.costs._accounting.price = lambda batch: ExampleCost(2**61, 2**62, 1)
    assert np.cumsum(task.costs.usages(task.pool))[-1] == pytest.approx(2.0**62 * len(task.pool))
