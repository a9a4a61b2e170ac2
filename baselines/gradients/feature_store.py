"""Features on disk, one file per shard, named by a hash of its inputs, so that no shard is computed twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cads.accounting.ledger import LedgerEntry
from cads.data.hashing import add_tensors
from cads.errors import CheckpointError, ConfigError
from cads.runtime.atomic_files import atomic_file

log = logging.getLogger(__name__)

FORMAT = "cads-features-2"


@dataclass(frozen=True)
class FeatureShard:
    """Features of some examples, float32, shape (n, d), and what computing them cost, by stage."""

    features: Tensor
    spent: dict[str, LedgerEntry]


class FeatureStore:
    """A folder of features.

    Args:
        folder: created if it is missing; None to store nothing.

    Raises:
        ConfigError: if `folder` is a file.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"features = {str(folder)!r} is a file: name a folder for the features")

    def get(self, key: str, n: int, dimension: int, compute: Callable[[], FeatureShard]) -> FeatureShard:
        """The shard of `key`: read if its file exists and is intact, computed and stored otherwise.

        Args:
            key: a hash of everything the features depend on.
            n, dimension: the shape that the features must have.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{key}.safetensors"
        if path.exists():
            try:
                return _read(path, key, (n, dimension))
            except CheckpointError as error:
                log.warning("%s: it is computed again", error)
        shard = compute()
        _write(path, key, shard)
        return shard


def _write(path: Path, key: str, shard: FeatureShard) -> None:
    """Write atomically: the file is complete or absent.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    spent = {stage: asdict(entry) for stage, entry in shard.spent.items()}
    header = {"format": FORMAT, "key": key, "sha256": _digest(shard.features), "spent": json.dumps(spent)}
    try:
        with atomic_file(path) as partial:
            save_file({"features": shard.features.contiguous()}, partial, header)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}): look at the disk, or keep no features") from error


def _read(path: Path, key: str, shape: tuple[int, int]) -> FeatureShard:
    """Read a file written by `_write`.

    Raises:
        CheckpointError: if the file is corrupt, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("key") != key:
                raise CheckpointError(f"{path} holds no features of this run")
            stored = file.get_slice("features")
            # Checked before reading, so that a large file that holds something else is never loaded.
            if stored.get_dtype() != "F32" or tuple(stored.get_shape()) != shape:
                raise CheckpointError(f"{path} is damaged")
            features = file.get_tensor("features")
        if _digest(features) != header["sha256"]:
            raise CheckpointError(f"{path} is damaged")
        spent = {stage: LedgerEntry(**entry) for stage, entry in json.loads(header["spent"]).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return FeatureShard(features, spent)


def _digest(features: Tensor) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, {"features": features})
    return digest.hexdigest()
