"""Passes in bfloat16 that do not cast what stays as it is: autocast on frozen weights that are cast once.

Autocast casts the weights of a layer whenever it is called, and what a layer reads once for each layer that reads it.
Here frozen weights stand in bfloat16 for the time of a pass, and the outputs of frozen norms are cast where they arise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from baselines.kernels.attention import ShortAttention
from baselines.kernels.cross_entropy import LogitsInPlace
from baselines.kernels.layer_rules import layer_norm, rms_norm, rule_of, transformers_rms_norm, transposed_linear
from baselines.kernels.matmul import FrozenProducts
from baselines.kernels.norms import frozen_norms, short_norms

Precision = Literal["no", "bf16"]

CASTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast would cast; subclasses may use theirs in other ways."""
NORMS = (layer_norm, rms_norm, transformers_rms_norm)
PEFT_CASTS = "cast_input_dtype_enabled"
"""Switch of PEFT's layers (see `peft.helpers.disable_input_dtype_casting`)."""


class Passes:
    """The precision of forward and backward passes of one model.

    Nothing of the model is changed but while a pass is under way. Copies of its frozen weights are kept between passes,
    half as large as they are, and made anew if the weights have changed.

    Args:
        model: whose passes they are; what is frozen stays frozen.
        precision: no (float32, as the model is: by `baselines.kernels.attention`, `baselines.kernels.norms`,
            `baselines.kernels.cross_entropy` and `baselines.kernels.matmul`) or bf16.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self._model, self._precision = model, precision
        modules = dict(model.named_modules()) if precision == "bf16" else {}
        self._layers = {path: m for path, m in modules.items() if type(m) in CASTED or rule_of(m) is transposed_linear}
        self._short = frozen_norms(model)
        self._norms = [m for m in modules.values() if rule_of(m) in NORMS and _is_frozen(m) and m not in self._short]
        self._adapters = [m for m in modules.values() if getattr(m, PEFT_CASTS, False)]
        self._copies: dict[str, tuple[nn.Parameter, int, nn.Parameter]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block computes in this precision."""
        dtype = torch.float32 if self._precision == "no" else torch.bfloat16
        with ExitStack() as stack:
            stack.enter_context(short_norms(self._short, dtype))
            stack.enter_context(ShortAttention(dtype))
            stack.enter_context(LogitsInPlace())
            stack.enter_context(FrozenProducts())
            if self._precision == "no":
                yield
                return
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(_halved).remove)
            for adapter in self._adapters:
                # Else an adapter makes its inputs float32, for autocast to make them bfloat16 again.
                stack.callback(setattr, adapter, PEFT_CASTS, True)
                setattr(adapter, PEFT_CASTS, False)
            stack.enter_context(self._stored())
            stack.enter_context(torch.autocast(next(self._model.parameters()).device.type, dtype=dtype))
            yield

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """Frozen weights in bfloat16, in the modules of this model alone: others may share the parameters."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path, module in self._layers.items():
                for name, parameter in module.named_parameters(recurse=False):
                    if not parameter.requires_grad and parameter.dtype == torch.float32:
                        module._parameters[name] = self._copy(f"{path}.{name}", parameter)
                        replaced.append((module, name, parameter))
            yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter

    def _copy(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        known = self._copies.get(name)
        if known is None or known[0] is not parameter or known[1] != parameter._version:
            # Scores are computed in inference mode, whose tensors no later backward pass could use.
            with torch.inference_mode(False), torch.no_grad():
                copy = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
            self._copies[name] = known = (parameter, parameter._version, copy)
        return known[2]


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _halved(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(torch.bfloat16)
