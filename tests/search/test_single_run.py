"""One run: selection that rides on the training of the final model, and what goes on from where it began."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.cli.main import main
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.token_batches import in_id_order
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, CheckpointError, ConfigError, DataError, SelectionError
from cads.registry import build_selector
from cads.runtime.checkpoint import State
from cads.search.inner_runs import InnerLoop
from cads.search.single_run import (
    PRETRAINED_STEPS,
    OnlineSelector,
    by_example,
    by_source,
    own_losses_tell,
    standardised,
)
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.cads_e.single_run import OneRunExamples
from cads.training.final import train
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from tests.support.killed_runs import resumed

METHODS = ("cads-e", "cads-s")
WITH_THETA = {"allowance": 0.5}
"""Enough for theta and its pass over the pool at `BUDGET`."""
BUDGET = Budget(16, "epochs", count_selection=True)


def choose(task, budget=BUDGET, *, method="cads-e", seed=0, **options):
    ledger = Ledger()
    selector = build_selector(f"{method}-one-run", options)
    selection = selector.select(task, budget, seed=seed, ledger=ledger)
    return selection, ledger


def weights_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_weights(one, other):
    for (name, x), (_, y) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def step_flops(task):
    return task.costs.usage(task.pool.batch(np.arange(task.recipe.batch_size))) + task.costs.optimizer_step


class Switched:
    """One stream up to an element, another from there on."""

    def __init__(self, before, after, at):
        self.before, self.after, self.at = before, after, at
        self.period = before.period

    def take(self, start, count):
        return (self.before if start < self.at else self.after).take(start, count)


class TestARunInParts:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("at", [1, 7, 19])
    def test_two_parts_equal_one(self, features, optimizer, at):
        task = features(dropout=0.3, batch_size=8, optimizer=optimizer, accumulate=2, learning_rate=0.02)
        build = task._build
        task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        step, steps = step_flops(task), 20

        def run(flops, segment, ledger):
            draws = BatchStream(
                task.pool, [ShuffledStream(np.arange(200), 3)], 8, target=task.target, target_fraction=0.25
            )
            trainer = Trainer(task, ledger)
            return trainer.fit(task.model(0), draws, flops, seed=1, phase=TRAIN, stage="model", segment=segment)

        ledgers = Ledger(), Ledger()
        whole = run(steps * step, RunSegment(), ledgers[0])
        first = run(at * step, RunSegment(horizon=steps * step, keep=True), ledgers[1])
        assert len(first.losses) == at
        last = run(steps * step, RunSegment(start=first.state), ledgers[1])
        np.testing.assert_array_equal(last.losses, whole.losses)
        np.testing.assert_array_equal(last.flops, whole.flops)
        assert_same_weights(last.models[0], whole.models[0])
        assert ledgers[0].to_json(seconds=False) == ledgers[1].to_json(seconds=False)
        assert last.flops_per_second * last.seconds == pytest.approx((steps - at) * step)

    def test_what_was_spent_before_counts_against_the_ledger_once(self, features):
        task = features(batch_size=8)
        ledger = Ledger(limit=20 * step_flops(task))
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 3)], 8)

        def run(flops, segment):
            fit = Trainer(task, ledger).fit(
                task.model(0), draws, flops, seed=1, phase=TRAIN, stage="m", segment=segment
            )
            return len(fit.losses), fit.state

        _, state = run(8 * step_flops(task), RunSegment(keep=True))
        assert run(1e18, RunSegment(start=state))[0] == 20
        assert ledger.total(TRAIN).flops == ledger.limit

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_the_losses_of_examples_are_theirs(self, sentences, accumulate):
        """With a model that does not move they are those of the model it began with, and of no target example."""
        task = sentences(batch_size=8, accumulate=accumulate, learning_rate=1e-30, weight_decay=0.0)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(150), 3)], 8, target=task.target, target_fraction=0.25)
        trainer, model = Trainer(task, Ledger()), task.model(0)
        flops = 12 * 8 * task.costs.per_usage(task.pool, 8)
        fit = trainer.fit(model, draws, flops, seed=1, phase=TRAIN, stage="m", segment=RunSegment(keep=True))
        seen = np.unique(np.concatenate([draws.streams[0].take(6 * s, 6) for s in range(len(fit.losses))]))
        assert 0 < len(seen) < 150
        expected = np.full(150, np.nan)
        for i in seen:
            with torch.no_grad():
                expected[i] = task.losses(task.model(0), task.pool.batch(np.array([i]))).item()
        np.testing.assert_allclose(fit.example_losses, expected, rtol=1e-5)

    def test_the_latest_loss_is_kept(self, features):
        task = features(batch_size=200, learning_rate=0.1)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 3)], 200)
        kept = []
        for steps in (1, 2):
            model = task.model(0)
            flops = (steps + 0.5) * step_flops(task)
            fit = Trainer(task, Ledger()).fit(
                model, draws, flops, seed=1, phase=TRAIN, stage="m", segment=RunSegment(horizon=1e9, keep=True)
            )
            kept.append(fit.example_losses)
        assert kept[1].mean() == pytest.approx(fit.losses[1, 0], rel=1e-5)
        assert kept[0].mean() == pytest.approx(fit.losses[0, 0], rel=1e-5)


class TestTheRun:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("options", [{}, WITH_THETA], ids=["free", "theta"])
    def test_it_equals_one_run_with_the_same_draws(self, features, method, options):
        task = features(batch_size=8, dropout=0.2, n=80)
        selection, ledger = choose(task, method=method, **options)
        assert bool(selection.notes["theta"]) == bool(options)
        outcome = train(task, selection, BUDGET, seed=0)

        reference_run = len(selection.warm_start.tensors["losses"])
        order, count = derive(0, "order"), 8 - round(0.3 * 8)
        everything = in_id_order(task.pool, np.arange(80))
        stream = Switched(ShuffledStream(everything, order), selection.stream(task.pool, order), reference_run * count)
        target_order = derive(0, "target order")
        draws = BatchStream(task.pool, [stream], 8, target=task.target, target_fraction=0.3, seed=target_order)
        flops = BUDGET.flops(task) - ledger.total(SELECT).flops
        model = task.model(derive(0, "final model"))
        whole = Trainer(task, Ledger()).fit(
            model, draws, flops, seed=derive(0, "training"), phase=TRAIN, stage="final model"
        )
        np.testing.assert_array_equal(outcome.train_result.losses, whole.losses)
        assert_same_weights(outcome.model, whole.models[0])
        assert outcome.ledger.total(TRAIN).flops == whole.flops[-1]
        assert outcome.ledger.total(TRAIN).usages == 8 * len(whole.losses)

    @settings(deadline=None, max_examples=15)
    @given(
        epochs=st.floats(0.1, 16),
        method=st.sampled_from(METHODS),
        target_fraction=st.sampled_from([0.0, 0.3, 0.7]),
        allowance=st.sampled_from([None, 0.0, 0.2, 0.5, 1.0]),
        counted=st.booleans(),
        pretrained=st.booleans(),
    )
    def test_selection_and_training_are_one_budget(
        self, features, epochs, method, target_fraction, allowance, counted, pretrained
    ):
        task = copy.copy(features(batch_size=8, n=80))
        task.pretrained = pretrained
        budget = Budget(epochs, "epochs", count_selection=counted)
        options = {"method": method, "target_fraction": target_fraction, "allowance": allowance}
        selection, ledger = choose(task, budget, **options)
        total, chosen = budget.flops(task), ledger.total(SELECT).flops
        share = (0.13 if pretrained else 0.05) if allowance is None else allowance / (1 + allowance)
        assert chosen <= share * total * (1 + 1e-9)
        del options["method"]
        planned = build_selector(f"{method}-one-run", options).plan(task, budget).total(SELECT).flops
        assert planned == pytest.approx(chosen, rel=0.01)
        outcome = train(task, selection, budget, seed=0)
        spent = outcome.ledger.total(SELECT).flops + outcome.ledger.total(TRAIN).flops
        assert total - step_flops(task) <= spent <= total * (1 + 1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_texts_are_read_by_u(self, texts, method):
        """Batches of similar lengths, whose sizes and prices differ: u reads the pool, and that is charged."""
        task = texts(batch_size=8)
        assert not own_losses_tell(task)
        selection, ledger = choose(task, Budget(40, "epochs"), method=method)
        assert selection.warm_start is not None
        assert ledger.entries[SELECT, "l*"].flops > 0
        planned = build_selector(f"{method}-one-run").plan(task, Budget(40, "epochs"))
        # Texts are padded, batch by batch: theta may take a step more or less than the mean price tells.
        step = 8 * task.costs.per_usage(task.target, 8)
        assert planned.total(SELECT).flops == pytest.approx(ledger.total(SELECT).flops, abs=1.1 * step)
        outcome = train(task, selection, Budget(40, "epochs"), seed=0)
        spent = outcome.ledger.total(SELECT).flops + outcome.ledger.total(TRAIN).flops
        assert 0.98 * Budget(40, "epochs").flops(task) < spent <= Budget(40, "epochs").flops(task)

    @pytest.mark.parametrize("method", METHODS)
    def test_below_the_threshold_it_is_joint_training(self, features, method):
        task = features(batch_size=8)
        small = Budget(3, "epochs", count_selection=True)
        selection, ledger = choose(task, small, method=method)
        assert selection.warm_start is None
        assert not ledger.total().flops
        assert "too small" in selection.notes["one run"]
        joint = build_selector("joint").select(task, small, seed=0, ledger=Ledger())
        one, other = (train(task, s, small, seed=0) for s in (selection, joint))
        assert_same_weights(one.model, other.model)

    @pytest.mark.parametrize(("epochs", "selects"), [(6, False), (30, True)])
    def test_a_pretrained_model_selects_with_a_theta_or_not_at_all(self, features, monkeypatch, epochs, selects):
        """By its losses less those of u: what both find easy, or hard, is neither better nor worse."""
        task = copy.copy(features(batch_size=8, n=80))
        task.pretrained = True
        hard = np.random.default_rng(0).permutation(80)
        found = []
        monkeypatch.setattr(InnerLoop, "losses", lambda self, *_, **__: hard + np.arange(80) / 100)
        monkeypatch.setattr(OnlineSelector, "_reference", lambda self, *_: found.append(True) or hard * 1.0)
        selection, ledger = choose(task, Budget(epochs, "epochs"))
        assert bool(found) == selects == bool(selection.notes.get("theta")) == (selection.warm_start is not None)
        if selects:
            assert ledger.entries[SELECT, "theta"].usages >= 8 * PRETRAINED_STEPS
            assert (np.diff(selection.probability) < 0).all()

    def test_without_an_allowance_it_is_not_the_budget_that_is_blamed(self, features):
        selection, ledger = choose(features(batch_size=8), Budget(100, "epochs"), allowance=0.0)
        assert selection.warm_start is None
        assert not ledger.entries
        assert "allowance = 0 leaves nothing" in selection.notes["one run"]

    @pytest.mark.parametrize("method", METHODS)
    def test_a_run_that_was_killed_goes_on(self, features, tmp_path, method):
        task = features(batch_size=8, n=80)
        budget = Budget(12, "epochs")

        def work():
            selection, ledger = choose(task, budget, method=method, **WITH_THETA)
            return selection, ledger, train(task, selection, budget, seed=0)

        selection, ledger, outcome = work()
        assert selection.warm_start is not None
        again, other_ledger, other = resumed(tmp_path, work, kills=(3, 30, 120))
        assert again.content_hash == selection.content_hash
        assert ledger.to_json(seconds=False) == other_ledger.to_json(seconds=False)
        assert outcome.ledger.to_json(seconds=False) == other.ledger.to_json(seconds=False)
        assert_same_weights(outcome.model, other.model)


class TestWeights:
    def test_standardised_within_groups(self):
        rng = np.random.default_rng(0)
        signal, groups = rng.normal(size=300), rng.integers(0, 3, 300)
        scale, shift = np.array([0.1, 1.0, 30.0]), np.array([5.0, -3.0, 0.0])
        z = standardised(signal, groups)
        for g in range(3):
            assert z[groups == g].mean() == pytest.approx(0, abs=1e-12)
            assert z[groups == g].std() == pytest.approx(1)
        np.testing.assert_allclose(standardised(signal * scale[groups] + shift[groups], groups), z, atol=1e-9)

    def test_what_is_not_known_is_neutral(self):
        assert standardised(np.array([1.0, np.nan, 3.0]), None).tolist() == [-1.0, 0.0, 1.0]
        assert standardised(np.array([2.0, 2.0, np.nan]), np.array([0, 0, 1])).tolist() == [0.0, 0.0, 0.0]

    def test_sources_get_the_weight_of_their_mean(self, features):
        pool = features().pool
        z = np.random.default_rng(0).normal(size=len(pool))
        weights = by_source(pool, z)
        for source in range(4):
            own = pool.sources == source
            assert weights[own] == pytest.approx(by_example(pool, np.full(200, z[own].mean()))[own])

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("options", [{}, WITH_THETA], ids=["free", "theta"])
    def test_sources_with_more_noise_get_less(self, features, method, options):
        task = features(batch_size=8, n=800, learning_rate=0.01)
        selection, _ = choose(task, method=method, **options)
        means = [selection.probability[task.pool.sources == s].mean() for s in range(4)]
        assert rankdata(means).tolist() == [4, 3, 2, 1]
        if method == "cads-s":
            assert list(selection.source_probability.values()) == pytest.approx(means)


DAMAGE = {
    "no values": lambda f: (f / "start.json").unlink(),
    "no tensors": lambda f: (f / "start.safetensors").unlink(),
    "values are no JSON": lambda f: (f / "start.json").write_text("{"),
    "values are a list": lambda f: (f / "start.json").write_text("[]"),
    "values are changed": lambda f: (f / "start.json").write_text("{}"),
    "values are huge": lambda f: os.truncate(f / "start.json", 2**27),
    "tensors are cut": lambda f: os.truncate(f / "start.safetensors", 100),
    "tensors are changed": lambda f: (f / "start.safetensors").write_bytes(
        (f / "start.safetensors").read_bytes()[:-1] + b"\7"
    ),
    "a huge header": lambda f: (f / "start.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"x" * 99),
    "a link": lambda f: ((f / "start.json").rename(f.parent / "x"), (f / "start.json").symlink_to(f.parent / "x")),
    "no digest": lambda f: (f / "selection.json").write_text(
        json.dumps({**json.loads((f / "selection.json").read_text()), "start": [3]})
    ),
}
"""What can happen to the folder of a Selection with a start."""


@pytest.fixture(scope="module")
def task(features):
    return features(batch_size=8, n=80)


class TestOnDisk:
    @pytest.fixture
    def saved(self, task, tmp_path):
        return choose(task)[0].save(tmp_path / "s")

    def test_it_comes_back_as_it_was(self, task, saved):
        selection, loaded = choose(task)[0], Selection.load(saved)
        assert loaded.content_hash == selection.content_hash
        assert loaded._header() == selection._header()
        assert loaded.warm_start.values == selection.warm_start.values
        assert set(loaded.warm_start.tensors) == set(selection.warm_start.tensors)
        for name, x in loaded.warm_start.tensors.items():
            assert torch.equal(x, selection.warm_start.tensors[name])
            assert x.dtype == selection.warm_start.tensors[name].dtype
        assert_same_weights(*(train(task, s, BUDGET, seed=4).model for s in (selection, loaded)))

    @pytest.mark.parametrize("method", METHODS)
    def test_same_seed_same_bytes(self, task, method, tmp_path):
        folders = [choose(task, method=method, seed=s)[0].save(tmp_path / n) for n, s in (("a", 0), ("b", 0), ("c", 1))]
        for file in ("selection.json", "scores.parquet", "start.json", "start.safetensors"):
            one, two, other = ((folder / file).read_bytes() for folder in folders)
            assert one == two
            assert file == "start.json" or one != other

    def test_another_start_is_another_selection(self, task):
        selection = choose(task)[0]
        before = selection.content_hash
        other = choose(task)[0]
        other.warm_start.tensors["weights/model.0.weight"][0, 0] += 1
        assert other.content_hash != before

    def test_it_can_be_saved_over_a_selection_without_a_start(self, task, tmp_path):
        without = choose(task, Budget(2, "epochs"))[0]
        choose(task)[0].save(without.save(tmp_path / "s"))
        assert Selection.load(tmp_path / "s").warm_start is not None
        without.save(tmp_path / "s")
        assert Selection.load(tmp_path / "s").warm_start is None
        assert not (tmp_path / "s" / "start.json").exists()

    @pytest.mark.parametrize("damage", list(DAMAGE))
    def test_damage_is_refused(self, saved, damage):
        DAMAGE[damage](saved)
        with pytest.raises(SelectionError, match="start"):
            Selection.load(saved)


class Untouched:
    """A task on which nothing may be computed."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        if name in ("model", "losses", "metrics", "objective"):
            raise AssertionError(f"{name} was used before it was refused")
        return getattr(self._task, name)


class TestRefused:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "options", [{"target_fraction": 1.0}, {"target_fraction": -0.1}, {"allowance": -1.0}, {"allowance": np.nan}]
    )
    def test_options_out_of_range(self, method, options):
        with pytest.raises(ConfigError, match=next(iter(options))):
            build_selector(f"{method}-one-run", options)

    @pytest.mark.parametrize("work", ["select", "plan"])
    def test_before_anything_is_computed(self, features, work):
        task = features(batch_size=8)
        assert task.costs.optimizer_step >= 0
        plain = features(batch_size=8, sources=0)
        plain.pool = Pool(plain.pool.ids, plain.pool.examples)

        def call(method, task, budget=BUDGET, **options):
            more = {"seed": 0, "ledger": Ledger()} if work == "select" else {}
            getattr(build_selector(f"{method}-one-run", options), work)(Untouched(task), budget, **more)

        with pytest.raises(DataError, match="has no sources"):
            call("cads-s", plain)
        with pytest.raises(ConfigError, match="leaves nothing of a batch of 8"):
            call("cads-e", task, target_fraction=0.99)
        with pytest.raises(BudgetError, match="raise the budget or lower batch_size"):
            call("cads-e", task, Budget(0.9 * step_flops(task)))

    def test_a_start_of_another_model(self, task, features):
        selection, _ = choose(task)
        with pytest.raises(CheckpointError, match="of another model"):
            train(features(batch_size=8, n=80, hidden=9), selection, BUDGET, seed=0)

    def test_a_start_that_makes_no_sense(self, task):
        selection, _ = choose(task)
        selection.warm_start = State({**selection.warm_start.values, "counts": "many"}, selection.warm_start.tensors)
        with pytest.raises(CheckpointError, match="corrupt"):
            train(task, selection, BUDGET, seed=0)

    def test_a_budget_that_the_beginning_has_used_up(self, task):
        selection, _ = choose(task)
        with pytest.raises(
            BudgetError, match=r"has begun has spent .* give the budget that the selection was made for"
        ):
            train(task, selection, Budget(2, "epochs"), seed=0)


CONFIG = """
task: {hidden: 16, n_pool: 80, n_target: 30, n_test: 30, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budget: 20 epochs
method: cads-e-one-run
seed: 3
progress: false
tensorboard: false
"""


def test_the_command_line_gives_the_same_as_python(tmp_path):
    from safetensors.torch import load_file

    from cads.recipe import TrainConfig
    from cads.tasks.vision.config import VisionConfig
    from cads.tasks.vision.synthetic_sources import SyntheticSource

    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    out = str(tmp_path / "run")
    assert main(["select", str(file), "--out", out]) == 0
    assert main(["train", str(file), "--selection", out]) == 0

    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=16, n_pool=80, n_target=30, n_test=30, sources=sources)
    task = config.build(TrainConfig(batch_size=8))
    budget, ledger = Budget(20.0, "epochs"), Ledger()
    selection = OneRunExamples().select(task, budget, seed=3, ledger=ledger)
    assert selection.warm_start is not None
    assert Selection.load(out).content_hash == selection.content_hash
    outcome = train(task, selection, budget, seed=3)
    trained = load_file(Path(out) / "train" / "model.safetensors")
    assert set(trained) == set(weights_of(outcome.model))
    for name, x in weights_of(outcome.model).items():
        assert torch.equal(x, trained[name])
    results = json.loads((Path(out) / "train" / "results.json").read_text())
    assert results["metrics"] == outcome.metrics
    spent = sum(entry["flops"] for entry in results["ledger"] if entry["phase"] in (SELECT, TRAIN))
    assert 0.95 * budget.flops(task) < spent <= budget.flops(task)
