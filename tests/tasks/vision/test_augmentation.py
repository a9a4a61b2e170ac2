"""Transforms change the images of training steps and no others, the same ones when a run is repeated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cads
from cads.errors import ConfigError
from cads.tasks.vision.augmentation import Augmentation
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

RECIPE = cads.TrainConfig(batch_size=8)
CROP = {"name": "RandomCrop", "size": 8, "padding": 2}
SMALL = {"n_pool": 60, "n_target": 20, "n_test": 20, "hidden": 16}


def task(*transforms, recipe=RECIPE, **options):
    return VisionConfig(**SMALL, transforms=list(transforms), **options).build(recipe)


def test_each_image_is_changed_on_its_own():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(20, 1, 1, 1)
    flipped = Augmentation(["RandomHorizontalFlip"])(images)
    same = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    assert 0 < sum(same) < 20
    assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in zip(images, flipped, strict=True))


def test_only_training_steps_see_changed_images():
    own = task({"name": "RandomHorizontalFlip", "p": 1.0})
    model, batch = own.model(0), own.pool.batch(np.arange(8))
    changed = replace(batch, inputs={"images": batch.inputs["images"].flip(-1)})
    assert torch.equal(own.training_losses(model, batch), own.losses(model, changed))
    assert own.metrics(model, own.test) == task().metrics(model, own.test)
    assert own.pool.content_hash == task().pool.content_hash


@pytest.mark.parametrize("method", ["full", "cads", "search"])
def test_runs_repeat_to_the_last_bit(method):
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    one, other = (
        cads.train(task("RandomHorizontalFlip", CROP, sources=sources), "8 epochs", method=method) for _ in "ab"
    )
    assert one.metrics == other.metrics
    plain = cads.train(task(sources=sources), "8 epochs", method=method)
    assert one.metrics != plain.metrics
    assert one.ledger.total("train").flops == plain.ledger.total("train").flops


def test_results_without_transforms_keep_their_fields():
    assert not {"transforms", "weights"} & set(VisionConfig().result_fields())
    assert VisionConfig(transforms=["RandomHorizontalFlip"]).result_fields()["transforms"] == ["RandomHorizontalFlip"]
    assert task(CROP).identity != task().identity == task().identity


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["RandomHorizontalFlop"], "names like it: .*RandomHorizontalFlip"),
        (["os.system"], "names no transform"),
        ([{"size": 3}], "names no transform"),
        ([{"name": "RandomCrop"}], "RandomCrop refuses"),
        (["Lambda"], "Lambda refuses"),
    ],
)
def test_unknown_transforms_are_refused_at_once(transforms, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig(transforms=transforms)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"name": "RandomCrop", "size": 4}, r"shape \(1, 4, 4\).*they must keep both"),
        ({"name": "RandomCrop", "size": 99}, "are refused"),
        ({"name": "Normalize", "mean": [0.5], "std": [0.5]}, "are refused|they must keep both"),
    ],
)
def test_transforms_that_change_shape_or_type_are_refused(transform, message):
    with pytest.raises(ConfigError, match=message):
        task(transform)


def test_batched_replicas_are_refused():
    with pytest.raises(ConfigError, match="transforms with replicas = 'batched'"):
        task(CROP, recipe=cads.TrainConfig(replicas="batched"))
    assert task(CROP).recipe.replicas == "loop"
