"""Training, scoring and selection on a GPU, and on a stand-in for one where there is none.

Each test runs on both, but for what only a GPU has. On the stand-in, whose kernels are those of the CPU, numbers are
equal bit by bit. On a GPU they are within `BOUND`, which leaves room for TF32 and for another order of sums.
"""

from __future__ import annotations

import gc
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import cads
from baselines.gradients.per_example import PerExample
from baselines.gradients.projection import make_projection
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.planning.memory import training_memory
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, names
from cads.runtime.lockstep import StepReporter
from cads.scoring.pool_scores import score_pool
from cads.scoring.reference_models import device_of
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.device_settings import device_settings
from cads.training.learners import SingleLearner
from cads.training.loop import TrainingLoop
from cads.training.precision import autocast
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from cads.training.unread import READ_TOGETHER, UnreadSteps
from tests.support.fitted import fit, step_cost, streams_of, whole_pool
from tests.support.language_tasks import LORA, sharpened
from tests.support.pretended_device import pretended_device
from tests.support.real_device import on_cpu, real_device

BOUND = 0.02
"""Relative difference of losses between a GPU and the CPU over a few steps."""
REPEATED = 1e-3
"""Relative difference of losses between two runs of one seed on a GPU, whose kernels may sum in another order."""
GPU = pytest.mark.gpu
SHORT_RUNS = 50

# Without a driver, the loader says that nothing is pinned.
pytestmark = pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")


@pytest.fixture(params=[pretended_device, pytest.param(real_device, marks=GPU)], ids=["pretended", "real"])
def gpu(request):
    """A context in which training is on a GPU."""
    return request.param


@pytest.fixture
def same(gpu):
    """Whether two arrays are equal, as far as they can be there."""
    return np.array_equal if gpu is pretended_device else partial(np.allclose, rtol=BOUND, atol=BOUND)


@pytest.fixture(scope="module")
def tasks(texts):
    """One of images, and one of texts, each with sources."""
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
    config = VisionConfig(hidden=16, n_pool=80, n_target=40, n_test=30, sources=sources)
    return {"images": config.build(TrainConfig(batch_size=8)), "texts": texts(batch_size=8)}


def trained(task, steps, seed=0):
    return fit(task, (steps + 0.5) * step_cost(task), seed=seed)


def devices(*models):
    return {x.device.type for model in models for x in model.state_dict().values()}


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"optimizer": "sgd"}, {"clip_norm": None}])
def test_the_host_waits_once_for_many_steps(gpu, features, settings):
    task = features(batch_size=8, **settings)
    waits = {}
    for steps in (5, 5 + 3 * READ_TOGETHER):
        with gpu() as device:
            before = device.waits.total()
            result = trained(task, steps)
            assert devices(*result.models) == {"cuda"}
            assert len(result.losses) == steps
            waits[steps] = device.waits.total() - before
    assert waits[5 + 3 * READ_TOGETHER] - waits[5] == 3


@pytest.mark.parametrize("kind", ["images", "texts", "llama"])
def test_steps_of_the_online_method_wait_for_nothing(gpu, tasks, build, monkeypatch, kind):
    """The host waits where the probabilities move: after 256 examples, or before a window of steps is drawn."""
    waits, reads = [], []
    plain_step, plain_take = TrainingLoop._step, UnreadSteps.take

    def step(*args):
        before = device.waits.total()
        plain_step(*args)
        waits.append(device.waits.total() - before)

    def take(unread):
        reads.append(len(unread))
        return plain_take(unread)

    monkeypatch.setattr(TrainingLoop, "_step", step)
    monkeypatch.setattr(UnreadSteps, "take", take)
    task = build("llama", peft=LORA) if kind == "llama" else tasks[kind]
    with gpu() as device:
        cads.select(task, "12 epochs", method="cads")
    assert len(waits) > 10
    assert set(waits) == {0}
    assert sum(reads) == len(waits)
    assert max(reads) > 4


class TestFailures:
    """The host finds out some steps later; the weights are those of the last good step all the same."""

    def failed(self, task):
        trainer = Trainer(task, Ledger())
        learner = SingleLearner(task, task.model(0))
        run = trainer.prepare(learner, whole_pool(task), 30.5 * step_cost(task), 0, TRAIN, "final model")
        state = trainer.steps(run, StepReporter())
        assert state.values["failure"] is not None
        return state.values["failure"], {n: x.detach().cpu().numpy() for n, x in state.tensors.items()}

    @pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"accumulate": 2}])
    @pytest.mark.parametrize("normalised", [False, True])
    def test_the_weights_are_those_of_the_last_good_step(self, gpu, features, settings, normalised, same):
        task = features(batch_size=8, sources=0, **settings)
        order = ShuffledStream(np.arange(len(task.pool)), 0).take(0, 8 * 8)
        task.pool.examples.rows[order[8 * 6 + 3]] = np.inf
        if normalised:
            build = task._build
            task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        failure, expected = self.failed(task)
        with gpu():
            found, state = self.failed(task)
        assert failure["step"] == 6
        assert found == failure
        assert len(expected["losses"]) == 6
        assert set(state) == set(expected)
        for name, x in expected.items():
            assert np.isfinite(x).all()
            assert same(state[name], x), name

    def test_a_bad_batch_can_be_skipped(self, gpu, features, same):
        task = features(batch_size=8, sources=0, non_finite="skip")
        task.pool.examples.rows[5::40] = np.inf
        expected = trained(task, 20)
        with gpu():
            found = trained(task, 20)
        assert found.skipped == expected.skipped > 0
        assert same(np.nan_to_num(found.losses), np.nan_to_num(expected.losses))


def test_batches_of_the_online_method_are_pinned(tasks):
    with pretended_device() as device:
        cads.select(tasks["images"], "12 epochs", method="cads")
        assert device.pinned > 0


@GPU
def test_batches_are_pinned_on_a_gpu(features):
    with real_device():
        assert whole_pool(features(batch_size=8)).step(0)[0].pin_memory().labels.is_pinned()


def test_a_run_in_two_segments_is_one_run(gpu, features):
    task = features(batch_size=8)
    draws, step = whole_pool(task), step_cost(task)
    with gpu():
        trainer, model = Trainer(task, Ledger()), task.model(0)
        run = partial(trainer.fit, seed=0, phase=TRAIN, stage="final model")
        whole = run(task.model(0), draws, 8.5 * step)
        first = run(model, draws, 4.5 * step, segment=RunSegment(horizon=8.5 * step, keep=True))
        assert {x.device.type for x in first.state.tensors.values()} == {"cpu"}
        second = run(task.model(0), draws, 8.5 * step, segment=RunSegment(start=first.state))
        assert devices(*whole.models, *second.models) == {"cuda"}
        for x, y in zip(whole.models[0].parameters(), second.models[0].parameters(), strict=True):
            assert torch.equal(x, y)


def test_a_killed_run_goes_on_there(gpu, features, tmp_path, monkeypatch):
    task = features(batch_size=8)
    train = partial(cads.train, task, "3 epochs", method="random", fraction=0.5)
    plain_step, taken = TrainingLoop._step, []

    def step(*args):
        if len(taken) == 20:
            raise KeyboardInterrupt
        taken.append(args)
        return plain_step(*args)

    monkeypatch.setattr("cads.training.final.matmul_flops_per_second", lambda *_: 1e12)
    with gpu():
        expected = train().metrics
        monkeypatch.setattr(TrainingLoop, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints=tmp_path)
        monkeypatch.setattr(TrainingLoop, "_step", plain_step)
        trained = train(checkpoints=tmp_path)
        assert trained.metrics == expected
        assert devices(trained.model) == {"cuda"}


@pytest.mark.parametrize("network", ["cnn", "resnet18"])
def test_images_and_running_means(gpu, same, images, network):
    task = images(model=network, batch_size=8)
    with on_cpu():
        expected = trained(task, 2)
    with gpu():
        result = trained(task, 2)
        assert devices(*result.models) == {"cuda"}
        assert task.metrics(result.models[0], task.test)["loss"] > 0
    assert same(result.losses, expected.losses)


@pytest.mark.parametrize("mode", ["batched", "loop"])
def test_replicas(gpu, same, features, mode):
    task = features(batch_size=8, replicas=mode)
    draws = BatchStream(task.pool, streams_of(task, 3), 8)

    def run():
        models = [task.model(k) for k in range(3)]
        trainer = Trainer(task, Ledger())
        return trainer.fit_replicas(models, draws, 3.5 * step_cost(task), seed=0, phase=TRAIN, stage="model")

    with on_cpu():
        expected = run()
    with gpu():
        result = run()
        assert devices(*result.models) == {"cuda"}
    assert same(result.losses, expected.losses)


def test_adapters_share_a_base(gpu, build):
    task = build(peft=LORA)
    with gpu():
        models = [trained(task, 2, seed=seed).models[0] for seed in (0, 1)]
        assert devices(*models) == {"cuda"}
        first, second = ({p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in models)
        assert first == second


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("peft", [None, LORA, {"type": "prompt_tuning", "num_virtual_tokens": 3}])
def test_losses_of_texts_need_no_mask_of_the_padding(gpu, build, family, peft):
    if peft is LORA and family == "gpt2":
        peft = {**LORA, "target_modules": ["c_attn"]}
    task = build(family, peft=peft)
    batch = task.pool.batch(np.array([0, 7, 20, 33, 41]))
    assert not batch.inputs["attention_mask"].all()
    with torch.no_grad():
        model = sharpened(task.model(0))
        expected = task.losses(model, batch)
        with gpu() as device:
            model, there = model.to("cuda"), batch.to("cuda")
            before = device.waits.total()
            losses = task.losses(model, there)
            # All of them are of transformers, which looks at the mask of virtual tokens.
            assert device.waits.total() - before <= (0 if peft is None or peft["type"] == "lora" else 2)
            losses = losses.cpu()
    assert torch.allclose(losses, expected, atol=1e-5 if gpu is pretended_device else BOUND)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_examples_make_nobody_wait(gpu, build, family):
    task = build(family, peft=LORA if family == "llama" else None)
    with gpu() as device:
        model = task.model(0).to("cuda")
        gradients = PerExample(task, model)
        sketch = make_projection(gradients.sizes, 32, 0, device.device)
        batch = task.pool.batch(np.arange(4)).to("cuda")
        assert gradients.check(batch) == 3
        assert gradients.batched

        def features():
            into, before = sketch.empty(4), device.waits.total()
            gradients.each(batch, lambda name, start, g: sketch.add(name, g, into[start : start + len(g)]))
            return into, device.waits.total() - before

        features()
        into, waits = features()
        assert not waits
        assert into.device.type == "cuda"
        assert into.cpu().isfinite().all()


def test_a_projection_is_the_same_map_everywhere(gpu):
    sizes = {"a": 50, "b": 33}
    x = {name: torch.randn(3, n, generator=torch.Generator().manual_seed(n)) for name, n in sizes.items()}

    def projected(device):
        sketch = make_projection(sizes, 16, 0, device)
        into = sketch.empty(3)
        for name, gradient in x.items():
            sketch.add(name, gradient.to(device), into)
        return into.cpu()

    expected = projected("cpu")
    with gpu():
        assert torch.allclose(projected("cuda"), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_scores(gpu, tasks, kind):
    task = tasks[kind]
    model = task.model(0)

    def losses():
        score = partial(task.losses, model)
        on = device_of(model)
        return score_pool(task.pool, score, task.costs.forward, ledger=Ledger(), stage="losses", device=on)

    with on_cpu():
        expected = losses()
    with gpu():
        model.to("cuda")
        assert np.allclose(losses(), expected, atol=1e-5 if gpu is pretended_device else BOUND)


def test_memory_does_not_grow_over_short_runs(gpu, features):
    task = features(batch_size=8)
    allocated = []
    with gpu() as device:
        for seed in range(SHORT_RUNS):
            trained(task, 1, seed=seed)
            if seed % 16 == 1:
                gc.collect()
                allocated.append(device.allocated)
    assert len(allocated) > 3
    assert len(set(allocated)) == 1


EVERYWHERE = [(name, "images") for name in names(SELECTORS) if name != "bm25"] + [
    (name, "texts") for name in ("embedding", "less", "loss", "ppl", "cads")
]


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_selectors_choose_as_on_the_cpu(gpu, tasks, name, kind):
    options = {"source": {"name": "clean"}}.get(name, {})

    def choose():
        ledger = Ledger()
        return cads.select(tasks[kind], Budget(6, "epochs"), method=name, ledger=ledger, **options), ledger

    with on_cpu():
        expected, ledger_there = choose()
    with gpu():
        selection, ledger = choose()
    # Texts are scored in larger batches there, which are padded more and cost more.
    if kind == "images":
        assert ledger.total(SELECT).flops == ledger_there.total(SELECT).flops
    if gpu is pretended_device:
        assert np.allclose(selection.probability, expected.probability, atol=1e-4 if kind == "images" else 1e-3)
    assert np.isfinite(selection.probability).all()


@GPU
class TestOnlyOnAGpu:
    @pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
    def test_it_trains_within_the_budget(self, features, precision):
        task, ledger = features(batch_size=8, precision=precision), Ledger()
        flops = Budget(2, "epochs").flops(task)
        with real_device():
            result = fit(task, flops, ledger=ledger)
            assert devices(*result.models) == {"cuda"}
        assert np.isfinite(result.losses).all()
        assert 0 < ledger.total(TRAIN).flops <= flops

    def test_autocast_multiplies_in_half_precision(self):
        with real_device(), autocast("bf16", "cuda"):
            assert (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).dtype == torch.bfloat16

    def test_one_seed_gives_one_run(self, images):
        task = images(model="cnn", batch_size=8)
        with real_device():
            first, second = (trained(task, 20).losses for _ in range(2))
        assert np.allclose(first, second, rtol=REPEATED)

    def test_peak_memory_is_about_that_of_the_plan(self, features):
        task = features(hidden=2048, batch_size=256)
        with real_device():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trained(task, 3)
            peak = torch.cuda.max_memory_allocated() - before
        assert 0.3 < training_memory(task).total / peak < 3

    def test_texts_in_half_precision_run_in_flash_attention(self, build):
        task = build(dtype="bfloat16", recipe=TrainConfig(batch_size=8, precision="bf16"))
        batch = task.pool.batch(np.arange(8))
        with real_device(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            assert task.losses(task.model(0).to("cuda"), batch.to("cuda")).isfinite().all()

    def test_the_settings_name_it(self):
        assert torch.cuda.get_device_name() in str(device_settings(TrainConfig()))

    def test_products_are_timed(self):
        assert matmul_flops_per_second("cuda", "bf16") > 1e12

    def test_workers_may_start_after_the_device_is_in_use(self, features):
        task = features(batch_size=8, workers=2)
        with real_device(), warnings.catch_warnings():
            torch.zeros(1, device="cuda")
            assert np.isfinite(trained(task, 3).losses).all()
