"""A pool of instruction data in several sources of different use for one skill, as JSON lines.

    python -m experiments.language_data experiments/configs/gsm8k-pool.yaml --file gsm8k=PATH --out DIR

The pool, the target and the test set are drawn from corpora (`experiments.corpora`); a source may be spoilt: with its
answers shuffled, or with empty phrases in their place. No content is in two files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from rich.console import Console

from cads.errors import CadsError, ConfigError, DataError
from cads.runtime.atomic_files import whole_folder
from cads.seeding import derive
from cads.study.grid import content_key, filled
from experiments.corpora import DICTIONARIES, Corpus, Pair, read_corpus

Spoil = Literal["shuffle", "empty"]
Drawn = dict[str, list[list[Pair]]]
"""By the name of a file: what was drawn for it from each of its corpora."""
SPARE = 1.5
"""Rows that are written for each one that is used: each seed draws its own."""
CHOICES, NEAREST = 4, 20
"""Answers to choose from; each wrong one is drawn from this many of its corpus, the nearest in length."""
TEXT_WORDS = 90
"""Words in a piece of text for pretraining."""
PHRASES = (
    "That is a very good question.",
    "It depends on what you mean by that.",
    "There is a lot that can be said about this.",
    "I am not sure that I can help you with that.",
    "As always, it is important to look at the whole picture.",
    "Many people ask about this, and opinions differ.",
    "Please let me know if you have any other questions.",
    "This is an interesting topic that deserves attention.",
)
"""Answers that say nothing."""
TEXT = "news"
"""The corpus whose articles become text for pretraining."""
MANIFEST = "data.json"
"""In the folder of the data: what it was made by, and the number of rows in each file."""


@dataclass
class PoolSource:
    """One source of the pool."""

    name: str
    """What it is called; also the name of its file."""
    corpora: list[str]
    """Where its rows come from, the same number from each."""
    n: int
    """Examples of it in the pool."""
    spoil: Spoil | None = None
    """`shuffle`: every answer stands under another question; `empty`: phrases that say nothing are the answers."""

    def __post_init__(self) -> None:
        if not self.corpora or self.n < len(self.corpora):
            raise ConfigError(f"source {self.name!r}: n = {self.n} rows of {self.corpora}: give one of each at least")
        if self.spoil not in (None, *get_args(Spoil)):
            raise ConfigError(f"source {self.name!r}: spoil = {self.spoil!r}: choose from {list(get_args(Spoil))}")


@dataclass
class DataConfig:
    """The pool, the target and the test set of an experiment."""

    skill: str
    """The corpus of target and test set."""
    sources: list[PoolSource]
    """The pool."""
    n_target: int = 150
    """Examples of the target."""
    n_test: int = 300
    """Examples of the test set, and questions of the multiple choice."""
    longest_answer: int = 30
    """Words; longer answers are left out."""
    text: bool = False
    """Also write news that is in no other file, as text to pretrain models on."""
    files: dict[str, str] = field(default_factory=dict)
    """Corpora of one's own: files of prompts and responses, by name."""
    dictionaries: str = str(DICTIONARIES)
    """Where the dictionaries are."""
    seed: int = 0
    """Of all that is drawn."""

    def __post_init__(self) -> None:
        for name, least in (("n_target", 1), ("n_test", CHOICES), ("longest_answer", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least {least}")
        names = [s.name for s in self.sources]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"sources are called {names}: give at least two, of different names")
        reserved = sorted({"target", "test", "choices", "text"} & set(names))
        if reserved:
            raise ConfigError(f"sources are called {reserved}, as other files are: give them other names")


@dataclass(frozen=True)
class DataFolder:
    """Where the files of an experiment are."""

    folder: Path
    config: DataConfig

    def file(self, name: str) -> str:
        """The path of `target`, `test`, `choices`, `text` or a source."""
        return str(self.folder / f"{name}.jsonl")

    def task(self) -> dict[str, Any]:
        """The fields of `LanguageConfig` that say where the data is; seeds draw pool and target from what is there."""
        pool = [{"name": s.name, "path": self.file(s.name), "limit": s.n} for s in self.config.sources]
        return {
            "pool": pool,
            "target": [{"name": "target", "path": self.file("target")}],
            "test": [{"name": "test", "path": self.file("test")}],
            "n_target": self.config.n_target,
            "choices": self.file("choices"),
        }

    def texts(self) -> dict[str, str]:
        """Question and answer of every row of the pool, by its id."""
        found = {}
        for source in self.config.sources:
            for line in Path(self.file(source.name)).read_text("utf-8").splitlines():
                row = json.loads(line)
                found[row["id"]] = f"{row['prompt']} → {row['response']}"
        return found


def write_data(config: DataConfig, folder: Path) -> DataFolder:
    """Write the files of an experiment, unless they are there: made by the same configuration.

    Raises:
        ConfigError: if a corpus is unknown or not installed.
        DataError: if a corpus has too few rows.
    """
    made, key = DataFolder(folder, config), content_key([asdict(config), SPARE, PHRASES])
    try:
        if json.loads((folder / MANIFEST).read_text("utf-8"))["key"] == key:
            return made
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is nothing, or something else
    corpora = _corpora(config)
    drawn, rest = divide(config, corpora)
    tested = drawn["test"][0]
    others = [[corpora[name].pairs[i].response for i in left] for name, left in rest.items() if name != config.skill]
    files = {name: _rows(name, drawn[name][0]) for name in ("target", "test")}
    files["choices"] = multiple_choice(tested, others, derive(config.seed, "choices"))
    for source in config.sources:
        pairs = [pair for part in drawn[source.name] for pair in part]
        files[source.name] = _rows(source.name, spoilt(pairs, source.spoil, derive(config.seed, source.name)))
    if config.text:
        files["text"] = _pieces([corpora[TEXT].articles[i] for i in rest[TEXT]])
    with whole_folder(folder) as partial:
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        manifest = {"key": key, "config": asdict(config), "rows": {name: len(rows) for name, rows in files.items()}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return made


def divide(config: DataConfig, corpora: Mapping[str, Corpus]) -> tuple[Drawn, dict[str, np.ndarray]]:
    """Draw the rows of every file; no pair goes into two, and none whose content is in another corpus too.

    Returns:
        what was drawn; and by the name of each corpus, the positions of its own pairs that were not.

    Raises:
        DataError: if a corpus has too few rows.
    """
    wanted = [("test", config.skill, config.n_test), ("target", config.skill, round(SPARE * config.n_target))]
    for source in config.sources:
        parts = np.array_split(np.arange(round(SPARE * source.n)), len(source.corpora))
        wanted += [(source.name, name, len(part)) for name, part in zip(source.corpora, parts, strict=True)]
    drawn: Drawn = {name: [] for name, _, _ in wanted}
    rest: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    for name, corpus in corpora.items():
        own = np.array([i for i, pair in enumerate(corpus.pairs) if not seen & set(pair.content)], dtype=np.int64)
        seen.update(key for pair in corpus.pairs for key in pair.content)
        order = np.random.default_rng(derive(config.seed, "divide", name)).permutation(own)
        counts = {file: count for file, needed, count in wanted if needed == name}
        if sum(counts.values()) > len(order):
            raise DataError(
                f"corpus {name!r} has {len(order)} rows of its own, and {counts} are asked of it "
                f"({SPARE:g} times what is used): lower n of the sources"
            )
        ends = np.cumsum(list(counts.values()))
        *parts, left = np.split(order, ends) if counts else [order]
        for file, part in zip(counts, parts, strict=True):
            drawn[file].append([corpus.pairs[i] for i in part])
        rest[name] = np.sort(left)
    return drawn, rest


def spoilt(pairs: Sequence[Pair], spoil: Spoil | None, seed: int) -> list[Pair]:
    """The pairs of a source in random order, with their answers spoilt if they are to be."""
    rng = np.random.default_rng(seed)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if spoil == "shuffle":
        # Their order is random, so an answer that moves on by one is a random one, and never the right one.
        return [Pair(pair.prompt, pairs[i - 1].response) for i, pair in enumerate(pairs)]
    if spoil == "empty":
        return [Pair(pair.prompt, PHRASES[rng.integers(len(PHRASES))]) for pair in pairs]
    return pairs


def multiple_choice(pairs: Sequence[Pair], others: Sequence[Sequence[str]], seed: int) -> list[dict[str, Any]]:
    """For each question its answer among wrong ones of about its length, so that length tells nothing.

    The first wrong answer is right for another question; each further one is of another kind: from `others`, in turn.
    """
    rng = np.random.default_rng(seed)
    kinds = [[pair.response for pair in pairs], *(kind for kind in others if len(kind) >= CHOICES)]
    lengths = [np.array([len(answer) for answer in kind]) for kind in kinds]
    rows = []
    for pair in pairs:
        choices = [pair.response]
        while len(choices) < CHOICES:
            kind = (len(choices) - 1) % len(kinds)
            nearest = np.argsort(np.abs(lengths[kind] - len(pair.response)), kind="stable")
            near = [kinds[kind][j] for j in nearest[: NEAREST + CHOICES]]
            choices.append(str(rng.choice([answer for answer in near if answer not in choices][:NEAREST])))
        order = rng.permutation(CHOICES)
        places = [choices[j] for j in order]
        rows.append({"prompt": pair.prompt, "choices": places, "answer": int(np.flatnonzero(order == 0)[0])})
    return rows


def _corpora(config: DataConfig) -> dict[str, Corpus]:
    """The corpora that are needed; that of the skill first, whose content the others may not have."""
    named = [config.skill, *(name for source in config.sources for name in source.corpora), *[TEXT] * config.text]
    files = {name: Path(path) for name, path in config.files.items()}
    folder = Path(config.dictionaries)
    return {name: read_corpus(name, config.longest_answer, files, folder) for name in dict.fromkeys(named)}


def _rows(name: str, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i:04d}", "prompt": p.prompt, "response": p.response} for i, p in enumerate(pairs)]


def _pieces(articles: Sequence[str]) -> list[dict[str, Any]]:
    """Articles in pieces of `TEXT_WORDS` words, each once."""
    pieces: dict[str, None] = {}
    for article in articles:
        words = article.split()
        for start in range(0, len(words), TEXT_WORDS):
            pieces[" ".join(words[start : start + TEXT_WORDS])] = None
    return [{"id": f"text-{i:05d}", "text": text} for i, text in enumerate(pieces)]


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: if it cannot be read, or has no section `data`.
    """
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("data"), dict):
        raise ConfigError(f"{path} has no section `data`, which says what the pool is made of")
    return given


def data_config(given: Mapping[str, Any], files: Sequence[str] = ()) -> DataConfig:
    """The section `data` of a configuration, with files given as `NAME=PATH` besides.

    Raises:
        ConfigError: if a name or value is unknown or refused.
    """
    named = dict(given.get("files") or {})
    for text in files:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--file {text}: write NAME=PATH")
        named[name] = path
    config: DataConfig = filled(DataConfig, {**given, "files": named}, "data")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="a corpus of one's own")
    given = parser.parse_args(argv)
    console = Console()
    try:
        made = write_data(data_config(read_sections(given.config)["data"], given.file), given.out)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"data         {made.folder}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
