"""Conversations in the ways that data sets write them, and what of them the chat template gets."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cads.errors import ConfigError, DataError
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.token_cache import TokenCache
from cads.tasks.language.written_json import as_rows
from tests.support.tiny_llama import MARKED, TEMPLATE, tokenizer, write_lines
from tests.support.token_caches import warnings_of

CALLING = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.name }} {% endfor %}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{% if m.role == 'tool' %}user|>#{% else %}{{ m.role }}|>{% endif %}"
    "{% if m.reasoning_content %}?{{ m.reasoning_content }}?{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}={{ c.function.name }}:{{ c.function.arguments.a }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes tools, tool calls, tools' replies and chains of thought."""
WRITING = (
    "#{{ tools | tojson }}#{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}#{{ m.tool_calls | tojson }}#"
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes tools and tool calls as JSON, between #."""
JOINING = CALLING.replace("{{ c.function.arguments.a }}", "{{ 'x' + c.function.arguments }}")
"""Joins the arguments of a call to text, as DeepSeek's template does."""


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def encoded(tmp_path, rows, template=TEMPLATE, *, drop=False, **options):
    tok = tokenizer(template)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    encoder = TokenEncoder(tok, Renderer(tok), 1000, drop_unanswered=drop)
    return tok, *encoder.encode(load_rows(TextSource(path=str(file), **options), 0))


def written(tmp_path, rows, template=TEMPLATE, **options):
    """The whole text of each example, and what is learned of it."""
    tok, tokens, _ = encoded(tmp_path, rows, template, **options)
    result = []
    for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids, mask = tokens.ids[begin:end], tokens.loss_mask[begin:end]
        result.append((tok.decode(ids), tok.decode(ids[mask])))
    return result


def rendered(path, template):
    """The text of each example of a file; the tokenizer of the tests knows few characters."""
    rows = load_rows(TextSource(path=str(path)), 0)
    write = Renderer(tokenizer(template)).of(rows.format)
    return [
        write(row, name).text
        for ids, table in rows.shards()
        for row, name in zip(as_rows(table), ids.to_pylist(), strict=True)
    ]


PLAIN = ("<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>b<|end|>\n", "b<|end|>")
TALK = [{"role": "system", "content": "s"}, user("a"), assistant("b")]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
WAYS = {
    "messages": {"messages": TALK},
    "messages as json": {"messages": json.dumps(TALK)},
    "a system column": {"messages": TALK[1:], "system": "s"},
    "sharegpt": {"conversations": SHAREGPT},
    "sharegpt with a system column": {"conversations": SHAREGPT[1:], "system": "s"},
    "conversations of roles": {"conversations": TALK},
    "content parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]},
    "prompt and completion lists": {"prompt": TALK[:2], "completion": TALK[2:]},
    "a prompt list and a completion text": {"prompt": TALK[:2], "completion": "b"},
    "lists as json": {"prompt": json.dumps(TALK[:2]), "completion": json.dumps(TALK[2:])},
    "an object of lists": {"messages": {"role": [m["role"] for m in TALK], "content": [m["content"] for m in TALK]}},
    "keys without a value": {"messages": [{**m, "name": None, "tool_calls": [], "weight": None} for m in TALK]},
}


class TestWays:
    @pytest.mark.parametrize("template", [TEMPLATE, MARKED])
    @pytest.mark.parametrize("way", WAYS)
    def test_all_give_the_same_example_and_nothing_is_said(self, tmp_path, caplog, way, template):
        assert written(tmp_path, [WAYS[way]], template) == [PLAIN]
        assert warnings_of(caplog) == []

    @pytest.mark.parametrize("way", WAYS)
    def test_also_from_parquet(self, tmp_path, way):
        pq.write_table(pa.Table.from_pylist([WAYS[way], WAYS[way]]), tmp_path / "a.parquet")
        tok = tokenizer()
        rows = load_rows(TextSource(path=str(tmp_path / "a.parquet")), 0)
        tokens, _ = TokenEncoder(tok, Renderer(tok), 1000).encode(rows)
        assert tok.decode(tokens.ids) == 2 * PLAIN[0]

    def test_only_the_completion_of_a_prompt_list_is_learned(self, tmp_path):
        row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
        (text, learned), (_, marked) = (written(tmp_path, [row], t)[0] for t in (TEMPLATE, MARKED))
        assert "<|assistant|>b<|end|>" in text
        assert learned == marked == "d<|end|>"

    @pytest.mark.parametrize(
        "entry",
        [
            {"from": "Paris", "to": "Rome"},
            {"role": "admin", "name": "Ann"},
            {"role": "user", "name": "Ann"},
            {"role": "admin", "content": "x"},
        ],
    )
    def test_an_answer_that_is_json_of_something_else_is_text(self, entry):
        row = {"prompt": "extract", "response": json.dumps([entry])}
        example = Renderer(tokenizer()).of("prompt")(row, "x")
        (begin, end), *_ = example.answers
        assert example.text[begin:end] == row["response"] + "<|end|>"

    def test_lists_need_a_chat_template(self, tmp_path):
        with pytest.raises(ConfigError, match="has no chat template, which messages need"):
            encoded(tmp_path, [WAYS["prompt and completion lists"]], None)

    def test_two_system_messages_are_said(self, tmp_path, caplog):
        assert written(tmp_path, [{"messages": TALK, "system": "other"}]) == [PLAIN]
        assert "that of the column is not (1 examples, such as 'other')" in warnings_of(caplog)[0]


class TestKeys:
    @pytest.mark.parametrize("template", [TEMPLATE, MARKED])
    def test_a_weight_of_zero_is_not_learned(self, tmp_path, template):
        turns = [user("a"), assistant("b", weight=0), user("c", weight=1), assistant("d", weight=1)]
        ((text, learned),) = written(tmp_path, [{"messages": turns}], template)
        assert "b<|end|>" in text
        assert learned == "d<|end|>"

    def test_weights_that_are_neither_zero_nor_one_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"weight = 0.5: use 1 \(learned\) or 0"):
            encoded(tmp_path, [{"messages": [user("a"), assistant("b", weight=0.5)]}])
        with pytest.raises(DataError, match="has no answer whose weight is not 0"):
            encoded(tmp_path, [{"messages": [user("a"), assistant("b", weight=0)]}])

    @pytest.mark.parametrize("arguments", [{"a": "1"}, '{"a": "1"}'])
    def test_tools_their_calls_and_thoughts_are_written_and_learned(self, tmp_path, caplog, arguments):
        call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            assistant("b", reasoning_content="so"),
        ]
        row = {"messages": turns, "tools": [{"name": "f"}, {"name": "g"}]}
        expected = (
            "<|system|>f g <|end|>\n<|user|>a<|end|>\n<|assistant|>=f:1<|end|>\n<|user|>#2<|end|>\n"
            "<|assistant|>?so?b<|end|>\n",
            "=f:1<|end|>?so?b<|end|>",
        )
        assert written(tmp_path, [row, row], CALLING) == [expected] * 2
        assert warnings_of(caplog) == [
            "rows: tool_call_id is not written by the chat template and not used, such as 'x'"
        ]
        assert written(tmp_path, [{**row, "tools": json.dumps(row["tools"])}], CALLING) == [expected]
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        tok = tokenizer(CALLING)
        tokens, _ = TokenEncoder(tok, Renderer(tok), 1000).encode(
            load_rows(TextSource(path=str(tmp_path / "a.parquet")), 0)
        )
        assert tok.decode(tokens.ids) == expected[0]

    @pytest.mark.parametrize("way", ["objects", "text", "parquet of text"])
    def test_nulls_that_are_written_in_json_reach_the_template(self, tmp_path, way):
        calls = [{"function": {"name": "f", "arguments": {"a": None, "b": [None, {"c": None}]}}}]
        tools = [{"name": "f", "parameters": {"a": {"default": None, "enum": ["x", None]}}}]
        row = {"messages": [user("a"), assistant("", tool_calls=calls)], "tools": tools}
        if way != "objects":
            row = {name: json.dumps(value) for name, value in row.items()}
        path = write_lines(tmp_path / "a.jsonl", [row])
        if way == "parquet of text":
            path = tmp_path / "a.parquet"
            pq.write_table(pa.Table.from_pylist([row]), path)
        (text,) = rendered(path, WRITING)
        assert text.split("#")[1::2] == [json.dumps(tools), json.dumps(calls)]

    def test_keys_that_arrow_adds_to_structs_do_not(self, tmp_path):
        calls = [[{"function": {"name": "f", "arguments": {name: 1}}}] for name in "ab"]
        rows = [{"messages": [user("a"), assistant("", tool_calls=c)], "tools": [{"name": "f"}]} for c in calls]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        texts = rendered(tmp_path / "a.parquet", WRITING)
        assert [text.split("#")[3] for text in texts] == [json.dumps(c) for c in calls]

    @pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
    def test_templates_that_join_arguments_get_them_as_json(self, tmp_path, arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        ((text, _),) = written(tmp_path, [{"messages": [user("a"), assistant("", tool_calls=[call])]}], JOINING)
        assert "=f:x" in text
        assert ": 1" in text

    def test_what_the_template_does_not_write_is_named_with_values(self, tmp_path, caplog):
        rows = [{"messages": [user("a", name=f"n{i}"), assistant("b", reasoning_content="r")]} for i in range(5)]
        rows = [{**row, "tools": [{"name": "f"}]} for row in rows]
        assert {text for text, _ in written(tmp_path, rows)} == {PLAIN[0].removeprefix("<|system|>s<|end|>\n")}
        said = warnings_of(caplog)
        assert "rows: name is not written by the chat template and not used, such as 'n0', 'n1', 'n2'" in said
        assert "rows: reasoning_content is not written by the chat template and not used, such as 'r'" in said
        assert "rows: tools is not written by the chat template and not used, such as [{'name': 'f'}]" in said

    def test_a_thought_that_is_written_in_the_last_turn_only_is_said(self, tmp_path, caplog):
        turns = [user("a"), assistant("b", reasoning_content="t1"), user("c"), assistant("d", reasoning_content="t2")]
        last = CALLING.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
        ((text, _),) = written(tmp_path, [{"messages": turns}], last)
        assert "t1" not in text
        (said,) = warnings_of(caplog)
        assert "does not write every reasoning_content as it is (1 examples, such as 't1')" in said

    def test_a_system_message_that_the_template_leaves_out_is_said(self, tmp_path, caplog):
        silent = TEMPLATE.replace("<|{{ m['role'] }}|>", "{% if m['role'] != 'system' %}<|{{ m['role'] }}|>").replace(
            "<|end|>\n{% endfor", "<|end|>\n{% endif %}{% endfor"
        )
        talk = [{"role": "system", "content": "be kind"}, *TALK[1:]]
        written(tmp_path, [{"messages": talk}], silent)
        assert "does not write the content of system as it is (1 examples, such as 'be kind')" in warnings_of(caplog)[0]

    def test_a_call_that_the_template_does_not_write_is_no_answer(self, tmp_path):
        turns = [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
        with pytest.raises(DataError, match=r"has an empty answer \(the chat template does not write its"):
            encoded(tmp_path, [{"messages": turns}])

    def test_the_cache_says_the_same(self, tmp_path, caplog):
        rows = [{"id": f"r{i}", "messages": [user("a", name="n"), assistant("b")]} for i in range(3)]
        rows.append({"id": "bad", "messages": [user("a"), assistant(None)]})
        file = write_lines(tmp_path / "rows.jsonl", rows)
        tok = tokenizer()
        cache = TokenCache(tmp_path / "cache", TokenEncoder(tok, Renderer(tok), 1000, drop_unanswered=True))
        said = []
        for _ in range(2):
            _, (report,) = cache.fetch([load_rows(TextSource(path=str(file)), 0)])
            said.append(warnings_of(caplog))
            assert report.unusable.tolist() == report.left_out.tolist() == [3]
        assert said[0] == said[1]
        assert len(said[0]) == 2


REFUSED = {
    "an image": (
        [user([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]), assistant("b")],
        "a part of type 'image_url' in the content of user: cads reads text",
    ),
    "a role that the template lacks": (
        [user("a"), assistant("b"), {"role": "tool", "content": "2"}, assistant("c")],
        "the role 'tool', which the chat template does not name: use system, user, assistant",
    ),
    "a developer": ([{"role": "developer", "content": "s"}, user("a"), assistant("b")], "the role 'developer'"),
    "no content": ([user(None), assistant("b")], "content of user = None: it must be text"),
    "an answer without content": ([user("a"), assistant(None)], "content of assistant = None: it must be text"),
    "a system message alone": ([{"role": "system", "content": "s"}], "which do not alternate"),
    "the assistant first": ([assistant("b"), user("a"), assistant("b")], "which do not alternate"),
    "no messages": ([], r"messages = \[\]"),
    "text": ("hello", "messages = 'hello'"),
    "no roles": ([{"content": "a"}], "the message .*: each needs role and content"),
}


class TestUnusable:
    @pytest.mark.parametrize("name", REFUSED)
    def test_it_is_refused_by_id_with_the_remedy(self, tmp_path, name):
        messages, reason = REFUSED[name]
        with pytest.raises(DataError, match=rf"example 'x' has .*{reason}.*or set drop: true to leave out"):
            encoded(tmp_path, [{"id": "x", "messages": messages}, {"id": "y", "messages": TALK}])

    @pytest.mark.parametrize("name", REFUSED)
    def test_or_left_out_counted_and_listed(self, tmp_path, caplog, name):
        messages, _ = REFUSED[name]
        bad = [{"id": f"bad-{i}", "messages": messages} for i in range(4)]
        good = [{"id": f"good-{i}", "messages": TALK} for i in range(2)]
        _, tokens, positions = encoded(tmp_path, [good[0], *bad, good[1]], drop=True)
        assert positions.tolist() == [0, 5]
        assert len(tokens) == 2
        (said,) = warnings_of(caplog)
        assert "4 examples of rows cannot be used, such as ['bad-0', 'bad-1', 'bad-2'] (they have " in said
        assert said.endswith("they are left out")
        with pytest.raises(DataError, match=r"nothing is left.*repair them"):
            encoded(tmp_path, bad, drop=True)

    def test_a_prompt_that_is_no_text_is_left_out_too(self, tmp_path, caplog):
        rows = [{"id": "n", "prompt": None, "response": "b"}, {"id": "y", "prompt": "a", "response": "b"}]
        assert encoded(tmp_path, rows, drop=True)[2].tolist() == [1]
        assert "['n'] (they have prompt = None: it must be text): they are left out" in warnings_of(caplog)[0]

    def test_and_what_the_template_refuses(self, tmp_path, caplog):
        strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
        rows = [{"id": "n", "messages": TALK}, {"id": "y", "messages": TALK[1:]}]
        assert encoded(tmp_path, rows, strict, drop=True)[2].tolist() == [1]
        assert "['n'] (they have a conversation that the chat template refuses: no system)" in warnings_of(caplog)[0]

    def test_unusable_and_unanswered_examples_are_counted_apart(self, tmp_path, caplog):
        rows = [
            {"id": "null", "messages": [user(None), assistant("b")]},
            {"id": "empty", "messages": [user("a"), assistant(" ")]},
            {"id": "good", "messages": TALK},
        ]
        assert encoded(tmp_path, rows, drop=True)[2].tolist() == [2]
        unanswered, unusable = warnings_of(caplog)
        assert "1 examples of rows have no answer token" in unanswered
        assert "['empty']" in unanswered
        assert "1 examples of rows cannot be used, such as ['null']" in unusable
