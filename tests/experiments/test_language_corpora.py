"""Corpora as pairs of prompt and response, and data made of them without leaks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cads.errors import ConfigError, DataError
from experiments import corpora
from experiments.corpora import Pair, read_corpus
from experiments.language_data import PHRASES, SPARE, data_config, multiple_choice, spoilt, write_data
from tests.support.tiny_corpora import SOURCES, dictionary
from tests.support.tiny_llama import write_lines

pytestmark = pytest.mark.usefixtures("packages")


def data(world: Path, **changes):
    given = {"skill": "foldoc", "sources": SOURCES, "n_target": 12, "n_test": 10, "text": True}
    return data_config({**given, "dictionaries": str(world), **changes})


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_package", lambda corpus, name: world / name)
        write_data(data(world), folder / "data")
    return folder / "data"


class TestCorpora:
    def test_a_definition_is_its_first_sentence_without_marks(self, tmp_path):
        entries = {
            "00-database-info": "   Nothing to be learned here at all.",
            "foo\nbar": "   <jargon> /foo/ A {sample} name for absolutely anything.  Very {common}.",
            "see": "   See {foo} and others like it.",
            "dated": "   A thing of the distant past. (1994-01-02)",
            "long": "   " + "word " * 40 + ".",
        }
        dictionary(tmp_path, "foldoc", entries)
        result = read_corpus("foldoc", 30, {}, tmp_path).pairs
        assert result == [
            Pair("Define foo.", "A sample name for absolutely anything."),
            Pair("Define dated.", "A thing of the distant past."),
        ]

    def test_copies_are_left_out_whatever_their_case(self, tmp_path):
        pairs = [("What is it?", "One"), ("what is IT", "Two"), ("And that?", "one."), ("That?", "Three")]
        file = write_lines(tmp_path / "own.jsonl", [{"question": q, "answer": a} for q, a in pairs])
        result = read_corpus("own", 30, {"own": file}).pairs
        assert [p.response for p in result] == ["One", "Three"]

    def test_topics_of_the_chats_are_corpora_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpora, "_package", lambda corpus, name: tmp_path)
        folder = tmp_path / "data" / "english"
        folder.mkdir(parents=True)
        for topic in ("food", "money"):
            (folder / f"{topic}.yml").write_text(f"conversations: [['{topic}?', more {topic}, not this], [alone]]")
        assert read_corpus("chat/food", 30, {}).pairs == [Pair("food?", "more food")]
        assert len(read_corpus("chat", 30, {}).pairs) == 2
        with pytest.raises(ConfigError, match=r"no topic 'weather': choose from \['food', 'money'\]"):
            read_corpus("chat/weather", 30, {})

    def test_what_is_missing_is_named_with_its_remedy(self, tmp_path):
        with pytest.raises(ConfigError, match="apt-get install dict-jargon"):
            read_corpus("jargon", 30, {}, tmp_path)
        with pytest.raises(ConfigError, match="'nothing' is unknown"):
            read_corpus("nothing", 30, {}, tmp_path)
        with pytest.raises(ConfigError, match="write NAME=PATH"):
            data_config({"skill": "x", "sources": SOURCES}, ["x"])


class TestData:
    def test_nothing_is_in_two_files(self, written):
        prompts = [
            r["prompt"] for name in ("target", "test", *(s["name"] for s in SOURCES)) for r in rows(written, name)
        ]
        answers = [r["response"] for name in ("target", "test", "definitions", "news") for r in rows(written, name)]
        assert max(Counter(prompts).values()) == 1
        assert max(Counter(answers).values()) == 1
        assert not {r["response"] for r in rows(written, "mixed-up")} & set(answers)

    def test_text_to_pretrain_on_has_no_article_of_another_file(self, written):
        text = " ".join(r["text"] for r in rows(written, "text"))
        used = [
            r["prompt"].split()[2]
            for name in ("news", "mixed-up")
            for r in rows(written, name)
            if "Continue" in r["prompt"]
        ]
        unused = {str(i) for i in range(60)} - set(used)
        assert len(used) == SPARE * 24
        assert {i for i in map(str, range(60)) if f"Article {i} part" in text} == unused

    def test_every_file_has_the_rows_that_were_asked_for(self, written):
        counts = {name: len(rows(written, name)) for name in ("target", "test", "choices", "news", "mixed-up")}
        assert counts == {"target": 18, "test": 10, "choices": 10, "news": 24, "mixed-up": 24}

    def test_shuffled_answers_are_all_there_and_none_in_its_place(self):
        pairs = [Pair(f"q{i}", f"a{i}") for i in range(30)]
        for seed in range(20):
            result = spoilt(pairs, "shuffle", seed)
            assert sorted(p.response for p in result) == sorted(p.response for p in pairs)
            assert sorted(p.prompt for p in result) == sorted(p.prompt for p in pairs)
            assert not set(result) & set(pairs)

    def test_empty_answers_say_nothing(self, written):
        assert {r["response"] for r in rows(written, "empty")} <= set(PHRASES)

    def test_one_of_four_choices_is_right_and_its_place_tells_nothing(self):
        pairs = [Pair(f"q{i}", f"{'a' * (i % 7)}{i}") for i in range(400)]
        kinds = [[f"{kind}{'a' * (i % 7)}{i}" for i in range(50)] for kind in "xyz"]
        result = multiple_choice(pairs, kinds, 0)
        for pair, row in zip(pairs, result, strict=True):
            assert len(set(row["choices"])) == 4
            assert Counter(c[0] for c in row["choices"] if c[0] in "xyz") == {"x": 1, "y": 1}
            assert max(abs(len(c) - len(pair.response)) for c in row["choices"]) <= 4
            assert row["choices"][row["answer"]] == pair.response
        places = Counter(row["answer"] for row in result)
        assert all(70 < places[i] < 130 for i in range(4))

    def test_same_seed_same_bytes_and_another_seed_other_rows(self, world, written, tmp_path):
        write_data(data(world), tmp_path / "again")
        write_data(data(world, seed=1), tmp_path / "other")
        for file in written.iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        assert rows(tmp_path / "other", "test") != rows(written, "test")

    def test_what_is_there_is_kept_and_what_another_config_made_is_not(self, world, tmp_path):
        write_data(data(world), tmp_path / "d")
        before = (tmp_path / "d" / "test.jsonl").stat().st_ino
        write_data(data(world), tmp_path / "d")
        assert (tmp_path / "d" / "test.jsonl").stat().st_ino == before
        write_data(data(world, n_test=8), tmp_path / "d")
        assert len(rows(tmp_path / "d", "test")) == 8

    def test_too_few_rows_are_refused_with_numbers(self, world, tmp_path):
        with pytest.raises(DataError, match=r"'foldoc' has 150 rows.*'test': 90"):
            write_data(data(world, n_test=90), tmp_path / "d")
        assert not (tmp_path / "d").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_test": 3}, "n_test = 3"),
            ({"sources": SOURCES[:1]}, "at least two"),
            ({"sources": [{**SOURCES[0], "name": "test"}, SOURCES[1]]}, "other names"),
            ({"sources": [{**SOURCES[0], "spoil": "burn"}, SOURCES[1]]}, "spoil"),
            ({"colour": "red"}, "unknown"),
        ],
    )
    def test_bad_sections_are_refused(self, world, changes, message):
        with pytest.raises(ConfigError, match=message):
            data(world, **changes)
