"""The language task for `cads plan`: real examples, and a model without weights on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cads.data.batch import Batch
from cads.tasks.language.task import LanguageTask


class MetaLanguageTask(LanguageTask):
    """A language task whose models are on the meta device. Examples are read, since costs depend on their lengths."""

    def model(self, seed: int) -> nn.Module:
        """The model without weights."""
        return self.models.on_meta()

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss of each example on the meta device, shape (B,)."""
        return super().losses(model, batch.to("meta"))

    def model_inputs(self, model: Callable[..., Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, with a mask: to build one, a model would read data, which meta tensors lack."""
        ids, answers = batch.inputs["input_ids"], batch.inputs["answers"]
        rows, length = ids.shape
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
        return {"input_ids": ids, "attention_mask": mask}, answers
