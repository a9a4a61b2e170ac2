"""Pool, target and test set: sources keep their names and a row, and an id stands for one row."""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.errors import DataError
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.draws import first_of_each
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.source_names import names_and_prefixes
from cads.tasks.language.splits import split_rows
from tests.support.tiny_llama import model_folder, sums, write_lines

ALL = (None, None, None)


def texts(folder, name, n, **fields):
    """A file of n rows, as a source; `fields` maps further keys to functions of the row's number."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"{name} {i}", **{key: value(i) for key, value in fields.items()}} for i in range(n)]
    return TextSource(path=str(write_lines(path, rows)))


def ids(parts):
    return [i for rows in parts for i in rows.ids.to_pylist()]


def names(parts):
    return [rows.name for rows in parts]


def names_of(*sources):
    return [name for name, _ in names_and_prefixes(sources)]


class TestNames:
    def test_files_of_one_name_are_two_sources(self, tmp_path, caplog):
        pool = [texts(tmp_path, "gsm/train.jsonl", 20), texts(tmp_path, "flan/train.jsonl", 30)]
        split = split_rows(pool, [], [], (None, 5, 5), 0)
        assert sorted(names(split.pool)) == ["flan/train", "gsm/train"]
        assert {i.rsplit("-", 1)[0] for i in ids(split.pool)} == {"flan/train", "gsm/train"}
        result = ids(split.pool) + ids(split.target) + ids(split.test)
        assert len(set(result)) == len(result) == 50
        said = [r.message for r in caplog.records if "of equal names" in r.message]
        assert len(said) == 1
        assert "'gsm/train'" in said[0]
        assert "'flan/train'" in said[0]

    def test_pool_target_and_test_set_may_have_files_of_one_name(self, tmp_path):
        pool, target, test = (texts(tmp_path, f"{n}/data.jsonl", 9) for n in ("pool", "target", "test"))
        split = split_rows([pool], [target], [test], ALL, 0)
        assert [ids(part)[0] for part in (split.pool, split.target, split.test)] == [
            "pool/data-00000",
            "target/data-00000",
            "test/data-00000",
        ]

    def test_names_grow_until_they_differ(self, tmp_path):
        paths = ["a/x/train.jsonl", "b/x/train.jsonl", "b/y/train.jsonl", "b/y/test.jsonl"]
        sources = [TextSource(path=str(tmp_path / p)) for p in paths]
        assert names_of(*sources) == ["a/x/train", "b/x/train", "b/y/train", "test"]

    @pytest.mark.parametrize(
        ("paths", "expected"),
        [
            (["gsm/train.jsonl", "gsm/train.csv"], ["train.jsonl", "train.csv"]),
            (["gsm/train.jsonl.gz", "gsm/train.jsonl"], ["train.jsonl.gz", "train.jsonl"]),
            (["gsm/train.jsonl", "flan/train.csv"], ["gsm/train", "flan/train"]),
            (
                ["gsm/train.jsonl", "gsm/train.csv", "x/flan/train.csv"],
                ["gsm/train.jsonl", "gsm/train.csv", "flan/train.csv"],
            ),
        ],
    )
    def test_suffixes_tell_files_of_one_folder_apart(self, tmp_path, paths, expected):
        assert names_of(*(TextSource(path=str(tmp_path / p)) for p in paths)) == expected

    def test_a_given_name_stays_also_where_it_is_that_of_the_file(self, tmp_path):
        paths = [str(tmp_path / f"{folder}/train.jsonl") for folder in ("gsm", "flan")]
        assert names_of(TextSource("train", paths[0]), TextSource(path=paths[1])) == ["train", "flan/train"]
        joined = names_and_prefixes([TextSource("train", path) for path in paths])
        assert joined == [("train", "train/gsm/train"), ("train", "train/flan/train")]

    def test_names_that_differ_stay_as_they_were(self, tmp_path, caplog):
        sources = [TextSource(path=str(tmp_path / "a" / n)) for n in ("x.jsonl", "y.jsonl.gz", "z.v1.json")]
        assert names_and_prefixes(sources) == [(n, n) for n in ("x", "y", "z.v1")]
        assert not caplog.records

    def test_given_names_stay_and_join_their_files(self, tmp_path):
        web = [TextSource("web", str(tmp_path / n)) for n in ("s1.jsonl", "s2.jsonl")]
        other = TextSource(path=str(tmp_path / "web.jsonl"))
        result = names_and_prefixes([*web, other])
        assert result[:2] == [("web", "web/s1"), ("web", "web/s2")]
        assert result[2][0] not in ("web", "s1", "s2")

    def test_rows_of_joined_files_are_numbered_apart(self, tmp_path):
        files = [texts(tmp_path, f"{n}.jsonl", 9) for n in ("s1", "s2")]
        pool = [TextSource("web", file.path) for file in files]
        split = split_rows(pool, [], [], (None, 2, 2), 0)
        assert set(names(split.pool)) == {"web"}
        assert len(set(ids(split.pool))) == 14

    def test_data_sets_of_the_hub_differ_by_owner_configuration_and_split(self):
        a, b = TextSource(dataset="a/math"), TextSource(dataset="b/math")
        assert names_of(a, b) == ["a/math", "b/math"]
        splits = [TextSource(dataset="a/math", split=s) for s in ("train", "test")]
        assert names_of(*splits) == ["a/math/default/train", "a/math/default/test"]
        configs = [TextSource(dataset="a/math", config=c) for c in ("easy", "hard")]
        assert names_of(*configs) == ["a/math/easy", "a/math/hard"]

    @given(
        st.lists(st.tuples(*[st.sampled_from("ab")] * 3, st.sampled_from(["jsonl", "csv"])), unique=True, min_size=1)
    )
    def test_no_two_files_have_one_name(self, paths):
        sources = [TextSource(path=f"/{a}/{b}/{c}.{suffix}") for a, b, c, suffix in paths]
        result = names_and_prefixes(sources)
        assert len({name for name, _ in result}) == len({prefix for _, prefix in result}) == len(paths)


class TestIds:
    @pytest.mark.parametrize("limit", [None, 2])
    def test_an_id_on_two_rows_is_refused_before_the_file_is_split(self, tmp_path, limit):
        for i in range(20):
            source = texts(tmp_path, "a.jsonl", 20, id=lambda j, i=i: 0 if j == i else j)
            if i == 0:
                load_rows(source, 0)
                continue
            source.limit = limit
            with pytest.raises(DataError, match=r"'id' of .*a.jsonl has 1 ids on more than one row, such as \['0'\]"):
                split_rows([source], [], [], ALL, 0)

    @pytest.mark.parametrize(
        "roles", [("pool", "target"), ("pool", "test set"), ("target", "test set"), ("pool", "pool")]
    )
    def test_an_id_in_two_files_is_refused_also_where_it_is_not_drawn(self, tmp_path, roles):
        files = {"pool": [], "target": [], "test set": []}
        for k, role in enumerate(roles):
            files[role].append(texts(tmp_path, f"f{k}.jsonl", 20, id=lambda i, k=k: "same" if i == 7 else f"{k}-{i}"))
        files["pool"] = files["pool"] or [texts(tmp_path, "pool.jsonl", 9)]
        places = " and ".join(rf"the {role} \(.*f{k}.jsonl\)" for k, role in enumerate(roles))
        with pytest.raises(DataError, match=rf"1 ids are in more than one file, such as \['same'\], in {places}"):
            split_rows(files["pool"], files["target"], files["test set"], (2, 2, 2), 0)

    def test_a_file_that_is_given_twice_is_refused(self, tmp_path):
        pool = texts(tmp_path, "a/x.jsonl", 20)
        again = TextSource(path=str(tmp_path / "a" / ".." / "a" / "x.jsonl"))
        for target, test in (([again], []), ([], [again])):
            with pytest.raises(DataError, match=r"20 ids are in more than one file.*give each file once"):
                split_rows([pool], target, test, ALL, 0)

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
    def test_ids_and_sources_are_what_is_written(self, tmp_path, suffix):
        made = ["2020-01-01", "2020-01-02", "9223372036854775809", "9223372036854775810", "007", "1e5"]
        rows = [{"id": i, "source": i[:4], "text": f"2021-01-0{k}"} for k, i in enumerate(made)]
        path = tmp_path / f"a.{suffix}"
        match suffix:
            case "json":
                path.write_text(json.dumps(rows))
            case "jsonl":
                write_lines(path, rows)
            case "csv":
                path.write_text("id,source,text\n" + "".join(",".join(r.values()) + "\n" for r in rows))
            case "parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
        result = load_rows(TextSource(path=str(path)), 0, given_sources=True)
        assert result.ids.to_pylist() == made
        assert result.sources.to_pylist() == [i[:4] for i in made]
        assert result.table["text"].to_pylist() == [r["text"] for r in rows]

    def test_large_numbers_stay_apart(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f'{{"id": {2**63 + i}, "text": "x{i}"}}\n' for i in range(5)))
        assert load_rows(TextSource(path=str(path)), 0).ids.to_pylist() == [str(2**63 + i) for i in range(5)]

    def test_an_id_that_is_missing_is_refused_and_a_column_without_any_is_not_used(self, tmp_path, caplog):
        some = texts(tmp_path, "a.jsonl", 5, id=lambda i: None if i == 3 else i)
        with pytest.raises(DataError, match=r"'id' of .* has no value in 1 of 5 rows: give each row one"):
            load_rows(some, 0)
        assert load_rows(texts(tmp_path, "b.jsonl", 2, id=lambda i: None), 0).ids.to_pylist() == ["b-00000", "b-00001"]
        assert "'id' of" in caplog.text
        assert "the rows are numbered" in caplog.text
        with pytest.raises(DataError, match=r"'id' of .* holds lists or objects"):
            load_rows(texts(tmp_path, "c.jsonl", 2, id=lambda i: [i]), 0)


def without_source(i):
    return None if i == 3 else "s"


class TestSourceColumns:
    @pytest.mark.parametrize(
        "value", [lambda i: None, without_source, lambda i: ["s"], lambda i: {"a": i}, lambda i: " "]
    )
    def test_one_that_no_one_named_is_used_only_where_every_row_has_a_source(self, tmp_path, caplog, value):
        source = texts(tmp_path, "a.jsonl", 9, source=value)
        result = load_rows(source, 0, given_sources=True)
        assert result.sources is None
        assert "'source' of" in caplog.text
        assert "it is not used" in caplog.text
        caplog.clear()
        assert load_rows(source, 0).sources is None
        source.columns = {"source": "source"}
        with pytest.raises(DataError, match=r"'source' of .*name another column, or rename this one"):
            load_rows(source, 0)


class TestEverySourceKeepsARow:
    def test_a_file_of_one_row_beside_many(self, tmp_path):
        one, many = texts(tmp_path, "one.jsonl", 1), texts(tmp_path, "many.jsonl", 100)
        for seed in range(30):
            split = split_rows([one, many], [], [], (20, 30, 40), seed)
            assert set(names(split.pool)) == {"one", "many"}
            assert [len(ids(part)) for part in (split.pool, split.target, split.test)] == [20, 30, 40]

    def test_a_source_column_with_one_row_of_a_source(self, tmp_path):
        source = texts(tmp_path, "a.jsonl", 60, source=lambda i: "rare" if i == 7 else "common")
        source.limit = 50
        for seed in range(30):
            (rows,) = split_rows([source], [], [], (10, 15, 15), seed).pool
            assert set(rows.sources.to_pylist()) == {"rare", "common"}

    def test_of_the_target_too(self, tmp_path):
        pool = texts(tmp_path, "pool.jsonl", 9)
        target = [texts(tmp_path, "one.jsonl", 1), texts(tmp_path, "many.jsonl", 60)]
        for seed in range(30):
            assert set(names(split_rows([pool], target, [], (None, 10, 30), seed).target)) == {"one", "many"}

    def test_or_it_is_said_to_be_gone(self, tmp_path, caplog):
        pool = [texts(tmp_path, f"{n}.jsonl", 1) for n in "abcd"]
        split = split_rows(pool, [], [], (None, 1, 1), 0)
        (gone,) = [r.message for r in caplog.records if "they are gone" in r.message]
        assert "no row of 2 of 4 sources is left in the pool" in gone
        assert all(f"'{name}'" in gone for name in set("abcd") - set(names(split.pool)))

    def test_also_when_all_its_examples_are_left_out(self, tmp_path, caplog):
        rows = [
            {"prompt": f"q{i}", "response": "" if i < 3 else "a", "source": "x" if i < 3 else "y"} for i in range(30)
        ]
        path = write_lines(tmp_path / "a.jsonl", rows)
        config = LanguageConfig(
            model=str(model_folder(tmp_path / "m")), pool=[TextSource(path=str(path))], n_test=2, n_target=2, drop=True
        )
        with caplog.at_level(logging.WARNING):
            task = config.build(TrainConfig())
        assert task.pool.source_names == ("y",)
        assert "no row of 1 of 2 sources is left in the encoded pool, such as ['x']" in caplog.text

    def test_where_no_source_would_be_lost_the_draw_is_as_it_always_was(self, tmp_path):
        split = split_rows([texts(tmp_path, "a.jsonl", 50), texts(tmp_path, "b.jsonl", 50)], [], [], (None, 10, 20), 3)
        test = np.sort(np.random.default_rng((6, 3, 0)).permutation(100)[:20])
        assert ids(split.test) == [f"{'ab'[p // 50]}-{p % 50:05d}" for p in test]
        rest = np.delete(np.arange(100), test)
        target = np.sort(rest[np.random.default_rng((6, 3, 1)).permutation(80)[:10]])
        assert ids(split.target) == [f"{'ab'[p // 50]}-{p % 50:05d}" for p in target]

    def test_also_when_it_is_a_file_of_which_nothing_is_left(self, tmp_path, caplog):
        files = {"x": [{"prompt": "q", "response": ""}] * 9, "y": sums(30), "z": sums(40)[30:]}
        sources = [TextSource(path=str(write_lines(tmp_path / f"{n}.jsonl", rows))) for n, rows in files.items()]
        settings = {"model": str(model_folder(tmp_path / "m")), "n_test": 2, "n_target": 2, "drop": True}
        task = LanguageConfig(pool=sources[:2], target=sources[2:], **settings).build(TrainConfig())
        assert task.pool.source_names == ("y",)
        assert "no row of 1 of 2 sources is left in the encoded pool, such as ['x']: they are gone" in caplog.text

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
    def test_for_any_sources(self, codes, data):
        codes = np.array(codes)
        count = data.draw(st.integers(0, len(codes)))
        order = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(len(codes))
        chosen = first_of_each(order, codes, count)
        assert len(set(chosen.tolist())) == len(chosen) == count
        plain = order[:count]
        if len(set(codes)) <= count:
            assert set(codes[chosen]) == set(codes)
        if set(codes[plain]) == set(codes) or len(set(codes)) > count:
            assert set(chosen) == set(plain)


class TestOrderOfRows:
    @given(st.randoms(use_true_random=False), st.booleans(), st.sampled_from([None, 25]))
    def test_files_with_ids_give_the_same_examples_in_any_order_of_their_rows(
        self, tmp_path_factory, random, has_sources, limit
    ):
        folder = tmp_path_factory.mktemp("files")
        made = {n: [{"id": f"{n}{i}", "text": f"{n} {i}", "source": "st"[i % 7 == 0]} for i in range(40)] for n in "ba"}
        result = []
        for _ in range(2):
            files = [str(write_lines(folder / f"{n}.jsonl", rows)) for n, rows in made.items()]
            pool = [TextSource(path=file, limit=limit) for file in files]
            split = split_rows(pool[:1] if has_sources else pool, [], [], (9, 5, 7), 1)
            result.append([sorted(ids(part)) for part in (split.pool, split.target, split.test)])
            for rows in made.values():
                random.shuffle(rows)
        assert result[0] == result[1]
        assert [len(part) for part in result[0]] == [9, 5, 7]


class TestTooFewRows:
    def test_a_given_target_is_never_drawn_from_the_pool(self, tmp_path):
        pool, target = texts(tmp_path, "pool.jsonl", 50), texts(tmp_path, "target.jsonl", 1)
        with pytest.raises(DataError, match="the test set takes all 1 rows of the target: give more rows"):
            split_rows([pool], [target], [], ALL, 0)

    def test_a_pool_without_rows_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no row is left for the pool"):
            split_rows([texts(tmp_path, "pool.jsonl", 2)], [], [], ALL, 0)
        with pytest.raises(DataError, match="the test set takes all 5 rows of the pool"):
            split_rows([texts(tmp_path, "pool.jsonl", 5)], [], [], (None, None, 5), 0)
