"""A folder of tiny language models, data and configurations, and a Selection made there."""

from __future__ import annotations

import pytest
import yaml

from tests.support.language_commands import BUDGET, LORA, run
from tests.support.tiny_llama import model_folder, sums, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("commands")
    model_folder(made / "llama")
    model_folder(made / "small", hidden=8)
    write_lines(made / "sums.jsonl", sums(60))
    asked = [{"prompt": f"is {i}?", "choices": ["yes", "no", "so 3"], "answer": i % 3} for i in range(8)]
    write_lines(made / "choices.jsonl", asked)
    for name, peft in (("full", None), ("lora", LORA)):
        task = {"model": str(made / "llama"), "pool": [{"path": str(made / "sums.jsonl")}], "peft": peft}
        task |= {"choices": str(made / "choices.jsonl"), "max_new_tokens": 8, "n_test": 8}
        recipe = {"batch_size": 8, "learning_rate": 0.01}
        config = {"kind": "language", "task": task, "train": recipe, "budget": BUDGET}
        (made / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return made


@pytest.fixture(scope="module")
def selected(folder):
    """A Selection of a third of the pool, made by the command."""
    run("select", folder / "lora.yaml", "--method", "random", "--options.fraction", "0.3", "--out", folder / "random")
    return folder / "random"
