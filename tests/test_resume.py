"""A run that was killed and gone on with equals one that was not, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from scipy.stats import sem

from cads import journal as journal_module
from cads.budget import SELECT, TRAIN, Budget, Ledger
from cads.checkpoint import CheckpointConfig, State
from cads.cli import main
from cads.draws import Draws, Epochs
from cads.errors import CheckpointError, ConfigError, NonFiniteError
from cads.inner import Inner
from cads.interrupt import Interrupted, Interrupts
from cads.journal import Journal, Progress, in_shards, perform
from cads.monitor import Monitor
from cads.outcome import train_on
from cads.record_store import FINISHED
from cads.registry import SELECTORS, build_selector, names
from cads.tasks.sources import SourceSpec
from cads.tasks.vision import VisionConfig
from cads.trainer import MOST_SKIPPED, TrainConfig, Trainer
from experiments import chaos

EVERY_STEP = CheckpointConfig(every_seconds=None, every_steps=1)
IDENTITY = {"seed": 0}


def killed(work, steps: int) -> bool:
    """Do `work` in a child process that is killed (SIGKILL) after `steps` steps; returns whether it ended before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            left = iter(range(steps))
            step = journal_module._Underway.step

            def mortal(self, state):
                step(self, state)
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            journal_module._Underway.step = mortal
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return not os.WIFSIGNALED(status)


def resumed(tmp_path, work, every=EVERY_STEP, kills=(0, 3, 5)):
    """What `work` returns after it was killed some times in one journal, and gone on with."""

    def journaled():
        with Journal(tmp_path / "journal", IDENTITY, every).open():
            return work()

    for steps in kills:
        killed(journaled, steps)
    return journaled()


def step_flops(task):
    return task.costs.usage(task.pool.batch(np.arange(task.recipe.batch_size))) + task.costs.optimizer_step


def trained(task, *, replicas=1, steps=12, scaler=None):
    """Fit of a fresh trainer, and its ledger."""
    ledger = Ledger()
    trainer = Trainer(task, ledger)
    if scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scaler, growth_interval=3)
    streams = [Epochs(np.arange(k, len(task.pool), k + 1), k) for k in range(replicas)]
    draws = Draws(task.pool, streams, task.recipe.batch_size, target=task.target, target_fraction=0.25)
    models = [task.model(0) for _ in streams]
    flops = (steps + 0.5) * step_flops(task)
    if replicas == 1:
        fit = trainer.fit(models[0], draws, flops, seed=1, phase=TRAIN, stage="final model")
    else:
        fit = trainer.fit_replicas(models, draws, flops, seed=1, phase=SELECT, stage="short runs")
    return fit, ledger


def same_fit(one, other):
    (fit, ledger), (again, other_ledger) = one, other
    np.testing.assert_array_equal(fit.losses, again.losses)
    np.testing.assert_array_equal(fit.flops, again.flops)
    np.testing.assert_array_equal(fit.diverged, again.diverged)
    assert fit.skipped == again.skipped
    assert ledger.to_json(seconds=False) == other_ledger.to_json(seconds=False)
    for model, twin in zip(fit.models, again.models, strict=True):
        assert model.training == twin.training
        for (name, x), (_, y) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
            assert torch.equal(x, y), name


class TestTraining:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("replicas", [1, 3])
    @pytest.mark.parametrize("way", ["batched", "loop"])
    def test_dense_models(self, features, tmp_path, optimizer, replicas, way):
        task = features(dropout=0.3, batch_size=8, optimizer=optimizer, replicas=way, learning_rate=0.02)
        same_fit(trained(task, replicas=replicas), resumed(tmp_path, lambda: trained(task, replicas=replicas)))

    def test_texts_of_unequal_lengths(self, sentences, tmp_path):
        task = sentences(batch_size=4, accumulate=2)
        same_fit(trained(task), resumed(tmp_path, lambda: trained(task)))

    def test_running_means_of_batch_normalisation(self, features, tmp_path):
        task = features(batch_size=8)
        build = task._build
        task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        same_fit(trained(task, replicas=2), resumed(tmp_path, lambda: trained(task, replicas=2)))

    @pytest.mark.parametrize("scale", [2.0**10, 2.0**127])
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_the_scale_of_the_loss_goes_on(self, features, tmp_path, scale, optimizer):
        task = features(batch_size=8, optimizer=optimizer)
        same_fit(trained(task, scaler=scale), resumed(tmp_path, lambda: trained(task, scaler=scale)))

    def test_steps_that_the_scaler_has_skipped_are_counted_on(self, features, tmp_path):
        task = features(batch_size=8)
        plain = task.losses
        task.losses = lambda model, batch: plain(model, batch) + (0 * next(model.parameters()).sum()).sqrt()

        def work():
            with pytest.raises(NonFiniteError) as caught:
                trained(task, steps=60, scaler=2.0**10)
            return caught.value

        assert resumed(tmp_path, work).step == work().step == MOST_SKIPPED

    @pytest.mark.parametrize("every", [1, 2, 5, 100])
    def test_whatever_the_interval(self, features, tmp_path, every):
        task = features(batch_size=8)
        config = CheckpointConfig(every_seconds=None, every_steps=every)
        same_fit(trained(task), resumed(tmp_path, lambda: trained(task), config, kills=(4, 4, 4)))

    def test_nothing_is_trained_twice(self, features, tmp_path):
        """Of 12 steps with a checkpoint after each, killed after 5, the second process takes 7."""
        task = features(batch_size=8)
        plain, calls = task.training_losses, []
        task.training_losses = lambda *given: calls.append(1) or plain(*given)
        resumed(tmp_path, lambda: trained(task), kills=(4,))
        assert len(calls) == 7
        resumed(tmp_path, lambda: trained(task), kills=())
        assert len(calls) == 7

    def test_frozen_weights_are_not_written(self, features, tmp_path):
        def work():
            task = features(batch_size=8, hidden=64)
            model = task.model(0)
            model[0].requires_grad_(False)
            draws = Draws(task.pool, [Epochs(np.arange(200), 0)], 8)
            flops = 8 * step_flops(task)
            return Trainer(task, Ledger()).fit(model, draws, flops, seed=0, phase=TRAIN, stage="s"), Ledger()

        same_fit(work(), resumed(tmp_path, work))
        with Journal(tmp_path / "other", IDENTITY, EVERY_STEP).open() as journal:
            work()
            ((_, _, tensors),) = journal.store.checkpoints.read(FINISHED)
            names = set(tensors.load())
        assert {n for n in names if "weights" in n} == {"0/weights/model.2.weight", "0/weights/model.2.bias"}

    def test_curves_are_whole_in_the_last_process(self, features, tmp_path):
        class Curve(Monitor):
            def __init__(self):
                super().__init__()
                self.points = []

            def scalar(self, tag, value, step):
                self.points.append((tag, step, pytest.approx(value)))

        task = features(batch_size=8)

        def work():
            curve = Curve()
            trainer = Trainer(task, Ledger(), curve)
            draws = Draws(task.pool, [Epochs(np.arange(200), 0)], 8)
            trainer.fit(task.model(0), draws, 9 * step_flops(task), seed=0, phase=TRAIN, stage="s")
            return curve.points

        assert resumed(tmp_path, work) == work()


class TestFailures:
    def poisoned(self, features, **recipe):
        task = features(batch_size=8, sources=0, **recipe)
        task.pool.examples.rows[5::40] = np.inf
        return task

    def work(self, task, steps=30):
        ledger = Ledger()
        draws = Draws(task.pool, [Epochs(np.arange(1, 200), 0)], 8)
        fit = Trainer(task, ledger).fit(
            task.model(0), draws, (steps + 0.5) * step_flops(task), seed=0, phase=TRAIN, stage="s"
        )
        return fit, ledger

    def test_a_failure_is_the_same_and_keeps_the_last_good_state(self, features, tmp_path):
        task = self.poisoned(features)

        def failing():
            with pytest.raises(NonFiniteError) as caught:
                self.work(task)
            return str(caught.value), caught.value.step, caught.value.ids

        plain = failing()
        folder = tmp_path / "journal"
        with Journal(folder, IDENTITY, EVERY_STEP).open():
            assert failing() == plain
        journal = Journal(folder, IDENTITY, EVERY_STEP)
        ((_, _, tensors),) = journal.store.checkpoints.read(FINISHED)
        state = tensors.load("0/")
        assert all(x.isfinite().all() for n, x in state.items() if n.startswith(("weights", "optimizer")))
        assert any(n.endswith("exp_avg_sq") for n in state) or plain[1] == 0
        with journal.open():
            assert failing() == plain

    def test_a_bad_batch_is_skipped_paid_for_and_counted(self, features, tmp_path):
        task = self.poisoned(features, non_finite="skip")
        fit, ledger = self.work(task)
        draws = Draws(task.pool, [Epochs(np.arange(1, 200), 0)], 8)
        bad = [not np.isfinite(draws.batches(t)[0].inputs["x"].numpy()).all() for t in range(30)]
        assert 0 < sum(bad) < 30
        assert fit.skipped == sum(bad)
        assert np.isnan(fit.losses[:, 0]).tolist() == bad
        assert len(fit.losses) == 30
        assert ledger.total().flops == pytest.approx(30 * step_flops(task))
        assert np.isfinite(fit.training_loss).all()
        assert all(p.isfinite().all() for p in fit.models[0].parameters())
        same_fit((fit, ledger), resumed(tmp_path, lambda: self.work(task), kills=(6, 9)))

    @pytest.mark.parametrize("normalised", [False, True])
    def test_a_skipped_batch_moves_nothing(self, features, normalised):
        """Weights and running means are those of training on the good batches alone."""
        task = features(batch_size=8, sources=0, non_finite="skip", schedule="constant", warmup=0.0)
        if normalised:
            build = task._build
            task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        draws = Draws(task.pool, [Epochs(np.arange(200), 0)], 8)
        plain = draws.batches

        def spoilt(step):
            pieces = plain(step)
            if step != 2:
                return pieces
            return [p.map(lambda x: x * np.nan if x.is_floating_point() else x) for p in pieces]

        def without(step):
            return plain(step + (step >= 2))

        models = []
        for batches, steps in ((spoilt, 7), (without, 6)):
            draws.batches = batches
            trainer = Trainer(task, Ledger())
            flops = (steps + 0.5) * step_flops(task)
            models.append(trainer.fit(task.model(0), draws, flops, seed=0, phase=TRAIN, stage="s").models[0])
        for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert torch.equal(one, other), name
            assert one.isfinite().all()

    def test_nothing_but_bad_batches_is_given_up(self, features):
        task = features(batch_size=8, sources=0, non_finite="skip")
        task.pool.examples.rows[:] = np.nan
        with pytest.raises(NonFiniteError, match=f"after {MOST_SKIPPED} batches skipped in a row") as caught:
            self.work(task)
        assert caught.value.step == MOST_SKIPPED

    def test_skipping_with_loss_scaling(self, features, tmp_path):
        task = self.poisoned(features, non_finite="skip")
        same_fit(trained(task, scaler=1024.0), resumed(tmp_path, lambda: trained(task, scaler=1024.0)))

    def test_batched_replicas_cannot_skip(self):
        with pytest.raises(ConfigError, match="replicas = 'auto' or 'loop'"):
            TrainConfig(non_finite="skip", replicas="batched")
        with pytest.raises(ConfigError, match="non_finite = 'ignore'"):
            TrainConfig(non_finite="ignore")

    @pytest.mark.parametrize("way", ["batched", "loop"])
    def test_a_diverged_replica_is_never_averaged_in(self, features, tmp_path, way):
        task = features(batch_size=8, replicas=way)
        task.pool.examples.rows[:20] = np.inf
        streams = [Epochs(np.arange(20, 200), 0), Epochs(np.arange(40), 0), Epochs(np.arange(30, 200), 0)]

        def work():
            inner = Inner(task, Ledger(), Monitor())
            return inner.run(streams, 12 * step_flops(task), seed=0, stage="short runs"), inner.ledger

        runs, ledger = work()
        assert np.isnan(runs.objective).tolist() == [False, True, False]
        assert np.isnan(runs.reached).tolist() == [False, True, False]
        again, other = resumed(tmp_path, work)
        np.testing.assert_array_equal(runs.objective, again.objective)
        np.testing.assert_array_equal(runs.reached, again.reached)
        assert ledger.to_json(seconds=False) == other.to_json(seconds=False)


BUDGET = Budget(8, "epochs")
SOURCES = [SourceSpec("clean"), SourceSpec("noisy", label_noise=0.9)]
SPENDERS = sorted({*names(SELECTORS)} - {"full", "joint", "random", "source", "target-only", "bm25"})
"""All that train or score something on images."""


@pytest.fixture(scope="module")
def digits():
    config = VisionConfig(hidden=16, n_pool=80, n_target=30, n_test=30, sources=SOURCES)
    return config.build(TrainConfig(batch_size=8))


class TestSelectors:
    @pytest.mark.parametrize("name", SPENDERS)
    def test_a_selection_is_the_same_byte_by_byte(self, digits, tmp_path, name):
        def work():
            ledger = Ledger()
            selection = build_selector(name).select(digits, BUDGET, seed=0, ledger=ledger)
            assert selection.ledger.to_json() == ledger.to_json()
            return selection

        config = CheckpointConfig(every_seconds=None, every_steps=7)
        work().save(tmp_path / "one")
        resumed(tmp_path, work, config, kills=(1, 5, 20, 40, 60)).save(tmp_path / "two")
        for file in ("selection.json", "scores.parquet"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    def test_errors_of_runs_are_those_of_paired_differences(self, digits, tmp_path):
        def work():
            streams = [Epochs(np.arange(k, len(digits.pool), k + 1), k) for k in range(3)]
            return Inner(digits, Ledger(), Monitor()).run(streams, 60 * step_flops(digits), seed=0, stage="short runs")

        runs, again = work(), resumed(tmp_path, work, kills=(5, 12))
        each = [digits.metrics_by_example(model, digits.target)[digits.outer] for model in runs.models]
        assert runs.objective == pytest.approx([x.mean() for x in each])
        assert runs.errors == pytest.approx([sem(x - each[0]) for x in each])
        assert runs.errors[1] > runs.errors[0] == 0
        np.testing.assert_array_equal(runs.errors, again.errors)

    def test_all_of_it_comes_from_the_journal_if_all_of_it_is_there(self, digits, tmp_path, monkeypatch):
        def work():
            return build_selector("cads-s").select(digits, BUDGET, seed=0, ledger=Ledger())

        first = resumed(tmp_path, work, kills=())
        monkeypatch.setattr(digits, "training_losses", lambda *_: pytest.fail("trained again"))
        monkeypatch.setattr(digits, "metrics", lambda *_: pytest.fail("measured again"))
        again = resumed(tmp_path, work, kills=())
        assert again.table().equals(first.table())
        assert again.ledger.total().seconds == pytest.approx(first.ledger.total().seconds, rel=0.2)

    def test_the_final_model(self, digits, tmp_path):
        selection = build_selector("random").select(digits, BUDGET, seed=0, ledger=Ledger())

        def work():
            outcome = train_on(digits, selection, BUDGET, seed=0)
            return (outcome.fit, outcome.ledger), outcome.metrics

        (fit, metrics), (again, same) = work(), resumed(tmp_path, work, kills=(3, 30))
        same_fit(fit, again)
        assert metrics == same

    def test_a_disk_that_is_full_at_the_end_is_said(self, digits, tmp_path, monkeypatch):
        selection = build_selector("random").select(digits, BUDGET, seed=0, ledger=Ledger())
        outcome = train_on(digits, selection, Budget(1, "epochs"), seed=0)

        def full(*_, **__):
            raise SafetensorError("No space left on device")

        monkeypatch.setattr(digits, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*: make room"):
            outcome.save(tmp_path)
        assert not (tmp_path / "results.json").exists()


class TestJournal:
    def journal(self, tmp_path, config=EVERY_STEP, **identity):
        return Journal(tmp_path / "journal", {**IDENTITY, **identity}, config)

    def do(self, log, value, ledger=None, arguments=()):
        def compute(_):
            log.append(value)
            ledger is None or ledger.charge(SELECT, "s", value)
            return State({"value": value}, {"x": torch.full((2,), float(value))})

        return perform("doing", list(arguments), ledger or Ledger(), compute)

    def test_what_is_done_answers_with_its_charges(self, tmp_path):
        values = [0.1, 0.2, 0.3]
        ledgers = [Ledger(), Ledger(), Ledger()]
        log = []
        for value in values:
            self.do(log, value, ledgers[0])
        for ledger in ledgers[1:]:
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                states = [self.do(log, value, ledger) for value in values]
        assert log == values * 2
        assert [s.values["value"] for s in states] == values
        assert [s.tensors["x"].tolist() for s in states] == torch.tensor(values)[:, None].expand(3, 2).tolist()
        assert {x.total().flops for x in ledgers} == {0.1 + 0.2 + 0.3}, "sums are equal to the last bit"

    def test_a_run_that_does_something_else_is_refused(self, tmp_path):
        for arguments in ([1], [2]):
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                if arguments == [1]:
                    self.do([], 1, arguments=arguments)
                else:
                    with pytest.raises(CheckpointError, match=r"operation 0 .* does not repeat the one before"):
                        self.do([], 1, arguments=arguments)

    def test_operations_within_one_are_part_of_it(self, tmp_path):
        def outer(_):
            return State({"sum": sum(self.do(log, v).values["value"] for v in (1, 2))})

        for expected in ([1, 2, 3], []):
            log = []
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                assert perform("outer", [], Ledger(), outer).values["sum"] == 3
                self.do(log, 3)
            assert log == expected

    def test_another_run_is_refused_by_what_differs(self, tmp_path):
        with self.journal(tmp_path, settings={"train": {"batch_size": 8}}).open() as journal:
            self.do([], 1)
            journal.store.flush()
        with pytest.raises(CheckpointError, match=r"settings\.train\.batch_size was 8, now 16"):
            self.journal(tmp_path, settings={"train": {"batch_size": 16}})
        with pytest.raises(CheckpointError, match="pool was None, now 'abc'"):
            self.journal(tmp_path, settings={"train": {"batch_size": 8}}, pool="abc")

    def test_finished_shards_survive(self, tmp_path):
        done = []

        def shard(ledger, last):
            def score(i):
                if i == last:
                    raise RuntimeError("the machine is gone")
                done.append(i)
                ledger.charge(SELECT, "scores", 0.1, tokens=i)
                return np.arange(i, dtype=np.float64)

            return score

        plain = Ledger()
        expected = in_shards("scores", [], plain, 6, shard(plain, None))
        done.clear()
        for last in (2, 4, None):
            ledger = Ledger()
            with contextlib.suppress(RuntimeError), self.journal(tmp_path).open():
                found = in_shards("scores", [], ledger, 6, shard(ledger, last))
        assert done == [0, 1, 2, 3, 4, 5]
        np.testing.assert_array_equal(found, expected)
        assert ledger.total().flops == plain.total().flops
        assert ledger.total().tokens == plain.total().tokens == 15

    def halves(self, tmp_path, taken, last=None):
        """An operation, and a pass of four shards that fails at `last`."""
        ledger = Ledger()

        def shard(i):
            if i == last:
                raise ZeroDivisionError
            taken.append(i)
            return np.full(1, i)

        with self.journal(tmp_path).open():
            self.do([], 1, ledger)
            return in_shards("pass", [], ledger, 4, shard).tolist()

    def test_where_a_pass_was_outlives_a_damaged_record_of_what_came_before(self, tmp_path):
        taken = []
        with pytest.raises(ZeroDivisionError):
            self.halves(tmp_path, taken, last=2)
        (tmp_path / "journal" / "000001-finished" / "values.json").write_text("{}")
        assert self.halves(tmp_path, taken) == taken == [0, 1, 2, 3]

    def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(self, tmp_path, monkeypatch, caplog):
        def full(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        monkeypatch.setattr("cads.checkpoint.remove_folder", full)
        assert self.halves(tmp_path, []) == [0, 1, 2, 3]
        assert "cannot be removed" in caplog.text

    def test_without_a_journal_nothing_is_kept(self):
        seen = []
        perform("doing", [], Ledger(), lambda progress: seen.append(type(progress)) or State())
        assert seen == [Progress]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_step_is_finished_and_written(self, features, tmp_path, number):
        task = features(batch_size=8)
        interrupts = Interrupts()
        plain, calls = task.training_losses, []

        def losses(*given):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), number)
            return plain(*given)

        task.training_losses = losses
        never = CheckpointConfig(every_seconds=None)
        before = signal.getsignal(number)

        def stopped():
            with interrupts.listen(), Journal(tmp_path / "journal", IDENTITY, never, interrupts).open():
                trained(task)

        with pytest.raises(Interrupted, match="goes on from here") as caught:
            stopped()
        assert caught.value.status == 128 + number
        assert signal.getsignal(number) is before
        assert len(calls) == 5
        again = resumed(tmp_path, lambda: trained(task), never, kills=())
        assert len(calls) == 12
        same_fit(trained(task), again)

    def test_what_has_just_finished_is_not_lost(self, tmp_path, monkeypatch):
        """A signal when all is computed, and not yet noted."""
        interrupts, done, plain = Interrupts(), [], journal_module.charges_since

        def signalled(*given):
            os.kill(os.getpid(), signal.SIGTERM)
            return plain(*given)

        def run():
            with interrupts.listen(), Journal(tmp_path, IDENTITY, EVERY_STEP, interrupts).open():
                perform("doing", [], Ledger(), lambda _: done.append(1) or State({"a": 1}))

        with monkeypatch.context() as patched:
            patched.setattr(journal_module, "charges_since", signalled)
            with pytest.raises(Interrupted, match="after doing"):
                run()
        interrupts = Interrupts()
        run()
        assert len(done) == 1

    def test_between_operations_it_stops_at_once(self):
        def stopped():
            with Interrupts().listen():
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("it went on")

        with pytest.raises(Interrupted, match="between two operations"):
            stopped()


CONFIG = """
task: {hidden: 16, n_pool: 80, n_target: 30, n_test: 30, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budget: 4 epochs
method: cads-s
progress: false
tensorboard: false
"""


@pytest.fixture
def cads(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)

    def run(command, *flags):
        status = main([command, str(tmp_path / "config.yaml"), *map(str, flags)])
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    return run


class TestCommands:
    def test_the_same_command_goes_on_and_then_has_nothing_to_do(self, cads, tmp_path, caplog):
        every = ("--checkpoint.every_steps", 3)
        whole, run = tmp_path / "whole", tmp_path / "run"
        assert cads("select", "--out", whole)[0] == 0
        assert not killed(lambda: cads("select", "--out", run, *every), 12)
        assert not (run / "selection").exists()
        status, said = cads("select", "--out", run)
        assert status == 0
        assert "going on from the checkpoints" in said + caplog.text
        for file in ("selection.json", "scores.parquet"):
            assert (run / "selection" / file).read_bytes() == (whole / "selection" / file).read_bytes()
        assert sorted(f.name for f in run.iterdir()) == ["config.yaml", "select.json", "selection"]
        made = (run / "selection").stat().st_mtime_ns
        status, said = cads("select", "--out", run)
        assert (status, "nothing to do" in said) == (0, True)
        assert (run / "selection").stat().st_mtime_ns == made
        # A process that is killed when all is done but tidying up.
        (run / "checkpoints" / "select" / "000001-finished").mkdir(parents=True)
        assert cads("select", "--out", run)[0] == 0
        assert sorted(f.name for f in run.iterdir()) == ["config.yaml", "select.json", "selection"]

        assert not killed(lambda: cads("train", "--selection", run, *every), 9)
        assert cads("train", "--selection", run)[0] == 0
        assert cads("train", "--selection", whole)[0] == 0
        assert "nothing to do" in cads("train", "--selection", run)[1]
        one, two = ((out / "train" / "model.safetensors").read_bytes() for out in (run, whole))
        assert one == two

    def test_other_settings_are_refused_unless_told_to_begin_anew(self, cads, tmp_path):
        out = tmp_path / "run"
        assert cads("select", "--out", out, "--method", "random")[0] == 0
        status, said = cads("select", "--out", out, "--method", "random", "--seed", 1)
        assert status == 1
        assert "settings.seed was 0, now 1" in said
        assert "--overwrite true" in said
        assert cads("select", "--out", out, "--method", "random", "--seed", 1, "--overwrite", "true")[0] == 0
        assert "nothing to do" in cads("select", "--out", out, "--method", "random", "--seed", 1)[1]

    def test_settings_that_change_nothing_are_no_others(self, cads, tmp_path):
        out = tmp_path / "run"
        assert cads("select", "--out", out, "--method", "random")[0] == 0
        assert "nothing to do" in cads("select", "--out", out, "--method", "random", "--train.workers", 1)[1]

    def test_checkpoints_of_other_settings_are_refused(self, cads, tmp_path):
        out, every = tmp_path / "run", ("--checkpoint.every_steps", 3)
        assert not killed(lambda: cads("select", "--out", out, *every), 10)
        status, said = cads("select", "--out", out, "--train.learning_rate", 0.5)
        assert status == 1
        assert "settings.train.learning_rate was 0.001, now 0.5" in said
        assert cads("select", "--out", out)[0] == 0

    @pytest.mark.parametrize(
        ("flags", "again"),
        [((), "the same command"), (("--overwrite", "true"), "the same command without --overwrite")],
    )
    def test_sigterm_ends_with_its_status_and_a_message(self, cads, tmp_path, monkeypatch, flags, again):
        out = tmp_path / "run"
        step, left = journal_module._Underway.step, iter(range(10))

        def stopped(self, state):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, state)

        with monkeypatch.context() as patched:
            patched.setattr(journal_module._Underway, "step", stopped)
            status, said = cads("select", "--out", out, *flags)
        assert status == 128 + signal.SIGTERM
        assert f"stopped by SIGTERM during training; {again} goes on from here" in said
        assert "Traceback" not in said
        assert cads("select", "--out", out)[0] == 0

    def test_a_run_that_failed_early_leaves_nothing_in_the_way(self, cads, tmp_path):
        assert cads("select", "--out", tmp_path / "run", "--options.outer", "beauty")[0] == 1
        assert cads("select", "--out", tmp_path / "run")[0] == 0


def test_chaos_in_short(capsys, monkeypatch):
    """Four processes killed at random moments, with damage done in between; see `experiments.chaos`."""
    monkeypatch.setitem(chaos.CONFIG, "budget", "6 epochs")
    assert chaos.main(["--kills", "4", "--commands", "select", "--no-small-disk"]) == 0
    assert "4 kills" in capsys.readouterr().out
