"""The language task without weights: its examples, and a model on the meta device. For `cads plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.tasks.language.task import LanguageTask


class MetaLanguageTask(LanguageTask):
    """A language task whose models are on the meta device; examples are read, since costs follow from their lengths."""

    def model(self, seed: int) -> nn.Module:
        """The model without weights."""
        return self.models.on_meta()

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example on the meta device, shape (B,)."""
        return super().losses(model, batch.to("meta"))

    def model_inputs(self, model: Callable[..., Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What the model reads, with a mask of its own: building one looks at data, and here there is none."""
        ids, answers = batch.inputs["input_ids"], batch.inputs["answers"]
        rows, length = ids.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
        return {"input_ids": ids, "attention_mask": mask}, answers
