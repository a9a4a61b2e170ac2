"""Rankings: scored once, cut for any budget, kept in a folder that says what they were made from."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from baselines.bm25 import Bm25
from baselines.perplexity import Perplexity
from baselines.random import Random
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, ConfigError, DataError, SelectionError
from cads.registry import build_selector
from cads.scoring.ranking import Ranking
from cads.seeding import derive
from cads.training.final import train

SHARES = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@pytest.mark.parametrize("kind", [Bm25, Perplexity, Random])
def test_one_ranking_is_cut_for_every_budget(texts, kind):
    task, ledger = texts(n=200), Ledger()
    ranking = kind().rank(task, seed=0, ledger=ledger)
    spent = ledger.total().flops
    chosen = [kind(fraction=share).select_top(ranking, task, Budget(1, "epochs")) for share in SHARES]
    assert ledger.total().flops == spent
    costs = task.costs.usages(task.pool) + task.costs.optimizer_step / task.recipe.batch_size
    for share, selection in zip(SHARES, chosen, strict=True):
        chosen_cost = costs[selection.selected].sum()
        assert chosen_cost <= share * costs.sum() * (1 + 1e-9) or selection.selected.sum() == 1
        assert chosen_cost >= share * costs.sum() - costs.max()
        assert selection.ledger.total().flops == spent
        assert selection.score[selection.selected].min() >= selection.score[~selection.selected].max(initial=-np.inf)
    for smaller, larger in pairwise(chosen):
        assert (smaller.selected <= larger.selected).all()
    assert chosen[-1].selected.all()


class TestTarget:
    """The target in the final training on what was kept."""

    @pytest.mark.parametrize("epochs", [0.2, 2.0, 4.0, 16.0, 100.0])
    @pytest.mark.parametrize("fraction", [0, 0.3, "by size"])
    def test_the_budget_passes_over_kept_and_target_so_often(self, texts, epochs, fraction):
        """As many examples are kept as possible, with the target's part of the batches of each pass paid for."""
        task, budget = texts(n=200, batch_size=4), Budget(8, "epochs")
        step = task.costs.optimizer_step / task.recipe.batch_size
        ranker = Random(epochs=epochs, target_fraction=fraction)
        chosen = ranker.select(task, budget, seed=0, ledger=Ledger())
        usages = (task.costs.usages(task.pool) + step)[np.argsort(chosen.rank)]
        target_usage = task.costs.usages(task.target).mean() + step
        kept, n_target = int(chosen.selected.sum()), len(task.target)

        def share(n):
            return min(0.6, n_target / (n_target + n)) if fraction == "by size" else fraction

        def course(n):
            return epochs * (usages[:n].sum() + n * share(n) / (1 - share(n)) * target_usage)

        assert chosen.target_fraction == pytest.approx(share(kept))
        assert course(kept) <= budget.flops(task) * (1 + 1e-6)
        assert kept == 200 or course(kept + 1) > budget.flops(task) * (1 - 1e-6)

    def test_a_fraction_of_the_pool_is_kept_whatever_the_target(self, texts):
        task, budget = texts(n=200), Budget(1, "epochs")
        plain, joint = (
            Bm25(fraction=0.4, target_fraction=f).select(task, budget, seed=0, ledger=Ledger()) for f in (0, "by size")
        )
        assert np.array_equal(plain.selected, joint.selected)
        assert plain.target_fraction == 0
        assert joint.target_fraction == pytest.approx(20 / (20 + plain.selected.sum()))

    def test_the_ranking_is_the_same(self, texts, tmp_path, monkeypatch):
        task = texts()
        Perplexity(order="low").rank_once(task, tmp_path / "r", seed=0, ledger=Ledger())
        monkeypatch.setattr(Perplexity, "rank", None)
        ranker = Perplexity(order="low", target_fraction="by size")
        stored = ranker.rank_once(task, tmp_path / "r", seed=0, ledger=Ledger())
        assert ranker.select_top(stored, task, Budget(1, "epochs")).config["target_fraction"] == "by size"

    def test_training_takes_the_target(self, texts, monkeypatch):
        """Of each batch of 8 the share by size."""
        task, rows = texts(n=80, batch_size=8), []
        chosen = Random(fraction=0.5, target_fraction="by size").select(
            task, Budget(1, "epochs"), seed=0, ledger=Ledger()
        )
        plain = BatchStream.step

        def noted(self, step):
            rows.append((self.from_pool, self.batch_size))
            return plain(self, step)

        monkeypatch.setattr(BatchStream, "step", noted)
        train(task, chosen, Budget(1, "epochs"), seed=0)
        n_target = round(8 * 20 / (20 + chosen.selected.sum()))
        assert n_target > 0
        assert set(rows) == {(8 - n_target, 8)}

    @pytest.mark.parametrize("fraction", [-0.1, 1, 2.0, float("nan"), "by weight"])
    def test_what_is_no_share_is_refused(self, fraction):
        with pytest.raises(ConfigError, match="target_fraction"):
            build_selector("bm25", {"target_fraction": fraction})


def test_ties_break_by_id(texts):
    task = texts()
    ranking = Ranking(task.pool.ids, np.zeros(len(task.pool)), "flat", 0, Ledger(), "")
    chosen = Random(fraction=0.3).select_top(ranking, task, Budget(1, "epochs"))
    ids = sorted(task.pool.ids.to_pylist())
    chosen_ids = set(task.pool.ids.filter(pa.array(chosen.selected)).to_pylist())
    assert chosen_ids == set(ids[: len(chosen_ids)])


def test_it_is_read_back_as_it_was(texts, tmp_path):
    ranking = Bm25().rank(texts(), seed=0, ledger=Ledger())
    ranking.notes["said"] = "once"
    loaded = Ranking.load(ranking.save(tmp_path / "r"))
    assert loaded.ids.equals(ranking.ids)
    assert (loaded.score == ranking.score).all()
    for name in ("method", "seed", "config", "pool_hash", "notes", "provenance_hash"):
        assert getattr(loaded, name) == getattr(ranking, name)
    assert loaded.ledger.to_json(seconds=False) == ranking.ledger.to_json(seconds=False)
    ranking.save(tmp_path / "r")
    assert sorted(f.name for f in (tmp_path).iterdir()) == ["r"]


class TestRankOnce:
    def test_the_second_time_it_is_read(self, texts, tmp_path, monkeypatch):
        task, first, second = texts(), Ledger(), Ledger()
        one = Perplexity(order="low").rank_once(task, tmp_path / "r", seed=0, ledger=first)
        monkeypatch.setattr(Perplexity, "rank", None)
        # How a ranking is cut changes nothing in it.
        two = Perplexity(order="low", fraction=0.1, epochs=2).rank_once(task, tmp_path / "r", seed=0, ledger=second)
        assert (one.score == two.score).all()
        assert first.total().flops == second.total().flops > 0

    def test_a_selection_tells_where_it_was_cut_itself(self, texts, tmp_path):
        task = texts()
        Bm25(fraction=0.1).rank_once(task, tmp_path / "r", seed=0, ledger=Ledger())
        ranker = Bm25(fraction=0.5, epochs=2)
        stored = ranker.rank_once(task, tmp_path / "r", seed=0, ledger=Ledger())
        config = ranker.select_top(stored, task, Budget(1, "epochs")).config
        assert (config["fraction"], config["epochs"], config["k1"]) == (0.5, 2, ranker.k1)

    def test_other_subtasks_of_the_same_target_are_ranked_anew(self, texts, tmp_path):
        three, one = texts(subtasks=3), texts(subtasks=1)
        assert three.target.content_hash == one.target.content_hash
        Bm25().rank_once(three, tmp_path / "r", seed=0, ledger=Ledger())
        stored = Bm25().rank_once(one, tmp_path / "r", seed=0, ledger=Ledger())
        assert (stored.score == Bm25().rank(one, seed=0, ledger=Ledger()).score).all()

    def test_anything_else_is_ranked_anew(self, texts, tmp_path):
        task = texts()
        other = copy.copy(task)
        other.pool = task.pool.subset(np.arange(50), "pool")
        weights = copy.copy(task)
        weights._build = lambda: copy.deepcopy(task.model(derive(99)))
        cases = [
            (Perplexity(order="low"), task, 0),
            (Perplexity(order="high"), task, 0),
            (Perplexity(order="low"), task, 1),
            (Perplexity(order="low"), other, 0),
            (Perplexity(order="low"), weights, 0),
            (Bm25(), task, 0),
            (Random(), task, 0),
        ]
        hashes = set()
        for selector, ranked, seed in cases:
            ranking = selector.rank_once(ranked, tmp_path / "r", seed=seed, ledger=Ledger())
            hashes.add(ranking.provenance_hash)
            assert ranking.method == selector.method
            assert len(ranking.ids) == len(ranked.pool)
        assert len(hashes) == len(cases)

    def test_foreign_folders_are_left_alone(self, texts, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(SelectionError, match=r"holds \['thesis.tex'\]"):
            Bm25().rank_once(texts(), tmp_path, seed=0, ledger=Ledger())
        assert (tmp_path / "thesis.tex").read_text() == "years of work"


UNREADABLE = r"no ranking that can be read|ranking\.json (has schema version|cannot be read)"


class TestDamage:
    @pytest.fixture
    def folder(self, texts, tmp_path):
        return Random().rank(texts(), seed=0, ledger=Ledger()).save(tmp_path / "r")

    def test_missing(self, folder):
        (folder / "scores.parquet").unlink()
        with pytest.raises(SelectionError, match="does not exist"):
            Ranking.load(folder)

    @pytest.mark.parametrize(
        "change", [{"schema_version": 9}, {"seed": "0"}, {"ledger": 3}, {"config": None}, {"method": ["a"]}]
    )
    def test_header(self, folder, change):
        header = json.loads((folder / "ranking.json").read_text())
        (folder / "ranking.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(SelectionError, match=UNREADABLE):
            Ranking.load(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"schema_version": 1}'])
    def test_no_header(self, folder, text):
        (folder / "ranking.json").write_text(text)
        with pytest.raises(SelectionError, match=UNREADABLE):
            Ranking.load(folder)

    @pytest.mark.parametrize(
        "table", [{"id": ["a", "a"], "score": [1.0, 2.0]}, {"id": ["a", None], "score": [1.0, 2.0]}, {"id": ["a"]}]
    )
    def test_scores(self, folder, table):
        pq.write_table(pa.table(table), folder / "scores.parquet")
        with pytest.raises(SelectionError, match="no ranking that can be read"):
            Ranking.load(folder)


def test_a_ranking_of_another_pool_is_refused(texts):
    task, small = texts(), copy.copy(texts())
    small.pool = task.pool.subset(np.arange(10), "pool")
    ranking = Bm25().rank(small, seed=0, ledger=Ledger())
    with pytest.raises(DataError, match="70 examples of the pool have no score"):
        Bm25().select_top(ranking, task, Budget(1, "epochs"))


def test_scores_that_are_not_finite_are_refused_by_id(texts):
    task = texts()
    score = np.zeros(len(task.pool))
    score[3] = np.nan
    with pytest.raises(DataError, match="pool-3"):
        Random().ranking(task, score, seed=0, ledger=Ledger())


def test_a_ranking_that_eats_the_budget_is_refused_before_compute(texts, monkeypatch):
    task, ledger = texts(batch_size=4), Ledger()
    monkeypatch.setattr(Perplexity, "rank", None)
    with pytest.raises(BudgetError, match="nothing is left to train with"):
        Perplexity().select(task, Budget(0.25, "epochs", count_selection=True), seed=0, ledger=ledger)
    assert not ledger.entries
