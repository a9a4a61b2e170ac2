"""A pool in shards on the engines that people run: the same bytes as one machine's, whatever is killed.

    python -m experiments.engines --out experiments/results/engines.md

One process selects by BM25 from all files. Then the launchers do: Ray on a cluster of two nodes, submitit's local
executor, and processes; the files are in S3 (moto's server on loopback). Meanwhile workers, the driver, the object
store of a node and the S3 server are killed (kill -9) at random moments, and started again where nobody else does it.
Each Selection must equal that of one process byte by byte. Last come the growth curve and the large pool.
Rows are kept as JSON beside the table; `--render` makes the table again from them, `--sections` measures some anew.
Needs the extras `ray` and `slurm`, and moto[s3], flask, flask-cors, boto3, s3fs and psutil.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from experiments.engines_data import S3Server, write_config, write_corpus
from experiments.engines_report import markdown

OUTPUTS = ("selection.json", "scores.parquet", "rows.parquet")
FILES = 64
"""Files of a pool, each of them a shard."""
CHAOS_DOCUMENTS = 16_000
"""Texts of the pool on which processes are killed."""
GROWTH = (1, 4, 16, 64)
"""Shards of the growth curve."""
GROWTH_DOCUMENTS = 500
"""Texts of a shard there."""
PAUSE = (3.0, 15.0)
"""Seconds between two kills."""
SHARES = {"ray": 18, "slurm": 6, "local": 6}
"""Kills of each launcher, of 30."""
SHARDS = {"ray": FILES, "slurm": 8, "local": 8}
"""Shards of each launcher: an actor of Ray takes one after another, every other shard is a process of its own."""
MAX_SECONDS = 1200.0
"""A run that takes longer is taken to hang."""
WORKERS = 2


@dataclass
class Results:
    """Everything that was measured, as JSON values, by section."""

    chaos: list[dict[str, Any]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)
    large: list[dict[str, Any]] = field(default_factory=list)


def digest(out: Path) -> str:
    """The hash of the files of a Selection, but for the times."""
    parts = [(out / "selection" / name).read_bytes() for name in OUTPUTS]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def cads(*words: object) -> list[str]:
    """A command line of this package."""
    return [sys.executable, "-m", "cads", *map(str, words)]


def measured(command: list[str]) -> tuple[float, float, int]:
    """Run a command to its end: seconds, seconds of its processors, bytes at its peak.

    Raises:
        SystemExit: if it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {error.decode()[-2000:]}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def one_machine(config: Path, out: Path) -> list[dict[str, Any]]:
    """Select in one process; rows of scoring and of merging."""
    rows = []
    for step, words in (("all files in one process", ("--shard", "1/1")), ("merge", ("--merge",))):
        seconds, cpu, peak = measured(cads("select", config, "--out", out, *words))
        rows.append({"step": step, "seconds": seconds, "cpu": cpu, "peak": peak})
    return rows


class Engine:
    """What runs shards, and whose processes can be killed.

    Args:
        name: of the launcher. config: of the selection. s3: that has the files.
    """

    def __init__(self, name: str, config: Path, s3: S3Server) -> None:
        self.name, self._config, self._s3 = name, config, s3
        self.driver: subprocess.Popen[bytes] | None = None
        self._cluster: Any = None
        self._node: Any = None
        if name == "ray":
            from ray.cluster_utils import Cluster

            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            self._node = self._cluster.add_node(num_cpus=1)

    def start(self, out: Path) -> None:
        """Start the driver, or start it again."""
        options = {
            "ray": {"num_cpus": 1, "address": getattr(self._cluster, "address", None)},
            "slurm": {"cluster": "local", "timeout_min": 60},
            "local": {},
        }[self.name]
        flags = ["--launcher", self.name, "--workers", WORKERS, "--retries", "50", "--shards", SHARDS[self.name]]
        words = cads("select", self._config, "--out", out, *flags, "--launcher_options", json.dumps(options))
        with (out.parent / f"{out.name}.log").open("ab") as log:
            self.driver = subprocess.Popen(words, stdout=log, stderr=log)

    def victims(self) -> dict[str, Callable[[], None]]:
        """What can be killed now, and how; each is started again."""
        kinds: dict[str, Callable[[], None]] = {"S3 server": self._kill_s3}
        assert self.driver is not None
        if self.driver.poll() is None:
            kinds["driver"] = self.driver.kill
        if workers := self._workers():
            kinds["worker"] = lambda: os.kill(random.choice(workers).pid, signal.SIGKILL)
        if self._cluster is not None:
            kinds["object store of a node"] = self._kill_node
        return kinds

    def close(self) -> None:
        """End what was started."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.terminate()
            self.driver.wait()
        for process in self._workers():
            process.kill()
        if self._cluster is not None:
            self._cluster.shutdown()

    def _workers(self) -> list[psutil.Process]:
        """Processes that run shards: below the nodes of Ray, or those that this process's jobs have become."""
        if self._cluster is None:
            return [p for p in psutil.process_iter() if self._is_job(p)]
        roots = [process.process.pid for node in self._cluster.list_all_nodes() for process in _raylets(node)]
        family = [child for pid in roots if psutil.pid_exists(pid) for child in psutil.Process(pid).children(True)]
        return [p for p in family if "ray::" in _command(p) and "Map" in _command(p)]

    def _is_job(self, process: psutil.Process) -> bool:
        """Whether a process runs a shard of this experiment: its command names the folder, and it is not the driver."""
        command = _command(process)
        is_job = "--shard " in command or "submitit.core._submit" in command
        return str(self._config.parent) in command and is_job and process.pid != self.driver_pid

    @property
    def driver_pid(self) -> int:
        """Of the driver; -1 without one."""
        return -1 if self.driver is None else self.driver.pid

    def _kill_s3(self) -> None:
        self._s3.kill()
        self._s3.start()

    def _kill_node(self) -> None:
        """The raylet of a node holds its object store; its workers end with it."""
        for process in _raylets(self._node):
            process.process.kill()
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=1)


def _raylets(node: Any) -> list[Any]:
    return [info for kind, infos in node.all_processes.items() if kind == "raylet" for info in infos]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def chaos(folder: Path, kills: int, seed: int, launchers: Sequence[str]) -> list[dict[str, Any]]:
    """Kill processes of some launchers while they select; a row for each launcher."""
    random.seed(seed)
    write_corpus(folder, CHAOS_DOCUMENTS, FILES)
    s3 = S3Server(folder / "pool", folder / "s3.log")
    s3.start()
    rows = []
    try:
        config = write_config(folder, s3.address)
        one_machine(config, folder / "one")
        expected = digest(folder / "one")
        for name in launchers:
            share = round(SHARES[name] * kills / sum(SHARES.values()))
            rows.append(_chaos_of(name, config, s3, share, expected))
            print(rows[-1], flush=True)
    finally:
        s3.kill()
    return rows


def _chaos_of(name: str, config: Path, s3: S3Server, kills: int, expected: str) -> dict[str, Any]:
    engine, killed = Engine(name, config, s3), Counter[str]()
    runs = equal = whole = 0
    began = time.perf_counter()
    try:
        while killed.total() < kills or not runs:
            out = config.parent / f"{name}-{runs}"
            _one_run(engine, out, kills, killed)
            runs += 1
            equal += digest(out) == expected
            parts = [path for path in (out / "shards" / "values").iterdir() if not path.name.startswith(".")]
            whole += len(parts) == FILES
    finally:
        engine.close()
    return {
        "launcher": name,
        "kills": dict(killed),
        "runs": runs,
        "equal": equal,
        "whole": whole,
        "digest": expected,
        "seconds": time.perf_counter() - began,
    }


def _one_run(engine: Engine, out: Path, kills: int, killed: Counter[str]) -> None:
    """One selection to its end, disturbed until the kills are used up; the driver is started again when it is gone."""
    engine.start(out)
    end = time.monotonic() + MAX_SECONDS
    next_kill = time.monotonic() + random.uniform(*PAUSE)
    while True:
        assert engine.driver is not None
        status = engine.driver.poll()
        if status == 0:
            return
        if status is not None:
            engine.start(out)
        if time.monotonic() > end:
            raise SystemExit(f"{out} does not end: look at {out}.log")
        if killed.total() < kills and time.monotonic() > next_kill:
            kinds = engine.victims()
            # Those that were killed least, so that all kinds have their turn.
            kind = min(kinds, key=lambda kind: (killed[kind], random.random()))
            kinds[kind]()
            killed[kind] += 1
            print(f"{engine.name}: kill {killed.total()}: {kind}", flush=True)
            next_kill = time.monotonic() + random.uniform(*PAUSE)
        time.sleep(0.2)


def growth(folder: Path) -> list[dict[str, Any]]:
    """Time and memory of a shard and of merging, for pools of 1 to 64 shards of equal size."""
    rows = []
    for shards in GROWTH:
        here = folder / f"growth-{shards}"
        write_corpus(here, GROWTH_DOCUMENTS * shards, shards)
        config = write_config(here, str(here / "pool"))
        score, merge = one_machine(config, here / "out")
        rows.append({"shards": shards, "documents": GROWTH_DOCUMENTS * shards, "score": score, "merge": merge})
        print(rows[-1], flush=True)
        shutil.rmtree(here)
    return rows


def large(folder: Path, documents: int) -> list[dict[str, Any]]:
    """The large pool: in one process, and in 64 shards by two actors of Ray."""
    write_corpus(folder, documents, FILES)
    config = write_config(folder, str(folder / "pool"))
    rows = one_machine(config, folder / "one")
    flags = ["--launcher", "ray", "--workers", WORKERS, "--shards", FILES]
    seconds, _, _ = measured(cads("select", config, "--out", folder / "many", *flags))
    step = f"{FILES} shards by {WORKERS} actors of Ray, and merge"
    rows.append({"step": step, "seconds": seconds, "cpu": None, "peak": None})
    same = digest(folder / "one") == digest(folder / "many")
    return [{"documents": documents, "files": FILES, "same": same, "digest": digest(folder / "one"), "steps": rows}]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; rows are written beside it as JSON")
    parser.add_argument(
        "--sections", nargs="+", choices=("chaos", "growth", "large"), default=["chaos", "growth", "large"]
    )
    parser.add_argument(
        "--launchers", nargs="+", choices=list(SHARES), default=list(SHARES), help="whose shards are killed"
    )
    parser.add_argument("--kills", type=int, default=30, help="of all launchers together")
    parser.add_argument("--documents", type=int, default=10**6, help="of the large pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    stored = args.out.with_suffix(".json")
    results = Results(**json.loads(stored.read_text())) if stored.exists() else Results()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for section in [] if args.render else args.sections:
        with tempfile.TemporaryDirectory(prefix="engines-") as name:
            folder = Path(name)
            if section == "chaos":
                measured_now = chaos(folder, args.kills, args.seed, args.launchers)
                kept = [row for row in results.chaos if row["launcher"] not in args.launchers]
                results.chaos = [*kept, *measured_now]
            elif section == "growth":
                results.growth = growth(folder)
            else:
                results.large = large(folder, args.documents)
        stored.write_text(json.dumps(asdict(results), indent=1) + "\n")
    documents = results.large[0]["documents"] if results.large else args.documents
    command = f"python -m experiments.engines --out {args.out} --documents {documents}"
    args.out.write_text(markdown(asdict(results), command))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
