"""Several processes: each runs the same program and decides alike; only work is divided among them.

Whoever divides work asks `current()` for the processes at hand. With one process everything here is a plain call.
What processes tell each other is JSON and the bytes of tensors: nothing that one sends can run in another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
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

log = logging.getLogger(__name__)

TIMEOUT_VARIABLE, TIMEOUT = "CADS_PROCESS_TIMEOUT", 600.0
"""Seconds that a process waits for the others before it gives up: the variable, and what holds without it."""
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, accelerate, MPI) say how many processes there are."""
WHEREABOUTS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Where launchers say which of the processes this is, and where they meet."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
"""What launchers can be asked for that divides the weights of a model."""
BUCKET = 2**25
"""Bytes of gradients that are added up at once, at least."""
SHARED = "shared"
"""Attribute of an error that every process raises."""


T = TypeVar("T")


class ProcessError(CadsError):
    """The other processes cannot be reached, or do something else."""


class RemoteError(CadsError):
    """Something other than a `CadsError` went wrong in another process."""


class ProcessGroup:
    """One process, which does everything itself.

    Attributes:
        rank: number of this process, from 0. size: how many there are.
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
        """What each process computes by itself, in order of their numbers; on the CPU.

        Raises:
            CadsError: in all processes, what one of them raised; the first if several did.
        """
        return [compute()]

    def locally(self, compute: Callable[[], T]) -> T:
        """What this process computes by itself. Raises, in all processes, what one of them raised."""
        return compute()

    def broadcast(self, compute: Callable[[], State]) -> State:
        """What the first process computes, alone. Raises what it raised, in all processes."""
        return compute()

    def on_rank_zero(self, compute: Callable[[], Any]) -> Any:
        """As `from_first`, for a JSON value: for whatever reads or writes what all depend on."""
        return compute()

    def check_identical(self, what: str, value: Any) -> None:
        """Refuse processes that are not given the same.

        Args:
            value: JSON.

        Raises:
            ProcessError: in all of them.
        """


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """Several processes that reach each other through `torch.distributed`.

    Args:
        state: of accelerate, which knows how they were launched. seconds: how long one waits for the others.
    """

    def __init__(self, state: PartialState, seconds: float) -> None:
        self.rank, self.size = int(state.process_index), int(state.num_processes)
        self._device = torch.device("cpu") if state.backend in ("gloo", "mpi") else torch.device(state.device)
        self._seconds = seconds

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        x = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        with self._reaching():
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return [int(n) for n in x.tolist()]

    def all_reduce_sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `ProcessGroup`."""
        x = torch.from_numpy(numbers.astype(np.float64)).to(self._device)
        with self._reaching():
            dist.all_reduce(x)
        return np.asarray(x.cpu().numpy())

    def add_gradients(self, parameters: Sequence[nn.Parameter], present: np.ndarray) -> None:
        """See `ProcessGroup`."""
        bucket: list[Tensor] = []
        for parameter, there in zip(parameters, present, strict=True):
            if not there:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (bucket[0].dtype != parameter.grad.dtype or sum(x.nbytes for x in bucket) >= BUCKET):
                self._add_up(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._add_up(bucket)

    def gather(self, compute: Callable[[], State]) -> list[State]:
        """See `ProcessGroup`."""
        mine, failure, header = _attempt(compute)
        said = [json.loads(text) for text in self._gather_bytes(header)]
        self._raise_first([about["error"] for about in said], failure)
        return [self._broadcast(about, mine, rank) for rank, about in enumerate(said)]

    def locally(self, compute: Callable[[], T]) -> T:
        """See `ProcessGroup`."""
        found: list[T] = []

        def own() -> State:
            found.append(compute())
            return State()

        self.gather(own)
        return found[0]

    def broadcast(self, compute: Callable[[], State]) -> State:
        """See `ProcessGroup`."""
        mine, failure, header = _attempt(compute) if self.first else (State(), None, b"")
        size = torch.tensor([len(header)], dtype=torch.int64, device=self._device)
        with self._reaching():
            dist.broadcast(size, 0)
        text = _as_bytes(header) if self.first else torch.empty(int(size), dtype=torch.uint8)
        about = json.loads(bytes(self._sent(text, 0).numpy()))
        self._raise_first([about["error"]], failure)
        return self._broadcast(about, mine, 0)

    def on_rank_zero(self, compute: Callable[[], Any]) -> Any:
        """See `ProcessGroup`."""
        return self.broadcast(lambda: State({"value": compute()})).values["value"]

    def check_identical(self, what: str, value: Any) -> None:
        """See `ProcessGroup`."""
        number = digest(value)
        most, least = self.all_reduce_max([number, -number])
        if most != -least:
            text = f"{what} differs between processes: give all of them the same command, files and versions"
            raise _marked(ProcessError(text))

    def _add_up(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([x.flatten() for x in bucket])
        whole = flat.to(self._device)
        with self._reaching():
            dist.all_reduce(whole)
        pieces = whole.split([x.numel() for x in bucket])
        for x, piece in zip(bucket, pieces, strict=True):
            x.copy_(piece.view_as(x))

    def _gather_bytes(self, text: bytes) -> list[bytes]:
        """What each process says."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=self._device))
        lengths = [int(n) for n in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: len(text)] = _as_bytes(text).to(self._device)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(found, padded)
        return [bytes(x[:n].cpu().numpy()) for x, n in zip(found, lengths, strict=True)]

    def _broadcast(self, about: dict[str, Any], mine: State, rank: int) -> State:
        """The state of the process `rank`, as it has described it."""
        tensors = {}
        for name, kind, shape in about["tensors"]:
            dtype = getattr(torch, kind)
            own = mine.tensors[name].detach().cpu() if rank == self.rank else torch.empty(shape, dtype=dtype)
            if own.numel():
                own = self._sent(own.contiguous().flatten().view(torch.uint8), rank).view(dtype)
            tensors[name] = own.view(shape)
        return State(about["values"], tensors)

    def _sent(self, x: Tensor, rank: int) -> Tensor:
        """`x` (uint8) of the process `rank`, on the CPU."""
        placed = x.to(self._device)
        with self._reaching():
            dist.broadcast(placed, rank)
        return placed.cpu()

    def _raise_first(self, errors: list[dict[str, Any] | None], mine: Exception | None) -> None:
        for rank, about in enumerate(errors):
            if about is not None:
                raise _marked(mine if rank == self.rank and mine is not None else _rebuilt(about, rank)) from None

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say that it is another process which has failed."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} has lost the others: one has ended, as it says itself, or has not "
                f"answered for {self._seconds:g} s ({TIMEOUT_VARIABLE}): {str(error).splitlines()[0]}"
            ) from error


@contextmanager
def local_scope() -> Iterator[None]:
    """Within the block this process works by itself: `current()` knows no other."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def active_group() -> ProcessGroup:
    """The processes that work together here.

    Raises:
        ConfigError: if they were launched in a way that is not supported.
    """
    return SINGLE_PROCESS if _APART.get() else world_group()


@cache
def world_group() -> ProcessGroup:
    """All processes that were launched, whether or not this one works by itself at the moment."""
    size = max((int(os.environ[name]) for name in SIZE_VARIABLES if os.environ.get(name, "").isdigit()), default=1)
    if size == 1 and "MASTER_ADDR" in os.environ and is_set("ACCELERATE_USE_CPU"):
        log.warning(
            "`accelerate launch --cpu` has started one process, whatever --num_processes says: for several on CPUs "
            "leave out --cpu and use `accelerate launch --multi_gpu --num_processes N -m cads ...`"
        )
    if size == 1:
        return SINGLE_PROCESS
    seconds = _timeout()
    for name, kind in SHARDED.items():
        if is_set(name):
            raise ConfigError(f"{kind} is not supported: launch without it; sharding = 'full' divides a model")
    cpu = is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        where = ", ".join(f"{name}={os.environ.get(name, '')}" for name in WHEREABOUTS)
        raise ProcessError(
            f"this process does not find the {size - 1} others within {seconds:g} s ({where}): start all of them by "
            f"one launcher, or unset these variables to run alone: {str(error).splitlines()[0]}"
        ) from error
    return TorchProcessGroup(state, seconds) if state.num_processes > 1 else SINGLE_PROCESS


def close() -> None:
    """Part from the others, at the end of a program that went well."""
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


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"{TIMEOUT_VARIABLE} = {text!r}: it must be a positive number of seconds")
    return seconds


def _attempt(compute: Callable[[], State]) -> tuple[State, Exception | None, bytes]:
    """What is computed apart from the others, or why not, and how that is told to them.

    Raises:
        ProcessError: if the others were lost meanwhile: there is nobody to tell.
    """
    try:
        with local_scope():
            mine = compute()
        return mine, None, _header(mine, None)
    except ProcessError:
        raise
    except Exception as error:
        # Whatever it is, the others wait to be told; it is raised again once they are.
        return State(), error, _header(State(), error)


def _header(state: State, failure: Exception | None) -> bytes:
    tensors = [[n, str(x.dtype).removeprefix("torch."), list(x.shape)] for n, x in state.tensors.items()]
    error = None if failure is None else _described(failure)
    return json.dumps({"error": error, "values": state.values, "tensors": tensors}).encode()


def _as_bytes(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _described(error: Exception) -> dict[str, Any]:
    fields = {n: x for n, x in vars(error).items() if n != SHARED} if isinstance(error, CadsError) else {}
    return {"type": type(error).__name__, "message": str(error), "fields": json.loads(json.dumps(fields, default=str))}


def _rebuilt(about: dict[str, Any], rank: int) -> CadsError:
    """The error of another process, of its own kind, so that all processes take the same way from here."""
    kinds = {kind.__name__: kind for kind in _kinds(CadsError)}
    if about["type"] not in kinds:
        return RemoteError(f"process {rank}: {about['type']}: {about['message']}")
    kind = kinds[about["type"]]
    error = kind.__new__(kind, about["message"])
    CadsError.__init__(error, about["message"])
    vars(error).update(about["fields"])
    return error


def _kinds(root: type[CadsError]) -> Iterator[type[CadsError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)


def _marked(error: Exception) -> Exception:
    vars(error)[SHARED] = True
    return error


_APART: ContextVar[bool] = ContextVar("apart", default=False)
"""Whether this process works by itself at the moment."""
