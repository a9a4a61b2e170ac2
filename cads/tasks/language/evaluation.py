"""What a trained language model can do: multiple choice, exact match, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import scoring_batches
from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted
from cads.scoring.pool_scores import evaluating
from cads.task import Metrics
from cads.tasks.language.encoding import Encoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.tokens import Tokens, tokens_of

LM_EVAL = "lm_eval:"
NAMES = ("choices", "exact_match", f"{LM_EVAL}TASKS")
GENERATED_TOGETHER = 16
"""Prompts of one length that are continued at a time."""


class TextGenerator(Protocol):
    """What an evaluation asks of a language task."""

    tokenizer: Any
    test: Pool
    settings: LanguageSettings

    @property
    def pad(self) -> int:
        """The token id of padding."""
        ...

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer."""
        ...

    @property
    def longest(self) -> int:
        """Positions that no example exceeds."""
        ...

    def token_losses(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the answer tokens in nats, and where they count; (B, A) each."""
        ...


def check_evaluation(task: TextGenerator, name: str) -> None:
    """Refuse what cannot be evaluated; nothing is computed.

    Raises:
        ConfigError: if the name is unknown, or a file, pattern or library is missing.
        DataError: if the file of choices is damaged.
    """
    if name == "choices":
        load_choices(task)
    elif name == "exact_match":
        answer_pattern(task)
    elif name.startswith(LM_EVAL) and name != LM_EVAL:
        if find_spec("lm_eval") is None:
            raise ConfigError(f"--eval {name} needs lm-evaluation-harness: pip install 'cads-select[lm-eval]'")
    else:
        raise ConfigError(f"evaluation {name!r} is unknown: choose from {', '.join(NAMES)}")


def evaluate(task: TextGenerator, model: nn.Module, name: str) -> Metrics:
    """The metrics of one evaluation; see `check_evaluation`."""
    check_evaluation(task, name)
    if name == "choices":
        return choices(task, model)
    return exact_match(task, model) if name == "exact_match" else harness(task, model, name.removeprefix(LM_EVAL))


@dataclass(frozen=True)
class Choices:
    """Questions with several answers each.

    Attributes:
        pool: every answer as an example of its own.
        question: the question of each, shape (N,). right: whether it is the right one, bool, shape (N,).
        characters: length of each answer, shape (N,).
    """

    pool: Pool
    question: np.ndarray
    right: np.ndarray
    characters: np.ndarray


def load_choices(task: TextGenerator) -> Choices:
    """The file of choices as examples of the task.

    Raises:
        ConfigError: if none is named.
        DataError: if it cannot be read, or an entry is no question with choices and an answer.
    """
    if task.settings.choices is None:
        raise ConfigError("--eval choices needs task.choices: a file of JSON lines with prompt, choices and answer")
    path = Path(task.settings.choices)
    prompts, answers, question, right = [], [], [], []
    for number, entry in enumerate(_lines(path)):
        given, answer = entry.get("choices"), entry.get("answer")
        if not (isinstance(given, list) and len(given) > 1 and isinstance(answer, int) and 0 <= answer < len(given)):
            raise DataError(
                f"{path}, entry {number}: it needs choices (at least two) and an answer between 0 and their number"
            )
        prompts += [entry.get("prompt")] * len(given)
        answers += given
        question += [number] * len(given)
        right += [i == answer for i in range(len(given))]
    if not question:
        raise DataError(f"{path} is empty: it needs at least one question")
    ids = pa.array([f"choice-{i}" for i in range(len(question))], pa.string())
    try:
        table = pa.table({"prompt": pa.array(prompts, pa.string()), "response": pa.array(answers, pa.string())})
    except pa.ArrowException as error:
        raise DataError(f"{path}: prompts and choices must be text ({error})") from error
    settings = task.settings
    renderer = Renderer(task.tokenizer, settings.separator, settings.chat)
    tokens, _ = Encoder(task.tokenizer, renderer, task.longest).encode(Rows(table, "prompt", ids, "choices"))
    lengths = np.array([len(a) for a in answers])
    return Choices(Pool(ids, tokens, name="choices"), np.array(question), np.array(right), lengths)


def choices(task: TextGenerator, model: nn.Module) -> Metrics:
    """Accuracy of the answer with the highest log-likelihood, and with the highest one a character (0 to 1)."""
    asked = load_choices(task)
    device = next(model.parameters()).device
    likelihood = np.zeros(len(asked.pool))
    with evaluating(model):
        for rows in scoring_batches(asked.pool):
            losses, _ = task.token_losses(model, asked.pool.batch(rows).to(device))
            likelihood[rows] = -losses.double().sum(dim=1).cpu().numpy()
    return {
        "choices": _accuracy(likelihood, asked),
        "choices_per_character": _accuracy(likelihood / asked.characters, asked),
    }


def _accuracy(score: np.ndarray, asked: Choices) -> float:
    # By question, then from the best answer to the worst; ties go to the one that stands first.
    order = np.lexsort((np.arange(len(score)), -score, asked.question))
    first = np.unique(asked.question[order], return_index=True)[1]
    return float(asked.right[order[first]].mean())


def answer_pattern(task: TextGenerator) -> re.Pattern[str] | None:
    """What exact match compares.

    Raises:
        ConfigError: if it is no regular expression.
    """
    if task.settings.answer_pattern is None:
        return None
    try:
        return re.compile(task.settings.answer_pattern)
    except re.error as error:
        raise ConfigError(
            f"answer_pattern = {task.settings.answer_pattern!r} is no regular expression: {error}"
        ) from error


def exact_match(task: TextGenerator, model: nn.Module) -> Metrics:
    """Share of the test examples whose first answer greedy generation writes exactly (0 to 1)."""
    tokens, pattern = tokens_of(task.test), answer_pattern(task)
    prompts, answers = first_answers(tokens)
    hits = 0
    with evaluating(model):
        for rows in _of_one_length(prompts):
            wanted = task.tokenizer.batch_decode([answers[r] for r in rows], skip_special_tokens=True)
            written = generate(task, model, np.stack([prompts[r] for r in rows]))
            hits += sum(extract(w, pattern) == extract(g, pattern) for w, g in zip(wanted, written, strict=True))
    return {"exact_match": hits / len(tokens)}


def first_answers(tokens: Tokens) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What stands before the first answer of each sequence, and that answer; plain text has one token before it."""
    prompts, answers = [], []
    for begin, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        learned = np.array(tokens.learned[begin:end])
        learned[0] = False
        first = int(learned.argmax())
        after = np.flatnonzero(~learned[first:])
        until = first + int(after[0]) if len(after) else len(learned)
        prompts.append(tokens.ids[begin : begin + first])
        answers.append(tokens.ids[begin + first : begin + until])
    return prompts, answers


def generate(task: TextGenerator, model: Any, prompts: np.ndarray) -> list[str]:
    """The greedy continuation of prompts of one length (shape (B, T)), up to the token that ends an answer."""
    ids = torch.from_numpy(prompts.astype(np.int64)).to(next(model.parameters()).device)
    room = task.longest - ids.shape[1]
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(task.settings.max_new_tokens, room)),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=task.pad,
        eos_token_id=task.ends,
    )
    found: list[str] = task.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return found


def extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """What is compared: all of the text, or the last group of the last match of the pattern; None without a match."""
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    return (matches[-1][pattern.groups] or "").strip() if matches else None


def _of_one_length(prompts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Positions of prompts of equal length, at most `GENERATED_TOGETHER` at a time."""
    sizes = np.array([len(p) for p in prompts])
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        yield from np.array_split(rows, -(-len(rows) // GENERATED_TOGETHER))


def harness(task: TextGenerator, model: nn.Module, names: str) -> Metrics:
    """Metrics of lm-evaluation-harness: `task/metric` for each task in `names` (names or YAML files, with commas).

    Raises:
        ConfigError: if the harness does not know a task, or fails.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wanted = [n.strip() for n in names.split(",") if n.strip()]
    folders = sorted({str(Path(n).resolve().parent) for n in wanted if n.endswith((".yaml", ".yml"))})
    stems = [Path(n).stem for n in wanted if n.endswith((".yaml", ".yml"))]
    tasks = [Path(n).stem if n.endswith((".yaml", ".yml")) else n for n in wanted]
    try:
        wrapped = HFLM(pretrained=model, tokenizer=task.tokenizer, batch_size=1, max_length=task.longest)
        # Reading the harness's own tasks takes half a minute: only where one of them is asked for.
        manager = TaskManager(include_path=folders or None, include_defaults=len(folders) == 0 or tasks != stems)
        found: Any = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    except Interrupted:
        raise
    except Exception as error:  # the harness and its data sets raise many kinds
        raise ConfigError(f"lm-evaluation-harness on {tasks}: {type(error).__name__}: {error}") from error
    return {
        f"{name}/{metric.split(',')[0]}": float(value)
        for name, results in found["results"].items()
        for metric, value in results.items()
        # A metric is called `name,filter`; what has no filter is no metric.
        if "," in metric and "stderr" not in metric and isinstance(value, int | float)
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open() as file:
            for line in file:
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise DataError(f"{path} must hold one object a line, not {type(entry).__name__}")
                    yield entry
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
