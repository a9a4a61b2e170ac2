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
from cads.search.constants import PRETRAINED
from cads.search.inner_costs import PlannedInnerLoop
from cads.selectors.cads_e.schedule import (
    FIDELITIES,
    KEEP_FRACTIONS,
    LEAST_RUNS,
    LEAST_STEPS,
    MAX_THETA_SHARE,
    PRETRAINED_STEPS,
    THETA_SHARE,
    FineTuned,
    FromScratch,
    comparisons,
    signal_models,
)
from cads.selectors.cads_e.selector import CadsExamples
from tests.support.planned import charges


@pytest.fixture(scope="session")
def costs(features):
    """Costs with an allowance for a training of so many passes."""

    def build(passes: float, allowance: float, *, pretrained: bool = False) -> tuple[PlannedInnerLoop, float]:
        task = copy.copy(features(batch_size=8))
        task.pretrained = pretrained
        training = Budget(passes, "epochs").flops(task)
        return PlannedInnerLoop(task, allowance * training, held_out=True), training

    return build


@pytest.mark.parametrize("dearer", [False, True])
def test_theta_has_to_afford_a_step_on_the_target(texts, monkeypatch, dearer):
    """Whose examples may be longer than those of the pool, or shorter."""
    monkeypatch.setattr(cads.selectors.cads_e.schedule, "LEAST_STEPS", 0)
    monkeypatch.setattr(cads.selectors.cads_e.schedule, "MAX_THETA_SHARE", 0)
    task = copy.copy(texts(batch_size=4))
    order = np.argsort(task.pool.examples.lengths(), kind="stable")
    task.target = task.pool.subset(order[-20:] if dearer else order[:20], "target")
    rng, trained = np.random.default_rng(0), []
    costs = PlannedInnerLoop(task, 1.0, held_out=True)
    for _ in range(50):
        batch = costs.fitted.batch(rng.choice(len(costs.fitted), 4, replace=False))
        assert task.costs.usage(batch) + task.costs.optimizer_step <= costs.target_step_flops * (1 + 1e-9)
    assert (costs.target_step_flops > costs.step_flops) == dearer
    for steps in np.linspace(0.1, 4, 60):
        training = steps * costs.step_flops / THETA_SHARE
        theta = signal_models(PlannedInnerLoop(task, 1e5 * costs.step_flops, held_out=True), training).theta
        assert (theta > 0) == (steps * costs.step_flops >= costs.target_step_flops * (1 - 1e-12))
        trained.append(theta > 0)
    assert set(trained) == {False, True}


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_comparisons_fit_into_what_is_left_and_are_worth_making(costs, passes, allowance):
    costs, training = costs(passes, allowance)
    rungs = comparisons(costs, training)
    cost = sum(r.n_trials * (r.flops + costs.measuring_flops) for r in rungs)
    assert cost <= costs.ledger.left * (1 + 1e-9)
    assert len(rungs) <= 2
    for rung in rungs:
        assert LEAST_STEPS * costs.step_flops * (1 - 1e-9) <= rung.flops <= training * (1 + 1e-9)
        assert rung.data_fraction >= min(1.0, rung.fidelity)
    if rungs:
        assert rungs[0].n_trials >= LEAST_RUNS
    if len(rungs) == 2:
        assert rungs[0].fidelity < rungs[1].fidelity == FIDELITIES[2]
        assert rungs[1].n_trials == 2


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4), kept=st.floats(0, 1))
def test_what_is_kept_back_and_what_a_run_takes_beside_are_left(costs, passes, allowance, kept):
    costs, training = costs(passes, allowance)
    reserve, per_run = kept * costs.ledger.left, kept * costs.measuring_flops
    rungs = comparisons(costs, training, lowest=1 / 16, least_runs=2, per_run=per_run, reserve=reserve)
    cost = sum(r.n_trials * (r.flops + costs.measuring_flops + per_run) for r in rungs)
    assert cost + reserve <= costs.ledger.left * (1 + 1e-9) or not rungs
    assert not rungs or rungs[0].n_trials >= 2


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_scores_are_bought_only_where_something_can_be_compared_afterwards(costs, passes, allowance):
    costs, training = costs(passes, allowance)
    teachers = signal_models(costs, training)
    assert teachers.theta >= 0
    assert teachers.theta > 0 or teachers.theta_refit_flops == teachers.u == 0
    planned = charges(CadsExamples(allowance=allowance), costs, training)
    assert planned == (teachers.theta > 0)


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(2, 6))
def test_a_thorough_theta_leaves_enough_for_long_runs(costs, passes, allowance):
    costs, training = costs(passes, allowance)
    teachers = signal_models(costs, training)
    assert charges(CadsExamples(allowance=allowance), costs, training) == (teachers.theta > 0)
    assert costs.ledger.total(SELECT).flops <= costs.ledger.limit * (1 + 1e-9)
    assert teachers.theta + teachers.theta_refit_flops <= MAX_THETA_SHARE * training or not isinstance(
        teachers, FromScratch
    )
    if isinstance(teachers, FromScratch):
        assert teachers.u == 0
        assert teachers.steps == [(kept, 0.0) for kept in KEEP_FRACTIONS]
        assert [s for _, s in costs.ledger.entries if s.startswith("short runs") and "measuring" not in s] == [
            f"short runs, C/{1 / max(FIDELITIES[2], LEAST_STEPS * costs.step_flops / training):.3g}"
        ]
    if passes >= 8 and allowance >= 2.75:
        assert teachers.theta_refit_flops == teachers.theta > 0


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 6))
def test_what_is_bought_for_a_pretrained_model_leaves_enough_for_the_short_runs(costs, passes, allowance):
    costs, training = costs(passes, allowance, pretrained=True)
    teachers, step = signal_models(costs, training), costs.step_flops
    assert charges(CadsExamples(allowance=allowance), costs, training) == (teachers.theta > 0)
    assert costs.ledger.total(SELECT).flops <= costs.ledger.limit * (1 + 1e-9)
    if not teachers.theta:
        # Twice what they take at least, and a C in which they fit, are always enough.
        least = CadsExamples().min_flops(PlannedInnerLoop(costs.task, math.inf, held_out=True))
        assert (
            allowance * training < 2 * max(least, FIDELITIES[0] * 2 * training)
            or training < PRETRAINED.min_steps * step
        )
        return
    assert isinstance(teachers, FineTuned)
    assert teachers.theta >= costs.target_steps_flops(PRETRAINED_STEPS)
    assert teachers.reference_is_first_run == (passes <= PRETRAINED.full_data_max_passes * (1 + 1e-9))
    assert teachers.reference_is_first_run == (teachers.u == 0)
    runs = [s for _, s in costs.ledger.entries if s.startswith("short runs") and "measuring" not in s]
    usages = costs.ledger.entries[SELECT, runs[0]].usages / costs.task.recipe.batch_size
    assert len(runs) == 1
    assert 2 * PRETRAINED.min_steps <= usages <= (1 + len(teachers.steps)) * training / step


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
    assert FineTuned(1.0, passes=passes).steps == [(share, 1.0) for share in kept]


@pytest.mark.parametrize(("passes", "whole"), [(2.4, True), (2.6, False)])
def test_short_runs_keep_the_passes_where_repeating_costs_something(costs, passes, whole):
    costs, training = costs(passes, 20.0, pretrained=True)
    teachers = signal_models(costs, training)
    (rung,) = teachers.comparisons(costs, training)
    assert rung.data_fraction == (1.0 if whole else rung.fidelity)
    assert rung.n_trials == 1 + len(teachers.steps)
