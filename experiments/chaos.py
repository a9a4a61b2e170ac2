"""Results must not change under kill -9 at random moments, damaged checkpoints and full disks.

    python -m experiments.chaos --kills 50 --out experiments/results/chaos.md

Each of `select`, `train` and `compare` runs once undisturbed. Then it is started again and again in its folder and
killed at random moments, until the given number of kills is reached. After some kills a file of the newest checkpoint
is cut short, has one bit flipped or is removed; after some the next process finds the disk full. Every result that is
reached must equal that of the undisturbed run in all but the times: the Selection byte by byte, weights, metrics and
ledgers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

from cads.cli.main import main as cads
from cads.runtime.checkpoint import MANIFEST, TENSORS, VALUES
from cads.study.tables import read_runs

TASK = {"hidden": 16, "n_pool": 400, "n_target": 60, "n_test": 60}
SOURCES = [{"name": "clean"}, {"name": "noise 45 %", "label_noise": 0.45}, {"name": "noise 90 %", "label_noise": 0.9}]
CONFIG = {"task": {**TASK, "sources": SOURCES}, "train": {"batch_size": 16}, "budget": "32 epochs", "method": "search"}
GRID = {
    "methods": ["full", "search"],
    "budgets": ["16 epochs"],
    "seeds": 1,
    "task": {**TASK, "sources": SOURCES},
    "train": {"batch_size": 16},
    "checkpoint": {"every_seconds": 0.05},
}
QUIET = ("--progress", "false", "--tensorboard", "false", "--checkpoint.every_seconds", "0.05")
DAMAGES = ("cut", "flip", "remove")
DAMAGED, FULL = 0.5, 0.15
"""Share of the kills after which the newest checkpoint is damaged; share of the starts that find a full disk."""
DISK_BYTES, FREE_BYTES = 2**24, 6000
"""Bytes of the small disk; bytes of it that stay free when it counts as full."""
SUBPROCESS_EVERY = 20
"""One kill in this many is of a new Python interpreter; the others are of forks, which start faster."""
MAX_SECONDS = 300.0
"""A command that takes longer than this is taken to hang."""
TIMES = ("seconds", "code", "cell", "version")
"""Columns of the table of runs that may differ between two runs."""


@dataclass
class Subject:
    """A command that is disturbed.

    Attributes:
        arguments: of the command, given the folder that it writes to. digest: of the result in such a folder.
        expected: digest of the undisturbed run. seconds: that a run takes undisturbed. counts: by `COLUMNS`.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    digest: Callable[[Path], str]
    expected: str = ""
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


def digest_selection(folder: Path) -> str:
    """Digest of what `cads select` has written, but for the times."""
    parts = [(folder / "selection" / name).read_bytes() for name in ("selection.json", "scores.parquet")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def digest_training(folder: Path) -> str:
    """Digest of what `cads train` has written, but for the times."""
    results = json.loads((folder / "results.json").read_text())
    ledger = [{k: v for k, v in entry.items() if k != "seconds"} for entry in results["ledger"]]
    rest = json.dumps([results["metrics"], results["steps"], ledger], sort_keys=True).encode()
    return hashlib.sha256((folder / "model.safetensors").read_bytes() + rest).hexdigest()


def digest_study(folder: Path) -> str:
    """Digest of the table of runs, but for the times."""
    rows = []
    for row in read_runs(folder):
        compared = {k: v for k, v in row.items() if k not in TIMES}
        compared["ledger"] = [{k: v for k, v in e.items() if k != "seconds"} for e in json.loads(row["ledger"] or "[]")]
        rows.append(json.dumps(compared, sort_keys=True))
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


class Chaos:
    """The commands in their folders, and what is done to them.

    Args:
        folder: to work in. seed: of all that is drawn; the moments of the kills depend on the machine's speed too.
        small_disk: whether `folder`/disk is a small disk that can be filled; if not, a limit on the size of files
            stands for a full disk.
    """

    def __init__(self, folder: Path, seed: int, *, small_disk: bool) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.log = folder / "log"
        self.small_disk = small_disk
        self._rng = np.random.default_rng(seed)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        selection_folder = folder / "expected-select"
        self.subjects = [
            Subject("select", lambda out: self._arguments("select", out), digest_selection),
            Subject(
                "train", lambda out: self._arguments("train", out, "--selection", selection_folder), digest_training
            ),
            Subject("compare", lambda out: ["compare", str(folder / "grid.yaml"), "--out", str(out)], digest_study),
        ]

    def run(self, kills: int, names: Sequence[str]) -> None:
        """Disturb the commands in turn until `kills` processes have been killed in all."""
        chosen = [s for s in self.subjects if s.name in names]
        for subject in self.subjects:
            if subject in chosen or (subject.name == "select" and "train" in names):
                self._undisturbed(subject)
        for i, subject in enumerate(chosen):
            while subject.counts["kills"] < kills // len(chosen) + (i < kills % len(chosen)):
                self._one_result(subject, kills // len(chosen) + (i < kills % len(chosen)))
            print(subject.name, dict(subject.counts), flush=True)

    def _arguments(self, command: str, out: Path, *options: object) -> list[str]:
        return [command, str(self.folder / "config.yaml"), "--out", str(out), *QUIET, *map(str, options)]

    def _undisturbed(self, subject: Subject) -> None:
        """Store the digest of the undisturbed result, and the time that a fork takes for it.

        The first run is in this process, so that all modules that forks need are imported.
        """
        out = self.folder / f"expected-{subject.name}"
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
            status = cads(subject.arguments(out))
        assert status == 0, f"{subject.name} fails by itself"
        subject.expected = subject.digest(out)
        repeated = self.disk / "again"
        started = time.monotonic()
        status = self._wait(self._start(subject, repeated), None)
        subject.seconds = time.monotonic() - started
        assert status == 0, f"{subject.name} fails in a fork: {self.log.read_text()[-2000:]}"
        assert subject.digest(repeated) == subject.expected, f"{subject.name} does not repeat itself"
        shutil.rmtree(repeated)

    def _one_result(self, subject: Subject, kills: int) -> None:
        """Start a command until it has finished; it is disturbed until it was killed `kills` times in all."""
        out = self.disk / subject.name
        shutil.rmtree(out, ignore_errors=True)
        status: int | None = None
        while status != 0:
            kills_reached = subject.counts["kills"] >= kills
            full = not kills_reached and self._rng.random() < FULL
            new_interpreter = (
                not kills_reached and not full and subject.counts["kills"] % SUBPROCESS_EVERY == SUBPROCESS_EVERY - 1
            )
            started, first_start = time.monotonic(), not out.exists()
            with self._full() if full else contextlib.nullcontext():
                process = self._start(
                    subject, out, limited=full and not self.small_disk, new_interpreter=new_interpreter
                )
                delay = None if kills_reached else float(self._rng.uniform(0, 1)) * subject.seconds
                status = self._wait(
                    process, delay if not new_interpreter or delay is None else delay + self._import_seconds
                )
            if first_start and status == 0 and not new_interpreter:
                # Other jobs change the machine's speed: the moments of the kills follow the time of the last whole run.
                subject.seconds = time.monotonic() - started
            self._account(subject, status, full=full, new_interpreter=new_interpreter)
            if status == -signal.SIGKILL and self._rng.random() < DAMAGED:
                self._damage(subject, out)
        subject.counts["results"] += 1
        subject.counts["mismatches"] += subject.digest(out) != subject.expected
        subject.counts["left over"] += (out / "checkpoints").exists() or (out / ".lock").exists()

    def _account(self, subject: Subject, status: int, *, full: bool, new_interpreter: bool) -> None:
        log = " ".join(self.log.read_text(errors="replace").split())
        subject.counts["kills"] += status == -signal.SIGKILL
        subject.counts["own process"] += new_interpreter and status == -signal.SIGKILL
        subject.counts["full disks"] += full
        subject.counts["stopped by a full disk"] += full and status == 1
        subject.counts["resumed"] += "going on from the checkpoints" in log
        subject.counts["checkpoints passed over"] += log.count("passed over")
        subject.counts["checkpoints not written"] += "no checkpoint could be written" in log
        # A fork that ends by an exception has status 70; status 1 is that of a command that reports an error.
        acceptable = status in (0, -signal.SIGKILL) or (full and status == 1)
        assert acceptable, f"{subject.name} ended with {status}: {log[-2000:]}"

    def _start(self, subject: Subject, out: Path, *, limited: bool = False, new_interpreter: bool = False) -> int:
        """Start a process that runs the command; returns its process id.

        Args:
            limited: whether no file may grow beyond `FREE_BYTES`.
            new_interpreter: whether Python is started anew, not forked.
        """
        arguments = subject.arguments(out)
        if new_interpreter:
            with open(self.log, "wb") as log:
                code = "import sys; from cads.cli.main import main; sys.exit(main(sys.argv[1:]))"
                return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log).pid
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        status = 70
        try:
            with open(self.log, "wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if limited:
                resource.setrlimit(resource.RLIMIT_FSIZE, (FREE_BYTES, FREE_BYTES))
            status = cads(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _wait(self, process: int, delay: float | None) -> int:
        """Wait for a process, and kill it after `delay` seconds; returns its status, negative for a signal."""
        deadline = time.monotonic() + (MAX_SECONDS if delay is None else delay)
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                os.kill(process, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                assert delay is not None, f"a command has not ended in {MAX_SECONDS} s"
                return status
            time.sleep(0.002)

    def _damage(self, subject: Subject, out: Path) -> None:
        """Damage one file of the newest checkpoint."""
        checkpoints = sorted(p for p in out.glob("checkpoints/**/0*-*") if p.is_dir())
        if not checkpoints:
            return
        file = checkpoints[-1] / str(self._rng.choice([TENSORS, VALUES, MANIFEST]))
        if not file.exists():
            return
        damage, content = str(self._rng.choice(DAMAGES)), bytearray(file.read_bytes())
        if damage == "remove":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(content[: int(self._rng.integers(len(content)))])
        else:
            content[int(self._rng.integers(len(content)))] ^= 1 << int(self._rng.integers(8))
            file.write_bytes(content)
        subject.counts[f"damaged: {damage}"] += 1

    @contextlib.contextmanager
    def _full(self) -> Iterator[None]:
        """Fill the small disk while the block runs."""
        filler = self.disk / "filler"
        try:
            if self.small_disk:
                state = os.statvfs(self.disk)
                filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - FREE_BYTES)))
            yield
        finally:
            filler.unlink(missing_ok=True)

    @property
    def _import_seconds(self) -> float:
        """Seconds that a new interpreter takes to import the command."""
        if not hasattr(self, "_imported"):
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", "import cads.cli"], check=True)
            self._imported = time.monotonic() - started
        return self._imported


@contextlib.contextmanager
def workspace(small_disk: bool) -> Iterator[tuple[Path, bool]]:
    """A folder to work in, with a small disk mounted in it if `small_disk` asks for it and it can be mounted.

    Yields:
        the folder, and whether its subfolder `disk` is a small disk.
    """
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder / "disk")]
    mounted = small_disk and shutil.which("mount") is not None and not subprocess.run(mount, check=False).returncode
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder / "disk")], check=False)
        shutil.rmtree(folder, ignore_errors=True)


COLUMNS = (
    "results", "mismatches", "left over", "kills", "own process", "resumed", "damaged: cut", "damaged: flip",
    "damaged: remove", "checkpoints passed over", "full disks", "checkpoints not written", "stopped by a full disk",
)  # fmt: skip


def report(subjects: Sequence[Subject], command: str, *, small_disk: bool) -> str:
    """How often each command was disturbed, and how many results differ, as Markdown."""
    ran = [s for s in subjects if s.counts]
    total = sum((s.counts for s in ran), Counter[str]())
    head = ["", *(s.name for s in ran), "all"]
    rows = [[name, *(str(s.counts[name]) for s in ran), str(total[name])] for name in COLUMNS]
    rows.append(["seconds undisturbed", *(f"{s.seconds:.1f}" for s in ran), ""])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    disk = f"a small disk (tmpfs of {DISK_BYTES >> 20} MiB) filled up" if small_disk else "a limit on the size of files"
    return (
        f"# Kill -9, damaged checkpoints, full disks\n\n    {command}\n\n{total['kills']} kills, {total['results']} "
        f"results reached, {total['mismatches']} of them different from the undisturbed run's. torch "
        f"{torch.__version__}, {torch.get_num_threads()} thread. A full disk is {disk}.\n\n{table}\n\n"
        "A result is compared by the bytes of the Selection, by weights, metrics and ledgers, without times. `left "
        "over`: results beside which checkpoints or a lock were still there. `own process`: kills of a process that "
        "started Python itself; the others are forks.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb the commands and write the report; returns 1 if a result differs, or files are left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=["select", "train", "compare"])
    parser.add_argument("--small-disk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with workspace(args.small_disk) as (folder, small_disk):
        chaos = Chaos(folder, args.seed, small_disk=small_disk)
        chaos.run(args.kills, args.commands)
        command = f"python -m experiments.chaos {shlex.join(sys.argv[1:] if argv is None else argv)}"
        text = report(chaos.subjects, command, small_disk=small_disk)
    print(text)
    if args.out:
        args.out.write_text(text)
    return int(any(s.counts["mismatches"] + s.counts["left over"] for s in chaos.subjects))


if __name__ == "__main__":
    raise SystemExit(main())
