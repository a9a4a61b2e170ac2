"""Low loss, RHO and EL2N: the formulas, against one example at a time, and that noisy labels show."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from baselines import embedding, less
from baselines.el2n import El2n, error_norms
from baselines.embedding import Embedding
from baselines.gradients.features import POOL
from baselines.less import Less
from baselines.loss import Loss
from baselines.perplexity import Perplexity
from baselines.rho import Rho
from cads.accounting.ledger import SELECT, Ledger
from cads.data import token_batches
from cads.data.token_batches import scoring_limits
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.scoring.stages import TrainOnPool, TrainOnTarget
from cads.seeding import derive
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource


def losses(task, model):
    model.eval()
    with torch.no_grad():
        return np.array([float(task.losses(model, task.pool.batch([i]))) for i in range(len(task.pool))])


@pytest.fixture(scope="module")
def noisy():
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=32, n_pool=600, n_target=200, n_test=30, sources=sources)
    return config.build(TrainConfig(batch_size=16, learning_rate=3e-3))


def clean_share(task, score):
    """Share of labels that are right among the best third."""
    best = np.argsort(-score)[: len(score) // 3]
    return 1 - task.truth.corrupted[best].mean()


def test_loss_is_that_of_a_model_fitted_to_the_target(images):
    task, ledger = images(batch_size=10), Ledger()
    selector = Loss(passes=4)
    ranking = selector.rank(task, seed=7, ledger=ledger)
    theta = TrainOnTarget("theta", 4).run(task, seed=derive(7, "theta"), ledger=Ledger())
    assert ranking.score == pytest.approx(-losses(task, theta), rel=1e-4)
    assert ledger.entries[SELECT, "theta"].usages == 240
    assert selector.rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=1e-9)


def test_rho_is_the_difference_of_two_losses(images):
    task, ledger = images(batch_size=10), Ledger()
    selector = Rho(pool_passes=2, target_passes=3)
    ranking = selector.rank(task, seed=7, ledger=ledger)
    seed = derive(7, "rho")
    theta = TrainOnTarget("theta", 3).run(task, seed=seed, ledger=Ledger())
    u = TrainOnPool("u", 2).run(task, seeds=[seed], ledger=Ledger())[0]
    assert ranking.score == pytest.approx(losses(task, u) - losses(task, theta), rel=1e-4, abs=1e-5)
    assert ledger.total().usages == 2 * 200 + 3 * 60
    assert selector.rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=1e-9)


def test_el2n_is_the_norm_of_the_error_of_the_probabilities(images):
    task = images()
    model, batch = task.model(0).eval(), task.pool.batch(np.arange(9))
    with torch.no_grad():
        actual = error_norms(task, model, batch).numpy()
        probabilities = torch.softmax(task.logits(model, batch), dim=1).numpy()
    for i, label in enumerate(batch.labels.tolist()):
        wanted = np.eye(3)[label]
        assert actual[i] == pytest.approx(np.sqrt(((probabilities[i] - wanted) ** 2).sum()), rel=1e-5)
    assert (actual < np.sqrt(2)).all()


def test_el2n_is_a_mean_over_models(images):
    task, ledger = images(batch_size=10), Ledger()
    selector = El2n(models=2, warm_up=1)
    ranking = selector.rank(task, seed=7, ledger=ledger)
    seeds = [derive(7, "el2n", k) for k in range(2)]
    models = TrainOnPool("warm-up", 1, 2).run(task, seeds=seeds, ledger=Ledger())
    with torch.no_grad():
        each = [error_norms(task, m.eval(), task.pool.batch(np.arange(200))).numpy() for m in models]
    assert ranking.score == pytest.approx(np.mean(each, axis=0), rel=1e-4)
    assert ledger.total().usages == 400
    assert selector.rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=1e-9)


@pytest.mark.parametrize("selector", [Loss(), Rho(), El2n(order="low")])
def test_labels_that_are_wrong_are_ranked_low(noisy, selector):
    score = selector.rank(noisy, seed=0, ledger=Ledger()).score
    assert clean_share(noisy, score) > clean_share(noisy, np.random.default_rng(0).random(len(score))) + 0.1


def test_orders_are_opposite(images):
    task = images()
    low, high = (Loss(order=order, passes=1).rank(task, seed=0, ledger=Ledger()).score for order in ("low", "high"))
    assert (low == -high).all()
    low, high = (El2n(order=order, models=1).rank(task, seed=0, ledger=Ledger()).score for order in ("low", "high"))
    assert (low == -high).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Loss, {"order": "best"}, "order = 'best'"),
        (Loss, {"passes": float("nan")}, "passes = nan"),
        (Rho, {"target_passes": 0}, "target_passes = 0"),
        (Rho, {"pool_passes": -1}, "pool_passes = -1"),
        (Loss, {"batch_tokens": 0}, "batch_tokens = 0"),
        (Rho, {"batch_tokens": 0}, "batch_tokens = 0"),
        (El2n, {"models": 0}, "models = 0"),
        (El2n, {"warm_up": -1}, "warm_up = -1"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "selector",
    [Loss(passes=0), Perplexity(), El2n(models=2, warm_up=0), Embedding(), Less(checkpoints=1, warmup_share=0.1)],
    ids=lambda selector: selector.method,
)
def test_plans_and_passes_follow_the_device(texts, images, monkeypatch, kind, selector):
    """With limits so small that the batches of the two devices differ in their padding."""
    monkeypatch.setattr(token_batches, "SCORED_TOKENS", 64)
    monkeypatch.setattr(token_batches, "ACCELERATOR_TOKENS", 256)
    monkeypatch.setattr(token_batches, "device_type", lambda: kind)
    monkeypatch.setattr(less, "BATCH_TOKENS", 64)
    monkeypatch.setattr(embedding, "ENCODED_TOKENS", 64)
    task, ledger = images() if isinstance(selector, El2n) else texts(subtasks=1, batch_size=8), Ledger()
    selector.rank(task, seed=0, ledger=ledger)
    planned = selector.rank_plan(task)
    if isinstance(selector, Less):
        # Which examples its warm-up and its check read is not planned.
        assert planned.entries[SELECT, POOL].flops == pytest.approx(ledger.entries[SELECT, POOL].flops, rel=1e-9)
    else:
        assert planned.total().flops == pytest.approx(ledger.total().flops, rel=1e-9)


@pytest.mark.parametrize(("kind", "expected"), [("cpu", 1024), ("cuda", 4096), ("mps", 4096)])
def test_less_and_embedding_keep_their_batches_on_a_cpu(monkeypatch, kind, expected):
    monkeypatch.setattr(token_batches, "device_type", lambda: kind)
    monkeypatch.setattr(token_batches, "scoring_limits", lambda: scoring_limits(kind))
    assert token_batches.default_tokens(less.BATCH_TOKENS) == expected
    assert token_batches.default_tokens(embedding.ENCODED_TOKENS) == expected
    assert Less().feature_config().batch_tokens == expected
    assert Less(batch_tokens=7).feature_config().batch_tokens == 7


@pytest.mark.parametrize("selector", [Loss(passes=0), Rho(target_passes=1, pool_passes=0), El2n(models=1, warm_up=0)])
def test_pools_are_read_in_the_precision_of_training(images, monkeypatch, selector):
    task, seen = copy.copy(images()), set()
    task.recipe = replace(task.recipe, precision="bf16")
    logits = task.logits

    def seen_logits(model, batch):
        result = logits(model, batch)
        if torch.is_inference_mode_enabled():
            seen.add(result.dtype)
        return result

    monkeypatch.setattr(task, "logits", seen_logits)
    selector.rank(task, seed=0, ledger=Ledger())
    assert seen == {torch.bfloat16}
