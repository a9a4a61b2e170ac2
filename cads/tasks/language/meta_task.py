"""The language task for `cads plan`: real examples, and a model without weights on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.task import Task
from cads.tasks.language.models import LanguageModels
from cads.tasks.language.task import LanguageTask


class RandomModels(LanguageModels):
    """Models with random weights, also where there are others."""

    @property
    def random(self) -> bool:
        """Always."""
        return True


class MetaLanguageTask(LanguageTask):
    """A language task whose models are on the meta device. Examples are read, since costs depend on their lengths."""

    def model(self, seed: int) -> nn.Module:
        """The model without weights."""
        return self.models.on_meta()

    def to_time(self) -> tuple[Task, float]:
        """The same examples, and models with random weights: none are loaded."""
        models = RandomModels(**{f.name: getattr(self.models, f.name) for f in fields(self.models) if f.init})
        pools = [self.pool, self.target, self.test]
        task = LanguageTask(
            pools, models, self.tokenizer, settings=self.settings, recipe=self.recipe, counts=self.counts
        )
        return task, 1.0

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example on the meta device, shape (B,)."""
        return super().losses(model, batch.to("meta"))

    def model_inputs(self, model: Callable[..., Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, with a mask: to build one, a model would read data, which meta tensors lack."""
        ids, answers = batch.inputs["input_ids"], batch.inputs["answers"]
        rows, length = ids.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
        return {"input_ids": ids, "attention_mask": mask}, answers
