"""The guard of a search: when it cannot tell, and what it says."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from baselines.best_of import BestOf
from baselines.live_penalty import LivePenalty
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.search.base import guard_message
from cads.selectors.search.selector import PolicySearch


def with_target(task, n):
    """The task with only the first n examples of its target."""
    other = copy.copy(task)
    other.target = task.target.subset(np.arange(n), task.target.name)
    return other


GUARDED = [PolicySearch, BestOf, LivePenalty]


@pytest.mark.parametrize("kind", GUARDED)
@pytest.mark.parametrize("n", [1, 2, 19])
def test_too_small_a_target_cannot_tell_and_nothing_is_spent_on_it(features, caplog, kind, n):
    task, selector, ledger = with_target(features(batch_size=8), n), kind(guard=True), Ledger()
    said = f"the target has {n} example{'s' * (n > 1)}, and with fewer than 20 the guard cannot tell"
    assert said in selector.plan(task, Budget(16, "epochs")).note
    chosen = selector.select(task, Budget(16, "epochs"), seed=0, ledger=ledger)
    assert chosen.selected.all()
    assert not ledger.entries
    assert said in chosen.notes["guard"]
    assert said in caplog.text
    assert "or set guard = false" in chosen.notes["guard"]


@pytest.mark.parametrize("kind", GUARDED)
@pytest.mark.parametrize(("n", "guard"), [(20, True), (19, False), (1, False)])
def test_a_large_target_or_no_guard_is_searched(features, kind, n, guard):
    task, ledger = with_target(features(batch_size=8), n), Ledger()
    chosen = kind(guard=guard).select(task, Budget(16, "epochs"), seed=0, ledger=ledger)
    assert ledger.total(SELECT).flops > 0
    assert "cannot tell" not in chosen.notes.get("guard", "")
    if not guard:
        assert "better" not in chosen.notes.get("guard", "")


@pytest.mark.parametrize(("guard", "chosen"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_guard_says_what_it_did_and_that_it_is_off(guard, chosen):
    message = guard_message(guard=guard, chosen=chosen)
    assert ("better than the full pool" in message) == (guard and chosen)
    assert ("the guard is off" in message) == (not guard)
    assert ("the full pool is returned" in message or "not beaten" in message) == (not chosen)
