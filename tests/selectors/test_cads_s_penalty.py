"""CADS-S as published: one theta, l* at the whole budget, its gradient against enumeration, and its budget."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.data.streams import WeightedStream
from cads.errors import ConfigError
from cads.estimators.enumeration import enumerate_masks
from cads.estimators.reachable_loss import mean_over_sources
from cads.monitor import Monitor
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.mixture import MixturePolicy
from cads.registry import build_selector
from cads.search.allowance import selection_share, split_budget
from cads.search.inner_runs import InnerLoop
from cads.search.space import MixtureSpace, SubsetSpace
from cads.selectors.cads_s.penalty_form import PenalizedSources, penalty_gradient
from tests.support.killed_runs import resumed, step_flops
from tests.support.rates import Rates, assert_one_course

NAME = "cads-s-penalty"
POLICIES = ["bernoulli", "mixture"]
SIZES = np.array([20.0, 50.0, 130.0])
BIG = Budget(400, "epochs")


def choose(task, epochs=16.0, seed=0, count_selection=False, monitor=None, **options):
    ledger, budget = Ledger(), Budget(epochs, "epochs", count_selection=count_selection)
    selector = PenalizedSources(**options)
    return selector.select(task, budget, seed=seed, ledger=ledger, monitor=monitor), ledger


@pytest.fixture
def task(features):
    return features(batch_size=8, n=200, learning_rate=0.02)


def space_of(kind, sizes):
    space = kind.__new__(kind)
    space.sizes = sizes
    return space


def reach(weights):
    """Some function of the mixture and the amount of data."""
    amounts = weights * SIZES
    ratios = amounts / amounts.sum(axis=1, keepdims=True)
    return 0.3 + ratios @ np.array([0.5, 0.2, 0.9]) - ratios[:, 0] * ratios[:, 2] - 0.05 * np.log(amounts.sum(axis=1))


class TestGradient:
    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 10_000))
    def test_it_is_unbiased_over_subsets_that_hold_a_source(self, seed):
        """Over all pairs of non-empty masks of three sources: the derivative of E[R - l* | a source is in it]."""
        rng = np.random.default_rng(seed)
        s, risks, alpha = rng.uniform(0.1, 0.9, 3), rng.uniform(0.5, 3, 3), rng.uniform(0.05, 3)
        space, masks = space_of(SubsetSpace, SIZES), enumerate_masks(3)[1:]
        values = mean_over_sources(masks, SIZES, risks) - reach(masks)

        def chances(s):
            p = np.where(masks, s, 1 - s).prod(axis=1)
            return p / p.sum()

        policy, p = BernoulliPolicy(s), chances(s)
        mean = sum(
            p[a] * p[b] * penalty_gradient(policy, space, masks[[a, b]], risks, reach, alpha)
            for a, b in itertools.product(range(7), repeat=2)
        )
        nudges = 1e-6 * np.eye(3)
        slopes = [alpha * (chances(s + e) - chances(s - e)) @ values / 2e-6 for e in nudges]
        np.testing.assert_allclose(mean, slopes, rtol=1e-5, atol=1e-8)

    def test_it_is_unbiased_over_ratios(self):
        """Of 400,000 draws, against the slope of the mean over the same uniform numbers."""
        means, risks, alpha, sigma, count = np.array([0.2, 0.5, 0.3]), np.array([1.0, 2.0, 0.5]), 0.7, 0.15, 400_000
        space = space_of(MixtureSpace, SIZES)

        def draws(means):
            return MixturePolicy(means, sigma).sample(count, np.random.default_rng(0))

        def value(means):
            weights = space.weights(draws(means))
            return float((mean_over_sources(weights, SIZES, risks) - reach(weights)).mean())

        result = penalty_gradient(MixturePolicy(means, sigma), space, draws(means), risks, reach, alpha)
        slopes = [alpha * (value(means + e) - value(means - e)) / 2e-3 for e in 1e-3 * np.eye(3)]
        np.testing.assert_allclose(result, slopes, atol=0.02)
        assert np.abs(slopes).max() > 0.2


class TestOneTheta:
    def test_segments_are_one_run(self, task):
        """Four rounds on the same draws are one training: the same weights, steps and learning rates."""
        step, seed = step_flops(task), 3
        stream = WeightedStream(np.arange(1.0, 201), 5)
        fixed = {"seed": seed, "stage": "theta", "stream": stream, "target_fraction": 0.5}
        whole = InnerLoop(task, Ledger(), Monitor()).fit_on(20.5 * step, horizon=20 * step, before=None, **fixed)
        inner, fit = InnerLoop(task, Ledger(), Monitor()), None
        for _ in range(4):
            fit = inner.fit_on(5.5 * step, horizon=20 * step, before=fit, **fixed)
        assert len(fit.losses) == 20
        np.testing.assert_array_equal(fit.losses, whole.losses)
        for x, y in zip(fit.models[0].parameters(), whole.models[0].parameters(), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("name", [NAME, "live-penalty"])
    def test_each_model_has_one_course(self, task, name):
        rates = Rates()
        budget = Budget(32, "epochs")
        build_selector(name, {}).select(task, budget, seed=0, ledger=Ledger(), monitor=rates)
        for stage in ("theta",) if name == NAME else ("theta", "u"):
            assert len(rates.of[stage]) > 300
            assert_one_course(rates.of[stage])

    def test_the_rate_of_a_curve_that_is_continued_does_not_fall_to_its_end(self, task):
        rates = Rates()
        choose(task, 32, monitor=rates)
        course = rates.of["short runs, C/8"]
        peak = max(course)
        assert course[-1] > 0.95 * peak
        choose(task, 32, monitor=rates, reach="fitted")
        assert rates.of["short runs, C/8"][-1] < 0.05 * peak


class TestAlpha:
    def test_it_grows_by_one_factor_a_round(self):
        selector = PenalizedSources(alpha=4.0, first_alpha=0.25, rounds=5)
        np.testing.assert_allclose([selector.alpha_of(k) for k in range(5)], [0.25, 0.5, 1, 2, 4])
        assert [PenalizedSources(alpha=0.1).alpha_of(k) for k in (0, 4)] == [0.1, 0.1]
        assert PenalizedSources(alpha=0.1, first_alpha=1.0, rounds=1).alpha_of(0) == 0.1

    def test_theta_sees_more_of_the_pool_in_later_rounds(self, task, monkeypatch):
        shares = []
        plain = InnerLoop.fit_on

        def noted(self, flops, **fields):
            shares.append(fields["target_fraction"])
            return plain(self, flops, **fields)

        monkeypatch.setattr(InnerLoop, "fit_on", noted)
        choose(task, alpha=1.0, first_alpha=0.25, rounds=3)
        np.testing.assert_allclose(shares, [0.8, 2 / 3, 0.5])

    @pytest.mark.parametrize(
        "options", [{"first_alpha": 0.0}, {"first_alpha": float("nan")}, {"policy": "gauss"}, {"reach": "guessed"}]
    )
    def test_bad_options_are_refused_by_name(self, options):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} = "):
            PenalizedSources(**options)

    def test_batches_of_the_target_alone_are_refused(self, task):
        with pytest.raises(ConfigError, match=r"first_alpha = 0\.01: of a batch of 8"):
            choose(task, first_alpha=0.01)


class TestBudget:
    @settings(deadline=None, max_examples=20)
    @given(
        epochs=st.floats(1, 20),
        counted=st.booleans(),
        policy=st.sampled_from(POLICIES),
        how=st.sampled_from(["fitted", "extrapolated", "exact"]),
        allowance=st.one_of(st.none(), st.floats(0.2, 8)),
        pretrained=st.booleans(),
    )
    def test_it_is_never_exceeded_and_the_plan_is_the_ledger(
        self, features, epochs, counted, policy, how, allowance, pretrained
    ):
        task = copy.copy(features(batch_size=8, n=80))
        task.pretrained = pretrained
        selector = PenalizedSources(policy=policy, reach=how, masks=4, rounds=3, allowance=allowance)
        budget, ledger = Budget(epochs, "epochs", count_selection=counted), Ledger()
        planned = selector.plan(task, budget)
        selector.select(task, budget, seed=0, ledger=ledger)
        if counted:
            assert ledger.total().flops <= budget.flops(task)
        if planned.limit is not None:
            assert ledger.total().flops <= planned.limit * (1 + 1e-9)
        assert ledger.entries.keys() == planned.entries.keys()
        for key, entry in ledger.entries.items():
            assert entry.flops == pytest.approx(planned.entries[key].flops)
        # A pretrained model's search may take more of a small budget, where it needs it, but never above the default.
        largest = 2.75 if pretrained and allowance is None else allowance
        ceiling = split_budget(task, budget, largest, 2.75).selection_flops
        assert ledger.total(SELECT).flops <= ceiling * (1 + 1e-9)

    @pytest.mark.parametrize("epochs", [12, 16, 64, 400])
    def test_its_share_of_a_budget_that_covers_it_is_that_of_the_other_searches(self, task, epochs):
        budget = Budget(epochs, "epochs", count_selection=True)
        share = selection_share(task, budget.flops(task))
        spent = PenalizedSources().plan(task, budget).total(SELECT).flops
        assert 0.9 * share < spent / (budget.flops(task) - spent) <= share * (1 + 1e-9)

    def test_what_the_ceiling_does_not_bind_is_as_published(self, task):
        """On top of the budget trials have C/8 and theta C/2."""
        stages = PenalizedSources().plan(task, Budget(64, "epochs")).entries
        steps = 64 * 200 // 8
        assert stages[SELECT, "short runs, C/8"].usages == 8 * 8 * (steps // 8)
        assert stages[SELECT, "theta"].usages == 8 * 5 * (steps // 10)

    def test_trials_and_theta_are_shortened_alike(self, task):
        plain, half = (
            {stage: entry.usages for (_, stage), entry in PenalizedSources(allowance=a).plan(task, BIG).entries.items()}
            for a in (None, 0.8)
        )
        trials = [max(n for stage, n in usages.items() if "short runs" in stage) for usages in (plain, half)]
        assert trials[1] / trials[0] == pytest.approx(half["theta"] / plain["theta"], rel=0.05)
        assert 0.4 < trials[1] / trials[0] < 0.6

    def test_runs_of_the_whole_budget_need_an_allowance(self, task, caplog):
        chosen, ledger = choose(task, 16, reach="exact")
        assert "raise allowance" in chosen.notes["guard"]
        assert chosen.selected.all()
        assert not ledger.entries
        chosen, ledger = choose(task, 4, reach="exact", allowance=20.0)
        assert "guard" not in chosen.notes
        assert ledger.entries[SELECT, "short runs, C/1"].usages == 8 * 4 * 200

    @pytest.mark.parametrize("allowance", [-1.0, math.inf, math.nan])
    def test_what_is_no_allowance_is_refused(self, task, allowance):
        with pytest.raises(ConfigError, match="allowance"):
            choose(task, allowance=allowance)


class TestRun:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_run_that_was_killed_goes_on(self, task, tmp_path, policy):
        def work():
            return choose(task, 8, policy=policy, first_alpha=0.5)

        selection, ledger = work()
        # The steps of the trials, which train at once, then those of theta.
        again, other = resumed(tmp_path, work, kills=(3, 26, 50, 20))
        assert again.content_hash == selection.content_hash
        assert other.to_json(seconds=False) == ledger.to_json(seconds=False)

    def test_the_live_penalty_goes_on_too(self, task, tmp_path):
        def work():
            ledger = Ledger()
            selector = build_selector("live-penalty", {"rounds": 4, "allowance": 1.0})
            return selector.select(task, Budget(8, "epochs"), seed=0, ledger=ledger), ledger

        selection, ledger = work()
        again, other = resumed(tmp_path, work, kills=(3, 30, 40))
        assert again.content_hash == selection.content_hash
        assert other.to_json(seconds=False) == ledger.to_json(seconds=False)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_order_of_the_pool_changes_nothing(self, task, policy):
        permuted = copy.copy(task)
        order, pool = np.random.default_rng(0).permutation(len(task.pool)), task.pool
        permuted.pool = Pool(
            pool.ids.take(order), pool.examples.take(order), pool.sources[order], pool.source_names, name="pool"
        )
        one, other = choose(task, policy=policy)[0], choose(permuted, policy=policy)[0]
        assert one.source_probability == other.source_probability
        np.testing.assert_array_equal(one.weights[order], other.weights)

    @pytest.mark.parametrize("options", [{}, {"policy": "mixture"}, {"alpha": 1.0, "first_alpha": 0.1}])
    def test_noisier_sources_get_less(self, noisy, options):
        selection, _ = choose(noisy, 16, **options)
        clean, half, bad = (selection.source_probability[name] for name in ("clean", "half", "noisy"))
        assert clean > half >= bad
        assert selection.shares["clean"] > selection.shares["noisy"]
