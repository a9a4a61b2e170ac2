"""CADS-E as published: its estimators against enumeration, its budget, and what it keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.estimators.enumeration import enumerate_masks, expected_gradient
from cads.estimators.rao_blackwell import rao_blackwell_leading
from cads.policies.bernoulli import BernoulliPolicy
from cads.registry import build_selector
from cads.selectors.cads_e import penalty_form
from cads.selectors.cads_e.live_gap import KDraw, LiveGap, RaoBlackwellised
from tests.support.forked_processes import TOLERANCE, spread
from tests.support.killed_runs import resumed
from tests.support.rates import Rates, assert_one_course

NAME = "cads-e-penalty"
ESTIMATORS = ["rao-blackwell", "k-draw"]


def choose(task, epochs=8.0, seed=0, count_selection=False, **options):
    ledger, budget = Ledger(), Budget(epochs, "epochs", count_selection=count_selection)
    options = {"draws": 4, **options}
    return build_selector(NAME, options).select(task, budget, seed=seed, ledger=ledger), ledger


@pytest.fixture
def task(features):
    return features(batch_size=8, n=120, learning_rate=0.02)


class FixedDraws:
    """A generator that gives what it is told, in place of random numbers."""

    def __init__(self, uniforms=(), masks=(), members=()):
        self._uniforms, self._masks, self._members = uniforms, iter(masks), iter(members)

    def random(self, count, dtype=None):
        return np.asarray(self._uniforms) if dtype is None else 1.0 - np.asarray(next(self._masks), dtype=float)

    def integers(self, high, size):
        return np.full(size, next(self._members)) if size else np.empty(0, dtype=int)


class TestEstimators:
    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 10_000))
    def test_rao_blackwell_is_the_exact_derivative_at_what_is_drawn(self, seed):
        """Over all batches of three of three examples: given that a draw is i, the mean entry is the derivative at i.

        The step of the policy is the sum of entries, so its mean is the derivative times how often i is drawn.
        """
        rng = np.random.default_rng(seed)
        s, gaps, alpha, b = rng.uniform(0.05, 1, 3), rng.normal(size=3), rng.uniform(0.1, 3), 3
        policy, chances = BernoulliPolicy(s), s / s.sum()
        ends = np.cumsum(chances)
        mean = np.zeros(3)
        for batch in itertools.product(range(3), repeat=b):
            estimator = RaoBlackwellised()
            uniforms = [(ends[i] + (ends[i - 1] if i else 0)) / 2 for i in batch]
            items = estimator.draw(policy, b, b, FixedDraws(uniforms))
            assert items.tolist() == list(batch)
            mean += chances[list(batch)].prod() * estimator.gradient(policy, gaps[items], alpha)
        np.testing.assert_allclose(mean / (b * chances), alpha * rao_blackwell_leading(gaps, s), atol=1e-12)

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 10_000))
    def test_k_draw_is_unbiased(self, seed):
        """Over all pairs of masks of three examples, and all examples that each gives: the gradient of E[R - l*]."""
        rng = np.random.default_rng(seed)
        s, gaps, alpha = rng.uniform(0.05, 0.95, 3), rng.normal(size=3), rng.uniform(0.1, 3)
        policy, masks = BernoulliPolicy(s), enumerate_masks(3)
        chance = np.where(masks, s, 1 - s).prod(axis=1)
        members = [np.flatnonzero(m) if m.any() else np.array([s.argmax()]) for m in masks]
        values = np.array([gaps[x].mean() for x in members])
        mean = np.zeros(3)
        for a, b in itertools.product(range(8), repeat=2):
            for i, j in itertools.product(range(len(members[a])), range(len(members[b]))):
                estimator = KDraw(2)
                fixed = FixedDraws(masks=[masks[a], masks[b]], members=[i, j, 0, 0])
                items = estimator.draw(policy, 2, 2, fixed)
                assert items.tolist() == [members[a][i], members[b][j]]
                weight = chance[a] * chance[b] / len(members[a]) / len(members[b])
                mean += weight * estimator.gradient(policy, gaps[items], alpha)
        np.testing.assert_allclose(mean, alpha * expected_gradient(values, s), atol=1e-10)

    @pytest.mark.parametrize("estimator", [RaoBlackwellised(), KDraw(3)])
    def test_examples_are_drawn_by_their_probability(self, estimator):
        s = np.array([1.0, 0.5, 0.25, 0.0])
        items = [estimator.draw(BernoulliPolicy(s), 6, 3, np.random.default_rng(k)) for k in range(2000)]
        shares = np.bincount(np.concatenate(items), minlength=4) / 12_000
        assert shares[3] == 0
        assert (np.diff(shares) < 0).all()
        if isinstance(estimator, RaoBlackwellised):
            np.testing.assert_allclose(shares, s / s.sum(), atol=0.02)

    @pytest.mark.parametrize("estimator", [RaoBlackwellised(), KDraw(2)])
    def test_losses_that_are_not_finite_move_nothing(self, estimator):
        policy = BernoulliPolicy(np.full(5, 0.5))
        estimator.draw(policy, 4, 4, np.random.default_rng(0))
        assert not estimator.gradient(policy, np.full(4, np.nan), 1.0).any()


class TestCourse:
    def live(self, pool, estimator, size=20):
        return LiveGap(
            pool,
            size=size,
            alpha=1.0,
            estimator=estimator,
            batch_size=8,
            n_shared=4,
            n_steps=100,
            flops=200.0,
            price=lambda _: 1.0,
            seed=0,
        )

    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_the_size_falls_from_all_to_what_is_wanted(self, task, name):
        live = self.live(task.pool, RaoBlackwellised() if name == "rao-blackwell" else KDraw(2))
        sizes = []
        for step in range(100):
            live.draw(step)
            live.pay([])
            live.pay([])
            live.reach(np.zeros(8))
            live.learn(np.random.default_rng(step).normal(size=4))
            s = live.probabilities()
            assert (s >= 0).all()
            assert (s <= 1).all()
            sizes.append(s.sum())
        np.testing.assert_allclose(sizes[:16], 120)
        np.testing.assert_allclose(sizes[60:], 20)
        assert (np.diff(sizes) <= 1e-9).all()

    def test_the_state_is_all_that_draws_depend_on(self, task):
        def go_on(live, steps):
            drawn = []
            for step in steps:
                drawn.append(live.draw(step))
                live.pay([])
                live.reach(np.zeros(8))
                live.learn(task.pool.sources[drawn[-1][:4]] + 0.1 * drawn[-1][:4])
            return drawn

        whole = self.live(task.pool, RaoBlackwellised())
        go_on(whole, range(40))
        other = self.live(task.pool, RaoBlackwellised())
        other.restore(whole.state())
        for one, two in zip(go_on(whole, range(40, 60)), go_on(other, range(40, 60)), strict=True):
            np.testing.assert_array_equal(one, two)


class TestBudget:
    @settings(deadline=None, max_examples=15)
    @given(
        epochs=st.floats(0.2, 12),
        allowance=st.one_of(st.none(), st.floats(0, 3)),
        counted=st.booleans(),
        name=st.sampled_from(ESTIMATORS),
    )
    def test_the_allowance_is_never_exceeded_and_the_plan_is_the_ledger(
        self, features, epochs, allowance, counted, name
    ):
        task = features(batch_size=10, n=60)
        options = {"allowance": allowance, "estimator": name, "draws": 5}
        budget = Budget(epochs, "epochs", count_selection=counted)
        selection, ledger = choose(task, epochs, count_selection=counted, **options)
        planned = build_selector(NAME, options).plan(task, budget)
        limit = budget.flops(task)
        if allowance is not None:
            limit *= allowance / (1 + allowance) if counted else allowance
        elif not counted:
            limit *= penalty_form.ALLOWANCE
        assert ledger.total().flops <= limit * (1 + 1e-9)
        assert ledger.entries.keys() == planned.entries.keys()
        for key, entry in ledger.entries.items():
            assert entry.flops == pytest.approx(planned.entries[key].flops)
            assert entry.usages == planned.entries[key].usages
        assert bool(ledger.entries) == ("steps" in selection.notes)
        assert bool(planned.note) == (not ledger.entries)

    def test_texts_cost_what_they_cost(self, texts):
        """Lengths differ: with padding fewer steps are bought, and the size falls all the same."""
        task = texts(batch_size=8, n=160)
        selection, ledger = choose(task, 8, allowance=1.0)
        total = Budget(8, "epochs").flops(task)
        assert 0.8 * total < ledger.total().flops <= total * (1 + 1e-9)
        assert selection.probability.sum() == pytest.approx(80)
        assert ledger.entries[SELECT, "u"].usages == pytest.approx(8 * selection.notes["steps"], abs=8)

    def test_each_model_trains_once(self, task):
        """One warm-up and one decay for each of theta and u, over all of its steps."""
        rates = Rates()
        budget = Budget(8, "epochs")
        selection = build_selector(NAME, {}).select(task, budget, seed=0, ledger=Ledger(), monitor=rates)
        assert set(rates.of) == {"u", "theta"}
        for course in rates.of.values():
            assert len(course) == selection.notes["steps"] > 60
            assert_one_course(course)


class TestRun:
    @pytest.mark.parametrize("name", ESTIMATORS)
    @pytest.mark.parametrize("kills", [(0, 3, 5), (50, 70)])
    def test_a_run_that_was_killed_goes_on(self, task, tmp_path, name, kills):
        def work():
            return choose(task, 8, estimator=name)

        selection, ledger = work()
        again, other = resumed(tmp_path, work, kills=kills)
        assert again.content_hash == selection.content_hash
        assert other.to_json(seconds=False) == ledger.to_json(seconds=False)

    def test_a_run_that_was_killed_after_its_last_step_goes_on(self, task, tmp_path):
        selection, ledger = choose(task, 8)
        kills = [selection.notes["steps"] - 1]
        again, other = resumed(tmp_path, lambda: choose(task, 8), kills=kills)
        assert again.content_hash == selection.content_hash
        assert other.to_json(seconds=False) == ledger.to_json(seconds=False)

    def test_texts_that_were_killed_go_on(self, texts, tmp_path):
        task = texts(batch_size=8, n=160)

        def work():
            return choose(task, 6)[0]

        assert resumed(tmp_path, work, kills=(20, 31)).content_hash == work().content_hash

    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_the_order_of_the_pool_changes_nothing(self, task, name):
        permuted = task.__class__((task.pool, task.target, task.test), task.recipe, task._build)
        order, pool = np.random.default_rng(0).permutation(len(task.pool)), task.pool
        permuted.pool = Pool(
            pool.ids.take(order), pool.examples.take(order), pool.sources[order], pool.source_names, name="pool"
        )
        one, other = choose(task, estimator=name)[0], choose(permuted, estimator=name)[0]
        np.testing.assert_array_equal(one.probability[order], other.probability)
        np.testing.assert_array_equal(one.selected[order], other.selected)

    def test_seeds_differ(self, task):
        assert choose(task, seed=0)[0].content_hash != choose(task, seed=1)[0].content_hash

    def test_micro_batches_give_the_same(self, features):
        one, other = (
            choose(features(batch_size=9, n=90, learning_rate=0.02, accumulate=k), 6)[0].probability for k in (1, 3)
        )
        np.testing.assert_allclose(one, other, atol=1e-3)


class TestWhatIsKept:
    def test_wrong_labels_and_noisy_sources_get_less(self, noisy):
        selection, _ = choose(noisy, 8)
        wrong = noisy.truth.corrupted
        assert selection.probability[~wrong].mean() > 2 * selection.probability[wrong].mean()
        assert wrong[selection.selected].mean() < 0.5 * wrong.mean()
        clean, half, bad = (selection.source_probability[name] for name in ("clean", "half", "noisy"))
        assert clean > half > bad

    @pytest.mark.parametrize(("fraction", "kept"), [(0.1, 12), (0.25, 30), (1.0, 120)])
    def test_the_most_probable_are_kept(self, task, fraction, kept):
        selection, _ = choose(task, fraction=fraction)
        assert selection.selected.sum() == kept
        assert selection.probability.sum() == pytest.approx(kept)
        if kept < 120:
            assert selection.probability[selection.selected].min() >= selection.probability[~selection.selected].max()
        assert not selection.weighted

    @pytest.mark.parametrize(("epochs", "kept"), [(1, 30), (1.5, 45), (4, 60)])
    def test_by_default_what_the_training_passes_over_four_times_and_at_most_half(self, task, epochs, kept):
        selection, _ = choose(task, epochs, allowance=12.0)
        assert selection.selected.sum() == kept

    def test_a_budget_for_too_few_steps_keeps_all(self, task):
        selection, ledger = choose(task, 0.3)
        assert selection.selected.all()
        assert "does not buy enough steps" in selection.notes["guard"]
        assert not ledger.entries


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"fraction": 0.0}, {"fraction": 1.5}, {"draws": 1}, {"estimator": "exact"}]
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} = "):
        build_selector(NAME, options)


@pytest.mark.parametrize(("options"), [{"alpha": 0.01}, {"alpha": 100.0}, {"estimator": "k-draw", "draws": 7}])
def test_batches_that_hold_too_little_of_either_are_refused_at_once(task, options):
    for begin in (
        lambda: choose(task, **options),
        lambda: build_selector(NAME, options).plan(task, Budget(4, "epochs")),
    ):
        with pytest.raises(ConfigError, match="of a batch of 8 the target model would take"):
            begin()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_learn_what_one_does(features, tmp_path, sharding):
    """They divide each batch of both models, or both models too."""

    def work():
        task = features(batch_size=8, n=60, learning_rate=0.02, sharding=sharding)
        selection, ledger = choose(task, 6)
        return {"probability": selection.probability.tolist(), "flops": ledger.total().flops}

    one = work()
    for told in spread(2, work, tmp_path):
        np.testing.assert_allclose(told["probability"], one["probability"], atol=TOLERANCE)
        assert told["flops"] == one["flops"]
