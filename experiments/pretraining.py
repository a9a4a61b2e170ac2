"""Small models of the Llama architecture in several sizes, each pretrained once from scratch on text.

    python -m experiments.pretraining TEXT.jsonl --sizes 1M --tokens 1.5e6 [--out runs/pretrained]

Pretraining is a training run like any other: on data of the format `text`, all of it, for a budget of tokens. A model
is kept in a folder whose name contains a hash of its configuration and data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import CadsError, ConfigError, DataError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.atomic_files import whole_folder
from cads.study.grid import content_key
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.training.final import train

MODEL_CACHE = Path("runs/pretrained")
"""Folder where pretrained models are kept."""
CONTEXT = 256
"""Context length of the models in tokens."""
TEXT_TOKENS = 192
"""Tokens at which a piece of text is cut in pretraining."""
HEAD_WIDTH = 32
"""Width of an attention head; keys and values have half as many heads as queries."""
PAD, END = "<pad>", "</s>"
HELD_OUT = 200
"""Pieces of text on which the pretrained model is tested; a tenth of all pieces if that is less."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: hidden width, number of layers, and width of the feed-forward layers."""

    hidden: int
    layers: int
    intermediate: int


LADDER = {"1M": Shape(128, 3, 320), "5M": Shape(256, 6, 640), "20M": Shape(512, 6, 1408)}
"""Shapes by the number of parameters with a vocabulary of 4,096 tokens; input and output embeddings are tied."""


@dataclass
class PretrainingConfig:
    """How the models are pretrained."""

    tokens: float = 1.5e6
    """Tokens that each model is trained on, padding included."""
    vocabulary: int = 4096
    """Size of the byte-pair tokenizer's vocabulary, at most."""
    batch_size: int = 16
    """Pieces of text in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate of the size 1M; that of another size is inversely proportional to the root of its width."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""
    ladder: dict[str, Shape] = field(default_factory=lambda: dict(LADDER))
    """The shape of each size."""

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise ConfigError(f"tokens = {self.tokens}: it must be positive")
        if self.vocabulary < 300:
            raise ConfigError(
                f"vocabulary = {self.vocabulary}: bytes and special tokens alone are 258; give 300 or more"
            )

    def shapes(self, sizes: Sequence[str]) -> dict[str, Shape]:
        """The shapes of models, by the names of their sizes.

        Raises:
            ConfigError: if a size is not in `ladder`.
        """
        if unknown := sorted(set(sizes) - set(self.ladder)):
            raise ConfigError(f"sizes {unknown} are unknown: choose from {list(self.ladder)}")
        return {size: self.ladder[size] for size in sizes}

    def recipe(self, shape: Shape) -> TrainConfig:
        """The training recipe of a model of that shape."""
        rate = self.learning_rate * (LADDER["1M"].hidden / shape.hidden) ** 0.5
        return TrainConfig(batch_size=self.batch_size, learning_rate=rate, weight_decay=0.1)


def pretrained(
    sizes: Sequence[str],
    text: Path,
    tokenizer_files: Sequence[Path],
    config: PretrainingConfig,
    model_cache: Path = MODEL_CACHE,
    console: Console | None = None,
) -> dict[str, Path]:
    """The folders of pretrained models; models that do not exist yet are pretrained.

    Args:
        sizes: names in `config.ladder`. text: JSON lines with `text`, which the models are trained on.
        tokenizer_files: further JSON lines; only the tokenizer is trained on their texts, prompts and responses.
        model_cache: folder of all models; the name of each ends in a hash of configuration and data.

    Raises:
        ConfigError: if a size is unknown.
        DataError: if a file cannot be read.
        BudgetError: if `config.tokens` are too few for one step.
    """
    shapes = config.shapes(sizes)
    contents = [_digest(path) for path in (text, *tokenizer_files)]
    folders = {}
    for size, shape in shapes.items():
        recipe = config.recipe(shape)
        key_fields = [asdict(shape), recipe.result_fields(), config.tokens, config.vocabulary, config.seed, contents]
        folder = model_cache / f"{size}-{content_key([*key_fields, CONTEXT, TEXT_TOKENS, HEAD_WIDTH])}"
        if not folder.exists():
            _pretrain(folder, shape, recipe, text, tokenizer_files, config, console)
        folders[size] = folder
    return folders


def _pretrain(
    folder: Path,
    shape: Shape,
    recipe: TrainConfig,
    text: Path,
    tokenizer_files: Sequence[Path],
    config: PretrainingConfig,
    console: Console | None,
) -> None:
    with tempfile.TemporaryDirectory() as blank_folder:
        write_blank(Path(blank_folder), shape, (text, *tokenizer_files), config.vocabulary)
        source = TextSource(name="text", path=str(text), format="text")
        held_out = max(1, min(HELD_OUT, len(_read(text).splitlines()) // 10))
        task = LanguageConfig(
            model=blank_folder,
            pool=[source],
            n_target=1,
            n_test=held_out,
            max_tokens=TEXT_TOKENS,
            data_seed=config.seed,
        ).build(recipe)
        budget = Budget(config.tokens, "tokens")
        full_pool = build_selector("full").select(task, budget, seed=config.seed, ledger=Ledger())
        with Monitor(console=console) as monitor, monitor.named(folder.name):
            outcome = train(task, full_pool, budget, seed=config.seed, monitor=monitor)
        with whole_folder(folder) as partial:
            outcome.save(partial)


def write_blank(folder: Path, shape: Shape, files: Sequence[Path], vocabulary: int) -> None:
    """Write a model without weights: its config, and a byte-pair tokenizer trained on the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(_texts(files), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, pad_token=PAD, eos_token=END, model_max_length=CONTEXT, padding_side="right"
    )
    tokenizer.save_pretrained(folder)
    heads = max(1, shape.hidden // HEAD_WIDTH)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        for line in _read(path).splitlines():
            row: Mapping[str, object] = json.loads(line)
            yield from (str(row[name]) for name in ("text", "prompt", "response") if name in row)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain models on a file of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="JSON lines with `text`")
    parser.add_argument("tokenizer_files", type=Path, nargs="*", help="further files to train the tokenizer on")
    parser.add_argument("--sizes", default="1M", help="sizes, separated by commas")
    parser.add_argument("--tokens", type=float, default=PretrainingConfig.tokens)
    parser.add_argument("--out", type=Path, default=MODEL_CACHE)
    args = parser.parse_args(argv)
    console = Console()
    try:
        config = PretrainingConfig(tokens=args.tokens)
        folders = pretrained(args.sizes.split(","), args.text, args.tokenizer_files, config, args.out, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    for size, folder in folders.items():
        results = json.loads((folder / "results.json").read_text())
        perplexity = results["metrics"]["perplexity"]
        console.print(f"{size}  {folder}  perplexity {perplexity:.1f} on text held out", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
