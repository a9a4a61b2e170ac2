"""The FLOPs of a model in closed form: the matrix products of the forward and backward pass, 2mnk each.

A product `y = x W` of S positions costs `2 S n_in n_out` forward. The backward pass costs as much for the gradient of
W if W is trained, and as much again for the gradient of x if a trained weight lies before x. Attention is counted as
the full square, not as its causal half. By default attention is eager, with a backward pass of four products. Fused
kernels recompute the scores and execute five. Normalisations, activations and embeddings are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cads.accounting.architectures import Architecture, Linear
from cads.errors import ConfigError

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear but the language-model head."""
FUSED_BACKWARD_PRODUCTS = 5
"""Products in the backward pass of fused attention: it recomputes the scores, and then executes the other four."""

Checkpointing = Literal["reentrant", "non-reentrant"]


class Flops(NamedTuple):
    """FLOPs of one forward pass, and of one forward and backward pass."""

    forward: int
    usage: int


@dataclass(frozen=True)
class AllWeights:
    """Full fine-tuning: every weight is trained, embeddings included."""

    def trains(self, name: str) -> bool:
        """Whether the weight of the module at this path is trained."""
        return True

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module at this path, 0 without one."""
        return 0


@dataclass(frozen=True)
class Frozen:
    """No weight is trained: the backward pass costs nothing."""

    def trains(self, name: str) -> bool:
        """Whether the weight of the module at this path is trained."""
        return False

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module at this path, 0 without one."""
        return 0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters `x A B` beside frozen linears (Hu et al. 2021, arXiv 2106.09685), named as in PEFT.

    Attributes:
        r: the rank.
        targets: names or trailing parts of paths (`q_proj`, `mlp.c_proj`), or "all-linear".
        modules_to_save: names of linears or embeddings that are fully trained.

    Raises:
        ConfigError: if the rank is not positive or there is no target.
    """

    r: int
    targets: tuple[str, ...] | Literal["all-linear"]
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA rank r = {self.r}: it must be at least 1")
        if not self.targets or (isinstance(self.targets, str) and self.targets != ALL_LINEAR):
            raise ConfigError(f"LoRA targets = {self.targets!r}: a tuple of module names, or {ALL_LINEAR!r}")

    def trains(self, name: str) -> bool:
        """Whether the weight of the module at this path is trained."""
        return _matches(name, self.modules_to_save)

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module at this path, 0 without one."""
        if isinstance(self.targets, str):
            return 0 if _matches(name, ("lm_head", "cls.predictions.decoder")) else self.r
        return self.r if _matches(name, self.targets) else 0

    def check(self, architecture: Architecture) -> None:
        """Refuse names that the architecture does not have.

        Raises:
            ConfigError: naming the unknown modules and the known ones.
        """
        linears = [x.name for x in architecture.linears]
        trainable = [*linears, *architecture.embedding_names]
        targets = () if isinstance(self.targets, str) else self.targets
        unknown = [t for t in targets if not any(_matches(x, (t,)) for x in linears)]
        unknown += [m for m in self.modules_to_save if not any(_matches(x, (m,)) for x in trainable)]
        if unknown:
            available = sorted({x.rsplit(".", 1)[-1] for x in trainable})
            raise ConfigError(f"{architecture.family} has no module {unknown}: choose from {available}")


Trainable = AllWeights | Frozen | Lora


def _matches(path: str, names: tuple[str, ...]) -> bool:
    """Whether the path is one of the names, or ends with one, as PEFT matches them."""
    return any(path == name or path.endswith("." + name) for name in names)


def lora_parameters(architecture: Architecture, lora: Lora) -> int:
    """Number of trained parameters: of all adapters, `r (n_in + n_out)` each, and of the fully trained modules."""
    lora.check(architecture)
    adapters = sum(lora.rank(x.name) * (x.n_in + x.n_out) for x in architecture.linears)
    fully_trained = sum(x.n_parameters for x in architecture.linears if lora.trains(x.name))
    return adapters + fully_trained


def transformer_flops(
    architecture: Architecture,
    length: int,
    *,
    batch: int = 1,
    trainable: Trainable | None = None,
    checkpointing: Checkpointing | None = None,
    head_positions: int | None = None,
    fused_attention: bool = False,
) -> Flops:
    """FLOPs of a batch of B sequences of T positions, padding included.

    For full fine-tuning of L layers, with S = B T, width h, a gated MLP of width I, and query and key projections of
    widths q and k: forward is `L (2S(hq + 2hk + qh + 3hI) + 4 B T^2 q) + 2ShV`, forward and backward three times that.

    Args:
        architecture: the model.
        length: T.
        batch: B.
        trainable: what is trained; everything by default.
        checkpointing: how layers are recomputed in the backward pass; None for no recomputation. Non-reentrant
            recomputation stops once every saved tensor is there, which skips the last product of a layer if no later
            operation saves a tensor. With LoRA and checkpointing the output of the embedding requires a gradient,
            as in PEFT.
        head_positions: number of positions of each sequence that a language-model head computes on; all by default.
        fused_attention: whether to count the recomputed scores of a fused kernel.

    Raises:
        ConfigError: for a shape that cannot run, or LoRA names that the model does not have.
    """
    trainable = trainable or AllWeights()
    check_shape(architecture, batch, length, head_positions)
    if isinstance(trainable, Lora):
        trainable.check(architecture)
    requires_grad = any(trainable.trains(name) for name in architecture.embedding_names)
    requires_grad = requires_grad or (isinstance(trainable, Lora) and checkpointing is not None)
    forward = backward = 0
    for i in range(architecture.layers):
        layer = _layer(architecture, i, (batch, length), trainable, requires_grad=requires_grad, fused=fused_attention)
        forward += layer.forward
        backward += layer.backward
        requires_grad = layer.requires_grad
        if requires_grad and checkpointing is not None:
            backward += layer.forward - (layer.not_recomputed if checkpointing == "non-reentrant" else 0)
    positions = {"all": length, "answer": head_positions or length, "first": 1}
    for linear in architecture.head_linears:
        head = _linear(linear, batch * positions[linear.positions], trainable, requires_grad)
        forward += head.forward
        backward += head.backward if linear.in_loss else 0
        requires_grad = head.requires_grad
    return Flops(forward, forward + backward)


class _Cost(NamedTuple):
    """The cost of a linear or a layer.

    Attributes:
        forward, backward: FLOPs of each pass.
        requires_grad: whether the output requires a gradient.
        not_recomputed: forward FLOPs that non-reentrant recomputation skips.
    """

    forward: int
    backward: int
    requires_grad: bool
    not_recomputed: int


def _linear(linear: Linear, positions: int, trainable: Trainable, requires_grad: bool) -> _Cost:
    """`y = x W`, or `y = x W + x A B` with LoRA; `requires_grad` is whether x requires a gradient."""
    product = 2 * positions * linear.n_in * linear.n_out
    trained, r = trainable.trains(linear.name), trainable.rank(linear.name)
    down, up = 2 * positions * linear.n_in * r, 2 * positions * r * linear.n_out
    return _Cost(
        forward=product + down + up,
        backward=product * (trained + requires_grad) + down * (1 + requires_grad) + up * 2,
        requires_grad=requires_grad or trained or r > 0,
        # A product saves its operands before it runs: recomputation can stop before the last product.
        not_recomputed=up if r else product,
    )


def _layer(
    architecture: Architecture,
    i: int,
    shape: tuple[int, int],
    trainable: Trainable,
    *,
    requires_grad: bool,
    fused: bool,
) -> _Cost:
    """Layer i: query, key and value; `softmax(Q K^T) V`; output projection; MLP. Attention and MLP have residuals."""
    batch, length = shape
    positions = batch * length
    inputs = [_linear(x.of(i), positions, trainable, requires_grad) for x in architecture.attention_in]
    q, k, v = [x.requires_grad for x in inputs] if len(inputs) == 3 else [inputs[0].requires_grad] * 3
    square = 2 * batch * length**2 * architecture.heads * architecture.head_dim
    scores = q or k
    products = q + k + scores + v  # dQ, dK, d(softmax), dV
    if fused and products:
        products = FUSED_BACKWARD_PRODUCTS
    out = _linear(architecture.attention_out.of(i), positions, trainable, scores or v)
    mlp_requires_grad = requires_grad or out.requires_grad
    expand = [_linear(x.of(i), positions, trainable, mlp_requires_grad) for x in architecture.mlp_in]
    contract = _linear(architecture.mlp_out.of(i), positions, trainable, any(x.requires_grad for x in expand))
    linears = [*inputs, out, *expand, contract]
    return _Cost(
        forward=sum(x.forward for x in linears) + 2 * square,
        backward=sum(x.backward for x in linears) + products * square,
        requires_grad=mlp_requires_grad or contract.requires_grad,
        not_recomputed=0 if architecture.tail_saves else contract.not_recomputed,
    )


def check_shape(architecture: Architecture, batch: int, length: int, head_positions: int | None) -> None:
    """Refuse a batch that cannot run.

    Raises:
        ConfigError: for sizes that are not positive, a sequence longer than a learned position table, or a
            head that cannot be restricted to `head_positions`.
    """
    if batch < 1 or length < 1:
        raise ConfigError(f"a batch of {batch} sequences of {length} positions cannot run: both must be positive")
    limit = architecture.max_positions
    if limit is not None and length > limit:
        raise ConfigError(
            f"{length} positions cannot run through a {architecture.family} with {limit} learned positions"
        )
    if head_positions is not None and not (architecture.head == "lm" and 1 <= head_positions <= length):
        raise ConfigError(
            f"head_positions = {head_positions}: between 1 and {length}, for a causal language-model head "
            f"(this one is {architecture.head!r})"
        )


COSTLESS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.Embedding,
    nn.PReLU,
)
"""Layers with parameters but without a matrix product: their FLOPs are not counted."""


def module_flops(model: nn.Module, *inputs: Tensor) -> Flops:
    """FLOPs of a batch on a model whose products are all in `nn.Linear` and `nn.Conv1d` to `nn.Conv3d`.

    Args:
        model: with `requires_grad` set as for training.
        inputs: of shapes (B, ...), on any device; only shapes and types are used.

    Raises:
        ConfigError: if a layer with parameters has no closed form, or the inputs cannot run through the model.
    """
    check_layers(model)
    return product_flops(model, lambda meta_model: meta_model(*(_to_meta(x) for x in inputs)))


def product_flops(model: nn.Module, run: Callable[[Callable[..., Any]], Any]) -> Flops:
    """FLOPs of all linears and convolutions while `run` calls the model on the meta device.

    This pass gives the shapes, and whether the input of a layer requires a gradient. The model is not changed.
    A convolution costs `2 B n_out prod(kernel) (n_in / groups) prod(output size)`.

    Args:
        model: with `requires_grad` set as for training.
        run: calls the function it is given, a copy of the model on the meta device, with inputs on that device.

    Raises:
        ConfigError: if the inputs cannot run through the model.
    """
    forward = backward = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal forward, backward
        weight = state[names[module]]
        product = 2 * output.numel() * prod(weight.shape[1:])
        forward += product
        backward += product * (weight.requires_grad + args[0].requires_grad)

    def meta_model(*args: Any, **options: Any) -> Any:
        return torch.func.functional_call(model, state, args, options)

    names = {m: f"{n}.weight" if n else "weight" for n, m in model.named_modules() if _has_product(m)}
    state = {n: _to_meta(x) for n, x in (*model.named_parameters(), *model.named_buffers())}
    # `named_parameters` lists a weight shared by two modules only under its first name.
    state.update({name: state[_first_name(model, m)] for m, name in names.items() if name not in state})
    handles = [m.register_forward_hook(count) for m in names]
    try:
        with torch.enable_grad():
            run(meta_model)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"these inputs cannot run through the model: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return Flops(forward, forward + backward)


def _to_meta(x: Tensor) -> Tensor:
    """A tensor of the same shape and type on the meta device."""
    return torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)


def _has_product(module: nn.Module) -> bool:
    """Whether the module is a linear or a convolution."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _first_name(model: nn.Module, module: nn.Module) -> str:
    """The name under which `named_parameters` lists the weight of `module`."""
    weight: Any = module.weight
    return next(n for n, p in model.named_parameters() if p is weight)


def check_layers(model: nn.Module) -> None:
    """Refuse a model with parameters in layers that have no closed form.

    Raises:
        ConfigError: naming the first such layer.
    """
    for name, module in model.named_modules():
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_parameters and not (_has_product(module) or isinstance(module, COSTLESS)):
            raise ConfigError(f"layer {name!r} ({type(module).__name__}) has no closed form: use `measured` accounting")
