"""Pools of P3's templates, on a file of the same shape in which every content has a word of its own."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cads.errors import ConfigError, DataError
from cads.study.analysis.points import points_of
from cads.study.grid import filled, settings
from experiments import p3, p3_figure
from experiments.language_data import read_sections
from experiments.p3_choices import chance, questions, read_options
from experiments.p3_content import content_groups, phrases
from experiments.p3_data import P3Config, P3Draws, Rows, data_set_of, read_p3
from experiments.p3_report import report
from experiments.p3_rivals_figure import draw_rivals
from experiments.p3_rivals_report import over_targets, rivals_report
from tests.support.paths import CONFIGS
from tests.support.tiny_corpora import WORDS

TEMPLATES = {
    "plain": ("{story}\n\nGiven the context: {question}", "{answer}"),
    "heard": ("I heard that {story}\n\nAnd I was wondering {question}", "{answer}"),
    "reverse": ('The answer to it is "{answer}". What is the whole story?', "{story}"),
    "choices": ("Question: {question}\n\nContext: {story}\n\nWhich one of these?\n\nA: {answer}", "A"),
}
DATA_SETS = ("common_gen", "social_i_qa", "quarel", "qasc", "wiqa")
N_CONTENTS = 30
SETTINGS = ("needle", "transfer")


def content(data_set: str, i: int) -> dict[str, str]:
    """What a row says. Rows of a data set come in pairs with one story; the first of common_gen is in qasc too."""
    if (data_set, i) == ("qasc", 0):
        data_set = "common_gen"
    story_words = random.Random(f"{data_set} {i // 2}").choices(WORDS, k=7)
    answer_words = random.Random(f"{data_set} {i} answer").choices(WORDS, k=5)
    marker = f"{data_set.replace('_', '')}{i // 2}x"
    return {
        "story": " ".join([marker, *story_words]) + ".",
        "question": "What will they do next?",
        "answer": " ".join([f"{marker}answer{i}", *answer_words]),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The templates of five data sets in random order, with empty answers and a text that is too long."""
    columns: dict[str, list[str]] = {name: [] for name in ("id", "source", "prompt", "response")}
    numbers = list(range(len(DATA_SETS) * len(TEMPLATES) * N_CONTENTS))
    random.Random(0).shuffle(numbers)
    rows = [
        (f"{data_set}_{name}", *(part.format(**content(data_set, i)) for part in parts))
        for data_set in DATA_SETS
        for name, parts in TEMPLATES.items()
        for i in range(N_CONTENTS)
    ]
    rows += [("trec_what", f"What is {i}?", " \n") for i in range(3)]
    rows += [("xsum_long", "long " * 400, "short")]
    for k, (template, prompt, response) in enumerate(rows):
        for name, value in zip(columns, (f"{template}/{k}", template, prompt, response), strict=True):
            columns[name].append(value)
    path = tmp_path_factory.mktemp("p3") / "p3.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def config(setting: str, **changes) -> P3Config:
    given = {"setting": setting, "targets": ["common_gen"], "templates": 6, "rows": 5, "needles": 2}
    return filled(P3Config, {**given, "n_target": 20, "n_test": 30, **changes}, "data")


def markers(rows: Rows, positions: np.ndarray) -> set[str]:
    """The stories of rows, by the words that no other has."""
    return {m for i in positions for m in re.findall(r"\b([a-z]+\d+x)", f"{rows.prompts[i]} {rows.responses[i]}")}


class TestDraws:
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("seed", range(4))
    def test_no_content_is_in_two_of_target_test_set_and_pool(self, file, setting, seed):
        rows = read_p3(file)
        drawn = P3Draws(rows, config(setting)).draw("common_gen", seed)
        assert {name: len(positions) for name, positions in drawn.items()} == {"target": 20, "test": 30, "pool": 30}
        assert all(len(set(positions)) == len(positions) for positions in drawn.values())
        target, test, pool = (markers(rows, drawn[name]) for name in ("target", "test", "pool"))
        # Not the rows of as few stories as would be enough.
        assert len(target) > 3
        assert len(test) > 4
        assert not target & test
        assert not (target | test) & pool

    def test_content_of_the_test_set_in_another_data_set_stays_out_of_the_pool(self, file):
        rows = read_p3(file)
        draws = P3Draws(rows, config("transfer", templates=16, rows=25))
        held = [draws.draw("common_gen", seed) for seed in range(8)]
        twice = [drawn for drawn in held if "commongen0x" in markers(rows, [*drawn["target"], *drawn["test"]])]
        assert twice
        for drawn in twice:
            assert "commongen0x" not in markers(rows, drawn["pool"])

    def test_templates_of_the_data_set(self, file):
        rows = read_p3(file)
        for setting, n_own in (("transfer", 0), ("needle", 2)):
            for seed in range(4):
                pool = P3Draws(rows, config(setting)).draw("common_gen", seed)["pool"]
                templates = {rows.templates[i] for i in pool}
                assert len(templates) == 6
                assert sum(data_set_of(name) == "common_gen" for name in templates) == n_own

    def test_the_same_seed_draws_the_same_rows_and_another_one_others(self, file):
        draws = [P3Draws(read_p3(file), config("needle")).draw("common_gen", seed) for seed in (0, 0, 1)]
        for name in ("target", "test", "pool"):
            one, again, other = (drawn[name].tolist() for drawn in draws)
            assert one == again
            assert set(one) != set(other)

    def test_too_few_rows_or_templates_are_said(self, file):
        rows = read_p3(file)
        for changes, message in (
            ({"n_target": 100}, "common_gen has 120 rows"),
            ({"templates": 20}, "lower templates"),
            ({"rows": 29}, "no template of common_gen"),
        ):
            with pytest.raises(DataError, match=message):
                P3Draws(rows, config("needle", **changes)).draw("common_gen", 0)


class TestContent:
    def test_rows_of_one_story_are_one_group_in_all_templates(self, file):
        rows = read_p3(file)
        own = [i for i in range(len(rows)) if rows.data_sets[i] == "social_i_qa"]
        found = content_groups([P3Draws(rows, config("needle")).phrases[i] for i in own])
        stories = [markers(rows, [i]).pop() for i in own]
        assert len(set(found.tolist())) == len(set(stories)) == N_CONTENTS // 2
        assert len(set(zip(found.tolist(), stories, strict=True))) == N_CONTENTS // 2

    def test_words_of_the_template_tell_nothing(self):
        prompts = [f"Tell me what comes of this story here: number {i}" for i in range(12)]
        assert phrases(prompts, ["yes"] * 12, ["t"] * 12) == [frozenset()] * 12

    def test_groups_join_through_others(self):
        assert content_groups([["a"], ["b"], ["a", "b"], ["c"], []]).tolist()[:3] in ([0] * 3, [1] * 3, [2] * 3)
        assert len(set(content_groups([["a"], ["b"], ["a", "b"], ["c"], []]).tolist())) == 3


class TestData:
    def test_empty_answers_are_counted_by_data_set(self, file):
        rows = read_p3(file)
        assert rows.left_out == {"empty answer": {"trec": 3}}
        assert "trec" not in rows.data_sets

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"setting": "near"}, "setting"), ({"targets": ["mnist"]}, "mnist"), ({"needles": 6}, "needles"),
            ({"rows": 0}, "rows"),
        ],
    )  # fmt: skip
    def test_bad_values_are_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            config(changes.pop("setting", "needle"), **changes)

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "p3.parquet").write_text("no")
        with pytest.raises(DataError, match="columns"):
            read_p3(tmp_path / "p3.parquet")

    @pytest.mark.parametrize("name", ["p3-needle", "p3-transfer", "p3-rankings"])
    def test_configurations_are_read(self, name):
        found = filled(P3Config, read_sections(CONFIGS / f"{name}.yaml")["data"], "data")
        assert found.setting == ("transfer" if name == "p3-transfer" else "needle")
        assert (found.templates * found.rows, found.n_target, found.n_test) == (960, 120, 300)

    @pytest.mark.parametrize("name", ["p3-rankings", "p3-135m"])
    def test_what_trains_on_part_of_the_pool_takes_the_target_too(self, name):
        sections = read_sections(CONFIGS / f"{name}.yaml")
        entries = [entry for entry in sections["methods"] if isinstance(entry, dict)]
        assert {"less"} <= {entry["method"] for entry in entries}
        assert all(entry["options"]["target_fraction"] for entry in entries)


def choice_rows() -> Rows:
    """Two rows of quartz and one of social_i_qa, each in several templates, and what has no options."""
    written = [
        ("quartz_read_passage_below_choose/0", "Read (choices are more or less ):\n\nIs it more or less?", "more"),
        ("quartz_use_info_from_paragraph_question/0", "Is it more or less?", "more"),
        ("quartz_read_passage_below_choose/1", "Read (choices are more or or less ):\n\nMore?", "less"),
        ("quartz_use_info_from_paragraph_question/1", "More?", "less"),
        ("social_i_qa_Show_choices_and_generate_index/0", "Who?\n\nA: Ann\n\nB: Bob\n\nC: Cid", "C"),
        ("social_i_qa_Generate_answer/0", "Who?", "Cid"),
        ("social_i_qa_Check_if_a_random_answer_is_valid_or_not/0", "Is it Ann?", "No"),
        ("dream_baseline/0", "- A dash.\n\nQuestion: What?\n\n- Tea.\n\n- Rain.", "Rain."),
        ("common_gen_Put_together/0", "Put together: a, b", "a b"),
    ]
    ids, prompts, responses = map(list, zip(*written, strict=True))
    templates = [name.rsplit("/", 1)[0] for name in ids]
    return Rows(ids, templates, prompts, responses, [data_set_of(name) for name in templates], {})


class TestChoices:
    def asked(self) -> dict[str, tuple[list[str], int]]:
        rows = choice_rows()
        found = questions(rows, np.arange(len(rows)), read_options(rows))
        return {question["prompt"]: (question["choices"], question["answer"]) for question in found}

    def test_the_options_of_a_row_hold_in_all_its_templates(self):
        found = self.asked()
        assert found["Is it more or less?"] == (["more", "less"], 0)
        assert found["Who?"] == (["Ann", "Bob", "Cid"], 2)
        assert found["Who?\n\nA: Ann\n\nB: Bob\n\nC: Cid"] == (["A", "B", "C"], 2)
        assert found["- A dash.\n\nQuestion: What?\n\n- Tea.\n\n- Rain."] == (["Tea.", "Rain."], 1)

    def test_what_cannot_be_told_apart_or_answers_otherwise_is_no_question(self):
        assert not {"More?", "Is it Ann?", "Put together: a, b"} & set(self.asked())

    def test_chance(self):
        assert chance([{"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}]) == 0.375


@pytest.mark.usefixtures("packages")
class TestExperiment:
    def given(self, folder: Path) -> list[str]:
        sections = {
            "data": {**vars(config("needle")), "n_test": 12, "n_target": 8},
            "pretraining": {
                "tokens": 4000, "vocabulary": 300,
                "ladder": {"tiny": {"hidden": 32, "layers": 1, "intermediate": 32}},
            },
            "sizes": ["tiny"],
            "task": {"max_tokens": 240},
            "train": {"batch_size": 4, "learning_rate": 0.003},
            "budgets": ["4 epochs", "8 epochs"],
            "seeds": 2,
            "metric": "loss",
            "methods": ["cads", "joint", "target-only", "full"],
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(sections))
        flags = ["--out", folder / "run", "--models", folder / "models", "--results", folder / "page.md"]
        return [str(word) for word in (folder / "config.yaml", *flags)]

    def test_a_missing_file_is_said_and_nothing_is_run(self, tmp_path, capsys):
        assert p3.main([*self.given(tmp_path), "--file", f"p3={tmp_path / 'none.parquet'}"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "skipped" in said
        assert "give it with --file p3=PATH" in said
        assert not (tmp_path / "run").exists()

    def test_from_the_file_to_the_page(self, file, tmp_path):
        words = [*self.given(tmp_path), "--file", f"p3={file}"]
        assert p3.main([*words, "--budgets", "8 epochs"]) == 0
        page = (tmp_path / "page.md").read_text()
        for part in ("## Bars", "| common_gen | 8 epochs | 2 |", "trec 3", "xsum 1", "## What `cads` drew"):
            assert part in page
        cells = list((tmp_path / "run").glob("common_gen/*/tables/runs/*"))
        assert len(cells) == 8
        assert (tmp_path / "config.png").exists() == ("(config.png)" in page)
        assert p3.main([*words, "--budgets", "4 epochs", "--methods", "full", "--seeds", "1"]) == 0
        assert len(list((tmp_path / "run").glob("common_gen/*/tables/runs/*"))) == 9
        later = (tmp_path / "page.md").read_text()
        assert "| common_gen | 8 epochs | 2 |" in later
        assert "| 4 epochs | full |" in later
        for path in (tmp_path / "run").glob("common_gen/*/grid.yaml"):
            task = next(settings(p3.read_grid(path))).build()
            assert task.counts["pool"][0]["cut"] == 0
            assert (len(task.pool), len(task.target)) == (30, 8)
            assert len(task.pool.source_names) == 6

    def test_a_grid_with_a_ranking_and_a_model_of_ones_own(self, file, tmp_path):
        words = [*self.given(tmp_path), "--file", f"p3={file}"]
        assert p3.main([*words, "--budgets", "8 epochs", "--methods", "full", "--seeds", "1"]) == 0
        (model,) = (tmp_path / "models").glob("tiny-*")
        sections = yaml.safe_load((tmp_path / "config.yaml").read_text())
        del sections["pretraining"], sections["sizes"]
        ranking = {"method": "bm25", "label": "ranked and target", "options": {"target_fraction": "by size"}}
        peft = {"type": "lora", "r": 2, "target_modules": ["q_proj"]}
        sections |= {
            "models": [{"label": "own", "task": {"model": str(model), "peft": peft}}],
            "methods": ["cads", "full", ranking], "evaluations": ["choices"], "seeds": 1, "budgets": ["8 epochs"],
        }  # fmt: skip
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(sections))
        words[0] = str(tmp_path / "other.yaml")
        words[words.index("--out") + 1] = str(tmp_path / "other")
        assert p3.main(words) == 0
        page = (tmp_path / "page.md").read_text()
        for part in ("r 2", "| ranked and target |", "1 pairs of target and budget", "--file p3=PATH"):
            assert part in page
        assert "## Accuracy" not in page
        assert "## Bars" not in page
        assert str(file) not in page
        assert (tmp_path / "other-methods.png").stat().st_size > 1000
        (tmp_path / "page.md").unlink()
        assert p3.main([*words, "--no-run"]) == 0
        assert (tmp_path / "page.md").read_text() == page

    def test_unknown_flags_are_refused(self, file, tmp_path, capsys):
        words = [*self.given(tmp_path), "--file"]
        assert p3.main([*words, f"other={file}"]) == 1
        assert p3.main([*words, f"p3={file}", "--targets", "quarel"]) == 1
        assert "choose from ['common_gen']" in " ".join(capsys.readouterr().out.split())


def test_a_page_without_cells_says_so():
    assert "no cell is finished" in report("p3", "command", [], [], figure=False)


def run(method: str, seed: int, score: float, task: str = "quartz", status: str = "done") -> dict:
    """A row of the table `runs`."""
    return {
        "task": task, "model": "1M", "method": method, "selector": method, "budget": "1 epochs", "seed": seed,
        "cell": f"{method}-{seed}", "status": status, "metric": "loss", "maximised": False, "score": score,
        "metrics": json.dumps({"loss": score, "choices": 0.5}), "budget_flops": 1.0, "selection_flops": 0.0,
        "selection_flops_spent": 0.0, "training_flops": 1.0, "full_flops": 1.0, "n_selected": 1, "n_pool": 4,
        "shares": json.dumps({"quartz_a": 0.5, "dream_a": 0.25, "ropes_a": 0.125, "ropes_b": 0.125}),
    }  # fmt: skip


RIVALS = [
    *(run("cads", seed, 1.0 + seed) for seed in range(3)),
    *(run("bm25", seed, 1.5 + seed) for seed in range(3)),
    *(run("full", seed, 0.75 + seed) for seed in range(2)),
    *(run("cads", seed, 2.0, "dream") for seed in range(2)),
    *(run("bm25", seed, 1.5, "dream") for seed in range(2)),
    run("less", 0, 0.0, status="over budget"),
]


class TestRivals:
    def page(self, chance: float = 0.25) -> str:
        return rivals_report("p3", "command", ["Words."], RIVALS, {"quartz": ("7", chance)}, {"What": "p3.png"})

    def test_differences_are_paired_over_the_seeds_that_both_have(self):
        points = points_of(RIVALS)
        lines = over_targets(points, ["1 epochs"]).splitlines()
        cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].strip("| ") for line in lines}
        assert cells["full"].startswith("+0.250")
        assert cells["full"].endswith("(2)")
        # Thrice -0.5 of one target and twice 0.5 of the other.
        assert cells["bm25"].startswith("-0.100")
        assert cells["bm25"].endswith("(5)")

    def test_the_page_says_what_the_budget_did_not_buy(self):
        page = self.page()
        assert "less at 1 epochs (1)" in page
        assert "`cads` has the lowest mean test loss in 1 of 2 pairs" in page

    def test_accuracy_is_left_out_where_all_methods_guess(self):
        page = self.page()
        assert "blind guesses are right in 25.0%" in page
        assert "| bm25 | 50.0 ± 0.0 |" in page
        page = self.page(chance=0.5)
        assert "No method does more than guess: 50.0% to 50.0%" in page
        assert "| bm25 | 50.0 ± 0.0 |" not in page

    def test_own_templates(self):
        table = self.page().split("## The target's own templates")[1]
        assert "| cads | 1.6 |" in table  # 2 times in quartz, thrice; once in dream, twice

    def test_the_figure(self, tmp_path):
        assert draw_rivals(RIVALS, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000
        assert not draw_rivals([run("full", 0, 1.0)], tmp_path / "none.png")


def test_the_figure_shows_what_was_drawn_at_the_largest_budget(tmp_path):
    def row(budget, seed, shares, n_selected=1):
        head = {"method": "cads", "task": "quartz", "budget": f"{budget} epochs", "seed": seed}
        return {**head, "n_selected": n_selected, "shares": json.dumps(shares)}

    even = {"quartz_a": 0.25, "ropes_a": 0.25, "ropes_b": 0.25, "trec_a": 0.25}
    later = {"quartz_a": 0.5, "ropes_a": 0.25, "ropes_b": 0.15, "trec_a": 0.1}
    runs = [row("0.5", 0, even), row("10", 0, later), row("10", 1, later), row("20", 0, even, n_selected=0)]
    ((key, found),) = p3_figure._panels(runs).items()
    assert key == ("quartz", "10 epochs")
    assert dict(found) == pytest.approx({"quartz": 2.0, "ropes": 0.8, "trec": 0.4})
    assert p3_figure.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert not p3_figure.draw([row("20", 0, even, n_selected=0)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
