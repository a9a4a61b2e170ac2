"""A ladder of small Llama-architecture models, each pretrained once from scratch on text, and kept by its content.

    python -m experiments.pretraining TEXT.jsonl --sizes 1M --tokens 1.5e6 [--out runs/pretrained]

Pretraining is a training run like any other: format text, all of it, for a budget of tokens.
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

KEPT = Path("runs/pretrained")
"""Where models are kept."""
CONTEXT = 256
"""Positions that the models can read."""
TEXT_TOKENS = 192
"""Tokens at which a piece of text is cut in pretraining."""
HEAD_WIDTH = 32
"""Width of an attention head; keys and values have half as many as queries."""
PAD, END = "<pad>", "</s>"
HELD_OUT = 200
"""Pieces of text on which the pretrained model is tested, or a tenth of them if that is less."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: width, layers, and width of the feed-forward part."""

    hidden: int
    layers: int
    intermediate: int


LADDER = {"1M": Shape(128, 3, 320), "5M": Shape(256, 6, 640), "20M": Shape(512, 6, 1408)}
"""Models by their number of parameters with 4,096 tokens; input and output embeddings are one."""


@dataclass
class PretrainingConfig:
    """How the ladder is pretrained."""

    tokens: float = 1.5e6
    """Tokens that each model is trained on, padding included."""
    vocabulary: int = 4096
    """Byte pairs of the tokenizer, at most."""
    batch_size: int = 16
    """Pieces of text a step."""
    learning_rate: float = 3e-3
    """Peak learning rate of the smallest model; it falls with the root of the width."""
    seed: int = 0
    """Of weights and order."""
    ladder: dict[str, Shape] = field(default_factory=lambda: dict(LADDER))
    """Further sizes, or others."""

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise ConfigError(f"tokens = {self.tokens}: it must be positive")
        if self.vocabulary < 300:
            raise ConfigError(
                f"vocabulary = {self.vocabulary}: bytes and special tokens alone are 258; give 300 or more"
            )

    def shapes(self, sizes: Sequence[str]) -> dict[str, Shape]:
        """The shapes of models by their names.

        Raises:
            ConfigError: if one is not in the ladder.
        """
        if unknown := sorted(set(sizes) - set(self.ladder)):
            raise ConfigError(f"sizes {unknown} are unknown: choose from {list(self.ladder)}")
        return {size: self.ladder[size] for size in sizes}

    def recipe(self, shape: Shape) -> TrainConfig:
        """How a model is pretrained."""
        rate = self.learning_rate * (LADDER["1M"].hidden / shape.hidden) ** 0.5
        return TrainConfig(batch_size=self.batch_size, learning_rate=rate, weight_decay=0.1)


def pretrained(
    sizes: Sequence[str],
    text: Path,
    more: Sequence[Path],
    config: PretrainingConfig,
    kept: Path = KEPT,
    console: Console | None = None,
) -> dict[str, Path]:
    """The folders of pretrained models, each made if it is not there.

    Args:
        sizes: names in the ladder. text: JSON lines with `text`, which is learned.
        more: further JSON lines whose texts, prompts and responses the tokenizer is trained on, and no model.
        kept: the folder of all models; the name of each ends in a hash of all that it follows from.

    Raises:
        ConfigError: if a size is unknown.
        DataError: if a file cannot be read.
        BudgetError: if the tokens do not buy one step.
    """
    shapes = config.shapes(sizes)
    contents = [_digest(path) for path in (text, *more)]
    found = {}
    for size, shape in shapes.items():
        recipe = config.recipe(shape)
        about = [asdict(shape), recipe.result_fields(), config.tokens, config.vocabulary, config.seed, contents]
        folder = kept / f"{size}-{content_key([*about, CONTEXT, TEXT_TOKENS, HEAD_WIDTH])}"
        if not folder.exists():
            _pretrain(folder, shape, recipe, text, more, config, console)
        found[size] = folder
    return found


def _pretrain(
    folder: Path,
    shape: Shape,
    recipe: TrainConfig,
    text: Path,
    more: Sequence[Path],
    config: PretrainingConfig,
    console: Console | None,
) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_blank(Path(place), shape, (text, *more), config.vocabulary)
        source = TextSource(name="text", path=str(text), format="text")
        held_out = max(1, min(HELD_OUT, len(_read(text).splitlines()) // 10))
        task = LanguageConfig(
            model=place, pool=[source], n_target=1, n_test=held_out, max_tokens=TEXT_TOKENS, data_seed=config.seed
        ).build(recipe)
        budget = Budget(config.tokens, "tokens")
        everything = build_selector("full").select(task, budget, seed=config.seed, ledger=Ledger())
        with Monitor(console=console) as monitor, monitor.named(folder.name):
            outcome = train(task, everything, budget, seed=config.seed, monitor=monitor)
        with whole_folder(folder) as partial:
            outcome.save(partial)


def write_blank(folder: Path, shape: Shape, files: Sequence[Path], vocabulary: int) -> None:
    """A model without weights: its config, and a byte-pair tokenizer trained on the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(_texts(files), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pairs, pad_token=PAD, eos_token=END, model_max_length=CONTEXT, padding_side="right"
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
        for line in _read(path).decode("utf-8").splitlines():
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
    parser.add_argument("more", type=Path, nargs="*", help="further files for the tokenizer")
    parser.add_argument("--sizes", default="1M", help="comma-separated names")
    parser.add_argument("--tokens", type=float, default=PretrainingConfig.tokens)
    parser.add_argument("--out", type=Path, default=KEPT)
    given = parser.parse_args(argv)
    console = Console()
    try:
        config = PretrainingConfig(tokens=given.tokens)
        found = pretrained(given.sizes.split(","), given.text, given.more, config, given.out, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    for size, folder in found.items():
        results = json.loads((folder / "results.json").read_text())
        perplexity = results["metrics"]["perplexity"]
        console.print(f"{size}  {folder}  perplexity {perplexity:.1f} on text held out", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
