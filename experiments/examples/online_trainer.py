"""Select while `transformers.Trainer` trains, on files of text; they need no ids.

Sources are the values of a column `source` of POOL, if there is one. With `trainer_compatible: true` in its
configuration, `cads train` gives the same weights to the last bit.

python -m experiments.examples.online_trainer MODEL POOL TARGET BUDGET OUT
"""

import sys

from transformers import Trainer, TrainingArguments

from cads.integrations.transformers import OnlineSelection
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource

model_name, pool, target, budget, out = sys.argv[1:]
recipe = TrainConfig(batch_size=8, learning_rate=3e-3)
config = LanguageConfig(model=model_name, pool=[TextSource(path=pool)], target=[TextSource(path=target)], n_test=8)

selection = OnlineSelection(config.build(recipe), budget)
model = selection.model()
trainer = Trainer(
    model=model,
    args=TrainingArguments(out, **selection.settings(), save_strategy="steps", save_steps=10, report_to="none"),
    **selection.parts(model),
)
trainer.train()
trainer.save_model(f"{out}/model")
selection.selection().save(f"{out}/selection")
