"""Multiple choice on P3: the options of a row, as one of its data set's templates lists them.

The templates of a data set write the same rows in the same order, and an id ends in the number of its row. A template
that lists the options of a row so tells them for the other templates that ask for the same answer. Nothing is made up:
a row whose answer is none of the options listed for it is no question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.p3_data import Rows, data_set_of

DASHES = re.compile(r"^- (.+)$", re.MULTILINE)
LETTERS = re.compile(r"^([A-E]): (.+)$", re.MULTILINE)
EITHER = re.compile(r"\(choices are (.+?) ?\):")
LISTING = {
    "dream": "dream_baseline",
    "quartz": "quartz_read_passage_below_choose",
    "social_i_qa": "social_i_qa_Show_choices_and_generate_index",
}
"""By data set, the template whose prompts list the options one by one."""
Options = dict[tuple[str, int], list[list[str]]]
"""Lists of options by data set and number of the row: their texts, and their letters where there are any."""


def read_options(rows: Rows) -> Options:
    """The options of all rows of which they are listed, those among `rows` that list them."""
    found: Options = {}
    for row_id, template, prompt in zip(rows.ids, rows.templates, rows.prompts, strict=True):
        data_set = data_set_of(template)
        if template == LISTING.get(data_set) and (lists := _listed(data_set, prompt)):
            found[data_set, _number(row_id)] = lists
    return found


def questions(rows: Rows, positions: np.ndarray, options: Options) -> list[dict[str, Any]]:
    """Rows as questions, with `prompt`, `choices` and `answer`, the position of the right one.

    Args:
        positions: of the rows. Those without options, or whose answer is none of them, are left out.
    """
    found = []
    for i in positions:
        for choices in options.get((rows.data_sets[i], _number(rows.ids[i])), ()):
            if (answer := rows.responses[i].strip()) in choices:
                found.append({"prompt": rows.prompts[i], "choices": choices, "answer": choices.index(answer)})
                break
    return found


def chance(asked: Iterable[Mapping[str, Any]]) -> float:
    """The accuracy of blind guesses."""
    return float(np.mean([1 / len(question["choices"]) for question in asked]))


def _listed(data_set: str, prompt: str) -> list[list[str]]:
    """The lists of options in a prompt; empty where they cannot be told apart."""
    if data_set == "dream":
        lists = [[text.strip() for text in DASHES.findall(prompt.rsplit("Question:", 1)[-1])]]
    elif data_set == "quartz":
        match = EITHER.search(prompt)
        lists = [match[1].split(" or ")] if match else []
    else:
        pairs: Sequence[tuple[str, str]] = LETTERS.findall(prompt)
        lists = [[text.strip() for _, text in pairs], [letter for letter, _ in pairs]]
    return lists if all(_apart(texts) for texts in lists) else []


def _apart(texts: Sequence[str]) -> bool:
    """Whether these are at least two different options. "more or or less" would be cut into three parts or odd ones."""
    whole = all(text and text.split()[0] != "or" and text.split()[-1] != "or" for text in texts)
    return whole and len(texts) == len(set(texts)) > 1


def _number(row_id: str) -> int:
    return int(row_id.rsplit("/", 1)[1])
