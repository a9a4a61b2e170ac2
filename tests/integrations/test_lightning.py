"""The method `cads` in Lightning's trainer: the run is that of `cads train`, and a resumed one that of a whole one."""

import logging

import numpy as np
import pytest

import cads
from cads.accounting.ledger import EVALUATE
from cads.errors import CheckpointError, ConfigError
from cads.integrations.transformers import OnlineSelection
from tests.support.other_trainers import SEED, assert_same_weights, digits_task, sums_task, write_sums

lightning = pytest.importorskip("lightning", reason="needs lightning")

EPOCHS, DIGIT_EPOCHS = "3 epochs", "4 epochs"


@pytest.fixture(autouse=True)
def _quiet():
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def module_of(callback, model):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            return callback.loss(self.model(**batch), labels)

        def configure_optimizers(self):
            return callback.optimizer()

    return Module()


def online(task, budget, folder, *, resume=None, callbacks=(), **changed):
    """The selection and its model after a run."""
    from cads.integrations.lightning import LightningSelection

    selection = OnlineSelection(task, budget, seed=SEED)
    model = selection.model()
    callback = LightningSelection(selection, model)
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": bool(callbacks)}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = lightning.Trainer(callbacks=[callback, *callbacks], **{**settings, **changed})
    trainer.fit(module_of(callback, model), callback.loader(), ckpt_path=resume)
    return selection, model, trainer


def spent(ledger):
    return [record for record in ledger.to_json(seconds=False) if record["phase"] != EVALUATE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("sums"))


@pytest.mark.parametrize(
    ("options", "changed"),
    [({}, {}), ({"clip_norm": 0.1, "optimizer": "sgd"}, {}), ({"precision": "bf16"}, {"precision": "bf16-mixed"})],
    ids=str,
)
def test_texts_give_the_weights_of_cads_train(folder, tmp_path, options, changed):
    trained = cads.train(sums_task(folder, **options), EPOCHS, seed=SEED)
    selection, model, trainer = online(sums_task(folder, **options), EPOCHS, tmp_path, **changed)
    assert_same_weights(trained.model, model)
    assert spent(trained.ledger) == spent(selection.ledger)
    assert trainer.global_step == len(trained.train_result.losses)


def test_weighed_images_give_the_weights_of_cads_train(tmp_path):
    trained = cads.train(digits_task(), DIGIT_EPOCHS, seed=SEED)
    selection, model, _ = online(digits_task(), DIGIT_EPOCHS, tmp_path)
    assert_same_weights(trained.model, model)
    assert spent(trained.ledger) == spent(selection.ledger)
    chosen = cads.select(digits_task(), DIGIT_EPOCHS, seed=SEED)
    np.testing.assert_array_equal(selection.selection().probability, chosen.probability)


def test_a_resumed_run_equals_a_whole_one(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=15, save_top_k=-1)
    selection, whole, trainer = online(digits_task(), DIGIT_EPOCHS, tmp_path, callbacks=[saving])
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(checkpoints) == trainer.global_step // 15 > 2
    for checkpoint in (checkpoints[0], checkpoints[-1]):
        resumed, model, again = online(digits_task(), DIGIT_EPOCHS, tmp_path, resume=str(checkpoint))
        assert_same_weights(whole, model)
        assert spent(resumed.ledger) == spent(selection.ledger)
        assert again.global_step == trainer.global_step
    with pytest.raises(CheckpointError, match="another selection"):
        online(digits_task(), "5 epochs", tmp_path, resume=str(checkpoints[0]))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches = 2, not 1"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val = 1.0, not None"),
        ({"precision": "bf16-mixed"}, "precision = bf16-mixed, not 32-true"),
    ],
)
def test_what_the_recipe_does_not_say_is_refused(tmp_path, changed, match):
    with pytest.raises(ConfigError, match=match):
        online(digits_task(), DIGIT_EPOCHS, tmp_path, **changed)


def test_a_run_that_ends_before_its_budget_says_so(tmp_path, caplog):
    selection, _, trainer = online(digits_task(), DIGIT_EPOCHS, tmp_path, max_steps=5)
    assert trainer.global_step == 5
    assert selection.ledger.left > 0
    assert "the trainer stopped at step 5" in caplog.text
