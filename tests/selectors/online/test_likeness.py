"""Groups of the pool by likeness to the target, and what comes of them."""

import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.pool import Pool
from cads.errors import DataError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.selectors.online import likeness as likeness_module
from cads.selectors.online.likeness import LEAST, LIKENESS, N_GROUPS, NEAR, likeness, likeness_flops, shrunk_ratios
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED
from cads.selectors.online.selector import TARGET_AND_NEAR, Cads
from cads.selectors.online.strata import Strata
from cads.tasks.language.bag_of_tokens import N_BUCKETS
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.descriptors import N_DESCRIPTORS, describe_images, describing_flops
from cads.tasks.vision.synthetic_sources import SyntheticSource
from tests.support.forked_processes import chosen, same, spread
from tests.support.killed_runs import resumed
from tests.support.noisy_digits import RECIPE, without_sources
from tests.support.tiny_llama import model_folder, write_lines

SHIFTED = [SyntheticSource("plain", size=300), SyntheticSource("inverted", size=600, transform="invert")]
EPOCHS = 8


def digits(sources=SHIFTED, seed=0):
    return VisionConfig(hidden=64, n_target=60, n_test=150, sources=sources, data_seed=seed).build(RECIPE)


class Affordable(Cads):
    """Compares pool and target whatever that costs."""

    def constants(self, task):
        return replace(super().constants(task), most_comparing=1.0)


THEMES = {"first": "abcdef", "second": "ghijkl", "third": "mnopqr", "fourth": "stuvwx"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Makes tasks: a pool of the first three themes, 80 texts each, and a target of one theme.

    longest: letters of the longest text, of 24 at least; those of the third theme are longer by the same ratio.
    copies: of each text of the third theme.
    """
    folder = tmp_path_factory.mktemp("texts")
    model_folder(folder / "llama", "llama")
    rng, letters = np.random.default_rng(0), list("".join(THEMES.values()))

    def text(theme, longest):
        times = rng.uniform(1, longest / 24) * (longest / 24 if theme == "third" else 1)
        theirs, others = (rng.choice(x, round(times * n)) for x, n in ((list(THEMES[theme]), 14), (letters, 10)))
        return "".join([*theirs, *others])

    def task(theme, longest=24, copies=1):
        for name in ("first", "second", "third"):
            written = [text(name, longest) for _ in range(80)]
            # Of one theme there are copies.
            written *= copies if name == "third" else 1
            write_lines(folder / f"{name}.jsonl", [{"id": f"{name} {i}", "text": x} for i, x in enumerate(written)])
        rows = [{"id": f"target {i}", "text": text(theme, longest)} for i in range(80)]
        write_lines(folder / "target.jsonl", rows)
        pool = [TextSource(path=str(folder / f"{name}.jsonl"), name=name) for name in ("first", "second", "third")]
        target = [TextSource(path=str(folder / "target.jsonl"))]
        config = LanguageConfig(model=str(folder / "llama"), pool=pool, target=target, n_target=40, n_test=40)
        return config.build(TrainConfig(batch_size=8))

    return task


@pytest.fixture(scope="module")
def task():
    return digits()


def choose(task, epochs=EPOCHS, **options):
    ledger, selector = Ledger(), build_selector("cads", options)
    return selector.select(task, Budget(epochs, "epochs"), seed=0, ledger=ledger), ledger


class TestDescriptors:
    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 9, 12), (1, 7, 30)])
    def test_are_those_of_each_image(self, shape):
        pixels = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
        described = describe_images(torch.from_numpy(pixels))
        assert described.shape == (5, N_DESCRIPTORS)
        assert described.dtype == np.float32
        for one, row in zip(pixels, described, strict=True):
            grey = one.mean(axis=0) / 255
            if min(grey.shape) >= 8:
                height, width = (n // 2 for n in grey.shape)
                grey = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
            across, down = (np.abs(np.diff(grey, axis=axis)).sum() / grey.size for axis in (1, 0))
            square = (grey**2).mean()
            contrast = np.sqrt(max(square - row[:9].mean() ** 2, 1e-4))
            expected = [across, down, across / (down + 0.01), square, (across + down) / (contrast + 0.01)]
            np.testing.assert_allclose(row[9:], expected, rtol=1e-4, atol=1e-6)
            if grey.shape[0] % 3 == grey.shape[1] % 3 == 0:
                cells = grey.reshape(3, grey.shape[0] // 3, 3, grey.shape[1] // 3).mean(axis=(1, 3))
                np.testing.assert_allclose(row[:9], cells.ravel(), rtol=1e-4)

    def test_cost_little(self):
        assert describing_flops((1, 28, 28)) == 28 * 28 * 5.25 + 16
        assert describing_flops((3, 4, 4)) == 16 * 13 + 16


class TestRatios:
    def test_chance_is_no_difference(self):
        assert (shrunk_ratios(np.array([8, 9, 8, 7, 10, 8])) == 1).all()

    def test_are_those_of_the_counts_where_these_are_many(self):
        counts = np.array([0, 100, 1000, 1000, 1900, 2000])
        expected = np.clip(counts / 1000, 0, 1)
        np.testing.assert_allclose(shrunk_ratios(counts), expected, atol=0.01)

    @pytest.mark.parametrize("n", [2, 30, 500])
    def test_are_within_reach(self, n):
        for counts in np.random.default_rng(n).multinomial(n, [0.5, 0.3, 0.1, 0.05, 0.05, 0], size=50):
            weights = shrunk_ratios(counts)
            assert weights.max() == 1
            assert (weights >= 0).all()

    def test_samples_of_the_pool_keep_all_their_weight(self):
        """Of 500 draws from six equal groups, few look unlike them by chance."""
        draws = np.random.default_rng(0).multinomial(50, np.full(6, 1 / 6), size=500)
        assert np.mean([shrunk_ratios(counts).mean() for counts in draws]) > 0.98


class TestLikeness:
    def test_unlike_images_weigh_less(self, task):
        inverted = task.pool.sources == task.pool.source_names.index("inverted")
        alike = likeness(task, Strata.of(task), 0)
        weights = alike.weights[alike.codes]
        assert weights[inverted].mean() < 0.2
        assert weights[~inverted].mean() > 0.8

    @pytest.mark.parametrize("seed", range(4))
    def test_a_pool_like_the_target_is_left_alone(self, seed):
        task = digits([SyntheticSource("plain", size=900)], seed)
        alike = likeness(task, Strata.of(task), seed)
        assert alike is None or alike.weights.min() > 0.6

    def test_classes_that_the_pool_has_too_many_of_are_not_unlike(self):
        skewed = [SyntheticSource("all", size=150), SyntheticSource("few", size=250, classes=[0, 1])]
        task = digits(skewed)
        alike = likeness(task, Strata.of(task), 0)
        assert alike is None or alike.weights[alike.codes].mean() > 0.85

    def test_does_not_depend_on_the_order_of_files_or_on_chunks(self, task, monkeypatch):
        alike = likeness(task, Strata.of(task), 0)
        order = np.random.default_rng(0).permutation(len(task.pool))
        other = without_sources(task)
        other.pool = Pool(task.pool.ids.take(order), task.pool.examples.take(order))
        monkeypatch.setattr(likeness_module, "CHUNK", 97)
        again = likeness(other, Strata.of(other), 0)
        np.testing.assert_array_equal(again.weights, alike.weights)
        assert (again.codes == alike.codes[order]).mean() > 0.995

    def test_of_a_large_target_a_sample_is_compared(self, task, monkeypatch):
        whole, flops, described = likeness(task, Strata.of(task), 0), likeness_flops(task), []
        monkeypatch.setattr(likeness_module, "MOST_TARGET", 50)
        describe = task.descriptors

        def watched(pool, positions):
            described.append(len(positions) if pool is task.target else 0)
            return describe(pool, positions)

        monkeypatch.setattr(task, "descriptors", watched)
        alike = likeness(task, Strata.of(task), 0)
        assert sum(described) == 50 < len(task.target)
        assert likeness_flops(task) < flops
        assert np.abs(alike.weights - whole.weights).max() < 0.3

    def test_flops_are_those_of_one_pass(self, task):
        """Descriptors and one product for each example; all else, and once more the descriptors, is of a sample."""
        smaller = without_sources(task)
        smaller.pool = task.pool.subset(np.arange(450), "pool")
        per_example = task.descriptor_flops + 5 * 2 * N_DESCRIPTORS
        of_sample = task.descriptor_flops + 2 * (2 * N_DESCRIPTORS) ** 2 + 2 * 2 * N_DESCRIPTORS * 5
        assert likeness_flops(task) - likeness_flops(smaller) == pytest.approx(450 * (per_example + of_sample))


class TestTexts:
    def test_what_is_about_something_else_weighs_less(self, texts):
        task = texts("second")
        alike = likeness(task, Strata.of(task), 0)
        weights = alike.weights[alike.codes]
        about = np.array(task.pool.source_names)[task.pool.sources]
        assert weights[about == "second"].mean() > 0.9
        assert weights[about != "second"].mean() < LEAST + 0.05
        assert weights.min() == LEAST

    def test_a_pool_that_lacks_the_target_is_left_alone(self, texts):
        task = texts("fourth")
        alike = likeness(task, Strata.of(task), 0)
        assert alike is None or alike.weights.min() > 0.5

    def test_directions_are_those_of_naive_bayes(self):
        """With two tokens, texts of one token each, and nearly no smoothing: the log ratio of the shares."""
        rng = np.random.default_rng(0)
        x, y = (np.eye(2)[(rng.random(n) < share).astype(int)] for n, share in ((20_000, 0.2), (10_000, 0.6)))
        folds, parts = rng.integers(0, 2, len(x)), [rng.random(len(y)) < 0.5, np.full(len(y), True)]
        # The first leaves out fold 0 of the pool, the second fold 1.
        directions = likeness_module._Tokens.directions(x, np.full(len(x), 1 / len(x)), folds, y, parts)
        for k, part in enumerate(parts):
            expected = np.log(y[part].mean(axis=0) / x[folds != k].mean(axis=0))
            np.testing.assert_allclose(directions[k], expected, atol=0.01)

    def test_a_pool_that_is_like_the_target_is_not_divided(self, texts):
        """Texts are ranked by directions that saw neither them nor their scale."""
        hidden = without_sources(texts("second"))
        rng, whole, near = np.random.default_rng(1), hidden.pool, []
        for seed in range(6):
            theirs = rng.permutation(len(whole))
            hidden.target, hidden.pool = whole.subset(theirs[:60], "target"), whole.subset(theirs[60:], "pool")
            alike = likeness(hidden, Strata.of(hidden), seed, near=True)
            assert alike.weights.mean() > 0.9
            near.append((alike.codes == NEAR).mean())
        assert np.mean(near) > 0.5

    def test_copies_in_the_target_hide_nothing_of_its_kind(self, texts):
        hidden = without_sources(texts("second"))
        once = likeness(hidden, Strata.of(hidden), 0, near=True).codes == NEAR
        twice, n = copy.copy(hidden), len(hidden.target)
        ids = pa.array([f"{i}" for i in range(2 * n)])
        twice.target = Pool(ids, hidden.target.examples.take(np.repeat(np.arange(n), 2)), name="target")
        assert (likeness(twice, Strata.of(twice), 0, near=True).codes == NEAR).sum() > 0.8 * once.sum()

    def test_flops_are_those_of_one_pass(self, texts):
        """Shares and one product for each example; of a sample the same again, its sums, and two products."""
        task = texts("second")
        smaller = without_sources(task)
        smaller.pool = task.pool.subset(np.arange(90), "pool")
        pairs = 2 * task.costs.tokens_per_example(task.pool) * len(task.target)
        per_example = 2 * task.descriptor_flops + 2 * N_BUCKETS + (5 + 2 * 2) * N_BUCKETS
        assert likeness_flops(task) - likeness_flops(smaller) == pytest.approx(150 * per_example)
        of_near = likeness_flops(task, near=True) - likeness_flops(task)
        # The 240 texts, the same as a sample, and the target with itself.
        expected = (2 * 240 + 40) * (pairs + 4 * task.costs.tokens_per_example(task.pool))
        assert of_near == pytest.approx(expected + 40 * task.descriptor_flops)

    def test_are_drawn_by_likeness_without_sources(self, texts):
        """The target share follows from what is alike, and the run stays within its budget."""
        task = texts("second")
        hidden, budget = without_sources(task), Budget(6, "epochs")
        ledger = Ledger()
        selection = Cads().select(hidden, budget, seed=0, ledger=ledger)
        about = np.array(task.pool.source_names)[task.pool.sources]
        share = selection.probability[about == "second"].sum() / selection.probability.sum()
        assert share > 0.55
        assert ledger.entries[SELECT, LIKENESS].flops == likeness_flops(hidden, near=True)
        assert ledger.total().flops <= budget.flops(hidden)
        assert len(task.target) / (len(task.target) + len(task.pool)) < 0.15 < selection.target_fraction

    def test_those_of_the_targets_kind_are_found(self, texts):
        """And of no other theme; where the pool has none, none."""
        for theme, found in (("second", True), ("fourth", False)):
            task = texts(theme)
            hidden = without_sources(task)
            alike = likeness(hidden, Strata.of(hidden), 0, near=True)
            near = np.zeros(len(task.pool), bool) if alike is None else alike.codes == NEAR
            about = np.array(task.pool.source_names)[task.pool.sources]
            assert not found or near[about == theme].sum() > 60
            assert near[about != theme].mean() < 0.02

    def test_those_of_the_targets_kind_come_as_often_as_the_target(self, texts):
        """And no other text, where the budget does not pay for more; lengths do not decide how often one comes."""
        task = texts("second", longest=40)
        hidden, budget = without_sources(task), Budget(1, "epochs")
        ledger = Ledger()
        selection = Affordable().select(hidden, budget, seed=0, ledger=ledger)
        strata = Strata.of(hidden)
        near = likeness(hidden, strata, 0, near=True).codes == NEAR
        assert strata.n_groups > 1
        assert (selection.selected == near).all()
        assert selection.target_fraction == pytest.approx(len(task.target) / (len(task.target) + near.sum()))
        np.testing.assert_allclose(selection.probability, near, rtol=1e-12)
        assert selection.notes["likeness"]["near"] == near.sum()
        assert ledger.total().flops > 0.93 * budget.flops(hidden)
        few = Affordable().plan(hidden, Budget(0.5, "epochs"))
        assert (few.note, few.kept) == (TARGET_AND_NEAR, None)

    @pytest.mark.parametrize(("longest", "copies"), [(24, 1), (40, 1), (40, 3), (24, 3)])
    def test_the_target_leads_whatever_the_lengths(self, texts, longest, copies):
        """In a run that pays for all: by four visits of each text, where copies share theirs."""
        hidden, ledger = without_sources(texts("second", longest=longest, copies=copies)), Ledger()
        budget, task = Budget(3 / copies**0.5, "epochs"), hidden
        selection = Affordable().select(hidden, budget, seed=0, ledger=ledger)
        alike = likeness(hidden, Strata.of(hidden), 0, near=True)
        near, often = alike.codes == NEAR, selection.probability * np.bincount(codes := task.pool.content_codes)[codes]
        # Of the visits c of the target, which its kind has too, each other text has (c - 4) w.
        ratios = often[~near] / often[near][0] / alike.weights[alike.codes[~near]]
        np.testing.assert_allclose(ratios, ratios[0])
        visits = PRETRAINED.mixed_lead / (1 - ratios[0])
        assert PRETRAINED.mixed_lead < visits < 0.99 * PRETRAINED.stop_passes
        np.testing.assert_allclose(often[near], often[near][0])
        # Each visit has its price, and all are the whole budget.
        drawn = visits * selection.probability / often[near][0]
        update = task.costs.optimizer_step / task.recipe.batch_size
        spent = (
            drawn @ (task.costs.usages(task.pool) + update) + visits * (task.costs.usages(task.target) + update).sum()
        )
        assert spent == pytest.approx(budget.flops(task) - ledger.total(SELECT).flops)
        assert selection.target_fraction == pytest.approx(
            visits * len(task.target) / (visits * len(task.target) + drawn.sum())
        )
        # Batches are padded.
        assert ledger.total(TRAIN).usages == pytest.approx(visits * len(task.target) + drawn.sum(), rel=0.1)

    def test_a_pool_with_none_of_its_kind_leaves_a_small_budget_to_the_target(self, texts):
        hidden, budget = without_sources(texts("fourth")), Budget(0.5, "epochs")
        selection = Affordable().select(hidden, budget, seed=0, ledger=Ledger())
        assert selection.target_fraction == 1
        assert not selection.selected.any()

    @pytest.mark.parametrize("granularity", ["source", "example"])
    def test_where_sources_are_not_told_apart_examples_are_compared(self, texts, granularity):
        """But for one probability a source, which all its examples share."""

        ledger = Ledger()
        selection = Affordable(granularity).select(texts("second"), Budget(2, "epochs"), seed=0, ledger=ledger)
        assert not any(stage == "probe" for _, stage in ledger.entries)
        assert ((SELECT, LIKENESS) in ledger.entries) == (granularity == "example")
        assert ("likeness" in selection.notes) == (granularity == "example")

    def test_sources_that_are_told_apart_are_not_compared(self, texts):
        ledger = Ledger()
        Cads().select(texts("second"), Budget(20, "epochs"), seed=0, ledger=ledger)
        assert (SELECT, LIKENESS) not in ledger.entries
        assert any(stage == "probe" for _, stage in ledger.entries)


class TestRun:
    def test_unlike_images_are_drawn_less(self, task):
        hidden = without_sources(task)
        selection, ledger = choose(hidden)
        inverted = task.pool.sources == task.pool.source_names.index("inverted")
        probability = np.asarray(selection.probability)
        assert probability[inverted].mean() < 0.25 * probability[~inverted].mean()
        assert len(selection.notes["likeness"]["weights"]) == N_GROUPS
        assert sum(selection.notes["likeness"]["shares"]) == pytest.approx(1, abs=1e-3)
        assert json.loads(json.dumps(selection.notes)) == selection.notes
        budget = Budget(EPOCHS, "epochs")
        charged = ledger.entries[SELECT, LIKENESS].flops
        assert charged == likeness_flops(hidden) == Cads().plan(hidden, budget).entries[SELECT, LIKENESS].flops
        assert charged <= FROM_SCRATCH.most_comparing * budget.flops(hidden)
        assert ledger.total().flops <= budget.flops(hidden)

    def test_the_share_of_what_is_unlike_falls(self, task):
        hidden = without_sources(task)
        inverted = task.pool.sources == task.pool.source_names.index("inverted")

        class Blind(Cads):
            def constants(self, task):
                return replace(super().constants(task), most_comparing=0.0)

        share = {}
        for name, selector in {"blind": Blind(), "cads": Cads()}.items():
            selection = selector.select(hidden, Budget(EPOCHS, "epochs"), seed=0, ledger=Ledger())
            share[name] = selection.probability[inverted].sum() / selection.probability.sum()
        assert share["cads"] < 0.5 * share["blind"]

    def test_two_processes_compare_as_one(self, task, tmp_path):
        hidden = without_sources(task)

        def work():
            selection, _ = choose(hidden)
            return chosen(selection) | {"likeness": selection.notes["likeness"]["weights"]}

        same(spread(2, work, tmp_path), work())

    def test_given_sources_are_not_compared(self, task):
        assert (SELECT, LIKENESS) not in choose(task)[1].entries

    def test_a_single_source_tells_nothing(self):
        _, ledger = choose(digits([SyntheticSource("all", size=900)]))
        assert ledger.entries[SELECT, LIKENESS].flops > 0

    def test_a_budget_that_is_too_small_does_without(self, task):
        hidden = without_sources(task)
        epochs = 0.99 * likeness_flops(hidden) / FROM_SCRATCH.most_comparing / Budget(1, "epochs").flops(hidden)
        selection, ledger = choose(hidden, epochs)
        assert (SELECT, LIKENESS) not in ledger.entries
        assert "likeness" not in selection.notes

    def test_what_was_killed_goes_on(self, task, tmp_path):
        hidden = without_sources(task)
        selection, ledger = choose(hidden)
        assert "likeness" in selection.notes
        again, other = resumed(tmp_path, lambda: choose(hidden), kills=(2, 200))
        assert again.content_hash == selection.content_hash
        assert again.notes == selection.notes
        assert ledger.to_json(seconds=False) == other.to_json(seconds=False)


class TestGroups:
    @pytest.mark.parametrize("hidden", [True, False])
    def test_have_probabilities_of_their_own(self, task, hidden):
        task = without_sources(task) if hidden else task
        selection, ledger = choose(task, granularity="group")
        assert ledger.entries[SELECT, LIKENESS].flops > 0
        # Neither likelihoods nor anything else tells the examples of a class and a group apart.
        groups = N_GROUPS * len(task.classes) * (1 if hidden else 2)
        assert 2 < len(np.unique(np.asarray(selection.probability).round(9))) <= groups
        assert ledger.entries[TRAIN, "final model"].flops > 0

    def test_texts_have_groups_within_their_sources(self, texts):
        task = texts("second")
        selection, ledger = choose(task, 20, granularity="group")
        assert ledger.entries[SELECT, LIKENESS].flops > 0
        second = task.pool.sources == task.pool.source_names.index("second")
        probability = np.asarray(selection.probability)
        assert probability[second].mean() > 2 * probability[~second].mean()
        assert selection.notes["likeness"]["weights"][-1] == 1 > selection.notes["likeness"]["weights"][0]

    def test_examples_that_nothing_describes_have_none(self, features):
        with pytest.raises(DataError, match="use granularity = example, or source"):
            choose(features(batch_size=8, n=80), granularity="group")
