"""Perplexity: the order that was asked for, answer tokens or all, and CCDS's own recipe."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from baselines.perplexity import Perplexity, shuffled_thirds
from baselines.similarity.pool_losses import in_order, whole_texts
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.ids import rank_by_score
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.tiny_llama import model_folder, sums, tokenizer, write_lines


def losses(task, model, pool=None):
    pool = pool or task.pool
    model.eval()
    with torch.no_grad():
        return np.array([float(task.losses(model, pool.batch([i]))) for i in range(len(pool))])


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_orders_are_what_they_say(request, kind):
    task = request.getfixturevalue(kind)()
    values = losses(task, task.model(0))

    def ranked(order):
        ranking = Perplexity(order=order).rank(task, seed=0, ledger=Ledger())
        return values[np.argsort(rank_by_score(ranking.ids, ranking.score))]

    assert (np.diff(ranked("low")) >= -1e-5).all()
    assert (np.diff(ranked("high")) <= 1e-5).all()
    assert (np.diff(abs(ranked("mid") - np.median(values))) >= -1e-5).all()


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_batches_change_nothing_beyond_1e_4(texts, tokens):
    task = texts()
    ranking = Perplexity(order="high", batch_tokens=tokens).rank(task, seed=0, ledger=Ledger())
    assert ranking.score == pytest.approx(losses(task, task.model(0)), rel=1e-4)


def test_answers_alone_or_every_token(texts):
    task = texts()
    model = task.model(0).eval()
    all_tokens = losses(task, model, whole_texts(task.pool))
    tokens = task.pool.examples
    with torch.no_grad():
        for i in (0, 5):
            ids = torch.from_numpy(tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]).long()[None]
            logs = torch.log_softmax(model.head(model.hidden(ids))[0, :-1], dim=1)
            each = -logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].numpy()
            assert all_tokens[i] == pytest.approx(each.mean(), rel=1e-5)
            assert losses(task, model)[i] == pytest.approx(each[-3:].mean(), rel=1e-5)


def test_images_have_no_tokens_to_add(images):
    pool = images().pool
    assert whole_texts(pool) is pool


def test_fine_tuning_is_charged_and_planned(texts):
    task, ledger = texts(batch_size=5), Ledger()
    selector = Perplexity(order="low", fine_tune=3)
    tuned = selector.rank(task, seed=0, ledger=ledger)
    assert 0 < ledger.entries[SELECT, "fine-tuning"].usages <= 60
    step = task.costs.per_usage(task.target, 5) * 5
    assert 0 <= selector.rank_plan(task).total().flops - ledger.total().flops <= 2 * step
    assert (tuned.score != Perplexity(order="low").rank(task, seed=0, ledger=Ledger()).score).any()


@pytest.mark.parametrize("order", ["low", "mid", "high"])
def test_the_papers_recipe_shuffles_within_thirds(texts, order):
    task, ledger = texts(n=90, batch_size=5), Ledger()
    selector = Perplexity(order=order, recipe="paper", fraction=1 / 3)
    ranking = selector.rank(task, seed=0, ledger=ledger)
    assert (SELECT, "fine-tuning") in ledger.entries
    assert selector.passes == 4
    place = rank_by_score(ranking.ids, ranking.score)
    assert Perplexity(order=order, recipe="paper").rank(task, seed=1, ledger=Ledger()).score.tolist() != (
        ranking.score.tolist()
    )
    assert sorted(place) == list(range(90))


@pytest.mark.parametrize(("order", "thirds"), [("low", [0, 1, 2]), ("mid", [1, 0, 2]), ("high", [2, 1, 0])])
def test_thirds(texts, order, thirds):
    pool = texts(n=90).pool
    values = np.random.default_rng(0).permutation(90).astype(float)
    one, two = (np.argsort(rank_by_score(pool.ids, shuffled_thirds(pool, values, order, s))) for s in (0, 1))
    for first in (one, two):
        assert [set(values[part] // 30) for part in np.split(first, 3)] == [{t} for t in thirds]
    assert (one != two).any()
    assert (np.diff(values[one][:30]) < 0).any()
    assert (np.diff(values[one][:30]) > 0).any()


def test_the_proxy_is_what_scores(images):
    task, proxy = copy.copy(images()), images(model="cnn")
    order = np.random.default_rng(0).permutation(len(proxy.pool))
    proxy = copy.copy(proxy)
    proxy.pool = proxy.pool.subset(order, "pool")
    task.proxy = proxy
    ledger = Ledger()
    ranking = Perplexity(order="high").rank(task, seed=0, ledger=ledger)
    by_proxy = losses(images(model="cnn"), proxy.model(0))
    assert ranking.scores_of(task.pool) == pytest.approx(by_proxy, rel=1e-4)
    assert ledger.total().flops == proxy.costs.forward_pool(proxy.pool)


def test_autocast_is_near(texts):
    task = texts()
    exact, half = (
        Perplexity(order="high", autocast=a).rank(task, seed=0, ledger=Ledger()).score for a in (False, True)
    )
    assert half == pytest.approx(exact, rel=0.03)
    assert (half != exact).any()


def test_the_median_comes_first():
    values = np.array([5.0, 1.0, 3.0, 9.0, 4.0])
    assert np.argsort(-in_order(values, "mid"), kind="stable").tolist()[0] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "top"}, "order = 'top'"),
        ({"recipe": "lasagne"}, "recipe = 'lasagne'"),
        ({"fine_tune": -1}, "fine_tune = -1"),
        ({"batch_tokens": 0}, "batch_tokens = 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Perplexity(**options)


@pytest.mark.parametrize("name", ["ppl", "less", "embedding", "loss"])
def test_a_scorer_of_another_kind_is_refused_before_compute(texts, images, name):
    """Images of the same ids as the texts they are to score for."""
    task, ledger = copy.copy(texts()), Ledger()
    other = images()
    task.proxy = copy.copy(other)
    task.proxy.pool = other.pool.subset(np.arange(len(task.pool)), "pool")
    task.proxy.target = other.target.subset(np.arange(len(task.target)), "target")
    with pytest.raises(ConfigError, match=r"reads \['images'\] .*where the task reads .*the same kind"):
        build_selector(name).select(task, Budget(4, "epochs"), seed=0, ledger=ledger)
    assert not ledger.total().flops


def test_a_model_that_is_no_language_model_cannot_score_texts(tmp_path):
    """`selector_model` names a network for images."""
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    tokenizer().save_pretrained(tmp_path / "vit")
    rows = TextSource(path=str(write_lines(tmp_path / "rows.jsonl", sums(30))))
    folder = model_folder(tmp_path / "model")
    config = LanguageConfig(
        model=str(folder), pool=[rows], n_target=5, n_test=5, max_tokens=64, selector_model=str(tmp_path / "vit")
    )
    with pytest.raises(ConfigError, match=r"vit.*cannot be loaded"):
        config.build(TrainConfig()).proxy.model(0)
