"""Sharded training: several processes divide the parameters, gradients and optimizer state of one model.

It uses PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277): each process holds a
shard of every tensor, gathers a layer while it computes with it, and reduce-scatters the gradients.
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
"""Backend of the collectives by kind of device: others lack them, or end the process (gloo on GPUs)."""
NO_SHARDS = "train it with sharding = 'none'"


class FsdpLearner(SingleLearner):
    """One model, sharded over several processes; all of them must call the same methods in the same order.

    The trainable weights of `model` are freed; `trained` restores them.

    Args:
        task: gives the losses. model: whole, on any device. device: where it trains.

    Raises:
        ConfigError: if the model cannot be sharded; then it is unchanged.
    """

    is_collective = True

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        blocks = _blocks(model)
        _check_weights(model, blocks)
        super().__init__(task, _without_weights(model))
        self._original = (model,)
        self._train_device = device
        self._with_gradient: set[str] = set()
        mesh = _mesh(device.type, active_group().size)
        layers = [self.get_submodule(f"model.{name}") for name in blocks]
        try:
            for module in (*layers, self):
                fully_shard(module, mesh=mesh)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            # torch raises any of these for a model that it cannot shard.
            raise ConfigError(f"the model of {task.name} cannot be divided ({error}): {NO_SHARDS}") from error
        for module in self._sharded_modules():
            # Losses are already divided by the number of examples of the whole batch: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # The examples of another process may use other weights; `has_grad` tells which have a gradient.
            module.set_reduce_scatter_unused_params(True, recurse=False)
        self._register_gradient_hooks()
        self._load_shards()

    def forward(self, batch: Batch) -> Tensor:
        """Losses of the batch, shape (1, B)."""
        # FSDP puts a hook on the losses, which a view could lose.
        return super().forward(batch).clone()

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by the global norm, over the shards in all processes."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm.detach()[None]

    def has_grad(self) -> np.ndarray:
        """Which trainable parameters have got a gradient in this process since the last call."""
        present = np.array([name in self._with_gradient for name, p in self.named_parameters() if p.requires_grad])
        self._with_gradient.clear()
        return present

    def trained(self) -> list[nn.Module]:
        """The model given at the start, whole in every process, with the current weights."""
        (model,) = self._original
        with torch.no_grad():
            for shard, weights in zip(self.model.parameters(), model.parameters(), strict=True):
                if shard.requires_grad:
                    weights.data = _full_tensor(shard)
            for buffer, original in zip(self.model.buffers(), model.buffers(), strict=True):
                original.copy_(buffer)
        return [model.to(self._train_device).train(self.training)]

    def gather(self, tensors: Iterable[tuple[str, Tensor]], *, everywhere: bool) -> dict[str, Tensor]:
        """See `Learner`; each tensor is gathered on the device, then moved to the CPU before the next one."""
        gathered = {}
        for name, x in tensors:
            full = _full_tensor(x) if isinstance(x, DTensor) else x
            if everywhere or active_group().first:
                gathered[name] = full.cpu()
        return gathered

    def shard(self, x: Tensor, like: Tensor) -> Tensor:
        """See `Learner`."""
        if not isinstance(like, DTensor) or not x.dim():
            return x.to(like.device)
        return distribute_tensor(x.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def _load_shards(self) -> None:
        """Copy this process's shards of the weights, and free the original's trainable weights."""
        (model,) = self._original
        # One tensor at a time goes to the device.
        model.cpu()
        self.to_empty(device=self._train_device)
        with torch.no_grad():
            for shard, weights in zip(self.model.parameters(), model.parameters(), strict=True):
                shard.copy_(self.shard(weights, shard))
                if shard.requires_grad:
                    # Frozen weights may be shared with other models: they are not freed.
                    weights.data = weights.new_empty(0)
            for buffer, original in zip(self.model.buffers(), model.buffers(), strict=True):
                buffer.copy_(original)

    def _sharded_modules(self) -> Iterator[Any]:
        return (module for module in self.modules() if isinstance(module, FSDPModule))

    def _register_gradient_hooks(self) -> None:
        """Note which gathered parameters get a gradient: a shard of it does not tell a zero gradient from none."""
        names = {module: name for name, module in self.named_modules()}
        for module in self._sharded_modules():
            handles: list[Any] = []

            def register_hooks(module: nn.Module, _: Any, handles: list[Any] = handles) -> None:
                for name, parameter in module.named_parameters(prefix=names[module]):
                    if parameter.requires_grad and not isinstance(parameter, DTensor):
                        parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, name))
                # FSDP gathers into the same parameters each time.
                handles.pop().remove()

            handles.append(module.register_forward_pre_hook(register_hooks))

    def _note_gradient(self, name: str, _: Tensor) -> None:
        self._with_gradient.add(name)


def check_backend(device: torch.device) -> None:
    """Refuse a backend of the processes that cannot shard weights.

    Raises:
        ConfigError: naming the backends that can.
    """
    backend = str(dist.get_backend_config())
    if f"{device.type}:{BACKENDS.get(device.type)}" not in backend:
        raise ConfigError(
            f"sharding = 'full' does not run on {device.type} with {backend}: it needs gloo on CPUs or NCCL on GPUs; "
            "launch so, or set sharding = 'none'"
        )


def divided(task: Task, train_state: TrainState, device: torch.device, train: Callable[[], State]) -> State:
    """Call `train`, which takes steps of `train_state`, while its one model is sharded over all processes.

    A layer is gathered in the type of its weights, not in that of autocast, so that bf16 computes as in one process.
    Its cast copies are kept for the backward pass, unless layers are recomputed in it (gradient checkpointing).

    Raises:
        ConfigError: if the model cannot be sharded.
        BudgetError: as `train` does if it takes no step; the model is unchanged. After other errors it has no weights.
        ProcessError: if another process is gone.
    """
    single = train_state.learner
    (model,) = single.trained()
    with _peer_errors():
        sharded = FsdpLearner(task, model, device)
        train_state.use(sharded)
        try:
            state = train()
        except BudgetError:
            sharded.trained()
            raise
        sharded.trained()
    train_state.use(single)
    del sharded
    # Layers with FSDP's hooks refer to each other: without a collection now, their memory would stay allocated.
    gc.collect()
    return state


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn an error of the communication into a `ProcessError`: another process has failed."""
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


def _full_tensor(x: Tensor) -> Tensor:
    sharded: Any = x.detach()
    full: Tensor = sharded.full_tensor()
    return full


def _blocks(model: nn.Module) -> list[str]:
    """The names of the layers that are gathered one at a time: those of the outermost lists of equal modules."""
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{block}." for block in names)):
            continue
        layer_types = {type(layer) for layer in module}
        if len(module) > 1 and len(layer_types) == 1 and not layer_types & {nn.ModuleList, nn.ModuleDict}:
            names += [f"{name}.{i}" if name else str(i) for i, _ in enumerate(module)]
    return names


def _check_weights(model: nn.Module, blocks: list[str]) -> None:
    """Refuse weights that cannot be sharded, or that layers share.

    Raises:
        ConfigError: naming the weights.
    """
    owners: dict[int, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        if owners.setdefault(id(parameter), block) != block:
            raise ConfigError(f"the weights {name} belong to several layers, which sharding takes apart: {NO_SHARDS}")
        if not parameter.dim():
            raise ConfigError(f"the weights {name} are a single number, which cannot be divided: {NO_SHARDS}")
        if parameter.requires_grad and dtypes.setdefault(block, parameter.dtype) != parameter.dtype:
            raise ConfigError(
                f"the weights {name} are {parameter.dtype}, others of their layer {dtypes[block]}: sharding adds up "
                f"gradients of one type; give the model one dtype, or {NO_SHARDS}"
            )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with its buffers; parameters have no memory, and are shared between layers as in `model`."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@cache
def _mesh(device: str, size: int) -> DeviceMesh:
    return init_device_mesh(device, (size,))
