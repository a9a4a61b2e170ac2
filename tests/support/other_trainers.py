"""Runs of `OnlineSelection` in `transformers.Trainer` and TRL's `SFTTrainer`, on tasks that train in a second."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from cads.integrations.transformers import OnlineSelection
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from tests.support.tiny_llama import model_folder, sums, tokenizer, write_lines

SEED = 3
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1000}


def write_sums(folder, n=80):
    """A model without weights, and sums of unequal lengths: right and wrong answers by source; no ids."""
    model_folder(folder / "m")
    for name, count, seed in (("pool", n, 0), ("target", 16, 1), ("test", 8, 2)):
        rows = [{key: row[key] for key in ("prompt", "response", "source")} for row in sums(count, seed)]
        rows = [{**row, "prompt": f"{name} {row['prompt']}"} for row in rows]
        if name != "pool":
            rows = [{key: row[key] for key in ("prompt", "response")} for row in rows]
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def sums_task(folder, model="m", weighting="example", peft=None, **recipe):
    """The task on what `write_sums` has written."""
    parts = {name: [TextSource(path=str(folder / f"{name}.jsonl"))] for name in ("pool", "target", "test")}
    settings = {"chat": False, "weighting": weighting, "peft": peft, "trainer_compatible": True}
    config = LanguageConfig(model=str(folder / model), **parts, **settings)
    return config.build(TrainConfig(**{"batch_size": 8, "learning_rate": 3e-3, **recipe}))


def digits_task(**recipe):
    """Digits of a clean and a noisy source: their examples are weighed."""
    sources = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.8)]
    config = VisionConfig(hidden=16, n_pool=320, n_target=60, n_test=20, sources=sources)
    return config.build(TrainConfig(**{"batch_size": 16, "learning_rate": 5e-3, **recipe}))


def online(task, budget, out, *, kind=(Trainer, TrainingArguments), resume=None, extra=None, **changed):
    """The selection and the trainer after a run; `changed` arguments win over those of the selection."""
    selection = OnlineSelection(task, budget, seed=SEED)
    model = selection.model()
    trainer_class, arguments_class = kind
    arguments = {"save_strategy": "no", **QUIET, **selection.settings(), **changed}
    trainer = trainer_class(
        model=model, args=arguments_class(str(out), **arguments), **selection.parts(model), **(extra or {})
    )
    trainer.train(resume_from_checkpoint=resume)
    return selection, trainer


def sft(task, budget, out, **changed):
    """The same in TRL's trainer."""
    from trl import SFTConfig, SFTTrainer

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    kind, extra = (SFTTrainer, SFTConfig), {"processing_class": tokenizer()}
    return online(task, budget, out, kind=kind, extra=extra, **prepared, **changed)


def assert_same_weights(one, other):
    """To the last bit."""
    theirs = dict(other.named_parameters())
    for name, x in one.named_parameters():
        assert torch.equal(x.cpu(), theirs[name].cpu()), name
