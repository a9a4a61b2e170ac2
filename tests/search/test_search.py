"""What a search owes its caller when it finds nothing, runs out, or meets what is no number."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from scipy.stats import sem

from baselines.best_of import BestOf
from baselines.best_source import BestSource
from baselines.bilevel import Bilevel
from baselines.halving import Halving
from baselines.live_penalty import LivePenalty
from baselines.loss import Loss
from baselines.mixture_regression import MixtureRegression
from baselines.rho import Rho
from baselines.source import Source
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.estimators.design import spaced
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.search.constants import PRETRAINED
from cads.search.fidelity import Rung
from cads.search.inner_costs import PlannedInnerLoop
from cads.search.inner_runs import InnerLoop, InnerRuns, paired_error
from cads.search.rungs import affordable_rungs, run_rung
from cads.search.source_choice import source_choice
from cads.search.space import MixtureSpace, SubsetSpace
from cads.selection import Selection
from cads.selectors.cads_s.penalty_form import PenalizedSources
from cads.selectors.search.proposals import initial_design
from cads.selectors.search.selector import PolicySearch
from cads.selectors.search.target_risk import excess_target_loss, probe_positions
from cads.selectors.search.trials import TrialHistory
from cads.task import ObjectiveValue
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource


@pytest.mark.parametrize("kind", [PolicySearch, LivePenalty])
def test_the_full_pool_keeps_the_options_that_were_asked_for(features, kind):
    selector = kind(allowance=0.0, target_fraction=0.25)
    chosen = selector.select(features(), Budget(2, "epochs"), seed=0, ledger=Ledger())
    assert chosen.selected.all()
    assert chosen.target_fraction == 0.25
    assert chosen.config["allowance"] == 0.0


def confidence_lost(task, model, pool):
    return task.metrics(model, pool)["loss"] ** 2


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (PolicySearch, 16),
        (partial(PolicySearch, allowance=0), 16),
        (Bilevel, 16),
    ],
)
def test_a_selection_by_a_function_of_ones_own_is_saved_with_its_name(features, kind, passes, tmp_path):
    task = features(batch_size=8)
    made = kind(outer=confidence_lost).select(task, Budget(passes, "epochs"), seed=0, ledger=Ledger())
    loaded = Selection.load(made.save(tmp_path / "selection"))
    assert loaded.config["outer"] == f"{__name__}.confidence_lost"
    assert loaded.config == made.config
    assert loaded.content_hash == made.content_hash


def test_a_callable_without_a_name_goes_by_its_class(features):
    task = features(batch_size=8)
    measure = partial(confidence_lost)
    made = PolicySearch(outer=measure).select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert made.config["outer"] == "functools.partial"
    assert made.content_hash


def test_the_function_asked_for_is_what_is_measured(features):
    """The square of the loss has the order of the loss, and other gains."""
    task = features(batch_size=8)
    budget = Budget(16, "epochs")
    by_name, squared = (
        PolicySearch(outer=outer, guard=False).select(task, budget, seed=0, ledger=Ledger())
        for outer in ("loss", confidence_lost)
    )
    assert by_name.notes["runs"] == squared.notes["runs"]
    assert by_name.notes["gain"] != squared.notes["gain"]


@pytest.mark.parametrize("kind", [PolicySearch, BestSource])
def test_a_proxy_in_another_order_selects_in_the_order_of_the_pool(features, kind):
    task, proxy = copy.copy(features(batch_size=8)), copy.copy(features(batch_size=8, hidden=4))
    pool, order = proxy.pool, np.random.default_rng(1).permutation(len(proxy.pool))
    proxy.pool = Pool(pool.ids.take(order), pool.examples.take(order), pool.sources[order], pool.source_names)
    task.proxy = proxy
    chosen = kind().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    own = copy.copy(proxy)
    alone = kind(allowance=2.75).select(own, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert chosen.pool_hash == task.pool.content_hash
    assert chosen.ids.equals(task.pool.ids)
    assert chosen.sources.to_pylist() == [task.pool.source_names[s] for s in task.pool.sources]
    np.testing.assert_array_equal(chosen.score[order], alone.score)
    np.testing.assert_array_equal(chosen.probability[order], alone.probability)
    np.testing.assert_array_equal(chosen.selected[order], alone.selected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(PolicySearch, {"policy": "gaussian"}), (PolicySearch, {"reach": "far"}), (PenalizedSources, {"reach": "far"})],
)
def test_unknown_choices_are_refused(kind, options):
    with pytest.raises(ConfigError, match="choose from"):
        kind(**options)


@pytest.mark.parametrize(
    "options",
    [{"alpha": -0.1}, {"alpha": float("nan")}, {"alpha": float("inf")}, {"policy_steps": -1}, {"policy_steps": 1.5}],
)
def test_weights_and_steps_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} = .*must be"):
        PolicySearch(**options)


class Watched(Monitor):
    """Remembers the scalars, and the probabilities of the sources."""

    def __init__(self):
        super().__init__()
        self.scalars, self.marginals = {}, []

    def scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append(value)

    def probabilities(self, names, values, step):
        self.marginals.append(np.array(values))


def watched_search(task, **options):
    monitor, selector, ledger = Watched(), PolicySearch(**options), Ledger()
    selector.select(task, Budget(16, "epochs"), seed=0, ledger=ledger, monitor=monitor)
    assert ledger.total(SELECT).flops == pytest.approx(selector.plan(task, Budget(16, "epochs")).total(SELECT).flops)
    return monitor


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_a_held_alpha_weighs_the_whole_penalty(features, alpha):
    scalars = watched_search(features(batch_size=8), alpha=alpha).scalars
    for tag in ("control/weight_of_target_model_loss", "control/weight_of_loss_within_reach"):
        assert set(scalars[tag]) == {alpha}
    assert scalars["outer/target_model_loss"][0] > 0


def test_without_theta_there_is_no_penalty_to_weigh(features, monkeypatch):
    monkeypatch.setattr("cads.selectors.search.selector.theta_flops", lambda *args: (0.0, []))
    scalars = watched_search(features(batch_size=8), alpha=1.0).scalars
    weights = ("control/weight_of_target_model_loss", "control/weight_of_loss_within_reach")
    for tag in ("outer/target_model_loss", *weights):
        assert set(scalars[tag]) == {0.0}


def test_a_choice_beats_everything_by_more_than_the_target_can_tell_by_chance():
    full, draw = np.ones(3), np.array([1.0, 0.0, 1.0])
    draws, fidelity, errors = np.array([full, draw, full, draw]), np.array([0.1, 0.1, 0.3, 0.3]), [0, 0.05, 0, 0.02]

    def beats(early, late):
        return TrialHistory(
            draws, np.array([0, early, 0, late]), np.array(errors), fidelity, np.zeros(4)
        ).beats_full_pool(draw)

    assert beats(-0.1, -0.01)
    assert not beats(-0.01, -0.01)
    assert not beats(0.1, -0.1)
    assert not beats(-0.5, 0.0)
    assert beats(np.nan, -0.05)


def test_errors_of_runs_are_those_of_paired_differences():
    a, b = np.random.default_rng(0).normal(size=(2, 400))
    found = paired_error(ObjectiveValue(0.0, a), ObjectiveValue(0.0, a + 0.1 * b))
    assert found == pytest.approx(sem(0.1 * b))
    assert paired_error(ObjectiveValue(0.0, a), ObjectiveValue(0.0)) == 0


def test_what_the_pool_teaches_is_taken_out_of_what_theta_finds(features, monkeypatch):
    task = features(batch_size=8)
    inner = InnerLoop(task, Ledger(), Monitor())
    theta, u = np.array([2.0, 1.0, 3.0]), np.array([3.0, 1.1, 3.2])
    monkeypatch.setattr("cads.selectors.search.target_risk.mean_losses", lambda *_: u)
    positions = probe_positions(SubsetSpace(task.pool))
    assert [set(task.pool.sources[p]) for p in positions] == [{k} for k in range(len(task.pool.source_names))]
    np.testing.assert_allclose(excess_target_loss(inner, theta, positions, task.model(0)), theta - u + u.mean())


@pytest.mark.parametrize("space", [SubsetSpace, MixtureSpace])
@pytest.mark.parametrize("replicas", ["auto", "loop"])
def test_a_rung_whose_first_run_was_made_before_is_the_same(space, replicas):
    sources = [SyntheticSource(name, label_noise=noise) for name, noise in (("a", 0.0), ("b", 0.5), ("c", 0.9))]
    config = VisionConfig(hidden=16, n_pool=80, n_target=30, n_test=30, sources=sources)
    task = config.build(TrainConfig(batch_size=8, replicas=replicas))
    space, rung = space(task.pool), Rung(1 / 8, 40 * task.costs.per_usage(task.pool, 8) * 8, 0.5, 3)
    draws = space.nested(np.arange(len(space.sizes)))[:3]
    ledgers = Ledger(), Ledger()
    whole = run_rung(InnerLoop(task, ledgers[0], Monitor(), "loss"), space, draws, rung, 0, 0)
    inner = InnerLoop(task, ledgers[1], Monitor(), "loss")
    reference_run = run_rung(inner, space, draws[:1], rung, 0, 0)
    parts = run_rung(inner, space, draws, rung, 0, 0, reference_run)
    assert (len(reference_run.models), len(parts.models), len(whole.models)) == (1, 0, 0)
    for name in ("objective", "stderr", "losses", "final_train_loss", "flops"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-5, err_msg=name)
    assert ledgers[1].total().flops == pytest.approx(ledgers[0].total().flops)
    assert whole.stderr[1:].all()


def test_runs_of_other_lengths_are_put_side_by_side_at_their_ends():
    def made(steps, runs, first):
        losses = np.arange(steps)[:, None] + 10.0 * np.arange(runs)
        values = np.arange(runs, dtype=np.float64)
        return InnerRuns(values, losses, np.arange(1.0, steps + 1), values, [None] * runs, values, first)

    one, more = made(3, 1, ObjectiveValue(0.5)), made(5, 3, ObjectiveValue(0.7))
    both = one.followed_by(more)
    np.testing.assert_array_equal(both.losses, [[0, 2, 12, 22], [1, 3, 13, 23], [2, 4, 14, 24]])
    np.testing.assert_allclose(both.flops, (np.array([1, 2, 3]) + 3 * np.array([3, 4, 5])) / 4)
    np.testing.assert_array_equal(both.objective, [0, 0, 1, 2])
    assert both.models == []
    assert both.reference is one.reference


@pytest.mark.parametrize("selector", [PolicySearch(), PolicySearch(policy="mixture")])
def test_a_pretrained_model_is_searched_for_where_the_budget_buys_the_least(features, selector):
    task, ledger = copy.copy(features(batch_size=8, hidden=1024)), Ledger()
    task.pretrained = True
    min_flops = selector.min_flops(PlannedInnerLoop(task, math.inf))
    budget = Budget(1.8 * min_flops, "FLOPs", count_selection=True)
    selector.select(task, budget, seed=0, ledger=ledger)
    planned, spent = selector.plan(task, budget), ledger.total(SELECT)
    assert spent.flops == pytest.approx(planned.total(SELECT).flops)
    assert spent.flops <= min_flops * (1 + 1e-6)
    assert ledger.entries[SELECT, "theta"].usages >= PRETRAINED.theta_min_steps * 8
    assert any("short runs" in stage for _, stage in ledger.entries)


@pytest.mark.parametrize("policy", ["bernoulli", "mixture"])
def test_a_policy_without_steps_stays_where_it_starts(features, policy):
    task = features(batch_size=8)
    start = 0.5 if policy == "bernoulli" else task.pool.source_sizes / len(task.pool)
    for marginals in watched_search(task, policy=policy, policy_steps=0).marginals:
        np.testing.assert_allclose(marginals, np.broadcast_to(start, marginals.shape))
    moved = watched_search(task, policy=policy, policy_steps=1).marginals
    assert moved
    assert np.abs(moved[-1] - start).max() > 0.01


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_a_penalty_whose_batches_hold_target_or_pool_alone_is_refused_at_once(features, alpha):
    task, ledger = features(batch_size=8), Ledger()
    for begin in (PenalizedSources(alpha).plan, partial(PenalizedSources(alpha).select, seed=0, ledger=ledger)):
        with pytest.raises(
            ConfigError, match=rf"alpha = {alpha}: of a batch of 8 the target model would take [08] examples"
        ):
            begin(task, Budget(16, "epochs"))
    assert not ledger.entries


@pytest.mark.parametrize(("steps", "reach", "searched"), [(12, "fitted", True), (12, "extrapolated", False)])
def test_a_run_of_one_step_is_no_curve(features, steps, reach, searched):
    """Of 12 steps a short run has one, which can be fitted and not extrapolated."""
    task, ledger = features(batch_size=8, clip_norm=None), Ledger()
    selector = PenalizedSources(reach=reach, rounds=1, allowance=20.0)
    chosen = selector.select(task, Budget(8 * steps, "usages"), seed=0, ledger=ledger)
    assert bool(ledger.total(SELECT).flops) == searched
    assert ("guard" in chosen.notes) != searched
    assert chosen.config == asdict(selector)


@pytest.mark.parametrize(
    "kind",
    [
        PolicySearch,
        partial(PolicySearch, policy="mixture"),
        PenalizedSources,
        BestOf,
        BestSource,
        Bilevel,
        Halving,
        LivePenalty,
        MixtureRegression,
    ],
)
def test_one_source_is_not_searched(features, kind):
    task, ledger, selector = features(batch_size=8, sources=1), Ledger(), kind()
    assert "one source" in selector.plan(task, Budget(16, "epochs")).note
    chosen = selector.select(task, Budget(16, "epochs"), seed=0, ledger=ledger)
    assert chosen.selected.all()
    assert not chosen.weighted
    assert "one source" in chosen.notes["guard"]
    assert chosen.config == asdict(selector)
    assert not ledger.entries


@pytest.mark.parametrize("sizes", [(49, 37, 114), (1, 3, 196), (50, 50, 100)])
def test_ratios_in_proportion_to_sizes_are_no_weights(features, sizes):
    task = copy.copy(features())
    pool = task.pool
    task.pool = Pool(pool.ids, pool.examples, np.repeat(np.arange(3), sizes), ("a", "b", "c"))
    space = MixtureSpace(task.pool)

    def chosen(draw):
        return source_choice(space, np.array(draw), space.policy(), {})

    assert not chosen(space.full).weighted
    assert chosen(space.full).selected.all()
    assert not chosen([sizes[0] / (sizes[0] + sizes[2]), 0.0, sizes[2] / (sizes[0] + sizes[2])]).weighted
    assert chosen(space.full * [1, 1, 1 + 1e-9]).weighted


@pytest.mark.parametrize("kind", [Loss, Rho])
def test_batches_without_room_are_refused_at_once(kind):
    with pytest.raises(ConfigError, match="batch_tokens = 0"):
        kind(batch_tokens=0)


def test_a_source_that_is_not_there_is_refused_by_the_plan(features):
    with pytest.raises(ConfigError, match="no source of the pool"):
        Source("elsewhere").plan(features(), Budget(1, "epochs"))
    with pytest.raises(ConfigError, match=r"name = 'elsewhere' is no source of the pool"):
        Source(["source 0", "elsewhere"]).plan(features(), Budget(1, "epochs"))
    with pytest.raises(ConfigError, match=r"name = \[\] names no source"):
        Source([]).plan(features(), Budget(1, "epochs"))


@pytest.mark.parametrize(("name", "kept"), [("source 1", {1}), (["source 3", "source 1"], {1, 3})])
def test_sources_are_kept_by_name(features, name, kept):
    task = features()
    chosen = Source(name).select(task, Budget(1, "epochs"), seed=0, ledger=Ledger())
    assert (chosen.selected == np.isin(task.pool.sources, list(kept))).all()
    assert {s for s, p in chosen.source_probability.items() if p} == {f"source {s}" for s in kept}


def test_a_full_pool_that_diverges_is_named(features, monkeypatch):
    task = features(batch_size=8)
    monkeypatch.setattr(type(task), "objective", lambda *_: ObjectiveValue(float("nan")))
    with pytest.raises(DataError, match="full pool met a loss that is not finite"):
        PolicySearch().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())


@pytest.mark.parametrize("options", [{"rounds": 3, "allowance": 0.15}, {"rounds": 6, "allowance": 0.5}])
def test_live_penalty_stays_in_its_allowance_where_lengths_differ(texts, options):
    task, ledger = texts(n=600, batch_size=1), Ledger()
    selector, budget = LivePenalty(**options), Budget(2, "epochs")
    planned = selector.plan(task, budget)
    selector.select(task, budget, seed=0, ledger=ledger)
    assert 0 < ledger.total().flops <= planned.limit
    assert ledger.total().flops == pytest.approx(planned.total().flops, rel=0.1)


def test_the_plain_penalty_stays_in_its_allowance_where_lengths_differ(texts):
    """Few long texts in a source of their own: of what R is measured on they are more than of the pool."""
    task, ledger = copy.copy(texts(n=1500, batch_size=2)), Ledger()
    pool = task.pool
    task.pool = Pool(pool.ids, pool.examples, (pool.examples.lengths() >= 36).astype(np.int64), ("short", "long"))
    selector, budget = PenalizedSources(alpha=1.0, rounds=20), Budget(0.5, "epochs")
    planned = selector.plan(task, budget)
    selector.select(task, budget, seed=0, ledger=ledger)
    assert 0 < ledger.total().flops <= planned.limit
    assert ledger.total().flops == pytest.approx(planned.total().flops, rel=0.1)
    assert ledger.entries[SELECT, "R"].flops == pytest.approx(planned.entries[SELECT, "R"].flops)


@pytest.mark.parametrize(
    ("count", "alone", "sizes"),
    [
        (3, True, [4, 2, 1]),
        (3, False, [4, 3, 2]),
        (4, True, [4, 3, 2, 1]),
        (4, False, [4, 3, 2, 1]),
        (2, False, [4, 1]),
    ],
)
def test_one_source_alone_is_left_for_last_where_it_is_learned_by_heart(features, count, alone, sizes):
    space, risk = SubsetSpace(features().pool), np.array([0.3, 0.1, 0.4, 0.2])
    draws = initial_design(space, space.full[None], risk, count, single=alone)
    assert draws.sum(axis=1).tolist() == sizes
    assert [set(np.flatnonzero(draw)) for draw in draws] == [set([1, 3, 0, 2][:n]) for n in sizes]


@pytest.mark.parametrize("space", [SubsetSpace, MixtureSpace])
def test_sources_leave_a_draw_one_by_one(features, space):
    there = space(features().pool)
    draws = there.nested(np.array([2, 0, 3, 1]))
    assert (draws[0] == there.full).all()
    assert [set(np.flatnonzero(draw)) for draw in draws] == [{0, 1, 2, 3}, {0, 2, 3}, {0, 2}, {2}]
    weights = there.weights(draws)
    np.testing.assert_allclose(weights, (weights > 0) * weights.max(axis=1, keepdims=True))
    np.testing.assert_allclose(draws.sum(axis=1), there.full.sum() if space is MixtureSpace else [4, 3, 2, 1])


@pytest.mark.parametrize(
    ("policy", "allowance", "few"),
    [("bernoulli", 0.35, True), ("bernoulli", 1.0, False), ("mixture", 0.45, True), ("mixture", 1.0, False)],
)
def test_few_runs_are_spent_in_the_order_of_the_risk(features, monkeypatch, policy, allowance, few):
    """Up to four runs for four sources: on all of them, and without the worst, which theta knows."""
    task, seen = features(batch_size=8, hidden=64, n=1000), []

    def watched(inner, space, draws, *rest):
        seen.append((space, draws))
        return run_rung(inner, space, draws, *rest)

    monkeypatch.setattr("cads.selectors.search.selector.run_rung", watched)
    ledger, budget = Ledger(), Budget(16, "epochs")
    selector = PolicySearch(allowance=allowance, policy=policy)
    selector.select(task, budget, seed=0, ledger=ledger)
    assert ledger.total(SELECT).flops <= allowance * budget.flops(task)
    assert selector.plan(task, budget).total(SELECT).flops == pytest.approx(ledger.total(SELECT).flops)
    assert "theta" in {stage for _, stage in ledger.entries}
    space, draws = seen[0]
    assert (len(draws) <= 4) == few
    # Wrong labels become more from source to source.
    in_order = np.array_equal(draws, spaced(space.nested(np.arange(4)), len(draws)))
    assert in_order == few


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_a_rung_is_in_the_next_and_that_of_the_last_is_chosen(features, monkeypatch, seed):
    task, best, tried = features(batch_size=8, hidden=64, n=1000), [], []

    def watched(inner, space, draws, *rest):
        runs = run_rung(inner, space, draws, *rest)
        best.append(draws[np.argmin(runs.objective)])
        tried.append(draws)
        return runs

    monkeypatch.setattr("cads.selectors.search.selector.run_rung", watched)
    chosen = PolicySearch(allowance=5.0).select(task, Budget(16, "epochs"), seed=seed, ledger=Ledger())
    assert len(tried) > 1
    assert len(tried[-1]) > 2
    assert all((draws == earlier).all(axis=1).any() for earlier, draws in zip(best, tried[1:], strict=False))
    first = np.unique(task.pool.sources, return_index=True)[1]
    np.testing.assert_array_equal(chosen.probability[first], best[-1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("epochs", [1, 4, 16])
def test_what_is_reserved_is_paid_once_however_many_rungs_there_are(features, share, epochs):
    task = features(batch_size=8)
    training = Budget(epochs, "epochs").flops(task)
    space, limit = SubsetSpace(task.pool), 2.75 * training
    rungs = affordable_rungs(PlannedInnerLoop(task, limit), space, training, 10, reserved=share * limit)
    rest = PlannedInnerLoop(task, max(0.0, 1 - share) * limit)
    assert rungs == affordable_rungs(rest, space, training, 10)
    assert sum(r.n_trials * (r.flops + rest.measuring_flops) for r in rungs) <= rest.ledger.left
    if share <= 0.1 and epochs == 16:
        assert len(rungs) > 1


@pytest.mark.parametrize("kind", [SubsetSpace, MixtureSpace])
def test_risk_is_measured_on_all_of_a_sorted_source(features, kind):
    """The examples of a source come in the order of their quality: those measured are from all parts of it."""
    space = kind(features(n=4000).pool)
    for source, positions in enumerate(probe_positions(space, 64)):
        members = np.flatnonzero(space.pool.sources == source)
        assert len(set(positions)) == 64
        place = np.searchsorted(members, positions) / len(members)
        assert abs(place.mean() - 0.5) < 4 / np.sqrt(12 * 64)
    few, many = probe_positions(space, 8), probe_positions(space, 64)
    assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True))
