"""A run without a configuration is named after the data that its flags name."""

from __future__ import annotations

import pytest

from cads.cli.config import read
from cads.cli.settings import TrainSettings
from cads.errors import ConfigError


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "papers.v2.jsonl.gz", "c.jsonl", "d e.jsonl", "val.jsonl"):
        (tmp_path / name).write_text("{}")
    for folder in ("photos.2024", "texts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "a.parquet").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("pools", "flags", "name"),
    [
        (["chats.jsonl"], [], "chats"),
        (["chats.jsonl"], ["--method", "random"], "chats-random"),
        (["chats.jsonl", "papers.v2.jsonl.gz"], [], "chats-papers.v2"),
        (["chats.jsonl", "c.jsonl", "d e.jsonl", "papers.v2.jsonl.gz"], [], "chats-c-d_e-1-more"),
        (["texts/"], [], "texts"),
        (["photos.2024/"], [], "photos.2024"),
        (["photos.2024/../photos.2024"], [], "photos.2024"),
        (["s3://bucket/rows/part.parquet"], [], "part"),
    ],
)
def test_a_run_without_a_configuration_is_named_after_its_pool(files, pools, flags, name):
    words = [word for pool in pools for word in ("--pool", pool)]
    is_text = not pools[0].startswith("photos")
    target = ["--target", "val.jsonl", "--model", "m"] if is_text else []
    assert read(TrainSettings, [*words, *target, *flags]).name == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pool", "chat.jsonl", "--target", "val.jsonl"], r"chat.jsonl: no such file or folder: did you mean chats"),
        (["mine.yml"], r"No such file or directory: did you mean mine.yaml\?"),
        (["grid.yaml"], "is the file of a grid: `cads compare grid.yaml` runs it"),
    ],
)
def test_files_that_are_not_meant_are_refused_with_those_that_are(files, words, message):
    (files / "mine.yaml").write_text("kind: language\n")
    (files / "grid.yaml").write_text("methods: [cads, full]\nbudgets: [1 epochs]\n")
    with pytest.raises(ConfigError, match=message):
        read(TrainSettings, words)


def test_a_configuration_names_the_run_whatever_the_pool(files):
    (files / "mine.yaml").write_text("kind: language\n")
    words = ["mine.yaml", "--pool", "chats.jsonl", "--target", "val.jsonl", "--model", "m"]
    assert read(TrainSettings, words).name == "mine"
    assert read(TrainSettings, ["--task.n_pool", "50"]).name == "cads"
