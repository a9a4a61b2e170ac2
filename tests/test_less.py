"""LESS against a plain loop over examples and checkpoints with autograd, and what it owes at its edges."""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from scipy.stats import spearmanr
from test_resume import resumed
from tiny_llama import model_folder, sums, write_lines
from torch import nn

import baselines.attention
import baselines.influence
from baselines.directions import AdamDirection
from baselines.gradients import PerExample, last_layer
from baselines.influence import POOL, TARGET, GradientFeatures
from baselines.less import Less
from baselines.projection import ProjectionError, Sketch
from baselines.shards import Shard, Shards
from baselines.warmup import Checkpoint, planned_flops, schedule, warm_up
from cads.budget import SELECT, Budget, Ledger
from cads.checkpoint import CheckpointConfig
from cads.counting import count_flops
from cads.errors import BudgetError, CheckpointError, ConfigError, DataError
from cads.journal import Journal
from cads.registry import build_selector
from cads.task import Pool
from cads.tasks.language import LanguageConfig
from cads.tasks.language_data import TextSource
from cads.trainer import TrainConfig

RECIPES = ["corrected", "paper", "sgd"]
BUDGET = Budget(60, "epochs")


@pytest.fixture
def task(features):
    return features(hidden=8, n=60, batch_size=8, learning_rate=1e-2)


def rank(task, seed=0, **options):
    return Less(**options).rank(task, seed=seed, ledger=Ledger())


def gradient(task, model, pool, i):
    """The gradient of one example by autograd, one vector, float64."""
    loss = task.losses(model, pool.batch([i])).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found]).double().numpy()


def direction(g, m, v, t, recipe):
    """The formulas of the paper, and of Adam."""
    if recipe == "sgd":
        return g
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    if recipe == "paper":
        return m / np.sqrt(v + 1e-8)
    return (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)


def plain_less(task, checkpoints, recipe, subtasks):
    """LESS as the formula has it: a loop over checkpoints, pool and target."""
    total = np.zeros((len(task.target), len(task.pool)))
    whole = sum(c.rate for c in checkpoints)
    for c in checkpoints:
        model = task.model(0).eval()
        model.load_state_dict(c.parameters)
        m, v = (
            np.concatenate([x.numpy().ravel() for x in part.values()]).astype(float) for part in (c.first, c.second)
        )
        t = [gradient(task, model, task.target, i) for i in range(len(task.target))]
        g = [direction(gradient(task, model, task.pool, i), m, v, c.steps, recipe) for i in range(len(task.pool))]
        t, g = (np.stack([x / np.linalg.norm(x) for x in rows]) for rows in (t, g))
        total += c.rate / whole * t @ g.T
    return np.max([total[subtasks == k].mean(axis=0) for k in np.unique(subtasks)], axis=0)


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
    np.testing.assert_allclose(both, np.max(alone, axis=0), rtol=1e-9)
    one = rank(with_subtasks(copy.copy(task), np.zeros(len(codes), int))).scores_of(task.pool)
    np.testing.assert_array_equal(one, rank(task).scores_of(task.pool))


def rank_part(task, positions):
    part = copy.copy(task)
    part.target = task.target.part(positions, "target")
    return rank(part).scores_of(task.pool)


class TestWarmUp:
    def test_one_checkpoint_an_epoch_with_moments_by_name(self, task):
        plan = schedule(task, 0.5, 4)
        assert (plan.examples, plan.steps) == (30, 4)
        ledger = Ledger()
        found = warm_up(task, plan, seed=0, ledger=ledger)
        assert [c.steps for c in found] == [4, 8, 12, 16]
        names = set(dict(task.model(0).named_parameters()))
        for c in found:
            assert set(c.parameters) == set(c.first) == set(c.second) == names
            assert all(c.first[n].shape == c.second[n].shape == p.shape for n, p in c.parameters.items())
        step = 8 * task.costs.per_usage(task.pool, 8)
        assert ledger.total(SELECT).flops == pytest.approx(16 * step)
        expected = [task.recipe.rate((s + 0.5) / 16) for s in range(16)]
        assert [c.rate for c in found] == pytest.approx(np.reshape(expected, (4, 4)).mean(axis=1), rel=1e-6)

    def test_the_moments_are_those_of_adam(self, task):
        """The last checkpoint's from the gradients of a loop of one step a time."""
        found = warm_up(task, replace(schedule(task, 0.2, 1), steps=1), seed=3, ledger=Ledger())[0]
        model = task.model(3)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, p in found.parameters.items():
            # After one step m = (1 - b1) g and v = (1 - b2) g^2.
            assert torch.allclose(found.first[name].square() / 0.01, found.second[name] / 0.001, rtol=1e-4, atol=1e-12)
            moved = found.first[name].abs() > 1e-7
            assert (torch.sign(before[name] - p)[moved] == torch.sign(found.first[name])[moved]).float().mean() > 0.95

    def test_a_small_pool_still_has_steps(self, features):
        task = features(n=5, batch_size=8, sources=0)
        assert [c.steps for c in warm_up(task, schedule(task, 0.05, 3), seed=0, ledger=Ledger())] == [1, 2, 3]

    def test_seeds_draw_other_examples(self, task):
        scores = [rank(task, seed=s).scores_of(task.pool) for s in (0, 0, 1)]
        assert (scores[0] == scores[1]).all()
        assert (scores[0] != scores[2]).any()


def checkpoint_of(task, **changes):
    return replace(warm_up(task, schedule(task, 0.2, 1), seed=0, ledger=Ledger())[0], **changes)


class TestCheckpoint:
    def test_without_moments_it_is_refused(self, task):
        bare = checkpoint_of(task, first={}, second={})
        found = GradientFeatures(Less(), task, task.model(0), 0, Ledger())
        with pytest.raises(CheckpointError, match=r"no moments of Adam for 4 of 4 parameters, such as .*0.bias"):
            found.load(bare)
        GradientFeatures(Less(recipe="sgd"), task, task.model(0), 0, Ledger()).load(bare)

    def test_half_of_the_moments_is_refused(self, task):
        sound = checkpoint_of(task)
        with pytest.raises(CheckpointError, match="have only one of them"):
            AdamDirection("paper", sound.first, {}, 1)
        direction = AdamDirection("paper", {"a": torch.ones(3)}, {"a": torch.ones(3)}, 1)
        with pytest.raises(CheckpointError, match="no moments of Adam for 'b'"):
            direction("b", torch.ones(1, 3))

    def test_of_another_model_is_refused(self, task):
        sound = checkpoint_of(task)
        with pytest.raises(CheckpointError, match="another model"):
            sound.load_into(nn.Linear(2, 2))
        with pytest.raises(CheckpointError, match=r"0.weight.*shape"):
            replace(sound, parameters={**sound.parameters, "0.weight": torch.ones(2)}).load_into(task.model(0))

    def test_its_hash_is_of_all_it_holds(self, task):
        sound = checkpoint_of(task)
        other = {n: x + (n == "2.bias") for n, x in sound.second.items()}
        hashes = {
            c.content_hash for c in (sound, replace(sound, second=other), replace(sound, steps=7), copy.deepcopy(sound))
        }
        assert len(hashes) == 3
        assert isinstance(sound, Checkpoint)


def test_batches_and_shards_change_nothing(features, monkeypatch):
    from cads import scoring

    task = features(n=50, batch_size=8)
    whole = rank(task).scores_of(task.pool)
    monkeypatch.setattr(scoring, "SCORED_EXAMPLES", 7)
    monkeypatch.setattr(baselines.influence, "SHARD_EXAMPLES", 10)
    np.testing.assert_allclose(rank(task).scores_of(task.pool), whole, rtol=1e-5, atol=1e-7)


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
        found = warm_up(task, schedule(task, 0.4, 2), seed=0, ledger=Ledger())
        model, total = task.model(0).eval(), 0.0
        for c in found:
            c.load_into(model)
            names = list(c.parameters)
            m, v = (
                np.concatenate([part[n].numpy().ravel() for n in names]).astype(float) for part in (c.first, c.second)
            )
            pool, target = ([adapters(task, model, p, i) for i in range(len(p))] for p in (task.pool, task.target))
            pool = [direction(g, m, v, c.steps, "corrected") for g in pool]
            t, g = (np.stack([x / np.linalg.norm(x) for x in rows]) for rows in (target, pool))
            total += c.rate / sum(x.rate for x in found) * (g @ t.T).mean(axis=1)
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
        found = warm_up(alone, schedule(alone, 0.2, 1), seed=0, ledger=Ledger())[0]
        scores = []
        for task in (alone, packed):
            features = GradientFeatures(Less(), task, task.model(0), 0, Ledger())
            features.load(found)
            scores.append(features.similarities(np.full((1, 6), 1 / 6), "one"))
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-7)


def adapters(task, model, pool, i):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(task.losses(model, pool.batch([i])).sum(), parameters)
    return torch.cat([g.flatten() for g in found]).double().numpy()


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
        assert less.price(task)(batch) == executed
        own = task.costs.forward(batch) + 2 * sum(gradients.sizes.values()) * batch.tokens
        assert (executed > own) == deep
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
        monkeypatch.setattr(baselines.attention, "SHORT_EXACT", 0)
        self.check(TestLanguage().task(tmp_path, peft=LORA), deep=True)

    def test_by_the_account_of_papers_it_is_a_usage(self, tmp_path):
        task = TestLanguage().task(tmp_path, peft=LORA)
        task.accounting = "paper"
        batch = task.pool.batch([0, 1])
        assert Less(layers="last").price(task)(batch) == task.costs.usage(batch)


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


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_warm_up_is_planned_in_batches_of_similar_length(texts, share):
    task, ledger = texts(n=400, batch_size=8), Ledger()
    plan = schedule(task, share, 4)
    warm_up(task, plan, seed=0, ledger=ledger)
    assert planned_flops(task, plan) == pytest.approx(ledger.total().flops, rel=0.15)


class TestFeaturesOnDisk:
    def run(self, task, folder, **options):
        ledger = Ledger()
        ranking = Less(features=str(folder), dimension=60, checkpoints=2, **options).rank(task, seed=0, ledger=ledger)
        return ranking.scores_of(task.pool), ledger.to_json(seconds=False)

    def test_an_interrupted_scoring_goes_on(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(baselines.influence, "SHARD_EXAMPLES", 20)
        monkeypatch.setattr("cads.scoring.SCORED_EXAMPLES", 10)
        scores, account = self.run(task, tmp_path / "whole")
        folder, calls = tmp_path / "cut", []
        write = baselines.shards._write

        def cut(path, key, shard):
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(key)
            write(path, key, shard)

        monkeypatch.setattr(baselines.shards, "_write", cut)
        with pytest.raises(KeyboardInterrupt):
            self.run(task, folder)
        assert len(list(folder.glob("*.safetensors"))) == 4
        monkeypatch.setattr(
            baselines.shards, "_write", lambda path, key, shard: (calls.append(key), write(path, key, shard))
        )
        again, its_account = self.run(task, folder)
        assert len(calls) == len(set(calls)) == 6
        np.testing.assert_array_equal(again, scores)
        assert its_account == account

    def test_a_damaged_or_foreign_shard_is_computed_again(self, task, tmp_path, caplog):
        scores, account = self.run(task, tmp_path)
        first, second = sorted(tmp_path.glob("*.safetensors"))
        damaged = bytearray(first.read_bytes())
        damaged[-5] ^= 1
        first.write_bytes(damaged)
        second.write_bytes(b"something else")
        again, its_account = self.run(task, tmp_path)
        np.testing.assert_array_equal(again, scores)
        assert its_account == account
        assert "is damaged: it is computed again" in caplog.text
        assert "cannot be read" in caplog.text
        swapped = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(swapped)
        np.testing.assert_array_equal(self.run(task, tmp_path)[0], scores)
        assert "holds no features of this run" in caplog.text

    def test_what_has_another_shape_is_not_even_read(self, tmp_path, monkeypatch):
        shards = Shards(tmp_path)
        features = torch.arange(6.0).view(2, 3)
        shards.get("key", 2, 3, lambda: Shard(features, {}))
        opened = baselines.shards.safe_open

        @contextmanager
        def watched(*args):
            with opened(*args) as file:
                yield SimpleNamespace(metadata=file.metadata, get_slice=file.get_slice, get_tensor=pytest.fail)

        monkeypatch.setattr(baselines.shards, "safe_open", watched)
        other = Shard(torch.zeros(5, 3), {})
        assert shards.get("key", 5, 3, lambda: other) is other

    def test_a_shard_that_cannot_be_written_is_said(self, tmp_path, monkeypatch):
        def full(*args):
            raise SafetensorError("no space left on device")

        monkeypatch.setattr(baselines.shards, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written .*no space left"):
            Shards(tmp_path).get("key", 1, 1, lambda: Shard(torch.zeros(1, 1), {}))
        assert list(tmp_path.iterdir()) == []

    def test_other_features_have_other_names(self, task, tmp_path):
        for options in ({}, {"recipe": "paper"}, {"layers": "last", "dimension": 20}):
            Less(features=str(tmp_path), **{"dimension": 50, "checkpoints": 1, **options}).rank(
                task, seed=0, ledger=Ledger()
            )
        assert len(list(tmp_path.iterdir())) == 3

    def test_kept_features_cost_what_the_accounting_of_the_task_says(self, task, tmp_path):
        self.run(task, tmp_path)
        paper = copy.copy(task)
        paper.__dict__.pop("costs", None)
        paper.accounting = "paper"
        assert self.run(paper, tmp_path)[1] == self.run(paper, tmp_path / "fresh")[1]

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "f").write_text("")
        with pytest.raises(ConfigError, match="is a file"):
            Less(features=str(tmp_path / "f"))


class TestAWarmUpThatIsKilled:
    """Of 3 epochs of 4 steps, each step written down; what `killed` counts are steps and the ends of epochs."""

    def work(self, task):
        ledger = Ledger()
        found = warm_up(task, schedule(task, 0.5, 3), seed=0, ledger=ledger)
        return [c.content_hash for c in found], [c.rate for c in found], ledger.to_json(seconds=False)

    @pytest.mark.parametrize("every", [1, 3])
    @pytest.mark.parametrize("kills", [(1,), (6, 3), (0, 2, 4)])
    def test_equals_one_that_was_not(self, task, tmp_path, kills, every):
        config = CheckpointConfig(every_seconds=None, every_steps=every)
        assert resumed(tmp_path, lambda: self.work(task), config, kills) == self.work(task)

    def test_goes_on_in_the_epoch_that_was_under_way(self, task, tmp_path):
        """Killed after the sixth step: the second process takes the other six, with moments and rates of the whole."""
        plain, calls = task.training_losses, []
        task.training_losses = lambda *given: calls.append(1) or plain(*given)
        whole = self.work(task)
        assert len(calls) == 12
        assert resumed(tmp_path, lambda: self.work(task), kills=(5,)) == whole
        assert len(calls) == 12 + 6

    def test_an_adapter_and_running_means(self, features, tmp_path):
        """Frozen weights are not kept, running means are."""
        task = features(hidden=8, n=60, batch_size=8)
        build = task._build
        task._build = lambda: nn.Sequential(nn.BatchNorm1d(6), build().requires_grad_(False), nn.Linear(3, 3))
        found = warm_up(task, schedule(task, 0.5, 2), seed=0, ledger=Ledger())
        assert {n.split(".")[0] for n in found[0].parameters} == {"0", "2"}
        assert set(found[0].buffers) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
        assert not torch.equal(found[0].buffers["0.running_mean"], found[1].buffers["0.running_mean"])
        assert resumed(tmp_path, lambda: self.work(task)) == self.work(task)


def test_a_warm_up_that_is_too_dear_is_refused(task):
    plan = schedule(task, 0.5, 3)
    whole = Ledger()
    warm_up(task, plan, seed=0, ledger=whole)
    short = Ledger(limit=0.6 * whole.total().flops)
    with pytest.raises(BudgetError, match=r"epoch 2 of 3 ends after 7 of 8 steps.*lower warmup_share or checkpoints"):
        warm_up(task, plan, seed=0, ledger=short)


def test_a_journal_goes_on_where_it_stopped(task, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.influence, "SHARD_EXAMPLES", 20)
    monkeypatch.setattr("cads.scoring.SCORED_EXAMPLES", 10)
    whole, account = Ledger(), Ledger()
    exact = Less().rank(task, seed=0, ledger=whole).scores_of(task.pool)
    each, calls = GradientFeatures._of, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return each(self, *args, **options)

    monkeypatch.setattr(GradientFeatures, "_of", interrupted)
    config = CheckpointConfig(every_steps=1)

    def run(ledger):
        with Journal(tmp_path / "j", {"run": 1}, config).open():
            return Less().rank(task, seed=0, ledger=ledger).scores_of(task.pool)

    with pytest.raises(KeyboardInterrupt):
        run(Ledger())
    monkeypatch.setattr(task, "training_losses", lambda *_: pytest.fail("warmed up again"))
    np.testing.assert_array_equal(run(account), exact)
    assert account.to_json(seconds=False) == whole.to_json(seconds=False)


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
            found = losses(model, batch)
            bad = (batch.inputs["x"][: len(found)] == torch.from_numpy(pool.examples.rows[17])).all(dim=1)
            scale = torch.ones(len(found)).masked_fill(bad & (not model.training), math.nan)
            return found * scale

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
