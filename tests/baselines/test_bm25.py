"""BM25: with recipe = paper exactly the scores of `rank_bm25`, whatever the order and the chunks of the documents."""

from __future__ import annotations

import copy
import json
import logging
import math
import string
import time

import numpy as np
import pyarrow as pa
import pytest

from baselines import bm25
from baselines.bm25 import Bm25, tokenize
from baselines.similarity.okapi import Okapi, okapi_scores, positive_idf
from baselines.similarity.words import split_words
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.accounting.operations import bm25_flops
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from tests.support.paths import SHARED

GSM8K = SHARED / "gsm8k_train.jsonl"
rank_bm25 = pytest.importorskip("rank_bm25")


def reference(documents, queries):
    okapi = rank_bm25.BM25Okapi(documents)
    return np.mean([okapi.get_scores(query) for query in queries], axis=0)


def random_texts(seed, n, words, longest=12):
    """Token lists with repetitions, some of them empty; word 0 is in most of them, so that its idf is negative."""
    rng = np.random.default_rng(seed)
    return [[f"w{min(w, words) - 1}" for w in rng.geometric(0.3, rng.integers(0, longest))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_rank_bm25(seed):
    documents, queries = random_texts(seed, 60, 15), [*random_texts(seed + 99, 9, 20), ["w0", "w0", "unknown"]]
    assert okapi_scores(documents, queries) == pytest.approx(reference(documents, queries), abs=1e-9)


def test_a_negative_idf_has_a_floor():
    documents = [["a", "b"], ["a"], ["a", "c"], ["a", "c", "d"]]
    okapi = Okapi([pa.array(documents)])
    raw = [np.log(4 - df + 0.5) - np.log(df + 0.5) for df in (4, 1, 2, 1)]
    assert okapi.idf == pytest.approx([0.25 * np.mean(raw), *raw[1:]])


def test_the_default_idf_is_that_of_lucene_and_never_negative():
    frequency = np.arange(1, 101)
    expected = [math.log(1 + (100 - n + 0.5) / (n + 0.5)) for n in range(1, 101)]
    assert positive_idf(100, frequency) == pytest.approx(expected, abs=1e-12)
    assert (positive_idf(100, frequency) > 0).all()
    assert (np.diff(positive_idf(100, frequency)) < 0).all()


def with_texts(task, pool, target):
    """The task with these texts, repeated."""
    other = copy.copy(task)
    other.texts = lambda part: [
        (target if part is task.target else pool)[i % len(target if part is task.target else pool)]
        for i in range(len(part))
    ]
    return other


def test_copies_of_the_target_come_first_though_their_words_are_common(texts):
    """Three of four texts ask what the target asks; its words are in most texts, and the last text shares none."""
    task = with_texts(
        texts(),
        ["which is the capital", "which is the capital", "which is the capital of", "so"],
        ["Which is the capital?"],
    )
    score = Bm25().rank(task, seed=0, ledger=Ledger()).score
    assert score[0] == score[1] > score[2] > score[3] == 0
    paper = Bm25(recipe="paper").rank(task, seed=0, ledger=Ledger()).score
    assert paper[0] == paper[1] < paper[3] == 0, "as rank_bm25 has it"


@pytest.mark.parametrize(
    ("pool", "target"),
    [
        (["我喜欢吃苹果和香蕉。", "今天下雨了", "股票市场大跌"], ["你喜欢吃什么水果?"]),
        (["猫がとても好きです", "雨が降るでしょう", "カメラを買った"], ["私は犬がとても好き。"]),
        (["학교에서 공부한다", "비가 내린다", "시장에 간다"], ["학교는 어디에 있나요"]),
        (["ฉันชอบกินข้าว", "วันนี้ร้อน", "ไปตลาด"], ["คุณชอบกินอะไร"]),
    ],
)
def test_scripts_without_spaces_are_told_apart(texts, pool, target):
    task = with_texts(texts(), pool, target)
    score = Bm25().rank(task, seed=0, ledger=Ledger()).score
    assert score[0] > max(score[1], score[2])
    assert (Bm25(recipe="paper").rank(task, seed=0, ledger=Ledger()).score == 0).all()


def test_repeated_query_terms_count_again():
    documents = random_texts(0, 20, 9)
    once, twice = (okapi_scores(documents, [["w3"] * n]) for n in (1, 2))
    assert once.max() > 0
    assert twice == pytest.approx(2 * once, abs=1e-12)


def test_gsm8k_questions_agree_and_are_150_times_faster():
    if not GSM8K.exists():
        pytest.skip("GSM8K is not here")
    texts = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    documents, queries = tokenize(texts[:3000]).to_pylist(), tokenize(texts[-12:]).to_pylist()
    theirs = rank_bm25.BM25Okapi(documents)
    start = time.perf_counter()
    expected = np.mean([theirs.get_scores(query) for query in queries], axis=0)
    their_time = time.perf_counter() - start
    assert okapi_scores(documents, queries) == pytest.approx(expected, abs=1e-9)
    okapi, asked, times = Okapi([pa.array(documents)]), pa.array(queries), []
    for _ in range(5):
        start = time.perf_counter()
        okapi.scores(np.asarray(okapi.count(asked).mean(axis=0)))
        times.append(time.perf_counter() - start)
    assert their_time / min(times) >= 150


def test_chunks_and_order_change_nothing():
    documents = random_texts(1, 50, 12)
    at_once, parts = Okapi([pa.array(documents)]), Okapi([pa.array(documents[:7]), pa.array(documents[7:])])
    order = np.random.default_rng(0).permutation(50)
    mixed = Okapi([pa.array([documents[i] for i in order])])
    query = np.asarray(at_once.count(pa.array([["w1", "w4"]])).mean(axis=0))
    assert (at_once.scores(query) == parts.scores(query)).all()
    assert (at_once.scores(query)[order] == mixed.scores(query)).all()


@pytest.mark.parametrize(
    "text", ["  Hello,   World's end.\n", "", "...", "a\tb\u00a0C", "Éa-b_c", string.punctuation + "x", " \n "]
)
def test_tokens_are_words_without_case_and_punctuation(text):
    plain = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    assert tokenize([text, "next"]).to_pylist() == [plain, ["next"]]
    assert split_words([text, "next"]).to_pylist() == [plain, ["next"]]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("今天天气好。", ["今天", "天天", "天气", "气好"]),
        ("中", ["中"]),
        ("公园,好", ["公园", "好"]),
        ("用Python写", ["用", "python", "写"]),
        ("ラーメンを", ["ラー", "ーメ", "メン", "ンを"]),
        ("한국어 좋아", ["한국", "국어", "좋아"]),
        ("ＡＢＣ１２ ｶﾞ", ["abc12", "ガ"]),
        ("“don’t”—stop…", ["dont", "stop"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("हिन्दी शब्द", ["हिन्दी", "शब्द"]),
        ("。！？", []),
        ("", []),
    ],
)
def test_tokens_of_every_script(text, tokens):
    assert tokenize([text]).to_pylist() == [tokens]
    assert tokenize(["plain words", text, "", text]).to_pylist() == [["plain", "words"], tokens, [], tokens]


@pytest.mark.parametrize(
    ("documents", "queries", "message"),
    [
        ([], [["a"]], "documents is empty"),
        ([["a"]], [], "queries is empty"),
        (["a b"], [["a"]], "split them into tokens"),
        ([[3]], [["a"]], "tokens that are strings"),
        ([["a", None]], [["a"]], "documents has tokens, or lists of them, that are None"),
        ([["a"], None], [["a"]], "documents has tokens, or lists of them, that are None"),
        ([["a"]], [["a", None]], "queries has tokens, or lists of them, that are None"),
    ],
)
def test_bad_input_is_refused(documents, queries, message):
    with pytest.raises(DataError, match=message):
        okapi_scores(documents, queries)


def test_documents_without_words_score_zero():
    assert (okapi_scores([[], []], [["a"]]) == 0).all()


@pytest.mark.parametrize("aggregate", ["subtask", "mean"])
def test_the_best_mean_within_a_subtask(texts, aggregate, monkeypatch):
    monkeypatch.setattr(bm25, "CHUNK", 7)
    task, ledger = texts(), Ledger()
    ranking = Bm25(aggregate=aggregate, recipe="paper").rank(task, seed=0, ledger=ledger)
    documents, queries = (tokenize(task.texts(part)).to_pylist() for part in (task.pool, task.target))
    okapi = rank_bm25.BM25Okapi(documents)
    each = np.array([okapi.get_scores(query) for query in queries])
    groups = task.subtasks(task.target) if aggregate == "subtask" else np.zeros(len(queries))
    expected = np.max([each[groups == g].mean(axis=0) for g in np.unique(groups)], axis=0)
    assert ranking.score == pytest.approx(expected, abs=1e-9)
    postings = sum(len(set(words)) for words in documents)
    matches = sum(
        len(set(words) & {w for query, h in zip(queries, groups, strict=True) if h == g for w in query})
        for g in np.unique(groups)
        for words in documents
    )
    assert ledger.total().flops == bm25_flops(postings, matches)


@pytest.mark.parametrize("most", [1, 100, 1000])
def test_chunks_hold_so_many_characters(texts, most, monkeypatch):
    task, held = texts(), []
    expected = Bm25().rank(task, seed=0, ledger=Ledger()).score
    monkeypatch.setattr(bm25, "CHUNK_CHARACTERS", most)
    monkeypatch.setattr(bm25, "tokenize", lambda texts: held.append([len(t) for t in texts]) or tokenize(texts))
    assert (Bm25().rank(task, seed=0, ledger=Ledger()).score == expected).all()
    documents = [size for sizes in held[1:] for size in sizes]
    assert documents == [len(text) for text in task.texts(task.pool)]
    assert len(held) > 2
    assert all(sum(sizes) < most + max(documents) for sizes in held[1:])


def test_without_subtasks_both_aggregates_agree(texts):
    task = texts(subtasks=0)
    one, other = (Bm25(aggregate=a).rank(task, seed=0, ledger=Ledger()).score for a in ("subtask", "mean"))
    assert (one == other).all()


def unknown_words(task, count):
    """The task whose first `count` targets share no word with the pool."""
    other = copy.copy(task)
    other.texts = lambda pool: ["zzz"] * count + task.texts(pool)[count:] if pool is task.target else task.texts(pool)
    return other


@pytest.mark.parametrize(("count", "message"), [(3, "3 of 20"), (20, "all scores are zero")])
def test_queries_without_a_known_word_are_said_once(texts, caplog, count, message):
    task = unknown_words(texts(), count)
    with caplog.at_level(logging.WARNING):
        chosen = Bm25(fraction=0.5).select(task, Budget(1, "epochs"), seed=0, ledger=Ledger())
    assert len(caplog.records) == 1
    assert message in caplog.text
    assert (chosen.score == 0).all() == (count == 20)


def test_the_index_is_made_once_and_not_kept(texts, monkeypatch):
    indexes = []
    monkeypatch.setattr(bm25, "Okapi", lambda *args, **options: indexes.append(1) or Okapi(*args, **options))
    selector = Bm25()
    selector.select(texts(), Budget(1, "epochs", count_selection=True), seed=0, ledger=Ledger())
    assert len(indexes) == 1
    assert selector._cached is None


def test_answers_are_not_read(texts):
    task = texts()
    other = copy.copy(task)
    tokens = copy.copy(task.pool.examples)
    object.__setattr__(tokens, "ids", np.zeros_like(tokens.ids))
    other.pool = Pool(task.pool.ids, tokens)
    other.texts = lambda pool: task.texts(task.pool if pool is other.pool else pool)
    one, two = (Bm25().rank(t, seed=0, ledger=Ledger()).score for t in (task, other))
    assert (one == two).all()


@pytest.mark.parametrize(
    "options",
    [{"k1": -1}, {"b": 1.5}, {"epsilon": float("inf")}, {"epsilon": 0.5}, {"aggregate": "max"}, {"recipe": "lucene"}],
)
def test_bad_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Bm25(**options)
