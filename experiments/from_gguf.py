"""Convert a model in a GGUF file to a folder of safetensors and tokenizer files, which transformers loads.

    python -m experiments.from_gguf FILE.gguf FOLDER

Quantised weights are dequantised to float32. Needs: pip install gguf
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
"""First bytes of a GGUF file."""


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of `file` to `folder`, completely or not at all.

    Raises:
        ConfigError: if the folder exists, or gguf is not installed.
        DataError: if the file is missing, no GGUF file, or damaged.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: remove it, or name another folder")
    try:
        with file.open("rb") as opened:
            first_bytes = opened.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if first_bytes != MAGIC:
        raise DataError(f"{file} is no GGUF file: it begins with {first_bytes!r}")
    if find_spec("gguf") is None:
        raise ConfigError("the package gguf is missing, which reads such files: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Transformers cannot save weights that stay quantised.
    dequantised = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dequantised)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a damaged file makes its reader raise many kinds
        raise DataError(f"{file} cannot be converted: {type(error).__name__}: {error}") from error
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GGUF file of a causal language model")
    parser.add_argument("folder", type=Path, help="folder to write model and tokenizer to; it must not exist")
    args = parser.parse_args(argv)
    console = Console()
    try:
        convert(args.file, args.folder)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"model        {args.folder}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
