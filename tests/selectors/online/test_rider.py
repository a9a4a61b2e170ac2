"""What is drawn for each step, and how the probabilities move by its losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.monitor import Monitor
from cads.policies.label_odds import LabelOdds
from cads.selectors.online.history import PolicyHistory
from cads.selectors.online.rider import OnlineRider
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import Strata
from tests.conftest import Rows
from tests.support.labelled_tasks import labelled


def held(value, pools, seen):
    """Bytes of the arrays that `value` holds, without those of `pools`."""
    if id(value) in seen or any(value is pool for pool in pools):
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        owner = value if value.base is None or not isinstance(value.base, np.ndarray) else value.base
        return 0 if any(owner is pool.sources for pool in pools) else owner.nbytes
    if isinstance(value, dict):
        return sum(held(x, pools, seen) for x in value.values())
    if isinstance(value, list | tuple):
        return sum(held(x, pools, seen) for x in value)
    return held(vars(value), pools, seen) if hasattr(value, "__dict__") else 0


def rider_of(task, **changes):
    strata = Strata.of(task)
    arguments = {
        "target_stream": ShuffledStream(np.arange(len(task.target)), 0),
        "target_start": 0,
        "excess": SourceExcess(strata.n_sources, strata.n_groups, 100),
        "odds": LabelOdds(strata.n_sources, 1.0, 100),
        "by_source": True,
        "on_target": True,
        "batch_size": 8,
        "workers": 0,
        "constants": FROM_SCRATCH,
        "history": PolicyHistory(
            Monitor(), task.pool.source_names, np.ones(strata.n_sources), strata.group_shares, 10, 0
        ),
        "seed": 0,
        "n_rows": 1e4,
    }
    return OnlineRider(task.pool, task.target, strata, **(arguments | changes))


def test_the_longer_the_run_the_more_sources_it_visits(features):
    task = labelled(features(batch_size=8, n=800))
    odds = LabelOdds(len(task.pool.source_names), 1.0, 100)
    odds.wrong = np.linspace(0.0, 0.8, len(odds.wrong))
    short, long, longest = (rider_of(task, odds=odds, n_rows=n).source_weights for n in (100.0, 4e3, 1e9))
    assert short[0] == long[0] == longest[0] == 1
    assert (short[1:] == FROM_SCRATCH.floor).all()
    assert (short[1:] <= long[1:]).all()
    assert (long[1:] < longest[1:]).all()
    np.testing.assert_allclose(longest, 1 - odds.wrong, rtol=1e-4)


def test_the_probabilities_move_after_256_losses(features):
    rider = rider_of(labelled(features(batch_size=8, n=800)))
    moved = []
    for step in range(70):
        before = rider.excess.state().copy()
        rows = sum(len(batch) for batch in rider.step(step))
        assert rider.needs_losses == (step % 32 == 31)
        rider.observe(np.linspace(0.1, 2.0, rows))
        moved.append(not np.array_equal(before, rider.excess.state()))
    assert np.flatnonzero(moved).tolist() == [31, 63]


def test_losses_may_be_observed_some_steps_later(features):
    """A window later the state is the same, bit by bit."""
    task = labelled(features(batch_size=8, n=800))
    at_once, later = rider_of(task), rider_of(task)
    for window in range(3):
        steps = range(32 * window, 32 * window + 32)
        losses = [np.random.default_rng(step).exponential(size=8) for step in steps]
        for step, x in zip(steps, losses, strict=True):
            at_once.step(step)
            at_once.observe(x)
        for step in steps:
            later.step(step)
        for x in losses:
            later.observe(x)
    for (name, x), y in zip(at_once.state().items(), later.state().values(), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), err_msg=name)


def test_what_is_learned_by_heart_later_is_no_more_likely_to_be_right(features):
    """A label whose loss was high while probabilities moved keeps a low weight when its loss falls to 0."""
    task = labelled(features(batch_size=8, n=64))
    rider = rider_of(task, constants=replace(FROM_SCRATCH, learning_passes=8))
    wrong = np.arange(64) % 4 == 0

    def take(step, losses_of):
        rider.step(step)
        rows, target_rows = rider._drawn
        rider.observe(np.concatenate([losses_of(rows), np.full(len(target_rows), 0.1)]))
        return rows

    step = 0
    while rider._numbers["rows"] < 8 * 64:
        take(step, lambda rows: np.where(wrong[rows], 9.0, 0.2))
        step += 1
    rows = take(step, lambda rows: np.zeros(len(rows)))
    later = expit(rider.log_odds()[: len(rows)])
    assert wrong[rows].any()
    assert (later[wrong[rows]] < 0.05).all()
    assert (later[~wrong[rows]] > 0.7).all()


@pytest.mark.parametrize("sources", [True, False])
def test_a_rider_holds_twelve_bytes_an_example_at_most(features, sources):
    """Of a pool without copies, beside what the pool holds itself."""
    task, n = labelled(features(batch_size=8)), 100_000
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n)
    given = (rng.integers(0, 2, n).astype(np.int32), ["a", "b"]) if sources else ()
    task.pool = Pool([f"{i:06d}" for i in range(n)], Rows(rows, labels, np.full(n, 6)), *given)
    rider = rider_of(task)
    for step in range(100):
        rider.observe(np.ones(sum(len(batch) for batch in rider.step(step))))
    assert n * 5 < held(rider, (task.pool, task.target), set()) <= n * 12 + 100_000


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_no_batch_of_texts_holds_an_example_twice(texts, share):
    """Rows of like length share a batch, and copies are of equal length: they are kept apart."""
    changes = {"odds": None, "by_source": False, "workers": None, "constants": PRETRAINED, "fixed_share": share}
    rider = rider_of(texts(batch_size=8, n=160), **changes)
    repeated = [sum(len(x) - len(np.unique(x)) for x in rider.draw()) for _ in range(3 * len(rider.upcoming))]
    assert np.mean(np.array(repeated) > 0) < 0.2
    assert all(sum(map(len, pair)) == 8 for pair in rider.upcoming)
