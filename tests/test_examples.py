"""CADS-E: what its allowance buys, and that the best candidate has to beat the full pool in longer runs too."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cads.examples
from cads.budget import SELECT, Budget, Ledger
from cads.examples import (
    FIDELITIES,
    LEAST_RUNS,
    LEAST_STEPS,
    LENGTHS,
    SHARPNESS,
    STEPS,
    TAUGHT,
    THETA_SHARE,
    CadsExamples,
    Signals,
    Teachers,
    affordable_steps,
    comparisons,
    learn_from,
    teachers_of,
)
from cads.inner import Inner, Planned
from cads.monitor import Monitor
from cads.operations import candidates_flops


@pytest.fixture(scope="session")
def purse(features):
    """A purse with an allowance for a training of so many passes."""
    task = features(batch_size=8)

    def build(passes: float, allowance: float) -> tuple[Planned, float]:
        training = Budget(passes, "epochs").flops(task)
        return Planned(task, allowance * training, held_out=True), training

    return build


@pytest.mark.parametrize("dearer", [False, True])
def test_theta_has_to_afford_a_step_on_the_target(texts, monkeypatch, dearer):
    """Whose examples may be longer than those of the pool, or shorter."""
    monkeypatch.setattr(cads.examples, "LEAST_STEPS", 0)
    monkeypatch.setattr(cads.examples, "TAUGHT", 0)
    task = copy.copy(texts(batch_size=4))
    order = np.argsort(task.pool.examples.lengths(), kind="stable")
    task.target = task.pool.part(order[-20:] if dearer else order[:20], "target")
    rng, trained = np.random.default_rng(0), []
    purse = Planned(task, 1.0, held_out=True)
    for _ in range(50):
        batch = purse.fitted.batch(rng.choice(len(purse.fitted), 4, replace=False))
        assert task.costs.usage(batch) + task.costs.optimizer_step <= purse.target_step_flops * (1 + 1e-9)
    assert (purse.target_step_flops > purse.step_flops) == dearer
    for steps in np.linspace(0.1, 4, 60):
        training = steps * purse.step_flops / THETA_SHARE
        theta = teachers_of(Planned(task, 1e5 * purse.step_flops, held_out=True), training).theta
        assert (theta > 0) == (steps * purse.step_flops >= purse.target_step_flops * (1 - 1e-12))
        trained.append(theta > 0)
    assert set(trained) == {False, True}


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_comparisons_fit_into_what_is_left_and_are_worth_making(purse, passes, allowance):
    purse, training = purse(passes, allowance)
    rungs = comparisons(purse, training)
    cost = sum(r.runs * (r.flops + purse.measuring_flops) for r in rungs)
    assert cost <= purse.ledger.left * (1 + 1e-9)
    assert len(rungs) <= 2
    for rung in rungs:
        assert LEAST_STEPS * purse.step_flops * (1 - 1e-9) <= rung.flops <= training * (1 + 1e-9)
        assert rung.data >= min(1.0, rung.fidelity)
    if rungs:
        assert rungs[0].runs >= LEAST_RUNS
    if len(rungs) == 2:
        assert rungs[0].fidelity < rungs[1].fidelity == FIDELITIES[2]
        assert rungs[1].runs == 2


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4), kept=st.floats(0, 1))
def test_what_is_kept_back_and_what_a_run_takes_beside_are_left(purse, passes, allowance, kept):
    purse, training = purse(passes, allowance)
    reserve, per_run = kept * purse.ledger.left, kept * purse.measuring_flops
    rungs = comparisons(purse, training, lowest=1 / 16, least_runs=2, per_run=per_run, reserve=reserve)
    cost = sum(r.runs * (r.flops + purse.measuring_flops + per_run) for r in rungs)
    assert cost + reserve <= purse.ledger.left * (1 + 1e-9) or not rungs
    assert not rungs or rungs[0].runs >= 2


@pytest.mark.parametrize("grouped", [True, False])
def test_policies_are_steps_of_their_length_in_each_group(grouped):
    rng, n = np.random.default_rng(0), 4000
    theta, u, groups = rng.exponential(size=n), rng.exponential(size=n), rng.integers(0, 3, n) * 5
    signals = Signals.of(theta, u, STEPS, groups if grouped else None)
    for candidate, (kept, weight) in zip(signals.candidates, STEPS, strict=True):
        z = (theta - weight * u - (theta - weight * u).mean()) / (theta - weight * u).std()
        expected = np.empty(n)
        for members in [groups == g for g in (0, 5, 10)] if grouped else [np.ones(n, dtype=bool)]:
            expected[members] = 1 / (1 + np.exp(SHARPNESS * (z[members] - np.quantile(z[members], kept))))
        np.testing.assert_allclose(candidate.probability(), expected, rtol=1e-9)
    assert (signals.everything.probability() == 1).all()
    assert signals.everything.flops == 0
    assert [(c.kept, c.reach_weight) for c in signals.candidates] == list(STEPS)
    assert {weight for _, weight in affordable_steps(with_reach=False)} == {0.0}


def test_candidates_take_no_memory_until_they_are_asked_for():
    n = 200_000
    losses = np.random.default_rng(0).exponential(size=n)
    tracemalloc.start()
    field = Signals.of(losses, losses[::-1].copy(), STEPS).candidates
    kept = tracemalloc.get_traced_memory()[0] / n
    for candidate in field:
        candidate.probability()
    peak = tracemalloc.get_traced_memory()[1] / n
    tracemalloc.stop()
    assert len(field) == len(STEPS)
    # The copy of the losses, and the arrays of one candidate: signal, z, and what the quantile sorts.
    assert kept < 9
    assert peak < 8 + 5 * 8


def test_what_policies_cost_is_planned_and_charged(features):
    task, budget, ledger = features(batch_size=8), Budget(16, "epochs"), Ledger()
    planned = CadsExamples().plan(task, budget)
    CadsExamples(guard=False).select(task, budget, seed=0, ledger=ledger)
    made = ledger.entries[SELECT, "policy"].flops
    assert made == pytest.approx(planned.entries[SELECT, "policy"].flops)
    # Each candidate, the best of them to look at it, and what theta is trained on in its second half.
    each = Planned(task, planned.limit, held_out=True).measuring_flops
    stages = [s for _, s in planned.entries if s.startswith("short runs") and s.endswith("measuring")]
    runs = [round(planned.entries[SELECT, s].flops / each) for s in stages]
    assert made == candidates_flops(len(task.pool), sum(runs) + 1)


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_scores_are_bought_only_where_something_can_be_compared_afterwards(purse, passes, allowance):
    purse, training = purse(passes, allowance)
    teachers = teachers_of(purse, training)
    assert teachers.theta >= 0
    assert teachers.theta > 0 or teachers.again == teachers.u == 0
    planned = CadsExamples(allowance=allowance).spend(purse, training)
    assert planned == (teachers.theta > 0)


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(2, 6))
def test_a_thorough_theta_leaves_enough_for_long_runs(purse, passes, allowance):
    purse, training = purse(passes, allowance)
    teachers = teachers_of(purse, training)
    assert CadsExamples(allowance=allowance).spend(purse, training) == (teachers.theta > 0)
    assert purse.ledger.total(SELECT).flops <= purse.ledger.limit * (1 + 1e-9)
    assert teachers.theta + teachers.again <= TAUGHT * training or not teachers.thorough
    if teachers.thorough:
        assert teachers.u == 0
        assert teachers.steps == [(kept, 0.0) for kept in LENGTHS]
        assert [s for _, s in purse.ledger.entries if s.startswith("short runs") and "measuring" not in s] == [
            f"short runs, C/{1 / max(FIDELITIES[2], LEAST_STEPS * purse.step_flops / training):.3g}"
        ]
    if passes >= 8 and allowance >= 2.75:
        assert teachers.again == teachers.theta > 0


def test_theta_goes_on_with_what_it_keeps_of_each_class(features, monkeypatch):
    task = features(batch_size=8)
    fitted, losses = [], []
    inner = Inner(task, Ledger(), Monitor(), held_out=True)
    monkeypatch.setattr(inner, "fit_target", lambda flops, **about: fitted.append((flops, about)))
    monkeypatch.setattr(
        inner, "losses", lambda *_, **__: losses.append(np.random.default_rng(len(losses)).random(200)) or losses[-1]
    )
    signals = learn_from(inner, Teachers(2.0, 3.0, thorough=True), seed=0)
    assert [flops for flops, _ in fitted] == [2.0, 3.0]
    labels = task.groups(task.pool)
    kept = np.zeros(200, dtype=bool)
    kept[fitted[1][1]["stream"].take(0, 130)] = True
    for label in np.unique(labels):
        mine, least = losses[0][labels == label], losses[0][(labels == label) & kept]
        assert least.max() < np.delete(np.sort(mine), np.arange(len(least))).min()
    assert kept.mean() == pytest.approx(0.6, abs=0.02)
    assert (signals.from_theta == losses[1]).all()
    assert signals.from_u is None


@pytest.mark.parametrize("guard", [True, False])
def test_what_the_full_pool_beats_is_returned_on_request_alone(features, monkeypatch, guard):
    monkeypatch.setattr(cads.examples, "compare", lambda inner, field, *_: np.arange(len(field), dtype=float))
    task = features(batch_size=8)
    chosen = CadsExamples(guard=guard).select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert chosen.selected.all() == guard
    assert chosen.notes["guard"] == (
        "the full pool was not beaten" if guard else "better than the full pool on the target"
    )


def test_a_policy_that_selects_nothing_is_the_full_pool(features, monkeypatch):
    """Every group has one example, so that none is better than the others of its own."""
    monkeypatch.setattr(cads.examples, "compare", lambda inner, field, *_: -np.arange(len(field), dtype=float))
    task = features(batch_size=8)
    monkeypatch.setattr(type(task), "groups", lambda self, pool: np.arange(len(pool)))
    chosen = CadsExamples().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert (chosen.probability == 0.5).all()
    assert chosen.selected.all()
