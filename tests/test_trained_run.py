"""The run that a selector has made of the final model, kept beside its Selection."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.cli.main import main
from cads.errors import CheckpointError, SelectionError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.checkpoint import State
from cads.selection import Selection
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.final import train

BUDGET = Budget(8, "epochs", count_selection=True)
DAMAGE = {
    "no values": lambda f: (f / "trained.json").unlink(),
    "no tensors": lambda f: (f / "trained.safetensors").unlink(),
    "values are no JSON": lambda f: (f / "trained.json").write_text("{"),
    "values are a list": lambda f: (f / "trained.json").write_text("[]"),
    "values are changed": lambda f: (f / "trained.json").write_text("{}"),
    "values are huge": lambda f: os.truncate(f / "trained.json", 2**27),
    "tensors are cut": lambda f: os.truncate(f / "trained.safetensors", 100),
    "tensors are changed": lambda f: (f / "trained.safetensors").write_bytes(
        (f / "trained.safetensors").read_bytes()[:-1] + b"\7"
    ),
    "a huge header": lambda f: (f / "trained.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"x" * 99),
    "a link": lambda f: ((f / "trained.json").rename(f.parent / "x"), (f / "trained.json").symlink_to(f.parent / "x")),
    "no digest": lambda f: (f / "selection.json").write_text(
        json.dumps({**json.loads((f / "selection.json").read_text()), "trained": [3]})
    ),
}
"""What can happen to the folder of such a Selection."""


def choose(task, seed=0, budget=BUDGET):
    return build_selector("cads").select(task, budget, seed=seed, ledger=Ledger())


def assert_same_weights(one, other):
    for (name, x), (_, y) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def task(features):
    return features(batch_size=8, n=80)


@pytest.fixture(scope="module")
def selection(task):
    return choose(task)


class TestOnDisk:
    @pytest.fixture
    def saved(self, selection, tmp_path):
        return selection.save(tmp_path / "s")

    def test_it_comes_back_as_it_was(self, task, selection, saved):
        loaded = Selection.load(saved)
        assert loaded.content_hash == selection.content_hash
        assert loaded._header() == selection._header()
        assert loaded.trained.values == selection.trained.values
        assert set(loaded.trained.tensors) == set(selection.trained.tensors)
        for name, x in loaded.trained.tensors.items():
            assert torch.equal(x, selection.trained.tensors[name])
            assert x.dtype == selection.trained.tensors[name].dtype
        assert_same_weights(*(train(task, s, BUDGET, seed=0).model for s in (selection, loaded)))

    def test_same_seed_same_bytes(self, task, tmp_path):
        folders = [choose(task, seed).save(tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
        for file in ("selection.json", "scores.parquet", "trained.json", "trained.safetensors"):
            one, two, other = ((folder / file).read_bytes() for folder in folders)
            assert one == two
            assert file == "trained.json" or one != other

    def test_another_run_is_another_selection(self, selection):
        tensors = {name: x.clone() for name, x in selection.trained.tensors.items()}
        tensors["weights/model.0.weight"][0, 0] += 1
        other = replace(selection, trained=State(selection.trained.values, tensors))
        assert other.content_hash != selection.content_hash

    def test_it_can_be_saved_over_a_selection_without_a_run(self, selection, tmp_path):
        without = replace(selection, trained=None)
        selection.save(without.save(tmp_path / "s"))
        assert Selection.load(tmp_path / "s").trained is not None
        without.save(tmp_path / "s")
        assert Selection.load(tmp_path / "s").trained is None
        assert not (tmp_path / "s" / "trained.json").exists()

    @pytest.mark.parametrize("damage", list(DAMAGE))
    def test_damage_is_refused(self, saved, damage):
        DAMAGE[damage](saved)
        with pytest.raises(SelectionError, match="trained"):
            Selection.load(saved)


class TestTheFinalModel:
    def test_nothing_is_trained_further(self, task, selection):
        outcome = train(task, selection, BUDGET, seed=0)
        phases = {phase for phase, _ in outcome.ledger.entries}
        assert phases == {SELECT, TRAIN, EVALUATE}
        for phase in (SELECT, TRAIN):
            assert outcome.ledger.total(phase) == selection.ledger.total(phase)
        model = outcome.model.state_dict()
        weights = {n: x for n, x in selection.trained.tensors.items() if n.startswith("weights/")}
        assert len(weights) == len(model)
        for name, x in weights.items():
            assert torch.equal(x, model[name.removeprefix("weights/model.")])
        np.testing.assert_array_equal(outcome.train_result.losses, selection.trained.tensors["losses"])
        assert outcome.train_result.flops[-1] == selection.ledger.total(TRAIN).flops

    def test_adapters_are_put_on_the_frozen_weights_of_the_run(self, features):
        """Frozen weights are not stored: they come from the seed of the selection, whatever seed is given."""
        task = features(batch_size=8, n=80)
        build = task._build

        def frozen():
            model = build()
            model[0].requires_grad_(False)
            return model

        task._build = frozen
        one, other = (train(task, choose(task), BUDGET, seed=seed).model for seed in (0, 5))
        assert_same_weights(one, other)

    def test_utilisation_is_that_of_the_run_where_its_time_is_known(self, task, selection, tmp_path):
        entry = selection.ledger.total(TRAIN)
        assert entry.seconds > 0
        outcome = train(task, selection, BUDGET, seed=0)
        assert outcome.train_result.flops_per_second == pytest.approx(entry.flops / entry.seconds)
        assert outcome.utilisation > 0
        loaded = Selection.load(selection.save(tmp_path / "s"))
        assert train(task, loaded, BUDGET, seed=0).utilisation == 0

    @pytest.mark.parametrize(
        ("budget", "seed", "said"),
        [
            (BUDGET, 0, None),
            (Budget(8, "epochs"), 0, None),
            (Budget(2, "epochs"), 0, "a budget of 2 epochs has no effect: cads trained .* with 8 epochs"),
            (BUDGET, 4, "the seed 4 has no effect: cads trained .* with the seed 0"),
        ],
    )
    def test_another_budget_or_seed_is_said(self, task, selection, caplog, budget, seed, said):
        outcome = train(task, selection, budget, seed=seed)
        assert_same_weights(outcome.model, train(task, selection, BUDGET, seed=0).model)
        result = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
        assert len(result) == (said is not None)
        assert said is None or re.search(said, result[0])


class TestRefused:
    def test_the_first_part_of_a_run_of_an_earlier_version(self, selection, tmp_path):
        file = selection.save(tmp_path / "s") / "selection.json"
        header = json.loads(file.read_text())
        header["start"] = header.pop("trained")
        file.write_text(json.dumps(header))
        with pytest.raises(SelectionError, match=r"holds the first part of a run.*select again"):
            Selection.load(tmp_path / "s")

    def test_a_run_of_another_model(self, selection, features):
        with pytest.raises(CheckpointError, match="of another model"):
            train(features(batch_size=8, n=80, hidden=9), selection, BUDGET, seed=0)

    def test_a_run_that_makes_no_sense(self, task, selection):
        state = State({**selection.trained.values, "counts": "many"}, selection.trained.tensors)
        with pytest.raises(CheckpointError, match="corrupt"):
            train(task, replace(selection, trained=state), BUDGET, seed=0)


CONFIG = """
task: {hidden: 16, n_pool: 80, n_target: 30, n_test: 30, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budget: 20 epochs
method: cads
seed: 3
progress: false
tensorboard: false
"""


def test_the_command_line_gives_the_same_as_python(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    out = str(tmp_path / "run")
    assert main(["select", str(file), "--out", out]) == 0
    assert main(["train", str(file), "--selection", out]) == 0

    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=16, n_pool=80, n_target=30, n_test=30, sources=sources)
    task = config.build(TrainConfig(batch_size=8))
    budget = Budget(20.0, "epochs")
    selection = choose(task, 3, budget)
    assert selection.trained is not None
    assert Selection.load(out).content_hash == selection.content_hash
    outcome = train(task, selection, budget, seed=3)
    trained = load_file(Path(out) / "train" / "model.safetensors")
    assert set(trained) == set(outcome.model.state_dict())
    for name, x in outcome.model.state_dict().items():
        assert torch.equal(x, trained[name])
    results = json.loads((Path(out) / "train" / "results.json").read_text())
    assert results["metrics"] == outcome.metrics
    spent = sum(entry["flops"] for entry in results["ledger"] if entry["phase"] in (SELECT, TRAIN))
    assert 0.95 * budget.flops(task) < spent <= budget.flops(task)
