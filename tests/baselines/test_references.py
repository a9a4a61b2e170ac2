"""The reference methods for choosing sources: each does what its recipe says, checked where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines import best_of, best_source, bilevel, halving, mixture_regression
from baselines.bilevel import Bilevel
from baselines.halving import Halving
from baselines.live_penalty import weight_gradient
from baselines.mixture_regression import MixtureRegression, sample_mixtures
from baselines.search import ridge as ridge_module
from baselines.search.adam import Adam
from baselines.search.ridge import MAX_PAIRED, Ridge, n_paired_columns, predict, with_pairs
from baselines.search.source_search import random_masks, threshold
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.estimators.enumeration import enumerate_masks
from cads.monitor import Monitor
from cads.policies.annealing import annealed_size
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.space import SubsetSpace
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

BUDGET = Budget(50, "epochs")
LEVELS = (0.0, 0.9, 0.3, 0.9)
METHODS = ["best-of", "best-source", "bilevel", "halving", "live-penalty", "mixture-regression"]


@pytest.fixture(scope="module")
def task():
    """Four sources of digits; the first is clean."""
    sources = [SyntheticSource(f"{i}: noise {level}", label_noise=level) for i, level in enumerate(LEVELS)]
    config = VisionConfig(hidden=16, n_pool=240, n_target=100, n_test=30, sources=sources)
    return config.build(TrainConfig(batch_size=8, learning_rate=3e-3))


class Oracle:
    """Stands in for training: the objective of a draw is a known function, and what was asked is recorded."""

    def __init__(self, function):
        self.function = function
        self.asked = []

    def __call__(self, inner, space, draws, rung, seed, stage):
        self.asked.append((draws.copy(), rung))
        objective = np.array([self.function(draw) for draw in draws])
        return InnerRuns(objective, np.empty((0, 0)), np.empty(0), np.empty(0), [], np.zeros(len(objective)))


def choose(task, name, budget=BUDGET, seed=0, **options):
    return build_selector(name, options).select(task, budget, seed=seed, ledger=Ledger())


def sources_of(n):
    """The subsets of n sources of one example each."""
    return SubsetSpace(
        Pool([str(i) for i in range(n)], np.zeros(n), np.arange(n), tuple(map(str, range(n))), name="pool")
    )


def mask_of(selection):
    return np.array(list(selection.mixture().values())) > 0


def test_adam_is_that_of_torch():
    gradients = np.random.default_rng(0).normal(size=(12, 5))
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference, adam, mine = torch.optim.Adam([x], lr=0.05), Adam(5), np.zeros(5)
    for gradient in gradients:
        x.grad = torch.from_numpy(gradient)
        reference.step()
        mine -= 0.05 * adam(gradient)
    assert mine == pytest.approx(x.detach().numpy(), abs=1e-12)


class TestBilevel:
    def test_its_steps_are_adam_on_the_score_function_gradient(self, task, monkeypatch):
        cost = np.array([-0.3, 0.5, -0.1, 0.2])
        oracle = Oracle(lambda m: float(cost @ m) + 0.1 * m[0] * m[1])
        monkeypatch.setattr(bilevel, "train_draws", oracle)
        selection = choose(task, "bilevel", allowance=40)
        s = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([s], lr=5e-2)
        assert len(oracle.asked) == 7
        for step, (masks, rung) in enumerate(oracle.asked):
            assert masks.shape == (5, 4)
            assert masks.any(axis=1).all()
            assert rung.fidelity == rung.data_fraction == 1
            f = np.array([oracle.function(m) for m in masks])
            here = s.detach().numpy()
            others = np.array([np.delete(f, k).mean() for k in range(5)])
            g = sum((f[k] - others[k]) * (masks[k] / here - (1 - masks[k]) / (1 - here)) for k in range(5)) / 5
            s.grad = torch.from_numpy(g)
            torch.nn.utils.clip_grad_norm_(s, 3)
            adam.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi * step / 7)) * 5e-2
            adam.step()
            s.data.clamp_(0, 1)
        assert list(selection.source_probability.values()) == pytest.approx(s.tolist(), abs=1e-6)

    def test_a_large_gradient_is_clipped_and_a_small_one_is_not(self):
        for scale in (0.1, 1.0, 50.0):
            x = scale * np.array([3.0, -4.0, 0.0])
            reference = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            reference.grad = torch.from_numpy(x.copy())
            torch.nn.utils.clip_grad_norm_(reference, 3)
            assert bilevel.clipped(x) == pytest.approx(reference.grad.numpy(), abs=1e-5)

    def test_the_size_falls_as_in_pbcs(self, task, monkeypatch):
        """All sources are good, so that the size is the largest that is allowed: from half of them to the cap."""
        monkeypatch.setattr(bilevel, "train_draws", Oracle(lambda m: -float(m.sum())))
        sizes = []
        monitor = Monitor()
        monitor.probabilities = lambda names, values, step: sizes.append(values.sum())
        selector = build_selector("bilevel", {"cap": 1.0, "allowance": 200})
        selector.select(task, BUDGET, seed=0, ledger=Ledger(), monitor=monitor)
        assert len(sizes) > 35
        for step, size in enumerate(sizes):
            assert size <= annealed_size(2.0, 1.0, step / len(sizes)) + 1e-9
        assert sizes[0] == pytest.approx(2.0)
        assert sizes[-1] == pytest.approx(1.0)

    def test_it_descends_to_the_best_sources(self, task, monkeypatch):
        monkeypatch.setattr(bilevel, "train_draws", Oracle(lambda m: float(np.array([-1, 1, -1, 1]) @ m)))
        assert mask_of(choose(task, "bilevel", allowance=120)).tolist() == [True, False, True, False]

    def test_the_cap_holds(self, task, monkeypatch):
        monkeypatch.setattr(bilevel, "train_draws", Oracle(lambda m: -float(m.sum())))
        assert sum(choose(task, "bilevel", cap=1.5).source_probability.values()) <= 1.5 + 1e-9

    def test_one_draw_is_enough_without_a_baseline(self, task, monkeypatch):
        cost = np.array([-1, 1, -1, 1])
        oracle = Oracle(lambda m: float(cost @ m))
        monkeypatch.setattr(bilevel, "train_draws", oracle)
        probability = np.zeros(4)
        for seed in range(5):
            oracle.asked.clear()
            selection = choose(task, "bilevel", draws=1, baseline="none", allowance=300, seed=seed)
            assert {len(masks) for masks, _ in oracle.asked} == {1}
            assert len(oracle.asked) > 200
            probability += np.array(list(selection.source_probability.values())) / 5
        # A probability of 0 stays there, and without a baseline some good ones come to it.
        assert probability[cost < 0].min() > probability[cost > 0].max()


class TestRidge:
    def test_a_linear_truth_is_recovered(self):
        rng = np.random.default_rng(0)
        x, slope = rng.normal(size=(40, 6)) * [1, 5, 0.1, 1, 1, 1] + 3, np.array([1.0, -2.0, 3.0, 0.0, 0.5, -1.0])
        unseen = rng.normal(size=(20, 6))
        assert Ridge(x, x @ slope + 7)(unseen) == pytest.approx(unseen @ slope + 7, abs=1e-3)

    def test_noise_is_shrunk_away(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(30, 20)), rng.normal(size=30)
        free = np.linalg.lstsq(np.hstack([x, np.ones((30, 1))]), y, rcond=None)[0][:-1]
        assert np.std(Ridge(x, y)(x)) < 0.5 * np.std(x @ free)

    def test_rows_count_by_their_weight_and_not_at_all_where_they_diverged(self):
        x, y = np.array([[0.0], [1.0], [0.0], [1.0], [1.0]]), np.array([0.0, 1.0, 0.0, 3.0, np.nan])
        w = np.array([1, 3, 1, 1, 9.0])
        many = (np.tile(x, (50, 1)), np.tile(y, 50), np.tile(w, 50))
        assert Ridge(*many)(np.array([[0.0], [1.0]])) == pytest.approx([0, 1.5], abs=0.01)

    def test_pairs(self):
        assert with_pairs(np.array([[2.0, 3.0, 5.0]])).tolist() == [[2, 3, 5, 6, 10, 15]]

    def test_of_many_columns_there_are_no_pairs(self):
        assert with_pairs(np.ones((2, MAX_PAIRED))).shape == (2, n_paired_columns(MAX_PAIRED))
        assert with_pairs(np.ones((2, MAX_PAIRED + 1))).shape == (2, n_paired_columns(MAX_PAIRED + 1))
        assert n_paired_columns(MAX_PAIRED + 1) == MAX_PAIRED + 1

    def test_predictions_come_in_blocks_of_bounded_size(self, monkeypatch):
        rng, seen = np.random.default_rng(0), []
        x, unseen = rng.normal(size=(20, 5)), rng.normal(size=(101, 5))
        ridge = Ridge(with_pairs(x), rng.normal(size=20))
        monkeypatch.setattr(ridge_module, "BLOCK_VALUES", 15 * 10)

        def features(rows):
            seen.append(len(rows))
            return with_pairs(rows)

        assert predict(ridge, unseen, features) == pytest.approx(ridge(with_pairs(unseen)), rel=1e-12)
        assert (max(seen), sum(seen)) == (10, 101 + 1)


def test_the_likeliest_sources_are_kept():
    assert threshold(np.array([0.6, 0.5, 0.4])).tolist() == [1, 0, 0]
    assert threshold(np.array([0.2, 0.4, 0.3])).tolist() == [0, 1, 0]


class TestHalving:
    def test_a_full_pool_that_diverges_is_no_reference(self, task, monkeypatch):
        monkeypatch.setattr(halving, "train_draws", Oracle(lambda m: np.nan if m.all() else 1.0))
        with pytest.raises(DataError, match="the run on the full pool met a loss that is not finite"):
            choose(task, "halving")

    def test_the_rungs_of_the_recipe(self, task, monkeypatch):
        sources = [SyntheticSource(f"s{i}") for i in range(5)]
        large = VisionConfig(hidden=16, n_pool=400, n_target=40, n_test=10, sources=sources).build(TrainConfig())
        rungs = Oracle(lambda m: 0.0)
        monkeypatch.setattr(halving, "train_draws", rungs)
        choose(large, "halving", Budget(100, "epochs"))
        assert [(r.fidelity, r.data_fraction, len(m)) for m, r in rungs.asked] == [
            (1 / 16, 1 / 16, 16),
            (1 / 8, 1 / 8, 7),
            (1 / 4, 1 / 4, 4),
        ]
        for masks, _ in rungs.asked:
            assert masks[0].all(), "the full pool is among them throughout"
            assert len(np.unique(masks, axis=0)) == len(masks)

    @pytest.mark.parametrize("epochs", [0.5, 2, 8, 20])
    def test_the_smallest_run_follows_from_the_budget(self, task, epochs):
        budget = Budget(epochs, "epochs")
        steps = epochs * 240 / 8
        plan = Halving(allowance=12.0).plan(task, budget)
        for (_, stage), entry in plan.entries.items():
            if stage.endswith("measuring") or stage == "policy":
                continue
            share = 1 / float(stage.split("/")[-1])
            assert share * steps >= min(steps, 40) * 0.99
            assert entry.usages > 0

    def test_it_finds_the_best_of_all_masks_from_a_few(self, task, monkeypatch):
        def function(m):
            return float(np.array([-0.5, 0.3, -0.1, 0.2]) @ m + 0.6 * m[0] * m[2] - 0.4 * m[1] * m[3])

        oracle = Oracle(function)
        monkeypatch.setattr(halving, "train_draws", oracle)
        values = [function(m.astype(float)) for m in enumerate_masks(4)[1:]]
        best = enumerate_masks(4)[1:][int(np.argmin(values))]
        assert mask_of(choose(task, "halving", Budget(200, "epochs"))).tolist() == best.tolist()

    @pytest.mark.parametrize("n", [2, 5, 12])
    def test_up_to_12_sources_the_first_masks_hold_each_by_a_coin(self, n):
        space = sources_of(n)
        count = min(16, space.count)
        expected = random_masks(space, count, 3, full_first=True)
        np.testing.assert_array_equal(halving._first_masks(space, count, 3), expected)
        np.testing.assert_array_equal(halving._candidates(space), enumerate_masks(n)[1:])

    @pytest.mark.parametrize(("n", "count"), [(13, 16), (20, 16), (20, 40), (100, 16), (100, 2)])
    def test_above_12_sources_masks_have_every_size(self, n, count):
        masks = halving._first_masks(sources_of(n), count, 3)
        assert masks[0].all()
        assert len(np.unique(masks, axis=0)) == len(masks) == count
        sizes = np.sort(masks[1:].sum(axis=1))
        assert sizes[0] == 1
        if count > 2:
            assert sizes[-1] == n - 1
            assert np.diff(sizes).max() <= max(1, np.ceil((n - 2) / (count - 2)))
        candidates = halving._candidates(sources_of(n))
        assert set(candidates.sum(axis=1)) == set(range(1, n + 1))
        # No source is in more masks than another, but by chance.
        assert np.abs(candidates.mean(axis=0) - candidates.mean()).max() < 0.05

    @pytest.mark.parametrize("wanted", [1, 18])
    def test_above_12_sources_it_comes_near_the_best_size(self, monkeypatch, wanted):
        """The objective tells of the size alone. Masks that hold each source by a coin end at 3 and at 20."""
        sources = [SyntheticSource(f"{i:02}") for i in range(20)]
        many = VisionConfig(hidden=16, n_pool=400, n_target=40, n_test=10, sources=sources).build(TrainConfig())
        monkeypatch.setattr(halving, "train_draws", Oracle(lambda m: (m.sum() - wanted) ** 2 / 100))
        assert abs(mask_of(choose(many, "halving", Budget(200, "epochs"))).sum() - wanted) <= 1

    def test_it_drops_what_is_noise(self, task):
        chosen = mask_of(choose(task, "halving"))
        assert chosen[0]
        assert not (chosen[1] and chosen[3])


class TestMixtureRegression:
    @pytest.mark.parametrize("regression", ["linear", "pairs"])
    def test_the_best_of_a_linear_truth_is_predicted(self, regression):
        proportions, slope = np.array([0.4, 0.1, 0.3, 0.2]), np.array([0.5, -1.0, 2.0, 0.1])
        mixtures, candidates = (sample_mixtures(proportions, n, seed) for n, seed in ((60, 0), (4096, 1)))
        method = MixtureRegression(regression=regression)
        best = method.best_predicted(mixtures, mixtures @ slope + 3, candidates)
        truly = candidates[np.argsort(candidates @ slope)[: mixture_regression.AVERAGED]].mean(axis=0)
        assert best == pytest.approx(truly, abs=0.02)
        assert best.sum() == pytest.approx(1)

    def test_a_truth_with_pairs_needs_pairs(self):
        mixtures, candidates = (sample_mixtures(np.full(3, 1 / 3), n, seed) for n, seed in ((60, 0), (4096, 1)))

        def truth(x):
            return -x[..., 0] * x[..., 1]

        result = {
            r: truth(MixtureRegression(regression=r).best_predicted(mixtures, truth(mixtures), candidates))
            for r in ("linear", "pairs")
        }
        assert result["pairs"] == pytest.approx(truth(candidates).min(), abs=0.01)
        assert result["linear"] > result["pairs"] + 0.02

    def test_mixtures_are_mixtures_around_the_proportions(self):
        proportions = np.array([0.7, 0.2, 0.1])
        mixtures = sample_mixtures(proportions, 20_000, 0)
        assert (mixtures >= 0).all()
        assert mixtures.sum(axis=1) == pytest.approx(np.ones(20_000))
        assert mixtures.mean(axis=0) == pytest.approx(proportions, abs=0.02)

    def test_the_clean_source_has_more_than_the_noisy_ones(self, task):
        weights = list(choose(task, "mixture-regression").mixture().values())
        assert weights[0] > max(weights[1], weights[3])


class TestLivePenalty:
    def test_the_gradient_of_the_weights_is_that_of_autograd(self):
        rng = np.random.default_rng(0)
        logits, gap = rng.normal(size=6), rng.normal(size=6)
        w = torch.tensor(logits, requires_grad=True)
        (0.7 * (torch.softmax(w, 0) @ torch.tensor(gap))).backward()
        assert weight_gradient(logits, gap, 0.7) == pytest.approx(w.grad.numpy(), abs=1e-12)

    def test_the_clean_source_has_most(self, task):
        weights = list(choose(task, "live-penalty", Budget(20, "epochs")).mixture().values())
        assert np.argmax(weights) == 0
        assert weights[0] > 2 * max(weights[1], weights[3])


@pytest.mark.parametrize(("name", "module"), [("best-of", best_of), ("best-source", best_source)])
def test_the_best_of_what_was_trained_is_returned(task, monkeypatch, name, module):
    oracle = Oracle(lambda m: float(np.array([0.3, -0.1, -0.2, 0.4]) @ m) if m.sum() < 4 else np.nan)
    monkeypatch.setattr(module, "train_draws", oracle)
    chosen = mask_of(choose(task, name))
    ((masks, _),) = oracle.asked
    values = [oracle.function(m) for m in masks]
    assert chosen.tolist() == (masks[int(np.nanargmin(values))] > 0).tolist()
    if name == "best-source":
        assert masks.tolist() == np.eye(4).tolist()
    else:
        assert masks[0].all()


@pytest.mark.parametrize("worse", [False, True])
def test_the_guard_returns_the_full_pool_where_the_choice_loses(task, monkeypatch, worse):
    monkeypatch.setattr(best_source, "train_draws", Oracle(lambda m: -m[2]))
    monkeypatch.setattr("baselines.search.source_search.train_draws", Oracle(lambda m: m.sum() * (-1 if worse else 1)))
    selection = choose(task, "best-source", guard=True)
    assert selection.selected.all() == worse
    assert selection.notes["guard"].startswith("the full pool" if worse else "better")


def test_the_guard_needs_the_full_pool(task, monkeypatch):
    monkeypatch.setattr(best_source, "train_draws", Oracle(lambda m: -m[2]))
    monkeypatch.setattr("baselines.search.source_search.train_draws", Oracle(lambda m: np.nan if m.all() else 1.0))
    with pytest.raises(DataError, match="guard: the run on the full pool met"):
        choose(task, "best-source", guard=True)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "live-penalty"])
def test_runs_that_all_diverge_are_said(task, monkeypatch, name):
    def diverging(inner, streams, *_, **__):
        return InnerRuns(
            np.full(len(streams), np.nan), np.empty((0, 0)), np.empty(0), np.empty(0), [], np.zeros(len(streams))
        )

    monkeypatch.setattr(InnerLoop, "run", diverging)
    with pytest.raises(DataError, match=r"all \d+ runs met a loss that is not finite"):
        choose(task, name)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_guard_is_planned_and_allowances_are_kept(task, name, guard):
    selector, ledger = build_selector(name, {"guard": guard, "allowance": 6.0}), Ledger()
    budget = Budget(8, "epochs")
    planned = selector.plan(task, budget)
    selector.select(task, budget, seed=0, ledger=ledger)
    spent = ledger.total(SELECT).flops
    assert 0 < spent <= 6 * budget.flops(task) * (1 + 1e-9)
    assert planned.total(SELECT).flops == pytest.approx(spent, rel=0.01)
    assert ((SELECT, "guard") in planned.entries) == guard


@pytest.mark.parametrize("name", METHODS)
def test_a_pool_without_sources_is_refused(name):
    task = VisionConfig(hidden=8, n_pool=60, n_target=20, n_test=10).build(TrainConfig())
    with pytest.raises(DataError, match="no sources"):
        choose(task, name, Budget(2, "epochs"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bilevel", {"draws": 1}),
        ("bilevel", {"draws": 0, "baseline": "none"}),
        ("bilevel", {"share": 0.0}),
        ("bilevel", {"cap": -1.0}),
        ("best-of", {"share": 1.5}),
        ("best-source", {"share": 0.0}),
        ("live-penalty", {"alpha": 0.0}),
        ("live-penalty", {"rounds": 0}),
        ("mixture-regression", {"regression": "cubic"}),
    ],
)
def test_bad_options_are_refused_by_name(name, options):
    option = next(iter(options))
    with pytest.raises(ConfigError, match=f"{option} = "):
        build_selector(name, options)


def test_more_allowance_is_more_outer_steps(task):
    budget = Budget(4, "epochs")
    steps = [Bilevel(allowance=a).plan(task, budget).total(SELECT).usages for a in (8, 16, 32)]
    assert steps[0] < steps[1] < steps[2]
