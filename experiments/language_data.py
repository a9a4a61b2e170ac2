"""A pool of instruction data for one skill, in sources of different usefulness, as JSON lines.

    python -m experiments.language_data experiments/configs/gsm8k-pool.yaml --file gsm8k=PATH --out DIR

The pool, the target and the test set are drawn from corpora (`experiments.corpora`). A source may be spoilt: its
answers are shuffled, or replaced by empty phrases. No content is in two files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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
"""The pairs that were drawn for each file from each of its corpora, by the name of the file."""
SPARE = 1.5
"""Rows that are written for each row that a seed uses: each seed draws its own from them."""
CHOICES, NEAREST = 4, 20
"""Answers to choose from; answers from which each wrong one is drawn, the nearest in length of its kind."""
TEXT_WORDS = 90
"""Words of a piece of text for pretraining."""
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
"""File in the folder of the data: its configuration, and the number of rows in each file."""


@dataclass
class PoolSource:
    """One source of the pool."""

    name: str
    """Name of the source and of its file."""
    corpora: list[str]
    """Corpora that its rows come from, the same number from each."""
    n: int
    """Number of its examples in the pool."""
    spoil: Spoil | None = None
    """`shuffle`: every question has the answer of another one; `empty`: the answers are phrases that say nothing."""

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
    """Words of the longest answer; longer answers are left out."""
    text: bool = False
    """Also write news that is in no other file, as text to pretrain models on."""
    files: dict[str, str] = field(default_factory=dict)
    """The user's own corpora: files of prompts and responses, by name."""
    dictionaries: str = str(DICTIONARIES)
    """Folder of the dictionaries."""
    seed: int = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        for name, minimum in (("n_target", 1), ("n_test", CHOICES), ("longest_answer", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least {minimum}")
        names = [s.name for s in self.sources]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"sources are called {names}: give at least two, of different names")
        reserved = sorted({"target", "test", "choices", "text"} & set(names))
        if reserved:
            raise ConfigError(f"sources are called {reserved}, as other files are: give them other names")


@dataclass(frozen=True)
class DataFolder:
    """The folder of an experiment's data, and the configuration that the data is made by."""

    folder: Path
    config: DataConfig

    def file(self, name: str) -> str:
        """The path of `target`, `test`, `choices`, `text` or a source."""
        return str(self.folder / f"{name}.jsonl")

    def task(self) -> dict[str, Any]:
        """The fields of `LanguageConfig` for this data; each seed draws its pool and target from the files."""
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
        texts = {}
        for source in self.config.sources:
            for line in Path(self.file(source.name)).read_text("utf-8").splitlines():
                row = json.loads(line)
                texts[row["id"]] = f"{row['prompt']} → {row['response']}"
        return texts


def write_data(config: DataConfig, folder: Path) -> DataFolder:
    """Write the files of an experiment, unless the folder has those of the same configuration already.

    Raises:
        ConfigError: if a corpus is unknown or not installed.
        DataError: if a corpus has too few rows.
    """
    data_folder, key = DataFolder(folder, config), content_key([asdict(config), SPARE, PHRASES])
    try:
        if json.loads((folder / MANIFEST).read_text("utf-8"))["key"] == key:
            return data_folder
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the folder does not exist, or holds something else
    corpora = _corpora(config)
    drawn, rest = divide(config, corpora)
    test_pairs = drawn["test"][0]
    others = [
        [corpora[name].pairs[i].response for i in positions] for name, positions in rest.items() if name != config.skill
    ]
    files = {name: _rows(name, drawn[name][0]) for name in ("target", "test")}
    files["choices"] = multiple_choice(test_pairs, others, derive(config.seed, "choices"))
    for source in config.sources:
        pairs = [pair for part in drawn[source.name] for pair in part]
        files[source.name] = _rows(source.name, spoilt(pairs, source.spoil, derive(config.seed, source.name)))
    if config.text:
        files["text"] = pieces([corpora[TEXT].articles[i] for i in rest[TEXT]])
    with whole_folder(folder) as partial:
        for name, rows in files.items():
            write_lines(partial / f"{name}.jsonl", rows)
        manifest = {"key": key, "config": asdict(config), "rows": {name: len(rows) for name, rows in files.items()}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return data_folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def divide(config: DataConfig, corpora: Mapping[str, Corpus]) -> tuple[Drawn, dict[str, np.ndarray]]:
    """Draw the rows of every file; no pair is drawn for two files.

    A pair whose content is in an earlier corpus too counts as one of that corpus alone.

    Returns:
        the pairs drawn; the positions of the pairs of each corpus that were not drawn, by the corpus's name.

    Raises:
        DataError: if a corpus has too few rows.
    """
    requests = [("test", config.skill, config.n_test), ("target", config.skill, round(SPARE * config.n_target))]
    for source in config.sources:
        parts = np.array_split(np.arange(round(SPARE * source.n)), len(source.corpora))
        requests += [(source.name, name, len(part)) for name, part in zip(source.corpora, parts, strict=True)]
    drawn: Drawn = {name: [] for name, _, _ in requests}
    rest: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    for name, corpus in corpora.items():
        eligible = np.array([i for i, pair in enumerate(corpus.pairs) if not seen & set(pair.content)], dtype=np.int64)
        seen.update(key for pair in corpus.pairs for key in pair.content)
        order = np.random.default_rng(derive(config.seed, "divide", name)).permutation(eligible)
        counts = {file: count for file, corpus_name, count in requests if corpus_name == name}
        if sum(counts.values()) > len(order):
            raise DataError(
                f"corpus {name!r} has {len(order)} rows of its own, but {counts} are needed "
                f"({SPARE:g} times the rows in use): lower n of the sources"
            )
        ends = np.cumsum(list(counts.values()))
        *parts, undrawn = np.split(order, ends) if counts else [order]
        for file, part in zip(counts, parts, strict=True):
            drawn[file].append([corpus.pairs[i] for i in part])
        rest[name] = np.sort(undrawn)
    return drawn, rest


def spoilt(pairs: Sequence[Pair], spoil: Spoil | None, seed: int) -> list[Pair]:
    """The pairs of a source in random order, with their answers spoilt as `spoil` says."""
    rng = np.random.default_rng(seed)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if spoil == "shuffle":
        # The order is random: the answer of the pair before is a random one, and never the right one.
        return [Pair(pair.prompt, pairs[i - 1].response) for i, pair in enumerate(pairs)]
    if spoil == "empty":
        return [Pair(pair.prompt, PHRASES[rng.integers(len(PHRASES))]) for pair in pairs]
    return pairs


def multiple_choice(pairs: Sequence[Pair], others: Sequence[Sequence[str]], seed: int) -> list[dict[str, Any]]:
    """Multiple-choice rows: each question with its answer and wrong ones of about the same length.

    The similar lengths give no hint. The first wrong answer is the right one of another question; each further one is
    from one of `others`, in turn.

    Args:
        others: answers of other kinds, such as those of other corpora.
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
            candidates = [kinds[kind][j] for j in nearest[: NEAREST + CHOICES]]
            choices.append(str(rng.choice([answer for answer in candidates if answer not in choices][:NEAREST])))
        order = rng.permutation(CHOICES)
        shuffled = [choices[j] for j in order]
        rows.append({"prompt": pair.prompt, "choices": shuffled, "answer": int(np.flatnonzero(order == 0)[0])})
    return rows


def _corpora(config: DataConfig) -> dict[str, Corpus]:
    """The corpora that the data needs; the skill's is first, since the others may not share its content."""
    named = [config.skill, *(name for source in config.sources for name in source.corpora), *[TEXT] * config.text]
    files = {name: Path(path) for name, path in config.files.items()}
    folder = Path(config.dictionaries)
    return {name: read_corpus(name, config.longest_answer, files, folder) for name in dict.fromkeys(named)}


def _rows(name: str, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i:04d}", "prompt": p.prompt, "response": p.response} for i, p in enumerate(pairs)]


def pieces(articles: Sequence[str]) -> list[dict[str, Any]]:
    """The articles cut into pieces of `TEXT_WORDS` words, without repetitions."""
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
        sections = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(sections, dict) or not isinstance(sections.get("data"), dict):
        raise ConfigError(f"{path} has no section `data`, which says what the pool is made of")
    return sections


def data_config(section: Mapping[str, Any], files: Sequence[str] = ()) -> DataConfig:
    """The section `data` of a configuration, with further files as `NAME=PATH`.

    Raises:
        ConfigError: if a name or value is unknown or refused.
    """
    own_files = dict(section.get("files") or {})
    for text in files:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"--file {text}: write NAME=PATH")
        own_files[name] = path
    config: DataConfig = filled(DataConfig, {**section, "files": own_files}, "data")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the files to")
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME=PATH", help="your own corpus; repeat for more"
    )
    args = parser.parse_args(argv)
    console = Console()
    try:
        data_folder = write_data(data_config(read_sections(args.config)["data"], args.file), args.out)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"data         {data_folder.folder}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
