"""One writer at a time in a run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cads.cli.main import main
from cads.runtime.lock import LOCK, LockedError, RunLock

HOLD = """
import sys, time
from cads.runtime.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_is_first(tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder), pytest.raises(LockedError, match=rf"process {os.getpid()} on .*: wait until it ends"):
        RunLock(folder).__enter__()
    assert not folder.exists(), "of a run that wrote nothing nothing stays"


def test_a_folder_that_was_there_stays(tmp_path):
    with RunLock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert os.listdir(tmp_path) == []
    with RunLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    """Another process holds it; once that is killed, nothing has to be removed by hand."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(LockedError, match=f"process {holder.pid} "):
            RunLock(tmp_path).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("note", [b"", b"{", b"[1]", b"\xff\xfe", b'{"pid": 3}', b"[" * 4000])
def test_whatever_the_note_says(tmp_path, note):
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_bytes(note)
        with pytest.raises(LockedError, match="in use by another process"):
            RunLock(tmp_path).__enter__()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        RunLock(tmp_path / "file").__enter__()


def test_many_processes_take_turns(tmp_path):
    """Each of five counts to twenty under the lock, removing it each time: no count is lost."""
    counter = tmp_path / "run" / "count"
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                done = 0
                while done < 20:
                    try:
                        with RunLock(tmp_path / "run"):
                            counter.write_text(str(int(counter.read_text() or 0) + 1 if counter.exists() else 1))
                            done += 1
                    except LockedError:
                        time.sleep(0.001)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5
    assert counter.read_text() == "100"


def test_the_commands_lock_their_folder(tmp_path, capsys):
    with RunLock(tmp_path / "run"):
        assert main(["select", "--method", "random", "--task.n_pool", "40", "--out", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "LockedError" in said
    assert "is in use by process" in said
