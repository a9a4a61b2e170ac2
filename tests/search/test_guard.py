"""The guard: the full pool stays unless the best of several candidates is better by more than chance."""

import numpy as np
import pytest
from scipy.stats import norm

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.search.guard import SIGNIFICANCE_Z, beats_full_pool, critical_z
from cads.search.inner_runs import InnerRuns, paired_error
from cads.selectors.cads_e import selector as cads_e
from cads.selectors.cads_e.candidates import Signals
from cads.selectors.cads_e.selector import CadsExamples
from cads.task import ObjectiveValue

RUNS = 1500


def trials(rng, n_target, n_candidates, gains):
    """Losses of a full pool and of candidates on the same target, as if trained on samples of one clean source.

    Losses are skewed, candidates resemble each other, and `gains` (nats, shape (n_candidates,)) are what they are
    better by on average.
    """
    full_pool = rng.lognormal(0.0, 1.0, n_target)
    shared, own = rng.normal(size=n_target), rng.normal(size=(n_candidates, n_target))
    differences = 0.3 * full_pool * (shared + own) - np.asarray(gains)[:, None]
    return [ObjectiveValue(float(x.mean()), x) for x in (full_pool, *(full_pool + differences))]


def best_of(values):
    """The difference of the best candidate to the full pool, and its standard error."""
    full_pool, *others = values
    best = min(others, key=lambda value: value.value)
    return best.value - full_pool.value, paired_error(best, full_pool)


def test_one_candidate_needs_two_standard_errors_and_more_need_more():
    assert critical_z(1) == pytest.approx(SIGNIFICANCE_Z)
    needed = [critical_z(k) for k in range(1, 20)]
    assert needed == sorted(needed)
    assert 2.6 < critical_z(5) < 2.7


@pytest.mark.parametrize("n_target", [20, 250])
@pytest.mark.parametrize("n_candidates", [1, 2, 5, 8])
def test_a_clean_pool_is_kept_in_nearly_all_runs(n_target, n_candidates):
    rng = np.random.default_rng(n_candidates)
    found = [best_of(trials(rng, n_target, n_candidates, np.zeros(n_candidates))) for _ in range(RUNS)]
    chosen = np.mean([beats_full_pool(*one, n_candidates) for one in found])
    # At the level of two standard errors, and three errors of the simulation above it.
    level = norm.sf(SIGNIFICANCE_Z)
    assert chosen <= level + 3 * np.sqrt(level / RUNS)
    without_error_bar = np.mean([delta < 0 for delta, _ in found])
    assert without_error_bar > 0.45


def test_two_standard_errors_alone_are_too_few_for_the_best_of_eight():
    rng = np.random.default_rng(0)
    found = [best_of(trials(rng, 250, 8, np.zeros(8))) for _ in range(RUNS)]
    assert np.mean([beats_full_pool(*one, 1) for one in found]) > 2 * norm.sf(SIGNIFICANCE_Z)


@pytest.mark.parametrize("n_candidates", [1, 2, 5, 8])
def test_real_gains_pass(n_candidates):
    """One candidate is better by about five standard errors."""
    rng, gains = np.random.default_rng(1), np.zeros(n_candidates)
    gains[-1] = 5 * 0.3 * np.sqrt(2 * np.exp(2) / 250)
    found = [best_of(trials(rng, 250, n_candidates, gains)) for _ in range(RUNS)]
    assert np.mean([beats_full_pool(*one, n_candidates) for one in found]) > 0.95


def test_without_an_error_bar_any_gain_counts_and_a_diverged_trial_never():
    assert beats_full_pool(-1e-9, 0.0, 5)
    assert not beats_full_pool(0.0, 0.0, 5)
    assert not beats_full_pool(np.nan, 0.1, 5)


@pytest.mark.parametrize(("allowance", "gain", "chosen"), [(3.0, 0.0, 0), (8.0, 0.0, 0), (1.0, 0.0, 0), (3.0, 0.6, 40)])
def test_a_search_keeps_a_clean_pool(features, monkeypatch, allowance, gain, chosen):
    """CADS-E with simulated trials: few, many, or in two rungs. At most one of 40 runs errs."""
    task, rng = features(batch_size=8), np.random.default_rng(0)

    def learn_from(inner, models, seed):
        return Signals.of(rng.exponential(size=len(task.pool)), None, models.steps)

    def run_candidates(inner, candidates, *_):
        values = trials(rng, 250, len(candidates) - 1, np.full(len(candidates) - 1, gain))
        errors = np.array([paired_error(value, values[0]) for value in values])
        empty = [np.empty(0) for _ in range(3)]
        return InnerRuns(np.array([v.value for v in values]), *empty, models=[], stderr=errors)

    monkeypatch.setattr(cads_e, "learn_from", learn_from)
    monkeypatch.setattr(cads_e, "run_candidates", run_candidates)
    selector = CadsExamples(allowance=allowance)
    found = [selector.select(task, Budget(16, "epochs"), seed=seed, ledger=Ledger()) for seed in range(40)]
    assert all(selection.notes["guard"] for selection in found)
    assert abs(sum(not selection.selected.all() for selection in found) - chosen) <= 1
