"""Gradients of single examples, in batches: hooks meet each layer's inputs with the gradient of its outputs.

One backward pass serves the whole batch. Each layer's gradients are handed out as soon as its output's gradient is
known, for a chunk of examples at a time, and forgotten. Those of a parameter that is used more than once have to be
added up first, for all examples of a pass: batches are cut so that there are not too many.
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

log = logging.getLogger(__name__)

CHUNK_VALUES = 2**20
"""Most entries of gradients of one layer that are held at once, or one example's: 4 MB as float32, which stays in the
cache of a core while it is preconditioned and projected (7 ns an entry; with 64 MB 12.5)."""
SHARED_VALUES = 2**27
"""Most entries of gradients of the parameters that layers share, which are held for all examples of a pass at once, or
one example's: 512 MB as float32."""
CHECK_TOLERANCE = 1e-3, 1e-5
"""How far the gradients of a parameter may be from autograd's in `PerExample.check`: relative to its norm, and to that
of the whole gradient."""

Receive = Callable[[str, int, Tensor], None]
"""(name of the parameter, first example, gradients (b, entries)): takes the gradients of b examples of the batch."""

Context = Callable[[], AbstractContextManager[None]]
"""Makes the context of one forward and backward pass."""


class PerExample:
    """Gradients of the loss of each example, in evaluation mode, so that examples do not touch each other.

    Layers without a rule (`baselines.kernels.layer_rules`), layers that mix examples, and parameters used outside
    their layers
    make it fall back to one example at a time, by autograd; that is said once.

    Args:
        task: whose losses are differentiated.
        model: put into evaluation mode.
        names: of the parameters; None for all that are trainable.
        precision: of forward and backward pass; gradients are reduced in float32 at least.

    Attributes:
        sizes: entries of each parameter, by name.
        batched: whether gradients come in batches.

    Raises:
        ConfigError: if there is no parameter.
    """

    def __init__(
        self, task: Task, model: nn.Module, names: Sequence[str] | None = None, precision: Precision = "no"
    ) -> None:
        self.model = model.eval()
        self._losses = task.losses
        self._passes = Passes(model, precision)
        # In float32 the check sees what passes replace, and falls back to autograd without it. In bfloat16 rounding
        # alone would fail it.
        exact = precision == "no"
        self._checked: Context = self._passes if exact else nullcontext
        self._single: Context = nullcontext if exact else self._passes
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = trainable if names is None else {n: trainable[n] for n in names}
        if not self.parameters:
            raise ConfigError(f"the model of {task.name} has no trainable parameter to take gradients of")
        self.sizes = {name: p.numel() for name, p in self.parameters.items()}
        self._layers = _layers(model, self.parameters)
        owners = Counter(name for layer in self._layers.values() for name in layer.names.values())
        shared = sum(self.sizes[name] for name, count in owners.items() if count > 1)
        self._most = max(1, SHARED_VALUES // shared) if shared else None
        self.batched = True
        without = [name for name, layer in self._layers.items() if layer.rule is None]
        if without:
            kind = type(model.get_submodule(without[0])).__name__
            self._fall_back(f"there is no rule for {without[:3]} ({kind})")

    def each(self, batch: Batch, receive: Receive) -> None:
        """Hand out the gradient of every parameter for every example of `batch`.

        Args:
            batch: B examples, on the model's device.
            receive: called once for each parameter and chunk of examples; the tensor is its own to change.
        """
        if self.batched:
            size = self._most or len(batch)
            try:
                for start in range(0, len(batch), size):
                    with self._passes():
                        self._in_batches(rows_of(batch, start, start + size), partial(_shifted, receive, start))
                return
            except _Mixed as reason:
                raise ConfigError(
                    f"{reason}: per-example gradients of this model cannot be taken in batches of {len(batch)}, though "
                    "two examples worked; use batch_size = 1"
                ) from None
        for i in range(len(batch)):
            with self._single():
                self._alone(rows_of(batch, i, i + 1), partial(_shifted, receive, i))

    def check(self, batch: Batch) -> int:
        """Compare the first of two examples with autograd on it alone, in float32, and fall back where they differ.

        Returns:
            how many usages that took.
        """
        if not self.batched:
            return 0
        two = rows_of(batch, 0, min(2, len(batch)))
        exact: dict[str, Tensor] = {}
        self._alone(rows_of(batch, 0, 1), lambda name, _, g: exact.__setitem__(name, g[0]))
        found: dict[str, Tensor] = {}

        def first(name: str, start: int, g: Tensor) -> None:
            if start == 0:
                found[name] = g[0].clone()

        try:
            with self._checked():
                self._in_batches(two, first)
        except _Mixed as reason:
            self._fall_back(str(reason))
            return 1 + len(two)
        whole = float(torch.stack([x.norm() for x in exact.values()]).norm())
        relative, absolute = CHECK_TOLERANCE
        wrong = [
            name
            for name, x in exact.items()
            if not float((found[name] - x).norm()) <= relative * float(x.norm()) + absolute * whole
        ]
        if wrong and torch.isfinite(torch.tensor(whole)):
            self._fall_back(f"the layers of {wrong[:3]} do more than their rules know")
        return 1 + len(two)

    def _fall_back(self, reason: str) -> None:
        self.batched = False
        log.warning("%s: gradients are taken one example at a time, which is slow", reason)

    def _alone(self, batch: Batch, receive: Receive) -> None:
        """The gradients of one example by autograd."""
        with torch.enable_grad():
            loss = self._losses(self.model, batch).sum()
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for (name, parameter), g in zip(self.parameters.items(), found, strict=True):
            whole = torch.zeros_like(parameter) if g is None else g
            # Parameters that are added to each other are given one and the same tensor by autograd.
            receive(name, 0, _widened(whole).reshape(1, -1).clone())

    def _in_batches(self, batch: Batch, receive: Receive) -> None:
        """One forward and backward pass for all of them.

        Raises:
            _Mixed: if a layer's first dimension is not the examples.
        """
        backward = _Backward(len(batch), receive, self.sizes)
        with torch.enable_grad(), self._hooks(backward):
            losses = self._losses(self.model, batch)
            # Only what leads to a tap is differentiated: no ordinary gradient of a weight is computed.
            with torch.autocast(losses.device.type, enabled=False):
                torch.autograd.grad(losses.sum(), backward.anchor, allow_unused=True)
        backward.finish({name: p.device for name, p in self.parameters.items()})

    @contextmanager
    def _hooks(self, backward: _Backward) -> Iterator[None]:
        handles = []
        try:
            for name, layer in self._layers.items():
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(partial(backward.meet, name, layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Mixed(Exception):
    """A layer whose inputs cannot be told apart by example."""


class _Layer:
    """A layer with parameters of its own: their names in the layer and in the model, and its rule."""

    def __init__(self, rule: Rule | None, names: dict[str, str]) -> None:
        self.rule, self.names = rule, names


def _layers(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, _Layer]:
    """The layers that own `parameters`, by name; a parameter that several share has one name."""
    names = {id(p): name for name, p in parameters.items()}
    found = {}
    for path, module in model.named_modules():
        own = {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in names}
        if own:
            found[path] = _Layer(rule_of(module), own)
    return found


class _Backward:
    """One backward pass: what each layer has read, and which parameters are still owed a gradient.

    Attributes:
        anchor: a number that every tap depends on; differentiating by it visits all taps.
    """

    def __init__(self, n: int, receive: Receive, sizes: dict[str, int]) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._n, self._receive, self._sizes = n, receive, sizes
        self._uses: Counter[str] = Counter()
        self._shared: dict[str, Tensor] = {}
        self._given: set[str] = set()

    def meet(self, path: str, layer: _Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """The forward hook: keeps the inputs, and taps the output."""
        if len(args) != 1 or not isinstance(output, Tensor):
            raise _Mixed(f"{path!r} is called with {len(args)} inputs")
        a: Tensor = args[0].detach()
        if isinstance(module, nn.Embedding) and len(a) == len(output) == 1:
            # A table of positions is read once for all examples: each gets its own copy of what it says.
            a, output = a.expand(self._n, *a.shape[1:]), output.expand(self._n, *output.shape[1:]).clone()
        if a.dim() < 1 + (not isinstance(module, nn.Embedding)) or len(a) != self._n or len(output) != self._n:
            raise _Mixed(f"{path!r} reads {tuple(a.shape)} and writes {tuple(output.shape)} for {self._n} examples")
        self._uses.update(layer.names.values())

        def receive(g: Tensor) -> None:
            self._reduce(layer, module, a, g)

        tapped: Tensor = _Tap.apply(output, self.anchor, receive)
        return tapped

    def _reduce(self, layer: _Layer, module: nn.Module, a: Tensor, g: Tensor) -> None:
        assert layer.rule is not None
        entries = sum(self._sizes[name] for name in layer.names.values())
        size = max(1, CHUNK_VALUES // entries)
        for start in range(0, self._n, size):
            part = slice(start, start + size)
            found = layer.rule(module, _widened(a[part]), _widened(g[part]))
            for local, name in layer.names.items():
                self._give(name, start, found[local].flatten(1))
        for name in layer.names.values():
            self._uses[name] -= 1
            if not self._uses[name] and name in self._shared:
                self._receive(name, 0, self._shared.pop(name))

    def _give(self, name: str, start: int, gradient: Tensor) -> None:
        """Hand out, or add up where the parameter is used more than once."""
        if self._uses[name] > 1 and name not in self._shared:
            self._shared[name] = gradient.new_zeros(self._n, self._sizes[name])
        self._given.add(name)
        if name in self._shared:
            self._shared[name][start : start + len(gradient)] += gradient
        else:
            self._receive(name, start, gradient)

    def finish(self, devices: dict[str, torch.device]) -> None:
        """Hand out what is left: shared parameters of which a use met no gradient, and zeros for the unused."""
        for name, gradient in self._shared.items():
            self._receive(name, 0, gradient)
        for name in self._sizes:
            if name not in self._given:
                size = max(1, CHUNK_VALUES // self._sizes[name])
                for start in range(0, self._n, size):
                    rows = min(size, self._n - start)
                    self._receive(name, start, torch.zeros(rows, self._sizes[name], device=devices[name]))


class _Tap(torch.autograd.Function):
    """The identity, which shows the gradient that passes through it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        # Marked as changed, so that a later layer may change it in place; nothing is copied.
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
    """Names of the trainable parameters of the last layer that has any, as `model.named_parameters` has them.

    Raises:
        ConfigError: if no layer has.
    """
    # A layer that shares its weights with an earlier one has them under that one's name.
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[str] = []
    for module in model.modules():
        own = [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
        found = own or found
    if not found:
        raise ConfigError("the model has no trainable parameter to take gradients of")
    return found


def only_last_layer(task: Task) -> Task:
    """`task` with a model of which the last layer alone is trained: a usage goes back to that layer and no further.

    It is there to be accounted for; its weights are those of `task.costs.model`, not copies of them.

    Raises:
        ConfigError: if the model has no trainable parameter.
    """
    model = task.costs.model
    names = set(last_layer(model))
    kept: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if p.requires_grad and n not in names else p
        for n, p in model.named_parameters()
    }
    narrowed = copy.deepcopy(model, kept)
    found = copy.copy(task)
    found.__dict__.pop("costs", None)
    found.__dict__["model"] = lambda seed: narrowed
    return found


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _shifted(receive: Receive, by: int, name: str, start: int, gradient: Tensor) -> None:
    receive(name, start + by, gradient)
