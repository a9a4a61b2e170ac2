"""Checkpoints on disk, complete or absent: numbered folders of tensors and JSON values, each with its hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cads.data.hashing import add_tensors
from cads.errors import CheckpointError, ConfigError
from cads.runtime.atomic_files import remove_folder, whole_folder
from cads.runtime.safe_read import JSON_LIMIT, memory_limit

log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
KEPT = 2
"""Checkpoints of one kind that are kept: the newest, and the one before it in case the newest is damaged."""
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
HEADER_LIMIT = 64 * 2**20
"""Largest header of a safetensors file, in bytes, that is read."""
MAX_SHOWN = 60
"""Characters of a setting that a message about another run shows."""
HASHED_AT_ONCE = 2**20
"""Bytes that are read at a time while a file is hashed."""


class OtherRunError(CheckpointError):
    """Checkpoints of a run with other settings, other data or other versions.

    Attributes:
        changed: what differs, one phrase each.
    """

    def __init__(self, message: str, changed: list[str]) -> None:
        super().__init__(message)
        self.changed = changed


@dataclass
class CheckpointConfig:
    """How often a long command writes checkpoints. It changes no result.

    Operations that finished since the last checkpoint are held in memory, with the weights of each trained model.
    Memory holds all of them where nothing can be written (a full disk) or both fields are null.
    """

    every_seconds: float | None = 60.0
    """Seconds between checkpoints, or null."""
    every_steps: int | None = None
    """Training steps (or scored shards) between checkpoints, or null."""

    def __post_init__(self) -> None:
        seconds, steps = self.every_seconds, self.every_steps
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"every_seconds = {seconds}: it must be finite and >= 0, or null for never")
        if steps is not None and steps < 1:
            raise ConfigError(f"every_steps = {steps}: it must be at least 1, or null for never")


@dataclass
class State:
    """The state to store: JSON values, and tensors by name."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """The value called `name`.

        Raises:
            CheckpointError: if there is none, or it is no number.
        """
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} = {value!r} is stored, which is no number: begin anew with --overwrite true")
        return float(value)

    @property
    def digest(self) -> str:
        """Hash of the values, and of the name, type, shape and contents of each tensor."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        add_tensors(digest, self.tensors)
        return digest.hexdigest()

    def detached(self) -> State:
        """A copy on the CPU that later training does not change."""
        return State(json.loads(json.dumps(self.values)), {n: _copied(x) for n, x in self.tensors.items()})


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).contiguous()


class Checkpoints:
    """The numbered checkpoints of one run, `000001-kind` and so on; each is complete.

    Args:
        folder: holds them; made when the first one is written.
        identity: identifies the run: JSON values by name. Checkpoints with another identity are refused.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._damaged: set[Path] = set()
        self._write_failed = False

    def write(self, kind: str, state: State) -> Path | None:
        """Write one more checkpoint: files first, then the manifest, then the name.

        Returns:
            its folder; None, with a warning, if it could not be written (a full disk): earlier ones are still there.
        """
        name = f"{1 + max((number for number, _, _ in self._numbered()), default=0):06d}-{kind}"
        try:
            with whole_folder(self.folder / name) as partial:
                save_file({n: _copied(x) for n, x in state.tensors.items()}, partial / TENSORS)
                (partial / VALUES).write_text(json.dumps(state.values))
                files = {n: _describe(partial / n) for n in (TENSORS, VALUES)}
                manifest = {"schema_version": CHECKPOINT_VERSION, "identity": self.identity, "files": files}
                signed = {**manifest, "sha256": _signature(manifest)}
                (partial / MANIFEST).write_text(json.dumps(signed, indent=2))
        except (OSError, SafetensorError) as error:
            if not self._write_failed:
                log.warning("%s: no checkpoint could be written (%s): the run goes on", self.folder, _reason(error))
            self._write_failed = True
            return None
        self._write_failed = False
        return self.folder / name

    def read(self, kind: str) -> Iterator[tuple[Path, dict[str, Any], StoredTensors]]:
        """The undamaged checkpoints of a kind, newest first; a damaged one is passed over with a warning.

        Raises:
            OtherRunError: if one was written by another run: other settings, pool or versions.
        """
        for _, _, path in sorted((entry for entry in self._numbered() if entry[1] == kind), reverse=True):
            try:
                identity, values, tensors = read_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s: it is passed over", error)
                self._damaged.add(path)
                continue
            if changed := differences(identity, self.identity):
                raise OtherRunError(
                    f"{path} is of another run: {'; '.join(changed)}; go on with what it was begun with, choose "
                    "another folder, or begin anew with --overwrite true",
                    changed,
                )
            yield path, values, tensors

    def prune(self, kind: str, keep: int = KEPT) -> None:
        """Remove all checkpoints of a kind but the `keep` newest undamaged ones; what cannot be removed stays."""
        newest_first = sorted((entry for entry in self._numbered() if entry[1] == kind), reverse=True)
        undamaged = [path for _, _, path in newest_first if path not in self._damaged]
        for path in [*undamaged[keep:], *self._damaged]:
            try:
                remove_folder(path)
            except OSError as error:
                log.warning("%s: an old checkpoint cannot be removed (%s)", path, _reason(error))
        self._damaged.clear()

    def sweep(self) -> None:
        """Remove the half-written folders of a killed process; call it while the run is locked."""
        if self.folder.is_dir():
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        remove_folder(self.folder)

    @property
    def empty(self) -> bool:
        """Whether the folder holds no checkpoint."""
        return not any(True for _ in self._numbered())

    def _numbered(self) -> Iterator[tuple[int, str, Path]]:
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            number, _, kind = path.name.partition("-")
            if len(number) >= 6 and number.isascii() and number.isdigit() and kind:
                yield int(number), kind, path


class StoredTensors:
    """The tensors of one checkpoint, still on disk.

    Raises:
        CheckpointError: if the file is no safetensors file, or larger than this machine can hold.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        check_size(path, memory_limit())
        with open(path, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > HEADER_LIMIT:
            raise CheckpointError(f"{path.name} has a header of {header} bytes, more than the {HEADER_LIMIT} read")
        with safe_open(path, framework="pt") as stored:
            self._names = list(stored.keys())

    def load(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, on the CPU; keyed by the rest of the name."""
        names = [name for name in self._names if name.startswith(prefix)]
        with safe_open(self._path, framework="pt") as stored:
            return {name.removeprefix(prefix): stored.get_tensor(name).clone() for name in names}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], StoredTensors]:
    """Read and verify one checkpoint: sizes and hashes before contents; nothing in it is executed.

    Returns:
        the identity of the run that wrote it, the values, and the tensors.

    Raises:
        CheckpointError: if it is incomplete, corrupt, of another version, or larger than this machine can hold.
    """
    try:
        manifest = load_json(path / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("schema_version") != CHECKPOINT_VERSION:
            version = manifest.get("schema_version") if isinstance(manifest, dict) else None
            raise CheckpointError(f"it has schema version {version!r}; this library reads {CHECKPOINT_VERSION}")
        if manifest.pop("sha256", None) != _signature(manifest):
            raise CheckpointError("its manifest is damaged: its hash differs")
        identity, files = manifest.get("identity"), manifest.get("files")
        if not isinstance(identity, dict) or not isinstance(files, dict) or set(files) != {TENSORS, VALUES}:
            raise CheckpointError(f"its manifest does not list {TENSORS} and {VALUES}")
        for name, description in files.items():
            _check_plain(path / name)
            if not isinstance(description, dict) or (path / name).stat().st_size != description.get("bytes"):
                raise CheckpointError(f"{name} has another size than the manifest says")
            if _describe(path / name) != description:
                raise CheckpointError(f"{name} is not what the manifest says: its hash differs")
        values = load_json(path / VALUES)
        if not isinstance(values, dict):
            raise CheckpointError(f"{VALUES} holds {type(values).__name__}, not names and values")
        return identity, values, StoredTensors(path / TENSORS)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error
    except (OSError, ValueError, RecursionError, SafetensorError, MemoryError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two identities, one phrase each, by dotted name."""
    phrases = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            phrases += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            before_text, now_text = _in_words(old), _in_words(new)
            is_long = max(len(before_text), len(now_text)) > MAX_SHOWN
            change = "has changed" if is_long else f"was {before_text}, now {now_text}"
            phrases.append(f"{prefix}{name} {change}")
    return phrases


def _in_words(value: Any) -> str:
    """A value as configuration files have it; text in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=repr)


def _signature(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": content_digest(path)}


def content_digest(path: Path) -> str:
    """The SHA-256 of a file's contents, hexadecimal.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASHED_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def check_size(path: Path, limit: float) -> None:
    """Refuse a file that is no plain file (a link leads out of its folder), or larger than `limit` bytes.

    Raises:
        CheckpointError: naming the file.
    """
    _check_plain(path)
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path.name} has {path.stat().st_size} bytes, more than the {limit:.0f} that are read")


def _check_plain(path: Path) -> None:
    if path.is_symlink() or path.parent.is_symlink():
        raise CheckpointError(f"{path.name} is a symbolic link: a checkpoint has its own files")
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing")


def load_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        CheckpointError: if it is missing, a link, or too large.
        OSError, ValueError, RecursionError: if it cannot be read, or is no JSON.
    """
    check_size(path, JSON_LIMIT)
    return json.loads(path.read_bytes())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, "") + f" {error.strerror}"
    return str(error)
