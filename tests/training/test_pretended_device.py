"""Training, scoring and selection on a pretended device: nothing mixes devices, and a step waits for it once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import cads
from baselines.gradients.per_example import PerExample
from baselines.gradients.projection import make_projection
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, names
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.loop import TrainingLoop
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from tests.support.language_tasks import LORA, sharpened
from tests.support.pretended_device import pretended_device


@pytest.fixture
def device():
    with pretended_device() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def tasks(texts):
    """One of images, and one of texts, each with sources."""
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=16, n_pool=80, n_target=40, n_test=30, sources=sources)
    return {"images": config.build(TrainConfig(batch_size=8)), "texts": texts(batch_size=8)}


def trained(task, steps, seed=0):
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], task.recipe.batch_size)
    step = task.costs.per_usage(task.pool, task.recipe.batch_size) * task.recipe.batch_size
    return Trainer(task, Ledger()).fit(
        task.model(seed), draws, (steps + 0.5) * step, seed=seed, phase=TRAIN, stage="model"
    )


# Without a driver, the loader says that nothing is pinned.
pytestmark = pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")


class TestTheStandIn:
    def test_it_refuses_what_mixes_devices(self, device):
        layer = nn.Linear(3, 4).to("cuda")
        assert {p.device.type for p in layer.parameters()} == {"cuda"}
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(2, 3))
        assert layer(torch.ones(2, 3).to("cuda")).device.type == "cuda"
        assert layer(torch.ones(2, 3, device="cuda")).cpu().device.type == "cpu"

    def test_it_refuses_views_of_it_as_arrays(self, device):
        x = torch.arange(6, device="cuda").view(2, 3)[1]
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.cpu().numpy().tolist() == [3, 4, 5]

    def test_it_counts_what_makes_the_host_wait(self, device):
        x = torch.ones(3, device="cuda")
        (x * 2).sum()
        assert not device.waits
        assert float(x.sum()) == 3.0
        assert x.cpu() is not x
        assert x[x > 0].device.type == "cuda"
        assert device.waits == {"item": 1, "copy to the host": 1, "index": 1}

    def test_gradients_and_moments_are_there(self, device):
        layer = nn.Linear(3, 4).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(torch.ones(2, 3, device="cuda")).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        assert layer.weight.grad.device.type == "cuda"
        assert {x.device.type for x in optimizer.state[layer.weight].values()} == {"cuda"}
        assert not device.waits

    def test_copies_are_where_they_were_taken_from(self, device):
        import copy

        layer = nn.BatchNorm1d(3).to("cuda")
        assert {x.device.type for x in copy.deepcopy(layer).state_dict().values()} == {"cuda"}
        layer.cpu()
        assert {x.device.type for x in layer.state_dict().values()} == {"cpu"}


class TestTraining:
    @pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"optimizer": "sgd"}, {"clip_norm": None}])
    def test_the_host_waits_once_a_step(self, features, settings):
        task = features(batch_size=8, **settings)
        waits = {}
        for steps in (3, 7):
            with pretended_device() as device:
                result = trained(task, steps)
                assert {p.device.type for p in result.models[0].parameters()} == {"cuda"}
                waits[steps] = device.waits.total()
        assert waits[7] - waits[3] == 4

    @pytest.mark.parametrize("kind", ["images", "texts"])
    def test_the_online_method_adds_no_wait_to_a_step(self, tasks, monkeypatch, kind):
        waits = []
        plain_step = TrainingLoop._step

        def step(*args):
            before = device.waits.total()
            rate = plain_step(*args)
            waits.append(device.waits.total() - before)
            return rate

        monkeypatch.setattr(TrainingLoop, "_step", step)
        with pretended_device() as device:
            cads.select(tasks[kind], "12 epochs", method="cads")
            assert device.pinned > 0
        assert len(waits) > 10
        assert set(waits) == {1}

    def test_a_run_in_two_segments_is_one_run(self, features):
        task = features(batch_size=8, dropout=0.2)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 8)
        step = 8 * task.costs.per_usage(task.pool, 8)
        with pretended_device():
            trainer, model = Trainer(task, Ledger()), task.model(0)
            run = partial(trainer.fit, seed=0, phase=TRAIN, stage="model")
            whole = run(task.model(0), draws, 8.5 * step)
            first = run(model, draws, 4.5 * step, segment=RunSegment(horizon=8.5 * step, keep=True))
            second = run(task.model(0), draws, 8.5 * step, segment=RunSegment(start=first.state))
            for x, y in zip(whole.models[0].parameters(), second.models[0].parameters(), strict=True):
                assert x.device.type == y.device.type == "cuda"
                assert torch.equal(x, y)

    @pytest.mark.parametrize("network", ["cnn", "resnet18"])
    def test_images_and_running_means(self, images, network):
        task = images(model=network, batch_size=8)
        expected = trained(task, 2)
        with pretended_device() as device:
            result = trained(task, 2)
            assert {x.device.type for x in result.models[0].state_dict().values()} == {"cuda"}
            assert device.waits.total() <= 2
            assert task.metrics(result.models[0], task.test)["loss"] > 0
        assert np.array_equal(result.losses, expected.losses)

    def test_adapters_share_a_base_on_each_device(self, build):
        task = build(peft=LORA)
        with pretended_device():
            models = [trained(task, 2, seed=seed).models[0] for seed in (0, 1)]
            assert {p.device.type for model in models for p in model.parameters()} == {"cuda"}

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
    @pytest.mark.parametrize("peft", [None, LORA, {"type": "prompt_tuning", "num_virtual_tokens": 3}])
    def test_losses_of_texts_need_no_mask_of_the_padding(self, build, family, peft):
        if peft is LORA and family == "gpt2":
            peft = {**LORA, "target_modules": ["c_attn"]}
        task = build(family, peft=peft)
        batch = task.pool.batch(np.array([0, 7, 20, 33, 41]))
        assert not batch.inputs["attention_mask"].all()
        with torch.no_grad():
            model = sharpened(task.model(0))
            expected = task.losses(model, batch)
            with pretended_device() as device:
                losses = task.losses(model.to("cuda"), batch.to("cuda"))
                # All of them are of transformers, which looks at the mask or at the positions.
                assert device.waits.total() <= (1 if peft is None or peft["type"] == "lora" else 2)
                losses = losses.cpu()
        assert torch.allclose(losses, expected, atol=1e-5)

    @pytest.mark.parametrize("mode", ["batched", "loop"])
    def test_replicas(self, features, mode):
        task = features(batch_size=8, replicas=mode)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), k) for k in range(3)], 8)
        flops = 3.5 * 8 * task.costs.per_usage(task.pool, 8)

        def fit():
            models = [task.model(k) for k in range(3)]
            return Trainer(task, Ledger()).fit_replicas(models, draws, flops, seed=0, phase=TRAIN, stage="model")

        expected = fit()
        with pretended_device():
            result = fit()
            assert {p.device.type for model in result.models for p in model.parameters()} == {"cuda"}
        assert np.array_equal(result.losses, expected.losses)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_examples_make_nobody_wait(build, family):
    task = build(family, peft=LORA if family == "llama" else None)
    with pretended_device() as device:
        model = task.model(0).to("cuda")
        gradients = PerExample(task, model)
        sketch = make_projection(gradients.sizes, 32, 0, device.device)
        features = sketch.empty(4)
        batch = task.pool.batch(np.arange(4)).to("cuda")
        gradients.each(batch, lambda name, start, g: sketch.add(name, g, features[start : start + len(g)]))
        first = device.waits.copy()
        gradients.each(batch, lambda name, start, g: sketch.add(name, g, features[start : start + len(g)]))
        assert gradients.batched
        assert features.device.type == "cuda"
        # transformers looks whether rows are packed, once a pass.
        assert device.waits.total() <= 2 * first.total()
        assert first.total() <= 1


EVERYWHERE = [(name, "images") for name in names(SELECTORS) if name != "bm25"] + [
    (name, "texts") for name in ("embedding", "less", "loss", "ppl", "cads")
]


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_selectors_choose_as_on_the_cpu(tasks, name, kind):
    options = {"source": {"name": "clean"}}.get(name, {})

    def choose():
        ledger = Ledger()
        return cads.select(tasks[kind], Budget(6, "epochs"), method=name, ledger=ledger, **options), ledger

    expected, ledger_there = choose()
    with pretended_device():
        selection, ledger = choose()
    # Texts are scored in larger batches there, which are padded more and cost more.
    if kind == "images":
        assert ledger.total(SELECT).flops == ledger_there.total(SELECT).flops
    assert np.allclose(selection.probability, expected.probability, atol=1e-4 if kind == "images" else 1e-3)
