"""CADS-E: candidates, how they are told apart, and that the best one has to beat the full pool."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.operations import candidates_flops
from cads.monitor import Monitor
from cads.search.inner_costs import PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.selectors.cads_e import selector as cads_e
from cads.selectors.cads_e.candidates import SHARPNESS, Candidate, Signals
from cads.selectors.cads_e.schedule import CANDIDATE_STEPS, FromScratch, affordable_steps
from cads.selectors.cads_e.selector import CadsExamples, learn_from
from tests.support.killed_runs import resumed


@pytest.mark.parametrize("grouped", [True, False])
def test_policies_are_steps_of_their_length_in_each_group(grouped):
    rng, n = np.random.default_rng(0), 4000
    theta, u, groups = rng.exponential(size=n), rng.exponential(size=n), rng.integers(0, 3, n) * 5
    signals = Signals.of(theta, u, CANDIDATE_STEPS, groups if grouped else None)
    for candidate, (kept, weight) in zip(signals.candidates, CANDIDATE_STEPS, strict=True):
        z = (theta - weight * u - (theta - weight * u).mean()) / (theta - weight * u).std()
        expected = np.empty(n)
        for members in [groups == g for g in (0, 5, 10)] if grouped else [np.ones(n, dtype=bool)]:
            expected[members] = 1 / (1 + np.exp(SHARPNESS * (z[members] - np.quantile(z[members], kept))))
        np.testing.assert_allclose(candidate.probability(), expected, rtol=1e-9)
    assert (signals.everything.probability() == 1).all()
    assert signals.everything.flops == 0
    assert [(c.kept, c.reach_weight) for c in signals.candidates] == list(CANDIDATE_STEPS)
    assert {weight for _, weight in affordable_steps(with_reach=False)} == {0.0}


def test_candidates_take_no_memory_until_they_are_asked_for():
    n = 200_000
    losses = np.random.default_rng(0).exponential(size=n)
    tracemalloc.start()
    candidates = Signals.of(losses, losses[::-1].copy(), CANDIDATE_STEPS).candidates
    kept = tracemalloc.get_traced_memory()[0] / n
    for candidate in candidates:
        candidate.probability()
    peak = tracemalloc.get_traced_memory()[1] / n
    tracemalloc.stop()
    assert len(candidates) == len(CANDIDATE_STEPS)
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
    each = PlannedInnerLoop(task, planned.limit, held_out=True).measuring_flops
    stages = [s for _, s in planned.entries if s.startswith("short runs") and s.endswith("measuring")]
    runs = [round(planned.entries[SELECT, s].flops / each) for s in stages]
    assert made == candidates_flops(len(task.pool), sum(runs) + 1)


def test_theta_goes_on_with_what_it_keeps_of_each_class(features, monkeypatch):
    task = features(batch_size=8)
    fitted, losses = [], []
    inner = InnerLoop(task, Ledger(), Monitor(), held_out=True)
    monkeypatch.setattr(inner, "fit_target", lambda flops, **about: fitted.append((flops, about)))
    monkeypatch.setattr(
        inner, "losses", lambda *_, **__: losses.append(np.random.default_rng(len(losses)).random(200)) or losses[-1]
    )
    signals = learn_from(inner, FromScratch(2.0, 3.0), seed=0)
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
    monkeypatch.setattr(
        cads_e, "compare", lambda inner, field, *_: (np.arange(len(field), dtype=float), np.zeros(len(field)))
    )
    task = features(batch_size=8)
    chosen = CadsExamples(guard=guard).select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert chosen.selected.all() == guard
    assert chosen.notes["guard"] == (
        "the full pool was not beaten" if guard else "the guard is off: the choice need not beat the full pool"
    )


def test_a_policy_that_selects_nothing_is_the_full_pool(features, monkeypatch):
    """Every group has one example, so that none is better than the others of its own."""
    monkeypatch.setattr(
        cads_e, "compare", lambda inner, field, *_: (-np.arange(len(field), dtype=float), np.zeros(len(field)))
    )
    task = features(batch_size=8)
    monkeypatch.setattr(type(task), "groups", lambda self, pool: np.arange(len(pool)))
    chosen = CadsExamples().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert (chosen.probability == 0.5).all()
    assert chosen.selected.all()


class TestPretrained:
    """Models whose losses tell as much about an example as about what it is good for."""

    @pytest.fixture
    def task(self, features):
        task = copy.copy(features(batch_size=8, hidden=1024, learning_rate=0.003))
        task.pretrained = True
        return task

    @pytest.mark.parametrize(("passes", "beside"), [(3, True), (24, False)])
    def test_u_is_the_first_short_run_where_that_sees_the_whole_pool(self, task, monkeypatch, passes, beside):
        """Few passes: then it does, and models are scored after it. The plan is what is charged."""
        made, budget = [], Budget(passes, "epochs", count_selection=True)
        of = Candidate.probability
        monkeypatch.setattr(Candidate, "probability", lambda self: made.append(self) or of(self))
        ledger = Ledger()
        chosen = CadsExamples().select(task, budget, seed=0, ledger=ledger)
        planned = CadsExamples().plan(task, budget)
        assert {stage: entry.flops for stage, entry in ledger.entries.items()} == pytest.approx(
            {stage: entry.flops for stage, entry in planned.entries.items()}
        )
        stages = [stage for _, stage in ledger.entries]
        (runs,) = [stage for stage in stages if stage.startswith("short runs") and "measuring" not in stage]
        assert ("u" not in stages) == beside
        assert (stages.index(runs) < stages.index("l*")) == beside
        assert ledger.entries[SELECT, "R"].flops == ledger.entries[SELECT, "l*"].flops > 0
        assert "better than the full pool" in chosen.notes["guard"]
        assert chosen.notes["c2/c1"] == 1.0
        # Each candidate's signal is the difference, and the best one is what is returned.
        signals = made[-1].signals
        z = signals.from_theta - signals.from_u
        assert z[chosen.selected].max() < z[~chosen.selected].min()
        assert chosen.selected.mean() == pytest.approx(chosen.notes["kept"], abs=0.01)

    def test_what_u_finds_hard_as_well_is_no_reason_to_leave_it_out(self, task, monkeypatch):
        """Losses of both rise from example to example, and those of theta are larger for every other one."""
        hard, odd = np.linspace(0, 5, len(task.pool)), np.arange(len(task.pool)) % 2
        losses = {"R": hard + odd + hard[::-1] / 100, "l*": hard}
        monkeypatch.setattr(InnerLoop, "losses", lambda self, model, positions, *, stage: losses[stage])
        monkeypatch.setattr(
            cads_e,
            "compare",
            lambda _, field, *__: (np.array([c.kept != 0.33 for c in field]) - 1.0, np.zeros(len(field))),
        )
        chosen = CadsExamples().select(task, Budget(3, "epochs", count_selection=True), seed=0, ledger=Ledger())
        assert chosen.notes["kept"] == 0.33
        assert not chosen.selected[odd == 1].any()

    @pytest.mark.parametrize("passes", [3, 24])
    def test_a_search_that_was_killed_goes_on(self, task, tmp_path, passes):
        def work():
            ledger = Ledger()
            budget = Budget(passes, "epochs", count_selection=True)
            return CadsExamples().select(task, budget, seed=0, ledger=ledger), ledger

        chosen, ledger = work()
        again, other = resumed(tmp_path, work, kills=(3, 20, 30))
        assert chosen.notes["guard"] == "better than the full pool on the target"
        assert again.content_hash == chosen.content_hash
        assert other.to_json(seconds=False) == ledger.to_json(seconds=False)
