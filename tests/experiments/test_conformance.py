"""The measures of scores: AUC and LDS against known values, and the whole page, run small."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from experiments import conformance
from experiments.conformance import ORACLE, auc, halves, lds, main, measure, right_labels, target_losses

GRID = """
task:
  {hidden: 32, n_pool: 160, n_target: 60, n_test: 50, sources: [{name: clean}, {name: noise 80 %, label_noise: 0.8}]}
train: {batch_size: 16, learning_rate: 0.01}
budgets: [4 epochs]
seeds: 2
methods: [full]
"""


class TestAUC:
    def test_of_four_pairs_three_are_won(self):
        assert auc(np.array([4.0, 2.0, 3.0, 1.0]), np.array([True, True, False, False])) == 0.75

    def test_ties_count_half(self):
        assert auc(np.zeros(5), np.array([True, True, False, False, False])) == 0.5

    def test_it_is_the_statistic_of_mann_and_whitney(self):
        rng = np.random.default_rng(0)
        score, right = rng.integers(0, 20, 200).astype(float), rng.random(200) < 0.3
        u = mannwhitneyu(score[right], score[~right]).statistic
        assert auc(score, right) == pytest.approx(u / (right.sum() * (~right).sum()))

    def test_knowing_the_source_does_not_help_within_it(self):
        sources = np.repeat([0, 1], 10)
        right = np.array([True] * 9 + [False] + [True] + [False] * 9)
        assert auc(1.0 - sources, right) == pytest.approx(0.9)
        assert auc(1.0 - sources, right, sources) == 0.5

    def test_without_a_pair_there_is_none(self):
        assert np.isnan(auc(np.arange(3.0), np.ones(3, dtype=bool)))


class TestLDS:
    def test_of_the_score_that_the_loss_is_the_sum_of_it_is_one(self):
        rng = np.random.default_rng(0)
        worth, masks = rng.normal(size=50), halves(50, 40, 1)
        losses = 3.0 - masks @ worth
        assert lds(worth, masks, losses) == pytest.approx(1)
        assert lds(-worth, masks, losses) == pytest.approx(-1)
        assert lds(2 * worth + 5, masks, losses) == pytest.approx(1)
        assert abs(lds(rng.normal(size=50), masks, losses)) < 0.5

    def test_halves_are_halves_and_differ(self):
        masks = halves(11, 30, 0)
        assert (masks.sum(axis=1) == 5).all()
        assert len(np.unique(masks, axis=0)) == 30
        assert np.array_equal(masks, halves(11, 30, 0))
        assert not np.array_equal(masks, halves(11, 30, 1))


def test_wrong_labels_raise_the_target_loss_of_retrained_models(digits):
    task, right = digits, right_labels(digits)
    few, many = (np.isin(np.arange(len(right)), np.flatnonzero(mask)[:40]) for mask in (right, ~right))
    losses = target_losses(task, np.stack([few, many, few]), seed=0)
    assert losses[0] < losses[1]
    assert losses[2] < losses[1]
    assert losses[0] != losses[2]
    assert np.array_equal(losses, target_losses(task, np.stack([few, many, few]), seed=0))


def test_who_knows_the_right_labels_is_right_and_chance_is_not(digits):
    rows, _ = measure(digits, 0, 8)
    assert rows[ORACLE][:2] == (1, 1)
    assert 0.35 < rows["random"][0] < 0.65
    assert rows["`loss`"][0] > 0.7
    assert rows["`cads`, probability"][0] > 0.7


def test_the_part_of_the_label_leaves_out_source_and_class(digits):
    whole, part = conformance.online(digits, 0), conformance.label_part(digits, 0)
    for source in (0, 1):
        for label in np.unique(digits.groups(digits.pool)):
            cell = (digits.pool.sources == source) & (digits.groups(digits.pool) == label)
            np.testing.assert_allclose(part[cell], whole[cell] / whole[cell].max())


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture
def digits(grid):
    return next(conformance.settings(conformance.read_grid(grid))).build()


def test_the_page_has_the_command_the_seeds_and_a_row_for_each_score(grid, tmp_path, monkeypatch):
    out = tmp_path / "page.md"
    monkeypatch.setattr(conformance, "TRAININGS", 2)
    monkeypatch.setattr(conformance, "ONLINE_PASSES", 4.0)
    arguments = ["--config", str(grid), "--subsets", "6", "--out", str(out)]
    assert main(arguments) == 0
    text = out.read_text()
    assert f"python -m experiments.conformance {' '.join(arguments)}" in text
    assert "Seeds 0, 1" in text
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == list(conformance.SCORES)
    assert "nan" not in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "    ")))


def test_a_pool_without_wrong_labels_is_refused(grid, capsys):
    grid.write_text(GRID.replace(", label_noise: 0.8", ""))
    assert main(["--config", str(grid)]) == 1
    assert "label_noise" in capsys.readouterr().err
