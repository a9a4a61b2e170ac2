"""The language task: losses, packing, weighting, shared bases, costs, proxies, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_llama import conversations, model_folder, sums, tokenizer, write_lines
from tokenizers import normalizers
from torch import nn

from cads.budget import TRAIN, Budget, Ledger
from cads.counting import count_flops
from cads.draws import Draws, Epochs
from cads.errors import ConfigError, DataError
from cads.scorers import scorer_of
from cads.seeds import derive
from cads.task import Pool
from cads.tasks.language import LanguageConfig, tokens_of
from cads.tasks.language_data import TextSource
from cads.tasks.language_models import LanguageModels, answer_logits
from cads.tasks.language_tokens import IGNORED
from cads.trainer import TrainConfig, Trainer

LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("language")
    for family in ("llama", "gpt2", "qwen2"):
        model_folder(made / family, family)
    model_folder(made / "small", hidden=8, template=None)
    write_lines(made / "sums.jsonl", sums(60))
    write_lines(made / "talks.jsonl", conversations(40))
    write_lines(made / "texts.jsonl", [{"text": f"{i} " + "abc " * (i % 28)} for i in range(90)])
    return made


@pytest.fixture(scope="module")
def build(folder):
    def make(family="llama", data="sums", recipe=None, **options):
        pool = [TextSource(path=str(folder / f"{data}.jsonl"))]
        config = LanguageConfig(model=str(folder / family), pool=pool, **options)
        return config.build(recipe or TrainConfig(batch_size=8))

    return make


def plainly(model, batch):
    """The loss of each example as transformers computes it, alone and without padding, in nats."""
    found = []
    for ids, present, labels in zip(
        batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, strict=True
    ):
        n = int(present.sum())
        found.append(model(input_ids=ids[None, :n], labels=labels[None, :n]).loss)
    return torch.stack(found)


def sharpened(model, seed=0):
    """The model with weights that are not nearly zero, so that losses differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
DATA = pytest.mark.parametrize("data", ["sums", "talks"])


class TestLosses:
    @FAMILIES
    @DATA
    def test_they_are_those_of_transformers(self, build, family, data):
        task = build(family, data)
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(12))
        with torch.no_grad():
            found, expected = task.losses(model, batch), plainly(model, batch)
        assert expected.std() > 0.05
        assert torch.allclose(found, expected, atol=1e-5)

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
            found = np.zeros(n)
            for rows in batches:
                found[rows] = task.losses(model, task.pool.batch(rows)).numpy()
            return found

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
        steps, found = [], []
        for packing in (False, True):
            task = build(packing=packing)
            draws = Draws(task.pool, [Epochs(np.arange(40), 0)], 4, target=task.target, target_fraction=0.5)
            model = sharpened(task.model(0))
            steps = [draws.batches(step) for step in range(8)]
            with torch.no_grad():
                losses = [torch.cat([task.losses(model, piece) for piece in pieces]) for pieces in steps]
            found.append(torch.stack([x.sort().values for x in losses]))
        assert any(pool.shape == target.shape for pool, target in steps)
        assert torch.allclose(*found, atol=1e-5)

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
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(9))
        logits = model(batch.inputs["input_ids"], batch.inputs["attention_mask"]).logits[:, :-1]
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        found = sum(task.training_losses(model, piece).sum() for piece in batch.split(accumulate)) / len(batch)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(task.losses(model, batch).mean(), expected, atol=1e-5)

    def test_the_trainer_minimises_what_weighting_says(self, build):
        for weighting in ("token", "example"):
            task = build(weighting=weighting)
            model = task.model(0)
            draws = Draws(task.pool, [Epochs(np.arange(len(task.pool)), 0)], 8)
            [first] = draws.batches(0)
            with torch.no_grad():
                expected = float(task.training_losses(model, first).mean())
            fit = Trainer(task, Ledger()).fit(model, draws, 3 * task.costs.usage(first), seed=0, phase=TRAIN, stage="s")
            assert fit.losses[0, 0] == pytest.approx(expected, abs=1e-5)


def unique_bytes(models):
    """Bytes of all parameters and buffers of some models, each storage once."""
    storages = {}
    for model in models:
        for x in (*model.parameters(), *model.buffers()):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


class TestSharedBase:
    def test_four_models_hold_one_base(self, build):
        task = build(peft=LORA)
        models = [task.model(seed) for seed in range(4)]
        base = unique_bytes([task.models.base])
        adapters = sum(p.numel() * 4 for p in models[0].parameters() if p.requires_grad)
        assert unique_bytes(models[:1]) == base + adapters
        assert unique_bytes(models) == base + 4 * adapters
        frozen = [[p for p in m.parameters() if not p.requires_grad] for m in models]
        assert all(a is b for column in zip(*frozen, strict=True) for a, b in pairwise(column))

    def test_training_one_moves_no_other(self, build):
        task = build(peft=LORA)
        trained, other = task.model(0), task.model(1)
        before = [p.detach().clone() for p in (*other.parameters(), *task.models.base.parameters())]
        draws = Draws(task.pool, [Epochs(np.arange(len(task.pool)), 0)], 8)
        flops = 5 * 8 * task.costs.per_usage(task.pool, 8)
        fit = Trainer(task, Ledger()).fit(trained, draws, flops, seed=0, phase=TRAIN, stage="one")
        assert len(fit.losses) > 2
        assert all(map(torch.equal, before, (*other.parameters(), *task.models.base.parameters())))
        names = {n for n, p in trained.named_parameters() if p.requires_grad}
        assert all("lora" in n for n in names)
        fresh = dict(task.model(0).named_parameters())
        assert any(not torch.equal(p, fresh[n]) for n, p in trained.named_parameters())

    @pytest.mark.parametrize(
        "peft", [None, LORA, {"type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []}]
    )
    def test_the_seed_decides(self, build, peft):
        task = build(peft=peft)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        one = {n: p.clone() for n, p in task.model(3).state_dict().items()}
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        again, other = task.model(3).state_dict(), task.model(4).state_dict()
        assert all(torch.equal(one[n], again[n]) for n in one)
        if peft is None or peft["type"] == "lora":
            assert any(not torch.equal(one[n], other[n]) for n in one)

    def test_a_pretrained_model_is_where_everything_begins(self, build, folder, tmp_path):
        pretrained = sharpened(build().model(0))
        pretrained.save_pretrained(tmp_path / "m")
        tokenizer().save_pretrained(tmp_path / "m")
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        for peft in (None, LORA):
            task = LanguageConfig(model=str(tmp_path / "m"), pool=pool, peft=peft).build(TrainConfig())
            batch = task.pool.batch(np.arange(5))
            with torch.no_grad():
                assert torch.allclose(task.losses(task.model(1).eval(), batch), plainly(pretrained, batch), atol=1e-5)

    @pytest.mark.parametrize(
        ("peft", "message"),
        [
            (
                {"type": "lora", "target_modules": ["nothing"]},
                r"do not fit .*nothing.*linear layers are called .*q_proj",
            ),
            ({"type": "magic"}, "peft type = 'magic': choose from"),
            ({"r": 8}, "peft type = '': choose from"),
            ({"type": "lora", "rang": 8}, r"peft has no options \['rang'\] for type 'lora'"),
        ],
    )
    def test_adapters_that_do_not_fit_are_refused_before_weights_are_loaded(self, build, monkeypatch, peft, message):
        monkeypatch.setattr(LanguageModels, "base", property(lambda self: pytest.fail("weights were loaded")))
        with pytest.raises(ConfigError, match=message):
            build(peft=peft)

    def test_an_initialisation_that_changes_the_base_is_refused(self, build):
        task = build(peft={**LORA, "init_lora_weights": "pissa"})
        with pytest.raises(ConfigError, match="change the weights they stand on"):
            task.model(0)


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
        draws = Draws(task.pool, [Epochs(np.arange(len(task.pool)), 0)], 8)
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
        assert len(np.unique(lengths)) > len(task.pool.examples.shapes()[0])
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
        found = task.metrics(model.train(), task.test)
        assert model.training
        assert found["loss"] == pytest.approx(float(means.mean()), abs=1e-5)
        assert found["token_loss"] == pytest.approx(token_loss, abs=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(token_loss), rel=1e-4)
        objective = task.objective(model)
        assert objective.value == float(task.metrics(model, task.target)["loss"])
        assert objective.by_example is not None
        assert objective.by_example.shape == (len(task.target),)
        assert task.objective(model, "token_loss").by_example is None

    def test_features_are_mean_hidden_states(self, build):
        task = build()
        model, batch = sharpened(task.model(0)), task.pool.batch(np.arange(5))
        with torch.no_grad():
            found = task.features(model, batch)
            for row in range(5):
                n = int(batch.inputs["attention_mask"][row].sum())
                alone = model.model(batch.inputs["input_ids"][row : row + 1, :n]).last_hidden_state
                assert torch.allclose(found[row], alone[0].mean(dim=0), atol=1e-5)

    @DATA
    def test_texts_ask_and_never_answer(self, build, data):
        task = build(data=data)
        texts, shown = task.texts(task.pool), task.describe(task.pool, np.arange(len(task.pool)))
        for text, whole in zip(texts, shown, strict=True):
            assert text.startswith("what is ")
            assert text in whole
            assert "." not in text


class TestProxy:
    def test_a_smaller_model_with_its_own_tokenizer_sees_the_same_examples(self, build, folder):
        task = build(selector_model=str(folder / "small"))
        proxy = task.proxy
        for mine, its in ((task.pool, proxy.pool), (task.target, proxy.target), (task.test, proxy.test)):
            assert mine.ids.equals(its.ids)
        assert np.array_equal(task.pool.sources, proxy.pool.sources)
        assert task.pool.content_hash != proxy.pool.content_hash
        assert task.texts(task.pool) == proxy.texts(proxy.pool)
        assert proxy.costs.forward_pool(proxy.pool) < task.costs.forward_pool(task.pool)
        assert build().proxy is None

    def test_it_pads_with_a_token_of_its_own(self, build, folder, tmp_path):
        unpadded = model_folder(tmp_path / "m", hidden=8)
        tokenizer(pad=None).save_pretrained(unpadded)

        def pad(model=unpadded, **options):
            return tokens_of(build(selector_model=str(model), **options).proxy.pool).pad

        assert pad(selector_pad_token="<|end|>") == tokenizer().convert_tokens_to_ids("<|end|>")
        # The trained model's, where the selector's tokenizer has it, and names none.
        assert pad(pad_token="</s>") == tokenizer().eos_token_id
        assert pad(folder / "small", pad_token="</s>") == tokenizer().pad_token_id
        with pytest.raises(ConfigError, match="no pad token: set selector_pad_token to one of its tokens"):
            pad()
        with pytest.raises(ConfigError, match="selector_pad_token = 'zzz' is no token"):
            pad(selector_pad_token="zzz")
        larger = model_folder(tmp_path / "larger")
        own = tokenizer(pad=None)
        own.add_tokens(["<own>"])
        own.save_pretrained(larger)
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        config = LanguageConfig(model=str(larger), pool=pool, pad_token="<own>", selector_model=str(unpadded))
        with pytest.raises(ConfigError, match="set selector_pad_token"):
            config.build(TrainConfig())

    def test_what_one_of_the_two_leaves_out_the_other_leaves_out_too(self, folder, tmp_path):
        """The trained model's tokenizer needs four tokens for each a, the selector's for each b."""
        for name, letter in (("model", "a"), ("proxy", "b")):
            model_folder(tmp_path / name)
            own = tokenizer()
            own.backend_tokenizer.normalizer = normalizers.Replace(letter, letter * 4)
            own.save_pretrained(tmp_path / name)
        kinds = ("x", "a", "b", "ab")
        rows = [
            {"id": f"{k}-{i}", "prompt": f"{i} " + k * (18 // len(k)), "response": "so"}
            for k in kinds
            for i in range(9)
        ]
        files = {n: write_lines(tmp_path / f"{n}.jsonl", rows[s::3]) for s, n in enumerate(("pool", "target", "test"))}
        sources = {name: [TextSource(path=str(file))] for name, file in files.items()}
        config = LanguageConfig(model=str(tmp_path / "model"), **sources, max_tokens=50, drop=True)
        alone = config.build(TrainConfig(batch_size=4))
        both = replace(config, selector_model=str(tmp_path / "proxy"))
        for cache in (None, str(tmp_path / "cache")):
            task = replace(both, token_cache=cache).build(TrainConfig(batch_size=4))
            for mine, its in ((task.pool, task.proxy.pool), (task.target, task.proxy.target)):
                assert mine.ids == its.ids
                assert {i.split("-")[0] for i in mine.ids.to_pylist()} == {"x"}
            assert {i.split("-")[0] for i in alone.pool.ids.to_pylist()} == {"x", "b"}
            # What the model is tested on has nothing to do with the selector.
            assert task.test.content_hash == alone.test.content_hash
            assert scorer_of(task) is task.proxy
            assert task.counts["selector"]["max_tokens"] == 50
        with pytest.raises(DataError, match="have no answer token"):
            replace(both, drop=False).build(TrainConfig(batch_size=4))

    def test_a_shorter_context_cuts(self, build, folder, tmp_path):
        short = model_folder(tmp_path / "short")
        config = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
        task = build(selector_model=str(short), data="talks", max_tokens=90)
        assert tokens_of(task.proxy.pool).lengths().max() <= 50 < tokens_of(task.pool).lengths().max()
        assert (task.longest, task.proxy.longest) == (90, 50)
        assert build(selector_model=str(short), data="talks", max_tokens=48).proxy.longest == 48

    def test_adapters_of_another_family(self, build, folder):
        with pytest.raises(ConfigError, match=r"do not fit .*gpt2.*change selector_peft: .*c_attn"):
            build(selector_model=str(folder / "gpt2"), peft=LORA)
        with pytest.raises(ConfigError, match="selector_peft type = 'magic'"):
            build(selector_model=str(folder / "gpt2"), selector_peft={"type": "magic"})

        def trained(**options):
            model = build(peft=LORA, **options).proxy.model(0)
            return [name for name, p in model.named_parameters() if p.requires_grad]

        small, gpt2 = str(folder / "small"), str(folder / "gpt2")
        found = trained(selector_model=gpt2, selector_peft={"type": "lora", "r": 2, "target_modules": ["c_attn"]})
        assert found
        assert all("c_attn.lora" in name for name in found)
        assert all("lora" in name for name in trained(selector_model=small))
        assert any("embed_tokens" in name for name in trained(selector_model=small, selector_peft={}))

    def test_fields_that_are_not_set_leave_results_what_they_were(self, folder):
        """Keys of finished cells follow from `decisive`: a field that was added later changes none of them."""
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        config = LanguageConfig(model=str(folder / "llama"), pool=pool, selector_model=str(folder / "small"))
        assert {"selector_model", "pad_token", "peft"} <= set(config.decisive())
        for name, value in (("selector_pad_token", "</s>"), ("selector_peft", {})):
            assert name not in config.decisive()
            assert replace(config, **{name: value}).decisive() == {**config.decisive(), name: value}


class TestSketch:
    @pytest.mark.parametrize("peft", [None, LORA])
    def test_it_says_what_the_task_costs_and_loads_no_weights(self, build, folder, monkeypatch, peft):
        config = LanguageConfig(
            model=str(folder / "llama"), pool=[TextSource(path=str(folder / "sums.jsonl"))], peft=peft
        )
        task = config.build(TrainConfig(batch_size=8))
        task.accounting = "analytic"
        monkeypatch.setattr(LanguageModels, "base", property(lambda self: pytest.fail("weights were loaded")))
        sketch = config.sketch(TrainConfig(batch_size=8))
        sketch.accounting = "analytic"
        assert next(sketch.model(0).parameters()).is_meta
        assert sketch.pool.content_hash == task.pool.content_hash
        assert sketch.costs.forward_pool(sketch.pool) == pytest.approx(sketch_cost := task_forward(config), rel=0.01)
        assert sketch_cost > 0
        measured = config.sketch(TrainConfig(batch_size=8))
        assert measured.costs.forward_pool(measured.pool) == pytest.approx(sketch_cost, rel=0.01)


def task_forward(config):
    """FLOPs of one forward pass over the pool of full fine-tuning or adapters, executed on random weights."""
    task = replace(config).build(TrainConfig(batch_size=8))
    model = task.models.on_meta().to_empty(device="cpu")
    for p in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(p)
    return count_flops(lambda: task.metrics(model, task.pool))


class TestSaving:
    @pytest.mark.parametrize("peft", [None, LORA])
    @pytest.mark.parametrize("merge", [False, True])
    def test_what_is_written_is_what_was_trained(self, build, tmp_path, peft, merge):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        task = build(peft=peft)
        if merge and peft is None:
            with pytest.raises(ConfigError, match=r"merge = true: the models of .* have no adapters"):
                task.check_merge(merge)
            return
        model, batch = task.model(derive(0, "m")), task.pool.batch(np.arange(6))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        base = [p.clone() for p in task.models.base.parameters()] if peft else []
        task.save(model, tmp_path / "out", merge=merge)
        written = {f.name for f in (tmp_path / "out").iterdir()}
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in written)
        adapted = peft is not None and not merge
        assert (
            {"adapter_model.safetensors", "adapter_config.json"} <= written
            if adapted
            else "model.safetensors" in written
        )
        if adapted:
            # The base of this test has random weights, so the adapter is put on the same ones.
            loaded = PeftModel.from_pretrained(replace(task.models).build(0).unload(), tmp_path / "out")
        else:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == task.tokenizer.chat_template
        with torch.no_grad():
            expected = task.losses(model.eval(), batch)
            assert torch.allclose(task.losses(loaded.eval(), batch), expected, atol=1e-5)
        if peft is not None:
            assert all(map(torch.equal, base, task.models.base.parameters()))


def test_a_task_is_known_by_the_weights_it_begins_with(tmp_path):
    """Other weights under the same name are another task; another place for the same ones is not."""
    first, second = (model_folder(tmp_path / name, "llama") for name in ("first", "second"))
    for folder in (first, second):
        (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(100_000))
    models = [LanguageModels(str(first)), LanguageModels(str(second))]
    assert models[0].digest == models[1].digest
    weights = second / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-5] ^= 1
    weights.write_bytes(spoilt)
    assert LanguageModels(str(second)).digest != models[0].digest


def test_a_proxy_without_weights_to_tell_is_known_by_its_name(build, monkeypatch):
    task, proxy = build(), build()
    monkeypatch.setattr(task, "proxy", proxy)
    assert task.identity["selector model"] == proxy.models.digest
    plain = SimpleNamespace(name="words", identity={"pool": "p"})
    monkeypatch.setattr(task, "proxy", plain)
    assert task.identity["selector model"] == "words"
