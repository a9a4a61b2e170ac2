"""The blocks of code of a page, and a folder in which they run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cads.cli.main import main
from tests.support.paths import ROOT
from tests.support.tiny_llama import model_folder, sums, write_lines

FENCE = re.compile(
    r"(?:<!-- (?P<how>not run|run by): (?P<why>.+?) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
INDENTED = re.compile(r"(?:<!-- (?P<how>not run|run by): (?P<why>.+?) -->\n\n?)?(?P<code>(?:^    \S.*\n?)+)", re.M)
PROGRAMS = ("cads", "make", "pip", "trl", "tensorboard", "accelerate", "torchrun", "git", "python", ".venv/bin/python")
"""First words of commands; other indented lines are formulas."""
MODEL = "HuggingFaceTB/SmolLM2-135M"
"""The model of the pages; where they run, a folder with a tiny one."""
QUIET = {"train": ["--progress", "false"], "select": ["--progress", "false"]}
"""Flags that are added to a command."""


@dataclass
class Block:
    """One block of code: its language, and what the page says about running it."""

    kind: str
    code: str
    how: str | None
    why: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line."""
        return [shlex.split(line, comments=True) for line in self.code.splitlines() if line.strip()]


def pages() -> list[str]:
    """All pages, as paths in the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *docs]


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order: fenced ones but those of plain text, and indented commands."""
    text = (ROOT / page).read_text()
    found = [(m.start(), Block(m["kind"], m["code"], m["how"], m["why"])) for m in FENCE.finditer(text)]
    prose = FENCE.sub(lambda m: " " * len(m[0]), text)
    for match in INDENTED.finditer(prose):
        block = Block("sh", "\n".join(line[4:] for line in match["code"].splitlines()), match["how"], match["why"])
        if block.code.split()[0] in PROGRAMS:
            found.append((match.start(), block))
    return [block for _, block in sorted(found, key=lambda item: item[0]) if block.kind != "text"]


def run_block(block: Block, namespace: dict[str, Any], page: str) -> None:
    """Run a block in the current folder.

    Raises:
        AssertionError: if a command fails, or is not one of cads.
    """
    if block.kind == "python":
        exec(compile(block.code, page, "exec"), namespace)
    elif block.kind == "yaml":
        name = re.match(r"# (\S+\.yaml)\n", block.code)
        assert name is not None, f"{page}: the first line of a yaml block names its file"
        Path(name[1]).write_text(block.code)
    else:
        assert block.kind == "sh", f"{page}: blocks of {block.kind} are not known"
        for words in block.commands:
            assert words[0] == "cads", f"{page}: {words[0]} is not run: say why"
            assert main([*words[1:], *QUIET.get(words[1], [])]) == 0, words


def fill_folder(folder: Path) -> None:
    """Write what the commands of the pages read: three files of texts, a folder of images, and a tiny model."""
    model_folder(folder / MODEL)
    rows = iter(sums(180))
    for name in ("chats.jsonl", "papers.jsonl", "val.jsonl"):
        write_lines(folder / name, [{k: row[k] for k in ("prompt", "response")} for row in islice(rows, 60)])
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"photos/{label}/{i}.png")
