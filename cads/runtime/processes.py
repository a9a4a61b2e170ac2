"""Several processes: each runs the same program and takes the same decisions; only work is divided among them.

Code that divides work calls `active_group()`. With one process, every method of the group is a plain call.
Processes exchange JSON and the bytes of tensors: nothing that one sends can run in another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from cads.errors import CadsError, ConfigError
from cads.runtime.checkpoint import State
from cads.runtime.timeout import TIMEOUT_VARIABLE, timeout

log = logging.getLogger(__name__)

SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, accelerate, MPI) say how many processes there are."""
RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which launchers tell a process its rank, and the address at which the processes meet."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
"""Variables of launchers that ask for the weights of a model to be divided, and the names of these methods."""
BUCKET = 2**25
"""Least bytes of gradients in one all-reduce."""
SHARED = "shared"
"""Attribute that marks an error which every process raises."""


T = TypeVar("T")


class ProcessError(CadsError):
    """The other processes cannot be reached, or do not do the same."""


class RemoteError(CadsError):
    """Something other than a `CadsError` went wrong in another process."""


class ProcessGroup:
    """The processes that work together; this class itself is one process that works alone.

    Attributes:
        rank: of this process, from 0. size: number of processes.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes."""
        return list(numbers)

    def all_reduce_sum(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of arrays (float64, of one shape) over all processes, the same bits in each."""
        return numbers

    def add_gradients(self, parameters: Sequence[nn.Parameter], present: np.ndarray) -> None:
        """Replace gradients by their sums over all processes.

        Args:
            present: which parameters have a gradient in some process, bool, one a parameter; the others get none.
        """

    def gather(self, compute: Callable[[], State]) -> list[State]:
        """What each process computes by itself, in order of rank; on the CPU.

        Raises:
            CadsError: in all processes, what one of them raised; the first if several did.
        """
        return [compute()]

    def locally(self, compute: Callable[[], T]) -> T:
        """What this process computes by itself. Raises, in all processes, what one of them raised."""
        return compute()

    def broadcast(self, compute: Callable[[], State]) -> State:
        """What the first process computes, alone, in all processes. Raises in all of them what it raised."""
        return compute()

    def on_rank_zero(self, compute: Callable[[], Any]) -> Any:
        """As `broadcast`, for a JSON value: for work on files that all processes depend on."""
        return compute()

    def check_identical(self, label: str, value: Any) -> None:
        """Refuse processes that do not have the same `value`.

        Args:
            label: of the value, for the message. value: JSON.

        Raises:
            ProcessError: in all of them.
        """


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """Several processes that reach each other through `torch.distributed`.

    Args:
        state: of accelerate, which knows how they were launched. seconds: how long a process waits for the others.
    """

    def __init__(self, state: PartialState, seconds: float) -> None:
        self.rank, self.size = int(state.process_index), int(state.num_processes)
        self._device = torch.device("cpu") if state.backend in ("gloo", "mpi") else torch.device(state.device)
        self._seconds = seconds

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        x = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        with self._peer_errors():
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return [int(n) for n in x.tolist()]

    def all_reduce_sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `ProcessGroup`."""
        x = torch.from_numpy(numbers.astype(np.float64)).to(self._device)
        with self._peer_errors():
            dist.all_reduce(x)
        return np.asarray(x.cpu().numpy())

    def add_gradients(self, parameters: Sequence[nn.Parameter], present: np.ndarray) -> None:
        """See `ProcessGroup`."""
        bucket: list[Tensor] = []
        for parameter, has_gradient in zip(parameters, present, strict=True):
            if not has_gradient:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (bucket[0].dtype != parameter.grad.dtype or sum(x.nbytes for x in bucket) >= BUCKET):
                self._all_reduce_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._all_reduce_bucket(bucket)

    def gather(self, compute: Callable[[], State]) -> list[State]:
        """See `ProcessGroup`."""
        state, failure, encoded = _attempt(compute)
        headers = [json.loads(text) for text in self._gather_bytes(encoded)]
        self._raise_first([header["error"] for header in headers], failure)
        return [self._broadcast_state(header, state, rank) for rank, header in enumerate(headers)]

    def locally(self, compute: Callable[[], T]) -> T:
        """See `ProcessGroup`."""
        results: list[T] = []

        def run() -> State:
            results.append(compute())
            return State()

        self.gather(run)
        return results[0]

    def broadcast(self, compute: Callable[[], State]) -> State:
        """See `ProcessGroup`."""
        state, failure, encoded = _attempt(compute) if self.first else (State(), None, b"")
        size = torch.tensor([len(encoded)], dtype=torch.int64, device=self._device)
        with self._peer_errors():
            dist.broadcast(size, 0)
        text = _as_bytes(encoded) if self.first else torch.empty(int(size), dtype=torch.uint8)
        header = json.loads(bytes(self._broadcast_bytes(text, 0).numpy()))
        self._raise_first([header["error"]], failure)
        return self._broadcast_state(header, state, 0)

    def on_rank_zero(self, compute: Callable[[], Any]) -> Any:
        """See `ProcessGroup`."""
        return self.broadcast(lambda: State({"value": compute()})).values["value"]

    def check_identical(self, label: str, value: Any) -> None:
        """See `ProcessGroup`."""
        number = digest(value)
        maximum, negated_minimum = self.all_reduce_max([number, -number])
        if maximum != -negated_minimum:
            text = f"{label} differs between processes: give all of them the same command, files and versions"
            raise _mark_shared(ProcessError(text))

    def _all_reduce_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([x.flatten() for x in bucket])
        total = flat.to(self._device)
        with self._peer_errors():
            dist.all_reduce(total)
        pieces = total.split([x.numel() for x in bucket])
        for x, piece in zip(bucket, pieces, strict=True):
            x.copy_(piece.view_as(x))

    def _gather_bytes(self, text: bytes) -> list[bytes]:
        """The `text` of each process, in order of rank."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        with self._peer_errors():
            dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=self._device))
        lengths = [int(n) for n in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: len(text)] = _as_bytes(text).to(self._device)
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._peer_errors():
            dist.all_gather(texts, padded)
        return [bytes(x[:n].cpu().numpy()) for x, n in zip(texts, lengths, strict=True)]

    def _broadcast_state(self, header: dict[str, Any], state: State, rank: int) -> State:
        """The state of the process `rank`, which `header` describes; `state` is that of this process."""
        tensors = {}
        for name, kind, shape in header["tensors"]:
            dtype = getattr(torch, kind)
            x = state.tensors[name].detach().cpu() if rank == self.rank else torch.empty(shape, dtype=dtype)
            if x.numel():
                x = self._broadcast_bytes(x.contiguous().flatten().view(torch.uint8), rank).view(dtype)
            tensors[name] = x.view(shape)
        return State(header["values"], tensors)

    def _broadcast_bytes(self, x: Tensor, rank: int) -> Tensor:
        """`x` (uint8) of the process `rank`, on the CPU."""
        on_device = x.to(self._device)
        with self._peer_errors():
            dist.broadcast(on_device, rank)
        return on_device.cpu()

    def _raise_first(self, errors: list[dict[str, Any] | None], failure: Exception | None) -> None:
        """Raise the error of the lowest rank that has one; `failure` is that of this process."""
        for rank, error in enumerate(errors):
            if error is not None:
                raise _mark_shared(
                    failure if rank == self.rank and failure is not None else _rebuild_error(error, rank)
                ) from None

    @contextmanager
    def _peer_errors(self) -> Iterator[None]:
        """Turn an error of the communication into a `ProcessError`: another process has failed."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} has lost the others: one has ended, as it says itself, or has not "
                f"answered for {self._seconds:g} s ({TIMEOUT_VARIABLE}): {str(error).splitlines()[0]}"
            ) from error


@contextmanager
def local_scope() -> Iterator[None]:
    """Within the block this process works by itself: `active_group()` is this process alone."""
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)


def active_group() -> ProcessGroup:
    """The processes that work together here.

    Raises:
        ConfigError: if they were launched in a way that is not supported.
    """
    return SINGLE_PROCESS if _LOCAL.get() else world_group()


@cache
def world_group() -> ProcessGroup:
    """All processes that were launched, also within `local_scope`."""
    size = max((int(os.environ[name]) for name in SIZE_VARIABLES if os.environ.get(name, "").isdigit()), default=1)
    for name, kind in SHARDED.items():
        if is_set(name):
            raise ConfigError(
                f"{kind} of the launcher is not supported: take it out of the launch (torchrun, or accelerate launch "
                "--multi_gpu), and set train: {sharding: full}, by which cads itself divides parameters, gradients and "
                "optimizer state by FSDP2, as DeepSpeed ZeRO-3 does"
            )
    if size == 1 and "MASTER_ADDR" in os.environ and is_set("ACCELERATE_USE_CPU"):
        log.warning(
            "`accelerate launch --cpu` has started one process, whatever --num_processes says: for several on CPUs "
            "leave out --cpu and use `accelerate launch --multi_gpu --num_processes N -m cads ...`"
        )
    if size == 1:
        return SINGLE_PROCESS
    seconds = timeout()
    cpu = is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        variables = ", ".join(f"{name}={os.environ.get(name, '')}" for name in RENDEZVOUS_VARIABLES)
        raise ProcessError(
            f"this process does not find the {size - 1} others within {seconds:g} s ({variables}): start all of them "
            f"by one launcher, or unset these variables to run alone: {str(error).splitlines()[0]}"
        ) from error
    return TorchProcessGroup(state, seconds) if state.num_processes > 1 else SINGLE_PROCESS


def close() -> None:
    """Leave the process group at the end of a program that succeeded."""
    if world_group().size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def is_shared(error: BaseException) -> bool:
    """Whether every process has raised this error."""
    return bool(vars(error).get(SHARED, False))


def digest(value: Any) -> int:
    """A number of 60 bits for a JSON value."""
    return int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:15], 16)


def is_set(name: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _attempt(compute: Callable[[], State]) -> tuple[State, Exception | None, bytes]:
    """Compute in `local_scope`; returns the state, the error if there was one, and the encoded header of both.

    Raises:
        ProcessError: if the other processes were lost meanwhile: the error cannot reach them.
    """
    try:
        with local_scope():
            state = compute()
        return state, None, _header(state, None)
    except ProcessError:
        raise
    except Exception as error:
        # The others wait for the header, whatever the error is; `_raise_first` raises it in all processes.
        return State(), error, _header(State(), error)


def _header(state: State, failure: Exception | None) -> bytes:
    tensors = [[n, str(x.dtype).removeprefix("torch."), list(x.shape)] for n, x in state.tensors.items()]
    error = None if failure is None else _describe_error(failure)
    return json.dumps({"error": error, "values": state.values, "tensors": tensors}).encode()


def _as_bytes(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _describe_error(error: Exception) -> dict[str, Any]:
    fields = {n: x for n, x in vars(error).items() if n != SHARED} if isinstance(error, CadsError) else {}
    return {"type": type(error).__name__, "message": str(error), "fields": json.loads(json.dumps(fields, default=str))}


def _rebuild_error(description: dict[str, Any], rank: int) -> CadsError:
    """The error of the process `rank`, of its own class, so that all processes handle it in the same way."""
    kinds = {kind.__name__: kind for kind in _classes(CadsError)}
    if description["type"] not in kinds:
        return RemoteError(f"process {rank}: {description['type']}: {description['message']}")
    kind = kinds[description["type"]]
    error = kind.__new__(kind, description["message"])
    CadsError.__init__(error, description["message"])
    vars(error).update(description["fields"])
    return error


def _classes(root: type[CadsError]) -> Iterator[type[CadsError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _classes(kind)


def _mark_shared(error: Exception) -> Exception:
    vars(error)[SHARED] = True
    return error


_LOCAL: ContextVar[bool] = ContextVar("local", default=False)
"""Whether this process works by itself at the moment."""
