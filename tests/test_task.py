"""The contract between data and algorithms: pools, batches, costs, and leaks that are refused."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.costs import ADAMW_FLOPS, CLIP_FLOPS, SGD_FLOPS
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig

IN, CLASSES = 6, 3


class Numbers:
    """The least payload that a pool can have."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)

    def __len__(self):
        return len(self.values)

    def batch(self, positions):
        positions = torch.as_tensor(positions)
        return Batch({"x": self.values[positions]}, positions, positions, len(positions), len(positions))

    def take(self, positions):
        return Numbers(self.values[positions])

    def shapes(self):
        return np.zeros(1, dtype=np.int64), np.zeros(len(self), dtype=np.int64)

    def digests(self):
        return [hashlib.sha256(x.numpy().tobytes()).digest() for x in self.values]

    def label_digest(self):
        return b""


def numbers(n, **options):
    return Pool([f"n{i}" for i in range(n)], Numbers(range(n)), **options)


@pytest.mark.parametrize(
    ("ids", "n", "sources", "names", "message"),
    [
        ([], 0, None, (), "empty"),
        (["a", "b", "a"], 3, None, (), r"duplicate ids.*'a'"),
        (["a", None, "c"], 3, None, (), "1 missing ids"),
        (["a", "b"], 3, None, (), "2 ids for 3 examples"),
        ([1, 2, 3], 3, None, (), "not strings"),
        (["a", "b", "c"], 3, [0, 1], ("s", "t"), "2 sources for 3"),
        (["a", "b", "c"], 3, [0, 1, 2], ("s", "t"), r"outside 0\.\.1"),
        (["a", "b", "c"], 3, [0, -1, 1], ("s", "t"), r"outside 0\.\.1"),
        (["a", "b", "c"], 3, [0, 0, 2], ("s", "t", "u"), r"no example: \['t'\]"),
    ],
)
def test_unusable_pools_are_refused_by_name(ids, n, sources, names, message):
    with pytest.raises(DataError, match=message) as caught:
        Pool(ids, Numbers(range(n)), sources, names, name="winter pool")
    assert "winter pool" in str(caught.value)


def test_ids_may_be_an_arrow_column():
    column = pa.chunked_array([["a"], ["b", "c"]])
    assert Pool(column, Numbers(range(3))).ids.to_pylist() == ["a", "b", "c"]


def test_a_pool_without_sources_says_so():
    with pytest.raises(DataError, match="no sources"):
        _ = numbers(3).source_sizes
    with pytest.raises(DataError, match="no sources"):
        numbers(3).positions_in(np.ones(1))


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 99))
def test_sources_of_a_mask_are_the_examples_it_chooses(mask, seed):
    codes = np.random.default_rng(seed).permutation(np.arange(20) % 3)
    pool = numbers(20, sources=codes, source_names="abc")
    positions = pool.positions_in(np.array(mask))
    assert len(positions) == pool.source_sizes[mask].sum()
    assert set(codes[positions]) == set(np.flatnonzero(mask))


@given(st.integers(1, 30), st.integers(1, 40))
def test_batches_cover_the_pool_once_in_order(n, size):
    batches = list(numbers(n).batches(size))
    assert all(len(b) <= size for b in batches)
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(n))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_pieces_of_a_batch_hold_their_share_of_every_replica(replicas, each, parts):
    batch = numbers(replicas * each).batch(np.arange(replicas * each))
    pieces = batch.split(parts, replicas)
    assert len(pieces) == min(parts, each)
    shares = [p.positions.view(replicas, -1) for p in pieces]
    assert torch.equal(torch.cat(shares, dim=1).flatten(), batch.positions)
    assert max(len(p) for p in pieces) - min(len(p) for p in pieces) <= replicas
    for piece in pieces:
        assert torch.equal(piece.inputs["x"], piece.labels.float())
    assert abs(sum(p.tokens for p in pieces) - batch.tokens) <= len(pieces)


def test_the_content_hash_follows_ids_contents_and_sources():
    def pool(ids="abc", values=(1, 2, 3), codes=(0, 1, 1), names="st"):
        return Pool(list(ids), Numbers(values), codes, names)

    others = [pool(ids="abd"), pool(values=(1, 2, 4)), pool(codes=(0, 0, 1)), pool(names="su"), pool(values=(1, 3, 2))]
    assert pool().content_hash == pool().content_hash
    assert len({p.content_hash for p in [pool(), *others]}) == 6


def test_labels_are_part_of_the_content_hash(features):
    task = features()
    relabelled = features().pool
    relabelled.examples.labels = (relabelled.examples.labels + 1) % CLASSES
    assert task.pool.content_hash != relabelled.content_hash


def with_target(task, *, ids=None, rows=None):
    examples = task.target.examples
    if rows is not None:
        examples = type(examples)(rows, examples.labels, examples.lengths)
    task.target = Pool(task.target.ids if ids is None else ids, examples, name="target")
    return task


@pytest.mark.parametrize("other", ["pool", "test"])
def test_a_target_that_leaks_by_id_is_refused(features, other):
    task = features()
    ids = task.target.ids.to_pylist()
    ids[7] = getattr(task, other).ids[3].as_py()
    with pytest.raises(DataError, match=rf"1 ids of the target are also in the {other}.*{other}-3"):
        with_target(task, ids=ids).check()


@pytest.mark.parametrize("other", ["pool", "test"])
def test_a_target_that_leaks_by_content_is_refused(features, other):
    task = features()
    rows = task.target.examples.rows.copy()
    rows[:30] = getattr(task, other).examples.rows[0]
    with pytest.raises(DataError, match=rf"30 of 60 target examples have exact copies in the {other}"):
        with_target(task, rows=rows).check()


def test_a_few_copies_are_a_warning(features, caplog):
    task = features()
    n = 200
    rows = np.random.default_rng(5).normal(size=(n, IN)).astype(np.float32)
    rows[0] = task.pool.examples.rows[0]
    examples = type(task.pool.examples)(rows, np.zeros(n, dtype=np.int64), np.full(n, IN))
    task.target = Pool([f"t{i}" for i in range(n)], examples, name="target")
    with caplog.at_level(logging.WARNING):
        task.check()
    assert "1 of 200 target examples have exact copies in the pool, such as ['t0']" in caplog.text


def with_test(task, *, ids=None, rows=None):
    examples = task.test.examples
    if rows is not None:
        examples = type(examples)(rows, examples.labels, examples.lengths)
    task.test = Pool(task.test.ids if ids is None else ids, examples, name="test")
    return task


def test_a_test_set_of_pool_examples_is_refused_by_id(features):
    task = features()
    ids = task.test.ids.to_pylist()
    ids[7] = "pool-3"
    with pytest.raises(DataError, match=r"1 ids of the test are also in the pool.*pool-3"):
        with_test(task, ids=ids).check()


def test_a_test_set_of_pool_examples_is_refused_by_content(features):
    task = features()
    rows = task.test.examples.rows.copy()
    n = len(rows)
    rows[: n // 2] = task.pool.examples.rows[: n // 2]
    with pytest.raises(DataError, match=rf"{n // 2} of {n} test examples have exact copies in the pool, such as"):
        with_test(task, rows=rows).check()


def test_pools_of_one_name_are_still_compared(features):
    """Names are for messages: whoever makes pools may leave them out."""
    task = features()
    task.test = Pool(task.test.ids, task.pool.examples.take(np.arange(len(task.test))))
    task.target = Pool(task.target.ids, task.target.examples)
    with pytest.raises(DataError, match="have exact copies"):
        task.check()


def test_disjoint_pools_pass(features, sentences, images):
    features().check()
    images().check()
    assert set(sentences().metrics(sentences().model(0), sentences().test)) == {"loss"}


def test_the_objective_is_a_metric_of_the_target_or_any_callable(features):
    task = features()
    model = task.model(0)
    assert task.objective(model).value == task.metrics(model, task.target)["loss"]
    assert task.objective(model, lambda t, m, pool: len(pool)).value == 60
    with pytest.raises(ConfigError, match=r"'speed'.*\['loss'\]"):
        task.objective(model, "speed")


@settings(deadline=None, max_examples=12)
@given(
    hidden=st.integers(1, 30),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    clip=st.sampled_from([None, 0.5]),
    batch=st.integers(1, 9),
)
def test_costs_equal_the_closed_form(features, hidden, optimizer, clip, batch):
    task = features(hidden=hidden, optimizer=optimizer, clip_norm=clip)
    forward = 2 * (IN * hidden + hidden * CLASSES)
    weight_gradients, input_gradient = forward, 2 * hidden * CLASSES
    usage = forward + weight_gradients + input_gradient
    parameters = IN * hidden + hidden + hidden * CLASSES + CLASSES
    each = {"adamw": ADAMW_FLOPS, "sgd": SGD_FLOPS}[optimizer] + (CLIP_FLOPS if clip else 0)
    examples = task.pool.batch(np.arange(batch))
    assert task.costs.forward(examples) == batch * forward
    assert task.costs.usage(examples) == batch * usage
    assert task.costs.optimizer_step == parameters * each
    assert task.costs.per_usage(task.pool, 8) == pytest.approx(usage + parameters * each / 8)
    assert task.costs.forward_pool(task.target) == 60 * forward
    assert task.costs.tokens_per_example(task.pool) == IN


def freeze_first_layer(model):
    model[0].requires_grad_(False)
    return model


def test_frozen_parameters_cost_no_update(features):
    task = features(hidden=8, clip_norm=None)
    build = task.model
    task.model = lambda seed: freeze_first_layer(build(seed))
    assert task.costs.optimizer_step == ADAMW_FLOPS * (8 * CLASSES + CLASSES)
    assert task.costs.usage(task.pool.batch([0])) == 2 * IN * 8 + 2 * (2 * 8 * CLASSES)


def test_costs_of_unequal_examples_are_the_mean_over_the_pool(sentences):
    task = sentences()
    alone = [task.pool.batch([i]) for i in range(len(task.pool))]
    assert len({task.costs.usage(b) for b in alone}) == 3
    step = task.costs.optimizer_step
    mean = sum(task.costs.usage(b) for b in alone) / len(alone)
    assert task.costs.per_usage(task.pool, 4) == pytest.approx(mean + step / 4)
    assert task.costs.forward_pool(task.pool) == pytest.approx(sum(task.costs.forward(b) for b in alone))
    assert task.costs.tokens_per_example(task.pool) == pytest.approx(task.pool.examples.lengths.mean())


def test_counting_leaves_the_global_generator_alone(features):
    before = torch.get_rng_state()
    features(dropout=0.5).costs.per_usage(features().pool, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_an_example_that_does_not_fit_the_model_is_bad_data(features):
    task = features()
    with pytest.raises(DataError, match="cannot run through the model"):
        task.costs.usage(task.pool.batch(np.arange(2)).map(lambda x: x[:, :4] if x.dim() == 2 else x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"accumulate": 64}, "accumulate = 64"),
        ({"workers": -1}, "workers"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"schedule": "cosin"}, "schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"replicas": "stacked"}, "replicas"),
        ({"precision": "fp16", "replicas": "batched"}, "precision = 'fp16' needs replicas = 'auto' or 'loop'"),
    ],
)
def test_bad_recipes_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_what_a_result_does_not_depend_on_is_no_part_of_its_name():
    assert (
        TrainConfig(workers=3).result_fields()
        == TrainConfig(sharding="full").result_fields()
        == TrainConfig().result_fields()
    )
    assert TrainConfig(learning_rate=0.5).result_fields() != TrainConfig().result_fields()
