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
from cads.tasks.language.encoding import Encoder, EncodingReport
from cads.tasks.language.rows import Rows
from cads.tasks.language.tokens import Sequences

log = logging.getLogger(__name__)

ENTRY_VERSION = 1
"""Of the files, and of the way from rows to tokens: it rises with every change of `Renderer` or `Encoder`."""
MANIFEST = "manifest.json"
ARRAYS = {"ids": "<i4", "learned": "|b1", "offsets": "<i8", "text": "|u1", "text_offsets": "<i8", "left_out": "<i8"}
"""The files of an entry (`NAME.bin`), each an array without a header, and their types; no other file is ever opened."""
KEY_LENGTH = 32
"""Hexadecimal digits of a key."""
PARTIAL = re.compile(rf"\.[0-9a-f]{{{KEY_LENGTH}}}\..+")
"""What `whole_folder` calls an entry that is not whole yet."""
ABANDONED = 3600.0
"""Seconds without a write after which what is not whole is taken to be left by a process that was killed."""
LOOK_EVERY = 0.2
"""Seconds between two looks whether the process that writes an entry has finished."""

Encoded = tuple[Sequences, list[EncodingReport]]
"""Token sequences of several sources, one after another, and what became of the rows of each."""


class TokenCache:
    """Entries in one folder, each the tokens of some rows, under a key of all that decides on them.

    What is damaged is made anew, with a warning: it can be made again from the rows, and so is worth no refusal. One
    process writes an entry, under a lock that falls with it, and those that need the same one wait: the processes
    of one launch, and of any other.

    Args:
        folder: of the entries, made if need be; those that are there are used also if it cannot be written to.
        encoder: makes them.

    Raises:
        ConfigError: if there is something else in the folder's place.
    """

    def __init__(self, folder: Path | str, encoder: Encoder) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"token_cache = {str(folder)!r} is no folder: name another one, or null")
        self._encoder = encoder
        self._about = decisive(encoder)

    def fetch(self, parts: Sequence[Rows]) -> Encoded:
        """The tokens of `parts`, mapped; they are made only if they are not there. What was cut or left out is said.

        Raises:
            DataError: as `Encoder.encode_into`, or if they cannot be written.
        """
        contents = [rows_digest(rows) for rows in parts]
        key = hashlib.sha256(json.dumps([self._about, contents]).encode()).hexdigest()[:KEY_LENGTH]
        with suppress(FileNotFoundError, DataError):
            return self._found(key, parts)
        try:
            with self._only_writer(key):
                return self._made(key, parts)
        except OSError as error:
            # Where the file system has no locks, another process may have been faster.
            with suppress(FileNotFoundError, DataError):
                return self._found(key, parts)
            raise DataError(
                f"tokens cannot be written to token_cache = {str(self.folder)!r} ({error.strerror or error}): make "
                "room, name another folder, or set it to null to hold them in memory"
            ) from error

    def sweep(self) -> None:
        """Remove what processes that were killed left half written, `ABANDONED` seconds after their last write."""
        for path in self.folder.glob(".*"):
            if PARTIAL.fullmatch(path.name):
                with suppress(OSError):
                    last = max(x.stat().st_mtime for x in (path, *path.iterdir()))
                    if time.time() - last > ABANDONED:
                        shutil.rmtree(path)

    def _found(self, key: str, parts: Sequence[Rows]) -> Encoded:
        """The entry as it is there. Raises: as `read_entry`."""
        found = read_entry(self.folder / key, key, [len(rows) for rows in parts])
        for rows, kept in zip(parts, found[1], strict=True):
            self._encoder.say(rows, kept)
        return found

    def _made(self, key: str, parts: Sequence[Rows]) -> Encoded:
        """The entry, written unless another process has done so meanwhile."""
        try:
            return self._found(key, parts)
        except FileNotFoundError:
            pass
        except DataError as error:
            log.warning("%s: they are made anew", error)
        entry = self.folder / key
        with whole_folder(entry) as partial, TokenFiles(partial) as files:
            kept = [self._encoder.encode_into(rows, files) for rows in parts]
            files.finish({"key": key, "made_by": self._about, "sources": [rows.name for rows in parts]}, kept)
        return read_entry(entry, key, [len(rows) for rows in parts])

    @contextmanager
    def _only_writer(self, key: str) -> Iterator[None]:
        """Wait until no other process writes this entry, and keep others from it."""
        place = self.folder / f"lock-{key}"
        with ExitStack() as stack:
            waiting = False
            while True:
                try:
                    stack.enter_context(RunLock(place))
                    break
                except LockedError:
                    if not waiting:
                        log.info("%s: another process writes these tokens: this one waits for it", self.folder / key)
                    waiting = True
                    time.sleep(LOOK_EVERY)
            yield
        with suppress(OSError):
            place.rmdir()


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
        self._append("learned", shard.learned)
        self._append_ends("offsets", shard.offsets)
        _, ends, text = shard.texts.buffers()
        first, n = shard.texts.offset, len(shard.texts)
        offsets = np.frombuffer(ends, np.int64)[first : first + n + 1]
        data = np.empty(0, np.uint8) if text is None else np.frombuffer(text, np.uint8)
        self._append("text", data[offsets[0] : offsets[-1]])
        self._append_ends("text_offsets", offsets)

    def finish(self, about: Mapping[str, Any], kept: Sequence[EncodingReport]) -> None:
        """Write the manifest.

        Args:
            about: what they were made of, as JSON values. kept: what became of the rows of each source.
        """
        self._append("left_out", np.concatenate([k.left_out for k in kept]))
        parts = [k.counts for k in kept]
        files = {n: {"bytes": f.tell(), "sha256": self._hashes[n].hexdigest()} for n, f in self._files.items()}
        manifest = {"schema_version": ENTRY_VERSION, **about, "parts": parts, "files": files}
        text = json.dumps({**manifest, "check": number_of(manifest)}, indent=1)
        (self._folder / MANIFEST).write_text(text, encoding="utf-8")

    def _append_ends(self, name: str, offsets: np.ndarray) -> None:
        """Offsets of a shard, put behind those before it."""
        self._append(name, offsets[1:] - offsets[0] + self._ends[name])
        self._ends[name] += int(offsets[-1] - offsets[0])

    def _append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=ARRAYS[name]).data
        self._files[name].write(data)
        self._hashes[name].update(data)


def read_entry(folder: Path, key: str, sizes: Sequence[int]) -> Encoded:
    """Map an entry once sizes, hashes and offsets are known to be sound.

    Args:
        key: that it must have. sizes: rows of each source.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if it is damaged, or something else.
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
        kept = _kept(manifest["parts"], arrays["left_out"])
        if [k.rows for k in kept] != list(sizes):
            raise DataError("it is of another number of rows")
        return _sequences(arrays, sum(len(k) for k in kept)), kept
    except (CheckpointError, DataError) as error:
        raise DataError(f"the tokens in {folder} cannot be used: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"the tokens in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _mapped(path: Path, size: int, sha256: str, kind: str) -> np.ndarray:
    """A file as an array that stays on disk."""
    check_size(path, size)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            raise DataError(f"{path.name} has another size than the manifest says")
        digest = hashlib.sha256()
        while chunk := file.read(HASHED_AT_ONCE):
            digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise DataError(f"{path.name} is not what the manifest says: its hash differs")
        # As a plain array, of which a slice costs a tenth of that of a `memmap`; an empty file cannot be mapped.
        return np.asarray(np.memmap(file, dtype=kind, mode="r")) if size else np.empty(0, dtype=kind)


def _kept(parts: Sequence[Mapping[str, int]], left_out: np.ndarray) -> list[EncodingReport]:
    ends = np.cumsum([0, *(part["left_out"] for part in parts)])
    if ends[-1] != len(left_out):
        raise DataError("it does not list what was left out")
    found = []
    for part, begin, end in zip(parts, ends[:-1], ends[1:], strict=True):
        positions = left_out[begin:end]
        if len(positions) and (positions[0] < 0 or positions[-1] >= part["rows"] or (np.diff(positions) < 1).any()):
            raise DataError("it lists rows as left out that are none")
        found.append(EncodingReport(part["rows"], part["cut"], positions, part["left_out_cut"]))
    return found


def _sequences(arrays: Mapping[str, np.ndarray], count: int) -> Sequences:
    offsets, text_offsets = arrays["offsets"], arrays["text_offsets"]
    whole = len(offsets) == len(text_offsets) == count + 1 and offsets[0] == 0 and (np.diff(offsets) > 0).all()
    if not whole or not offsets[-1] == len(arrays["ids"]) == len(arrays["learned"]):
        raise DataError("its sequences do not follow one another")
    texts = pa.LargeStringArray.from_buffers(count, pa.py_buffer(text_offsets), pa.py_buffer(arrays["text"]))
    texts.validate(full=True)
    return Sequences(arrays["ids"], arrays["learned"], offsets, texts)


def decisive(encoder: Encoder) -> dict[str, Any]:
    """All on an encoder's side that decides on its tokens, as JSON values."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        # What the last call asked for: each call sets them anew.
        pipeline.pop(state, None)
    template = tokenizer.chat_template
    return {
        "version": ENTRY_VERSION,
        "tokenizer": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "pipeline": hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest(),
        # A template can write any of them.
        "special_tokens": dict(sorted(tokenizer.special_tokens_map.items())),
        "special_ids": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "split_special_tokens": tokenizer.split_special_tokens,
        "chat_template": template,
        # Some templates write the date.
        "day": str(date.today()) if "strftime_now" in json.dumps(template) else None,
        "chat": renderer.chat,
        "separator": renderer.separator,
        "longest": encoder.longest,
        "drop": encoder.drop,
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }


def rows_digest(rows: Rows) -> str:
    """A hash of what is written into the tokens of `rows`, whatever the chunks of its table: not ids, nor sources."""
    digest = hashlib.sha256(json.dumps([rows.format, len(rows)]).encode())
    for _, table in rows.shards():
        for name in sorted(table.column_names):
            digest.update(f"\0{name}\0".encode())
            _add_values(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _add_values(digest: Digest, values: pa.Array) -> None:
    """Take in values of any type, nested or missing ones too."""
    kind = values.type
    digest.update(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).data)
    if pa.types.is_struct(kind):
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
        # No text: examples made of it are refused, or do not read it.
        digest.update(f"\0{kind}\0{json.dumps(values.to_pylist(), default=str)}".encode())
