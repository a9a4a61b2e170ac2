"""Train on a Selection with `transformers.Trainer`.

python -m experiments.examples.transformers_trainer MODEL DATA.jsonl SELECTION OUT
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from cads.selection import Selection

model, data, selection, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
chosen = Selection.load(selection).apply(load_dataset("json", data_files=data, split="train"), id_column="id")
tokens = chosen.map(
    lambda row: tokenizer(row["prompt"] + "\n" + row["response"] + tokenizer.eos_token),
    remove_columns=chosen.column_names,
)
Trainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=TrainingArguments(out, max_steps=10, per_device_train_batch_size=4, report_to="none"),
    train_dataset=tokens,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
).train()
