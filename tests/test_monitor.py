"""What TensorBoard shows of a run: the event files are opened and read back."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.accounting.stage_labels import stage_tag
from cads.cli.main import main
from cads.data.pool import Pool
from cads.monitor import CURVE_POINTS, PANEL_SIZE, Monitor
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.selection import Selection
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

CONFIG = """
task:
  {hidden: 16, n_pool: 120, n_target: 40, n_test: 40, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8, learning_rate: 0.003}
budget: 24 epochs
"""
PANELS = {"examples/most_probable", "examples/least_probable"}


def read(folder):
    """The events of one run: everything directly in `folder`, without samples left out."""
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0))
    return events.Reload()


def curve(events, tag):
    """Values by step of a scalar."""
    points = events.Scalars(tag)
    steps = [p.step for p in points]
    assert steps == sorted(set(steps)), f"{tag} has two points at one step, or steps that go back"
    return np.array([p.value for p in points])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a method, after `cads select` and `cads train`."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            (folder / "config.yaml").write_text(CONFIG)
            common = [str(folder / "config.yaml"), "--method", method]
            assert main(["select", *common, "--out", str(folder / "run")]) == 0
            assert main(["train", *common, "--selection", str(folder / "run")]) == 0
            made[method] = folder / "run"
        return made[method]

    return get


ours = pytest.mark.parametrize("method", ["search"])


@ours
class TestSelect:
    def test_curves_of_the_outer_problem(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        rungs = len(curve(events, "outer/best_gain"))
        assert rungs >= 2
        assert (curve(events, "outer/best_gain") <= 0).all(), "the full pool itself is among the runs"
        for tag in ("outer/target_model_loss", "outer/loss_within_reach", "outer/gap", "outer/entropy"):
            values = curve(events, tag)
            assert len(values) == rungs
            assert np.isfinite(values).all()
        gap = curve(events, "outer/target_model_loss") - curve(events, "outer/loss_within_reach")
        assert curve(events, "outer/gap") == pytest.approx(gap, abs=1e-5)
        assert (curve(events, "outer/loss_within_reach") > 0).all()

    def test_control_coefficients(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        for tag in ("control/weight_of_target_model_loss", "control/weight_of_loss_within_reach"):
            assert (curve(events, tag) >= 0).all()

    def test_histogram_of_the_probabilities(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        shown = events.Histograms("outer/probabilities")
        assert len(shown) == len(curve(events, "outer/best_gain"))
        for histogram in (h.histogram_value for h in shown):
            assert histogram.num == 120
            assert 0 <= histogram.min <= histogram.max <= 1

    def test_probability_of_each_source_over_time(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        for name in ("clean", "noisy"):
            values = curve(events, f"policy_probability/{name}")
            assert len(values) == len(curve(events, "outer/best_gain"))
            assert ((values >= 0) & (values <= 1)).all()

    def test_shares_are_those_of_the_selection(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        for name, share in Selection.load(run(method)).shares.items():
            assert curve(events, f"share_of_training/{name}") == pytest.approx([share], rel=1e-6)

    def test_flops_by_stage_are_those_of_the_ledger(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        for (phase, stage), entry in Selection.load(run(method)).ledger.entries.items():
            assert curve(events, f"flops/{phase}/{stage_tag(stage)}") == pytest.approx([entry.flops], rel=1e-6)

    def test_curves_of_the_short_runs(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        stages = [t for t in events.Tags()["scalars"] if t.endswith("/training_loss")]
        assert any(stage.startswith("trials, ") for stage in stages)
        assert "target model/training_loss" in stages
        assert {stage.count("/") for stage in stages} == {1}, "TensorBoard groups by the first slash"

    def test_grids_of_the_most_and_least_probable_images(self, run, method):
        events = read(run(method) / "tensorboard" / "select")
        assert set(events.Tags()["images"]) == PANELS
        for tag in PANELS:
            shown = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
            assert shown.width * shown.height >= PANEL_SIZE * 8 * 8
            assert np.ptp(np.asarray(shown)) > 100
            text = events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
            assert text.count("label") == text.count("p = ") == PANEL_SIZE

    def test_hparams(self, run, method):
        hparams(run(method) / "tensorboard" / "select", method, {"selected_share", "selection_flops"})


@pytest.mark.parametrize("method", ["search", "random"])
def test_train(run, method):
    folder = run(method) / "train" / "tensorboard" / "train"
    events = read(folder)
    losses = curve(events, "final model/training_loss")
    assert 10 < len(losses) <= CURVE_POINTS + 1
    assert losses[-1] < losses[0]
    rate = curve(events, "final model/learning_rate")
    assert 0 < rate.max() <= 0.003 * (1 + 1e-6)
    assert 0 <= curve(events, "test/accuracy")[0] <= 1
    assert curve(events, "flops/train/final model")[0] > 0
    hparams(folder, method, {"accuracy", "loss", "total_flops"})


def hparams(folder, method, metrics):
    events = read(folder / "hparams")
    shown = set(events.Tags()["scalars"])
    assert {f"result/{m}" for m in metrics} <= shown
    started = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for word in ("method", method, "budget", "24 epochs", "seed"):
        assert word.encode() in started


def test_no_event_files_if_they_are_not_wanted(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = [str(tmp_path / "config.yaml"), "--method", "full", "--tensorboard", "false"]
    assert main(["select", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert not list(tmp_path.rglob("*tfevents*"))


def small(n):
    config = VisionConfig(hidden=16, n_pool=n, n_target=20, n_test=20)
    return config.build(TrainConfig(batch_size=4))


def test_panels_show_the_extremes_even_of_a_small_pool(tmp_path):
    task = small(10)
    with Monitor(tmp_path) as monitor:
        monitor.panels(task.pool, np.arange(10) / 10, 0)
    text = read(tmp_path).Tensors("examples/most_probable/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0].startswith(f"{task.pool.ids[9]}: label ")
    assert text.count("label") == 10


def test_panels_of_a_pool_without_images_show_nothing(tmp_path, sentences):
    task = sentences()
    with Monitor(tmp_path) as monitor:
        monitor.panels(task.pool, np.full(len(task.pool), 0.5), 0)
    assert read(tmp_path).Tags()["images"] == []


def test_a_run_leaves_a_bounded_number_of_points(tmp_path):
    with Monitor(tmp_path) as monitor:
        for _ in range(2):
            with monitor.progress("stage", 1e6) as advance:
                for i in range(5000):
                    advance((i + 1) * 200.0, 1.0, 0.1)
    points = len(curve(read(tmp_path), "stage/training_loss"))
    assert CURVE_POINTS <= points <= 2 * (CURVE_POINTS + 1)


def test_the_progress_bar_shows_what_is_spent():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with Monitor(console=console) as monitor, monitor.named("cell 3:"), monitor.progress("theta", 2e6) as advance:
        advance(1e6, 0.5, 0.1)
        monitor._shown.bar.refresh()
    for word in ("cell 3: target model", "1e+06/2e+06 FLOPs", "loss 0.500"):
        assert word in screen.getvalue()


def test_watching_changes_nothing(tmp_path):
    task = VisionConfig(
        hidden=16, n_pool=60, n_target=20, n_test=20, sources=[SyntheticSource("a"), SyntheticSource("b")]
    )
    task = task.build(TrainConfig(batch_size=4))
    chosen = []
    for folder in (None, tmp_path):
        with Monitor(folder) as monitor:
            selector = build_selector("search")
            chosen.append(selector.select(task, Budget(8, "epochs"), seed=0, ledger=Ledger(), monitor=monitor))
    assert chosen[0].table().equals(chosen[1].table())
    assert isinstance(task.pool, Pool)
