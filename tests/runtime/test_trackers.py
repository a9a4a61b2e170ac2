"""Trackers of curves: what is missing is refused with the remedy, and what fails later ends no run."""

import logging

import numpy as np
import pytest

from cads.cli.main import main
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.runtime import trackers
from cads.runtime.trackers import MLflow, TensorBoard, Tracker, WeightsAndBiases, check_trackers, open_trackers

CONFIG = """
task:
  {hidden: 16, n_pool: 80, n_target: 40, n_test: 40, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8}
budget: 8 epochs
"""


class Memory(Tracker):
    """Keeps points in memory, and fails from the third on if asked to."""

    fails = False
    runs: dict = {}  # noqa: RUF012

    def __init__(self, folder, run):
        self.points = []
        Memory.runs[run] = self

    def scalar(self, tag, value, step):
        if self.fails and len(self.points) == 2:
            raise ConnectionError("the server is away")
        self.points.append((tag, value, step))

    def hparams(self, settings, metrics):
        self.points.append(("hparams", settings, metrics))

    def close(self):
        self.points.append("closed")


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Memory, "json"))
    return Memory


def test_several_trackers_get_the_same(tmp_path, memory):
    with Monitor(tmp_path / "tensorboard" / "train", track=["tensorboard", "wandb"], run="a run") as monitor:
        monitor.scalar("loss", 0.5, 3)
        monitor.histogram("h", np.arange(3.0), 0)
        monitor.hparams({"seed": 0}, {"accuracy": 0.5})
    assert memory.runs["a run"].points == [("loss", 0.5, 3), ("hparams", {"seed": 0}, {"accuracy": 0.5}), "closed"]
    assert list((tmp_path / "tensorboard" / "train").glob("*tfevents*"))


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, memory, monkeypatch, caplog):
    monkeypatch.setattr(memory, "fails", True)
    with caplog.at_level(logging.WARNING), Monitor(tmp_path / "t", track=["wandb"], run="r") as monitor:
        for step in range(5):
            monitor.scalar("loss", 0.5, step)
    assert len(memory.runs["r"].points) == 2
    (record,) = caplog.records
    assert "wandb is left out from here on: ConnectionError: the server is away" in record.getMessage()


def test_what_is_not_installed_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", (MLflow, "no_such_package"))
    with pytest.raises(ConfigError, match=r"cads-select\[mlflow\]"):
        check_trackers(["mlflow"])
    (tmp_path / "c.yaml").write_text(CONFIG + "track: mlflow\n")
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'cads-select[mlflow]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_begin_is_refused(tmp_path, monkeypatch):
    def fail(self, folder, run):
        raise RuntimeError("no login")

    monkeypatch.setattr(Memory, "__init__", fail)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Memory, "json"))
    with pytest.raises(ConfigError, match=r"wandb does not begin: log in .*no login"):
        open_trackers(["wandb"], tmp_path, "r")


def test_names_of_mlflow_differ_where_tags_differ():
    tracker = MLflow.__new__(MLflow)
    tracker._names = {}
    tags = ["loss", "p/a,b", "p/a;b", "p/a b", "/p/a b", "p/€"]
    names = [tracker._name(tag) for tag in tags]
    assert names[0] == "loss"
    assert len(set(names)) == len(tags)
    assert not any(trackers.NOT_IN_NAMES.search(name) or name.startswith("/") for name in names)
    assert [tracker._name(tag) for tag in tags] == names


@pytest.mark.parametrize("choice", ["null", "[]", "tensorboard", "[tensorboard]"])
def test_the_key_in_a_configuration(tmp_path, choice):
    (tmp_path / "c.yaml").write_text(f"{CONFIG}track: {choice}\n")
    assert main(["select", str(tmp_path / "c.yaml"), "--method", "full", "--out", str(tmp_path / "run")]) == 0
    assert bool(list(tmp_path.rglob("*tfevents*"))) is ("tensorboard" in choice)


@pytest.mark.parametrize(("key", "flags", "has"), [("tensorboard: false", [], False), ("tensorboard: true", [], True)])
def test_files_of_earlier_versions_are_read(tmp_path, key, flags, has):
    (tmp_path / "c.yaml").write_text(f"{CONFIG}{key}\n")
    assert main(["select", str(tmp_path / "c.yaml"), "--method", "full", "--out", str(tmp_path / "run"), *flags]) == 0
    assert bool(list(tmp_path.rglob("*tfevents*"))) is has
    assert "tensorboard:" not in (tmp_path / "run" / "config.yaml").read_text()


def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    tracker = MLflow(tmp_path / "t", "a run")
    for step in range(3):
        tracker.scalar("final model/training_loss", 1.0 / (step + 1), step)
        tracker.scalar("p/a, b", 0.5, step)
    tracker.text("examples", "**text**", 0)
    tracker.hparams({"seed": 0}, {"accuracy": 0.5})
    tracker.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("cads").experiment_id])
    history = client.get_metric_history(run.info.run_id, "final model/training_loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert run.data.params == {"seed": "0"}
    assert run.data.metrics["result/accuracy"] == 0.5


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WeightsAndBiases(tmp_path / "tensorboard" / "train", "a run")
    for stage in ("trials", "final model"):
        for step in range(3):
            tracker.scalar(f"{stage}/training_loss", 1.0 / (step + 1), step)
    tracker.histogram("outer/probabilities", np.arange(4.0), 2)
    tracker.text("examples", "**text**", 2)
    tracker.images("examples/most", np.zeros((2, 1, 8, 8), dtype=np.uint8), 2)
    tracker.hparams({"seed": 0}, {"accuracy": 0.5})
    summary = dict(tracker._tracker.tracker.summary)
    tracker.close()
    assert summary["trials/step"] == summary["final model/step"] == 2, "each stage has an axis of its own"
    assert summary["result/accuracy"] == 0.5
    assert list((tmp_path / "tensorboard").rglob("*.wandb"))


def test_tensorboard_is_accelerates_tracker(tmp_path):
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoard(tmp_path / "select", "a run")
    assert isinstance(tracker._tracker, TensorBoardTracker)
    tracker.close()
