"""The features of LESS are kept: on disk or in a journal, scoring goes on where it stopped."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import baselines.gradients.features
from baselines.gradients import feature_store
from baselines.gradients.feature_store import FeatureShard, FeatureStore
from baselines.gradients.features import GradientFeatures
from baselines.less import Less
from cads.accounting.ledger import Ledger
from cads.errors import CheckpointError, ConfigError
from cads.runtime.checkpoint import CheckpointConfig
from cads.runtime.journal import Journal


class TestFeaturesOnDisk:
    def run(self, task, folder, **options):
        ledger = Ledger()
        ranking = Less(features=str(folder), dimension=60, checkpoints=2, **options).rank(task, seed=0, ledger=ledger)
        return ranking.scores_of(task.pool), ledger.to_json(seconds=False)

    def test_an_interrupted_scoring_goes_on(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(baselines.gradients.features, "SHARD_EXAMPLES", 20)
        monkeypatch.setattr("cads.data.token_batches.SCORED_EXAMPLES", 10)
        scores, account = self.run(task, tmp_path / "whole")
        folder, calls = tmp_path / "cut", []
        write = feature_store._write

        def cut(path, key, shard):
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(key)
            write(path, key, shard)

        monkeypatch.setattr(feature_store, "_write", cut)
        with pytest.raises(KeyboardInterrupt):
            self.run(task, folder)
        assert len(list(folder.glob("*.safetensors"))) == 4
        monkeypatch.setattr(
            feature_store,
            "_write",
            lambda path, key, shard: (calls.append(key), write(path, key, shard)),
        )
        again, its_account = self.run(task, folder)
        assert len(calls) == len(set(calls)) == 6
        np.testing.assert_array_equal(again, scores)
        assert its_account == account

    def test_a_damaged_or_foreign_shard_is_computed_again(self, task, tmp_path, caplog):
        scores, account = self.run(task, tmp_path)
        first, second = sorted(tmp_path.glob("*.safetensors"))
        damaged = bytearray(first.read_bytes())
        damaged[-5] ^= 1
        first.write_bytes(damaged)
        second.write_bytes(b"something else")
        again, its_account = self.run(task, tmp_path)
        np.testing.assert_array_equal(again, scores)
        assert its_account == account
        assert "is damaged: it is computed again" in caplog.text
        assert "cannot be read" in caplog.text
        swapped = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(swapped)
        np.testing.assert_array_equal(self.run(task, tmp_path)[0], scores)
        assert "holds no features of this run" in caplog.text

    def test_what_has_another_shape_is_not_even_read(self, tmp_path, monkeypatch):
        shards = FeatureStore(tmp_path)
        features = torch.arange(6.0).view(2, 3)
        shards.get("key", 2, 3, lambda: FeatureShard(features, {}))
        opened = feature_store.safe_open

        @contextmanager
        def watched(*args):
            with opened(*args) as file:
                yield SimpleNamespace(metadata=file.metadata, get_slice=file.get_slice, get_tensor=pytest.fail)

        monkeypatch.setattr(feature_store, "safe_open", watched)
        other = FeatureShard(torch.zeros(5, 3), {})
        assert shards.get("key", 5, 3, lambda: other) is other

    def test_a_shard_that_cannot_be_written_is_said(self, tmp_path, monkeypatch):
        def full(*args):
            raise SafetensorError("no space left on device")

        monkeypatch.setattr(feature_store, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written .*no space left"):
            FeatureStore(tmp_path).get("key", 1, 1, lambda: FeatureShard(torch.zeros(1, 1), {}))
        assert list(tmp_path.iterdir()) == []

    def test_other_features_have_other_names(self, task, tmp_path):
        for options in ({}, {"recipe": "paper"}, {"layers": "last", "dimension": 20}):
            Less(features=str(tmp_path), **{"dimension": 50, "checkpoints": 1, **options}).rank(
                task, seed=0, ledger=Ledger()
            )
        assert len(list(tmp_path.iterdir())) == 3

    def test_kept_features_cost_what_the_accounting_of_the_task_says(self, task, tmp_path):
        self.run(task, tmp_path)
        paper = copy.copy(task)
        paper.__dict__.pop("costs", None)
        paper.accounting = "paper"
        assert self.run(paper, tmp_path)[1] == self.run(paper, tmp_path / "fresh")[1]

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "f").write_text("")
        with pytest.raises(ConfigError, match="is a file"):
            Less(features=str(tmp_path / "f"))


def test_a_journal_goes_on_where_it_stopped(task, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.gradients.features, "SHARD_EXAMPLES", 20)
    monkeypatch.setattr("cads.data.token_batches.SCORED_EXAMPLES", 10)
    uninterrupted, account = Ledger(), Ledger()
    exact = Less().rank(task, seed=0, ledger=uninterrupted).scores_of(task.pool)
    each, calls = GradientFeatures._features_of, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return each(self, *args, **options)

    monkeypatch.setattr(GradientFeatures, "_features_of", interrupted)
    config = CheckpointConfig(every_steps=1)

    def run(ledger):
        with Journal(tmp_path / "j", {"run": 1}, config).open():
            return Less().rank(task, seed=0, ledger=ledger).scores_of(task.pool)

    with pytest.raises(KeyboardInterrupt):
        run(Ledger())
    monkeypatch.setattr(task, "training_losses", lambda *_: pytest.fail("warmed up again"))
    np.testing.assert_array_equal(run(account), exact)
    assert account.to_json(seconds=False) == uninterrupted.to_json(seconds=False)
