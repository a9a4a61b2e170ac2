"""Commands in shards are given many times with one configuration: it is parsed once, and FLOPs are not measured."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from cads.cli import commands
from cads.task import Task


@pytest.fixture(scope="package", autouse=True)
def quick():
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
