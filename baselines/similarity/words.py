"""Texts as tokens: words, and pairs of characters in scripts whose words cannot be told by spaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PUNCTUATION = r"[!-/:-@\[-`{-~]"
"""`string.punctuation` as a class of RE2."""
APOSTROPHES = r"[\x{2018}\x{2019}\x{02BC}]"
"""Written within words, like the apostrophe of ASCII."""
FURTHER_PUNCTUATION = r"[\pP\pS]"
"""All other punctuation and symbols of Unicode. They stand between words that need no space there."""
UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\x{30FC}\p{Bopomofo}\p{Hangul}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Javanese}\p{Balinese}]"
)
"""Characters of scripts that put no spaces between words, and of Korean, which ends words in particles. U+30FC, the
sign of long vowels, belongs to two of them."""


def split_words(texts: Sequence[str]) -> pa.ListArray:
    """Lower-case the texts, remove the punctuation of ASCII, and split on white space."""
    return _split(_without_punctuation(pa.array(texts, pa.large_string())))


def tokenize(texts: Sequence[str]) -> pa.ListArray:
    """Lower-cased words without punctuation; pairs of neighbouring characters in scripts without spaces (`UNSPACED`).

    Chinese, Japanese, Thai and the like would give one token for a whole sentence. Pairs of characters are the usual
    substitute for words there, and in Korean (Lucene's `CJKAnalyzer`). Forms of one character are made equal (NFKC):
    wide and narrow ones, and accents that are written apart.
    """
    given = pa.array(texts, pa.large_string())
    if pc.all(pc.string_is_ascii(given)).as_py():
        return _split(_without_punctuation(given))
    # Before punctuation goes, so that the characters on both sides of it do not become neighbours.
    apart = pc.replace_substring_regex(pc.utf8_normalize(given, form="NFKC"), f"({UNSPACED}+)", r" \1 ")
    plain = pc.replace_substring_regex(_without_punctuation(apart), APOSTROPHES, "")
    return _in_pairs(_split(pc.replace_substring_regex(plain, FURTHER_PUNCTUATION, " ")))


def _without_punctuation(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    return pc.replace_substring_regex(pc.utf8_lower(texts), PUNCTUATION, "")


def _split(texts: pa.LargeStringArray) -> pa.ListArray:
    """Token lists of texts, split on white space."""
    trimmed = pc.utf8_trim_whitespace(texts)
    split = pc.utf8_split_whitespace(trimmed)
    # Arrow splits an empty text into one empty token.
    no_tokens = pa.scalar([], split.type)
    return pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), no_tokens, split).cast(pa.list_(pa.string()))


def _in_pairs(lists: pa.ListArray) -> pa.ListArray:
    """Token lists in which each token of a script without spaces is replaced by its pairs of neighbours.

    A single character stays as it is.
    """
    tokens = lists.flatten()
    is_unspaced = pc.match_substring_regex(tokens, f"^{UNSPACED}").to_numpy(zero_copy_only=False)
    if not is_unspaced.any():
        return lists
    runs = tokens.filter(pa.array(is_unspaced))
    sizes = pc.utf8_length(runs).to_numpy().astype(np.int64)
    characters = np.frombuffer("".join(runs.to_pylist()).encode("utf-32-le"), dtype=np.uint32)
    pairs = np.stack([characters, np.append(characters[1:], np.uint32(0))], axis=1)
    is_last = np.zeros(len(characters), dtype=bool)
    is_last[np.cumsum(sizes) - 1] = True
    # A string of NumPy ends before zeros, so that a pair with zero is a single character.
    pairs[is_last, 1] = 0
    is_alone = np.repeat(sizes == 1, sizes)
    pair_tokens = pa.array(np.ascontiguousarray(pairs[~is_last | is_alone]).view("<U2").ravel(), pa.string())

    counts = np.ones(len(tokens), dtype=np.int64)
    counts[is_unspaced] = np.maximum(sizes - 1, 1)
    rows = np.empty(int(counts.sum()), dtype=np.int64)
    from_pairs = np.repeat(is_unspaced, counts)
    rows[from_pairs] = len(tokens) + np.arange(len(pair_tokens))
    rows[~from_pairs] = np.flatnonzero(~is_unspaced)
    ends = np.concatenate([[0], np.cumsum(counts)])
    offsets = np.asarray(lists.offsets.to_numpy(), dtype=np.int64)
    offsets -= offsets[0]
    return pa.ListArray.from_arrays(
        pa.array(ends[offsets].astype(np.int32)), pa.concat_arrays([tokens, pair_tokens]).take(pa.array(rows))
    )
