"""Worlds of the known-answer benchmark: small image tasks in YAML files, each a data set cut into sources."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.task import VisionTask

BUILT_IN = Path(__file__).parent / "configs" / "worlds"
"""Folder of the shipped worlds."""
SHORT = ("complementary", "domains", "noise", "redundant")
"""Shipped worlds of about 2,000 examples whose subsets are all trained."""
SHIPPED = ("complementary", "domains", "many", "noise-5000", "noise", "redundant")
"""Worlds that the benchmark runs if none is named."""


def shipped(names: Sequence[str]) -> list[Path]:
    """The files of shipped worlds."""
    return [BUILT_IN / f"{name}.yaml" for name in names]


@dataclass
class World:
    """A task whose best subset of sources can be found by trying them all.

    Attributes:
        name: of the file. task: images and sources. train: the recipe.
    """

    name: str
    task: VisionConfig
    train: TrainConfig

    def build(self) -> VisionTask:
        """The task; its data seed is the world's, whatever the seed of a selector."""
        task = self.task.build(self.train)
        task.check()
        return task

    def settings(self) -> dict[str, Any]:
        """All settings that the results of the world depend on."""
        return {"task": asdict(self.task), "train": self.train.result_fields()}


def read_world(path: Path) -> World:
    """The world in a YAML file with the keys `task` (as of `VisionConfig`) and `train` (as of `TrainConfig`).

    Raises:
        ConfigError: if the file cannot be read, a key or value is refused, or the world has fewer than two sources.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must map `task` and `train` to their settings")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VisionConfig, "task")
    parser.add_class_arguments(TrainConfig, "train")
    try:
        world = parser.instantiate(parser.parse_object(settings))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    if len(world.task.sources) < 2:
        raise ConfigError(f"{path} has {len(world.task.sources)} sources: list at least two under task.sources")
    return World(path.stem, world.task, world.train)
