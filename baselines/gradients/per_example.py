"""Per-example gradients, in batches: hooks combine each layer's inputs with the gradient of its outputs.

One backward pass serves the whole batch. Each layer's gradients are passed on as soon as the gradient of its output is
known, one chunk of examples at a time, and then freed. The gradients of a parameter that is used more than once have to
be summed first, for all examples of a pass. Batches are split so that these sums fit in memory.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from baselines.kernels.autocast import Passes, Precision
from baselines.kernels.layer_rules import Rule, rule_of
from cads.data.batch import Batch
from cads.errors import ConfigError
from cads.task import Task
from cads.training.device_settings import exact_products

log = logging.getLogger(__name__)

CHUNK_VALUES = 2**20
"""Maximum entries of one layer's gradients that are held at once, but at least one example's. The 4 MB in float32 stay
in a core's cache while they are preconditioned and projected: 7 ns per entry, and 12.5 with 64 MB."""
ACCELERATOR_CHUNK_VALUES = 2**26
"""The same on other devices, where a kernel for few entries takes as long to start as one for many. Not measured."""
SHARED_VALUES = 2**27
"""Maximum entries of the gradients of shared parameters, which are held for all examples of a pass at once, but at
least one example's: 512 MB in float32."""
CHECK_TOLERANCE = 1e-3, 1e-5
"""Tolerances of `PerExample.check` on the difference from autograd's gradient of a parameter: relative to the norm of
that gradient, and to the norm of the gradient of all parameters."""

Receive = Callable[[str, int, Tensor], None]
"""(name of the parameter, index of the first example, gradients (b, entries)): receives the gradients of b examples."""

Context = Callable[[], AbstractContextManager[None]]
"""Creates the context of one forward and backward pass."""


class PerExample:
    """Gradients of the loss of each example, in evaluation mode, so that examples do not affect each other.

    Layers without a rule (`baselines.kernels.layer_rules`), layers that mix examples, and parameters used outside
    their layers make it fall back to autograd, one example at a time. A warning says so once.

    Args:
        task: has the losses that are differentiated.
        model: put into evaluation mode.
        names: names of the parameters; None for all trainable ones.
        precision: of the forward and backward passes; gradients are reduced in float32 at least.

    Attributes:
        sizes: number of entries of each parameter, by name.
        batched: whether gradients are computed in batches, rather than by autograd.

    Raises:
        ConfigError: if there is no trainable parameter.
    """

    def __init__(
        self, task: Task, model: nn.Module, names: Sequence[str] | None = None, precision: Precision = "no"
    ) -> None:
        self.model = model.eval()
        self._losses = task.losses
        self._passes = Passes(model, precision)
        # In float32 the check covers the kernels of `Passes`, and the fallback to autograd does without them. In
        # bfloat16 rounding alone would fail the check.
        full_precision = precision == "no"
        self._check_context: Context = self._passes if full_precision else nullcontext
        self._autograd_context: Context = nullcontext if full_precision else self._passes
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = trainable if names is None else {n: trainable[n] for n in names}
        if not self.parameters:
            raise ConfigError(f"the model of {task.name} has no trainable parameter to take gradients of")
        self.sizes = {name: p.numel() for name, p in self.parameters.items()}
        self._layers = _layers(model, self.parameters)
        owners = Counter(name for layer in self._layers.values() for name in layer.names.values())
        shared = sum(self.sizes[name] for name, count in owners.items() if count > 1)
        self._max_pass_examples = max(1, SHARED_VALUES // shared) if shared else None
        self.batched = True
        without_rule = [name for name, layer in self._layers.items() if layer.rule is None]
        if without_rule:
            layer_type = type(model.get_submodule(without_rule[0])).__name__
            self._fall_back(f"there is no rule for {without_rule[:3]} ({layer_type})")

    def each(self, batch: Batch, receive: Receive) -> None:
        """Pass the gradient of every parameter for every example of `batch` to `receive`.

        Args:
            batch: B examples, on the model's device.
            receive: called once for each parameter and chunk of examples; may change the tensor in place.
        """
        if self.batched:
            size = self._max_pass_examples or len(batch)
            try:
                for start in range(0, len(batch), size):
                    with self._passes():
                        self._in_batches(rows_of(batch, start, start + size), partial(_shifted, receive, start))
                return
            except _ExamplesMixed as reason:
                raise ConfigError(
                    f"{reason}: per-example gradients of this model cannot be taken in batches of {len(batch)}, though "
                    "two examples worked; use batch_size = 1"
                ) from None
        for i in range(len(batch)):
            with self._autograd_context():
                self._by_autograd(rows_of(batch, i, i + 1), partial(_shifted, receive, i))

    def check(self, batch: Batch) -> int:
        """Compare the first example's gradients in a batch of two with autograd's, and fall back if they differ.

        Autograd computes them in float32, for that example alone. Products are not rounded to TF32 meanwhile.

        Returns:
            the number of usages that the check took.
        """
        if not self.batched:
            return 0
        with exact_products():
            return self._compared(batch)

    def _compared(self, batch: Batch) -> int:
        pair = rows_of(batch, 0, min(2, len(batch)))
        expected: dict[str, Tensor] = {}
        self._by_autograd(rows_of(batch, 0, 1), lambda name, _, g: expected.__setitem__(name, g[0]))
        actual: dict[str, Tensor] = {}

        def receive_first(name: str, start: int, g: Tensor) -> None:
            if start == 0:
                actual[name] = g[0].clone()

        try:
            with self._check_context():
                self._in_batches(pair, receive_first)
        except _ExamplesMixed as reason:
            self._fall_back(str(reason))
            return 1 + len(pair)
        total_norm = float(torch.stack([x.norm() for x in expected.values()]).norm())
        relative, absolute = CHECK_TOLERANCE
        mismatched = [
            name
            for name, x in expected.items()
            if not float((actual[name] - x).norm()) <= relative * float(x.norm()) + absolute * total_norm
        ]
        if mismatched and torch.isfinite(torch.tensor(total_norm)):
            self._fall_back(f"the layers of {mismatched[:3]} compute more than their rules cover")
        return 1 + len(pair)

    def _fall_back(self, reason: str) -> None:
        self.batched = False
        log.warning("%s: gradients are taken one example at a time, which is slow", reason)

    def _by_autograd(self, batch: Batch, receive: Receive) -> None:
        """The gradients of one example by autograd."""
        with torch.enable_grad():
            loss = self._losses(self.model, batch).sum()
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for (name, parameter), g in zip(self.parameters.items(), gradients, strict=True):
            gradient = torch.zeros_like(parameter) if g is None else g
            # Copied, because autograd returns the same tensor for parameters that are added to each other.
            receive(name, 0, _widened(gradient).reshape(1, -1).clone())

    def _in_batches(self, batch: Batch, receive: Receive) -> None:
        """The gradients of all examples by one forward and backward pass.

        Raises:
            _ExamplesMixed: if the first dimension of a layer's inputs is not the examples.
        """
        backward = _Backward(len(batch), receive, self.sizes)
        with torch.enable_grad(), self._hooks(backward):
            losses = self._losses(self.model, batch)
            # Only paths to a tap are differentiated: no summed gradient of a weight is computed.
            with torch.autocast(losses.device.type, enabled=False):
                torch.autograd.grad(losses.sum(), backward.anchor, allow_unused=True)
        backward.finish({name: p.device for name, p in self.parameters.items()})

    @contextmanager
    def _hooks(self, backward: _Backward) -> Iterator[None]:
        handles = []
        try:
            for name, layer in self._layers.items():
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(partial(backward.forward_hook, name, layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _ExamplesMixed(Exception):
    """The inputs of a layer cannot be separated by example."""


class _Layer:
    """A layer with parameters: its rule, and the names of its parameters, by layer-local name."""

    def __init__(self, rule: Rule | None, names: dict[str, str]) -> None:
        self.rule, self.names = rule, names


def _layers(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, _Layer]:
    """The layers that hold `parameters`, by name; a parameter shared by several layers has one name."""
    names = {id(p): name for name, p in parameters.items()}
    layers = {}
    for path, module in model.named_modules():
        local_names = {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in names}
        if local_names:
            layers[path] = _Layer(rule_of(module), local_names)
    return layers


class _Backward:
    """The state of one backward pass: pending uses of each parameter, partial sums and delivered gradients.

    Attributes:
        anchor: a scalar that every tap depends on; differentiating with respect to it visits all taps.
    """

    def __init__(self, n: int, receive: Receive, sizes: dict[str, int]) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._n, self._receive, self._sizes = n, receive, sizes
        self._pending_uses: Counter[str] = Counter()
        self._shared: dict[str, Tensor] = {}
        self._delivered: set[str] = set()

    def forward_hook(self, path: str, layer: _Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Store the inputs of a layer for the backward pass, and tap its output."""
        if len(args) != 1 or not isinstance(output, Tensor):
            raise _ExamplesMixed(f"{path!r} is called with {len(args)} inputs")
        a: Tensor = args[0].detach()
        if isinstance(module, nn.Embedding) and len(a) == len(output) == 1:
            # A position embedding is looked up once for all examples: each example gets its own copy of the output.
            a, output = a.expand(self._n, *a.shape[1:]), output.expand(self._n, *output.shape[1:]).clone()
        if a.dim() < 1 + (not isinstance(module, nn.Embedding)) or len(a) != self._n or len(output) != self._n:
            raise _ExamplesMixed(
                f"{path!r} reads {tuple(a.shape)} and writes {tuple(output.shape)} for {self._n} examples"
            )
        self._pending_uses.update(layer.names.values())

        def receive(g: Tensor) -> None:
            self._reduce(layer, module, a, g)

        tapped: Tensor = _Tap.apply(output, self.anchor, receive)
        return tapped

    def _reduce(self, layer: _Layer, module: nn.Module, a: Tensor, g: Tensor) -> None:
        assert layer.rule is not None
        entries = sum(self._sizes[name] for name in layer.names.values())
        size = max(1, (CHUNK_VALUES if g.device.type == "cpu" else ACCELERATOR_CHUNK_VALUES) // entries)
        for start in range(0, self._n, size):
            chunk = slice(start, start + size)
            gradients = layer.rule(module, _widened(a[chunk]), _widened(g[chunk]))
            for local, name in layer.names.items():
                self._deliver(name, start, gradients[local].flatten(1))
        for name in layer.names.values():
            self._pending_uses[name] -= 1
            if not self._pending_uses[name] and name in self._shared:
                self._receive(name, 0, self._shared.pop(name))

    def _deliver(self, name: str, start: int, gradient: Tensor) -> None:
        """Pass a gradient on, or sum it if the parameter is used more than once."""
        if self._pending_uses[name] > 1 and name not in self._shared:
            self._shared[name] = gradient.new_zeros(self._n, self._sizes[name])
        self._delivered.add(name)
        if name in self._shared:
            self._shared[name][start : start + len(gradient)] += gradient
        else:
            self._receive(name, start, gradient)

    def finish(self, devices: dict[str, torch.device]) -> None:
        """Deliver the sums of shared parameters with a use that met no gradient, and zeros for unused parameters."""
        for name, gradient in self._shared.items():
            self._receive(name, 0, gradient)
        for name in self._sizes:
            if name not in self._delivered:
                size = max(1, CHUNK_VALUES // self._sizes[name])
                for start in range(0, self._n, size):
                    rows = min(size, self._n - start)
                    self._receive(name, start, torch.zeros(rows, self._sizes[name], device=devices[name]))


class _Tap(torch.autograd.Function):
    """The identity; passes the gradient of its output to `receive` during the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        # Marked as changed in place, so that a later layer may change it too; nothing is copied.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.receive(gradient.detach())
        return gradient, torch.zeros(()), None


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Examples start .. stop-1 of a batch."""
    part = slice(start, stop)
    share = len(batch.positions[part]) / len(batch)
    return replace(
        batch.map(lambda x: x[part]),
        positions=batch.positions[part],
        tokens=round(batch.tokens * share),
        answer_tokens=round(batch.answer_tokens * share),
    )


def last_layer(model: nn.Module) -> list[str]:
    """Names of the trainable parameters of the last layer that has any, as in `model.named_parameters`.

    Raises:
        ConfigError: if no layer has any.
    """
    # Weights shared with an earlier layer are listed under the earlier layer's name.
    names = {id(p): name for name, p in model.named_parameters()}
    last: list[str] = []
    for module in model.modules():
        trainable = [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
        last = trainable or last
    if not last:
        raise ConfigError("the model has no trainable parameter to take gradients of")
    return last


def only_last_layer(task: Task) -> Task:
    """`task` with a model that trains only its last layer: the backward pass of a usage stops at that layer.

    It serves to count FLOPs only; it shares the weights of `task.costs.model`, without copying them.

    Raises:
        ConfigError: if the model has no trainable parameter.
    """
    model = task.costs.model
    names = set(last_layer(model))
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if p.requires_grad and n not in names else p
        for n, p in model.named_parameters()
    }
    last_layer_model = copy.deepcopy(model, memo)
    last_layer_task = copy.copy(task)
    last_layer_task.__dict__.pop("costs", None)
    last_layer_task.__dict__["model"] = lambda seed: last_layer_model
    return last_layer_task


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _shifted(receive: Receive, offset: int, name: str, start: int, gradient: Tensor) -> None:
    receive(name, start + offset, gradient)
