"""A run that was killed and gone on with equals one that was not, bit for bit."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from scipy.stats import sem

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.cli.main import main
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import CheckpointError, NonFiniteError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, build_selector, names
from cads.runtime import journal as journal_module
from cads.runtime.checkpoint import CheckpointConfig
from cads.runtime.journal import Journal
from cads.runtime.journal_store import FINISHED
from cads.search.inner_runs import InnerLoop
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.final import train
from cads.training.loop import MAX_SKIPPED
from cads.training.trainer import Trainer
from experiments import chaos
from tests.support.killed_runs import EVERY_STEP, IDENTITY, killed, resumed, same_fit, step_flops, trained


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

        assert resumed(tmp_path, work).step == work().step == MAX_SKIPPED

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
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 0)], 8)
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
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 0)], 8)
            trainer.fit(task.model(0), draws, 9 * step_flops(task), seed=0, phase=TRAIN, stage="s")
            return curve.points

        assert resumed(tmp_path, work) == work()


BUDGET = Budget(8, "epochs")
SOURCES = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
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
            streams = [ShuffledStream(np.arange(k, len(digits.pool), k + 1), k) for k in range(3)]
            return InnerLoop(digits, Ledger(), Monitor()).run(
                streams, 60 * step_flops(digits), seed=0, stage="short runs", keep=3
            )

        runs, again = work(), resumed(tmp_path, work, kills=(5, 12))
        each = [digits.metrics_by_example(model, digits.target)[digits.outer] for model in runs.models]
        assert runs.objective == pytest.approx([x.mean() for x in each])
        assert runs.stderr == pytest.approx([sem(x - each[0]) for x in each])
        assert runs.stderr[1] > runs.stderr[0] == 0
        np.testing.assert_array_equal(runs.stderr, again.stderr)

    def test_all_of_it_comes_from_the_journal_if_all_of_it_is_there(self, digits, tmp_path, monkeypatch):
        def work():
            return build_selector("search").select(digits, BUDGET, seed=0, ledger=Ledger())

        first = resumed(tmp_path, work, kills=())
        monkeypatch.setattr(digits, "training_losses", lambda *_: pytest.fail("trained again"))
        monkeypatch.setattr(digits, "metrics", lambda *_: pytest.fail("measured again"))
        again = resumed(tmp_path, work, kills=())
        assert again.table().equals(first.table())
        assert again.ledger.total().seconds == pytest.approx(first.ledger.total().seconds, rel=0.2)

    def test_the_final_model(self, digits, tmp_path):
        selection = build_selector("random").select(digits, BUDGET, seed=0, ledger=Ledger())

        def work():
            outcome = train(digits, selection, BUDGET, seed=0)
            return (outcome.train_result, outcome.ledger), outcome.metrics

        (fit, metrics), (again, same) = work(), resumed(tmp_path, work, kills=(3, 30))
        same_fit(fit, again)
        assert metrics == same

    def test_a_disk_that_is_full_at_the_end_is_said(self, digits, tmp_path, monkeypatch):
        selection = build_selector("random").select(digits, BUDGET, seed=0, ledger=Ledger())
        outcome = train(digits, selection, Budget(1, "epochs"), seed=0)

        def full(*_, **__):
            raise SafetensorError("No space left on device")

        monkeypatch.setattr(digits, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*: make room"):
            outcome.save(tmp_path)
        assert not (tmp_path / "results.json").exists()


CONFIG = """
task: {hidden: 16, n_pool: 80, n_target: 30, n_test: 30, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budget: 4 epochs
method: search
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

    @pytest.mark.parametrize("method", ["cads", "search"])
    def test_training_without_a_selection_goes_on_in_either_part(self, cads, tmp_path, method):
        flags = ("--method", method, "--checkpoint.every_steps", 3)
        whole, run = tmp_path / "whole", tmp_path / "run"
        assert cads("train", "--out", whole, *flags)[0] == 0
        for writes in (4, 6):
            assert not killed(lambda: cads("train", "--out", run, *flags), writes)
            assert not (run / "results.json").exists()
        assert cads("train", "--out", run, *flags)[0] == 0
        for file in ("model.safetensors", "selection/selection.json", "selection/scores.parquet"):
            assert (run / file).read_bytes() == (whole / file).read_bytes(), file

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


@pytest.mark.slow
def test_chaos_in_short(capsys, monkeypatch):
    """Four processes killed at random moments, with damage done in between; see `experiments.chaos`."""
    monkeypatch.setitem(chaos.CONFIG, "budget", "6 epochs")
    assert chaos.main(["--kills", "4", "--commands", "select", "--no-small-disk"]) == 0
    assert "4 kills" in capsys.readouterr().out
