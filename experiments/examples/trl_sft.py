"""Train on a Selection with TRL's `SFTTrainer`, on the tokens and labels of `cads train`.

It needs `pip install 'cads-select[sft]'`. The loss is averaged over the tokens of a batch, as with `weighting: token`.

python -m experiments.examples.trl_sft MODEL DATA SELECTION OUT
"""

import sys

from trl import SFTConfig, SFTTrainer

from experiments.examples.learned_tokens import learned_tokens

model, data, selection, out = sys.argv[1:]
examples, tokenizer = learned_tokens(selection, data, model)
settings = {"max_steps": 10, "per_device_train_batch_size": 4, "report_to": "none", "bf16": False}
SFTTrainer(
    model=model,
    # The examples are cut already. TRL leaves examples with input_ids and labels as they are.
    args=SFTConfig(out, max_length=None, **settings),
    train_dataset=examples,
    processing_class=tokenizer,
).train()
