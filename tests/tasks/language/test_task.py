"""The language task: losses, packing, weighting, what it costs, and what it measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.accounting.measured import count_flops
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.models import LanguageModels
from cads.tasks.language.output_head import answer_logits
from cads.tasks.language.rows import TextSource
from cads.tasks.language.tokens import IGNORED, tokens_of
from cads.training.trainer import Trainer
from tests.support.language_tasks import LORA, plainly, sharpened

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
DATA = pytest.mark.parametrize("data", ["sums", "talks"])


class TestLosses:
    @FAMILIES
    @DATA
    def test_they_are_those_of_transformers(self, build, family, data):
        task = build(family, data)
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(12))
        with torch.no_grad():
            actual, expected = task.losses(model, batch), plainly(model, batch)
        assert expected.std() > 0.05
        assert torch.allclose(actual, expected, atol=1e-5)

    def test_with_adapters(self, build):
        task = build(peft=LORA)
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(12))
        with torch.no_grad():
            assert torch.allclose(task.losses(model, batch), plainly(model, batch), atol=1e-5)

    def test_the_head_computes_answers_alone_and_an_unknown_one_everything(self, build):
        task = build()
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(4))
        seen = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[:2])))
        with torch.no_grad():
            inputs, places = task.model_inputs(model, batch)
            known = answer_logits(model, inputs, places)
            head._forward_pre_hooks.clear()
            unknown = answer_logits(model, inputs, places)
        assert seen == [tuple(places.shape), tuple(inputs["input_ids"].shape)]
        assert seen[0][1] < seen[1][1]
        assert torch.allclose(known, unknown, atol=1e-5)

    @pytest.mark.parametrize("packing", [False, True])
    def test_company_changes_nothing(self, build, packing):
        """Neither the order nor the size of a batch changes the loss of an example by more than 1e-5."""
        task = build(packing=packing)
        model, n = sharpened(task.model(0)), 24
        order = np.random.default_rng(0).permutation(n)

        def losses(batches):
            result = np.zeros(n)
            for rows in batches:
                result[rows] = task.losses(model, task.pool.batch(rows)).numpy()
            return result

        with torch.no_grad():
            alone = losses(np.arange(n)[:, None])
            assert np.abs(losses([order]) - alone).max() < 1e-5
            assert np.abs(losses(np.array_split(order, 5)) - alone).max() < 1e-5

    @FAMILIES
    @DATA
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_packed_equals_unpacked(self, build, family, data, attention):
        task = build(family, data, packing=True, attn_implementation=attention)
        plain = build(family, data, attn_implementation=attention)
        model = sharpened(task.model(0))
        packed, unpacked = task.pool.batch(np.arange(10)), plain.pool.batch(np.arange(10))
        rows = int(packed.inputs["row"].max()) + 1
        assert 1 < rows < 10
        with torch.no_grad():
            assert torch.allclose(task.losses(model, packed), plain.losses(model, unpacked), atol=1e-5)

    def test_packed_gradients_equal_unpacked(self, build):
        gradients = []
        for packing in (False, True):
            task = build(packing=packing)
            model = sharpened(task.model(0))
            task.losses(model, task.pool.batch(np.arange(8))).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.allclose(*gradients, atol=1e-6)

    def test_packed_pool_and_target_stand_apart(self, build):
        """A step that takes from both learns what it would learn unpacked, also where they are of one shape."""
        steps, result = [], []
        for packing in (False, True):
            task = build(packing=packing)
            draws = BatchStream(
                task.pool, [ShuffledStream(np.arange(40), 0)], 4, target=task.target, target_fraction=0.5
            )
            model = sharpened(task.model(0))
            steps = [draws.step(step) for step in range(8)]
            with torch.no_grad():
                losses = [torch.cat([task.losses(model, piece) for piece in pieces]) for pieces in steps]
            result.append(torch.stack([x.sort().values for x in losses]))
        assert any(pool.shape == target.shape for pool, target in steps)
        assert torch.allclose(*result, atol=1e-5)

    def test_packing_is_refused_where_it_does_not_go(self, build):
        with pytest.raises(ConfigError, match="accumulate = 2: packed batches are not cut"):
            build(packing=True, recipe=TrainConfig(batch_size=8, accumulate=2))
        with pytest.raises(ConfigError, match="packing needs a mask"):
            build(packing=True, attn_implementation="flash_attention_2")

    def test_scores_are_means_whatever_the_weighting(self, build):
        by_token, by_example = build(weighting="token"), build()
        model, batch = sharpened(by_token.model(0)), by_token.pool.batch(np.arange(6))
        assert torch.equal(by_token.losses(model, batch), by_example.losses(model, batch))
        assert torch.equal(by_example.training_losses(model, batch), by_example.losses(model, batch))

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_token_weighting_is_the_mean_over_tokens(self, build, accumulate):
        """Against the sum over all answer tokens divided by their number, also where a batch is cut into pieces."""
        task = build(weighting="token", data="talks")
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(12))
        logits = model(batch.inputs["input_ids"], batch.inputs["attention_mask"]).logits[:, :-1]
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        actual = sum(task.training_losses(model, piece).sum() for piece in batch.split(accumulate)) / len(batch)
        assert torch.allclose(actual, expected, atol=1e-5)
        assert not torch.allclose(task.losses(model, batch).mean(), expected, atol=1e-5)

    def test_the_trainer_minimises_what_weighting_says(self, build):
        for weighting in ("token", "example"):
            task = build(weighting=weighting)
            model = task.model(0)
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 8)
            [first] = draws.step(0)
            with torch.no_grad():
                expected = float(task.training_losses(model, first).mean())
            fit = Trainer(task, Ledger()).fit(model, draws, 3 * task.costs.usage(first), seed=0, phase=TRAIN, stage="s")
            assert fit.losses[0, 0] == pytest.approx(expected, abs=1e-5)


def executed(task, batch):
    """FLOPs of forward and backward, counted while they run on the CPU."""
    model = task.model(0).train()
    return count_flops(lambda: task.losses(model, batch).mean().backward())


class TestAdapters:
    """Any kind of adapter and precision trains, and costs what it executes."""

    @pytest.mark.parametrize(
        ("options", "recipe"),
        [
            ({"peft": {"type": "prompt_tuning", "num_virtual_tokens": 4}}, {}),
            ({"peft": {"type": "prefix_tuning", "num_virtual_tokens": 4}}, {}),
            ({"peft": {**LORA, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}}, {}),
            ({"peft": {**LORA, "target_modules": "all-linear"}, "gradient_checkpointing": True}, {"accumulate": 2}),
            ({"packing": True}, {"precision": "bf16"}),
            ({"packing": True, "dtype": "bfloat16"}, {}),
            ({"peft": LORA, "dtype": "bfloat16"}, {}),
        ],
        ids=["prompt", "prefix", "head", "all-linear", "autocast", "half", "half-lora"],
    )
    def test_it_trains(self, build, options, recipe):
        task = build(recipe=TrainConfig(batch_size=8, learning_rate=0.05, **recipe), **options)
        model, batch = task.model(0), task.pool.batch(np.arange(8))
        before = task.metrics(model, task.pool)["loss"]
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 8)
        flops = 12 * 8 * task.costs.per_usage(task.pool, 8)
        Trainer(task, Ledger()).fit(model, draws, flops, seed=0, phase=TRAIN, stage="adapters")
        assert task.metrics(model, task.pool)["loss"] < before - 1e-3
        assert task.costs.usage(batch) == pytest.approx(executed(task, batch), rel=0.01)


class TestCosts:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"peft": LORA},
            {"gradient_checkpointing": True},
            {"peft": LORA, "gradient_checkpointing": True},
            {"attn_implementation": "eager"},
            {"packing": True},
            {"packing": True, "peft": LORA},
            {"family": "gpt2"},
            {"data": "talks"},
            {"data": "texts"},
        ],
        ids=lambda o: "-".join(map(str, o)) or "full",
    )
    def test_what_is_charged_is_what_is_executed(self, build, options):
        task = build(**options)
        for rows in (np.arange(8), np.array([3]), tokens_of(task.pool).lengths().argsort()[-5:]):
            batch = task.pool.batch(rows)
            assert task.costs.usage(batch) == pytest.approx(executed(task, batch), rel=0.01)
            model = task.model(0)
            with torch.no_grad():
                forward = count_flops(lambda m=model, b=batch: task.losses(m, b))
            assert task.costs.forward(batch) == pytest.approx(forward, rel=0.01)

    def test_few_batches_are_counted_for_many_shapes(self, build, monkeypatch):
        task = build(data="texts")
        counted = []
        price = type(task.costs._accounting).price
        monkeypatch.setattr(type(task.costs._accounting), "price", lambda s, b: counted.append(b.shape) or price(s, b))
        task.costs.usages(task.pool)
        assert len(counted) <= 5
        assert len(task.pool.examples.shapes()[0]) > 10

    @pytest.mark.parametrize("peft", [None, LORA])
    def test_closed_forms_know_that_the_head_computes_answers_alone(self, build, peft):
        measured, analytic = build(peft=peft), build(peft=peft)
        analytic.accounting = "analytic"
        batch = measured.pool.batch(np.arange(8))
        assert analytic.costs.accounting == "analytic"
        assert analytic.costs.usage(batch) == pytest.approx(measured.costs.usage(batch), rel=0.01)

    def test_measuring_is_charged_what_it_executes(self, build):
        task = build()
        model = task.model(0)
        assert task.costs.forward_pool(task.test) == count_flops(lambda: task.metrics(model, task.test))

    def test_a_budget_in_tokens(self, build):
        task = build()
        tokens = task.costs.tokens_per_example(task.pool)
        assert Budget(10 * tokens, "tokens").flops(task) == pytest.approx(Budget(10, "usages").flops(task), rel=1e-6)

    def test_paper_accounting_is_6nd_without_adapters_and_padding(self, build):
        task = build(peft=LORA)
        task.accounting = "paper"
        [n] = {sum(p.numel() for p in task.models.base.parameters())}
        batch = task.pool.batch(np.array([0]))
        lengths = tokens_of(task.pool).lengths()
        assert task.costs.usage(batch) == 6 * n * lengths[0]
        # Lengths that are padded to one shape differ, and each is charged for its own.
        representatives, shapes = task.pool.examples.shapes()
        assert len(set(zip(shapes.tolist(), lengths.tolist(), strict=True))) > len(representatives)
        np.testing.assert_allclose(task.costs.usages(task.pool), 6 * n * lengths, rtol=1e-12)
        assert task.costs.tokens_per_example(task.pool) == lengths.mean()
        assert task.costs.forward_pool(task.pool) == pytest.approx(2 * n * lengths.sum(), rel=1e-12)
        for packed in (False, True):
            pool = Pool(task.pool.ids, replace(task.pool.examples, packed=packed))
            for rows in np.array_split(np.arange(len(pool)), 5):
                assert task.costs.usage(pool.batch(rows)) == pytest.approx(6 * n * lengths[rows].sum(), rel=1e-12)


class TestMeasures:
    def test_metrics(self, build):
        task = build(data="talks")
        model = sharpened(task.model(0))
        batch = task.test.batch(np.arange(len(task.test)))
        with torch.no_grad():
            means = plainly(model, batch).double()
        counts = (batch.labels != IGNORED).sum(dim=1)
        token_loss = float((means * counts).sum() / counts.sum())
        result = task.metrics(model.train(), task.test)
        assert model.training
        assert result["loss"] == pytest.approx(float(means.mean()), abs=1e-5)
        assert result["token_loss"] == pytest.approx(token_loss, abs=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(token_loss), rel=1e-4)
        objective = task.objective(model)
        assert objective.value == float(task.metrics(model, task.target)["loss"])
        assert objective.by_example is not None
        assert objective.by_example.shape == (len(task.target),)
        assert task.objective(model, "token_loss").by_example is None

    def test_features_are_mean_hidden_states(self, build):
        task = build()
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(5))
        with torch.no_grad():
            result = task.features(model, batch)
            for row in range(5):
                n = int(batch.inputs["attention_mask"][row].sum())
                alone = model.model(batch.inputs["input_ids"][row : row + 1, :n]).last_hidden_state
                assert torch.allclose(result[row], alone[0].mean(dim=0), atol=1e-5)

    @DATA
    def test_texts_ask_and_never_answer(self, build, data):
        task = build(data=data)
        texts, described = task.texts(task.pool), task.describe(task.pool, np.arange(len(task.pool)))
        for text, description in zip(texts, described, strict=True):
            assert text.startswith("what is ")
            assert text in description
            assert "." not in text


class TestMetaTask:
    @pytest.mark.parametrize("peft", [None, LORA])
    def test_it_says_what_the_task_costs_and_loads_no_weights(self, build, folder, monkeypatch, peft):
        config = LanguageConfig(
            model=str(folder / "llama"), pool=[TextSource(path=str(folder / "sums.jsonl"))], peft=peft
        )
        task = config.build(TrainConfig(batch_size=8))
        task.accounting = "analytic"
        monkeypatch.setattr(LanguageModels, "base", property(lambda self: pytest.fail("weights were loaded")))
        meta = config.meta(TrainConfig(batch_size=8))
        meta.accounting = "analytic"
        assert next(meta.model(0).parameters()).is_meta
        assert meta.pool.content_hash == task.pool.content_hash
        assert meta.costs.forward_pool(meta.pool) == pytest.approx(expected_cost := task_forward(config), rel=0.01)
        assert expected_cost > 0
        measured = config.meta(TrainConfig(batch_size=8))
        assert measured.costs.forward_pool(measured.pool) == pytest.approx(expected_cost, rel=0.01)


def task_forward(config):
    """FLOPs of one forward pass over the pool of full fine-tuning or adapters, executed on random weights."""
    task = replace(config).build(TrainConfig(batch_size=8))
    model = task.models.on_meta().to_empty(device="cpu")
    for p in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(p)
    return count_flops(lambda: task.metrics(model, task.pool))
