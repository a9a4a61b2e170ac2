"""Language models: many on one shared base, and what is written of them is what was trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.seeding import derive
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
