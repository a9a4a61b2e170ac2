"""Losses and gradients that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from cads.accounting.ledger import Ledger
from cads.data.streams import ShuffledStream
from cads.errors import NonFiniteError
from cads.monitor import Monitor
from cads.search.inner_runs import InnerLoop
from tests.support.fitted import (
    Course,
    assert_close,
    fit,
    fit_replicas,
    identical,
    poisoned,
    sloped,
    step_cost,
    whole_pool,
)


@pytest.mark.parametrize("mode", ["batched", "loop"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_replica_that_diverges_is_marked_and_disturbs_nobody(features, mode, value):
    task = poisoned(features(batch_size=8, replicas=mode), value)
    bad = ShuffledStream(np.arange(40), 0)
    good = [ShuffledStream(np.arange(20 + k, 200), k) for k in range(3)]
    ledger = Ledger()
    with_bad = fit_replicas(task, 20, [good[0], bad, *good[1:]], ledger=ledger)
    without = fit_replicas(task, 20, good)
    assert with_bad.diverged.tolist() == [False, True, False, False]
    assert not without.diverged.any()
    np.testing.assert_allclose(with_bad.losses[:, [0, 2, 3]], without.losses, rtol=0, atol=1e-6)
    for k, pair in zip((0, 2, 3), without.models, strict=True):
        assert_close(with_bad.models[k], pair, 1e-6)
    assert np.isfinite(with_bad.training_loss[[0, 2, 3]]).all()
    assert not np.isfinite(with_bad.training_loss[1])
    assert ledger.total().flops > 60 * step_cost(task), "what the lost replica spent counts too"


@pytest.mark.parametrize("mode", ["batched", "loop"])
@pytest.mark.parametrize("count", [1, 2])
def test_all_replicas_may_diverge(features, mode, count):
    task = poisoned(features(batch_size=8, replicas=mode), rows=slice(None))
    done = fit_replicas(task, 5, [ShuffledStream(np.arange(200), k) for k in range(count)])
    assert done.diverged.all()
    assert not np.isfinite(done.training_loss).any()


def test_runs_that_diverge_have_no_objective(features):
    task = poisoned(features(batch_size=8))
    inner = InnerLoop(task, Ledger(), Monitor())
    streams = [ShuffledStream(np.arange(20), 0), ShuffledStream(np.arange(20, 200), 0)]
    runs = inner.run(streams, 10 * step_cost(task), seed=0, stage="short runs", keep=2)
    assert np.isnan(runs.objective).tolist() == [True, False]
    assert runs.objective[1] == task.objective(runs.models[1]).value


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_that_is_not_finite_stops_before_the_update(features, value, accumulate):
    first_bad = 3
    task = features(batch_size=8, accumulate=accumulate)
    draws = whole_pool(task)
    task = poisoned(task, value, draws.step(first_bad)[0].positions.numpy()[:1])
    model, train_state, ledger, flops = task.model(0), Course(), Ledger(), 30 * step_cost(task)
    with pytest.raises(NonFiniteError) as caught:
        fit(task, flops, model=model, draws=draws, ledger=ledger, monitor=train_state)
    error = caught.value
    assert error.step == first_bad == len(train_state.points)
    assert error.ids == draws.ids(draws.step(first_bad))
    assert error.learning_rate == pytest.approx(task.recipe.rate((first_bad + 0.5) / 30))
    for detail in (f"step {first_bad}", error.ids[0], f"{error.learning_rate:.3g}"):
        assert detail in str(error)
    assert ledger.total().flops == pytest.approx((first_bad + 1) * step_cost(task)), "a failed run was not free"

    stopped_before = features(batch_size=8, accumulate=accumulate)
    same = stopped_before.model(0)
    steps = iter(range(first_bad))
    stopped_before.costs = Until(stopped_before.costs, steps)
    fit(stopped_before, flops, model=same)
    assert identical(model, same)


class Until:
    """Costs as they are for some steps, then more than any budget."""

    def __init__(self, costs, steps):
        self._costs, self._steps = costs, steps
        self.optimizer_step = costs.optimizer_step

    def usage(self, batch):
        return self._costs.usage(batch) if next(self._steps, None) is not None else 1e300


def test_a_gradient_that_is_not_finite_stops_before_the_update(features):
    task = sloped(features(batch_size=8))
    model = task.model(0)
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf) at step 0"):
        fit(task, 3e6, model=model)
    assert identical(model, task.model(0))
