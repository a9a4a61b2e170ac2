"""Weights of files: they fit by name and shape, hold no code, and what starts fresh is said."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from safetensors.torch import save_file

import cads
from cads.cli.main import main
from cads.errors import ConfigError, DataError
from cads.tasks.vision import weights as weights_module
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.networks import Network

RECIPE = cads.TrainConfig(batch_size=8)
SMALL = {"n_pool": 60, "n_target": 20, "n_test": 20, "hidden": 16}


class Mark:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.fixture(autouse=True)
def _say_again():
    weights_module._say.cache_clear()
    weights_module._read.cache_clear()


@pytest.fixture
def state():
    return {
        name: torch.full_like(x, 0.5) for name, x in Network("mlp", hidden=16).build((1, 8, 8), 10).state_dict().items()
    }


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped", "parallel"])
def test_files_of_all_kinds_are_read(form, state, tmp_path):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "pt":
        torch.save(state, path)
    elif form == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save({f"module.{name}": x for name, x in state.items()}, path)
    task = VisionConfig(**SMALL, weights=str(path)).build(RECIPE)
    for seed in (0, 1):
        assert all((x == 0.5).all() for x in task.model(seed).state_dict().values())


def test_a_head_of_another_size_starts_fresh_and_is_named(tmp_path, caplog):
    state = Network("resnet18").build((3, 32, 32), 7).state_dict()
    torch.save(state, tmp_path / "w.pth")
    network = Network("resnet18", weights=str(tmp_path / "w.pth"))
    with caplog.at_level(logging.WARNING):
        grey, other = network.build((1, 32, 32), 10), network.build((1, 32, 32), 10)
    assert torch.equal(grey.state_dict()["1.conv1.weight"], state["conv1.weight"])
    assert torch.equal(other.state_dict()["1.layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert "fresh: 1.fc.weight, 1.fc.bias" in caplog.text
    assert "2 tensors do not fit the network" in caplog.text
    assert caplog.text.count("fresh:") == 1


def test_a_model_that_cads_wrote_is_a_start(tmp_path):
    first = VisionConfig(**SMALL).build(RECIPE)
    trained = cads.train(first, "2 epochs", method="full")
    trained.save(tmp_path)
    config = VisionConfig(**SMALL, weights=str(tmp_path / "model.safetensors"))
    task = config.build(RECIPE)
    assert task.metrics(task.model(0), task.test)["loss"] == pytest.approx(trained.metrics["loss"], rel=1e-5)
    assert config.meta(RECIPE).model(0)[1].weight.is_meta
    assert task.identity["weights"]
    assert task.identity != first.identity


def test_files_that_hold_code_are_refused_and_never_run(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"1.weight": Mark(mark)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="files that hold code are not read"):
        Network("mlp", weights=str(tmp_path / "w.pt")).build((1, 8, 8), 10)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": torch.zeros(3)}, r"no weights in .* fit the network: it has a, and the network 1.weight"),
        ({"a": 3}, "no weights by name"),
        ([1], "no weights by name"),
        (None, "cannot be read"),
    ],
)
def test_files_without_fitting_weights_are_refused(contents, message, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"") if contents is None else torch.save(contents, path)
    with pytest.raises(DataError, match=message):
        Network("mlp", weights=str(path)).build((1, 8, 8), 10)


def test_names_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no file: give one of safetensors"):
        VisionConfig(weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigError, match="only torchvision's have weights"):
        VisionConfig(weights="DEFAULT")
    with pytest.raises(ConfigError, match="leave out pretrained"):
        VisionConfig(model="resnet18", pretrained=True, weights="IMAGENET1K_V2")
    with pytest.raises(ConfigError, match=r"torchvision has \['DEFAULT', 'IMAGENET1K_V1'\] for resnet18"):
        VisionConfig(model="resnet18", weights="IMAGENET1K_V9")


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_are_those_of_torchvision(name, tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = torchvision.models.squeezenet1_1().state_dict()
    url = torchvision.models.SqueezeNet1_1_Weights[name].url
    torch.save(state, tmp_path / "checkpoints" / url.split("/")[-1])
    loaded = Network("squeezenet1_1", weights=name).build((3, 32, 32), 10).state_dict()
    assert torch.equal(loaded["features.0.weight"], state["features.0.weight"])


def test_the_command_takes_a_file_and_knows_it_by_its_contents(state, tmp_path, capsys):
    save_file(state, tmp_path / "w.safetensors")
    config = {
        "task": {**SMALL, "weights": str(tmp_path / "w.safetensors"), "transforms": ["RandomHorizontalFlip"]},
        "train": {"batch_size": 8},
        "budget": "2 epochs",
        "tensorboard": False,
        "progress": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["train", str(tmp_path / "c.yaml"), "--method", "random", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert main(command) == 0
    assert "finished before" in capsys.readouterr().out.replace("\n", " ")
    assert main(["plan", str(tmp_path / "c.yaml"), "--methods", "[full]", "--flops_per_second", "1e9"]) == 0
    save_file({name: x + 1 for name, x in state.items()}, tmp_path / "w.safetensors")
    assert main(command) != 0
