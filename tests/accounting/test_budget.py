"""Budgets are read as they are written, and no account ever goes beyond its limit."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cads.accounting.budget import UNITS, Budget
from cads.accounting.ledger import EVALUATE, GLOSSARY, PHASES, SELECT, TRAIN, Ledger
from cads.accounting.units import short_count
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError
from cads.training.trainer import Trainer

AMOUNTS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
CHARGES = st.floats(min_value=0, max_value=1e30)


@given(AMOUNTS, st.sampled_from(sorted(set(UNITS.values()))))
def test_what_a_budget_prints_is_what_it_reads(amount, unit):
    budget = Budget(amount, unit)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("2e15", 2e15, "FLOPs"),
        ("2e15 FLOPs", 2e15, "FLOPs"),
        (2e15, 2e15, "FLOPs"),
        (10**15, 1e15, "FLOPs"),
        ("225000 usages", 225000, "usages"),
        ("225_000usages", 225000, "usages"),
        ("1 usage", 1, "usages"),
        ("5 epochs", 5, "epochs"),
        (" 0.5 Epoch ", 0.5, "epochs"),
        ("3 passes", 3, "epochs"),
        ("3e6 tokens", 3e6, "tokens"),
        ("2M tokens", 2e6, "tokens"),
        ("0.5 B tokens", 5e8, "tokens"),
        ("225k usages", 225e3, "usages"),
        ("3 PFLOPs", 3e15, "FLOPs"),
        (".5 epochs", 0.5, "epochs"),
        ("2 Tokens", 2, "tokens"),
        ("90 s", 90, "seconds"),
        ("30 minutes", 1800, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("$5 at 2.50 an hour", 7200, "seconds"),
        ("$ 5 at $2.50/hour", 7200, "seconds"),
        ("$1e2 at 4 per hour", 90_000, "seconds"),
    ],
)
def test_ways_to_write_a_budget(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)
    assert Budget.parse(text, count_selection=True).count_selection


@pytest.mark.parametrize(
    "text",
    ["", "epochs", "0", "0 epochs", "-5 epochs", "-1e9", "nan", "inf", "-inf", "nan usages", "1e999", "5 days", "5 5",
     "-1 h", "$5", "$5 at 0 an hour", "$0 at 2 an hour", "$5 at 2 a day", "5 at 2 an hour",
     "five epochs", "1e", "0x10", "5 epochs!", "2M", "2k", "5 Ms",
     "5 k minutes", "2m tokens", "2 M epochs s", math.nan, math.inf, 0, -1],
)  # fmt: skip
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("text", [" at 2.50 an hour", ".50 at $2/hour", "at 3 per hour"])
def test_what_the_shell_leaves_of_money_is_told(text):
    with pytest.raises(BudgetError, match="in single quotes"):
        Budget.parse(text)
    with pytest.raises(BudgetError, match=r"an hour'$"):
        Budget.parse("5 bananas")


@pytest.mark.parametrize("amount", [0.0, -1.0, math.nan, math.inf])
def test_amounts_that_are_none_are_refused(amount):
    with pytest.raises(BudgetError, match="positive"):
        Budget(amount, "epochs")
    with pytest.raises(BudgetError, match="'hours'"):
        Budget(1.0, "hours")


@settings(deadline=None, max_examples=30)
@given(amount=st.floats(0.01, 1e6), batch_size=st.integers(1, 50))
def test_units_are_consistent(features, amount, batch_size):
    task = features(batch_size=batch_size)
    usage = task.costs.per_usage(task.pool, batch_size)
    assert Budget(amount).flops(task) == amount
    assert Budget(amount, "usages").flops(task) == pytest.approx(amount * usage, abs=1)
    assert Budget(amount, "epochs").flops(task) == pytest.approx(amount * usage * len(task.pool), abs=1)
    per_example = task.costs.tokens_per_example(task.pool)
    assert Budget(amount * per_example, "tokens").flops(task) == pytest.approx(amount * usage, abs=1)


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 1000), batch_size=st.integers(1, 300), hidden=st.integers(5, 9))
def test_usages_of_whole_batches_buy_all_of_their_steps(features, steps, batch_size, hidden):
    task = features(batch_size=batch_size, hidden=hidden)
    step = batch_size * task.costs.usage(task.pool.batch([0])) + task.costs.optimizer_step
    flops = Budget(steps * batch_size, "usages").flops(task)
    assert steps * step <= flops < steps * step + 2


@settings(deadline=None, max_examples=15)
@given(n=st.integers(5, 60), batch_size=st.integers(1, 20), epochs=st.integers(1, 3))
def test_epochs_buy_that_many_usages_of_each_example(features, n, batch_size, epochs):
    task = features(n=n, batch_size=batch_size, sources=0)
    ledger = Ledger()
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(n), 0)], batch_size)
    flops = Budget(epochs, "epochs").flops(task)
    if epochs * n < batch_size:
        with pytest.raises(BudgetError):
            Trainer(task, ledger).fit(task.model(0), draws, flops, seed=0, phase=TRAIN, stage="final")
    else:
        Trainer(task, ledger).fit(task.model(0), draws, flops, seed=0, phase=TRAIN, stage="final")
        assert ledger.total().usages == epochs * n // batch_size * batch_size


def test_epochs_of_unequal_examples_buy_about_that_many_usages(sentences):
    task = sentences(batch_size=1)
    ledger = Ledger()
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 1)
    flops = Budget(2, "epochs").flops(task)
    Trainer(task, ledger).fit(task.model(0), draws, flops, seed=0, phase=TRAIN, stage="final")
    assert abs(ledger.total().usages - 2 * len(task.pool)) <= 1


@given(limit=st.floats(1e-3, 1e30), charges=st.lists(st.tuples(st.sampled_from([SELECT, TRAIN]), CHARGES), max_size=30))
def test_no_charge_goes_beyond_the_limit(limit, charges):
    ledger = Ledger(limit)
    for phase, flops in charges:
        before, remaining = ledger.total(), ledger.left
        if flops <= remaining:
            ledger.charge(phase, "s", flops, usages=1)
        elif flops > remaining * (1 + 1e-6):
            with pytest.raises(BudgetError):
                ledger.charge(phase, "s", flops, usages=1)
            assert ledger.total() == before
        assert ledger.total().flops <= limit * (1 + 1e-6)
        assert ledger.left >= 0


def test_evaluation_is_accounted_for_but_not_limited():
    ledger = Ledger(10.0)
    ledger.charge(EVALUATE, "test", 1e6)
    assert ledger.left == 10.0
    assert ledger.total().flops == 1e6
    assert Ledger().left == math.inf


@pytest.mark.parametrize("flops", [-1.0, math.nan, math.inf])
def test_a_charge_that_is_no_amount_is_refused(flops):
    with pytest.raises(BudgetError, match="select/x"):
        Ledger().charge(SELECT, "x", flops)


ENTRIES = st.lists(
    st.tuples(st.sampled_from([SELECT, TRAIN, EVALUATE]), st.sampled_from("abc"), st.integers(0, 10**12),
              st.integers(0, 10**6)),
    max_size=12,
)  # fmt: skip


def ledger_of(entries):
    ledger = Ledger()
    for phase, stage, flops, usages in entries:
        ledger.charge(phase, stage, flops, usages=usages, tokens=3 * usages, answer_tokens=2 * usages, seconds=0.5)
    return ledger


@given(ENTRIES)
def test_charges_add_up_over_phases_and_stages(entries):
    ledger = ledger_of(entries)
    assert ledger.total().flops == sum(e[2] for e in entries)
    assert ledger.total().tokens == 3 * sum(e[3] for e in entries)
    phases = [ledger.total(p) for p in (SELECT, TRAIN, EVALUATE)]
    assert sum(p.flops for p in phases) == ledger.total().flops
    assert sum(p.usages for p in phases) == ledger.total().usages
    assert ledger.total().seconds == 0.5 * len(entries)


@given(ENTRIES, ENTRIES)
def test_merging_is_charging_both(first, second):
    merged = ledger_of(first)
    other = ledger_of(second)
    merged.merge(other)
    assert merged.entries == ledger_of(first + second).entries
    assert other.entries == ledger_of(second).entries


@given(ENTRIES)
def test_a_ledger_survives_json(entries):
    ledger = ledger_of(entries)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.entries == ledger.entries
    assert all("seconds" not in record for record in ledger.to_json(seconds=False))
    for (phase, stage), entry in Ledger.from_json(ledger.to_json(seconds=False)).entries.items():
        assert entry.flops == ledger.entries[phase, stage].flops


def test_a_saved_ledger_is_json(tmp_path):
    ledger = ledger_of([(SELECT, "a", 5, 1)])
    ledger.save(tmp_path / "ledger.json")
    assert json.loads((tmp_path / "ledger.json").read_text()) == ledger.to_json()


def printed(ledger, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(ledger.table())
    return console.export_text()


@pytest.mark.parametrize("entries", [[], [(SELECT, "short runs", 3e9, 1234), (TRAIN, "final model", 9e9, 1)]])
def test_the_table_shows_every_stage_and_the_total(entries):
    text = printed(ledger_of(entries), 120)
    assert "total" in text
    for phase, stage, flops, usages in entries:
        for detail in (PHASES[phase], stage, f"{flops:.4g}", short_count(usages)):
            assert detail in text
    if entries:
        assert "25.0%" in text


def test_the_table_holds_at_80_columns_whatever_the_numbers_and_names_the_glossary_once():
    ledger = Ledger()
    for phase in PHASES:
        ledger.charge(phase, f"a stage of a {'very ' * 9}long name", 1.234e21, usages=10**9, tokens=7 * 10**11)
        ledger.charge(phase, "b", 9.99e-5, usages=999_999, tokens=5, answer_tokens=123_456_789_012, seconds=123456.789)
    text = printed(ledger, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text, "nothing is cut off"
    for word in (*PHASES.values(), "1.23e+21", "700G", "123G", "1.43 d", "50.0%"):
        assert word in text
    assert text.count(GLOSSARY) == 1


def test_a_column_that_repeats_another_is_left_out():
    """An image has one token, which is its label."""
    ledger = Ledger()
    ledger.charge(TRAIN, "final model", 1e9, usages=640, tokens=640, answer_tokens=640)
    assert "tokens" not in printed(ledger, 80)
    ledger.charge(TRAIN, "final model", 1e9, usages=640, tokens=64_000, answer_tokens=640)
    assert "64.6k" in printed(ledger, 80)


@given(st.integers(0, 10**15 - 10**12))
def test_short_counts_are_short_and_right(n):
    text = short_count(n)
    assert len(text) <= 6
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    number = text if factor == 1.0 else text[:-1]
    assert float(number) * factor == pytest.approx(n, rel=0.006, abs=1e-3)


def test_timing_adds_seconds_even_if_the_block_fails():
    ledger = Ledger()

    def fail():
        with ledger.timed(SELECT, "x"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ledger.total().seconds > 0
    assert ledger.total().flops == 0
