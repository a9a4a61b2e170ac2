"""Counts FLOPs while they are executed, with `FlopCounterMode`: of any function, or of a model on the meta device.

`measure` counts a model or a transformers config on the meta device, without weights. `attention_self_test` checks
that PyTorch still counts attention as this module expects.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from cads.accounting.architectures import READERS, Head, from_config, head_kind
from cads.accounting.closed_form import (
    FUSED_BACKWARD_PRODUCTS,
    AllWeights,
    Checkpointing,
    Flops,
    Frozen,
    Lora,
    Trainable,
    check_shape,
)
from cads.accounting.kernels import UncountedOperations, kernel_mapping
from cads.data.batch import Batch
from cads.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scaled dot-product attention on the CPU: both matrix products, full square (shapes B, H, T, D)."""
    b, h, t, d = q
    return int(2 * b * h * t * k[-2] * (d + v[-1]))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Backward of that attention: recomputed scores and four products, as PyTorch counts other flash kernels."""
    b, h, t, d = q
    return int(2 * b * h * t * k[-2] * (3 * d + 2 * v[-1]))


def cpu_attention_mapping() -> dict[Any, Callable[..., int]]:
    """Formulas for the CPU attention kernels, for which PyTorch (2.13, 2.14) has none and counts 0."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }


def _convolution_backward_flops(
    grad: Any,
    x: Any,
    weight: Any,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Any,
    **kwargs: Any,
) -> int:
    """Backward of a convolution: the gradients of input and of weight each cost as much as the forward."""
    positions = x if transposed else grad
    return int(2 * positions[0] * prod(positions[2:]) * prod(weight) * sum(output_mask[:2]))


def convolution_mapping() -> dict[Any, Callable[..., int]]:
    """Formula for grouped convolutions: PyTorch (2.14) counts their weight gradient `groups` times."""
    return {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_own_formulas())


def _own_formulas() -> dict[Any, Callable[..., int]]:
    return {**cpu_attention_mapping(), **convolution_mapping(), **kernel_mapping()}


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs (multiplications and additions of matrix products and convolutions) executed by `function`."""
    with _counter() as counter:
        function()
    return int(counter.get_total_flops())


def uncounted_operations(function: Callable[[], Any]) -> list[str]:
    """Names of the operations in `function` that do products which `count_flops` leaves out, such as `aten.fft_fft`."""
    with UncountedOperations({*flop_registry, *_own_formulas()}) as operations:
        function()
    return sorted(operations.names)


def attention_self_test() -> list[str]:
    """Changes in how PyTorch counts attention on the CPU, one message each; empty if our formulas still hold.

    A small attention runs forward and backward. PyTorch without our formulas is expected to count 0, since it has none
    for these kernels. `count_flops` is expected to count the closed form.
    """
    b, h, t, d = 2, 3, 16, 8
    product = 2 * b * h * t * t * d
    expected = product * (2 + FUSED_BACKWARD_PRODUCTS)
    q, k, v = (torch.zeros(b, h, t, d, requires_grad=True) for _ in range(3))

    def attend() -> None:
        scaled_dot_product_attention(q, k, v).sum().backward()

    changes = []
    for kernel in cpu_attention_mapping():
        if kernel in flop_registry:
            changes.append(
                f"PyTorch {torch.__version__} now has a formula for {kernel}: cpu_attention_mapping overrides it"
            )
    with FlopCounterMode(display=False) as counter:
        attend()
    if pytorch_flops := int(counter.get_total_flops()):
        changes.append(
            f"PyTorch {torch.__version__} counts {pytorch_flops} FLOPs of CPU attention where it counted 0: "
            "remove cpu_attention_mapping if that is right"
        )
    if (counted := count_flops(attend)) != expected:
        changes.append(
            f"CPU attention counts {counted} FLOPs where {expected} are executed: PyTorch {torch.__version__} "
            "runs other kernels, map them in cpu_attention_mapping"
        )
    return changes


def measure(
    model: Callable[[], nn.Module] | PretrainedConfig,
    shape: tuple[int, ...],
    *,
    trainable: Trainable | None = None,
    checkpointing: Checkpointing | None = None,
    head: Head | None = None,
    head_positions: int | None = None,
    device: str = "meta",
) -> Flops:
    """FLOPs of a batch, counted while it runs. On the meta device this needs no weights and hardly any memory or time.

    A transformers config runs with eager attention and an explicit mask, since transformers reads data to build a mask.

    Args:
        model: a factory of the model, or a transformers config.
        shape: of the batch: (B, T) tokens for a config, (B, ...) floats for a factory.
        trainable: what is trained; everything by default. For a factory only `Frozen` has an effect.
        checkpointing: how the layers of a transformer are recomputed; None for no recomputation.
        head: the head of a config's model; by default the one that `config.architectures` names.
        head_positions: number of positions of each sequence that a causal language-model head computes on.
        device: where the batch runs.

    Raises:
        ConfigError: for a shape that cannot run, or an option that the model does not have.
    """
    trainable = trainable or AllWeights()
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            if not hasattr(model, "model_type"):
                if checkpointing or head or head_positions or isinstance(trainable, Lora):
                    raise ConfigError(
                        "LoRA, checkpointing and heads are for transformers configs: a factory builds its own"
                    )
                return _run(model(), trainable, torch.zeros(shape))
            head = head or head_kind(model)
            batch, length = shape
            if model.model_type in READERS:  # the meta device does not check indices into embedding tables
                check_shape(from_config(model, head), batch, length, head_positions)
            transformer = build_transformer(model, trainable, checkpointing, head)
            return _run(transformer, trainable, **_tokens(batch, length, head_positions))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(f"a batch of shape {shape} cannot run through the model: {error}") from error


def _run(model: nn.Module, trainable: Trainable, *args: Tensor, **options: Any) -> Flops:
    """FLOPs of a forward pass, and of a backward pass from the sum of the output."""
    if isinstance(trainable, Frozen):
        model.requires_grad_(False)
    model.train()
    with _counter() as counter:
        output = model(*args, **options)
        output = output if isinstance(output, Tensor) else output[0]
        forward = int(counter.get_total_flops())
        if output.requires_grad:
            output.sum().backward()
        return Flops(forward, int(counter.get_total_flops()))


def _tokens(batch: int, length: int, head_positions: int | None) -> dict[str, Any]:
    """The arguments of a transformer for `batch` sequences of `length` tokens."""
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(batch, length, dtype=torch.long),
        "attention_mask": torch.ones(batch, 1, length, length, dtype=torch.bool),
    }
    return inputs if head_positions is None else {**inputs, "logits_to_keep": head_positions}


def build_transformer(
    config: PretrainedConfig, trainable: Trainable, checkpointing: Checkpointing | None, head: Head
) -> nn.Module:
    """The model of a transformers config on the current device, with its adapters and eager attention."""
    import peft
    import transformers

    builders = {
        "lm": transformers.AutoModelForCausalLM,
        "masked-lm": transformers.AutoModelForMaskedLM,
        "classifier": transformers.AutoModelForSequenceClassification,
        "none": transformers.AutoModel,
    }
    config = copy.deepcopy(config)
    config.use_cache = False
    config.pad_token_id = config.pad_token_id or 0
    with warnings.catch_warnings():
        # Deprecated names work in every transformers release we allow. Advice on training does not apply to counting.
        warnings.simplefilter("ignore")
        model: Any = builders[head].from_config(config, attn_implementation="eager")
        if checkpointing is not None and not isinstance(trainable, Frozen):
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if isinstance(trainable, Lora):
            targets = trainable.targets if isinstance(trainable.targets, str) else list(trainable.targets)
            modules_to_save = list(trainable.modules_to_save) or None
            adapter = peft.LoraConfig(r=trainable.r, target_modules=targets, modules_to_save=modules_to_save)
            model = peft.get_peft_model(model, adapter)
    return cast(nn.Module, model)


PROBE_SIZE = 2
"""Examples in the batch that is counted: batch normalisation cannot train on a single one."""


class Counted:
    """The FLOPs of a function of a batch: counted once per shape, by running it on copies of one example.

    The shape is that of the largest input, so the cost of the function must not depend on the answers.

    Args:
        function: of a batch.
    """

    def __init__(self, function: Callable[[Batch], object]) -> None:
        self._function = function
        self._cache: dict[tuple[int, ...], float] = {}

    def __call__(self, batch: Batch) -> float:
        """FLOPs of the function on `batch`."""
        shape = tuple(max((x.shape[1:] for x in batch.inputs.values()), key=prod))
        if shape not in self._cache:
            probe = batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))
            with torch.no_grad():
                self._cache[shape] = count_flops(lambda: self._function(probe)) / PROBE_SIZE
        return self._cache[shape] * len(batch)
