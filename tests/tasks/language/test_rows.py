"""Text as data: formats, which tokens are learned, what is cut and refused, and how batches are laid out."""

from __future__ import annotations

import json
import logging
import signal
from hashlib import blake2b

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from cads.errors import ConfigError, DataError
from cads.recipe import TrainConfig
from cads.runtime.signals import Interrupted
from cads.tasks.language import rows as rows_module
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.tokens import IGNORED, PAD_TO, Tokens, layout, tokens_of
from tests.support.tiny_llama import MARKED, TEMPLATE, conversations, model_folder, sums, tokenizer, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def encode(tmp_path, rows, *, tok=None, longest=200, drop=False, chat=None, **source):
    file = write_lines(tmp_path / "rows.jsonl", rows)
    tok = tok or tokenizer()
    encoder = TokenEncoder(tok, Renderer(tok, chat=chat), longest, drop_unanswered=drop)
    return encoder.encode(load_rows(TextSource(path=str(file), **source), 0))


def marked(tok, tokens, i):
    """The tokens of example i that are learned, and the others, as text."""
    ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
    learned = tokens.loss_mask[tokens.offsets[i] : tokens.offsets[i + 1]]
    return tok.decode(ids[learned]), tok.decode(ids[~learned])


TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho."},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so."},
]


class TestAnswers:
    def test_only_what_the_assistant_says_is_learned(self, tmp_path):
        """Against a mask made by hand: 1 for every character (and end of turn) of the assistant's."""
        by_hand = (
            "<|system|>", "be kind<|end|>\n<|user|>hi<|end|>\n<|assistant|>", "ho.<|end|>",
            "\n<|user|>why?<|end|>\n<|assistant|>", "so.<|end|>", "\n",
        )  # fmt: skip
        tok = tokenizer()
        tokens, _ = encode(tmp_path, [{"messages": TALK}])
        pieces = [tok(piece)["input_ids"] for piece in by_hand]
        assert tokens.ids.tolist() == [i for piece in pieces for i in piece]
        assert tokens.loss_mask.tolist() == [k in (2, 4) for k, piece in enumerate(pieces) for _ in piece]

    def test_a_template_that_marks_answers_gives_the_same(self, tmp_path):
        rows = [{"messages": TALK}, *({"messages": c["messages"]} for c in conversations(4))]
        result, _ = encode(tmp_path, rows)
        said, _ = encode(tmp_path, rows, tok=tokenizer(MARKED))
        assert np.array_equal(result.ids, said.ids)
        assert np.array_equal(result.loss_mask, said.loss_mask)

    def test_prompt_and_response_without_a_template(self, tmp_path):
        tok = tokenizer(None)
        tokens, _ = encode(tmp_path, [{"prompt": "ask", "response": "tell"}], tok=tok)
        assert marked(tok, tokens, 0) == ("tell</s>", "ask\n")

    def test_prompt_and_response_with_a_template_are_a_chat(self, tmp_path):
        tok = tokenizer()
        tokens, _ = encode(tmp_path, [{"prompt": "ask", "response": "tell"}])
        assert marked(tok, tokens, 0) == ("tell<|end|>", "<|user|>ask<|end|>\n<|assistant|>\n")

    def test_all_of_a_text_is_learned_but_its_first_token(self, tmp_path):
        tokens, _ = encode(tmp_path, [{"text": "a story."}])
        assert marked(tokenizer(), tokens, 0)[0] == "a story.</s>"
        assert tokens.answers.tolist() == [len("a story.")]
        labels = tokens.batch(np.arange(1)).labels[0]
        assert int(labels[0]) == IGNORED
        assert int((labels != IGNORED).sum()) == len("a story.")

    def test_alpaca_has_a_context(self, tmp_path):
        row = {"instruction": "add", "input": "1 2", "output": "3"}
        tokens, _ = encode(tmp_path, [row, {**row, "input": ""}], tok=tokenizer(None))
        assert tokens.texts.to_pylist() == ["add\n\n1 2", "add"]
        assert marked(tokenizer(None), tokens, 0) == ("3</s>", "add\n\n1 2\n")

    def test_a_template_that_rewrites_the_past_is_refused(self, tmp_path):
        rewriting = (
            "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>gone"
            "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        with pytest.raises(DataError, match=r"writes the beginning of example 'rows-00000' differently.*generation"):
            encode(tmp_path, [{"messages": TALK}], tok=tokenizer(rewriting))

    def test_a_template_that_raises_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"refuses example 'rows-00000': no system"):
            encode(tmp_path, [{"messages": TALK}], tok=tokenizer("{{ raise_exception('no system') }}"))


class TestLimits:
    def test_what_is_cut_is_counted_and_said(self, tmp_path, caplog):
        rows = [{"prompt": "q" * n, "response": "long answer"} for n in (1, 5, 30)]
        with caplog.at_level(logging.WARNING):
            tokens, positions = encode(tmp_path, rows, tok=tokenizer(None), longest=16, drop=True)
        assert positions.tolist() == [0, 1]
        assert tokens.lengths().tolist() == [14, 16]
        assert "1 of 2 examples were cut to 16 tokens" in caplog.text
        assert "1 examples of rows have no answer token (1 of them after they were cut" in caplog.text

    def test_without_an_answer_token_it_is_refused_by_id(self, tmp_path):
        rows = [{"id": "short", "prompt": "q", "response": "a"}, {"id": "endless", "prompt": "q" * 50, "response": "a"}]
        with pytest.raises(
            DataError, match=r"1 examples of rows have no answer token.*\['endless'\].*raise max_tokens"
        ):
            encode(tmp_path, rows, longest=20)

    @pytest.mark.parametrize("template", [TEMPLATE, MARKED, None])
    def test_empty_answers_are_left_out_where_they_may_be(self, tmp_path, caplog, monkeypatch, template):
        """Everything else is as if they were not there, also where many follow each other."""
        monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 2)
        tok = tokenizer(template)
        if template is None:
            # A token at the beginning and one at the end are no answer either.
            begin = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 3)])
            tok.backend_tokenizer.post_processor = begin
        texts = ["one", "", "two", "  ", "\n", "", "three"]
        rows = [{"id": str(i), "prompt": "q", "response": text} for i, text in enumerate(texts)]
        if template is not None:
            rows = [{"id": r["id"], "messages": [ask("q"), tell(r["response"])]} for r in rows]
            rows[1]["messages"] = [ask("q")]
            rows[3]["messages"] = [ask("q"), tell("a"), ask("q"), tell(" ")]
        tokens, positions = encode(tmp_path, rows, tok=tok, drop=True)
        assert positions.tolist() == [0, 2, 6]
        assert "4 examples of rows have no answer token (0 of them after they were cut" in caplog.text
        assert "['1', '3', '4']: they are left out" in caplog.text
        expected, _ = encode(tmp_path, [rows[i] for i in positions], tok=tok)
        assert np.array_equal(tokens.ids, expected.ids)
        assert np.array_equal(tokens.loss_mask, expected.loss_mask)
        with pytest.raises(DataError, match=r"'1' has (an empty|no) answer: .*drop: true"):
            encode(tmp_path, rows, tok=tok)
        with pytest.raises(DataError, match="nothing is left of rows"):
            encode(tmp_path, rows[3:6], tok=tok, drop=True)

    def test_context_of_the_model(self, model, tmp_path):
        file = write_lines(tmp_path / "sums.jsonl", sums(10))
        config = LanguageConfig(model=str(model), pool=[TextSource(path=str(file))], max_tokens=129)
        with pytest.raises(ConfigError, match=r"max_tokens = 129: the context of .* has 128 positions"):
            config.build(TrainConfig())


class TestFiles:
    def test_every_kind_of_file_gives_the_same_rows(self, tmp_path):
        from datasets import Dataset

        rows, table = sums(9), pa.Table.from_pylist(sums(9))
        write_lines(tmp_path / "a.jsonl", rows)
        (tmp_path / "a.json").write_text(json.dumps(rows))
        pq.write_table(table, tmp_path / "a.parquet")
        pyarrow.csv.write_csv(table, tmp_path / "a.csv")
        Dataset.from_list([*rows[::-1], *rows]).select(range(9, 18)).save_to_disk(str(tmp_path / "a"))
        read = [load_rows(TextSource(path=str(p)), 0) for p in sorted(tmp_path.iterdir())]
        assert len(read) == 5
        for result in read:
            assert result.format == "prompt"
            assert result.ids.to_pylist() == [r["id"] for r in rows]
            assert result.table["prompt"].to_pylist() == [r["prompt"] for r in rows]
            assert result.table["response"].to_pylist() == [r["response"] for r in rows]

    def test_a_line_longer_than_a_block(self, tmp_path):
        write_lines(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y" * 3_000_000}])
        assert len(load_rows(TextSource(path=str(tmp_path / "a.jsonl")), 0)) == 2

    def test_the_format_is_recognised_and_said(self, tmp_path, caplog):
        row = {"instruction": "1?", "input": "", "output": "2", "id": "x", "source": "s"}
        file = write_lines(tmp_path / "a.jsonl", [row])
        with caplog.at_level(logging.INFO):
            rows = load_rows(TextSource(path=str(file)), 0, given_sources=True)
        assert rows.format == "prompt"
        assert rows.ids.to_pylist() == ["x"]
        columns = "prompt = instruction, response = output, context = input, id, source"
        assert f"a ({file}): recognised as prompt, from columns {columns}" in caplog.text

    def test_or_named(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        file = write_lines(tmp_path / "a.jsonl", [{"q": "1?", "r": "2", "text": "other", "key": 7}])
        named = TextSource(path=str(file), format="prompt", columns={"prompt": "q", "response": "r", "id": "key"})
        rows = load_rows(named, 0)
        assert ["not used are text ('other');" in record.getMessage() for record in caplog.records] == [True]
        assert (rows.format, rows.ids.to_pylist()) == ("prompt", ["7"])
        assert load_rows(TextSource(path=str(file), format="text"), 0).format == "text"

    def test_limit_draws_by_seed(self, tmp_path):
        file = write_lines(tmp_path / "a.jsonl", sums(40))
        source = TextSource(path=str(file), limit=10)
        one, again, other = (load_rows(source, seed).ids.to_pylist() for seed in (0, 0, 1))
        assert one == again != other
        assert len(set(one)) == 10

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "x", "has the suffix '.txt'"),
            ("a.jsonl", "", "cannot be read|is empty"),
            ("a.jsonl", "{", "cannot be read"),
            ("a.json", "[1]", "every entry of the list must be an object"),
            ("a.json", "[]", "is empty"),
            ("a.parquet", "no", "cannot be read"),
            (
                "a.jsonl",
                '{"x": 1}',
                "no format is recognised: rename them to messages, to prompt and response, or to text",
            ),
            ("b.jsonl", None, "does not exist"),
        ],
    )
    def test_files_that_are_refused(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load_rows(TextSource(path=str(tmp_path / name)), 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "needs a path or a dataset, one of the two"),
            ({"path": "a", "dataset": "b"}, "needs a path or a dataset, one of the two"),
            ({"path": "a", "format": "poem"}, "format = 'poem': choose from"),
            ({"path": "a", "columns": {"colour": "c"}}, r"columns stand for \['colour'\]"),
            ({"path": "a", "limit": 0}, "limit = 0"),
        ],
    )
    def test_sources_that_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            TextSource(**options)


def ask(text):
    return {"role": "user", "content": text}


def tell(text):
    return {"role": "assistant", "content": text}


def talk(*turns):
    return {"id": "x", "messages": [{"role": r, "content": c} for r, c in turns]}


U, A, S = ("user", "hi"), ("assistant", "ho"), ("system", "be")


class TestBadConversations:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (talk(U, U, A), "'x' has the roles .*do not alternate"),
            (talk(A, U), "do not alternate"),
            (talk(U, S, A), "do not alternate"),
            (talk(S), "do not alternate"),
            (talk(U), "'x' has no answer"),
            (talk(U, ("assistant", " ")), "'x' has an empty answer"),
            (talk(U, ("tool", "3")), "the role 'tool'"),
            ({"id": "x", "messages": []}, "'x' has messages"),
        ],
    )
    def test_messages(self, tmp_path, row, message):
        with pytest.raises(DataError, match=message):
            encode(tmp_path, [row], format="messages")

    def test_an_empty_response(self, tmp_path):
        with pytest.raises(DataError, match="'e' has an empty answer"):
            encode(tmp_path, [{"id": "e", "prompt": "q", "response": "  "}])

    def test_a_prompt_that_is_missing(self, tmp_path):
        with pytest.raises(DataError, match="'e' has prompt = None: it must be text"):
            encode(tmp_path, [{"id": "d", "prompt": "q", "response": "a"}, {"id": "e", "response": "a"}])

    def test_no_chat_template(self, tmp_path):
        with pytest.raises(ConfigError, match="has no chat template, which messages need"):
            encode(tmp_path, [{"messages": TALK}], tok=tokenizer(None))
        with pytest.raises(ConfigError, match="has no chat template"):
            encode(tmp_path, sums(2), tok=tokenizer(None), chat=True)


class TestPools:
    def build(self, model, tmp_path, rows=60, **options):
        file = write_lines(tmp_path / "sums.jsonl", sums(rows))
        pool = options.pop("pool", [TextSource(path=str(file))])
        return LanguageConfig(model=str(model), pool=pool, **options).build(TrainConfig())

    def test_one_file_is_divided(self, model, tmp_path):
        task = self.build(model, tmp_path, n_target=7, n_test=11, n_pool=20)
        parts = [set(p.ids.to_pylist()) for p in (task.pool, task.target, task.test)]
        assert [len(p) for p in parts] == [20, 7, 11]
        assert len(set.union(*parts)) == 38
        assert set(task.pool.source_names) == {"right", "wrong"}
        task.check()

    def test_data_seed_divides(self, model, tmp_path):
        one, again, other = (self.build(model, tmp_path, data_seed=s) for s in (0, 0, 1))
        assert one.pool.content_hash == again.pool.content_hash != other.pool.content_hash

    def test_several_files_are_sources(self, model, tmp_path):
        files = [write_lines(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(9)]) for n in "xyz"]
        pool = [TextSource(path=str(f)) for f in files[:2]]
        task = self.build(model, tmp_path, pool=pool, target=[TextSource(path=str(files[2]))], n_test=4)
        assert task.pool.source_names == ("x", "y")
        assert task.pool.source_sizes.tolist() == [9, 9]
        assert (len(task.target), len(task.test)) == (5, 4)
        assert task.texts(task.target)[0].startswith("z ")

    def test_sources_and_subtasks_by_column(self, model, tmp_path):
        file = write_lines(tmp_path / "sums.jsonl", sums(60))
        columns = {"source": "kind", "subtask": "source"}
        task = self.build(model, tmp_path, pool=[TextSource(path=str(file), columns=columns)], n_target=10)
        assert set(task.pool.source_names) == {"small", "large"}
        right = {r["id"]: r["source"] for r in sums(60)}
        named = [right[i] for i in task.target.ids.to_pylist()]
        codes = task.subtasks(task.target)
        assert len({*zip(named, codes.tolist(), strict=True)}) == len({*named}) == 2

    def test_more_than_there_is(self, model, tmp_path):
        with pytest.raises(DataError, match="the target needs 99 rows where 48 are left"):
            self.build(model, tmp_path, n_target=99)


class TestTokenizers:
    def config(self, folder, tmp_path, **options):
        file = write_lines(tmp_path / "sums.jsonl", sums(10))
        return LanguageConfig(model=str(folder), pool=[TextSource(path=str(file))], **options)

    def test_without_a_pad_token(self, tmp_path):
        folder = model_folder(tmp_path / "m")
        tokenizer(pad=None).save_pretrained(folder)
        with pytest.raises(ConfigError, match="no pad token: set pad_token to one of its tokens, such as '</s>'"):
            self.config(folder, tmp_path).build(TrainConfig())
        with pytest.raises(ConfigError, match="pad_token = 'zzz' is no token"):
            self.config(folder, tmp_path, pad_token="zzz").build(TrainConfig())
        task = self.config(folder, tmp_path, pad_token="</s>").build(TrainConfig())
        assert tokens_of(task.pool).pad == 2
        unknown = tokenizer(pad=None).unk_token
        task = self.config(folder, tmp_path, pad_token=unknown).build(TrainConfig())
        assert tokens_of(task.pool).pad == tokenizer().unk_token_id

    def test_more_tokens_than_the_embedding(self, tmp_path):
        folder = model_folder(tmp_path / "m")
        larger = tokenizer()
        larger.add_tokens([f"<new{i}>" for i in range(20)])
        larger.save_pretrained(folder)
        with pytest.raises(ConfigError, match=r"has 72 tokens and the embedding of .* 64 rows"):
            self.config(folder, tmp_path).build(TrainConfig())

    def test_no_such_model(self, tmp_path):
        with pytest.raises(ConfigError, match=r"the model '.*absent' cannot be loaded"):
            self.config(tmp_path / "absent", tmp_path).build(TrainConfig())

    def test_remote_code_is_not_run(self, tmp_path):
        folder = model_folder(tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config.update(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text("raise SystemExit('it was run')")
        with pytest.raises(ConfigError, match="comes with code of its own, which is not run: set trust_remote_code"):
            self.config(folder, tmp_path).build(TrainConfig())


def random_tokens(sizes, seed=0, *, packed=False, longest=64):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    learned = rng.random(offsets[-1]) < 0.4
    learned[offsets[1:] - 1] = True
    ids = rng.integers(1, 60, offsets[-1]).astype(np.int32)
    texts = pa.array([str(i) for i in range(len(sizes))], pa.large_string())
    return Tokens(ids, learned, offsets, texts, packed=packed, max_length=longest)


SIZES = st.lists(st.integers(2, 30), min_size=1, max_size=12)


class TestTokens:
    @settings(deadline=None, max_examples=40)
    @given(sizes=SIZES, seed=st.integers(0, 99))
    def test_a_batch_holds_what_the_arrays_hold(self, sizes, seed):
        tokens = random_tokens(sizes, seed)
        order = np.random.default_rng(seed).integers(0, len(sizes), 5)
        batch = tokens.batch(order)
        width = batch.inputs["input_ids"].shape[1]
        assert width % PAD_TO == 0
        assert width - max(sizes[i] for i in order) < PAD_TO
        assert batch.tokens == batch.inputs["input_ids"].numel()
        for row, i in enumerate(order):
            ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
            learned = tokens.loss_mask[tokens.offsets[i] : tokens.offsets[i + 1]].copy()
            learned[0] = False
            assert batch.inputs["input_ids"][row, : len(ids)].tolist() == ids.tolist()
            assert int(batch.inputs["attention_mask"][row].sum()) == len(ids)
            expected = np.full(width, IGNORED)
            expected[: len(ids)][learned] = ids[learned]
            assert batch.labels[row].tolist() == expected.tolist()
            places = batch.inputs["answers"][row]
            assert places[places > 0].tolist() == np.flatnonzero(learned).tolist()
        counts = (batch.labels != IGNORED).sum(dim=1)
        assert batch.answer_tokens == int(counts.sum())
        assert torch.allclose(batch.inputs["weight"], counts / max(1.0, counts.float().mean()))

    @settings(deadline=None, max_examples=40)
    @given(sizes=SIZES, seed=st.integers(0, 99))
    def test_a_part_is_what_was_there(self, sizes, seed):
        tokens = random_tokens(sizes, seed)
        order = np.random.default_rng(seed).integers(0, len(sizes), 7)
        part = tokens.take(order)
        all_digests = tokens.digests()
        assert part.digests() == all_digests.take(order)
        edges = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        expected = [blake2b(tokens.ids[a:b].astype(np.int32).tobytes(), digest_size=16).digest() for a, b in edges]
        assert all_digests.to_pylist() == expected
        assert part.texts.to_pylist() == [str(i) for i in order]
        assert torch.equal(part.batch(np.arange(7)).labels, tokens.batch(order).labels)

    @given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40), capacity=st.integers(20, 50))
    def test_rows_are_filled_in_order_and_no_more_than_full(self, sizes, capacity):
        rows, offsets = layout(np.array(sizes), capacity)
        used = {}
        for size, row, offset in zip(sizes, rows.tolist(), offsets.tolist(), strict=True):
            assert used.get(row, 0) == offset
            used[row] = offset + size
            assert used[row] <= capacity
        assert list(used) == list(range(len(used)))
        first = {}
        for size, row in zip(sizes, rows.tolist(), strict=True):
            first.setdefault(row, size)
        assert all(used[r] + first[r + 1] > capacity for r in range(len(used) - 1))

    def test_equal_shapes_cost_the_same(self):
        tokens = random_tokens([5, 9, 7, 20, 8])
        representatives, codes = tokens.shapes()
        for i in range(len(tokens)):
            assert tokens.batch(np.array([i])).shape == tokens.batch(representatives[codes[i] : codes[i] + 1]).shape

    def test_the_arrays_may_be_mapped_from_a_file(self, tmp_path):
        tokens = random_tokens([5, 9, 7])
        tokens.ids.tofile(tmp_path / "ids")
        mapped = np.memmap(tmp_path / "ids", dtype=np.int32, mode="r")
        on_disk = Tokens(mapped, tokens.loss_mask, tokens.offsets, tokens.texts, max_length=64)
        assert torch.equal(on_disk.batch(np.arange(3)).labels, tokens.batch(np.arange(3)).labels)
        assert on_disk.digests() == tokens.digests()


def test_a_signal_while_a_data_set_loads_is_no_fault_of_the_data_set(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted):
        load_rows(TextSource(dataset="anything"), 0)
