"""A task from arrays: it trains, plans, resumes; and what would go wrong silently is refused with the remedy."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import cads
from cads.accounting.ledger import SELECT, TRAIN
from cads.errors import CheckpointError, ConfigError, DataError
from cads.runtime.checkpoint import CheckpointConfig
from cads.runtime.run_folder import resumable_journal
from cads.selection import Selection

MSE = nn.MSELoss(reduction="none")
RECIPE = cads.TrainConfig(batch_size=8, learning_rate=0.01)


def data(n, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    return x, (x @ np.arange(4) + noise * rng.normal(size=n))[:, None]


def mlp(outputs=1):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def task(**options):
    fields = {
        "pool": {"clean": data(60, 1), "noisy": data(60, 2, noise=20)},
        "target": data(40, 3),
        "test": data(40, 4),
        "loss": MSE,
        "recipe": RECIPE,
    }
    return cads.TensorTask(**{"model": mlp, **fields, **options})


@pytest.fixture(scope="module")
def regression():
    return task(metrics={"mae": lambda output, y: (output - y).abs()})


@pytest.mark.parametrize("method", ["cads", "search", "joint", "less", "rho", "cads-e-penalty", "embedding"])
def test_every_kind_of_method_spends_its_budget_and_no_more(regression, method):
    trained = cads.train(regression, "12 epochs", method=method)
    usage = regression.costs.per_usage(regression.pool, 8)
    assert 0 < trained.ledger.total(TRAIN).flops <= 12 * 120 * usage
    assert set(trained.metrics) == {"loss", "mae"}
    assert trained.metrics["mae"] ** 2 <= trained.metrics["loss"]
    plan = cads.plan(regression, "12 epochs", method=method, flops_per_second=1e9)
    assert trained.ledger.total(SELECT).flops <= plan.methods[0].selection * 1.1


def test_the_noisy_source_is_found(regression):
    selection = cads.select(regression, "20 epochs")
    assert selection.shares["clean"] > 0.8
    assert cads.train(regression, "20 epochs", selection=selection).metrics["loss"] < 5


def test_metrics_are_those_of_the_model_on_all_examples(regression):
    model = regression.model(3)
    x, y = (torch.from_numpy(part).float() for part in data(40, 4))
    with torch.no_grad():
        error = model(x) - y
    metrics = regression.metrics(model, regression.test)
    assert metrics["loss"] == pytest.approx(float(error.square().mean()))
    assert metrics["mae"] == pytest.approx(float(error.abs().mean()))
    assert regression.objective(model, "mae").value > 0


@pytest.mark.parametrize("kind", ["array", "tuple", "mapping", "tensor"])
def test_inputs_may_be_one_or_several(kind, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, left, right):
            return self.layers(torch.cat([left, right], dim=1))

    def form(x):
        file = tmp_path / f"{len(x)}.npy"
        np.save(file, x)
        forms = {
            "array": np.load(file, mmap_mode="r"),
            "tensor": torch.from_numpy(x),
            "tuple": (x[:, :1], x[:, 1:]),
            "mapping": {"right": x[:, 1:], "left": x[:, :1]},
        }
        return forms[kind]

    parts = {name: (form(x), y) for name, (x, y) in {"pool": data(50, 1), "target": data(20, 2)}.items()}
    own = cads.TensorTask(
        mlp if kind in ("array", "tensor") else Two,
        **parts,
        test=(form(data(9)[0]), data(9)[1]),
        loss=MSE,
        recipe=RECIPE,
    )
    batch = own.pool.batch(np.array([3, 1]))
    assert torch.equal(batch.labels, torch.from_numpy(data(50, 1)[1][[3, 1]]).float())
    inputs = (
        batch.inputs["x"] if len(batch.inputs) == 1 else torch.cat([batch.inputs[k] for k in sorted(batch.inputs)], 1)
    )
    assert torch.equal(inputs, torch.from_numpy(data(50, 1)[0][[3, 1]]).float())
    assert cads.train(own, "3 epochs", method="full").metrics["loss"] > 0


def test_classes_follow_from_the_cross_entropy_of_whole_numbers(caplog):
    rng = np.random.default_rng(0)

    def classes(n):
        x = rng.normal(size=(n, 4))
        return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 1)

    fields = {"pool": classes(90), "target": classes(40), "test": classes(40), "recipe": RECIPE}
    with caplog.at_level(logging.INFO):
        own = task(model=partial(mlp, 3), loss=nn.CrossEntropyLoss(reduction="none"), **fields)
    assert "taken for 3 classes" in caplog.text
    assert own.guess_loss == pytest.approx(np.log(3))
    assert own.groups(own.pool).tolist() == own.pool.examples.labels.tolist()
    assert cads.select(own, "8 epochs", method="el2n").selected.any()
    trained = cads.train(own, "8 epochs")
    assert trained.metrics["accuracy"] == pytest.approx(1 - trained.metrics["error"])
    without = task(model=partial(mlp, 3), loss=nn.CrossEntropyLoss(reduction="none"), classes=(), **fields)
    assert (without.groups(without.pool), without.guess_loss, without.classes) == (None, None, ())
    with pytest.raises(DataError, match="2 classes"):
        task(model=partial(mlp, 2), loss=partial(functional.cross_entropy, reduction="none"), classes=2, **fields)
    with pytest.raises(ConfigError, match="gives 3 numbers"):
        task(model=partial(mlp, 3), loss=nn.CrossEntropyLoss(reduction="none"), classes=["a", "b"], **fields)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss(), r"reduction = 'mean'.*reduction='none'"),
        (functional.mse_loss, r"shape \(\) for 2 examples.*reduction='none'"),
        (lambda output, y: (output - y[:, 0]).square(), r"compares each example with all others.*labels of shape"),
        (
            lambda output, y: (output - y).square() - (output - y).square().mean(),
            "must not depend on the other examples",
        ),
        (lambda output, y: (output - y).square() + torch.rand(1), "nor on chance"),
        (lambda output, y: output.argmax(dim=1), "not a tensor of numbers"),
        (lambda output, y: float(output.sum()), "float, and not a tensor"),
        (lambda output, y: output @ y, "cannot be computed from an output of"),
        (3, "cannot be called"),
    ],
)
def test_losses_that_do_not_keep_examples_apart_are_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        task(loss=loss)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(3, 1), "cannot be called with inputs"),
        (lambda: 3, "must make a torch.nn.Module"),
        (3, "give a torch.nn.Module"),
        (nn.Sequential(nn.Tanh()), "no parameters"),
        (nn.LazyLinear(1), "lazy layers"),
        (partial(lambda module: module, mlp()), "the same module each time"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        task(model=model)


def test_a_model_that_ignores_the_seed_is_refused():
    rng = np.random.default_rng(0)

    def random_model():
        model = mlp()
        model[0].weight.data.copy_(torch.from_numpy(rng.normal(size=(8, 4))))
        return model

    with pytest.raises(ConfigError, match="other weights each time"):
        task(model=random_model)


def test_a_module_gives_its_weights_whatever_the_seed():
    module = mlp()
    own = task(model=module)
    module[0].weight.data.zero_()
    first, second = own.model(0), own.model(1)
    assert first is not second
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[0].weight.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": (data(9)[0], data(8)[1])}, "different lengths"),
        ({"pool": np.zeros((3, 4))}, r"give a pair \(X, y\)"),
        ({"target": (np.full((5, 4), np.nan), np.zeros((5, 1)))}, "5 of 5 examples of the target have missing"),
        ({"pool": (np.array([["a", "b", "c", "d"]] * 4), np.zeros((4, 1)))}, "not numbers: encode"),
        ({"target": (np.zeros((5, 3)), np.zeros((5, 1)))}, r"of the pool has the shapes .* and one of the target has"),
        ({"pool": {}}, "empty mapping"),
        ({"pool": data(5), "sources": ["a"]}, "1 sources for 5"),
        ({"target": data(1), "test": None}, "none is left"),
    ],
)
def test_data_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(DataError, match=message):
        task(**fields)


def test_settings_given_twice_or_reserved_are_refused():
    with pytest.raises(ConfigError, match="names of sources already"):
        task(sources=["a"] * 120)
    with pytest.raises(ConfigError, match=r"\['loss'\] are those of the task"):
        task(metrics={"loss": MSE})


def test_without_a_test_set_a_half_of_the_target_is_held_out(caplog):
    own = task(test=None, target=data(41, 3))
    assert (len(own.target), len(own.test)) == (21, 20)
    assert "20 of the 41 examples of the target are held out" in caplog.text
    assert not set(own.target.ids.to_pylist()) & set(own.test.ids.to_pylist())
    own.check()
    assert task(test=None, target=data(41, 3)).test.ids.equals(own.test.ids)


def test_without_sources_and_classes_cads_says_that_it_weighs_nothing(caplog):
    cads.select(task(pool=data(60, 1)), "6 epochs")
    assert "neither sources nor classes" in caplog.text


def test_a_loss_that_vmap_refuses_trains_one_by_one(caplog):
    def picky(output, y):
        return (output - y).abs() if float(y.sum()) > 1e9 else (output - y).square()

    with caplog.at_level(logging.INFO):
        own = task(loss=picky)
    assert own.recipe.replicas == "loop"
    assert "torch.vmap cannot vectorise" in caplog.text
    with pytest.raises(ConfigError, match="use 'auto' or 'loop'"):
        task(loss=picky, recipe=cads.TrainConfig(replicas="batched"))
    selection = cads.select(own, "12 epochs", method="search")
    assert selection.shares == cads.select(task(), "12 epochs", method="search").shares


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    own, expected = task(), cads.train(task(), "6 epochs", seed=2)
    losses, calls = own.losses, []

    def killed(model, batch):
        calls.append(1)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return losses(model, batch)

    def often(label, folder, identity, _, interrupts):
        return resumable_journal(label, folder, identity, CheckpointConfig(every_steps=1), interrupts)

    monkeypatch.setattr("cads.api.resumable_journal", often)
    monkeypatch.setattr(own, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        cads.train(own, "6 epochs", seed=2, checkpoints=tmp_path)
    monkeypatch.setattr(own, "losses", lambda model, batch: (calls.append(1), losses(model, batch))[1])
    calls.clear()
    resumed = cads.train(own, "6 epochs", seed=2, checkpoints=tmp_path)
    assert resumed.metrics == expected.metrics
    assert resumed.ledger.to_json(seconds=False) == expected.ledger.to_json(seconds=False)
    for one, other in zip(resumed.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    steps = len(expected.train_result.losses)
    assert len(calls) < steps
    with pytest.raises(CheckpointError):
        cads.train(own, "7 epochs", seed=2, checkpoints=tmp_path)


def test_model_and_selection_are_written_and_read(regression, tmp_path):
    selection = cads.select(regression, "4 epochs", method="random")
    selection.save(tmp_path / "selection")
    assert Selection.load(tmp_path / "selection").content_hash == selection.content_hash
    trained = cads.train(regression, "4 epochs", selection=selection)
    trained.save(tmp_path / "model")
    loaded = regression.load(tmp_path / "model")
    assert regression.metrics(loaded, regression.test) == pytest.approx(trained.metrics)


def test_tied_weights_are_written_whole(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.out(self.two(self.one(x)))

    own = task(model=Tied)
    trained = cads.train(own, "2 epochs", method="full")
    trained.save(tmp_path)
    assert torch.equal(own.load(tmp_path).two.weight, trained.model.cpu().one.weight)


def test_identity_follows_weights_and_data():
    base = task().identity
    assert task().identity == base
    assert task(model=partial(mlp, 1)).identity == base
    changed = [task(model=lambda: mlp().double()), task(target=data(40, 9)), task(loss=nn.L1Loss(reduction="none"))]
    assert all(other.identity != base for other in changed)


def test_labels_on_other_devices_find_the_weights_of_the_loss():
    own = task(
        model=partial(mlp, 2),
        pool=(data(40)[0], np.arange(40) % 2),
        target=(data(20, 1)[0], np.arange(20) % 2),
        test=(data(20, 2)[0], np.arange(20) % 2),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), reduction="none"),
    )
    assert own.guess_loss is None
    assert len(cads.plan(own, "2 epochs", method="full", flops_per_second=1e9).methods) == 1


def test_classes_and_copies_that_the_pool_lacks_or_has_are_said(caplog):
    inputs = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    pool, target = (inputs, np.arange(12) % 2), (inputs[:4], np.array([0, 1, 0, 2]))
    own = cads.TensorTask(
        partial(nn.Linear, 4, 3),
        pool=pool,
        target=target,
        test=(inputs[:2] + 1, np.zeros(2, dtype=np.int64)),
        loss=nn.CrossEntropyLoss(reduction="none"),
        recipe=cads.TrainConfig(batch_size=4),
    )
    assert "1 of 4 examples of the target are of classes that the pool lacks: 2" in caplog.text
    assert "test set" not in caplog.text
    cads.select(own, "2 epochs", method="full")
    assert "4 of 4 target examples have exact copies in the pool" in caplog.text
