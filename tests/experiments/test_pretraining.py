"""Where small language models come from: pretraining from scratch, and files of another format."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cads.errors import ConfigError
from experiments import from_gguf, pretraining
from experiments.pretraining import LADDER, PretrainingConfig, Shape, pretrained, write_blank
from tests.support.tiny_corpora import sentence
from tests.support.tiny_llama import write_lines

TINY = Shape(32, 1, 32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    lines = [{"text": " ".join(sentence(rng, f"Piece {i}") for _ in range(4))} for i in range(300)]
    return write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", lines)


class TestPretraining:
    def test_texts_may_hold_any_mark_that_ends_lines_elsewhere(self, tmp_path):
        (tmp_path / "text.jsonl").write_text('{"text": "one\u2028two\x85three"}\n', "utf-8")
        write_blank(tmp_path / "model", TINY, [tmp_path / "text.jsonl"], 300)
        assert (tmp_path / "model" / "tokenizer.json").exists()

    @pytest.mark.parametrize("size", list(LADDER))
    def test_sizes_are_what_they_are_called(self, text, tmp_path, size):
        write_blank(tmp_path, LADDER[size], [text], 300)
        config = AutoConfig.from_pretrained(tmp_path)
        config.vocab_size = 4096
        import torch

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(float(size[:-1]), rel=0.1)

    def test_a_model_is_trained_once_and_within_its_tokens(self, text, tmp_path, monkeypatch):
        config = PretrainingConfig(tokens=20_000, vocabulary=300, learning_rate=0.01, ladder={"tiny": TINY})
        folder = pretrained(["tiny"], text, [], config, tmp_path)["tiny"]
        results = json.loads((folder / "results.json").read_text())
        assert 0.9 * 20_000 < next(r["tokens"] for r in results["ledger"] if r["phase"] == "train") <= 20_000
        assert results["metrics"]["token_loss"] < 4.5  # 300 tokens at random: 5.7 nats
        assert (folder / "model.safetensors").exists()
        monkeypatch.setattr(pretraining, "train", lambda *a, **k: pytest.fail("trained again"))
        assert pretrained(["tiny"], text, [], config, tmp_path)["tiny"] == folder
        other = write_lines(text.parent / "other.jsonl", [{"text": "something else"}] * 3)
        with pytest.raises(BaseException, match=r"trained again|rows"):
            pretrained(["tiny"], other, [], config, tmp_path)

    def test_bad_sizes_are_refused(self, text, tmp_path):
        with pytest.raises(ConfigError, match="'7B'"):
            pretrained(["7B"], text, [], PretrainingConfig(), tmp_path)
        with pytest.raises(ConfigError, match="vocabulary = 10"):
            PretrainingConfig(vocabulary=10)


class TestGguf:
    def refused(self, capsys, *words):
        assert from_gguf.main(list(map(str, words))) == 1
        return " ".join(capsys.readouterr().out.split())

    def test_what_cannot_be_converted_is_refused(self, tmp_path, monkeypatch, capsys):
        model, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
        model.write_bytes(b"GGUF and nothing of use")
        other.write_bytes(b"PK")
        assert "cannot be read: No such file" in self.refused(capsys, tmp_path / "absent.gguf", tmp_path / "out")
        assert "is no GGUF file: it begins with b'PK'" in self.refused(capsys, other, tmp_path / "out")
        assert "exists: remove it" in self.refused(capsys, model, tmp_path)
        monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
        assert "is missing, which reads such files: pip install gguf" in self.refused(capsys, model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_damaged_file_is_refused(self, tmp_path, capsys):
        pytest.importorskip("gguf")
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF and nothing of use")
        assert "cannot be converted" in self.refused(capsys, file, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_weights_and_tokens_are_those_of_the_file(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        names = {"token_embd": (40, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
        names |= {f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}
        names |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(16)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(40)
        writer.add_tokenizer_model("gpt2")
        letters = [chr(97 + i) for i in range(26)]
        tokens = ["<unk>", "</s>", *letters, "ab", *(f"<{i}>" for i in range(11))]
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * 27, *[3] * 11])
        writer.add_token_merges(["a b"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)
        rng = np.random.default_rng(0)
        weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
        for name, values in weights.items():
            writer.add_tensor(f"{name}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert from_gguf.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), weights["token_embd"])
        assert np.array_equal(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), weights["blk.0.ffn_up"])
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("cab")["input_ids"] == [4, 28]
