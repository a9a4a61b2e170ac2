"""What `experiments.gpu` trains: two tasks with random weights, on data that is made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from cads.data.batch import Batch
from cads.recipe import TrainConfig
from cads.task import Task
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

VOCABULARY = 49152
"""Rows of the embedding of SmolLM2."""
WORDS = 1000
"""Different words in the texts."""
SIZES: dict[str, dict[str, int]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
"""Shapes of Llama: those of SmolLM2-135M and Llama-3.2-1B, and one for machines without a GPU."""
LORA = {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True)
class GpuCase:
    """A task, and the loop that a user of PyTorch would write for it.

    Attributes:
        name: in tables. task: with data. config: the file for `cads train`.
        loss: the mean loss of a batch under a model, in plain PyTorch and transformers.
        steps: of a measurement.
    """

    name: str
    task: Task
    config: Path
    loss: Callable[[nn.Module, Batch], Tensor]
    steps: int


def vision_case(folder: Path, *, tiny: bool) -> GpuCase:
    """ResNet-18 (tiny: a small CNN) on random images of the shape of CIFAR-10, from two sources of labels."""
    n_train, n_test, batch_size = (120, 20, 8) if tiny else (12288, 512, 512)
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        (folder / "images" / split).mkdir(parents=True)
        labels = rng.integers(0, 10, n)
        labels[:10] = np.arange(10)
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.save(folder / "images" / split / "images.npy", pixels)
        np.save(folder / "images" / split / "labels.npy", labels)
    options: dict[str, Any] = {
        "dataset": "arrays",
        "path": str(folder / "images"),
        "model": "cnn" if tiny else "resnet18",
    }
    options |= {"n_target": n_train // 6, "n_pool": n_train // 2}
    sources: list[dict[str, Any]] = [{"name": "clean"}, {"name": "noisy", "label_noise": 0.5}]
    recipe: dict[str, Any] = {"batch_size": batch_size, "precision": "bf16"}
    task = VisionConfig(**options, sources=[SyntheticSource(**s) for s in sources]).build(TrainConfig(**recipe))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images = batch.inputs["images"].float().div(255).sub(0.5).div(0.25)
        return functional.cross_entropy(model(images), batch.labels)

    config = _config(folder / "vision.yaml", "vision", {**options, "sources": sources}, recipe)
    return GpuCase(f"{'CNN' if tiny else 'ResNet-18'}, 3x32x32, bf16", task, config, loss, 2 if tiny else 40)


def language_case(folder: Path, *, size: str, tiny: bool) -> GpuCase:
    """A Llama with LoRA on texts of random words, all of one length."""
    length, n_pool, batch_size = (32, 48, 4) if tiny else (1024, 384, 8)
    model = _model(folder / "model", "tiny" if tiny else size, length)
    rng = np.random.default_rng(0)
    pool = [_texts(folder, f"{name}", n_pool // 2, length, rng) for name in ("first", "second")]
    target, test = (_texts(folder, name, n_pool // 6, length, rng) for name in ("target", "test"))
    options: dict[str, Any] = {"model": str(model), "peft": LORA, "max_tokens": length, "dtype": "bfloat16"}
    files: dict[str, list[dict[str, Any]]] = {"pool": pool, "target": [target], "test": [test]}
    recipe: dict[str, Any] = {"batch_size": batch_size, "precision": "bf16"}
    parts: dict[str, Any] = {part: [TextSource(**f) for f in given] for part, given in files.items()}
    task = LanguageConfig(**options, **parts).build(TrainConfig(**recipe))
    # Closed forms: counting runs the model on the CPU.
    task.accounting = "analytic"

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(input_ids=batch.inputs["input_ids"], labels=batch.labels).loss
        return value

    config = _config(folder / "language.yaml", "language", {**options, **files}, recipe)
    name = f"Llama of {'a few thousand weights' if tiny else size.upper()} with LoRA, {length} tokens, bf16"
    return GpuCase(name, task, config, loss, 2 if tiny else 12)


def _model(folder: Path, size: str, length: int) -> Path:
    """A config and a tokenizer of words, without weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    shape = {"vocab_size": VOCABULARY, **SIZES[size]}
    LlamaConfig(
        **shape, max_position_embeddings=max(128, length), eos_token_id=1, pad_token_id=0, tie_word_embeddings=True
    ).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_words()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _words() -> list[str]:
    return [f"w{i}" for i in range(WORDS)]


def _texts(folder: Path, name: str, n: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """A file of texts of `length` tokens, the end token included; random walks over words, so that there is a loss."""
    path, words = folder / f"{name}.jsonl", np.array(_words())
    starts, steps = rng.integers(0, WORDS, (n, 1)), rng.integers(0, 5, (n, length - 1))
    rows = [" ".join(words[row]) for row in (starts + np.cumsum(steps, axis=1)) % WORDS]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {"name": name, "path": str(path)}


def _config(path: Path, kind: str, task: dict[str, Any], recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"kind": kind, "task": task, "train": recipe, "budget": "1 epochs"}))
    return path


def batches_on(case: GpuCase, device: torch.device, count: int) -> list[Batch]:
    """The first batches of the pool, on the device."""
    size = case.task.recipe.batch_size
    rows = np.arange(len(case.task.pool))
    starts = [i * size % max(1, len(rows) - size) for i in range(count)]
    return [case.task.pool.batch(rows[start : start + size]).to(device) for start in starts]
