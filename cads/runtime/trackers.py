"""Where curves are kept: TensorBoard, Weights & Biases or MLflow, through accelerate's trackers.

A tracker that fails later is left out with a warning: a run does not end because a server is away.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from cads.errors import ConfigError

TrackerName: TypeAlias = Literal["tensorboard", "wandb", "mlflow"]
Track: TypeAlias = list[TrackerName] | TrackerName | None
"""What the setting `track` takes: one tracker, several, or none."""
log = logging.getLogger(__name__)

PROJECT = "cads"
"""Project of Weights & Biases and experiment of MLflow; their own environment variables win."""
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
"""What a name of MLflow must not contain."""


class Tracker(ABC):
    """Keeps the curves, texts and pictures of one run.

    Args:
        folder: of TensorBoard's event files; files of others go beside it. run: name of the run.
    """

    @abstractmethod
    def __init__(self, folder: Path, run: str) -> None: ...

    @abstractmethod
    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of the curve `tag`."""

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:  # noqa: B027
        """The distribution of `values`, of any shape; not every tracker has one."""

    def text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Markdown text; not every tracker has one."""

    def images(self, tag: str, images: Any, step: int) -> None:  # noqa: B027
        """Images, shape (n, channels, height, width); not every tracker has them."""

    @abstractmethod
    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The settings of the run, plain values, and its resulting metrics."""

    @abstractmethod
    def close(self) -> None:
        """The run is over."""


class TensorBoard(Tracker):
    """Event files in `folder`."""

    def __init__(self, folder: Path, run: str) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(folder.name, folder.parent)
        self._tracker.start()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """See `Tracker`."""
        # The tracker's own `log` writes to disk at every point.
        self._tracker.tracker.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """See `Tracker`."""
        self._tracker.tracker.add_histogram(tag, values, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Tracker`."""
        self._tracker.tracker.add_text(tag, text, step)

    def images(self, tag: str, images: Any, step: int) -> None:
        """See `Tracker`."""
        self._tracker.log_images({tag: images}, step)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        results = {f"result/{name}": value for name, value in metrics.items()}
        self._tracker.tracker.add_hparams(dict(settings), results, run_name="hparams")

    def close(self) -> None:
        """See `Tracker`."""
        self._tracker.finish()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, in the project `cads` or `WANDB_PROJECT`; its files are beside `folder`."""

    def __init__(self, folder: Path, run: str) -> None:
        from accelerate.tracking import WandBTracker

        folder.parent.mkdir(parents=True, exist_ok=True)
        self._tracker = WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=run, dir=str(folder.parent))
        self._tracker.start()
        self._axes: set[str] = set()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """See `Tracker`."""
        # A run of W&B has one step for all curves. Stages begin anew, so each tag's group has an axis of its own.
        group = tag.partition("/")[0]
        axis = f"{group}/step"
        if group not in self._axes:
            self._axes.add(group)
            self._tracker.tracker.define_metric(axis, hidden=True)
            self._tracker.tracker.define_metric(f"{group}/*", step_metric=axis)
        self._tracker.log({tag: value, axis: step})

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """See `Tracker`."""
        import wandb

        self._tracker.log({tag: wandb.Histogram(values)})

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Tracker`."""
        self._tracker.log_table(tag, columns=["step", "text"], data=[[step, text]])

    def images(self, tag: str, images: Any, step: int) -> None:
        """See `Tracker`."""
        pictures = np.moveaxis(np.asarray(images), 1, -1)
        self._tracker.log_images({f"{tag}_images": list(pictures)})

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._tracker.store_init_configuration(dict(settings))
        self._tracker.tracker.summary.update({f"result/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """See `Tracker`."""
        self._tracker.finish()


class MLflow(Tracker):
    """A run of MLflow, in the experiment `cads` or `MLFLOW_EXPERIMENT_NAME`, where MLflow keeps its runs."""

    def __init__(self, folder: Path, run: str) -> None:
        from accelerate.tracking import MLflowTracker

        self._tracker = MLflowTracker(experiment_name=PROJECT, run_name=run)
        self._tracker.start()
        self._names: dict[str, str] = {}
        self._waiting: dict[str, float] = {}
        self._step = 0

    def scalar(self, tag: str, value: float, step: int) -> None:
        """See `Tracker`."""
        name = self._name(tag)
        if step != self._step or name in self._waiting:
            self._send()
        self._step = step
        self._waiting[name] = float(value)

    def _send(self) -> None:
        """Send the values of a step together, and do not wait: a call takes a tenth of a second."""
        if self._waiting:
            self._tracker.log(self._waiting, self._step, synchronous=False)
        self._waiting = {}

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Tracker`."""
        import mlflow

        mlflow.log_text(text, f"{self._name(tag)}/{step}.md")

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._tracker.store_init_configuration(dict(settings))
        for name, value in metrics.items():
            self.scalar(f"result/{name}", value, 0)

    def close(self) -> None:
        """See `Tracker`."""
        import mlflow

        self._send()
        mlflow.flush_async_logging()
        self._tracker.finish()

    def _name(self, tag: str) -> str:
        """The tag without what MLflow refuses; tags that differ have names that differ."""
        if tag not in self._names:
            name = plain = posixpath.normpath(NOT_IN_NAMES.sub("_", tag)).lstrip("/.")
            number = 2
            while name in self._names.values():
                name, number = f"{plain} {number}", number + 1
            self._names[tag] = name
        return self._names[tag]


class Guarded:
    """Trackers of which one that fails is left out from then on, with a warning.

    Args:
        trackers: by name.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of every tracker."""
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # of any library and of any network
                if name == "tensorboard":
                    raise
                log.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error)
                del self._trackers[name]


TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}
"""The class of each tracker, and the package that it needs."""


def tracker_names(track: Track) -> list[TrackerName]:
    """The trackers of the setting `track`."""
    return [track] if isinstance(track, str) else track or []


def tracker_place(name: TrackerName, folder: Path) -> str:
    """Where the curves of runs are, in words; `folder`: of TensorBoard's files."""
    return {
        "tensorboard": f"TensorBoard: tensorboard --logdir {folder}",
        "wandb": f"Weights & Biases: the project `{PROJECT}`, or WANDB_PROJECT",
        "mlflow": f"MLflow: mlflow ui; the experiment `{PROJECT}`, or MLFLOW_EXPERIMENT_NAME",
    }[name]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is spent.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(TRACKERS[name][1]) is None:
            raise ConfigError(f"track = {name} needs {name}, which is not installed: pip install 'cads-select[{name}]'")


def open_trackers(names: Sequence[str], folder: Path, run: str) -> Guarded:
    """The trackers of one run.

    Args:
        names: of trackers. folder: of TensorBoard's event files. run: name of the run.

    Raises:
        ConfigError: if one is not installed, or refuses to begin, for example without a login.
    """
    check_trackers(names)
    trackers: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            trackers[name] = TRACKERS[name][0](folder, run)
        except Exception as error:
            if name == "tensorboard":
                raise
            raise ConfigError(
                f"track = {name} does not begin: log in or set its server first, or leave it out ({error})"
            ) from error
    return Guarded(trackers)
