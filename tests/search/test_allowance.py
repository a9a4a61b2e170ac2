"""Dividing the compute: nothing is spent twice, and short runs fit into their allowance."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.budget import Budget, check_step
from cads.errors import BudgetError, ConfigError
from cads.search.allowance import selection_share, split_budget


@settings(deadline=None, max_examples=40)
@given(
    epochs=st.floats(2, 50),
    allowance=st.one_of(st.none(), st.floats(0, 10)),
    default=st.floats(0, 10),
    counted=st.booleans(),
)
def test_a_counted_selection_and_training_share_the_budget(features, epochs, allowance, default, counted):
    task = features()
    budget = Budget(epochs, "epochs", count_selection=counted)
    total = budget.flops(task)
    division = split_budget(task, budget, allowance, default)
    assert division.selection_flops >= 0
    assert 0 < division.train_flops <= total
    if counted:
        assert division.train_flops + division.selection_flops == pytest.approx(total)
    else:
        assert division.train_flops == total
    if allowance is not None:
        assert division.selection_flops == pytest.approx(allowance * division.train_flops)
    elif not counted:
        assert division.selection_flops == pytest.approx(default * total)
    else:
        assert division.selection_flops == pytest.approx(
            min(default, selection_share(task, total)) * division.train_flops
        )


@pytest.mark.parametrize(
    ("passes", "allowance", "of_pretrained"),
    [(0.5, 1 / 3, 1 / 3), (2, 1 / 3, 1 / 3), (4, 1 / 3, 2 / 3), (6, 0.5, 1.0), (12, 1.0, 1.0), (100, 1.0, 1.0)],
)
def test_selection_may_spend_more_of_a_budget_whose_passes_repeat_the_pool(features, passes, allowance, of_pretrained):
    task = copy.copy(features(batch_size=16))
    assert selection_share(task, Budget(passes, "epochs").flops(task)) == pytest.approx(allowance, rel=1e-6)
    task.pretrained = True
    assert selection_share(task, Budget(passes, "epochs").flops(task)) == pytest.approx(of_pretrained, rel=1e-6)


@pytest.mark.parametrize("times", [1.2, 1.32, 1.35, 2.0, 5.0])
def test_selection_for_a_pretrained_model_gets_the_least_it_needs_or_its_share(features, times):
    task = copy.copy(features(batch_size=16))
    total = Budget(3, "epochs").flops(task)
    min_flops = total / times
    assert selection_share(task, total, min_flops) == selection_share(task, total)
    task.pretrained = True
    share, result = selection_share(task, total), selection_share(task, total, min_flops)
    if 4 / 3 < times < 3:
        assert result > share
        assert min_flops <= result * total / (1 + result) <= min_flops * (1 + 1e-6)
    else:
        assert result == share


def test_budgets_that_cannot_be_divided_are_refused(features):
    task = features(batch_size=16)
    with pytest.raises(ConfigError, match=r"allowance = -0\.5"):
        split_budget(task, Budget(5, "epochs"), -0.5, 1.0)
    with pytest.raises(BudgetError) as caught:
        split_budget(task, Budget(15, "usages"), None, 1.0)
    step = task.costs.usage(task.pool.batch(np.arange(16))) + task.costs.optimizer_step
    assert f"{Budget(15, 'usages').flops(task):.4g}" in str(caught.value)
    assert f"{step:.4g}" in str(caught.value)
    split_budget(task, Budget(16, "usages"), None, 1.0)


def test_a_step_is_affordable_or_refused(features):
    task = features(batch_size=16)
    step = task.costs.usage(task.pool.batch(np.arange(16))) + task.costs.optimizer_step
    check_step(task, step)
    with pytest.raises(BudgetError):
        check_step(task, 0.999 * step)
