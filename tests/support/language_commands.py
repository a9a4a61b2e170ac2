"""Commands on language tasks of tiny models: their words, and what they write."""

from __future__ import annotations

import json

import torch

from cads.cli.main import main
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource

LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
BUDGET = "2000 tokens"


def run(*words):
    assert main([*map(str, words), "--progress", "false"]) == 0


def built(folder, **options):
    pool = [TextSource(path=str(folder / "sums.jsonl"))]
    settings = {"model": str(folder / "llama"), "pool": pool, "n_test": 8, **options}
    return LanguageConfig(**settings).build(TrainConfig(batch_size=8, learning_rate=0.01))


def spread(model):
    """The model with weights that are not nearly zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def errors(capsys):
    """What was written to stderr, with single spaces."""
    return " ".join(capsys.readouterr().err.split())


def results_of(folder):
    """The contents of `results.json`."""
    return json.loads((folder / "results.json").read_text())


def turns(row):
    """As a chat."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
