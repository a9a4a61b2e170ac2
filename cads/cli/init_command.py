"""The command `cads init`: look at files or folders, say what they are, and write a commented configuration."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from cads.cli.config import CommandConfig, read, read_init
from cads.cli.data_summary import first_examples, split_summary, task_summary
from cads.cli.init_images import image_task
from cads.cli.init_templates import FORMATS, ROWS, SMALL_MODEL, Draft, digits_draft, image_draft, text_draft
from cads.cli.init_texts import TextFiles, read_texts
from cads.cli.recognition import recognise
from cads.cli.settings import CheckSettings
from cads.data.token_batches import lengths
from cads.errors import ConfigError, DataError
from cads.runtime.atomic_files import whole_file
from cads.task import Task
from cads.tasks.language.columns import UnknownColumnsError
from cads.tasks.language.loading import open_tokenizer
from cads.tasks.language.models import LanguageModels

MAX_FILES = 20
"""Files that are listed."""


def init(argv: list[str]) -> None:
    """Say what files or folders are, and write a configuration for them; or write a template.

    Raises:
        ConfigError: if the output exists, or files and template do not go together.
        DataError: if the data cannot be read; or if it cannot be trained on as it is, after the file was written.
    """
    values = read_init(argv)
    console, output = Console(), Path(values.output)
    if output.exists() and not values.overwrite:
        raise ConfigError(f"{output} exists: name another file (--output), or give --overwrite true")
    grid, problem = values.template == "grid", None
    paths = [*values.paths, *values.pool]
    if not paths and (values.target or values.test):
        raise ConfigError("a target or a test set is given, and no pool: give its files, or its folder, first")
    if paths:
        draft = _draft(values, paths, console)
        draft.head.append(f"Written by: cads init {' '.join(map(shlex.quote, argv))}")
        problem = _look(draft, console, grid=grid)
    else:
        draft = _template(values)
    text = "compare" if grid else "train"
    draft.head += [
        f"Look at the data: cads check {output}. Run: cads {text} {output}. Prices: cads plan {output}."
        if not grid
        else f"Look at the data: cads check {output}. Run: cads compare {output}. Prices: add --dry-run.",
        f"All fields: cads {text} --kind {draft.kind} --help",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    whole_file(output, draft.text(grid=grid))
    if problem is not None:
        raise DataError(f"{output} is written, and `cads check` refuses it until this is mended: {problem}")
    _say(console, [f"Written: {output}. Next: cads check {output}, then cads {text} {output}"])


def _template(values: Namespace) -> Draft:
    """A template without data.

    Raises:
        ConfigError: if neither data nor template is named, or a model for images.
    """
    if values.template is None:
        raise ConfigError(
            f"what is there to look at? Give files or folders (cads init chats.jsonl), or a template: --template "
            f"{', '.join([*FORMATS, 'images', 'grid'])}"
        )
    if values.template in ("images", "grid"):
        draft = digits_draft(grid=values.template == "grid")
        if values.model is not None:
            draft.task["model"] = values.model
        return draft
    parts = {"pool": [{"path": "pool.jsonl"}], "target": [{"path": "val.jsonl"}], "test": [{"path": "test.jsonl"}]}
    draft = text_draft(values.template, parts, values.model, pretrained=True, pad_token=None, n_pool=10**6)
    draft.head.append("A template: put your files into pool, target and test, and name your model.")
    return draft


def _draft(values: Namespace, paths: list[str], console: Console) -> Draft:
    """The configuration for files or folders.

    Raises:
        ConfigError: if the template is for other data.
    """
    inputs = recognise(paths, values.target, values.test)
    if any(inputs.images.values()):
        _check_template(values.template, "images", "images")
        with _quiet():
            fields, remarks = image_task(inputs)
        if values.model is not None:
            fields["model"] = values.model
        _say(console, inputs.said)
        return image_draft(fields, remarks)
    try:
        with _quiet():
            files = read_texts(inputs)
    except UnknownColumnsError as error:
        raise DataError(f"{error}; `cads init --template prompts` writes a configuration to put this into") from error
    template = next(name for name, form in FORMATS.items() if form == files.format)
    _check_template(values.template, template, f"{files.format} (a row: {ROWS[template]})")
    console.print(_files_table(files))
    unused = [(file.entry["path"], ", ".join(file.rows.unused)) for file in files.files if file.rows.unused]
    _say(console, [*inputs.said, *files.said, *(f"{path}: columns not used: {names}" for path, names in unused)])
    n_pool = sum(len(file.rows) for file in files.files if file.part == "pool")
    model = values.model or SMALL_MODEL
    pretrained, pad_token, unread = True, None, ""
    try:
        pretrained = not LanguageModels(model).random
        pad_token = _missing_pad(model)
    except ConfigError as error:
        unread = str(error)
    draft = text_draft(template, files.task(), values.model, pretrained=pretrained, pad_token=pad_token, n_pool=n_pool)
    draft.unread = unread
    return draft


def _missing_pad(model: str) -> str | None:
    """The token to pad with, for a model whose tokenizer names none; else None.

    Raises:
        ConfigError: if the tokenizer cannot be loaded.
    """
    tokenizer = open_tokenizer(model, trust_remote_code=False)
    if tokenizer.pad_token_id is not None:
        return None
    return str(tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0))


def _check_template(given: str | None, found: str, words: str) -> None:
    """Refuse a template for data of another kind."""
    if given not in (None, "grid", found):
        raise ConfigError(f"--template {given}: the data is {words}, which is --template {found}; leave it out")


def _look(draft: Draft, console: Console, *, grid: bool) -> str | None:
    """Print what the data of a configuration is, as `cads check` does; settings that it needs are added to `draft`.

    Returns:
        why `cads check` would refuse the data; None if it would not.
    """
    if draft.unread:
        with _quiet():
            split = _parsed(draft, grid=grid).objects.task.split()
        split_summary(split, "rows").print(console)
        _say(console, [f"Lengths are in characters, and `cads check` says more once it can be loaded: {draft.unread}"])
        return None
    try:
        task = _build(draft, grid=grid)
    except (ConfigError, DataError) as error:
        return str(error)
    task_summary(task).print(console)
    _say(console, first_examples(task))
    own = lengths(task.pool)
    if own is not None:
        said = f"the longest of the pool has {own.max():,}, half of them at most {np.median(own):,.0f}"
        draft.comments["task.max_tokens"] += f" Now {said}."
    try:
        task.check()
    except DataError as error:
        return str(error)
    return None


def _build(draft: Draft, *, grid: bool) -> Task:
    """The task; with `drop: true` if some of its examples cannot be used, which is then set in `draft`."""
    try:
        return _built(draft, grid=grid)
    except DataError:
        draft.task["drop"] = True
        draft.comments["task.drop"] = "Some examples cannot be used: they are left out, and counted in data.json."
        try:
            # What was drawn was said before.
            with _quiet("cads.tasks.language.splits"):
                return _built(draft, grid=grid)
        except (ConfigError, DataError):
            del draft.task["drop"]
        raise


def _built(draft: Draft, *, grid: bool) -> Task:
    config = _parsed(draft, grid=grid)
    # How files are read was said before.
    with _quiet("cads.tasks.language.rows"):
        task: Task = config.objects.task.build(config.objects.train)
    return task


def _parsed(draft: Draft, *, grid: bool) -> CommandConfig:
    """The configuration as `cads check` reads it from the file that will be written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(draft.text(grid=grid))
        return read(CheckSettings, [str(path)])


def _files_table(files: TextFiles) -> Table:
    """Each file, what it is, and how its rows are read."""
    table = Table(title="files", title_justify="left")
    for column in ("file", "part", "rows", "read as"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for file in files.files[:MAX_FILES]:
        table.add_row(str(file.entry["path"]), file.part, f"{len(file.rows):,}", file.read_as)
    if len(files.files) > MAX_FILES:
        table.add_row(f"and {len(files.files) - MAX_FILES} more", "", "", "")
    return table


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _quiet(name: str = "cads.tasks") -> Iterator[None]:
    """Without the messages of loaders, which the command says itself, or which come when the task is built."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
