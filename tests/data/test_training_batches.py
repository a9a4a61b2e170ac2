"""What each step sees: a pure function of seed and step, every example once an epoch, shares exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.data.streams import ShuffledStream, WeightedStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, DataError

SEEDS = st.integers(0, 2**63 - 1)


@given(seed=SEEDS, n=st.integers(1, 25), epoch=st.integers(0, 5), chunk=st.integers(1, 40))
def test_every_epoch_visits_each_selected_example_once(seed, n, epoch, chunk):
    selected = np.random.default_rng(0).permutation(100)[:n]
    stream = ShuffledStream(selected, seed)
    taken = np.concatenate([stream.take(start, chunk) for start in range(0, (epoch + 1) * n, chunk)])
    visited = taken[epoch * n : (epoch + 1) * n]
    assert sorted(visited) == sorted(selected)


@given(seed=SEEDS, n=st.integers(1, 25), start=st.integers(0, 80), count=st.integers(1, 60))
def test_epochs_are_one_sequence_however_it_is_cut(seed, n, start, count):
    at_once = ShuffledStream(np.arange(n), seed).take(0, 140)
    assert np.array_equal(ShuffledStream(np.arange(n), seed).take(start, count), at_once[start : start + count])


def test_epochs_differ_in_order_and_by_seed():
    stream = ShuffledStream(np.arange(50), 0)
    assert not np.array_equal(stream.take(0, 50), stream.take(50, 50))
    assert not np.array_equal(stream.take(0, 50), ShuffledStream(np.arange(50), 1).take(0, 50))


@given(seed=SEEDS, steps=st.lists(st.integers(0, 60), min_size=1, max_size=8), weighted=st.booleans())
def test_a_step_does_not_depend_on_the_steps_before_it(features_task, seed, steps, weighted):
    def draws():
        stream = WeightedStream(np.arange(200.0), seed) if weighted else ShuffledStream(np.arange(200), seed)
        return BatchStream(features_task.pool, [stream], 7, target=features_task.target, target_fraction=0.3, seed=1)

    used = draws()
    for step in steps:
        fresh, again = draws().step(step), used.step(step)
        assert [p.positions.tolist() for p in fresh] == [p.positions.tolist() for p in again]


@pytest.fixture(scope="module")
def features_task(features):
    return features()


@pytest.mark.parametrize("draw", [lambda s: ShuffledStream(np.array([], dtype=np.int64), s)])
def test_nothing_to_draw_from_is_refused(draw):
    with pytest.raises(DataError, match="no example is selected"):
        draw(0)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [np.nan, 1], [np.inf, 1], []])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(DataError, match="weights"):
        WeightedStream(np.array(weights, dtype=float), 0)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, weights=st.lists(st.sampled_from([0, 0, 0.5, 1, 2, 7]), min_size=2, max_size=8).filter(any))
def test_weighted_draws_have_their_frequencies(seed, weights):
    p = np.array(weights) / sum(weights)
    stream, n = WeightedStream(np.array(weights), seed), 20_000
    drawn = np.concatenate([stream.take(start, 500) for start in range(0, n, 500)])
    frequencies = np.bincount(drawn, minlength=len(p)) / n
    assert (frequencies[p == 0] == 0).all()
    assert (np.abs(frequencies - p) <= 6 * np.sqrt(p * (1 - p) / n) + 1e-12).all()


def split(batch, draws, pool, target):
    """The positions of a one-replica batch that come from the pool, and from the target."""
    ids = draws.ids([batch])
    known = set(pool.ids.to_pylist()), set(target.ids.to_pylist())
    return [i for i in ids if i in known[0]], [i for i in ids if i in known[1]]


@given(fraction=st.floats(0, 1), batch_size=st.integers(1, 40), replicas=st.integers(1, 3))
def test_the_share_of_the_target_is_exact(features_task, fraction, batch_size, replicas):
    pool, target = features_task.pool, features_task.target
    streams = [ShuffledStream(np.arange(200), s) for s in range(replicas)]
    draws = BatchStream(pool, streams, batch_size, target=target, target_fraction=fraction, seed=3)
    from_target = round(fraction * batch_size)
    pieces = draws.step(2)
    assert sum(len(p) for p in pieces) == replicas * batch_size
    assert len(pieces) == 1
    from_pool = batch_size - from_target
    rows = pieces[0].inputs["x"].view(replicas, batch_size, -1)
    labels = pieces[0].labels.view(replicas, batch_size)
    expected_target = target.batch(
        ShuffledStream(np.arange(60), 3).take(2 * from_target, from_target) if from_target else [0]
    )
    for k, stream in enumerate(streams):
        if from_pool:
            expected = pool.batch(stream.take(2 * from_pool, from_pool))
            assert torch.equal(rows[k, :from_pool], expected.inputs["x"])
            assert torch.equal(labels[k, :from_pool], expected.labels)
        if from_target:
            assert torch.equal(rows[k, from_pool:], expected_target.inputs["x"])


def test_ids_name_pool_and_target(features_task):
    pool, target = features_task.pool, features_task.target
    draws = BatchStream(pool, [ShuffledStream(np.arange(200), 0)], 8, target=target, target_fraction=0.25)
    ids = draws.ids(draws.step(1))
    assert [i.split("-")[0] for i in ids] == ["pool"] * 6 + ["target"] * 2
    pieces = draws.step(1)
    assert torch.equal(pieces[0].labels[-2:], target.batch([int(i.split("-")[1]) for i in ids[-2:]]).labels)


@given(fraction=st.floats(0, 1), batch_size=st.integers(1, 12), replicas=st.integers(1, 3))
def test_ids_are_those_of_each_replica(features_task, fraction, batch_size, replicas):
    """Each row of a batch is named, in the order of the rows."""
    pool, target = features_task.pool, features_task.target
    streams = [ShuffledStream(np.arange(200), s) for s in range(replicas)]
    draws = BatchStream(pool, streams, batch_size, target=target, target_fraction=fraction)
    pieces = draws.step(1)
    of = {name: p.batch(np.array([i])) for p in (pool, target) for i, name in enumerate(p.ids.to_pylist())}
    rows = torch.cat([piece.inputs["x"] for piece in pieces])
    assert torch.equal(rows, torch.cat([of[name].inputs["x"] for name in draws.ids(pieces)]))


def test_the_target_alone_needs_no_stream(features_task):
    draws = BatchStream(features_task.pool, [], 16, target=features_task.target, target_fraction=1.0)
    seen = [i for step in range(15) for i in draws.ids(draws.step(step))]
    assert sorted(seen) == sorted(4 * features_task.target.ids.to_pylist())


def test_pieces_of_unequal_shape_stay_apart(sentences):
    task = sentences()
    short, long = (np.flatnonzero(task.pool.examples.lengths == n) for n in (3, 8))
    examples = task.pool.examples
    examples = type(examples)(examples.rows[long], examples.labels[long], examples.lengths[long])
    target = type(task.pool)(task.pool.ids.take(long), examples, name="target")
    draws = BatchStream(task.pool, [ShuffledStream(short, 0)], 6, target=target, target_fraction=0.5)
    assert [p.inputs["x"].shape for p in draws.step(0)] == [(3, 3), (3, 8)]
    assert len(draws.ids(draws.step(0))) == 6
    two = BatchStream(task.pool, [ShuffledStream(short, s) for s in (0, 1)], 6, target=target, target_fraction=0.5)
    named = two.ids(two.step(0))
    assert set(named[:6]) <= set(task.pool.ids.take(short).to_pylist())
    assert set(named[6:]) <= set(target.ids.to_pylist())
    assert len(named) == 12


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(features_task, fraction):
    with pytest.raises(ConfigError, match="target_fraction"):
        BatchStream(features_task.pool, [], 4, target=features_task.target, target_fraction=fraction)


def test_a_share_without_a_target_is_refused(features_task):
    with pytest.raises(ConfigError, match="needs the target"):
        BatchStream(features_task.pool, [ShuffledStream(np.arange(9), 0)], 4, target_fraction=0.5)


def test_one_replica_alone_sees_what_it_sees_among_others(features_task):
    streams = [ShuffledStream(np.arange(200), s) for s in range(3)]
    draws = BatchStream(features_task.pool, streams, 8, target=features_task.target, target_fraction=0.25)
    together = draws.step(5)[0].inputs["x"].view(3, 8, -1)
    for k, stream in enumerate(streams):
        assert torch.equal(draws.for_streams(stream).step(5)[0].inputs["x"], together[k])
