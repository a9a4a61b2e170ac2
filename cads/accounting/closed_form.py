"""What a model costs in closed form: the matrix products that forward and backward execute, 2mnk each.

A product `y = x W` of S positions costs `2 S n_in n_out` forward; backward, as much again for the gradient
of W if W is trained, and as much again for the gradient of x if something that is trained lies before x.
Attention is the full square (no causal half). One convention: eager attention, whose backward is four
products; fused kernels recompute the scores and execute five. Normalisations, activations and embeddings are
not counted.
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
"""A fused attention kernel keeps no scores: it recomputes them, then takes the four products."""

Checkpointing = Literal["reentrant", "non-reentrant"]


class Flops(NamedTuple):
    """FLOPs of one forward pass, and of one forward and backward pass."""

    forward: int
    usage: int


@dataclass(frozen=True)
class Full:
    """Every weight is trained, embeddings included."""

    def trains(self, name: str) -> bool:
        """Whether the weight of the module of this path is trained."""
        return True

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module of this path, 0 without one."""
        return 0


@dataclass(frozen=True)
class Frozen:
    """No weight is trained: a backward pass has nothing to do."""

    def trains(self, name: str) -> bool:
        """Whether the weight of the module of this path is trained."""
        return False

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module of this path, 0 without one."""
        return 0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters `x A B` beside frozen linears (Hu et al. 2021, arXiv 2106.09685), named as in PEFT.

    Attributes:
        r: the rank.
        targets: names or trailing parts of paths (`q_proj`, `mlp.c_proj`), or "all-linear".
        modules_to_save: names of linears or embeddings that are trained whole.

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
        """Whether the weight of the module of this path is trained."""
        return _named(name, self.modules_to_save)

    def rank(self, name: str) -> int:
        """Rank of the adapter on the module of this path, 0 without one."""
        if isinstance(self.targets, str):
            return 0 if _named(name, ("lm_head", "cls.predictions.decoder")) else self.r
        return self.r if _named(name, self.targets) else 0

    def check(self, architecture: Architecture) -> None:
        """Refuse names that the architecture does not have.

        Raises:
            ConfigError: naming them, and what there is.
        """
        linears = [x.name for x in architecture.linears]
        trainable = [*linears, *architecture.embedding_names]
        targets = () if isinstance(self.targets, str) else self.targets
        missing = [t for t in targets if not any(_named(x, (t,)) for x in linears)]
        missing += [m for m in self.modules_to_save if not any(_named(x, (m,)) for x in trainable)]
        if missing:
            known = sorted({x.rsplit(".", 1)[-1] for x in trainable})
            raise ConfigError(f"{architecture.family} has no module {missing}: choose from {known}")


Trainable = Full | Frozen | Lora


def _named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def lora_parameters(architecture: Architecture, lora: Lora) -> int:
    """Parameters of all adapters, `r (n_in + n_out)` each, and of the modules trained whole."""
    lora.check(architecture)
    adapters = sum(lora.rank(x.name) * (x.n_in + x.n_out) for x in architecture.linears)
    whole = sum(x.n_parameters for x in architecture.linears if lora.trains(x.name))
    return adapters + whole


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

    With full fine-tuning, S = B T, width h, gated MLP of width I, q and k the widths of query and key
    projections: forward `L (2S(hq + 2hk + qh + 3hI) + 4 B T^2 q) + 2ShV`, forward+backward three times that.

    Args:
        architecture: the model.
        length: T.
        batch: B.
        trainable: what is trained; everything by default.
        checkpointing: whether layers are recomputed in the backward pass. Non-reentrant recomputation stops
            as soon as it has all it needs, which spares the last product of a layer if nothing after it
            keeps a tensor. With LoRA the embedding's output then asks for a gradient, as PEFT has it.
        head_positions: positions of each sequence that a language-model head computes on; all by default.
        fused_attention: count the recomputed scores of a fused kernel.

    Raises:
        ConfigError: for a shape that cannot run, or LoRA names that the model does not have.
    """
    trainable = trainable or Full()
    check_shape(architecture, batch, length, head_positions)
    if isinstance(trainable, Lora):
        trainable.check(architecture)
    needs = any(trainable.trains(name) for name in architecture.embedding_names)
    needs = needs or (isinstance(trainable, Lora) and checkpointing is not None)
    forward = backward = 0
    for i in range(architecture.layers):
        layer = _layer(architecture, i, (batch, length), trainable, needs=needs, fused=fused_attention)
        forward += layer.forward
        backward += layer.backward
        needs = layer.needs
        if needs and checkpointing is not None:
            backward += layer.forward - (layer.spared if checkpointing == "non-reentrant" else 0)
    positions = {"all": length, "answer": head_positions or length, "first": 1}
    for linear in architecture.head_linears:
        head = _linear(linear, batch * positions[linear.positions], trainable, needs)
        forward += head.forward
        backward += head.backward if linear.in_loss else 0
        needs = head.needs
    return Flops(forward, forward + backward)


class _Cost(NamedTuple):
    """Of a linear or layer: FLOPs, whether its output asks for a gradient, what recomputing it spares."""

    forward: int
    backward: int
    needs: bool
    spared: int


def _linear(linear: Linear, positions: int, trainable: Trainable, needs: bool) -> _Cost:
    """`y = x W`, or `y = x W + x A B` with LoRA; `needs` says that x asks for a gradient."""
    product = 2 * positions * linear.n_in * linear.n_out
    trained, r = trainable.trains(linear.name), trainable.rank(linear.name)
    down, up = 2 * positions * linear.n_in * r, 2 * positions * r * linear.n_out
    return _Cost(
        forward=product + down + up,
        backward=product * (trained + needs) + down * (1 + needs) + up * 2,
        needs=needs or trained or r > 0,
        # A product saves its operands before it runs: recomputation stops there if nothing else is missing.
        spared=up if r else product,
    )


def _layer(
    architecture: Architecture,
    i: int,
    shape: tuple[int, int],
    trainable: Trainable,
    *,
    needs: bool,
    fused: bool,
) -> _Cost:
    """Layer i: query, key, value; `softmax(Q K^T) V`; output projection; MLP; both on a residual stream."""
    batch, length = shape
    positions = batch * length
    inputs = [_linear(x.of(i), positions, trainable, needs) for x in architecture.attention_in]
    q, k, v = [x.needs for x in inputs] if len(inputs) == 3 else [inputs[0].needs] * 3
    square = 2 * batch * length**2 * architecture.heads * architecture.head_dim
    scores = q or k
    products = q + k + scores + v  # dQ, dK, d(softmax), dV
    if fused and products:
        products = FUSED_BACKWARD_PRODUCTS
    out = _linear(architecture.attention_out.of(i), positions, trainable, scores or v)
    middle = needs or out.needs
    expand = [_linear(x.of(i), positions, trainable, middle) for x in architecture.mlp_in]
    contract = _linear(architecture.mlp_out.of(i), positions, trainable, any(x.needs for x in expand))
    linears = [*inputs, out, *expand, contract]
    return _Cost(
        forward=sum(x.forward for x in linears) + 2 * square,
        backward=sum(x.backward for x in linears) + products * square,
        needs=middle or contract.needs,
        spared=0 if architecture.tail_saves else contract.spared,
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
"""Layers with parameters whose work is not counted: no matrix product."""


def module_flops(model: nn.Module, *inputs: Tensor) -> Flops:
    """FLOPs of a batch on a model whose products are all in `nn.Linear` and `nn.Conv1d` to `nn.Conv3d`.

    Args:
        model: with `requires_grad` set as it will be trained.
        inputs: of shapes (B, ...), on any device; only their shapes and types are used.

    Raises:
        ConfigError: for a layer with parameters that has no closed form, or inputs that cannot run.
    """
    check_layers(model)
    return product_flops(model, lambda function: function(*(_to_meta(x) for x in inputs)))


def product_flops(model: nn.Module, run: Callable[[Callable[..., Any]], Any]) -> Flops:
    """FLOPs of all linears and convolutions while `run` calls the model on the meta device.

    Shapes, and whether the input of a layer asks for a gradient, come from that pass; the model is not touched.
    A convolution costs `2 B n_out prod(kernel) (n_in / groups) prod(output size)`.

    Args:
        model: with `requires_grad` set as it will be trained.
        run: given a function that stands for the model, calls it with inputs on the meta device.

    Raises:
        ConfigError: if that cannot run.
    """
    forward = backward = 0

    def charge(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal forward, backward
        weight = state[names[module]]
        product = 2 * output.numel() * prod(weight.shape[1:])
        forward += product
        backward += product * (weight.requires_grad + args[0].requires_grad)

    def function(*args: Any, **options: Any) -> Any:
        return torch.func.functional_call(model, state, args, options)

    names = {m: f"{n}.weight" if n else "weight" for n, m in model.named_modules() if _has_product(m)}
    state = {n: _to_meta(x) for n, x in (*model.named_parameters(), *model.named_buffers())}
    # A weight shared by two modules is listed under the first name only.
    state.update({name: state[_first_name(model, m)] for m, name in names.items() if name not in state})
    handles = [m.register_forward_hook(charge) for m in names]
    try:
        with torch.enable_grad():
            run(function)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"these inputs cannot run through the model: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return Flops(forward, forward + backward)


def _to_meta(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)


def _has_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _first_name(model: nn.Module, module: nn.Module) -> str:
    weight: Any = module.weight
    return next(n for n, p in model.named_parameters() if p is weight)


def check_layers(model: nn.Module) -> None:
    """Refuse a model with parameters in layers that have no closed form.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and not (_has_product(module) or isinstance(module, COSTLESS)):
            raise ConfigError(f"layer {name!r} ({type(module).__name__}) has no closed form: use `measured` accounting")
