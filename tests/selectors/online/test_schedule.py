"""The phases of a run."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.recipe import TrainConfig
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED, first_phase, target_share

RECIPE = TrainConfig(batch_size=10, learning_rate=0.5)


@given(
    n_target=st.integers(1, 500),
    total=st.floats(100, 1e5),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_target_is_learned_for_as_many_effective_passes(n_target, total, warmup, schedule):
    """Each step counts as much as its learning rate; more is never taken than the largest share of the budget."""
    recipe = TrainConfig(batch_size=10, learning_rate=0.5, warmup=warmup, schedule=schedule)
    phase = first_phase(FROM_SCRATCH, recipe, n_target=n_target, usage_flops=1.0, total=total)
    assert phase.flops <= 0.75 * total + 15
    steps = int(phase.flops / 10)
    effective = sum(recipe.rate((k + 0.5) * 10 / total) for k in range(steps)) / 0.5 * 10
    assert effective < 4 * n_target + 20
    if effective < 4 * n_target:
        assert phase.flops == pytest.approx(0.75 * total) or steps == 0
    assert phase.judges == (effective >= 1.5 * n_target and steps > 0)


def test_a_budget_below_one_step_has_no_first_phase():
    phase = first_phase(FROM_SCRATCH, RECIPE, n_target=5, usage_flops=1.0, total=12.0)
    assert phase.flops == 0
    assert not phase.judges


def test_pretrained_models_may_see_the_target_three_times_whatever_that_costs():
    small = first_phase(PRETRAINED, RECIPE, n_target=100, usage_flops=1.0, total=250.0)
    assert small.flops == 250
    assert (
        first_phase(replace(PRETRAINED, least_first=0), RECIPE, n_target=100, usage_flops=1.0, total=250.0).flops == 125
    )


@pytest.mark.parametrize(("n_target", "n_pool", "share"), [(50, 950, 0.05), (500, 500, 0.5), (900, 100, 0.6)])
def test_the_target_is_one_more_source(n_target, n_pool, share):
    assert target_share(n_target, n_pool, 0.6) == pytest.approx(share)


def test_rates_of_a_run_that_ends_early():
    """The rate falls from where it was to 0 at the new end, without a jump."""
    recipe = TrainConfig(learning_rate=2.0)
    rates = np.array([recipe.rate(0.3) * recipe.decay(x) for x in np.linspace(0, 1, 50)])
    assert rates[0] == recipe.rate(0.3)
    assert (np.diff(rates) <= 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-12)
