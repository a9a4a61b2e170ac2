"""A stand-in for a GPU: tensors stay on the CPU and are told to be on another device, which refuses what a GPU refuses.

The device of a tensor is that of its storage, so views, saved tensors and parameters with new data keep theirs. Two
modes of PyTorch do it: one for functions (`.to`, `.device`, `.numpy`, factories), one for kernels, which refuses those
that mix devices, and counts those that make the host wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
WAITING = {
    torch.ops.aten._local_scalar_dense.default: "item",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "masked_select",
    torch.ops.aten.equal.default: "equal",
    torch.ops.aten._unique2.default: "unique",
}
"""Kernels whose result has to be known on the host."""
CREATED_BY = (torch.tensor, torch.as_tensor, torch.asarray)
"""Factories that copy what they are given."""
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
"""Kernels that accept indices on the CPU."""


class PretendedDevice:
    """Which storages are on the pretended device, and what made the host wait.

    Attributes:
        device: the pretended one. waits: number of times by cause. pinned: tensors that were page-locked.
    """

    _storages: ClassVar[dict[int, StorageWeakRef]] = {}
    """Of all such devices: a tensor that outlives one is still there in the next."""

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)
        self.waits: Counter[str] = Counter()
        self.pinned = 0

    def holds(self, x: Tensor) -> bool:
        """Whether `x` is on the pretended device."""
        reference = self._storages.get(_storage(x)._cdata)
        return reference is not None and not reference.expired()

    def add(self, x: Tensor) -> Tensor:
        """Put the storage of `x` on the pretended device."""
        storage = _storage(x)
        if len(self._storages) > 4096:
            for key in [key for key, ref in self._storages.items() if ref.expired()]:
                del self._storages[key]
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return x

    def remove(self, x: Tensor) -> None:
        """Put the storage of `x` on the CPU."""
        self._storages.pop(_storage(x)._cdata, None)

    @property
    def allocated(self) -> int:
        """Bytes of all tensors on it that are alive."""
        alive = (ref for ref in self._storages.values() if not ref.expired())
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in alive)

    def device_of(self, x: Tensor) -> torch.device:
        """The device of `x`, as the user of a GPU would read it."""
        return self.device if self.holds(x) else CPU

    def tag(self, result: Any, held: bool) -> Any:
        """Put all tensors of a result on the pretended device or on the CPU."""
        for x in _tensors(result):
            (self.add if held else self.remove)(x)
        return result


class _Kernels(TorchDispatchMode):
    """Refuses kernels whose arguments are on two devices, and passes the device on to what they return."""

    def __init__(self, pretended: PretendedDevice) -> None:
        super().__init__()
        self._pretended = pretended

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        p, kwargs = self._pretended, kwargs or {}
        arguments = _tensors((args, kwargs))
        held = [x for x in arguments if p.holds(x)]
        if not held:
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return self._copy(func, args, kwargs)
        # A GPU takes single numbers from the host, and indices.
        allowed = args[1] if func in INDEXED and p.holds(args[0]) else ()
        free = {id(x) for x in _tensors(allowed)}
        strays = [x for x in arguments if not p.holds(x) and x.dim() and id(x) not in free]
        if strays:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {p.device} and cpu: "
                f"{func}, shapes {[tuple(x.shape) for x in strays]} on the CPU"
            )
        if func in INDEXED and any(x.dtype == torch.bool or not p.holds(x) for x in _tensors(allowed)):
            p.waits["index"] += 1
        if func in WAITING:
            p.waits[WAITING[func]] += 1
        return p.tag(func(*args, **kwargs), held=True)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        if self._pretended.holds(source) and not self._pretended.holds(target):
            self._pretended.waits["copy to the host"] += 1
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Moves tensors by their tags, and answers where they are."""

    def __init__(self, pretended: PretendedDevice) -> None:
        super().__init__()
        self._pretended = pretended
        t = torch.Tensor
        self._special: dict[Any, Callable[..., Any]] = {
            t.to: self._to,
            t.cpu: lambda x, *args, **kwargs: self._to(x, CPU),
            t.cuda: lambda x, *args, **kwargs: self._to(x, pretended.device),
            t.device.__get__: lambda x: x.device if x.device.type == "meta" else pretended.device_of(x),
            t.is_cuda.__get__: lambda x: x.device.type != "meta" and pretended.holds(x) and self._is_cuda,
            t.is_cpu.__get__: lambda x: x.device.type != "meta" and not pretended.holds(x),
            t.numpy: self._numpy,
            t.__array__: self._numpy,
            t.tolist: self._tolist,
            t.pin_memory: self._pin,
            t.__deepcopy__: self._deepcopy,
        }

    @property
    def _is_cuda(self) -> bool:
        return self._pretended.device.type == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._special:
            return self._special[func](*args, **kwargs)
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        held = torch.device(device).type == self._pretended.device.type
        result = func(*args, **{**kwargs, "device": CPU} if held else kwargs)
        if held and func in CREATED_BY:
            result = result.clone()
        return result if torch.device(device).type == "meta" else self._pretended.tag(result, held)

    def _to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        p = self._pretended
        if args and isinstance(args[0], Tensor):
            args = (args[0].device if args[0].device.type == "meta" else p.device_of(args[0]), args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if x.device.type == "meta" or (device is not None and device.type == "meta"):
            return x.to(*args, **kwargs)
        held = p.holds(x)
        goes = held if device is None else device.type == p.device.type
        if held == goes:
            return x.to(dtype or x.dtype, copy=copy)
        if held:
            p.waits["copy to the host"] += 1
        # Autograd follows the copy, as it does between devices.
        moved = x.clone() if dtype is None or dtype == x.dtype else x.to(dtype)
        p.tag(moved, goes)
        return moved

    def _numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._pretended.holds(x):
            raise TypeError(f"can't convert {self._pretended.device} device type tensor to numpy. Use Tensor.cpu()")
        return x.numpy(*args, **kwargs)

    def _tolist(self, x: Tensor) -> Any:
        if self._pretended.holds(x):
            self._pretended.waits["tolist"] += 1
        return x.tolist()

    def _pin(self, x: Tensor, *args: Any) -> Tensor:
        if self._pretended.holds(x):
            raise RuntimeError(f"cannot pin a tensor on {self._pretended.device}: only CPU memory can be pinned")
        self._pretended.pinned += 1
        return x.clone()

    def _deepcopy(self, x: Tensor, memo: dict[int, Any]) -> Any:
        held = x.device.type != "meta" and self._pretended.holds(x)
        copied = x.__deepcopy__(memo)
        return self._pretended.tag(copied, held) if held else copied


@contextmanager
def pretended_device(kind: str = "cuda") -> Iterator[PretendedDevice]:
    """Pretend that this machine has a GPU, on which accelerate trains, while the block runs."""
    pretended = PretendedDevice(kind)
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = pretended.device

    def grouped(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        # PyTorch groups in C++, which reads the real device.
        groups = _group_tensors_by_device_and_dtype(*args, **kwargs)
        held = {key: pretended.holds(next(x for x in group[0][0] if x is not None)) for key, group in groups.items()}
        return {(pretended.device if held[key] else key[0], key[1]): group for key, group in groups.items()}

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # PyTorch leaves the mode for a backward pass, and with it for the hooks in there.
        with _Functions(pretended):
            return _engine_run_backward(*args, **kwargs)

    def autocast(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        # The kernels are those of the CPU, and so is what is cast for them.
        autocast_init(self, "cpu" if device_type == kind else device_type, *args, **kwargs)

    autocast_init = torch.autocast.__init__
    grouping = "_group_tensors_by_device_and_dtype"
    try:
        with (
            patch.object(clip_grad, grouping, grouped),
            patch(f"torch.optim.optimizer.{grouping}", grouped),
            patch.object(torch.autocast, "__init__", autocast),
            patch.object(torch.accelerator, "synchronize", lambda *_: None),
            patch.object(torch.autograd, "_engine_run_backward", run_backward),
            _Functions(pretended),
            _Kernels(pretended),
        ):
            yield pretended
    finally:
        AcceleratorState._reset_state(True)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type != "meta"]


def _storage(x: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()
