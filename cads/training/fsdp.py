"""Training that does not fit into one process: several divide parameters, gradients and optimizer state of a model.

It is PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277): each process holds a
part of every tensor, gathers a layer while it computes with it, and adds up the gradients part by part.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cads.data.batch import Batch
from cads.errors import BudgetError, ConfigError
from cads.runtime.checkpoint import State
from cads.runtime.processes import ProcessError, active_group
from cads.task import Task
from cads.training.learners import SingleLearner
from cads.training.run_state import TrainState

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What gathers and adds up, by kind of device: others cannot, or end the process (gloo on GPUs)."""
NO_SHARDS = "train it with sharding = 'none'"


class FsdpLearner(SingleLearner):
    """One model while several processes hold a part of it each; all call all of its methods alike.

    The weights of the model it is given are freed if they are trained; `trained` gives them back.

    Args:
        task: gives the losses. model: whole, on any device. device: where it trains.

    Raises:
        ConfigError: if the model cannot be divided; then it is as it was.
    """

    together = True

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        blocks = _blocks(model)
        _check_weights(model, blocks)
        super().__init__(task, _without_weights(model))
        self._whole = (model,)
        self._place = device
        self._touched: set[str] = set()
        mesh = _mesh(device.type, active_group().size)
        layers = [self.get_submodule(f"model.{name}") for name in blocks]
        try:
            for module in (*layers, self):
                fully_shard(module, mesh=mesh)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            # What torch cannot divide it says in any of these ways.
            raise ConfigError(f"the model of {task.name} cannot be divided ({error}): {NO_SHARDS}") from error
        for module in self._divided():
            # Losses are divided by the number of examples of the whole batch: gradients add up to that of their mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # What another process learns from may use other weights; `touched` tells.
            module.set_reduce_scatter_unused_params(True, recurse=False)
        self._watch()
        self._fill()

    def forward(self, batch: Batch) -> Tensor:
        """Losses of the batch, shape (1, B)."""
        # FSDP puts a hook on them, which a view could lose.
        return super().forward(batch).clone()

    def clip(self, largest: float | None) -> np.ndarray:
        """Clip by the global norm, over the parts in all processes."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if largest is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), largest, norm)
        return np.array([norm.item()])

    def has_grad(self) -> np.ndarray:
        """Which trainable parameters this process has a gradient of, since it was last asked."""
        found = np.array([name in self._touched for name, p in self.named_parameters() if p.requires_grad])
        self._touched.clear()
        return found

    def trained(self) -> list[nn.Module]:
        """The model it was given, whole in every process, with the current weights."""
        (model,) = self._whole
        with torch.no_grad():
            for mine, weights in zip(self.model.parameters(), model.parameters(), strict=True):
                if mine.requires_grad:
                    weights.data = _gathered(mine)
            for buffer, whole in zip(self.model.buffers(), model.buffers(), strict=True):
                whole.copy_(buffer)
        return [model.to(self._place).train(self.training)]

    def gather(self, tensors: Iterable[tuple[str, Tensor]], *, everywhere: bool) -> dict[str, Tensor]:
        """See `Learner`; one at a time is gathered on the device, and kept on the CPU."""
        found = {}
        for name, x in tensors:
            whole = _gathered(x) if isinstance(x, DTensor) else x
            if everywhere or active_group().first:
                found[name] = whole.cpu()
        return found

    def shard(self, x: Tensor, like: Tensor) -> Tensor:
        """See `Learner`."""
        if not isinstance(like, DTensor) or not x.dim():
            return x.to(like.device)
        return distribute_tensor(x.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def _fill(self) -> None:
        """Take this process's part of the weights, and free those that will be trained."""
        (model,) = self._whole
        # One tensor at a time goes to the device.
        model.cpu()
        self.to_empty(device=self._place)
        with torch.no_grad():
            for mine, weights in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(self.shard(weights, mine))
                if mine.requires_grad:
                    # Frozen ones may be shared with other models.
                    weights.data = weights.new_empty(0)
            for buffer, whole in zip(self.model.buffers(), model.buffers(), strict=True):
                buffer.copy_(whole)

    def _divided(self) -> Iterator[Any]:
        return (module for module in self.modules() if isinstance(module, FSDPModule))

    def _watch(self) -> None:
        """Note which gathered parameters gradients come to: the part of a gradient tells no zero from none."""
        names = {module: name for name, module in self.named_modules()}
        for module in self._divided():
            handles: list[Any] = []

            def gathered(module: nn.Module, _: Any, handles: list[Any] = handles) -> None:
                for name, parameter in module.named_parameters(prefix=names[module]):
                    if parameter.requires_grad and not isinstance(parameter, DTensor):
                        parameter.register_post_accumulate_grad_hook(partial(self._touch, name))
                # FSDP gathers into the same parameters each time.
                handles.pop().remove()

            handles.append(module.register_forward_pre_hook(gathered))

    def _touch(self, name: str, _: Tensor) -> None:
        self._touched.add(name)


def check_backend(device: torch.device) -> None:
    """Refuse processes that cannot reach each other as divided weights need it.

    Raises:
        ConfigError: naming what does.
    """
    backend = str(dist.get_backend_config())
    if f"{device.type}:{BACKENDS.get(device.type)}" not in backend:
        raise ConfigError(
            f"sharding = 'full' does not run on {device.type} with {backend}: it needs gloo on CPUs or NCCL on GPUs; "
            "launch so, or set sharding = 'none'"
        )


def divided(task: Task, train_state: TrainState, device: torch.device, train: Callable[[], State]) -> State:
    """What `train` returns, which takes steps of `course` while its one model is divided over all processes.

    A layer is gathered in the type of its weights, whatever that of autocast, so that bf16 is that of one process; its
    cast copies are kept for the backward pass, unless layers are recomputed in it (gradient checkpointing).

    Raises:
        ConfigError: if the model cannot be divided.
        BudgetError: as `train` does if it takes no step; the model is as it was. After other errors it has no weights.
        ProcessError: if another process is gone.
    """
    single = train_state.learner
    (model,) = single.trained()
    with _reaching():
        train_state.learner = shards = FsdpLearner(task, model, device)
        try:
            state = train()
        except BudgetError:
            shards.trained()
            raise
        shards.trained()
    train_state.learner = single
    del shards
    # Layers that FSDP has hooked refer to each other: their memory would stay until some collection.
    gc.collect()
    return state


@contextmanager
def _reaching() -> Iterator[None]:
    """Say that it is another process which has failed, where a layer could not be gathered."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        world = active_group()
        raise ProcessError(
            f"process {world.rank} of {world.size} has lost the others, which hold parts of the model: one has ended, "
            f"as it says itself, or has not answered in time: {str(error).splitlines()[0]}"
        ) from error


def _gathered(x: Tensor) -> Tensor:
    parts: Any = x.detach()
    whole: Tensor = parts.full_tensor()
    return whole


def _blocks(model: nn.Module) -> list[str]:
    """The names of the layers that are gathered one at a time: those of the outermost lists of equal modules."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{block}." for block in found)):
            continue
        kinds = {type(layer) for layer in module}
        if len(module) > 1 and len(kinds) == 1 and not kinds & {nn.ModuleList, nn.ModuleDict}:
            found += [f"{name}.{i}" if name else str(i) for i, _ in enumerate(module)]
    return found


def _check_weights(model: nn.Module, blocks: list[str]) -> None:
    """Refuse what cannot be divided, or would come apart.

    Raises:
        ConfigError: naming the weights.
    """
    owners: dict[int, str] = {}
    kinds: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        if owners.setdefault(id(parameter), block) != block:
            raise ConfigError(f"the weights {name} belong to several layers, which sharding takes apart: {NO_SHARDS}")
        if not parameter.dim():
            raise ConfigError(f"the weights {name} are a single number, which cannot be divided: {NO_SHARDS}")
        if parameter.requires_grad and kinds.setdefault(block, parameter.dtype) != parameter.dtype:
            raise ConfigError(
                f"the weights {name} are {parameter.dtype}, others of their layer {kinds[block]}: sharding adds up "
                f"gradients of one type; give the model one dtype, or {NO_SHARDS}"
            )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of its modules and buffers; its parameters have no memory, and are shared as those of the model are."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@cache
def _mesh(device: str, size: int) -> DeviceMesh:
    return init_device_mesh(device, (size,))
