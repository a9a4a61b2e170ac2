"""The vision task: division of the data, losses, metrics, networks."""

import gzip
import math
import pathlib
import struct
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import minimize_scalar
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.tasks.vision.calibration import calibrated_losses
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.images import ImageTensors
from cads.tasks.vision.networks import Network
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.tasks.vision.task import VisionTask, channel_moments

RECIPE = TrainConfig()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def noisy():
    specs = [
        SyntheticSource("clean"),
        SyntheticSource("noise", label_noise=0.9),
        SyntheticSource("copies", duplicates=3),
    ]
    return VisionConfig(sources=specs, n_target=200).build(RECIPE)


def colour_data(n=40, height=8, width=8):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    rows = {
        "image": [Image.fromarray(x) for x in pixels],
        "label": [i % 4 for i in range(n)],
        "place": ["rare" if i == 0 else "common" for i in range(n)],
    }
    features = {
        "image": datasets.Image(),
        "label": datasets.Value("int64"),
        "place": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def tiny_task(labels=(0, 1, 2), **changes):
    def pool(name):
        rng = np.random.default_rng(sum(map(ord, name)))
        pixels = torch.from_numpy(rng.integers(0, 256, (len(labels), 1, 4, 4), dtype=np.uint8))
        ids = [f"{name}-{i}" for i in range(len(labels))]
        return Pool(ids, ImageTensors(pixels, torch.tensor(labels)), name=name)

    pools = {name: pool(name) for name in ("pool", "target", "test")} | changes
    network = Network("mlp", hidden=4)
    return VisionTask(**pools, classes="abc", build_model=partial(network.build, (1, 4, 4), 3), recipe=RECIPE)


def test_pool_target_and_test_are_disjoint_and_clean(noisy):
    pools = (noisy.pool, noisy.target, noisy.test)
    origins = [{i.split("#")[0] for i in p.ids.to_pylist()} for p in pools]
    assert not origins[0] & origins[1]
    assert not origins[0] & origins[2]
    assert not origins[1] & origins[2]
    assert len(noisy.target) == 200
    assert len(noisy.test) == 1797 // 5
    noisy.check()
    digits = VisionConfig(n_target=1, n_test=1).build(RECIPE).pool
    known = dict(zip(digits.ids.to_pylist(), digits.examples.labels.tolist(), strict=True))
    for pool in (noisy.target, noisy.test):
        pairs = zip(pool.ids.to_pylist(), pool.examples.labels.tolist(), strict=True)
        assert all(known.get(identity, label) == label for identity, label in pairs)


def test_ids_name_the_original_and_the_copy(noisy):
    ids = noisy.pool.ids.to_pylist()
    assert len(set(ids)) == len(ids)
    for identity, origin, copy in zip(ids, noisy.truth.origins, noisy.truth.copies, strict=True):
        assert identity.endswith(f"#{copy}") == (copy > 0)
        assert identity.startswith(ids[np.flatnonzero(noisy.truth.origins == origin)[0]])
    assert noisy.pool.source_names == noisy.truth.names
    assert not noisy.truth.corrupted[noisy.pool.sources != 1].any()


def test_the_same_data_seed_gives_the_same_task_and_another_does_not():
    def hashes(seed):
        task = VisionConfig(data_seed=seed, n_pool=300, sources=[SyntheticSource("a", None, 0.5)]).build(RECIPE)
        return [p.content_hash for p in (task.pool, task.target, task.test)]

    assert hashes(3) == hashes(3)
    assert not set(hashes(3)) & set(hashes(4))


def test_a_larger_pool_contains_the_smaller():
    small, large = (VisionConfig(n_pool=n).build(RECIPE) for n in (100, 200))
    assert set(small.pool.ids.to_pylist()) < set(large.pool.ids.to_pylist())
    assert small.target.ids == large.target.ids
    assert small.test.ids == large.test.ids


def test_a_leak_is_refused(noisy):
    leaky = VisionTask(
        noisy.pool,
        noisy.target,
        noisy.target,
        classes=noisy.classes,
        build_model=lambda: noisy.model(0),
        recipe=RECIPE,
    )
    with pytest.raises(DataError, match="held out"):
        leaky.check()
    renamed = Pool([f"x{i}" for i in range(len(noisy.target))], noisy.target.examples, name="test set")
    leaky.test = renamed
    with pytest.raises(DataError, match="exact copies"):
        leaky.check()


def test_the_own_test_split_is_used_whole_or_in_part(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 50), ("t10k", 20)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    config = {"dataset": "fashion-mnist", "path": str(tmp_path)}
    complete = VisionConfig(**config).build(RECIPE)
    assert (len(complete.pool), len(complete.target), len(complete.test)) == (45, 5, 20)
    assert complete.test.ids[3].as_py() == "test-00003"
    part = VisionConfig(**config, n_test=7, image_size=14, model="cnn").build(RECIPE)
    assert set(part.test.ids.to_pylist()) < set(complete.test.ids.to_pylist())
    assert part.pool.batch([0]).shape == (("images", (1, 14, 14)),)
    assert math.isfinite(part.metrics(part.model(0), part.test)["loss"])
    with pytest.raises(DataError, match="n_test = 21: the test split has 20"):
        VisionConfig(**config, n_test=21).build(RECIPE)


def test_given_sources_are_kept_and_lost_ones_left_out(tmp_path, caplog):
    colour_data().save_to_disk(tmp_path)
    config = {"dataset": "hub", "path": str(tmp_path), "source_column": "place"}
    complete = VisionConfig(**config, n_target=1, n_test=1).build(RECIPE)
    assert set(complete.pool.source_names) <= {"common", "rare"}
    small = VisionConfig(**config, n_pool=2).build(RECIPE)
    assert small.pool.source_names == ("common",)
    assert "rare" in caplog.text


def test_unknown_labels_are_counted_and_named():
    with pytest.raises(DataError, match=r"2 labels of the pool are not in 0\.\.2.*'pool-1', 'pool-3'"):
        tiny_task(labels=(0, -1, 2, 3))


def test_unlabelled_hub_data_is_refused_before_sources_are_made(tmp_path):
    rows = colour_data().remove_columns("label").add_column("label", [-1] * 5 + [1] * 35)
    rows.save_to_disk(tmp_path)
    for sources in ([], [SyntheticSource("a")]):
        config = VisionConfig(dataset="hub", path=str(tmp_path), n_target=1, n_test=1, sources=sources)
        with pytest.raises(DataError, match="holds -1 to 1: number them from 0"):
            config.build(RECIPE)


def test_payloads_of_another_kind_are_refused():
    class Other:
        def __len__(self):
            return 1

    with pytest.raises(DataError, match="the target holds Other"):
        tiny_task(target=Pool(["a"], Other(), name="target"))


def test_moments_are_those_of_the_pool(noisy):
    pixels = noisy.pool.batch(np.arange(len(noisy.pool))).inputs["images"].double()
    assert noisy.mean == pytest.approx([float(pixels.mean())])
    assert noisy.std == pytest.approx([float(pixels.std(correction=0))])
    constant = ImageTensors(torch.full((3, 2, 4, 4), 9, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert channel_moments(constant) == ((9.0, 9.0), (1.0, 1.0))


def test_moments_of_some_images_do_not_depend_on_the_order_of_the_file(monkeypatch):
    """Sorted by class, by brightness, or shuffled: the same images are measured, from all parts of the file."""
    monkeypatch.setattr("cads.tasks.vision.task.MOMENTS_FROM", 100)
    pixels = torch.arange(400, dtype=torch.float64).mul(255 / 400).to(torch.uint8)[:, None, None, None]
    images = ImageTensors(pixels.expand(400, 1, 4, 4).clone(), torch.zeros(400, dtype=torch.int64))
    result = []
    for order in (np.arange(400), np.arange(400)[::-1].copy(), np.random.default_rng(0).permutation(400)):
        task = tiny_task(pool=Pool([f"i{k}" for k in order], images.take(order)))
        result.append((task.mean, task.std))
    assert result[0] == result[1] == result[2]
    assert result[0][0] == pytest.approx([float(pixels.double().mean())], abs=5 * 255 / math.sqrt(12 * 100))
    assert result[0] != channel_moments(images)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet8", "squeezenet1_1"])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(model):
    task = VisionConfig(model=model, image_size=32 if model.startswith("s") else None).build(RECIPE)
    state = torch.get_rng_state()
    one, same, other = (list(task.model(seed).parameters()) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_resnet8_has_eight_layers_in_three_stages(stride):
    model = Network("resnet8", channels=4, stride=stride).build((3, 16, 16), 5)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        *((3, 4), (4, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    ]
    images, side = torch.rand(2, 3, 16, 16), 16 // stride
    assert model[:-3](images).shape == (2, 16, side // 4, side // 4)
    # Seven convolutions, and the linear layer.
    assert model(images).shape == (2, 5)
    assert isinstance(model[-1], torch.nn.Linear)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_losses_run_under_vmap_and_equal_those_of_each_model(model):
    task = VisionConfig(model=model).build(RECIPE)
    models = [task.model(seed) for seed in range(3)]
    batch = task.pool.batch(np.arange(15))
    split = batch.map(lambda x: x.unflatten(0, (3, 5)))
    parameters, buffers = stack_module_state(models)

    def one(parameters, inputs, labels):
        part = Batch(inputs, labels, batch.positions[:5], 5, 5)
        return task.losses(lambda x: functional_call(models[0], (parameters, buffers), (x,)), part)

    stacked = vmap(one)(parameters, split.inputs, split.labels)
    apart = [task.losses(m, b) for m, b in zip(models, batch.split(3), strict=True)]
    assert torch.allclose(stacked, torch.stack(apart), atol=1e-5)


def test_metrics_agree_with_losses_and_restore_modes(noisy):
    model = torch.nn.Sequential(noisy.model(0), torch.nn.Dropout(0.5))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    metrics = noisy.metrics(model, noisy.target)
    assert [m.training for m in model.modules()] == modes
    everything = noisy.target.batch(np.arange(len(noisy.target)))
    losses = noisy.losses(model.eval(), everything)
    right = noisy.logits(model, everything).argmax(dim=1) == everything.labels
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(right.double().mean()))
    assert metrics["error"] + metrics["accuracy"] == pytest.approx(1)
    assert metrics["calibrated_loss"] <= metrics["loss"] + 1e-9
    assert noisy.objective(model).value == metrics["calibrated_loss"]
    assert metrics["tempered_loss"] == pytest.approx((metrics["loss"] + metrics["calibrated_loss"]) / 2)


def test_metrics_are_means_over_examples(noisy):
    model, one = noisy.model(0), noisy.target.subset(np.arange(1), "one")
    by_example, metrics = noisy.metrics_by_example(model, noisy.target), noisy.metrics(model, noisy.target)
    assert set(by_example) == set(noisy.averaged) == set(metrics) - {"accuracy"}
    for name, values in by_example.items():
        assert values.shape == (len(noisy.target),)
        assert values.mean() == metrics[name]
    for name in ("loss", "error"):
        assert by_example[name][0] == pytest.approx(noisy.metrics(model, one)[name], rel=1e-5)


def test_metrics_do_not_depend_on_the_batch_size(noisy, monkeypatch):
    model = noisy.model(0)
    at_once = noisy.metrics(model, noisy.test)
    monkeypatch.setattr("cads.tasks.vision.images.CHUNK", 7)
    assert noisy.metrics(model, noisy.test) == pytest.approx(at_once, rel=1e-6)


def calibrated_nll(logits, labels):
    losses, temperature = calibrated_losses(logits, labels)
    assert losses.shape == labels.shape
    return float(losses.mean()), temperature


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.integers(2, 12),
    st.floats(-3, 3),
    st.floats(-0.5, 3),
)
def test_calibrated_nll_is_the_minimum_over_temperatures(seed, n, n_classes, log_scale, signal):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    logits += signal * functional.one_hot(labels, n_classes)
    logits *= 10**log_scale
    nats, temperature = calibrated_nll(logits, labels)

    def nll(b):
        return float(functional.cross_entropy(b * logits, labels))

    assert nats <= nll(1) + 1e-9
    assert nats <= math.log(n_classes) + 1e-9
    assert nll(1 / temperature) == pytest.approx(nats, abs=1e-9)
    best = minimize_scalar(lambda u: nll(math.exp(u)), bounds=(-12, 12), method="bounded", options={"xatol": 1e-9})
    assert nats <= best.fun + 1e-9
    if 1e-4 < temperature < 1e4:
        assert nats == pytest.approx(best.fun, abs=1e-6)


def test_calibrated_nll_of_special_cases():
    labels = torch.tensor([0, 1])
    right = torch.eye(2) * 7
    nats, temperature = calibrated_nll(right, labels)
    assert nats < 1e-10
    assert 0 < temperature < 1
    assert calibrated_nll(right, 1 - labels) == (math.log(2), math.inf)
    assert calibrated_nll(torch.ones(2, 2), labels) == (math.log(2), math.inf)
    assert all(map(math.isnan, calibrated_nll(torch.tensor([[0.0, math.nan]]), labels[:1])))


def test_a_torchvision_network_takes_grey_and_colour(tmp_path):
    colour_data(height=32, width=32).save_to_disk(tmp_path)
    colour = VisionConfig(dataset="hub", path=str(tmp_path), model="resnet18").build(RECIPE)
    grey = VisionConfig(model="googlenet", image_size=32).build(RECIPE)
    for task in (colour, grey):
        losses = task.losses(task.model(0).train(), task.pool.batch(np.arange(3)))
        assert losses.shape == (3,)
        assert torch.isfinite(losses).all()


def test_pretrained_weights_are_used_where_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    task = VisionConfig(model="squeezenet1_1", pretrained=True, image_size=32).build(RECIPE)
    with pytest.raises(DataError, match=r"weights of squeezenet1_1 are not in .*--task\.download true"):
        task.model(0)
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state, tmp_path / "checkpoints" / url.split("/")[-1])
    loaded = task.model(0)[1].state_dict()
    assert torch.equal(loaded["features.0.weight"], state["features.0.weight"])
    assert len(loaded["classifier.1.weight"]) == 10


class Payload:
    """What an attacker puts in place of weights."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_hold_code_are_refused_and_never_run(zipped, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mark, url = tmp_path / "executed", torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.split("/")[-1]
    file.parent.mkdir(parents=True)
    torch.save({"features.0.weight": Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
    network = Network("squeezenet1_1", pretrained=True)
    with pytest.raises(DataError, match="weights of squeezenet1_1 cannot be loaded"):
        network.build((3, 32, 32), 10)
    assert not mark.exists()
    file.write_bytes(b"")
    with pytest.raises(DataError, match="weights of squeezenet1_1 cannot be loaded"):
        network.build((3, 32, 32), 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mnist"}, "dataset = 'mnist': choose from"),
        ({"dataset": "folder"}, "needs a path"),
        ({"dataset": "hub"}, "needs a path"),
        ({"model": "resnet19"}, r"model = 'resnet19' is unknown.*resnet18"),
        ({"model": "cnm"}, r"'cnn'"),
        ({"pretrained": True}, "only torchvision's have weights"),
        ({"hidden": 0}, "hidden = 0"),
        ({"channels": 0}, "channels = 0"),
        ({"n_target": 0}, "n_target = 0"),
        ({"n_pool": -1}, "n_pool = -1"),
        ({"image_size": 0}, "image_size = 0"),
        ({"data_seed": -1}, "data_seed = -1"),
        ({"sources": [SyntheticSource("a"), SyntheticSource("a")]}, "own name"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**settings)


def test_more_examples_than_there_are_is_refused():
    with pytest.raises(DataError, match=r"n_target = 1000 and n_pool = 500 are more than the 1438"):
        VisionConfig(n_target=1000, n_pool=500).build(RECIPE)
    with pytest.raises(DataError, match="ask for fewer"):
        VisionConfig(n_test=1797).build(RECIPE)
