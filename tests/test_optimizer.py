"""Dividing the compute: nothing is spent twice, and short runs fit into their allowance."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.budget import Budget
from cads.errors import BudgetError, ConfigError
from cads.optimizer import (
    BY_HEART,
    FEW_PASSES,
    KEPT_PASSES,
    MIN_STEPS,
    check_step,
    counted_allowance,
    distinct,
    divide,
    ladder,
    strata,
    subsample,
)
from cads.task import Pool

POSITIVE = st.floats(1e-2, 1e4)


@settings(deadline=None, max_examples=40)
@given(
    epochs=st.floats(2, 50),
    allowance=st.one_of(st.none(), st.floats(0, 10)),
    default=st.floats(0, 10),
    counted=st.booleans(),
)
def test_a_counted_selection_and_training_share_the_budget(features, epochs, allowance, default, counted):
    task = features()
    budget = Budget(epochs, "epochs", count_selection=counted)
    total = budget.flops(task)
    division = divide(task, budget, allowance, default)
    assert division.selection >= 0
    assert 0 < division.training <= total
    if counted:
        assert division.training + division.selection == pytest.approx(total)
    else:
        assert division.training == total
    if allowance is not None:
        assert division.selection == pytest.approx(allowance * division.training)
    elif not counted:
        assert division.selection == pytest.approx(default * total)
    else:
        assert division.selection == pytest.approx(min(default, counted_allowance(task, total)) * division.training)


@pytest.mark.parametrize(
    ("passes", "allowance", "of_pretrained"),
    [(0.5, 1 / 3, 1 / 3), (2, 1 / 3, 1 / 3), (4, 1 / 3, 2 / 3), (6, 0.5, 1.0), (12, 1.0, 1.0), (100, 1.0, 1.0)],
)
def test_selection_may_spend_more_of_a_budget_whose_passes_repeat_the_pool(features, passes, allowance, of_pretrained):
    task = copy.copy(features(batch_size=16))
    assert counted_allowance(task, Budget(passes, "epochs").flops(task)) == pytest.approx(allowance, rel=1e-6)
    task.pretrained = True
    assert counted_allowance(task, Budget(passes, "epochs").flops(task)) == pytest.approx(of_pretrained, rel=1e-6)


@pytest.mark.parametrize("times", [1.2, 1.32, 1.35, 2.0, 5.0])
def test_selection_for_a_pretrained_model_gets_the_least_it_needs_or_its_share(features, times):
    task = copy.copy(features(batch_size=16))
    total = Budget(3, "epochs").flops(task)
    least = total / times
    assert counted_allowance(task, total, least) == counted_allowance(task, total)
    task.pretrained = True
    share, found = counted_allowance(task, total), counted_allowance(task, total, least)
    if 4 / 3 < times < 3:
        assert found > share
        assert least <= found * total / (1 + found) <= least * (1 + 1e-6)
    else:
        assert found == share


def test_budgets_that_cannot_be_divided_are_refused(features):
    task = features(batch_size=16)
    with pytest.raises(ConfigError, match=r"allowance = -0\.5"):
        divide(task, Budget(5, "epochs"), -0.5, 1.0)
    with pytest.raises(BudgetError) as caught:
        divide(task, Budget(15, "usages"), None, 1.0)
    step = task.costs.usage(task.pool.batch(np.arange(16))) + task.costs.optimizer_step
    assert f"{Budget(15, 'usages').flops(task):.4g}" in str(caught.value)
    assert f"{step:.4g}" in str(caught.value)
    divide(task, Budget(16, "usages"), None, 1.0)


def test_a_step_is_affordable_or_refused(features):
    task = features(batch_size=16)
    step = task.costs.usage(task.pool.batch(np.arange(16))) + task.costs.optimizer_step
    check_step(task, step)
    with pytest.raises(BudgetError):
        check_step(task, 0.999 * step)


@given(
    steps=st.floats(1, 1e5),
    allowance=POSITIVE,
    step=st.floats(1e-3, 1e15),
    measuring=st.floats(0, 100),
    passes=st.floats(1e-2, 1e3),
    pretrained=st.booleans(),
)
def test_the_ladder_stays_within_its_allowance(steps, allowance, step, measuring, passes, pretrained):
    training, per_run = steps * step, measuring * step
    rungs = ladder(training, allowance * step, step, per_run, passes, pretrained=pretrained)
    assert sum(r.runs * (r.flops + per_run) for r in rungs) <= allowance * step * (1 + 1e-9)
    assert all(r.runs >= 2 for r in rungs)
    assert all(r.flops == pytest.approx(r.fidelity * training) for r in rungs)
    assert all(r.flops >= min(training, MIN_STEPS * step) * (1 - 1e-9) for r in rungs)
    assert all(0 < r.fidelity * (BY_HEART if pretrained else 1) <= r.data <= 1 for r in rungs)
    kept = min(passes, math.sqrt(passes * KEPT_PASSES)) / (BY_HEART if pretrained else 1)
    visits = [passes * rung.fidelity / rung.data for rung in rungs]
    for rung, seen in zip(rungs[:-1], visits, strict=False):
        assert rung.data == 1 or seen == pytest.approx(kept)
    if rungs and pretrained:
        assert passes > FEW_PASSES or all(rung.data == 1 for rung in rungs)
        assert rungs[-1].data == 1 or visits[-1] == pytest.approx(kept)
    elif rungs and rungs[-1].data < 1:
        assert min(1.0, kept) * (1 - 1e-9) <= visits[-1] <= kept * (1 + 1e-9)
        assert rungs[-1].data <= max(math.sqrt(rungs[-1].fidelity), passes * rungs[-1].fidelity / kept) * (1 + 1e-9)
    fidelities = [r.fidelity for r in rungs]
    assert fidelities == sorted(set(fidelities))


@given(steps=st.floats(1, 1e5), allowance=POSITIVE, measuring=st.floats(0, 100), factor=st.floats(1, 10))
def test_more_allowance_never_buys_a_lower_ladder(steps, allowance, measuring, factor):
    less, more = (ladder(steps, a, 1.0, measuring, 5.0) for a in (allowance, factor * allowance))
    assert len(more) >= len(less)
    spent = [sum(r.runs * (r.flops + measuring) for r in rungs) for rungs in (less, more)]
    if len(less) == len(more):
        assert spent[1] >= spent[0]


def test_no_allowance_no_ladder():
    assert ladder(1e6, 0.0, 1.0, 1.0, 5.0) == []
    assert ladder(1e6, 79.0, 1.0, 1.0, 5.0) == []


class Nothing:
    """Examples that nobody looks at; those with equal contents are copies."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def digests(self):
        return [str(c).encode() for c in self.contents]


def pool_of(sizes, seed, contents=None):
    codes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    names = [f"s{i}" for i in range(len(sizes))]
    contents = range(len(codes)) if contents is None else contents[: len(codes)]
    return Pool([str(i) for i in range(len(codes))], Nothing(contents), codes, names)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    low=st.floats(1e-3, 1),
    high=st.floats(1e-3, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_samples_are_nested_and_hold_their_share_of_every_source(sizes, low, high, seed):
    low, high = sorted((low, high))
    pool = pool_of(sizes, seed % 1000)
    small, large = subsample(pool, low, seed), subsample(pool, high, seed)
    assert set(small) <= set(large)
    for chosen, fidelity in ((small, low), (large, high)):
        assert (np.diff(chosen) > 0).all()
        counts = np.bincount(pool.sources[chosen], minlength=len(sizes))
        assert (counts >= 1).all()
        share = fidelity * pool.source_sizes
        assert (np.abs(counts - share) <= np.maximum(0.5, 1 - share)).all()
    assert np.array_equal(subsample(pool, low, seed), small)
    assert np.array_equal(subsample(pool, 1.0, seed), np.arange(len(pool)))


@given(copies=st.integers(1, 8), fidelity=st.floats(1e-3, 1), seed=st.integers(0, 1000))
def test_copies_stay_together_and_contents_are_counted(copies, fidelity, seed):
    contents = np.random.default_rng(seed).integers(0, max(1, 200 // copies), 200)
    pool = pool_of([120, 80], seed, contents)
    chosen = subsample(pool, fidelity, seed)
    for source in range(2):
        here = contents[pool.sources == source]
        kept = contents[chosen[pool.sources[chosen] == source]]
        assert len(kept) == np.isin(here, kept).sum()
        assert len(set(kept)) == max(1, round(fidelity * len(set(here))))


def test_samples_depend_on_the_seed_alone():
    pool = pool_of([50, 50], 0)
    assert not np.array_equal(subsample(pool, 0.5, 0), subsample(pool, 0.5, 1))
    no_sources = Pool(pool.ids, Nothing(range(100)))
    assert (strata(no_sources) == 0).all()
    assert len(subsample(no_sources, 0.3, 0)) == 30


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_distinct_rows_keep_the_order_of_their_first_appearance(rows):
    found = [tuple(row) for row in distinct([np.array(row) for row in rows])]
    assert found == list(dict.fromkeys(tuple(row) for row in rows))
