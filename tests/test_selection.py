"""Selection: scores travel with ids, and weights say what training draws."""

import io
import re
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from baselines.random import Random
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.cli.commands import summary
from cads.data.pool import Pool
from cads.errors import SelectionError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.checkpoint import State
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.final import train
from tests.support.selections import SOURCES, chosen, small_task


@pytest.fixture(scope="module")
def task():
    return small_task()


def permuted(pool, seed=1):
    order = np.random.default_rng(seed).permutation(len(pool))
    return Pool(pool.ids.take(order), pool.examples.take(order), pool.sources[order], pool.source_names)


class TestIds:
    def test_positions_follow_the_ids(self, task):
        selection, other = chosen(task.pool), permuted(task.pool)
        wanted = {i for i, s in zip(task.pool.ids.to_pylist(), selection.selected, strict=True) if s}
        for pool in (task.pool, other):
            positions = selection.positions(pool)
            assert (np.diff(positions) > 0).all()
            assert set(pool.ids.take(positions).to_pylist()) == wanted

    def test_a_larger_pool_will_do(self, task):
        part = np.arange(0, 80, 2)
        small = Pool(task.pool.ids.take(part), task.pool.examples.take(part))
        selection = chosen(small)
        expected = small.ids.filter(pa.array(selection.selected)).to_pylist()
        assert task.pool.ids.take(selection.positions(task.pool)).to_pylist() == expected

    def test_stream_is_epochs_over_the_selected(self, task):
        selection, other = chosen(task.pool), permuted(task.pool)
        n = int(selection.selected.sum())
        for pool in (task.pool, other):
            taken = selection.stream(pool, seed=7).take(0, 2 * n)
            for epoch in (taken[:n], taken[n:]):
                assert sorted(epoch) == selection.positions(pool).tolist()

    def test_weighted_stream_draws_by_the_probability_of_the_id(self, task):
        selection = chosen(task.pool, weighted=True)
        expected = dict(zip(selection.ids.to_pylist(), selection.probability * selection.selected, strict=True))
        total = sum(expected.values())
        for pool in (task.pool, permuted(task.pool)):
            counts = np.bincount(selection.stream(pool, seed=7).take(0, 200_000), minlength=len(pool))
            for identity, count in zip(pool.ids.to_pylist(), counts, strict=True):
                share = expected[identity] / total
                assert abs(count / 200_000 - share) <= 5 * np.sqrt(share / 200_000)

    def test_apply_to_a_dataset_in_another_order(self, task):
        selection = chosen(task.pool)
        ids = [*permuted(task.pool).ids.to_pylist(), "one more"]
        dataset = datasets.Dataset.from_dict({"id": ids, "payload": [f"of {i}" for i in ids]})
        applied = selection.apply(dataset)
        wanted = set(selection.ids.filter(pa.array(selection.selected)).to_pylist())
        assert applied["id"] == [i for i in ids if i in wanted]
        assert applied["payload"] == [f"of {i}" for i in applied["id"]]

    def test_apply_reads_numbers_as_ids(self, task):
        pool = Pool([str(i) for i in range(80)], task.pool.examples)
        applied = chosen(pool).apply(datasets.Dataset.from_dict({"key": list(range(80))}), id_column="key")
        assert applied["key"] == list(range(0, 80, 3))

    def test_apply_says_what_is_missing(self, task):
        selection = chosen(task.pool)
        with pytest.raises(SelectionError, match=r"no column 'id'.*'name'"):
            selection.apply(datasets.Dataset.from_dict({"name": ["a"]}))
        with pytest.raises(SelectionError, match="27 selected ids are not in column 'id'"):
            selection.apply(datasets.Dataset.from_dict({"id": ["a"]}))

    def test_another_pool_is_refused(self, task):
        other = Pool([f"other-{i}" for i in range(80)], task.pool.examples)
        selection = chosen(task.pool)
        for use in (selection.positions, lambda p: selection.stream(p, 0), selection.sampler):
            with pytest.raises(SelectionError, match=r"27 selected ids are not in the pool.*use the pool"):
                use(other)

    def test_training_warns_if_ids_hold_and_contents_do_not(self, task, caplog):
        other = VisionConfig(
            hidden=16, n_pool=80, n_target=30, n_test=30, sources=[SOURCES[0], SyntheticSource("noisy")]
        )
        changed = other.build(TrainConfig(batch_size=8))
        selection = chosen(task.pool, ledger=Ledger(), budget=Budget(1, "epochs"))
        train(task, selection, selection.budget, seed=0)
        assert not caplog.records
        train(changed, selection, selection.budget, seed=0)
        assert "not those that the selection was made from" in caplog.text

    @pytest.mark.parametrize(("n_kept", "warned"), [(75, False), (76, True), (80, True)])
    def test_training_warns_if_nearly_all_is_kept(self, task, caplog, n_kept, warned):
        """Of 80 examples, 76 are 95 %."""
        ranker = Random(fraction=n_kept / 80)
        selection = ranker.select(task, Budget(1, "epochs"), seed=0, ledger=Ledger())
        assert selection.selected.sum() == n_kept
        train(task, selection, selection.budget, seed=0)
        assert bool(caplog.records) == warned
        if warned:
            said = f"random keeps {n_kept} of 80 examples, in effect {100 * n_kept / 80:.3g} % of the pool"
            assert said in caplog.text

    @pytest.mark.parametrize("name", ["full", "joint", "target-only", "cads"])
    def test_methods_that_mean_to_use_everything_do_not_warn(self, task, caplog, name):
        budget = Budget(4, "epochs")
        train(task, build_selector(name).select(task, budget, seed=0, ledger=Ledger()), budget, seed=0)
        assert not caplog.records

    def test_what_is_kept_is_told_by_weight(self, task, caplog):
        """Examples with little weight are as good as dropped."""
        probability = np.where(np.arange(80) < 40, 1.0, 1e-3)
        everything = {"selected": np.ones(80, dtype=bool), "weighted": True, "budget": Budget(1, "epochs")}
        few, all_of_them = (
            chosen(task.pool, ledger=Ledger(), probability=p, score=p, **everything)
            for p in (probability, 1 - 0.1 * probability)
        )
        assert few.effective_share == pytest.approx(0.5, abs=0.01)
        assert all_of_them.effective_share > 0.99
        train(task, few, few.budget, seed=0)
        assert not caplog.records
        train(task, all_of_them, few.budget, seed=0)
        assert "keeps 80 of 80 examples" in caplog.text

    @pytest.mark.parametrize(("share", "part"), [(0.01, "pool"), (0.99, "target"), (0.3, None)])
    def test_training_warns_of_a_share_that_is_rounded_away(self, task, caplog, share, part):
        selection = chosen(task.pool, ledger=Ledger(), budget=Budget(1, "epochs"), target_fraction=share)
        train(task, selection, selection.budget, seed=0)
        assert bool(caplog.records) == bool(part)
        if part:
            assert f"target_fraction = {share} of a batch of 8 is rounded" in caplog.text
            assert f"trains on the {part} alone" in caplog.text

    def test_ties_in_rank_break_by_id(self, task):
        score = np.repeat([1.0, 2.0], 40)
        selection = chosen(task.pool, score=score)
        ids = np.array(selection.ids.to_pylist())
        assert ids[np.argsort(selection.rank)].tolist() == sorted(ids[40:]) + sorted(ids[:40])
        order = np.random.default_rng(2).permutation(80)
        pool = Pool(task.pool.ids.take(order), task.pool.examples.take(order))
        assert (chosen(pool, score=score[order]).rank == selection.rank[order]).all()


class TestSampler:
    def test_an_epoch_is_every_selected_example_once(self, task):
        selection = chosen(task.pool)
        sampler = selection.sampler(task.pool, seed=5)
        first = list(sampler)
        assert len(sampler) == len(first) == 27
        assert sorted(first) == selection.positions(task.pool).tolist()
        sampler.set_epoch(1)
        second = list(sampler)
        assert sorted(second) == sorted(first)
        assert second != first
        sampler.set_epoch(0)
        assert list(sampler) == first

    def test_in_a_data_loader(self, task):
        loader = torch.utils.data.DataLoader(range(80), batch_size=10, sampler=chosen(task.pool).sampler(task.pool))
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(0, 80, 3))


class TestMixture:
    def test_shares_of_what_is_selected(self, task):
        selection = chosen(task.pool)
        clean = np.array(selection.sources) == "clean"
        share = (selection.selected & clean).sum() / selection.selected.sum()
        assert selection.mixture() == pytest.approx({"clean": share, "noisy": 1 - share})

    def test_shares_of_the_probability_if_weighted(self, task):
        probability = np.where(np.array(task.pool.sources) == 0, 1.0, 0.25)
        everything = np.ones(80, dtype=bool)
        selection = chosen(task.pool, selected=everything, probability=probability, weighted=True)
        assert selection.mixture() == pytest.approx({"clean": 0.8, "noisy": 0.2})

    def test_interleaves_datasets(self, task):
        mixture = chosen(task.pool).mixture()
        parts = [datasets.Dataset.from_dict({"source": [name] * 500}) for name in mixture]
        mixed = datasets.interleave_datasets(parts, probabilities=list(mixture.values()), seed=0)
        assert mixed["source"].count("clean") / len(mixed) == pytest.approx(mixture["clean"], abs=0.1)

    def test_refused_without_sources_or_selected_examples(self, task):
        with pytest.raises(SelectionError, match="no sources"):
            chosen(Pool(task.pool.ids, task.pool.examples)).mixture()
        with pytest.raises(SelectionError, match="selected nothing"):
            chosen(task.pool, selected=np.zeros(80, dtype=bool), target_fraction=1.0).mixture()


class TestWeights:
    def test_they_are_the_frequencies_with_which_training_draws_each_example(self, task):
        for weighted in (False, True):
            selection = chosen(task.pool, weighted=weighted)
            assert selection.weights.sum() == pytest.approx(1)
            drawn = np.bincount(selection.stream(task.pool, seed=7).take(0, 27 * 8000), minlength=80) / (27 * 8000)
            assert np.abs(drawn - selection.weights).max() <= 5 * np.sqrt(selection.weights.max() / (27 * 8000))
            assert ((drawn > 0) == (selection.weights > 0)).all()

    def test_shares_are_those_of_what_is_drawn_and_not_of_the_policy(self, task):
        """The full pool was not beaten by a policy that is sure of one source."""
        everything = np.ones(80, dtype=bool)
        selection = chosen(
            task.pool, selected=everything, probability=everything, source_probability={"clean": 0.039, "noisy": 0.961}
        )
        noisy = np.array(task.pool.sources) == 1
        assert selection.shares == pytest.approx({"clean": 1 - noisy.mean(), "noisy": noisy.mean()})
        assert selection.policy_probability == {"clean": 0.039, "noisy": 0.961}
        only_clean = replace(selection, selected=~noisy, probability=(~noisy).astype(float))
        assert only_clean.shares == {"clean": 1.0, "noisy": 0.0}
        assert only_clean.policy_probability == {"clean": 0.039, "noisy": 0.961}

    def test_examples_that_are_not_selected_have_no_share_however_probable_they_are(self, task):
        noisy = np.array(task.pool.sources) == 1
        selection = chosen(task.pool, selected=~noisy, probability=np.full(80, 0.9), weighted=True)
        assert selection.shares == {"clean": 1.0, "noisy": 0.0}
        assert selection.mixture() == selection.shares

    def test_a_selector_without_a_policy_has_no_policy_probability(self, task):
        selection = chosen(task.pool, source_probability={}, probability=np.arange(80) % 3 == 0)
        assert selection.policy_probability == {}
        by_example = chosen(task.pool, source_probability={})
        assert by_example.policy_probability == {name: mean for name, _, _, mean in by_example.source_counts()}

    def test_nothing_of_the_pool_has_no_weight(self, task):
        selection = chosen(task.pool, target_fraction=1.0)
        assert not selection.weights.any()
        assert selection.shares == {"clean": 0.0, "noisy": 0.0}

    def test_without_sources_there_are_no_shares(self, task):
        assert chosen(Pool(task.pool.ids, task.pool.examples)).shares == {}

    def test_weights_of_zero_are_refused(self, task):
        with pytest.raises(SelectionError, match="gives each selected example the weight 0"):
            chosen(task.pool, probability=np.where(np.arange(80) % 3 == 0, 0.0, 1.0), weighted=True)

    def test_the_table_shows_what_is_trained_on_beside_the_policy(self, task):
        noisy = np.array(task.pool.sources) == 1
        probability = np.where(noisy, 0.25, 1.0)
        selection = chosen(
            task.pool,
            selected=np.ones(80, dtype=bool),
            probability=probability,
            weighted=True,
            source_probability={"clean": 0.1, "noisy": 0.961},
            target_fraction=0.3,
        )
        table = printed(summary(selection))
        share = 0.25 * noisy.sum() / probability.sum()
        assert "share of training" in table
        assert "policy probability" in table
        assert re.search(rf"noisy .* {share:.1%} .* 0\.961", table)
        assert "30% of each batch from the target" in table
        without_policy = chosen(task.pool, source_probability={}, probability=np.arange(80) % 3 == 0)
        assert "policy" not in printed(summary(without_policy))
        assert re.search(r"\(all\) .* 100\.0%", printed(summary(chosen(Pool(task.pool.ids, task.pool.examples)))))
        alike = chosen(task.pool, notes={"likeness": {"shares": [0.5, 0.5], "weights": [0.3, 1.0]}})
        assert "least like the target is drawn 30% as often" in " ".join(printed(summary(alike)).split())


def printed(table):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class TestApplyWeights:
    @pytest.fixture
    def weighted(self, task):
        """A mixture of 61 to 39."""
        noisy = np.array(task.pool.sources) == 1
        probability = np.where(noisy, 0.39 / noisy.sum(), 0.61 / (~noisy).sum())
        everything = np.ones(80, dtype=bool)
        return chosen(task.pool, selected=everything, probability=probability / probability.max(), weighted=True)

    def rows(self, task, *sources):
        """The examples of some sources, as a data set."""
        names = [task.pool.source_names[code] for code in task.pool.sources]
        rows = [{"id": i, "from": s} for i, s in zip(task.pool.ids.to_pylist(), names, strict=True)]
        return [row for row in rows if not sources or row["from"] in sources]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_unequal_weights_are_refused_unless_it_is_said_what_becomes_of_them(self, task, weighted, streaming):
        dataset = datasets.Dataset.from_list(self.rows(task))
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        with pytest.raises(SelectionError, match=r'clean 61.0%, noisy 39.0%.*weights="column".*weights="resample"'):
            weighted.apply(dataset)
        with pytest.raises(SelectionError, match="weights = 'both': choose from"):
            weighted.apply(dataset, weights="both")
        by_id = dict(zip(weighted.ids.to_pylist(), weighted.weights, strict=True))
        rows = list(weighted.apply(dataset, weights="column"))
        assert {row["id"]: row["weight"] for row in rows} == by_id
        assert sum(row["weight"] for row in rows if row["from"] == "clean") == pytest.approx(0.61)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_resampled_rows_have_the_shares_of_training(self, task, weighted, streaming):
        dataset = datasets.Dataset.from_list(self.rows(task))
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        drawn = [row["from"] for seed in range(100) for row in weighted.apply(dataset, weights="resample", seed=seed)]
        assert len(drawn) == 8000
        assert drawn.count("clean") / 8000 == pytest.approx(0.61, abs=5 * np.sqrt(0.25 / 8000))

    def test_equal_weights_are_no_reason_to_resample(self, task):
        selection, dataset = chosen(task.pool), datasets.Dataset.from_list(self.rows(task))
        plain = selection.apply(dataset)
        assert plain.column_names == ["id", "from"]
        assert selection.apply(dataset, weights="resample")["id"] == plain["id"]
        assert selection.apply(dataset, weights="column")["weight"] == [1 / 27] * 27
        equal = replace(selection, probability=np.full(80, 0.3), weighted=True)
        assert equal.apply(dataset)["id"] == plain["id"]

    def test_a_column_of_weights_is_not_overwritten(self, task, weighted):
        dataset = datasets.Dataset.from_list([{**row, "weight": 0} for row in self.rows(task)])
        with pytest.raises(SelectionError, match="has a column 'weight' already"):
            weighted.apply(dataset, weights="column")

    def test_what_apply_cannot_give_is_said(self, task, caplog):
        dataset = datasets.Dataset.from_list(self.rows(task))
        nothing = chosen(task.pool, selected=np.zeros(80, dtype=bool), target_fraction=1.0)
        for use in (nothing.apply, lambda _: nothing.mixture(), lambda _: nothing.sampler(task.pool)):
            with pytest.raises(SelectionError, match=r"selected nothing of the pool.*use the rows of the target"):
                use(dataset)
        uses = {
            "apply": lambda s: s.apply(dataset, weights="column"),
            "sampler": lambda s: s.sampler(task.pool),
            "mixture": lambda s: s.mixture(),
        }
        begun = chosen(task.pool, target_fraction=0.3, weighted=True, trained=State({"step": 1}))
        for name, use in uses.items():
            caplog.clear()
            use(chosen(task.pool))
            assert not caplog.records
            use(begun)
            assert f"{name}() gives examples of the pool alone" in caplog.text
            assert "30 % of each batch" in caplog.text
            assert "Neither that model nor the course of the weights is among them" in caplog.text


class TestMaking:
    def test_nothing_selected_is_refused(self, task):
        with pytest.raises(SelectionError, match="made-up selected no example"):
            chosen(task.pool, selected=np.zeros(80, dtype=bool), target_fraction=0.5)

    @pytest.mark.parametrize(
        ("name", "values", "match"),
        [
            ("score", np.full(80, np.nan), "score has NaN"),
            ("score", np.full(80, -np.inf), "score has NaN or infinite"),
            ("score", np.zeros(79), "shape"),
            ("probability", np.full(80, 1.5), "between 0 and 1"),
            ("probability", np.full(80, -0.5), "between 0 and 1"),
            ("target_fraction", 2.0, "target_fraction = 2.0"),
            ("target_fraction", float("nan"), "target_fraction"),
        ],
    )
    def test_bad_values_are_refused(self, task, name, values, match):
        with pytest.raises(SelectionError, match=match):
            chosen(task.pool, **{name: values})
