"""README.md is one screen, and its commands and its example are true: they are run here."""

from __future__ import annotations

import re

from cads.selection import Selection
from tests.support.pages import MODEL, blocks, fill_folder, run_block
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = [block for block in blocks("README.md") if block.code.split()[0] not in ("pip", "make")]


def test_example_runs_as_printed(capsys):
    (example,) = [block for block in BLOCKS if block.kind == "python"]
    assert len([line for line in example.code.splitlines() if line.strip()]) <= 11
    run_block(example, {}, "README.md")
    printed = capsys.readouterr().out
    assert "'clean'" in printed
    chosen, everything = map(float, printed.split("\n")[1].split())
    assert chosen > everything


def test_commands_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_folder(tmp_path)
    commands = [block for block in BLOCKS if block.kind == "sh"]
    lines = "\n".join(block.code for block in commands).replace("NAME", MODEL)
    assert len(lines.splitlines()) <= 10
    for block in commands:
        block.code = block.code.replace("NAME", MODEL)
        run_block(block, {}, "README.md")
    for run in ("mine", "chats-papers"):
        assert set(Selection.load(tmp_path / "runs" / run).shares) == {"chats", "papers"}
    assert len((tmp_path / "chosen.jsonl").read_text().splitlines()) == 120


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 75
    assert README.count("![") == 1


def test_every_file_and_make_target_named_exists():
    for path in re.findall(r"(?:cads|experiments)/[\w/.-]+\.(?:py|yaml|png|md)", README):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets
