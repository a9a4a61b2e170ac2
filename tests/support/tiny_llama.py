"""A tokenizer of single characters, random models of a few thousand weights, and sums as data: all of it local."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?+=:#\n"
SPECIAL = ["<pad>", "<unk>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The same chats as `TEMPLATE`, with the assistant's part marked."""
CONTEXT, VOCABULARY = 128, 64


def tokenizer(template: str | None = TEMPLATE, *, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a character, and the special ones."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        extra_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = template
    return fast


def config(family: str = "llama", hidden: int = 16) -> PreTrainedConfig:
    """Two layers."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=hidden, n_layer=2, n_head=2, n_positions=CONTEXT,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT, eos_token_id=2,
    )  # fmt: skip


def model_folder(folder: Path, family: str = "llama", *, hidden: int = 16, template: str | None = TEMPLATE) -> Path:
    """A config and a tokenizer, without weights."""
    config(family, hidden).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def sums(n: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and responses of different lengths, half of them wrong, by source; no two are equal."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        a, b = 10 * i + rng.randint(0, 9), rng.randint(0, 9)
        right = i % 2 == 0
        answer = a + b if right else rng.randint(0, 999)
        prompt = f"what is {a} + {b}" + "?" * rng.randint(1, 12)
        source, kind = ("right", "wrong")[i % 2], "small" if a < 300 else "large"
        rows.append(
            {"id": f"row-{i}", "prompt": prompt, "response": f"{answer}.", "source": source, "kind": kind}
        )  # fmt: skip
    return rows


def conversations(n: int = 12) -> list[dict[str, object]]:
    """Two turns each, with a system message now and then."""
    rows: list[dict[str, object]] = []
    for i, row in enumerate(sums(n)):
        turns = [("user", row["prompt"]), ("assistant", row["response"]), ("user", "sure?"), ("assistant", "yes.")]
        system = [("system", "be brief.")] if i % 3 == 0 else []
        rows.append({"id": f"talk-{i}", "messages": [{"role": r, "content": c} for r, c in (*system, *turns)]})
    return rows


def write_lines(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
