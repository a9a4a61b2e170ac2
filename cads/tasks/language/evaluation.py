"""Evaluations of a language model: multiple choice, exact match, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import errno
import hashlib
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
from cads.errors import CadsError, ConfigError, DataError
from cads.scoring.pool_scores import evaluating
from cads.task import Metrics, StepwiseEvaluation
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.tokens import Tokens, tokens_of

LM_EVAL = "lm_eval:"
NAMES = ("choices", "exact_match", f"{LM_EVAL}TASKS")
HARNESS_FILES = (".yaml", ".yml")
"""Ends of the names of files that define tasks of lm-evaluation-harness."""
GENERATED_TOGETHER = 16
"""Most prompts that are continued at a time; all of them have one length."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Numbers of the errors of a disk that is full, broken or read-only."""


class TextGenerator(Protocol):
    """The interface of a language task that evaluations use."""

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
    def max_length(self) -> int:
        """Most tokens of an example."""
        ...

    def token_losses(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the answer tokens in nats, and a mask of the real ones; (B, A) each."""
        ...


def check_evaluation(task: TextGenerator, name: str) -> None:
    """Refuse evaluations that cannot run; nothing is computed.

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
            raise ConfigError(f"--eval {name} needs lm-evaluation-harness: pip install 'cads-select[evaluation]'")
    else:
        raise ConfigError(f"evaluation {name!r} is unknown: choose from {', '.join(NAMES)}")


def evaluate(task: TextGenerator, model: nn.Module, name: str) -> Metrics:
    """The metrics of one evaluation; see `check_evaluation`."""
    check_evaluation(task, name)
    stepwise = stepwise_evaluation(task, model, name)
    return harness(task, model, name.removeprefix(LM_EVAL)) if stepwise is None else stepwise.run()


def stepwise_evaluation(task: TextGenerator, model: nn.Module, name: str) -> StepwiseEvaluation | None:
    """The steps of `choices` and of `exact_match`; None for lm-evaluation-harness, which runs in one piece."""
    if name == "choices":
        return choices(task, model)
    return exact_match(task, model) if name == "exact_match" else None


def evaluation_settings(task: TextGenerator, name: str) -> dict[str, Any]:
    """What the result of an evaluation depends on beside data and model: contents of files, and settings.

    Raises:
        DataError: if a file cannot be read.
    """
    if name == "choices":
        return {"choices": None if task.settings.choices is None else _file_digest(Path(task.settings.choices))}
    if name == "exact_match":
        return {field: getattr(task.settings, field) for field in ("answer_pattern", "max_new_tokens")}
    files = [n.strip() for n in name.removeprefix(LM_EVAL).split(",") if n.strip().endswith(HARNESS_FILES)]
    return {"files": {n: _file_digest(Path(n)) for n in files if Path(n).is_file()}}


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Choices:
    """Questions with several answers each.

    Attributes:
        pool: an example for each answer.
        question: the number of each answer's question, shape (N,). right: whether it is the right answer, bool,
            shape (N,).
        characters: length of each answer, shape (N,).
    """

    pool: Pool
    question: np.ndarray
    right: np.ndarray
    characters: np.ndarray


def load_choices(task: TextGenerator) -> Choices:
    """The file of choices as examples of the task.

    Raises:
        ConfigError: if no file is named.
        DataError: if the file cannot be read, or an entry is not a question with choices and an answer.
    """
    if task.settings.choices is None:
        raise ConfigError("--eval choices needs task.choices: a file of JSON lines with prompt, choices and answer")
    path = Path(task.settings.choices)
    prompts, answers, question, right = [], [], [], []
    for number, entry in enumerate(_lines(path)):
        options, answer = entry.get("choices"), entry.get("answer")
        if not (
            isinstance(options, list) and len(options) > 1 and isinstance(answer, int) and 0 <= answer < len(options)
        ):
            raise DataError(
                f"{path}, entry {number}: it needs choices (at least two) and an answer between 0 and their number"
            )
        prompts += [entry.get("prompt")] * len(options)
        answers += options
        question += [number] * len(options)
        right += [i == answer for i in range(len(options))]
    if not question:
        raise DataError(f"{path} is empty: it needs at least one question")
    ids = pa.array([f"choice-{i}" for i in range(len(question))], pa.string())
    try:
        table = pa.table({"prompt": pa.array(prompts, pa.string()), "response": pa.array(answers, pa.string())})
    except pa.ArrowException as error:
        raise DataError(f"{path}: prompts and choices must be text ({error})") from error
    settings = task.settings
    renderer = Renderer(task.tokenizer, settings.separator, settings.chat)
    tokens, _ = TokenEncoder(task.tokenizer, renderer, task.max_length).encode(Rows(table, "prompt", ids, "choices"))
    lengths = np.array([len(a) for a in answers])
    return Choices(Pool(ids, tokens, name="choices"), np.array(question), np.array(right), lengths)


def choices(task: TextGenerator, model: nn.Module) -> StepwiseEvaluation:
    """Accuracy of the answer of highest log-likelihood, and of highest log-likelihood per character (0 to 1).

    The values of the steps are log-likelihoods of answers, in nats.
    """
    questions = load_choices(task)
    batches = scoring_batches(questions.pool)

    def step(number: int) -> np.ndarray:
        device = next(model.parameters()).device
        with evaluating(model):
            losses, _ = task.token_losses(model, questions.pool.batch(batches[number]).to(device))
            return np.asarray(-losses.cpu().double().sum(dim=1).numpy())

    def metrics(values: np.ndarray) -> Metrics:
        likelihood = np.empty(len(questions.pool))
        likelihood[np.concatenate(batches)] = values
        return {
            "choices": _accuracy(likelihood, questions),
            "choices_per_character": _accuracy(likelihood / questions.characters, questions),
        }

    return StepwiseEvaluation([len(rows) for rows in batches], step, metrics)


def _accuracy(score: np.ndarray, questions: Choices) -> float:
    # Sorted by question, then from the best answer to the worst. Of equal answers the first in the file wins.
    order = np.lexsort((np.arange(len(score)), -score, questions.question))
    first = np.unique(questions.question[order], return_index=True)[1]
    return float(questions.right[order[first]].mean())


def answer_pattern(task: TextGenerator) -> re.Pattern[str] | None:
    """The pattern whose last match is what exact match compares, or None for all text.

    Raises:
        ConfigError: if `answer_pattern` is not a regular expression.
    """
    if task.settings.answer_pattern is None:
        return None
    try:
        return re.compile(task.settings.answer_pattern)
    except re.error as error:
        raise ConfigError(
            f"answer_pattern = {task.settings.answer_pattern!r} is no regular expression: {error}"
        ) from error


def exact_match(task: TextGenerator, model: nn.Module) -> StepwiseEvaluation:
    """Share of the test examples whose first answer is generated exactly by greedy decoding (0 to 1).

    The values of the steps are 1 for an example that is, and 0 for others.
    """
    tokens, pattern = tokens_of(task.test), answer_pattern(task)
    prompts, answers = first_answers(tokens)
    batches = list(_of_one_length(prompts))

    def step(number: int) -> np.ndarray:
        rows = batches[number]
        expected = task.tokenizer.batch_decode([answers[r] for r in rows], skip_special_tokens=True)
        with evaluating(model):
            generated = generate(task, model, np.stack([prompts[r] for r in rows]))
        pairs = zip(expected, generated, strict=True)
        return np.array([extract(e, pattern) == extract(g, pattern) for e, g in pairs], dtype=np.float64)

    return StepwiseEvaluation(
        [len(rows) for rows in batches], step, lambda hits: {"exact_match": float(hits.sum()) / len(tokens)}
    )


def first_answers(tokens: Tokens) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The prompt before the first answer of each sequence, and that answer; the prompt of plain text is one token."""
    prompts, answers = [], []
    for begin, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        loss_mask = np.array(tokens.loss_mask[begin:end])
        loss_mask[0] = False
        first = int(loss_mask.argmax())
        gaps = np.flatnonzero(~loss_mask[first:])
        end_of_answer = first + int(gaps[0]) if len(gaps) else len(loss_mask)
        prompts.append(tokens.ids[begin : begin + first])
        answers.append(tokens.ids[begin + first : begin + end_of_answer])
    return prompts, answers


def generate(task: TextGenerator, model: Any, prompts: np.ndarray) -> list[str]:
    """Greedy continuations of prompts of one length, shape (B, T), up to a token that ends an answer."""
    ids = torch.from_numpy(prompts.astype(np.int64)).to(next(model.parameters()).device)
    free_positions = task.max_length - ids.shape[1]
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(task.settings.max_new_tokens, free_positions)),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=task.pad,
        eos_token_id=task.ends,
    )
    texts: list[str] = task.tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The compared part: all of the text, or the last group of the pattern's last match; None without a match."""
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
        OSError: if a disk is full or broken.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    requested = [n.strip() for n in names.split(",") if n.strip()]
    folders = sorted({str(Path(n).resolve().parent) for n in requested if n.endswith(HARNESS_FILES)})
    stems = [Path(n).stem for n in requested if n.endswith(HARNESS_FILES)]
    tasks = [Path(n).stem if n.endswith(HARNESS_FILES) else n for n in requested]
    try:
        wrapped = HFLM(pretrained=model, tokenizer=task.tokenizer, batch_size=1, max_length=task.max_length)
        # The harness takes half a minute to read its own tasks, so they are read only if one of them is requested.
        manager = TaskManager(include_path=folders or None, include_defaults=len(folders) == 0 or tasks != stems)
        report: Any = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    except (CadsError, MemoryError, torch.OutOfMemoryError):  # a stop or a checkpoint, within a forward pass
        raise
    except Exception as error:  # the harness and its data sets raise many types of exception
        if (of_disk := _disk_error(error)) is not None:
            raise of_disk from None
        raise ConfigError(f"lm-evaluation-harness on {tasks}: {type(error).__name__}: {error}") from error
    return {
        f"{name}/{metric.split(',')[0]}": float(value)
        for name, results in report["results"].items()
        for metric, value in results.items()
        # Metrics are named `name,filter`; entries without a filter are no metrics.
        if "," in metric and "stderr" not in metric and isinstance(value, int | float)
    }


def _disk_error(error: BaseException) -> OSError | None:
    """The error of a disk that is, or caused, this one: `datasets` raises errors of its own in its place."""
    cause: BaseException | None = error
    while cause is not None:
        # Errors of connections are OSErrors too.
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


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
