"""The commands of docs/commands.md on Fashion-MNIST run as printed, on fewer images."""

from __future__ import annotations

from pathlib import Path

import pytest

from cads.cli.main import main
from tests.support.pages import blocks
from tests.support.paths import ROOT


def test_commands_run_as_printed(tmp_path, monkeypatch):
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    (block,) = [block for block in blocks("docs/commands.md") if block.how == "run by"]
    assert [words[1] for words in block.commands] == ["plan", "select", "train"]
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    for _, *words in block.commands:
        quiet = [] if words[0] == "plan" else ["--progress", "false"]
        assert main([*words, "--task.n_pool", "2000", *quiet]) == 0
    assert (tmp_path / "runs/fm-train/model.safetensors").exists()
