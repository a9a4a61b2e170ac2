"""docs/own-images.md is true: its configuration trains on a folder of images."""

from __future__ import annotations

import re

import numpy as np
import torch
import torchvision
import yaml
from PIL import Image

from cads.cli.main import main
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "own-images.md").read_text()


def photos(folder, n, seed):
    rng = np.random.default_rng(seed)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{seed}-{i}.png")


def test_the_configuration_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    photos(tmp_path / "photos", 12, 0)
    photos(tmp_path / "photos-checked", 6, 1)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "hub" / "checkpoints" / url.split("/")[-1])
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = {**yaml.safe_load(text), "budget": "1 epochs", "train": {"batch_size": 4}, "tensorboard": False}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "c.yaml", "--method", "full", "--out", "run", "--progress", "false"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
