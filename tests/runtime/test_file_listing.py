"""Files of folders and of stores: listed by name, copied whole, refused when they have changed or cannot be read."""

from __future__ import annotations

import pytest

from cads.errors import ConfigError, DataError
from cads.runtime.file_listing import list_files, local_copy

TEXTS = (".jsonl", ".parquet")


@pytest.fixture
def folder(tmp_path):
    for name in ("b/two.jsonl", "a.parquet", "notes.txt", ".hidden/x.jsonl", "_SUCCESS"):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pool" / name).write_text(name)
    return tmp_path / "pool"


def test_a_folder_is_listed_by_name_and_what_is_left_out_is_said(folder, caplog):
    assert [file.name for file in list_files(str(folder), TEXTS)] == ["a.parquet", "b/two.jsonl"]
    assert "1 files are no data and not read, such as ['notes.txt']" in caplog.text
    (single,) = list_files(str(folder / "a.parquet"), TEXTS)
    with local_copy(single) as path:
        assert path == folder / "a.parquet"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("missing", "does not exist"),
        ("empty", "holds no file of data"),
        ("nosuchstore://bucket/pool", "nosuchstore"),
    ],
)
def test_what_cannot_be_listed_is_refused(tmp_path, location, reason):
    (tmp_path / "empty").mkdir()
    path = location if "://" in location else str(tmp_path / location)
    with pytest.raises((DataError, ConfigError), match=reason):
        list_files(path, TEXTS)


@pytest.fixture
def s3(folder, tmp_path, monkeypatch):
    for package in ("moto", "flask", "flask_cors", "s3fs"):
        pytest.importorskip(package)
    from experiments.engines_data import SECRETS, S3Server
    from tests.support.paths import ROOT

    for name in (*SECRETS, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (folder / "b" / "two.jsonl").unlink()
    (folder / "b").rmdir()
    server = S3Server(folder, tmp_path / "s3.log", monkeypatch.setenv)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_s3_on_loopback(s3, folder):
    (file,) = list_files(s3.address, TEXTS)
    assert (file.name, file.location) == ("a.parquet", f"{s3.address}/a.parquet")
    with local_copy(file) as path:
        assert path.read_bytes() == (folder / "a.parquet").read_bytes()
    assert not path.exists()
    (folder / "a.parquet").write_text("other")
    s3.kill()
    s3.start()
    with pytest.raises(DataError, match="has changed since the pool was listed"), local_copy(file):
        pass
    s3.kill()
    with pytest.raises(DataError, match="cannot be read"):
        list_files(s3.address, TEXTS)
