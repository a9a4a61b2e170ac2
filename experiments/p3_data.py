"""Pools of many real sources: prompt templates of P3, one of its data sets as the target.

Rows that share content (`experiments.p3_content`) are never in two of target, test set and pool. In the setting
`transfer` no template of the target's data set is in the pool; in the setting `needle` a few are, among many others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import ConfigError, DataError
from cads.runtime.atomic_files import whole_folder
from cads.seeding import derive
from cads.study.grid import content_key
from experiments.language_data import write_lines
from experiments.p3_content import content_groups, phrases

Placing = Literal["needle", "transfer"]
DATA_SETS = (
    "adversarial_qa", "ag_news", "amazon_polarity", "app_reviews", "cnn_dailymail", "common_gen", "commonsense_qa",
    "cosmos_qa", "dbpedia_14", "dream", "duorc", "gigaword", "glue_mrpc", "glue_qqp", "imdb", "kilt_tasks_hotpotqa",
    "multi_news", "paws_labeled_final", "qasc", "quarel", "quartz", "quoref", "ropes", "rotten_tomatoes", "samsum",
    "sciq", "social_i_qa", "trec", "wiki_bio", "wiki_hop", "wiki_qa", "wiqa", "xsum", "yelp_review_full",
)  # fmt: skip
"""The data sets; the name of a template begins with that of its data set."""
COLUMNS = ("id", "source", "prompt", "response")
SIDES = {"needle": (0.35, 0.35), "transfer": (0.5, 0.5)}
"""Shares of the target's data set that the target and the test set are drawn from; needles are drawn from the rest."""
LONGEST_TOKEN = 8
"""Characters a token, at most: texts with more are too long without being tokenised."""
MANIFEST = "data.json"
CHOICES = "choices"
"""The file of questions, and the field of the task and the evaluation that use it."""
TOKENIZER_ROWS = 10_000
"""Rows that the tokenizer is trained on."""


@dataclass
class P3Config:
    """Pools of P3's templates, and targets of its data sets."""

    setting: Placing
    """`transfer`: no template of the target's data set is in the pool; `needle`: `needles` of them are."""
    targets: list[str]
    """Data sets, each a target of its own."""
    templates: int = 48
    """Templates in the pool, drawn anew by each seed."""
    rows: int = 20
    """Rows of each template in the pool."""
    needles: int = 3
    """Templates of the target's data set among those of the pool, in the setting `needle`."""
    n_target: int = 120
    """Examples of the target; all rows of its side (`SIDES`) if they are fewer."""
    n_test: int = 300
    """Examples of the test set; all rows of its side if they are fewer."""
    files: dict[str, str] = field(default_factory=dict)
    """The file of P3, as `p3`: Parquet with columns id, source, prompt and response."""
    seed: int = 0
    """First word of all seeds."""

    def __post_init__(self) -> None:
        if self.setting not in get_args(Placing):
            raise ConfigError(f"setting = {self.setting!r}: choose from {list(get_args(Placing))}")
        if unknown := [name for name in self.targets if name not in DATA_SETS]:
            raise ConfigError(f"targets {unknown} are unknown: choose from {list(DATA_SETS)}")
        for name, least in (("templates", 2), ("rows", 1), ("needles", 1), ("n_target", 1), ("n_test", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least {least}")
        if self.needles >= self.templates:
            raise ConfigError(f"needles = {self.needles} of templates = {self.templates}: leave room for others")


@dataclass(frozen=True)
class Rows:
    """Rows of P3, as columns of length n.

    Attributes:
        ids, templates, prompts, responses: as in the file. data_sets: of the templates.
        left_out: numbers of rows left out by reason and data set.
    """

    ids: Sequence[str]
    templates: Sequence[str]
    prompts: Sequence[str]
    responses: Sequence[str]
    data_sets: Sequence[str]
    left_out: Mapping[str, Mapping[str, int]]

    def __len__(self) -> int:
        return len(self.ids)

    def kept(self, keep: np.ndarray, reason: str) -> Rows:
        """The rows where `keep` (bool, shape (n,)) is true; the others are counted under `reason`."""
        lost = Counter(name for name, stays in zip(self.data_sets, keep, strict=True) if not stays)

        def those(column: Sequence[str]) -> list[str]:
            return [value for value, stays in zip(column, keep, strict=True) if stays]

        return Rows(
            those(self.ids),
            those(self.templates),
            those(self.prompts),
            those(self.responses),
            those(self.data_sets),
            {**self.left_out, reason: dict(sorted(lost.items()))},
        )

    def records(self, positions: np.ndarray, *, source: bool = False) -> list[dict[str, str]]:
        """Rows as JSON values, with the template as their source or without."""
        columns = {"id": self.ids, "source": self.templates, "prompt": self.prompts, "response": self.responses}
        if not source:
            del columns["source"]
        return [{name: column[i] for name, column in columns.items()} for i in positions]


Asked = Callable[[Rows, np.ndarray], list[dict[str, Any]]]
"""Questions with `prompt`, `choices` and `answer` of rows at these positions."""


def data_set_of(template: str) -> str:
    """The data set of a template; a template of none is one of its own."""
    fitting = [name for name in DATA_SETS if template.startswith(f"{name}_")]
    return max(fitting, key=len, default=template)


def read_p3(path: Path) -> Rows:
    """All rows with an answer.

    Raises:
        DataError: if the file cannot be read, or lacks a column.
    """
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet with columns {list(COLUMNS)}: {error}") from error
    ids, templates, prompts, responses = (table[name].to_pylist() for name in COLUMNS)
    rows = Rows(ids, templates, prompts, responses, [data_set_of(name) for name in templates], {})
    return rows.kept(np.array([bool(text.strip()) for text in responses]), "empty answer")


def fitting(rows: Rows, tokenizer: Any, max_tokens: int) -> Rows:
    """The rows that are not cut at `max_tokens` tokens, prompt, answer and the token at the end together."""
    texts = [f"{prompt}\n{response}" for prompt, response in zip(rows.prompts, rows.responses, strict=True)]
    keep = np.array([len(text) <= LONGEST_TOKEN * max_tokens for text in texts])
    at = np.flatnonzero(keep)
    tokens = tokenizer([texts[i] for i in at], add_special_tokens=False, verbose=False)["input_ids"]
    keep[at] = [len(ids) < max_tokens for ids in tokens]
    return rows.kept(keep, "too long")


def tokenizer_records(rows: Rows, config: P3Config) -> list[dict[str, str]]:
    """Rows to train a tokenizer on: a random sample, without the data sets of targets."""
    others = np.flatnonzero([name not in config.targets for name in rows.data_sets])
    rng = np.random.default_rng(derive(config.seed, "tokenizer"))
    return rows.records(np.sort(rng.permutation(others)[:TOKENIZER_ROWS]), source=True)


class P3Draws:
    """Draws of target, test set and pool.

    Args:
        rows: all that may be drawn.
    """

    def __init__(self, rows: Rows, config: P3Config) -> None:
        self.rows, self.config = rows, config
        self.phrases = phrases(rows.prompts, rows.responses, rows.templates)
        self._data_sets, self._templates = np.array(rows.data_sets), np.array(rows.templates)

    def draw(self, target: str, seed: int) -> dict[str, np.ndarray]:
        """Positions of the rows of `target`, `test` and `pool`, int64 each; no content is in two of them.

        Raises:
            DataError: if the data set has too few rows or the pool too few templates.
        """
        config, rng = self.config, np.random.default_rng(derive(self.config.seed, "draw", target, seed))
        own = np.flatnonzero(self._data_sets == target)
        sides = np.zeros(len(own), dtype=np.int64)
        if len(own):
            sides = _sides(content_groups([self.phrases[i] for i in own]), SIDES[config.setting], rng)
        drawn, test = (
            rng.permutation(own[sides == side])[:n] for side, n in enumerate((config.n_target, config.n_test))
        )
        if len(drawn) < config.n_target / 2 or not len(test):
            raise DataError(f"{target} has {len(own)} rows that fit: too few for n_target = {config.n_target}")
        held = frozenset[str]().union(*(self.phrases[i] for i in np.concatenate([test, drawn])))
        free = np.array([held.isdisjoint(row) for row in self.phrases])
        free[own] = False
        needles = (
            self._pool(own[sides == len(SIDES[config.setting])], config.needles, rng)
            if config.setting == "needle"
            else []
        )
        others = self._pool(np.flatnonzero(free), config.templates - len(needles), rng)
        if config.setting == "needle" and not needles:
            raise DataError(f"no template of {target} has {config.rows} rows beside target and test set: lower rows")
        if len(needles) + len(others) < config.templates:
            raise DataError(f"{len(others)} templates have {config.rows} rows that fit: lower templates or rows")
        return {"target": drawn, "test": test, "pool": np.concatenate([*needles, *others])}

    def _pool(self, candidates: np.ndarray, n_templates: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Rows of templates drawn at random from those with enough rows; fewer templates if there are no more."""
        names = self._templates[candidates]
        enough = [str(name) for name, n in sorted(Counter(names).items()) if n >= self.config.rows]
        drawn: list[str] = rng.permutation(enough)[:n_templates].tolist() if enough else []
        return [rng.permutation(candidates[names == name])[: self.config.rows] for name in drawn]


def _sides(groups: np.ndarray, shares: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """The side of each row, int64, shape (n,): 0, 1, ... with about these shares of the rows, then the rest.

    All rows of a group are on one side.
    """
    sizes = np.bincount(groups)
    order = rng.permutation(len(sizes))
    middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(groups)
    side_of = np.empty(len(sizes), dtype=np.int64)
    side_of[order] = np.searchsorted(np.cumsum(shares), middles)
    return side_of[groups]


def write_draw(draws: P3Draws, target: str, seed: int, folder: Path, asked: Asked | None = None) -> dict[str, Any]:
    """Write `target`, `test` and `pool` as JSON lines, unless the folder has those of the same rows already.

    Args:
        asked: makes questions of the rows of the test set, which are written as `choices` if there are any.

    Returns:
        the fields of `LanguageConfig` for this data.
    """
    drawn = draws.draw(target, seed)
    files: dict[str, list[dict[str, Any]]] = {
        name: [*draws.rows.records(positions, source=name == "pool")] for name, positions in drawn.items()
    }
    if asked is not None and (questions := asked(draws.rows, drawn["test"])):
        files[CHOICES] = questions
    key = content_key([asdict(draws.config), target, seed, files])
    if not _has(folder, key):
        with whole_folder(folder) as partial:
            for name, records in files.items():
                write_lines(partial / f"{name}.jsonl", records)
            manifest = {"key": key, "rows": {n: len(r) for n, r in files.items()}, "left_out": draws.rows.left_out}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    columns = {"prompt": "prompt", "response": "response", "id": "id"}
    parts = {
        name: [{"name": name, "path": str(folder / f"{name}.jsonl"), "format": "prompt", "columns": columns}]
        for name in ("target", "test")
    }
    pool = {"name": "pool", "path": str(folder / "pool.jsonl"), "format": "prompt"}
    fields = {"pool": [{**pool, "columns": {**columns, "source": "source"}}], **parts}
    return {**fields, CHOICES: str(folder / f"{CHOICES}.jsonl")} if CHOICES in files else fields


def _has(folder: Path, key: str) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text("utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
