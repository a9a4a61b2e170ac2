"""Language tasks on tiny models, and their losses as transformers computes them."""

from __future__ import annotations

import torch

from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from tests.support.tiny_llama import conversations, model_folder, sums, write_lines

LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def write_language(folder):
    """Models of three families without weights, a smaller one, and examples: sums, talks and texts."""
    for family in ("llama", "gpt2", "qwen2"):
        model_folder(folder / family, family)
    model_folder(folder / "small", hidden=8, template=None)
    write_lines(folder / "sums.jsonl", sums(60))
    write_lines(folder / "talks.jsonl", conversations(40))
    write_lines(folder / "texts.jsonl", [{"text": f"{i:02} " + "abc " * (i % 28)} for i in range(90)])
    return folder


def language_task(folder, family="llama", data="sums", recipe=None, **options):
    """A task on what `write_language` has written."""
    pool = [TextSource(path=str(folder / f"{data}.jsonl"))]
    config = LanguageConfig(model=str(folder / family), pool=pool, **options)
    return config.build(recipe or TrainConfig(batch_size=8))


def plainly(model, batch):
    """The loss of each example as transformers computes it, alone and without padding, in nats."""
    result = []
    for ids, present, labels in zip(
        batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, strict=True
    ):
        n = int(present.sum())
        result.append(model(input_ids=ids[None, :n], labels=labels[None, :n]).loss)
    return torch.stack(result)


def sharpened(model, seed=0):
    """The model with weights that are not nearly zero, so that losses differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()
