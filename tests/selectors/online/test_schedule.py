"""The phases of a run."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.data.target_share import share_by_size
from cads.recipe import TrainConfig
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED, MixedPart, first_phase, mixture

RECIPE = TrainConfig(batch_size=10, learning_rate=0.5)


@given(
    n_target=st.integers(1, 500),
    total=st.floats(100, 1e5),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_target_is_learned_for_as_many_effective_passes(n_target, total, warmup, schedule):
    """Each step counts as much as its learning rate; if three quarters of the budget do not do, all of it is taken."""
    recipe = TrainConfig(batch_size=10, learning_rate=0.5, warmup=warmup, schedule=schedule)

    def effective(flops):
        return sum(recipe.rate((k + 0.5) * 10 / total) for k in range(int(flops / 10))) / 0.5 * 10

    flops = first_phase(FROM_SCRATCH, recipe, n_target=n_target, usage_flops=1.0, total=total)
    if flops == total:
        assert effective(0.75 * total) < 4 * n_target
    else:
        assert flops <= 0.75 * total + 5
        assert 4 * n_target <= effective(flops) < 4 * n_target + 10


def test_without_a_first_phase():
    none = replace(FROM_SCRATCH, first_passes=0)
    assert first_phase(none, RECIPE, n_target=5, usage_flops=1.0, total=1e4) == 0


def test_a_target_that_the_budget_hardly_covers_is_all_there_is():
    assert first_phase(PRETRAINED, RECIPE, n_target=100, usage_flops=1.0, total=350.0) == 350
    assert first_phase(PRETRAINED, RECIPE, n_target=100, usage_flops=1.0, total=900.0) < 500


@given(
    n_target=st.integers(20, 500),
    n_near=st.integers(0, 500),
    n_rest=st.integers(200, 5000),
    usages=st.tuples(*[st.floats(0.5, 8)] * 3),
    flops=st.floats(1e2, 1e6),
)
def test_the_lead_of_the_target_is_mixed_in(n_target, n_near, n_rest, usages, flops):
    """The target and its kind come `mixed_lead` times more often than the rest, or alone, or as often as they may."""
    sizes = np.array([n_target, n_near, n_rest])
    target, near, rest = (MixedPart(n, usage) for n, usage in zip(sizes.tolist(), usages, strict=True))
    mixed = mixture(PRETRAINED, target=target, near=near, rest=rest, flops=flops)
    assert 0 < mixed.target_share <= 1
    assert mixed.flops <= flops
    # One visit of the target with what comes along, then as many of these as the run pays for.
    of_one = sizes * [1, 1, mixed.rest]
    visits = mixed.flops / (of_one @ usages)
    assert mixed.target_share == pytest.approx(n_target / of_one.sum())
    assert visits <= PRETRAINED.stop_passes * (1 + 1e-9)
    assert visits == pytest.approx(PRETRAINED.stop_passes) or mixed.flops == pytest.approx(flops)
    assert visits * (1 - mixed.rest) == pytest.approx(min(visits, PRETRAINED.mixed_lead))


def test_a_budget_below_the_lead_buys_the_target_alone():
    sizes = {"target": MixedPart(100, 1.0), "rest": MixedPart(900, 1.0)}
    alone = mixture(PRETRAINED, near=MixedPart(0, 0.0), flops=400, **sizes)
    assert (alone.target_share, alone.rest, alone.flops) == (1, 0, 400)
    assert mixture(PRETRAINED, near=MixedPart(0, 0.0), flops=500, **sizes).target_share < 1
    with_near = mixture(PRETRAINED, near=MixedPart(50, 3.0), flops=400, **sizes)
    assert (with_near.target_share, with_near.rest) == (pytest.approx(2 / 3), 0)


def test_a_part_is_priced_by_its_own_examples():
    """Copies and unlike examples count for less."""
    part = MixedPart.of(np.array([1, 0.5, 0.5]), np.array([2.0, 6.0, 6.0]))
    assert (part.n, part.usage, part.flops) == (2, 4, 8)
    assert MixedPart.of(np.empty(0), np.empty(0)) == MixedPart(0, 0)


@pytest.mark.parametrize(("n_target", "n_pool", "share"), [(50, 950, 0.05), (500, 500, 0.5), (900, 100, 0.6)])
def test_the_target_is_one_more_source(n_target, n_pool, share):
    assert share_by_size(n_target, n_pool, 0.6) == pytest.approx(share)


def test_rates_of_a_run_that_ends_early():
    """The rate falls from where it was to 0 at the new end, without a jump."""
    recipe = TrainConfig(learning_rate=2.0)
    rates = np.array([recipe.rate(0.3) * recipe.decay(x) for x in np.linspace(0, 1, 50)])
    assert rates[0] == recipe.rate(0.3)
    assert (np.diff(rates) <= 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-12)
