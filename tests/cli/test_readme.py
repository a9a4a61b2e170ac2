"""README's commands and its example are true: they are run here."""

import re
from itertools import islice
from pathlib import Path

import pytest

from cads.cli.main import main
from cads.selection import Selection
from tests.support.paths import ROOT
from tests.support.tiny_llama import model_folder, sums, write_lines

README = (ROOT / "README.md").read_text()


def test_example_runs_as_printed(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'clean'" in printed
    assert "accuracy" in printed


def test_commands_run_as_printed(tmp_path, monkeypatch):
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    commands = re.findall(r"^    (cads (?:plan|select|train) .*)$", README, re.MULTILINE)
    with_files, *commands = commands
    assert "--pool" in with_files
    assert [c.split()[1] for c in commands] == ["plan", "select", "train"]
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command)][1:]
        quiet = [] if words[0] == "plan" else ["--progress", "false"]
        assert main([*words, "--task.n_pool", "2000", *quiet]) == 0
    assert (tmp_path / "runs/fm-train/model.safetensors").exists()


def test_the_command_with_files_runs_as_printed(tmp_path, monkeypatch):
    (command,) = re.findall(r"^    (cads train --pool .*)$", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "llama")
    rows = iter(sums(90))
    for name in ("chats.jsonl", "papers.jsonl", "val.jsonl"):
        write_lines(tmp_path / name, list(islice(rows, 30)))
    words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command.replace("NAME", "llama"))][1:]
    assert main([*words, "--train.batch_size", "8", "--progress", "false"]) == 0
    assert set(Selection.load(tmp_path / "runs" / "cads").shares) == {"chats", "papers"}


def test_every_file_and_make_target_named_exists():
    for path in re.findall(r"(?:cads|experiments)/[\w/.-]+\.(?:py|yaml|png|md)", README):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets
