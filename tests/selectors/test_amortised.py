"""An amortised policy: what it learns, what it costs, and what leaves it as it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import chain, repeat

import numpy as np
import pytest
from scipy.stats import rankdata

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError, NotAffordableError
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.runtime.checkpoint import CheckpointConfig
from cads.scoring.features import ENTROPY, GROUP, LENGTH, LOSS, MARGIN, SOURCE, FreeFeatures
from cads.search.fidelity import Rung
from cads.search.inner_costs import PlannedInnerLoop
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.selection import Selection
from cads.selectors.cads_amortised.allowance import (
    EXPLORING,
    STEPS,
    AmortisedBudget,
    affordable,
    divide_allowance,
    exploring,
)
from cads.selectors.cads_amortised.policy import AmortisedPolicy
from cads.selectors.cads_amortised.sample import Sample, candidates, learn_from, visit_order
from cads.selectors.cads_amortised.selector import (
    CadsAmortised,
    apply_policy,
    compare,
    explore,
    fill_unread,
    probabilities_of,
)
from cads.selectors.cads_e.schedule import FIDELITIES
from cads.task import ObjectiveValue
from cads.training.final import train
from tests.support.killed_runs import resumed
from tests.support.noisy_digits import without_sources

WITHOUT_U = [(kept, weight) for kept, weight in STEPS if not weight]


def choose(task, budget, seed=0, **options):
    ledger = Ledger()
    return build_selector("cads-amortised", options).select(task, budget, seed=seed, ledger=ledger), ledger


def area(score, positive):
    """Probability that a positive one scores above a negative one (Mann-Whitney)."""
    ranks = rankdata(score)
    n = int(positive.sum())
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


BUDGET = Budget(24, "epochs", count_selection=True)
READING = {"allowance": 0.5}
"""Enough for a pass over the pool at `BUDGET`."""


@pytest.fixture(scope="module")
def read_whole(noisy):
    """(selection, ledger) without sources, where the whole pool is read."""
    return choose(without_sources(noisy), BUDGET, **READING)


def measured(objective, stderr=0.0):
    """Trials with these objectives, and these standard errors of their differences."""
    n = len(objective)
    return InnerRuns(np.array(objective), *(np.empty(0) for _ in range(3)), models=[], stderr=np.full(n, stderr))


class TestSearch:
    def test_it_separates_clean_from_noisy_among_unseen_examples(self, noisy, tmp_path):
        """Learned on a sample, applied to the rest: ranks at least 85 % of pairs rightly."""
        task = without_sources(noisy)
        inner = InnerLoop(task, Ledger(limit=0.5 * BUDGET.flops(task)), Monitor(), held_out=True)
        parts = divide_allowance(inner, BUDGET.flops(task), ["loss", "confidence"], None)
        parts = replace(parts, sample=512, read=512)
        sample = learn_from(inner, parts, ["loss", "confidence"], visit_order(task.pool, 0), 0)
        policy = candidates(sample, parts.steps)[0].policy
        # The rest stands for a shard that was not there when the policy was learned; the policy comes from a file.
        unseen = np.sort(sample.order[parts.sample :])
        shard = task.pool.subset(unseen, "shard")
        policy.save(tmp_path / "policy.json")
        loaded, ledger = AmortisedPolicy.load(tmp_path / "policy.json"), Ledger()
        everything = np.arange(len(shard))
        found = probabilities_of(loaded, task, shard, everything, read=sample.read, ledger=ledger)
        assert ledger.entries[SELECT, "pass"].flops == pytest.approx(task.costs.forward_pool(shard))
        assert area(found, ~np.asarray(noisy.truth.corrupted)[unseen]) > 0.85
        probability, read = apply_policy(inner, replace(parts, read=len(task.pool)), policy, sample)
        assert read == len(task.pool)
        np.testing.assert_allclose(probability[unseen], found, rtol=1e-6)

    def test_every_class_keeps_its_share(self, noisy):
        rng, n = np.random.default_rng(0), 3000
        groups = rng.integers(0, 3, n)
        features = np.column_stack([rng.exponential(size=n) + groups, *(groups == g for g in range(3))]).astype(float)
        names = (LOSS, *(f"{GROUP}{g}" for g in range(3)))
        for proposal in candidates(Sample(np.arange(n), features, names, features[:, 0], None), WITHOUT_U):
            kept = proposal.policy.probabilities(features) > 0.5
            shares = np.bincount(groups, weights=kept) / np.bincount(groups)
            np.testing.assert_allclose(shares, proposal.kept, atol=0.01)
            assert features[kept, 0].mean() < features[~kept, 0].mean()

    def test_features_that_do_not_vary_give_no_candidate(self):
        groups = np.eye(2)[np.arange(100) % 2]
        losses = np.random.default_rng(0).exponential(size=100)
        assert not candidates(Sample(np.arange(100), groups, (f"{GROUP}0", f"{GROUP}1"), losses, None), WITHOUT_U)
        same = np.column_stack([np.ones(100), groups])
        assert not candidates(Sample(np.arange(100), same, (LOSS, f"{GROUP}0", f"{GROUP}1"), losses, None), WITHOUT_U)

    def test_what_is_read_is_in_the_ledger(self, noisy, read_whole):
        selection, ledger = read_whole
        assert selection.notes["way"] == "the whole pool was read"
        n, forward = len(noisy.pool), noisy.costs.forward_pool(noisy.pool)
        sample = selection.notes["sample"]
        assert 512 <= sample < n == selection.notes["read"]
        assert ledger.entries[SELECT, "R"].flops == pytest.approx(forward * sample / n)
        assert ledger.entries[SELECT, "pass"].flops == pytest.approx(forward * (n - sample) / n)
        assert ledger.entries[SELECT, "pass"].tokens == n - sample
        assert {"theta", "policy"} <= {stage for _, stage in ledger.entries}
        planned = build_selector("cads-amortised", READING).plan(without_sources(noisy), BUDGET)
        assert planned.total().flops == pytest.approx(ledger.total().flops, rel=0.01)
        clean = ~np.asarray(noisy.truth.corrupted)
        assert clean[selection.selected].mean() > clean.mean() + 0.15

    def test_the_policy_travels_with_the_selection(self, read_whole, tmp_path):
        selection, _ = read_whole
        loaded = Selection.load(selection.save(tmp_path / "s"))
        policy = AmortisedPolicy.from_json(loaded.notes["policy"])
        assert policy.to_json() == selection.notes["policy"]
        assert policy.names[:3] == (LOSS, ENTROPY, MARGIN)

    @pytest.mark.parametrize("sources", [True, False])
    def test_a_permutation_of_the_pool_changes_nothing(self, noisy, sources):
        task = noisy if sources else without_sources(noisy)
        shuffle = np.random.default_rng(1).permutation(len(task.pool))
        codes = None if task.pool.sources is None else task.pool.sources[shuffle]
        other = copy.copy(task)
        other.pool = Pool(task.pool.ids.take(shuffle), task.pool.examples.take(shuffle), codes, task.pool.source_names)
        budget = Budget(8, "epochs", count_selection=True)
        before, after = (choose(t, budget, allowance=0.5, guard=False)[0].table().sort_by("id") for t in (task, other))
        assert not all(before["selected"].to_pylist())
        assert before.equals(after)

    @pytest.mark.parametrize("kinds", [["source"], ["length"], ["source", "length"]])
    def test_features_that_do_not_apply_are_refused_before_compute(self, noisy, kinds):
        ledger, selector = Ledger(), build_selector("cads-amortised", {"features": kinds})
        with pytest.raises(ConfigError, match=r"features = \["):
            selector.plan(without_sources(noisy), BUDGET)
        with pytest.raises(ConfigError, match=r"features = \[.*add 'loss'"):
            selector.select(without_sources(noisy), BUDGET, seed=0, ledger=ledger)
        assert not ledger.entries

    def test_free_features_select_from_all_where_a_pass_is_too_dear(self, noisy):
        budget = Budget(7, "epochs", count_selection=True)
        selection, ledger = choose(noisy, budget, allowance=0.25, guard=False)
        assert "free" in selection.notes["way"]
        assert all(n.startswith((SOURCE, GROUP)) for n in selection.notes["policy"]["names"])
        assert (SELECT, "pass") not in ledger.entries
        # A function of source and label: those of one source and one label have one probability.
        groups = noisy.groups(noisy.pool) * 3 + noisy.pool.sources
        for group in np.unique(groups):
            assert len(np.unique(selection.probability[groups == group])) == 1
        means = [selection.probability[noisy.pool.sources == s].mean() for s in range(3)]
        assert means[0] > means[2]

    def test_without_any_a_share_is_read_and_filled_up(self, noisy):
        task, budget = without_sources(noisy), Budget(7, "epochs", count_selection=True)
        selection, ledger = choose(task, budget, allowance=0.25, guard=False)
        notes = selection.notes
        assert "random share" in notes["way"]
        assert notes["sample"] <= notes["read"] < len(task.pool)
        forward = task.costs.forward_pool(task.pool) / len(task.pool)
        charged = sum(
            ledger.entries[SELECT, stage].flops for stage in ("R", "pass") if (SELECT, stage) in ledger.entries
        )
        assert charged == pytest.approx(forward * notes["read"])
        # The training sees 2,025 examples four times: more than there are, so that all that were not read are taken.
        assert selection.selected.sum() > len(task.pool) - notes["read"]
        assert (selection.probability == 1).sum() == len(task.pool) - notes["read"]
        outcome = train(task, selection, budget, seed=0)
        assert outcome.ledger.total(SELECT).flops <= 0.2 * budget.flops(task) * (1 + 1e-9)

    def test_a_share_that_is_asked_for_is_read(self, noisy):
        selection, _ = choose(noisy, BUDGET, share=0.5, guard=False, **READING)
        assert selection.notes["read"] == round(0.5 * len(noisy.pool))
        assert LOSS in selection.notes["policy"]["names"]

    @pytest.mark.parametrize("kinds", [["source"], ["loss"], ["loss", "source"]])
    def test_only_what_is_asked_for_is_looked_at(self, noisy, kinds):
        selection, _ = choose(noisy, BUDGET, features=kinds, guard=False, **READING)
        names = [n for n in selection.notes["policy"]["names"] if not n.startswith(GROUP)]
        assert {n.split(":")[0] for n in names} == set(kinds)

    @pytest.mark.parametrize(
        "options", [{"share": 0}, {"share": 1.5}, {"features": []}, {"features": ["colour"]}], ids=str
    )
    def test_bad_options_are_refused(self, options):
        with pytest.raises(ConfigError, match=r"share|features"):
            build_selector("cads-amortised", options)

    def test_exploring_is_planned_and_charged(self, noisy):
        """Where there is room for many runs, about half of the first rung explores, and all of it is planned."""
        task, budget = noisy, Budget(8, "epochs")
        selector = CadsAmortised(allowance=4, guard=False)
        planned = selector.plan(task, budget)
        inner = InnerLoop(task, Ledger(limit=planned.limit), Monitor(), held_out=True)
        parts = divide_allowance(inner, budget.flops(task), selector.kinds, None)
        rungs = affordable(inner, parts, budget.flops(task))
        assert not exploring(rungs, len(rungs) - 1)
        assert rungs[0].n_trials >= EXPLORING
        selection, ledger = choose(task, budget, allowance=4, guard=False)
        assert planned.total().flops == pytest.approx(ledger.total().flops, rel=0.01)
        assert planned.total().usages == pytest.approx(ledger.total().usages, rel=0.01)
        assert planned.entries[SELECT, "policy"].flops == pytest.approx(ledger.entries[SELECT, "policy"].flops)
        assert selection.notes["origin"] in ("candidate", "draw", "corrected gradient")

    @pytest.mark.parametrize(("stderr", "kept"), [(0.0, False), (0.3, False), (0.6, True)])
    def test_the_guard_asks_for_more_than_the_target_can_tell_by_chance(self, noisy, monkeypatch, stderr, kept):
        def compare(inner, parts, sample, policies, *_):
            return measured([5.0 if policy is None else 4.0 for policy in policies], stderr)

        monkeypatch.setattr("cads.selectors.cads_amortised.selector.compare", compare)
        chosen, _ = choose(noisy, Budget(16, "epochs"))
        assert chosen.selected.all() == kept

    def test_what_wins_short_runs_and_loses_longer_ones_is_not_returned(self, noisy, monkeypatch):
        seen = []

        def compare(inner, parts, sample, policies, rung, *_):
            seen.append((rung.fidelity, len(policies)))
            # Against the full pool, 5.0: each policy is better in the short runs, and worse in the long one.
            others = 4.0 if rung.fidelity < FIDELITIES[2] else 5.1
            return measured([5.0 if policy is None else others for policy in policies])

        monkeypatch.setattr("cads.selectors.cads_amortised.selector.compare", compare)
        budget = Budget(16, "epochs")
        chosen, _ = choose(noisy, budget)
        assert [fidelity for fidelity, _ in seen] == [FIDELITIES[1], FIDELITIES[2]]
        assert seen[-1][1] == 2
        assert chosen.selected.all()
        assert chosen.notes["guard"] == "the full pool was not beaten"
        forced, _ = choose(noisy, budget, guard=False)
        assert not forced.selected.all()
        assert forced.notes["gain"] == pytest.approx(-0.1)

    @pytest.mark.parametrize(("finite", "named"), [(0, "reference model"), (1, "full pool")])
    def test_a_run_that_nothing_can_do_without_is_named_if_it_diverges(self, noisy, monkeypatch, finite, named):
        """u is measured first."""
        objectives = chain(repeat(1.0, finite), repeat(float("nan")))
        monkeypatch.setattr(type(noisy), "objective", lambda *_: ObjectiveValue(next(objectives)))
        with pytest.raises(DataError, match=f"{named}.* met a loss that is not finite"):
            choose(noisy, Budget(16, "epochs"))

    @pytest.mark.parametrize("passes", [1.5, 3.0, 8.0])
    @pytest.mark.parametrize("allowance", [0.3, 0.6, 1.0, 2.0])
    def test_what_is_learned_can_be_compared(self, noisy, passes, allowance):
        """Nothing is spent on a policy unless two runs at least can follow, and all that is planned can be paid for."""
        for task in (noisy, without_sources(noisy)):
            selector, budget = CadsAmortised(allowance=allowance), Budget(passes, "epochs")
            planned = selector.plan(task, budget)
            assert planned.total().flops <= planned.limit
            costs = PlannedInnerLoop(task, planned.limit, held_out=True)
            runs = [e for (_, stage), e in planned.entries.items() if stage.startswith("short runs")]
            try:
                divide_allowance(costs, budget.flops(task), selector.kinds, None)
            except NotAffordableError:
                assert not runs
            else:
                assert runs

    def test_policies_are_compared_block_by_block(self, noisy, monkeypatch):
        """Of features that are free, those of all that a run sees are never there at once."""
        task, n = noisy, len(noisy.pool)
        inner = InnerLoop(task, Ledger(), Monitor(), held_out=True)
        free = FreeFeatures(task, task.pool)
        sample = Sample(visit_order(task.pool, 0), np.empty((0, 13)), tuple(free.names), np.empty(0), None, free)
        shape = (len(free.names),)
        policies = [
            AmortisedPolicy(
                sample.names, np.zeros(shape), np.ones(shape), np.random.default_rng(i).normal(size=shape), 0.1
            )
            for i in range(3)
        ]
        rung, parts = Rung(0.25, 1e6, 0.6, 4), AmortisedBudget(1.0, 0.0, 10, n, False, 0.0, 3)
        seen = []

        def run(streams, flops, *, seed, stage, reference, keep):
            seen.append([np.sort(s.take(0, s.period)).tolist() for s in streams])
            return InnerRuns(
                np.zeros(len(streams)), *(np.empty(0) for _ in range(3)), models=[], stderr=np.zeros(len(streams))
            )

        monkeypatch.setattr(inner, "run", run)
        for block in (17, n):
            monkeypatch.setattr("cads.selectors.cads_amortised.selector.SHARD", block)
            compare(inner, parts, sample, [None, *policies], rung, 0, 0)
        visited = sample.order[: round(0.6 * n)]
        chosen = [visited[p.probabilities(free.values(free.names, visited)) > 0.5] for p in policies]
        assert seen[0] == seen[1] == [np.sort(x).tolist() for x in (visited, *chosen)]
        assert inner.ledger.entries[SELECT, "policy"].flops == 2 * parts.comparing_flops(3, len(visited))

    def test_a_run_that_was_killed_goes_on(self, noisy, tmp_path):
        task, budget = without_sources(noisy), Budget(8, "epochs", count_selection=True)

        def work():
            return choose(task, budget, allowance=0.5, guard=False)[0]

        work().save(tmp_path / "one")
        every = CheckpointConfig(every_seconds=None, every_steps=20)
        resumed(tmp_path, work, every, kills=(10, 60, 100)).save(tmp_path / "two")
        for file in ("selection.json", "scores.parquet"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    def test_texts_of_many_lengths(self, texts):
        task, budget = texts(n=1500, batch_size=8), Budget(10, "epochs", count_selection=True)
        selection, ledger = choose(task, budget, allowance=0.5, guard=False)
        assert {LOSS, LENGTH} <= set(selection.notes["policy"]["names"])
        planned = build_selector("cads-amortised", {"allowance": 0.5, "guard": False}).plan(task, budget)
        assert ledger.total().flops <= planned.limit
        assert planned.total().flops == pytest.approx(ledger.total().flops, rel=0.1)


def test_the_step_leads_downhill(noisy, monkeypatch):
    """Where the objective falls with the weight of one feature, the corrected gradient raises that weight."""
    rng, n = np.random.default_rng(0), 400
    sample = Sample(np.arange(n), rng.normal(size=(n, 2)), ("a", "b"), rng.exponential(size=n), None)
    proposals = candidates(sample, WITHOUT_U)
    parts = AmortisedBudget(1.0, 0.0, n, n, True, 0.0, 2)

    def compare(inner, parts, sample, policies, *_):
        return measured([5.0 - p.weights[1] for p in policies], 0.1)

    monkeypatch.setattr("cads.selectors.cads_amortised.selector.compare", compare)
    inner = InnerLoop(noisy, Ledger(), Monitor())
    gains = np.full(len(proposals), -0.1)
    made, values, errors = explore(inner, parts, sample, proposals, gains, measured([5.0]), 8, None, 0)
    np.testing.assert_array_equal(errors, np.full(len(made), 0.1))
    assert [p.origin for p in made] == ["draw"] * 8 + ["corrected gradient"]
    assert len(values) == len(made)
    assert made[-1].policy.weights[1] > proposals[0].policy.weights[1]
    # What it gains is measured, as that of the others.
    np.testing.assert_allclose(values, [-p.policy.weights[1] for p in made], atol=1e-12)


def test_filling_up_takes_the_next_in_the_order_of_the_visit():
    order = np.array([4, 2, 0, 5, 1, 3])
    parts = partial(AmortisedBudget, 1.0, 0.0, 2, 3, True, columns=1)
    probability = np.array([0.9, 0, 0.2, 0, 0.8, 0])
    selected, found = fill_unread(parts(least=3), probability, order, 3)
    np.testing.assert_array_equal(np.flatnonzero(selected), [0, 4, 5])
    np.testing.assert_allclose(found, [0.9, 1 / 3, 0.2, 1 / 3, 0.8, 1 / 3])
    assert fill_unread(parts(least=2), probability, order, 3)[0].sum() == 2
    assert fill_unread(parts(least=0), np.zeros(6), order, 6)[0].all()
