"""The inner loop: budgets, learning, precision, determinism, memory."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, ConfigError, DataError, NonFiniteError
from cads.recipe import TrainConfig
from cads.seeding import derive
from cads.training.loop import MAX_SKIPPED
from cads.training.trainer import Trainer
from tests.support.fitted import (
    Course,
    assert_close,
    fit,
    fit_replicas,
    identical,
    poisoned,
    sloped,
    step_cost,
    streams_of,
    weights,
    whole_pool,
)


class StatedCosts:
    """Any price of each pool example, and of an update."""

    def __init__(self, prices, update):
        self.prices, self.optimizer_step = np.asarray(prices), update

    def usage(self, batch):
        return float(self.prices[batch.positions.numpy()].sum())


# What a run may cost.


@settings(deadline=None, max_examples=40)
@given(
    batch_size=st.integers(1, 12),
    budget=st.floats(min_value=0, exclude_min=True, max_value=12),
    scale=st.floats(1e-3, 1e18),
    update=st.floats(0, 3),
    unequal=st.booleans(),
    limited=st.booleans(),
)
def test_the_budget_is_never_exceeded_and_used_up(features, batch_size, budget, scale, update, unequal, limited):
    task = features(n=40, sources=0, batch_size=batch_size)
    prices = np.random.default_rng(0).uniform(0.5, 1.5, 40) if unequal else np.ones(40)
    task.costs = StatedCosts(scale * prices / batch_size, scale * update)
    draws, flops = whole_pool(task), scale * budget
    steps = [step_cost(task, draws.step(t)[0].positions.numpy()) for t in range(40)]
    ledger = Ledger(limit=flops) if limited else Ledger()
    asked = 10 * flops if limited else flops
    if steps[0] > flops:
        with pytest.raises(BudgetError) as caught:
            fit(task, asked, draws=draws, ledger=ledger)
        assert f"{flops:.4g} FLOPs" in str(caught.value)
        assert f"{steps[0]:.4g}" in str(caught.value)
        assert ledger.total().flops == 0
    else:
        done = fit(task, asked, draws=draws, ledger=ledger)
        spent = ledger.total(TRAIN).flops
        taken = len(done.losses)
        assert spent == done.flops[-1] <= flops
        assert spent + steps[taken] > flops
        assert np.allclose(done.flops, np.cumsum(steps[:taken]))
        assert ledger.total().usages == taken * batch_size


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 4),
    budget=st.floats(min_value=0, exclude_min=True, max_value=8),
    mode=st.sampled_from(["batched", "loop"]),
    limited=st.booleans(),
)
def test_replicas_never_exceed_the_budget(features, count, budget, mode, limited):
    task = features(n=40, sources=0, batch_size=4, replicas=mode)
    step = step_cost(task)
    ledger = Ledger(limit=count * budget * step) if limited else Ledger()
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(40), k) for k in range(count)], 4)
    trainer, models = Trainer(task, ledger), [task.model(0) for _ in range(count)]
    flops = budget * step * (10 if limited else 1)

    def run():
        return trainer.fit_replicas(models, draws, flops, seed=0, phase=SELECT, stage="short runs")

    if budget < 1:
        with pytest.raises(BudgetError, match="do not buy one step"):
            run()
        assert ledger.total().flops == 0
    else:
        done = run()
        assert done.losses.shape[1] == count
        assert done.flops[-1] <= budget * step * (1 + 1e-12)
        assert ledger.total().flops <= count * budget * step * (1 + 1e-12)
        assert ledger.total().flops > count * (budget * step - step) * (1 - 1e-9) - step


@pytest.mark.parametrize("flops", [math.inf, math.nan])
def test_a_run_without_an_end_is_refused(features, flops):
    with pytest.raises(BudgetError, match="finite"):
        fit(features(), flops)


def test_the_ledger_holds_steps_times_the_closed_form(features):
    task = features(hidden=8, batch_size=16)
    ledger = Ledger()
    fit(task, 9.5 * step_cost(task), ledger=ledger)
    forward = 2 * (6 * 8 + 8 * 3)
    usage = 2 * forward + 2 * 8 * 3
    parameters = 6 * 8 + 8 + 8 * 3 + 3
    assert ledger.total(TRAIN).flops == 9 * (16 * usage + parameters * 18)
    assert ledger.total(TRAIN).usages == 9 * 16
    assert ledger.total(TRAIN).tokens == 9 * 16 * 6
    assert ledger.total(TRAIN).seconds > 0


def test_joint_training_costs_the_same_and_counts_both_parts(features):
    task = features(batch_size=8)
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 0)], 8, target=task.target, target_fraction=0.25)
    ledger = Ledger()
    fit(task, 5 * step_cost(task), draws=draws, ledger=ledger)
    assert ledger.total().usages == 5 * 8
    assert ledger.total().flops == 5 * step_cost(task)


def test_unequal_examples_are_charged_as_they_are_padded(sentences):
    task = sentences(batch_size=4)
    ledger, draws = Ledger(), whole_pool(task)
    done = fit(task, 30 * step_cost(task), draws=draws, ledger=ledger)
    pieces = [draws.step(t)[0] for t in range(len(done.losses))]
    expected = sum(task.costs.usage(p) + task.costs.optimizer_step for p in pieces)
    assert ledger.total().flops == pytest.approx(expected)
    assert ledger.total().tokens == sum(p.tokens for p in pieces)
    assert len({p.shape for p in pieces}) > 1


# Learning.


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_learns(features, images, sentences, optimizer):
    for make in (features, images, sentences):
        task = make(batch_size=16, optimizer=optimizer, learning_rate=0.02 if optimizer == "adamw" else 0.2)
        model = task.model(0)
        before = task.objective(model, "loss").value
        done = fit(task, 120 * step_cost(task), model=model)
        assert task.objective(model, "loss").value < 0.9 * before
        assert done.training_loss[0] < done.losses[0, 0]
        assert done.models[0] is model


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_the_rate_warms_up_peaks_and_ends_near_zero(features, schedule, warmup):
    task, train_state = features(batch_size=4, schedule=schedule, warmup=warmup, learning_rate=0.1), Course()
    fit(task, 100.5 * step_cost(task), monitor=train_state)
    rates = np.array([rate for _, _, rate in train_state.points])
    rising, falling = np.diff(rates[: int(warmup * 100)]), np.diff(rates[int(warmup * 100) + 1 :])
    assert len(rates) == 100
    assert (rising > 0).all()
    assert (falling < 0).all()
    assert rates.max() == pytest.approx(0.1, rel=0.05)
    assert rates[-1] < 0.002
    if warmup:
        assert rates[0] < 0.005


def test_a_constant_rate_is_constant(features):
    task, train_state = features(batch_size=4, schedule="constant", warmup=0.0, learning_rate=0.1), Course()
    fit(task, 20 * step_cost(task), monitor=train_state)
    assert {rate for _, _, rate in train_state.points} == {0.1}


@given(st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 0.99), st.floats(0, 1))
def test_the_rate_stays_between_zero_and_its_peak(schedule, warmup, progress):
    assert 0 <= TrainConfig(schedule=schedule, warmup=warmup, learning_rate=0.3).rate(progress) <= 0.3 * (1 + 1e-12)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_one_step_of_sgd_moves_by_the_clipped_gradient(features, clip_norm):
    recipe = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    task = features(batch_size=8, optimizer="sgd", clip_norm=clip_norm, **recipe)
    model, draws = task.model(0), whole_pool(task)
    batch, before = draws.step(0)[0], weights(task.model(0))
    gradient = torch.autograd.grad(task.losses(model, batch).mean(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    fit(task, step_cost(task), model=model, draws=draws)
    factor = 1.0 if clip_norm is None else float(min(1.0, clip_norm / norm))
    for old, new, g in zip(before, weights(model), gradient, strict=True):
        # Nesterov's first step is (1 + momentum) times the gradient.
        torch.testing.assert_close(old - new, 1.9 * factor * g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("joint", [False, True])
def test_accumulation_changes_nothing(features, sentences, optimizer, joint):
    for make in (features, sentences):
        models = []
        for accumulate in (1, 4):
            task = make(batch_size=10, accumulate=accumulate, optimizer=optimizer, learning_rate=0.01, clip_norm=0.5)
            part = {"target": task.target, "target_fraction": 0.3} if joint else {}
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 10, **part)
            models.append(fit(task, 20 * step_cost(task), draws=draws).models[0])
        assert_close(*models, 1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_workers_change_nothing(features, joint):
    models = []
    for workers in (0, 1):
        task = features(batch_size=8, workers=workers)
        part = {"target": task.target, "target_fraction": 0.5} if joint else {}
        models.append(
            fit(task, 4 * step_cost(task), draws=BatchStream(task.pool, [ShuffledStream(np.arange(200), 0)], 8, **part))
        )
    assert identical(models[0].models[0], models[1].models[0])


def test_frozen_parameters_stay(features):
    for mode in ("batched", "loop"):
        task = features(batch_size=8, replicas=mode)
        models = [task.model(0) for _ in range(2)]
        for model in models:
            model[0].requires_grad_(False)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), k) for k in range(2)], 8)
        Trainer(task, Ledger()).fit_replicas(models, draws, 5 * step_cost(task), seed=0, phase=SELECT, stage="s")
        fresh = task.model(0)
        for model in models:
            assert torch.equal(model[0].weight, fresh[0].weight)
            assert not torch.equal(model[2].weight, fresh[2].weight)


def test_nothing_to_train_is_refused(features):
    task = features()
    with pytest.raises(ConfigError, match="no trainable parameter"):
        fit(task, 5 * step_cost(task), model=task.model(0).requires_grad_(False))


# Precision.


def test_bf16_is_close_to_float32_and_fits_of_both_live_together(features):
    tasks = [features(batch_size=16, precision=p, learning_rate=0.01) for p in ("no", "bf16")]
    trainers = [Trainer(task, Ledger()) for task in tasks]

    def losses(task, trainer):
        flops = 30 * step_cost(task)
        return trainer.fit(task.model(0), whole_pool(task), flops, seed=0, phase=TRAIN, stage="s").losses

    first = [losses(*pair) for pair in zip(tasks, trainers, strict=True)]
    again = [losses(*pair) for pair in zip(tasks[::-1], trainers[::-1], strict=True)][::-1]
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(*first)
    assert np.abs(first[0] - first[1]).max() < 0.05


def test_bf16_replicas_follow_bf16_runs(features):
    both = []
    for mode in ("batched", "loop"):
        task = features(batch_size=16, precision="bf16", replicas=mode)
        both.append(fit_replicas(task, 10, streams_of(task, 3)).losses)
    assert np.abs(both[0] - both[1]).max() < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for machines without")
def test_fp16_without_a_gpu_is_refused_and_others_still_work(features):
    with pytest.raises(ConfigError, match="fp16"):
        Trainer(features(precision="fp16"), Ledger())
    task = features()
    fit(task, 2 * step_cost(task))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_loss_scaling_changes_nothing(features, optimizer):
    """As with fp16 on a GPU: gradients are unscaled before they are clipped, and an overflow skips its step."""
    models = []
    for scale in (None, 2.0**10, 2.0**127):
        task = features(batch_size=8, optimizer=optimizer, clip_norm=0.5, learning_rate=0.01)
        trainer = Trainer(task, Ledger())
        trainer.accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        model = task.model(0)
        model[0].weight.data *= 100
        trainer.fit(model, whole_pool(task), 10 * step_cost(task), seed=0, phase=TRAIN, stage="s")
        models.append(model)
    assert_close(models[0], models[1], 1e-4)
    assert all(w.isfinite().all() for w in weights(models[2]))
    assert not identical(models[2], models[0])


def scaling(task, scale=2.0**10):
    """A trainer that scales the loss as with fp16, and its scaler."""
    trainer = Trainer(task, Ledger())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer, trainer.accelerator.scaler


def test_a_replica_that_diverges_under_loss_scaling_disturbs_nobody(features):
    """One scaler would skip the update of all batched replicas."""
    task = poisoned(features(batch_size=8))
    streams = [ShuffledStream(np.arange(20 + k, 200), k) for k in range(2)]
    trainer, _ = scaling(task)
    draws = BatchStream(task.pool, [streams[0], ShuffledStream(np.arange(40), 0), streams[1]], 8)
    models = [task.model(0) for _ in draws.streams]
    done = trainer.fit_replicas(models, draws, 20 * step_cost(task), seed=0, phase=SELECT, stage="s")
    assert done.diverged.tolist() == [False, True, False]
    for k, alone in zip((0, 2), fit_replicas(task, 20, streams).models, strict=True):
        assert_close(done.models[k], alone, 1e-4)


def test_gradients_that_overflow_at_every_scale_end_the_run(features):
    task = sloped(features(batch_size=8))
    trainer, _ = scaling(task)
    model = task.model(0)
    with pytest.raises(NonFiniteError, match=f"after {MAX_SKIPPED} batches skipped in a row") as caught:
        trainer.fit(model, whole_pool(task), 60 * step_cost(task), seed=0, phase=TRAIN, stage="s")
    assert caught.value.step == MAX_SKIPPED
    assert identical(model, task.model(0))
    assert trainer.ledger.total().flops == pytest.approx((MAX_SKIPPED + 1) * step_cost(task))


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_scaler_has_seen_the_step_that_failed(features, mode):
    task = poisoned(features(batch_size=8, non_finite=mode), np.inf, slice(None))
    trainer, scaler = scaling(task, 2.0**40)
    with pytest.raises(NonFiniteError):
        trainer.fit(task.model(0), whole_pool(task), 60 * step_cost(task), seed=0, phase=TRAIN, stage="s")
    assert scaler.get_scale() == 2.0 ** (40 - (1 if mode == "stop" else MAX_SKIPPED + 1))
    task.pool.examples.rows[:] = 1.0
    after = trainer.fit(task.model(0), whole_pool(task), 6 * step_cost(task), seed=0, phase=TRAIN, stage="s")
    assert (len(after.losses), after.skipped) == (6, 0)


# Randomness.


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_seed_decides_everything(features, dropout):
    task = features(dropout=dropout, batch_size=8)
    flops = 12 * step_cost(task)
    first = fit(task, flops, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (the generator that must not matter)
    second = fit(task, flops, seed=3)
    assert identical(first.models[0], second.models[0])
    assert np.array_equal(first.losses, second.losses)
    assert not identical(first.models[0], fit(task, flops, seed=4).models[0])


def test_dropout_follows_the_seed_of_the_fit(features):
    task = features(dropout=0.5, batch_size=8)
    losses = []
    for seed in (1, 1, 2):
        trainer = Trainer(task, Ledger())
        done = trainer.fit(task.model(0), whole_pool(task), 5 * step_cost(task), seed=seed, phase=TRAIN, stage="s")
        losses.append(done.losses)
    assert np.array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


@pytest.mark.parametrize("mode", ["batched", "loop"])
def test_a_fit_leaves_the_global_generators_alone(features, mode):
    task = features(dropout=0.5, batch_size=8, replicas=mode)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit_replicas(task, 5, streams_of(task, 2))
    fit(task, 5 * step_cost(task))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


@given(seed=st.integers(0, 2**63 - 1), other=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6))
def test_seeds_for_purposes_are_distinct_and_fixed(seed, other, step):
    assert derive(seed, "order", step) == derive(seed, "order", step)
    assert 0 <= derive(seed, "order", step) < 2**63
    assert derive(seed, "order", step) != derive(seed, "order", step + 1)
    assert derive(seed, "order", step) != derive(seed, "model", step)
    assert (derive(seed, "order") == derive(other, "order")) == (seed == other)


# Memory.


@pytest.mark.parametrize("mode", ["batched", "loop"])
def test_a_trainer_keeps_no_model_that_it_has_trained(features, mode):
    task = features(batch_size=8, replicas=mode)
    trainer = Trainer(task, Ledger())

    def run():
        draws = BatchStream(task.pool, streams_of(task, 2), 8)
        models = [task.model(0) for _ in range(2)]
        trainer.fit_replicas(models, draws, 3 * step_cost(task), seed=0, phase=SELECT, stage="s")
        return [weakref.ref(m) for m in models]

    remaining = run()
    gc.collect()
    assert [r() for r in remaining] == [None, None]


def test_a_batch_without_answers_is_refused_by_id_before_it_costs(sentences, monkeypatch):
    task, ledger = sentences(), Ledger()
    batch = task.pool.examples.batch
    monkeypatch.setattr(task.pool.examples, "batch", lambda positions: replace(batch(positions), answer_tokens=0))
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], task.recipe.batch_size)
    with pytest.raises(DataError, match=r"no answer token .* step 0 .*pool"):
        Trainer(task, ledger).fit(task.model(0), draws, 1e9, seed=0, phase="train", stage="run")
    assert ledger.total().flops == 0
