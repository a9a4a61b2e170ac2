"""CADS as it trains: one run, one budget."""

import copy
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.pool import Pool
from cads.errors import BudgetError, ConfigError, DataError
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.selection import Selection
from cads.selectors.online.history import PolicyHistory
from cads.selectors.online.schedule import PRETRAINED
from cads.selectors.online.selector import Cads
from cads.training.final import train
from tests.conftest import Rows
from tests.support.killed_runs import resumed
from tests.support.labelled_tasks import labelled
from tests.support.other_trainers import sums_task, write_sums
from tests.support.tiny_llama import write_lines

EPOCHS = 12


def choose(task, epochs=EPOCHS, seed=0, monitor=None, **options):
    ledger = Ledger()
    budget = Budget(epochs, "epochs")
    selection = build_selector("cads", options).select(task, budget, seed=seed, ledger=ledger, monitor=monitor)
    return selection, ledger


def assert_same_weights(one, other):
    for (name, x), (_, y) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture
def task(features):
    return labelled(features(batch_size=8, n=240, learning_rate=0.02))


class TestOneBudget:
    @settings(deadline=None, max_examples=25)
    @given(
        epochs=st.floats(0.1, 12),
        granularity=st.sampled_from(["source", "example"]),
        counted=st.booleans(),
        pretrained=st.booleans(),
        hidden=st.booleans(),
        on_target=st.booleans(),
    )
    def test_it_covers_everything(self, features, epochs, granularity, counted, pretrained, hidden, on_target):
        task = labelled(features(batch_size=8, n=80), pretrained)
        if hidden:
            task.pool = Pool(task.pool.ids, task.pool.examples)
            granularity = "example"
        budget = Budget(epochs, "epochs", count_selection=counted)
        ledger, selector = Ledger(), build_selector("cads", {"granularity": granularity, "train_on_target": on_target})
        selection = selector.select(task, budget, seed=0, ledger=ledger)
        total = budget.flops(task)
        spent = ledger.total(SELECT).flops + ledger.total(TRAIN).flops
        assert spent <= total * (1 + 1e-9)
        if not pretrained:
            # All but a step: only pretrained models may stop before.
            assert spent > total - 1.01 * 8 * task.costs.per_usage(task.pool, 8)
        planned = selector.plan(task, budget).total(SELECT).flops
        assert planned == pytest.approx(ledger.total(SELECT).flops)
        trained = train(task, selection, budget, seed=0)
        assert trained.ledger.total(TRAIN).flops == ledger.total(TRAIN).flops

    def test_less_than_a_step_is_refused(self, task):
        with pytest.raises(BudgetError, match="raise the budget or lower batch_size"):
            choose(task, 0.9 * 8 / 240)

    @pytest.mark.parametrize("epochs", [4, 40])
    def test_probes_are_a_small_share(self, task, epochs):
        _, ledger = choose(task, epochs)
        assert 0 < ledger.total(SELECT).flops <= 0.031 * ledger.total().flops

    def test_texts_cost_what_they_cost(self, texts):
        """Lengths differ, batches hold similar ones, and the budget holds."""
        task = texts(batch_size=8, n=160)
        task.pretrained = True
        selection, ledger = choose(task, 6)
        total = Budget(6, "epochs").flops(task)
        assert 0.5 * total < ledger.total().flops <= total
        assert set(selection.shares) == {"clean", "noisy"}
        assert ledger.entries[SELECT, "probe"].flops > 0
        assert ledger.entries[SELECT, "probe of the initial model"].flops > 0

    @pytest.mark.parametrize("epochs", [0.3, 0.35, 0.4, 0.5])
    def test_a_budget_for_the_target_alone_buys_nothing_else(self, tmp_path, epochs):
        """Even where what is left, since the next batch of the target is a long one, would buy a short one."""
        folder = write_sums(tmp_path)
        rows = [{"prompt": f"target {i}", "response": "7" * (40 if i % 4 == 0 else 1)} for i in range(16)]
        write_lines(folder / "target.jsonl", rows)
        task, ledger = sums_task(folder, batch_size=4), Ledger()
        selection = Cads().select(task, Budget(epochs, "epochs"), seed=0, ledger=ledger)
        assert selection.target_fraction == 1
        assert not selection.selected.any()
        dearest = 4 * task.costs.usages(task.target).max() + task.costs.optimizer_step
        assert Budget(epochs, "epochs").flops(task) - dearest < ledger.total().flops

    def test_sources_that_cannot_be_told_apart_share_alike(self, texts):
        """A budget that buys too few probes: nothing is measured, and the target's lead is mixed in from the start."""
        task = texts(batch_size=8, n=160)
        task.pretrained = True
        budget = Budget(2, "epochs")
        few = replace(PRETRAINED, most_probing=1e-4)
        selector = Cads()
        selector.constants = lambda task: few
        ledger = Ledger()
        selection = selector.select(task, budget, seed=0, ledger=ledger)
        assert ledger.total(SELECT).flops == selector.plan(task, budget).total(SELECT).flops == 0
        assert set(selection.source_probability.values()) == {1.0}
        assert len(np.unique(selection.probability)) == 1
        n_target, n_pool = len(task.target), len(task.pool)
        usages = ledger.total(TRAIN).usages
        of_target = selection.target_fraction * usages
        lead = of_target / n_target - (usages - of_target) / n_pool
        # Texts of the target are not as long as those of the pool: FLOPs are shared as planned, usages about so.
        assert lead == pytest.approx(few.mixed_lead, rel=0.15)
        assert ledger.total().flops <= budget.flops(task)


class TestTheRun:
    def test_the_model_is_the_one_that_was_trained(self, task):
        """Training on the Selection trains no step more: it gives the weights of the run."""
        selection, _ = choose(task)
        model = train(task, selection, Budget(EPOCHS, "epochs"), seed=0).model
        for name, x in selection.trained.tensors.items():
            if name.startswith("weights/"):
                assert torch.equal(x, model.state_dict()[name.removeprefix("weights/model.")])

    def test_it_is_trained_on_the_target_too(self, task):
        untrained = copy.copy(task)
        accuracies = []
        for epochs in (0.2, EPOCHS):
            selection, _ = choose(untrained, epochs)
            accuracies.append(train(task, selection, Budget(epochs, "epochs"), seed=0).metrics["loss"])
        assert accuracies[1] < accuracies[0]

    def test_same_seed_same_bits(self, task):
        one, other = (choose(task)[0] for _ in range(2))
        assert one.content_hash == other.content_hash
        assert one.content_hash != choose(task, seed=1)[0].content_hash

    def test_the_order_of_the_pool_changes_nothing(self, task):
        permuted = copy.copy(task)
        order = np.random.default_rng(0).permutation(len(task.pool))
        pool = task.pool
        permuted.pool = Pool(
            pool.ids.take(order), pool.examples.take(order), pool.sources[order], pool.source_names, name="pool"
        )
        one, other = choose(task)[0], choose(permuted)[0]
        assert one.shares == pytest.approx(other.shares)
        np.testing.assert_array_equal(one.probability[order], other.probability)
        budget = Budget(EPOCHS, "epochs")
        assert_same_weights(train(task, one, budget, seed=0).model, train(permuted, other, budget, seed=0).model)

    @pytest.mark.parametrize("kills", [(3, 9, 40), (60, 100, 101)])
    def test_a_run_that_was_killed_goes_on(self, task, tmp_path, kills):
        def work():
            selection, ledger = choose(task, 6)
            return selection, ledger, train(task, selection, Budget(6, "epochs"), seed=0)

        selection, ledger, outcome = work()
        again, other_ledger, other = resumed(tmp_path, work, kills=kills)
        assert again.content_hash == selection.content_hash
        assert again.notes == selection.notes
        assert ledger.to_json(seconds=False) == other_ledger.to_json(seconds=False)
        assert_same_weights(outcome.model, other.model)

    def test_texts_that_were_killed_go_on(self, texts, tmp_path):
        """In the middle of a window of batches that are sorted by length."""
        task = texts(batch_size=8, n=160)

        def work():
            return choose(task, 4)[0]

        assert resumed(tmp_path, work, kills=(20, 31)).content_hash == work().content_hash

    def test_micro_batches_give_the_same(self, features):
        losses = []
        for accumulate in (1, 3):
            task = labelled(features(batch_size=9, n=90, learning_rate=0.02, accumulate=accumulate))
            selection, _ = choose(task, 8)
            losses.append(selection.trained.tensors["losses"].numpy())
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

    def test_threads_that_load_change_nothing(self, features):
        loading, hashes = set(), []
        for workers in (0, 2):
            task = labelled(features(batch_size=8, n=240, workers=workers))
            read = task.pool.examples.batch

            def noting(positions, read=read):
                loading.add(threading.current_thread() is threading.main_thread())
                return read(positions)

            task.pool.examples.batch = noting
            hashes.append(choose(task, 6)[0].content_hash)
        assert hashes[0] == hashes[1]
        assert loading == {True, False}

    def test_saved_and_read_it_trains_to_the_same(self, task, tmp_path):
        selection, _ = choose(task)
        loaded = Selection.load(selection.save(tmp_path / "s"))
        assert loaded.content_hash == selection.content_hash
        budget = Budget(EPOCHS, "epochs")
        assert_same_weights(*(train(task, s, budget, seed=0).model for s in (selection, loaded)))


class TestWhatIsLearned:
    @pytest.mark.parametrize("granularity", ["source", "example"])
    def test_sources_with_more_noise_get_less(self, features, granularity):
        task = labelled(features(batch_size=8, n=800, learning_rate=0.02))
        shares = list(choose(task, 8, granularity=granularity)[0].shares.values())
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 2 * shares[-1]

    def test_examples_with_wrong_labels_get_less(self, features):
        """Without sources: the weight of an example is the probability that its label is right."""
        task = labelled(features(batch_size=8, n=800, learning_rate=0.02))
        rows, labels = task.pool.examples.rows, task.pool.examples.labels
        wrong = labels != rows[:, :3].argmax(axis=1)
        task.pool = Pool(task.pool.ids, task.pool.examples)
        selection, _ = choose(task, 8)
        assert selection.probability[~wrong].mean() > 2 * selection.probability[wrong].mean()

    def test_copies_count_once(self, features):
        """A source of one example, repeated, weighs as one."""
        task = labelled(features(batch_size=8, n=200))
        rows, labels = task.pool.examples.rows.copy(), task.pool.examples.labels.copy()
        rows[:50], labels[:50] = rows[0], labels[0]
        task.pool = Pool(
            task.pool.ids, Rows(rows, labels, task.pool.examples.lengths), task.pool.sources, task.pool.source_names
        )
        assert choose(task, 6)[0].shares["source 0"] < 0.1

    def test_the_target_may_steer_alone(self, features):
        """As published: no example of the target is trained on, and yet sources with more noise get less."""
        task = labelled(features(batch_size=8, n=800, learning_rate=0.02))
        drawn = []
        batch = task.target.batch
        task.target = copy.copy(task.target)
        task.target.batch = lambda positions: drawn.append(len(positions)) or batch(positions)
        selection, ledger = choose(task, 8, train_on_target=False)
        assert selection.target_fraction == 0
        steering = ledger.entries[SELECT, "theta"]
        assert sum(drawn) <= steering.usages + 8 + 60
        assert ledger.total(SELECT).flops <= 0.08 * ledger.total().flops
        shares = list(selection.shares.values())
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 2 * shares[-1]

    def test_probabilities_move_while_it_trains(self, task):
        course = choose(task)[0].notes["course"]
        assert len(course["step"]) > 3
        first, last = course["source_shares"][0], course["source_shares"][-1]
        assert np.abs(np.subtract(first, last)).max() > 0.05
        json.dumps(course)

    def test_a_budget_for_the_target_alone(self, features):
        """A target that three quarters of the budget do not teach is all that is trained on."""
        task = labelled(features(batch_size=8, n=80))
        selection, ledger = choose(task, 2)
        assert not ledger.total(SELECT).flops
        assert selection.target_fraction == 1
        assert not selection.selected.any()

    def test_pretrained_models_stop_before_they_repeat_too_much(self, features, caplog):
        task = labelled(features(batch_size=8, n=80), pretrained=True)
        selection, ledger = choose(task, 100)
        usages = ledger.total(TRAIN).usages
        assert usages <= 8 * (80 + 60) + 8 * 60
        assert Cads().constants(task).stop_passes == 8
        assert usages * task.costs.per_usage(task.pool, 8) <= Cads().plan(task, Budget(100, "epochs")).most_training
        assert selection.notes["end"].startswith("training ended after 8 passes")
        assert "training ends after 8 passes" in caplog.text
        assert "end" not in choose(task, 3)[0].notes


class Recorder:
    """A monitor that keeps what it is given."""

    def __init__(self):
        self.scalars, self.texts = {}, []

    def scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def status(self, text):
        self.texts.append(text)

    def probabilities(self, names, values, step):
        for name, value in zip(names, values, strict=True):
            self.scalar(f"policy_probability/{name}", value, step)


class TestWhatIsSeen:
    def test_every_quantity_has_a_curve(self, task, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with Monitor(tmp_path) as monitor:
            choose(task, monitor=monitor)
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        wanted = {"target_share", "effective_pool_size", "target_model_loss", "loss_within_reach", "gap", "entropy"}
        assert {tag for tag in tags if tag.startswith("outer/")} == {f"outer/{name}" for name in wanted}
        for s in range(4):
            kinds = ("policy_probability", "signal", "signal_stderr", "wrong_labels")
            assert {f"{kind}/source {s}" for kind in kinds} <= tags
        assert {f"share_of_group/{g}" for g in range(3)} <= tags
        shares = np.array([[e.value for e in events.Scalars(f"policy_probability/source {s}")] for s in range(4)])
        np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)
        steps = [e.step for e in events.Scalars("outer/gap")]
        assert steps == sorted(steps)
        assert len(steps) > 50

    def test_one_line_says_what_it_is_doing(self):
        from cads.selectors.online.history import HistoryPoint

        recorder = Recorder()
        history = PolicyHistory(recorder, ["clean", "noisy", "junk"], np.array([10, 10, 20]), np.ones(1), 10, 0)
        zeros = np.zeros(3)
        point = HistoryPoint(np.array([0.7, 0.28, 0.02]), zeros, zeros, zeros, 0.25, 17.0, 2.0, 1.5)
        history.step(lambda: point)
        assert recorder.texts == ["3 sources, 2 in use: clean 70%, noisy 28%, junk 2%; target 25% of each batch"]
        assert recorder.scalars["outer/gap"] == [(1, 0.5)]


@pytest.mark.parametrize(("name", "granularity"), [("cads-s", "source"), ("cads-e", "example")])
def test_a_granularity_goes_by_a_name_too(task, name, granularity):
    ledger = Ledger()
    named = build_selector(name).select(task, Budget(EPOCHS, "epochs"), seed=0, ledger=ledger)
    chosen, spent = choose(task, granularity=granularity)
    assert named.method == name
    assert named.config == chosen.config
    assert np.array_equal(named.probability, chosen.probability)
    assert ledger.total().flops == spent.total().flops


class TestRefused:
    def test_an_unknown_granularity(self):
        with pytest.raises(ConfigError, match="granularity = 'batch': choose from"):
            build_selector("cads", {"granularity": "batch"})

    @pytest.mark.parametrize(("name", "other"), [("cads-s", "example"), ("cads-e", "source")])
    def test_a_granularity_that_the_name_rules_out(self, name, other):
        with pytest.raises(ConfigError, match=f"granularity = '{other}': choose from"):
            build_selector(name, {"granularity": other})

    def test_sources_that_are_not_there(self, features):
        task = features(batch_size=8)
        task.pool = Pool(task.pool.ids, task.pool.examples)
        with pytest.raises(DataError, match="has no sources"):
            choose(task, granularity="source")
