"""A task from data sets of `datasets` and of `torch.utils.data`: the same results as from arrays, or a remedy."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import cads
from cads.errors import ConfigError, DataError

MSE = nn.MSELoss(reduction="none")
RECIPE = cads.TrainConfig(batch_size=8, learning_rate=0.01)


def arrays(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    return x, x.sum(axis=1, keepdims=True)


def pairs(n, seed):
    return TensorDataset(*map(torch.from_numpy, arrays(n, seed)))


def table(n, seed, **columns):
    x, y = arrays(n, seed)
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist(), **columns})


def linear():
    return nn.Linear(3, 1)


def task(**options):
    fields = {"pool": pairs(50, 1), "target": pairs(20, 2), "test": pairs(20, 3), "loss": MSE, "recipe": RECIPE}
    return cads.DatasetTask(**{"model": linear, **fields, **options})


def test_data_sets_train_as_arrays_do():
    from_arrays = cads.TensorTask(
        linear, pool=arrays(50, 1), target=arrays(20, 2), test=arrays(20, 3), loss=MSE, recipe=RECIPE
    )
    expected = cads.train(from_arrays, "4 epochs", method="joint").metrics
    of_torch = task()
    of_datasets = task(pool=table(50, 1), target=table(20, 2), test=table(20, 3))
    assert of_torch.pool.content_hash == of_datasets.pool.content_hash
    assert of_torch.pool.digests.equals(from_arrays.pool.digests)
    for own in (of_torch, of_datasets):
        assert cads.train(own, "4 epochs", method="joint").metrics == expected
        assert own.costs.per_usage(own.pool, 8) == from_arrays.costs.per_usage(from_arrays.pool, 8)
    assert cads.plan(of_torch, "4 epochs", method="cads", flops_per_second=1e9).methods[0].usages > 0


def test_worker_processes_read_the_same():
    recipe = cads.TrainConfig(batch_size=8, learning_rate=0.01, workers=1)
    expected = cads.train(task(), "2 epochs", method="full").metrics
    assert cads.train(task(recipe=recipe), "2 epochs", method="full").metrics == expected


def test_columns_of_sources_and_ids(caplog):
    pool = table(40, 1, lab=["a", "b"] * 20, key=[f"row {i}" for i in range(40)])
    with caplog.at_level(logging.INFO):
        own = task(pool=pool, target=table(20, 2), test=table(20, 3), source_column="lab", id_column="key")
    assert own.pool.source_names == ("a", "b")
    assert own.pool.ids[3].as_py() == "row 3"
    assert "label label, inputs x" in caplog.text
    selection = cads.select(own, "6 epochs")
    assert set(selection.shares) == {"a", "b"}
    chosen = cads.select(own, "1 epochs", method="random", fraction=0.25).apply(pool, id_column="key")
    assert len(chosen) == 10


def test_several_inputs_go_by_name():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Linear(1, 1)

        def forward(self, right, left):
            return self.layers((left - right)[:, None])

    def rows(n):
        return [{"left": float(i), "right": 0.5, "y": [2.0 * i], "note": "text"} for i in range(n)]

    own = task(model=Sum, pool=rows(30), target=rows(90)[30:60], test=rows(90)[60:], inputs=["left", "right"])
    batch = own.pool.batch(np.array([4]))
    assert own.output(lambda left, right: left - right, batch).tolist() == [3.5]
    with pytest.raises(DataError, match=r"note of the pool is str.*inputs="):
        task(model=Sum, pool=rows(30), target=rows(90)[30:60])


def test_sources_by_name_are_one_pool():
    own = task(pool={"a": pairs(10, 1), "b": pairs(15, 4)})
    assert own.pool.source_sizes.tolist() == [10, 15]
    assert torch.equal(own.pool.batch(np.array([12])).inputs["x"][0], pairs(15, 4)[2][0])


def sequences(n, seed):
    rng = np.random.default_rng(seed)
    return [(torch.from_numpy(rng.normal(size=(2 + i % 3, 3))).float(), torch.tensor([float(i)])) for i in range(n)]


def padded(items):
    return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, 0])


def test_examples_of_different_shapes_need_collate():
    parts = {"pool": sequences(30, 1), "target": sequences(12, 2), "test": sequences(12, 3)}
    with pytest.raises(DataError, match=r"different shapes.*give collate"):
        task(model=Recurrent, **parts).pool.batch(np.arange(3))
    own = task(model=Recurrent, collate=padded, **parts)
    representatives, codes = own.pool.examples.shapes()
    assert (len(representatives), codes.tolist()) == (3, [i % 3 for i in range(30)])
    usages = own.costs.usages(own.pool)
    assert usages[0] < usages[1] < usages[2]
    trained = cads.train(own, "3 epochs", method="full")
    assert trained.ledger.total("train").flops <= 3 * own.costs.per_usage(own.pool, 8) * 30


class Augmented(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        return torch.rand(3), torch.zeros(1)


class Broken(Augmented):
    def __getitem__(self, i):
        raise OSError("disk")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs(5, 1))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pool": Augmented()}, DataError, "another each time.*Augment in the model"),
        ({"pool": Broken()}, DataError, "cannot be read: OSError: disk"),
        ({"pool": Stream()}, ConfigError, "no length or no items"),
        ({"pool": table(5, 1).to_iterable_dataset()}, ConfigError, "no length or no items"),
        ({"pool": datasets.DatasetDict({"train": table(5, 1)})}, ConfigError, r"several splits, \['train'\]"),
        ({"target": datasets.DatasetDict({"train": table(5, 1)})}, ConfigError, r"several splits, \['train'\]"),
        ({"pool": table(5, 1).rename_column("label", "z")}, DataError, r"columns \['x', 'z'\]: name the label"),
        ({"pool": [(torch.full((3,), torch.nan), torch.zeros(1))]}, DataError, "missing or infinite.*items \\[0\\]"),
        ({"pool": [1, 2]}, DataError, "must be pairs"),
        ({"pool": []}, DataError, "empty"),
        ({"source_column": "lab"}, ConfigError, "only data sets of the library"),
        ({"pool": table(5, 1), "source_column": "lab"}, DataError, r"not 'lab'"),
        ({"pool": {"a": pairs(5, 1)}, "source_column": "lab"}, ConfigError, "one of the two"),
        ({"collate": lambda items: 1 / 0}, DataError, "collate cannot make"),
    ],
)
def test_what_cannot_be_read_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        task(**fields)
