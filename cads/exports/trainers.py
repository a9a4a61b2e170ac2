"""What trainers of language models read: the fields of a row, and their own configuration of a mixture of files.

Read in the sources of LLaMA-Factory 0.9.5 (`data/parser.py`, `data/converter.py`, `hparams/data_args.py`), axolotl
0.19.0 (`utils/schemas/datasets.py`, `prompt_strategies/`) and TRL 1.16.0 (`scripts/utils.py`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from cads.errors import ConfigError
from cads.exports.mixture_parts import Mixture
from cads.exports.training_rows import TrainingRow


@dataclass(frozen=True)
class RowFacts:
    """What is true of all rows together.

    Attributes:
        kind: "text", "pair" or "chat".
        learns_last: whether of every chat the last message is learned, and no other.
        learns_all: whether of every chat each message of the assistant is learned.
        tools: whether a chat has tools.
        calls: whether a message holds more than role and content, or a tool speaks.
    """

    kind: str
    learns_last: bool
    learns_all: bool
    tools: bool
    calls: bool


class TrainerFormat(ABC):
    """The format of one trainer.

    Attributes:
        name: of the trainer.
        mixes: whether its configuration takes the shares of data sets.
        marks: whether it can be told which messages are learned.
        command: that trains by the written configuration.
    """

    name: ClassVar[str]
    mixes: ClassVar[bool] = True
    marks: ClassVar[bool] = False
    command: ClassVar[str]

    def check(self, facts: RowFacts) -> None:
        """Refuse rows that the trainer cannot read.

        Raises:
            ConfigError: with the remedy.
        """
        return

    @abstractmethod
    def record(self, row: TrainingRow, facts: RowFacts) -> dict[str, Any]:
        """The fields of a row."""

    @abstractmethod
    def files(self, mixture: Mixture, paths: Mapping[str, str], folder: str, facts: RowFacts) -> dict[str, str]:
        """Text by the name of each configuration file.

        Args:
            paths: of the file of each part, by its key, as a command in the present folder finds it.
            folder: that holds all files, in the same form.
        """

    def omits(self, row: TrainingRow, facts: RowFacts) -> bool:
        """Whether other messages of a row are learned by the trainer than in training by cads."""
        if row.kind != "chat" or self.marks:
            return False
        return not (row.learns_last if facts.learns_last else row.learns_all)


class LlamaFactory(TrainerFormat):
    """`dataset_info.json`, and a YAML file with `mix_strategy` and `interleave_probs`."""

    name = "llamafactory"
    command = "llamafactory-cli train YOURS.yaml, into which llamafactory.yaml is copied"

    def check(self, facts: RowFacts) -> None:
        """Refuse prompts without a chat."""
        if facts.kind == "pair":
            raise ConfigError(
                "chat = false: LLaMA-Factory writes every prompt by the `template` of its own configuration; leave "
                "chat true, and choose the template there"
            )

    def record(self, row: TrainingRow, facts: RowFacts) -> dict[str, Any]:
        """Text, or messages and tools as JSON."""
        if row.kind == "text":
            return {"text": row.text}
        tools = {"tools": json.dumps(row.tools, ensure_ascii=False) if row.tools else ""} if facts.tools else {}
        return {"messages": list(row.messages), **tools}

    def files(self, mixture: Mixture, paths: Mapping[str, str], folder: str, facts: RowFacts) -> dict[str, str]:
        """The description of each file, and the settings of their mixture."""
        columns: dict[str, Any] = {"columns": {"prompt": "text"}}
        if facts.kind == "chat":
            columns = {
                "formatting": "openai" if facts.calls else "sharegpt",
                "columns": {"messages": "messages", **({"tools": "tools"} if facts.tools else {})},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                    "observation_tag": "tool",
                    "function_tag": "function_call",
                    "system_tag": "system",
                },
            }
        described = {part.key: {"file_name": f"data/{part.key}.jsonl", **columns} for part in mixture.parts}
        settings: dict[str, Any] = {"stage": "pt" if facts.kind == "text" else "sft", "dataset_dir": folder}
        settings["dataset"] = ",".join(described)
        settings["mix_strategy"] = "concat" if mixture.concatenated else "interleave_under"
        if not mixture.concatenated:
            settings["interleave_probs"] = ",".join(repr(part.share) for part in mixture.parts)
        if facts.kind == "chat" and facts.learns_last and not facts.learns_all:
            settings["mask_history"] = True
        return {
            "dataset_info.json": json.dumps(described, indent=2, ensure_ascii=False) + "\n",
            "llamafactory.yaml": self.head(mixture) + _yaml(settings),
        }

    def head(self, mixture: Mixture) -> str:
        """What the configuration says of itself."""
        ratios = [
            "An epoch is as long as the first source lasts. interleave_over goes on until all rows were seen, and",
            "repeats rows; max_steps ends either.",
        ]
        return _comment([f"For {self.command}.", *([] if mixture.concatenated else ratios)])


class Axolotl(TrainerFormat):
    """The `datasets` of a configuration; it takes no shares, so that the numbers of rows hold them."""

    name = "axolotl"
    mixes = False
    marks = True
    command = "axolotl train YOURS.yaml, into which axolotl.yaml is copied"

    def record(self, row: TrainingRow, facts: RowFacts) -> dict[str, Any]:
        """Text, prompt and completion, or messages, each marked where not all answers are learned."""
        if row.kind == "text":
            return {"text": row.text}
        if row.kind == "pair":
            return {"prompt": row.prompt, "completion": row.response}
        messages = list(row.messages)
        if not facts.learns_all:
            messages = [{**m, "train": learned} for m, learned in zip(row.messages, row.learned, strict=True)]
        return {"messages": messages, **({"tools": row.tools or []} if facts.tools else {})}

    def files(self, mixture: Mixture, paths: Mapping[str, str], folder: str, facts: RowFacts) -> dict[str, str]:
        """The list of data sets."""
        form: dict[str, Any] = {"type": "completion", "field": "text"}
        if facts.kind == "pair":
            plain = "{instruction}"
            names = {"field_instruction": "prompt", "field_output": "completion"}
            form = {"type": {**names, "format": plain, "no_input_format": plain}}
        if facts.kind == "chat":
            form = {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}
            form |= {} if facts.learns_all else {"message_field_training": "train"}
            form |= {"train_on_eos": "turn"}
        listed = [{"path": paths[part.key], "ds_type": "json", **form} for part in mixture.parts]
        head = [
            f"For {self.command}.",
            "The numbers of rows hold the shares of the sources.",
            "axolotl knows prepared data by these paths: empty its dataset_prepared_path after another export here.",
        ]
        return {"axolotl.yaml": _comment(head) + _yaml({"datasets": listed})}


class Trl(TrainerFormat):
    """The `datasets` of TRL's scripts, each with its `fraction` of the mixture."""

    name = "trl"
    command = "trl sft --config trl.yaml --model_name_or_path MODEL --output_dir FOLDER"

    def record(self, row: TrainingRow, facts: RowFacts) -> dict[str, Any]:
        """Text, prompt and completion, or messages."""
        if row.kind == "text":
            return {"text": row.text}
        if row.kind == "pair":
            return {"prompt": row.prompt, "completion": row.response}
        tools = {"tools": row.tools or []} if facts.tools else {}
        if facts.learns_last:
            return {"prompt": list(row.messages[:-1]), "completion": list(row.messages[-1:]), **tools}
        return {"messages": list(row.messages), **tools}

    def files(self, mixture: Mixture, paths: Mapping[str, str], folder: str, facts: RowFacts) -> dict[str, str]:
        """The list of data sets, and what is learned of conversations."""
        columns = ["text"] if facts.kind == "text" else ["prompt", "completion"]
        settings: dict[str, Any] = {}
        if facts.kind == "chat" and not facts.learns_last:
            columns, settings = ["messages"], {"assistant_only_loss": True}
        columns += ["tools"] if facts.tools else []
        listed: list[dict[str, Any]] = [
            {
                "path": "json",
                "data_files": paths[part.key],
                "split": "train",
                "columns": columns,
                **({} if mixture.concatenated else {"fraction": part.share}),
            }
            for part in mixture.parts
        ]
        head = [f"For {self.command}."]
        if not mixture.concatenated:
            head.append("TRL keeps the first rows of each source, as many as its fraction allows: none is repeated.")
        return {"trl.yaml": _comment(head) + _yaml({"datasets": listed, **settings})}


TRAINERS: dict[str, TrainerFormat] = {form.name: form for form in (LlamaFactory(), Axolotl(), Trl())}
"""By the name that `--to` takes."""


def _comment(lines: Sequence[str]) -> str:
    return "".join(f"# {line}\n" for line in ["Written by cads export.", *lines])


class _WrittenOut(yaml.SafeDumper):
    """YAML in which what comes twice is written twice, for people to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(settings: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(settings), Dumper=_WrittenOut, sort_keys=False, allow_unicode=True)
    return text
