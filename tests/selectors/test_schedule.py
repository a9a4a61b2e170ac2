"""What the allowance of CADS-E buys: models, and runs that compare candidates."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cads.selectors.cads_e.schedule
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT
from cads.search.fidelity import FEW_PASSES, MIN_STEPS, PRETRAINED_STEPS
from cads.search.inner_costs import Planned
from cads.selectors.cads_e.schedule import (
    FIDELITIES,
    LEAST_RUNS,
    LEAST_STEPS,
    LENGTHS,
    TAUGHT,
    THETA_SHARE,
    Pretrained,
    Thorough,
    comparisons,
    teachers_of,
)
from cads.selectors.cads_e.selector import CadsExamples


@pytest.fixture(scope="session")
def purse(features):
    """A purse with an allowance for a training of so many passes."""

    def build(passes: float, allowance: float, *, pretrained: bool = False) -> tuple[Planned, float]:
        task = copy.copy(features(batch_size=8))
        task.pretrained = pretrained
        training = Budget(passes, "epochs").flops(task)
        return Planned(task, allowance * training, held_out=True), training

    return build


@pytest.mark.parametrize("dearer", [False, True])
def test_theta_has_to_afford_a_step_on_the_target(texts, monkeypatch, dearer):
    """Whose examples may be longer than those of the pool, or shorter."""
    monkeypatch.setattr(cads.selectors.cads_e.schedule, "LEAST_STEPS", 0)
    monkeypatch.setattr(cads.selectors.cads_e.schedule, "TAUGHT", 0)
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
    assert teachers.theta + teachers.again <= TAUGHT * training or not isinstance(teachers, Thorough)
    if isinstance(teachers, Thorough):
        assert teachers.u == 0
        assert teachers.steps == [(kept, 0.0) for kept in LENGTHS]
        assert [s for _, s in purse.ledger.entries if s.startswith("short runs") and "measuring" not in s] == [
            f"short runs, C/{1 / max(FIDELITIES[2], LEAST_STEPS * purse.step_flops / training):.3g}"
        ]
    if passes >= 8 and allowance >= 2.75:
        assert teachers.again == teachers.theta > 0


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 6))
def test_what_is_bought_for_a_pretrained_model_leaves_enough_for_the_short_runs(purse, passes, allowance):
    purse, training = purse(passes, allowance, pretrained=True)
    teachers, step = teachers_of(purse, training), purse.step_flops
    assert CadsExamples(allowance=allowance).spend(purse, training) == (teachers.theta > 0)
    assert purse.ledger.total(SELECT).flops <= purse.ledger.limit * (1 + 1e-9)
    if not teachers.theta:
        # Twice what they take at least, and a C in which they fit, are always enough.
        least = CadsExamples().least(Planned(purse.task, math.inf, held_out=True))
        assert allowance * training < 2 * max(least, FIDELITIES[0] * 2 * training) or training < MIN_STEPS * step
        return
    assert isinstance(teachers, Pretrained)
    assert teachers.theta >= purse.target_steps_flops(PRETRAINED_STEPS)
    assert teachers.beside == (passes <= FEW_PASSES * (1 + 1e-9))
    assert teachers.beside == (teachers.u == 0)
    runs = [s for _, s in purse.ledger.entries if s.startswith("short runs") and "measuring" not in s]
    usages = purse.ledger.entries[SELECT, runs[0]].usages / purse.task.recipe.batch_size
    assert len(runs) == 1
    assert 2 * MIN_STEPS <= usages <= (1 + len(teachers.steps)) * training / step


@pytest.mark.parametrize(
    ("passes", "kept"),
    [
        (0.5, [0.2, 0.33, 0.5, 0.67, 0.83]),
        (2.0, [0.67, 0.83, 0.5, 0.33]),
        (4.0, [0.83, 0.67, 0.5]),
        (50.0, [0.83]),
    ],
)
def test_shares_that_training_sees_a_few_times_are_tried_first_and_those_seen_too_often_not_at_all(passes, kept):
    assert Pretrained(1.0, passes=passes).steps == [(share, 1.0) for share in kept]


@pytest.mark.parametrize(("passes", "whole"), [(2.4, True), (2.6, False)])
def test_short_runs_keep_the_passes_where_repeating_costs_something(purse, passes, whole):
    purse, training = purse(passes, 20.0, pretrained=True)
    teachers = teachers_of(purse, training)
    (rung,) = teachers.comparisons(purse, training)
    assert rung.data == (1.0 if whole else rung.fidelity)
    assert rung.runs == 1 + len(teachers.steps)
