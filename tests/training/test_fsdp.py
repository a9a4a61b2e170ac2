"""A model divided among processes trains as one process trains it: gloo on CPUs, forked from this one."""

from __future__ import annotations

import json
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.cli.main import main
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError, ConfigError, NonFiniteError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.journal import Journal
from cads.runtime.processes import world_group
from cads.search.inner_runs import InnerLoop
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.training.fsdp import check_backend
from cads.training.run_state import RunSegment, TrainState
from cads.training.trainer import Trainer
from tests.support.forked_processes import (
    after_steps,
    chosen,
    ended,
    entries,
    killed,
    mortal,
    same,
    spread,
    started,
    weights,
)
from tests.support.killed_runs import EVERY_STEP
from tests.support.tiny_llama import model_folder, sums, write_lines

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""How far weights and losses may be from those of one process: sums of gradients are rounded otherwise."""
LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
KEEPING = RunSegment(keep=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Makes a language task: `llama(options, family="gpt2", **recipe)`."""
    folder = tmp_path_factory.mktemp("sharding")
    for family in ("llama", "gpt2"):
        model_folder(folder / family, family)
    write_lines(folder / "sums.jsonl", sums(40))

    def make(options=None, family="llama", **recipe):
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        config = LanguageConfig(model=str(folder / family), pool=pool, **(options or {}))
        return config.build(TrainConfig(**{"sharding": "full", "learning_rate": 0.01, "batch_size": 3} | recipe))

    return make


def fitted(task, *, steps=6, model=None, ledger=None, segment=KEEPING):
    """A Fit on pool and target, after about so many steps."""
    size = task.recipe.batch_size
    draws = BatchStream(
        task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], size, target=task.target, target_fraction=0.3
    )
    flops = steps * (size * task.costs.per_usage(task.pool, size) + task.costs.optimizer_step)
    trainer = Trainer(task, Ledger() if ledger is None else ledger)
    return trainer.fit(
        task.model(0) if model is None else model, draws, flops, seed=1, phase=TRAIN, stage="x", segment=segment
    )


def told(task, **options):
    """What a run leaves behind, as JSON."""
    ledger = Ledger()
    fit = fitted(task, ledger=ledger, **options)
    tensors = {name: x.double().flatten().tolist() for name, x in fit.state.tensors.items()} if fit.state else {}
    each = np.nan_to_num(fit.example_losses, nan=-1.0).tolist() if fit.example_losses is not None else []
    losses = fit.losses[:, 0].tolist()
    return {"weights": weights(fit.models[0]), "losses": losses, "each": each, "ledger": entries(ledger), **tensors}


class Choosing(nn.Module):
    """Some weights are used for some examples only, some for none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.rare, self.head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.gain, self.unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        scores = self.head(x) * self.gain
        chosen = x[:, 0] > 2
        return scores + self.rare(x) * chosen[:, None] if chosen.any() else scores


class TestTraining:
    def test_it_ends_where_one_process_ends(self, llama, texts, tmp_path):
        """Uneven and empty shares, tied weights, adapters, parts of models; optimizer state, losses of examples."""
        tasks = [
            texts(sharding="full", batch_size=3),
            llama(family="gpt2", accumulate=2),
            llama(batch_size=1, optimizer="sgd", learning_rate=0.1),
            llama({"peft": LORA, "gradient_checkpointing": True}),
            llama({"weighting": "token", "packing": True}, batch_size=5, clip_norm=None),
        ]

        def work():
            return [told(task) for task in tasks]

        one, result = work(), spread(2, work, tmp_path)
        for i in range(len(tasks)):
            same([f[i] for f in result], one[i], TOLERANCE)
            assert one[i]["losses"][0] != one[i]["losses"][-1]

    def test_in_bf16_it_is_near(self, llama, tmp_path):
        task = llama(precision="bf16")
        one = told(task, segment=RunSegment())["losses"]
        same(spread(2, lambda: told(task, segment=RunSegment())["losses"], tmp_path), one, 0.02)

    def test_weights_that_some_processes_do_not_use(self, features, tmp_path):
        task = features(batch_size=3, sharding="full", weight_decay=0.5)
        task._build = Choosing

        def work():
            fit = fitted(task, steps=20)
            return {"weights": weights(fit.models[0]), "unused": fit.models[0].unused.tolist()}

        one, result = work(), spread(2, work, tmp_path)
        same(result, one, TOLERANCE)
        assert one["unused"] == [1.0, 1.0]

    def test_what_batch_normalisation_mixes_is_not_divided(self, features, tmp_path):
        task = features(batch_size=4, sharding="full")
        build = task._build
        task._build = lambda: nn.Sequential(nn.BatchNorm1d(6), build())
        same(spread(2, lambda: told(task), tmp_path), told(task), TOLERANCE)

    @pytest.mark.parametrize("policy", ["stop", "skip"])
    def test_a_loss_that_is_not_finite_in_one_process_is_so_in_all(self, features, tmp_path, policy):
        task = features(batch_size=4, non_finite=policy, sharding="full", replicas="loop")
        task.pool.examples.rows[7] = np.nan

        def work():
            ledger = Ledger()
            try:
                fit = fitted(task, steps=80, ledger=ledger, segment=RunSegment())
            except NonFiniteError as error:
                return [str(error), error.step, error.ids, entries(ledger)]
            return [fit.skipped, np.isfinite(weights(fit.models[0])).all().item(), entries(ledger)]

        try:
            one, result = work(), spread(2, work, tmp_path)
        finally:
            task.pool.examples.rows[7] = 0.0
        assert result == [one] * 2
        assert one[:2] != [0, True]

    def test_inner_runs_train_in_turn(self, sentences, tmp_path):
        task = sentences(batch_size=4, sharding="full")

        def work():
            ledger = Ledger()
            streams = [ShuffledStream(np.arange(k, 100 - 20 * k), k) for k in range(3)]
            runs = InnerLoop(task, ledger, Monitor()).run(streams, 2e4, seed=0, stage="short runs", keep=3)
            models = {str(k): weights(model) for k, model in enumerate(runs.models)}
            return {"objective": runs.objective.tolist(), "ledger": entries(ledger), **models}

        one = work()
        same(spread(2, work, tmp_path), one, TOLERANCE)

    def test_one_process_is_the_same_without(self, llama, features, sentences, tmp_path):
        """Bit for bit, and silently; replicas too."""
        for make in (llama, features, sentences):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                full, none = (told(make(sharding=sharding, accumulate=2)) for sharding in ("full", "none"))
            assert full == none

        def replicas(sharding):
            streams = [ShuffledStream(np.arange(k, 100), k) for k in range(3)]
            runs = InnerLoop(features(sharding=sharding), Ledger(), Monitor()).run(
                streams, 1e5, seed=0, stage="short runs", keep=3
            )
            return [weights(model) for model in runs.models]

        assert replicas("full") == replicas("none")


class TestMemory:
    @pytest.mark.parametrize("options", [{}, {"peft": LORA}])
    def test_each_process_holds_half(self, llama, tmp_path, options):
        """Of what is trained, and of its optimizer state."""
        task = llama(options)

        def work():
            result = []

            def look(self, optimizer, state=TrainState.state, **keywords):
                if optimizer is not None:
                    parameters = [p for p in self.learner.parameters() if p.requires_grad]
                    moments = [optimizer.state[p]["exp_avg"] for p in parameters]
                    result.extend([_held(parameters), _held(moments), _held(model.parameters())])
                return state(self, optimizer, **keywords)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TrainState, "state", look)
                model = task.model(0)
                fitted(task, steps=3, model=model)
            return [*result, _held(model.parameters())]

        before = list(task.model(0).parameters())
        trained, all_values = _held(p for p in before if p.requires_grad), _held(before)
        first, second = spread(2, work, tmp_path)
        for i in (0, 1):
            assert first[i] + second[i] == trained
            assert max(first[i], second[i]) < 0.52 * trained
        # The model that was given is empty meanwhile, but for what is frozen.
        assert first[2] == second[2] == all_values - trained
        assert first[3] == second[3] == all_values


def _held(tensors):
    """Numbers in this process."""
    return sum(x.to_local().numel() if isinstance(x, DTensor) else x.numel() for x in tensors)


class TestGoingOn:
    """A checkpoint holds whole tensors, whoever has written it."""

    def test_with_other_numbers_of_processes(self, llama, tmp_path):
        task = llama({"peft": LORA})

        def work(folder, steps=None):
            if steps is not None:
                mortal(steps)
            with Journal(tmp_path / folder, {"seed": 0}, EVERY_STEP).open():
                return told(task, steps=12)

        one = work("whole")
        for size, steps in ((2, 3), (1, 3), (2, 2)):
            killed(size, lambda steps=steps: work("journal", steps), tmp_path / "said")
            (written,) = sorted(tmp_path.glob("journal/*-underway/tensors.safetensors"))[-1:]
            stored = load_file(written)
            assert {x.shape for name, x in stored.items() if name.endswith("lora_A.default.weight/exp_avg")} == {
                (4, 16)
            }
        same(spread(2, lambda: work("journal"), tmp_path / "said"), one, TOLERANCE)
        # What is finished answers without training.
        same([work("journal")], one, TOLERANCE)

    def test_with_the_same_number_to_the_same_bits(self, llama, tmp_path):
        task = llama()

        def work(folder, steps=None):
            if steps is not None:
                mortal(steps)
            with Journal(tmp_path / folder, {"seed": 0}, EVERY_STEP).open():
                return told(task, steps=8)

        told(task, steps=8)  # so that costs are known
        uninterrupted = spread(2, lambda: work("whole"), tmp_path / "said")
        killed(2, lambda: work("journal", 4), tmp_path / "said")
        assert spread(2, lambda: work("journal"), tmp_path / "said") == uninterrupted

    def test_cads_to_the_same_bits(self, llama, tmp_path):
        """Its probabilities are those of the step at which it was killed."""
        task, budget = llama(), Budget.parse("4 epochs")

        def work(folder, steps=None):
            if steps is not None:
                mortal(steps)
            with Journal(tmp_path / folder, {"seed": 0}, EVERY_STEP).open():
                selection = build_selector("cads").select(task, budget, seed=0, ledger=Ledger(), monitor=Monitor())
            return chosen(selection) | {"course": selection.notes["course"]}

        task.costs.per_usage(task.pool, task.recipe.batch_size)  # so that costs are known
        uninterrupted = spread(2, lambda: work("whole"), tmp_path / "said")
        assert "probability" in uninterrupted[0]
        for steps in (5, 25):
            killed(2, lambda steps=steps: work("journal", steps), tmp_path / "said")
            assert list(tmp_path.glob("journal/*-underway/tensors.safetensors")), "it was not killed on its way"
        assert spread(2, lambda: work("journal"), tmp_path / "said") == uninterrupted

    def test_from_the_end_of_an_earlier_part(self, llama, tmp_path):
        task = llama()

        def work():
            first = fitted(task, steps=4, segment=RunSegment(horizon=1e9, keep=True))
            return told(task, steps=8, segment=RunSegment(start=first.state, horizon=1e9))

        one = work()
        same(spread(2, work, tmp_path), one, TOLERANCE)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({"replicas": "batched"}, "sharded ones train one by one"), ({"precision": "fp16"}, "fp16 scales the loss")],
    )
    def test_recipes(self, options, message):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(sharding="full", **options)
        with pytest.raises(ConfigError, match="sharding = 'half'"):
            TrainConfig(sharding="half")

    def test_models(self, features, tmp_path):
        task = features(batch_size=4, sharding="full")

        def scalar(model):
            model.scale = nn.Parameter(torch.tensor(1.0))

        def tied(model):
            model.layers[1].weight = model.layers[0].weight

        def mixed(model):
            model.layers[0].bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))

        def sparse(model):
            model.layers[0].weight = nn.Parameter(torch.ones(6, 6).t())

        def work():
            said = []
            for change in (scalar, tied, mixed, sparse):
                model = Choosing()
                change(model)
                before = weights(model)
                with pytest.raises(ConfigError) as result:
                    fitted(task, model=model)
                said.append(str(result.value))
                assert weights(model) == before
            with pytest.raises(ConfigError) as result:
                check_backend(torch.device("cuda"))
            return [*said, str(result.value)]

        first, second = spread(2, work, tmp_path)
        assert first == second
        expected = [
            "the weights scale are a single number",
            "the weights layers.1.weight belong to several layers",
            "the weights layers.0.bias are torch.float64, others of their layer torch.float32",
            "cannot be divided (FSDP does not support non-contiguous parameters yet",
            "sharding = 'full' does not run on cuda",
        ]
        assert all(part in text for part, text in zip(expected, first, strict=True)), first
        assert all("sharding = 'none'" in text for text in first)

    def test_a_budget_below_one_step_leaves_the_model_as_it_was(self, features, tmp_path):
        task = features(batch_size=4, sharding="full")

        def work():
            model = task.model(0)
            before = weights(model)
            with pytest.raises(BudgetError, match="do not buy one step"):
                fitted(task, steps=0.5, model=model)
            return weights(model) == before

        assert spread(2, work, tmp_path) == [True, True]


def test_one_that_is_killed_ends_the_others(features, tmp_path):
    task = features(batch_size=4, sharding="full")

    def die(step):
        if step == 3 and not world_group().first:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        after_steps(die)
        fitted(task, steps=1000)

    ended(started(2, work, tmp_path), 60)
    kind, message = json.loads((tmp_path / "0.json").read_text())["error"]
    assert kind == "ProcessError"
    assert "process 0 of 2 has lost the others" in message


def test_commands(tmp_path):
    """A selection, and a trained model that is written whole."""
    (tmp_path / "config.yaml").write_text(
        "task: {hidden: 8, n_pool: 120, n_target: 40, n_test: 40, sources: [{name: a}, {name: b, label_noise: 0.9}]}\n"
        "train: {batch_size: 16, learning_rate: 0.003, sharding: full}\nbudget: 2 epochs\nprogress: false\n"
    )

    def select(name):
        out = str(tmp_path / name / "select")
        return main(["select", str(tmp_path / "config.yaml"), "--method", "loss", "--out", out])

    def train(name):
        arguments = ["--selection", str(tmp_path / name / "select" / "selection"), "--out", str(tmp_path / name)]
        return main(["train", str(tmp_path / "config.yaml"), *arguments])

    for command in (select, train):
        assert command("one") == 0
        assert spread(2, lambda command=command: command("two"), tmp_path / "said") == [0, 0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one | two)
