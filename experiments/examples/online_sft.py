"""Select while TRL's `SFTTrainer` trains, on rows that are tokenised here; they need no ids.

It needs `pip install 'cads-select[sft]'`. Rows have `prompt` and `response`, and a `source` if sources are known.

python -m experiments.examples.online_sft MODEL POOL TARGET BUDGET OUT
"""

import sys
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cads.integrations.transformers import OnlineSelection, tokenised_task
from cads.recipe import TrainConfig

model_name, pool, target, budget, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)


def tokenised(row: dict[str, Any]) -> dict[str, Any]:
    """Prompt and response with the end token; the response is learned."""
    prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
    response = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


rows = {
    name: load_dataset("json", data_files=file, split="train").map(tokenised)
    for name, file in (("pool", pool), ("target", target))
}
columns = ["input_ids", "labels"]
sources = [name for name in ("source",) if name in rows["pool"].column_names]
task = tokenised_task(
    model,
    rows["pool"].select_columns(columns + sources),
    rows["target"].select_columns(columns),
    recipe=TrainConfig(batch_size=8, learning_rate=3e-3),
    tokenizer=tokenizer,
)

selection = OnlineSelection(task, budget)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        out,
        **selection.settings(),
        # The rows are tokenised and cut.
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
    ),
    processing_class=tokenizer,
    **selection.parts(model),
)
trainer.train()
trainer.save_model(f"{out}/model")
selection.selection().save(f"{out}/selection")
