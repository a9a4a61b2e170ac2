"""Language models: many on one shared base, and what is written of them is what was trained."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import CheckpointError, ConfigError
from cads.recipe import TrainConfig
from cads.seeding import derive
from cads.tasks.language import models as models_module
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.models import LanguageModels
from cads.tasks.language.rows import TextSource
from cads.training.trainer import Trainer
from tests.support.language_tasks import LORA, plainly, sharpened
from tests.support.tiny_llama import model_folder, tokenizer


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
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], 8)
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


def on(*targets, **options):
    """LoRA on some layers."""
    return {"type": "lora", "r": 4, "target_modules": list(targets), **options}


TIED_ADAPTERS = {
    "head": ("llama", on("lm_head")),
    "embedding": ("llama", on("embed_tokens")),
    "both": ("llama", on("lm_head", "embed_tokens", "q_proj")),
    "by pattern": ("llama", {"type": "lora", "r": 4, "target_modules": ".*(lm_head|v_proj)"}),
    "head, kept tied": ("llama", on("lm_head", ensure_weight_tying=True)),
    "head, trained whole": ("llama", on("q_proj", modules_to_save=["lm_head"])),
    "embedding, trained whole": ("llama", on("q_proj", modules_to_save=["embed_tokens"])),
    "some tokens": ("llama", on("q_proj", trainable_token_indices=[3, 4, 9])),
    "dora on the head": ("qwen2", on("lm_head", use_dora=True)),
    "loha on the head": ("qwen2", {"type": "loha", "r": 4, "target_modules": ["lm_head"]}),
    "head of gpt2": ("gpt2", on("lm_head")),
    "embedding of gpt2": ("gpt2", on("wte")),
}


class TestTiedEmbeddings:
    """Adapters on a layer whose weights another one shares."""

    @pytest.fixture
    def tied(self, folder, tmp_path):
        """Makes a task whose models tie their embeddings, and a model of it with adapters that change something."""

        def make(family, peft):
            made = model_folder(tmp_path / f"{family}-tied", family)
            config = json.loads((made / "config.json").read_text())
            (made / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
            pool = [TextSource(path=str(folder / "sums.jsonl"))]
            task = LanguageConfig(model=str(made), pool=pool, peft=peft).build(TrainConfig(batch_size=8))
            sharpened(task.models.base)
            model = task.model(0)
            torch.manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.3 * torch.randn_like(p))
            return task, model.eval()

        return make

    def test_costs_share_nothing_with_adapters_that_are_computed_from_others(self, tied):
        task, model = tied("llama", on("embed_tokens", ensure_weight_tying=True))
        trained = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        counted = task.costs.model
        assert not trained & {x.untyped_storage().data_ptr() for x in (*counted.parameters(), *counted.buffers())}

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("adapters", TIED_ADAPTERS)
    def test_what_is_written_is_what_was_trained(self, tied, tmp_path, adapters, merge):
        from transformers import AutoModelForCausalLM

        task, model = tied(*TIED_ADAPTERS[adapters])
        batch, base = task.test.batch(np.arange(6)), [p.clone() for p in task.models.base.parameters()]
        out = tmp_path / "out"
        out.mkdir()
        task.check_merge(merge)
        task.save(model, out, merge=merge)
        with torch.no_grad():
            expected = task.losses(model, batch)
            assert not torch.allclose(task.losses(task.model(0).eval(), batch), expected, atol=0.01)
            assert torch.allclose(task.losses(task.load(out).eval(), batch), expected, atol=1e-4)
            if merge:
                loaded = AutoModelForCausalLM.from_pretrained(out).eval()
                assert torch.allclose(task.losses(loaded, batch), expected, atol=1e-4)
        assert all(map(torch.equal, base, task.models.base.parameters()))

    def test_embeddings_that_no_adapter_changes_stay_tied(self, tied, tmp_path):
        from safetensors.torch import load_file

        task, model = tied("llama", LORA)
        task.save(model, tmp_path, merge=True)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True

    def test_embeddings_that_differ_are_no_longer_called_tied(self, tied, tmp_path, caplog):
        from safetensors.torch import load_file

        task, model = tied("llama", on("lm_head"))
        with caplog.at_level(logging.INFO):
            task.save(model, tmp_path, merge=True)
        assert sum("they are written untied" in r.getMessage() for r in caplog.records) == 1
        weights = load_file(tmp_path / "model.safetensors")
        base = task.models.base.get_input_embeddings().weight
        assert torch.equal(weights["model.embed_tokens.weight"], base)
        assert not torch.allclose(weights["lm_head.weight"], base, atol=0.01)
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False

    def test_a_merged_model_with_another_loss_is_refused_and_not_written(self, tied, tmp_path, monkeypatch):
        """As PEFT alone merges it: the change of the head goes into the embedding too."""
        task, model = tied("llama", on("lm_head"))
        monkeypatch.setattr(models_module, "untie", lambda model: [])
        (tmp_path / "out").mkdir()
        message = r"merged model has loss .* on 12 test examples, and the trained one .*not written; give merge = false"
        with pytest.raises(CheckpointError, match=message):
            task.save(model, tmp_path / "out", merge=True)
        assert not list((tmp_path / "out").iterdir())

    def test_what_peft_says_is_passed_on_once(self, tied, caplog):
        with caplog.at_level(logging.WARNING):
            task, _ = tied("llama", on("lm_head"))
            task.model(1)
        assert sum("a tied layer is part of the adapter" in r.getMessage() for r in caplog.records) == 1
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tied("llama", LORA)
        assert not [r for r in caplog.records if "PEFT" in r.getMessage()]


class TestMerging:
    def test_adapters_that_are_no_change_of_weights_are_refused_before_training(self, build):
        task = build(peft={"type": "prompt_tuning", "num_virtual_tokens": 2})
        with pytest.raises(
            ConfigError, match=r"merge = true: adapters of peft type = 'prompt_tuning'.*leave merge out"
        ):
            task.check_merge(True)
        task.check_merge(False)

    def test_adapters_that_peft_cannot_merge_are_refused_before_training(self, build, monkeypatch):
        from peft.tuners.lora import LoraModel

        def refuse(*_, **__):
            raise ValueError("these cannot be merged")

        monkeypatch.setattr(LoraModel, "merge_and_unload", refuse)
        with pytest.raises(ConfigError, match=r"merge = true: .*these cannot be merged; give merge = false"):
            build(peft=LORA).check_merge(True)

    @pytest.mark.parametrize("peft", [LORA, {"type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []}])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_adapters_that_can_be_merged_are_not_refused(self, build, tmp_path, peft, dtype):
        task = build(peft=peft, dtype=dtype)
        task.check_merge(True)
        task.save(task.model(0), tmp_path, merge=True)

    def test_a_change_that_a_short_type_rounds_away_is_refused(self, build, tmp_path):
        """Weights of 16 bits lose a change of less than a 256th of them."""
        task = build(peft=LORA)
        task.models.dtype = "bfloat16"
        with pytest.raises(CheckpointError, match="or dtype = float32: bfloat16 may round the change away"):
            task.models._check_written(np.array([2.0]), np.array([1.0]))

    @pytest.mark.parametrize("found", [np.nan, np.inf])
    def test_a_loss_that_is_no_number_is_no_equality(self, build, found):
        with pytest.raises(CheckpointError, match="merged model has loss"):
            build(peft=LORA).models._check_written(np.array([found]), np.array([1.0]))

    def test_a_folder_holds_one_model(self, build, tmp_path):
        """An adapter beside a merged model would be loaded onto it, and so be added twice."""
        task = build(peft=LORA)
        for merge in (False, True, False):
            task.save(task.model(0), tmp_path, merge=merge)
            assert (tmp_path / "adapter_config.json").exists() is not merge
            assert (tmp_path / "adapter_model.safetensors").exists() is not merge
            assert (tmp_path / "model.safetensors").exists() is merge
            assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]

    @pytest.mark.parametrize(
        "peft", [None, LORA, {"type": "prompt_tuning", "num_virtual_tokens": 2}], ids=["none", "lora", "prompt"]
    )
    def test_a_written_model_is_loaded_as_it_was_trained(self, build, tmp_path, peft):
        task = build(peft=peft)
        model, batch = sharpened(task.model(3)), task.test.batch(np.arange(6))
        task.save(model, tmp_path)
        with torch.no_grad():
            expected = task.losses(model, batch)
            assert torch.allclose(task.losses(task.load(tmp_path).eval(), batch), expected, atol=1e-5)

    def test_what_cannot_be_loaded_is_refused(self, build, tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be loaded .*train it anew"):
            build().load(tmp_path)
        task = build(peft=LORA)
        task.save(task.model(0), tmp_path)
        with pytest.raises(CheckpointError, match="holds an adapter, and the task has none"):
            build().load(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            build(peft={**LORA, "target_modules": ["q_proj", "k_proj"]}).load(tmp_path)


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
