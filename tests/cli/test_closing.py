"""What `cads train` says at its end."""

import pytest

from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.cli.closing import budget_sentence
from cads.cli.main import main

GRID = """
task: {hidden: 16, n_pool: 80, n_target: 40, n_test: 60, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budgets: [8 epochs]
seeds: 2
methods: [target-only, {method: joint, label: "joint, ours"}, cads]
"""
CONFIG = GRID.partition("budgets")[0]


@pytest.mark.parametrize(
    ("covers", "selection", "expected"),
    [
        (True, 30.0, "The budget of 100 FLOPs (2 epochs) went to: training 60.0%, selection 30.0%, 10.0% unspent."),
        (
            False,
            30.0,
            "The budget of 100 FLOPs (2 epochs) went to: training 60.0%, 40.0% unspent. Selection came on top: "
            "30 FLOPs, 30.0% of the budget.",
        ),
        (True, 40.0, "The budget of 100 FLOPs (2 epochs) went to: training 60.0%, selection 40.0%."),
        (False, 0.0, "The budget of 100 FLOPs (2 epochs) went to: training 60.0%, selection 0.0%, 40.0% unspent."),
    ],
)
def test_what_the_budget_went_to(covers, selection, expected):
    ledger = Ledger()
    ledger.charge(SELECT, "probe", selection)
    ledger.charge(TRAIN, "final model", 60.0)
    ledger.charge(EVALUATE, "test", 1e9)
    budget = {"given": "2 epochs", "flops": 100.0, "covers_selection": covers}
    assert budget_sentence(budget, ledger) == expected


def test_why_a_budget_is_left_is_said():
    ledger = Ledger()
    ledger.charge(TRAIN, "final model", 60.0)
    budget = {"given": "100 FLOPs", "flops": 100.0, "covers_selection": True}
    assert budget_sentence(budget, ledger, "it ended").endswith("40.0% unspent (it ended).")
    assert "it ended" not in budget_sentence(budget | {"flops": 60.0}, ledger, "it ended")


@pytest.mark.parametrize(
    ("covers", "selection", "expected"),
    [
        (True, 0.0, "training 60.0%, selection 0.0%, 40.0% unspent."),
        (True, 40.0, "training 60.0%, selection 40.0%."),
        (False, 30.0, "training 60.0%, 40.0% unspent. Selection came on top: 30 FLOPs, 30.0% of the budget."),
    ],
)
def test_the_speed_test_of_a_time_is_said_beside_it(covers, selection, expected):
    """The FLOPs of a time are those of what measuring the speed left of it."""
    ledger = Ledger()
    ledger.charge(SELECT, "speed test", 50.0)
    ledger.charge(SELECT, "probe", selection)
    ledger.charge(TRAIN, "final model", 60.0)
    sentence = budget_sentence({"given": "100 FLOPs", "flops": 100.0, "covers_selection": covers}, ledger)
    beside = " Before that, 50 FLOPs went to measuring the speed."
    assert sentence == f"The budget of 100 FLOPs went to: {expected}{beside}"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "grid.yaml").write_text(GRID)
    (folder / "c.yaml").write_text(CONFIG)
    assert main(["compare", str(folder / "grid.yaml"), "--out", str(folder / "grid")]) == 0
    return folder


def said(study, capsys, *flags, out="run"):
    capsys.readouterr()
    words = ["train", str(study / "c.yaml"), "--method", "full", "--track", "null", "--validation_points", "0"]
    assert main([*words, *flags, "--out", str(study / out)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_grid_beside_the_run_says_what_is_free(study, capsys):
    text = said(study, capsys, "--budget", "8 epochs")
    assert "Free at this budget, by " in text
    assert "(accuracy, means of 2 seeds): " in text
    assert "target-only " in text
    assert "joint (ours) " in text
    assert "than the best that is free" in text
    assert "cads " not in text.partition("Free at this budget")[2].partition("This run")[0], "what selects is not free"


def test_other_budgets_and_other_data_are_not_compared(study, capsys):
    text = said(study, capsys, "--budget", "4 epochs", out="short")
    assert "and not at this budget (at 8 epochs)" in text
    text = said(study, capsys, "--budget", "8 epochs", "--task.data_seed", "7", out="other")
    assert "was not measured on this data" in text
    assert "`cads compare`" in text


def test_a_grid_that_cannot_be_read_is_named_and_ends_nothing(study, capsys, tmp_path, caplog):
    broken = tmp_path / "grid"
    (broken / "tables" / "runs").mkdir(parents=True)
    (broken / "grid.json").write_text("[]")
    (broken / "config.yaml").write_text("methods: 3")
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert "was not measured on this data" in said(tmp_path, capsys, "--budget", "4 epochs")
    assert any("is not compared with" in record.getMessage() for record in caplog.records)
