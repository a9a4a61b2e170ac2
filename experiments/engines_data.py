"""What the proof of the engines works on: files of texts, a tiny model, and an S3 server on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

VOCABULARY, KNOWN_WORDS, EXPONENT = 20_000, 2_000, 1.1
"""Words of the texts, words that are tokens, and the exponent of Zipf's law for their frequencies."""
SHORTEST, LONGEST = 6, 24
"""Words of the shortest and of the longest text."""
HELD_OUT = 200
"""Texts of the target, and of the test set."""
BUCKET = "pool"
SECRETS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_DEFAULT_REGION": "us-east-1"}
"""What S3 clients ask for; the server on loopback takes anything."""
ACCOUNT = "123456789012"
"""The account that moto's server works for."""
START_SECONDS = 60.0
"""Longest time that the server takes to answer."""


def write_corpus(folder: Path, documents: int, files: int) -> None:
    """Write `files` Parquet files of texts, a target, a test set, and a model of one layer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokens = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(KNOWN_WORDS))]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder / "model")
    LlamaConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=2, pad_token_id=0,
    ).save_pretrained(folder / "model")  # fmt: skip
    (folder / "pool").mkdir()
    for i in range(files):
        pq.write_table(_texts(documents // files, i + 2), folder / "pool" / f"part-{i:04d}.parquet")
    for i, name in enumerate(("target", "test")):
        pq.write_table(_texts(HELD_OUT, i), folder / f"{name}.parquet")


def write_config(folder: Path, pool: str, name: str = "config.yaml", **settings: object) -> Path:
    """Write the configuration of a selection from `pool`, a folder or an address."""
    task = {
        "model": str(folder / "model"),
        "pool": [{"path": pool}],
        "target": [{"path": str(folder / "target.parquet")}],
        "test": [{"path": str(folder / "test.parquet")}],
        "max_tokens": 64,
    }
    config = {"kind": "language", "method": "bm25", "budget": "0.1 epochs", "task": task, "train": {"batch_size": 32}}
    path = folder / name
    path.write_text(yaml.safe_dump({**config, **settings}))
    return path


def _texts(count: int, seed: int) -> pa.Table:
    frequency = 1.0 / np.arange(1, VOCABULARY + 1) ** EXPONENT
    cumulative = np.cumsum(frequency) / frequency.sum()
    rng = np.random.default_rng(seed)
    sizes = rng.integers(SHORTEST, LONGEST + 1, count)
    drawn = np.searchsorted(cumulative, rng.random(sizes.sum())).astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    words = pa.array([f"w{i}" for i in range(VOCABULARY)])
    lists = pa.ListArray.from_arrays(pa.array(ends), words.take(pa.array(drawn)))
    return pa.table({"text": pc.binary_join(lists, " ")})


class S3Server:
    """moto's server of S3, in a process of its own that can be killed; started again, it has the same contents.

    Args:
        files: a folder whose files are put into the bucket. log: of the server.
        export: sets an environment variable, by which clients find the server.
    """

    def __init__(self, files: Path, log: Path, export: Callable[[str, str], None] = os.environ.__setitem__) -> None:
        self._files, self._log = files, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"s3://{BUCKET}/texts"
        self._process: subprocess.Popen[bytes] | None = None
        for name, value in {**SECRETS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}.items():
            export(name, value)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [sys.executable, "-m", "experiments.engines_data", str(self._port), str(self._files)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"], timeout=1).close()
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def serve(port: int, files: Path) -> None:
    """Serve a bucket that holds some files. They are in it before the server answers, as in a store that lasts."""
    from moto.s3.models import s3_backends
    from moto.server import main

    store = s3_backends[ACCOUNT]["aws"]
    store.create_bucket(BUCKET, SECRETS["AWS_DEFAULT_REGION"])
    for file in sorted(path for path in files.iterdir() if path.is_file()):
        store.put_object(BUCKET, f"texts/{file.name}", file.read_bytes())
    main(["-H", "127.0.0.1", "-p", str(port)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
