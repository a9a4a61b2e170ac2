"""Chosen rows as a data set on the hub, with the Selection and a card."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from cads.data_card import write_repository
from cads.errors import DataError
from cads.exports.chosen_rows import ChosenRows
from cads.exports.writers import write_json_lines, write_parquet
from cads.runtime.hub_upload import upload_folder

log = logging.getLogger(__name__)


def upload_rows(chosen: ChosenRows, repo_id: str, *, private: bool, token: str | None) -> int:
    """Upload the rows, the Selection and a card; returns the number of rows.

    Raises:
        CadsError: if the rows cannot be read, or not be uploaded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = build_folder(chosen, folder, repo_id)
        message = f"{count:,} rows chosen by {chosen.selection.method}"
        address = upload_folder(folder, repo_id, private=private, token=token, message=message)
    log.info("%s: %d rows, %s", address, count, "private" if private else "public")
    return count


def build_folder(chosen: ChosenRows, folder: Path, repo_id: str) -> int:
    """Write what is uploaded: rows as Parquet (or JSON lines, where columns have no one type), Selection and card."""
    data = folder / "data"
    data.mkdir()
    file = data / "train.parquet"
    try:
        count = write_parquet(chosen.blocks, file)
    except DataError as error:
        file.unlink(missing_ok=True)
        file = data / "train.jsonl"
        log.info("rows are uploaded as JSON lines: %s", error)
        count = write_json_lines(chosen.blocks, file)
    write_repository(chosen.selection, folder, repo_id, rows=count, data_file=f"data/{file.name}")
    return count
