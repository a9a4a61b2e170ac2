"""Train on a Selection with `transformers.Trainer`, on the tokens and labels of `cads train`.

The Trainer averages the loss over the tokens of a batch, as `cads train` does with `weighting: token`.

python -m experiments.examples.transformers_trainer MODEL DATA SELECTION OUT
"""

import sys

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from experiments.examples.learned_tokens import learned_tokens

model, data, selection, out = sys.argv[1:]
examples, tokenizer = learned_tokens(selection, data, model)
Trainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=TrainingArguments(out, max_steps=10, per_device_train_batch_size=4, report_to="none"),
    train_dataset=examples,
    # It fills labels up with -100. A collator that masks the padding token masks all ends where the two are one.
    data_collator=DataCollatorForSeq2Seq(tokenizer),
).train()
