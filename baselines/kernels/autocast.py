"""Passes in bfloat16 that cast frozen weights only once.

Autocast casts the weights of a layer at every call, and an input once for each layer that reads it. Here frozen weights
are replaced by bfloat16 copies during a pass, and frozen norms cast their outputs themselves.
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
"""Layers whose weights autocast would cast; without subclasses, which may use their weights in other ways."""
NORMS = (layer_norm, rms_norm, transformers_rms_norm)
PEFT_CASTS = "cast_input_dtype_enabled"
"""Attribute of PEFT's layers that switches input casts (see `peft.helpers.disable_input_dtype_casting`)."""


class Passes:
    """The precision of forward and backward passes of one model.

    The model is changed only during a pass. Between passes, bfloat16 copies of its frozen weights stay in memory, at
    half the size of the weights. A copy is made again if its weight has changed.

    Args:
        model: runs the passes; frozen parameters stay frozen.
        precision: no (float32, by `baselines.kernels.attention`, `baselines.kernels.norms`,
            `baselines.kernels.cross_entropy` and `baselines.kernels.matmul`) or bf16.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self._model, self._precision = model, precision
        modules = dict(model.named_modules()) if precision == "bf16" else {}
        self._layers = {path: m for path, m in modules.items() if type(m) in CASTED or rule_of(m) is transposed_linear}
        self._fast_norms = frozen_norms(model)
        self._other_norms = [
            m for m in modules.values() if rule_of(m) in NORMS and _is_frozen(m) and m not in self._fast_norms
        ]
        self._adapters = [m for m in modules.values() if getattr(m, PEFT_CASTS, False)]
        self._copies: dict[str, tuple[nn.Parameter, int, nn.Parameter]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which passes have this precision."""
        dtype = torch.float32 if self._precision == "no" else torch.bfloat16
        with ExitStack() as stack:
            stack.enter_context(short_norms(self._fast_norms, dtype))
            stack.enter_context(ShortAttention(dtype))
            stack.enter_context(LogitsInPlace())
            stack.enter_context(FrozenProducts())
            if self._precision == "no":
                yield
                return
            for norm in self._other_norms:
                stack.callback(norm.register_forward_hook(_to_bfloat16).remove)
            for adapter in self._adapters:
                # Otherwise an adapter casts its inputs to float32, and autocast casts them back to bfloat16.
                stack.callback(setattr, adapter, PEFT_CASTS, True)
                setattr(adapter, PEFT_CASTS, False)
            stack.enter_context(self._bfloat16_weights())
            stack.enter_context(torch.autocast(next(self._model.parameters()).device.type, dtype=dtype))
            yield

    @contextmanager
    def _bfloat16_weights(self) -> Iterator[None]:
        """Replace frozen weights by bfloat16 copies in the modules of this model only: other models may share them."""
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
        cached = self._copies.get(name)
        if cached is None or cached[0] is not parameter or cached[1] != parameter._version:
            # A caller may be in inference mode, whose tensors cannot be used in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                copy = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
            self._copies[name] = cached = (parameter, parameter._version, copy)
        return cached[2]


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _to_bfloat16(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(torch.bfloat16)
