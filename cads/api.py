"""Plan, select, train and export, in one call each: the commands of the same names in Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import ConfigError
from cads.exports.export import AddedColumns, Form, write_export
from cads.monitor import Monitor
from cads.planning.methods import plan_methods
from cads.planning.plan import Plan
from cads.registry import build_selector
from cads.runtime.lock import held_by_first
from cads.runtime.run_folder import resumable_journal
from cads.runtime.signals import Interrupts
from cads.runtime.versions import versions
from cads.selection import Selection, Weights
from cads.selector import Selector
from cads.task import LEAK_TOLERANCE, Task
from cads.training import final
from cads.training.final import TrainedModel
from cads.training.speed import in_flops

log = logging.getLogger(__name__)

DEFAULT_METHOD = "cads"


def plan(
    task: Task,
    budget: Budget | str | float,
    *,
    method: str | Sequence[str] | None = None,
    count_selection: bool | None = None,
    flops_per_second: float | None = None,
) -> Plan:
    """The cost of each method by stage, in FLOPs, and the FLOPs that it leaves for training. Nothing is trained.

    Args:
        task: data, model and recipe.
        budget: FLOPs, or text such as "5 epochs", "3e6 tokens" or "30 minutes".
        method: one name or several; None for all that are installed.
        count_selection: whether the budget covers selection too; None: as a `Budget` says, or no.
        flops_per_second: of this machine, for the times; None to measure it.

    Returns:
        a plan, which prints by `plan.table()` and is written by `plan.to_json()`.

    Raises:
        BudgetError: if the budget does not parse, or does not buy one step.
        ConfigError: if a method is unknown, or does not apply to the task.
    """
    methods = [method] if isinstance(method, str) else method
    return plan_methods(task, _budget(budget, count_selection), methods, flops_per_second=flops_per_second)


def select(
    task: Task,
    budget: Budget | str | float,
    *,
    method: str | Selector = DEFAULT_METHOD,
    seed: int = 0,
    count_selection: bool | None = None,
    ledger: Ledger | None = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> Selection:
    """Choose what to train on.

    Args:
        task: data, model and recipe.
        budget: FLOPs for training the final model, or text such as "5 epochs", "3e6 tokens" or "30 minutes".
        method: name of an installed selector, or a selector.
        seed: of everything that is drawn.
        count_selection: whether the budget covers selection too; None: as a `Budget` says, or no.
        ledger: charged for what selection spends; None for a new one, which the Selection holds.
        monitor: shows progress and writes TensorBoard events; None for neither.
        options: of the selector, by name.

    Returns:
        a Selection: scores, probabilities and choice of each example, and the account of every FLOP.

    Raises:
        BudgetError: if the budget does not parse, or does not buy one step.
        ConfigError: if the method or an option is unknown or refused.
        DataError: if the data cannot be selected from.
    """
    selector = _selector(method, options)
    _say_copies(task)
    ledger = Ledger() if ledger is None else ledger
    parsed = in_flops(task, _budget(budget, count_selection), ledger)
    selection = selector.select(task, parsed, seed=seed, ledger=ledger, monitor=monitor)
    if monitor is not None:
        monitor.shares(selection.shares)
    return selection


def train(
    task: Task,
    budget: Budget | str | float,
    *,
    method: str | Selector = DEFAULT_METHOD,
    selection: Selection | None = None,
    seed: int = 0,
    count_selection: bool | None = None,
    monitor: Monitor | None = None,
    evaluations: Sequence[str] = (),
    save: Callable[[nn.Module], None] | None = None,
    checkpoints: Path | str | None = None,
    **options: Any,
) -> TrainedModel:
    """Train the final model within the budget, and measure it on the test set.

    Args:
        task: data, model and recipe.
        budget: FLOPs for training the final model, or text such as "5 epochs", "3e6 tokens" or "30 minutes".
        method: selects first, where no `selection` is given; as in `select`.
        selection: what to train on.
        seed: of everything that is drawn.
        count_selection: whether the budget covers selection too; None: as a `Budget` says, or no.
        monitor: shows progress and writes TensorBoard events; None for neither.
        evaluations: further ones of the task, such as "choices".
        save: is given the trained model before it is tested, to write it.
        checkpoints: folder for the state of the run, written every minute. The same call, given again after the process
            has ended, goes on from there, to the same bits. None: a run that is stopped begins anew.
        options: of the selector, by name.

    Returns:
        the model, its metrics on the test set, and the ledger of selection, training and evaluation.

    Raises:
        BudgetError: if the budget does not parse, or nothing is left for training.
        ConfigError: if the method, an option or an evaluation is unknown; or if options are given beside a selection.
        SelectionError: if the selection was made from another pool.
        CheckpointError: if `checkpoints` holds another run, such as one on other data.
    """
    if checkpoints is not None:
        settings = {
            "budget": str(_budget(budget, count_selection)),
            "selection": None if selection is None else selection.content_hash,
            "seed": seed,
            "evaluations": list(evaluations),
            **_method_settings(method, options),
        }
        with _resumable(Path(checkpoints), task, settings):
            return train(
                task,
                budget,
                method=method,
                selection=selection,
                seed=seed,
                count_selection=count_selection,
                monitor=monitor,
                evaluations=evaluations,
                save=save,
                **options,
            )
    if selection is not None:
        _say_copies(task)
    ledger = Ledger()
    parsed = in_flops(task, _budget(budget, count_selection), ledger)
    given = selection
    if selection is None:
        selection = select(task, parsed, method=method, seed=seed, ledger=ledger, monitor=monitor, **options)
    elif options:
        raise ConfigError(f"options {sorted(options)} are those of a selector, and a selection is given: leave one out")
    trained = final.train(task, selection, parsed, seed=seed, monitor=monitor, evaluations=evaluations, save=save)
    if given is not None:
        trained.ledger.merge(ledger)
    return trained


def export(
    selection: Selection | Path | str,
    output: Path | str,
    *,
    to: Form = "jsonl",
    files: Sequence[Path | str] = (),
    weights: Weights | None = None,
    seed: int = 0,
    weight_column: str | None = "weight",
    source_column: str | None = "source",
    overwrite: bool = False,
    chat: bool = True,
    private: bool = True,
    token: str | None = None,
) -> int:
    """Write the chosen rows as they stand in the files of the pool, a list of the chosen images of a folder, or what a
    trainer of language models reads.

    Values are those of the files; of CSV files they are text. Rows come in the order of the files and of their rows.
    The output appears only when it is complete.

    For a trainer (`docs/export.md`), `output` is a folder: a JSON lines file for each source, in a random order, whose
    rows are conversations, prompts with completions, or text; and the configuration with which the trainer mixes them.

    Args:
        selection: a Selection, or the folder that holds one.
        output: file to write; for a trainer a folder; for the hub the name of the data set, USER/NAME.
        to: "jsonl" or "parquet" for rows; "files" for a list of images, one path a line, relative to the folder of the
            pool; "llamafactory", "axolotl" or "trl" for a trainer; "hub" to upload rows, Selection and a data card.
        files: those of the pool, in any order, where they have moved, or those of them whose rows are wanted; they are
            recognised by the contents of the columns that examples are written from. None: where the pool was read
            from. For a list of images: the folder of the pool, in which they are looked for.
        weights: "column" adds the `weights` of the Selection as a column, whose sum over all files of the pool is 1 (to
            a list of images: after a tab, if they are not equal). "resample" repeats rows in proportion to how often
            training draws them, as many in all as are selected; a repeated row follows itself. None: "column", and for
            trainers, which read no weights, "resample" if weights differ. The shares of sources are in the
            configuration of LLaMA-Factory and TRL, and in the number of rows for axolotl, which takes none.
        seed: of the draws of "resample", and of the order of rows for trainers.
        weight_column: its name; None: no such column.
        source_column: name of the column of sources, if the pool had any; None: no such column.
        overwrite: replace `output` if it exists.
        chat: for trainers: write prompts and responses as conversations, for models with a chat template; if not, as
            text, with a line break between them.
        private: for the hub: whether a data set that is made is private.
        token: for the hub; None: that of `hf auth login`.

    Returns:
        the number of rows or lines written.

    Raises:
        SelectionError: if the pool was not read from files, they are missing or changed, a column that would be added
            has another meaning there, or nothing of the pool is selected.
        DataError: if a value has no form in the format.
        ConfigError: if `output` exists, a setting is unknown, the trainer cannot take the rows, or the hub refuses.
    """
    return write_export(
        selection,
        output,
        to,
        [Path(file) for file in files],
        weights=weights,
        seed=seed,
        added=AddedColumns(weight_column, source_column),
        overwrite=overwrite,
        chat=chat,
        private=private,
        token=token,
    )


@contextmanager
def _resumable(folder: Path, task: Task, settings: Mapping[str, Any]) -> Iterator[None]:
    """Write the state of what runs in the block to `folder`, and go on from what is there."""
    interrupts = Interrupts()
    identity = {"settings": settings, "recipe": task.recipe.result_fields(), "data": task.identity}
    with ExitStack() as stack:
        stack.enter_context(held_by_first(folder))
        stack.enter_context(interrupts.listen())
        journal = resumable_journal("train", folder / "train", identity | {"versions": versions()}, None, interrupts)
        stack.enter_context(journal)
        yield


def _method_settings(method: str | Selector, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method and its options, as JSON values."""
    if not isinstance(method, str):
        options = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    name = method if isinstance(method, str) else type(method).__qualname__
    plain = (str, int, float, bool, type(None))
    return {"method": name, "options": {k: v if isinstance(v, plain) else str(v) for k, v in options.items()}}


def _say_copies(task: Task) -> None:
    """Warn if more of target or test set than `LEAK_TOLERANCE` are in the pool; the commands refuse that."""
    for name, ids in task.copies().items():
        n = len(task.target if name == task.target.name else task.test)
        if len(ids) > LEAK_TOLERANCE * n:
            log.warning(
                "%d of %d %s examples have exact copies in the pool, such as %s: remove them from one side, as "
                "task.check() asks",
                *(len(ids), n, name, ids[:3]),
            )


def _selector(method: str | Selector, options: dict[str, Any]) -> Selector:
    if isinstance(method, str):
        return build_selector(method, options)
    if options:
        raise ConfigError(f"options {sorted(options)} are given beside a selector that is made: make it with them")
    return method


def _budget(budget: Budget | str | float, count_selection: bool | None) -> Budget:
    if not isinstance(budget, Budget):
        return Budget.parse(budget, count_selection=bool(count_selection))
    return budget if count_selection is None else replace(budget, count_selection=count_selection)
