"""What a search owes its caller when it finds nothing, runs out, or meets what is no number."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import cads.examples
from baselines.best_source import BestSource
from baselines.live_penalty import LivePenalty
from baselines.loss import Loss
from baselines.rho import Rho
from baselines.source import Source
from cads.budget import Budget, Ledger
from cads.errors import ConfigError, DataError
from cads.examples import CadsExamples
from cads.sources import CadsSources
from cads.task import Pool


@pytest.mark.parametrize("kind", [CadsSources, CadsExamples, LivePenalty])
def test_the_full_pool_keeps_the_options_that_were_asked_for(features, kind):
    selector = kind(allowance=0.0, target_fraction=0.25)
    chosen = selector.select(features(), Budget(2, "epochs"), seed=0, ledger=Ledger())
    assert chosen.selected.all()
    assert chosen.target_fraction == 0.25
    assert chosen.config["allowance"] == 0.0


@pytest.mark.parametrize("kind", [CadsSources, CadsExamples, BestSource])
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


@pytest.mark.parametrize("options", [{"policy": "gaussian"}, {"reach": "far"}])
def test_unknown_choices_are_refused(options):
    with pytest.raises(ConfigError, match="choose from"):
        CadsSources(**options)


@pytest.mark.parametrize("kind", [Loss, Rho])
def test_batches_without_room_are_refused_at_once(kind):
    with pytest.raises(ConfigError, match="batch_tokens = 0"):
        kind(batch_tokens=0)


def test_a_source_that_is_not_there_is_refused_by_the_plan(features):
    with pytest.raises(ConfigError, match="no source of the pool"):
        Source("elsewhere").plan(features(), Budget(1, "epochs"))


def test_a_full_pool_that_diverges_is_named(features, monkeypatch):
    task = features(batch_size=8)
    monkeypatch.setattr(type(task), "objective", lambda *_: float("nan"))
    with pytest.raises(DataError, match="full pool met a loss that is not finite"):
        CadsSources().select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())


@pytest.mark.parametrize("guard", [True, False])
def test_the_gain_is_that_of_the_choice_whatever_became_of_others(features, monkeypatch, guard):
    def compare(inner, field, rung, seed, height):
        gains = np.linspace(-1.0, -0.5, len(field)) if guard else np.linspace(0.5, 1.0, len(field))
        gains[0] = 0.0
        if len(field) > 2:
            gains[-1] = np.nan
        return gains

    monkeypatch.setattr(cads.examples, "compare", compare)
    task = features(batch_size=8)
    chosen = CadsExamples(guard=guard).select(task, Budget(16, "epochs"), seed=0, ledger=Ledger())
    gain = chosen.notes["gain"]
    assert gain > 0 if guard else gain < 0


@pytest.mark.parametrize("options", [{"rounds": 3, "allowance": 0.15}, {"rounds": 6, "allowance": 0.5}])
def test_live_penalty_stays_in_its_allowance_where_lengths_differ(texts, options):
    task, ledger = texts(n=600, batch_size=1), Ledger()
    selector, budget = LivePenalty(**options), Budget(2, "epochs")
    planned = selector.plan(task, budget)
    selector.select(task, budget, seed=0, ledger=ledger)
    assert 0 < ledger.total().flops <= planned.limit
    assert ledger.total().flops == pytest.approx(planned.total().flops, rel=0.1)
