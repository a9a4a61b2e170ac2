"""A pool of texts in files of two formats, and `cads select` on it in shards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cads.cli import commands
from cads.cli.main import main
from cads.task import Task
from tests.support.tiny_llama import model_folder, sums, write_lines

FILES = 5
OUTPUTS = ("selection.json", "scores.parquet", "rows.parquet")
SOURCE = {"prompt": "prompt", "response": "response", "source": "source"}


def write_pool(folder: Path, method: str = "bm25", *, ids: bool = False, **options) -> Path:
    """Files of 24 sums each, a target and a test set; returns the configuration."""
    model_folder(folder / "llama")
    rows = sums(220)
    for i in range(FILES):
        part = [{k: v for k, v in row.items() if ids or k != "id"} for row in rows[i * 24 : (i + 1) * 24]]
        (folder / "pool").mkdir(exist_ok=True)
        if i % 2:
            pq.write_table(pa.Table.from_pylist(part), folder / "pool" / f"part-{i}.parquet")
        else:
            write_lines(folder / "pool" / f"part-{i}.jsonl", part)
    write_lines(folder / "target.jsonl", [{**row, "prompt": f"please {row['prompt']}"} for row in rows[160:190]])
    write_lines(folder / "test.jsonl", [{**row, "prompt": f"now {row['prompt']}"} for row in rows[190:]])
    columns = {**SOURCE, "id": "id"} if ids else SOURCE
    config = {
        "kind": "language",
        "method": method,
        "options": options,
        "budget": "2 epochs",
        "task": {
            "model": str(folder / "llama"),
            "pool": [{"path": str(folder / "pool"), "columns": columns}],
            "target": [{"path": str(folder / "target.jsonl")}],
            "test": [{"path": str(folder / "test.jsonl")}],
        },
        "train": {"batch_size": 8},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def shard(config: Path, out: Path, text: str, *flags: str) -> int:
    """The exit status of one shard."""
    return main(["select", str(config), "--out", str(out), "--shard", text, *flags])


def merged(config: Path, out: Path, *flags: str) -> int:
    """The exit status of merging."""
    return main(["select", str(config), "--out", str(out), "--merge", *flags])


def in_shards(config: Path, out: Path, of: int, *flags: str) -> list[bytes]:
    """What a run in some shards writes."""
    waiting = list(range(of, 0, -1))
    for _ in range(2):
        statuses = {i: shard(config, out, f"{i}/{of}", *flags) for i in waiting}
        assert set(statuses.values()) <= {0, 75}, statuses
        waiting = [i for i, status in statuses.items() if status]
    assert not waiting, f"shards {waiting} wait for ever"
    assert merged(config, out, *flags) == 0
    return [(out / "selection" / name).read_bytes() for name in OUTPUTS]


@contextmanager
def quick_commands() -> Iterator[None]:
    """Parse each configuration once, whatever the shard and the folder; count FLOPs as in the papers."""
    parsed, read = {}, commands.read

    def read_once(settings, argv):
        words, given = list(argv), {}
        for name in ("--shard", "--out"):
            if words.count(name) == 1:
                i = words.index(name)
                given[name.removeprefix("--")] = words[i + 1]
                del words[i : i + 2]
        key = settings, tuple(words), Path(words[0]).read_text()
        if key not in parsed:
            parsed[key] = read(settings, words)
        config = copy.copy(parsed[key])
        config.values = config.values.clone()
        for name, value in given.items():
            config.values[name] = value
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "read", read_once)
        patch.setattr(Task, "accounting", "paper")
        yield
    # Commands that read data log how they read it.
    logging.getLogger("cads.tasks").setLevel(logging.NOTSET)
