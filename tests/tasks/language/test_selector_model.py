"""A smaller model scores in place of the language model: the same examples, through its own tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import normalizers

from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.scoring.reference_models import proxy_of
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.language.tokens import tokens_of
from tests.support.language_tasks import LORA
from tests.support.tiny_llama import model_folder, tokenizer, write_lines


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
        tok = tokenizer(pad=None)
        tok.add_tokens(["<own>"])
        tok.save_pretrained(larger)
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        config = LanguageConfig(model=str(larger), pool=pool, pad_token="<own>", selector_model=str(unpadded))
        with pytest.raises(ConfigError, match="set selector_pad_token"):
            config.build(TrainConfig())

    def test_what_one_of_the_two_leaves_out_the_other_leaves_out_too(self, folder, tmp_path):
        """The trained model's tokenizer needs four tokens for each a, the selector's for each b."""
        for name, letter in (("model", "a"), ("proxy", "b")):
            model_folder(tmp_path / name)
            tok = tokenizer()
            tok.backend_tokenizer.normalizer = normalizers.Replace(letter, letter * 4)
            tok.save_pretrained(tmp_path / name)
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
            assert proxy_of(task) is task.proxy
            assert task.counts["selector"]["max_tokens"] == 50
        with pytest.raises(DataError, match="have no answer token"):
            replace(both, drop=False).build(TrainConfig(batch_size=4))

    def test_a_shorter_context_cuts(self, build, folder, tmp_path):
        short = model_folder(tmp_path / "short")
        config = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
        task = build(selector_model=str(short), data="talks", max_tokens=90)
        assert tokens_of(task.proxy.pool).lengths().max() <= 50 < tokens_of(task.pool).lengths().max()
        assert (task.max_length, task.proxy.max_length) == (90, 50)
        assert build(selector_model=str(short), data="talks", max_tokens=48).proxy.max_length == 48

    def test_adapters_of_another_family(self, build, folder):
        with pytest.raises(ConfigError, match=r"do not fit .*gpt2.*change selector_peft: .*c_attn"):
            build(selector_model=str(folder / "gpt2"), peft=LORA)
        with pytest.raises(ConfigError, match="selector_peft type = 'magic'"):
            build(selector_model=str(folder / "gpt2"), selector_peft={"type": "magic"})

        def trained(**options):
            model = build(peft=LORA, **options).proxy.model(0)
            return [name for name, p in model.named_parameters() if p.requires_grad]

        small, gpt2 = str(folder / "small"), str(folder / "gpt2")
        result = trained(selector_model=gpt2, selector_peft={"type": "lora", "r": 2, "target_modules": ["c_attn"]})
        assert result
        assert all("c_attn.lora" in name for name in result)
        assert all("lora" in name for name in trained(selector_model=small))
        assert any("embed_tokens" in name for name in trained(selector_model=small, selector_peft={}))

    def test_fields_that_are_not_set_leave_results_what_they_were(self, folder):
        """Keys of finished cells follow from `result_fields`: a field that was added later changes none of them."""
        pool = [TextSource(path=str(folder / "sums.jsonl"))]
        config = LanguageConfig(model=str(folder / "llama"), pool=pool, selector_model=str(folder / "small"))
        assert {"selector_model", "pad_token", "peft"} <= set(config.result_fields())
        for name, value in (("selector_pad_token", "</s>"), ("selector_peft", {})):
            assert name not in config.result_fields()
            assert replace(config, **{name: value}).result_fields() == {**config.result_fields(), name: value}


def test_a_proxy_without_weights_to_tell_is_known_by_its_name(build, monkeypatch):
    task, proxy = build(), build()
    monkeypatch.setattr(task, "proxy", proxy)
    assert task.identity["selector model"] == proxy.models.digest
    plain = SimpleNamespace(name="words", identity={"pool": "p"})
    monkeypatch.setattr(task, "proxy", plain)
    assert task.identity["selector model"] == "words"
