"""Data and model on the command line: `--pool`, `--target`, `--test` and `--model`, without a configuration."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Any

from cads.errors import ConfigError
from cads.runtime.file_listing import is_remote

FLAGS = {
    "pool": "file of texts, each a source of the pool (may be repeated), or folder of images; sets kind and task.pool",
    "target": "file or folder of the target: what selection optimises for",
    "test": "file or folder of the test set",
    "model": "name or folder of the model; short for task.model",
}
"""Each flag, and its help."""
TEXTS = (".parquet", ".jsonl", ".ndjson", ".arrow", ".gz", ".zst")
"""Suffixes of files of texts; a folder that holds some is a pool of texts, which is read in shards."""
MOST_NAMES = 3
"""Files of the pool that name a run."""
NO_NAME = re.compile(r"[^\w.+-]+")
"""What no name of a run has."""
BESIDE_IMAGES = "metadata"
"""Name, without its suffix, of a table that folders of images may hold."""


def _is_of_images(path: str) -> bool:
    """Whether a path is a folder, and not one that holds files of texts."""
    folder = Path(path)
    if is_remote(path) or not folder.is_dir():
        return False
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern)]
    return not any(file.suffix in TEXTS and file.stem != BESIDE_IMAGES for file in files)


def add_data_flags(parser: Any) -> None:
    """Add the flags to a parser of argparse."""
    for name, text in FLAGS.items():
        action = "append" if name == "pool" else "store"
        parser.add_argument(f"--{name}", action=action, default=argparse.SUPPRESS, metavar="PATH", help=text)


def task_of_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """The fields of the task that the flags set, with `kind` if they tell it: folders are images, files are texts.

    Raises:
        ConfigError: if files and folders are mixed, several folders are given, or a path does not exist.
    """
    pool: list[str] = getattr(parsed, "pool", [])
    held_out = {name: getattr(parsed, name) for name in ("target", "test") if hasattr(parsed, name)}
    fields = {"model": parsed.model} if hasattr(parsed, "model") else {}
    paths = [*pool, *held_out.values()]
    if not paths:
        return fields
    missing = [path for path in paths if not (is_remote(path) or Path(path).exists())]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: no such file or folder{near_name(Path(missing[0]))} (data sets of the hub: name "
            "them in task.pool)"
        )
    folders = [path for path in paths if _is_of_images(path)]
    if not folders:
        files = {**({"pool": pool} if pool else {}), **{name: [path] for name, path in held_out.items()}}
        texts = {name: [{"path": path} for path in paths] for name, paths in files.items()}
        return {"kind": "language", **fields, **texts}
    if len(folders) < len(paths):
        raise ConfigError(
            f"{folders} are folders and the other paths are files: give folders of images, or files of texts"
        )
    if len(pool) > 1:
        raise ConfigError(f"--pool is given {len(pool)} folders: put them into one, and each is a source of the pool")
    images = {f"{name}_path": path for name, path in held_out.items()}
    return {"kind": "vision", **fields, **({"dataset": "folder", "path": pool[0]} if pool else {}), **images}


def near_name(path: Path) -> str:
    """The name that was probably meant, in words, among those beside a path that does not exist; "" if none is near."""
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f": did you mean {path.parent / close[0]}?" if close else ""


def names_of_data(fields: dict[str, Any]) -> list[str]:
    """The names of the files or of the folder of the pool, without suffixes, that the flags of `task_of_flags` gave."""
    pool = fields.get("pool") or []
    places = [entry["path"] for entry in pool] or [path for path in [fields.get("path")] if path]
    named = [_plain_name(place) for place in places]
    return named if len(named) <= MOST_NAMES else [*named[:MOST_NAMES], f"{len(named) - MOST_NAMES}-more"]


def _plain_name(place: str) -> str:
    from cads.tasks.language.tables import stem_of

    path = Path(place.rstrip("/")) if is_remote(place) else Path(place).resolve()
    return NO_NAME.sub("_", path.name if path.is_dir() else stem_of(path)) or "pool"
