"""The unrolled hypergradient: against finite differences of an independent training loop, and what it charges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.measured import count_flops
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from experiments.unrolled import (
    UPDATE_FLOPS,
    Batches,
    Schedule,
    Unrolled,
    WeightedSgd,
    outer_gradient,
    unrolled_products,
)

RATE, SEED = 0.1, 3
LOGITS = np.array([0.3, -0.7, 0.0, 1.1])


@pytest.fixture
def precise(features):
    """A task in float64, with four sources."""
    task = features(batch_size=10)
    for pool in (task.pool, task.target):
        pool.examples.rows = pool.examples.rows.astype(np.float64)
    build = task._build
    task._build = lambda: build().double()
    return task


@pytest.fixture(scope="module")
def task():
    """Four sources of digits; the first is clean, the third nearly so."""
    sources = [SyntheticSource(f"{i}", label_noise=level) for i, level in enumerate((0.0, 0.9, 0.1, 0.9))]
    config = VisionConfig(hidden=16, n_pool=240, n_target=100, n_test=30, sources=sources)
    return config.build(TrainConfig(batch_size=8, learning_rate=3e-3))


def validation_loss(task, logits, plain, steps, frozen):
    """Train a module by hand; the first `plain` steps with the weights of `frozen`, whatever `logits` are."""
    model, batches = task.model(SEED), Batches(task, SEED)
    for step in range(plain + steps):
        batch, sources = batches(step)
        w = torch.sigmoid(torch.from_numpy(frozen if step < plain else logits))[sources]
        losses = nn.functional.cross_entropy(model(batch.inputs["x"]), batch.labels, reduction="none")
        model.zero_grad()
        ((w * losses).sum() / w.sum()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(RATE * p.grad)
    target = task.target.batch(np.arange(len(task.target)))
    return float(nn.functional.cross_entropy(model(target.inputs["x"]), target.labels).detach())


@pytest.mark.parametrize(("plain", "steps"), [(0, 1), (0, 12), (7, 5)])
def test_the_hypergradient_is_that_of_finite_differences(precise, plain, steps):
    sgd = WeightedSgd(precise, precise.model(0), RATE)
    gradient, value = outer_gradient(sgd, LOGITS, Schedule(1, plain, steps, 0, 0), SEED)
    h = 1e-5
    expected = [
        (
            validation_loss(precise, LOGITS + h * e, plain, steps, LOGITS)
            - validation_loss(precise, LOGITS - h * e, plain, steps, LOGITS)
        )
        / (2 * h)
        for e in np.eye(4)
    ]
    assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)
    assert value == pytest.approx(validation_loss(precise, LOGITS, plain, steps, LOGITS), rel=1e-12)


def test_a_scale_of_all_weights_does_not_matter(precise):
    sgd = WeightedSgd(precise, precise.model(0), RATE)
    gradient, _ = outer_gradient(sgd, LOGITS, Schedule(1, 0, 8, 0, 0), SEED)
    # d L / d log w = d L / d a / (1 - w), and the weights are normalised.
    along_scale = gradient / (1 - 1 / (1 + np.exp(-LOGITS)))
    assert abs(along_scale.sum()) < 1e-10 * np.abs(along_scale).max()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_products_are_counted_as_they_are_executed(features, steps):
    task = features(batch_size=10)
    sgd = WeightedSgd(task, task.model(0), RATE)
    executed = count_flops(lambda: outer_gradient(sgd, np.zeros(4), Schedule(1, 2, steps, 0, 0), 0))
    plain = 10 * task.costs.per_usage(task.pool, 10) - task.costs.optimizer_step
    assert executed == 2 * plain + unrolled_products(task, steps)


def test_a_step_costs_its_closed_form(features):
    task = features(hidden=8, batch_size=10)
    first, second = (2 * layer.weight.numel() for layer in task.model(0) if isinstance(layer, nn.Linear))
    # Training: 2 and 3 products of the layers; its reverse: two for each of them that depends on the weights.
    assert unrolled_products(task, 9) - unrolled_products(task, 8) == 10 * (4 * first + 9 * second)


@pytest.mark.parametrize("budget", [Budget(0.1, "epochs"), Budget(2, "epochs")])
@pytest.mark.parametrize("allowance", [0.4, 3.0])
def test_what_is_planned_is_charged(task, budget, allowance):
    selector = Unrolled(allowance=allowance, share=0.5, unroll=10)
    ledger = Ledger()
    selection = selector.select(task, budget, seed=0, ledger=ledger)
    spent = ledger.total(SELECT)
    assert spent.flops == pytest.approx(selector.plan(task, budget).total(SELECT).flops, rel=1e-12)
    assert spent.usages == selector.plan(task, budget).total(SELECT).usages
    assert spent.flops <= allowance * budget.flops(task) * (1 + 1e-9)
    assert selection.selected.any()


def test_everything_executed_is_charged(task):
    ledger = Ledger()
    selector = Unrolled(allowance=3.0, share=0.5, unroll=10)
    assert selector.plan(task, Budget(2, "epochs")).total().flops > 0
    counting = count_flops(lambda: unrolled_products(task, 10))
    executed = count_flops(lambda: selector.select(task, Budget(2, "epochs"), seed=0, ledger=ledger))
    charged = {stage: e.flops for (_, stage), e in ledger.entries.items()}
    update = UPDATE_FLOPS * sum(p.numel() for p in task.model(0).parameters())
    steps = {stage: e.usages / 8 for (_, stage), e in ledger.entries.items()}
    products = charged["plain steps"] - steps["plain steps"] * update
    products += charged["unrolled steps"] - 3 * steps["unrolled steps"] * update
    # What prices the steps is executed too, once for the plan and once for the search.
    assert executed - 2 * counting == pytest.approx(products, rel=1e-9)


def test_it_finds_the_clean_sources(task):
    selection = Unrolled(allowance=2.0, unroll=30).select(task, Budget(4, "epochs"), seed=0, ledger=Ledger())
    assert selection.mixture()["0"] > 0
    assert selection.mixture()["1"] == selection.mixture()["3"] == 0


def test_same_seed_same_bits(task):
    table, again = (
        Unrolled(allowance=2.0, unroll=5).select(task, Budget(2, "epochs"), seed=1, ledger=Ledger()).table()
        for _ in range(2)
    )
    assert table.equals(again)


def test_a_network_with_buffers_is_refused_before_compute(task):
    other = copy.copy(task)
    other.__dict__.pop("costs", None)
    build = task._build_model
    other._build_model = lambda: nn.Sequential(build(), nn.BatchNorm1d(10))
    ledger = Ledger()
    with pytest.raises(ConfigError, match="has buffers"):
        Unrolled(allowance=3.0).select(other, Budget(2, "epochs"), seed=0, ledger=ledger)
    assert not ledger.entries


@pytest.mark.parametrize(
    "options",
    [{"share": 0}, {"share": 2}, {"unroll": 0}, {"rate": 0}, {"outer_rate": np.nan}, {"target_fraction": 1.0}],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Unrolled(**options)
