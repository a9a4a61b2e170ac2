"""A model in a GGUF file as a folder of safetensors and tokenizer, which transformers loads at once.

    python -m experiments.from_gguf FILE.gguf FOLDER

Quantised weights become float32, with the values that the file gives them. Needs: pip install gguf
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from cads.errors import CadsError, ConfigError, DataError
from cads.runtime.atomic_files import whole_folder

MAGIC = b"GGUF"
"""How such a file begins."""


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of `file` to `folder`, whole or not at all.

    Raises:
        ConfigError: if the folder exists, or gguf is not installed.
        DataError: if the file is missing, no GGUF file, or damaged.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: remove it, or name another folder")
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if begin != MAGIC:
        raise DataError(f"{file} is no GGUF file: it begins with {begin!r}")
    if find_spec("gguf") is None:
        raise ConfigError("the package gguf is missing, which reads such files: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Weights that stay quantised cannot be saved.
    whole = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=whole)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # a damaged file makes its reader raise many kinds
        raise DataError(f"{file} cannot be converted: {type(error).__name__}: {error}") from error
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a causal language model")
    parser.add_argument("folder", type=Path, help="where model and tokenizer go; it must not exist")
    given = parser.parse_args(argv)
    console = Console()
    try:
        convert(given.file, given.folder)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"model        {given.folder}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
