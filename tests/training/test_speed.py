"""A budget of time is what the measured speed of training makes of it."""

import logging

import pytest

import cads
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import BudgetError
from cads.training import speed
from cads.training.speed import in_flops
from tests.support.forked_processes import spread
from tests.support.killed_runs import resumed


def test_other_units_are_as_they_were(features):
    ledger, budget = Ledger(), Budget.parse("3 epochs")
    assert in_flops(features(), budget, ledger) is budget
    assert not ledger.entries


def test_time_less_that_of_measuring_at_the_speed_measured(features, caplog, monkeypatch):
    """The clock is one that ticks: a second each time that it is read."""
    task, ledger, ticks = features(batch_size=8, n=80), Ledger(), iter(range(1_000_000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    with caplog.at_level(logging.WARNING):
        budget = in_flops(task, Budget.parse("1000 seconds", count_selection=True), ledger)
    assert (budget.unit, budget.count_selection) == ("FLOPs", True)
    entry = ledger.entries[SELECT, "speed test"]
    # The first part has taken more than half of the 2 seconds: it alone is measured.
    assert entry.usages == speed.WARM_UP * 8
    rate = float(caplog.text.split(" FLOP/s")[0].split()[-1])
    assert 0.9 * 1000 * rate < budget.amount < 1000 * rate
    assert "1000 seconds at" in caplog.text
    assert "epochs" in caplog.text


def test_too_little_time_is_refused(features):
    with pytest.raises(BudgetError, match="does not suffice to measure how fast training is"):
        in_flops(features(), Budget.parse("1e-6 s"), Ledger())


def test_a_run_that_goes_on_keeps_the_speed_that_was_measured_first(features, tmp_path):
    task = features(batch_size=8, n=80)

    def work():
        return cads.train(task, "0.5 seconds", method="random").ledger.to_json(seconds=False)

    # Two runs from the start would not spend the same.
    first = resumed(tmp_path, work, kills=())
    assert resumed(tmp_path, work, kills=()) == first
    assert {entry["stage"] for entry in first} == {"speed test", "final model", "test"}


def test_processes_measure_one_speed(features, tmp_path):
    task = features(batch_size=8, n=80)

    def work():
        ledger = Ledger()
        budget = in_flops(task, Budget.parse("2 seconds"), ledger)
        return [budget.amount, ledger.entries[SELECT, "speed test"].flops]

    one, other = spread(2, work, tmp_path)
    assert one == other


def test_the_ledger_has_the_measuring_where_a_selection_is_given_too(features):
    task = features(batch_size=8, n=80)
    selection = cads.select(task, "2 epochs", method="full")
    trained = cads.train(task, "0.5 seconds", selection=selection)
    assert trained.ledger.entries[SELECT, "speed test"].flops > 0


def test_a_grid_wants_what_is_the_same_on_every_machine(features):
    with pytest.raises(BudgetError, match="comparisons are at equal FLOPs"):
        Budget.parse("30 minutes").flops(features())
