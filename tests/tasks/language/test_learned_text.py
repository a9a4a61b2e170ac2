"""What is learned of an example: the text of its answer, whatever the tokenizer and the template."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from cads.errors import DataError
from cads.tasks.language.encoding import FEW_LEARNED, TokenEncoder, whole_spans
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.splits import Split, encode_pools
from tests.support.tiny_llama import TEMPLATE, tokenizer, write_lines
from tests.support.token_caches import warnings_of
from tests.support.tokenizer_families import END, FAMILIES, fast

PAIRS = [
    ("review: dull, slow and far too long. sentiment:", "negative"),
    ("sentiment:", "positive"),
    ("what is the capital of france?", "the capital of france is paris."),
    ("one two", "three"),
    ("name two functions", "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))"),
]
SPOKEN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }}\n"
    "{% else %}assistant: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat in plain words; the prompt for an answer ends in a space."""
SPOKEN_MARKED = SPOKEN.replace(
    "assistant: {{ m['content'] }}", "assistant: {% generation %}{{ m['content'] }}{% endgeneration %}"
)
THINKING = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '#\n\n#' }}{% endif %}{{ m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""An empty thought before the last answer only, as Qwen 3 writes it."""


def encode(tmp_path, rows, tok, *, separator="\n", longest=1000, drop=False, **source):
    file = write_lines(tmp_path / "rows.jsonl", rows)
    encoder = TokenEncoder(tok, Renderer(tok, separator), longest, drop_unanswered=drop)
    return encoder.encode(load_rows(TextSource(path=str(file), **source), 0))


def learned_texts(tok, tokens):
    """What each example learns, without end token and without the white space around it."""
    texts = []
    for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids, mask = tokens.ids[begin:end], tokens.loss_mask[begin:end]
        texts.append(tok.decode(ids[mask], clean_up_tokenization_spaces=False).replace(END, "").strip())
    return texts


def of_family(text, family):
    """A text as the tokens of a family can give it back."""
    if family == "word_piece":
        pieces = fast(family)(text, add_special_tokens=False)["input_ids"]
        return fast(family).decode(pieces, clean_up_tokenization_spaces=False)
    return text


class TestAnswersAreLearnedWhole:
    @pytest.mark.parametrize("separator", [" ", "\n", "\n\n", " => ", "\t"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_prompts_and_responses(self, tmp_path, family, separator):
        tok = fast(family)
        rows = [{"prompt": p, "response": r} for p, r in PAIRS]
        tokens, positions = encode(tmp_path, rows, tok, separator=separator)
        assert positions.tolist() == [0, 1, 2, 3, 4]
        assert learned_texts(tok, tokens) == [of_family(r, family) for _, r in PAIRS]

    @pytest.mark.parametrize("template", [SPOKEN, SPOKEN_MARKED])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_chats_whose_prompt_for_an_answer_ends_in_a_space(self, tmp_path, family, template):
        tok = fast(family, template)
        rows = [{"prompt": p, "response": r} for p, r in PAIRS]
        tokens, _ = encode(tmp_path, rows, tok)
        assert learned_texts(tok, tokens) == [of_family(r, family) for _, r in PAIRS]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_all_turns_of_a_chat(self, tmp_path, family):
        tok = fast(family, SPOKEN)
        turns = [{"role": r, "content": c} for p, a in PAIRS[:4] for r, c in (("user", p), ("assistant", a))]
        tokens, _ = encode(tmp_path, [{"messages": turns}], tok)
        learned = "".join(learned_texts(tok, tokens)[0].split())
        assert learned == "".join("".join(of_family(a, family) for _, a in PAIRS[:4]).split())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_plain_texts(self, tmp_path, family):
        tok = fast(family)
        texts = [f"one two {response}" for _, response in PAIRS]
        tokens, _ = encode(tmp_path, [{"text": text} for text in texts], tok)
        assert learned_texts(tok, tokens) == [of_family(text, family) for text in texts]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_and_the_end_after_them_whoever_writes_it(self, tmp_path, family):
        tok = fast(family)
        tokens, _ = encode(tmp_path, [{"prompt": p, "response": r} for p, r in PAIRS], tok)
        ends = tokens.offsets[1:] - 1
        assert set(tokens.ids[ends].tolist()) == {tok.eos_token_id}
        assert tokens.loss_mask[ends].all()
        assert int((tokens.ids == tok.eos_token_id).sum()) == len(PAIRS)

    def test_where_the_last_answer_is_written_differently(self, tmp_path):
        tok = tokenizer(THINKING)
        talk = [
            {"role": r, "content": c}
            for r, c in (("user", "a"), ("assistant", "b."), ("user", "c"), ("assistant", "d."))
        ]
        tokens, _ = encode(tmp_path, [{"messages": talk}], tok)
        assert tok.decode(tokens.ids[tokens.loss_mask]) == "b.<|end|>#\n\n#d.<|end|>"

    def test_where_a_call_without_content_is_written_differently(self):
        template = THINKING.replace("#\n\n#", "<think>\n\n</think>\n\n").replace(
            "{{ m.content +", "{% for c in m.tool_calls or [] %}{{ '=' + c.function.name }}{% endfor %}{{ m.content +"
        )
        tok = tokenizer(template + "{# 'tool' #}")
        call = {"function": {"name": "f", "arguments": {}}}
        talk = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 20."},
        ]
        example = Renderer(tok).of("messages")({"messages": talk}, "x")
        learned = [example.text[begin:end] for begin, end in example.answers]
        assert learned == ["=f<|end|>", "<think>\n\n</think>\n\nIt is 20.<|end|>"]

    def test_where_an_answer_cannot_be_found_the_row_is_left_out(self, tmp_path):
        tok = tokenizer("{{ messages | length }}" + TEMPLATE)
        talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
        other = tokenizer(
            "{% if messages[0].content != 'a' %}{{ 9 }}{% else %}{{ messages | length }}{% endif %}" + TEMPLATE
        )
        with pytest.raises(DataError, match=r"beginning.*'rows.*generation %}.*drop: true"):
            encode(tmp_path, [{"messages": talk}], tok)
        good = [{**talk[0], "content": "c"}, talk[1]]
        assert encode(tmp_path, [{"messages": talk}, {"messages": good}], other, drop=True)[1].tolist() == [1]

    def test_where_the_prompt_for_an_answer_says_more_than_the_answer(self, tmp_path):
        """As in templates that begin a thought for the model to continue."""
        tok = tokenizer(TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>#\n{% endif %}"))
        tokens, _ = encode(tmp_path, [{"prompt": "a", "response": "b."}], tok)
        assert tok.decode(tokens.ids[tokens.loss_mask]) == "b.<|end|>"

    def test_token_spans_get_back_the_white_space_that_was_trimmed(self):
        offsets = np.array([[0, 0], [0, 3], [7, 7], [8, 12], [0, 0]])
        assert whole_spans(offsets).tolist() == [[0, 0], [0, 3], [3, 7], [8, 12], [0, 0]]


BLANK = ["", "  ", "\n\t", "\u200b", "\ufeff \u00a0"]


class TestEmptyTextsAreNoExamples:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("text", BLANK)
    def test_whatever_the_tokenizer_writes_around_them(self, tmp_path, family, text, caplog):
        rows = [{"id": "empty", "text": text}, {"id": "full", "text": "one two three"}]
        tokens, positions = encode(tmp_path, rows, fast(family), drop=True)
        assert positions.tolist() == [1]
        assert len(tokens) == 1
        assert "1 examples of rows have no answer token" in caplog.text
        assert "['empty']: they are left out" in caplog.text
        with pytest.raises(DataError, match=r"'empty' has no answer, as its text is empty.*drop: true"):
            encode(tmp_path, rows, fast(family))

    @pytest.mark.parametrize("text", BLANK)
    def test_responses_too(self, tmp_path, text):
        rows = [{"prompt": "one", "response": text}, {"prompt": "one", "response": "two"}]
        assert encode(tmp_path, rows, fast("replaced_spaces"), drop=True)[1].tolist() == [1]

    def test_nor_are_texts_of_which_only_the_end_can_be_predicted(self, tmp_path):
        rows = [{"text": "x"}, {"text": "xy"}]
        assert encode(tmp_path, rows, tokenizer(None), drop=True)[1].tolist() == [1]

    def test_nor_answers_that_the_tokenizer_does_not_see(self, tmp_path):
        tok = fast("word_piece")
        rows = [{"prompt": "one", "response": "\ufffd\ufffd"}, {"prompt": "one", "response": "two"}]
        assert encode(tmp_path, rows, tok, drop=True)[1].tolist() == [1]


class TestASourceOfWhichNothingIsLeft:
    @pytest.mark.parametrize("cached", [False, True])
    def test_is_said_and_others_fill_the_split(self, tmp_path, caplog, cached):
        good, bad = (
            TextSource(path=str(write_lines(tmp_path / f"{name}.jsonl", [{"prompt": p, "response": "b"}] * 3)))
            for name, p in (("good", "a"), ("bad", None))
        )
        cache = str(tmp_path / "cache") if cached else None
        settings = LanguageSettings(model="m", pool=[bad, good], drop=True, token_cache=cache)
        parts = [load_rows(source, 0) for source in (bad, good)]
        (pool, _, _), _ = encode_pools(Split(parts, [parts[1]], [parts[1]], True), tokenizer(), settings, 100)
        assert len(pool) == 3
        assert pool.source_names == ("good",)
        assert "3 examples of bad cannot be used" in caplog.text
        for _ in range(2):
            with pytest.raises(DataError, match=r"nothing is left.*repair them"):
                encode_pools(Split(parts[:1], parts, parts, True), tokenizer(), settings, 100)


class TestFewLearned:
    def test_a_share_near_zero_is_a_warning_with_an_example(self, tmp_path, caplog):
        rows = [{"prompt": "q" * 900, "response": "ab"}] * 3
        encode(tmp_path, rows, tokenizer(None))
        (said,) = warnings_of(caplog)
        assert "rows: 9 of 2712 tokens are learned (0.33%)" in said
        assert "learns 'ab</s>' after 'qqq" in said
        assert FEW_LEARNED > 0.0033

    def test_and_any_other_is_not(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            encode(tmp_path, [{"prompt": "q" * 90, "response": "ab"}] * 3, tokenizer(None))
        assert not caplog.records
