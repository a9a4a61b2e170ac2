"""Small tokenizers of every family, trained on a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "review: a warm and funny film. sentiment: positive",
    "review: dull, slow and far too long. sentiment: negative",
    "what is the capital of france? the capital of france is paris.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "user: name three fruits assistant: apples, pears and plums.",
    "one two three four five six seven eight nine ten",
] * 8
END, BEGIN, PAD, UNKNOWN = "</s>", "<s>", "<pad>", "<unk>"
SPECIAL = [PAD, UNKNOWN, BEGIN, END]
SIZE = 420


def _byte_level(*, trimmed: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """Byte-level BPE whose offsets count white space, as that of Llama 3 and Qwen."""
    return _byte_level(trimmed=False)


def byte_level_trimmed() -> Tokenizer:
    """Byte-level BPE whose offsets leave white space out, as that of GPT-2."""
    return _byte_level(trimmed=True)


def metaspace() -> Tokenizer:
    """BPE with a mark in place of a space, before the first word too."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    return tokenizer


def replaced_spaces() -> Tokenizer:
    """BPE over whole texts with a mark in place of a space, as that of Llama 2; a begin token is written."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    # Merges within words, and texts that are not split.
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return tokenizer


def word_piece() -> Tokenizer:
    """Words and their parts; white space is lost, and begin and end tokens are written."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ids)
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with a mark in place of a space, as that of T5; an end token is written."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token=UNKNOWN)
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return tokenizer


@cache
def _trained(family: str) -> str:
    # Training twice may number the tokens differently.
    trained: str = FAMILIES[family]().to_str()
    return trained


def fast(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a family, as transformers loads it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
    )
    tokenizer.chat_template = template
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    f.__name__: f for f in (byte_level, byte_level_trimmed, metaspace, replaced_spaces, word_piece, unigram)
}
