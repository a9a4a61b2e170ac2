"""CADS-E: what its allowance buys, and that the best candidate has to beat the full pool in longer runs too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cads.examples
from cads.budget import Budget, Ledger
from cads.examples import FIDELITIES, LEAST_RUNS, LEAST_STEPS, CadsExamples, comparisons, score_flops
from cads.inner import Planned


@pytest.fixture(scope="session")
def purse(features):
    """A purse with an allowance for a training of so many passes."""
    task = features(batch_size=8)

    def build(passes: float, allowance: float) -> tuple[Planned, float]:
        training = Budget(passes, "epochs").flops(task)
        return Planned(task, allowance * training, held_out=True), training

    return build


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_comparisons_fit_into_what_is_left_and_are_worth_making(purse, passes, allowance):
    purse, training = purse(passes, allowance)
    rungs = comparisons(purse, training)
    cost = sum(r.runs * (r.flops + purse.measuring_flops) for r in rungs)
    assert cost <= purse.ledger.left * (1 + 1e-9)
    assert len(rungs) <= 2
    for rung in rungs:
        assert LEAST_STEPS * purse.step_flops * (1 - 1e-9) <= rung.flops <= training * (1 + 1e-9)
        assert rung.data >= min(1.0, rung.fidelity)
    if rungs:
        assert rungs[0].runs >= LEAST_RUNS
    if len(rungs) == 2:
        assert rungs[0].fidelity < rungs[1].fidelity == FIDELITIES[2]
        assert rungs[1].runs == 2


@settings(deadline=None, max_examples=60)
@given(passes=st.floats(0.5, 100), allowance=st.floats(0, 4))
def test_scores_are_bought_only_where_something_can_be_compared_afterwards(purse, passes, allowance):
    purse, training = purse(passes, allowance)
    theta, u = score_flops(purse, training)
    assert theta >= 0
    assert u == 0 or theta > 0
    planned = CadsExamples(allowance=allowance).spend(purse, training)
    assert planned == (theta > 0)


def test_what_wins_short_runs_and_loses_longer_ones_is_not_returned(features, monkeypatch):
    seen = []

    def compare(inner, field, rung, seed, height):
        seen.append((rung.fidelity, len(field)))
        gains = np.linspace(-1.0, -0.5, len(field))
        gains[0] = 0.0
        # The winner of the short runs is worse than the full pool in the long one.
        return gains if rung.fidelity < FIDELITIES[2] else np.array([0.0, 0.1])

    monkeypatch.setattr(cads.examples, "compare", compare)
    task = features(batch_size=8)
    chosen = CadsExamples().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert [count for _, count in seen][-1] == 2
    assert len(seen) == 2
    assert chosen.selected.all()
    assert chosen.notes["guard"] == "the full pool was not beaten"
    forced = CadsExamples(guard=False).select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    assert not forced.selected.all()
