"""What `cads init` writes: the fields of a configuration, and what is to be known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cads.cli.commented_yaml import Off, commented_yaml

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The language model of a configuration for which none is named: small, with a chat template."""
FORMATS = {"chats": "messages", "prompts": "prompt", "text": "text"}
"""The format of rows of each template of texts."""
ROWS = {
    "chats": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "prompts": '{"prompt": "...", "response": "..."}',
    "text": '{"text": "..."}',
}
"""A row of each format, as it may stand in a file."""
NOISY_DIGITS = [{"name": "clean", "label_noise": 0.0}, {"name": "noise 45 %", "label_noise": 0.45}]
BATCH, RATE, LORA_RATE, FULL_RATE = 16, 1e-3, 2e-4, 2e-5
"""Examples a step; learning rates from scratch, of adapters, and of all pretrained weights."""
LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
BUDGET = "3 epochs"


@dataclass
class Draft:
    """A configuration that is to be written.

    Attributes:
        kind: of task. task, train: their fields. comments: by dotted name.
        head: lines above all.
        unread: why tokenizer or model cannot be loaded here; empty if they can.
    """

    kind: str
    task: dict[str, Any]
    train: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)
    unread: str = ""

    def text(self, *, grid: bool) -> str:
        """The file; a grid for `cads compare`, or a configuration of one run."""
        rest, comments = (GRID, GRID_COMMENTS) if grid else (RUN, RUN_COMMENTS)
        fields = {"kind": self.kind, "task": self.task, "train": self.train, **rest}
        head = "".join(f"# {line}\n" for line in self.head)
        return head + commented_yaml(fields, {**comments, **self.comments})


RUN: dict[str, Any] = {"budget": BUDGET, "count_selection": Off(True), "method": "cads", "seed": 0}
RUN_COMMENTS = {
    "budget": "What training may cost: 2e15 (FLOPs), 3 epochs, 225000 usages, 2e6 tokens, 30 minutes, "
    "$5 at 2.50 an hour.",
    "count_selection": "The budget covers what the method spends on selection too. `cads` needs no switch: all it does "
    "is in the budget.",
    "method": "How examples are chosen. `cads plan` prices this and the other methods.",
    "seed": "Of everything that is drawn.",
}
GRID: dict[str, Any] = {
    "budgets": ["1 epochs", "4 epochs"],
    "seeds": 2,
    "count_selection": True,
    "methods": ["full", "joint", "target-only", "cads"],
}
GRID_COMMENTS = {
    "budgets": "Each method is run at each budget.",
    "seeds": "Runs of each method at each budget; each draws its own data.",
    "count_selection": "Budgets cover selection and training, so that all methods cost the same.",
    "methods": "Names, or entries with options: {method: loss, options: {fraction: 0.5}}. `cads plan` prices them.",
}
IMAGE_COMMENTS = {
    "task.dataset": "folder (class/file or source/class/file), hub, arrays, digits, fashion-mnist, cifar10, cifar100.",
    "task.model": "mlp, cnn, resnet8, or a classifier of torchvision, such as resnet18.",
    "task.pretrained": "Start from torchvision's weights; download: true allows to fetch them.",
    "task.n_target": "Images that selection optimises for: val/ beside train/, or else a tenth of the training images, "
    "or as many, which are taken out of the pool.",
    "task.n_test": "Images of the test set, which no method sees: test/ beside train/, or else a fifth, or as many.",
    "train.batch_size": "Images a step.",
    "train.learning_rate": "Its peak; it rises first, and falls to 0 at the end of the budget.",
}


def digits_draft(*, grid: bool) -> Draft:
    """Digits, which come with scikit-learn, in a clean and a noisy source."""
    task = {"dataset": "digits", "model": "mlp", "n_target": 200, "n_test": 400, "sources": NOISY_DIGITS}
    comments = {
        **IMAGE_COMMENTS,
        "task.sources": "Sources that are made from the pool, to try methods on. Leave this out for data of your own.",
    }
    command = "cads init FOLDER --template grid" if grid else "cads init FOLDER"
    head = ["Digits of scikit-learn, to begin with. For your images: `" + command + "`."]
    return Draft("vision", task, {"batch_size": 32, "learning_rate": RATE}, comments, head)


def image_draft(fields: Mapping[str, Any], remarks: Mapping[str, str]) -> Draft:
    """Images of a folder; `fields` and `remarks` are those of `cads.cli.init_images`."""
    task = dict(fields)
    if fields["model"] not in ("mlp", "cnn", "resnet8"):
        task["pretrained"] = Off(True)
    task |= {"n_target": Off(500), "n_test": Off(500)}
    comments = {**IMAGE_COMMENTS, **{f"task.{name}": remark for name, remark in remarks.items()}}
    return Draft("vision", task, {"batch_size": 32, "learning_rate": RATE}, comments)


def text_draft(
    template: str, parts: Mapping[str, Any], model: str | None, *, pretrained: bool, pad_token: str | None, n_pool: int
) -> Draft:
    """Texts in files.

    Args:
        parts: pool, target and test, as fields of the task.
        model: name or folder; None: `SMALL_MODEL`. pretrained: whether it comes with weights.
        pad_token: for a tokenizer that has none; else None.
    """
    task: dict[str, Any] = {"model": model or SMALL_MODEL}
    if pad_token is not None:
        task["pad_token"] = pad_token
    task |= {"peft": LORA} if pretrained else {}
    task |= {"max_tokens": Off(512), **parts}
    absent = {"target": "n_target", "test": "n_test"}
    task |= {name: Off(100) for part, name in absent.items() if part not in parts}
    rate = LORA_RATE if pretrained else RATE
    comments = {
        "task.model": "Name on the hub, or a folder." + ("" if model else " A small one, to begin with: name yours."),
        "task.pad_token": "The tokenizer names none. It is masked, and never learned.",
        "task.peft": "Adapters: few weights are trained, which saves memory. Without this line all weights are "
        f"trained: then a learning rate of {FULL_RATE:g} is usual.",
        "task.max_tokens": "Tokens at which an example is cut; by default the context of the model.",
        "task.pool": "What may be trained on. Each file is a source; one file alone has the sources of its column "
        f"`source`, if any. A row: {ROWS[template]}",
        "task.target": "What selection optimises for: some examples of what the model is to be good at.",
        "task.test": "Held out; no method sees it.",
        "task.n_target": "Without a target of its own, a tenth of the pool is taken out of it, or as many.",
        "task.n_test": "Without a test set, half of the target (or a fifth of the pool) is taken out, or as many.",
        "train.batch_size": "Examples a step. To save memory: accumulate: 2, 4, ... cuts a step into pieces.",
        "train.learning_rate": "Its peak; it rises first, and falls to 0 at the end of the budget.",
    }
    return Draft("language", task, {"batch_size": max(1, min(BATCH, n_pool)), "learning_rate": rate}, comments)
