"""LESS against a plain loop over examples and checkpoints with autograd, its costs, and what it owes at its edges."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import baselines.gradients.features
import baselines.kernels.attention
from baselines.gradients.features import POOL, TARGET, GradientFeatures
from baselines.gradients.per_example import PerExample, last_layer
from baselines.gradients.projection import ProjectionError, Sketch
from baselines.gradients.warmup import schedule, warm_up
from baselines.less import Less
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.measured import count_flops
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.plain_less import direction, plain_less, rank
from tests.support.tiny_llama import model_folder, sums, write_lines

RECIPES = ["corrected", "paper", "sgd"]
BUDGET = Budget(60, "epochs")


def with_subtasks(task, codes):
    task.subtasks = lambda pool: codes
    return task


@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_scores_are_those_of_a_plain_loop(task, recipe):
    codes = np.arange(len(task.target)) % 3 * 7
    checkpoints = warm_up(task, schedule(task, 0.4, 3), seed=0, ledger=Ledger())
    exact = plain_less(task, checkpoints, recipe, codes)
    ranking = rank(with_subtasks(task, codes), recipe=recipe, dimension=None, warmup_share=0.4, checkpoints=3)
    np.testing.assert_allclose(ranking.scores_of(task.pool), exact, rtol=1e-4, atol=1e-5)
    assert ranking.notes["subtasks"] == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_projected_scores_rank_alike(features, recipe):
    task = features(hidden=300, n=80, batch_size=8)
    exact, projected = (rank(task, recipe=recipe, dimension=d).scores_of(task.pool) for d in (None, 2048))
    assert spearmanr(exact, projected).statistic > 0.95


def test_the_best_subtask_counts_and_none_is_one(task):
    codes = np.arange(len(task.target)) % 2
    alone = [rank_part(task, np.flatnonzero(codes == k)) for k in (0, 1)]
    both = rank(with_subtasks(copy.copy(task), codes)).scores_of(task.pool)
    np.testing.assert_allclose(both, np.max(alone, axis=0), rtol=1e-5, atol=1e-7)
    one = rank(with_subtasks(copy.copy(task), np.zeros(len(codes), int))).scores_of(task.pool)
    np.testing.assert_array_equal(one, rank(task).scores_of(task.pool))


def rank_part(task, positions):
    part = copy.copy(task)
    part.target = task.target.subset(positions, "target")
    return rank(part).scores_of(task.pool)


def test_batches_and_shards_change_nothing(features, monkeypatch):

    task = features(n=50, batch_size=8)
    all_layers = rank(task).scores_of(task.pool)
    monkeypatch.setattr("cads.data.token_batches.SCORED_EXAMPLES", 7)
    monkeypatch.setattr(baselines.gradients.features, "SHARD_EXAMPLES", 10)
    np.testing.assert_allclose(rank(task).scores_of(task.pool), all_layers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["sentences", "images", "texts"])
@pytest.mark.parametrize("dimension", [None, 30])
def test_the_size_of_batches_changes_no_score(request, monkeypatch, kind, dimension):
    """One example a pass, a few, and many; projected or not. Texts are batched by tokens, all else by examples."""
    task, largest, scores = request.getfixturevalue(kind)(batch_size=8), [], []
    losses = task.losses
    task.losses = lambda model, batch: sizes.append(len(batch.positions)) or losses(model, batch)
    for examples, tokens in ((1, 1), (17, 100), (1000, 10**6)):
        sizes = []
        monkeypatch.setattr("cads.data.token_batches.SCORED_EXAMPLES", examples)
        scores.append(rank(task, batch_tokens=tokens, dimension=dimension, checkpoints=2).scores_of(task.pool))
        largest.append(max(sizes))
    # The warm-up has batches of 8.
    assert largest[0] == 8 < largest[1] < largest[2]
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores[1], scores[2], rtol=1e-4, atol=1e-6)


def test_sentences_of_several_lengths_and_an_embedding(sentences):
    task = sentences(batch_size=8)
    scores = rank(task).scores_of(task.pool)
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def test_a_convolutional_task_and_its_last_layer(images):
    task = images(model="cnn", batch_size=8)
    whole, last = Ledger(), Ledger()
    all_layers = Less().rank(task, seed=0, ledger=whole).scores_of(task.pool)
    last_layer = Less(layers="last").rank(task, seed=0, ledger=last).scores_of(task.pool)
    assert spearmanr(all_layers, last_layer).statistic > 0.3
    pool = SELECT, "pool gradients"
    assert last.entries[pool].flops < whole.entries[pool].flops
    for options, ledger in (({}, whole), ({"layers": "last"}, last)):
        assert Less(**options).rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"dimension": 40}, {"recipe": "sgd"}, {"checkpoints": 2, "warmup_share": 0.3}])
def test_the_plan_is_what_is_charged(task, options):
    ledger = Ledger()
    Less(**options).rank(task, seed=0, ledger=ledger)
    planned = Less(**options).rank_plan(task)
    assert {s for _, s in planned.entries} == {s for (_, s), e in ledger.entries.items() if e.flops}
    for key, entry in planned.entries.items():
        assert entry.flops == pytest.approx(ledger.entries[key].flops, rel=0.01), key
        assert entry.usages == ledger.entries[key].usages, key


def test_every_pass_is_charged(task):
    """From first principles: usages of the warm-up, of target and pool at each checkpoint, and of the check."""
    ledger = Ledger()
    Less(warmup_share=0.2, checkpoints=2).rank(task, seed=0, ledger=ledger)
    usages = {stage: e.usages for (_, stage), e in ledger.entries.items()}
    warm, pool, target = 2 * 16, 2 * len(task.pool), 2 * len(task.target) + 3
    assert usages == {
        "warm-up": warm,
        "target gradients": target,
        "pool gradients": pool,
        "projections": 0,
        "similarities": 0,
    }
    usage = task.costs.usage(task.pool.batch([0]))
    assert ledger.entries[SELECT, "pool gradients"].flops == pytest.approx(pool * usage)
    assert ledger.entries[SELECT, "target gradients"].flops == pytest.approx(target * usage)


LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


class TestLanguage:
    """On a causal language model: adapters or all weights, rows that are padded or shared."""

    def task(self, folder, **settings):
        data = write_lines(folder / "sums.jsonl", sums(40))
        model = model_folder(folder / "model")
        config = LanguageConfig(
            model=str(model), pool=[TextSource(path=str(data))], n_pool=24, n_target=6, n_test=4, **settings
        )
        return config.build(TrainConfig(batch_size=4, learning_rate=1e-2))

    def test_scores_with_adapters_are_those_of_a_plain_loop(self, tmp_path):
        task = self.task(tmp_path, peft=LORA)
        result = warm_up(task, schedule(task, 0.4, 2), seed=0, ledger=Ledger())
        model, total = task.model(0).eval(), 0.0
        for c in result:
            c.load_into(model)
            names = list(c.parameters)
            m, v = (
                np.concatenate([part[n].numpy().ravel() for n in names]).astype(float) for part in (c.first, c.second)
            )
            pool, target = ([adapters(task, model, p, i) for i in range(len(p))] for p in (task.pool, task.target))
            pool = [direction(g, m, v, c.steps, "corrected") for g in pool]
            t, g = (np.stack([x / np.linalg.norm(x) for x in rows]) for rows in (target, pool))
            total += c.rate / sum(x.rate for x in result) * (g @ t.T).mean(axis=1)
        scores = rank(task, dimension=None, warmup_share=0.4, checkpoints=2).scores_of(task.pool)
        np.testing.assert_allclose(scores, total, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("settings", [{"peft": LORA}, {}, {"peft": LORA, "packing": True}], ids=str)
    def test_the_plan_is_what_is_charged_and_no_pass_is_slow(self, tmp_path, settings, caplog):
        task, ledger = self.task(tmp_path, **settings), Ledger()
        less = Less(checkpoints=2, warmup_share=0.2)
        less.rank(task, seed=0, ledger=ledger)
        assert "one example at a time" not in caplog.text
        for key, planned in less.rank_plan(task).entries.items():
            rough = 0.3 if key[1] == "warm-up" else 0.02  # it has one batch, padded as chance will have it
            assert planned.flops == pytest.approx(ledger.entries[key].flops, rel=rough), key
            assert planned.usages == ledger.entries[key].usages

    def test_rows_that_examples_share_change_nothing(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        alone, packed = (self.task(tmp_path / n, peft=LORA, packing=n == "b") for n in "ab")
        result = warm_up(alone, schedule(alone, 0.2, 1), seed=0, ledger=Ledger())[0]
        scores = []
        for task in (alone, packed):
            features = GradientFeatures(Less().feature_config(), task, task.model(0), 0, Ledger())
            features.load(result)
            scores.append(features.similarities(np.full((1, 6), 1 / 6), "one"))
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-7)


def adapters(task, model, pool, i):
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = torch.autograd.grad(task.losses(model, pool.batch([i])).sum(), parameters)
    return torch.cat([g.flatten() for g in result]).double().numpy()


class Tied(nn.Module):
    """Its last layer has the weights of its first."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(60, 4), nn.Linear(4, 4), nn.Linear(4, 60, bias=False)
        self.head.weight = self.table.weight

    def hidden(self, tokens):
        return torch.relu(self.inner(self.table(tokens)))


class TestWhatTheLastLayerCosts:
    def check(self, task, *, deep):
        """It is charged what is executed; `deep`: more than a forward pass and the layer's own gradient."""
        less, model, batch = Less(layers="last", checkpoints=1), task.model(0), task.pool.batch([0, 1, 2])
        gradients = PerExample(task, model, last_layer(model))
        executed = count_flops(lambda: gradients.each(batch, lambda *_: None))
        assert gradients.batched
        assert less.feature_config().price(task)(batch) == executed
        example_flops = task.costs.forward(batch) + 2 * sum(gradients.sizes.values()) * batch.tokens
        assert (executed > example_flops) == deep
        assert task.costs.forward(batch) < executed < task.costs.usage(batch)
        accounted = dict(task.costs.model.named_parameters())
        assert [p.requires_grad for p in accounted.values()] == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in accounted.values())
        ledger = Ledger()
        less.rank(task, seed=0, ledger=ledger)
        planned = less.rank_plan(task).entries
        for key in ((SELECT, TARGET), (SELECT, POOL)):
            assert planned[key].flops == pytest.approx(ledger.entries[key].flops, rel=0.02), key

    @pytest.mark.parametrize("model", ["cnn", "mlp"])
    def test_where_it_gives_the_logits(self, images, model):
        self.check(images(model=model, batch_size=8), deep=False)

    def test_where_its_weights_are_those_of_the_first(self, texts):
        task = texts(batch_size=8)
        task._build = Tied
        self.check(task, deep=True)

    def test_where_it_is_an_adapter_under_other_layers(self, tmp_path, monkeypatch):
        # Torch's own attention is what is counted, and the table that is kept for short texts one product less.
        monkeypatch.setattr(baselines.kernels.attention, "SHORT_EXACT", 0)
        self.check(TestLanguage().task(tmp_path, peft=LORA), deep=True)

    def test_by_the_account_of_papers_it_is_a_usage(self, tmp_path):
        task = TestLanguage().task(tmp_path, peft=LORA)
        task.accounting = "paper"
        batch = task.pool.batch([0, 1])
        assert Less(layers="last").feature_config().price(task)(batch) == task.costs.usage(batch)


class TestProxy:
    def test_it_scores_in_place_of_the_task(self, features):
        task, small = features(hidden=16, n=40, batch_size=8), features(hidden=4, n=40, batch_size=8)
        order = np.random.default_rng(0).permutation(40)
        small.pool = Pool(small.pool.ids.take(order), small.pool.examples.take(order))
        task.proxy = small
        ledger = Ledger()
        ranking = Less().rank(task, seed=0, ledger=ledger)
        alone = Less().rank(small, seed=0, ledger=Ledger())
        np.testing.assert_array_equal(ranking.scores_of(task.pool), alone.scores_of(task.pool))
        assert ledger.total().flops == pytest.approx(Less().rank_plan(small).total().flops, rel=0.01)


class TestRefused:
    @pytest.mark.parametrize(
        "options",
        [
            {"warmup_share": 0}, {"warmup_share": 1.5}, {"checkpoints": 0}, {"batch_tokens": 0}, {"recipe": "adam"},
            {"layers": "first"}, {"precision": "fp8"}, {"dimension": "many"}, {"fraction": 2},
        ],
    )  # fmt: skip
    def test_options(self, options):
        with pytest.raises(ConfigError, match=next(iter(options))):
            build_selector("less", options)

    @pytest.mark.parametrize("options", [{"dimension": 10_000}, {"dimension": 0}])
    def test_a_dimension_above_the_gradients_before_compute(self, task, options):
        ledger = Ledger()
        for call in (
            lambda: Less(**options).rank(task, seed=0, ledger=ledger),
            lambda: Less(**options).rank_plan(task),
        ):
            with pytest.raises(ConfigError, match="dimension = "):
                call()
        assert not ledger.entries

    def test_sgd_leaves_no_moments_and_has_its_own_recipe(self, features):
        task, ledger = features(optimizer="sgd", n=40, batch_size=8), Ledger()
        with pytest.raises(ConfigError, match="keeps no moments of Adam"):
            Less().select(task, BUDGET, seed=0, ledger=ledger)
        assert not ledger.entries
        assert np.isfinite(rank(task, recipe="sgd").scores_of(task.pool)).all()

    @pytest.mark.parametrize("part", ["pool", "target"])
    def test_gradients_that_are_not_finite_by_id(self, task, part):
        pool = getattr(task, part)
        losses = task.losses

        def spoilt(model, batch):
            result = losses(model, batch)
            bad = (batch.inputs["x"][: len(result)] == torch.from_numpy(pool.examples.rows[17])).all(dim=1)
            scale = torch.ones(len(result)).masked_fill(bad & (not model.training), math.nan)
            return result * scale

        task.losses = spoilt
        with pytest.raises(DataError, match=f"1 examples of the {part}, such as \\['{part}-17'\\], are not finite"):
            rank(task)

    def test_a_projection_that_loses_everything(self, task, monkeypatch):
        monkeypatch.setattr(Sketch, "add", lambda self, name, gradient, into: None)
        with pytest.raises(ProjectionError, match="squared norms"):
            rank(task, dimension=50)


def test_an_example_without_gradient_scores_zero(task):
    losses, row = task.losses, torch.from_numpy(task.pool.examples.rows[5])
    task.losses = lambda model, batch: losses(model, batch) * (batch.inputs["x"] != row).any(dim=1)
    scores = rank(task, recipe="sgd").scores_of(task.pool)
    assert scores[5] == 0
    assert (np.delete(scores, 5) != 0).all()


def test_it_finds_the_examples_with_right_labels(features):
    task = features(hidden=16, n=200, sources=4, batch_size=8, learning_rate=1e-2)
    ranking = rank(task, warmup_share=0.3)
    scores = ranking.scores_of(task.pool)
    by_source = [scores[task.pool.sources == s].mean() for s in range(4)]
    assert by_source[0] == max(by_source)
    assert by_source[3] == min(by_source)
    assert json.dumps(ranking.notes)
