"""Tokens on disk: encoded once, shard by shard, into folders of plain arrays, and mapped into memory from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.hashing import Digest, add_column
from cads.errors import CheckpointError, ConfigError, DataError
from cads.runtime.atomic_files import whole_folder
from cads.runtime.checkpoint import HASHED_AT_ONCE, check_size, load_json
from cads.runtime.lock import LockedError, RunLock
from cads.runtime.processes import digest as number_of
from cads.tasks.language.encoding import EncodingReport, TokenEncoder
from cads.tasks.language.rows import Rows
from cads.tasks.language.tokens import Sequences

log = logging.getLogger(__name__)

ENTRY_VERSION = 3
"""Version of the files and of the encoding; raise it with every change of `Renderer` or `TokenEncoder`."""
MANIFEST = "manifest.json"
ARRAYS = {"ids": "<i4", "learned": "|b1", "offsets": "<i8", "text": "|u1", "text_offsets": "<i8", "left_out": "<i8"}
"""The files of an entry (`NAME.bin`), each an array without a header, and their types. No other file is opened."""
KEY_LENGTH = 32
"""Hexadecimal digits of a key."""
PARTIAL = re.compile(rf"\.[0-9a-f]{{{KEY_LENGTH}}}\..+")
"""Name that `whole_folder` gives to an entry until it is complete."""
ABANDONED = 3600.0
"""Seconds without a write after which an incomplete entry is taken to be left by a killed process."""
LOOK_EVERY = 0.2
"""Seconds between two checks whether the process that writes an entry has finished."""

EncodedRows = tuple[Sequences, list[EncodingReport]]
"""Token sequences of several sources, one after another, and the report on the rows of each source."""


class TokenCache:
    """A folder of entries. Each entry holds the tokens of some rows, under a key of everything that decides on them.

    A damaged entry is encoded again from its rows, with a warning. One process writes an entry, under a lock that is
    released when the process ends. All other processes that need the entry, of the same launch or of another, wait.

    Args:
        folder: of the entries, created if need be. Entries in a folder that cannot be written to are still read.
        encoder: makes the tokens.

    Raises:
        ConfigError: if the path of the folder is not a folder.
    """

    def __init__(self, folder: Path | str, encoder: TokenEncoder) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"token_cache = {str(folder)!r} is no folder: name another one, or null")
        self._encoder = encoder
        self._encoder_fields = result_fields(encoder)

    def fetch(self, parts: Sequence[Rows]) -> EncodedRows:
        """The tokens of `parts`, memory-mapped; rows are encoded only if there is no entry.

        What was cut or left out is logged in both cases.

        Raises:
            DataError: as `Encoder.encode_into`, or if the tokens cannot be written.
        """
        contents = [rows_digest(rows) for rows in parts]
        key = hashlib.sha256(json.dumps([self._encoder_fields, contents]).encode()).hexdigest()[:KEY_LENGTH]
        with suppress(FileNotFoundError, DataError):
            return self._read(key, parts)
        try:
            with self._only_writer(key):
                return self._read_or_encode(key, parts)
        except OSError as error:
            # Where the file system has no locks, another process may have been faster.
            with suppress(FileNotFoundError, DataError):
                return self._read(key, parts)
            raise DataError(
                f"tokens cannot be written to token_cache = {str(self.folder)!r} ({error.strerror or error}): make "
                "room, name another folder, or set it to null to hold them in memory"
            ) from error

    def sweep(self) -> None:
        """Remove incomplete entries of killed processes, `ABANDONED` seconds after their last write."""
        for path in self.folder.glob(".*"):
            if PARTIAL.fullmatch(path.name):
                with suppress(OSError):
                    last_write = max(x.stat().st_mtime for x in (path, *path.iterdir()))
                    if time.time() - last_write > ABANDONED:
                        shutil.rmtree(path)

    def _read(self, key: str, parts: Sequence[Rows]) -> EncodedRows:
        """The existing entry; logs what was cut or left out. Raises: as `read_entry`."""
        entry = read_entry(self.folder / key, key, [len(rows) for rows in parts])
        for rows, report in zip(parts, entry[1], strict=True):
            self._encoder.say(rows, report)
        return entry

    def _read_or_encode(self, key: str, parts: Sequence[Rows]) -> EncodedRows:
        """The entry; encoded and written unless another process has done so meanwhile."""
        try:
            return self._read(key, parts)
        except FileNotFoundError:
            pass
        except DataError as error:
            log.warning("%s: they are made anew", error)
        entry = self.folder / key
        with whole_folder(entry) as partial, TokenFiles(partial) as files:
            reports = [self._encoder.encode_into(rows, files) for rows in parts]
            files.finish(
                {"key": key, "made_by": self._encoder_fields, "sources": [rows.name for rows in parts]}, reports
            )
        return read_entry(entry, key, [len(rows) for rows in parts])

    @contextmanager
    def _only_writer(self, key: str) -> Iterator[None]:
        """Wait until no other process writes this entry, and hold its lock."""
        lock_folder = self.folder / f"lock-{key}"
        with ExitStack() as stack:
            waiting = False
            while True:
                try:
                    stack.enter_context(RunLock(lock_folder))
                    break
                except LockedError:
                    if not waiting:
                        log.info("%s: another process writes these tokens: this one waits for it", self.folder / key)
                    waiting = True
                    time.sleep(LOOK_EVERY)
            yield
        with suppress(OSError):
            lock_folder.rmdir()


class TokenFiles:
    """A sink that writes the files of an entry into an existing folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS}
        self._hashes = {name: hashlib.sha256() for name in ARRAYS}
        self._ends = {"offsets": 0, "text_offsets": 0}
        for name in self._ends:
            self._append(name, np.zeros(1))

    def __enter__(self) -> TokenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, shard: Sequences) -> None:
        """See `Sink`."""
        self._append("ids", shard.ids)
        self._append("learned", shard.loss_mask)
        self._append_ends("offsets", shard.offsets)
        _, ends, text = shard.texts.buffers()
        first, n = shard.texts.offset, len(shard.texts)
        offsets = np.frombuffer(ends, np.int64)[first : first + n + 1]
        data = np.empty(0, np.uint8) if text is None else np.frombuffer(text, np.uint8)
        self._append("text", data[offsets[0] : offsets[-1]])
        self._append_ends("text_offsets", offsets)

    def finish(self, origin: Mapping[str, Any], reports: Sequence[EncodingReport]) -> None:
        """Write the manifest.

        Args:
            origin: key, encoder and sources of the entry, as JSON values. reports: on the rows of each source.
        """
        self._append("left_out", np.concatenate([report.left_out for report in reports]))
        parts = [report.stored for report in reports]
        files = {n: {"bytes": f.tell(), "sha256": self._hashes[n].hexdigest()} for n, f in self._files.items()}
        manifest = {"schema_version": ENTRY_VERSION, **origin, "parts": parts, "files": files}
        text = json.dumps({**manifest, "check": number_of(manifest)}, indent=1)
        (self._folder / MANIFEST).write_text(text, encoding="utf-8")

    def _append_ends(self, name: str, offsets: np.ndarray) -> None:
        """Append the offsets of a shard, shifted by the size of the shards before it."""
        self._append(name, offsets[1:] - offsets[0] + self._ends[name])
        self._ends[name] += int(offsets[-1] - offsets[0])

    def _append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=ARRAYS[name]).data
        self._files[name].write(data)
        self._hashes[name].update(data)


def read_entry(folder: Path, key: str, sizes: Sequence[int]) -> EncodedRows:
    """Map an entry into memory after a check of its sizes, hashes and offsets.

    Args:
        key: of the entry. sizes: rows of each source.

    Raises:
        FileNotFoundError: if there is no entry.
        DataError: if the entry is damaged, or of another key or version.
    """
    if not folder.exists() and not folder.is_symlink():
        raise FileNotFoundError(folder)
    try:
        manifest = load_json(folder / MANIFEST)
        check = manifest.pop("check")
        if check != number_of(manifest) or (manifest["schema_version"], manifest["key"]) != (ENTRY_VERSION, key):
            raise DataError("its manifest is damaged, or of another entry")
        files = manifest["files"]
        if set(files) != set(ARRAYS):
            raise DataError(f"its manifest lists {sorted(files)[:9]}, not {sorted(ARRAYS)}")
        arrays = {
            name: _mapped(folder / f"{name}.bin", int(files[name]["bytes"]), files[name]["sha256"], kind)
            for name, kind in ARRAYS.items()
        }
        reports = _reports(manifest["parts"], arrays["left_out"])
        if [report.rows for report in reports] != list(sizes):
            raise DataError("it is of another number of rows")
        return _sequences(arrays, sum(len(report) for report in reports)), reports
    except (CheckpointError, DataError) as error:
        raise DataError(f"the tokens in {folder} cannot be used: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"the tokens in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _mapped(path: Path, size: int, sha256: str, kind: str) -> np.ndarray:
    """A file as an array that stays on disk, after a check of its size and hash."""
    check_size(path, size)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            raise DataError(f"{path.name} has another size than the manifest says")
        digest = hashlib.sha256()
        while chunk := file.read(HASHED_AT_ONCE):
            digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise DataError(f"{path.name} is not what the manifest says: its hash differs")
        # Slicing a plain array costs a tenth of slicing a `memmap`. An empty file cannot be mapped.
        return np.asarray(np.memmap(file, dtype=kind, mode="r")) if size else np.empty(0, dtype=kind)


def _reports(parts: Sequence[Mapping[str, Any]], left_out: np.ndarray) -> list[EncodingReport]:
    """The reports of an entry, from the counts in its manifest and the positions left out of all sources."""
    ends = np.cumsum([0, *(part["left_out"] for part in parts)])
    if ends[-1] != len(left_out):
        raise DataError("it does not list what was left out")
    reports = []
    for part, begin, end in zip(parts, ends[:-1], ends[1:], strict=True):
        positions = left_out[begin:end]
        if len(positions) and (positions[0] < 0 or positions[-1] >= part["rows"] or (np.diff(positions) < 1).any()):
            raise DataError("it lists rows as left out that are none")
        unusable = np.array(part["unusable"], dtype=np.int64)
        if not np.isin(unusable, positions).all():
            raise DataError("it lists rows as unusable that were not left out")
        said = tuple(map(str, part["reasons"])), tuple(map(str, part["notes"]))
        reports.append(EncodingReport(part["rows"], part["cut"], positions, part["left_out_cut"], unusable, *said))
    return reports


def _sequences(arrays: Mapping[str, np.ndarray], count: int) -> Sequences:
    """The arrays of an entry as sequences, after a check of their offsets."""
    offsets, text_offsets = arrays["offsets"], arrays["text_offsets"]
    consistent = len(offsets) == len(text_offsets) == count + 1 and offsets[0] == 0 and (np.diff(offsets) > 0).all()
    if not consistent or not offsets[-1] == len(arrays["ids"]) == len(arrays["learned"]):
        raise DataError("its sequences do not follow one another")
    texts = pa.LargeStringArray.from_buffers(count, pa.py_buffer(text_offsets), pa.py_buffer(arrays["text"]))
    texts.validate(full=True)
    return Sequences(arrays["ids"], arrays["learned"], offsets, texts)


def result_fields(encoder: TokenEncoder) -> dict[str, Any]:
    """The fields of an encoder that decide on its tokens, as JSON values."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        # Arguments of the last call; each call sets them anew.
        pipeline.pop(state, None)
    template = tokenizer.chat_template
    return {
        "version": ENTRY_VERSION,
        "tokenizer": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "pipeline": hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest(),
        # A template can write any special token.
        "special_tokens": dict(sorted(tokenizer.special_tokens_map.items())),
        "special_ids": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "split_special_tokens": tokenizer.split_special_tokens,
        "chat_template": template,
        # Some templates write the date.
        "day": str(date.today()) if "strftime_now" in json.dumps(template) else None,
        "chat": renderer.chat,
        "separator": renderer.separator,
        "longest": encoder.max_length,
        "drop": encoder.drop_unanswered,
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }


def rows_digest(rows: Rows) -> str:
    """A hash of the contents of `rows`, independent of the chunks of its table; ids and sources do not count."""
    digest = hashlib.sha256(json.dumps([rows.format, len(rows)]).encode())
    for _, table in rows.shards():
        for name in sorted(table.column_names):
            digest.update(f"\0{name}\0".encode())
            _add_values(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _add_values(digest: Digest, values: pa.Array) -> None:
    """Add values of any type to a hash, nested and missing ones included."""
    kind = values.type
    digest.update(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).data)
    if isinstance(kind, pa.BaseExtensionType):
        digest.update(f"\0{kind.extension_name}\0".encode())
        _add_values(digest, values.storage)
    elif pa.types.is_struct(kind):
        for part, inner in zip(kind, values.flatten(), strict=True):
            digest.update(f"\0{part.name}\0".encode())
            _add_values(digest, inner)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        digest.update(np.asarray(pc.list_value_length(values).fill_null(0), dtype="<i8").data)
        _add_values(digest, pc.list_flatten(values))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        digest.update(b"\0text\0")
        add_column(digest, values.fill_null(""))
    else:
        # Not text: examples either do not read such a column, or are refused for it.
        digest.update(f"\0{kind}\0{json.dumps(values.to_pylist(), default=str)}".encode())
