"""Train on a Selection with TRL's `SFTTrainer`, on the answers alone (`pip install 'cads-select[trl]'`).

python -m experiments.examples.trl_sft MODEL DATA.jsonl SELECTION OUT
"""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from cads.selection import Selection

model, data, selection, out = sys.argv[1:]
chosen = Selection.load(selection).apply(load_dataset("json", data_files=data, split="train"), id_column="id")
pairs = chosen.rename_columns({"response": "completion"}).select_columns(["prompt", "completion"])
SFTTrainer(
    model=model,
    args=SFTConfig(out, max_steps=10, per_device_train_batch_size=4, report_to="none", bf16=False),
    train_dataset=pairs,
).train()
