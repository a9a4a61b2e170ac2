"""Rivals: a word where a package is missing, planted noise is found, and no budget is exceeded."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training import final
from experiments import leaderboard
from experiments.leaderboard import RIVALS, main
from experiments.leaderboard_report import best, common, complete, regret
from experiments.online_report import Cells
from experiments.rivals.adapt import Adapt
from experiments.rivals.blade import Blade, BladeRider, with_weights
from experiments.rivals.cleanlab import CleanlabFolds, folds_of
from experiments.rivals.mixmin import best_mixture
from experiments.rivals.mixtures import LogLinear, fit_law, law_values
from experiments.rivals.online_rule import OnlineRule, step_flops

PACKAGED = [rival for rival in RIVALS if rival.package]
MODULES = {rival.package: rival.package for rival in PACKAGED} | {"submodlib-py": "submodlib"}
HARD = ("datacull, TDDS", "datacull, RCAP")
"""Rivals that prefer examples that a model finds hard, of which noise is one kind."""
NEARLY_FLAT = ("adapt",)
"""Rivals whose weights lie between .27 and .73."""
FREE = ("datacull, RCAP",)
"""Rivals that cost nothing beside training."""
SOURCES = [SyntheticSource("clean", size=400), SyntheticSource("noisy", size=400, label_noise=0.9)]
ENOUGH = Budget.parse("24 epochs", count_selection=True)
FEW = Budget.parse("4 epochs", count_selection=True)


@pytest.fixture(scope="module")
def noisy():
    config = VisionConfig(hidden=32, n_target=200, n_test=150, sources=SOURCES)
    return config.build(TrainConfig(batch_size=16, learning_rate=5e-3))


@pytest.fixture(params=RIVALS, ids=lambda rival: rival.name)
def rival(request):
    if request.param.package:
        pytest.importorskip(MODULES[request.param.package])
    return request.param


def enough(rival):
    """A budget at which a rival selects."""
    return FEW if issubclass(rival.kind, OnlineRule) else ENOUGH


def right_share(task, weights):
    """The share of right labels in what is drawn from the pool."""
    return float(weights[~task.truth.corrupted].sum() / weights.sum())


@pytest.mark.parametrize("rival", PACKAGED, ids=lambda rival: rival.name)
def test_a_missing_package_is_named_before_anything_is_spent(noisy, monkeypatch, rival):
    module = MODULES[rival.package]
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    ledger = Ledger()
    with pytest.raises(ConfigError, match=rf"needs {rival.package} .*pip install 'cads-select\[rivals\]'"):
        rival.build().select(noisy, ENOUGH, seed=0, ledger=ledger)
    assert not ledger.entries


def test_planted_noise_is_found(noisy, rival):
    selection = rival.build().select(noisy, ENOUGH, seed=0, ledger=Ledger())
    # Of an online rule, the score says how often each example was trained on.
    weights = selection.score if selection.trained is not None else selection.weights
    margin = 0.01 if rival.name in NEARLY_FLAT else 0.03
    if rival.name not in HARD:
        assert right_share(noisy, weights) > right_share(noisy, np.ones(len(weights))) + margin


@pytest.mark.parametrize("passes", [0.5, 4, 24])
def test_selection_and_training_stay_within_the_budget(noisy, rival, passes):
    if passes == 24 and enough(rival) is not ENOUGH:
        pytest.skip("it selects with less")
    budget, ledger = Budget.parse(f"{passes} epochs", count_selection=True), Ledger()
    selection = rival.build().select(noisy, budget, seed=0, ledger=ledger)
    trained = final.train(noisy, selection, budget, seed=0)
    spent = [trained.ledger.total(phase).flops for phase in (SELECT, TRAIN)]
    assert sum(spent) <= budget.flops(noisy) * (1 + 1e-9)
    assert spent[1] > 0.2 * budget.flops(noisy), "most of the rest trains the final model"
    chose = not selection.selected.all() or selection.weighted or selection.trained is not None
    assert (spent[0] > 0) == (chose and rival.name not in FREE)


def test_a_budget_of_training_alone_trains_for_all_of_it(noisy, rival):
    budget = Budget.parse("4 epochs", count_selection=False)
    trained = final.train(noisy, rival.build().select(noisy, budget, seed=0, ledger=Ledger()), budget, seed=0)
    assert 0.95 * budget.flops(noisy) < trained.ledger.total(TRAIN).flops <= budget.flops(noisy) * (1 + 1e-9)


def test_the_plan_is_what_is_charged(noisy, rival):
    ledger, selector = Ledger(), rival.build()
    selector.select(noisy, enough(rival), seed=0, ledger=ledger)
    planned = selector.plan(noisy, enough(rival)).total(SELECT).flops
    # Pruned trials leave their FLOPs to others, which may be as many as the allowance buys.
    tolerance = 0.4 if rival.name in ("optuna", "botorch") else 1e-6
    assert ledger.total(SELECT).flops == pytest.approx(planned, rel=tolerance)


def test_the_same_seed_gives_the_same_choice(noisy, rival):
    hashes = {rival.build().select(noisy, enough(rival), seed=3, ledger=Ledger()).content_hash for _ in range(2)}
    assert len(hashes) == 1


def test_a_share_that_buys_no_scores_returns_the_full_pool(noisy):
    pytest.importorskip("cleanlab")
    budget, ledger = Budget.parse("1 epochs", count_selection=True), Ledger()
    selection = CleanlabFolds(share=0.1).select(noisy, budget, seed=0, ledger=ledger)
    assert selection.selected.all()
    assert not ledger.entries
    assert "full pool" in selection.notes["guard"]


def test_tasks_without_classes_are_refused(texts):
    pytest.importorskip("cleanlab")
    with pytest.raises(ConfigError, match="no classes"):
        CleanlabFolds().select(texts(), ENOUGH, seed=0, ledger=Ledger())


def test_folds_hold_each_class_evenly_and_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    labels, order = rng.integers(0, 3, 300), np.arange(300)
    fold = folds_of(labels, order, 3, seed=5)
    counts = np.array([np.bincount(labels[fold == k], minlength=3) for k in range(3)])
    assert np.ptp(counts, axis=0).max() <= 1
    permuted = rng.permutation(300)
    # Example i stands at `permuted[i]`; the order of ids finds it there.
    moved = np.empty_like(labels)
    moved[permuted] = labels
    assert (folds_of(moved, permuted, 3, seed=5)[permuted] == fold).all()


def test_no_fold_is_judged_by_a_model_that_saw_it(noisy, monkeypatch):
    """Half of the labels are wrong: a model that learned them by heart has a far lower loss on its own folds."""
    pytest.importorskip("cleanlab")
    judges = []

    def noted(task, pool, model, function, *, positions, **_):
        judges.append((model.eval(), positions))
        return np.full((len(positions), len(task.classes)), 1 / len(task.classes))

    monkeypatch.setattr("experiments.rivals.cleanlab.read_rows", noted)
    CleanlabFolds(passes=40).probabilities(noisy, 4 * ENOUGH.flops(noisy), 0, Ledger())
    assert sorted(np.concatenate([positions for _, positions in judges])) == list(range(len(noisy.pool)))
    for model, held_out in judges:
        learned = np.setdiff1d(np.arange(len(noisy.pool)), held_out)
        with torch.no_grad():
            losses = [float(noisy.losses(model, noisy.pool.batch(rows)).mean()) for rows in (held_out, learned)]
        assert losses[0] > 1.4 * losses[1]


def test_the_law_of_mixtures_is_found_again():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(3), 40)
    law = np.array([0.5, -0.2, -1.5, 0.3, 1.0])
    objective = law_values(law, mixtures)
    others = rng.dirichlet(np.ones(3), 100)
    fitted = law_values(fit_law(mixtures, objective), others)
    assert fitted == pytest.approx(law_values(law, others), abs=0.05)
    best_mixture = LogLinear().best_predicted(mixtures, objective, others)
    assert best_mixture[0] > 0.7, "the source that lowers the loss"


def test_mixmin_weighs_models_as_the_likelihood_does():
    """Against a grid of all mixtures of three models."""
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=(60, 3)) * [1.0, 1.5, 4.0]
    steps = np.arange(51) / 50
    grid = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9]).clip(0)

    def objective(mixture):
        return -np.log(np.exp(-losses) @ mixture).mean()

    found = best_mixture(losses)
    assert found.sum() == pytest.approx(1)
    assert objective(found) <= min(map(objective, grid)) + 1e-4


def test_the_leaderboard_skips_what_is_missing_and_reports_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "installed_version", lambda package: None)
    (tmp_path / "two.yaml").write_text(
        "task:\n  dataset: digits\n  hidden: 16\n  sources:\n"
        "    - {name: clean, size: 100}\n    - {name: noisy, size: 100, label_noise: 0.8}\n"
        "train: {batch_size: 16, learning_rate: 0.005}\n"
    )
    out = tmp_path / "out"
    arguments = ["--worlds", str(tmp_path / "two.yaml"), "--targets", "60", "--seeds", "0", "1", "--passes", "4"]
    main(["--out", str(out), *arguments])
    assert "optuna is left out: pip install optuna" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    names = {row["key"][4] for row in rows}
    assert {"cads", "aligned batches", "log-linear"} <= names
    assert not names & {rival.name for rival in PACKAGED}
    # A cell, or a seed of it, that some method lacks is not reported.
    lone = {"accuracy": 1.0, "select": 0.0, "budget": 1.0, "seconds": 1.0}
    with (out / "cells.jsonl").open("a") as file:
        for passes, seed in ((16.0, 0), (4.0, 7)):
            file.write(json.dumps({"key": ["two", 60, passes, seed, "full"], **lone}) + "\n")
    main(["--out", str(out), "--results", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.jsonl").read_text() == (out / "cells.jsonl").read_text()
    cells = complete(Cells.read(out / "cells.jsonl"), common(out / "cells.jsonl"))
    place = ("two", 60, 4.0)
    assert "# Leaderboard: 1 cells, 2 seeds" in page
    assert "Without a result here: cleanlab, 3 folds" in page
    assert regret(cells, place, best(cells, place)) == 0
    assert f"| aligned batches | ours, after OPUS | {regret(cells, place, 'aligned batches'):.2f} |" in page


def test_a_rule_buys_as_many_steps_as_its_budget_allows(noisy):
    """One step more, with what the rule costs then, would exceed the budget."""
    for kind in (Adapt, Blade):
        rule, budget = kind(), Budget.parse("3 epochs", count_selection=True)
        trained = rule.select(noisy, budget, seed=0, ledger=(ledger := Ledger())).trained
        assert trained is not None
        steps = round(ledger.total(TRAIN).flops / step_flops(noisy))

        def cost(n, rule=rule):
            return n * step_flops(noisy) + sum(rule.prices(noisy, n).values())

        assert cost(steps) <= budget.flops(noisy) * (1 + 1e-9) < cost(steps + 1)


def test_adapt_weighs_by_likeness_to_the_target_examples_of_the_same_label(noisy):
    """A label that is wrong belongs to a class that the image is not like."""
    scores = [
        Adapt(temperature=temperature).select(noisy, FEW, seed=0, ledger=Ledger()).score for temperature in (1.0, 1e6)
    ]
    # At this temperature all weights are 1/2, and both runs draw the same examples.
    turns = 2 * scores[1]
    assert turns == pytest.approx(turns.round(), abs=1e-3)
    weights, wrong = scores[0] / turns, noisy.truth.corrupted
    assert weights[~wrong].mean() > weights[wrong].mean() + 0.02


def test_the_reference_of_blade_knows_the_target_better_than_the_model_that_it_starts_from(noisy, monkeypatch):
    losses = []
    original = BladeRider.trained_reference

    def measured(self, step):
        reference = original(self, step)
        model, batch = self.run.model, noisy.target.batch(np.arange(len(noisy.target)))
        with torch.no_grad():
            before, after = (noisy.losses(m, batch).mean() for m in (model, with_weights(model, reference)))
        losses.append((float(before), float(after)))
        return reference

    monkeypatch.setattr(BladeRider, "trained_reference", measured)
    Blade().select(noisy, FEW, seed=0, ledger=Ledger())
    assert len(losses) == 5
    assert all(after < before for before, after in losses)
