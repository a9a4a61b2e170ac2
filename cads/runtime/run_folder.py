"""The folder of a long command: one writer, a record of the run, and a journal to resume from."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cads.errors import CheckpointError
from cads.runtime.atomic_files import remove_folder, whole_file
from cads.runtime.checkpoint import CheckpointConfig, Checkpoints, OtherRunError, differences, load_json
from cads.runtime.journal import Journal
from cads.runtime.journal_store import FINISHED, UNDERWAY
from cads.runtime.lock import held_by_first
from cads.runtime.processes import active_group
from cads.runtime.signals import Interrupts

log = logging.getLogger(__name__)

RECORD_VERSION = 1


@contextmanager
def resumable_journal(
    label: str,
    folder: Path,
    identity: Mapping[str, Any],
    config: CheckpointConfig | None = None,
    interrupts: Interrupts | None = None,
) -> Iterator[Journal]:
    """A journal that is open in the block; if it resumes a run, a warning says so of `label`.

    Other arguments, raises: as `Journal`.
    """
    journal = Journal(folder, identity, config, interrupts)
    if journal.resumed and active_group().first:
        log.warning("%s: going on from the checkpoints in %s", label, folder)
    with journal.open():
        yield journal


class RunFolder:
    """One command at work in its folder; the same command, given again, resumes where it ended.

    Of several processes the first alone reads and writes here.

    Args:
        folder: of the run; made if need be.
        command: "select" or "train".
        settings: all that the result depends on, as JSON values.
        product: files and folders in `folder` that the command has written when it has finished.
        config: how often checkpoints are written.
        overwrite: begin anew, whatever is there.
        neutral: settings on which the work does not depend, by dotted name, each with the value under which it stands
            in the record, whatever it is.
        form: settings on which the product depends, and the work before it does not.

    Raises:
        LockedError: if another process works in the folder.
        CheckpointError: if the folder holds the result or the checkpoints of a run with other settings.
    """

    def __init__(
        self,
        folder: Path | str,
        command: str,
        settings: Mapping[str, Any],
        product: tuple[str, ...],
        config: CheckpointConfig | None = None,
        *,
        overwrite: bool = False,
        neutral: Mapping[str, Any] | None = None,
        form: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.command = command
        self._neutral = dict(neutral or {})
        self._form: dict[str, Any] = json.loads(json.dumps(dict(form or {})))
        self._identity = self._neutralised({"settings": json.loads(json.dumps(dict(settings)))})
        self._product = [self.folder / name for name in product]
        self._config = config
        self._overwrite = overwrite
        self._record = self.folder / f"{command}.json"
        self._checkpoints = self.folder / "checkpoints" / command
        self._interrupts = Interrupts(overwriting=overwrite)
        self._world = active_group()
        self._stack = ExitStack()

    def __enter__(self) -> RunFolder:
        with ExitStack() as stack:
            stack.enter_context(held_by_first(self.folder))
            stack.enter_context(self._interrupts.listen())
            self._world.on_rank_zero(self._prepare)
            self._stack = stack.pop_all()
        return self

    def _prepare(self) -> None:
        self._sweep()
        if self._overwrite:
            self._discard()
        self._compare({"settings": self._identity["settings"]})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def open_or_skip(self, **identity: Any) -> bool:
        """Begin or resume, now that the data is known.

        Args:
            identity: what else the result depends on, as JSON values: content hashes, library versions.

        Returns:
            False if there is nothing left to do.

        Raises:
            CheckpointError: if the folder holds another run.
        """
        self._identity |= json.loads(json.dumps(identity))
        self._world.check_identical("the run (settings, data or versions)", self._identity)
        return bool(self._world.on_rank_zero(self._begin))

    def _begin(self) -> bool:
        finished = self._compare(self._identity)
        if finished:
            # A run that was killed at its very end has left its checkpoints.
            self._remove_checkpoints()
        else:
            self._take_over_settings()
            self._write_record(finished=False)
        return not finished

    def _take_over_settings(self) -> None:
        """Keep the neutral settings of the record: the checkpoints of earlier versions have them in their identity."""
        record = None if self._overwrite else self._read_record()
        if record is not None and record["neutral"].get("settings") == self._identity["settings"]:
            self._identity["settings"] = record["identity"]["settings"]

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """Within the block operations are recorded in the journal, and replayed from it."""
        with resumable_journal(
            self.command, self._checkpoints, self._identity, self._config, self._interrupts
        ) as journal:
            yield journal

    @contextmanager
    def journal_of(self, part: str, identity: Mapping[str, Any]) -> Iterator[Journal]:
        """The journal of a part of the work that is done on the finished product; removed when the block ends well.

        Args:
            part: its name. identity: what it depends on beside the product, as JSON values; what an earlier process
                has done under another identity is discarded.
        """
        folder = self._parts / hashlib.sha256(part.encode()).hexdigest()[:16]
        part_identity = {**self._identity, "form": self._form, "part": part, **identity}
        self._world.on_rank_zero(lambda: _discard_others(part, folder, part_identity))
        with resumable_journal(part, folder, part_identity, self._config, self._interrupts) as journal:
            yield journal
        self._world.on_rank_zero(lambda: self._clear(folder))

    def finish(self) -> None:
        """Record that the product is complete, and remove the checkpoints."""
        self._world.on_rank_zero(self._finish)

    def _finish(self) -> None:
        self._write_record(finished=True)
        self._remove_checkpoints()
        # Those of the product before.
        self._clear(self._parts)

    @property
    def _parts(self) -> Path:
        """Folder of the journals of `journal_of`."""
        return self._checkpoints.with_name(f"{self.command}-parts")

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run."""
        self._clear(self._checkpoints)

    def _clear(self, checkpoints: Path) -> None:
        """Remove a folder of checkpoints, and those around it that are empty then."""
        remove_folder(checkpoints)
        for folder in (checkpoints.parent, checkpoints.parent.parent):
            if folder != self.folder and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _compare(self, identity: Mapping[str, Any]) -> bool:
        """Whether this very run has finished before; a finished one may have other versions.

        Raises:
            CheckpointError: if something of another run would be lost.
        """
        if self._overwrite:
            return False
        has_product = any(path.exists() for path in self._product)
        if not has_product and Checkpoints(self._checkpoints, {}).empty:
            return False
        record = self._read_record()
        if record is None:
            if not has_product:
                return False
            raise CheckpointError(
                f"{self.folder} holds {self._product[0].name} but no record of its run: choose another folder "
                "with --out, or begin anew with --overwrite true"
            )
        finished = has_product and record["finished"] is True
        recorded = {name: value for name, value in record["neutral"].items() if name in identity}
        expected = {name: value for name, value in identity.items() if not (finished and name == "versions")}
        changed = differences({name: recorded.get(name) for name in expected}, expected)
        if finished:
            changed += differences(record["form"], self._form, "settings.")
        if changed:
            raise CheckpointError(
                f"{self.folder} holds {'the result' if finished else 'the checkpoints'} of another run: "
                f"{'; '.join(changed[:5])}; choose another folder with --out, or begin anew with --overwrite true"
            )
        return finished

    def _read_record(self) -> dict[str, Any] | None:
        """The record of the run in this folder; None if there is none, or, with a warning, if it is damaged."""
        if not self._record.exists():
            return None
        try:
            record = load_json(self._record)
            if record["schema_version"] != RECORD_VERSION or not isinstance(record["identity"], dict):
                raise CheckpointError(f"schema version {record['schema_version']!r} is not {RECORD_VERSION}")
            return {
                "finished": record["finished"],
                "identity": record["identity"],
                "neutral": self._neutralised(record["identity"]),
                "form": self._recorded_form(record),
            }
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be used: %s", self._record, error)
            return None

    def _recorded_form(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The form of the product in a record; earlier versions have it among the settings."""
        settings = record["identity"]["settings"]
        form = record.get("form", {name: settings.get(name) for name in self._form})
        if not isinstance(form, dict):
            raise CheckpointError(f"form = {form!r} is no mapping")
        return form

    def _neutralised(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `identity` in which the neutral settings have their recorded values."""
        result: dict[str, Any] = copy.deepcopy(dict(identity))
        for dotted, value in self._neutral.items():
            *sections, name = dotted.split(".")
            place = result["settings"]
            for section in sections:
                place = place.get(section, {})
            if name in place:
                place[name] = value
        return result

    def _write_record(self, *, finished: bool) -> None:
        record = {"schema_version": RECORD_VERSION, "finished": finished, "identity": self._identity}
        if self._form:
            record["form"] = self._form
        self.folder.mkdir(parents=True, exist_ok=True)
        whole_file(self._record, json.dumps(record, indent=2, sort_keys=True) + "\n")

    def _discard(self) -> None:
        Checkpoints(self._checkpoints, {}).clear()
        self._clear(self._parts)
        self._record.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove the half-written files and folders of a killed process."""
        for path in (*self._product, self._record, self.folder / "config.yaml"):
            for partial in self.folder.glob(f".{path.stem}.*"):
                shutil.rmtree(partial, ignore_errors=True)
                partial.unlink(missing_ok=True)


def _discard_others(label: str, folder: Path, identity: Mapping[str, Any]) -> None:
    """Remove the checkpoints in `folder`, with a warning of `label`, if they are of another identity."""
    checkpoints = Checkpoints(folder, identity)
    try:
        for _ in (*checkpoints.read(FINISHED), *checkpoints.read(UNDERWAY)):
            pass
    except OtherRunError as error:
        log.warning("%s begins anew, its checkpoints are discarded: %s", label, "; ".join(error.changed))
        checkpoints.clear()
