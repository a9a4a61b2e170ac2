"""The images of a folder that a Selection chose, as a list of paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from cads.errors import ConfigError, SelectionError
from cads.selection import Selection
from cads.tasks.vision.folders import EXTENSIONS

SHOWN = 3
"""Ids that a message names."""


def image_lines(selection: Selection, counts: np.ndarray, roots: Sequence[Path], *, weighted: bool) -> Iterator[str]:
    """Paths relative to the folder of the pool, one a line, in the order of the pool.

    Args:
        selection: whose ids are these paths.
        counts: how often each example comes, int64, shape (N,).
        roots: the folder of the pool, in which the images are looked for, or nothing.
        weighted: add the weight of each image, after a tab.

    Raises:
        SelectionError: if the pool is no folder of images, a name has a tab or line break, or an image is missing.
        ConfigError: if several folders are given.
    """
    if selection.origin is not None:
        raise SelectionError(
            "the pool was read from files of rows, and holds no images: use --to jsonl or --to parquet"
        )
    if len(roots) > 1:
        raise ConfigError(f"{len(roots)} folders are given: a list of images has one, the folder of the pool")
    examples = np.flatnonzero(counts)
    names: list[str] = selection.ids.take(pa.array(examples)).to_pylist()
    others = [name for name in names if not name.lower().endswith(EXTENSIONS)]
    if others:
        raise SelectionError(
            f"{len(others)} of {len(names)} ids are no paths of images, such as {others[:SHOWN]}: only a folder of "
            "image files can be listed, not arrays, data sets of the hub, synthetic sources, or a task of your own; "
            "use selection.positions(pool), or selection.apply(dataset, id_column=...)"
        )
    odd = [name for name in names if set(name) & set("\t\r\n")]
    if odd:
        raise SelectionError(f"{odd[0]!r} has a tab or a line break, which a list cannot hold: rename the file")
    if roots:
        missing = [name for name in names if not (roots[0] / name).is_file()]
        if missing:
            raise SelectionError(
                f"{len(missing)} of {len(names)} images are not in {roots[0]}, such as {missing[:SHOWN]}: give the "
                "folder that the pool was read from (--task.path)"
            )
    for name, i in zip(names, examples.tolist(), strict=True):
        line = f"{name}\t{float(selection.weights[i])!r}\n" if weighted else f"{name}\n"
        for _ in range(int(counts[i])):
            yield line


def refuse_synthetic(folder: Path) -> None:
    """Refuse a run on a pool with synthetic sources, whose images and labels are not those of its files.

    A Selection does not say so itself: the configuration that `cads select` wrote beside it does.

    Raises:
        SelectionError: if it names synthetic sources.
    """
    for file in (folder / "config.yaml", folder.parent / "config.yaml"):
        try:
            config = yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        task = config.get("task") if isinstance(config, dict) and config.get("kind") == "vision" else None
        if isinstance(task, dict) and task.get("sources"):
            raise SelectionError(
                f"{file} names synthetic sources, whose images and labels are made anew and are in no file: choose "
                "from a pool without task.sources"
            )
        return
