"""The tokens and labels on which `cads train` trains, as a data set for other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, load_dataset

from cads.errors import ConfigError
from cads.selection import Selection
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.splits import encoder_of
from cads.tasks.language.tokens import IGNORED, Tokens

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""What `datasets` reads files with, by suffix."""


def learned_tokens(selection: Path | str, data: Path | str, model: str) -> tuple[Dataset, Any]:
    """The examples of the file `data` that a Selection trains on, each as often as its weight says.

    Args:
        selection: its folder. data: a file that its pool was read from; it needs no ids. model: as in `task.model`.

    Returns:
        `input_ids`, `attention_mask` and `labels` (answers with their end tokens, and -100 elsewhere) of each example;
        and the tokenizer.

    Raises:
        ConfigError, DataError: as `cads train`. SelectionError: as `Selection.apply`.
    """
    settings = settings_of(selection, model, data)
    tokenizer = settings.load_tokenizer()
    encoder = encoder_of(tokenizer, settings, settings.max_length(settings.models()))
    row_of = chosen_rows(selection, data)
    rows, repeats = np.unique(row_of, return_inverse=True)
    tokens, encoded = encoder.encode(load_rows(source_of(settings, data), settings.data_seed).take(rows))
    # The pool holds no row that the encoder leaves out.
    assert len(encoded) == len(rows)
    examples = list(_examples(tokens))
    return Dataset.from_list([examples[i] for i in repeats]), tokenizer


def chosen_rows(selection: Path | str, data: Path | str) -> np.ndarray:
    """The rows of the file `data`, counted from 0, that a Selection trains on; int64, repeated by weight.

    Raises:
        ConfigError: if the type of the file is not known. SelectionError: as `Selection.apply`.
    """
    suffix = Path(data).suffix
    if suffix not in READERS:
        raise ConfigError(f"{data} has the suffix {suffix!r}: use one of {', '.join(READERS)}")
    dataset = load_dataset(READERS[suffix], data_files=str(data), split="train")
    numbered = dataset.add_column("row in file", np.arange(len(dataset)))
    return np.array(Selection.load(selection).apply(numbered, weights="resample")["row in file"], dtype=np.int64)


def settings_of(selection: Path | str, model: str, data: Path | str) -> LanguageConfig:
    """The settings of the task that a Selection was made for, with the model of this path or name.

    They are in the `config.yaml` that `cads select` writes. A Selection that was made in Python has none: the defaults
    are taken.
    """
    folder = Path(selection)
    file = (folder.parent if folder.name == "selection" else folder) / "config.yaml"
    task: dict[str, Any] = {"pool": [{"path": str(data)}]}
    if file.exists():
        task = yaml.safe_load(file.read_text())["task"]
    parts = {part: [TextSource(**source) for source in task.get(part) or []] for part in ("pool", "target", "test")}
    return LanguageConfig(**{**task, **parts, "model": model})


def source_of(settings: LanguageConfig, data: Path | str) -> TextSource:
    """How the file `data` was read for the pool; all of its rows.

    Raises:
        ConfigError: if the pool has several files, and this is none of them.
    """
    files = [source for source in settings.pool if source.path is not None]
    for source in files:
        if Path(str(source.path)).resolve() == Path(data).resolve():
            return replace(source, limit=None)
    if len(settings.pool) == len(files) == 1:
        # A file that was moved.
        return replace(files[0], path=str(data), limit=None)
    raise ConfigError(
        f"{data} is none of the files of the pool, {[s.location for s in settings.pool]}: give one of them"
    )


def _examples(tokens: Tokens) -> Iterator[dict[str, list[int]]]:
    for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids, learned = np.array(tokens.ids[begin:end]), np.array(tokens.loss_mask[begin:end])
        # Nothing predicts the first token.
        learned[0] = False
        labels = np.where(learned, ids, IGNORED)
        yield {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}
